"""The group norm of the network: one operator on a GPU, sums that suit its cache on a CPU.

Images are [N, C, H, W] in channels-last memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from improved_diffusion.nn import norm_operators


class GroupNorm32(nn.GroupNorm):
    """GroupNorm of 32 groups, fused with what follows it; statistics are float32 (or float64)."""

    def __init__(self, channels: int, *, silu: bool = False):
        super().__init__(32, channels)
        self.silu = silu
        self.group_size = channels // 32

    def forward(
        self, x: Tensor, scale: Tensor | None = None, shift: Tensor | None = None
    ) -> Tensor:
        """Normalise images [N, C, H, W]; with `scale`, `shift` [R, C]: norm * (1 + scale) + shift.

        R divides N: a row stands for the N / R consecutive images of one video. SiLU follows where the
        layer was made with it.
        """
        return self._images(x, scale, shift)[0]

    def before(
        self,
        layer: Callable[[Tensor], Tensor],
        x: Tensor,
        scale: Tensor | None = None,
        shift: Tensor | None = None,
    ) -> Tensor:
        """`layer(self(x, scale, shift))`, whose backward pass computes the layer's input again.

        Halves what a block keeps, for an affine map and a SiLU more, cheap beside a convolution.
        """
        out, again = self._images(x, scale, shift)
        if not torch.is_grad_enabled() or torch.compiler.is_compiling():
            return layer(out)
        memory, shape = _memory(out), out.shape

        def pack(saved: Tensor) -> Tensor | Callable[[], Tensor]:
            return again if _memory(saved) == memory and saved.shape == shape else saved

        def unpack(kept: Tensor | Callable[[], Tensor]) -> Tensor:
            if isinstance(kept, Tensor):
                return kept
            with torch.no_grad():
                return kept()

        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            return layer(out)

    def _images(
        self, x: Tensor, scale: Tensor | None, shift: Tensor | None
    ) -> tuple[Tensor, Callable[[], Tensor]]:
        """The result, and a function that computes it again from what is kept for the backward pass."""
        if norm_operators.run_on(x):
            out, again = self._by_operators(_pixels(x), scale, shift)
        else:
            out, again = self._by_sums(_pixels(x), scale, shift)
        size = x.shape[2:]
        return _as_images(out, size), lambda: _as_images(again(), size)

    def _by_operators(
        self, x: Tensor, scale: Tensor | None = None, shift: Tensor | None = None
    ) -> tuple[Tensor, Callable[[], Tensor]]:
        """As `_images`, of [N, L, K]; weight and bias are repeated over the K columns."""
        affine = [t for t in (self.weight, self.bias, scale, shift) if t is not None]
        out, *statistics = norm_operators.normalise(x, affine, self.group_size, self.eps, self.silu)
        kept = x.detach()
        return out, lambda: norm_operators.normalise_again(
            kept, statistics, affine, self.group_size, self.silu
        )

    def _by_sums(
        self, x: Tensor, scale: Tensor | None, shift: Tensor | None
    ) -> tuple[Tensor, Callable[[], Tensor]]:
        weight: Tensor = self.weight
        bias: Tensor = self.bias
        if scale is not None and shift is not None:
            if len(scale) > 1:
                scale, shift = (
                    t.repeat_interleave(len(x) // len(t), dim=0) for t in (scale, shift)
                )
            weight, bias = weight * (1 + scale), torch.addcmul(shift, bias, 1 + scale)
        out, slope, offset = normalise(x, weight, bias, self.group_size, self.eps, self.silu)
        kept, dtype = x.detach(), out.dtype
        return out, lambda: _affine(at_least_float32(kept), slope, offset, self.silu).to(dtype)

    def across_frames(self, x: Tensor) -> Tensor:
        """Normalise [B, T, D, C] with statistics over the T frames and the channels of a group."""
        columns = x.flatten(2)
        if norm_operators.run_on(x):
            return self._by_operators(columns)[0].view(x.shape)
        weight, bias = self.weight.repeat(x.shape[2]), self.bias.repeat(x.shape[2])
        out, _, _ = normalise(columns, weight, bias, self.group_size, self.eps, self.silu)
        return out.view(x.shape)


def _memory(x: Tensor) -> int:
    """Equal for tensors that share their memory; unlike data_ptr(), fake tensors have it too."""
    return x.untyped_storage()._cdata


def normalise(
    x: Tensor, weight: Tensor, bias: Tensor, group_size: int, eps: float, silu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Group normalisation (arXiv 1803.08494, Eq. 1) of [N, L, K], then SiLU if `silu`.

    Statistics are taken over L and each `group_size` consecutive ones of the K columns.
    weight, bias: [K], [1, K] or [N, K]. Returns the result, and the slope and offset [N, K] of the
    affine map of `x` that it is (before the SiLU).
    """
    if torch.compiler.is_compiling():  # which fuses the plain formula itself
        groups = at_least_float32(x).unflatten(2, (-1, group_size))
        variance, mean = torch.var_mean(groups, dim=(1, 3), correction=0)
        slope = weight * _spread(torch.rsqrt(variance + eps), group_size)
        offset = bias - slope * _spread(mean, group_size)
        out = at_least_float32(x) * slope[:, None] + offset[:, None]
        return (F.silu(out) if silu else out).to(x.dtype), slope, offset
    result: tuple[Tensor, Tensor, Tensor] = _Normalise.apply(
        x, weight.expand(len(x), -1), bias.expand(len(x), -1), group_size, eps, silu
    )
    return result


class _Normalise(torch.autograd.Function):
    """`normalise` by sums over L, which are fast in this memory layout, unlike torch's own kernels.

    Keeps the input alone for the backward pass; what lies between is computed again. On a CPU a few
    images are done at a time, so that they stay in its cache and need little memory.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, group_size: int, eps: float, silu: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        count = x.shape[1] * group_size
        out = torch.empty_like(x)
        slope, offset = weight.new_empty(weight.shape), weight.new_empty(weight.shape)
        means, rstds = [], []
        for part in _parts(x):
            wide = at_least_float32(x[part])
            mean = _group_sums(wide.sum(1), group_size) / count
            variance = _group_sums((wide * wide).sum(1), group_size) / count - mean * mean
            rstd = torch.rsqrt(variance.clamp(min=0) + eps)
            slope[part] = weight[part] * _spread(rstd, group_size)
            offset[part] = bias[part] - slope[part] * _spread(mean, group_size)
            _affine(wide, slope[part], offset[part], silu, out=out[part])
            means.append(mean)
            rstds.append(rstd)
        ctx.save_for_backward(x, weight, torch.cat(means), torch.cat(rstds), slope, offset)
        ctx.group_size, ctx.silu = group_size, silu
        ctx.mark_non_differentiable(slope, offset)
        return out, slope, offset

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *unused: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, weight, mean, rstd, slope, offset = ctx.saved_tensors
        mean, rstd = _spread(mean, ctx.group_size), _spread(rstd, ctx.group_size)
        x_grad = torch.empty_like(x)
        weight_grad, bias_grad = torch.empty_like(slope), torch.empty_like(slope)
        for part in _parts(x):
            wide, by_out = at_least_float32(x[part]), at_least_float32(grad[part])
            if ctx.silu:
                by_out = torch.ops.aten.silu_backward(
                    by_out, _affine(wide, slope[part], offset[part], silu=False)
                )
            bias_grad[part] = by_out.sum(1)
            weight_grad[part] = rstd[part] * ((by_out * wide).sum(1) - mean[part] * bias_grad[part])
            # dx = slope * by_out - rstd * (a + b * normalised), a and b means over the group of
            # weight * by_out and weight * by_out * normalised.
            a, b = (
                _spread(_group_sums(weight[part] * sums[part], ctx.group_size), ctx.group_size)
                * rstd[part]
                / (x.shape[1] * ctx.group_size)
                for sums in (bias_grad, weight_grad)
            )
            b = b * rstd[part]
            by_x = _affine(wide, -b, b * mean[part] - a, silu=False)
            x_grad[part] = by_x.addcmul_(by_out, slope[part, None])
        return x_grad, weight_grad, bias_grad, None, None, None


CACHE_ELEMENTS = 2**20  # a few megabytes


def _parts(x: Tensor) -> Iterator[slice]:
    """Slices of the first axis: as many images at a time as fit a CPU's cache; all on a GPU."""
    images = len(x) if x.is_cuda else max(1, CACHE_ELEMENTS // max(1, x[0].numel()))
    return (slice(start, start + images) for start in range(0, len(x), images))


def at_least_float32(x: Tensor) -> Tensor:
    """Half precision as float32, which sums need; other tensors as they are."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def _affine(
    x: Tensor, slope: Tensor, offset: Tensor, silu: bool, out: Tensor | None = None
) -> Tensor:
    """slope * x + offset of [N, L, K] and [N, K], then SiLU if `silu`; rounded only into `out`."""
    same = out is not None and out.dtype == x.dtype
    result = torch.addcmul(offset[:, None], x, slope[:, None], out=out if same else None)
    if silu:
        F.silu(result, inplace=True)
    return result if out is None or same else out.copy_(result)


def _pixels(x: Tensor) -> Tensor:
    return x.permute(0, 2, 3, 1).flatten(1, 2)


def _as_images(pixels: Tensor, size: torch.Size) -> Tensor:
    return pixels.unflatten(1, size).permute(0, 3, 1, 2)


def _group_sums(columns: Tensor, group_size: int) -> Tensor:
    return columns.unflatten(1, (-1, group_size)).sum(2)


def _spread(groups: Tensor, group_size: int) -> Tensor:
    return groups.repeat_interleave(group_size, dim=1)
