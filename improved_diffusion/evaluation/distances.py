"""Further distances between sets of videos, beside FVD and KVD of `metrics`.

Each is one class here and one line of `registry.VIDEO_METRICS`.
"""

from __future__ import annotations

import numpy as np

from improved_diffusion.evaluation.metrics import VideoMetric
from improved_diffusion.frechet_video_distance import (
    extrapolated_frechet_distance,
    frechet_distance,
    jedi_distance,
)


class FvdInfinity(VideoMetric):
    """Fréchet distance extrapolated to infinitely many videos (computed in float64)."""

    higher_is_better = False

    def compute(self, samples: np.ndarray, truth: np.ndarray) -> float:
        return extrapolated_frechet_distance(samples, truth)


class Jedi(VideoMetric):
    """JEDi's distance: 100 x biased MMD with the kernel (x.y / d)^2; JEDi itself is on V-JEPA."""

    higher_is_better = False

    def compute(self, samples: np.ndarray, truth: np.ndarray) -> float:
        return jedi_distance(samples, truth)


class Motion(VideoMetric):
    """Fréchet distance of statistics of frame differences, whatever --features are."""

    features = "motion"
    higher_is_better = False

    def compute(self, samples: np.ndarray, truth: np.ndarray) -> float:
        return frechet_distance(samples, truth)


class Fvmd(Motion):
    """FVMD's: Fréchet distance of histograms of tracked points' velocity and acceleration.

    Source: Liu et al. 2024 (arXiv 2407.16124), there of segments of all videos, here of their mean in
    each video, so that videos are what is sampled.
    """

    features = "tracks"
