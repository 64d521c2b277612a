"""Patch sampling: pure patches are chosen in the annotated image and matched in all others.

A *cell* is a place of the grid that the two views share (see ``pscl.geometry.correspond``). In the
annotated image K cells are chosen for each class by its label map; these C*K patches are the
*templates*. Every other image contributes, for each template in turn, its most similar cell, and
none twice while others are similar. Of oblong images that are turned a position of view k can have
several cells, of which each counts by itself.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from pscl.fast_matching import match
from pscl.geometry import Correspondence, ViewGeometry, resize
from utils.ranks.tensors import of_first_rank

VOTES = 5  # cells of the annotated image that a match must find again


def label_at(label: Tensor, geometry: ViewGeometry, rows: int, columns: int) -> Tensor:
    """The warped label (C, H, W) on the cells of a map of ``rows x columns``: (C, h'*w')."""
    return resize(label, geometry.size(rows, columns)).flatten(1)


def choose(label: Tensor, noise: Tensor, templates: int) -> tuple[Tensor, Tensor]:
    """Choose the purest cells of each class in the annotated image.

    For each class in turn, the cells with the largest ``label + 0.1*noise + history``, of equals
    the first; then the history of these cells falls by the maximum of the whole label map, so that
    later classes take other cells while there are any, unless that map is all zero. A crop with
    fewer than K cells gives them all, repeated in order.

    Args:
        label: (C, P) label map, 0 to 255, with fractions where classes meet; all zero for random
            sampling.
        noise: (C, P) uniform in [0, 1).
        templates: K.

    Returns:
        The cells, int64 (C, K), and their purity (C, K): their sums over the class's total of them,
        negative for cells that an earlier class took (published program).
    """
    cells = label.shape[1]
    count = min(templates, cells)
    peak = label.amax().expand(count)
    history = label.new_zeros(cells)
    values, indices = [], []
    for score in label + 0.1 * noise:
        # Not topk, which takes another one of equals on every device: in single precision 255 and a
        # noise of 0.1 have 6,500 different sums, of which some of the largest are always equal.
        order = (score + history).sort(descending=True, stable=True)
        value, index = order.values[:count], order.indices[:count]
        history.index_add_(0, index, peak, alpha=-1)
        values.append(value)
        indices.append(index)
    order = torch.arange(templates, device=label.device) % count
    value, index = torch.stack(values)[:, order], torch.stack(indices)[:, order]  # (C, K) each
    total = value.sum(dim=1, keepdim=True)
    return index, (value / total).masked_fill_(total == 0, 1.0 / templates)


@dataclass(frozen=True)
class Patches:
    """The patches of one scale: (B, C*K) positions in the flattened map of view q and of view k.

    ``purity`` (C, K) sums to 1 for each class. ``admitted`` (B, C, K), bool: which take part in the
    loss; None: all.
    """

    query: Tensor
    key: Tensor
    purity: Tensor
    admitted: Tensor | None = None


def sample_patches(
    keys: Tensor, places: Correspondence, label: Tensor, noise: Tensor, templates: int
) -> Patches:
    """Choose in the annotated image (number 0 of the batch) and match in all others.

    ``keys`` (B, D, P) are key embeddings at the cells of each image, or vectors with the same inner
    products; ``pscl.fast_matching.match`` says which P is fastest. ``label`` and ``noise``
    (C, h'*w') are the annotated image's, as for ``choose``; K is ``templates``. Where several ranks
    share a batch, all have the annotated image, and match with the first one's templates.
    """
    keys = keys.detach().float()
    chosen, purity = choose(label, noise, templates)  # (C, K) each
    cells = chosen.view(1, -1)  # (1, T)
    if len(keys) > 1:
        template = of_first_rank(keys[0].T[cells[0]].T)  # (D, T)
        cells = torch.cat([cells, match(template, keys[1:], places.valid[1:])])  # (B, T)
    return Patches(places.query.gather(1, cells), places.key.gather(1, cells), purity)


def agreed(patches: Patches, seen: Tensor, rows: int, columns: int) -> Tensor:
    """Which patches another observer takes for their template's class, too: bool (B, C, K).

    ``seen`` (B, C, H, W) are its label maps of view k, 0 to 255; a patch shows the class that has
    more than half of its cell in a map of ``rows x columns``. The annotated image's all count.
    """
    shares = resize(seen, (rows, columns)).flatten(2)  # (B, C, P)
    return with_annotated(shares.gather(2, patches.key.view(*shares.shape[:2], -1)) > 127.5)


def found_again(keys: Tensor, annotated: Tensor, valid: Tensor, label: Tensor) -> Tensor:
    """Which patches lead back from other images to their template's class: bool (B, C, K).

    A patch does if the ``VOTES`` cells of the annotated image that are most similar to it, by
    cosine, all show that class: more than half of each by ``label`` (C, P'). ``keys`` (B, D, C*K)
    are vectors of the patches, ``annotated`` (D, P) those of the annotated image's cells, of which
    the first P' may be ``valid`` (P). The annotated image's patches all count.
    """
    count = label.shape[1]
    shown = label.argmax(dim=0).masked_fill(label.amax(dim=0) <= 127.5, -1)  # (P',)
    votes = own_votes(keys, annotated[:, :count], valid[:count], shown, len(label))
    return with_annotated(votes.all(dim=-1))


def sureness(keys: Tensor, annotated: Tensor, valid: Tensor, label: Tensor) -> Tensor:
    """How much more similar patches are to their template's class than to all others: (B, C, K).

    The mean cosine with the ``VOTES`` most similar cells of the annotated image that show that
    class, less the mean with the ``VOTES`` most similar of all others. Arguments and what a cell
    shows as in ``found_again``; where fewer cells show a class, those missing count as -1.
    """
    count, classes = label.shape[1], len(label)
    shown = label.argmax(dim=0).masked_fill(label.amax(dim=0) <= 127.5, -1)  # (P',)
    unit = F.normalize(annotated[:, :count].float(), dim=0)
    similar = (F.normalize(keys.float(), dim=1).mT @ unit).unflatten(1, (classes, -1))
    usable = valid[:count] & (shown >= 0)
    own = shown == torch.arange(classes, device=shown.device)[:, None]  # (C, P')

    def nearest(cells: Tensor) -> Tensor:
        masked = similar.masked_fill(~(cells & usable)[:, None], -1.0)  # (B, C, K, P')
        return masked.topk(min(VOTES, count)).values.mean(dim=-1)

    return nearest(own) - nearest(~own)


def own_votes(
    keys: Tensor, annotated: Tensor, valid: Tensor, shown: Tensor, classes: int
) -> Tensor:
    """Which of the ``VOTES`` nearest annotated cells show a patch's own class: bool (B, C, K, V).

    The most similar one, by cosine, is the first. ``keys`` (B, D, C*K) are vectors of patches,
    ``annotated`` (D, P) those of cells that may be ``valid`` (P) and that show the class ``shown``.
    """
    unit = F.normalize(annotated.float(), dim=0)
    similar = F.normalize(keys.float(), dim=1).mT @ unit  # (B, C*K, P)
    similar.masked_fill_(~valid, -torch.inf)
    votes = shown[similar.topk(min(VOTES, len(shown))).indices].unflatten(1, (classes, -1))
    return votes == torch.arange(classes, device=shown.device)[:, None, None]


def with_annotated(admitted: Tensor) -> Tensor:
    """``admitted`` (B, C, K) and all patches of the annotated image, number 0."""
    first = torch.arange(len(admitted), device=admitted.device) == 0
    return admitted | first[:, None, None]
