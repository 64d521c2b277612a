"""Matching as the published program does it; training calls ``fast_matching``, of equal result."""

from __future__ import annotations

import torch
from torch import Tensor


def match(template: Tensor, keys: Tensor, valid: Tensor) -> Tensor:
    """Choose each template's most similar cell in turn (paper, patch sampling).

    Template 0 takes its most similar cell, the first of equals. That cell's similarity to every
    template is then lowered by the image's largest similarity, and template 1 chooses, so that a
    cell is taken twice only when no other is similar.

    Args:
        template: (D, T) features of the templates.
        keys: (B, D, P) features of the cells of each image.
        valid: (B, P) padding mask, False for padding; every image has at least one cell.

    Returns:
        The cell of each template in each image, int64 (B, T).
    """
    # In double precision, so that near-ties do not depend on a library's order of summation.
    wide = torch.float32 if keys.is_mps else torch.float64  # MPS has no double precision
    similarity = template.to(wide).T @ keys.to(wide)  # (B, T, P)
    similarity.masked_fill_(~valid[:, None], -torch.inf)
    peak = similarity.amax(dim=(1, 2))  # (B,)
    image = torch.arange(len(keys), device=keys.device)
    chosen = []
    for t in range(template.shape[1]):
        cell = similarity[:, t].argmax(dim=1)  # (B,)
        similarity[image, :, cell] -= peak[:, None]
        chosen.append(cell)
    return torch.stack(chosen, dim=1)
