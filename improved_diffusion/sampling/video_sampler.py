"""A strategy drives a sampler over a batch of videos.

Frames are kept as uint8, which is what is saved: a frame that is sampled in one inference step is
observed in later ones exactly as its file will show it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

from improved_diffusion.data.frame_batch import FrameBatch, to_symmetric, to_uint8
from improved_diffusion.data.rng_util import make_generator
from improved_diffusion.inference_utils import InferenceStrategyBase
from improved_diffusion.registry import SAMPLERS
from improved_diffusion.sampling.denoiser import Denoiser
from improved_diffusion.sampling.plan import Job, VideoPlan
from improved_diffusion.sampling.trained_model import TrainedModel


class VideoSampler:
    """Samples batches of videos.

    Args:
        denoiser: in the process whose timesteps are gone through.
        device: where the network is.
        sampler: a name in SAMPLERS.
        seed: of the noise, beside the video, the sample and the inference step.
        eta: of ddim.
    """

    def __init__(
        self, denoiser: Denoiser, device: str, *, sampler: str, seed: int = 0, eta: float = 0.0
    ) -> None:
        self.denoiser, self.device = denoiser, torch.device(device)
        self.sampler, self.seed, self.eta = sampler, seed, eta

    def sample(
        self,
        strategy: InferenceStrategyBase,
        videos: np.ndarray,
        jobs: Sequence[Job],
        start_stage: int = 0,
        made: np.ndarray | None = None,
    ) -> Iterator[tuple[int, int]]:
        """Fill in the missing frames of `videos`, uint8 [B, T, 3, H, W], in place.

        The frames `strategy.observed_from_data` must be there, and what the inference steps before
        `start_stage` sample. jobs: B of them. made: bool [B, T], the frames that exist, which is
        kept up to date (None: those from the data). Yields (stage, frames sampled in it) after each
        one. Raises ValueError where a frame that is to be observed does not exist.
        """
        if made is None:
            made = np.zeros(videos.shape[:2], bool)
            made[:, strategy.observed_from_data] = True
        if strategy.is_adaptive:
            strategy.set_videos(SymmetricView(videos))  # type: ignore[attr-defined]
        for stage, (observed, latent) in enumerate(strategy):
            if not strategy.is_adaptive:
                observed, latent = [observed] * len(jobs), [latent] * len(jobs)
            if stage >= start_stage:
                for rows in _alike(observed, latent):
                    indices = np.array([observed[row] + latent[row] for row in rows])
                    names = [(self.seed, *jobs[row], stage) for row in rows]
                    num_observed = len(observed[rows[0]])
                    for row, frames in zip(rows, indices, strict=True):
                        require_made(jobs[row], made[row], frames[:num_observed])
                    self._sample_rows(videos, rows, indices, num_observed, names)
                    made[np.array(rows)[:, None], indices[:, num_observed:]] = True
                yield stage, sum(map(len, latent))

    @torch.inference_mode()
    def _sample_rows(
        self,
        videos: np.ndarray,
        rows: list[int],
        indices: np.ndarray,
        num_observed: int,
        names: Sequence[tuple[int, ...]],
    ) -> None:
        """One network trajectory for some rows of `videos`, written back into them.

        indices: [rows, K], the observed frames first. names: of each row, what all that is drawn for
        it depends on.
        """
        where = np.array(rows)[:, None]
        shared = (indices == indices[:1]).all()
        batch = FrameBatch.from_uint8(
            videos[where, indices], indices[:1] if shared else indices, num_observed, self.device
        )
        denoiser = self.denoiser.for_trajectories(batch, names)
        noise = [make_generator(*name) for name in names]
        # One context for the whole trajectory: half-precision copies of the weights are made once.
        with denoiser.autocast():
            out = SAMPLERS[self.sampler](denoiser, batch, generator=noise, eta=self.eta)
        videos[where, indices[:, num_observed:]] = to_uint8(out[:, num_observed:])


def require_made(job: Job, made: np.ndarray, frames: Sequence[int] | np.ndarray) -> None:
    """Raise ValueError where one of `frames` does not exist. made: bool [T] of the job's video."""
    missing = [int(frame) for frame in frames if not made[frame]]
    if missing:
        raise ValueError(
            f"video {job.video} sample {job.sample}: the frames {missing} were never made: delete "
            "what is kept of it in partial/ and run again"
        )


def _alike(observed: list[list[int]], latent: list[list[int]]) -> list[list[int]]:
    """Rows with equal numbers of frames: they run together, so that nothing is ever padded."""
    counts = [(len(o), len(la)) for o, la in zip(observed, latent, strict=True)]
    return [[row for row, c in enumerate(counts) if c == count] for count in sorted(set(counts))]


class SymmetricView:
    """uint8 videos seen as float32 in [-1, 1]; only the frames that are indexed are converted."""

    def __init__(self, videos: np.ndarray):
        self._videos, self.shape, self.ndim = videos, videos.shape, videos.ndim

    def __len__(self) -> int:
        return len(self._videos)

    def __getitem__(self, index: Any) -> np.ndarray:
        return to_symmetric(self._videos[index])


def sample_video(
    model: TrainedModel,
    observed_frames: np.ndarray,
    T: int,
    strategy: str = "autoreg",
    *,
    max_frames: int | None = None,
    step_size: int | None = None,
    sampler: str = "unipc",
    spacing: str = "logsnr",
    steps: int = 10,
    seed: int = 0,
) -> np.ndarray:
    """Continue uint8 [n, H, W, 3] to uint8 [T, H, W, 3]; ValueError for what does not fit.

    model: of `script_util.load_model`. Defaults: max_frames as trained, step_size half of it.
    """
    size = model.image_size
    if observed_frames.dtype != np.uint8 or observed_frames.shape[1:] != (size, size, 3):
        found = f"{observed_frames.dtype} {list(observed_frames.shape)}"
        raise ValueError(f"observed_frames: give uint8 [n, {size}, {size}, 3], not {found}")
    if (max_frames := max_frames or model.max_frames) is None:
        raise ValueError("the checkpoint does not say its max_frames: give max_frames")
    num_observed = len(observed_frames)
    plan = VideoPlan(
        strategy, T, num_observed, max_frames, step_size or max_frames // 2, device=model.device
    )
    if (chosen := plan.strategy()).is_goal_directed:
        raise ValueError(f"{strategy} observes the end too: use scripts/video_sample.py")
    videos = np.zeros((1, T, 3, size, size), np.uint8)
    videos[0, :num_observed] = observed_frames.transpose(0, 3, 1, 2)
    maker = VideoSampler(
        model.denoiser(str(steps), spacing=spacing), model.device, sampler=sampler, seed=seed
    )
    list(maker.sample(chosen, videos, [Job(0, 0)]))
    return np.ascontiguousarray(videos[0].transpose(0, 2, 3, 1))
