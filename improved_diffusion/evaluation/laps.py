"""Memory measured lap by lap, on videos that repeat themselves after a known period (maze_laps).

Once a whole lap is observed every later frame is determined, so the distance to the truth measures
memory and nothing else. Laps count from where the observed frames end: lap 1 is observed, lap 2 are
the first `period` frames after it, and so on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from improved_diffusion.evaluation.metrics import FrameMetric

LAPS = (2, 3, 4)


def lap_numbers(num_frames: int, obs_length: int, period: int) -> np.ndarray:
    """int64 [T]: the lap that each frame belongs to; 0 where it is observed.

    Raises ValueError where less than a lap is observed, since the rest is not determined then.
    """
    if not 1 <= period <= obs_length:
        raise ValueError(
            f"--obs_length {obs_length}: a lap of this video has {period} frames, "
            "observe at least so many"
        )
    frames = np.arange(num_frames)
    return np.where(frames < obs_length, 0, 2 + (frames - obs_length) // period)


def mean_by_lap(
    values: np.ndarray, numbers: np.ndarray, period: int, *, decibels: bool = False
) -> np.ndarray:
    """The means of `values` [T] over the frames of each of LAPS; nan where one is not complete.

    Decibels are averaged as squared errors: a repeated frame meets its own copy once in every lap, whose
    psnr is inf. numbers: [T] from `lap_numbers`.
    """
    values = 10 ** (-values / 10) if decibels else values
    laps = [values[numbers == lap] for lap in LAPS]
    means = np.array([lap.mean() if len(lap) == period else np.nan for lap in laps])
    with np.errstate(divide="ignore"):
        return -10 * np.log10(means) if decibels else means


def predictions(
    samples: np.ndarray, truth: np.ndarray, obs_length: int, period: int
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """What is compared with what, each uint8 [T - obs_length, 3, H, W], from the first sampled frame on.

    "samples" with the truth; "own last lap": each sampled frame with the sample one period before,
    which tells whether a video agrees with itself, right or wrong; and two predictions that need no
    network, with the truth: "one period earlier", perfect memory, and "last observed frame".

    Args:
        samples, truth: uint8 [T, 3, H, W].
    """
    later, earlier = slice(obs_length, None), slice(obs_length - period, len(truth) - period)
    last = np.broadcast_to(truth[obs_length - 1], truth[later].shape)
    return {
        "samples": (samples[later], truth[later]),
        "own last lap": (samples[later], samples[earlier]),
        "one period earlier": (truth[earlier], truth[later]),
        "last observed frame": (last, truth[later]),
    }


def measure_laps(
    samples: np.ndarray,
    truth: np.ndarray,
    periods: Sequence[int],
    *,
    obs_length: int,
    metrics: Mapping[str, FrameMetric],
) -> dict[str, dict[str, np.ndarray]]:
    """Every metric of every prediction, by lap.

    Args:
        samples, truth: uint8 [N, T, 3, H, W].
        periods: [N] frames of a lap of each video.
        metrics: by name.

    Returns:
        {prediction: {metric: float64 [N, len(LAPS)]}}, with the predictions of `predictions`; nan for
        laps that the videos are too short for. psnr is that of a lap's mean squared error, inf for a
        perfect prediction.

    Raises ValueError for arrays of different shapes, and as `lap_numbers` and the metrics.
    """
    if samples.shape != truth.shape or len(periods) != len(truth):
        raise ValueError(
            f"samples {list(samples.shape)}, truth {list(truth.shape)} and {len(periods)} periods "
            "do not fit together: give the same videos"
        )
    rows: dict[str, dict[str, list[np.ndarray]]] = {}
    for sample, video, period in zip(samples, truth, periods, strict=True):
        numbers = lap_numbers(len(video), obs_length, period)[obs_length:]
        for name, pair in predictions(sample, video, obs_length, period).items():
            for metric_name, metric in metrics.items():
                values = metric.compute(*pair)
                row = mean_by_lap(values, numbers, period, decibels=metric.unit == "dB")
                rows.setdefault(name, {}).setdefault(metric_name, []).append(row)
    return {
        name: {metric: np.stack(values) for metric, values in columns.items()}
        for name, columns in rows.items()
    }


def mean_and_error(values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(mean, standard error, number) of each lap over the videos that have it.

    values: [N, laps]. The standard error is nan with fewer than two videos or where a value is inf.
    """
    count = (~np.isnan(values)).sum(axis=0)
    with np.errstate(invalid="ignore", divide="ignore"):
        mean = np.nansum(values, axis=0) / count
        variance = np.nansum((values - mean) ** 2, axis=0) / (count - 1)
        error = np.sqrt(variance / count)
    error[(count < 2) | ~np.isfinite(mean)] = np.nan
    return mean, error, count
