"""Sampling the videos of a data set into an evaluation directory; the work of scripts/video_sample.py."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from improved_diffusion import dist_util
from improved_diffusion.data import machine
from improved_diffusion.data.step_order import rounds_of
from improved_diffusion.data.video_datasets import VideoTestSet
from improved_diffusion.inference_utils import InferenceStrategyBase
from improved_diffusion.sampling.batch_size import fitting_batch_size
from improved_diffusion.sampling.keeper import Keeper
from improved_diffusion.sampling.options import SampleConfig
from improved_diffusion.sampling.plan import (
    Job,
    OneClip,
    Task,
    VideoPlan,
    chosen_batches,
    own_jobs,
)
from improved_diffusion.sampling.rank_team import RankTeam, split_jobs
from improved_diffusion.sampling.results import EvalDir
from improved_diffusion.sampling.unfinished_video import UnfinishedVideo
from improved_diffusion.sampling.video_sampler import Sampler, VideoSampler, make_videos
from improved_diffusion.sampling.video_sampler import sample_video as sample_video  # published here

logger = logging.getLogger(__name__)


def sample_dataset(options: SampleConfig) -> EvalDir:
    """Make the videos that `options` ask for; those that exist are skipped.

    Raises ValueError or FileNotFoundError for a user's mistake, before anything is written.
    """
    task = Task.resolve(options)
    strategy = task.plan.strategy()
    eval_dir = EvalDir(task.eval_dir)
    if options.just_visualise:
        _visualise(task.plan, eval_dir.path / "schedule.png")
        return eval_dir
    source = task.source()
    batches = chosen_batches(options, len(source))
    eval_dir.check_config(task.stored(), task.ignored())
    if options.status:
        print_status(task, eval_dir, batches)
        return eval_dir
    wanted = own_jobs(batches)
    if not wanted:
        return eval_dir
    # All ranks share out one list: by the time the last one looks, the first may have saved a video.
    jobs = dist_util.broadcast_object(_unfinished(task, eval_dir, wanted))
    _check_lengths(strategy, source, sorted({job.video for job in wanted}), task.plan.T)
    run = SamplingRun(task, source, eval_dir)
    logger.info("%d videos to sample into %s", len(jobs), eval_dir.path)
    run.make(jobs)
    return eval_dir


def _unfinished(task: Task, eval_dir: EvalDir, wanted: list[Job]) -> list[Job]:
    """Those of the jobs that are left to do; what killed runs left behind is removed."""
    if dist_util.is_main():
        eval_dir.clean_up()
    return [job for job in wanted if not eval_dir.has_sample(*job, task.shape)]


def print_status(task: Task, eval_dir: EvalDir, batches: list[list[Job]]) -> None:
    """Print what is missing: one line per video and sample, and the array tasks that make them."""
    shape = task.shape
    missing = [[job for job in batch if not eval_dir.has_sample(*job, shape)] for batch in batches]
    for job in sorted(job for batch in missing for job in batch):
        print(f"missing: video {job.video} sample {job.sample}")
    tasks = [str(index) for index, batch in enumerate(missing) if batch]
    if tasks and task.options.batch_size is not None:
        print(f"--array={','.join(tasks)}")
    total, left = sum(map(len, batches)), sum(map(len, missing))
    print(f"{total - left} of {total} videos are in {eval_dir.path}")


def _visualise(plan: VideoPlan, path: Path) -> None:
    from improved_diffusion.sampling.schedule_picture import draw_schedule

    if plan.schedule is None:
        raise ValueError(
            "--just_visualise: adaptive strategies choose observed frames by what the sampled ones "
            "look like, so there is no schedule before sampling: choose another --inference_mode"
        )
    draw_schedule(plan.strategy(), path)
    rounds = rounds_of(plan.schedule)
    words = "%d inference steps in %d rounds, at most %d at once; drew the schedule to %s"
    logger.info(words, len(plan.schedule), len(rounds), max(rounds), path)


def _check_lengths(
    strategy: InferenceStrategyBase, source: VideoTestSet | OneClip, videos: list[int], T: int
) -> None:
    """Observed frames must be in the data; truth for the others need not."""
    lengths = {video: source.length(video) for video in videos}
    needed = max(strategy.observed_from_data, default=-1) + 1
    for video, length in lengths.items():
        if length < needed:
            what = "the goal frames" if strategy.is_goal_directed else "--obs_length"
            raise ValueError(
                f"video {video} has {length} frames, {what} asks for {needed}: "
                "give a smaller --T or --obs_length"
            )
    shortest = min(lengths.values(), default=T)
    if shortest < T:
        logger.info("videos of %d frames continue data of %d frames", T, shortest)


class SamplingRun:
    """Makes videos, keeps what is unfinished, and says how long it took.

    Raises ValueError or FileNotFoundError, before anything is written, for weights that do not fit
    and a plan that will fail.
    """

    def __init__(self, task: Task, source: VideoTestSet | OneClip, eval_dir: EvalDir) -> None:
        options, model = task.options, task.model
        self.task, self.eval_dir = task, eval_dir
        self.sampler = VideoSampler(
            task.denoiser(),
            model.device,
            sampler=options.sampler_name,
            seed=options.seed,
            eta=options.eta,
            batch_size=options.batch_size or 1,
        )
        task.plan.check(model.image_size)
        self.keeper = Keeper(task, source, eval_dir)

    def make(self, jobs: list[Job]) -> None:
        """Sample the videos; those that an earlier run left unfinished go on where they are."""
        if self.task.options.batch_size is None and jobs:
            self.sampler.batch_size = self._fitting_batch_size(len(jobs))
        shared, own = split_jobs(jobs, self.task.plan)
        began = time.perf_counter()
        total = (len(shared) + len(own)) * self.task.plan.num_sampled
        with tqdm(total=total, unit="frame", disable=not dist_util.is_main()) as bar:
            if shared:
                self._make_together(shared, bar)
            self._make(own, self.sampler, bar)
        seconds, made = time.perf_counter() - began, self.sampler.num_frames
        if shared or own:
            logger.info(
                "sampled %d frames in %.1f s: %.2f frames/s, %d network calls, peak memory %.2f GB",
                made,
                seconds,
                made / seconds,
                self.sampler.denoiser.calls,
                machine.peak_memory_gb(self.sampler.device),
            )

    def _fitting_batch_size(self, num_videos: int) -> int:
        """No more than can run at once, and than twice as many videos as that have room for."""
        task = self.task
        widest = max(rounds_of(task.plan.schedule or ()), default=1)
        room = machine.free_memory_bytes(torch.device("cpu")) or 0
        video_bytes = math.prod(task.shape)
        most = num_videos * widest
        if not task.plan.is_side_by_side and room:
            most = max(1, min(most, room // (4 * video_bytes)))
        frames = task.plan.max_frames, *task.shape[1:]
        return fitting_batch_size(self.sampler.denoiser, task.model.device, frames, most)

    def _make_together(self, jobs: list[Job], bar: Any) -> None:
        team = RankTeam(self.sampler)
        if dist_util.rank() > 0:
            team.follow()
            return
        with team:
            self._make(jobs, team, bar)

    def _make(self, jobs: list[Job], sampler: Sampler, bar: Any) -> None:
        """Sample and save videos."""
        for video, step in make_videos(self._opened(jobs, bar), sampler):
            bar.update(len(step.latent))
            if video.ready:
                self.keeper.keep(video, step)
            else:
                self.keeper.finish(video)

    def _opened(self, jobs: list[Job], bar: Any) -> Iterator[UnfinishedVideo]:
        """The videos one after the other; those that another run has finished meanwhile are left out."""
        plan = self.task.plan
        for job in jobs:
            if self.eval_dir.has_sample(*job, self.task.shape):
                continue
            video = self.keeper.open(job)
            if video.ready:
                bar.update(int(video.made.sum()) - len(plan.observed_from_data))
                yield video
            else:
                self.keeper.finish(video)
