"""Puts the videos of one run of sampling on disk, unfinished and finished, and reads them back."""

from __future__ import annotations

import contextlib
import functools
import logging
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from improved_diffusion.data.machine import code_version
from improved_diffusion.data.strategy_base import Step
from improved_diffusion.data.video_datasets import VideoTestSet
from improved_diffusion.sampling.plan import Job, OneClip, Task
from improved_diffusion.sampling.results import EvalDir, Partial, content_digest

logger = logging.getLogger(__name__)


class Keeper:
    """The files of one run in its evaluation directory.

    The options are stored when the first file is written, so that a run that fails before leaves
    nothing behind.
    """

    def __init__(self, task: Task, source: VideoTestSet | OneClip, eval_dir: EvalDir) -> None:
        self.task, self.source, self.eval_dir = task, source, eval_dir
        self._observed = task.plan.strategy().observed_from_data
        self._claimed = False
        self._due = time.perf_counter()
        self._truth = functools.cache(self._hash_truth)

    def load(self, job: Job) -> Partial | None:
        """What is kept of an unfinished video; None where there is nothing to go on with.

        Raises ValueError where other samples of the video were made of another true video.
        """
        self._check_truth(job.video)
        partial = self.eval_dir.load_partial(*job)
        if partial is None:
            return None
        shape = self.task.shape
        fits = partial.frames.shape == shape and partial.made.shape == shape[:1]
        if fits:
            data = self.source.read(job.video, self._observed)
            fits = np.array_equal(partial.frames[self._observed], data)
        if not fits:
            logger.warning("%s: what is kept of %s does not fit: from its start", *self._named(job))
            self.eval_dir.drop_partial(*job)
            return None
        return partial

    def keep(self, partials: Mapping[Job, Partial]) -> None:
        """Write unfinished videos, as often as costs no more than a twentieth of the time.

        A disk that has no room for them costs nothing but what would have to be made again.
        """
        began = time.perf_counter()
        if began < self._due:
            return
        try:
            with self._first_file():
                for job, partial in partials.items():
                    self.eval_dir.save_partial(*job, partial)
        except OSError as error:
            logger.warning("unfinished videos are not kept: %s", error)
        ended = time.perf_counter()
        self._due = ended + 20 * (ended - began)

    def finish(
        self, job: Job, video: np.ndarray, schedule: Sequence[Step], seconds: float | None
    ) -> None:
        """Write a finished video, uint8 [T, 3, H, W], what its truth is, and how it was made.

        seconds: None where not all of it was made in this run.
        """
        with self._first_file():
            truth = self._truth(job.video)
            if truth is not None:
                self.eval_dir.save_truth(job.video, truth)
            record = {"schedule": schedule, "seconds": seconds, "version": code_version()}
            self.eval_dir.save_record(*job, record)
            self.eval_dir.save_sample(*job, video)
        self.eval_dir.drop_partial(*job)

    @contextlib.contextmanager
    def _first_file(self) -> Any:
        """Around writing files: before the first of them the options are stored, or compared."""
        if self._claimed:
            yield
            return
        task = self.task
        with self.eval_dir.claimed(task.model.config, task.stored(), task.ignored()):
            yield
        self._claimed = True

    def _hash_truth(self, video: int) -> dict[str, Any] | None:
        """{"frames": n, "sha256": of the first n frames}; None for a clip of one's own."""
        if isinstance(self.source, OneClip):
            return None
        frames = self.source.read(video)
        return {"frames": len(frames), "sha256": content_digest(frames)}

    def _check_truth(self, video: int) -> None:
        stored = self.eval_dir.truth(video)
        if stored is not None and stored != self._truth(video):
            raise ValueError(
                f"{self.eval_dir.path} holds samples of another video {video} than the one that "
                f"{self.task.dataset} has now: choose another folder with --eval_dir, or restore the "
                "data set"
            )

    def _named(self, job: Job) -> tuple[Any, str]:
        return self.eval_dir.path, f"video {job.video} sample {job.sample}"
