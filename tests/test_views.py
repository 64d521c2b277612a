"""The 8 views of an image, on predictions whose disagreement is known by hand."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch

from metallography.tiling import average_batch, average_views, disagreement


def by_column(image: np.ndarray) -> np.ndarray:
    """Sure of class 1 in the left half of what it is shown where the picture is not 0."""
    one = np.zeros(image.shape, np.float32)
    one[:, : image.shape[1] // 2] = 1
    one[image == 0] = 0
    return np.stack([1 - one, one])


def test_views_that_contradict_each_other() -> None:
    # Of the 8 views of a square, 4 show any pixel in their left half: 4 votes against 4.
    votes, mutual, entropy = disagreement(by_column)(np.ones((8, 8), np.uint8))
    np.testing.assert_allclose(votes, 0.5)
    np.testing.assert_allclose(mutual, math.log(2), rtol=1e-5)
    np.testing.assert_allclose(entropy, math.log(2), rtol=1e-5)


def test_even_odds_in_all_views_are_no_disagreement() -> None:
    votes, mutual, entropy = disagreement(lambda x: np.full((2, *x.shape), 0.5))(
        np.ones((6, 10), np.uint8)
    )
    assert votes.max() == 0 and mutual.max() < 1e-6
    np.testing.assert_allclose(entropy, math.log(2), rtol=1e-5)


def test_the_average_over_views_turns_with_the_picture() -> None:
    def lopsided(image):
        right = np.arange(image.shape[1])[None, :] + 0.0 * image
        return np.stack([image * right, image + np.roll(image, 1, axis=0)]).astype(np.float32)

    image = np.random.default_rng(0).normal(size=(6, 9))
    averaged = average_views(lopsided)
    given = averaged(image)
    assert given.shape == (2, 6, 9)
    for turned, back in [
        (np.rot90(image), lambda p: np.rot90(p, axes=(1, 2))),
        (image[:, ::-1], lambda p: p[:, :, ::-1]),
        (image.T, lambda p: p.transpose(0, 2, 1)),
    ]:
        np.testing.assert_allclose(averaged(np.ascontiguousarray(turned)), back(given), atol=1e-4)
    # By hand for the first channel: a column's weight, averaged over the 8 views, is the mean of
    # all four distances from the sides: (W - 1 + H - 1) / 4.
    np.testing.assert_allclose(given[0], image * (8 + 5) / 4, rtol=1e-5)


def test_the_average_over_a_batch_is_that_of_each_picture_alone() -> None:
    torch.manual_seed(0)
    network = torch.nn.Conv2d(3, 4, 3, padding=1)
    images = torch.rand(2, 3, 8, 11)

    def predict(image: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        x = torch.from_numpy(image.copy()).movedim(2, 0)[None]
        return network(x).softmax(dim=1)[0].detach().numpy()

    with torch.no_grad():
        found = average_batch(network, images)
    for image, one in zip(images, found, strict=True):
        expected = average_views(predict)(image.movedim(0, 2).numpy())
        np.testing.assert_allclose(one.numpy(), expected, rtol=1e-5, atol=1e-6)


def test_the_average_over_a_batch_turns_with_the_pictures() -> None:
    torch.manual_seed(0)
    network = torch.nn.Conv2d(3, 4, 3, padding=1)
    images = torch.rand(2, 3, 8, 11)
    with torch.no_grad():
        one, turned = (average_batch(network, x) for x in (images, torch.rot90(images, 1, (2, 3))))
    torch.testing.assert_close(torch.rot90(one, 1, (2, 3)), turned)
