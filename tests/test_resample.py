"""Timestep samplers: their distributions, and the weights that undo them."""

import numpy as np
import pytest
import torch

from improved_diffusion.config import DiffusionConfig, from_options
from improved_diffusion.data.rng_util import make_generator
from improved_diffusion.resample import (
    LossSecondMomentSampler,
    ScheduleSampler,
    create_schedule_sampler,
    stratified_quantiles,
    timestep_distribution,
)
from improved_diffusion.respace import SpacedDiffusion
from improved_diffusion.training.options import TrainConfig


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def warmed_up(num_timesteps=4, history=3):
    """A sampler whose losses at timestep t were all t + 1."""
    sampler = LossSecondMomentSampler(num_timesteps, history=history, uniform_share=0.001)
    for _ in range(history):
        t = torch.arange(num_timesteps)
        sampler.update(t, (t + 1).float())
    return sampler


def test_uniform_covers_all_timesteps_with_weight_one():
    t, weights = ScheduleSampler(5).sample(5000, generator())
    assert torch.allclose(torch.bincount(t, minlength=5) / 5000, torch.full((5,), 0.2), atol=0.03)
    assert torch.allclose(weights, torch.ones(5000))


def test_equal_generators_draw_equal_timesteps():
    sampler = create_schedule_sampler("uniform", 1000)
    first, second = (sampler.sample(8, generator(3))[0] for _ in range(2))
    assert torch.equal(first, second)
    assert not torch.equal(first, sampler.sample(8, generator(4))[0])


def test_second_moment_is_uniform_until_every_timestep_has_its_history():
    sampler = LossSecondMomentSampler(4, history=2)
    for t in ([0, 1, 2, 3], [0, 1, 2]):
        sampler.update(torch.tensor(t), torch.tensor(t) + 1.0)
        assert torch.allclose(sampler.probabilities(), torch.full((4,), 0.25).double())
    sampler.update(torch.tensor([3]), torch.tensor([4.0]))
    assert not torch.allclose(sampler.probabilities(), torch.full((4,), 0.25).double())


def test_second_moment_draws_in_proportion_to_the_rms_loss():
    expected = 0.999 * torch.tensor([0.1, 0.2, 0.3, 0.4]).double() + 0.001 / 4
    assert torch.allclose(warmed_up().probabilities(), expected)


def test_old_losses_are_forgotten():
    sampler = warmed_up()
    for _ in range(3):
        sampler.update(torch.arange(4), torch.ones(4))
    assert torch.allclose(sampler.probabilities(), torch.full((4,), 0.25).double())


def test_weights_keep_the_mean_loss_unbiased():
    sampler = warmed_up()
    t, weights = sampler.sample(200_000, generator())
    losses = torch.tensor([5.0, 1.0, 2.0, 8.0])
    assert (losses[t] * weights).mean() == pytest.approx(losses.mean().item(), rel=0.02)


def test_state_round_trip_draws_the_same():
    sampler, copy = warmed_up(), LossSecondMomentSampler(4, history=3)
    copy.load_state_dict(sampler.state_dict())
    assert torch.equal(copy.probabilities(), sampler.probabilities())
    sampler.update(torch.tensor([0]), torch.tensor([9.0]))
    assert not torch.equal(copy.probabilities(), sampler.probabilities())


def test_state_of_another_sampler_is_refused():
    with pytest.raises(ValueError, match="another --schedule_sampler"):
        LossSecondMomentSampler(4).load_state_dict(ScheduleSampler(4).state_dict())


# ---------------------------------------------------------------- over noise levels


def log_sigmas(**options):
    """log sigma of each timestep of a process, from its definition."""
    bar = SpacedDiffusion(DiffusionConfig(**options)).alphas_cumprod
    return np.log(np.sqrt((1 - bar) / bar))


def distribution(name, diffusion=None, **options):
    """The distribution as training makes it of its options."""
    train = from_options(TrainConfig, {"dataset": "x", "schedule_sampler": name, **options})
    return timestep_distribution(train, SpacedDiffusion(DiffusionConfig(**(diffusion or {}))))


def quantiles(batch_size, rank=0, world_size=1, seed=0):
    shared, own = make_generator(seed, 99), make_generator(seed, rank)
    return stratified_quantiles(batch_size, rank, world_size, shared=shared, own=own)


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
@pytest.mark.parametrize("stratified", [False, True])
def test_lognormal_draws_the_nearest_timestep_of_normal_levels(schedule, stratified):
    """Shares of 20 parts of the chain, against normal numbers rounded to the nearest timestep."""
    sampler = distribution(
        "lognormal", diffusion={"noise_schedule": schedule}, log_sigma_mean=0.5, log_sigma_std=1.6
    )
    levels = log_sigmas(noise_schedule=schedule)
    drawn = 0.5 + 1.6 * np.random.default_rng(3).standard_normal(400_000)
    right = np.searchsorted(levels, drawn).clip(1, 999)
    nearest = right - (drawn - levels[right - 1] < levels[right] - drawn)
    expected = np.bincount(nearest // 50, minlength=20) / len(drawn)
    n = 20_000
    t, weights = sampler.sample(n, generator(), quantiles=quantiles(n) if stratified else None)
    shares = np.bincount(t // 50, minlength=20) / n
    # Five standard deviations of a binomial share; strata leave at most one draw at either edge.
    spread = np.sqrt(expected * (1 - expected))
    bound = (
        5 * spread / np.sqrt(len(drawn)) + (2 if stratified else 5 * spread * np.sqrt(n) + 1) / n
    )
    assert (np.abs(shares - expected) < bound).all()
    assert (weights == 1).all() and sampler.probabilities().sum() == pytest.approx(1)


def test_a_share_of_lognormal_draws_is_uniform():
    shape = {"log_sigma_mean": 0.5, "log_sigma_std": 0.2}
    pure = distribution("lognormal", **shape).probabilities()
    p = distribution("lognormal", **shape, lognormal_uniform_share=0.25).probabilities()
    assert float(pure[0]) < 1e-9  # which the uniform share mends
    torch.testing.assert_close(p, 0.75 * pure + 0.25 / 1000)


def test_logsnr_uniform_fills_equal_ranges_alike():
    sampler = distribution("logsnr-uniform", log_snr_min=-6.0, log_snr_max=4.0)
    n = 20_000
    t, weights = sampler.sample(n, generator())
    drawn = -2 * log_sigmas()[t.numpy()]
    # A timestep's bin reaches half a step beyond the range.
    assert -6.1 < drawn.min() and drawn.max() < 4.1
    shares = np.histogram(drawn, bins=np.linspace(-6, 4, 11))[0] / n
    assert (np.abs(shares - 0.1) < 5 * np.sqrt(0.09 / n) + 0.003).all()
    assert (weights == 1).all()


def test_logsnr_uniform_ends_where_the_process_does():
    p = distribution("logsnr-uniform", log_snr_min=-99.0, log_snr_max=99.0).probabilities().numpy()
    levels = -2 * log_sigmas()
    middle = (levels[:-2] - levels[2:]) / 2 / (levels[0] - levels[-1])
    np.testing.assert_allclose(p[1:-1], middle, rtol=1e-9)
    assert p.sum() == pytest.approx(1) and p.min() > 0


@pytest.mark.parametrize("name, options, words", [
    ("lognormal", {"log_sigma_std": 0.0}, "--log_sigma_std 0.0: must be above 0"),
    ("lognormal", {"log_sigma_mean": float("inf")}, "--log_sigma_mean inf: must be finite"),
    ("lognormal", {"log_sigma_mean": 9.0}, "--log_sigma_mean 9.0: must lie .* between -4.61 and 5"),
    ("lognormal", {"lognormal_uniform_share": 1.5}, "share 1.5: must be from 0 to 1"),
    ("logsnr-uniform", {"log_snr_min": 2.0, "log_snr_max": 1.0}, "--log_snr_min 2.0 must be below"),
    ("logsnr-uniform", {"log_snr_min": 20.0, "log_snr_max": 30.0}, "the noise schedule has none"),
    ("log-normal", {}, "--schedule_sampler 'log-normal' is unknown: choose from uniform, loss-"),
    ("lognormal", {"diffusion": {"use_kl": True}}, "--use_kl True and --schedule_sampler lognormal"),
])  # fmt: skip
def test_distributions_that_cannot_be_are_refused_in_one_line(name, options, words):
    with pytest.raises(ValueError, match=words) as caught:
        distribution(name, **options)
    assert "\n" not in str(caught.value)


# ---------------------------------------------------------------- strata


@pytest.mark.parametrize("ranks, batch_size", [(1, 8), (3, 4)])
def test_all_ranks_together_take_one_quantile_of_each_stratum(ranks, batch_size):
    total = ranks * batch_size
    drawn = [quantiles(batch_size, rank, ranks) for rank in range(ranks)]
    strata = torch.cat(drawn).mul(total).floor().long()
    assert sorted(strata.tolist()) == list(range(total))
    assert strata.tolist() != list(range(total))  # a microbatch is no part of the chain


def test_a_stratified_draw_by_itself_has_the_distribution():
    """The first item of rank 1, over many updates; and a distribution that learns from losses."""
    sampler = warmed_up()
    n = 4000
    firsts = torch.cat([quantiles(3, 1, 2, seed)[:1] for seed in range(n)])
    t, weights = sampler.sample(n, generator(), quantiles=firsts)
    p = sampler.probabilities()
    shares = torch.bincount(t, minlength=4) / n
    assert ((shares - p).abs() < 5 * (p * (1 - p) / n).sqrt()).all()
    torch.testing.assert_close(weights, (1 / (4 * p[t])).float())


def test_quantiles_reach_every_timestep_and_none_that_has_no_probability():
    class Middle(ScheduleSampler):
        def probabilities(self):
            return torch.tensor([0.0, 0.5, 0.5, 0.0], dtype=torch.float64)

    ends = torch.tensor([0.0, 0.4999, 0.5, 1.0], dtype=torch.float64)
    assert Middle(4).sample(4, generator(), quantiles=ends)[0].tolist() == [1, 1, 2, 2]
    even = ScheduleSampler(100).sample(100, generator(), quantiles=quantiles(100))[0]
    assert sorted(even.tolist()) == list(range(100))
