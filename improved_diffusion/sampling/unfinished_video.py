"""A video in work: its frames, which of them exist, and which inference steps wait for no other."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import numpy as np

from improved_diffusion.data.step_order import OrderedStep
from improved_diffusion.sampling.plan import Job, VideoPlan

# The frames of an inference step that is made already, uint8 [n, 3, H, W], or None.
Kept = Callable[[OrderedStep], np.ndarray | None]


class UnfinishedVideo:
    """One video while its inference steps are made.

    Frames are kept as uint8, which is what is saved: a frame that is sampled in one inference step is
    observed in later ones exactly as its file will show it.

    Args:
        job: which video it is.
        plan: how it is made.
        observed: the frames `plan.observed_from_data`, uint8 [n, 3, H, W].
        kept: asked once for each step, when nothing that it waits for is missing.

    Attributes:
        frames: uint8 [T, 3, H, W]; those that are not made are black.
        made: bool [T], the frames that exist: read from the data, or sampled.
        seconds: of its share of the rounds so far; None where an earlier run has made some steps.
    """

    def __init__(
        self, job: Job, plan: VideoPlan, observed: np.ndarray, kept: Kept = lambda step: None
    ) -> None:
        self.job, self._kept = job, kept
        self.frames = np.zeros((plan.T, *observed.shape[1:]), np.uint8)
        self.made = np.zeros(plan.T, bool)
        self._put(plan.observed_from_data, observed)
        self.seconds: float | None = 0.0
        self._steps: dict[int, OrderedStep] = {}  # those that are made, by their stage
        # Strategies that look at frames have no schedule: they are asked for one step after the other.
        self._waiting = list(plan.schedule or ())
        self._later = iter(()) if plan.schedule is not None else plan.steps_of(self.frames)
        self._ready: list[OrderedStep] | None = None

    @property
    def ready(self) -> list[OrderedStep]:
        """The steps that wait for no other, in the strategy's order; none: the video is finished."""
        while self._ready is None:
            if not self._waiting:
                self._waiting.extend(itertools.islice(self._later, 1))
            ready = [step for step in self._waiting if step.after <= self._steps.keys()]
            if not any([self._restore(step) for step in ready]):
                self._ready = ready
        return self._ready

    @property
    def schedule(self) -> list[tuple[list[int], list[int]]]:
        """The (observed, latent) frames of the steps that are made, in the strategy's order."""
        return [(step.observed, step.latent) for _, step in sorted(self._steps.items())]

    def observed_frames(self, step: OrderedStep) -> np.ndarray:
        """What the step observes, uint8 [n, 3, H, W]. Raises ValueError where it does not exist."""
        self._require_made(step.observed)
        return self.frames[step.observed]

    def finish(self, step: OrderedStep, frames: np.ndarray) -> None:
        """Put in what a ready step has sampled, uint8 [n, 3, H, W]."""
        self._put(step.latent, frames)
        self._steps[step.stage] = step
        self._waiting.remove(step)
        self._ready = None

    def whole(self) -> np.ndarray:
        """The finished video. Raises ValueError where a frame of it was never made."""
        self._require_made(range(len(self.made)))
        return self.frames

    def _restore(self, step: OrderedStep) -> bool:
        """Finish the step with what is kept of it, if there is any."""
        frames = self._kept(step)
        if frames is not None:
            self.finish(step, frames)
            self.seconds = None
        return frames is not None

    def _put(self, indices: Sequence[int], frames: np.ndarray) -> None:
        if frames.shape != (len(indices), *self.frames.shape[1:]):
            shape = list(frames.shape)
            raise ValueError(f"{self}: {len(indices)} frames are to be put in, not {shape}")
        self.frames[indices] = frames
        self.made[indices] = True

    def _require_made(self, frames: Sequence[int]) -> None:
        missing = [int(frame) for frame in frames if not self.made[frame]]
        if missing:
            raise ValueError(
                f"{self}: the frames {missing} were never made: the strategy ends before they are, "
                "or observes them before"
            )

    def __str__(self) -> str:
        return f"video {self.job.video} sample {self.job.sample}"
