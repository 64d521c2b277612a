"""LayerNorm and LeakyReLU of rows as one kernel for CUDA, in Triton: each number is read once.

PyTorch's two take seven passes over the rows, and in autocast widen them to single precision.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from utils.cuda.rows import SHARING, block_sizes, mixed_rows, require_equal

TILE = 4096  # numbers that a program holds at once
PROGRAMS = 512  # at most, of the backward pass: each sums the gradients of weight and bias


def norm_leaky(
    rows: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    slope: float,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """``F.leaky_relu(F.layer_norm(rows, ...), slope)`` over the last dimension of (..., C).

    In single precision inside; the result is of ``dtype``, or else of the type of ``rows``.
    """
    result: Tensor = _NormLeaky.apply(rows, weight, bias, eps, slope, dtype or rows.dtype)
    return result


class _NormLeaky(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        weight: Tensor,
        bias: Tensor,
        eps: float,
        slope: float,
        dtype: torch.dtype,
    ) -> Tensor:
        rows = rows.contiguous()
        ctx.save_for_backward(rows, weight, bias)
        ctx.constants = eps, slope
        return forward(rows, weight, bias, eps, slope, dtype)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (rows, weight, bias), (eps, slope) = ctx.saved_tensors, ctx.constants
        found = backward(gradient.contiguous(), rows, weight, bias, eps, slope, PROGRAMS)
        return *found, None, None, None


def forward(
    rows: Tensor, weight: Tensor, bias: Tensor, eps: float, slope: float, dtype: torch.dtype
) -> Tensor:
    """``norm_leaky`` of contiguous rows, without autograd."""
    result = torch.empty_like(rows, dtype=dtype)
    count, sizes = rows.numel() // rows.shape[-1], block_sizes(rows, TILE)
    grid = (triton.cdiv(count, sizes["block"]),)
    inputs = (rows, weight, bias, result, count, rows.shape[-1])
    with torch.cuda.device_of(rows):  # Triton takes the current one
        _forward[grid](*inputs, eps, slope, **sizes)
    return result


def backward(
    gradient: Tensor,
    rows: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    slope: float,
    most: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of rows, weight and bias; the same numbers are added in the same order always.

    ``most`` programs at most share the rows.
    """
    result, channels, sizes = torch.empty_like(rows), rows.shape[-1], block_sizes(rows, TILE)
    count = rows.numel() // channels
    programs = min(most, triton.cdiv(count, sizes["block"]))
    # Of weight and bias.
    sums = torch.empty(2, programs, channels, device=rows.device, dtype=torch.float32)
    inputs = (gradient, rows, weight, bias, result, sums)
    with torch.cuda.device_of(rows):
        _backward[(programs,)](*inputs, count, channels, eps, slope, programs, **sizes)
    of_weight, of_bias = sums.sum(dim=1).to(weight.dtype)
    return result, of_weight, of_bias


@triton.jit
def _normalised(x, there, channels, eps):
    """Rows (block, width) with mean 0 and variance 1, and the factors of their deviations."""
    mean = tl.sum(x, axis=1) / channels
    centred = tl.where(there, x - mean[:, None], 0.0)
    scale = 1.0 / tl.sqrt(tl.sum(centred * centred, axis=1) / channels + eps)
    return centred * scale[:, None], scale


@triton.jit
def _forward(
    rows,
    weight,
    bias,
    result,
    count,
    channels,
    eps,
    slope,
    width: tl.constexpr,
    block: tl.constexpr,
):
    """A block of rows."""
    c = tl.arange(0, width)
    row = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    there = (row < count)[:, None] & (c < channels)[None, :]
    at = row[:, None] * channels + c[None, :]
    x = tl.load(rows + at, mask=there, other=0.0).to(tl.float32)
    w = tl.load(weight + c, mask=c < channels, other=0.0).to(tl.float32)
    b = tl.load(bias + c, mask=c < channels, other=0.0).to(tl.float32)
    unit, _ = _normalised(x, there, channels, eps)
    y = unit * w[None, :] + b[None, :]
    tl.store(result + at, tl.where(y > 0, y, y * slope).to(result.dtype.element_ty), mask=there)


@triton.jit
def _backward(
    gradient,
    rows,
    weight,
    bias,
    result,
    sums,
    count,
    channels,
    eps,
    slope,
    programs,
    width: tl.constexpr,
    block: tl.constexpr,
):
    """Every ``programs``-th block of rows, and the sums of their weights' and biases' gradients."""
    c = tl.arange(0, width)
    w = tl.load(weight + c, mask=c < channels, other=0.0).to(tl.float32)
    b = tl.load(bias + c, mask=c < channels, other=0.0).to(tl.float32)
    of_weight = tl.zeros((width,), tl.float32)
    of_bias = tl.zeros((width,), tl.float32)
    for number in range(tl.program_id(0), tl.cdiv(count, block), programs):
        row = tl.cast(number, tl.int64) * block + tl.arange(0, block)
        there = (row < count)[:, None] & (c < channels)[None, :]
        at = row[:, None] * channels + c[None, :]
        x = tl.load(rows + at, mask=there, other=0.0).to(tl.float32)
        g = tl.load(gradient + at, mask=there, other=0.0).to(tl.float32)
        unit, scale = _normalised(x, there, channels, eps)
        g = tl.where(unit * w[None, :] + b[None, :] > 0, g, g * slope)
        of_weight += tl.sum(g * unit, axis=0)
        of_bias += tl.sum(g, axis=0)
        g = g * w[None, :]
        along = tl.sum(g * unit, axis=1) / channels
        mean = tl.sum(g, axis=1) / channels
        back = (g - mean[:, None] - unit * along[:, None]) * scale[:, None]
        tl.store(result + at, back.to(result.dtype.element_ty), mask=there)
    at = sums + tl.program_id(0) * channels + c
    tl.store(at, of_weight, mask=c < channels)
    tl.store(at + programs * channels, of_bias, mask=c < channels)


@torch.no_grad()
def check(device: torch.device, dtype: torch.dtype) -> None:
    """Compare both passes with PyTorch's in double precision; RuntimeError if they differ."""
    aten, eps, slope = torch.ops.aten, 1e-5, 0.01
    for channels in (32, 24):
        rows = mixed_rows(channels, device, dtype)
        gradient = rows.roll(1, 0)
        weight, bias = (torch.linspace(a, 1, channels, device=device) for a in (0.5, -1))
        with torch.autocast(device.type, enabled=False):
            wide, wide_gradient, w, b = (x.double() for x in (rows, gradient, weight, bias))
            normed, mean, scale = aten.native_layer_norm(wide, [channels], w, b, eps)
            back = aten.leaky_relu_backward(wide_gradient, normed, slope, False)
            inputs = (back, wide, [channels], mean, scale, w, b, [True] * 3)
            expected = (F.leaky_relu(normed, slope), *aten.native_layer_norm_backward(*inputs))
            found = (
                forward(rows, weight, bias, eps, slope, dtype),
                *backward(gradient, rows, weight, bias, eps, slope, SHARING),
            )
        require_equal(found, expected, dtype)
