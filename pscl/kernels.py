"""Kernels for CUDA, written in Triton: accelerators of what stands in plain form elsewhere."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


def assign(
    cell: Tensor, sure: Tensor, highest: Tensor, template: Tensor, keys: Tensor, valid: Tensor
) -> Tensor:
    """As ``pscl.assignment.assign``, one program of the device for each image."""
    (dim, templates), (images, cells), length = template.shape, valid.shape, cell.shape[2]
    # Written row by row, so they must not lie in memory as their inputs may.
    chosen = sure.new_empty((images, templates), dtype=torch.int64)
    taken = valid.new_zeros((images, cells), dtype=torch.int32)  # how often
    features = (template.T, keys.transpose(1, 2), valid)  # rows of D numbers
    read = (tensor.contiguous() for tensor in (cell, sure, highest, *features))
    room, width = triton.next_power_of_2(length), triton.next_power_of_2(dim)
    constants = (templates, cells, dim, length)
    with torch.cuda.device_of(keys):  # Triton takes the current one
        _assign[(images,)](*read, taken, chosen, *constants, room=room, width=width, some=128)
    return chosen


@triton.jit
def _assign(
    cell,
    sure,
    highest,
    template,
    keys,
    valid,
    taken,
    chosen,
    templates,
    cells,
    dim,
    length,
    room: tl.constexpr,
    width: tl.constexpr,
    some: tl.constexpr,
):
    """Templates in turn take their first sure candidate that is free; without one, search all."""
    image = tl.program_id(0).to(tl.int64)
    keys, valid, taken = keys + image * cells * dim, valid + image * cells, taken + image * cells
    number = tl.arange(0, room)
    peak = tl.full((), 0.0, tl.float64)
    known = 0  # whether the image's largest similarity was looked for
    for t in range(templates):
        row = image * templates + t
        inside = number < tl.load(sure + row)
        found = tl.load(cell + row * length + number, mask=inside, other=0)
        free = inside & (tl.load(taken + found, mask=inside, other=1) == 0)
        first = tl.min(tl.where(free, number, room), axis=0)
        choice = tl.sum(tl.where(number == first, found, 0), axis=0)
        if first == room:
            if known == 0:
                known = 1
                peak = tl.full((), float("-inf"), tl.float64)
                for u in range(templates):
                    if tl.load(highest + image * templates + u) != 0:
                        at = template + u * dim
                        value, _ = _best(at, keys, valid, taken, 0.0, cells, dim, width, some)
                        peak = tl.maximum(peak, value)
            at = template + t * dim
            _, choice = _best(at, keys, valid, taken, peak, cells, dim, width, some)
        tl.store(chosen + row, choice)
        before = tl.load(taken + choice)
        tl.debug_barrier()  # all threads have read it
        tl.store(taken + choice, before + 1)
        tl.debug_barrier()  # the next template sees it


@triton.jit
def _best(template, keys, valid, taken, peak, cells, dim, width: tl.constexpr, some: tl.constexpr):
    """Similarity and number of a template's most similar cell, each lowered as often as taken."""
    d = tl.arange(0, width)
    wanted = tl.load(template + d, mask=d < dim, other=0.0).to(tl.float64)  # (D,)
    best = tl.full((), float("-inf"), tl.float64)
    place = tl.full((), 0, tl.int64)
    for start in range(0, cells, some):
        p = start + tl.arange(0, some)
        inside = p < cells
        at = keys + p[:, None].to(tl.int64) * dim + d[None, :]
        key = tl.load(at, mask=inside[:, None] & (d < dim)[None, :], other=0.0).to(tl.float64)
        similarity = tl.sum(key * wanted[None, :], axis=1)  # (some,), added in one order for all
        times = tl.load(taken + p, mask=inside, other=0).to(tl.float64)
        there = tl.load(valid + p, mask=inside, other=0) != 0
        similarity = tl.where(there, similarity - times * peak, float("-inf"))
        top = tl.max(similarity, axis=0)
        first = tl.min(tl.where(similarity == top, p, cells), axis=0)  # of equals
        place = tl.where(top > best, first.to(tl.int64), place)
        best = tl.maximum(best, top)
    return best, place
