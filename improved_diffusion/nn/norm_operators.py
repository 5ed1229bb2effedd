"""The group norm as operators of torch, each one Triton kernel: what GPUs run in place of many kernels.

They are registered on every machine, so that they can be traced, compiled and counted without a GPU; the
kernels (norm_kernels.py) and Triton are imported when one first runs.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import logging
import os
import shutil
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Elements of a tile, and bytes of a row of it: what the registers of a GPU hold, and what a fetch from its
# memory brings. A tile that holds whole groups may be larger, since no sums are kept beside it, and its
# rows from half to twice as long.
TILE, WHOLE_TILE, ROW_BYTES = 4096, 16384, 64


# ---------------------------------------------------------------- where they run

_assumed = False


def run_on(x: Tensor) -> bool:
    """Whether the operators are to work on `x`: on a GPU, with Triton, up to single precision."""
    if _assumed:
        return True
    if not x.is_cuda or x.dtype not in DTYPES:
        return False
    return torch.compiler.is_compiling() or _can_run(x.device)  # compiling needs the same things


@functools.cache
def _can_run(device: torch.device) -> bool:
    missing = _what_is_missing(device)
    if missing:
        logger.warning(
            "%s: every group norm runs as some twenty kernels in place of one, and an update takes up to "
            "twice as long",
            missing,
        )
    return not missing


def _what_is_missing(device: torch.device) -> str:
    """What Triton lacks on this machine, and how to mend it; empty where it can run."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is missing (pip install triton)"
    if torch.cuda.get_device_capability(device) < (7, 0):
        return "Triton needs a GPU of compute capability 7.0 or more"
    if not any(map(shutil.which, (os.environ.get("CC", "cc"), "gcc", "clang"))):
        return (
            "Triton finds no C compiler (install gcc, or name one in the environment variable CC)"
        )
    return ""


@contextlib.contextmanager
def assumed() -> Iterator[None]:
    """Inside, every tensor counts as lying on a GPU with Triton: for fake ones, which nothing computes."""
    global _assumed
    before, _assumed = _assumed, True
    try:
        yield
    finally:
        _assumed = before


# ---------------------------------------------------------------- the operators
#
# x is [N, L, K]. Statistics are taken over L and each `group_size` consecutive columns: [N, K / group_size].
# affine holds what follows: weight and bias [C], repeated over the columns where there are more; then, or
# not, scale and shift [R, C], each row for as many consecutive n as there are more of them:
# out = silu((normalised * weight + bias) * (1 + scale) + shift).


@torch.library.custom_op(
    "improved_diffusion::normalise",
    mutates_args=(),
    schema="(Tensor x, Tensor[] affine, int group_size, float eps, bool silu)"
    " -> (Tensor, Tensor, Tensor)",
)
def normalise(
    x: Tensor, affine: list[Tensor], group_size: int, eps: float, silu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Group norm: the result, the means, and one over the standard deviations."""
    from improved_diffusion.nn import norm_kernels

    x = x.contiguous()
    out, statistics = torch.empty_like(x), _statistics_of(x, group_size)
    run = _Launch.of(x, affine, group_size)
    with torch.cuda.device_of(x):
        norm_kernels.normalise[run.grid](
            x, out, *statistics, *run.affine, *run.sizes, eps, **run.tiles, SILU=silu, KNOWN=False
        )
    return out, statistics[0], statistics[1]


@torch.library.custom_op(
    "improved_diffusion::normalise_again",
    mutates_args=(),
    schema="(Tensor x, Tensor[] statistics, Tensor[] affine, int group_size, bool silu) -> Tensor",
)
def normalise_again(
    x: Tensor, statistics: list[Tensor], affine: list[Tensor], group_size: int, silu: bool
) -> Tensor:
    """The first result of `normalise` from its others: one read of `x`."""
    from improved_diffusion.nn import norm_kernels

    x = x.contiguous()
    out = torch.empty_like(x)
    run = _Launch.of(x, affine, group_size)
    with torch.cuda.device_of(x):
        norm_kernels.normalise[run.grid](
            x, out, *statistics, *run.affine, *run.sizes, 0.0, **run.tiles, SILU=silu, KNOWN=True
        )
    return out


@torch.library.custom_op(
    "improved_diffusion::normalise_backward",
    mutates_args=(),
    schema="(Tensor grad, Tensor x, Tensor[] statistics, Tensor[] affine, int group_size, bool silu)"
    " -> (Tensor, Tensor)",
)
def normalise_backward(
    grad: Tensor,
    x: Tensor,
    statistics: list[Tensor],
    affine: list[Tensor],
    group_size: int,
    silu: bool,
) -> tuple[Tensor, Tensor]:
    """The gradient by `x`, and [2, N, K] of sums over L that the others are made of.

    Those are of the gradient before the SiLU times the normalised `x`, and of that gradient alone.
    """
    from improved_diffusion.nn import norm_kernels

    x, grad = x.contiguous(), grad.contiguous()
    x_grad, sums = torch.empty_like(x), _sums_of(x)
    run = _Launch.of(x, affine, group_size, backward=True)
    with torch.cuda.device_of(x):
        norm_kernels.normalise_backward[run.grid](
            grad,
            x,
            *statistics,
            *run.affine,
            x_grad,
            sums,
            *run.sizes,
            len(x),
            **run.tiles,
            SILU=silu,
        )
    return x_grad, sums


def _statistics_of(x: Tensor, group_size: int) -> list[Tensor]:
    shape = len(x), x.shape[2] // group_size
    return [x.new_empty(shape, dtype=torch.float32) for _ in range(2)]


def _sums_of(x: Tensor) -> Tensor:
    return x.new_empty((2, len(x), x.shape[2]), dtype=torch.float32)


@normalise.register_fake
def _(
    x: Tensor, affine: list[Tensor], group_size: int, eps: float, silu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    mean, rstd = _statistics_of(x, group_size)
    return x.new_empty(x.shape), mean, rstd


@normalise_again.register_fake
def _(x: Tensor, *unused: Any) -> Tensor:
    return x.new_empty(x.shape)


@normalise_backward.register_fake
def _(grad: Tensor, x: Tensor, *unused: Any) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), _sums_of(x)


# ---------------------------------------------------------------- autograd


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, affine, ctx.group_size, _, ctx.silu = inputs
    ctx.save_for_backward(x, *output[1:], *affine)
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, grad: Tensor | None, *unused: Any) -> tuple[Any, ...]:
    """By x and by affine; the statistics are not differentiated."""
    x, mean, rstd, *affine = ctx.saved_tensors
    if grad is None:
        return None, [None] * len(affine), None, None, None
    x_grad, sums = normalise_backward(grad, x, [mean, rstd], affine, ctx.group_size, ctx.silu)
    return x_grad, _affine_gradients(sums, *affine), None, None, None


def _affine_gradients(
    sums: Tensor,
    weight: Tensor,
    bias: Tensor,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
) -> list[Tensor]:
    sums = sums.unflatten(2, (-1, len(weight)))  # [2, N, repeats, C]
    if scale is None or shift is None:
        by_weight, by_bias = sums.sum((1, 2))
        return [by_weight.to(weight.dtype), by_bias.to(bias.dtype)]
    by_weight, by_shift = sums.flatten(1, 2).unflatten(1, (len(scale), -1)).sum(2)  # [R, C] each
    by_scale = torch.addcmul(weight * by_weight, bias, by_shift)
    factor = 1 + scale.to(sums.dtype)
    by_weight, by_bias = (by_weight * factor).sum(0), (by_shift * factor).sum(0)
    return [
        by_weight.to(weight.dtype),
        by_bias.to(bias.dtype),
        by_scale.to(scale.dtype),
        by_shift.to(shift.dtype),
    ]


normalise.register_autograd(_gradients, setup_context=_keep)


# ---------------------------------------------------------------- launching


class _Launch(NamedTuple):
    """Arguments that the kernels share."""

    grid: tuple[int]
    affine: list[Tensor | None]  # weight, bias, scale, shift
    sizes: tuple[int, ...]
    tiles: dict[str, int | bool]

    @classmethod
    def of(
        cls, x: Tensor, affine: list[Tensor], group_size: int, *, backward: bool = False
    ) -> _Launch:
        n, length, columns = x.shape
        stride, frames = (affine[2].stride(0), n // len(affine[2])) if affine[2:] else (0, 1)
        tensors: list[Tensor | None] = [*affine, None, None]
        plan = tiles(x, group_size, backward=backward)
        blocks = -(-columns // plan["USED"])
        sizes = stride, frames, length, columns, len(affine[0])
        return cls((n * blocks,), tensors[:4], sizes, {"GROUP": group_size, **plan})


def reads(x: Tensor, group_size: int, *, backward: bool = False) -> int:
    """How often `normalise`, or its backward pass, reads all of `x` [N, L, K]: once or twice."""
    return 1 if tiles(x, group_size, backward=backward)["ONE_TILE"] else 2


def tiles(x: Tensor, group_size: int, *, backward: bool = False) -> dict[str, int | bool]:
    """How a kernel goes through `x` [N, L, K], see norm_kernels: all rows at once where they fit."""
    share = 2 if backward else 1  # of the registers: the backward pass has two inputs and two sums
    length, columns = _power_of_two(x.shape[1]), ROW_BYTES // x.element_size()
    most = WHOLE_TILE // share // length  # columns with which one tile holds all rows
    one_tile = most >= _power_of_two(_whole_groups(columns // 2, group_size))
    if one_tile:
        columns = min(2 * columns, max(min(columns, most), TILE // share // length))
    used = min(x.shape[2], _whole_groups(columns, group_size))
    columns = _power_of_two(used)
    if not one_tile:
        length = max(1, TILE // share // columns)
    warps = min(16, max(1, length * columns * share // 512))
    return {
        "USED": used,
        "COLUMNS": columns,
        "LENGTH": length,
        "ONE_TILE": one_tile,
        "num_warps": _power_of_two(warps),
    }


def _whole_groups(columns: int, group_size: int) -> int:
    """As many columns as are whole groups, and one group at least."""
    return max(1, columns // group_size) * group_size


def _power_of_two(n: int) -> int:
    """The least one that is not below `n`."""
    return 1 << (n - 1).bit_length()
