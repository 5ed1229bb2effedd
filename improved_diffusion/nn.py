"""Layers shared by the network's parts. Images are [N, C, H, W] in channels-last memory."""

from __future__ import annotations

import math
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

Module = TypeVar("Module", bound=nn.Module)


class GroupNorm32(nn.GroupNorm):
    """GroupNorm of 32 groups, fused with what follows it; statistics are float32 (or float64)."""

    def __init__(self, channels: int, *, silu: bool = False):
        super().__init__(32, channels)
        self.silu = silu

    def forward(self, x: Tensor, scale: Tensor | None = None, shift: Tensor | None = None) -> Tensor:
        """Normalise images [N, C, H, W]; with `scale`, `shift` [N, C]: norm * (1 + scale) + shift.

        SiLU follows where the layer was made with it.
        """
        weight: Tensor = self.weight
        bias: Tensor = self.bias
        if scale is not None and shift is not None:
            weight, bias = weight * (1 + scale), torch.addcmul(shift, bias, 1 + scale)
        pixels = x.permute(0, 2, 3, 1).flatten(1, 2)
        out = normalise(pixels, weight, bias, self._channels_per_group, self.eps, self.silu)
        return out.unflatten(1, x.shape[2:]).permute(0, 3, 1, 2)

    def across_frames(self, x: Tensor) -> Tensor:
        """Normalise [B, T, D, C] with statistics over the T frames and the channels of a group."""
        num_pixels = x.shape[2]
        weight, bias = self.weight.repeat(num_pixels), self.bias.repeat(num_pixels)
        out = normalise(x.flatten(2), weight, bias, self._channels_per_group, self.eps, self.silu)
        return out.view(x.shape)

    @property
    def _channels_per_group(self) -> int:
        return self.num_channels // self.num_groups


def normalise(
    x: Tensor, weight: Tensor, bias: Tensor, group_size: int, eps: float, silu: bool
) -> Tensor:
    """Group normalisation (arXiv 1803.08494, Eq. 1) of [N, L, K], then SiLU if `silu`.

    Statistics are taken over L and each `group_size` consecutive ones of the K columns.
    weight, bias: [K] or [N, K].
    """
    result: Tensor = _Normalise.apply(
        x, weight.expand(len(x), -1), bias.expand(len(x), -1), group_size, eps, silu
    )
    return result


class _Normalise(torch.autograd.Function):
    """`normalise` by sums over L, which are fast in this memory layout, unlike torch's own kernels.

    Keeps the input alone for the backward pass; what lies between is computed again.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, group_size: int, eps: float, silu: bool
    ) -> Tensor:
        wide = _wide(x)
        count = x.shape[1] * group_size
        mean = _group_sums(wide.sum(1), group_size) / count
        variance = _group_sums((wide * wide).sum(1), group_size) / count - mean * mean
        rstd = torch.rsqrt(variance.clamp(min=0) + eps)
        slope = weight * _spread(rstd, group_size)
        offset = torch.addcmul(bias, slope, _spread(mean, group_size), value=-1)
        out = torch.addcmul(offset[:, None], wide, slope[:, None])
        ctx.save_for_backward(x, weight, mean, rstd, slope, offset)
        ctx.group_size, ctx.silu = group_size, silu
        return (F.silu(out, inplace=True) if silu else out).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, weight, mean, rstd, slope, offset = ctx.saved_tensors
        wide, grad, group_size = _wide(x), _wide(grad), ctx.group_size
        if ctx.silu:
            before = torch.addcmul(offset[:, None], wide, slope[:, None])
            grad = torch.ops.aten.silu_backward(grad, before)
        bias_grad = grad.sum(1)
        product = (grad * wide).sum(1)
        mean, rstd = _spread(mean, group_size), _spread(rstd, group_size)
        weight_grad = rstd * (product - mean * bias_grad)
        # dx = slope * grad - rstd * (a + b * normalised), a and b means over the group of
        # weight * grad and weight * grad * normalised.
        count = x.shape[1] * group_size
        a = _spread(_group_sums(weight * bias_grad, group_size) / count, group_size)
        b = _spread(_group_sums(weight * weight_grad, group_size) / count, group_size)
        by_x = -b * rstd * rstd
        constant = -rstd * a - by_x * mean
        x_grad = torch.addcmul(constant[:, None], wide, by_x[:, None])
        x_grad.addcmul_(grad, slope[:, None])
        return x_grad.to(x.dtype), weight_grad, bias_grad, None, None, None


def _wide(x: Tensor) -> Tensor:
    """Half precision as float32, which the sums need; other tensors as they are."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def _group_sums(columns: Tensor, group_size: int) -> Tensor:
    return columns.unflatten(1, (-1, group_size)).sum(2)


def _spread(groups: Tensor, group_size: int) -> Tensor:
    return groups.repeat_interleave(group_size, dim=1)


def conv3x3(in_channels: int, out_channels: int, stride: int = 1) -> nn.Conv2d:
    """A 3x3 convolution that keeps the image's size (or divides it by `stride`)."""
    return nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1)


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
