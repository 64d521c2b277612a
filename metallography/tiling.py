"""Prediction of images of any size by tiles, and of images in their 8 views.

Tiles overlap and are blended smoothly, so that memory is bounded.

The UNet pools three times, so its prediction at a pixel depends on the pixel's place modulo 8 and
on the remainder of the image's sides by 8 (an odd side is padded at both ends on the way up). Tiles
therefore begin at multiples of 8 and have sides with the same remainder as the image's. Pixels that
lie closer to a cut edge than the network sees (``CONTEXT``) are not used, if the overlap is wide
enough for that; the tiled prediction is then that of the whole image, everywhere.

An encoder from ImageNet halves the image five times, so there it is multiples of 32, and sees
farther than any overlap (``WIDE``): tiles are then close to the whole image, not equal to it.

The views are an image's flips and quarter turns. A micrograph has no top and no handedness, so the
views ought to agree; where they do not, the prediction depends on more than the material.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import reduce
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from utils.commandline import UserError

Array = NDArray[Any]
Floats = NDArray[np.float32]
Predict = Callable[[Array], Floats]
"""An image (H, W) or (H, W, 3) to class probabilities (C, H, W)."""


class Sight(NamedTuple):
    """What a network sees of an image; by default the UNet."""

    grid: int = 8  # pixels of the image in one position of the coarsest map
    context: float = 72  # a pixel's prediction depends on no pixel farther away than this

    @property
    def least_step(self) -> int:
        """From one tile to the next, in pixels."""
        return 2 * self.grid


UNETS, WIDE = Sight(), Sight(32, math.inf)
CONTEXT = int(UNETS.context)
BLEND = 16  # width of the transition between tiles, where the overlap has room for both
DEFAULT_TILE = 768
DEFAULT_OVERLAP = 2 * CONTEXT + BLEND
VIEWS = 8
MEASURES = ("vote_disagreement", "mutual_information", "entropy")
TOGETHER = 2**21  # pixels of the tiles of the default size that a device computes at once


@dataclass(frozen=True)
class Together:
    """A ``Predict`` that also takes several tiles of one size at once, up to ``pixels`` in all."""

    one: Predict
    several: Callable[[Sequence[Array]], Floats]  # gives (tiles, C, h, w)
    pixels: int

    def __call__(self, tile: Array) -> Floats:
        """Predict one tile."""
        return self.one(tile)


def together(tile: int) -> int:
    """Pixels of tiles of at most ``tile`` x ``tile`` that a device computes at once.

    Smaller tiles, by which memory is saved, are not made up for by more of them.
    """
    return min(TOGETHER, TOGETHER * tile**2 // DEFAULT_TILE**2)


class Axis(NamedTuple):
    """Tiles along one side: their common length, first pixels, and weights (tiles, length)."""

    size: int
    starts: list[int]
    weights: Floats


def cut_axis(length: int, tile: int, overlap: int, sight: Sight = UNETS) -> Axis:
    """Cut a side into tiles of at most ``tile`` pixels that overlap by at least ``overlap``.

    The weights of a tile are 0 in the ``sight``'s context next to a cut edge, or as much of it as
    the overlap has room for, rise as a raised cosine over the rest of the overlap, and are 1
    inside; over all tiles they sum to 1 at every pixel. UserError if the overlap leaves less than
    16 pixels of a tile (64 where the grid is 32).
    """
    if overlap < 0 or tile - overlap < sight.least_step:
        raise UserError(
            f"--tile {tile} with overlap {overlap}: the overlap must lie in 0 ... "
            f"{max(tile - sight.least_step, 0)}; give a larger tile or a smaller overlap"
        )
    if length <= tile:
        return Axis(length, [0], np.ones((1, length), np.float32))
    grid = sight.grid
    size = tile - (tile - length) % grid
    positions = (length - size) // grid
    gaps = -(-positions // ((size - overlap) // grid))
    starts = [grid * (i * positions // gaps) for i in range(gaps + 1)]
    context = int(min(sight.context, max(0, (overlap - BLEND) // 2)))
    ramp = overlap - 2 * context
    inside = np.arange(size) + 0.5 - context
    share = np.clip(inside / ramp, 0, 1) if ramp else (inside > 0).astype(float)
    rise = (1 - np.cos(np.pi * share)) / 2
    weights = np.ones((len(starts), size))
    weights[1:] *= rise
    weights[:-1] *= rise[::-1]
    pixels = np.add.outer(starts, np.arange(size))  # (tiles, length): each tile's, on the side
    weights /= np.bincount(pixels.ravel(), weights.ravel())[pixels]
    return Axis(size, starts, weights.astype(np.float32))


def predict_bands(
    image: Array,
    predict: Predict,
    num_classes: int,
    tile: int,
    overlap: int,
    sight: Sight = UNETS,
) -> Iterator[tuple[int, Floats]]:
    """Predict an image by tiles; yields (first row, probabilities (C, rows, W)) from the top.

    It holds one row of tiles at a time: C * tile * W numbers. An image (H, W) or
    (H, W, 3) whose sides are at most ``tile`` is predicted in one piece. An overlap of 160 pixels
    and more makes tiling exact, but of a ``WIDE`` network. While a tile (or, of ``Together``,
    several) is blended into the row, a thread predicts the next.
    """
    height, width = image.shape[:2]
    down, across = (cut_axis(side, tile, overlap, sight) for side in (height, width))
    band = np.zeros((num_classes, down.size, width), np.float32)
    places = [(row, column) for row in down.starts for column in across.starts]
    pieces = _predicted(image, predict, places, (down.size, across.size))
    top = 0
    for start, row_weight in zip(down.starts, down.weights, strict=True):
        done = start - top
        if done:
            yield top, band[:, :done].copy()
            band[:, :-done] = band[:, done:].copy()
            band[:, -done:] = 0
            top = start
        for left, column_weight in zip(across.starts, across.weights, strict=True):
            columns = slice(left, left + across.size)
            band[:, :, columns] += next(pieces) * (row_weight[:, None] * column_weight)
    yield top, band


def _predicted(
    image: Array, predict: Predict, places: Sequence[tuple[int, int]], size: tuple[int, int]
) -> Iterator[Floats]:
    """Predict tiles of a size at places (first row, first column), in order, one step ahead."""
    height, width = size
    tiles = [image[row : row + height, column : column + width] for row, column in places]
    if len(tiles) == 1:
        yield predict(tiles[0])
        return
    step = max(1, predict.pixels // (height * width)) if isinstance(predict, Together) else 1

    def some(start: int) -> Sequence[Floats] | Floats:
        own = tiles[start : start + step]
        if isinstance(predict, Together) and len(own) > 1:
            return predict.several(own)
        return [predict(tile) for tile in own]

    with ThreadPoolExecutor(1) as thread:
        coming = thread.submit(some, 0)
        for start in range(0, len(tiles), step):
            ready, after = coming.result(), start + step
            if after < len(tiles):
                coming = thread.submit(some, after)
            yield from ready


def resized_bands(
    probabilities: Floats, height: int, width: int, rows: int = 512
) -> Iterator[tuple[int, Floats]]:
    """Resize (C, h, w) to (C, height, width), bilinear with aligned centres.

    Yields (first row, probabilities (C, up to ``rows``, width)) from the top.
    """
    left, right, share = _neighbours(probabilities.shape[2], width)
    above, below, part = _neighbours(probabilities.shape[1], height)
    for top in range(0, height, rows):
        take = slice(top, top + rows)
        mix = part[take, None]
        band = probabilities[:, above[take]] * (1 - mix) + probabilities[:, below[take]] * mix
        band = band[:, :, left] * (1 - share) + band[:, :, right] * share
        yield top, np.asarray(band, np.float32)


def _neighbours(old: int, new: int) -> tuple[Array, Array, Floats]:
    """For each new pixel the two old ones it lies between, and the share of the second."""
    centre = np.clip((np.arange(new) + 0.5) * old / new - 0.5, 0, old - 1)
    first = np.floor(centre).astype(np.int64)
    return first, np.minimum(first + 1, old - 1), np.asarray(centre - first, np.float32)


def each_view(predict: Predict, image: Array) -> Iterator[Floats]:
    """Predict an image's 8 views; yields the predictions turned back, the image's own first."""
    for turns in range(4):
        for flip in (False, True):
            view = np.rot90(image, turns)
            given = predict(np.ascontiguousarray(view[:, ::-1] if flip else view))
            back = given[:, :, ::-1] if flip else given
            yield np.rot90(back, -turns, axes=(1, 2)).astype(np.float32)


def average_views(predict: Predict) -> Predict:
    """Average a prediction over the image's 8 views (test-time augmentation).

    The result turns and flips with the image, which a network's own does only roughly.
    """
    return lambda image: reduce(np.add, each_view(predict, image)) / np.float32(VIEWS)


def average_and_votes(predict: Predict) -> Predict:
    """The average over the 8 views with the vote disagreement as its last channel: (C+1, H, W)."""

    def maps(image: Array) -> Floats:
        total = votes = np.zeros(1, np.float32)
        for view in each_view(predict, image):
            total = total + view
            votes = votes + (view.argmax(axis=0) == np.arange(len(view))[:, None, None])
        split = 1 - votes.max(axis=0, keepdims=True) / VIEWS
        return np.concatenate([total / np.float32(VIEWS), split]).astype(np.float32)

    return maps


def average_batch(network: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    """Class probabilities (B, C, H, W), the average over the 8 views of a batch (B, 3, H, W).

    ``network`` gives logits (B, C, h, w) of (B, 3, h, w).
    """
    total = images.new_zeros(())
    for turns in range(4):
        turned = torch.rot90(images, turns, (2, 3))
        for axes in ((), (3,)):
            view = turned.flip(axes).contiguous(memory_format=torch.channels_last)
            given = network(view).float().softmax(dim=1).flip(axes)
            total = total + torch.rot90(given, -turns, (2, 3))
    return total / VIEWS


def disagreement(predict: Predict) -> Predict:
    """Turn a prediction of class probabilities into one of (3, H, W), a map for each measure:

    * vote disagreement: share of the views whose class is not the majority's, 0 ... 1 - 1/C.
    * mutual information between class and view in nats: the entropy below less the mean of the
      views' own entropies (Houlsby et al., arXiv:1112.5745, there between models).
    * entropy of the views' average probabilities in nats, 0 ... ln C.
    """

    def maps(image: Array) -> Floats:
        total = own = votes = np.zeros(1, np.float32)
        for view in each_view(predict, image):
            total = total + view
            own = own + entropy(view)
            votes = votes + (view.argmax(axis=0) == np.arange(len(view))[:, None, None])
        of_average = entropy(total / VIEWS)
        mutual = np.maximum(of_average - own / VIEWS, 0)  # rounding can make it negative
        return np.stack([1 - votes.max(axis=0) / VIEWS, mutual, of_average]).astype(np.float32)

    return maps


def entropy(probabilities: Array) -> Floats:
    """Entropy of each pixel in nats: (C, H, W) to (H, W)."""
    tiny = np.finfo(np.float32).tiny
    return -np.sum(probabilities * np.log(np.maximum(probabilities, tiny)), axis=0)
