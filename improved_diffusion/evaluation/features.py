"""What distances between sets of videos are computed from: extractors of features.

An extractor is one class here and one line of `registry.FEATURES`. No torch is imported before
something is computed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from improved_diffusion.config import check_choices, option
from improved_diffusion.data.metric_weights import sha256
from improved_diffusion.evaluation.metrics import FeatureExtractor
from improved_diffusion.frechet_video_distance import (
    BACKENDS,
    RESIZES,
    video_features,
    weights_path,
)


class I3DFeatures(FeatureExtractor):
    """The 400 logits of I3D, of the whole video at once; at least 10 frames."""

    @dataclass(frozen=True)
    class Options:
        """How I3D is computed, and with which weights."""

        backend: str = option("torch", "what computes FVD and KVD", choices=BACKENDS)
        resize: str = option(
            "legacy",
            "how FVD and KVD scale frames: TF1's way, as published numbers do, or today's",
            choices=RESIZES,
        )
        i3d_weights: str | None = option(
            None, "I3D file, or TF-Hub folder (default: what fetch_metric_weights.py stored)"
        )

        def __post_init__(self) -> None:
            check_choices(self)

    @property
    def backend(self) -> str:
        return self.options.backend

    def settings(self) -> dict[str, Any]:
        options = self.options
        weights = weights_path(options.backend, options.i3d_weights)
        return {
            "backend": options.backend,
            "resize": options.resize,
            "weights_sha256": sha256(weights),
        }

    def compute(self, video: np.ndarray) -> np.ndarray:
        return video_features(
            video[None],
            backend=self.options.backend,
            resize=self.options.resize,
            weights=self.options.i3d_weights,
            device=self.device,
        )[0]
