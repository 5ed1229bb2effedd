"""Sampling the videos of a data set into an evaluation directory; the work of scripts/video_sample.py."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from tqdm import tqdm

from improved_diffusion import dist_util
from improved_diffusion.data import machine
from improved_diffusion.data.video_datasets import VideoTestSet
from improved_diffusion.inference_utils import InferenceStrategyBase
from improved_diffusion.sampling.keeper import Keeper
from improved_diffusion.sampling.options import SampleConfig
from improved_diffusion.sampling.plan import Job, OneClip, Task, chosen_batches, own_jobs
from improved_diffusion.sampling.results import EvalDir, Partial
from improved_diffusion.sampling.video_sampler import VideoSampler, require_made
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
        _visualise(strategy, eval_dir.path / "schedule.png")
        return eval_dir
    source = task.source()
    batches = chosen_batches(options, len(source))
    if options.status:
        print_status(task, eval_dir, batches)
        return eval_dir
    wanted = own_jobs(batches)
    if not wanted:
        return eval_dir
    stored, ignored = task.stored(), task.ignored()
    eval_dir.check_config(stored, ignored)
    # All ranks share out one list: by the time the last one looks, the first may have saved a video.
    jobs = dist_util.broadcast_object(_unfinished(task, eval_dir, wanted))
    _check_lengths(strategy, source, sorted({job.video for job in wanted}), task.plan.T)
    run = SamplingRun(task, source, eval_dir)
    logger.info("%d videos to sample into %s", len(jobs), eval_dir.path)
    run.make(jobs[dist_util.rank() :: dist_util.world_size()])
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
    if tasks:
        print(f"--array={','.join(tasks)}")
    total, left = sum(map(len, batches)), sum(map(len, missing))
    print(f"{total - left} of {total} videos are in {eval_dir.path}")


def _visualise(strategy: InferenceStrategyBase, path: Path) -> None:
    from improved_diffusion.sampling.schedule_picture import draw_schedule

    if strategy.is_adaptive:
        raise ValueError(
            "--just_visualise: adaptive strategies choose observed frames by what the sampled ones "
            "look like, so there is no schedule before sampling: choose another --inference_mode"
        )
    draw_schedule(strategy, path)
    logger.info("drew the schedule to %s", path)


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
    """Makes videos in batches, keeps what is unfinished, and says how long it took.

    Raises ValueError or FileNotFoundError, before anything is written, for weights that do not fit
    and a plan that will fail.
    """

    def __init__(self, task: Task, source: VideoTestSet | OneClip, eval_dir: EvalDir) -> None:
        options, model = task.options, task.model
        self.task, self.source, self.eval_dir = task, source, eval_dir
        self.sampler = VideoSampler(
            task.denoiser(),
            model.device,
            sampler=options.sampler_name,
            seed=options.seed,
            eta=options.eta,
        )
        task.plan.check(model.image_size)
        self.keeper = Keeper(task, source, eval_dir)

    def make(self, jobs: list[Job]) -> None:
        """Sample in batches; videos that an earlier run left unfinished go on where they are."""
        total = len(jobs) * _frames_per_video(self.task.plan.strategy())
        stages = {job: self.eval_dir.partial_stages(*job) for job in jobs}
        began, made = time.perf_counter(), 0
        with tqdm(total=total, unit="frame", disable=not dist_util.is_main()) as bar:
            while stages:
                stage, partials = self._next_batch(stages)
                for num_frames in self._make_batch(stage, partials):
                    bar.update(num_frames)
                    made += num_frames
        seconds = time.perf_counter() - began
        if jobs:
            logger.info(
                "sampled %d frames in %.1f s: %.2f frames/s, %d network calls, peak memory %.2f GB",
                made,
                seconds,
                made / seconds,
                self.sampler.denoiser.calls,
                machine.peak_memory_gb(self.sampler.device),
            )

    def _next_batch(self, stages: dict[Job, int]) -> tuple[int, dict[Job, Partial | None]]:
        """(inference steps made, unfinished videos) of a batch, perhaps none; takes it out of `stages`.

        Another run may work in the same folder: of the videos that were furthest when they were
        looked at last, those make the batch that are still there; finished ones are dropped.
        """
        stage, batch = max(stages.values()), {}
        furthest = [job for job, reached in stages.items() if reached == stage]
        for job in furthest[: self.task.options.batch_size]:
            if self.eval_dir.has_sample(*job, self.task.shape):
                del stages[job]
                continue
            partial = self.keeper.load(job)
            stages[job] = partial.stages if partial else 0
            if stages[job] == stage:
                batch[job] = partial
                del stages[job]
        return stage, batch

    def _make_batch(self, stage: int, partials: dict[Job, Partial | None]) -> Iterator[int]:
        """Sample and save videos of which `stage` inference steps are made; yields new frames."""
        batch, plan, began = list(partials), self.task.plan, time.perf_counter()
        if not batch:
            return
        videos = np.zeros((len(batch), *self.task.shape), np.uint8)
        made = np.zeros(videos.shape[:2], bool)
        strategy = plan.strategy()
        observed = strategy.observed_from_data
        for row, job in enumerate(batch):
            partial = partials[job]
            if partial is None:
                videos[row, observed] = self.source.read(job.video, observed)
                made[row, observed] = True
            else:
                videos[row], made[row] = partial.frames, partial.made
        steps = self.sampler.sample(strategy, videos, batch, stage, made)
        for done, num_frames in steps:
            yield num_frames
            rows = zip(videos, made, strict=True)
            self.keeper.keep({j: Partial(done + 1, *r) for j, r in zip(batch, rows, strict=True)})
        seconds = None if stage else (time.perf_counter() - began) / len(batch)
        for row, job in enumerate(batch):
            require_made(job, made[row], range(plan.T))
            self.keeper.finish(job, videos[row], strategy.steps_made(row), seconds)


def _frames_per_video(strategy: InferenceStrategyBase) -> int:
    """How many frames a strategy samples, counting those that it samples again."""
    if strategy.samples_frame_twice:
        return sum(len(latent) for _, latent in strategy)
    return strategy._video_length - len(strategy.observed_from_data)
