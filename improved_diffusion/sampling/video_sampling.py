"""Sampling whole videos: an inference strategy chooses frames, a sampler makes them.

Frames are kept as uint8, which is what is saved: a frame that is sampled in one inference step is
observed in later ones exactly as its file will show it.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from improved_diffusion import dist_util
from improved_diffusion.config import DiffusionConfig
from improved_diffusion.data import paths
from improved_diffusion.data.checkpoints import load_weights
from improved_diffusion.data.rng_util import make_generator
from improved_diffusion.data.video_datasets import VideoTestSet, get_test_dataset
from improved_diffusion.data.video_io import OpenVideo, centre_crop_resize, open_video, to_uint8
from improved_diffusion.inference_utils import InferenceStrategyBase, create_strategy
from improved_diffusion.registry import STRATEGIES
from improved_diffusion.sampling.options import SampleConfig
from improved_diffusion.sampling.results import EvalDir
from improved_diffusion.sampling.samplers import SAMPLERS
from improved_diffusion.script_util import (
    array_task,
    build_model,
    choose_videos,
    config_from_args,
    create_diffusion,
    default_device,
    stored_dataset,
    trained_image_size,
)

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
        spec = stored_dataset(dataset, model_config)
        image_size = model_config.get("image_size") or spec.image_size
        T = options.T or spec.T
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
        schedule = paths.optimal_schedule_path(self.eval_dir) if self.options.optimal else None
        return create_strategy(
            self.options.inference_mode,
            video_length=self.T,
            num_obs=self.options.obs_length,
            max_frames=self.max_frames,
            step_size=self.options.step_size,
            optimal_schedule_path=schedule,
            options=self.options.strategy_options,
            embed=self._embed,
        )

    def _embed(self, frames: np.ndarray) -> np.ndarray:
        """What the strategy asks for by name; its weights are read when frames are there."""
        from improved_diffusion.sampling.lpips_util import EMBEDDINGS

        options = self.options
        name = STRATEGIES[options.inference_mode].embedding(options.strategy_options)
        return EMBEDDINGS[name](frames, device=default_device(options.device))

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
        if options.obs_video:
            prefix += f"clip-{Path(options.obs_video).stem}_"
        return base / paths.inference_mode_str(
            options.inference_mode,
            self.max_frames,
            options.step_size,
            self.T,
            options.obs_length,
            optimal=options.optimal,
            prefix=prefix,
            options=STRATEGIES[options.inference_mode].folder_suffix(options.strategy_options),
        )

    def source(self) -> VideoTestSet | OneClip:
        """Where observed frames come from."""
        if self.options.obs_video:
            return OneClip(self.options.obs_video, self.image_size)
        return get_test_dataset(
            stored_dataset(self.dataset, self.model_config),
            T=self.T,
            partition=self.options.dataset_partition,
            cache_dir=self.options.cache_dir,
        )

    def stored(self) -> dict[str, Any]:
        """What sample_config.json keeps: all that the samples' values depend on."""
        options = self.options
        kept = (
            "checkpoint_path inference_mode step_size obs_length optimal eta timestep_respacing "
            "precision clip_denoised dataset_partition obs_video seed"
        )
        strategy = STRATEGIES[options.inference_mode]
        return {
            **strategy.stored_options(options.strategy_options),
            **{name: getattr(options, name) for name in kept.split()},
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
        start_stage: int = 0,
    ) -> Iterator[tuple[int, int]]:
        """Fill in the missing frames of `videos`, uint8 [B, T, 3, H, W], in place.

        The frames `strategy.observed_from_data` must be there, and what the inference steps before
        `start_stage` sample. jobs: B of them. Yields (step, frames sampled in it) after each step.
        """
        if strategy.is_adaptive:
            strategy.set_videos(SymmetricView(videos))  # type: ignore[attr-defined]
        for stage, (observed, latent) in enumerate(strategy):
            if not strategy.is_adaptive:
                observed, latent = [observed] * len(jobs), [latent] * len(jobs)
            if stage >= start_stage:
                self._sample_stage(videos, observed, latent, jobs, stage)
                yield stage, sum(map(len, latent))

    def _sample_stage(
        self,
        videos: np.ndarray,
        observed: list[list[int]],
        latent: list[list[int]],
        jobs: Sequence[Job],
        stage: int,
    ) -> None:
        """One inference step; videos whose frame counts differ run apart, so nothing is padded."""
        counts = [(len(o), len(la)) for o, la in zip(observed, latent, strict=True)]
        for count in sorted(set(counts)):
            rows = [row for row, its_count in enumerate(counts) if its_count == count]
            indices = np.array([observed[row] + latent[row] for row in rows])
            self._sample_rows(videos, rows, indices, count[0], [jobs[row] for row in rows], stage)

    def _sample_rows(
        self,
        videos: np.ndarray,
        rows: list[int],
        indices: np.ndarray,
        num_observed: int,
        jobs: Sequence[Job],
        stage: int,
    ) -> None:
        """One network trajectory for some rows of a batch, written back into `videos`.

        indices: [rows, K], the observed frames first.
        """
        where = np.array(rows)[:, None]
        clean = torch.from_numpy(videos[where, indices]).to(self.device).float() / 127.5 - 1
        obs_mask = torch.zeros(*indices.shape, 1, 1, 1, device=self.device)
        obs_mask[:, :num_observed] = 1
        seed = self.settings.options.seed
        alike = (indices == indices[:1]).all()
        out = self._run_sampler(
            tuple(clean.shape),
            model_kwargs={
                "x0": clean * obs_mask,
                "obs_mask": obs_mask,
                "latent_mask": 1 - obs_mask,
                "frame_indices": torch.from_numpy(indices[:1] if alike else indices).to(
                    self.device
                ),
            },
            generators=[make_generator(seed, job.video, job.sample, stage) for job in jobs],
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

        def model(x: Tensor, timesteps: Tensor, **kwargs: Any) -> Tensor:
            self.network_calls += 1
            # All videos are at one timestep: what depends on it alone is made once for them all.
            return self.model(x, timesteps[:1], **kwargs)

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


class OneClip:
    """One's own video file in the place of a test set."""

    def __init__(self, path: str, image_size: int):
        self.video: OpenVideo = open_video(path)
        self.image_size = image_size

    def __len__(self) -> int:
        return 1

    def length(self, index: int) -> int:
        """Frames in the file."""
        return self.video.shape[0]

    def read(self, index: int, frame_indices: Sequence[int]) -> np.ndarray:
        """Frames, cropped and scaled to the network's size: uint8 [n, 3, H, W]."""
        frames = centre_crop_resize(self.video.read(frame_indices), self.image_size)
        return np.ascontiguousarray(frames.transpose(0, 3, 1, 2))


def sample_video(
    loaded: tuple[torch.nn.Module, dict[str, Any], int],
    observed_frames: np.ndarray,
    T: int,
    strategy: str = "autoreg",
    *,
    max_frames: int | None = None,
    step_size: int | None = None,
    sampler: str = "dpmpp2m",
    steps: int = 20,
    seed: int = 0,
) -> np.ndarray:
    """Continue uint8 [n, H, W, 3] to uint8 [T, H, W, 3]; ValueError for what does not fit.

    loaded: of `script_util.load_model`. Defaults: max_frames as trained, step_size half of it.
    """
    model, model_config, step = loaded
    size = trained_image_size(model_config)
    if observed_frames.dtype != np.uint8 or observed_frames.shape[1:] != (size, size, 3):
        found = f"{observed_frames.dtype} {list(observed_frames.shape)}"
        raise ValueError(f"observed_frames: give uint8 [n, {size}, {size}, 3], not {found}")
    if (max_frames := max_frames or model_config.get("max_frames")) is None:
        raise ValueError("the checkpoint does not say its max_frames: give max_frames")
    options = SampleConfig(
        checkpoint_path="",
        inference_mode=strategy,
        step_size=step_size or max_frames // 2,
        obs_length=len(observed_frames),
        sampler=sampler,
        timestep_respacing=str(steps),
        device=str(next(model.parameters()).device),
        seed=seed,
    )
    settings = SampleSettings(options, model_config, step, "", size, T, max_frames)
    if (chosen := settings.strategy()).is_goal_directed:
        raise ValueError(f"{strategy} observes the end too: use scripts/video_sample.py")
    videos = np.zeros((1, T, 3, size, size), np.uint8)
    videos[0, : len(observed_frames)] = observed_frames.transpose(0, 3, 1, 2)
    list(VideoSampler(model, settings, options.device).sample(chosen, videos, [Job(0, 0)]))
    return np.ascontiguousarray(videos[0].transpose(0, 2, 3, 1))


def chosen_batches(options: SampleConfig, num_videos: int) -> list[list[Job]]:
    """All jobs that the options name, a list per batch of videos (array task i: the i-th)."""
    videos = choose_videos(num_videos, indices=options.indices, subset_size=options.subset_size)
    samples = range(options.num_samples) if options.sample_idx is None else [options.sample_idx]
    size = options.batch_size
    return [
        [Job(video, sample) for sample in samples for video in videos[start : start + size]]
        for start in range(0, len(videos), size)
    ]


def sample_dataset(options: SampleConfig) -> EvalDir:
    """Make the videos that `options` ask for; those that exist are skipped.

    Raises ValueError or FileNotFoundError for a user's mistake, before anything is written.
    """
    weights = load_weights(options.checkpoint_path)
    settings = SampleSettings.resolve(options, weights.config, weights.step)
    strategy = settings.strategy()
    eval_dir = EvalDir(settings.eval_dir)
    if options.just_visualise:
        _visualise(strategy, eval_dir.path / "schedule.png")
        return eval_dir
    source = settings.source()
    batches = chosen_batches(options, len(source))
    if options.status:
        print_status(eval_dir, batches)
        return eval_dir
    task = array_task()
    if task is not None and task >= len(batches):
        logger.info("nothing to do: SLURM_ARRAY_TASK_ID=%d is past the last batch of videos", task)
        return eval_dir
    wanted = [job for batch in (batches if task is None else [batches[task]]) for job in batch]
    # All ranks share out one list: by the time the last one looks, the first may have saved a video.
    jobs = dist_util.broadcast_object([job for job in wanted if not eval_dir.has_sample(*job)])
    _check_lengths(strategy, source, sorted({job.video for job in wanted}), settings.T)
    device = default_device(options.device)
    model = build_model(weights, options.checkpoint_path, device, compile=options.compile)
    sampler = VideoSampler(model, settings, device)
    eval_dir.write_configs(weights.config, settings.stored())
    logger.info("%d videos to sample into %s", len(jobs), eval_dir.path)
    _sample_jobs(sampler, source, eval_dir, jobs[dist_util.rank() :: dist_util.world_size()])
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
    from improved_diffusion.evaluation.plots import draw_schedule

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


def _sample_jobs(
    sampler: VideoSampler, source: VideoTestSet | OneClip, eval_dir: EvalDir, jobs: list[Job]
) -> None:
    """Sample in batches; videos that an earlier run left unfinished go on where they are."""
    settings = sampler.settings
    size = settings.options.batch_size
    frames = len(jobs) * _frames_per_video(settings.strategy())
    stages = {job: eval_dir.load_partial(*job)[0] for job in jobs}
    began = time.perf_counter()
    with tqdm(total=frames, unit="frame", disable=not dist_util.is_main()) as bar:
        for stage in sorted(set(stages.values()), reverse=True):
            alike = [job for job in jobs if stages[job] == stage]
            for start in range(0, len(alike), size):
                _sample_batch(sampler, source, eval_dir, alike[start : start + size], bar)
    seconds = time.perf_counter() - began
    if jobs:
        logger.info(
            "sampled %d frames in %.1f s: %.2f frames/s, %d network calls, peak memory %.2f GB",
            bar.n,
            seconds,
            bar.n / seconds,
            sampler.network_calls,
            dist_util.peak_memory_gb(sampler.device),
        )


def _sample_batch(
    sampler: VideoSampler,
    source: VideoTestSet | OneClip,
    eval_dir: EvalDir,
    batch: list[Job],
    bar: tqdm[Any],
) -> None:
    """Sample, save and tidy up one batch of jobs that are at the same inference step."""
    settings = sampler.settings
    size = settings.image_size
    videos = np.zeros((len(batch), settings.T, 3, size, size), np.uint8)
    observed = settings.strategy().observed_from_data
    start_stage = 0
    for row, job in enumerate(batch):
        start_stage, frames = eval_dir.load_partial(*job)
        if frames is None:
            videos[row, observed] = source.read(job.video, observed)
        else:
            videos[row] = frames
    keeper = PartialKeeper(eval_dir, batch, videos)
    for stage, num_frames in sampler.sample(settings.strategy(), videos, batch, start_stage):
        bar.update(num_frames)
        keeper.keep(stage + 1)
    for job, video in zip(batch, videos, strict=True):
        eval_dir.save_sample(*job, video)
        eval_dir.drop_partial(*job)


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
