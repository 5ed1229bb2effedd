"""Features by a network of one's own, from a TorchScript or torch.export file (network_file.py)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from improved_diffusion.config import check_choices, check_positive, option
from improved_diffusion.data.metric_weights import sha256
from improved_diffusion.evaluation.metrics import FeatureExtractor
from improved_diffusion.evaluation.network_file import RANGES, RANGES_HELP, NetworkFile, shape_of

LAYOUTS = ("video", "frames")


class FileFeatures(FeatureExtractor):
    """What the network of a file returns, averaged over tokens, frames and calls."""

    shared = True

    @dataclass(frozen=True)
    class Options:
        """The file, and what its network takes."""

        feature_file: str | None = option(None, "the same as --features FILE")
        feature_size: int | None = option(
            None, "height and width of the frames that the network of --features FILE takes"
        )
        feature_range: str | None = option(
            None, f"their values: {RANGES_HELP}", choices=tuple(RANGES)
        )
        feature_layout: str = option(
            "video", "what it takes: video [1, 3, T, H, W], or frames [T, 3, H, W]", choices=LAYOUTS
        )
        feature_frames: int | None = option(
            None, "frames of one call of it, T above (default: all of the video)"
        )

        def __post_init__(self) -> None:
            check_choices(self)
            check_positive(self, "feature_size", "feature_frames")

    def settings(self) -> dict[str, Any]:
        options = self.options
        if options.feature_file is None:
            raise ValueError("--features file: name the file itself, --features FILE")
        if options.feature_size is None or options.feature_range is None:
            raise ValueError(
                f"--features {options.feature_file}: say what its network takes, with "
                "--feature_size and --feature_range"
            )
        return {
            "weights_sha256": sha256(options.feature_file),
            "size": options.feature_size,
            "range": options.feature_range,
            "layout": options.feature_layout,
            "frames": options.feature_frames or "all",
        }

    def compute(self, video: np.ndarray) -> np.ndarray:
        count = self.options.feature_frames or len(video)
        if len(video) < count:
            raise ValueError(
                f"videos of {len(video)} frames are too short for --feature_frames {count}"
            )
        of_frames = self.options.feature_layout == "frames"
        rows = []
        for start, fresh in _windows(len(video), count):
            found = self._call(video[start : start + count])
            # What an earlier call has seen already counts once.
            rows.append(found[count - fresh :] if of_frames else found)
        return np.concatenate(rows).mean(axis=0)

    def _call(self, frames: np.ndarray) -> np.ndarray:
        """[1, d] of a video, or [T, d] of frames uint8 [T, 3, H, W], float64.

        Raises ValueError for a network that does not take them or returns something else.
        """
        import torch

        options = self.options
        network = NetworkFile(
            options.feature_file,
            device=self.device,
            check="--feature_size, --feature_layout and --feature_frames",
        )
        x = network.frames(frames, options.feature_size, options.feature_range)
        x = x.transpose(0, 1)[None] if options.feature_layout == "video" else x
        found = network(x)
        if not isinstance(found, torch.Tensor) or found.ndim < 2 or len(found) != len(x):
            raise ValueError(
                f"{options.feature_file} returns {shape_of(found)} for {list(x.shape)}, not "
                f"[{len(x)}, d] or [{len(x)}, tokens, d]: check --feature_layout, or export it with "
                "such an output"
            )
        tokens = found.double().reshape(len(found), -1, found.shape[-1])
        return tokens.mean(dim=1).cpu().numpy()


def _windows(length: int, count: int) -> Iterator[tuple[int, int]]:
    """(first frame, frames not seen before) of windows of `count` frames that cover a video.

    The last one ends with the video and may overlap the one before.
    """
    for start in range(0, length, count):
        yield min(start, length - count), min(count, length - start)
