"""The losses as pure functions in single precision; ``temperature`` divides similarities."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec

import torch
import torch.nn.functional as F
from torch import Tensor

from utils.device import precision
from utils.metrics import IGNORED

P = ParamSpec("P")
SMOOTH = 1e-4  # of the published program: a class that is nowhere is no 0 / 0


def full_precision(loss: Callable[P, Tensor]) -> Callable[P, Tensor]:
    """Compute a loss outside autocast."""

    @wraps(loss)
    def unrounded(*args: P.args, **kwargs: P.kwargs) -> Tensor:
        tensor = next(x for x in (*args, *kwargs.values()) if isinstance(x, Tensor))
        with precision(None, tensor.device):
            return loss(*args, **kwargs)

    return unrounded


@full_precision
def nt_xent(query: Tensor, key: Tensor, temperature: float) -> Tensor:
    """Normalised temperature-scaled cross-entropy of 2B embeddings, mean (Chen 2020, equation 1).

    With one image there is no negative and the loss is 0.

    ``query`` and ``key`` are embeddings (B, D) of the two views, of any length.
    """
    rows = F.normalize(torch.cat([query, key]).float(), dim=1)  # (2B, D)
    logits = (rows @ rows.T / temperature).fill_diagonal_(-torch.inf)  # (2B, 2B)
    target = torch.arange(len(rows), device=rows.device).roll(len(query))
    return F.cross_entropy(logits, target)


@full_precision
def patch_nt_xent(
    query: Tensor,
    key: Tensor,
    temperature: float,
    intra_view_negatives: bool = True,
    admitted: Tensor | None = None,
) -> Tensor:
    """NT-Xent over the patches of one decoder scale, mean (paper, patch loss of PSCL-SimCLR).

    Every patch of both views is a row. Its positive is its correspondent in the other view, its
    negatives are all rows of another class; rows of its own class are neither.

    ``query`` and ``key`` (B, C, K, D) are embeddings of the two views; [b, c, k] of both is one
    place. ``intra_view_negatives``: whether rows of the same image and view may be negatives.
    Of ``admitted`` (B, C, K), bool, which is ours, other places give no row and no negative.
    """
    images, classes, templates, _ = query.shape
    by_class = torch.stack([query.transpose(0, 1), key.transpose(0, 1)], dim=1)
    unit = F.normalize(by_class.float(), dim=-1)  # (C, 2, B, K, D)
    rows = unit.flatten(1, 3)  # (C, N, D), N = 2*B*K
    positive = (unit * unit.flip(1)).sum(dim=-1).flatten(1)  # (C, N): the other view's
    label = torch.arange(classes, device=rows.device)
    other = (label[:, None] + label[1:]) % classes  # (C, C-1): the other classes of each
    logits = rows @ rows[other].flatten(1, 2).mT  # (C, N, (C-1)*N)
    if not intra_view_negatives:
        group = torch.arange(2 * images, device=rows.device).repeat_interleave(templates)  # (N,)
        same = group[:, None] == group.repeat(classes - 1)  # image and view
        logits.masked_fill_(same, -torch.inf)
    if admitted is not None:
        counted = admitted.transpose(0, 1)[:, None].expand(-1, 2, -1, -1).flatten(1)  # (C, N)
        logits.masked_fill_(~counted[other].flatten(1)[:, None], -torch.inf)
    logits = torch.cat([positive[..., None], logits], dim=-1).div_(temperature).flatten(0, 1)
    target = label.new_zeros(len(logits))
    if admitted is None:
        return F.cross_entropy(logits, target)
    each = F.cross_entropy(logits, target, reduction="none") * counted.flatten()
    return each.sum() / counted.sum()


@full_precision
def soft_info_nce(
    query: Tensor,
    key: Tensor,
    queue: Tensor,
    queue_target: Tensor,
    row_weight: Tensor,
    temperature: float,
) -> Tensor:
    """InfoNCE with soft targets over [positive, queue] (paper, losses of PSCL-MoCo), row by row.

    Args:
        query, key: (..., D) unit vectors; the same row of both is a positive pair.
        queue: (Q, D) keys of earlier batches.
        queue_target: (..., Q); that of the positive is 1, their sum is not normalised.
        row_weight: (...) by which a whole row is multiplied.

    Returns:
        (...) cross-entropies; the caller takes the mean.
    """
    query, key, queue = query.float(), key.float(), queue.float()
    positive = (query * key).sum(dim=-1, keepdim=True)  # (..., 1)
    logits = torch.cat([positive, query @ queue.T], dim=-1) / temperature  # (..., 1 + Q)
    log_probability = logits.log_softmax(dim=-1)
    own, others = log_probability[..., 0], log_probability[..., 1:]
    return -row_weight * (own + (queue_target * others).sum(dim=-1))


@full_precision
def info_nce(query: Tensor, key: Tensor, queue: Tensor, temperature: float) -> Tensor:
    """InfoNCE over [positive, queue] with a one-hot target, mean (He 2020, equation 1).

    Rows of ``query`` and ``key``, unit vectors (N, D), are positive pairs; ``queue`` (Q, D) holds
    keys of earlier batches, the negatives of every row.
    """
    query, key, queue = query.float(), key.float(), queue.float()
    positive = (query * key).sum(dim=1, keepdim=True)  # (N, 1)
    logits = torch.cat([positive, query @ queue.T], dim=1) / temperature  # (N, 1 + Q)
    target = torch.zeros(len(query), dtype=torch.long, device=query.device)
    return F.cross_entropy(logits, target)


@full_precision
def dense_info_nce(
    query: Tensor,
    key: Tensor,
    features_q: Tensor,
    features_k: Tensor,
    queue: Tensor,
    temperature: float,
) -> Tensor:
    """InfoNCE of the cells of two views' grids, mean (Wang 2021, equations 2 and 4).

    The positive of a cell of view q is the key of that cell of the same image in view k whose
    features are the most similar by cosine; no gradient flows through this choice.

    Args:
        query, key: (B, D, P) dense projections of the P cells of both views, of any length.
        features_q, features_k: (B, c, P) the backbone's features of the same cells.
        queue: (Q, D) dense keys of earlier images, unit vectors, the negatives of every cell.
    """
    with torch.no_grad():
        unit_q = F.normalize(features_q.float(), dim=1)
        unit_k = F.normalize(features_k.float(), dim=1)
        match = (unit_q.transpose(1, 2) @ unit_k).argmax(dim=2)  # (B, P) cells of view k
    query, key = F.normalize(query.float(), dim=1), F.normalize(key.float(), dim=1)
    positive = key.gather(2, match[:, None].expand_as(key))  # (B, D, P)
    rows_q, rows_k = (x.transpose(1, 2).flatten(0, 1) for x in (query, positive))  # (B*P, D)
    return info_nce(rows_q, rows_k, queue, temperature)


@full_precision
def byol_loss(prediction: Tensor, target: Tensor) -> Tensor:
    """Squared distance of the unit vectors, 2 - 2 cos, mean (Grill 2020, equation 2).

    (B, D) each, of any length: the online network's predictions from one view, the target network's
    projections from the other.
    """
    prediction, target = F.normalize(prediction.float(), dim=1), F.normalize(target.float(), dim=1)
    return (2 - 2 * (prediction * target).sum(dim=1)).mean()


def dice_loss(logits: Tensor, mask: Tensor) -> Tensor:
    """Dice loss per class, averaged over the images (published program).

    From (B, C, H, W) logits and (B, H, W) class ids, without pixels of id ``IGNORED``: (C,) values
    of 1 - 2*(sum(p*t) + SMOOTH) / (sum(p) + sum(t) + SMOOTH). Of a class that an image lacks it
    falls to -1 as the last of its probability does.
    """
    rows = mask.flatten(1)[:, None]  # (B, 1, H*W)
    probability = logits.float().softmax(dim=1).flatten(2) * (rows != IGNORED)  # (B, C, H*W)
    classes = torch.arange(logits.shape[1], device=mask.device)[:, None]
    truth = (rows == classes).float()  # (B, C, H*W); one_hot would wait for a device
    overlap = 2 * ((probability * truth).sum(dim=2) + SMOOTH)
    area = probability.sum(dim=2) + truth.sum(dim=2) + SMOOTH
    return (1 - overlap / area).mean(dim=0)


def supervised_loss(logits: Tensor, mask: Tensor, class_weight: Tensor) -> dict[str, Tensor]:
    """Half weighted cross-entropy, half mean Dice loss without background (published program).

    From (B, C, H, W) logits and (B, H, W) class ids, without pixels of id ``IGNORED``. The
    cross-entropy, with weights (C,), is divided by the number of labelled pixels, not by the sum of
    their weights. Returns ``loss`` and its parts ``cross_entropy`` and ``dice_loss``.
    """
    logits = logits.float()
    total = F.cross_entropy(logits, mask, class_weight, ignore_index=IGNORED, reduction="sum")
    cross_entropy = total / (mask != IGNORED).sum().clamp(min=1)
    dice = dice_loss(logits, mask)[1:].mean()
    loss = 0.5 * cross_entropy + 0.5 * dice
    return {"loss": loss, "cross_entropy": cross_entropy, "dice_loss": dice}
