"""The fused normalisation against torch's own, forward and backward."""

import importlib.util
import logging

import pytest
import torch
import torch.nn.functional as F

from improved_diffusion.nn import GroupNorm32, norm_operators


def images(channels, size, dtype=torch.float64):
    generator = torch.Generator().manual_seed(channels + size)
    x = 3 + 2 * torch.randn(2, channels, size, size, generator=generator, dtype=dtype)
    return x.contiguous(memory_format=torch.channels_last).requires_grad_()


def layer(channels, silu, dtype=torch.float64):
    norm = GroupNorm32(channels, silu=silu).to(dtype)
    with torch.no_grad():
        norm.weight.uniform_(0.5, 1.5)
        norm.bias.uniform_(-1, 1)
    return norm


def gradients(out, inputs):
    weights = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).reshape(out.shape)
    return torch.autograd.grad((out * weights).sum(), inputs)


@pytest.mark.parametrize("channels, size", [(32, 4), (96, 5), (128, 1)])
@pytest.mark.parametrize("silu", [False, True])
def test_norm_equals_torchs_group_norm_and_its_gradients(channels, size, silu):
    x, norm = images(channels, size), layer(channels, silu)
    expected = F.group_norm(x, 32, norm.weight, norm.bias, norm.eps)
    expected = F.silu(expected) if silu else expected
    out = norm(x)
    torch.testing.assert_close(out, expected)
    inputs = (x, norm.weight, norm.bias)
    for mine, theirs in zip(gradients(out, inputs), gradients(expected, inputs), strict=True):
        torch.testing.assert_close(mine, theirs)


def test_scale_and_shift_per_image_and_their_gradients():
    x, norm = images(64, 4), layer(64, True)
    scale, shift = (torch.randn(2, 64, dtype=torch.float64, requires_grad=True) for _ in range(2))
    normed = F.group_norm(x, 32, norm.weight, norm.bias, norm.eps)
    expected = F.silu(normed * (1 + scale[..., None, None]) + shift[..., None, None])
    out = norm(x, scale, shift)
    torch.testing.assert_close(out, expected)
    inputs = (x, norm.weight, norm.bias, scale, shift)
    for mine, theirs in zip(gradients(out, inputs), gradients(expected, inputs), strict=True):
        torch.testing.assert_close(mine, theirs)


def test_norm_across_frames_takes_each_pixel_by_itself():
    norm = layer(64, False)
    x = torch.randn(2, 3, 5, 64, dtype=torch.float64, requires_grad=True)  # [B, T, D, C]
    pixels = x.permute(0, 2, 3, 1).flatten(0, 1)  # [B*D, C, T]
    expected = F.group_norm(pixels, 32, norm.weight, norm.bias, norm.eps)
    expected = expected.unflatten(0, (2, 5)).permute(0, 3, 1, 2)
    out = norm.across_frames(x)
    torch.testing.assert_close(out, expected)
    for mine, theirs in zip(
        gradients(out, (x, norm.weight)), gradients(expected, (x, norm.weight)), strict=True
    ):
        torch.testing.assert_close(mine, theirs)


def test_half_precision_is_normalised_in_float32():
    x = images(64, 8, torch.float32)
    norm = layer(64, True, torch.float32)
    half = x.detach().bfloat16()
    assert norm(half).dtype == torch.bfloat16
    assert torch.equal(norm(half), norm(half.float()).bfloat16())


@pytest.mark.parametrize("lack, words", [
    ("triton", "pip install triton"),
    ("gpu", "compute capability 7.0"),
    ("compiler", "install gcc"),
])  # fmt: skip
def test_a_gpu_without_what_triton_needs_runs_the_plain_norm_and_says_so_once(
    lack, words, monkeypatch, caplog
):
    class OnGpu:
        is_cuda, dtype, device = True, torch.float32, torch.device("cuda", 7)

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if lack == "triton" else 1)
    capability = (6, 1) if lack == "gpu" else (8, 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    if lack == "compiler":
        monkeypatch.setenv("PATH", "")
        monkeypatch.delenv("CC", raising=False)
    norm_operators._can_run.cache_clear()
    with caplog.at_level(logging.WARNING):
        assert not norm_operators.run_on(OnGpu()) and not norm_operators.run_on(OnGpu())
    norm_operators._can_run.cache_clear()
    assert len(caplog.records) == 1 and words in caplog.text
