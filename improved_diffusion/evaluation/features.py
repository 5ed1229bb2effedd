"""What distances between sets of videos are computed from: extractors of features.

An extractor is one class here and one line of `registry.FEATURES`. No torch is imported before
something is computed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from improved_diffusion.config import check_choices, option
from improved_diffusion.data.metric_weights import find_alexnet, sha256
from improved_diffusion.evaluation.metrics import (
    LPIPS_CHUNK,
    PRECISIONS,
    FeatureExtractor,
    arithmetic,
    said_precision,
)
from improved_diffusion.frechet_video_distance import (
    BACKENDS,
    RESIZES,
    video_features,
    weights_path,
)


class I3DFeatures(FeatureExtractor):
    """The 400 logits of I3D, of the whole video at once; at least 10 frames."""

    shared = True

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
        i3d_precision: str = option(
            "fp32", "arithmetic of I3D in torch; bf16 is said beside the number", choices=PRECISIONS
        )

        def __post_init__(self) -> None:
            check_choices(self)
            if self.backend != "torch" and self.i3d_precision != "fp32":
                raise ValueError(
                    f"--i3d_precision {self.i3d_precision} goes with --backend torch: drop one"
                )

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
        } | said_precision(options.i3d_precision)

    def compute(self, video: np.ndarray) -> np.ndarray:
        with arithmetic(self.options.i3d_precision, self.device):
            return video_features(
                video[None],
                backend=self.options.backend,
                resize=self.options.resize,
                weights=self.options.i3d_weights,
                device=self.device,
            )[0]


class AlexNetFeatures(FeatureExtractor):
    """The last convolution of LPIPS's AlexNet, averaged over pixels and frames: 256 numbers.

    They tell what frames look like and nothing of their order.
    """

    shared = True

    @dataclass(frozen=True)
    class Options:
        """The weights."""

        alexnet_weights: str | None = option(
            None, "AlexNet file of its features (default: what fetch_metric_weights.py stored)"
        )

    def settings(self) -> dict[str, Any]:
        return {"weights_sha256": sha256(find_alexnet(self.options.alexnet_weights))}

    def compute(self, video: np.ndarray) -> np.ndarray:
        from improved_diffusion.data.frame_batch import to_symmetric
        from improved_diffusion.sampling.lpips_util import last_features

        sums = [
            last_features(
                to_symmetric(video[i : i + LPIPS_CHUNK]),
                weights=self.options.alexnet_weights,
                device=self.device,
            ).sum(axis=0, dtype=np.float64)
            for i in range(0, len(video), LPIPS_CHUNK)
        ]
        return np.sum(sums, axis=0) / len(video)


class MotionFeatures(FeatureExtractor):
    """How much frames change, at which pace and how evenly: 12 numbers, from differences alone.

    For each of six amounts of change the mean and the standard deviation over time of its logarithm:
    the mean absolute difference of frames 1, 2, 4 and 8 apart, of frames 1 apart once blocks of 4x4
    pixels are averaged, and of neighbouring differences. No network and no optical flow: a video
    whose frames are shuffled, frozen or jump differs, one whose objects move elsewhere may not.
    """

    LAGS = (1, 2, 4, 8)
    BLOCK = 4
    MIN_FRAMES = 10
    # Below about a tenth of a level of grey a change counts as none.
    SMALLEST = 0.1 / 255

    def compute(self, video: np.ndarray) -> np.ndarray:
        if len(video) < self.MIN_FRAMES or min(video.shape[2:]) < self.BLOCK:
            raise ValueError(
                f"a video of {len(video)} frames of {video.shape[2]}x{video.shape[3]} has no motion "
                f"features: they need {self.MIN_FRAMES} frames of {self.BLOCK}x{self.BLOCK}"
            )
        amounts = [_changes(video, {0: -1, lag: 1}) for lag in self.LAGS]
        amounts.append(_changes(video, {0: -1, 1: 1}, block=self.BLOCK))
        amounts.append(_changes(video, {0: 1, 1: -2, 2: 1}))
        logs = [np.log(amount + self.SMALLEST) for amount in amounts]
        return np.array([number for log in logs for number in (log.mean(), log.std())])


def _changes(video: np.ndarray, factors: dict[int, int], block: int = 1) -> np.ndarray:
    """The mean absolute value, in [0, 2], of a combination of frames at each time, float64.

    factors: {frames later: factor}. block: sides of the squares over which pixels are averaged first.
    """
    values = []
    for time in range(len(video) - max(factors)):
        change = sum(factor * video[time + k].astype(np.float32) for k, factor in factors.items())
        height, width = (size // block for size in video.shape[2:])
        cut = np.asarray(change)[:, : height * block, : width * block]
        blocks = cut.reshape(-1, height, block, width, block).mean(axis=(2, 4))
        values.append(abs(blocks).mean(dtype=np.float64) / 255)
    return np.array(values)
