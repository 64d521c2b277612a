"""Decoder maps whose last convolution is computed at the wanted positions alone.

It is a sixteenth of the network's work. Of its map only the chosen patches carry a gradient, and in
view q only they are used. The plain form is ``at_positions`` on the maps of the whole network.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from networks import ChannelLayerNorm, ProjectedUNet, Up, activated
from pscl.recompute import recomputed


def at_positions(features: Tensor, index: Tensor) -> Tensor:
    """The features (B, c, H, W) at positions (B, T) of the flattened H*W map: (B, T, c)."""
    images, channels, rows, columns = features.shape
    first = torch.arange(0, images * rows * columns, rows * columns, device=index.device)
    # A view in channels-last memory: a row for each position.
    table = features.permute(0, 2, 3, 1).reshape(-1, channels)
    return F.embedding(index + first[:, None], table)


class LazyMap:
    """A map (B, c, H, W), computed where it is needed.

    ``features`` are the map, or, with ``unfinished``, the input of that decoder block's last
    convolution, which with its norm is still to be computed. ``size`` is (H, W).
    """

    def __init__(self, features: Tensor, unfinished: Up | None = None) -> None:
        self.features, self.unfinished = features, unfinished
        self.size = (features.shape[-2], features.shape[-1])

    def of_first(self) -> LazyMap:
        """The map (1, c, H, W) of the first image."""
        return LazyMap(self.features[:1], self.unfinished)

    def at(self, index: Tensor) -> Tensor:
        """Features at positions (B, T) of the flattened H*W map: (B, T, c)."""
        if self.unfinished is None:
            return at_positions(self.features, index)
        block = self.unfinished.conv
        rows, columns = self.size
        if 2 * index.shape[1] > rows * columns:  # most of the map is wanted
            return at_positions(activated(block.norm2, block.con2(self.features)), index)
        step = torch.arange(-1, 2, device=index.device)
        row = (index // columns)[..., None] + step.repeat_interleave(3)  # (B, T, 9)
        column = (index % columns)[..., None] + step.repeat(3)
        near_row, near_column = row.clamp(0, rows - 1), column.clamp(0, columns - 1)
        around = at_positions(self.features, (near_row * columns + near_column).flatten(1))
        outside = ((near_row != row) | (near_column != column))[..., None]  # zero padding
        around = around.view(*row.shape, -1).masked_fill(outside, 0.0).flatten(2)  # (B, T, 9*c)
        weight = block.con2.weight.permute(0, 2, 3, 1).flatten(1)  # (c, 9*c)
        assert isinstance(block.norm2, ChannelLayerNorm)  # which treats positions one by one
        return block.norm2.activated_rows(F.linear(around, weight))


def lazy_maps(
    network: ProjectedUNet, image: Tensor, recompute: int = -1
) -> tuple[Tensor, list[LazyMap]]:
    """What ``network`` gives, embeddings (B, D) and the maps up1, up2, up3, the last one lazily.

    ``recompute`` is the ``levels`` of ``pscl.recompute.recompute_activations``.
    """
    encoder, block = network.encode, network.encode.up3

    def all_but_last(x: Tensor, skip: Tensor) -> Tensor:
        return activated(block.conv.norm1, block.conv.con1(block.join(x, skip)))

    x1, x2, x3, x4 = encoder.contract(image)
    up1 = encoder.up1(x4, x3)
    up2 = encoder.up2(up1, x2)
    before = recomputed(all_but_last, block, 0, recompute)(up2, x1)
    return network.decode.image(x4), [LazyMap(up1), LazyMap(up2), LazyMap(before, block)]
