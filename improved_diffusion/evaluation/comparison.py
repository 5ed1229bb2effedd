"""By how much strategies differ, paired over videos, each difference with its 95 % interval.

Samples of one video share its truth, and are hard or easy together: that part of the uncertainty of
two numbers cancels in their difference.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from improved_diffusion.evaluation.cache import cache_name
from improved_diffusion.evaluation.intervals import HALVES, Interval, mean_interval
from improved_diffusion.evaluation.measurements import Measurements, Statistic
from improved_diffusion.registry import METRICS, SAMPLE_METRICS


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
        """Of `other`: "better" or "worse" only where the interval leaves no doubt about the sign."""
        if self.interval.holds_zero:
            return "not told apart"
        higher_is_better = METRICS[self.metric].higher_is_better
        if higher_is_better is None:
            return "differs"
        return "better" if (self.interval.low > 0) == higher_is_better else "worse"


def find_differences(measured: Mapping[str, Measurements]) -> list[Difference]:
    """Those of every further set of samples, by name, from the first, in the metrics that both have.

    Left out are metrics of other videos, truth, frames or settings, and of too few videos.
    """
    (first_name, first), *others = measured.items()
    found = []
    for name, other in others:
        if not _of_the_same(first, other):
            continue
        for metric in [metric for metric in first.metrics if metric in other.metrics]:
            for column, n, interval in _intervals(metric, first, other):
                if interval is not None:
                    found.append(Difference(metric, first_name, name, n, interval, column))
    return found


def _of_the_same(first: Measurements, other: Measurements) -> bool:
    """Whether both are of the same true videos, and of the same frames of them."""
    one, two = (
        (m.scored.videos, m.scored.predicted.tolist(), [c.digest for c in m.scored.truth_clips])
        for m in (first, other)
    )
    return one == two


def _intervals(
    metric: str, first: Measurements, other: Measurements
) -> Iterator[tuple[str, int, Interval | None]]:
    """Of each number of a metric: its column, the videos that count, the interval if there is one."""
    ready = first.metrics[metric]
    if ready.settings != other.metrics[metric].settings:
        return
    if ready.features is not None:
        yield "", len(first.scored.videos), _of_distances(metric, first, other)
        return
    one, two = (m.values(metric, ready.settings) for m in (first, other))
    if one is None or two is None:
        return
    several = metric in SAMPLE_METRICS
    columns = SAMPLE_METRICS[metric].columns if several else ("",)
    for i, column in enumerate(columns):
        chosen = slice(i, i + 1) if several else slice(None)
        differences = video_differences(one[..., chosen], two[..., chosen])
        yield column, len(differences), mean_interval(differences)


def _of_distances(metric: str, first: Measurements, other: Measurements) -> Interval | None:
    settings = first.metrics[metric].settings
    digests = [
        [clip.digest for clips in m.scored.sample_clips for clip in clips]
        for m in (first, other)
    ]  # fmt: skip
    truth = [clip.digest for clip in first.scored.truth_clips]
    file = cache_name(f"difference_{metric}", digests, truth, settings, HALVES)
    return other.kept_interval(file, lambda: _distances_differ(metric, first, other), len(truth))


def video_differences(first: np.ndarray, other: np.ndarray) -> np.ndarray:
    """[at most videos]: mean differences of `other` [videos, samples, frames] from `first`.

    Samples are averaged first, of which there may be different numbers; frames whose difference is not
    finite are left out, and so are videos of such frames alone.
    """
    with np.errstate(invalid="ignore"):  # two perfect frames: inf - inf
        frames = other.mean(axis=1) - first.mean(axis=1)
    finite = [video[np.isfinite(video)] for video in frames]
    return np.array([video.mean() for video in finite if len(video)])


def _distances_differ(metric: str, first: Measurements, other: Measurements) -> Statistic | None:
    """The difference of two distances from one truth, as a function of which videos count."""
    of_each = []
    for measured in (first, other):
        scored = measured.scored
        settings = measured.metrics[metric].settings
        sets, truth = scored.sample_sets, scored.truth_clips
        of_each.append(measured.statistic(metric, settings, sets, truth))
    of_first, of_other = of_each
    if of_first is None or of_other is None:
        return None
    return lambda chosen: of_other(chosen) - of_first(chosen)


def format_differences(differences: Sequence[Difference]) -> str:
    """As text, a line each."""
    lines = []
    for difference in differences:
        found = difference.interval
        label = f"{difference.metric} {difference.column}".rstrip()
        lines.append(
            f"{label}: {difference.other} minus {difference.first}: {found.value:+.4g} "
            f"[{found.low:+.4g}, {found.high:+.4g}] ({difference.n} videos, paired): "
            f"{difference.verdict}"
        )
    return "\n".join(lines)
