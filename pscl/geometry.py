"""Views and windows as values: drawn once, applied to images, masks and index grids alike."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from utils.device import upload
from utils.metrics import IGNORED


@dataclass(frozen=True)
class ViewGeometry:
    """Flip, quarter turns and crop of one view (paper: data augmentation; published loader).

    Attributes:
        flip: whether the rows are reversed, before the rotation.
        quarter_turns: counter-clockwise (``torch.rot90``), 1 to 4.
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
        """Top, bottom, left, right of the crop of an image that is ``rows x columns`` unrotated.

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

    def index_steps(self, rows: int, columns: int) -> tuple[int, int, int]:
        """The grid of indices 0 ... rows*columns - 1 after flip, rotation and crop.

        The first cell's index, and its increments from row to row and from column to column.
        """
        top, _, left, _ = self.crop_box(rows, columns)
        first, down, across = 0, columns, 1
        if self.flip:
            first, down = (rows - 1) * columns, -columns
        for _ in range(self.quarter_turns % 4):  # the last column becomes the first row
            first, down, across = first + (columns - 1) * across, -across, down
            rows, columns = columns, rows
        return first + top * down + left * across, down, across

    def cut(self, image: Tensor) -> Tensor:
        """Flip, rotate and crop without resizing: (..., H, W) to (..., h', w')."""
        top, bottom, left, right = self.crop_box(image.shape[-2], image.shape[-1])
        if self.flip:
            image = image.flip(-2)
        return torch.rot90(image, self.quarter_turns, (-2, -1))[..., top:bottom, left:right]

    def apply(self, image: Tensor) -> Tensor:
        """Flip, rotate, crop, resize back (bilinear, antialias): float (..., H, W) to the same."""
        return resize(self.cut(image), (image.shape[-2], image.shape[-1]))

    def apply_mask(self, mask: Tensor) -> Tensor:
        """The same for class ids, resized by centre-aligned nearest: integer (H, W) to the same."""
        cut = self.cut(mask)
        if cut.shape == mask.shape:
            return cut
        sizes = zip(mask.shape, cut.shape, strict=True)
        rows, columns = (((torch.arange(n) + 0.5) * (old / n)).long() for n, old in sizes)
        return cut[rows[:, None], columns]


@dataclass(frozen=True)
class Window:
    """A shifted, rotated and scaled crop of an image (training with labels).

    The result has ``rows x columns`` pixels; its centre is ``row`` and ``column`` pixels from the
    image's top and left edge. The image is magnified by ``scale``, rotated counter-clockwise by
    ``angle`` degrees, and beyond its edges mirrored and unlabelled.
    """

    rows: int
    columns: int
    row: float
    column: float
    scale: float = 1.0
    angle: float = 0.0

    @classmethod
    def draw(
        cls,
        rng: np.random.Generator,
        size: tuple[int, int],
        side: int = 0,
        scale: float = 1.0,
        rotation: float = 0.0,
    ) -> Window:
        """Draw a window that, before its rotation, lies inside the image if it fits there.

        Args:
            size: rows and columns of the image.
            side: rows and columns of the window; 0: those of the image.
            scale: the largest; its logarithm is uniform in -log(scale) ... log(scale).
            rotation: largest angle either way, in degrees.
        """
        rows, columns = (side, side) if side else size
        if scale == 1 and rotation == 0:  # whole pixels: resampling would blur
            top = int(rng.integers(max(size[0] - rows, 0) + 1))
            left = int(rng.integers(max(size[1] - columns, 0) + 1))
            return cls(rows, columns, top + rows / 2, left + columns / 2)
        reach = math.log(scale)
        factor = math.exp(rng.uniform(-reach, reach))
        angle = float(rng.uniform(-rotation, rotation))
        half = (min(rows / factor, size[0]) / 2, min(columns / factor, size[1]) / 2)
        row = float(rng.uniform(half[0], size[0] - half[0]))
        column = float(rng.uniform(half[1], size[1] - half[1]))
        return cls(rows, columns, row, column, factor, angle)

    def places(self, rows: int, columns: int) -> tuple[Tensor, Tensor, Tensor]:
        """Distances of the pixels' centres from the top and left edge of ``rows x columns``.

        Float (h, w) each, in pixels, and whether (h, w) they are inside the image.
        """
        down = (torch.arange(self.rows) + 0.5 - self.rows / 2)[:, None] / self.scale
        right = (torch.arange(self.columns) + 0.5 - self.columns / 2)[None, :] / self.scale
        cosine, sine = (f(math.radians(self.angle)) for f in (math.cos, math.sin))
        y = self.row + right * sine + down * cosine
        x = self.column + right * cosine - down * sine
        return y, x, (y >= 0) & (y < rows) & (x >= 0) & (x < columns)

    def part(self, rows: int, columns: int) -> tuple[tuple[slice, slice], Window]:
        """Rows and columns of an image that the window needs, and the window in that part of it.

        Beyond the edges it needs what is mirrored there, and linear interpolation one pixel more.
        """
        y, x, _ = self.places(rows, columns)
        slices = []
        for at, length in ((y, rows), (x, columns)):
            low, high = math.floor(float(at.min())), math.ceil(float(at.max()))
            first, last = min(low, 2 * length - high) - 1, max(high, -low) + 1
            slices.append(slice(max(first, 0), min(last, length)))
        row, column = self.row - slices[0].start, self.column - slices[1].start
        part = (slices[0], slices[1])
        return part, dataclasses.replace(self, row=row, column=column)

    def apply(self, image: Tensor) -> Tensor:
        """The window of a float image (c, H, W), bilinear: (c, h, w)."""
        rows, columns = image.shape[-2:]
        y, x, _ = self.places(rows, columns)
        grid = torch.stack([2 * x / columns - 1, 2 * y / rows - 1], dim=-1)[None]
        return F.grid_sample(image[None], grid, "bilinear", "reflection", align_corners=False)[0]

    def apply_mask(self, mask: Tensor) -> Tensor:
        """The same for class ids (H, W), by the nearest pixel; ``IGNORED`` outside: (h, w)."""
        rows, columns = mask.shape
        y, x, inside = self.places(rows, columns)
        nearest = y.floor().long().clamp(0, rows - 1), x.floor().long().clamp(0, columns - 1)
        return mask[nearest].masked_fill(~inside, IGNORED)


def resize(image: Tensor, size: tuple[int, int]) -> Tensor:
    """Bilinear, antialiased resize of float (..., H, W) to (..., *size) (torchvision's default)."""
    if image.shape[-2:] == size:
        return image
    stack = image.reshape(-1, 1, *image.shape[-2:])
    if stack.is_mps and not has_kernel("_upsample_bilinear2d_aa.out", "MPS"):  # as in torch 2.6
        stack = stack.cpu()
    stack = F.interpolate(stack, size, mode="bilinear", antialias=True, align_corners=False)
    return stack.reshape(*image.shape[:-2], *size).to(image.device)


def has_kernel(operator: str, backend: str) -> bool:
    """Whether the PyTorch that runs has an operator such as ``take`` for ``CPU``, ``MPS``, ..."""
    return bool(torch._C._dispatch_has_kernel_for_dispatch_key(f"aten::{operator}", backend))


def warp(images: Tensor, geometry: Sequence[ViewGeometry]) -> Tensor:
    """``ViewGeometry.apply`` of each image of a batch, all at once: float (B, c, H, W) to the same.

    A pixel lies between two rows and two columns of its crop; where those lie in the image before
    flip, rotation and crop is linear in their numbers, as in ``correspond``. Values agree within
    rounding. Crops with more rows or columns than the image, which rotated oblongs have, must be
    reduced by antialiasing: then images are warped one by one.
    """
    rows, columns = images.shape[-2:]
    sizes = [view.size(rows, columns) for view in geometry]
    if any(h > rows or w > columns for h, w in sizes):
        return torch.stack([view.apply(x) for view, x in zip(geometry, images, strict=True)])
    linear = [view.index_steps(rows, columns) for view in geometry]
    numbers = [(*size, *steps) for size, steps in zip(sizes, linear, strict=True)]
    table = upload(torch.tensor(numbers).T[:, :, None], images.device)
    height, width, first, down, across = table.unbind()  # (B, 1) each
    above, below, lower = _between(height, rows)  # (B, H) each
    left, right, farther = _between(width, columns)  # (B, W) each
    flat = images.flatten(2)  # (B, c, H*W)

    def mixed(row: Tensor) -> Tensor:
        start = (first + row * down)[:, :, None]  # (B, H, 1)
        one, other = (
            flat.gather(2, (start + (at * across)[:, None]).flatten(1)[:, None].expand_as(flat))
            for at in (left, right)
        )
        share = farther[:, None].expand(-1, rows, -1).flatten(1)[:, None]  # (B, 1, H*W)
        return torch.lerp(one, other, share)

    share = lower[:, :, None].expand(-1, -1, columns).flatten(1)[:, None]
    return torch.lerp(mixed(above), mixed(below), share).view_as(images)


def _between(old: Tensor, new: int) -> tuple[Tensor, Tensor, Tensor]:
    """Of ``new`` pixels the two of ``old`` (B, 1) between whose centres each lies, and the share of
    the second: (B, new) each."""
    centre = (torch.arange(new, device=old.device) + 0.5) * (old / new) - 0.5
    last = (old - 1).float()
    centre = torch.minimum(centre.clamp(min=0), last)
    first = centre.floor()
    return first.long(), torch.minimum(first + 1, last).long(), centre - first


@dataclass(frozen=True)
class Correspondence:
    """Where the cells of the cropped grid lie in the two views' feature maps, for B images.

    Images differ in h' x w'; all are padded to the same P, H*W or a little more. In padding ``key``
    is some position of the map and ``query`` is undefined.

    Attributes:
        query, key: (B, P) indices into the flattened H*W maps of view q and of view k.
        valid: (B, P) padding mask, False for padding.
    """

    query: Tensor
    key: Tensor
    valid: Tensor


def cell_numbers(geometry: Sequence[ViewGeometry], rows: int, columns: int) -> Tensor:
    """What ``correspond_by`` needs of B images: int64 (8, B, 1), made on the host.

    Arguments are those of ``correspond``.
    """
    sizes = [view.size(rows, columns) for view in geometry]
    linear = [view.index_steps(rows, columns) for view in geometry]
    numbers = [(h, w, h * w, *n, rows, columns) for (h, w), n in zip(sizes, linear, strict=True)]
    return torch.tensor(numbers).T[:, :, None]


def correspond(
    geometry: Sequence[ViewGeometry],
    rows: int,
    columns: int,
    device: torch.device | str = "cpu",
    multiple: int = 1,
) -> Correspondence:
    """Which position of view q and which of view k show the same material, cell by cell.

    The published program flips, rotates and crops a grid of indices for view q and resizes the
    grid of view k to the crop's h' x w' by nearest. The first is a linear function of the cell's
    row p // w' and column p % w', the second a rounding of it, so both are computed for all images
    at once.

    ``geometry`` holds the view k of each of the B images, ``rows`` and ``columns`` are H, W of the
    feature map; P is H*W rounded up to a multiple of ``multiple``.
    """
    table = upload(cell_numbers(geometry, rows, columns), torch.device(device))
    return correspond_by(table, rows, columns, multiple)


def correspond_by(table: Tensor, rows: int, columns: int, multiple: int = 1) -> Correspondence:
    """``correspond`` by the numbers (8, B, 1) of ``cell_numbers``, where those lie."""
    _, width, size, first, down, right = table[:6].unbind()  # (B, 1) each
    cells = -(-rows * columns // multiple) * multiple
    cell = torch.arange(cells, device=table.device)  # (P,)
    row, column = cell // width, cell % width  # (B, P)
    query = torch.addcmul(first, row, down).addcmul_(column, right)
    # As torch's 'nearest' (not 'nearest-exact') resize from the full size: the source of a cell is
    # scaled in single precision and rounded down.
    row_scale, column_scale = (table[6:] / table[:2]).unbind()
    key = (column * column_scale).long().add_((row * row_scale).long(), alpha=columns)
    key.clamp_(max=rows * columns - 1)  # the rows of padding go on below the map
    return Correspondence(query, key, cell < size)
