"""Patch embeddings in fewer dimensions, for comparisons among themselves alone."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from networks import ProjectionHead, dense_weight, pointwise, rectified


def coordinates(head: ProjectionHead, features: Tensor, scale: int) -> Tensor:
    """Vectors with the inner products of ``head.patch``'s: (B, c, P) to (B, d, P), d <= D.

    Embeddings are W h + b of the hidden units h, so they lie in the space spanned by the columns of
    W and b, of at most hidden + 1 dimensions. With [W, b] = QR and Q orthonormal, R [h, 1] has
    their lengths and inner products. So d is hidden + 1 where that is less than D (by default 33 of
    64, at the finest scale alone), which saves memory and multiplications; else it is D.

    The result is in single precision, and computed in it where d < D (on CUDA as far as PyTorch's
    convolutions are set to it). No gradient reaches the last layer.
    """
    conv1, norm1, last = head.patch_layers(scale)
    assert isinstance(last, nn.Conv2d)
    if last.in_channels + 1 >= last.out_channels or features.is_mps:  # MPS has no doubles
        return head.patch(features, scale).float()
    hidden = rectified(norm1, pointwise(conv1, features.unsqueeze(2)), torch.float32)
    del features  # large; hidden is (B, hidden, 1, P)
    with torch.autocast(hidden.device.type, enabled=False):
        weight, bias = dense_weight(last).detach(), last.get_parameter("bias").detach()
        columns = torch.cat([weight, bias[:, None]], dim=1)
        r = torch.linalg.qr(columns.double(), mode="r").R.float()  # (d, d)
        return F.conv2d(hidden.float(), r[:, :-1, None, None], r[:, -1]).squeeze(2)
