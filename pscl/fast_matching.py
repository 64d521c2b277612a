"""Matching among candidates found by batched tensor code, with the result of ``pscl.matching``.

Candidates are each template's few most similar cells. While no lowered cell can win, which is
checked, a template takes the best of them that earlier ones left; a template whose candidates do
not decide looks at all cells (``pscl.assignment``). So the number of operators depends on shapes
alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from pscl.assignment import assign

BLOCK = 32  # neighbours of which ``largest`` compares the maxima first
SLICE = 8  # neighbouring cells of which only the largest similarity is kept at first
CELLS = BLOCK * SLICE  # numbers of cells are padded to a multiple of it


@dataclass(frozen=True)
class Limits:
    """How much is searched and held at once, which does not change the result.

    Attributes:
        candidates: of each template, at most slices * SLICE and CELLS.
        slices: of each template whose cells may be candidates.
        all_of: cells up to which their similarities are always all kept.
        held: similarities up to which all are kept, 48 MiB; of more, the largest of each slice.
        whole: similarities computed at once, 128 MiB.
        piece: similarities of a piece that fits into a processor's cache, 12 MiB.
        cached: types of devices that gain by such pieces; on others few large calls are better.
        few: templates up to which no device gains.
    """

    candidates: int = 32
    slices: int = 16
    all_of: int = 4096
    held: int = 12 * 2**20
    whole: int = 32 * 2**20
    piece: int = 3 * 2**20
    cached: tuple[str, ...] = ("cpu",)
    few: int = 128


LIMITS = Limits()


def match(template: Tensor, keys: Tensor, valid: Tensor, limits: Limits = LIMITS) -> Tensor:
    """As ``pscl.matching.match``, for the same arguments.

    Keys are copied unless P is a multiple of ``CELLS`` and a cell's D numbers lie side by side.
    """
    if missing := -valid.shape[1] % CELLS:
        keys, valid = F.pad(keys, (0, missing)), F.pad(valid, (0, missing))
    cells = valid.shape[1]
    few = len(keys) * cells * template.shape[1] <= limits.held or cells <= limits.all_of
    peaks = None if few else _peaks(template, keys, valid, limits)
    value, cell, others = _candidates(template, keys, valid, peaks, limits)
    # Stable: of equal values the first cell wins, as in argmax.
    value, order = value.sort(dim=2, descending=True, stable=True)
    # A choice is exact if no cell taken before could beat it at its lowered value, nor any cell
    # that is no candidate. Those are known in single precision only: rounding errors are
    # proportional to the largest length of a template times that of a key.
    best = value[:, :, 0]  # (B, T)
    reach = template.norm(dim=0).amax() * keys.norm(dim=1).amax(dim=1, keepdim=True)  # (B, 1)
    lowered = best - best.amax(dim=1, keepdim=True)
    bound = torch.maximum(lowered, others).add_(reach, alpha=1e-5)  # (B, T)
    sure = (value > bound[..., None]).sum(dim=2)  # (B, T)
    highest = lowered >= -1e-5 * reach
    return assign(cell.gather(2, order), sure, highest, template, keys, valid)


def _candidates(
    template: Tensor, keys: Tensor, valid: Tensor, peaks: Tensor | None, limits: Limits
) -> tuple[Tensor, Tensor, Tensor]:
    """Each template's cells that are most similar in single precision, ordered by their numbers.

    Returns similarities (B, T, L) in double precision, -inf for padding; the cells (B, T, L); the
    largest similarity that another cell can have (B, T).
    """
    images, dim, cells = keys.shape
    padding = valid.log()  # 0, and -inf for padding
    table = keys.transpose(1, 2).reshape(-1, dim)  # a row for each cell of each image
    first = torch.arange(0, len(table), cells, device=keys.device)[:, None, None]
    rows = template.T.expand(images, -1, -1)  # (B, T, D)
    if peaks is None:
        rough, cell = largest(torch.baddbmm(padding[:, None], rows, keys), limits.candidates)
        others = rough[:, :, -1]
    else:
        peak, slices = largest(peaks, limits.slices)  # (B, T, S) each
        index = slices + first // SLICE
        outside = F.embedding(index, padding.reshape(-1, SLICE)).flatten(2)  # (B, T, S*SLICE)
        some = F.embedding(index, table.reshape(-1, SLICE * dim)).view(-1, outside.shape[2], dim)
        similarity = torch.bmm(some, rows.reshape(-1, dim, 1)).view_as(outside)
        del some  # large
        rough, order = similarity.add_(outside).topk(limits.candidates, dim=2)
        inside = torch.arange(SLICE, device=keys.device)
        cell = torch.add(inside, slices[..., None], alpha=SLICE).flatten(2).gather(2, order)
        others = torch.maximum(peak[:, :, -1], rough[:, :, -1])
    cell = cell.sort(dim=2).values
    index = cell + first
    wide = torch.float32 if keys.is_mps else torch.float64  # MPS has no double precision
    # Not a matrix product, whose order of summation differs for the last rows of an odd number, so
    # that equal cells would differ.
    exact = F.embedding(index, table).to(wide).mul_(template.T[:, None].to(wide)).sum(dim=3)
    return exact.add_(padding.flatten()[index]), cell, others


def _peaks(template: Tensor, keys: Tensor, valid: Tensor, limits: Limits) -> Tensor:
    """Largest similarity in each slice of ``SLICE`` cells, (B, T, P / SLICE).

    -inf where all cells are padding; where some are, it may be too large.

    All similarities would fill gigabytes, so pieces use the same memory in turn. For many templates
    on a CPU they fit into its cache, since writing and reading them outside takes longer than
    computing them, and hold one image, whose padding comes last and is left out.
    """
    images, templates = len(keys), template.shape[1]
    some = valid.unflatten(1, (-1, SLICE)).any(dim=2)  # (B, slices)
    slices = some.shape[1]
    together, at_once, ends = images, limits.whole, [slices]
    if templates > limits.few and keys.device.type in limits.cached:
        together, at_once = 1, limits.piece
        ends = (some * torch.arange(1, slices + 1)).amax(dim=1).tolist()
    step = min(slices, max(1, at_once // (together * templates * SLICE)))
    # Cells as rows and templates as columns: the largest of a slice is then one of whole rows.
    columns = template.expand(together, -1, -1)  # (b, D, T)
    memory = keys.new_empty(together, step, SLICE, templates)
    peaks = keys.new_empty(images, templates, slices)
    of_images = (keys.transpose(1, 2), some.log()[..., None], peaks.transpose(1, 2))
    for rows, padding, peak, end in zip(*(x.split(together) for x in of_images), ends, strict=True):
        for start in range(0, end, step):
            stop = min(start + step, end)
            similarity = memory[:, : stop - start]
            torch.bmm(rows[:, start * SLICE : stop * SLICE], columns, out=similarity.flatten(1, 2))
            torch.add(similarity.amax(dim=2), padding[:, start:stop], out=peak[:, start:stop])
        peak[:, end:] = -torch.inf
    return peaks


def largest(values: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """``values.topk(count, dim=2)`` of (B, T, P), P a multiple of ``BLOCK``, in less time.

    The ``count`` largest lie in the ``count`` blocks with the largest maxima. Which of equal values
    are taken is undefined, as in topk.
    """
    blocks = values.shape[2] // BLOCK
    if blocks < 4 * count:
        return values.topk(count, dim=2)
    peaks = values.unflatten(2, (blocks, BLOCK)).amax(dim=3)  # (B, T, blocks)
    block = peaks.topk(count, dim=2, sorted=False).indices  # (B, T, count)
    inside = torch.arange(BLOCK, device=values.device)
    index = torch.add(inside, block[..., None], alpha=BLOCK).flatten(2)  # (B, T, count * BLOCK)
    found, order = values.gather(2, index).topk(count, dim=2)
    return found, index.gather(2, order)
