"""By how much strategies differ, paired over videos, each difference with its 95 % interval.

Samples of one video share its truth, and are hard or easy together: that part of the uncertainty of
two numbers cancels in their difference.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from improved_diffusion.evaluation.cache import cache_name
from improved_diffusion.evaluation.intervals import HALVES, Interval, mean_interval
from improved_diffusion.evaluation.measurements import Measurements, Statistic
from improved_diffusion.registry import METRICS


@dataclass(frozen=True)
class Difference:
    """A metric of `other` minus that of `first`, names of evaluation directories; n videos."""

    metric: str
    first: str
    other: str
    n: int
    interval: Interval

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
            interval = _interval(metric, first, other)
            if interval is not None:
                n = len(first.scored.videos)
                found.append(Difference(metric, first_name, name, n, interval))
    return found


def _of_the_same(first: Measurements, other: Measurements) -> bool:
    """Whether both are of the same true videos, and of the same frames of them."""
    one, two = (
        (m.scored.videos, m.scored.predicted.tolist(), [c.digest for c in m.scored.truth_clips])
        for m in (first, other)
    )
    return one == two


def _interval(metric: str, first: Measurements, other: Measurements) -> Interval | None:
    ready = first.metrics[metric]
    if ready.settings != other.metrics[metric].settings:
        return None
    if ready.features is None:
        values = [m.values(metric, ready.settings) for m in (first, other)]
        if any(array is None for array in values):
            return None
        means = [_video_means(array) for array in values if array is not None]
        differences = means[1] - means[0]
        return mean_interval(differences[np.isfinite(differences)])
    digests = [
        [clip.digest for clips in m.scored.sample_clips for clip in clips]
        for m in (first, other)
    ]  # fmt: skip
    truth = [clip.digest for clip in first.scored.truth_clips]
    file = cache_name(f"difference_{metric}", digests, truth, ready.settings, HALVES)
    return other.kept_interval(file, lambda: _distances_differ(metric, first, other), len(truth))


def _video_means(values: np.ndarray) -> np.ndarray:
    """[videos] means of [videos, samples, frames] over what is finite; NaN where nothing is."""
    finite = np.where(np.isfinite(values), values, np.nan)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # a video of infinite values alone
        return np.nanmean(finite, axis=(1, 2))


def _distances_differ(metric: str, first: Measurements, other: Measurements) -> Statistic | None:
    """The difference of two distances from one truth, as a function of which videos count."""
    of_each = []
    for measured in (first, other):
        scored = measured.scored
        sets = [list(clips) for clips in zip(*scored.sample_clips, strict=True)]
        settings = measured.metrics[metric].settings
        of_each.append(measured.statistic(metric, settings, sets, scored.truth_clips))
    of_first, of_other = of_each
    if of_first is None or of_other is None:
        return None
    return lambda chosen: of_other(chosen) - of_first(chosen)


def format_differences(differences: Sequence[Difference]) -> str:
    """As text, a line each."""
    lines = []
    for difference in differences:
        found = difference.interval
        lines.append(
            f"{difference.metric}: {difference.other} minus {difference.first}: {found.value:+.4g} "
            f"[{found.low:+.4g}, {found.high:+.4g}] ({difference.n} videos, paired): "
            f"{difference.verdict}"
        )
    return "\n".join(lines)
