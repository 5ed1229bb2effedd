"""Samplers against a case with a known answer: Gaussian frames and their exact denoiser.

A video is T frames of 3x1x1 numbers, jointly Gaussian over frames (channels independent). Given some
frames, the others are Gaussian with a mean and a covariance in closed form, and so is the best
denoiser at every noise level: samplers that use it must reproduce both.
"""

import numpy as np
import pytest
import torch

from improved_diffusion.config import DiffusionConfig
from improved_diffusion.data.frame_batch import FrameBatch
from improved_diffusion.data.rng_util import make_generator
from improved_diffusion.registry import SAMPLERS
from improved_diffusion.respace import SpacedDiffusion
from improved_diffusion.sampling.denoiser import Denoiser

T, NUM_OBSERVED, CHANNELS = 4, 2, 3
POSITIONS = np.arange(T)
COVARIANCE = 0.09 * np.exp(-0.5 * np.abs(POSITIONS[:, None] - POSITIONS[None]))
MEAN = np.array([0.1, -0.2, 0.3, 0.0])
OBSERVED_VALUES = np.array([0.4, -0.3])


def conditional() -> tuple[np.ndarray, np.ndarray]:
    """Mean and covariance of the latent frames given the observed ones."""
    o, latent = slice(0, NUM_OBSERVED), slice(NUM_OBSERVED, T)
    gain = COVARIANCE[latent, o] @ np.linalg.inv(COVARIANCE[o, o])
    mean = MEAN[latent] + gain @ (OBSERVED_VALUES - MEAN[o])
    return mean, COVARIANCE[latent, latent] - gain @ COVARIANCE[o, latent]


class GaussianModel:
    """The exact denoiser, in the network's place; predicts what `config` says."""

    def __init__(self, config: DiffusionConfig):
        self.config = config
        self.bars = SpacedDiffusion(
            DiffusionConfig(noise_schedule=config.noise_schedule)
        ).alphas_cumprod
        self.mean, self.covariance = conditional()

    def __call__(self, x, timesteps, *, x0, obs_mask, latent_mask, frame_indices):
        assert torch.equal(x0[:, :NUM_OBSERVED, 0, 0, 0], self.observed(len(x)))
        bar = self.bars[int(timesteps[0].round())]
        noisy = x[:, NUM_OBSERVED:].double()
        mean = torch.from_numpy(self.mean)[:, None, None, None]
        gain = (
            np.sqrt(bar)
            * self.covariance
            @ np.linalg.inv(bar * self.covariance + (1 - bar) * np.eye(2))
        )
        change = torch.einsum(
            "ij,bjchw->bichw", torch.from_numpy(gain), noisy - np.sqrt(bar) * mean
        )
        clean = torch.zeros_like(x)
        clean[:, NUM_OBSERVED:] = (mean + change).float()
        if not self.config.predict_xstart:
            clean = (x - np.sqrt(bar) * clean) / np.sqrt(1 - bar)
        if self.config.learn_sigma:
            clean = torch.cat([clean, -torch.ones_like(clean)], dim=2)  # the posterior's variance
        return clean

    def observed(self, batch_size: int) -> torch.Tensor:
        return torch.tensor(OBSERVED_VALUES, dtype=torch.float32).expand(batch_size, -1)


def run(
    sampler: str, respacing: str, num: int, eta: float = 0.0, noise=None, **options
) -> np.ndarray:
    """Latent frames [num * CHANNELS, 2] of `num` sampled videos."""
    config = DiffusionConfig(timestep_respacing=respacing, **options)
    model = GaussianModel(config)
    obs_mask = torch.zeros(num, T, 1, 1, 1)
    obs_mask[:, :NUM_OBSERVED] = 1
    x0 = torch.zeros(num, T, CHANNELS, 1, 1)
    x0[:, :NUM_OBSERVED] = model.observed(num)[:, :, None, None, None]
    out = SAMPLERS[sampler](
        Denoiser(model, SpacedDiffusion(config), clip_denoised=False),
        FrameBatch(x0, obs_mask, 1 - obs_mask, torch.arange(T).expand(num, -1)),
        eta=eta,
        generator=make_generator(1),
        noise=noise,
    )
    assert torch.equal(out[:, :NUM_OBSERVED], x0[:, :NUM_OBSERVED]), "observed frames must stay"
    return out[:, NUM_OBSERVED:, :, 0, 0].transpose(1, 2).reshape(-1, 2).numpy()


CASES = [
    ("ddpm", "", {}),
    ("ddpm", "250", {"sigma_small": True}),
    ("ddpm", "250", {"learn_sigma": True}),
    ("ddim", "100", {}),
    ("ddim", "ddim100", {"predict_xstart": True}),
    ("ddim", "250", {"eta": 1.0}),
    ("dpmpp2m", "30", {}),
    ("dpmpp2m", "30", {"predict_xstart": True, "learn_sigma": True}),
    ("dpmpp2m", "30", {"noise_schedule": "cosine"}),
    ("heun", "30", {}),
    ("heun", "60", {"noise_schedule": "cosine", "predict_xstart": True}),
    ("dpmpp3m", "20", {"noise_schedule": "cosine"}),
    ("unipc", "20", {"predict_xstart": True, "learn_sigma": True}),
    ("ipndm4", "20", {"noise_schedule": "cosine", "predict_xstart": True}),
]


@pytest.mark.parametrize("sampler, respacing, options", CASES)
def test_mean_and_covariance_are_those_of_the_conditional_distribution(sampler, respacing, options):
    num = 2000
    samples = run(sampler, respacing, num, **options)
    mean, covariance = conditional()
    n = num * CHANNELS
    tolerance = 5 * np.sqrt(covariance.diagonal() / n) + 0.01 * np.sqrt(covariance.diagonal())
    assert (np.abs(samples.mean(axis=0) - mean) < tolerance).all()
    # Sampling error of a covariance is about sqrt(2/n) of it; the solver's own may be 6 %.
    assert (
        np.abs(np.cov(samples.T) - covariance) < (5 * np.sqrt(2 / n) + 0.06) * covariance[0, 0]
    ).all()


@pytest.mark.parametrize("timesteps", ["2", "3", "6"])
def test_ddim_with_all_of_ddpms_noise_is_finite_however_few_its_steps(timesteps):
    samples = run("ddim", timesteps, 4, eta=1.0, noise_schedule="cosine", predict_xstart=True)
    assert np.isfinite(samples).all()


def exact_flow(noise: np.ndarray, sigma: float) -> np.ndarray:
    """Where the probability flow takes x = sigma * noise (in x / sqrt(alpha_bar)), in closed form.

    For a Gaussian N(m, C) the flow keeps (C + sigma^2)^(-1/2) (x - m).
    """
    mean, covariance = conditional()
    values, vectors = np.linalg.eigh(covariance)
    shrink = vectors @ np.diag(np.sqrt(values / (values + sigma**2))) @ vectors.T
    return mean + (noise * np.sqrt(1 + sigma**2) - mean) @ shrink.T


@pytest.mark.parametrize("sampler, order", [("ddim", 1), ("dpmpp2m", 2), ("heun", 2)])
def test_deterministic_samplers_converge_with_their_order(sampler, order):
    """Each time the number of steps doubles, the error shrinks by about 2^order."""
    num = 50
    noise = torch.randn(num, T, CHANNELS, 1, 1, generator=make_generator(7))
    bars = SpacedDiffusion(DiffusionConfig(noise_schedule="cosine")).alphas_cumprod
    sigma = np.sqrt(1 / bars[-1] - 1)
    start = noise[:, NUM_OBSERVED:, :, 0, 0].transpose(1, 2).reshape(-1, 2).numpy()
    exact = exact_flow(start, sigma)
    steps = (25, 50, 100)
    errors = [
        np.abs(run(sampler, str(n), num, noise=noise, noise_schedule="cosine") - exact).max()
        for n in steps
    ]
    observed = np.log2(errors[0] / errors[-1]) / 2
    assert observed > order - 0.4, f"errors {errors} at {steps} steps: order {observed:.2f}"


def test_second_order_solvers_beat_ddim_at_few_steps():
    num = 50
    noise = torch.randn(num, T, CHANNELS, 1, 1, generator=make_generator(7))
    exact = run("heun", "", num, noise=noise)
    errors = {
        s: np.abs(run(s, "20", num, noise=noise) - exact).max() for s in ("ddim", "dpmpp2m", "heun")
    }
    assert errors["dpmpp2m"] < errors["ddim"] / 2 and errors["heun"] < errors["ddim"] / 2, errors
