"""Prediction types and loss weightings: one denoiser in three disguises, and formulas from the papers."""

import argparse

import numpy as np
import pytest
import torch

from improved_diffusion import script_util
from improved_diffusion.config import DiffusionConfig
from improved_diffusion.data.frame_batch import FrameBatch
from improved_diffusion.data.rng_util import make_generator, randn
from improved_diffusion.registry import LOSS_WEIGHTINGS, PREDICTIONS, SAMPLERS
from improved_diffusion.respace import SpacedDiffusion
from improved_diffusion.sampling.denoiser import Denoiser

B, K, H = 2, 4, 4
STEPS = 50


class SameDenoiser:
    """A network that says what clean frames it guesses as eps, clean frames or v.

    The guess is a smooth function of its input, the timestep and the observed frames.
    """

    def __init__(self, prediction: str, learn_sigma: bool):
        self.prediction, self.learn_sigma = prediction, learn_sigma
        process = DiffusionConfig(diffusion_steps=STEPS, rescale_timesteps=False)
        self.bars = torch.from_numpy(SpacedDiffusion(process).alphas_cumprod)

    def __call__(self, x, timesteps, *, x0, obs_mask, latent_mask, frame_indices):
        bar = self.bars[timesteps.long()].reshape(-1, 1, 1, 1, 1)
        x_t = x.double()
        clean = (0.8 * x_t * bar.sqrt() + 0.1 * x0.double().mean(dim=1, keepdim=True)).tanh()
        eps = (x_t - bar.sqrt() * clean) / (1 - bar).sqrt()
        says = {"eps": eps, "xstart": clean, "v": bar.sqrt() * eps - (1 - bar).sqrt() * clean}
        output = says[self.prediction].float()
        return torch.cat([output, 0.3 * clean.float()], dim=2) if self.learn_sigma else output


def denoiser(prediction: str, **options) -> Denoiser:
    values = {"diffusion_steps": STEPS, "rescale_timesteps": False, **options}
    config = DiffusionConfig(prediction=prediction, **values)
    return Denoiser(SameDenoiser(prediction, config.learn_sigma), SpacedDiffusion(config))


def frames() -> FrameBatch:
    clean = (0.4 * randn((B, K, 3, H, H), make_generator(2))).clamp(-1, 1)
    observed = (torch.arange(K) < 2).float().expand(B, K).reshape(B, K, 1, 1, 1)
    return FrameBatch(clean, observed, 1 - observed, torch.arange(K).expand(B, K))


# ---------------------------------------------------------------- one denoiser, three outputs


@pytest.mark.parametrize("learn_sigma", [False, True])
def test_equal_denoisers_have_equal_losses_up_to_their_weights(learn_sigma):
    batch, noise = frames(), randn((B, K, 3, H, H), make_generator(5))
    # At the last timesteps float32 holds too little of the frames that eps stands for.
    for t in torch.arange(STEPS - 10).split(B):
        terms, scales = {}, {}
        for name in ("eps", "xstart", "v"):
            loss = denoiser(name, learn_sigma=learn_sigma)
            bar = torch.from_numpy(loss.diffusion.alphas_cumprod)[t]
            snr = bar / (1 - bar)
            scales[name] = {"eps": snr, "xstart": torch.ones_like(snr), "v": snr + 1}[name]
            terms[name] = loss.losses(batch, t, noise, mask=batch.latent_mask)
        for name in ("eps", "v"):
            mse = terms[name]["mse"].double() / scales[name]
            torch.testing.assert_close(mse, terms["xstart"]["mse"].double(), rtol=1e-5, atol=1e-9)
            if learn_sigma:
                vb = terms[name]["vb"], terms["xstart"]["vb"]
                torch.testing.assert_close(*vb, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("sampler", list(SAMPLERS))
@pytest.mark.parametrize("options", [{}, {"learn_sigma": True}, {"timestep_respacing": "20"}])
def test_equal_denoisers_give_equal_samples(sampler, options):
    eta = 0.5 if sampler == "ddim" else 0.0
    samples = [
        SAMPLERS[sampler](denoiser(name, **options), frames(), generator=make_generator(1), eta=eta)
        for name in ("eps", "xstart", "v")
    ]
    assert samples[0].std() > 0.05
    for other in samples[1:]:
        torch.testing.assert_close(other, samples[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("options", [{}, {"learn_sigma": True}, {"timestep_respacing": "20"}])
def test_equal_denoisers_have_equal_bounds_in_both_implementations(options):
    batch = frames()
    one = FrameBatch(*(getattr(batch, name)[:1] for name in vars(batch)))
    bits, published = [], []
    for name in ("eps", "xstart", "v"):
        bound = denoiser(name, **options)
        steps = torch.arange(bound.diffusion.num_timesteps)
        generator = make_generator(4)
        noise = {int(t): randn(one.frames.shape, generator) for t in steps}
        total = bound.bound(one, steps, lambda t, noise=noise: noise[int(t)])
        bits.append(total / one.frames.numel())
        out = bound.diffusion.calc_bpd_loop(
            bound.network, one.frames, model_kwargs=one.conditioning, generator=make_generator(4)
        )
        published.append(float(out["total_bpd"]))
    assert bits == pytest.approx([bits[0]] * 3, rel=1e-5) and bits[0] > 1
    assert published == pytest.approx([published[0]] * 3, rel=1e-5)


def test_v_is_what_the_paper_says_and_gives_the_frames_back():
    diffusion = SpacedDiffusion(DiffusionConfig(prediction="v"))
    x0, noise = (randn((3, K, 3, H, H), make_generator(seed)) for seed in (1, 2))
    t = torch.tensor([0, 400, 999])
    bar = torch.from_numpy(diffusion.alphas_cumprod)[t].reshape(-1, 1, 1, 1, 1)
    noised = diffusion.noised(x0, t, noise)
    v = diffusion.prediction.target(diffusion, noised)
    expected = bar.sqrt() * noise.double() - (1 - bar).sqrt() * x0.double()
    torch.testing.assert_close(v.double(), expected, rtol=0, atol=1e-6)
    again = diffusion.prediction.xstart(diffusion, v, noised.x_t, t)
    torch.testing.assert_close(again, x0, rtol=0, atol=2e-6)


# ---------------------------------------------------------------- weightings


def published_weight(weighting: str, prediction: str, snr: float) -> float:
    """The factor on the error of the output, as the papers write it for each prediction type."""
    if weighting == "min-snr":
        least = min(snr, 5.0)
        return {"eps": least / snr, "xstart": least, "v": least / (snr + 1)}[prediction]
    s = 1 / (1 + np.exp(-(-1.0 - np.log(snr))))
    return {"eps": s, "xstart": s * snr, "v": s * snr / (snr + 1)}[prediction]


@pytest.mark.parametrize("weighting", ["min-snr", "sigmoid"])
@pytest.mark.parametrize("prediction", ["eps", "xstart", "v"])
@pytest.mark.parametrize("learn_sigma", [False, True])
def test_the_mse_alone_is_weighted_as_published(weighting, prediction, learn_sigma):
    batch, noise = frames(), randn((B, K, 3, H, H), make_generator(5))
    loss = denoiser(prediction, loss_weighting=weighting, learn_sigma=learn_sigma)
    plain = denoiser(prediction, learn_sigma=learn_sigma)
    for t in torch.arange(STEPS).split(B):
        terms, unweighted = (
            d.losses(batch, t, noise, mask=batch.latent_mask) for d in (loss, plain)
        )
        bars = loss.diffusion.alphas_cumprod[t.numpy()]
        weights = [published_weight(weighting, prediction, s) for s in bars / (1 - bars)]
        expected = torch.tensor(weights).float() * terms["mse"] + terms.get("vb", 0.0)
        torch.testing.assert_close(terms["loss"], expected, rtol=2e-5, atol=1e-7)
        assert all(torch.equal(terms[k], unweighted[k]) for k in unweighted if k != "loss")


def test_the_options_of_a_weighting_change_it():
    snr = torch.tensor([0.01, 1.0, 100.0])
    ones = torch.ones(3)

    def weights(name, **options):
        config = DiffusionConfig(loss_weighting=name, loss_weighting_options=options)
        return LOSS_WEIGHTINGS.made(name, config.loss_weighting_options)(snr, ones).tolist()

    assert weights("min-snr", min_snr_gamma=2.0) == pytest.approx([0.01, 1.0, 2.0])
    assert weights("sigmoid", sigmoid_bias=0.0) == pytest.approx([0.01 / 1.01, 0.5, 100 / 101])
    assert weights("none") == [1, 1, 1]


@pytest.mark.parametrize("options, words", [
    ({"loss_weighting": "max-snr"}, "--loss_weighting 'max-snr' is unknown: choose from none, min"),
    ({"prediction": "u"}, "--prediction 'u' is unknown: choose from eps, xstart, v"),
    ({"prediction": "v", "predict_xstart": True}, "contradict each other"),
    ({"use_kl": True, "loss_weighting": "sigmoid"}, "--use_kl True and --loss_weighting sigmoid"),
    ({"loss_weighting": "min-snr", "min_snr_gamma": 0.0}, "--min_snr_gamma 0.0: must be above 0"),
    ({"loss_weighting": "sigmoid", "sigmoid_bias": float("nan")}, "--sigmoid_bias nan"),
])  # fmt: skip
def test_wrong_objectives_are_refused_in_one_line(options, words):
    with pytest.raises(ValueError, match=words) as caught:
        script_util.config_from_args(DiffusionConfig, options)
    assert "\n" not in str(caught.value)


def test_own_options_are_flags_and_travel_flat():
    parser = argparse.ArgumentParser()
    script_util.add_arguments(parser, DiffusionConfig)
    words = "--prediction v --loss_weighting min-snr --min_snr_gamma 3".split()
    config = script_util.config_from_args(DiffusionConfig, parser.parse_args(words))
    _, diffusion = script_util.create_model_and_diffusion(
        image_size=32, num_channels=32, prediction="v", loss_weighting="min-snr", min_snr_gamma=3.0
    )
    assert diffusion.config == config
    assert isinstance(diffusion.prediction, PREDICTIONS["v"])
