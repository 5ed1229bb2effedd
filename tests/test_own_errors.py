"""--resample_observed: observed frames with the network's own errors in them."""

from pathlib import Path

import pytest
import torch

from helpers import call_main, golden_case, make_checkpoint, make_folder_dataset
from improved_diffusion.data import checkpoints
from improved_diffusion.sampling.results import EvalDir
from improved_diffusion.training.options import TrainConfig
from train_runs import (
    assert_same_run,
    column,
    equal,
    flags,
    load_run,
    make_loop,
    train,
    wake_up,
)


def step_and_batch(videos, size=6, **options):
    """A TrainStep whose network predicts something, and a batch of which some items observe frames."""
    options = {"mask_distribution": "filled", "batch_size": size} | options
    loop = make_loop(videos, mask_options={"unconditional_share": 0.5}, **options)
    wake_up(loop.train_step.network)
    batch = loop.train_step.batch(next(loop._batches()))
    assert 0 < batch.obs_mask.flatten(1).any(1).sum() < size
    return loop.train_step, batch


def test_observed_frames_alone_become_the_networks_own(videos):
    step, batch = step_and_batch(videos, resample_observed=1.0)
    own = step.own_errors(batch, position=0)
    changed = (own.frames != batch.frames).flatten(2).any(2)
    assert torch.equal(changed, batch.obs_mask.flatten(1) > 0)
    assert own.frames.abs().max() <= 1 and not own.frames.requires_grad
    assert all(param.grad is None for param in step.network.parameters())
    assert step.network.training


def test_they_are_denoised_from_the_less_noisy_half_of_the_timesteps(videos, monkeypatch):
    step, batch = step_and_batch(videos, resample_observed=1.0)
    seen = []
    monkeypatch.setattr(
        step.own_errors.denoiser, "denoise", lambda x_t, t, alone: seen.append(t) or x_t
    )
    for position in range(100):
        step.own_errors(batch, position=position)
    steps, drawn = step.own_errors.denoiser.diffusion.num_timesteps, torch.cat(seen)
    assert drawn.min() < 0.05 * steps and 0.4 * steps < drawn.max() < 0.5 * steps


def test_in_that_call_they_alone_are_latent_and_the_latent_ones_absent(videos, monkeypatch):
    step, batch = step_and_batch(videos, resample_observed=1.0)
    seen = []
    real = step.own_errors.denoiser.denoise

    def noted(x_t, t, alone):
        seen.append((x_t, t, alone))
        return real(x_t, t, alone)

    monkeypatch.setattr(step.own_errors.denoiser, "denoise", noted)
    first = step.own_errors(batch, position=0)
    ((x_t, t, alone),) = seen
    observing = batch.obs_mask.flatten(1).any(1)
    assert not alone.obs_mask.any() and not alone.conditioning["x0"].any()
    assert torch.equal(alone.latent_mask, batch.obs_mask[observing])
    assert len(set(t.tolist())) > 1  # a level for each item
    # Whatever the latent frames are, nothing of them reaches the observed ones.
    other = torch.where(batch.latent_mask > 0, -batch.frames, batch.frames)
    again = step.own_errors(type(batch)(other, *vars_of(batch)), position=0)
    mask = batch.obs_mask > 0
    assert torch.equal(first.frames * mask, again.frames * mask)


def vars_of(batch):
    return batch.obs_mask, batch.latent_mask, batch.frame_indices


def test_the_share_of_items_is_the_stated_probability(videos, monkeypatch):
    step, batch = step_and_batch(videos, resample_observed=0.25)
    monkeypatch.setattr(
        step.own_errors.denoiser, "denoise", lambda x_t, t, alone: torch.full_like(x_t, 2.0)
    )
    observing = batch.obs_mask.flatten(1).any(1)
    number, replaced = 400, 0
    for position in range(number):
        own = step.own_errors(batch, position)
        replaced += int((own.frames == 2).flatten(1).any(1).sum())
    total = number * int(observing.sum())
    assert abs(replaced / total - 0.25) < 5 * (0.25 * 0.75 / total) ** 0.5


def test_microbatches_leave_the_frames_as_they_are(videos):
    step, batch = step_and_batch(videos, resample_observed=1.0)
    whole = step.own_errors(batch, position=3).frames
    step, _ = step_and_batch(videos, resample_observed=1.0, microbatch=2)
    frames = step.own_errors(batch, position=3).frames
    # Rounding grows where nearly pure noise is denoised; another item's noise would be off by 1.
    torch.testing.assert_close(frames, whole, rtol=0, atol=1e-3)


@pytest.mark.slow
def test_the_updates_own_random_numbers_stay_as_they_are(videos):
    """Where no item observes anything, a run with it is the run without it, bit for bit."""
    options = {"mask_distribution": "filled", "mask_options": {"unconditional_share": 1.0}}
    for run_id, share in (("with", 1.0), ("without", 0.0)):
        make_loop(
            videos, {"dropout": 0.1}, resume_id=run_id, resample_observed=share, **options
        ).run_loop()
    assert_same_run("checkpoints/with", "checkpoints/without")


@pytest.mark.parametrize(
    ("masks", "precision", "microbatch"),
    [("mixed", "fp32", 1), pytest.param("queries", "bf16", -1, marks=pytest.mark.slow)],
)
@pytest.mark.slow
def test_resume_equals_an_unbroken_run_bit_for_bit(videos, masks, precision, microbatch):
    options = {
        "mask_distribution": masks,
        "resample_observed": 0.7,
        "precision": precision,
        "microbatch": microbatch,
        "max_steps": 3,
    }
    dropout = {"dropout": 0.1}
    make_loop(videos, dropout, resume_id="whole", **options).run_loop()
    make_loop(videos, dropout, resume_id="parts", **options | {"max_steps": 1}).run_loop()
    make_loop(videos, dropout, resume_id="parts", num_workers=1, **options).run_loop()
    assert_same_run("checkpoints/whole", "checkpoints/parts")
    assert column("checkpoints/whole", "loss") == column("checkpoints/parts", "loss")


def test_resuming_with_another_mask_distribution_is_refused(videos):
    make_loop(videos, resume_id="run", max_steps=1).run_loop()
    with pytest.raises(ValueError, match="--mask_distribution mixed differs .* published"):
        make_loop(videos, resume_id="run", mask_distribution="mixed")


@pytest.mark.slow
def test_ranks_train_with_it(videos, tmp_path):
    done = train(
        tmp_path,
        *flags(videos, resample_observed=0.5, mask_distribution="filled", resume_id="run"),
        ranks=2,
    )
    assert done.returncode == 0, done.stderr
    assert load_run("checkpoints/run").step == 4


@pytest.mark.parametrize("share", [-0.1, 1.1, float("nan")])
def test_an_impossible_share_is_refused(share):
    with pytest.raises(ValueError, match="--resample_observed .*: must be from 0 to 1"):
        TrainConfig(dataset="x", resample_observed=share)


@pytest.mark.slow
def test_a_published_checkpoint_fine_tunes_and_samples_with_the_published_command(videos):
    data = make_folder_dataset(Path("data"))
    old = make_checkpoint(Path("published/ema_0.9999_latest.pt"), data, predict_xstart=False)
    case = golden_case("small32")["args"]
    network = [
        f"--{name}={case[name]}"
        for name in ("num_channels", "num_res_blocks", "attention_resolutions", "num_heads")
        if name in case
    ]
    words = "--max_frames 4 --batch_size 2 --num_workers 0 --max_steps 2 --diffusion_steps 3"
    words += " --noise_schedule cosine --mask_distribution queries --resample_observed 1"
    call_main(
        "video_train.py", "--dataset", str(data), *network, *words.split(),
        *("--resume_checkpoint", str(old), "--sample_interval", 0),
    )  # fmt: skip
    (folder,) = Path("checkpoints").iterdir()
    new = folder / "ema_0.9999_latest.pt"
    before, after = (checkpoints.load_weights(str(path)).state_dict for path in (old, new))
    assert before.keys() == after.keys() and not equal(before, after)
    words = "--inference_mode autoreg --step_size 2 --obs_length 4 --T 8 --indices 0 --device cpu"
    call_main("video_sample.py", str(new), *words.split(), "--eval_dir", "out")
    (evaluated,) = Path("out").iterdir()
    assert EvalDir(evaluated).has_sample(0, 0)
