"""Memory measured lap by lap, on videos that repeat themselves after a known period (maze_laps).

Once a whole lap is observed every later frame is determined, so the distance to the truth measures
memory and nothing else. Laps count from where the observed frames end: lap 1 is observed, lap 2 are
the first `period` frames after it, and so on.
"""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np

from improved_diffusion.evaluation.metrics import (
    FrameMetric,
    Lpips,
    Psnr,
    SampleMetric,
    Ssim,
    TrueVideo,
)

LAPS = (2, 3, 4)
OF_SAMPLES = ("samples", "own last lap")
REFERENCES = ("one period earlier", "last observed frame")
PREDICTIONS = OF_SAMPLES + REFERENCES


class LapMetric(SampleMetric):
    """A metric of frames, averaged over laps 2, 3 and 4 of each of PREDICTIONS; see `predictions`.

    Decibels are averaged as squared errors: a repeated frame meets its own copy once in every lap, whose
    psnr is inf. A lap that the video is too short for is nan.
    """

    columns = tuple(f"lap {lap}: {name}" for name in PREDICTIONS for lap in LAPS)
    reference_columns = tuple(f"lap {lap}: {name}" for name in REFERENCES for lap in LAPS)
    of_frames: ClassVar[type[FrameMetric]]  # the metric that is averaged

    def __init__(self, options: Any = None, *, device: str = "cpu") -> None:
        super().__init__(options, device=device)
        self.metric = self.of_frames(self.options, device=device)

    def settings(self) -> dict[str, Any]:
        return self.metric.settings()

    def compute(self, sample: np.ndarray, truth: TrueVideo) -> np.ndarray:
        """Raises ValueError also where no period is known, or less than a lap is observed."""
        numbers = lap_numbers(truth)
        pairs = predictions(sample, truth)
        decibels = self.metric.unit == "dB"
        return np.concatenate(
            [
                mean_by_lap(self.metric.compute(*pair), numbers, truth.period, decibels=decibels)
                for pair in pairs.values()
            ]
        )


class LapPsnr(LapMetric):
    """Peak signal-to-noise ratio of each lap's mean squared error."""

    unit = "dB"
    higher_is_better = True
    of_frames = Psnr


class LapSsim(LapMetric):
    """Structural similarity lap by lap."""

    higher_is_better = True
    Options = Ssim.Options
    of_frames = Ssim


class LapLpips(LapMetric):
    """LPIPS lap by lap."""

    higher_is_better = False
    Options = Lpips.Options
    of_frames = Lpips


def lap_numbers(truth: TrueVideo) -> np.ndarray:
    """int64 [n]: the lap that each predicted frame belongs to, from 2 on.

    Raises ValueError where laps are not known, less than one is observed, so that the rest is not
    determined, or frames after the first sampled one are observed, too.
    """
    predicted, period = truth.predicted, truth.period
    start, end = predicted[0], len(truth.frames)
    if not period:
        raise ValueError(
            f"the videos of {truth.dataset} do not repeat themselves after a known period: laps can be "
            "scored on maze_laps, and on folders that keep maps/ as it does"
        )
    if period > start:
        raise ValueError(
            f"--obs_length {start}: a lap of this video has {period} frames, observe at least so many"
        )
    if len(predicted) != end - start:
        raise ValueError("laps can be scored only where all observed frames are at the start")
    return lap_of(predicted, start, period)


def lap_of(frames: np.ndarray, start: int, period: int) -> np.ndarray:
    """int64 [n]: the laps of frames [n], where `start` is the first sampled one; lap 1 was observed."""
    return np.maximum(1, 2 + (frames - start) // period)


def mean_by_lap(
    values: np.ndarray, numbers: np.ndarray, period: int, *, decibels: bool = False
) -> np.ndarray:
    """The means of `values` [n] over the frames of each of LAPS; nan where one is not complete.

    numbers: [n] from `lap_numbers`. decibels: average squared errors instead.
    """
    values = 10 ** (-values / 10) if decibels else values
    laps = [values[numbers == lap] for lap in LAPS]
    means = np.array([lap.mean() if len(lap) == period else np.nan for lap in laps])
    with np.errstate(divide="ignore"):
        return -10 * np.log10(means) if decibels else means


def predictions(sample: np.ndarray, truth: TrueVideo) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """What is compared with what, by PREDICTIONS, each uint8 [n, 3, H, W]: the predicted frames.

    "samples" with the truth; "own last lap": each sampled frame with the sample one period before,
    which tells whether a video agrees with itself, right or wrong; and two predictions that need no
    network, with the truth: "one period earlier", perfect memory, and "last observed frame".
    """
    later = truth.predicted
    earlier, last = later - truth.period, np.full_like(later, later[0] - 1)
    frames = truth.frames
    pairs = (
        (sample[later], frames[later]),
        (sample[later], sample[earlier]),
        (frames[earlier], frames[later]),
        (frames[last], frames[later]),
    )
    return dict(zip(PREDICTIONS, pairs, strict=True))
