"""Inference steps of many videos go through a sampler together.

What runs together is a batch of trajectories: inference steps that wait for no other, of one video or
of several, which observe and sample as many frames each. What they hold does not depend on it.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch

from improved_diffusion.config import chosen_options
from improved_diffusion.data import machine
from improved_diffusion.data.frame_batch import FrameBatch, to_uint8
from improved_diffusion.data.rng_util import make_generator
from improved_diffusion.data.step_order import OrderedStep
from improved_diffusion.registry import SAMPLERS, STRATEGIES
from improved_diffusion.sampling.denoiser import Denoiser
from improved_diffusion.sampling.plan import Job, VideoPlan
from improved_diffusion.sampling.trained_model import TrainedModel
from improved_diffusion.sampling.unfinished_video import UnfinishedVideo

logger = logging.getLogger(__name__)


class Trajectory(NamedTuple):
    """One inference step of one video, on its way from noise to frames.

    Attributes:
        noise: (video, sample, stage), which its noise depends on beside the seed.
        indices: its frames in the video, the observed ones first.
        observed: these, uint8 [n, 3, H, W].
    """

    noise: tuple[int, int, int]
    indices: list[int]
    observed: np.ndarray

    @classmethod
    def of(cls, video: UnfinishedVideo, step: OrderedStep) -> Trajectory:
        """That of a ready step. Raises ValueError where a frame that it observes does not exist."""
        indices = [*step.observed, *step.latent]
        return cls((*video.job, step.stage), indices, video.observed_frames(step))


class Sampler(Protocol):
    """What `make_videos` needs: so many trajectories at most are best given to `sample` at once."""

    @property
    def round_size(self) -> int: ...

    def sample(self, trajectories: Sequence[Trajectory]) -> list[np.ndarray]: ...


class VideoSampler:
    """Samples batches of trajectories.

    Args:
        denoiser: in the process whose timesteps are gone through.
        device: where the network is.
        sampler: a name in SAMPLERS.
        seed: of the noise, beside the video, the sample and the inference step.
        eta: of ddim.
        batch_size: trajectories in one call of the network; halved where memory does not do for them.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        device: str,
        *,
        sampler: str,
        seed: int = 0,
        eta: float = 0.0,
        batch_size: int = 8,
    ) -> None:
        self.denoiser, self.device = denoiser, torch.device(device)
        self.sampler, self.seed, self.eta = sampler, seed, eta
        self.batch_size = batch_size
        self.num_frames = 0  # sampled so far

    @property
    def round_size(self) -> int:
        """Trajectories that run at once."""
        return self.batch_size

    def sample(self, trajectories: Sequence[Trajectory]) -> list[np.ndarray]:
        """The sampled frames of each, uint8 [m, 3, H, W]; all have equal numbers of frames."""
        sampled: list[np.ndarray] = []
        while len(sampled) < len(trajectories):
            part = trajectories[len(sampled) : len(sampled) + self.batch_size]
            try:
                sampled.extend(self._sample_at_once(part))
                continue
            except (RuntimeError, MemoryError) as error:
                if not machine.is_out_of_memory(error) or len(part) == 1:
                    raise
            # The error is gone by now, and the tensors that its traceback held with it.
            self.batch_size = len(part) // 2
            machine.release_memory(self.device)
            words = "out of memory with %d trajectories at once: going on with %d"
            logger.warning(words, len(part), self.batch_size)
        self.num_frames += sum(map(len, sampled))
        return sampled

    @torch.inference_mode()
    def _sample_at_once(self, trajectories: Sequence[Trajectory]) -> np.ndarray:
        """uint8 [B, m, 3, H, W]."""
        indices = np.array([trajectory.indices for trajectory in trajectories])
        observed = np.stack([trajectory.observed for trajectory in trajectories])
        num_observed = observed.shape[1]
        frames = np.zeros((*indices.shape, *observed.shape[2:]), np.uint8)
        frames[:, :num_observed] = observed
        shared = (indices == indices[:1]).all()
        batch = FrameBatch.from_uint8(
            frames, indices[:1] if shared else indices, num_observed, self.device
        )
        names = [(self.seed, *trajectory.noise) for trajectory in trajectories]
        denoiser = self.denoiser.for_trajectories(batch, names)
        noise = [make_generator(*name) for name in names]
        # One context for the whole way: half-precision copies of the weights are made once.
        with denoiser.autocast():
            out = SAMPLERS[self.sampler](denoiser, batch, generator=noise, eta=self.eta)
        return to_uint8(out[:, num_observed:])


def make_videos(
    videos: Iterator[UnfinishedVideo], sampler: Sampler
) -> Iterator[tuple[UnfinishedVideo, OrderedStep]]:
    """Make all inference steps of all videos; yields each (video, step) when its frames are there.

    In each round those that are ready and have equal numbers of frames run together, as many as the
    sampler takes, whatever videos and stages they belong to. A video is taken from `videos` when
    those taken before do not fill a round, and at most twice as many as a round holds are in work.
    """
    in_work: list[UnfinishedVideo] = []
    while True:
        size = sampler.round_size
        found = _next_round(in_work, size)
        while len(found) < size and len(in_work) < 2 * size:
            video = next(videos, None)
            if video is None:
                break
            in_work.append(video)
            found = _next_round(in_work, size)
        if not found:
            return
        began = time.perf_counter()
        sampled = sampler.sample([Trajectory.of(video, step) for video, step in found])
        share = (time.perf_counter() - began) / len(found)
        for (video, step), frames in zip(found, sampled, strict=True):
            video.seconds = None if video.seconds is None else video.seconds + share
            video.finish(step, frames)
            yield video, step
        in_work = [video for video in in_work if video.ready]


def _next_round(
    in_work: Sequence[UnfinishedVideo], size: int
) -> list[tuple[UnfinishedVideo, OrderedStep]]:
    """Up to `size` steps with equal numbers of frames: as many as there are, the earliest on ties."""
    groups: dict[tuple[int, int], list[tuple[UnfinishedVideo, OrderedStep]]] = {}
    for video in in_work:
        for step in video.ready:
            counts = len(step.observed), len(step.latent)
            groups.setdefault(counts, []).append((video, step))
    return max((group[:size] for group in groups.values()), key=len, default=[])


def sample_video(
    model: TrainedModel,
    observed_frames: np.ndarray,
    T: int,
    strategy: str = "autoreg",
    *,
    max_frames: int | None = None,
    step_size: int | None = None,
    sampler: str = "ipndm4",
    spacing: str = "logsnr",
    steps: int = 10,
    seed: int = 0,
    strategy_options: Mapping[str, Any] | None = None,
) -> np.ndarray:
    """Continue uint8 [n, H, W, 3] to uint8 [T, H, W, 3]; ValueError for what does not fit.

    model: of `script_util.load_model`. Defaults: max_frames as trained, step_size half of it.
    strategy_options: the strategy's own, as {"distance": "l2"}.
    """
    size = model.image_size
    if observed_frames.dtype != np.uint8 or observed_frames.shape[1:] != (size, size, 3):
        found = f"{observed_frames.dtype} {list(observed_frames.shape)}"
        raise ValueError(f"observed_frames: give uint8 [n, {size}, {size}, 3], not {found}")
    if (max_frames := max_frames or model.max_frames) is None:
        raise ValueError("the checkpoint does not say its max_frames: give max_frames")
    num_observed = len(observed_frames)
    step_size = step_size or max_frames // 2
    own = chosen_options(STRATEGIES, strategy, strategy_options)
    plan = VideoPlan(strategy, T, num_observed, max_frames, step_size, own, device=model.device)
    if plan.strategy().is_goal_directed:
        raise ValueError(f"{strategy} observes the end too: use scripts/video_sample.py")
    video = UnfinishedVideo(Job(0, 0), plan, observed_frames.transpose(0, 3, 1, 2))
    maker = VideoSampler(
        model.denoiser(str(steps), spacing=spacing), model.device, sampler=sampler, seed=seed
    )
    for _ in make_videos(iter([video]), maker):
        pass
    return np.ascontiguousarray(video.whole().transpose(0, 2, 3, 1))
