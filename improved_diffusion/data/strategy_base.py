"""The contract of inference strategies: what each keeps, is asked for, and must not do. No torch here.

`inference_utils` has the strategies.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import pickle
from collections.abc import Callable, Collection, Iterator
from typing import Any

import numpy as np

from improved_diffusion.config import NoOptions
from improved_diffusion.data import frame_selection as select
from improved_diffusion.registry import STRATEGIES

logger = logging.getLogger(__name__)

# (observed, latent), each a list of frame indices; adaptive strategies: a list of those per video.
Step = tuple[list[Any], list[Any]]
# Frames, an array [n, 3, H, W] of floats in [-1, 1] -> [n, d] floats, an array or a tensor on any device.
Embed = Callable[[np.ndarray], Any]
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

    A strategy with options of its own declares them as `Options`, a frozen dataclass of
    `config.option` fields: each is a flag of every script that takes --inference_mode, is stored with
    the samples (`stored_options`), and names their folder if it says how (`folder_suffix`). The
    values of one run are in `self.options`.

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

    Options: type[Any] = NoOptions

    def __init__(
        self,
        video_length: int,
        num_obs: int,
        max_frames: int,
        step_size: int,
        optimal_schedule_path: str | os.PathLike[str] | None = None,
        options: Any = None,
    ) -> None:
        self.validate(video_length, num_obs, max_frames, step_size)
        self.options: Any = self.Options() if options is None else options
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

    @classmethod
    def stored_options(cls, options: Any) -> dict[str, Any]:
        """What sample_config.json keeps of `options`, an instance of `Options`."""
        return dataclasses.asdict(options)

    @classmethod
    def folder_suffix(cls, options: Any) -> str:
        """What `options` add to the mode in the name of the evaluation directory.

        `_<word><value>` for each that was declared by `option(..., folder_word=word)`.
        """
        return "".join(
            f"_{item.metadata['folder_word']}{getattr(options, item.name)}"
            for item in dataclasses.fields(options)
            if "folder_word" in item.metadata
        )

    @classmethod
    def embedding(cls, options: Any) -> str | None:
        """The name of the embedding that the class must be given as `embed`; None: it needs none."""
        return None

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
        if logger.isEnabledFor(logging.DEBUG):  # finding the mode's name takes longer than a step
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
        names = (name for name, strategy in STRATEGIES.items() if strategy is cls)
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
