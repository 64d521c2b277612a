"""BatchNorm in training, with LeakyReLU, of channels-last maps: kernels for CUDA, in Triton.

PyTorch's two take ten passes over a map forward and back, some of them slow for few channels; these
take eight, at the speed of the memory.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from utils.cuda.rows import SHARING, block_sizes, mixed_rows, require_equal

TILE = 4096  # numbers that a program holds at once
PROGRAMS = 1024  # at most, each of which sums over its rows


def norm_leaky(
    rows: Tensor,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor,
    variance: Tensor,
    momentum: float,
    eps: float,
    slope: float,
) -> Tensor:
    """BatchNorm over the P rows of (P, C), then LeakyReLU; in single precision inside.

    The running ``mean`` and ``variance`` (C,) follow, as in ``F.batch_norm`` in training. The
    result has the type of ``rows``.
    """
    result: Tensor = _NormLeaky.apply(rows, weight, bias, mean, variance, momentum, eps, slope)
    return result


class _NormLeaky(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        weight: Tensor,
        bias: Tensor,
        mean: Tensor,
        variance: Tensor,
        momentum: float,
        eps: float,
        slope: float,
    ) -> Tensor:
        rows = rows.contiguous()
        statistics = take_statistics(rows, mean, variance, momentum, eps, PROGRAMS)
        ctx.save_for_backward(rows, weight, bias, statistics)
        ctx.slope = slope
        return forward(rows, weight, bias, statistics, slope)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        rows, weight, bias, statistics = ctx.saved_tensors
        inputs = (gradient.contiguous(), rows, weight, bias, statistics)
        found = backward(*inputs, ctx.slope, PROGRAMS)
        return *found, None, None, None, None, None


def take_statistics(
    rows: Tensor,
    mean: Tensor,
    variance: Tensor,
    momentum: float,
    eps: float,
    most: int,
) -> Tensor:
    """Mean, and one over the deviation, of each channel: (2, C). The running ones follow.

    ``most`` programs at most share the rows.
    """
    (count, channels), sizes = rows.shape, block_sizes(rows, TILE)
    programs = min(most, triton.cdiv(count, sizes["block"]))
    sums = torch.empty(2, programs, channels, device=rows.device, dtype=torch.float32)
    found = torch.empty(2, channels, device=rows.device, dtype=torch.float32)
    with torch.cuda.device_of(rows):  # Triton takes the current one
        _sums[(programs,)](rows, sums, count, channels, programs, **sizes)
        where, constants = (rows, sums, mean, variance, found), (momentum, eps)
        _merge[(channels,)](*where, count, channels, programs, *constants, some=PROGRAMS)
    return found


def forward(rows: Tensor, weight: Tensor, bias: Tensor, statistics: Tensor, slope: float) -> Tensor:
    """Rows normalised by ``statistics`` and activated."""
    result, (count, channels), sizes = torch.empty_like(rows), rows.shape, block_sizes(rows, TILE)
    grid = (triton.cdiv(count, sizes["block"]),)
    inputs = (rows, weight, bias, statistics, result, count, channels, slope)
    with torch.cuda.device_of(rows):
        _forward[grid](*inputs, **sizes)
    return result


def backward(
    gradient: Tensor,
    rows: Tensor,
    weight: Tensor,
    bias: Tensor,
    statistics: Tensor,
    slope: float,
    most: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of rows, weight and bias; the same numbers are added in the same order always."""
    result, (count, channels), sizes = torch.empty_like(rows), rows.shape, block_sizes(rows, TILE)
    blocks = triton.cdiv(count, sizes["block"])
    programs = min(most, blocks)
    parts = torch.empty(2, programs, channels, device=rows.device, dtype=torch.float32)
    inputs = (gradient, rows, weight, bias, statistics)
    with torch.cuda.device_of(rows):
        _sums_backward[(programs,)](*inputs, parts, count, channels, slope, programs, **sizes)
        sums = parts.sum(dim=1)  # of weight and bias
        _backward[(blocks,)](*inputs, sums, result, count, channels, slope, **sizes)
    of_weight, of_bias = sums.to(weight.dtype)
    return result, of_weight, of_bias


@triton.jit
def _sums(rows, sums, count, channels, programs, width: tl.constexpr, block: tl.constexpr):
    """Sums, and sums of squares, of every ``programs``-th block's differences from the first row.

    Differences, since of large numbers that vary little the squares would say nothing.
    """
    c = tl.arange(0, width)
    inside = c < channels
    origin = tl.load(rows + c, mask=inside, other=0.0).to(tl.float32)
    first = tl.zeros((block, width), tl.float32)
    second = tl.zeros((block, width), tl.float32)
    for number in range(tl.program_id(0), tl.cdiv(count, block), programs):
        row = tl.cast(number, tl.int64) * block + tl.arange(0, block)
        there = (row < count)[:, None] & inside[None, :]
        x = tl.load(rows + row[:, None] * channels + c[None, :], mask=there, other=0.0)
        x = tl.where(there, x.to(tl.float32) - origin[None, :], 0.0)
        first += x
        second += x * x
    at = sums + tl.program_id(0) * channels + c
    tl.store(at, tl.sum(first, axis=0), mask=inside)
    tl.store(at + programs * channels, tl.sum(second, axis=0), mask=inside)


@triton.jit
def _merge(
    rows,
    sums,
    mean,
    variance,
    found,
    count,
    channels,
    programs,
    momentum,
    eps,
    some: tl.constexpr,
):
    """Statistics of one channel from the sums of all programs, ``some`` at most."""
    c = tl.program_id(0)
    number = tl.arange(0, some)
    at = sums + number * channels + c
    first = tl.sum(tl.load(at, mask=number < programs, other=0.0), axis=0) / count
    at += programs * channels
    second = tl.sum(tl.load(at, mask=number < programs, other=0.0), axis=0) / count
    own = tl.load(rows + c).to(tl.float32) + first
    spread = second - first * first
    spread = tl.where(spread < 0, 0.0, spread)  # nan stays
    tl.store(found + c, own)
    tl.store(found + channels + c, 1.0 / tl.sqrt(spread + eps))
    before = tl.load(mean + c)
    tl.store(mean + c, before + momentum * (own - before))
    before = tl.load(variance + c)
    unbiased = spread * (count / tl.maximum(count - 1, 1))
    tl.store(variance + c, before + momentum * (unbiased - before))


@triton.jit
def _block(rows, weight, bias, statistics, count, channels, number, width, block):
    """Where a block of rows lies, its rows with mean 0 and variance 1, and factors of channels."""
    c = tl.arange(0, width)
    inside = c < channels
    w = tl.load(weight + c, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(bias + c, mask=inside, other=0.0).to(tl.float32)
    mean = tl.load(statistics + c, mask=inside, other=0.0)
    scale = tl.load(statistics + channels + c, mask=inside, other=0.0)
    row = tl.cast(number, tl.int64) * block + tl.arange(0, block)
    there = (row < count)[:, None] & inside[None, :]
    at = row[:, None] * channels + c[None, :]
    x = tl.load(rows + at, mask=there, other=0.0).to(tl.float32)
    return at, there, (x - mean[None, :]) * scale[None, :], scale, w, b


@triton.jit
def _forward(
    rows,
    weight,
    bias,
    statistics,
    result,
    count,
    channels,
    slope,
    width: tl.constexpr,
    block: tl.constexpr,
):
    """A block of rows."""
    number = tl.program_id(0)
    at, there, unit, _, w, b = _block(
        rows, weight, bias, statistics, count, channels, number, width, block
    )
    y = unit * w[None, :] + b[None, :]
    tl.store(result + at, tl.where(y > 0, y, y * slope).to(result.dtype.element_ty), mask=there)


@triton.jit
def _sums_backward(
    gradient,
    rows,
    weight,
    bias,
    statistics,
    sums,
    count,
    channels,
    slope,
    programs,
    width: tl.constexpr,
    block: tl.constexpr,
):
    """Sums of weight's and bias's gradients over every ``programs``-th block of rows."""
    of_weight = tl.zeros((block, width), tl.float32)
    of_bias = tl.zeros((block, width), tl.float32)
    for number in range(tl.program_id(0), tl.cdiv(count, block), programs):
        at, there, unit, _, w, b = _block(
            rows, weight, bias, statistics, count, channels, number, width, block
        )
        g = tl.load(gradient + at, mask=there, other=0.0).to(tl.float32)
        g = tl.where(unit * w[None, :] + b[None, :] > 0, g, g * slope)
        of_weight += g * unit
        of_bias += g
    c = tl.arange(0, width)
    at = sums + tl.program_id(0) * channels + c
    tl.store(at, tl.sum(of_weight, axis=0), mask=c < channels)
    tl.store(at + programs * channels, tl.sum(of_bias, axis=0), mask=c < channels)


@triton.jit
def _backward(
    gradient,
    rows,
    weight,
    bias,
    statistics,
    sums,
    result,
    count,
    channels,
    slope,
    width: tl.constexpr,
    block: tl.constexpr,
):
    """Gradient of a block of rows; ``sums`` are those of weight and bias (2, C)."""
    number = tl.program_id(0)
    at, there, unit, scale, w, b = _block(
        rows, weight, bias, statistics, count, channels, number, width, block
    )
    c = tl.arange(0, width)
    along = tl.load(sums + c, mask=c < channels, other=0.0) / count
    mean = tl.load(sums + channels + c, mask=c < channels, other=0.0) / count
    g = tl.load(gradient + at, mask=there, other=0.0).to(tl.float32)
    g = tl.where(unit * w[None, :] + b[None, :] > 0, g, g * slope)
    back = (g - mean[None, :] - unit * along[None, :]) * (scale * w)[None, :]
    tl.store(result + at, back.to(result.dtype.element_ty), mask=there)


@torch.no_grad()
def check(
    device: torch.device,
    dtype: torch.dtype,
    sizes: Iterable[tuple[int, int]] = ((700, 32), (700, 24)),
    programs: int = SHARING,
) -> None:
    """Compare both passes with PyTorch's on rows of ``sizes`` (N, C); RuntimeError if they differ.

    ``programs`` at most share the rows. PyTorch computes in double precision, and the running
    statistics begin at 1, so that no number is next to 0 and an error is one of the kernel.
    Without autograd: within a block whose activations are recomputed a backward pass of the check's
    own would take the block's.
    """
    aten, momentum, eps, slope = torch.ops.aten, 0.1, 1e-5, 0.01
    for count, channels in sizes:
        rows = mixed_rows(channels, device, dtype, count)
        gradient = rows.roll(1, 0)
        weight, bias = (torch.linspace(a, 1, channels, device=device) for a in (0.5, -1))
        mean, variance = torch.ones(2, channels, device=device)
        mean_too, variance_too = torch.ones(2, channels, device=device, dtype=torch.float64)
        with torch.autocast(device.type, enabled=False):
            statistics = take_statistics(rows, mean, variance, momentum, eps, programs)
            passed = forward(rows, weight, bias, statistics, slope)
            back = backward(gradient, rows, weight, bias, statistics, slope, programs)
            found = (passed, *back, mean, variance)
            wide, wide_gradient = rows.double(), gradient.double()
            known = (weight.double(), bias.double(), mean_too, variance_too)
            normed, *saved = aten.native_batch_norm(wide, *known, True, momentum, eps)
            above = aten.leaky_relu_backward(wide_gradient, normed, slope, False)
            rest = (weight.double(), mean_too, variance_too, *saved, True, eps, [True] * 3)
            expected = (
                F.leaky_relu(normed, slope),
                *aten.native_batch_norm_backward(above, wide, *rest),
                mean_too,
                variance_too,
            )
        require_equal(found, expected, dtype)
