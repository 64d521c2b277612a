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

_CANDIDATES = 64  # best cells of each template that take part in the rounds; real images need few
_BLOCK = 32  # neighbours whose largest stands for them while the largest of many are looked for
_WHOLE = 100 * 2**20  # similarities held at once, 400 MiB; of more only the largest of slices
_SLICE = 8  # cells of a slice
_CHUNK = 2**24  # similarities that are computed at once, 64 MiB, to find the largest of slices
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
    few cells by single precision take part. Images that these do not decide follow the rule
    template by template.

    Scales have nothing to do with each other, but share the rounds, which are many small calls.

    Args:
        templates: (D, T) of each scale.
        keys: (B, D, P) of each scale, fastest if the D numbers of a cell lie together in memory.
        valid: (B, P) of each scale, whether a cell exists in the image; there is at least one.

    Returns:
        The cell of each template, int64 (B, T), of each scale.
    """
    scales = list(zip(templates, keys, valid, strict=True))
    chosen, settled = _accept([_preferences(*scale) for scale in scales], valid)
    if settled is None:
        return chosen
    for (template, key, there), cell, of_scale in zip(scales, chosen, settled, strict=True):
        open_images = (~of_scale.all(dim=1)).nonzero().squeeze(1)
        at_once = max(1, _WHOLE // (2 * cell.shape[1] * there.shape[1]))  # they are doubles
        for some in open_images.split(at_once) if len(open_images) else ():
            cell[some] = _match_in_turn(template, key[some], there[some])
    return chosen


def _preferences(template: Tensor, keys: Tensor, valid: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Each template's candidates, best first, and the value above which a win is surely exact.

    Returns:
        Value and cell of the candidates (B, T, L) and the bound (B, T).
    """
    cells = valid.shape[1]
    absent = valid.log()  # 0 where a cell exists, -inf where it does not
    rough, cell = _candidates(template, keys, absent, min(_CANDIDATES, cells))
    cell = cell.sort(dim=2).values
    value = _products(template, keys, absent, cell, exact=True)
    # Best first, equal values in the order of their cells, as argmax would take them.
    value, order = value.sort(dim=2, descending=True, stable=True)
    # A win is exact if no cell taken before could beat it at its lowered value, and if it surely
    # beats those that are no candidates (known in single precision only).
    best = value[:, :, 0]
    bound = best - best.amax(dim=1, keepdim=True)
    if cell.shape[2] < cells:
        bound = torch.maximum(bound, rough[:, :, -1])
    length = template.norm(dim=0).amax() * keys.norm(dim=1).amax(dim=1, keepdim=True)  # (B, 1)
    return value, cell.gather(2, order), torch.add(bound, length, alpha=1e-5)


def _candidates(
    template: Tensor, keys: Tensor, absent: Tensor, count: int
) -> tuple[Tensor, Tensor]:
    """Each template's ``count`` most similar cells in single precision.

    Args:
        template, keys: see ``match``.
        absent: (B, P) 0, or -inf for cells that do not exist; added to similarities.
        count: L.

    Returns:
        Similarity, best first, and cell (B, T, L).
    """
    images, _, cells = keys.shape
    if images * template.shape[1] * cells <= _WHOLE:
        rows = template.T.expand(images, -1, -1)  # (B, T, D)
        return _largest(torch.baddbmm(absent[:, None], rows, keys), count)
    # The matrix of all similarities would fill memory; only the largest of each slice is kept, and
    # the slices that may hold one of the best cells are computed again.
    strides = cells // _SLICE
    peaks = _peaks(template, keys, absent, strides)
    slices = _largest(peaks, min(count, strides))[1]  # (B, T, count)
    inside = torch.arange(0, _SLICE * strides, strides, device=keys.device)
    cell = (slices[..., None] + inside).flatten(2)  # (B, T, count * _SLICE)
    rest = torch.arange(_SLICE * strides, cells, device=keys.device)
    cell = torch.cat([cell, rest.expand(*cell.shape[:2], -1)], dim=2)
    rough, order = _products(template, keys, absent, cell, exact=False).topk(count, dim=2)
    return rough, cell.gather(2, order)


def _peaks(template: Tensor, keys: Tensor, absent: Tensor, strides: int) -> Tensor:
    """Largest similarity in each slice of ``_SLICE`` cells, (B, T, strides).

    Slice j holds the cells j, j + strides, j + 2*strides, ... The loop is over chunks of slices,
    of which only the similarities of one are held at a time: those of all would fill gigabytes,
    and memory that is used again and again is several times as fast as so much of it.
    """
    images, _, _ = keys.shape
    templates, whole = template.shape[1], _SLICE * strides
    # ``absent`` is added by the product itself: one more number of each cell, times one.
    key = keys[:, :, :whole].unflatten(2, (_SLICE, strides)).permute(0, 2, 3, 1)
    absent = absent[:, :whole].unflatten(1, (_SLICE, strides))[..., None]
    rows = F.pad(template.T, (0, 1), value=1.0).expand(images * _SLICE, -1, -1)
    chunk = max(1, _CHUNK // (images * _SLICE * templates))
    peaks = []
    for pair in zip(key.split(chunk, dim=2), absent.split(chunk, dim=2), strict=True):
        columns = torch.cat(pair, dim=3).flatten(0, 1).transpose(1, 2)  # (B*_SLICE, D + 1, n)
        value = torch.bmm(rows, columns)  # (B*_SLICE, T, n)
        peaks.append(value.unflatten(0, (images, _SLICE)).amax(dim=1))
    return torch.cat(peaks, dim=2)


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
    rest = torch.arange(whole, values.shape[2], device=values.device)
    index = torch.cat([index, rest.expand(*index.shape[:2], -1)], dim=2)
    largest, order = values.gather(2, index).topk(count, dim=2)
    return largest, index.gather(2, order)


def _accept(
    preferences: Sequence[tuple[Tensor, Tensor, Tensor]], valid: Sequence[Tensor]
) -> tuple[list[Tensor], list[Tensor] | None]:
    """Rounds of asking and turning down, of all scales at once.

    Args:
        preferences: of each scale the value and cell (B, T, L) of its templates' candidates, best
            first, and the bound (B, T), as of ``_preferences``.
        valid: (B, P) of each scale.

    Returns:
        The cell that each template got, int64 (B, T), of each scale, and None if all are surely
        the right ones; else (B, T) of each scale, False where that is not known.
    """
    counts = [bound.shape[1] for _, _, bound in preferences]
    sizes = [there.shape[1] for there in valid]
    offsets = [0, *itertools.accumulate(sizes)]  # a scale's cells follow those of the one before
    # A template that ran out of candidates asks for a cell that has no value.
    length, none = max(_CANDIDATES, sum(_ROUNDS)) + 1, offsets.pop()
    value = _joined([v for v, _, _ in preferences], length, -torch.inf)
    moved = zip(preferences, offsets, strict=True)
    cell = _joined([c + offset if offset else c for (_, c, _), offset in moved], length, none)
    bound = torch.cat([b for _, _, b in preferences], dim=1)
    images, templates = bound.shape
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
    wish = cell.take(at).split(counts, dim=1)
    got = [c - offset if offset else c for c, offset in zip(wish, offsets, strict=True)]
    return got, None if done else list(settled.split(counts, dim=1))


def _joined(parts: Sequence[Tensor], length: int, value: float) -> Tensor:
    """Join (B, T, L) of several scales to (B, all T, length), filled up with a value."""
    filled = [F.pad(part, (0, length - part.shape[2]), value=value) for part in parts]
    return torch.cat(filled, dim=1)


def _products(
    template: Tensor, keys: Tensor, absent: Tensor, cell: Tensor, *, exact: bool
) -> Tensor:
    """Products of each template with some cells, and ``absent`` added.

    Args:
        template, keys, absent: see ``_candidates``.
        cell: (B, T, L).
        exact: in double precision, and such that equal cells have equal products.

    Returns:
        (B, T, L).
    """
    images, dim, cells = keys.shape
    index = cell + torch.arange(0, images * cells, cells, device=cell.device)[:, None, None]
    row = F.embedding(index, keys.transpose(1, 2).reshape(-1, dim))  # (B, T, L, D)
    if exact:
        wide = torch.float32 if keys.is_mps else torch.float64  # MPS has no double precision
        # Not a matrix product: that sums the last few rows of an odd number in another order.
        product = (row.to(wide) * template.T[None, :, None].to(wide)).sum(dim=3)
    else:
        column = template.T.expand(images, -1, -1).reshape(-1, dim, 1)  # (B*T, D, 1)
        product = torch.bmm(row.flatten(0, 1), column).view_as(index)
    return product.add_(absent.take(index))


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
        keys: (B, D, P) key embeddings at the cells of each image (zero or anything in padding).
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
        template = [key[0].index_select(1, cell[0]) for key, cell in zip(keys, cells, strict=True)]
        others = match(template, [key[1:] for key in keys], [p.valid[1:] for p in places])
        cells = [torch.cat(pair) for pair in zip(cells, others, strict=True)]  # (B, T)
    return [
        Patches(place.query.gather(1, cell), place.key.gather(1, cell), purity)
        for place, cell, purity in zip(places, cells, purities, strict=True)
    ]
