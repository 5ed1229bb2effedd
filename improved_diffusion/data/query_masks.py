"""Training items that are inference steps: what sampling asks of the network. No torch here."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from improved_diffusion.config import option
from improved_diffusion.data.frame_masks import (
    Filled,
    FilledOptions,
    Frames,
    check_sizes,
    draw_frames,
)
from improved_diffusion.data.strategy_base import InferenceStrategyBase, Step
from improved_diffusion.inference_utils import AdaptiveAutoregressive
from improved_diffusion.registry import STRATEGIES

MAX_SCHEDULES = 1024  # kept by a process; of 300 frames one takes about 20 kB
FULL_LENGTH_SHARE = 0.5  # of the runs are of a whole training window, the others are shorter
NOTHING_OBSERVED_SHARE = 0.25  # of the runs have obs_length 0

StrategyClass = type[InferenceStrategyBase]


class Schedule(NamedTuple):
    """All steps of one strategy at certain sizes, each (observed, latent) as training wants them."""

    strategy: StrategyClass
    video_length: int
    num_obs: int
    max_frames: int
    step_size: int
    steps: list[Frames]


def strategies_for(video_length: int, max_frames: int) -> tuple[StrategyClass, ...]:
    """The registered strategies that queries are made of, each once, in the registry's order.

    Those that can work with at most so many frames, and sample each frame once: gibbs is left out,
    as its sweeps are another procedure than the model's own factorisation. Of adaptive strategies
    those that say what they observe first of all, as `AdaptiveAutoregressive` does.
    """
    return tuple(
        strategy
        for strategy in dict.fromkeys(STRATEGIES.values())
        if not strategy.samples_frame_twice
        and (not strategy.is_adaptive or issubclass(strategy, AdaptiveAutoregressive))
        and max_frames > strategy.min_step_size + strategy.num_goal_frames
        and video_length > strategy.num_goal_frames
    )


@functools.lru_cache(MAX_SCHEDULES)
def make_schedule(
    strategies: tuple[StrategyClass, ...], number: int, video_length: int, max_frames: int
) -> Schedule:
    """The schedule of this number: the strategies take turns, the sizes are random.

    video_length: the most frames that the video may have. Equal arguments give equal schedules, so
    that what is drawn does not depend on what a process has drawn before.
    """
    strategy = strategies[number % len(strategies)]
    rng = np.random.default_rng([number, video_length, max_frames])
    sizes = _draw_sizes(strategy, video_length, max_frames, rng)
    if issubclass(strategy, AdaptiveAutoregressive):
        run = _observing_at_random(strategy, rng)(*sizes)
        steps = [(observed[0], latent[0]) for observed, latent in run]
    else:
        steps = list(strategy(*sizes))
    arrays = [(np.sort(np.array(o, np.int64)), np.sort(np.array(la, np.int64))) for o, la in steps]
    return Schedule(strategy, *sizes, arrays)


def _draw_sizes(
    strategy: StrategyClass, longest: int, max_frames: int, rng: np.random.Generator
) -> tuple[int, int, int, int]:
    """Legal (video_length, num_obs, max_frames, step_size).

    Lengths are log-uniform but for those that are `longest`, and so are numbers of observed frames
    but for 0; step sizes are the mean of two uniform ones, since half of max_frames is common.
    """
    goals = strategy.num_goal_frames
    length = longest
    if rng.random() >= FULL_LENGTH_SHARE:
        length = _log_uniform(max(goals + 1, min(longest, max_frames)), longest, rng)
    num_obs = 0
    if length - goals > 1 and rng.random() >= NOTHING_OBSERVED_SHARE:
        num_obs = _log_uniform(1, length - goals - 1, rng)
    step_sizes = rng.integers(strategy.min_step_size, max_frames - goals, size=2)
    return length, num_obs, max_frames, int(step_sizes.sum() + rng.integers(2)) // 2


def _log_uniform(low: int, high: int, rng: np.random.Generator) -> int:
    """An integer from low to high, both included."""
    return min(high, int(low * math.exp(rng.random() * math.log((high + 1) / low))))


def _observing_at_random(
    strategy: type[AdaptiveAutoregressive], rng: np.random.Generator
) -> type[AdaptiveAutoregressive]:
    """The adaptive strategy with done frames at random instead of those that look different."""

    class ObservingAtRandom(strategy):  # type: ignore[misc, valid-type]
        def next_indices(self) -> Step:
            if not self._done_frames:
                return [[]], [self._first_latents()]
            start, places, latent = self._plan()
            observed = start[:places]
            others = np.array(sorted(self._done_frames.difference(observed)), np.int64)
            number = min(places - len(observed), len(others))
            return [[*observed, *rng.choice(others, number, replace=False)]], [latent]

    return ObservingAtRandom


@dataclass(frozen=True)
class QueriesOptions:
    """How many runs of strategies the steps are taken from."""

    query_schedules: int = option(
        512, "queries, mixed: strategies at random sizes whose steps are items"
    )

    def __post_init__(self) -> None:
        if not 1 <= self.query_schedules <= MAX_SCHEDULES:
            raise ValueError(
                f"--query_schedules {self.query_schedules}: must be from 1 to {MAX_SCHEDULES}"
            )


class Queries:
    """An inference step of a random strategy at a random video length, obs_length and step size.

    The video begins anywhere in the window of T frames. With K = 1, where no strategy can work, an
    item is one latent frame.
    """

    Options = QueriesOptions

    def __init__(self, options: QueriesOptions) -> None:
        self.options = options

    def __call__(self, video_length: int, max_frames: int, rng: np.random.Generator) -> Frames:
        """As `frame_masks.draw_frames`; max_frames is also that of the strategies."""
        check_sizes(video_length, max_frames)
        strategies = strategies_for(video_length, max_frames)
        if not strategies:
            return np.zeros(0, np.int64), rng.integers(video_length, size=1)
        number = int(rng.integers(self.options.query_schedules))
        schedule = make_schedule(strategies, number, video_length, max_frames)
        observed, latent = schedule.steps[rng.integers(len(schedule.steps))]
        start = rng.integers(video_length - schedule.video_length + 1)
        return observed + start, latent + start


@dataclass(frozen=True)
class MixedOptions(FilledOptions, QueriesOptions):
    """How often each of the distributions is drawn from."""

    share_published: float = option(0.2, "mixed: weight of published items")
    share_filled: float = option(0.4, "mixed: weight of filled items")
    share_queries: float = option(0.4, "mixed: weight of queries")

    def __post_init__(self) -> None:
        FilledOptions.__post_init__(self)
        QueriesOptions.__post_init__(self)
        if not (min(self.shares) >= 0 and 0 < sum(self.shares) < math.inf):
            raise ValueError(
                f"--share_published, --share_filled, --share_queries are {self.shares}: none may be "
                "negative, and not all 0"
            )

    @property
    def shares(self) -> tuple[float, float, float]:
        """Of published, filled, queries; only their proportions count."""
        return self.share_published, self.share_filled, self.share_queries


class Mixed:
    """An item of `draw_frames`, `Filled` or `Queries`, each in its share."""

    Options = MixedOptions

    def __init__(self, options: MixedOptions) -> None:
        self.options = options
        self._parts = (draw_frames, Filled(self.options), Queries(self.options))
        self._ends = np.cumsum(self.options.shares) / sum(self.options.shares)

    def __call__(self, video_length: int, max_frames: int, rng: np.random.Generator) -> Frames:
        """As `frame_masks.draw_frames`."""
        part = int(np.searchsorted(self._ends, rng.random(), side="right"))
        return self._parts[min(part, len(self._parts) - 1)](video_length, max_frames, rng)
