"""Probing a pretrained network without fine-tuning it: linear classifier, k-means, spread.

The features of a pixel are up3 at the pixel, and up2 and up1 interpolated bilinearly there. Methods
that train the encoder only (not ``Method.trains_ups``) are seen through ups as initialised, with
BatchNorm's running means of 0 and variances of 1. Classifier and k-means are linear in the
features: their weights are applied to each map at its own size, and only the results enlarged.

The global random state and the network stay as they are.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from imaging.drawing import blend, overview, palette, save_picture
from utils.metrics import IGNORED, Scores, SegmentationScores

T = TypeVar("T")
Maps = Sequence[Tensor]  # up1, up2, up3 of the images, (B, c, h, w) each
Encode = Callable[[Tensor], tuple[Tensor, Maps]]  # (B, 3, H, W) to embeddings (B, D) and maps
Item = tuple[Tensor, Tensor, str]  # image (3, H, W), mask (H, W) and file name

PIXELS = 10_000  # in the classifier's training set
EACH_PIXELS = 1_000  # of each test image in k-means, and of each image in the pixel spread
CLUSTER_PIXELS = 10_000  # in k-means at most
ITERATIONS = 300  # of the logistic regression at most
SPREAD_IMAGES = 8
COLLAPSED = 0.001  # spread below which training has collapsed; a random network has 0.05 and more
SIDE = 400  # of the images in the picture, pixels


class Linear(NamedTuple):
    """A linear function of a pixel's features."""

    weight: Tensor  # (K, F)
    bias: Tensor  # (K,)


class Spreads(NamedTuple):
    """``spread`` of the embeddings of images, and of their pixels."""

    image_spread: float
    pixel_spread: float


class Findings(NamedTuple):
    """Scores of the classifier on the test set, and spreads of the embeddings."""

    scores: Scores
    spreads: Spreads

    def as_dict(self) -> dict[str, Any]:
        """All numbers by their names in ``metrics.jsonl``."""
        return {**self.scores.as_dict(), **self.spreads._asdict()}

    def lines(self, epochs_done: int) -> list[str]:
        """For the log: the numbers, and a warning if training has collapsed."""
        scores, spreads = self
        line = (
            f"Probe: after {epochs_done} epochs, Dice {scores.mean_dice:.4f} ACC {scores.acc:.4f} "
            "of a linear classifier on the frozen features; spread of the embeddings "
            f"{spreads.image_spread:.4f} (images), {spreads.pixel_spread:.4f} (pixels)"
        )
        collapsed = [one for one in spreads if one < COLLAPSED]
        if not collapsed or not epochs_done:  # before training it is no collapse
            return [line]
        what = "images" if spreads.image_spread < COLLAPSED else "pixels"
        alarm = (
            f"Warning: collapse: after {epochs_done} epochs the embeddings of all {what} are "
            f"nearly the same (spread {min(collapsed):.2g}, of 1 at most); try a lower --self_lr, "
            "a larger --self_batch_size or another --temperature, and look at the pictures of the "
            "probe"
        )
        return [line, alarm]


@torch.inference_mode()
def probe(
    encoder: nn.Module,
    *,
    images: Tensor,
    annotated: Sequence[Item],
    test: Iterable[Item],
    shown: Sequence[Item],
    pixels: Sequence[NDArray[Any]],
    num_classes: int,
    rng: np.random.Generator,
    precision: Callable[[], AbstractContextManager[object]],
    picture: Path,
    heading: str,
) -> Findings:
    """Probe a network, which stays as it is, and draw its clusters.

    ``images`` (B, 3, H, W) give the spreads; see ``embedding_spreads`` for ``encoder``. The
    classifier learns from ``annotated``, at least one image, and is scored on ``test``, to which
    k-means of ``num_classes`` clusters is fitted; ``rng`` chooses the pixels. ``shown`` are drawn
    in ``picture`` below ``heading``, with their files' ``pixels``, uint8 (H, W) or (H, W, 3).
    ``precision`` makes the autocast context.
    """
    device = next(encoder.parameters()).device

    def encode(batch: Tensor) -> tuple[Tensor, Maps]:
        with precision():
            return encoder(batch.to(device, memory_format=torch.channels_last))

    with precision():
        on_device = images.to(device, memory_format=torch.channels_last)
        spreads = embedding_spreads(encoder, on_device)
    training = encoder.training
    encoder.eval()
    try:
        scores, clusters = look(encode, annotated, test, num_classes, rng)
        draw_clusters(picture, encode, shown, pixels, clusters, heading)
    finally:
        encoder.train(training)
    return Findings(scores, spreads)


def evenly(samples: Sequence[T], count: int) -> list[T]:
    """At most ``count`` evenly spaced samples, the first included."""
    return list(samples[:: max(1, -(-len(samples) // count))])


def look(
    encode: Encode,
    annotated: Sequence[Item],
    test: Iterable[Item],
    num_classes: int,
    rng: np.random.Generator,
) -> tuple[Scores, Linear]:
    """Scores of a classifier of the features, and the logits of their clusters; see ``probe``.

    The network is in evaluation mode.
    """
    features, labels = [], []
    for image, mask, _ in annotated:
        place = draw_pixels(mask, PIXELS // len(annotated), rng)
        features.append(at_pixels(encode(image[None])[1], place, mask.shape))
        labels.append(mask.flatten()[place])
    classifier = fit_classifier(torch.cat(features), torch.cat(labels), num_classes)
    scores = SegmentationScores(num_classes)
    samples = []
    for image, mask, _ in test:
        maps = encode(image[None])[1]
        scores.add(apply_linear(maps, classifier, mask.shape).argmax(dim=1).cpu(), mask[None])
        place = draw_pixels(torch.zeros_like(mask), EACH_PIXELS, rng)
        samples.append(at_pixels(maps, place, mask.shape))
    some = torch.cat(samples)
    some = some[torch.from_numpy(rng.permutation(len(some))[:CLUSTER_PIXELS])]
    return scores.compute(), fit_clusters(some, num_classes, seed=int(rng.integers(2**31)))


def draw_pixels(mask: Tensor, count: int, rng: np.random.Generator) -> Tensor:
    """Flat places (P,), sorted, of at most ``count`` random labelled pixels of a mask (H, W)."""
    labelled = np.flatnonzero(mask.numpy() != IGNORED)
    chosen = rng.choice(labelled, min(max(count, 1), len(labelled)), replace=False)
    return torch.from_numpy(np.sort(chosen))


def at_pixels(maps: Maps, place: Tensor, size: Sequence[int]) -> Tensor:
    """Features (P, F), float, of pixels at flat places (P,) of an image of ``size``.

    They are the values of all maps enlarged by ``F.interpolate``, computed without enlarging them.
    """
    rows, columns = size
    y = (2 * (place // columns) + 1) / rows - 1
    x = (2 * (place % columns) + 1) / columns - 1
    grid = torch.stack([x, y], dim=-1).float()[None, None].to(maps[0].device)  # (1, 1, P, 2)
    found = [
        F.grid_sample(one.float(), grid, padding_mode="border", align_corners=False)[0, :, 0].T
        for one in maps
    ]
    return torch.cat(found, dim=1)


def apply_linear(maps: Maps, linear: Linear, size: Sequence[int]) -> Tensor:
    """A linear function of every pixel's features: (B, K, *size)."""
    weights = linear.weight.to(maps[0].device).split([one.shape[1] for one in maps], dim=1)
    total = linear.bias.to(maps[0].device)[None, :, None, None]
    for one, weight in zip(maps, weights, strict=True):
        small = F.conv2d(one.float(), weight[:, :, None, None])
        total = total + F.interpolate(small, tuple(size), mode="bilinear", align_corners=False)
    return total


def fit_classifier(features: Tensor, labels: Tensor, num_classes: int) -> Linear:
    """Logits (C) of a multinomial logistic regression (scikit-learn) on standardised features.

    ``features`` are (P, F), ``labels`` (P,). Pixels count alike, so a class weighs as much as its
    area; one without labels is never chosen. The logits take features that are not standardised.
    """
    from sklearn.linear_model import LogisticRegression

    seen = np.unique(labels.numpy())
    weight = torch.zeros(num_classes, features.shape[1])
    bias = torch.full((num_classes,), -math.inf)
    bias[torch.from_numpy(seen).long()] = 0.0
    if len(seen) == 1:  # scikit-learn refuses it
        return Linear(weight, bias)
    points, as_they_are = _standardised(features)
    model = _fit(LogisticRegression(max_iter=ITERATIONS), points, labels.numpy())
    # For two classes scikit-learn has one row, the second's.
    classes = torch.from_numpy(seen[-1:] if len(seen) == 2 else seen).long()
    weight[classes] = torch.from_numpy(model.coef_).float()
    bias[classes] = torch.from_numpy(model.intercept_).float()
    return as_they_are(weight, bias)


def fit_clusters(features: Tensor, count: int, seed: int) -> Linear:
    """K-means (scikit-learn) on standardised features (P, F), the largest cluster first.

    Returns logits: the nearest centre m has the largest m·x - |m|²/2, which is linear in x.
    """
    from sklearn.cluster import KMeans

    points, as_they_are = _standardised(features)
    model = _fit(KMeans(count, n_init=3, random_state=seed), points)
    order = np.argsort(-np.bincount(model.labels_, minlength=count), kind="stable")
    centres = torch.from_numpy(model.cluster_centers_[order]).float()
    return as_they_are(centres, -centres.square().sum(dim=1) / 2)


def _standardised(features: Tensor) -> tuple[NDArray[Any], Callable[[Tensor, Tensor], Linear]]:
    """Features (P, F) as z-scores (constant ones 0), and the inverse for a linear function."""
    values = features.cpu().double()  # on the processor: MPS has no double precision
    mean, deviation = values.mean(dim=0).float(), values.std(dim=0, correction=0)
    deviation = deviation.where(deviation > 1e-8, 1.0).float()

    def as_they_are(weight: Tensor, bias: Tensor) -> Linear:
        weight = weight / deviation
        return Linear(weight, bias - weight @ mean)

    return ((features.cpu() - mean) / deviation).numpy(), as_they_are


def _fit(model: Any, *data: NDArray[Any]) -> Any:
    """Fit a scikit-learn model by one thread: with more, sums differ from run to run."""
    from threadpoolctl import threadpool_limits

    with threadpool_limits(1), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # not converged or few distinct points: good enough here
        return model.fit(*data)


def spread(embeddings: Tensor) -> float:
    """Root mean square distance of normalised embeddings (N, D) from their mean: sqrt(1 - |mean|²).

    0 if all point the same way (collapse), 1 if they cancel out, nan of a single one.
    """
    if len(embeddings) < 2:
        return math.nan
    rows = F.normalize(embeddings.cpu().double(), dim=1)  # MPS has no double precision
    return float((rows - rows.mean(dim=0)).square().sum(dim=1).mean().sqrt())


def embedding_spreads(encoder: nn.Module, images: Tensor) -> Spreads:
    """Spread of the embeddings as the loss sees them: in training mode, all images in one batch.

    In evaluation mode BatchNorm's running statistics, which lag behind, would make embeddings
    nearly equal early in training. ``encoder`` maps images (B, 3, H, W) to embeddings and maps;
    its ``decode.patch`` embeds pixels. A copy of it is run, so its running statistics stay.
    """
    twin = copy.deepcopy(encoder).train()
    embedding, maps = twin(images)
    pixels = maps[-1].flatten(2)  # (B, c, H*W)
    pixels = pixels[:, :, :: max(1, pixels.shape[2] // EACH_PIXELS)]
    decode: Any = twin.get_submodule("decode")
    embedded = decode.patch(pixels, len(maps) - 1)  # (B, D, P)
    return Spreads(spread(embedding), spread(embedded.transpose(1, 2).flatten(0, 1)))


def draw_clusters(
    path: Path,
    encode: Encode,
    items: Iterable[Item],
    pixels: Sequence[NDArray[Any]],
    clusters: Linear,
    heading: str,
) -> None:
    """Draw images and, beside each, the cluster of every pixel; see ``probe``."""
    colours = palette(len(clusters.bias))
    pictures, titles = [], []
    for (image, mask, name), shown in zip(items, pixels, strict=True):
        cluster = apply_linear(encode(image[None])[1], clusters, mask.shape)[0].argmax(dim=0)
        unmarked = np.zeros(shown.shape[:2], np.uint8)
        drawn = (shown, colours[cluster.cpu().numpy()])
        pictures += [blend(picture, unmarked, colours, SIDE) for picture in drawn]
        titles += [name, "clusters"]
    save_picture(path, overview(pictures, titles, heading))
