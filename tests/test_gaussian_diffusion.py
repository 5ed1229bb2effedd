"""The diffusion process: schedules, masks in every loss, learned variances, bounds, respacing."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from improved_diffusion.config import DiffusionConfig
from improved_diffusion.data.rng_util import make_generator, randn
from improved_diffusion.gaussian_diffusion import get_named_beta_schedule
from improved_diffusion.losses import discretized_gaussian_log_likelihood, normal_kl
from improved_diffusion.respace import SpacedDiffusion, space_timesteps

B, T, H = 2, 3, 4
LATENT = torch.tensor([[0.0, 1, 0], [1, 0, 1]]).reshape(B, T, 1, 1, 1)


class Pixelwise(nn.Module):
    """A network whose output at a pixel depends on that pixel alone; 3 or 6 channels."""

    def __init__(self, channels: int):
        super().__init__()
        self.weight = nn.Parameter(0.3 * torch.ones(channels))
        self.bias = nn.Parameter(0.1 * torch.arange(channels))

    def forward(self, x, timesteps, **kwargs):
        wide = x.repeat(1, 1, len(self.weight) // 3, 1, 1)
        return wide * self.weight[:, None, None] + self.bias[:, None, None]


def make(**options):
    config = DiffusionConfig(**({"diffusion_steps": 50} | options))
    return SpacedDiffusion(config), Pixelwise(6 if config.learn_sigma else 3)


def data():
    generator = make_generator(3)
    x0 = randn((B, T, 3, H, H), generator).clamp(-1, 1)
    return x0, randn(x0.shape, generator), torch.tensor([0, 30])


@pytest.mark.parametrize("options", [
    {},
    {"predict_xstart": True},
    {"learn_sigma": True},
    {"use_kl": True},
    {"learn_sigma": True, "use_kl": True},
])  # fmt: skip
def test_frames_outside_the_mask_change_no_loss(options):
    diffusion, model = make(**options)
    x0, noise, t = data()
    other = torch.where(LATENT > 0, x0, -x0)
    losses = [
        diffusion.training_losses(model, x, t, noise=noise, latent_mask=LATENT, eval_mask=LATENT)
        for x in (x0, other)
    ]
    for name in losses[0]:
        torch.testing.assert_close(losses[0][name], losses[1][name], msg=name)
    unmasked = diffusion.training_losses(model, x0, t, noise=noise)
    assert (unmasked["loss"] != losses[0]["loss"]).all()


def test_masked_means_divide_by_all_elements():
    diffusion, model = make()
    x0, noise, t = data()
    full = diffusion.training_losses(model, x0, t, noise=noise)["mse"]
    parts = [
        diffusion.training_losses(model, x0, t, noise=noise, latent_mask=mask)["mse"]
        for mask in (LATENT, 1 - LATENT)
    ]
    torch.testing.assert_close(parts[0] + parts[1], full)


def test_the_bound_of_learn_sigma_trains_the_variance_alone():
    diffusion, model = make(learn_sigma=True)
    x0, noise, t = data()
    terms = diffusion.training_losses(model, x0, t, noise=noise, latent_mask=LATENT)
    terms["vb"].sum().backward()
    assert (model.bias.grad[:3] == 0).all() and (model.bias.grad[3:] != 0).all()
    torch.testing.assert_close(terms["loss"], terms["mse"] + terms["vb"])


def test_learned_variances_lie_between_the_posterior_and_beta():
    diffusion, _ = make(learn_sigma=True)
    x0, _, _ = data()
    t = torch.tensor([10, 30])

    def variance(value):
        output = torch.cat([torch.zeros_like(x0), torch.full_like(x0, value)], dim=2)
        out = diffusion.p_mean_variance(lambda x, ts: output, x0, t)
        assert out["mean"].shape == out["variance"].shape == x0.shape
        return out["variance"][:, 0, 0, 0, 0].numpy()

    bars = diffusion.alphas_cumprod
    posterior = diffusion.betas[[10, 30]] * (1 - bars[[9, 29]]) / (1 - bars[[10, 30]])
    np.testing.assert_allclose(variance(-1.0), posterior, rtol=1e-5)
    np.testing.assert_allclose(variance(1.0), diffusion.betas[[10, 30]], rtol=1e-5)


def test_options_change_the_loss_or_the_variance():
    x0, noise, t = data()

    def loss(**options):
        diffusion, model = make(**options)
        return diffusion.training_losses(model, x0, t, noise=noise)["loss"].sum().item()

    def variance(**options):
        diffusion, model = make(**options)
        return diffusion.p_mean_variance(model, x0, t)["variance"].sum().item()

    base = loss()
    assert all(loss(**{o: True}) != base for o in ("predict_xstart", "use_kl", "learn_sigma"))
    assert loss(noise_schedule="cosine") != base
    assert loss(learn_sigma=True) != loss(learn_sigma=True, rescale_learned_sigmas=False)
    assert variance(sigma_small=True) != variance()
    seen = []
    for rescale in (True, False):
        diffusion, _ = make(rescale_timesteps=rescale)
        diffusion.p_mean_variance(lambda x, ts: seen.append(ts) or x, x0, t)
    assert seen[0].tolist() == [0.0, 600.0] and seen[1].tolist() == [0, 30]


def test_the_bound_is_the_sum_of_its_terms_and_counts_masked_frames_only():
    diffusion, model = make(noise_schedule="cosine", diffusion_steps=6)
    x0, _, _ = data()
    out = diffusion.calc_bpd_loop(model, x0, latent_mask=LATENT, generator=make_generator(1))
    assert out["vb"].shape == out["mse"].shape == (B, 6)
    torch.testing.assert_close(out["total_bpd"], out["vb"].sum(dim=1) + out["prior_bpd"])
    other = torch.where(LATENT > 0, x0, -x0)
    again = diffusion.calc_bpd_loop(model, other, latent_mask=LATENT, generator=make_generator(1))
    torch.testing.assert_close(out["total_bpd"], again["total_bpd"])


def test_the_bound_exceeds_the_entropy_and_nearly_meets_it_with_the_best_network():
    """For Gaussian data the best network is known, and so is what no code can go below."""
    std = 0.2
    diffusion, _ = make(diffusion_steps=400)

    def best(x, timesteps, **kwargs):
        bar = torch.from_numpy(diffusion.alphas_cumprod).float()[
            (timesteps[0] * 400 / 1000).round().long()
        ]
        return x * (1 - bar).sqrt() / (bar * std**2 + 1 - bar)

    x0 = std * randn((1, 20, 3, 16, 16), make_generator(0))
    x0 = ((x0 + 1) * 127.5).round() / 127.5 - 1  # 8-bit pixels
    bits = diffusion.calc_bpd_loop(best, x0, clip_denoised=False, generator=make_generator(1))
    entropy = 0.5 * math.log2(2 * math.pi * math.e * std**2) + math.log2(127.5)
    assert entropy - 0.02 < bits["total_bpd"].item() < entropy + 0.15


def test_pixels_probabilities_sum_to_one():
    pixels = torch.arange(256) / 127.5 - 1
    for mean, log_scale in ((0.0, -2.0), (0.9, -1.0), (-1.0, -4.0)):
        log_p = discretized_gaussian_log_likelihood(
            pixels, means=torch.tensor(mean), log_scales=torch.tensor(log_scale)
        )
        assert log_p.exp().sum().item() == pytest.approx(1, abs=1e-3)


def test_kl_of_gaussians_equals_torchs():
    a, b = torch.distributions.Normal(0.3, 0.5), torch.distributions.Normal(-1.0, 2.0)
    ours = normal_kl(a.mean, a.variance.log(), b.mean, b.variance.log())
    torch.testing.assert_close(ours, torch.distributions.kl_divergence(a, b))


def test_the_linear_schedule_refuses_too_few_steps():
    with pytest.raises(ValueError, match="cosine"):
        get_named_beta_schedule("linear", 20)
    fewest = get_named_beta_schedule(
        "linear", 21
    )  # 1e-4 to 0.02 at 1000 steps, 1000 / 21 times that
    np.testing.assert_allclose(fewest, np.linspace(0.1 / 21, 20 / 21, 21))
    bar = np.cos((np.array([0, 0.5]) + 0.008) / 1.008 * np.pi / 2) ** 2  # Improved DDPM Eq. 17
    np.testing.assert_allclose(
        get_named_beta_schedule("cosine", 2), [1 - bar[1] / bar[0], 0.999], rtol=1e-12
    )


@pytest.mark.parametrize("respacing, expected", [
    ("", list(range(10))),
    ("5", [0, 2, 4, 7, 9]),
    ("ddim5", [0, 2, 4, 6, 8]),
    ("2,3", [0, 4, 5, 7, 9]),
    ("1", [0]),
])  # fmt: skip
def test_respacing_keeps_the_documented_timesteps(respacing, expected):
    assert space_timesteps(10, respacing) == expected


@pytest.mark.parametrize("respacing", ["11", "0", "a", "ddim4x", "ddim7", "6,6", "-3"])
def test_impossible_respacings_are_refused(respacing):
    with pytest.raises(ValueError, match="--timestep_respacing"):
        space_timesteps(10, respacing)


def test_a_respaced_chain_has_the_same_marginals_and_shows_the_network_the_original_timesteps():
    full, short = make()[0], make(timestep_respacing="7")[0]
    np.testing.assert_allclose(short.alphas_cumprod, full.alphas_cumprod[short.timestep_map])
    t = torch.arange(7)
    scaled = full.scale_timesteps(torch.from_numpy(short.timestep_map))
    assert short.scale_timesteps(t).tolist() == scaled.tolist()


def test_noise_of_a_row_does_not_depend_on_its_neighbours():
    keys = [(0, 4, 1, 2), (0, 5, 1, 2)]
    both = randn((2, 3), [make_generator(*key) for key in keys])
    alone = randn((1, 3), [make_generator(*keys[1])])
    assert torch.equal(both[1:], alone) and not torch.equal(both[0], both[1])
