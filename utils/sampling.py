"""The paper's contribution: choosing pure patches in the annotated image, matching them elsewhere.

A *cell* is a place of the grid that the two views share (see ``utils.geometry.correspond``). In the
annotated image K cells are chosen for each class by its label map; these C*K patches are the
*templates*. Every other image contributes, for each template in turn, its most similar cell, each
cell once. Batched tensor code: the loops are over the few classes and over rounds of conflict
resolution, and the rare case that rounds cannot decide is settled template by template.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from utils.geometry import Correspondence, ViewGeometry, resize

_CANDIDATES = 64  # best cells of each template that take part in the rounds, <= _SLICES * _SLICE
_SLICES = 32  # slices of each template whose cells may be candidates
_EFFORT = 4  # times as many of both for images that those did not decide
_BLOCK = 32  # neighbours whose largest stands for them while the largest of many are looked for
_SLICE = 8  # neighbouring cells of which only the largest similarity is kept at first
_HELD = 12 * 2**20  # similarities that are kept and searched, 48 MiB; of more each slice's largest
_WHOLE = 32 * 2**20  # similarities computed at once, 128 MiB
_MANY = 100 * 2**20  # similarities of which so many are computed in pieces for a cache
_PIECE = 3 * 2**20  # similarities of such a piece, 12 MiB
_CACHED = ("cpu",)  # devices where it should; on others few large calls are better
_ROUNDS = (4, 4, 56)  # rounds before the first, second and last look whether all are settled


def label_at(label: Tensor, geometry: ViewGeometry, rows: int, columns: int) -> Tensor:
    """The annotated image's warped label (C, H, W) on the cells of a map of ``rows x columns``.

    Returns:
        (C, h'*w'), 0 to 255 with fractions where classes meet.
    """
    return resize(label, geometry.size(rows, columns)).flatten(1)


def choose(label: Tensor, noise: Tensor, templates: int) -> tuple[Tensor, Tensor]:
    """Choose the purest cells of each class in the annotated image.

    For each class in turn, the cells with the largest ``label + 0.1*noise + history``; then the
    history of the cells taken falls by the maximum of the whole label map, so that later classes
    take other cells while there are any. A crop with fewer than ``templates`` cells gives them
    all, repeated in order.

    Args:
        label: (C, P) label map, 0 to 255; all zero for random sampling.
        noise: (C, P) uniform in [0, 1).
        templates: K.

    Returns:
        The cells, int64 (C, K), and their purity (C, K): the values that won, divided by the
        class's sum of them.
    """
    cells = label.shape[1]
    count = min(templates, cells)
    peak = label.amax().expand(count)
    history = label.new_zeros(cells)
    values: list[Tensor] = []
    indices: list[Tensor] = []
    for score in (label + 0.1 * noise).unbind():
        if indices:
            score = score + history.index_add_(0, indices[-1], peak, alpha=-1)
        value, index = score.topk(count)
        values.append(value)
        indices.append(index)
    value, index = torch.stack(values), torch.stack(indices)  # (C, K) each
    if count < templates:
        order = torch.arange(templates, device=label.device) % count
        value, index = value[:, order], index[:, order]
    total = value.sum(dim=1, keepdim=True)
    return index, (value / total).masked_fill_(total == 0, 1.0 / templates)


def match(
    templates: Sequence[Tensor], keys: Sequence[Tensor], valid: Sequence[Tensor]
) -> list[Tensor]:
    """Let the templates of a scale choose in turn their most similar cells; a taken one is lowered.

    Exactly the published rule: template 0 takes its most similar cell (the first of equals), whose
    similarity is then lowered, for all templates, by the image's largest similarity; template 1
    chooses next, and so on. Similarities are single-precision features' products summed in double
    precision, so that near-ties do not depend on the order of a library's additions.

    As long as no lowered cell can win (checked), this is a serial dictatorship, and deferred
    acceptance gives the same result in few rounds: every template asks for its best candidate that
    has not turned it down, a cell keeps the earliest template that ever asked. Each template's best
    few cells by single precision take part; more of them for images that these do not decide.
    Images that are still open follow the rule template by template.

    Scales have nothing to do with each other, but share what are many small calls.

    Args:
        templates: (D, T) of each scale, which may differ in D as in T and P.
        keys: (B, D, P) of each scale, fastest if the D numbers of a cell lie together in memory.
        valid: (B, P) of each scale, whether a cell exists in the image; there is at least one.

    Returns:
        The cell of each template, int64 (B, T), of each scale.
    """
    scales = [_Scale.of(*scale) for scale in zip(templates, keys, valid, strict=True)]
    chosen, settled = _match_in_rounds(scales, 1)
    for scale, cell, of_scale in zip(scales, chosen, settled or (), strict=bool(settled)):
        open_images = (~of_scale).nonzero().squeeze(1)
        # Keys of candidates are gathered, of more candidates for fewer images at once.
        gathered = _EFFORT * _SLICES * _SLICE * scale.template.numel()
        for some in open_images.split(max(1, _WHOLE // gathered)) if len(open_images) else ():
            cell[some] = _match_with_effort(scale.some(some))
    return chosen


@dataclass(frozen=True)
class _Scale:
    """What is matched at one scale.

    Attributes:
        template, keys, valid: see ``match``.
        peaks: of ``_peaks``, None where every similarity is looked at.
    """

    template: Tensor
    keys: Tensor
    valid: Tensor
    peaks: Tensor | None

    @classmethod
    def of(cls, template: Tensor, keys: Tensor, valid: Tensor) -> _Scale:
        """With the peaks, if they are of use."""
        similarities = len(keys) * valid.shape[1] * template.shape[1]
        few = similarities <= _HELD or valid.shape[1] <= 4 * _EFFORT * _SLICES * _SLICE
        return cls(template, keys, valid, None if few else _peaks(template, keys, valid))

    def some(self, images: Tensor) -> _Scale:
        """The same of some images (b,)."""
        peaks = None if self.peaks is None else self.peaks[images]
        return _Scale(self.template, self.keys[images], self.valid[images], peaks)


def _match_with_effort(scale: _Scale) -> Tensor:
    """The cells (B, T) of images that the usual candidates did not decide."""
    images = len(scale.keys)
    cell = torch.zeros(images, scale.template.shape[1], dtype=torch.long, device=scale.keys.device)
    open_images = torch.arange(images, device=cell.device)
    if scale.peaks is not None:
        (cell,), settled = _match_in_rounds([scale], _EFFORT)
        if settled is None:
            return cell
        open_images = (~settled[0]).nonzero().squeeze(1)
    at_once = max(1, _WHOLE // (2 * cell.shape[1] * scale.valid.shape[1]))  # they are doubles
    for some in open_images.split(at_once):
        cell[some] = _match_in_turn(scale.template, scale.keys[some], scale.valid[some])
    return cell


def _match_in_rounds(
    scales: Sequence[_Scale], effort: int
) -> tuple[list[Tensor], list[Tensor] | None]:
    """The cells (B, T) of each scale by deferred acceptance among some candidates.

    Returns:
        The cells, and None if all are surely right; else of each scale (B,) which images' are.
    """
    counts = [scale.template.shape[1] for scale in scales]
    sizes = [scale.valid.shape[1] for scale in scales]
    offsets = [0, *itertools.accumulate(sizes)]  # a scale's cells follow those of the one before
    cell, settled = _accept(*_preferences(scales, offsets, effort), offsets[-1])
    parts = zip(cell.split(counts, dim=1), offsets[:-1], strict=True)
    chosen = [part - offset if offset else part for part, offset in parts]
    if settled is None:
        return chosen, None
    return chosen, [part.all(dim=1) for part in settled.split(counts, dim=1)]


def _preferences(
    scales: Sequence[_Scale], offsets: Sequence[int], effort: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Each template's candidates, best first, and the value above which a win is surely exact.

    Args:
        scales: what is matched.
        offsets: number of the first cell of each scale, and the number of all.
        effort: times as many candidates as usual.

    Returns:
        Value and cell of the candidates (B, T, L) and the bound (B, T), T the templates of all
        scales. A scale with fewer cells is filled up with cells that do not exist.
    """
    counts = [scale.template.shape[1] for scale in scales]
    length = max(min(effort * _CANDIDATES, scale.valid.shape[1]) for scale in scales)
    found = [
        _candidates(scale, effort, length, offset)
        for scale, offset in zip(scales, offsets, strict=False)
    ]
    value, cells, others, margins = (torch.cat(parts, dim=1) for parts in zip(*found, strict=True))
    # Best first, equal values in the order of their cells, as argmax would take them.
    value, order = value.sort(dim=2, descending=True, stable=True)
    # A win is exact if no cell taken before could beat it at its lowered value, and if it surely
    # beats those that are no candidates (known in single precision only).
    best = value[:, :, 0]
    peaks = [part.amax(dim=1, keepdim=True).expand_as(part) for part in best.split(counts, dim=1)]
    bound = torch.maximum(best - torch.cat(peaks, dim=1), others)
    return value, cells.gather(2, order), torch.add(bound, margins, alpha=1e-5)


def _candidates(
    scale: _Scale, effort: int, length: int, offset: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Each template's most similar cells by single precision, in the order of their numbers.

    Args:
        scale: what is matched.
        effort: times as many candidates as usual.
        length: L; if there are fewer, the first cell is repeated as one that does not exist.
        offset: added to the numbers of the cells.

    Returns:
        The similarities (B, T, L) in double precision, -inf where a cell does not exist, the cells
        (B, T, L), the largest similarity that another cell can have (B, T), and the largest length
        of a template times that of a key (B, T), to which errors of rounding are proportional.
    """
    template, keys = scale.template, scale.keys
    images, dim, cells = keys.shape
    templates, count = template.shape[1], min(effort * _CANDIDATES, cells)
    absent = scale.valid.log()  # 0 where a cell exists, -inf where it does not
    table = keys.transpose(1, 2).reshape(-1, dim)  # a row for each cell of each image
    start = torch.arange(0, images * cells, cells, device=keys.device)[:, None, None]
    if scale.peaks is None:
        rows = template.T.expand(images, -1, -1)  # (B, T, D)
        rough, cell = _largest(torch.baddbmm(absent[:, None], rows, keys), count)
        other = rough[:, :, -1] if count < cells else torch.full_like(rough[:, :, -1], -torch.inf)
    else:
        peak, slices = _largest(scale.peaks, effort * _SLICES)  # (B, T, S) each
        inside = torch.arange(_SLICE, device=keys.device)
        some = (slices[..., None] * _SLICE + inside).flatten(2)  # (B, T, S*_SLICE)
        if cells % _SLICE:  # what fills no slice
            rest = torch.arange(cells - cells % _SLICE, cells, device=keys.device)
            some = torch.cat([some, rest.expand(images, templates, -1)], dim=2)
        some = some + start
        column = template.T.expand(images, -1, -1).reshape(-1, dim, 1)  # (B*T, D, 1)
        similarity = torch.bmm(F.embedding(some, table).flatten(0, 1), column).view_as(some)
        rough, order = similarity.add_(absent.take(some)).topk(count, dim=2)
        cell = some.gather(2, order) - start
        other = torch.maximum(peak[:, :, -1], rough[:, :, -1])
    cell = cell.sort(dim=2).values
    index = cell + start
    there = absent.take(index)
    if count < length:
        index = F.pad(index, (0, length - count))
        cell = F.pad(cell, (0, length - count))
        there = F.pad(there, (0, length - count), value=-torch.inf)
    longest = template.norm(dim=0).amax() * keys.norm(dim=1).amax(dim=1, keepdim=True)  # (B, 1)
    wide = torch.float32 if keys.is_mps else torch.float64  # MPS has no double precision
    # Not a matrix product: that sums the last few rows of an odd number in another order, and equal
    # cells would differ.
    exact = F.embedding(index, table).to(wide).mul_(template.T[:, None].to(wide)).sum(dim=3)
    return exact.add_(there), cell + offset, other, longest.expand(-1, templates)


def _peaks(template: Tensor, keys: Tensor, valid: Tensor) -> Tensor:
    """Largest similarity in each slice of ``_SLICE`` cells, (B, T, P // _SLICE).

    -inf where none of the cells exists; where some do not, it may be too large.

    Where all similarities would fill gigabytes, the loop is over pieces that use the same memory in
    turn. On a processor they are small, because to write and read the similarities outside its
    cache takes longer than to compute them, and of one image, because cells that do not exist come
    last and are left out.
    """
    images, _, cells = keys.shape
    templates, slices = template.shape[1], cells // _SLICE
    some = valid[:, : slices * _SLICE].unflatten(1, (slices, _SLICE)).any(dim=2)  # (B, slices)
    together, at_once, ends = images, _WHOLE, [slices]
    if images * templates * cells > _MANY and keys.device.type in _CACHED:
        together, at_once = 1, _PIECE
        ends = (some * torch.arange(1, slices + 1)).amax(dim=1).tolist()
    step = min(slices, max(1, at_once // (together * templates * _SLICE)))
    # Cells as rows and templates as columns: the largest of a slice is then one of whole rows.
    column = template.expand(together, -1, -1)  # (b, D, T)
    memory = keys.new_empty(together, step, _SLICE, templates)
    product = memory.flatten(1, 2)
    peaks = keys.new_empty(images, templates, slices)
    of_images = (keys.transpose(1, 2), some.log()[..., None], peaks.transpose(1, 2))
    for row, absent, peak, end in zip(*(x.split(together) for x in of_images), ends, strict=True):
        pieces = (
            row[:, : end * _SLICE].split(step * _SLICE, dim=1),
            absent[:, :end].split(step, dim=1),
            peak[:, :end].split(step, dim=1),
        )
        for r, a, out in zip(*pieces, strict=True):
            n = out.shape[1]
            value, flat = (
                (memory, product) if n == step else (memory[:, :n], product[:, : n * _SLICE])
            )
            torch.bmm(r, column, out=flat)  # (b, n * _SLICE, T)
            torch.add(value.amax(dim=2), a, out=out)
        if end < slices:
            peak[:, end:] = -torch.inf
    return peaks


def _largest(values: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """``values.topk(count, dim=2)`` of (B, T, P), for the same values in a fraction of the time.

    The ``count`` largest lie in the ``count`` blocks with the largest maxima, or in the rest that
    fills no block. Among equal values the choice is free, as it is in topk.
    """
    blocks = values.shape[2] // _BLOCK
    if blocks < 4 * count:
        return values.topk(count, dim=2)
    whole = blocks * _BLOCK
    peaks = values[:, :, :whole].unflatten(2, (blocks, _BLOCK)).amax(dim=3)  # (B, T, blocks)
    block = peaks.topk(count, dim=2, sorted=False).indices  # (B, T, count)
    inside = torch.arange(_BLOCK, device=values.device)
    index = (block[..., None] * _BLOCK + inside).flatten(2)  # (B, T, count * _BLOCK)
    if whole < values.shape[2]:
        rest = torch.arange(whole, values.shape[2], device=values.device)
        index = torch.cat([index, rest.expand(*index.shape[:2], -1)], dim=2)
    largest, order = values.gather(2, index).topk(count, dim=2)
    return largest, index.gather(2, order)


def _accept(value: Tensor, cell: Tensor, bound: Tensor, none: int) -> tuple[Tensor, Tensor | None]:
    """Rounds of asking and turning down.

    Args:
        value, cell, bound: of the templates' candidates, as of ``_preferences``.
        none: number of a cell that no template can want.

    Returns:
        The cell that each template got, int64 (B, T), and None if all are surely the right ones;
        else (B, T), False where that is not known.
    """
    # A template that ran out of candidates asks for a cell that has no value.
    images, templates, candidates = cell.shape
    length = max(candidates, sum(_ROUNDS)) + 1
    value = F.pad(value, (0, length - candidates), value=-torch.inf)
    cell = F.pad(cell, (0, length - candidates), value=none)
    number = torch.arange(templates, device=cell.device).expand(images, -1)
    at = torch.arange(0, images * templates * length, length, device=cell.device).view(images, -1)
    holder = torch.full((images, none + 1), templates, device=cell.device)
    for rounds in _ROUNDS:
        for _ in range(rounds):
            wish = cell.take(at)
            holder.scatter_reduce_(1, wish, number, "amin")
            refused = holder.gather(1, wish) < number
            at += refused
        settled = (value.take(at) > bound) & ~refused
        done = bool(settled.all())
        if done:
            break
    return cell.take(at), None if done else settled


def _match_in_turn(template: Tensor, keys: Tensor, valid: Tensor) -> Tensor:
    """The published rule as it stands, template by template, all images at once."""
    wide = torch.float32 if keys.is_mps else torch.float64
    # Filled up to round numbers: a product adds in another order at the edges of its blocks, and
    # equal cells would differ by a rounding.
    cells, templates = keys.shape[2], template.shape[1]
    rows = F.pad(template.to(wide).T, (0, 0, 0, -templates % _BLOCK))
    columns = F.pad(keys.to(wide), (0, -cells % _BLOCK))
    similarity = (rows @ columns)[:, :templates, :cells]  # (B, T, P)
    similarity.masked_fill_(~valid[:, None, :], -torch.inf)
    peak = similarity.amax(dim=(1, 2))[:, None, None]
    chosen = []
    for t in range(template.shape[1]):
        cell = similarity[:, t].argmax(dim=1)[:, None]  # (B, 1)
        chosen.append(cell)
        at = cell[:, None, :].expand(-1, template.shape[1], 1)
        similarity.scatter_(2, at, similarity.gather(2, at) - peak)
    return torch.cat(chosen, dim=1)


@dataclass(frozen=True)
class Patches:
    """The patches of one scale: for each image, class and rank a place, seen in both views.

    Attributes:
        query, key: (B, C*K) index into the flattened map of view q and of view k.
        purity: (C, K), summing to 1 for each class.
    """

    query: Tensor
    key: Tensor
    purity: Tensor


def sample_patches(
    keys: Sequence[Tensor],
    places: Sequence[Correspondence],
    labels: Sequence[Tensor],
    noise: Sequence[Tensor],
    templates: Sequence[int],
) -> list[Patches]:
    """Choose in the annotated image (number 0 of the batch) and match in all others.

    Args, each with an entry for every scale:
        keys: (B, D, P) key embeddings at the cells of each image (zero or anything in padding), or
            numbers with the same inner products; D may differ from scale to scale.
        places: where the P cells lie in both maps.
        labels: (C, h'*w') of the annotated image, see ``label_at``.
        noise: (C, h'*w') uniform in [0, 1).
        templates: K.

    Returns:
        The patches of all B images, of every scale.
    """
    keys = [key.detach().float() for key in keys]
    own, purities = zip(*map(choose, labels, noise, templates), strict=True)  # (C, K) each
    cells = [cell.view(1, -1) for cell in own]  # (1, T)
    if len(keys[0]) > 1:
        template = [key[0].T[cell[0]].T for key, cell in zip(keys, cells, strict=True)]  # (D, T)
        others = match(template, [key[1:] for key in keys], [p.valid[1:] for p in places])
        cells = [torch.cat(pair) for pair in zip(cells, others, strict=True)]  # (B, T)
    return [
        Patches(place.query.gather(1, cell), place.key.gather(1, cell), purity)
        for place, cell, purity in zip(places, cells, purities, strict=True)
    ]
