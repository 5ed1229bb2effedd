"""Layers shared by the network's parts, and moving averages of weights.

Images are [N, C, H, W] in channels-last memory.
"""

from __future__ import annotations

import logging
import math
import os
import shlex
import shutil
import sys
from collections.abc import Iterable, Mapping
from typing import TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from improved_diffusion.nn.group_norm import GroupNorm32 as GroupNorm32
from improved_diffusion.nn.group_norm import at_least_float32 as at_least_float32

logger = logging.getLogger(__name__)

MOST_KINDS_OF_BLOCKS = 128  # that are compiled, by shapes and arithmetic

Module = TypeVar("Module", bound=nn.Module)


def conv3x3(in_channels: int, out_channels: int, stride: int = 1) -> nn.Conv2d:
    """A 3x3 convolution that keeps the image's size (or divides it by `stride`)."""
    return nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1)


def doubled_conv3x3(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A 3x3 convolution of images whose height and width are doubled by repeating pixels.

    As one transposed convolution, 4x4 with stride 2: each pixel of the result meets four pixels of `x`,
    so taps that meet the same one are summed first. It is 4/9 of the products, and the doubled images are
    never made. x: [N, C, H, W]; weight: [D, C, 3, 3]; returns [N, D, 2 H, 2 W].
    """
    summed = F.avg_pool2d(weight.flip(2, 3), 2, stride=1, padding=1, divisor_override=1)
    return F.conv_transpose2d(x, summed.transpose(0, 1), bias, stride=2, padding=1)


def compile_network(network: nn.Module) -> nn.Module:
    """`network` through torch.compile: elementwise work between the larger operations is fused.

    Where the network says what its `blocks` are, each is compiled by itself and in place, equal ones
    once: seconds for each kind of block, where the whole would take minutes. Beside the convolutions
    stand the operators of the norms, so a compiled block keeps the inputs of both for the backward pass.

    Raises ValueError where the C++ compiler that this needs is missing.
    """
    compiler = os.environ.get("CXX") or ("clang++" if sys.platform == "darwin" else "g++")
    if shutil.which(shlex.split(compiler)[0]) is None:
        raise ValueError(
            f"--compile True: there is no C++ compiler {compiler}: install it, name another in the "
            "environment variable CXX, or leave --compile out"
        )
    if next(network.parameters()).device.type == "cpu":
        logger.warning(
            "--compile True on a CPU: there it was measured useless (1.05 s for 1.02 s an update, after "
            "174 s of compiling; with bf16 seven times slower)"
        )
    blocks = getattr(getattr(network, "module", network), "blocks", None)
    if blocks is None:
        return cast(nn.Module, torch.compile(network))
    import torch._dynamo.config as dynamo_config  # costs a second, and only compiling needs it

    # Shapes of blocks differ, and each is a version of the same code: 8 would be too few.
    limit = "recompile_limit" if hasattr(dynamo_config, "recompile_limit") else "cache_size_limit"
    setattr(dynamo_config, limit, max(getattr(dynamo_config, limit), MOST_KINDS_OF_BLOCKS))
    for block in blocks:
        block.compile()
    return network


def zero_module(module: Module) -> Module:
    """Set all parameters of `module` to zero and return it."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


def timestep_embedding(timesteps: Tensor, channels: int, max_period: float = 10000) -> Tensor:
    """Sinusoidal embedding [B, channels] (cosines, then sines) of timesteps [B], float32.

    Source: Improved DDPM's code convention of "Attention is all you need" (arXiv 1706.03762), 3.5.
    """
    half = channels // 2
    exponents = torch.arange(half, dtype=torch.float32, device=timesteps.device) / half
    angles = timesteps.float()[:, None] * torch.exp(-math.log(max_period) * exponents)
    embedding = torch.cat([angles.cos(), angles.sin()], dim=-1)
    return F.pad(embedding, (0, channels % 2))


def in_autocast_dtype(x: Tensor) -> Tensor:
    """`x` as autocast gives it to layers: rounded once here, where many layers read it."""
    kind = x.device.type
    known = torch.amp.is_autocast_available(kind)
    return x.to(torch.get_autocast_dtype(kind)) if known and torch.is_autocast_enabled(kind) else x


def ema_decay(rate: float, step: int, *, warmup: bool) -> float:
    """The share of the old average after update number `step` (from 1); warmup starts it low."""
    return min(rate, (1 + step) / (10 + step)) if warmup else rate


@torch.no_grad()
def update_ema(average: Mapping[str, Tensor], weights: Iterable[Tensor], decay: float) -> None:
    """average = decay * average + (1 - decay) * weights, in place; equal orders of tensors."""
    torch._foreach_lerp_(list(average.values()), list(weights), 1.0 - decay)
