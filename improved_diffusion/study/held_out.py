"""What a network has learnt: its errors on inference steps of test videos, at several noise levels."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import numpy as np
import torch

from improved_diffusion.data.dataset_files import prepare_dataset
from improved_diffusion.data.frame_batch import FrameBatch
from improved_diffusion.data.rng_util import make_generator, randn
from improved_diffusion.data.video_datasets import TrainDataset
from improved_diffusion.gaussian_diffusion import GaussianDiffusion
from improved_diffusion.sampling.denoiser import Denoiser
from improved_diffusion.training.start import resolve_train_options
from improved_diffusion.training.train_data import held_out_items
from improved_diffusion.training.validation import bits_per_dim

if TYPE_CHECKING:
    from improved_diffusion.study.training_comparison import Recipe

LEVELS = (-6, -4, -2, 0, 2, 4, 6)  # log SNR, natural logarithm
BOUND = "bits/dim"


def held_out_errors(
    denoiser: Denoiser, recipe: Recipe, num_queries: int, *, seed: int, device: str
) -> dict[str, float]:
    """{"-6": squared error of predicted clean frames at this log SNR, ..., "bits/dim": bound}.

    Means over queries, inference steps of random strategies on test videos with the sizes of the recipe.
    """
    _, _, spec = resolve_train_options(recipe.train, recipe.data, recipe.model)
    train = dataclasses.replace(
        recipe.train,
        mask_distribution="queries",
        mask_options=None,
        seed=seed,
        valid_videos=num_queries,
    )
    prepare_dataset(spec)  # a measurement before training may be the first use
    queries = held_out_items(spec, train, recipe.data.cache_dir)
    rows = [
        query_errors(denoiser, query_batch(queries, number, device), (seed, number))
        for number in range(num_queries)
    ]
    return dict(zip([*map(str, LEVELS), BOUND], map(float, np.mean(rows, axis=0)), strict=True))


def query_batch(queries: TrainDataset, number: int, device: str) -> FrameBatch:
    """Query number `number`, always the same, as a batch of one video without padding."""
    item = queries[divmod(number, len(queries))]
    items = {key: value[None] for key, value in item.items()}
    return FrameBatch.from_items(items, device).without_padding()


@torch.inference_mode()
def query_errors(denoiser: Denoiser, batch: FrameBatch, key: tuple[int, int]) -> list[float]:
    """The squared error of predicted clean frames at each of LEVELS, then the bound in bits/dim.

    batch: one video without padding; only its latent frames count, with values in [-1, 1]. key: what
    the noise depends on.
    """
    t = nearest_timesteps(denoiser.diffusion).to(batch.device)
    several = batch.repeated(len(t))
    noise = randn(several.frames.shape, make_generator(*key), batch.device)
    x_t = denoiser.diffusion.q_sample(several.frames, t, noise)
    squares = (denoiser.denoise(x_t, t, several) - several.frames) ** 2
    latent = several.latent_mask.expand_as(squares)
    errors = (squares * latent).flatten(1).sum(1) / latent.flatten(1).sum(1)
    return [*errors.tolist(), bits_per_dim(denoiser, batch, make_generator(*key, 1))]


def nearest_timesteps(diffusion: GaussianDiffusion) -> torch.Tensor:
    """The timesteps, int64 [levels], whose log SNR is nearest to those of LEVELS."""
    bar = diffusion.alphas_cumprod
    log_snr = np.log(bar) - np.log1p(-bar)
    return torch.from_numpy(np.abs(log_snr[None] - np.array(LEVELS)[:, None]).argmin(1))
