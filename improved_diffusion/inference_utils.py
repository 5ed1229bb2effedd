"""Inference strategies: which frames are observed and which are sampled in each inference step.

A strategy is an iterator over the steps of one batch of videos, each step a pair
(obs_frame_indices, latent_frame_indices). To add one, write a class with a `next_indices` method
and register it in `inference_strategies` at the end of this module.

Source: the sampling schemes of Harvey et al. 2022 (arXiv 2205.11495).
"""

from __future__ import annotations

import logging
import os
import pickle
from collections.abc import Callable, Collection, Iterator
from typing import Any

import numpy as np

from improved_diffusion.data import frame_selection as select

logger = logging.getLogger(__name__)

# (observed, latent), each a list of frame indices; adaptive strategies: a list of those per video.
Step = tuple[list[Any], list[Any]]
# Frames [n, 3, H, W] in [-1, 1] -> [n, d], float arrays.
Embed = Callable[[np.ndarray], np.ndarray]
# A strategy may sample each frame again so often; beyond that it counts as stuck.
MAX_REFINEMENTS = 1000
MAKE_SCHEDULE = "make it with scripts/video_optimal_schedule.py"


class InferenceStrategyBase:
    """Iterator over (obs_frame_indices, latent_frame_indices); subclasses define `next_indices`.

    The base class checks every step and keeps these attributes up to date:
        _video_length: frames of the whole video.
        _num_obs: frames observed at its start.
        _max_T: frames, observed and latent, that the network takes at once.
        _step_size: frames to sample in one step.
        _obs_frames: list of the frames observed at the start of the video. Without any, the first
            step samples up to `_max_T` frames given nothing, and those take this place.
        _done_frames: set of the frames that exist: observed or sampled.
        _current_step: number of steps made.

    With `optimal_schedule_path` (see `load_optimal_schedule`) the frames of that file are observed
    instead of those that the strategy chooses.

    Raises ValueError for illegal sizes (see `validate`) and for a step that breaks a rule (see
    `_checked`).
    """

    is_adaptive: bool = False
    is_goal_directed: bool = False
    samples_frame_twice: bool = False
    min_step_size: int = 1
    num_goal_frames: int = 0  # frames observed at the end of the video
    options: tuple[str, ...] = ()  # keywords that the class takes beyond those of the base

    def __init__(
        self,
        video_length: int,
        num_obs: int,
        max_frames: int,
        step_size: int,
        optimal_schedule_path: str | os.PathLike[str] | None = None,
    ) -> None:
        self.validate(video_length, num_obs, max_frames, step_size)
        self._video_length = video_length
        self._num_obs = num_obs
        self._max_T = max_frames
        self._step_size = step_size
        self._obs_frames = list(range(num_obs))
        self._done_frames = set(self.observed_from_data)
        self._current_step = 0
        self._schedule_path = optimal_schedule_path
        self._schedule: dict[int, list[int]] | None = None
        if optimal_schedule_path is not None:
            if self.is_adaptive:
                raise ValueError(f"--optimal: {self._mode()} chooses its own frames, leave it out")
            self._schedule = load_optimal_schedule(optimal_schedule_path)

    def __init_subclass__(cls, **kwargs: Any) -> None:
        # A class that decides when it is done may go on after every frame exists.
        super().__init_subclass__(**kwargs)
        if "is_done" in cls.__dict__ and "samples_frame_twice" not in cls.__dict__:
            cls.samples_frame_twice = True

    @classmethod
    def validate(cls, video_length: int, num_obs: int, max_frames: int, step_size: int) -> None:
        """Raise ValueError, naming the flag and its legal range, for sizes that cannot work."""
        goals = cls.num_goal_frames
        least_max_frames = cls.min_step_size + goals + 1  # one frame must be left to observe
        for flag, value, least, most in (
            ("T", video_length, goals + 1, None),
            ("obs_length", num_obs, 0, video_length - goals - 1),
            ("max_frames", max_frames, least_max_frames, None),
            ("step_size", step_size, cls.min_step_size, max_frames - goals - 1),
        ):
            if value < least or (most is not None and value > most):
                legal = f"at least {least}" if most is None else f"from {least} to {most}"
                raise ValueError(
                    f"--{flag} {value} is illegal for {cls._mode()} with --T {video_length} and "
                    f"--max_frames {max_frames}: it must be {legal}"
                )

    @property
    def _max_frames(self) -> int:
        return self._max_T

    @property
    def _places(self) -> int:
        """Frames that can be observed beside `_step_size` latent ones."""
        return self._max_T - self._step_size

    @property
    def observed_from_data(self) -> list[int]:
        """Sorted frames that the data gives and no step samples."""
        goals = range(self._video_length - self.num_goal_frames, self._video_length)
        return [*range(self._num_obs), *goals]

    def next_indices(self) -> Step:
        """Frames to observe, which must be done, and frames to sample in the next step."""
        raise NotImplementedError(f"{type(self).__name__} must define next_indices")

    def is_done(self) -> bool:
        """Whether the inference is finished: by default, as soon as every frame exists."""
        return len(self._done_frames) >= self._video_length

    def __iter__(self) -> Iterator[Step]:
        return self

    def __next__(self) -> Step:
        if self.is_done():
            raise StopIteration
        if self._done_frames or self.is_adaptive:
            observed, latent = self.next_indices()
        else:
            observed, latent = [], self._first_latents()
        if self._schedule is not None and self._done_frames:
            observed = self._scheduled_frames(self._schedule)
        videos = zip(observed, latent, strict=True) if self.is_adaptive else [(observed, latent)]
        steps = [self._checked(*video) for video in videos]
        sampled = steps[0][1]
        logger.debug("%s, step %d: %s", self._mode(), self._current_step, steps)
        if not self._done_frames:
            self._obs_frames = sorted(sampled)
        self._done_frames.update(sampled)
        self._current_step += 1
        return ([s[0] for s in steps], [s[1] for s in steps]) if self.is_adaptive else steps[0]

    def _first_latents(self) -> list[int]:
        """Frames of the first step when no frame at all is given."""
        return list(range(min(self._max_T, self._video_length)))

    def _next_block(self) -> list[int]:
        """The `_step_size` frames after the last done one, fewer at the end of the video."""
        start = max(self._done_frames) + 1
        return list(range(start, min(start + self._step_size, self._video_length)))

    def _scheduled_frames(self, schedule: dict[int, list[int]]) -> list[int]:
        if self._current_step not in schedule:
            fault = f"no entry for step {self._current_step} of {self._mode()}"
            raise ValueError(f"{self._schedule_path}: {fault}: {MAKE_SCHEDULE}")
        return schedule[self._current_step]

    def _checked(self, observed: Collection[Any], latent: Collection[Any]) -> Step:
        """The step of one video as lists of ints; ValueError if it breaks a rule."""
        observed, latent = [int(frame) for frame in observed], [int(frame) for frame in latent]
        done, T = self._done_frames, self._video_length
        fixed = set(self.observed_from_data) if self.samples_frame_twice else done
        fault = select.step_fault(observed, latent, done, fixed, T, self._max_T)
        if not fault and self._current_step > (1 + MAX_REFINEMENTS) * T:
            fault = "is one step too many: is_done never says that it is done"
        if fault:
            source = f" with {self._schedule_path}" if self._schedule_path else ""
            raise ValueError(f"{self._mode()}{source}, step {self._current_step}: {fault}")
        return observed, latent

    @classmethod
    def _mode(cls) -> str:
        """What --inference_mode calls this class."""
        names = (name for name, strategy in inference_strategies.items() if strategy is cls)
        return next(names, cls.__name__)


def load_optimal_schedule(path: str | os.PathLike[str]) -> dict[int, list[int]]:
    """Read {step: observed frames} from a file written by torch.save.

    Raises FileNotFoundError if there is none, ValueError if it holds anything else.
    """
    import torch

    try:
        schedule = torch.load(path, map_location="cpu", weights_only=True)
        return {int(step): [int(frame) for frame in frames] for step, frames in schedule.items()}
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no optimal schedule there: {MAKE_SCHEDULE}") from None
    except (pickle.UnpicklingError, RuntimeError, EOFError, AttributeError, TypeError, ValueError):
        raise ValueError(f"{path}: not a schedule {{step: frames}}: {MAKE_SCHEDULE}") from None


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
        distance: "lpips", or "l2" on pixels, which needs no weights.
        embed: for "lpips": its squared Euclidean distances are LPIPS; sees each done frame once.
    """

    is_adaptive = True
    options = ("distance", "embed")

    def __init__(
        self, *args: Any, distance: str = "lpips", embed: Embed | None = None, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        if distance not in ("lpips", "l2"):
            raise ValueError(f"--distance {distance!r} is unknown: choose from lpips, l2")
        self._distance = distance
        self._embed = embed
        self._videos: Any = None
        self._embeddings: dict[int, np.ndarray] = {}  # frame -> [B, d]

    def set_videos(self, videos: Any) -> None:
        """Give the videos as they are now: array or tensor [B, T, 3, H, W], float in [-1, 1].

        Only done frames are read, when the next step is made. Raises ValueError for another shape,
        and if `distance` is "lpips" without `embed`.
        """
        if self._distance == "lpips" and self._embed is None:
            raise ValueError("--distance lpips needs an embedding: give embed, or --distance l2")
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
        observed = []
        for video in range(len(self._videos)):
            embeddings = {frame: values[video] for frame, values in self._embeddings.items()}
            observed.append(select.farthest_points(embeddings, start, places))
        return observed, [latent] * len(observed)

    def _plan(self) -> tuple[list[int], int, list[int]]:
        """Frames to observe first of all, number of frames to observe, latent frames."""
        return [max(self._done_frames)], self._places, self._next_block()

    def _embed_new_frames(self) -> None:
        new = sorted(self._done_frames - self._embeddings.keys())
        if not new:
            return
        frames = self._videos[:, new]
        if hasattr(frames, "detach"):  # a torch tensor, on any device and of any float type
            frames = frames.detach().float().cpu().numpy()
        flat = np.asarray(frames, dtype=np.float32).reshape(-1, *frames.shape[2:])
        embed = self._embed if self._distance == "lpips" else None
        values = np.asarray(embed(flat)) if embed else flat.reshape(len(flat), -1)
        if values.ndim != 2 or len(values) != len(flat) or not np.isfinite(values).all():
            fault = f"embeddings are {list(values.shape)} or not finite"
            raise ValueError(f"{self._mode()}: {fault}: must be finite, [{len(flat)}, d]")
        values = values.reshape(len(self._videos), len(new), -1)
        self._embeddings.update({frame: values[:, i] for i, frame in enumerate(new)})


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
    options = ("gibbs_sweeps",)

    def __init__(self, *args: Any, gibbs_sweeps: int = 1, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if not 1 <= gibbs_sweeps <= MAX_REFINEMENTS:
            raise ValueError(f"--gibbs_sweeps {gibbs_sweeps}: must be from 1 to {MAX_REFINEMENTS}")
        starts = range(self._num_obs, self._video_length, self._step_size)
        self._blocks = [range(i, min(i + self._step_size, self._video_length)) for i in starts]
        self._num_left = gibbs_sweeps * len(self._blocks)

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


def create_strategy(mode: str, **kwargs: Any) -> InferenceStrategyBase:
    """The strategy `mode`, given those keywords that are not for other strategies only.

    Raises ValueError for an unknown mode, and what the class raises.
    """
    if mode not in inference_strategies:
        valid = ", ".join(inference_strategies)
        raise ValueError(f"--inference_mode {mode!r} is unknown: choose from {valid}")
    strategy = inference_strategies[mode]
    foreign = {name for other in inference_strategies.values() for name in other.options}
    foreign.difference_update(strategy.options)
    return strategy(**{name: value for name, value in kwargs.items() if name not in foreign})


inference_strategies: dict[str, type[InferenceStrategyBase]] = {
    "autoreg": Autoregressive,
    "long-range": LongRange,
    "mixed-autoreg-independent": LongRange,
    "independent": Independent,
    "really-independent": ReallyIndependent,
    "exp-past": ExponentialPast,
    "hierarchy-2": Hierarchy,
    "hierarchy-3": Hierarchy3,
    "hierarchy-4": Hierarchy4,
    "hierarchy-5": Hierarchy5,
    "adaptive-autoreg": AdaptiveAutoregressive,
    "adaptive-hierarchy-2": AdaptiveHierarchy,
    "adaptive-hierarchy-3": AdaptiveHierarchy3,
    "goal-directed-autoreg": GoalDirectedAutoregressive,
    "goal-directed-hierarchy-2": GoalDirectedHierarchy,
    "gibbs": Gibbs,
}
