"""Losses and bits per dimension on held-out videos, and that measuring them changes nothing."""

import numpy as np
import pytest
import torch

from improved_diffusion.config import DiffusionConfig
from improved_diffusion.data.frame_batch import FrameBatch
from improved_diffusion.data.rng_util import make_generator, randn
from improved_diffusion.sampling.denoiser import Denoiser
from improved_diffusion.sampling.trained_model import create_diffusion
from improved_diffusion.training import signals, validation
from train_runs import assert_same_run, column, flags, make_loop, train


def item(num_obs=1, num_latent=3):
    roles = torch.arange(num_obs + num_latent).reshape(1, -1, 1, 1, 1)
    return FrameBatch(
        frames=torch.rand(1, num_obs + num_latent, 3, 8, 8) * 2 - 1,
        obs_mask=(roles < num_obs).float(),
        latent_mask=(roles >= num_obs).float(),
        frame_indices=torch.arange(num_obs + num_latent)[None],
    )


def toy(x, timesteps, **kwargs):
    """A network whose error depends on the timestep and the frames."""
    return 0.5 * x + timesteps[:, None, None, None, None] / 1000


@pytest.mark.parametrize("num_timesteps", [1, 2, 3, 40, 64, 1000])
def test_strata_cover_all_timesteps_once(num_timesteps):
    draws = [
        validation.stratified_timesteps(num_timesteps, make_generator(0, i)) for i in range(300)
    ]
    sizes = draws[0][1]
    starts = np.cumsum([0, *sizes])
    assert starts[-1] == num_timesteps and sizes[0] == 1
    for steps, _ in draws:
        assert all(low <= t < high for t, low, high in zip(steps, starts, starts[1:], strict=False))
    for column_, low, size in zip(
        zip(*(s for s, _ in draws), strict=True), starts, sizes, strict=False
    ):
        if size <= 32:
            assert set(column_) == set(range(low, low + size))


def test_bits_per_dim_of_two_timesteps_is_the_whole_bound():
    diffusion = create_diffusion(DiffusionConfig(diffusion_steps=2, noise_schedule="cosine"))
    sample, generator = item(), make_generator(5)
    x0, mask = sample.frames, sample.latent_mask
    estimate = validation.bits_per_dim(Denoiser(toy, diffusion), sample, make_generator(5))
    expected = diffusion.prior_bpd(x0, mask)
    for step in (0, 1):  # the strata {0} and {1}: nothing is left to chance but the noise
        torch.randint(step, step + 1, (), generator=generator)
    for step in (0, 1):
        t = torch.tensor([step])
        x_t = diffusion.q_sample(x0, t, randn(x0.shape, generator))
        term = diffusion.vb_terms_bpd(toy, x0, x_t, t, latent_mask=mask)
        expected = expected + term["output"]
    assert estimate == pytest.approx(float(expected) * 4 / 3, rel=1e-6)


def test_bits_per_dim_is_unbiased():
    diffusion = create_diffusion(DiffusionConfig(diffusion_steps=40))
    sample = item()
    whole = [
        diffusion.calc_bpd_loop(
            toy,
            sample.frames,
            latent_mask=sample.latent_mask,
            generator=make_generator(1, i),
        )["total_bpd"].item() * 4 / 3
        for i in range(20)
    ]  # fmt: skip
    estimates = [
        validation.bits_per_dim(Denoiser(toy, diffusion), sample, make_generator(2, i))
        for i in range(300)
    ]
    error = np.hypot(np.std(estimates) / len(estimates) ** 0.5, np.std(whole) / len(whole) ** 0.5)
    assert error < 0.02 * np.mean(whole)
    assert abs(np.mean(estimates) - np.mean(whole)) < 4 * error


def test_padding_is_taken_out_and_frames_are_ordered():
    sample = FrameBatch(
        frames=torch.zeros(1, 4, 3, 2, 2),
        obs_mask=torch.tensor([1.0, 0, 0, 0]).reshape(1, 4, 1, 1, 1),
        latent_mask=torch.tensor([0, 1.0, 1, 0]).reshape(1, 4, 1, 1, 1),
        frame_indices=torch.tensor([[5, 2, 9, 7]]),
    )
    real = sample.without_padding()
    assert real.frame_indices.tolist() == [[2, 5, 9]]
    assert real.obs_mask.flatten().tolist() == [0, 1, 0]


@pytest.mark.slow
def test_measuring_is_logged_at_its_interval_repeats_itself_and_changes_nothing(videos):
    options = {"log_interval": 3, "max_steps": 4, "lr": 0.0, "valid_videos": 3}
    make_loop(videos, {"dropout": 0.1}, resume_id="with", valid_interval=2, **options).run_loop()
    make_loop(videos, {"dropout": 0.1}, resume_id="without", **options).run_loop()
    assert_same_run("checkpoints/with", "checkpoints/without")
    assert column("checkpoints/with", "step") == ["2", "3", "4"]
    first, between, second = column("checkpoints/with", "valid_bpd")
    assert between == "" and first == second and float(first) > 0  # the rate is 0: same weights
    losses = column("checkpoints/with", "valid_loss")
    assert losses[0] == losses[2] and 0.2 < float(losses[0]) < 2


def test_a_measurement_that_a_signal_cut_short_is_not_logged(videos, monkeypatch):
    loop = make_loop(videos, valid_interval=1)
    monkeypatch.setattr(signals, "received", lambda: 15)
    loop._validate()
    loop.log.add("x", 1)
    assert loop.log.dump(1) == {"x": 1}


@pytest.mark.slow
def test_ranks_measure_what_one_process_measures(videos, tmp_path):
    options = flags(videos, valid_interval=1, max_steps=1, lr=0, valid_videos=5)
    for ranks, run_id in ((0, "one"), (2, "two")):
        done = train(tmp_path, *options, f"--resume_id={run_id}", ranks=ranks)
        assert done.returncode == 0, done.stderr
    for name in ("valid_loss", "valid_bpd"):
        one, two = (float(column(f"checkpoints/{run}", name)[0]) for run in ("one", "two"))
        assert one == pytest.approx(two, rel=1e-6)


def test_a_short_test_video_is_told_before_training(videos, tmp_path):
    np.save(tmp_path / "videos" / "test" / "1.npy", np.zeros((3, 32, 32, 3), np.uint8))
    done = train(tmp_path, *flags(videos, valid_interval=1))
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1
    assert "test/1.npy" in done.stderr
