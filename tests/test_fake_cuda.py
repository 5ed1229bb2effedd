"""What runs on GPUs runs through on fake ones: no device is mixed, no dtype, and nothing waits for a value.

It stands in for tests/test_cuda.py where there is no GPU.
"""

import functools

import pytest
import torch

from fake_cuda import backward, fake_cuda, make_network
from improved_diffusion import fp16_util
from improved_diffusion.config import DiffusionConfig, ModelConfig
from improved_diffusion.data.frame_batch import FrameBatch
from improved_diffusion.nn import norm_operators, update_ema
from improved_diffusion.registry import SAMPLERS
from improved_diffusion.sampling.denoiser import Denoiser
from improved_diffusion.sampling.trained_model import create_diffusion

B, K, SIZE = 2, 3, 32
CUDA = torch.device("cuda")


@pytest.fixture
def cuda(monkeypatch):
    with fake_cuda(monkeypatch) as mode:
        yield mode


def make_denoiser(mode, *, precision="fp32", use_fp16=False, **process):
    config = ModelConfig(
        image_size=SIZE, num_channels=32, num_res_blocks=1, attention_resolutions="8"
    )
    network = make_network(config, mode)
    autocast = functools.partial(fp16_util.autocast, CUDA, precision=precision, use_fp16=use_fp16)
    return Denoiser(network, create_diffusion(DiffusionConfig(**process)), autocast=autocast)


def make_batch():
    observed = (torch.arange(K) < 1).float().expand(B, K)[..., None, None, None]
    return FrameBatch.from_items(
        {
            "frames": torch.zeros(B, K, 3, SIZE, SIZE, dtype=torch.uint8),
            "obs_mask": observed,
            "latent_mask": 1 - observed,
            "frame_indices": torch.arange(K).expand(B, K),
        },
        CUDA,
    )


@pytest.mark.parametrize(
    "options",
    [
        {},
        pytest.param({"precision": "bf16"}, marks=pytest.mark.slow),
        pytest.param({"use_fp16": True}, marks=pytest.mark.slow),
    ],
    ids=["fp32", "bf16", "fp16"],
)
def test_a_training_step(cuda, options, monkeypatch):
    norms = []
    real = norm_operators.normalise

    def normalise(x, *args):
        norms.append((x.device.type, x.dtype))
        return real(x, *args)

    monkeypatch.setattr(norm_operators, "normalise", normalise)
    denoiser, batch = make_denoiser(cuda, **options), make_batch()
    params = list(denoiser.network.parameters())
    average = {str(i): param.detach().clone() for i, param in enumerate(params)}
    t, noise = torch.full((B,), 500, device=CUDA), torch.randn_like(batch.frames)
    losses = denoiser.losses(batch, t, noise, mask=batch.latent_mask)
    assert all(loss.device.type == "cuda" and loss.shape == (B,) for loss in losses.values())
    backward(losses["loss"].mean())
    assert all(param.grad is not None for param in params)
    torch.optim.AdamW(params, fused=True).step()
    update_ema(average, params, 0.99)
    half = {"bf16": torch.bfloat16}.get(options.get("precision"), torch.float32)
    half = torch.float16 if "use_fp16" in options else half
    assert set(norms) == {("cuda", half)}


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_sampling(cuda, sampler):
    denoiser, batch = make_denoiser(cuda, precision="bf16", timestep_respacing="2"), make_batch()
    denoiser.network.eval()
    generators = [torch.Generator().manual_seed(i) for i in range(B)]
    with torch.inference_mode(), denoiser.autocast():
        out = SAMPLERS[sampler](denoiser, batch, generator=generators, eta=0.0)
    assert out.device.type == "cuda" and out.dtype == torch.float32
    assert out.shape == batch.frames.shape


def test_bounds(cuda):
    denoiser, batch = make_denoiser(cuda, timestep_respacing="2"), make_batch()
    t = torch.tensor([0, 1], device=CUDA)
    with torch.no_grad():
        term = denoiser.bound_term(batch, t, torch.randn_like(batch.frames))
        prior = denoiser.diffusion.prior_bpd(batch.frames, batch.latent_mask)
    assert (term.device.type, term.dtype, term.shape) == ("cuda", torch.float64, (B,))
    assert prior.device.type == "cuda"


def test_mixed_devices_are_noticed(cuda):
    """The stand-in can fail."""
    denoiser, batch = make_denoiser(cuda), make_batch()
    with pytest.raises(RuntimeError, match="device"):
        denoiser.predict(batch.frames, torch.zeros(B, dtype=torch.int64), batch.to("cpu"))
