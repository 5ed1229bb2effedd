"""Guidance: its formula, what the reference sees, its independence of batches, folders, refusals."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from helpers import call_main
from improved_diffusion.config import DiffusionConfig
from improved_diffusion.data.frame_batch import FrameBatch
from improved_diffusion.registry import GUIDANCE_REFERENCES
from improved_diffusion.respace import SpacedDiffusion
from improved_diffusion.sampling.denoiser import Denoiser
from improved_diffusion.sampling.guidance import GuidedDenoiser
from improved_diffusion.sampling.options import SampleConfig
from improved_diffusion.sampling.provenance import sample_command
from test_video_sampling import assert_same_video, checkpoint, load, sample  # noqa: F401

PROCESS = SpacedDiffusion(
    DiffusionConfig(diffusion_steps=4, noise_schedule="cosine", predict_xstart=True)
)
T0 = torch.tensor([0])


class CountingNetwork:
    """Predicts the mean of what is observed, plus its `bias`; keeps the frames of each call."""

    def __init__(self, bias: float = 0.0):
        self.bias, self.calls = bias, []

    def __call__(self, x, timesteps, *, x0, obs_mask, latent_mask, frame_indices):
        self.calls.append(frame_indices.expand(len(x), -1).tolist())
        observed = (x0 * obs_mask).sum(1, keepdim=True) / obs_mask.sum(1, keepdim=True).clamp(min=1)
        return observed.expand_as(x) + self.bias


def batch_of(values, num_latent: int = 1, indices=None) -> FrameBatch:
    """Videos that observe frames of these grey values [B, n], then have latent ones."""
    values = torch.as_tensor(values, dtype=torch.float32)
    frames = torch.cat([values, torch.zeros(len(values), num_latent)], dim=1)
    frames = frames[:, :, None, None, None].expand(-1, -1, 3, 2, 2)
    obs_mask = torch.ones(*frames.shape[:2], 1, 1, 1)
    obs_mask[:, values.shape[1] :] = 0
    if indices is None:
        indices = torch.arange(frames.shape[1])[None]
    return FrameBatch(frames, obs_mask, 1 - obs_mask, torch.as_tensor(indices))


def guided(network, weight, *, clip=False, against="nothing", interval=None) -> GuidedDenoiser:
    denoiser = Denoiser(network, PROCESS, clip_denoised=clip)
    if isinstance(against, str):
        against = GUIDANCE_REFERENCES[against]
    return GuidedDenoiser(denoiser, weight, against=against, interval=interval)


def names_of(batch, seed: int = 0) -> list[tuple[int, ...]]:
    return [(seed, video, 0, 0) for video in range(len(batch))]


def predicted(denoiser, batch, t=T0) -> torch.Tensor:
    """Of the first latent frame, [B]."""
    x = torch.zeros(batch.frames.shape)
    bound = denoiser.for_trajectories(batch, names_of(batch))
    out = bound.denoise(x, t, batch)
    assert torch.equal(out, bound.predict(x, t, batch).xstart)
    return out[batch.latent_mask.expand_as(out) > 0].view(len(batch), -1)[:, 0]


def test_predictions_are_led_away_from_those_of_the_reference():
    batch = batch_of([[0.2, 0.4]])
    for weight in (0.0, 1.0, 1.5, 3.0):  # 0.3 with its two frames, 0 without them
        assert predicted(guided(CountingNetwork(), weight), batch).item() == pytest.approx(
            0.3 * weight
        )


def test_clean_frames_are_clipped_after_guidance_not_before():
    batch = batch_of([[0.5]])
    away = guided(CountingNetwork(), 2, clip=True, against=Denoiser(CountingNetwork(1.0), PROCESS))
    # 1.5 + 2 (0.5 - 1.5) = -0.5; of a clipped reference it would be 0.
    assert predicted(away, batch).item() == pytest.approx(-0.5)
    assert predicted(guided(CountingNetwork(), 3, clip=True), batch).item() == 1


def test_outside_of_the_interval_nothing_changes_and_nothing_more_is_called():
    batch, network = batch_of([[0.2, 0.4]]), CountingNetwork()
    sigma = np.exp(-PROCESS.log_snr / 2)
    denoiser = guided(network, 2, interval=(sigma[1] * 0.9, sigma[2] * 1.1))
    assert predicted(denoiser, batch, torch.tensor([1])).item() == pytest.approx(0.6)
    calls = denoiser.calls
    assert predicted(denoiser, batch, torch.tensor([3])).item() == pytest.approx(0.3)
    assert denoiser.calls == calls + 2 == len(network.calls)  # denoise and predict
    several = batch_of([[0.2, 0.4]] * 2)
    both = predicted(denoiser, several, torch.tensor([0, 2]))
    assert both.tolist() == pytest.approx([0.3, 0.6])
    with pytest.raises(ValueError, match="--guidance_interval 1e-09 1e-08.*levels"):
        guided(network, 2, interval=(1e-9, 1e-8))


def test_an_interval_without_sampled_noise_levels_is_refused():
    with pytest.raises(ValueError, match="^--guidance_interval 1e-06 2e-06: none of the sampled"):
        guided(CountingNetwork(), 2, interval=(1e-6, 2e-6))


@pytest.mark.parametrize("against, frames", [
    ("nothing", [[7, 8], [30, 31]]),
    ("recent", [[5, 9, 7, 8], [32, 29, 30, 31]]),
])  # fmt: skip
def test_the_reference_is_given_fewer_frames_and_no_padding(against, frames):
    indices = [[1, 5, 9, 20, 7, 8], [20, 32, 10, 29, 30, 31]]
    batch, network = batch_of([[0.1, 0.2, 0.3, 0.4]] * 2, 2, indices), CountingNetwork()
    predicted(guided(network, 2, against=against), batch)
    assert network.calls[:2] == [indices, frames]


def test_half_of_an_odd_number_is_rounded_down_and_the_later_frame_of_a_tie_is_kept():
    network = CountingNetwork()
    for indices in ([[3, 7, 1, 5]], [[7, 3, 1, 5]]):
        predicted(guided(network, 2, against="recent"), batch_of([[0.1, 0.2, 0.3]], 1, indices))
    assert network.calls[1] == network.calls[5] == [[7, 5]]


def test_a_random_half_depends_on_the_names_alone():
    batch, network = batch_of(torch.rand(6, 8)), CountingNetwork()
    denoiser = guided(network, 2, against="subset")
    together = predicted(denoiser, batch)
    assert len({tuple(row) for row in network.calls[1]}) > 1, "each video has its own"
    assert {len(row) for row in network.calls[1]} == {5}
    for row in range(6):
        alone = batch.rows(slice(row, row + 1))
        bound = denoiser.for_trajectories(alone, [names_of(batch)[row]])
        out = bound.denoise(torch.zeros(alone.frames.shape), T0, alone)
        assert out[0, -1, 0, 0, 0].item() == pytest.approx(together[row].item())


def test_it_predicts_for_a_batch_of_no_known_trajectory_too():
    batch = batch_of([[0.2, 0.4, 0.9]] * 2)
    for against in ("recent", "subset"):
        denoiser = guided(CountingNetwork(), 2, against=against)
        alone = denoiser.denoise(torch.zeros(batch.frames.shape), T0, batch)[:, -1, 0, 0, 0]
        assert len(alone) == 2 and (alone != 0.5).all()
        if against == "recent":
            assert torch.equal(alone, predicted(denoiser, batch))


def test_where_nothing_is_observed_there_is_nothing_to_guide():
    batch, network = batch_of(torch.zeros(1, 0), 3), CountingNetwork(0.25)
    denoiser = guided(network, 2, against="recent")
    assert predicted(denoiser, batch).item() == 0.25
    assert len(network.calls) == denoiser.calls == 2


# ---------------------------------------------------------------- sampled


@pytest.mark.slow
@pytest.mark.parametrize("options, suffix", [
    ({"guidance": 2.0, "sampler": "unipc", "timestep_respacing": "3"}, "_unipc_respace3_g2-nothing"),
    ({"guidance": 1.5, "guidance_against": "subset", "guidance_interval": (0.1, 5)},
     "_g1.5-subset-0.1-5"),
])  # fmt: skip
def test_guidance_names_the_folder_is_stored_and_does_not_depend_on_batches(
    checkpoint,  # noqa: F811
    options,
    suffix,
):
    together = sample(checkpoint, indices=(0, 1, 2), batch_size=3, **options)
    assert together.path.parent.name == f"ema_0.9999_latest_1234{suffix}"
    stored = json.loads((together.path / "sample_config.json").read_text())
    assert stored["guidance"] == options["guidance"]
    assert stored["guidance_interval"] == list(options.get("guidance_interval", ()))
    alone = sample(checkpoint, indices=(2,), batch_size=1, eval_dir="b", **options)
    assert_same_video(load(together, 2), load(alone, 2))
    options = {name: value for name, value in options.items() if "guidance" not in name}
    plain = sample(checkpoint, indices=(2,), **options)
    assert (load(plain, 2)[4:] != load(together, 2)[4:]).mean() > 0.1


def test_a_folder_keeps_to_one_guidance_and_spacing(checkpoint):  # noqa: F811
    sample(checkpoint, eval_dir="a")
    stored = Path("a/autoreg_4_2_8_4/sample_config.json")
    before = json.loads(stored.read_text())
    earlier = {k: v for k, v in before.items() if "guidance" not in k and k != "spacing"}
    for content in (before, earlier):  # as this version keeps them, and one without guidance
        stored.write_text(json.dumps(content))
        with pytest.raises(ValueError, match="guidance 1.0, not 2.0.*--eval_dir"):
            sample(checkpoint, eval_dir="a", guidance=2.0)
        with pytest.raises(ValueError, match="spacing time, not rho7"):
            sample(checkpoint, eval_dir="a", timestep_respacing="3", spacing="rho7")
        sample(checkpoint, eval_dir="a")


@pytest.mark.slow
def test_an_earlier_checkpoint_guides_and_is_known_by_its_weights(checkpoint, tmp_path):  # noqa: F811
    content = torch.load(checkpoint, weights_only=True)
    content["state_dict"]["out.2.bias"] += 0.3
    earlier, moved = tmp_path / "earlier.pt", tmp_path / "moved.pt"
    for path in (earlier, moved):
        torch.save(content, path)
    first = sample(checkpoint, guidance=2.0, guidance_against=str(earlier))
    suffix = first.path.parent.name.removeprefix("ema_0.9999_latest_1234_g2-")
    assert len(suffix) == 8 and set(suffix) <= set("0123456789abcdef")
    stored = json.loads((first.path / "sample_config.json").read_text())
    assert stored["guidance_against"].startswith(suffix)
    assert f"--guidance_against {earlier}" in sample_command(first)
    again = sample(checkpoint, indices=(1,), guidance=2.0, guidance_against=str(moved))
    assert again.path == first.path
    content["state_dict"]["out.2.bias"] += 0.3
    torch.save(content, moved)
    other = sample(checkpoint, guidance=2.0, guidance_against=str(moved))
    assert other.path != first.path and (load(other, 0) != load(first, 0)).any()


def test_references_that_cannot_guide_are_refused(checkpoint, tmp_path):  # noqa: F811
    content = torch.load(checkpoint, weights_only=True)
    content["state_dict"]["out.2.bias"] += 0.3
    own = content["config"]
    for name, changed in (
        ("dataset", {"dataset": "bouncy_balls"}),
        ("image_size", {"image_size": 64}),
        ("noise_schedule", {"noise_schedule": "linear", "diffusion_steps": 30}),
        ("diffusion_steps", {"diffusion_steps": 7}),
    ):
        torch.save(content | {"config": own | changed}, f"{name}.pt")
    for against, words in (
        (checkpoint, "has the weights of the checkpoint itself"),
        ("dataset.pt", "the data set bouncy_balls, the checkpoint with"),
        ("image_size.pt", "the image size 64, the checkpoint with 32"),
        ("noise_schedule.pt", "the noise schedule linear, the checkpoint with cosine"),
        ("diffusion_steps.pt", "the number of timesteps 7, the checkpoint with 3"),
        ("resent", "resent: is no file, and none of nothing, recent, subset"),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=words):
            sample(checkpoint, guidance=2.0, guidance_against=str(against))
    assert not Path("results").exists()


@pytest.mark.parametrize("options, words", [
    ({"guidance": -1.0}, "--guidance -1"),
    ({"guidance_against": "recent"}, "do nothing without --guidance W"),
    ({"guidance": 2.0, "guidance_interval": (3.0,)}, "--guidance_interval 3: give two"),
    ({"guidance": 2.0, "guidance_interval": (3.0, 1.0)}, "the lower first"),
    ({"spacing": "rho7"}, "--spacing rho7 chooses timesteps.*--timestep_respacing"),
    ({"spacing": "even"}, "--spacing 'even' is unknown: choose from time, logsnr, rho7"),
])  # fmt: skip
def test_options_that_do_nothing_or_cannot_be_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        SampleConfig("c.pt", "autoreg", **options)


@pytest.mark.parametrize("script, shown, hidden", [
    ("video_nll.py", "--distance --recall_gap", "--gibbs_sweeps --guidance --spacing --sampler"),
    ("video_optimal_schedule.py", "--guidance --spacing", "--gibbs_sweeps --distance --recall_gap"),
    ("video_sample.py", "--guidance_against --gibbs_sweeps --distance --spacing", "--spacings"),
])  # fmt: skip
def test_help_shows_no_option_that_the_command_refuses(script, shown, hidden, capsys):
    with pytest.raises(SystemExit):
        call_main(script, "--help")
    words = capsys.readouterr().out.split()
    assert set(shown.split()) <= set(words) and not set(hidden.split()) & set(words)
