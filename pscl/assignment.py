"""The rule of ``pscl.matching`` among candidates: one operator, ``assign``, for all images at once.

On CUDA it is a kernel (``pscl.kernels``) that never waits for the host. Elsewhere it is plain loops
over numbers, which take less time than the tensor operations that could replace them.
"""

from __future__ import annotations

import math
import warnings
from collections import Counter

import torch
from torch import Tensor

FEW = 8  # candidates of which most templates take one
BLOCK = 32  # templates whose similarities to all cells are computed together
with_kernel: bool | None = None  # whether the kernel works here; None: not known yet


def assign(
    cell: Tensor, sure: Tensor, highest: Tensor, template: Tensor, keys: Tensor, valid: Tensor
) -> Tensor:
    """Let templates choose in turn among candidates, and among all cells where those don't decide.

    Args:
        cell: (B, T, L) candidates of each template, the most similar first.
        sure: (B, T), how many of them, from the first on, are more similar than any cell that is
            taken, and than any that is not among them.
        highest: (B, T), whether a template may have the image's largest similarity.
        template, keys, valid: as for ``pscl.matching.match``.

    Returns:
        The cell of each template in each image, int64 (B, T), as ``pscl.matching.match``.
    """
    chosen: Tensor = torch.ops.pscl.assign(cell, sure, highest, template, keys, valid)
    return chosen


def in_turn(
    cell: Tensor, sure: Tensor, highest: Tensor, template: Tensor, keys: Tensor, valid: Tensor
) -> Tensor:
    """``assign`` on the host; tensors of another device are waited for."""
    images, templates, length = cell.shape
    few = min(FEW, length)
    candidates, count = cell[:, :, :few].flatten().tolist(), sure.flatten().tolist()
    chosen: list[int] = []
    for image in range(images):
        everywhere: AllCells | None = None
        taken: Counter[int] = Counter()
        for number in range(templates):
            row = len(chosen)
            own = candidates[row * few : row * few + min(few, count[row])]
            if count[row] > few and all(choice in taken for choice in own):
                own = cell[image, number, : count[row]].tolist()
            for choice in own:
                if choice not in taken:
                    break
            else:
                if everywhere is None:
                    everywhere = AllCells(template, keys[image], valid[image], highest[image])
                choice = everywhere.best(number, taken)
            taken[choice] += 1
            chosen.append(choice)
    return torch.tensor(chosen, device=keys.device).view(images, templates)


def on_cuda(
    cell: Tensor, sure: Tensor, highest: Tensor, template: Tensor, keys: Tensor, valid: Tensor
) -> Tensor:
    """``assign`` by a kernel, or, after one line where that does not work, on the host.

    The kernel's first result is compared with the host's.
    """
    global with_kernel
    inputs = (cell, sure, highest, template, keys, valid)
    if with_kernel is False:
        return in_turn(*inputs)
    try:
        from pscl import kernels  # Triton comes with PyTorch for CUDA alone

        chosen = kernels.assign(*inputs)
        if with_kernel is None and not torch.equal(chosen, in_turn(*inputs)):
            raise RuntimeError("its choices differ from those of the rule")
    except Exception as error:  # whatever a compiler may miss on somebody's machine
        with_kernel = False
        why = (str(error).splitlines() or [type(error).__name__])[0]
        warnings.warn(f"Matching has no CUDA kernel here and is slower: {why}", stacklevel=2)
        return in_turn(*inputs)
    with_kernel = True
    return chosen


class AllCells:
    """Similarities of all cells of an image, in double precision, a block of templates at a time.

    Blocks are of equal size: a matrix product adds in another order at the edges of its own blocks,
    so that equal cells would differ by a rounding. The number of cells is a multiple of ``BLOCK``.
    """

    def __init__(self, template: Tensor, keys: Tensor, valid: Tensor, highest: Tensor) -> None:
        wide = torch.float32 if keys.is_mps else torch.float64  # MPS has no double precision
        self.template, self.keys, self.padding = template.to(wide), keys.to(wide), ~valid
        self.first, self.block = 0, keys.new_empty(0)
        some = highest.nonzero().squeeze(1)
        peaks = [float(self.similarity(t).amax()) for t in some.split(BLOCK) if len(t)]
        self.peak = max(peaks, default=math.nan)  # none is highest where numbers are not finite

    def similarity(self, number: Tensor) -> Tensor:
        """Of up to ``BLOCK`` templates, the last one repeated: (BLOCK, P), -inf for padding."""
        filled = torch.arange(BLOCK, device=number.device).clamp_(max=len(number) - 1)
        rows = self.template.T[number[filled]]  # (BLOCK, D)
        return (rows @ self.keys).masked_fill_(self.padding, -torch.inf)

    def best(self, number: int, taken: Counter[int]) -> int:
        """A template's most similar cell, after lowering cells as often as they were taken."""
        if not 0 <= number - self.first < len(self.block):
            last = min(number + BLOCK, self.template.shape[1])
            self.block = self.similarity(torch.arange(number, last, device=self.keys.device))
            self.first = number
        row, again = self.block[number - self.first], dict(taken)
        while again:
            row[list(again)] -= self.peak
            again = {cell: times - 1 for cell, times in again.items() if times > 1}
        return int(row.argmax())


# Not ``torch.library.custom_op``, which imports PyTorch's compiler: that takes a while.
LIBRARY = torch.library.Library("pscl", "DEF")
NAMES = ("cell", "sure", "highest", "template", "keys", "valid")
LIBRARY.define(f"assign({', '.join(f'Tensor {name}' for name in NAMES)}) -> Tensor")
LIBRARY.impl("assign", in_turn, "CompositeExplicitAutograd")
LIBRARY.impl("assign", on_cuda, "CUDA")
