"""Strategies in other orders than from start to end: blocks side by side, and backwards. No torch here."""

from __future__ import annotations

from typing import Any

import numpy as np

from improved_diffusion.data import frame_selection as select
from improved_diffusion.data.strategy_base import InferenceStrategyBase, Step
from improved_diffusion.inference_utils import Hierarchy


class ParallelHierarchy(Hierarchy):
    """Hierarchy in which the blocks of a level hardly wait for each other.

    Every second block of a level observes only what exists when the level begins, so that all of
    them can be made at once; then come those in between, which see both neighbours. The levels have
    the frames of `Hierarchy`. A video takes 2 * levels - 1 rounds, however long it is.
    """

    levels = 2

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._level = 0 if self._num_obs else 1  # an unconditional first step is the first level
        self._blocks: list[list[int]] = []  # those that are made at once, and are not yet made
        self._between: list[list[int]] = []  # those that are made after them
        self._visible: set[int] = set()  # the frames that existed before the first of `_blocks`

    def next_indices(self) -> Step:
        if not self._blocks:
            self._visible = set(self._done_frames)
            self._blocks, self._between = self._between, []
        while not self._blocks:
            self._level += 1
            blocks = self._cut(self._level_frames())
            self._blocks, self._between = blocks[::2], blocks[1::2]
        latent = self._blocks.pop(0)
        before, between, after = select.split_around(self._visible, latent)
        if self._level == 1:  # nothing but the observed frames exists
            return select.spread(len(before), self._max_T - self._step_size), latent
        places = self._max_T - len(latent) - len(between)
        num_after = min(len(after), max(places // 2, places - len(before)))
        return select.last_items(before, places - num_after) + between + after[:num_after], latent

    def _level_frames(self) -> list[int]:
        """The frames of the level that begins; there may be none of a level but the last."""
        undone = sorted(set(range(self._video_length)) - self._done_frames)
        if self._level == 1:
            ends = undone[0], self._video_length - 0.001
            return sorted({int(frame) for frame in np.linspace(*ends, self._step_size)})
        stride = self._stride(self._step_size)
        return select.walk(undone, undone[0] - 1 + stride, stride, len(undone))

    def _cut(self, frames: list[int]) -> list[list[int]]:
        """Blocks of up to `_step_size` frames.

        The done frames inside a block have to be observed: it has fewer frames where they would
        leave it less than two places for others.
        """
        blocks = []
        while frames:
            for size in range(min(self._step_size, len(frames)), 0, -1):
                between = select.split_around(self._visible, frames[:size])[1]
                if size + len(between) + 2 <= self._max_T:
                    break
            blocks.append(frames[:size])
            frames = frames[size:]
        return blocks


class ParallelHierarchy3(ParallelHierarchy):
    """Parallel hierarchy of three levels."""

    levels = 3


class ParallelHierarchy4(ParallelHierarchy):
    """Parallel hierarchy of four levels."""

    levels = 4


class EndToStart(InferenceStrategyBase):
    """Sample the last frames first and the others backwards from there, anchored on the start.

    Half of the places show the frames just after the new ones, the rest the last of the frames
    observed first, which are real: errors do not add up on the way.

    Source: inverted anti-drifting sampling of FramePack (arXiv 2504.12626).
    """

    def next_indices(self) -> Step:
        latent = sorted(set(range(self._video_length)) - self._done_frames)[-self._step_size :]
        after = [frame for frame in range(latent[-1] + 1, self._video_length)]
        first = [frame for frame in self._obs_frames if frame < latent[0]]
        num_after = min(len(after), max(self._places // 2, self._places - len(first)))
        return select.last_items(first, self._places - num_after) + after[:num_after], latent
