"""The paper's contribution: choosing pure patches in the annotated image, matching them elsewhere.

A *cell* is a place of the grid that the two views share (see ``pscl.geometry.correspond``). In the
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

from pscl.geometry import Correspondence, ViewGeometry, resize

CELLS = 256  # numbers of cells are rounded up to a multiple of it, _BLOCK * _SLICE: no rest is left
_CANDIDATES = 64  # best of a template that take part in the rounds, <= _SLICES * _SLICE, <= CELLS
_SLICES = 32  # slices of each template whose cells may be candidates
_EFFORT = 4  # times as many of both for images that those did not decide
_BLOCK = 32  # neighbours whose largest stands for them while the largest of many are looked for
_SLICE = 8  # neighbouring cells of which only the largest similarity is kept at first
_HELD = 12 * 2**20  # similarities that are kept and searched, 48 MiB; of more each slice's largest
_WHOLE = 32 * 2**20  # similarities computed at once, 128 MiB
_PIECE = 3 * 2**20  # similarities of a piece for a cache, 12 MiB
_CACHED = ("cpu",)  # devices that gain by such pieces; on others few large calls are better
_FEW = 128  # templates up to which no device does
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
    templates: Sequence[Tensor],
    keys: Sequence[Tensor],
    valid: Sequence[Tensor],
    unit: bool = False,
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
        keys: (B, D, P) of each scale, copied unless P is a multiple of ``CELLS`` and the D numbers
            of a cell lie together in memory.
        valid: (B, P) of each scale, whether a cell exists in the image; there is at least one.
        unit: whether templates and keys are known to be no longer than 1, and need no measuring.

    Returns:
        The cell of each template, int64 (B, T), of each scale.
    """
    scales = [_Scale.of(*scale, unit) for scale in zip(templates, keys, valid, strict=True)]
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
        template, keys, valid: see ``match``; the number of cells is a multiple of ``CELLS``.
        reach: (B, 1), the largest length of a template times that of a key, to which
            errors of rounding are proportional.
        peaks: of ``_peaks``, None where every similarity is looked at.
    """

    template: Tensor
    keys: Tensor
    valid: Tensor
    reach: Tensor
    peaks: Tensor | None

    @classmethod
    def of(cls, template: Tensor, keys: Tensor, valid: Tensor, unit: bool) -> _Scale:
        """With the peaks, if they are of use."""
        missing = -valid.shape[1] % CELLS
        if missing:
            keys, valid = F.pad(keys, (0, missing)), F.pad(valid, (0, missing))
        if unit:
            reach = template.new_ones(len(keys), 1)
        else:
            reach = template.norm(dim=0).amax() * keys.norm(dim=1).amax(dim=1, keepdim=True)
        similarities = len(keys) * valid.shape[1] * template.shape[1]
        few = similarities <= _HELD or valid.shape[1] <= 4 * _EFFORT * _SLICES * _SLICE
        return cls(template, keys, valid, reach, None if few else _peaks(template, keys, valid))

    def some(self, images: Tensor) -> _Scale:
        """The same of some images (b,)."""
        peaks = None if self.peaks is None else self.peaks[images]
        own = self.keys[images], self.valid[images], self.reach[images]
        return _Scale(self.template, *own, peaks)


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
        scales.
    """
    counts = [scale.template.shape[1] for scale in scales]
    found = [
        _candidates(scale, effort, offset) for scale, offset in zip(scales, offsets, strict=False)
    ]
    value, cells, others, reach = (torch.cat(parts, dim=1) for parts in zip(*found, strict=True))
    # Best first, equal values in the order of their cells, as argmax would take them.
    value, order = value.sort(dim=2, descending=True, stable=True)
    # A win is exact if no cell taken before could beat it at its lowered value, and if it surely
    # beats those that are no candidates (known in single precision only).
    best = value[:, :, 0]
    peaks = [part.amax(dim=1, keepdim=True).expand_as(part) for part in best.split(counts, dim=1)]
    bound = torch.maximum(best - torch.cat(peaks, dim=1), others)
    return value, cells.gather(2, order), torch.add(bound, reach, alpha=1e-5)


def _candidates(scale: _Scale, effort: int, offset: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Each template's most similar cells by single precision, in the order of their numbers.

    Args:
        scale: what is matched.
        effort: times as many candidates as usual.
        offset: added to the numbers of the cells.

    Returns:
        The similarities (B, T, L) in double precision, -inf where a cell does not exist, the cells
        (B, T, L), the largest similarity that another cell can have (B, T), and the reach (B, T).
    """
    template, keys = scale.template, scale.keys
    images, dim, cells = keys.shape
    templates, count = template.shape[1], effort * _CANDIDATES
    absent = scale.valid.log()  # 0 where a cell exists, -inf where it does not
    table = keys.transpose(1, 2).reshape(-1, dim)  # a row for each cell of each image
    if scale.peaks is None:
        rows = template.T.expand(images, -1, -1)  # (B, T, D)
        rough, cell = _largest(torch.baddbmm(absent[:, None], rows, keys), count)
        other = rough[:, :, -1]
    else:
        peak, slices = _largest(scale.peaks, effort * _SLICES)  # (B, T, S) each
        start = torch.arange(0, len(table) // _SLICE, cells // _SLICE, device=keys.device)
        index = slices + start[:, None, None]
        there = F.embedding(index, absent.reshape(-1, _SLICE)).flatten(2)  # (B, T, S*_SLICE)
        some = F.embedding(index, table.reshape(-1, _SLICE * dim)).view(-1, there.shape[2], dim)
        column = template.T.expand(images, -1, -1).reshape(-1, dim, 1)  # (B*T, D, 1)
        similarity = torch.bmm(some, column).view_as(there)
        del some  # large
        rough, order = similarity.add_(there).topk(count, dim=2)
        inside = torch.arange(_SLICE, device=keys.device)
        cell = torch.add(inside, slices[..., None], alpha=_SLICE).flatten(2).gather(2, order)
        other = torch.maximum(peak[:, :, -1], rough[:, :, -1])
    cell = cell.sort(dim=2).values
    index = cell + torch.arange(0, len(table), cells, device=keys.device)[:, None, None]
    wide = torch.float32 if keys.is_mps else torch.float64  # MPS has no double precision
    # Not a matrix product: that sums the last few rows of an odd number in another order, and equal
    # cells would differ.
    exact = F.embedding(index, table).to(wide).mul_(template.T[:, None].to(wide)).sum(dim=3)
    exact += absent.take(index)
    return exact, cell.add_(offset), other, scale.reach.expand(-1, templates)


def _peaks(template: Tensor, keys: Tensor, valid: Tensor) -> Tensor:
    """Largest similarity in each slice of ``_SLICE`` cells, (B, T, P / _SLICE).

    -inf where none of the cells exists; where some do not, it may be too large.

    Where all similarities would fill gigabytes, the loop is over pieces that use the same memory in
    turn. For many templates on a processor they are small, because to write and read the
    similarities outside its cache takes longer than to compute them, and of one image, because
    cells that do not exist come last and are left out.
    """
    images, templates = len(keys), template.shape[1]
    some = valid.unflatten(1, (-1, _SLICE)).any(dim=2)  # (B, slices)
    slices = some.shape[1]
    together, at_once, ends = images, _WHOLE, [slices]
    if templates > _FEW and keys.device.type in _CACHED:
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
        peak.narrow(1, end, slices - end).fill_(-torch.inf)
    return peaks


def _largest(values: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """``values.topk(count, dim=2)`` of (B, T, P), for the same values in a fraction of the time.

    The ``count`` largest lie in the ``count`` blocks with the largest maxima. Among equal values
    the choice is free, as it is in topk.

    Args:
        values: P a multiple of ``_BLOCK``.
        count: how many are wanted.
    """
    blocks = values.shape[2] // _BLOCK
    if blocks < 4 * count:
        return values.topk(count, dim=2)
    peaks = values.unflatten(2, (blocks, _BLOCK)).amax(dim=3)  # (B, T, blocks)
    block = peaks.topk(count, dim=2, sorted=False).indices  # (B, T, count)
    inside = torch.arange(_BLOCK, device=values.device)
    index = torch.add(inside, block[..., None], alpha=_BLOCK).flatten(2)  # (B, T, count * _BLOCK)
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
    # Filled up to a round number, as P is: a product adds in another order at the edges of its
    # blocks, and equal cells would differ by a rounding.
    templates = template.shape[1]
    rows = F.pad(template.to(wide).T, (0, 0, 0, -templates % _BLOCK))
    similarity = (rows @ keys.to(wide))[:, :templates]  # (B, T, P)
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
    unit: bool = False,
) -> list[Patches]:
    """Choose in the annotated image (number 0 of the batch) and match in all others.

    Args, each with an entry for every scale:
        keys: (B, D, P) key embeddings at the cells of each image (zero or anything in padding), or
            numbers with the same inner products; D may differ from scale to scale.
        places: where the P cells lie in both maps, see ``match`` on P.
        labels: (C, h'*w') of the annotated image, see ``label_at``.
        noise: (C, h'*w') uniform in [0, 1).
        templates: K.

    And ``unit``, whether all keys are known to be no longer than 1.

    Returns:
        The patches of all B images, of every scale.
    """
    keys = [key.detach().float() for key in keys]
    own, purities = zip(*map(choose, labels, noise, templates), strict=True)  # (C, K) each
    cells = [cell.view(1, -1) for cell in own]  # (1, T)
    if len(keys[0]) > 1:
        template = [key[0].T[cell[0]].T for key, cell in zip(keys, cells, strict=True)]  # (D, T)
        others = match(template, [key[1:] for key in keys], [p.valid[1:] for p in places], unit)
        cells = [torch.cat(pair) for pair in zip(cells, others, strict=True)]  # (B, T)
    return [
        Patches(place.query.gather(1, cell), place.key.gather(1, cell), purity)
        for place, cell, purity in zip(places, cells, purities, strict=True)
    ]
