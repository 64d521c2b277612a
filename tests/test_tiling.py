"""Tiles against the whole picture, and against sums written out by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from metallography import tiling
from metallography.tiling import (
    UNETS,
    WIDE,
    Together,
    cut_axis,
    predict_bands,
    resized_bands,
    together,
)
from networks import UNet
from utils.commandline import UserError


def unet(num_classes: int = 3) -> UNet:
    """A small UNet with batch statistics and offsets that are not those of a fresh one."""
    torch.manual_seed(0)
    network = UNet(num_classes, (4, 8, 16, 32))
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.normal_(module.running_mean)
            torch.nn.init.uniform_(module.running_var, 0.5, 2)
            torch.nn.init.normal_(module.bias)
    return network.eval()


def predictor(network: UNet):
    @torch.inference_mode()
    def predict(image):
        x = torch.from_numpy(np.ascontiguousarray(image)).float().expand(3, -1, -1)[None]
        return network(x)[0].softmax(0).numpy()

    return predict


def joined(bands):
    tops, parts = zip(*bands, strict=True)
    rows = [0, *np.cumsum([p.shape[1] for p in parts])]
    assert list(tops) == rows[:-1]  # without gaps, from the top
    return np.concatenate(parts, axis=1)


def test_the_context_covers_what_a_pixel_depends_on() -> None:
    network = UNet(2, (2, 4, 8, 16)).double().eval()
    side = 176  # and what lies farther away than the context
    farthest = 0
    for row, column in [(80, 80), (81, 82), (84, 87), (87, 83)]:
        # A max-pool passes a gradient to one pixel of four, so several pictures are tried.
        for _ in range(4):
            image = torch.randn(1, 3, side, side, dtype=torch.double, requires_grad=True)
            (gradient,) = torch.autograd.grad(network(image)[0, 0, row, column], image)
            seen = gradient.abs().sum(1)[0].nonzero()
            farthest = max(farthest, int((seen - torch.tensor([row, column])).abs().max()))
    assert 40 < farthest <= tiling.CONTEXT


@pytest.mark.parametrize("height, width", [(400, 360), (403, 358), (397, 200), (100, 399)])
def test_tiles_give_what_the_whole_picture_gives(height: int, width: int) -> None:
    image = np.random.default_rng(1).normal(size=(height, width)).astype(np.float32)
    predict = predictor(unet())
    whole = predict(image)
    assert whole.std() > 0.05  # the classes do differ from place to place
    pieces = []

    def counted(tile):
        pieces.append(tile.shape)
        return predict(tile)

    tiled = joined(predict_bands(image, counted, 3, tile=256, overlap=160))
    assert len(pieces) > 1 and max(max(p) for p in pieces) <= 256
    np.testing.assert_allclose(tiled, whole, atol=2e-5)


@pytest.mark.parametrize(("sight", "off"), [(WIDE, False), (UNETS, True)])
@pytest.mark.parametrize("side", [600, 617])
def test_tiles_of_a_network_that_halves_five_times(sight, off, side) -> None:
    """Here one that sees no farther than its own block of 32 x 32 pixels: their mean."""

    def predict(tile: np.ndarray) -> np.ndarray:
        rows, columns = (np.arange(0, n, 32) for n in tile.shape)
        sums = np.add.reduceat(np.add.reduceat(tile, rows, 0), columns, 1)
        counts = np.add.reduceat(np.add.reduceat(np.ones_like(tile), rows, 0), columns, 1)
        whole = np.repeat(np.repeat(sums / counts, 32, 0), 32, 1)
        return whole[None, : tile.shape[0], : tile.shape[1]]

    image = np.random.default_rng(1).normal(size=(side, side)).astype(np.float32)
    tiled = joined(predict_bands(image, predict, 1, 250, 160, sight))
    assert (np.abs(tiled - predict(image)).max() > 1e-2) == off


def test_a_network_that_sees_far_uses_as_little_of_a_tile_as_the_overlap_allows() -> None:
    axis = cut_axis(1000, 500, 400, WIDE)  # (400 - 16) / 2 = 192 pixels at a cut edge are not used
    assert (np.array(axis.starts) % 32 == 0).all() and (1000 - axis.size) % 32 == 0
    assert axis.weights[0, -192:].max() == 0 < axis.weights[0, -193 - 16]
    total = np.zeros(1000)
    for start, weights in zip(axis.starts, axis.weights, strict=True):
        total[start : start + axis.size] += weights
    np.testing.assert_allclose(total, 1, rtol=1e-6)
    with pytest.raises(UserError, match="must lie in 0 ... 436"):
        cut_axis(1000, 500, 440, WIDE)


def test_too_small_an_overlap_is_close_but_not_equal() -> None:
    """Shows that the test above can fail."""
    image = np.random.default_rng(1).normal(size=(300, 300)).astype(np.float32)
    predict = predictor(unet())
    tiled = joined(predict_bands(image, predict, 3, tile=128, overlap=16))
    difference = np.abs(tiled - predict(image))
    assert difference.max() > 1e-3 and difference.mean() < 0.05


def test_a_picture_of_at_most_one_tile_is_not_cut() -> None:
    image = np.arange(15 * 20.0).reshape(15, 20)
    bands = list(predict_bands(image, lambda tile: tile[None].astype(np.float32), 1, 20, 4))
    assert len(bands) == 1
    np.testing.assert_array_equal(bands[0][1][0], image)


@pytest.mark.parametrize("length", [33, 40, 64, 65, 100, 1000, 1003])
@pytest.mark.parametrize("tile, overlap", [(32, 0), (32, 5), (32, 16), (40, 24), (256, 160)])
def test_weights_sum_to_one_and_places_keep_the_remainder(length, tile, overlap) -> None:
    axis = cut_axis(length, tile, overlap)
    total = np.zeros(length)
    for start, weight in zip(axis.starts, axis.weights, strict=True):
        assert start % 8 == 0 and len(weight) == axis.size
        total[start : start + axis.size] += weight
    np.testing.assert_allclose(total, 1, atol=1e-6)
    assert axis.starts[0] == 0 and axis.starts[-1] + axis.size == length
    assert axis.size <= tile and (length - axis.size) % 8 == 0
    gaps = np.diff(axis.starts)
    assert (axis.size - gaps >= overlap).all()


def test_the_transition_is_a_raised_cosine() -> None:
    axis = cut_axis(56, 40, 24)  # two tiles, 0...39 and 16...55; 4 of the 24 shared are context
    assert axis.starts == [0, 16]
    expected = np.zeros(40)
    for i in range(40):
        if i < 4:
            expected[i] = 0
        elif i < 20:
            expected[i] = 0.5 - 0.5 * np.cos(np.pi * (i - 4 + 0.5) / 16)
        else:
            expected[i] = 1
    np.testing.assert_allclose(axis.weights[1], expected, atol=1e-6)
    np.testing.assert_allclose(axis.weights[0], expected[::-1], atol=1e-6)


@pytest.mark.parametrize("tile, overlap", [(32, 17), (32, -1), (8, 0), (100, 200)])
def test_an_overlap_that_leaves_nothing_is_refused(tile: int, overlap: int) -> None:
    with pytest.raises(ValueError, match=f"tile {tile} with overlap {overlap}.*smaller overlap"):
        cut_axis(1000, tile, overlap)


def test_memory_is_one_row_of_tiles() -> None:
    image = np.zeros((4000, 64), np.uint8)
    held = [
        band.shape[1]
        for _, band in predict_bands(
            image, lambda tile: np.ones((2, *tile.shape), np.float32), 2, 64, 16
        )
    ]
    assert max(held) <= 64 and sum(held) == 4000


@pytest.mark.parametrize("height, width", [(7, 5), (40, 33), (3, 2)])
def test_resizing_in_bands_is_bilinear(height: int, width: int) -> None:
    probabilities = np.random.default_rng(0).random((3, 7, 9)).astype(np.float32)
    expected = torch.nn.functional.interpolate(
        torch.from_numpy(probabilities)[None], (height, width), mode="bilinear"
    )[0]
    given = joined(resized_bands(probabilities, height, width, rows=8))
    assert given.dtype == np.float32
    np.testing.assert_allclose(given, expected.numpy(), atol=1e-6)


def in_turn(image, predict, num_classes: int, tile: int, overlap: int) -> np.ndarray:
    """Tiles one after the other, the whole image in memory."""
    down, across = (cut_axis(side, tile, overlap) for side in image.shape[:2])
    whole = np.zeros((num_classes, *image.shape[:2]), np.float32)
    for top, above in zip(down.starts, down.weights, strict=True):
        for left, beside in zip(across.starts, across.weights, strict=True):
            place = (slice(top, top + down.size), slice(left, left + across.size))
            whole[(slice(None), *place)] += predict(image[place]) * (above[:, None] * beside)
    return whole


@pytest.mark.parametrize("pixels", [0, 3 * 40**2, 10**9])
def test_tiles_ahead_and_together_give_the_bytes_of_tiles_in_turn(pixels: int) -> None:
    """Together: none, three at a time, all of them."""
    image = np.random.default_rng(2).random((123, 200), np.float32)
    sizes: list[int] = []

    def one(tile):
        sizes.append(1)
        return np.stack([tile, np.sin(tile)])

    def several(tiles):
        sizes.append(len(tiles))
        return np.stack([[tile, np.sin(tile)] for tile in tiles])

    expected = in_turn(image, one, 2, 40, 16)
    tiles = len(sizes)
    sizes.clear()
    found = joined(predict_bands(image, Together(one, several, pixels), 2, 40, 16))
    np.testing.assert_array_equal(found, expected)
    assert sum(sizes) == tiles and max(sizes) == {0: 1, 4800: 3}.get(pixels, tiles)


@pytest.mark.parametrize(("tile", "at_once"), [(768, 3), (384, 3), (200, 3), (1024, 2), (2000, 1)])
def test_what_a_device_holds_follows_the_tile(tile: int, at_once: int) -> None:
    """Three tiles of the default size are 1.8 million pixels; a quarter of them at half the side.

    Of larger ones as many as 2 million pixels hold, or one.
    """
    assert max(together(tile) // tile**2, 1) == at_once
    most = max(at_once * tile**2, 1)
    assert tile > 768 or most <= 3 * 768**2 * (tile / 768) ** 2
    held: list[int] = []

    def several(tiles):
        held.append(sum(each.size for each in tiles))
        return np.stack([each[None] for each in tiles])

    image, one = np.zeros((2 * tile, 2 * tile), np.float32), lambda tile: tile[None]
    for _ in predict_bands(image, Together(one, several, together(tile)), 1, tile, tile // 4):
        pass
    assert max(held, default=tile**2) <= most


def test_what_stops_a_tile_stops_the_image() -> None:
    def refused(tile):
        raise MemoryError

    with pytest.raises(MemoryError):
        list(predict_bands(np.zeros((90, 90)), refused, 1, 40, 16))
