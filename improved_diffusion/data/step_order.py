"""Which inference steps wait for which: those of one video that do not can be made at once. No torch here."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple


class OrderedStep(NamedTuple):
    """An inference step and what it waits for.

    Attributes:
        stage: its number in the strategy's own order, from 0, which its noise depends on.
        observed, latent: its frames.
        after: stages that must be made before it.
    """

    stage: int
    observed: list[int]
    latent: list[int]
    after: frozenset[int]


def ordered_steps(steps: Iterable[tuple[list[int], list[int]]]) -> Iterator[OrderedStep]:
    """The steps (observed, latent) of one video, each with the earlier ones that it waits for.

    A step waits for those that sample what it observes; where frames are sampled again, also for
    those that sample and observe them as they were. Made in any order that keeps to this, every
    step observes the frames that it would observe if they were made one after the other.

    Asks for the next step no earlier than it is asked for one.
    """
    sampled_by: dict[int, int] = {}  # frame -> the stage that sampled it last
    observed_by: dict[int, set[int]] = {}  # frame -> the stages that observed it since then
    for stage, (observed, latent) in enumerate(steps):
        after = {sampled_by[frame] for frame in (*observed, *latent) if frame in sampled_by}
        for frame in latent:
            after |= observed_by.pop(frame, set())
            sampled_by[frame] = stage
        for frame in observed:
            observed_by.setdefault(frame, set()).add(stage)
        yield OrderedStep(stage, observed, latent, frozenset(after))


def rounds_of(steps: Iterable[OrderedStep]) -> list[int]:
    """How many steps there are in each round, if each is made in the first that it can be made in."""
    rounds: dict[int, int] = {}
    for step in steps:
        rounds[step.stage] = max((rounds[stage] + 1 for stage in step.after), default=0)
    return [list(rounds.values()).count(i) for i in range(max(rounds.values(), default=-1) + 1)]
