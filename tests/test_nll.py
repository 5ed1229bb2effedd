"""Bounds on the likelihood: closed form, equality with the published loop, files and refusals."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from golden_fill import array
from helpers import make_checkpoint, make_folder_dataset, run_script
from improved_diffusion.config import DiffusionConfig
from improved_diffusion.data import paths
from improved_diffusion.data.frame_batch import to_uint8
from improved_diffusion.data.rng_util import make_generator
from improved_diffusion.evaluation import nll
from improved_diffusion.evaluation.metric_tables import load_elbo
from improved_diffusion.evaluation.options import NllConfig
from improved_diffusion.inference_utils import AdaptiveAutoregressive
from improved_diffusion.registry import STRATEGIES
from improved_diffusion.respace import SpacedDiffusion
from improved_diffusion.sampling.denoiser import Denoiser
from improved_diffusion.sampling.results import read_json
from improved_diffusion.script_util import load_model

T, NUM_OBSERVED, SIZE = 4, 1, 4


@pytest.fixture
def frames() -> np.ndarray:
    values = 128 + 60 * array("nll/frames", [T, 3, SIZE, SIZE])
    return np.clip(values, 0, 255).astype(np.uint8)


def zero_model(x, timesteps, **kwargs):
    """Predicts middle grey, whatever it is given: every term has a closed form."""
    return torch.zeros_like(x)


def nosy_model(x, timesteps, *, x0, obs_mask, latent_mask, frame_indices):
    """Depends on all that a network is given, the timestep and the frames' positions too."""
    given = x0 * obs_mask + x * latent_mask
    position = frame_indices[:, :, None, None, None] / 10
    context = given.mean(dim=(1, 2, 3, 4), keepdim=True)
    return 0.5 * given + context + position - timesteps[:, None, None, None, None] / 1000


def make_bound(model=nosy_model, *, batch_size=3, seed=0, **options) -> nll.StepBound:
    config = DiffusionConfig(diffusion_steps=12, noise_schedule="cosine", **options)
    denoiser = Denoiser(model, SpacedDiffusion(config))
    return nll.StepBound(denoiser, seed=seed, batch_size=batch_size, device="cpu")


def of_step(bound: nll.StepBound, frames: np.ndarray, *, key=(5, 2), indices=(0, 3, 6, 7)) -> float:
    return bound(frames, list(indices), NUM_OBSERVED, key)


# ---------------------------------------------------------------- the mathematics


def normal_cdf(x: np.ndarray) -> np.ndarray:
    return 0.5 * (1 + np.vectorize(math.erf)(x / np.sqrt(2)))


def kl(mean_1, variance_1, mean_2, variance_2):
    ratio = variance_1 / variance_2
    return 0.5 * (ratio - 1 - np.log(ratio) + (mean_1 - mean_2) ** 2 / variance_2)


@pytest.mark.parametrize("respacing, steps", [("", 12), ("5", 5), ("1", 1)])
def test_the_bound_of_a_constant_prediction_is_its_closed_form(frames, respacing, steps):
    """A network that always predicts 0 leaves no term that depends on the noise."""
    frames = (128 + (frames.astype(int) - 128) // 6).astype(np.uint8)  # not in the tails at t = 0
    bound = make_bound(zero_model, predict_xstart=True, timestep_respacing=respacing)
    x = frames[NUM_OBSERVED:].astype(np.float64) / 127.5 - 1
    bar, beta = bound.denoiser.diffusion.alphas_cumprod, bound.denoiser.diffusion.betas
    assert len(bar) == steps
    nats = kl(np.sqrt(bar[-1]) * x, 1 - bar[-1], 0, 1).sum()
    for t in range(1, len(bar)):
        posterior = beta[t] * (1 - bar[t - 1]) / (1 - bar[t])
        gap = np.sqrt(bar[t - 1]) * beta[t] / (1 - bar[t]) * x
        nats += kl(gap, posterior, 0, beta[t]).sum()
    # At t = 0 the next posterior variance stands in. A chain of one step keeps a large prior term.
    variance = beta[1] * (1 - bar[0]) / (1 - bar[1]) if steps > 1 else beta[0]
    scale = np.sqrt(variance)
    upper = np.where(x > 0.999, 1, normal_cdf((x + 1 / 255) / scale))
    lower = np.where(x < -0.999, 0, normal_cdf((x - 1 / 255) / scale))
    nats -= np.log(np.maximum(upper - lower, 1e-12)).sum()
    # The published bound approximates the normal distribution function by a tanh.
    assert of_step(bound, frames) == pytest.approx(nats / math.log(2), rel=2e-3)


def test_a_step_equals_the_published_loop_given_the_same_noise(frames, monkeypatch):
    bound = make_bound()
    noises = []
    for t in reversed(range(12)):  # the loop draws for the last timestep first
        noise = torch.randn(1, T, 3, SIZE, SIZE)
        generator = make_generator(0, 5, 2, t)
        noise[0, NUM_OBSERVED:] = torch.randn(T - NUM_OBSERVED, 3, SIZE, SIZE, generator=generator)
        noises.append(noise)
    x0 = torch.from_numpy(frames)[None].float() / 127.5 - 1
    mask = torch.ones(1, T, 1, 1, 1)
    mask[:, :NUM_OBSERVED] = 0
    indices = torch.tensor([[0, 3, 6, 7]])
    kwargs = {"x0": x0, "obs_mask": 1 - mask, "latent_mask": mask, "frame_indices": indices}
    with monkeypatch.context() as patch:
        patch.setattr(torch, "randn", lambda *shape, **options: noises.pop(0))
        terms = bound.denoiser.diffusion.calc_bpd_loop(
            nosy_model, x0, model_kwargs=kwargs, latent_mask=mask
        )
    expected = float(terms["total_bpd"]) * x0.numel()
    assert not noises
    assert of_step(bound, frames) == pytest.approx(expected, rel=1e-5)
    assert of_step(bound, frames, key=(5, 3)) != pytest.approx(expected, rel=1e-5)


def test_the_stratified_estimate_is_the_bound_on_average_in_few_calls(frames):
    """The bound of a constant prediction does not depend on the noise: what varies are the draws."""
    exact = make_bound(zero_model, predict_xstart=True)
    estimate = make_bound(zero_model, predict_xstart=True)
    estimate.stratified = True
    found = np.array([of_step(estimate, frames, key=(5, stage)) for stage in range(200)])
    error = found.std(ddof=1) / np.sqrt(len(found))
    assert 0 < error < 0.05 * found.mean()
    assert abs(found.mean() - of_step(exact, frames)) < 4 * error
    calls = estimate.denoiser.calls
    of_step(estimate, frames)
    assert estimate.denoiser.calls - calls == 2  # {0}, {1}, {2, 3}, {4 .. 7}, {8 .. 11}, 3 at once


def test_the_bound_does_not_depend_on_the_batch_size(frames):
    values = [of_step(make_bound(batch_size=size), frames) for size in (1, 5, 12, 100)]
    np.testing.assert_allclose(values, values[0], rtol=1e-6)


def test_noise_depends_on_seed_video_step_and_the_original_timestep(frames):
    first = of_step(make_bound(), frames)
    for other in (
        of_step(make_bound(seed=1), frames),
        of_step(make_bound(), frames, key=(6, 2)),
        of_step(make_bound(), frames, key=(5, 1)),
    ):
        assert other != pytest.approx(first, rel=1e-6)
    seen = []
    bound = make_bound(timestep_respacing="2")
    draw = nll.make_generator
    try:
        nll.make_generator = lambda *key: seen.append(key) or draw(*key)
        of_step(bound, frames)
    finally:
        nll.make_generator = draw
    assert seen == [(0, 5, 2, 0), (0, 5, 2, 11)]


def test_observed_frames_are_given_and_not_counted(frames):
    changed = frames.copy()
    changed[0] = 255 - changed[0]
    assert of_step(make_bound(), changed) != pytest.approx(of_step(make_bound(), frames), rel=1e-6)
    deaf = make_bound(zero_model, predict_xstart=True)
    assert of_step(deaf, changed) == pytest.approx(of_step(deaf, frames), rel=1e-6)
    with_all = deaf(frames, [0, 3, 6, 7], 0, (5, 2))
    first_alone = deaf(frames[:1], [0], 0, (5, 2))
    assert with_all == pytest.approx(of_step(deaf, frames) + first_alone, rel=1e-5)


# ---------------------------------------------------------------- test sets


VIDEO_LENGTH, OBS_LENGTH, NUM_STEPS = 8, 4, 2


@pytest.fixture
def checkpoint(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    dataset = make_folder_dataset(tmp_path / "data", T=VIDEO_LENGTH)
    return make_checkpoint(tmp_path / "checkpoints/abc/ema_0.9999_latest.pt", dataset)


def bound_dataset(checkpoint: Path, **options) -> nll.VideoBounds:
    defaults = {
        "inference_mode": "autoreg",
        "step_size": 2,
        "obs_length": OBS_LENGTH,
        "indices": (0, 2),
    }
    return nll.bound_dataset(NllConfig(checkpoint_path=str(checkpoint), **(defaults | options)))


def load(bounds: nll.VideoBounds, video: int) -> np.ndarray:
    return load_elbo(paths.elbo_path(bounds.eval_dir, video))


def test_files_are_where_documented_and_hold_bits_per_step(checkpoint):
    bounds = bound_dataset(checkpoint)
    assert bounds.eval_dir == Path("results/abc/ema_0.9999_latest_1234/autoreg_4_2_8_4")
    assert sorted(p.name for p in (bounds.eval_dir / "elbos").iterdir()) == [
        "elbo_0000.npy",
        "elbo_0002.npy",
    ]
    assert load(bounds, 2).dtype == np.float64 and load(bounds, 2).shape == (NUM_STEPS,)
    dimensions = (VIDEO_LENGTH - OBS_LENGTH) * 3 * 32 * 32
    assert bounds.videos == [0, 2]
    assert bounds.bits_per_dim[1] == pytest.approx(load(bounds, 2).sum() / dimensions)
    assert not (bounds.eval_dir / "partial").exists()
    assert read_json(bounds.eval_dir / "elbo_config.json")["checkpoint_step"] == 1234
    assert (bounds.eval_dir / "model_config.json").exists()


def test_a_step_of_the_network_is_bounded_on_the_frames_of_the_strategy(checkpoint, tmp_path):
    bounds = bound_dataset(checkpoint, indices=(2,))
    model, config, _ = load_model(str(checkpoint))
    diffusion = SpacedDiffusion(DiffusionConfig(
        diffusion_steps=3, noise_schedule="cosine", predict_xstart=True
    ))  # fmt: skip
    video = np.load(tmp_path / "data/test/2.npy").transpose(0, 3, 1, 2)
    bound = nll.StepBound(Denoiser(model, diffusion), seed=0, batch_size=3, device="cpu")
    for step, indices in enumerate(([2, 3, 4, 5], [4, 5, 6, 7])):
        expected = bound(video[indices], indices, 2, (2, step))
        assert load(bounds, 2)[step] == pytest.approx(expected, rel=1e-5)


def test_estimates_say_so_and_do_not_mix_with_bounds(checkpoint):
    exact = bound_dataset(checkpoint)
    assert "estimate" not in nll.format_bounds(exact)
    with pytest.raises(ValueError, match="holds bounds made with stratified False, not True"):
        bound_dataset(checkpoint, stratified=True)
    estimate = bound_dataset(checkpoint, stratified=True, eval_dir="other")
    assert "an unbiased estimate of the bound of the chain of all" in nll.format_bounds(estimate)


def test_batches_and_array_tasks_change_nothing(checkpoint, monkeypatch, caplog):
    caplog.set_level("INFO")
    together = bound_dataset(checkpoint, indices=None, batch_size=4, eval_dir="a")
    assert together.videos == [0, 1, 2, 3]
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "1")
    task = bound_dataset(checkpoint, indices=None, batch_size=2, eval_dir="b")
    assert task.videos == [2, 3]
    np.testing.assert_allclose(load(task, 3), load(together, 3), rtol=1e-5)
    assert (load(together, 2) != load(together, 3)).all()
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "2")
    past = bound_dataset(checkpoint, indices=None, batch_size=2, eval_dir="c")
    assert past.videos == [] and not Path("c").exists() and "past the last batch" in caplog.text
    assert "no video" in nll.format_bounds(past)


def test_finished_videos_are_skipped_and_unfinished_ones_go_on(checkpoint, monkeypatch):
    bounds = bound_dataset(checkpoint)
    whole = load(bounds, 2)
    kept, broken = (paths.elbo_path(bounds.eval_dir, video) for video in (0, 2))
    stamp = kept.stat().st_mtime_ns
    broken.write_bytes(broken.read_bytes()[:-3])
    steps = []
    original = nll.StepBound.__call__

    def dying(self, frames, indices, num_observed, key):
        if len(steps) == 1:
            steps.append("killed")
            raise KeyboardInterrupt
        steps.append(key)
        return original(self, frames, indices, num_observed, key)

    monkeypatch.setattr(nll.StepBound, "__call__", dying)
    with pytest.raises(KeyboardInterrupt):
        bound_dataset(checkpoint)
    bound_dataset(checkpoint)
    assert steps == [(2, 0), "killed", (2, 1)]
    np.testing.assert_allclose(load(bounds, 2), whole, rtol=1e-6)
    assert kept.stat().st_mtime_ns == stamp and not (bounds.eval_dir / "partial").exists()


def test_a_respaced_chain_has_its_own_folder_and_is_named(checkpoint):
    full, short = bound_dataset(checkpoint), bound_dataset(checkpoint, timestep_respacing="2")
    assert short.eval_dir.parent.name.endswith("_respace2")
    assert (load(full, 0) != load(short, 0)).all()
    assert "all 3 timesteps" in nll.format_bounds(full)
    text = nll.format_bounds(short)
    assert "respaced to 2 of 3 timesteps, not an estimate of the full one" in text
    assert f"{short.bits_per_dim.mean():.4f} +- " in text and "over 2 videos" in text


def test_adaptive_strategies_choose_their_frames_on_the_true_video(
    checkpoint, tmp_path, monkeypatch
):
    seen = []

    class Watching(AdaptiveAutoregressive):
        def set_videos(self, videos):
            seen.append(to_uint8(videos[0]))
            super().set_videos(videos)

    monkeypatch.setitem(STRATEGIES, "watching", Watching)
    bounds = bound_dataset(
        checkpoint, inference_mode="watching", strategy_options={"distance": "l2"}, indices=(1,)
    )
    truth = np.load(tmp_path / "data/test/1.npy").transpose(0, 3, 1, 2)
    np.testing.assert_array_equal(seen[0], truth)
    assert load(bounds, 1).shape == (NUM_STEPS,)


def test_bounds_without_observed_frames_cover_the_whole_video(checkpoint):
    bounds = bound_dataset(checkpoint, obs_length=0, indices=(0,))
    total = load(bounds, 0).sum()
    assert bounds.bits_per_dim[0] == pytest.approx(total / (VIDEO_LENGTH * 3 * 32 * 32))


@pytest.mark.parametrize(
    "options, words",
    [
        ({"inference_mode": "gibbs"}, "--inference_mode gibbs samples frames more than once"),
        ({"T": 12}, "video 0 has 8 frames, the bound needs all 12"),
        ({"inference_mode": "autoregg"}, "autoregg"),
        ({"indices": (9,)}, "--indices 9"),
        ({"timestep_respacing": "9"}, "9 timesteps"),
    ],
)
def test_mistakes_are_named_and_nothing_is_written(checkpoint, options, words):
    with pytest.raises(ValueError, match=words):
        bound_dataset(checkpoint, **options)
    assert not Path("results").exists()


def test_a_folder_keeps_to_one_seed(checkpoint):
    bound_dataset(checkpoint, indices=(0,), eval_dir="a")
    with pytest.raises(ValueError, match="bounds made with seed 0, not 1.*--eval_dir"):
        bound_dataset(checkpoint, indices=(0,), eval_dir="a", seed=1)


@pytest.mark.parametrize(
    "values", [np.zeros(3, np.float32), np.zeros((2, 2)), np.array([1.0, np.nan])]
)
def test_a_file_of_anything_else_is_no_bound(tmp_path, values):
    path = tmp_path / "elbo_0000.npy"
    np.save(path, values)
    with pytest.raises(ValueError, match=r"elbo_0000\.npy does not hold"):
        load_elbo(path)


def test_the_script_prints_bits_per_dim(checkpoint, tmp_path):
    args = (
        "--inference_mode",
        "autoreg",
        "--step_size",
        "2",
        "--obs_length",
        "4",
        "--indices",
        "0",
    )
    done = run_script("video_nll.py", checkpoint, *args, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    bits = load_elbo(next(tmp_path.glob("results/**/elbo_0000.npy"))).sum() / (4 * 3 * 32 * 32)
    assert (
        done.stdout.strip()
        == f"{bits:.4f} bits/dim over 1 videos: the bound of the chain of all 3 timesteps"
    )
