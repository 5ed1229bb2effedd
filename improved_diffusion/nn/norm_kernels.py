"""Triton kernels of the group norm, for GPUs; `norm_operators` launches them.

Activations are [N, length, columns] in memory, and a group is GROUP neighbouring columns over the whole
length. A program does the groups of USED columns of one n, by tiles of LENGTH rows and COLUMNS columns, the
power of two that USED fits in. Where one tile holds all rows, they are read once; else a second time, the
last ones first, since those are still in the cache. All arithmetic is float32.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def normalise(
    x,  # [N, length, columns]
    out,  # like x
    mean,  # float32 [N, columns / GROUP]; written, or read where KNOWN
    rstd,  # likewise: one over the standard deviation
    weight,  # [channels], as bias; column k is channel k modulo channels
    bias,
    scale,  # rows of [channels], `stride` apart, each for `frames` n in a row; as shift. None: not there
    shift,
    stride,
    frames,
    length,
    columns,
    channels,
    eps,
    GROUP: tl.constexpr,
    USED: tl.constexpr,
    COLUMNS: tl.constexpr,
    LENGTH: tl.constexpr,
    ONE_TILE: tl.constexpr,
    SILU: tl.constexpr,
    KNOWN: tl.constexpr,
):
    """out = silu(((x - mean) * rstd * weight + bias) * (1 + scale) + shift)."""
    n, column, own = _own_columns(columns, USED, COLUMNS)
    group = n * (columns // GROUP) + column // GROUP
    w, b = _affine(weight, bias, scale, shift, n // frames * stride, column % channels, own)
    x += n * length * columns
    out += n * length * columns
    at, here = _tile(0, column, own, length, columns, LENGTH)
    tile = tl.load(x + at, here, other=0.0).to(tl.float32)
    if KNOWN:
        m = tl.load(mean + group, own, other=0.0)
        r = tl.load(rstd + group, own, other=0.0)
    else:
        m, r = _statistics(x, tile, here, column, own, length, columns, eps, GROUP, ONE_TILE)
        first = own & (column % GROUP == 0)
        tl.store(mean + group, m, first)
        tl.store(rstd + group, r, first)
    slope = r * w
    offset = b - m * slope
    tiles = tl.cdiv(length, LENGTH)
    for back in range(tiles):
        if not ONE_TILE:
            at, here = _tile((tiles - 1 - back) * LENGTH, column, own, length, columns, LENGTH)
            tile = tl.load(x + at, here, other=0.0).to(tl.float32)
        result = tile * slope + offset
        if SILU:
            result *= tl.sigmoid(result)
        tl.store(out + at, result.to(out.dtype.element_ty), here)


@triton.jit
def normalise_backward(
    grad,  # [N, length, columns], of the output
    x,
    mean,
    rstd,
    weight,
    bias,
    scale,
    shift,
    x_grad,  # like x
    sums,  # float32 [2, N, columns]: over the length, of normalised x times by_out, and of by_out
    stride,
    frames,
    length,
    columns,
    channels,
    images,  # N
    GROUP: tl.constexpr,
    USED: tl.constexpr,
    COLUMNS: tl.constexpr,
    LENGTH: tl.constexpr,
    ONE_TILE: tl.constexpr,
    SILU: tl.constexpr,
):
    """The gradient by x, and the sums that those by weight, bias, scale and shift are made of.

    by_out is the gradient before the SiLU. With w = weight * (1 + scale), and means over the group:
    x_grad = rstd * (w * by_out - mean(w * by_out) - normalised * mean(w * by_out * normalised)).
    """
    n, column, own = _own_columns(columns, USED, COLUMNS)
    group = n * (columns // GROUP) + column // GROUP
    w, b = _affine(weight, bias, scale, shift, n // frames * stride, column % channels, own)
    m = tl.load(mean + group, own, other=0.0)
    r = tl.load(rstd + group, own, other=0.0)
    grad += n * length * columns
    x += n * length * columns
    x_grad += n * length * columns
    at, here = _tile(0, column, own, length, columns, LENGTH)
    normed, by_out = _normed_and_gradient(x, grad, at, here, m, r, w, b, SILU)
    by_weight, by_bias = by_out * normed, by_out
    if not ONE_TILE:
        for start in range(LENGTH, length, LENGTH):
            at, here = _tile(start, column, own, length, columns, LENGTH)
            normed, by_out = _normed_and_gradient(x, grad, at, here, m, r, w, b, SILU)
            by_weight += by_out * normed
            by_bias += by_out
    weight_sum, bias_sum = tl.sum(by_weight, 0), tl.sum(by_bias, 0)
    tl.store(sums + n * columns + column, weight_sum, own)
    tl.store(sums + (images + n) * columns + column, bias_sum, own)
    count = length * GROUP
    through_mean = _over_groups(w * bias_sum, GROUP, COLUMNS) / count
    through_rstd = _over_groups(w * weight_sum, GROUP, COLUMNS) / count
    tiles = tl.cdiv(length, LENGTH)
    for back in range(tiles):
        if not ONE_TILE:
            at, here = _tile((tiles - 1 - back) * LENGTH, column, own, length, columns, LENGTH)
            normed, by_out = _normed_and_gradient(x, grad, at, here, m, r, w, b, SILU)
        result = r * (w * by_out - through_mean - normed * through_rstd)
        tl.store(x_grad + at, result.to(x_grad.dtype.element_ty), here)


@triton.jit
def _statistics(
    x, tile, here, column, own, length, columns, eps, GROUP: tl.constexpr, ONE_TILE: tl.constexpr
):
    """Each column's mean and one over the standard deviation of its group; `tile` is the first one.

    Sums of differences from the first row's mean do not cancel where the mean is large.
    """
    LENGTH: tl.constexpr = tile.shape[0]
    COLUMNS: tl.constexpr = tile.shape[1]
    pivot = tl.load(x + column, own, other=0.0).to(tl.float32)
    pivot = _over_groups(pivot, GROUP, COLUMNS) / GROUP
    difference = tl.where(here, tile - pivot, 0.0)
    sums, squares = difference, difference * difference
    if not ONE_TILE:
        for start in range(LENGTH, length, LENGTH):
            at, here = _tile(start, column, own, length, columns, LENGTH)
            difference = tl.load(x + at, here, other=0.0).to(tl.float32) - pivot
            difference = tl.where(here, difference, 0.0)
            sums += difference
            squares += difference * difference
    count = length * GROUP
    mean = _over_groups(tl.sum(sums, 0), GROUP, COLUMNS) / count
    square = _over_groups(tl.sum(squares, 0), GROUP, COLUMNS) / count
    return mean + pivot, tl.rsqrt(tl.maximum(square - mean * mean, 0.0) + eps)


@triton.jit
def _normed_and_gradient(x, grad, at, here, m, r, w, b, SILU: tl.constexpr):
    """A tile of normalised x, and of the gradient before the SiLU, which is 0 outside."""
    normed = (tl.load(x + at, here, other=0.0).to(tl.float32) - m) * r
    by_out = tl.load(grad + at, here, other=0.0).to(tl.float32)
    if SILU:
        z = normed * w + b
        gate = tl.sigmoid(z)
        by_out *= gate * (1 + z * (1 - gate))
    return normed, by_out


@triton.jit
def _own_columns(columns, USED: tl.constexpr, COLUMNS: tl.constexpr):
    """This program's n, its columns [COLUMNS], and which of them exist and are its own."""
    blocks = tl.cdiv(columns, USED)
    n = (tl.program_id(0) // blocks).to(tl.int64)
    inside = tl.arange(0, COLUMNS)
    column = tl.program_id(0) % blocks * USED + inside
    return n, column, (inside < USED) & (column < columns)


@triton.jit
def _tile(start, column, own, length, columns, LENGTH: tl.constexpr):
    """Places [LENGTH, COLUMNS] in an image of the rows from `start` on, and which of them exist."""
    row = start + tl.arange(0, LENGTH)[:, None]
    return row * columns + column[None, :], (row < length) & own[None, :]


@triton.jit
def _over_groups(values, GROUP: tl.constexpr, COLUMNS: tl.constexpr):
    """For each column the sum over its group of `values` [COLUMNS]."""
    group = tl.arange(0, COLUMNS) // GROUP
    same = group[:, None] == group[None, :]
    return tl.sum(tl.where(same, values[None, :], 0.0), 1)


@triton.jit
def _affine(weight, bias, scale, shift, row, channel, own):
    """weight * (1 + scale) and bias * (1 + scale) + shift of some channels; 0 where not `own`."""
    w = tl.load(weight + channel, own, other=0.0).to(tl.float32)
    b = tl.load(bias + channel, own, other=0.0).to(tl.float32)
    if scale is not None:
        s = 1 + tl.load(scale + row + channel, own, other=0.0).to(tl.float32)
        w *= s
        b = b * s + tl.load(shift + row + channel, own, other=0.0).to(tl.float32)
    return w, b
