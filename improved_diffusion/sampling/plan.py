"""What is to be made: which frames of which videos, from what, and into which folder."""

from __future__ import annotations

import functools
import hashlib
import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from improved_diffusion import dist_util
from improved_diffusion.config import DataConfig, chosen_options, from_options
from improved_diffusion.data import machine, paths
from improved_diffusion.data.dataset_specs import FrameRate
from improved_diffusion.data.frame_batch import SymmetricView
from improved_diffusion.data.metric_weights import sha256
from improved_diffusion.data.step_order import OrderedStep, ordered_steps, rounds_of
from improved_diffusion.data.video_datasets import VideoTestSet, choose_videos, get_test_dataset
from improved_diffusion.data.video_io import OpenVideo, centre_crop_resize, open_video, subsample
from improved_diffusion.fp16_util import resolve_precision
from improved_diffusion.inference_utils import (
    InferenceStrategyBase,
    create_strategy,
    load_optimal_schedule,
)
from improved_diffusion.registry import GUIDANCE_REFERENCES, STRATEGIES
from improved_diffusion.sampling.denoiser import Denoiser
from improved_diffusion.sampling.guidance import GuidedDenoiser, reference_model
from improved_diffusion.sampling.options import SampleConfig
from improved_diffusion.sampling.trained_model import TrainedModel

logger = logging.getLogger(__name__)


class Job(NamedTuple):
    """One video to make; its noise depends on the seed and these two numbers alone."""

    video: int
    sample: int


@dataclass(frozen=True)
class VideoPlan:
    """How a video is made: the inference strategy and its sizes.

    Attributes:
        mode: a name in `inference_utils.inference_strategies`.
        T: frames of a video.
        obs_length: frames observed at its start.
        max_frames: frames given to the network at once.
        step_size: frames to sample in each inference step.
        options: the strategy's own.
        optimal: file of observed frames that replace the strategy's choice, or None.
        device: where frames are embedded, for strategies that look at them.
    """

    mode: str
    T: int
    obs_length: int
    max_frames: int
    step_size: int
    options: Any = None
    optimal: Path | None = None
    device: str = "cpu"

    def strategy(self) -> InferenceStrategyBase:
        """A fresh strategy for one batch of videos. Raises ValueError for sizes that cannot be."""
        return create_strategy(
            self.mode,
            video_length=self.T,
            num_obs=self.obs_length,
            max_frames=self.max_frames,
            step_size=self.step_size,
            optimal_schedule_path=self.optimal,
            options=self.options,
            embed=self._embed,
        )

    @functools.cached_property
    def observed_from_data(self) -> list[int]:
        """Sorted frames that the data gives."""
        return self.strategy().observed_from_data

    @functools.cached_property
    def schedule(self) -> tuple[OrderedStep, ...] | None:
        """All inference steps; None for strategies that choose them by what frames look like.

        Raises ValueError where the strategy breaks a rule of `InferenceStrategyBase`.
        """
        strategy = self.strategy()
        return None if strategy.is_adaptive else tuple(ordered_steps(strategy))

    @property
    def num_sampled(self) -> int:
        """Frames that are sampled for one video, counting those that are sampled again."""
        if self.schedule is None:
            return self.T - len(self.observed_from_data)
        return sum(len(step.latent) for step in self.schedule)

    @property
    def is_side_by_side(self) -> bool:
        """Whether any two inference steps of a video can be made at once."""
        return self.schedule is not None and max(rounds_of(self.schedule), default=0) > 1

    def steps_of(self, frames: np.ndarray) -> Iterator[OrderedStep]:
        """The inference steps of one video, one after the other.

        frames: uint8 [T, 3, H, W], which holds the frames of the steps before when one is asked for;
        adaptive strategies look at them.
        """
        if self.schedule is not None:
            return iter(self.schedule)
        strategy = self.strategy()
        strategy.set_videos(SymmetricView(frames[None]))  # type: ignore[attr-defined]
        return ordered_steps((observed, latent) for (observed,), (latent,) in strategy)

    def _embed(self, frames: np.ndarray) -> Any:
        """What the strategy asks for by name; its weights are read when frames are there."""
        from improved_diffusion.sampling.lpips_util import EMBEDDINGS

        assert self.embedding is not None, f"{self.mode} asks for no embedding"
        return EMBEDDINGS[self.embedding](frames, device=self.device)

    @property
    def embedding(self) -> str | None:
        """The name of the embedding that the strategy asks for."""
        own = chosen_options(STRATEGIES, self.mode, self.options)
        return STRATEGIES[self.mode].embedding(own)

    def check(self, image_size: int) -> None:
        """See that nothing in the plan can fail once videos are sampled.

        Walks through the whole schedule, and embeds a frame of `image_size` where that will be
        done. Raises ValueError or FileNotFoundError.
        """
        self.schedule  # noqa: B018
        if self.embedding is not None:
            self._embed(np.zeros((1, 3, image_size, image_size), np.float32))

    def hashes(self) -> dict[str, str]:
        """SHA-256 of what files the plan depends on: the schedule, the weights of an embedding."""
        from improved_diffusion.sampling.lpips_util import EMBEDDING_WEIGHTS

        found = {}
        if self.optimal is not None:
            schedule = load_optimal_schedule(self.optimal)
            text = json.dumps(schedule, sort_keys=True)
            found["schedule_sha256"] = hashlib.sha256(text.encode()).hexdigest()
        if self.embedding in EMBEDDING_WEIGHTS:
            found["embedding_sha256"] = sha256(EMBEDDING_WEIGHTS[self.embedding]())
        return found


@dataclass(frozen=True)
class Task:
    """What a command works on: a trained model, a plan for videos, their data, their folder."""

    options: SampleConfig
    model: TrainedModel
    plan: VideoPlan
    dataset: str
    eval_dir: Path
    reference: TrainedModel | None = None  # that guidance leads away from

    @classmethod
    def resolve(cls, options: SampleConfig) -> Task:
        """Read the checkpoint, fill in defaults, check sizes.

        Raises ValueError or FileNotFoundError for a user's mistake.
        """
        device = machine.default_device(options.device)
        options = replace(options, precision=resolve_precision(options.precision, device))
        how = {"compile": options.compile, "cuda_graphs": options.cuda_graphs}
        model = TrainedModel.load(options.checkpoint_path, device, **how)
        dataset = options.override_dataset or model.dataset
        if not dataset:
            raise ValueError(
                f"{options.checkpoint_path} names no data set: give --override_dataset"
            )
        T = model.dataset_spec(dataset).T if options.T is None else options.T
        max_frames = model.max_frames if options.max_frames is None else options.max_frames
        if max_frames is None:
            raise ValueError(
                f"{options.checkpoint_path} does not say its max_frames: give --max_frames"
            )
        if model.max_frames is not None and max_frames > model.max_frames:
            logger.warning(
                "--max_frames %d is more than the %d trained with", max_frames, model.max_frames
            )
        reference = reference_model(options, model)
        identity = reference.identity if reference else ""
        eval_dir = evaluation_dir(options, model.step, T, max_frames, identity)
        plan = VideoPlan(
            options.inference_mode,
            T,
            options.obs_length,
            max_frames,
            options.step_size,
            options.strategy_options,
            paths.optimal_schedule_path(eval_dir) if options.optimal else None,
            device,
        )
        return cls(options, model, plan, dataset, eval_dir, reference)

    def denoiser(self) -> Denoiser:
        """The network as the options sample with it.

        Raises ValueError for timesteps that cannot be kept, weights that do not fit, and a guidance
        interval without timesteps.
        """
        options = self.options

        def of(model: TrainedModel) -> Denoiser:
            return model.denoiser(
                options.timestep_respacing,
                spacing=options.spacing,
                clip_denoised=options.clip_denoised,
                precision=options.precision,
            )

        if not options.is_guided:
            return of(self.model)
        if self.reference:
            against: Any = of(self.reference)
        else:
            against = GUIDANCE_REFERENCES[options.guidance_against]
        interval: Any = options.guidance_interval  # two of them
        return GuidedDenoiser(of(self.model), options.guidance, against=against, interval=interval)

    @property
    def reference_identity(self) -> str:
        """The identity of the weights that guidance leads away from; empty where it is none."""
        return self.reference.identity if self.reference else ""

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Of a video: (T, 3, H, W)."""
        return self.plan.T, 3, self.model.image_size, self.model.image_size

    def source(self) -> VideoTestSet | OneClip:
        """Where observed frames come from."""
        if self.options.obs_video:
            return OneClip(self.options.obs_video, self.model)
        return self.videos(self.options.dataset_partition)

    def videos(self, partition: str) -> VideoTestSet:
        """The videos of a partition of the data set."""
        spec, cache_dir = self.model.dataset_spec(self.dataset), self.options.cache_dir
        return get_test_dataset(spec, T=self.plan.T, partition=partition, cache_dir=cache_dir)

    def stored(self) -> dict[str, Any]:
        """What sample_config.json keeps: all that the samples' values depend on."""
        options, plan = self.options, self.plan
        kept = (
            "checkpoint_path inference_mode step_size obs_length optimal eta timestep_respacing "
            "spacing guidance precision clip_denoised dataset_partition obs_video seed"
        )
        own = STRATEGIES[plan.mode].stored_options(plan.options)
        return (
            own
            | self.hashes()
            | {name: getattr(options, name) for name in kept.split()}
            | {
                "checkpoint_step": self.model.step,
                "dataset": self.dataset,
                "T": plan.T,
                "max_frames": plan.max_frames,
                "tf32": False,  # see fp16_util.autocast
                "sampler": options.sampler_name,
                # A file may be moved: its weights are what counts.
                "guidance_against": self.reference_identity or options.guidance_against,
                "guidance_file": options.guidance_against if self.reference else "",
                "guidance_interval": list(options.guidance_interval or ()),
                "observed_frames": plan.observed_from_data,
            }
        )

    def hashes(self) -> dict[str, str]:
        """SHA-256 of what files the samples and bounds depend on, beside the data set."""
        found = {"weights_sha256": self.model.identity} | self.plan.hashes()
        if self.options.obs_video:
            found["obs_video_sha256"] = sha256(self.options.obs_video)
        return found

    def ignored(self) -> set[str]:
        """The stored options that play no part: a clip comes from no data set, and may be moved."""
        unused = set() if self.options.sampler_name == "ddim" else {"eta"}
        if not self.options.is_guided:
            unused |= {"guidance_against", "guidance_interval"}
        clip = {"dataset", "dataset_partition", "obs_video"} if self.options.obs_video else set()
        return unused | clip


def evaluation_dir(
    options: SampleConfig, step: int, T: int, max_frames: int, reference: str = ""
) -> Path:
    """The evaluation directory that the options name, for a checkpoint of `step` updates.

    reference: the identity of the weights that guidance leads away from, where those are a file's.
    """
    if options.eval_dir is not None:
        base = Path(options.eval_dir)
    else:
        suffix = options.sampler_suffix + options.guidance_suffix(reference[:8])
        base = paths.results_dir(options.checkpoint_path, step, suffix)
    prefix = "trainset_" if options.dataset_partition == "train" else ""
    if options.override_dataset:
        prefix += Path(options.override_dataset).name + "_"
    if options.obs_video:
        prefix += f"clip-{Path(options.obs_video).stem}_"
    own = STRATEGIES[options.inference_mode].folder_suffix(options.strategy_options)
    return base / paths.inference_mode_str(
        options.inference_mode,
        (max_frames, options.step_size, T, options.obs_length),
        optimal=options.optimal,
        prefix=prefix,
        options=own,
    )


class OneClip:
    """One's own video file in the place of a test set, at the frame rate that was trained on.

    Raises ValueError for a file that cannot be read or has no frame rate where one is needed.
    """

    def __init__(self, path: str, model: TrainedModel):
        video = open_video(path)
        reading = from_options(DataConfig, model.config)
        rate = FrameRate(reading.frame_stride, reading.fps)
        self.video: OpenVideo = subsample(video, rate.step(video.path, video.fps))
        self.image_size = model.image_size

    def __len__(self) -> int:
        return 1

    def length(self, index: int) -> int:
        """Frames in the file."""
        return self.video.shape[0]

    def read(self, index: int, frame_indices: Sequence[int]) -> np.ndarray:
        """Frames, cropped and scaled to the network's size: uint8 [n, 3, H, W]."""
        frames = centre_crop_resize(self.video.read(frame_indices), self.image_size)
        return np.ascontiguousarray(frames.transpose(0, 3, 1, 2))


def chosen_batches(options: SampleConfig, num_videos: int) -> list[list[Job]]:
    """All jobs that the options name, a list per batch of videos (array task i: the i-th).

    Raises ValueError for an array task that is not told how many videos are its own.
    """
    if options.batch_size is None and dist_util.array_task() is not None:
        raise ValueError(
            "--batch_size auto: an array task needs a number, which says which videos are its own"
        )
    videos = choose_videos(num_videos, indices=options.indices, subset_size=options.subset_size)
    samples = range(options.num_samples) if options.sample_idx is None else [options.sample_idx]
    size = options.batch_size or max(1, len(videos))
    return [
        [Job(video, sample) for sample in samples for video in videos[start : start + size]]
        for start in range(0, len(videos), size)
    ]


def own_jobs(batches: list[list[Job]]) -> list[Job]:
    """The jobs of this process's array task, or all of them; none, and told, past the last task."""
    task = dist_util.array_task()
    if task is not None and task >= len(batches):
        logger.info("nothing to do: SLURM_ARRAY_TASK_ID=%d is past the last batch of videos", task)
    return [
        job for batch in (batches if task is None else batches[task : task + 1]) for job in batch
    ]
