"""Matching in a few rounds of batched tensor code, with the result of ``pscl.matching``.

While no lowered cell can win, which is checked, the published rule is a serial dictatorship: each
template takes the best cell that earlier ones left. Deferred acceptance (Gale and Shapley 1962)
gives the same assignment in few rounds: every template proposes to its best candidate that has not
rejected it, a cell keeps the earliest template that ever proposed. Candidates are each template's
few most similar cells; more of them for images that these do not decide. Images that are still
open are matched template by template.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from pscl import matching

BLOCK = 32  # neighbours of which ``largest`` compares the maxima first
SLICE = 8  # neighbouring cells of which only the largest similarity is kept at first
CELLS = BLOCK * SLICE  # numbers of cells are padded to a multiple of it


@dataclass(frozen=True)
class Limits:
    """How much is searched and held at once, which does not change the result.

    Attributes:
        candidates: of each template, at most slices * SLICE and CELLS.
        slices: of each template whose cells may be candidates.
        effort: times as many of both for images that those did not decide.
        held: similarities up to which all are kept, 48 MiB; of more, the largest of each slice.
        whole: similarities computed at once, 128 MiB.
        piece: similarities of a piece that fits into a processor's cache, 12 MiB.
        cached: types of devices that gain by such pieces; on others few large calls are better.
        few: templates up to which no device gains.
        rounds: before the first, second and last check whether all templates are settled.
    """

    candidates: int = 64
    slices: int = 32
    effort: int = 4
    held: int = 12 * 2**20
    whole: int = 32 * 2**20
    piece: int = 3 * 2**20
    cached: tuple[str, ...] = ("cpu",)
    few: int = 128
    rounds: tuple[int, ...] = (4, 4, 56)


LIMITS = Limits()


def match(template: Tensor, keys: Tensor, valid: Tensor, limits: Limits = LIMITS) -> Tensor:
    """As ``pscl.matching.match``, for the same arguments.

    Keys are copied unless P is a multiple of ``CELLS`` and a cell's D numbers lie side by side.
    """
    if missing := -valid.shape[1] % CELLS:
        keys, valid = F.pad(keys, (0, missing)), F.pad(valid, (0, missing))
    (dim, templates), cells = template.shape, valid.shape[1]
    effort = limits.effort
    more = replace(limits, candidates=effort * limits.candidates, slices=effort * limits.slices)
    few = len(keys) * cells * templates <= limits.held or cells <= 4 * more.slices * SLICE
    peaks = None if few else _peaks(template, keys, valid, limits)
    chosen, settled = _match_in_rounds(template, keys, valid, peaks, limits)
    if peaks is not None:
        for some in _open(settled, limits.whole // (more.slices * SLICE * dim * templates)):
            chosen[some], settled[some] = _match_in_rounds(
                template, keys[some], valid[some], peaks[some], more
            )
    # Padded to a multiple of BLOCK, by the last template: a matrix product adds in another order at
    # the edges of its blocks, so that equal cells would differ by a rounding.
    filled = torch.arange(templates + -templates % BLOCK, device=keys.device)
    filled.clamp_(max=templates - 1)
    for some in _open(settled, limits.whole // (2 * templates * cells)):  # 2: in double precision
        in_turn = matching.match(template[:, filled], keys[some], valid[some])
        chosen[some] = in_turn[:, :templates]
    return chosen


def _open(settled: Tensor, at_once: int) -> tuple[Tensor, ...]:
    """Indices (b,) of the images that are not settled (B,), in groups of ``at_once``."""
    images = (~settled).nonzero().squeeze(1)
    return images.split(max(1, at_once)) if len(images) else ()


def _match_in_rounds(
    template: Tensor, keys: Tensor, valid: Tensor, peaks: Tensor | None, limits: Limits
) -> tuple[Tensor, Tensor]:
    """The cells (B, T) by deferred acceptance among candidates, and whether (B,) they are right."""
    value, cell, others = _candidates(template, keys, valid, peaks, limits)
    # Stable: of equal values the first cell wins, as in argmax.
    value, order = value.sort(dim=2, descending=True, stable=True)
    # A win is exact if no cell taken before could beat it at its lowered value, nor any cell that
    # is no candidate. Those are known in single precision only: rounding errors are proportional to
    # the largest length of a template times that of a key.
    best = value[:, :, 0]
    lowered = best - best.amax(dim=1, keepdim=True)
    reach = template.norm(dim=0).amax() * keys.norm(dim=1).amax(dim=1, keepdim=True)  # (B, 1)
    bound = torch.maximum(lowered, others).add(reach, alpha=1e-5)  # (B, T)
    return _accept(value, cell.gather(2, order), bound, keys.shape[2], limits.rounds)


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
    return exact.add_(padding.take(index)), cell, others


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


def _accept(
    value: Tensor, cell: Tensor, bound: Tensor, none: int, rounds: tuple[int, ...]
) -> tuple[Tensor, Tensor]:
    """Rounds of proposals and rejections among candidates (B, T, L), best first.

    A win is surely exact above ``bound`` (B, T); ``none`` is the number of a cell that is no
    candidate. Returns the cells (B, T), and whether (B,) all of an image are surely right.
    """
    # A template that has no candidate left proposes to the cell ``none``, at the value -inf.
    images, templates, candidates = cell.shape
    length = max(candidates, sum(rounds)) + 1
    value = F.pad(value, (0, length - candidates), value=-torch.inf)
    cell = F.pad(cell, (0, length - candidates), value=none)
    number = torch.arange(templates, device=cell.device).expand(images, -1)
    at = torch.arange(0, images * templates * length, length, device=cell.device).view(images, -1)
    holder = torch.full((images, none + 1), templates, device=cell.device)
    for few in rounds:
        for _ in range(few):
            proposal = cell.take(at)
            holder.scatter_reduce_(1, proposal, number, "amin")
            rejected = holder.gather(1, proposal) < number
            at += rejected
        settled = ((value.take(at) > bound) & ~rejected).all(dim=1)
        if settled.all():
            break
    return cell.take(at), settled
