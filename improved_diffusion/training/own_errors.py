"""Observed frames as sampling will find them: with the network's own errors in them.

Training observes frames of the data, sampling mostly frames that the network made. With
--resample_observed the observed frames of some items are what the network makes of them.
Source: Guo et al. 2025, "Resampling Forcing" (arXiv 2512.15702); here in one call instead of a
shortened chain.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from dataclasses import fields, replace

import torch
from torch import Tensor, nn

from improved_diffusion import dist_util
from improved_diffusion.data.frame_batch import FrameBatch
from improved_diffusion.data.rng_util import generator_on, make_generator
from improved_diffusion.gaussian_diffusion import GaussianDiffusion
from improved_diffusion.sampling.denoiser import Denoiser
from improved_diffusion.training.options import TrainConfig
from improved_diffusion.training.transfer import send

OWN_ERRORS_STREAM = 1  # its random numbers are others than those of the update itself
# One call makes the mean of all that could be there out of a frame that is mostly noise, which is no error
# that sampling makes: with timesteps from the whole range, samples became worse (docs/training.md).
NOISED_SHARE = 0.5  # of the timesteps, the less noisy ones


class OwnErrors:
    """Replaces observed frames of some items of a batch by the network's denoising of them.

    Args:
        network: the trained network itself; one without gradients or an exchange between ranks is
            wanted here, so not as DistributedDataParallel wraps it.
        diffusion: the process that is trained on.
        config: `resample_observed` is each item's probability; `microbatch` limits how many items
            go through the network at once.
        autocast: as for `Denoiser`.

    Everything random is a function of (seed, position, rank), in a stream of its own: the noise and
    the timesteps of the update are those of a run without this.
    """

    def __init__(
        self,
        network: nn.Module,
        diffusion: GaussianDiffusion,
        config: TrainConfig,
        *,
        autocast: Callable[[], contextlib.AbstractContextManager],
    ) -> None:
        self.network, self.config = network, config
        self.denoiser = Denoiser(network, diffusion, autocast=autocast)

    def __call__(
        self, batch: FrameBatch, position: int, *, observed: Tensor | None = None
    ) -> FrameBatch:
        """The batch with the observed frames of the drawn items replaced; clean ones stay in [-1, 1].

        position: that of the update, which names its random numbers. observed: the batch's obs_mask
        on the CPU, where it is at hand: to ask a GPU for it is to wait.
        """
        if self.config.resample_observed == 0:
            return batch
        generator = make_generator(self.config.seed, position, dist_util.rank(), OWN_ERRORS_STREAM)
        drawn = torch.rand(len(batch), generator=generator) < self.config.resample_observed
        steps = math.ceil(NOISED_SHARE * self.denoiser.diffusion.num_timesteps)
        t = torch.randint(steps, (len(batch),), generator=generator)
        on_device = generator_on(batch.device, generator)
        noise = torch.randn(batch.frames.shape, generator=on_device, device=batch.device)
        observes = (batch.obs_mask.cpu() if observed is None else observed).flatten(1).any(dim=1)
        chosen = (drawn & observes).nonzero().flatten()
        size = self.config.microbatch if self.config.microbatch > 0 else len(batch)
        frames = batch.frames.clone()
        t = send(t, batch.device)
        for rows in (send(part, batch.device) for part in chosen.split(size) if len(part)):
            frames[rows] = self._denoised(_rows(batch, rows), t[rows], noise[rows])
        return replace(batch, frames=frames)

    @torch.no_grad()
    def _denoised(self, batch: FrameBatch, t: Tensor, noise: Tensor) -> Tensor:
        """The frames with those that are observed denoised from timesteps t, all at once.

        They alone are latent in that call; all others are absent: in neither mask, and black.
        """
        alone = replace(
            batch,
            frames=batch.frames * batch.obs_mask,
            obs_mask=torch.zeros_like(batch.obs_mask),
            latent_mask=batch.obs_mask,
        )
        x_t = self.denoiser.diffusion.q_sample(alone.frames, t, noise)
        self.network.eval()  # without dropout, whose random numbers are the update's
        own = self.denoiser.denoise(x_t, t, alone)
        self.network.train()
        return torch.where(batch.obs_mask > 0, own.to(batch.frames.dtype), batch.frames)


def _rows(batch: FrameBatch, rows: Tensor) -> FrameBatch:
    """The items `rows` (int [n]) alone."""
    return FrameBatch(**{item.name: getattr(batch, item.name)[rows] for item in fields(batch)})
