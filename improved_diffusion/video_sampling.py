"""Sampling whole videos: an inference strategy chooses frames, a sampler makes them.

Frames are kept as uint8, which is what is saved: a frame that is sampled in one inference step is
observed in later ones exactly as its file will show it.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from improved_diffusion import dist_util, paths
from improved_diffusion.config import DiffusionConfig, SampleConfig
from improved_diffusion.inference_utils import InferenceStrategyBase, create_strategy
from improved_diffusion.results import EvalDir
from improved_diffusion.rng_util import make_generator
from improved_diffusion.samplers import SAMPLERS
from improved_diffusion.script_util import (
    config_from_args,
    create_diffusion,
    default_device,
    load_model,
    resolve_indices,
)
from improved_diffusion.video_datasets import VideoTestSet, dataset_spec, get_test_dataset
from improved_diffusion.video_io import to_uint8

logger = logging.getLogger(__name__)


class Job(NamedTuple):
    """One video to make; its noise depends on the seed and these two numbers alone."""

    video: int
    sample: int


@dataclass(frozen=True)
class SampleSettings:
    """Sampling options with everything filled in that the checkpoint and the data set say."""

    options: SampleConfig
    model_config: dict[str, Any]
    step: int
    dataset: str
    image_size: int
    T: int
    max_frames: int

    @classmethod
    def resolve(
        cls, options: SampleConfig, model_config: dict[str, Any], step: int
    ) -> SampleSettings:
        """Fill in defaults and check sizes. Raises ValueError for a user's mistake."""
        dataset = options.override_dataset or model_config.get("dataset", "")
        if not dataset:
            raise ValueError(
                f"{options.checkpoint_path} names no data set: give --override_dataset"
            )
        image_size = model_config["image_size"]
        T = options.T or dataset_spec(dataset, image_size=image_size).T
        trained = model_config.get("max_frames")
        max_frames = options.max_frames or trained
        if max_frames is None:
            raise ValueError(
                f"{options.checkpoint_path} does not say its max_frames: give --max_frames"
            )
        if trained is not None and max_frames > trained:
            logger.warning("--max_frames %d is more than the %d trained with", max_frames, trained)
        return cls(options, model_config, step, dataset, image_size, T, max_frames)

    def strategy(self) -> InferenceStrategyBase:
        """A fresh strategy for one batch of videos."""
        schedule = self.eval_dir / "optimal_schedule.pt" if self.options.optimal else None
        return create_strategy(
            self.options.inference_mode,
            video_length=self.T,
            num_obs=self.options.obs_length,
            max_frames=self.max_frames,
            step_size=self.options.step_size,
            optimal_schedule_path=schedule,
        )

    @property
    def eval_dir(self) -> Path:
        """The evaluation directory that the options name."""
        options = self.options
        if options.eval_dir is not None:
            base = Path(options.eval_dir)
        else:
            base = paths.results_dir(options.checkpoint_path, self.step, options.sampler_suffix)
        prefix = "trainset_" if options.dataset_partition == "train" else ""
        if options.override_dataset:
            prefix += Path(options.override_dataset).name + "_"
        return base / paths.inference_mode_str(
            options.inference_mode,
            self.max_frames,
            options.step_size,
            self.T,
            options.obs_length,
            optimal=options.optimal,
            prefix=prefix,
        )

    def stored(self) -> dict[str, Any]:
        """What sample_config.json keeps: all that the samples' values depend on."""
        options = self.options
        kept = (
            "checkpoint_path inference_mode step_size obs_length optimal eta timestep_respacing "
            "precision clip_denoised dataset_partition seed"
        )
        return {name: getattr(options, name) for name in kept.split()} | {
            "checkpoint_step": self.step,
            "dataset": self.dataset,
            "T": self.T,
            "max_frames": self.max_frames,
            "sampler": options.sampler_name,
            "observed_frames": self.strategy().observed_from_data,
        }


class VideoSampler:
    """Samples batches of videos with one network and one set of options."""

    def __init__(self, model: torch.nn.Module, settings: SampleSettings, device: str):
        self.model, self.settings, self.device = model, settings, torch.device(device)
        respacing = settings.options.timestep_respacing
        overrides = {"timestep_respacing": respacing} if respacing else {}
        self.diffusion = create_diffusion(
            config_from_args(DiffusionConfig, settings.model_config | overrides)
        )
        self.network_calls = 0

    def sample(
        self,
        strategy: InferenceStrategyBase,
        videos: np.ndarray,
        jobs: Sequence[Job],
        progress: Iterable[Any] | None = None,
    ) -> np.ndarray:
        """Fill in the missing frames of `videos`, uint8 [B, T, 3, H, W], in place; return them.

        The frames `strategy.observed_from_data` must be there. jobs: B of them.
        progress: a tqdm bar that counts sampled frames.
        """
        if strategy.is_adaptive:
            strategy.set_videos(SymmetricView(videos))  # type: ignore[attr-defined]
        for stage, (observed, latent) in enumerate(strategy):
            if not strategy.is_adaptive:
                observed, latent = [observed] * len(jobs), [latent] * len(jobs)
            counts = [(len(o), len(la)) for o, la in zip(observed, latent, strict=True)]
            for count in sorted(set(counts)):  # the network gets real frames only: no padding
                rows = [row for row, its_count in enumerate(counts) if its_count == count]
                self._sample_stage(
                    videos,
                    rows,
                    [observed[r] for r in rows],
                    [latent[r] for r in rows],
                    jobs,
                    stage,
                )
            if isinstance(progress, tqdm):
                progress.update(sum(map(len, latent)))
        return videos

    def _sample_stage(
        self,
        videos: np.ndarray,
        rows: list[int],
        observed: list[list[int]],
        latent: list[list[int]],
        jobs: Sequence[Job],
        stage: int,
    ) -> None:
        """One network trajectory for some rows of a batch, written back into `videos`."""
        indices = np.array([o + la for o, la in zip(observed, latent, strict=True)])
        num_observed = len(observed[0])
        where = np.array(rows)[:, None]
        clean = torch.from_numpy(videos[where, indices]).to(self.device).float() / 127.5 - 1
        obs_mask = torch.zeros(*indices.shape, 1, 1, 1, device=self.device)
        obs_mask[:, :num_observed] = 1
        options = self.settings.options
        generators = [
            make_generator(options.seed, jobs[row].video, jobs[row].sample, stage) for row in rows
        ]
        out = self._run_sampler(
            tuple(clean.shape),
            model_kwargs={
                "x0": clean * obs_mask,
                "obs_mask": obs_mask,
                "latent_mask": 1 - obs_mask,
                "frame_indices": torch.from_numpy(indices).to(self.device),
            },
            generators=generators,
        )
        videos[where, indices[:, num_observed:]] = to_uint8(out[:, num_observed:])

    def _run_sampler(
        self,
        shape: tuple[int, ...],
        *,
        model_kwargs: dict[str, Tensor],
        generators: list[torch.Generator],
    ) -> Tensor:
        options = self.settings.options

        def model(*args: Any, **kwargs: Any) -> Tensor:
            self.network_calls += 1
            return self.model(*args, **kwargs)

        bf16 = torch.autocast(self.device.type, torch.bfloat16, enabled=options.precision == "bf16")
        with torch.inference_mode(), bf16:
            return SAMPLERS[options.sampler_name](
                self.diffusion,
                model,
                shape,
                eta=options.eta,
                clip_denoised=options.clip_denoised,
                model_kwargs=model_kwargs,
                generator=generators,
            )


class SymmetricView:
    """uint8 videos seen as float32 in [-1, 1]; only the frames that are indexed are converted."""

    def __init__(self, videos: np.ndarray):
        self._videos, self.shape, self.ndim = videos, videos.shape, videos.ndim

    def __len__(self) -> int:
        return len(self._videos)

    def __getitem__(self, index: Any) -> np.ndarray:
        return self._videos[index].astype(np.float32) / 127.5 - 1


def missing_jobs(settings: SampleSettings, eval_dir: EvalDir, num_videos: int) -> list[Job]:
    """What the options ask for and is not on disk yet, sample by sample."""
    options = settings.options
    videos = resolve_indices(
        num_videos,
        indices=options.indices,
        subset_size=options.subset_size,
        batch_size=options.batch_size,
    )
    if not videos:
        logger.info("nothing to do: SLURM_ARRAY_TASK_ID lies past the last batch of videos")
    samples = range(options.num_samples) if options.sample_idx is None else [options.sample_idx]
    jobs = [Job(video, sample) for sample in samples for video in videos]
    return [job for job in jobs if not eval_dir.has_sample(*job)]


def sample_dataset(options: SampleConfig) -> EvalDir:
    """Make the videos that `options` ask for; those that exist are skipped.

    Raises ValueError or FileNotFoundError for a user's mistake, before anything is written.
    """
    device = default_device(options.device)
    model, model_config, step = load_model(options.checkpoint_path, device)
    settings = SampleSettings.resolve(options, model_config, step)
    strategy = settings.strategy()
    if options.just_visualise:
        _visualise(settings)
        return EvalDir(settings.eval_dir)
    test_set = get_test_dataset(
        settings.dataset,
        T=settings.T,
        image_size=settings.image_size,
        partition=options.dataset_partition,
    )
    eval_dir = EvalDir(settings.eval_dir)
    jobs = missing_jobs(settings, eval_dir, len(test_set))
    _check_lengths(strategy, test_set, sorted({job.video for job in jobs}), settings.T)
    sampler = VideoSampler(model, settings, device)
    eval_dir.write_configs(model_config, settings.stored())
    logger.info("%d videos to sample into %s", len(jobs), eval_dir.path)
    mine = jobs[dist_util.rank() :: dist_util.world_size()]
    _sample_jobs(sampler, test_set, eval_dir, mine)
    return eval_dir


def _visualise(settings: SampleSettings) -> None:
    from improved_diffusion.plots import draw_schedule

    path = settings.eval_dir / "schedule.png"
    draw_schedule(settings.strategy(), path)
    logger.info("drew the schedule to %s", path)


def _check_lengths(
    strategy: InferenceStrategyBase, test_set: VideoTestSet, videos: list[int], T: int
) -> None:
    """Observed frames must be in the data; truth for the others need not."""
    needed = max(strategy.observed_from_data, default=-1) + 1
    lengths = {video: test_set.length(video) for video in videos}
    for video, length in lengths.items():
        if length < needed:
            why = "goal frames" if strategy.is_goal_directed else "--obs_length"
            raise ValueError(
                f"test video {video} has {length} frames, {why} needs {needed}: give a smaller --T or --obs_length"
            )
    if lengths and min(lengths.values()) < T:
        logger.info("videos of %d frames continue data of %d frames", T, min(lengths.values()))


def _sample_jobs(
    sampler: VideoSampler, test_set: VideoTestSet, eval_dir: EvalDir, jobs: list[Job]
) -> None:
    settings = sampler.settings
    size = settings.options.batch_size
    observed = settings.strategy().observed_from_data
    frames = len(jobs) * _frames_per_video(settings.strategy())
    start = time.perf_counter()
    with tqdm(total=frames, unit="frame", disable=not dist_util.is_main()) as bar:
        for begin in range(0, len(jobs), size):
            batch = jobs[begin : begin + size]
            shape = (len(batch), settings.T, 3, settings.image_size, settings.image_size)
            videos = np.zeros(shape, np.uint8)
            for row, job in enumerate(batch):
                videos[row, observed] = test_set.read(job.video, observed)
            sampler.sample(settings.strategy(), videos, batch, bar)
            for job, video in zip(batch, videos, strict=True):
                eval_dir.save_sample(*job, video)
    seconds = time.perf_counter() - start
    if jobs:
        logger.info(
            "sampled %d frames in %.1f s: %.2f frames/s, %d network calls, peak memory %.2f GB",
            frames,
            seconds,
            frames / seconds,
            sampler.network_calls,
            dist_util.peak_memory_gb(sampler.device),
        )


def _frames_per_video(strategy: InferenceStrategyBase) -> int:
    """How many frames a strategy samples, counting those that it samples again."""
    if strategy.samples_frame_twice:
        return sum(len(latent) for _, latent in strategy)
    return strategy._video_length - len(strategy.observed_from_data)
