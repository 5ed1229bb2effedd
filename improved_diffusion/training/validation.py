"""What is measured and looked at while training: bounds on held-out videos, and samples.

Every item goes through the network by itself and without its padding: the network is to see real
frames only.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from improved_diffusion.data import video_io
from improved_diffusion.data.rng_util import randn
from improved_diffusion.gaussian_diffusion import GaussianDiffusion, Model

Item = dict[str, Tensor]  # x0, frame_indices, obs_mask, latent_mask of one video: [1, K, ...]


def without_padding(item: Item) -> Item:
    """The observed and latent frames of an item, in the order of the video."""
    real = (item["obs_mask"] + item["latent_mask"]).flatten() > 0
    order = item["frame_indices"][0, real].argsort()
    return {key: value[:, real][:, order] for key, value in item.items()}


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
def bits_per_dim(
    diffusion: GaussianDiffusion, model: Model, item: Item, generator: torch.Generator
) -> float:
    """An unbiased estimate of the bound on an item's latent frames, in bits per their dimension.

    One network call per stratum of `stratified_timesteps` instead of one per timestep. The item
    has no padding. Source: DDPM (arXiv 2006.11239) Eq. 5.
    """
    x0, mask = item["x0"], item["latent_mask"]
    total = diffusion.prior_bpd(x0, mask)
    steps, sizes = stratified_timesteps(diffusion.num_timesteps, generator)
    for step, size in zip(steps, sizes, strict=True):
        t = torch.tensor([step], device=x0.device)
        x_t = diffusion.q_sample(x0, t, randn(x0.shape, generator, x0.device))
        term = diffusion.vb_terms_bpd(model, x0, x_t, t, model_kwargs=item, latent_mask=mask)
        total = total + size * term["output"]
    return float(total / mask.mean())  # the terms are means over all frames given


def draw_sample(
    diffusion: GaussianDiffusion, model: Model, item: Item, generator: torch.Generator
) -> np.ndarray:
    """Sample the latent frames of an item: uint8 [frames, H, W, 3], observed ones with a border."""
    item = without_padding(item)
    sample = diffusion.ddim_sample_loop(
        model,
        item["x0"].shape,
        model_kwargs=item,
        latent_mask=item["latent_mask"],
        generator=generator,
    )
    observed = item["obs_mask"].flatten().cpu().numpy() > 0
    frames = video_io.add_border(video_io.to_uint8(sample[0].cpu()), observed)
    return frames.transpose(0, 2, 3, 1)
