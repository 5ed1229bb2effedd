"""Inference strategies: which frames are observed and which are sampled in each inference step.

A strategy is an iterator over the steps of one batch of videos, each step a pair
(obs_frame_indices, latent_frame_indices). To add one, write a class with a `next_indices` method
and register it: `inference_strategies["mine"] = Mine`, or a line in registry.py. No torch here.

Source: the sampling schemes of Harvey et al. 2022 (arXiv 2205.11495).
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from improved_diffusion.config import check_choices, chosen_options, option
from improved_diffusion.data import frame_selection as select
from improved_diffusion.data.frame_distances import FrameDistances, as_array
from improved_diffusion.data.strategy_base import (
    MAX_REFINEMENTS,
    Embed,
    InferenceStrategyBase,
    Step,
    load_optimal_schedule,
)
from improved_diffusion.registry import STRATEGIES as inference_strategies

__all__ = [
    "InferenceStrategyBase",
    "create_strategy",
    "inference_strategies",
    "load_optimal_schedule",
]


class Autoregressive(InferenceStrategyBase):
    """Observe the most recent frames."""

    def next_indices(self) -> Step:
        return select.last_items(sorted(self._done_frames), self._places), self._next_block()


class LongRange(InferenceStrategyBase):
    """Observe the most recent frames in half of the places, those observed first in the rest."""

    def next_indices(self) -> Step:
        recent = select.last_items(sorted(self._done_frames), self._places // 2)
        others = [frame for frame in self._obs_frames if frame not in recent]
        return select.last_items(others, self._places - len(recent)) + recent, self._next_block()


class Independent(InferenceStrategyBase):
    """Observe the last of the frames observed first, in every step."""

    def next_indices(self) -> Step:
        return select.last_items(self._obs_frames, self._places), self._next_block()


class ReallyIndependent(InferenceStrategyBase):
    """Observe nothing and sample `_max_T` frames, in every step; `_step_size` plays no part."""

    @classmethod
    def validate(cls, video_length: int, num_obs: int, max_frames: int, step_size: int) -> None:
        super().validate(video_length, num_obs, max_frames, min(step_size, cls.min_step_size))

    def next_indices(self) -> Step:
        start = max(self._done_frames) + 1
        return [], list(range(start, min(start + self._max_T, self._video_length)))


class ExponentialPast(InferenceStrategyBase):
    """Observe the frames 1, 2, 4, ... before the first latent one, then the most recent others."""

    def next_indices(self) -> Step:
        latent = self._next_block()
        first = latent[0]
        past = [first - 2**power for power in range(first.bit_length() - 1)][: self._places]
        others = [frame for frame in sorted(self._done_frames) if frame not in past]
        return sorted(past + select.last_items(others, self._places - len(past))), latent


class Hierarchy(InferenceStrategyBase):
    """Sample frames spread over the whole video, then those in between, level by level."""

    min_step_size = 2
    levels = 2

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._level = 1
        # The frame from which the next walk goes on; an unconditional first step reaches the end.
        self._last = (self._num_obs or self._video_length) - 1

    def _first_latents(self) -> list[int]:
        count = min(self._max_T, self._video_length)
        return [int(frame) for frame in np.linspace(0, self._video_length - 1, count)]

    def next_indices(self) -> Step:
        latent, places = self._next_latents()
        before, between, after = select.split_around(self._done_frames, latent)
        places -= len(between)
        after = after[: places // 2]
        places -= len(after)
        # On the first level nothing is done but the observed frames: none between, none after.
        if self._level == 1:
            return select.spread(len(before), places), latent
        return select.last_items(before, places) + between + after, latent

    def _next_latents(self) -> tuple[list[int], int]:
        """The next latent frames, and the number of frames to observe.

        The done frames between the latent ones have to be observed: where that leaves fewer than
        two places for others, fewer frames are sampled.
        """
        for step_size in range(self._step_size, 0, -1):
            latent = self._latents(step_size)
            places = self._max_T - step_size
            if places - len(select.split_around(self._done_frames, latent)[1]) >= 2:
                break
        self._last = latent[-1]
        return latent, places

    def _latents(self, step_size: int) -> list[int]:
        """At most `step_size` latent frames, of the next level if this one has no more."""
        undone = sorted(set(range(self._video_length)) - self._done_frames)
        origin = self._last
        while origin + self._stride(step_size) > undone[-1]:
            self._level, self._last = self._level + 1, 0
            origin = undone[0] - 1
        if self._level == 1:
            ends = self._last + 1, self._video_length - 0.001
            return sorted({int(frame) for frame in np.linspace(*ends, step_size)})
        stride = self._stride(step_size)
        return select.walk(undone, origin + stride, stride, step_size)

    def _stride(self, step_size: int) -> int:
        num_missing = self._video_length - len(self._obs_frames)
        return select.hierarchy_stride(num_missing, step_size, self._level, self.levels)


class Hierarchy3(Hierarchy):
    """Hierarchy of three levels."""

    levels = 3


class Hierarchy4(Hierarchy):
    """Hierarchy of four levels."""

    levels = 4


class Hierarchy5(Hierarchy):
    """Hierarchy of five levels."""

    levels = 5


class AdaptiveAutoregressive(InferenceStrategyBase):
    """Observe the most recent frame and, per video, done frames that are far from each other.

    Steps are (list of observed frames per video, list of the same latent frames per video). Call
    `set_videos` before the first step, and again whenever frames were sampled into a copy.

    Args:
        embed: the embedding that `embedding` names: squared Euclidean distances of what it returns
            are the option's distance. It sees each done frame once.
    """

    is_adaptive = True

    @dataclass(frozen=True)
    class Options:
        """How far frames are from each other."""

        distance: str = option(
            "lpips", "adaptive strategies: distance between frames", choices=("lpips", "l2")
        )

        def __post_init__(self) -> None:
            check_choices(self)

    def __init__(self, *args: Any, embed: Embed | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._embed = embed
        self._videos: Any = None
        self._distances: list[FrameDistances] = []  # of each video's done frames

    @classmethod
    def embedding(cls, options: Any) -> str | None:
        """That of the distance; l2 compares the pixels themselves and needs none."""
        return None if options.distance == "l2" else options.distance

    def set_videos(self, videos: Any) -> None:
        """Give the videos as they are now: array or tensor [B, T, 3, H, W], float in [-1, 1].

        Only done frames are read, when the next step is made. Raises ValueError for another shape,
        and without `embed` where the distance needs one.
        """
        name = self.embedding(self.options)
        if name is not None and self._embed is None:
            raise ValueError(f"--distance {name} needs an embedding: give embed, or --distance l2")
        if videos.ndim != 5 or videos.shape[1] != self._video_length:
            shape, T = list(videos.shape), self._video_length
            raise ValueError(f"{self._mode()}: videos are {shape}, not [B, {T}, 3, H, W]")
        self._videos = videos

    def next_indices(self) -> Step:
        if self._videos is None:
            raise ValueError(f"{self._mode()}: call set_videos before the first step")
        if not self._done_frames:
            return [[] for _ in self._videos], [self._first_latents() for _ in self._videos]
        self._embed_new_frames()
        start, places, latent = self._plan()
        observed = [self._choose(video, start, places) for video in range(len(self._videos))]
        return observed, [latent] * len(observed)

    def _choose(self, video: int, start: list[int], places: int) -> list[int]:
        """The frames to observe in one video."""
        return select.farthest_points(self._distances[video], start, places)

    def _plan(self) -> tuple[list[int], int, list[int]]:
        """Frames to observe first of all, number of frames to observe, latent frames."""
        return [max(self._done_frames)], self._places, self._next_block()

    def _embed_new_frames(self) -> None:
        if not self._distances:
            self._distances = [FrameDistances(self._video_length) for _ in self._videos]
        new = sorted(frame for frame in self._done_frames if frame not in self._distances[0])
        if not new:
            return
        frames = self._videos[:, new]
        if hasattr(frames, "detach"):  # a torch tensor, on any device and of any float type
            frames = frames.detach().float().cpu().numpy()
        flat = np.asarray(frames, dtype=np.float32).reshape(-1, *frames.shape[2:])
        embed = self._embed if self.embedding(self.options) else None
        values = as_array(embed(flat)) if embed else flat.reshape(len(flat), -1)
        finite = values.isfinite() if hasattr(values, "isfinite") else np.isfinite(values)
        if values.ndim != 2 or len(values) != len(flat) or not finite.all():
            fault = f"embeddings are {list(values.shape)} or not finite"
            raise ValueError(f"{self._mode()}: {fault}: must be finite, [{len(flat)}, d]")
        for video, distances in enumerate(self._distances):
            distances.add(new, values[video * len(new) : (video + 1) * len(new)])


class AdaptiveHierarchy(AdaptiveAutoregressive, Hierarchy):
    """Latent frames of a hierarchy; the nearest frames around them are observed first of all."""

    def _plan(self) -> tuple[list[int], int, list[int]]:
        latent, places = self._next_latents()
        before, between, after = select.split_around(self._done_frames, latent)
        return between + before[:-3:-1] + after[:1], places, latent


class AdaptiveHierarchy3(AdaptiveHierarchy):
    """Adaptive hierarchy of three levels."""

    levels = 3


class GoalDirectedAutoregressive(InferenceStrategyBase):
    """Another strategy on all frames but the last five, which every step observes as well."""

    is_goal_directed = True
    num_goal_frames = 5
    inner_class: type[InferenceStrategyBase] = Autoregressive

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        length, frames = (n - self.num_goal_frames for n in (self._video_length, self._max_T))
        self._inner = self.inner_class(length, self._num_obs, frames, self._step_size)

    def next_indices(self) -> Step:
        observed, latent = next(self._inner)
        return observed + self.observed_from_data[self._num_obs :], latent


class GoalDirectedHierarchy(GoalDirectedAutoregressive):
    """Goal-directed hierarchy of two levels."""

    min_step_size = Hierarchy.min_step_size
    inner_class = Hierarchy


class Gibbs(Autoregressive):
    """After an autoregressive pass, sample `gibbs_sweeps` times each block given both sides."""

    samples_frame_twice = True

    @dataclass(frozen=True)
    class Options:
        """How often the video is gone over again."""

        gibbs_sweeps: int = option(
            1, "gibbs: sweeps over the video after the first pass", folder_word="sweeps"
        )

        def __post_init__(self) -> None:
            if not 1 <= self.gibbs_sweeps <= MAX_REFINEMENTS:
                raise ValueError(
                    f"--gibbs_sweeps {self.gibbs_sweeps}: must be from 1 to {MAX_REFINEMENTS}"
                )

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        starts = range(self._num_obs, self._video_length, self._step_size)
        self._blocks = [range(i, min(i + self._step_size, self._video_length)) for i in starts]
        self._num_left = self.options.gibbs_sweeps * len(self._blocks)

    def is_done(self) -> bool:
        return super().is_done() and self._num_left == 0

    def next_indices(self) -> Step:
        if not super().is_done():
            return super().next_indices()
        latent = list(self._blocks[-self._num_left % len(self._blocks)])
        self._num_left -= 1
        earlier, _, later = select.split_around(self._done_frames, latent)
        before = select.last_items(earlier, self._places // 2)
        after = later[: self._places - len(before)]
        # With a single place the last block, which has nothing after it, would observe nothing.
        return before + after or select.last_items(earlier, self._places), latent


def create_strategy(
    mode: str, *, options: Any = None, embed: Embed | None = None, **sizes: Any
) -> InferenceStrategyBase:
    """The strategy `mode`, ready to be iterated over.

    Args:
        mode: a name in `inference_strategies`.
        options: an instance of the class's `Options`, or a mapping of some of them; others of its
            entries may belong to other strategies.
        embed: see `AdaptiveAutoregressive`; goes to the classes that name an embedding.
        sizes: what the class takes: video_length, num_obs, max_frames, step_size, and perhaps
            optimal_schedule_path.

    Raises ValueError for an unknown mode or option, and what the class raises.
    """
    strategy = inference_strategies[mode]
    options = chosen_options(inference_strategies, mode, options)
    # A class that has no options of its own need not take the keyword.
    extra = {"options": options} if fields(options) else {}
    if strategy.embedding(options) is not None:
        extra["embed"] = embed
    return strategy(**sizes, **extra)
