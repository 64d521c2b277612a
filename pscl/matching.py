"""Matching as the published program does it, template by template: the form that is read.

``pscl.fast_matching.match`` finds the same cells and is what training calls.
"""

from __future__ import annotations

import torch
from torch import Tensor


def match(template: Tensor, keys: Tensor, valid: Tensor) -> Tensor:
    """Let templates choose, one after the other, their most similar cells (paper, patch sampling).

    Template 0 takes its most similar cell, the first of equals. That cell's similarity is then
    lowered, for all templates, by the image's largest similarity, and template 1 chooses. So a cell
    is taken twice only when little is left.

    Args:
        template: (D, T) features of the templates.
        keys: (B, D, P) features of the cells of each image.
        valid: (B, P) padding mask, False where the image has no such cell; it has at least one.

    Returns:
        The cell of each template in each image, int64 (B, T).
    """
    # In double precision near-ties do not depend on the order in which a library adds.
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
