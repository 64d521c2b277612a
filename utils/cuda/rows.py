"""What the kernels of norms share: rows in blocks, and the comparison with PyTorch's numbers."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

SHARING = 4  # programs of a comparison: some then have one block of its rows, some two
TOLERANCE = {torch.float32: 1e-4}  # of the mean difference, relative; of other types 1e-2


def block_sizes(rows: Tensor, tile: int) -> dict[str, int]:
    """``width`` and ``block`` of a kernel that holds ``tile`` numbers of (..., C): powers of 2."""
    width = 1 << (rows.shape[-1] - 1).bit_length()
    return {"width": width, "block": max(1, tile // width)}


def mixed_rows(channels: int, device: torch.device, dtype: torch.dtype, count: int = 700) -> Tensor:
    """Rows (count, C) of numbers between -0.5 and 1.5, not from a run's generator.

    Their mean is about 0.5: relative to a mean next to 0 all rounding would be an error.
    """
    mixed = torch.arange(count * channels) * 7919 % 1009 / 504 - 0.5
    return mixed.view(count, channels).to(device, dtype)


def require_equal(found: Iterable[Tensor], expected: Iterable[Tensor], dtype: torch.dtype) -> None:
    """RuntimeError if numbers of a kernel, computed of ``dtype``, are not PyTorch's.

    What is ``expected`` may be in double precision: of many rows PyTorch's own sums round, too.
    """
    for own, plain in zip(found, expected, strict=True):
        # In the mean: a number next to 0 may have the slope of the other side.
        error = float((own.to(plain.dtype) - plain).abs().mean() / plain.abs().mean())
        if not error < TOLERANCE.get(dtype, 1e-2):
            raise RuntimeError(f"its numbers differ from PyTorch's by {error:.1e}")
