"""The paper's contribution: choosing pure patches in the annotated image, matching them elsewhere.

A *cell* is a place of the grid that the two views share (see ``utils.geometry.correspond``). In the
annotated image K cells are chosen for each class by its label map; these C*K patches are the
*templates*. Every other image contributes, for each template in turn, its most similar cell, each
cell once. Batched tensor code: the loops are over the few classes and over rounds of conflict
resolution, and the rare case that rounds cannot decide is settled template by template.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from utils.geometry import Correspondence, ViewGeometry, resize

_CANDIDATES = 64  # best cells of each template that take part in the rounds; real images need few
_BLOCK = 32  # cells whose largest similarity stands for them while candidates are looked for
_ROUNDS_PER_CHECK = 8  # rounds between two looks whether all conflicts are resolved


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
    history = label.new_zeros(cells)
    taken = (-label.max()).expand(count)
    values, indices = [], []
    for score in (label + 0.1 * noise).unbind():
        value, index = (score + history).topk(count)
        history.index_add_(0, index, taken)
        values.append(value)
        indices.append(index)
    value, index = torch.stack(values), torch.stack(indices)  # (C, K) each
    if count < templates:
        order = torch.arange(templates, device=label.device) % count
        value, index = value[:, order], index[:, order]
    total = value.sum(dim=1, keepdim=True)
    return index, torch.where(total == 0, 1.0 / templates, value / total)


def match(template: Tensor, keys: Tensor, valid: Tensor) -> Tensor:
    """Give each template in turn its most similar cell; a cell taken becomes unattractive.

    Exactly the published rule: template 0 takes its most similar cell (the first of equals), whose
    similarity is then lowered, for all templates, by the image's largest similarity; template 1
    chooses next, and so on. Similarities are single-precision features' products summed in double
    precision, so that near-ties do not depend on the order of a library's additions.

    As long as no lowered cell can win (checked), this is a serial dictatorship, and deferred
    acceptance gives the same result in few rounds: every template asks for its best candidate that
    has not turned it down, a cell keeps the earliest template that ever asked. Each template's best
    few cells by single precision take part. Images that these do not decide follow the rule
    template by template.

    Args:
        template: (D, T).
        keys: (B, D, P).
        valid: (B, P) whether a cell exists in the image; each image has at least one.

    Returns:
        The cell of each template, int64 (B, T).
    """
    cell, settled = _match_by_rounds(template, keys, valid)
    if not bool(settled.all()):
        open_images = (~settled).nonzero().squeeze(1)
        cell[open_images] = _match_in_turn(template, keys[open_images], valid[open_images])
    return cell


def _match_by_rounds(template: Tensor, keys: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """Deferred acceptance: cells (B, T), and for which images (B,) they are surely exact."""
    cells = valid.shape[1]
    similarity = (template.T @ keys).masked_fill_(~valid[:, None, :], -torch.inf)
    rough, cell = _largest(similarity, min(_CANDIDATES, cells))
    del similarity
    cell, order = cell.sort(dim=2)
    value = _exact_products(template, keys, cell)
    value.masked_fill_(rough.gather(2, order).isinf(), -torch.inf)
    # Best first, equal values in the order of their cells, as argmax would take them.
    value, order = value.sort(dim=2, descending=True, stable=True)
    cell = cell.gather(2, order)
    won, chosen, refused = _accept(value, cell, cells)
    # Exact if all got a cell that no cell taken before could beat at its lowered value, and that
    # surely beats those that are no candidates (known in single precision only).
    error = 1e-5 * template.norm(dim=0).max() * keys.norm(dim=1).amax(dim=1)[:, None]  # (B, 1)
    best = value[:, :, 0]
    exact = ~refused & (won > best - best.amax(dim=1, keepdim=True) + error)
    if cell.shape[2] < cells:
        exact &= won > rough[:, :, -1] + error
    return chosen, exact.all(dim=1)


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


def _accept(value: Tensor, cell: Tensor, cells: int) -> tuple[Tensor, Tensor, Tensor]:
    """Rounds of asking and turning down, until nobody is turned down.

    Args:
        value, cell: (B, T, L) candidates of each template, best first.
        cells: P.

    Returns:
        Value and cell that each template got, and whether it got none (B, T).
    """
    images, templates, count = cell.shape
    number = torch.arange(templates, device=cell.device).expand(images, -1).contiguous()
    # A template that ran out of candidates asks for a cell that is never given: number P.
    cell = torch.nn.functional.pad(cell, (0, _ROUNDS_PER_CHECK), value=cells)
    first = torch.arange(images * templates, device=cell.device).view(images, -1) * cell.shape[2]
    holder = torch.full((images, cells + 1), templates, device=cell.device)
    holder[:, cells] = -1
    rank = torch.zeros_like(number)
    for _ in range(0, templates, _ROUNDS_PER_CHECK):
        at = first + rank
        for _ in range(_ROUNDS_PER_CHECK):
            wish = cell.take(at)
            holder.scatter_reduce_(1, wish, number, "amin")
            refused = holder.gather(1, wish) < number
            at += refused
        rank = (at - first).clamp_(max=count)
        if not refused.any():
            break
    last = rank.clamp(max=count - 1)[:, :, None]
    won, chosen = value.gather(2, last).squeeze(2), cell.gather(2, last).squeeze(2)
    return won, chosen, refused | (rank == count)


def _exact_products(template: Tensor, keys: Tensor, cell: Tensor) -> Tensor:
    """Products of each template with its candidate cells (B, T, L), in double precision."""
    images, templates, count = cell.shape
    index = cell.flatten(1)[:, None, :].expand(-1, keys.shape[1], -1)
    candidate = keys.gather(2, index).view(images, -1, templates, count)  # (B, D, T, L)
    wide = torch.float32 if keys.is_mps else torch.float64  # MPS has no double precision
    return torch.einsum("dt,bdtl->btl", template.to(wide), candidate.to(wide))


def _match_in_turn(template: Tensor, keys: Tensor, valid: Tensor) -> Tensor:
    """The published rule as it stands, template by template, all images at once."""
    wide = torch.float32 if keys.is_mps else torch.float64
    similarity = template.to(wide).T @ keys.to(wide)  # (B, T, P)
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
    keys: Tensor, places: Correspondence, label: Tensor, noise: Tensor, templates: int
) -> Patches:
    """Choose in the annotated image (number 0 of the batch) and match in all others.

    Args:
        keys: (B, D, P) key embeddings at the cells of each image (zero or anything in padding).
        places: where the P cells lie in both maps.
        label: (C, h'*w') of the annotated image, see ``label_at``.
        noise: (C, h'*w') uniform in [0, 1).
        templates: K.

    Returns:
        The patches of all B images.
    """
    keys = keys.detach().float()
    own, purity = choose(label, noise, templates)
    own = own.flatten()[None, :]  # (1, T)
    cells = own
    if len(keys) > 1:
        others = match(keys[0][:, own[0]], keys[1:], places.valid[1:])
        cells = torch.cat([own, others])
    return Patches(places.query.gather(1, cells), places.key.gather(1, cells), purity)
