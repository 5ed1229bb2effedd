"""The GPU's group norm against the plain one, value by value; without a GPU Triton interprets it.

`conftest.py` asks Triton for that.
"""

import os
import subprocess
import sys

import pytest
import torch

from helpers import ROOT
from improved_diffusion.config import ModelConfig
from improved_diffusion.nn import norm_operators
from improved_diffusion.nn.group_norm import GroupNorm32
from improved_diffusion.unet import FrameContext, ResBlock

pytest.importorskip("triton", reason="the kernels need Triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(params=["one tile", "several tiles"])
def tiles(request, monkeypatch):
    """So small tiles that both ways through the rows are met by small images."""
    monkeypatch.setattr(norm_operators, "TILE", 64)
    monkeypatch.setattr(norm_operators, "WHOLE_TILE", 4096 if request.param == "one tile" else 64)
    return request.param


def images(channels, height, width, dtype=torch.float32, number=4):
    generator = torch.Generator().manual_seed(channels + height)
    x = 30 + 2 * torch.randn(number, channels, height, width, generator=generator)
    return x.to(DEVICE, dtype).contiguous(memory_format=torch.channels_last).requires_grad_()


def layer(channels, silu):
    norm = GroupNorm32(channels, silu=silu).to(DEVICE)
    with torch.no_grad():
        norm.weight.copy_(torch.linspace(0.5, 1.5, channels))
        norm.bias.copy_(torch.linspace(-1, 1, channels).flip(0))
    return norm


def both(function, inputs):
    """[outputs, then gradients by `inputs`] of the operators, and of the plain norm in float64."""
    results = []
    with norm_operators.assumed():
        results.append(outputs_and_gradients(function, inputs))
    wide = [t.detach().double().requires_grad_() for t in inputs]
    results.append(outputs_and_gradients(function, wide))
    return zip(*results, strict=True)


def outputs_and_gradients(function, inputs):
    out = function(*inputs)
    weights = torch.arange(out.numel(), device=out.device).cos().reshape(out.shape)
    return [out, *torch.autograd.grad((out.float() * weights).sum(), inputs)]


def assert_near(pairs, error):
    for mine, exact in pairs:
        assert mine.shape == exact.shape
        assert (mine.double() - exact).abs().max() <= error * exact.abs().max()


def call(norm, *fixed):
    """The norm as a function of its input and parameters."""

    def function(x, weight, bias, *scale_and_shift):
        parameters = {"weight": weight, "bias": bias}
        return torch.func.functional_call(norm, parameters, (x, *scale_and_shift, *fixed))

    return function


@pytest.mark.parametrize(
    "silu, rows", [(True, 0), pytest.param(False, 1, marks=pytest.mark.slow), (True, 2)]
)
def test_values_and_gradients_with_rows_of_scale_and_shift(tiles, silu, rows):
    norm, x = layer(96, silu), images(96, 5, 3)
    inputs = [x, norm.weight, norm.bias]
    if rows:  # one for each video's frames
        both_terms = torch.linspace(-1, 1, rows * 192, device=DEVICE).view(rows, 192)
        inputs += [t.requires_grad_() for t in both_terms.chunk(2, dim=1)]
    assert_near(both(call(norm), inputs), 1e-5)


@pytest.mark.parametrize("dtype, error", [(torch.bfloat16, 8e-3), (torch.float16, 1e-3)])
def test_half_precision_is_rounded_once(tiles, dtype, error):
    norm, x = layer(64, True), images(64, 4, 4, dtype, number=1)
    with norm_operators.assumed():
        out = norm(x)
    assert out.dtype == dtype
    assert_near(both(call(norm), [x, norm.weight, norm.bias]), error)


def test_groups_wider_than_a_row_of_a_tile(tiles):
    norm, x = layer(640, True), images(640, 3, 1, number=1)
    assert_near(both(call(norm), [x, norm.weight, norm.bias]), 1e-5)


def test_norm_across_frames_repeats_weights_over_the_pixels(tiles):
    norm = layer(64, False)
    x = 5 + torch.randn(2, 3, 5, 64, generator=torch.Generator().manual_seed(0))  # [B, T, D, C]

    class Across(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = norm

        def forward(self, x):
            return self.norm.across_frames(x)

    def function(x, weight, bias):
        names = {"norm.weight": weight, "norm.bias": bias}
        return torch.func.functional_call(Across(), names, (x,))

    inputs = [x.to(DEVICE).requires_grad_(), norm.weight, norm.bias]
    assert_near(both(function, inputs), 1e-5)


def test_the_layers_input_is_computed_again_and_not_kept(tiles):
    norm, x = layer(64, True), images(64, 4, 4, number=2)
    conv = torch.nn.Conv2d(64, 8, 3, device=DEVICE)
    inputs = (x, norm.weight, norm.bias, conv.weight)
    kept = []

    def gradients(out):
        return torch.autograd.grad(out.square().sum(), inputs)

    def note(tensor):
        kept.append(tensor.shape)
        return tensor

    with norm_operators.assumed():
        expected = gradients(conv(norm(x)))
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            out = norm.before(conv, x)
        found = gradients(out)
    assert kept.count((2, 16, 64)) == 1  # the norm's input, as pixels
    assert x.shape not in kept  # the convolution's
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs)


def test_operators_are_registered_as_torch_demands():
    x = torch.randn(4, 6, 64, device=DEVICE, requires_grad=True)
    affine = [torch.randn(64, device=DEVICE, requires_grad=True) for _ in range(2)]
    affine += [torch.randn(2, 64, device=DEVICE, requires_grad=True) for _ in range(2)]
    torch.library.opcheck(
        norm_operators.normalise,
        (x, affine, 2, 1e-5, True),
        test_utils=("test_schema", "test_faketensor", "test_autograd_registration"),
    )


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="compiled and run above")
@pytest.mark.parametrize("architecture", [80, 90])
def test_kernels_compile_for_a100_and_h100_without_spilling(architecture, tmp_path):
    """In a process that does not interpret; spilled registers would lie in local memory."""
    pytest.importorskip("triton.backends.nvidia")
    code = COMPILE.format(architecture=architecture)
    environment = os.environ | {"TRITON_CACHE_DIR": str(tmp_path), "TRITON_INTERPRET": "0"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, cwd=ROOT, capture_output=True, text=True
    )
    assert done.stdout.split() == ["spilled", "False"] * 4, done.stderr


COMPILE = """
import torch, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from improved_diffusion.nn import norm_kernels, norm_operators

for kernel in (norm_kernels.normalise, norm_kernels.normalise_backward):
    for length in (1024, 4096):
        backward = kernel is norm_kernels.normalise_backward
        x = torch.empty(1, length, 256, dtype=torch.bfloat16, device="meta")
        constants = dict(norm_operators.tiles(x, 8, backward=backward), GROUP=8, SILU=True)
        warps = constants.pop("num_warps")
        if not backward:
            constants["KNOWN"] = False
        kinds = dict.fromkeys(("x", "out", "grad", "x_grad", "scale", "shift"), "*bf16")
        kinds |= dict.fromkeys(("stride", "frames", "length", "columns", "channels", "images"), "i32")
        kinds |= dict.fromkeys(constants, "constexpr") | {{"eps": "fp32"}}
        signature = {{name: kinds.get(name, "*fp32") for name in kernel.arg_names}}
        compiled = triton.compile(
            ASTSource(kernel, signature, constants),
            target=GPUTarget("cuda", {architecture}, 32),
            options={{"num_warps": warps}},
        )
        print("spilled", ".local" in compiled.asm["ptx"] or b".nv.local" in compiled.asm["cubin"])
"""


@pytest.mark.slow
@pytest.mark.parametrize("on_gpu", [True, False])
def test_a_block_is_traced_whole_with_the_operators_and_without(on_gpu, monkeypatch):
    """What --compile does up to its code, which needs minutes."""
    torch.manual_seed(0)
    config = ModelConfig(image_size=32, num_channels=32)
    block = ResBlock(32, 32, 16, config).to(DEVICE)
    with torch.no_grad():
        block.out_layers[3].weight.normal_()  # they begin as zeros
    x, terms = torch.randn(4, 32, 4, 4, device=DEVICE), torch.randn(2, 16, device=DEVICE)
    x = x.contiguous(memory_format=torch.channels_last).requires_grad_()
    context = FrameContext(2, terms, torch.empty(0), None)
    if on_gpu:
        monkeypatch.setattr(norm_operators, "_assumed", True)
    expected = block(x, context)
    out = torch.compile(block, backend="aot_eager", fullgraph=True)(x, context)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)
    mine, theirs = (torch.autograd.grad(y.square().sum(), x)[0] for y in (out, expected))
    assert (mine - theirs).abs().max() < 1e-4 * theirs.abs().max()
