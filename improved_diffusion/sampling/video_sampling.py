"""Sampling the videos of a data set into an evaluation directory; the work of scripts/video_sample.py."""

from __future__ import annotations

import logging
import time
from pathlib import Path

import numpy as np
from tqdm import tqdm

from improved_diffusion import dist_util
from improved_diffusion.data import machine
from improved_diffusion.data.video_datasets import VideoTestSet
from improved_diffusion.inference_utils import InferenceStrategyBase
from improved_diffusion.sampling.options import SampleConfig
from improved_diffusion.sampling.plan import Job, OneClip, Task, chosen_batches, own_jobs
from improved_diffusion.sampling.results import EvalDir
from improved_diffusion.sampling.video_sampler import VideoSampler
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
        print_status(eval_dir, batches)
        return eval_dir
    wanted = own_jobs(batches)
    if not wanted:
        return eval_dir
    # All ranks share out one list: by the time the last one looks, the first may have saved a video.
    jobs = dist_util.broadcast_object([job for job in wanted if not eval_dir.has_sample(*job)])
    _check_lengths(strategy, source, sorted({job.video for job in wanted}), task.plan.T)
    run = SamplingRun(task, source, eval_dir)
    eval_dir.write_configs(task.model.config, task.stored())
    logger.info("%d videos to sample into %s", len(jobs), eval_dir.path)
    run.make(jobs[dist_util.rank() :: dist_util.world_size()])
    return eval_dir


def print_status(eval_dir: EvalDir, batches: list[list[Job]]) -> None:
    """Print what is missing: one line per video and sample, and the array tasks that make them."""
    missing = [[job for job in batch if not eval_dir.has_sample(*job)] for batch in batches]
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
    """Makes videos in batches, keeps what is unfinished, and says how long it took."""

    def __init__(self, task: Task, source: VideoTestSet | OneClip, eval_dir: EvalDir) -> None:
        options, model = task.options, task.model
        self.task, self.source, self.eval_dir = task, source, eval_dir
        denoiser = model.denoiser(
            options.timestep_respacing,
            clip_denoised=options.clip_denoised,
            precision=options.precision,
        )
        self.sampler = VideoSampler(
            denoiser,
            model.device,
            sampler=options.sampler_name,
            seed=options.seed,
            eta=options.eta,
        )

    def make(self, jobs: list[Job]) -> None:
        """Sample in batches; videos that an earlier run left unfinished go on where they are."""
        size = self.task.options.batch_size
        frames = len(jobs) * _frames_per_video(self.task.plan.strategy())
        stages = {job: self.eval_dir.load_partial(*job)[0] for job in jobs}
        began = time.perf_counter()
        with tqdm(total=frames, unit="frame", disable=not dist_util.is_main()) as bar:
            for stage in sorted(set(stages.values()), reverse=True):
                alike = [job for job in jobs if stages[job] == stage]
                for start in range(0, len(alike), size):
                    self._make_batch(alike[start : start + size], bar)
        seconds = time.perf_counter() - began
        if jobs:
            logger.info(
                "sampled %d frames in %.1f s: %.2f frames/s, %d network calls, peak memory %.2f GB",
                bar.n,
                seconds,
                bar.n / seconds,
                self.sampler.denoiser.calls,
                machine.peak_memory_gb(self.sampler.device),
            )

    def _make_batch(self, batch: list[Job], bar: tqdm) -> None:
        """Sample, save and tidy up one batch of jobs that are at the same inference step."""
        plan, size = self.task.plan, self.task.model.image_size
        videos = np.zeros((len(batch), plan.T, 3, size, size), np.uint8)
        observed = plan.strategy().observed_from_data
        start_stage = 0
        for row, job in enumerate(batch):
            start_stage, frames = self.eval_dir.load_partial(*job)
            if frames is None:
                videos[row, observed] = self.source.read(job.video, observed)
            else:
                videos[row] = frames
        keeper = PartialKeeper(self.eval_dir, batch, videos)
        for stage, num_frames in self.sampler.sample(plan.strategy(), videos, batch, start_stage):
            bar.update(num_frames)
            keeper.keep(stage + 1)
        for job, video in zip(batch, videos, strict=True):
            self.eval_dir.save_sample(*job, video)
            self.eval_dir.drop_partial(*job)


class PartialKeeper:
    """Keeps unfinished videos on disk, as often as costs no more than a twentieth of the time."""

    def __init__(self, eval_dir: EvalDir, jobs: list[Job], videos: np.ndarray):
        self.eval_dir, self.jobs, self.videos = eval_dir, jobs, videos
        self._due = time.perf_counter()

    def keep(self, stages: int) -> None:
        """Write the videos, of which `stages` inference steps are made, unless it is too soon."""
        began = time.perf_counter()
        if began < self._due:
            return
        for job, video in zip(self.jobs, self.videos, strict=True):
            self.eval_dir.save_partial(*job, video, stages)
        ended = time.perf_counter()
        self._due = ended + 20 * (ended - began)


def _frames_per_video(strategy: InferenceStrategyBase) -> int:
    """How many frames a strategy samples, counting those that it samples again."""
    if strategy.samples_frame_twice:
        return sum(len(latent) for _, latent in strategy)
    return strategy._video_length - len(strategy.observed_from_data)
