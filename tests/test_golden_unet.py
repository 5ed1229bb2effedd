"""The network and the diffusion process compute what the published ones do for the same weights."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from golden_fill import array, weights
from improved_diffusion.script_util import create_model_and_diffusion, model_and_diffusion_defaults
from improved_diffusion.unet import FactorizedAttentionBlock

GOLDEN = Path(__file__).parent / "golden"
CASES = {case["name"]: case for case in json.loads((GOLDEN / "unet.json").read_text())}
VALUES = np.load(GOLDEN / "unet.npz")


class Setup:
    """One golden case: network with its weights, inputs and masks."""

    def __init__(self, name: str, **overrides):
        self.case = case = CASES[name]
        options = {
            k: v for k, v in case["args"].items() if k in model_and_diffusion_defaults()
        } | overrides
        self.model, self.diffusion = create_model_and_diffusion(**options)
        loaded = {k: torch.from_numpy(v) for k, v in weights(case["state_dict_shapes"]).items()}
        self.model.load_state_dict(loaded, strict=True)
        B, T, size, tag = case["B"], case["T"], case["image_size"], case["seed_tag"]
        shape = (B, T, 3, size, size)
        self.x = torch.from_numpy(array(tag + "/x", shape))
        self.x0 = torch.from_numpy(np.clip(array(tag + "/x0", shape, 0.5), -1, 1))
        self.noise = torch.from_numpy(array(tag + "/noise", shape))
        self.t = torch.tensor(case["t"])
        self.obs, self.lat = torch.zeros(B, T, 1, 1, 1), torch.zeros(B, T, 1, 1, 1)
        for b in range(B):
            n_obs, n_lat = case["n_obs"][b], case["n_lat"][b]
            self.obs[b, :n_obs] = 1
            self.lat[b, n_obs : n_obs + n_lat] = 1
        self.kwargs = {
            "x0": self.x0,
            "obs_mask": self.obs,
            "latent_mask": self.lat,
            "frame_indices": torch.tensor(case["frame_indices"]),
        }

    def losses(self, **kwargs):
        options = {"latent_mask": 1 - self.obs, "eval_mask": self.lat} | kwargs
        return self.diffusion.training_losses(
            self.model, self.x0, self.t, model_kwargs=self.kwargs, noise=self.noise, **options
        )


@pytest.fixture(scope="module", params=list(CASES))
def setup(request):
    return Setup(request.param)


def assert_golden(got: torch.Tensor, setup: Setup, key: str, largest: float | None = None) -> None:
    expected = VALUES[f"{setup.case['name']}/{key}"]
    assert got.shape == expected.shape
    error = np.abs(got.detach().numpy() - expected).max() / (largest or np.abs(expected).max())
    assert error < 1e-4, f"{key}: {error:.2e}"


def test_forward_equals_the_published_network(setup):
    with torch.no_grad():
        out = setup.model(setup.x, setup.diffusion.scale_timesteps(setup.t), **setup.kwargs)
    assert_golden(out, setup, "forward")


def test_denoising_distribution_equals_the_published_one(setup):
    with torch.no_grad():
        out = setup.diffusion.p_mean_variance(
            setup.model, setup.x, setup.t, model_kwargs=setup.kwargs
        )
    if setup.case["name"] == "sigma32":  # the published code splits the wrong axis there
        assert out["mean"].shape == out["variance"].shape == setup.x.shape
        return
    for key in ("mean", "variance", "log_variance"):
        assert_golden(out[key], setup, "p_" + key)
    # At t = 999 the clean frames are 157 times the noise, then clipped: float32 can promise 1e-4 of
    # the largest value before clipping only.
    eps = torch.from_numpy(VALUES[f"{setup.case['name']}/forward"])
    largest = setup.diffusion.predict_xstart_from_eps(setup.x, setup.t, eps).abs().max().item()
    assert_golden(out["pred_xstart"], setup, "p_pred_xstart", largest)


def test_losses_bounds_and_noising_equal_the_published_ones():
    for name in ("small32", "deep32", "seed64"):
        setup = Setup(name)
        with torch.no_grad():
            losses = setup.losses()
            x_t = setup.diffusion.q_sample(setup.x0, setup.t, setup.noise)
            vb = setup.diffusion.vb_terms_bpd(
                setup.model,
                setup.x0,
                x_t,
                setup.t,
                model_kwargs=setup.kwargs,
                latent_mask=setup.lat,
            )
        assert_golden(x_t, setup, "q_sample")
        for key in ("mse", "eval-mse", "loss"):
            assert_golden(losses[key], setup, "loss_" + key)
        assert_golden(vb["output"], setup, "vb_bpd")
        assert_golden(setup.diffusion.prior_bpd(setup.x0, setup.lat), setup, "prior_bpd")


def test_gradients_equal_the_published_ones():
    for name in ("small32", "deep32", "seed64"):
        setup = Setup(name)
        setup.losses()["loss"].mean().backward()
        expected = setup.case["grad_norms"]
        largest = max(expected.values())
        for key, parameter in setup.model.named_parameters():
            assert abs(parameter.grad.norm().item() - expected[key]) < 1e-4 * largest, key


def test_gradient_checkpointing_changes_no_gradient():
    plain, saving = Setup("small32"), Setup("small32", use_checkpoint=True)
    for setup in (plain, saving):
        setup.losses()["loss"].mean().backward()
    for (name, p), q in zip(plain.model.named_parameters(), saving.model.parameters(), strict=True):
        torch.testing.assert_close(q.grad, p.grad, rtol=1e-5, atol=1e-7, msg=name)


def test_padding_reaches_real_frames_only_through_the_norm_of_temporal_attention():
    """Given a norm of each frame by itself there, what the padding shows changes no real frame."""
    setup = Setup("small32")
    real = setup.case["n_obs"][1] + setup.case["n_lat"][1]
    assert real < setup.case["T"]
    other = setup.x.clone()
    other[1, real:] = 3 * other[1, real:].flip(-1) + 1

    def change(**masks):
        with torch.no_grad():
            pair = [
                setup.model(x, setup.t.float(), **setup.kwargs | masks) for x in (setup.x, other)
            ]
        return (pair[0] - pair[1])[1, :real].abs().max()

    assert change() > 1e-4
    for module in setup.model.modules():
        if isinstance(module, FactorizedAttentionBlock):
            norm = module.temporal_attention.norm
            norm.across_frames = lambda tokens: torch.nn.functional.layer_norm(
                tokens, tokens.shape[-1:]
            )
    assert change() < 1e-5
    assert change(latent_mask=1 - setup.obs) > 1e-4  # padding that counts as latent is attended to
