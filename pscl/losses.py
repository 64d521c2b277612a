"""The losses as pure functions: tensors in, a scalar out, always in single precision."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from utils.metrics import IGNORED


def nt_xent(query: Tensor, key: Tensor, temperature: float) -> Tensor:
    """Normalised temperature-scaled cross-entropy over 2B embeddings (Chen 2020, equation 1).

    Args:
        query, key: (B, D) embeddings of the two views, any length; row i of both is one image.
        temperature: divides the cosine similarities.

    Returns:
        The mean over the 2B rows. With one image there is no negative and the loss is 0.
    """
    rows = F.normalize(torch.cat([query, key]).float(), dim=1)  # (2B, D)
    logits = (rows @ rows.T / temperature).fill_diagonal_(-torch.inf)  # (2B, 2B)
    target = torch.arange(len(rows), device=rows.device).roll(len(query))
    return F.cross_entropy(logits, target)


def patch_nt_xent(
    query: Tensor, key: Tensor, temperature: float, intra_view_negatives: bool = True
) -> Tensor:
    """NT-Xent over the patches of one decoder scale (paper, patch loss of PSCL-SimCLR).

    Every patch of both views is a row. Its positive is its correspondent in the other view, its
    negatives are all rows of another class; rows of its own class are neither.

    Args:
        query, key: (B, C, K, D) patch embeddings of the two views; [b, c, k] of both is one place.
        temperature: divides the cosine similarities.
        intra_view_negatives: whether rows of the same image and view may be negatives.

    Returns:
        The mean cross-entropy over the 2*B*C*K rows.
    """
    by_class = torch.stack([query.transpose(0, 1), key.transpose(0, 1)], dim=1).float()
    unit = F.normalize(by_class, dim=-1)  # (C, 2, B, K, D)
    with torch.autocast(unit.device.type, enabled=False):
        loss: Tensor = _PatchNTXent.apply(unit, temperature, intra_view_negatives)
    return loss


class _PatchNTXent(torch.autograd.Function):
    """The cross-entropy of ``patch_nt_xent`` on unit vectors (C, 2, B, K, D).

    Written by hand because the matrix of similarities grows with the square of the patches:
    automatic differentiation would keep several of its size, in many calls; here one is changed
    in place into the logits, their softmax and the gradient.
    """

    @staticmethod
    def forward(ctx: Any, unit: Tensor, temperature: float, intra_view_negatives: bool) -> Tensor:
        """The loss; keeps the gradient of the logits."""
        classes, _, images, templates, dim = unit.shape
        rows = unit.view(-1, dim)  # (N, D), N = C*2*B*K
        # The columns are those rows with the views swapped: the diagonal is the positives.
        columns = unit.flip(1).view(-1, dim)
        logits = (rows @ columns.T).div_(temperature)  # (N, N)
        positive = logits.diagonal().clone()
        size = len(rows) // classes
        logits.view(classes, size, classes, size).diagonal(dim1=0, dim2=2).fill_(-torch.inf)
        if not intra_view_negatives:
            group = logits.view(classes, 2, images, templates, classes, 2, images, templates)
            for view in (0, 1):  # the image and the view of a row are those of a column
                same = group[:, view, :, :, :, 1 - view]
                same.diagonal(dim1=1, dim2=4).fill_(-torch.inf)
        diagonal = logits.diagonal()
        diagonal.copy_(positive)
        peak = logits.amax(dim=1, keepdim=True)
        total = logits.sub_(peak).exp_().sum(dim=1, keepdim=True)  # (N, 1)
        logits.div_(total)
        diagonal.sub_(1)
        ctx.save_for_backward(rows, columns, logits)
        ctx.shape, ctx.scale = unit.shape, 1 / (temperature * len(rows))
        return (total.log_().add_(peak).squeeze(1) - positive).mean()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        """A unit vector is a row, and with its view swapped a column."""
        rows, columns, slope = ctx.saved_tensors
        of_row = (slope @ columns).view(ctx.shape)
        of_column = (slope.T @ rows).view(ctx.shape).flip(1)
        return (of_row + of_column) * (grad * ctx.scale), None, None


def soft_info_nce(
    query: Tensor,
    key: Tensor,
    queue: Tensor,
    queue_target: Tensor,
    row_weight: Tensor,
    temperature: float,
) -> Tensor:
    """InfoNCE with soft targets over [positive, queue] (paper, losses of PSCL-MoCo), row by row.

    The targets are not normalised: the positive has 1, each queue entry what ``queue_target`` says,
    and the whole row is multiplied by ``row_weight``.

    Args:
        query, key: (..., D) unit vectors; the same row of both is a positive pair.
        queue: (Q, D) keys of earlier batches.
        queue_target: (..., Q) soft targets of the queue's entries, broadcast over the rows.
        row_weight: (...), broadcast over the rows.
        temperature: divides the similarities.

    Returns:
        (...) cross-entropies; the caller takes the mean.
    """
    query, key, queue = query.float(), key.float(), queue.float()
    positive = (query * key).sum(dim=-1, keepdim=True)  # (..., 1)
    logits = torch.cat([positive, query @ queue.T], dim=-1) / temperature  # (..., 1 + Q)
    log_probability = logits.log_softmax(dim=-1)
    own, others = log_probability[..., 0], log_probability[..., 1:]
    return -row_weight * (own + (queue_target * others).sum(dim=-1))


def info_nce(query: Tensor, key: Tensor, queue: Tensor, temperature: float) -> Tensor:
    """InfoNCE over [positive, queue] with a one-hot target (He 2020, equation 1).

    Args:
        query, key: (N, D) unit vectors; the same row of both is a positive pair.
        queue: (Q, D) keys of earlier batches, the negatives of every row.
        temperature: divides the similarities.

    Returns:
        The mean cross-entropy over the N rows.
    """
    query, key, queue = query.float(), key.float(), queue.float()
    positive = (query * key).sum(dim=1, keepdim=True)  # (N, 1)
    negative = query @ queue.T  # (N, Q)
    logits = torch.cat([positive, negative], dim=1) / temperature  # (N, 1 + Q)
    target = torch.zeros(len(query), dtype=torch.long, device=query.device)
    return F.cross_entropy(logits, target)


def dense_info_nce(
    query: Tensor,
    key: Tensor,
    features_q: Tensor,
    features_k: Tensor,
    queue: Tensor,
    temperature: float,
) -> Tensor:
    """InfoNCE of the cells of two views' grids (Wang 2021, equations 2 and 4).

    The positive of a cell of view q is the key of that cell of view k, of the same image, whose
    features are the most similar by cosine. Which one that is carries no gradient.

    Args:
        query, key: (B, D, P) dense projections of the P cells of both views, of any length.
        features_q, features_k: (B, c, P) the backbone's features of the same cells.
        queue: (Q, D) dense keys of earlier images, unit vectors, the negatives of every cell.
        temperature: divides the similarities.

    Returns:
        The mean cross-entropy over the B*P cells of view q.
    """
    with torch.no_grad():
        unit_q = F.normalize(features_q.float(), dim=1)
        unit_k = F.normalize(features_k.float(), dim=1)
        match = (unit_q.transpose(1, 2) @ unit_k).argmax(dim=2)  # (B, P) cells of view k
    query, key = F.normalize(query.float(), dim=1), F.normalize(key.float(), dim=1)
    positive = key.gather(2, match[:, None].expand_as(key))  # (B, D, P)
    rows_q, rows_k = (x.transpose(1, 2).flatten(0, 1) for x in (query, positive))  # (B*P, D)
    return info_nce(rows_q, rows_k, queue, temperature)


def byol_loss(prediction: Tensor, target: Tensor) -> Tensor:
    """Squared distance of the unit vectors, 2 - 2 cos (Grill 2020, equation 2).

    Args:
        prediction: (B, D) of the online network from one view, of any length.
        target: (B, D) projections of the target network from the other view.

    Returns:
        The mean over the B rows, from 0 to 4.
    """
    prediction, target = F.normalize(prediction.float(), dim=1), F.normalize(target.float(), dim=1)
    return (2 - 2 * (prediction * target).sum(dim=1)).mean()


def dice_loss(logits: Tensor, mask: Tensor, smooth: float = 1e-4) -> Tensor:
    """Dice loss per class, averaged over the images (published program).

    Args:
        logits: (B, C, H, W).
        mask: (B, H, W) class ids; pixels of id ``IGNORED`` are left out.
        smooth: added to the doubled intersection and to the sum of the areas.

    Returns:
        (C,) values of 1 - (2*sum(p*t) + smooth) / (sum(p) + sum(t) + smooth).
    """
    labelled = (mask != IGNORED).flatten(1)[:, None]  # (B, 1, H*W)
    probability = logits.float().softmax(dim=1).flatten(2) * labelled  # (B, C, H*W)
    classes = F.one_hot(mask.where(mask != IGNORED, 0), logits.shape[1])  # (B, H, W, C)
    truth = classes.movedim(-1, 1).flatten(2).float() * labelled  # (B, C, H*W)
    overlap = 2 * (probability * truth).sum(dim=2) + smooth
    area = probability.sum(dim=2) + truth.sum(dim=2) + smooth
    return (1 - overlap / area).mean(dim=0)


def supervised_loss(logits: Tensor, mask: Tensor, class_weight: Tensor) -> dict[str, Tensor]:
    """Half weighted cross-entropy, half mean Dice loss without background (published program).

    Args:
        logits: (B, C, H, W).
        mask: (B, H, W) class ids 0 to C-1; pixels of id ``IGNORED`` are left out.
        class_weight: (C,) weights of the cross-entropy, which is divided by the number of labelled
            pixels.

    Returns:
        ``loss`` and its parts ``cross_entropy`` and ``dice``.
    """
    total = F.cross_entropy(
        logits.float(), mask, class_weight, ignore_index=IGNORED, reduction="sum"
    )
    cross_entropy = total / (mask != IGNORED).sum().clamp(min=1)
    dice = dice_loss(logits, mask)[1:].mean()
    return {"loss": 0.5 * cross_entropy + 0.5 * dice, "cross_entropy": cross_entropy, "dice": dice}
