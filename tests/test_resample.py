"""Timestep samplers: their distributions, and the weights that undo them."""

import pytest
import torch

from improved_diffusion.resample import (
    LossSecondMomentSampler,
    ScheduleSampler,
    create_schedule_sampler,
)


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
