"""By how much strategies differ, paired over videos, each difference with its 95 % interval.

Samples of one video share its truth, and are hard or easy together: that part of the uncertainty of
two numbers cancels in their difference. All is taken from tables: of metrics of frames and samples they
hold the values, of distances between sets of videos what half of the videos give.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from improved_diffusion.evaluation.intervals import HalfSampled, Interval, mean_interval
from improved_diffusion.evaluation.metric_tables import COMPARED, ScoreTable
from improved_diffusion.registry import METRICS, SAMPLE_METRICS, VIDEO_METRICS

# What two tables must share for their videos to be pairs; of each they may hold other numbers of samples.
PAIRED = tuple(key for key in COMPARED if key != "samples")


def verdict(interval: Interval, higher_is_better: bool | None) -> str:
    """What a difference means: "better" or "worse" only where the interval leaves no doubt about the sign.

    "differs" where neither direction is better.
    """
    if interval.holds_zero:
        return "not told apart"
    if higher_is_better is None:
        return "differs"
    return "better" if (interval.low > 0) == higher_is_better else "worse"


@dataclass(frozen=True)
class Difference:
    """A metric of `other` minus that of `first`, names of evaluation directories.

    column: which of its numbers, of a metric that has several of each sample; else empty. n: videos
    that count; those whose difference is infinite in every frame do not.
    """

    metric: str
    first: str
    other: str
    n: int
    interval: Interval
    column: str = ""

    @property
    def verdict(self) -> str:
        """Of `other`."""
        return verdict(self.interval, METRICS[self.metric].higher_is_better)


def find_differences(tables: Mapping[str, ScoreTable]) -> list[Difference]:
    """Those of every further table, by name, from the first, in the metrics that both have.

    Left out are metrics of other videos, frames or settings, of too few videos, columns that say
    nothing of the samples, and metrics that nobody here knows.
    """
    (first_name, first), *others = tables.items()
    found = []
    for name, other in others:
        if any(first.info.get(key) != other.info.get(key) for key in PAIRED):
            continue
        for metric in [m for m in METRICS if m in first.values and m in other.values]:
            for column, n, interval in _intervals(metric, first, other):
                if interval is not None:
                    found.append(Difference(metric, first_name, name, n, interval, column))
    return found


def _intervals(
    metric: str, first: ScoreTable, other: ScoreTable
) -> Iterator[tuple[str, int, Interval | None]]:
    """Of each number of a metric: its column, the videos that count, the interval if there is one."""
    rows = [table.info.get("metrics", {}).get(metric, {}) for table in (first, other)]
    if rows[0].get("settings") != rows[1].get("settings"):
        return
    if metric in VIDEO_METRICS:
        one, two = map(_half_sampled, rows)
        if one is not None and two is not None:
            yield "", one.n, (two - one).interval()
        return
    values = first.values[metric], other.values[metric]
    if metric not in SAMPLE_METRICS:
        differences = video_differences(*values)
        yield "", len(differences), mean_interval(differences)
        return
    kind = SAMPLE_METRICS[metric]
    for i, column in enumerate(kind.columns):
        if column not in kind.reference_columns:
            differences = video_differences(*(array[..., i : i + 1] for array in values))
            yield column, len(differences), mean_interval(differences)


def _half_sampled(row: Mapping[str, Any]) -> HalfSampled | None:
    """A distance as its row tells it; None where it does not, for few videos or as old tables."""
    of_halves = row.get("interval", {}).get("of_halves")
    return None if of_halves is None else HalfSampled(row["mean"], np.array(of_halves), row["n"])


def video_differences(first: np.ndarray, other: np.ndarray) -> np.ndarray:
    """[at most videos]: mean differences of `other` [videos, samples, frames] from `first`.

    Samples are averaged first, of which there may be different numbers; frames whose difference is not
    finite are left out, and so are videos of such frames alone.
    """
    with np.errstate(invalid="ignore"):  # two perfect frames: inf - inf
        frames = other.mean(axis=1) - first.mean(axis=1)
    finite = [video[np.isfinite(video)] for video in frames]
    return np.array([video.mean() for video in finite if len(video)])


def format_differences(differences: Sequence[Difference]) -> str:
    """As text, a line each."""
    lines = []
    for difference in differences:
        label = f"{difference.metric} {difference.column}".rstrip()
        lines.append(
            f"{label}: {difference.other} minus {difference.first}: {difference.interval:+} "
            f"({difference.n} videos, paired): {difference.verdict}"
        )
    return "\n".join(lines)
