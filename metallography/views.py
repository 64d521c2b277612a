"""The 8 views of an image, its flips and quarter turns: their average, and where they disagree.

A micrograph has no top and no handedness, so the views ought to agree; where they do not, the
prediction depends on more than the material.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import reduce

import numpy as np
import torch
from torch import Tensor

from metallography.tiling import Array, Floats, Predict

VIEWS = 8
MEASURES = ("vote_disagreement", "mutual_information", "entropy")


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
