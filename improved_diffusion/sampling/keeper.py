"""Puts the videos of one run of sampling on disk, unfinished and finished, and reads them back."""

from __future__ import annotations

import contextlib
import functools
import logging
from typing import Any

import numpy as np

from improved_diffusion.data.machine import code_version
from improved_diffusion.data.step_order import OrderedStep
from improved_diffusion.data.video_datasets import VideoTestSet
from improved_diffusion.sampling.plan import Job, OneClip, Task
from improved_diffusion.sampling.results import EvalDir, KeptStep, content_digest, truth_of
from improved_diffusion.sampling.unfinished_video import Kept, UnfinishedVideo

logger = logging.getLogger(__name__)


class Keeper:
    """The files of one run in its evaluation directory.

    The options are stored when the first file is written, so that a run that fails before leaves
    nothing behind.
    """

    def __init__(self, task: Task, source: VideoTestSet | OneClip, eval_dir: EvalDir) -> None:
        self.task, self.source, self.eval_dir = task, source, eval_dir
        self._claimed = False
        self._has_room = True
        self._truth = functools.cache(self._hash_truth)
        self._observed_sha256: dict[Job, str] = {}  # of the videos in work

    def open(self, job: Job) -> UnfinishedVideo:
        """A video to go on with where an earlier run left it, or to begin.

        Raises ValueError where other samples of the video were made of another true video.
        """
        self._check_truth(job.video)
        plan = self.task.plan
        observed = self.source.read(job.video, plan.observed_from_data)
        self._observed_sha256[job] = content_digest(observed)
        return UnfinishedVideo(job, plan, observed, self._kept_steps(job))

    def _kept_steps(self, job: Job) -> Kept:
        """What is kept of a video's steps; where one does not fit, none of those after it."""
        stages = self.eval_dir.kept_stages(*job)

        def kept(step: OrderedStep) -> np.ndarray | None:
            if step.stage not in stages:
                return None
            found = self.eval_dir.load_step(*job, step.stage)
            if found is None:  # damaged, or another run has just finished the video
                return None
            shape = len(step.latent), *self.task.shape[1:]
            fits = list(found.latent) == step.latent and found.frames.shape == shape
            if fits and found.observed_sha256 == self._observed_sha256[job]:
                return found.frames
            words = "%s: what is kept of video %d sample %d does not fit: from inference step %d on"
            logger.warning(words, self.eval_dir.path, *job, step.stage)
            self.eval_dir.drop_steps(*job)
            stages.clear()
            return None

        return kept

    def keep(self, video: UnfinishedVideo, step: OrderedStep) -> None:
        """Write an inference step that has just been made.

        A disk that has no room for it costs nothing but what would have to be made again.
        """
        frames, digest = video.frames[step.latent], self._observed_sha256[video.job]
        try:
            with self._first_file():
                kept = KeptStep(np.array(step.latent), frames, digest)
                self.eval_dir.save_step(*video.job, step.stage, kept)
        except OSError as error:
            if self._has_room:
                logger.warning("unfinished videos are not kept: %s", error)
            self._has_room = False

    def finish(self, video: UnfinishedVideo) -> None:
        """Write a finished video, what its truth is, and how it was made.

        Raises ValueError where a frame of it was never made.
        """
        frames, job = video.whole(), video.job
        with self._first_file():
            truth = self._truth(job.video)
            if truth is not None:
                self.eval_dir.save_truth(job.video, truth)
            record = {
                "schedule": video.schedule,
                "seconds": video.seconds,
                "version": code_version(),
            }
            self.eval_dir.save_record(*job, record)
            self.eval_dir.save_sample(*job, frames)
        self.eval_dir.drop_steps(*job)
        del self._observed_sha256[job]

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
        return truth_of(self.source.read(video))

    def _check_truth(self, video: int) -> None:
        if self.eval_dir.truth(video) is not None:
            self.eval_dir.check_truth(video, self._truth(video), self.task.dataset)
