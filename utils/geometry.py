"""A view as a value: drawn once, applied to pixels, masks and index grids alike."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class ViewGeometry:
    """Flip, quarter turns and crop of one view (paper: data augmentation; published loader).

    Attributes:
        flip: whether the image is flipped upside down (rows reversed), before the rotation.
        quarter_turns: number of counter-clockwise quarter turns, 1 to 4 (``torch.rot90``).
        height, width: the crop's share of the rotated image's rows and columns, in (0, 1] (the
            paper's r1, r2).
        top, left: where the crop starts, as a share of rows and columns (the paper's r3, r4).
    """

    flip: bool
    quarter_turns: int
    height: float = 1.0
    width: float = 1.0
    top: float = 0.0
    left: float = 0.0

    @classmethod
    def draw(cls, rng: np.random.Generator, random_crop: float) -> ViewGeometry:
        """Draw a view: flip with p 1/2, 1 to 4 quarter turns, a crop of 1 - U(0, random_crop)."""
        flip = bool(rng.integers(2))
        quarter_turns = int(rng.integers(1, 5))
        if random_crop == 0:
            return cls(flip, quarter_turns)
        height, width = (1.0 - rng.uniform(0.0, random_crop, size=2)).tolist()
        top, left = rng.uniform(0.0, 1.0 - height), rng.uniform(0.0, 1.0 - width)
        return cls(flip, quarter_turns, height, width, top, left)

    def crop_box(self, rows: int, columns: int) -> tuple[int, int, int, int]:
        """Top, bottom, left, right of the crop on an image of ``rows x columns`` before rotation.

        The box lies on the rotated image, whose sides are swapped after an odd number of turns. It
        holds at least one position: on a tiny grid the published rounding could leave none.
        """
        if self.quarter_turns % 2:
            rows, columns = columns, rows
        top, left = int(self.top * rows), int(self.left * columns)
        bottom = max(int(self.top * rows + self.height * rows), top + 1)
        right = max(int(self.left * columns + self.width * columns), left + 1)
        return top, min(bottom, rows), left, min(right, columns)

    def size(self, rows: int, columns: int) -> tuple[int, int]:
        """Rows and columns (h', w') that the crop keeps of an image of ``rows x columns``."""
        top, bottom, left, right = self.crop_box(rows, columns)
        return bottom - top, right - left

    def cut(self, image: Tensor) -> Tensor:
        """Flip, rotate and crop without resizing: (..., H, W) to (..., h', w')."""
        top, bottom, left, right = self.crop_box(image.shape[-2], image.shape[-1])
        if self.flip:
            image = image.flip(-2)
        return torch.rot90(image, self.quarter_turns, (-2, -1))[..., top:bottom, left:right]

    def apply(self, image: Tensor) -> Tensor:
        """Flip, rotate, crop, resize back (bilinear, antialias): float (..., H, W), same shape."""
        return resize(self.cut(image), (image.shape[-2], image.shape[-1]))

    def apply_mask(self, mask: Tensor) -> Tensor:
        """The same for class ids, resized by centre-aligned nearest: integer (H, W), same shape."""
        cut = self.cut(mask)
        if cut.shape == mask.shape:
            return cut
        rows, columns = (
            ((torch.arange(new) + 0.5) * (old / new)).long().clamp(max=old - 1)
            for new, old in zip(mask.shape, cut.shape, strict=True)
        )
        return cut[rows[:, None], columns[None, :]]


def resize(image: Tensor, size: tuple[int, int]) -> Tensor:
    """Bilinear, antialiased resize of float (..., H, W) to (..., *size) (torchvision's default)."""
    if image.shape[-2:] == size:
        return image
    stack = image.reshape(-1, 1, *image.shape[-2:])
    stack = F.interpolate(stack, size, mode="bilinear", antialias=True, align_corners=False)
    return stack.reshape(*image.shape[:-2], *size)


@dataclass(frozen=True)
class Correspondence:
    """Where the cells of the cropped grid lie in the two views' feature maps, for B images.

    Images differ in h' x w'; cells beyond an image's own are padding, where ``valid`` is false and
    both indices are 0.

    Attributes:
        query: (B, P) index into the flattened H*W map of view q.
        key: (B, P) index into the flattened H*W map of view k.
        valid: (B, P) bool.
        sizes: h', w' of each image, on the host.
    """

    query: Tensor
    key: Tensor
    valid: Tensor
    sizes: tuple[tuple[int, int], ...]


def correspond(
    geometry: Sequence[ViewGeometry], rows: int, columns: int, device: torch.device | str = "cpu"
) -> Correspondence:
    """Which position of view q and which of view k show the same material, cell by cell.

    The published program flips, rotates and crops a grid of indices for view q and resizes the
    grid of view k to the crop's h' x w' by nearest; here both follow from the cell's coordinates,
    for all images of the batch at once.

    Args:
        geometry: the view k of each of the B images.
        rows, columns: H, W of the feature map.
        device: where the index tensors are made.

    Returns:
        The ``Correspondence`` of the batch; cell p of an image is row p // w', column p % w'.
    """
    sizes = tuple(view.size(rows, columns) for view in geometry)
    table = torch.tensor(
        [
            (*size, view.crop_box(rows, columns)[0], view.crop_box(rows, columns)[2],
             view.quarter_turns % 4, int(view.flip))
            for view, size in zip(geometry, sizes, strict=True)
        ]
    ).to(device)  # fmt: skip
    height, width, top, left, turns, flip = table[:, :, None].unbind(1)  # each (B, 1)
    cell = torch.arange(max(h * w for h, w in sizes), device=device)[None, :]  # (1, P)
    valid = cell < height * width  # (B, P)
    row, column = cell // width, cell % width

    key_row = _nearest(row, rows, height)
    key_column = _nearest(column, columns, width)

    # Back from the cropped to the rotated grid, then undo the turns, then the flip.
    i, j = row + top, column + left
    source_row = torch.where(
        turns == 0,
        i,
        torch.where(turns == 1, j, torch.where(turns == 2, rows - 1 - i, rows - 1 - j)),
    )
    source_column = torch.where(
        turns == 0, j,
        torch.where(turns == 1, columns - 1 - i, torch.where(turns == 2, columns - 1 - j, i)),
    )  # fmt: skip
    source_row = torch.where(flip == 1, rows - 1 - source_row, source_row)

    zero = cell.new_zeros(())
    query = torch.where(valid, source_row * columns + source_column, zero)
    key = torch.where(valid, key_row * columns + key_column, zero)
    return Correspondence(query, key, valid, sizes)


def _nearest(index: Tensor, old: int, new: Tensor) -> Tensor:
    """Source index of torch's 'nearest' (not 'nearest-exact') resize from ``old`` to ``new``.

    torch scales in single precision and takes the floor; so does this, to agree to the last cell.
    """
    scale = torch.full_like(new, old, dtype=torch.float32) / new.float()
    return (index.float() * scale).floor().long().clamp(max=old - 1)
