"""Layers shared by the network's parts. Images are [N, C, H, W] in channels-last memory."""

from __future__ import annotations

import math
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Module = TypeVar("Module", bound=nn.Module)


class GroupNorm32(nn.GroupNorm):
    """GroupNorm of 32 groups that computes in float32 whatever the input's type."""

    def __init__(self, channels: int):
        super().__init__(32, channels)

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype == torch.float32:
            return super().forward(x)
        return F.group_norm(x.float(), self.num_groups, self.weight, self.bias, self.eps).to(
            x.dtype
        )

    def tokens(self, x: Tensor) -> Tensor:
        """Normalise tokens [N, L, C]; statistics over L and the channels of a group."""
        # Seen as a channels-last image [N, C, L, 1], contiguous tokens need no copy.
        return self(x.unsqueeze(2).permute(0, 3, 1, 2)).permute(0, 2, 3, 1).squeeze(2)


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
