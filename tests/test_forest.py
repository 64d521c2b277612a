"""Filters against closed forms, and the pixel classifier on pictures it must or cannot tell."""

from __future__ import annotations

import numpy as np
import pytest

import stages.forest
from stages.forest import (
    PixelForest,
    blur,
    draw_pixels,
    eigenvalues,
    gradient,
    hessian,
    pixel_features,
    with_channels,
)

ROWS, COLUMNS = np.mgrid[0:64, 0:64].astype(np.float32)
INNER = slice(24, 40)  # far enough from the edges, which mirror the picture


@pytest.mark.parametrize("sigma", [0.0, 1.0, 3.0])
def test_derivatives_of_a_quadratic(sigma: float) -> None:
    # f = 0.01 y^2 + 0.03 x y - 0.02 x^2 + 0.1 y: blurring adds a constant and changes nothing else.
    f = 0.01 * ROWS**2 + 0.03 * ROWS * COLUMNS - 0.02 * COLUMNS**2 + 0.1 * ROWS
    smooth = blur(f, sigma) if sigma else f
    inner = (INNER, INNER)
    down, right = gradient(smooth)
    assert down[inner] == pytest.approx((0.02 * ROWS + 0.03 * COLUMNS + 0.1)[inner], abs=1e-3)
    assert right[inner] == pytest.approx((0.03 * ROWS - 0.04 * COLUMNS)[inner], abs=1e-3)
    a, b, c = hessian(smooth)
    assert a[inner] == pytest.approx(0.02, abs=1e-3)
    assert b[inner] == pytest.approx(0.03, abs=1e-3)
    assert c[inner] == pytest.approx(-0.04, abs=1e-3)
    high, low = eigenvalues(a, b, c)
    expected = np.linalg.eigvalsh(np.array([[0.02, 0.03], [0.03, -0.04]]))
    assert high[inner] == pytest.approx(expected[1], abs=1e-3)
    assert low[inner] == pytest.approx(expected[0], abs=1e-3)


def test_eigenvalues_are_those_of_numpy() -> None:
    a, b, c = np.random.default_rng(0).normal(size=(3, 50))
    high, low = eigenvalues(a, b, c)
    expected = np.linalg.eigvalsh(np.moveaxis(np.array([[a, b], [b, c]]), -1, 0))
    assert np.stack([low, high], 1) == pytest.approx(expected)


def test_a_blurred_step_is_the_normal_distribution() -> None:
    from math import erf, sqrt

    step = (COLUMNS >= 32).astype(np.float32)
    expected = [0.5 * (1 + erf((x - 31.5) / (4 * sqrt(2)))) for x in range(64)]
    assert blur(step, 4.0)[30] == pytest.approx(expected, abs=2e-3)


def test_features_of_a_ramp() -> None:
    # It climbs by 2/255 a column: one eigenvalue of the structure tensor is the square of that.
    features = pixel_features((2 * COLUMNS / 255)[None], sigmas=(1.0, 2.0))
    assert features.shape == (64, 64, 1 + 2 * 7) and features.dtype == np.float32
    slope = 2 / 255
    for start in (1, 8):
        smooth, edge, laplacian, high, low, first, second = features[32, 32, start : start + 7]
        assert smooth == pytest.approx(64 / 255, abs=1e-5)
        assert edge == pytest.approx(slope, rel=1e-3)
        assert [laplacian, high, low, second] == pytest.approx([0, 0, 0, 0], abs=1e-5)
        assert first == pytest.approx(slope**2, rel=1e-3)


def test_turning_the_picture_turns_the_features() -> None:
    image = np.random.default_rng(0).random((1, 40, 30)).astype(np.float32)
    turned = pixel_features(np.rot90(image, axes=(1, 2)))
    assert turned == pytest.approx(np.rot90(pixel_features(image)), abs=1e-5)


def test_colour_adds_the_intensity_of_each_channel() -> None:
    image = np.random.default_rng(0).integers(0, 256, (3, 20, 20)).astype(np.uint8)
    features = pixel_features(image.astype(np.float32), sigmas=(1.0,))
    assert features.shape == (20, 20, 3 + 3 + 6)
    assert features[..., :3] == pytest.approx(np.moveaxis(image, 0, -1))
    assert with_channels(image[:1], 3).tolist() == [image[0].tolist()] * 3
    mean = np.rint(image.astype(float).mean(0))
    assert with_channels(image, 1)[0] == pytest.approx(mean)


def two_textures(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Stripes beside noise of the same gray values, and a dark band; ids 0, 1, 2."""
    rng = np.random.default_rng(seed)
    image = np.where(np.arange(48)[:, None] % 6 < 3, 200, 120) + rng.integers(-9, 9, (48, 48))
    image[:, 24:] = rng.permutation(image[:, 24:].ravel()).reshape(48, 24)
    mask = np.zeros((48, 48), np.uint8)
    mask[:, 24:] = 1
    image[40:], mask[40:] = rng.integers(0, 30, (8, 48)), 2
    return image.astype(np.uint8)[None], mask


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stages.forest, "TREES", 20)


def test_textures_of_equal_brightness_are_told_apart(small: None) -> None:
    forest = PixelForest(seed=0)
    image, mask = two_textures(0)
    assert forest.fit([image], [mask]) == mask.size
    other, truth = two_textures(1)
    assert (forest.predict(other) == truth).mean() > 0.9


def test_the_seed_decides_and_the_threads_do_not(small: None) -> None:
    found = []
    for seed, threads in ((0, 1), (0, 2), (1, 1)):
        forest = PixelForest(seed, threads=threads)
        forest.fit([two_textures(0)[0]], [two_textures(0)[1]])
        found.append(forest.predict(two_textures(2)[0]).tobytes())
    assert found[0] == found[1] != found[2]


@pytest.mark.parametrize("classes", [(0,), (0, 2), (0, 1, 3)])
def test_probabilities_are_those_of_scikit_learn(classes: tuple[int, ...]) -> None:
    image, mask = two_textures(0)
    mask = np.asarray(classes, np.uint8)[mask % len(classes)]
    forest = PixelForest(seed=0, quick=True)
    forest.fit([image], [mask])
    other = two_textures(1)[0]
    pixels = forest.features(other).reshape(mask.size, -1)
    expected = forest.model.predict_proba(pixels).astype(np.float32).T
    found = forest.probabilities(other, 4).reshape(4, -1)
    assert np.array_equal(found[list(classes)], expected)
    assert not np.delete(found, classes, axis=0).any()
    assert np.array_equal(forest.predict(other).ravel(), forest.model.predict(pixels))


def test_brightness_and_contrast_matter_unless_images_are_standardised(small: None) -> None:
    image, mask = two_textures(0)
    other = (image // 2 + 90).astype(np.uint8)
    right = {}
    for standardize in (False, True):
        forest = PixelForest(seed=0, standardize=standardize)
        forest.fit([image], [mask])
        right[standardize] = (forest.predict(other) == mask).mean()
    assert right[True] > 0.9 > 0.8 > right[False]
    features = PixelForest(seed=0, standardize=True).features(image)[..., 0]
    assert features.mean() == pytest.approx(0, abs=1e-5)
    assert features.std() == pytest.approx(1, abs=1e-5)
    flat = np.full((1, 20, 20), 7, np.uint8)
    assert not PixelForest(seed=0, standardize=True).features(flat).any()


def test_unlabelled_pixels_and_absent_classes(small: None) -> None:
    image, mask = two_textures(0)
    mask[:20] = 255
    mask[mask == 1] = 3  # classes 0, 2 and 3
    forest = PixelForest(seed=0)
    assert forest.fit([image, image], [mask, mask]) == 2 * 28 * 48
    assert set(np.unique(forest.predict(image))) <= {0, 2, 3}


def test_gray_and_colour_images_go_together(small: None) -> None:
    image, mask = two_textures(0)
    forest = PixelForest(seed=0)
    forest.fit([image, image.repeat(3, axis=0)], [mask, mask])
    assert (forest.predict(image) == mask).mean() > 0.95
    gray = PixelForest(seed=0)
    gray.fit([image], [mask])
    assert (gray.predict(image.repeat(3, axis=0)) == gray.predict(image)).all()


def test_of_a_large_class_so_many_pixels_are_drawn() -> None:
    ids = np.array([0] * 100 + [1] * 5 + [255] * 7, np.uint8)
    chosen = draw_pixels(ids, seed=0, most=20)
    assert len(chosen) == len(set(chosen)) == 25
    assert list(chosen) == sorted(chosen)
    assert set(range(100, 105)) <= set(chosen) and max(chosen) < 105
    assert chosen.tolist() == draw_pixels(ids, seed=0, most=20).tolist()
    assert chosen.tolist() != draw_pixels(ids, seed=1, most=20).tolist()


def test_hidden_pixels_do_not_count_for_the_mean_and_the_deviation() -> None:
    image = np.array([[[10, 20, 200], [30, 40, 200]]], np.uint8)
    inside = np.array([[True, True, False]] * 2)
    found = PixelForest(seed=0, standardize=True).features(image, inside)[..., 0]
    # Of 10, 20, 30 and 40: mean 25, deviation the root of (225 + 25 + 25 + 225) / 4.
    by_hand = (np.array([[10, 20], [30, 40]]) - 25) / np.sqrt(125)
    np.testing.assert_allclose(found[:, :2], by_hand, rtol=1e-6)
