"""How far a number may be off because of which videos there are: 95 % intervals.

Resampling videos with replacement would repeat some of them, which biases Fréchet and kernel
distances upward. So half of the videos are drawn without replacement, many times: between such
halves a statistic varies, to leading order, as between sets of all n videos (the delete-half
jackknife). Source: Shao and Wu 1989, A general theory for jackknife variance estimation.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

LEVEL = 0.95
# A standard error from this many halves is itself known to 5 %.
HALVES = 200
# Of fewer videos a half is too small to say anything.
MIN_VIDEOS = 8


@dataclass(frozen=True)
class Interval:
    """A number with its 95 % interval, `low` to `high`.

    at_half: the mean of the same number over halves of the videos; where it is far from `value` the
    number depends on how many videos there are. NaN where no halves were drawn.
    """

    value: float
    low: float
    high: float
    at_half: float = np.nan

    def __format__(self, sign: str) -> str:
        """As "value [low, high]", to two digits of what lies between them; `sign` "+" shows that of all."""
        reach = max((self.high - self.low) / 2, abs(self.value) / 1000)
        known = np.isfinite(reach) and reach > 0
        form = f"{sign}.{max(0, 1 - int(np.floor(np.log10(reach))))}f" if known else f"{sign}.4g"
        return f"{self.value:{form}} [{self.low:{form}}, {self.high:{form}}]"

    @property
    def holds_zero(self) -> bool:
        """Whether the sign of the number is open; so it is where the interval is not finite."""
        return not (self.low > 0 or self.high < 0)


@dataclass(frozen=True)
class HalfSampled:
    """A number of n videos, and the same number of halves of them, float64 [HALVES].

    The halves of equal n are the same ones, so two numbers of the same videos are compared in pairs by
    subtracting one from the other.
    """

    value: float
    of_halves: np.ndarray
    n: int

    def __sub__(self, other: HalfSampled) -> HalfSampled:
        """Raises ValueError for a number of another n, or of other halves."""
        if (self.n, len(self.of_halves)) != (other.n, len(other.of_halves)):
            raise ValueError(f"numbers of {self.n} and {other.n} videos are not of the same halves")
        return HalfSampled(self.value - other.value, self.of_halves - other.of_halves, self.n)

    def interval(self) -> Interval:
        """value +- t s, s the standard deviation over halves of m = n // 2 videos times sqrt(m / (n - m)).

        t is Student's quantile of n - 1 degrees of freedom. It is about the number at this n: a bias
        that comes from n is not in it, but shows in `at_half`.
        """
        m = self.n // 2
        error = self.of_halves.std(ddof=1) * np.sqrt(m / (self.n - m))
        return _around(self.value, error, self.n, at_half=float(self.of_halves.mean()))


def half_sample(
    statistic: Callable[[np.ndarray], float], n: int, *, seed: int = 0
) -> HalfSampled | None:
    """A statistic of n videos and of halves of them; None for fewer than MIN_VIDEOS.

    Args:
        statistic: of indices int64 [m] below n, each at most once; what belongs to one video (its
            sample and truth) is taken together.
        seed: of the halves; equal seeds draw equal ones.
    """
    if n < MIN_VIDEOS:
        return None
    rng, m = np.random.default_rng(seed), n // 2
    of_halves = [statistic(np.sort(rng.permutation(n)[:m])) for _ in range(HALVES)]
    return HalfSampled(float(statistic(np.arange(n))), np.array(of_halves, dtype=np.float64), n)


def mean_interval(values: np.ndarray) -> Interval | None:
    """The interval of the mean of independent numbers [n] (Student's); None for fewer than two."""
    n = len(values)
    if n < 2:
        return None
    return _around(float(values.mean()), values.std(ddof=1) / np.sqrt(n), n)


def _around(value: float, error: float, n: int, at_half: float = np.nan) -> Interval:
    from scipy.special import stdtrit  # of scipy.stats too, whose import takes a second

    reach = float(stdtrit(n - 1, (1 + LEVEL) / 2) * error)
    return Interval(float(value), float(value) - reach, float(value) + reach, at_half)
