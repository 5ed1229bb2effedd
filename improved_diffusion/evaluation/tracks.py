"""How points of a video move: FVMD's histograms of velocity and acceleration, from a tracker of one's own.

Source: Liu et al. 2024, Fréchet Video Motion Distance (arXiv 2407.16124), its dense 1D histograms.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from improved_diffusion.config import check_choices, check_positive, option
from improved_diffusion.data.metric_weights import sha256
from improved_diffusion.evaluation.metrics import FeatureExtractor
from improved_diffusion.evaluation.network_file import RANGES, RANGES_HELP, NetworkFile, shape_of

# Vectors are gathered over so many frames, and over so many points of the grid each way.
TUBE_FRAMES, TUBE_POINTS = 4, 5
ANGLE_BINS = 8
# Longer vectors count as ones of this length in pixels, which is 2^8 - 1.
LONGEST = 255


class TrackFeatures(FeatureExtractor):
    """The histograms of `motion_histogram`, averaged over segments of a video.

    Segments share one frame; frames after the last whole one are left out.
    """

    shared = True

    @dataclass(frozen=True)
    class Options:
        """The tracker's file, and what it takes."""

        tracker: str | None = option(
            None,
            "TorchScript or torch.export file that follows the points of a square grid: of frames "
            "[1, 3, T, H, W] it returns their places (x, y) in pixels, [1, T, points, 2]",
        )
        tracker_size: int | None = option(
            None, "height and width of the frames that --tracker takes (FVMD: 256)"
        )
        tracker_range: str | None = option(
            None, f"their values: {RANGES_HELP}", choices=tuple(RANGES)
        )
        tracker_frames: int = option(16, "frames of one call of it, T above")

        def __post_init__(self) -> None:
            check_choices(self)
            check_positive(self, "tracker_size")
            if self.tracker_frames < TUBE_FRAMES:
                raise ValueError(
                    f"--tracker_frames {self.tracker_frames}: must be {TUBE_FRAMES} or more"
                )

    def settings(self) -> dict[str, Any]:
        options = self.options
        if options.tracker is None:
            raise ValueError("motion of tracked points needs a tracker: name its file, --tracker")
        if options.tracker_size is None or options.tracker_range is None:
            raise ValueError(
                f"--tracker {options.tracker}: say what it takes, with --tracker_size and "
                "--tracker_range"
            )
        return {
            "tracker_sha256": sha256(options.tracker),
            "size": options.tracker_size,
            "range": options.tracker_range,
            "frames": options.tracker_frames,
        }

    def compute(self, video: np.ndarray) -> np.ndarray:
        count = self.options.tracker_frames
        if len(video) < count:
            raise ValueError(
                f"videos of {len(video)} frames are too short for --tracker_frames {count}"
            )
        starts = range(0, len(video) - count + 1, count - 1)
        segments = [motion_histogram(self._tracks(video[i : i + count])) for i in starts]
        return np.mean(segments, axis=0)

    def _tracks(self, frames: np.ndarray) -> np.ndarray:
        """float64 [T, side, side, 2] of uint8 [T, 3, H, W]. Raises ValueError for another output."""
        import torch

        options = self.options
        network = NetworkFile(
            options.tracker, device=self.device, check="--tracker_size and --tracker_frames"
        )
        x = network.frames(frames, options.tracker_size, options.tracker_range)
        found = network(x.transpose(0, 1)[None])
        side = 0
        if isinstance(found, torch.Tensor) and found.ndim == 4:
            side = round(found.shape[2] ** 0.5)
        if side < TUBE_POINTS or tuple(found.shape) != (1, len(frames), side**2, 2):
            raise ValueError(
                f"{options.tracker} returns {shape_of(found)} for {len(frames)} frames, not "
                f"[1, {len(frames)}, points, 2] of a square grid of {TUBE_POINTS} x {TUBE_POINTS} points "
                "or more, row by row: export it with such an output"
            )
        if not bool(found.isfinite().all()):
            raise ValueError(f"{options.tracker} returns places that are not finite")
        return found.double().cpu().numpy().reshape(len(frames), side, side, 2)


def motion_histogram(tracks: np.ndarray) -> np.ndarray:
    """Which way points move, and how fast, and the same of the change of that, float64 [d].

    tracks: float [T, side, side, 2], places (x, y) in pixels of a grid of points. Velocity is the
    difference of neighbouring frames, 0 in the first one, acceleration that of neighbouring velocities,
    0 in the first two. Both are gathered in tubes of TUBE_FRAMES x TUBE_POINTS x TUBE_POINTS, eight
    angles each; frames and points that fill no tube are left out. d = 2 x 8 x tubes; 1024 of FVMD's 16
    frames of 20 x 20 points.
    """
    velocity, acceleration = np.zeros_like(tracks), np.zeros_like(tracks)
    velocity[1:] = np.diff(tracks, axis=0)
    acceleration[2:] = np.diff(tracks, n=2, axis=0)
    return np.concatenate([_histogram(velocity).ravel(), _histogram(acceleration).ravel()])


def _histogram(vectors: np.ndarray) -> np.ndarray:
    """Of [T, side, side, 2] the sum of magnitudes by angle in each tube: [tubes in T, y, x, 8].

    A magnitude m counts as the whole number above log2(1 + m), of 8. Angles are told from the y axis on,
    as the published code does: where an edge between bins belongs depends on it.
    """
    frames, side = len(vectors) // TUBE_FRAMES, vectors.shape[1] // TUBE_POINTS
    x, y = np.moveaxis(
        vectors[: frames * TUBE_FRAMES, : side * TUBE_POINTS, : side * TUBE_POINTS], -1, 0
    )
    turn = (np.arctan2(x, y) + np.pi) / (2 * np.pi)
    angles = np.minimum((ANGLE_BINS * turn).astype(int), ANGLE_BINS - 1)
    bits = np.log2(1 + np.minimum(np.hypot(x, y), LONGEST))
    weights = np.ceil(bits) / np.log2(1 + LONGEST)
    by_angle = np.where(angles[..., None] == np.arange(ANGLE_BINS), weights[..., None], 0)
    shape = frames, TUBE_FRAMES, side, TUBE_POINTS, side, TUBE_POINTS, ANGLE_BINS
    return by_angle.reshape(shape).sum(axis=(1, 3, 5))
