"""What is measured and looked at while training: bounds on held-out videos, and samples.

Every item goes through the network by itself and without its padding: the network is to see real
frames only.
"""

from __future__ import annotations

import numpy as np
import torch

from improved_diffusion.data import video_io
from improved_diffusion.data.frame_batch import FrameBatch, to_uint8
from improved_diffusion.data.rng_util import randn
from improved_diffusion.sampling.denoiser import Denoiser
from improved_diffusion.sampling.samplers import ddim


def stratified_timesteps(
    num_timesteps: int, generator: torch.Generator
) -> tuple[list[int], list[int]]:
    """One timestep from each of {0}, {1}, {2, 3}, {4 .. 7}, ..., and the sizes of these strata.

    sum(size * f(timestep)) is an unbiased estimate of the sum of f over all timesteps; the strata
    are small where the terms of the variational bound are large and steep.
    """
    edges = [0, *(1 << power for power in range(num_timesteps.bit_length())), num_timesteps]
    edges = sorted({edge for edge in edges if edge <= num_timesteps})
    pairs = list(zip(edges[:-1], edges[1:], strict=True))
    drawn = [int(torch.randint(low, high, (), generator=generator)) for low, high in pairs]
    return drawn, [high - low for low, high in pairs]


@torch.no_grad()
def bits_per_dim(denoiser: Denoiser, batch: FrameBatch, generator: torch.Generator) -> float:
    """An unbiased estimate of the bound on a video's latent frames, in bits per their dimension.

    One network call per stratum of `stratified_timesteps` instead of one per timestep. The batch
    is one video without padding. Source: DDPM (arXiv 2006.11239) Eq. 5.
    """
    steps, sizes = stratified_timesteps(denoiser.diffusion.num_timesteps, generator)
    bits = denoiser.bound(
        batch,
        torch.tensor(steps),
        lambda t: randn(batch.frames.shape, generator, batch.device),
        weights=torch.tensor(sizes),
    )
    return bits / float(batch.latent_mask.expand_as(batch.frames).sum())


@torch.no_grad()
def draw_sample(denoiser: Denoiser, batch: FrameBatch, generator: torch.Generator) -> np.ndarray:
    """Sample one video's latent frames: uint8 [frames, H, W, 3], observed ones with a border."""
    batch = batch.without_padding()
    sample = ddim(denoiser, batch, generator=generator)
    observed = batch.obs_mask.flatten().cpu().numpy() > 0
    frames = video_io.add_border(to_uint8(sample[0]), observed)
    return frames.transpose(0, 2, 3, 1)
