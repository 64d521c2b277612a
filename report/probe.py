"""Probing a pretrained network without fine-tuning it: linear classifier, k-means, spread.

The features of a pixel are up3 at the pixel, and up2 and up1 interpolated bilinearly there. A
method that trains the way down only (``Method.trains_ups``) leaves the ups as initialised, with
BatchNorm's running means of 0 and variances of 1; what it learnt is then seen through those.
Classifier and k-means are linear in the features, so their weights are applied to each map at its
own size and only the few results are enlarged.

Nothing here uses the global random numbers, and nothing changes the network.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from utils.drawing import blend, overview, palette, save_picture
from utils.metrics import IGNORED, Scores, SegmentationScores

T = TypeVar("T")
Maps = Sequence[Tensor]
"""up1, up2, up3 of the images, (B, c, h, w) each."""
Encode = Callable[[Tensor], tuple[Tensor, Maps]]
"""Images (B, 3, H, W) to embeddings (B, D) and maps, without gradients."""
Item = tuple[Tensor, Tensor, str]
"""Image (3, H, W), mask (H, W) and file name."""

PIXELS = 10_000  # that the classifier learns from
EACH_PIXELS = 1_000  # of a test image, of whose features the clusters are made
CLUSTER_PIXELS = 10_000  # that k-means is fitted to at most
ITERATIONS = 300
SPREAD_IMAGES = 8
COLLAPSED = 0.001  # a random network has 0.05 and more
SIDE = 400


class Linear(NamedTuple):
    """A linear function of a pixel's features: weight (K, F), bias (K,)."""

    weight: Tensor
    bias: Tensor


class Spreads(NamedTuple):
    """How far the embeddings of images, and of their pixels, differ; see ``spread``."""

    image_spread: float
    pixel_spread: float


@dataclass(frozen=True)
class Findings:
    """What a probe found: scores of the classifier on the test set, spreads of the embeddings."""

    scores: Scores
    spreads: Spreads

    def as_dict(self) -> dict[str, Any]:
        """All numbers, as a line of ``metrics.jsonl`` holds them."""
        return {**self.scores.as_dict(), **self.spreads._asdict()}

    def lines(self, epochs_done: int) -> list[str]:
        """For the log: the numbers, and a warning if training made embeddings nearly the same."""
        scores, spreads = self.scores, self.spreads
        line = (
            f"Probe: after {epochs_done} epochs, Dice {scores.mean_dice:.4f} ACC {scores.acc:.4f} "
            "of a linear classifier on the frozen features; spread of the embeddings "
            f"{spreads.image_spread:.4f} (images), {spreads.pixel_spread:.4f} (pixels)"
        )
        collapsed = [one for one in spreads if one < COLLAPSED]
        if not collapsed or not epochs_done:  # what a network starts with is no collapse
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
    """Probe a network as it is, and write the picture of its clusters.

    Args:
        encoder: images to embeddings and maps, see ``embedding_spreads``; left as it was.
        images: training images (B, 3, H, W), of which the spread is measured.
        annotated: at least one image with its mask.
        test: images with masks.
        shown, pixels: the images of the picture, and as they are, uint8 (H, W) or (H, W, 3).
        num_classes: C, also of the clusters.
        rng: which pixels are taken.
        precision: makes the context in which the network computes.
        picture, heading: the PNG, and the words above it.
    """
    device = next(encoder.parameters()).device

    def encode(batch: Tensor) -> tuple[Tensor, Maps]:
        with precision():
            embedding, maps = encoder(batch.to(device, memory_format=torch.channels_last))
        return embedding, maps

    with precision():
        batch = images.to(device, memory_format=torch.channels_last)
        spreads = embedding_spreads(encoder, batch)
    training = encoder.training
    encoder.eval()  # BatchNorm's running statistics are used and stay as they are
    try:
        scores, clusters = look(encode, annotated, test, num_classes, rng)
        draw_clusters(picture, encode, shown, pixels, clusters, heading)
    finally:
        encoder.train(training)
    return Findings(scores, spreads)


def evenly(samples: Sequence[T], count: int) -> list[T]:
    """At most ``count`` of the samples, taken evenly from the first on."""
    return list(samples[:: max(1, -(-len(samples) // count))])


def look(
    encode: Encode,
    annotated: Sequence[Item],
    test: Iterable[Item],
    num_classes: int,
    rng: np.random.Generator,
) -> tuple[Scores, Linear]:
    """Train a classifier on the annotated images' features, score it; cluster the test set's.

    The network is in evaluation mode. Returns the classifier's scores, and the function whose
    largest value is a pixel's cluster.
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
    """At most ``count`` (at least one) labelled pixels of a mask (H, W), each once, in order."""
    labelled = np.flatnonzero(mask.numpy() != IGNORED)
    chosen = rng.choice(labelled, min(max(count, 1), len(labelled)), replace=False)
    return torch.from_numpy(np.sort(chosen))


def at_pixels(maps: Maps, place: Tensor, size: Sequence[int]) -> Tensor:
    """Features of pixels at flat places (P,) of an image of ``size``: float (P, F), F of all maps.

    They are those that maps enlarged to the image's size would have there (``F.interpolate``,
    bilinear), without enlarging them.
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
    """Multinomial logistic regression (scikit-learn) on standardised features (P, F).

    Pixels count alike, so a class has the weight of its area. A class that no label shows is never
    chosen; with one class there is nothing to learn.

    Returns:
        Logits of the C classes, of features as they are.
    """
    from sklearn.linear_model import LogisticRegression

    seen = np.unique(labels.numpy())
    weight = torch.zeros(num_classes, features.shape[1])
    bias = torch.full((num_classes,), -math.inf)
    bias[torch.from_numpy(seen).long()] = 0.0
    if len(seen) == 1:
        return Linear(weight, bias)
    points, as_they_are = _standardised(features)
    model = _fit(LogisticRegression(max_iter=ITERATIONS), points, labels.numpy())
    # Of two classes there is one row, for the second.
    classes = torch.from_numpy(seen[-1:] if len(seen) == 2 else seen).long()
    weight[classes] = torch.from_numpy(model.coef_).float()
    bias[classes] = torch.from_numpy(model.intercept_).float()
    return as_they_are(weight, bias)


def fit_clusters(features: Tensor, count: int, seed: int) -> Linear:
    """K-means (scikit-learn) on standardised features (P, F); the largest cluster is number 0.

    The nearest centre m is the one with the largest m·x - |m|²/2, which is linear in x.
    """
    from sklearn.cluster import KMeans

    points, as_they_are = _standardised(features)
    model = _fit(KMeans(count, n_init=3, random_state=seed), points)
    order = np.argsort(-np.bincount(model.labels_, minlength=count), kind="stable")
    centres = torch.from_numpy(model.cluster_centers_[order]).float()
    return as_they_are(centres, -centres.square().sum(dim=1) / 2)


def _standardised(features: Tensor) -> tuple[NDArray[Any], Callable[[Tensor, Tensor], Linear]]:
    """Features (P, F) of mean 0 and standard deviation 1, constant ones 0.

    Also what makes a linear function of them one of the features as they are.
    """
    values = features.double().cpu()
    mean, deviation = values.mean(dim=0).float(), values.std(dim=0, correction=0)
    deviation = deviation.where(deviation > 1e-8, 1.0).float()

    def as_they_are(weight: Tensor, bias: Tensor) -> Linear:
        weight = weight / deviation
        return Linear(weight, bias - weight @ mean)

    return ((features.cpu() - mean) / deviation).numpy(), as_they_are


def _fit(model: Any, *data: NDArray[Any]) -> Any:
    """Fit a model of scikit-learn by one thread: sums of several differ from run to run."""
    from threadpoolctl import threadpool_limits

    with threadpool_limits(1), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # not converged, or few different points: good enough
        return model.fit(*data)


def spread(embeddings: Tensor) -> float:
    """How far embeddings (N, D) of unit length are from their mean, root mean square.

    It is sqrt(1 - |mean|²): 0 if all point the same way, which is collapse; 1 if they cancel out;
    nan of one alone.
    """
    if len(embeddings) < 2:
        return math.nan
    rows = F.normalize(embeddings.double(), dim=1)
    return float((rows - rows.mean(dim=0)).square().sum(dim=1).mean().sqrt())


def embedding_spreads(encoder: nn.Module, images: Tensor) -> Spreads:
    """Spread of the embeddings as the loss sees them: in training mode, all images in one batch.

    In evaluation mode BatchNorm's running statistics, which lag behind, would make embeddings of
    different images nearly equal early in training. They stay as they are: a copy is used.

    Args:
        encoder: images to embeddings and maps; its ``decode.patch`` embeds pixels.
        images: (B, 3, H, W).
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
    """Write a picture of images and, beside each, the cluster of every pixel; see ``probe``."""
    colours = palette(len(clusters.bias))
    pictures, titles = [], []
    for (image, mask, name), shown in zip(items, pixels, strict=True):
        cluster = apply_linear(encode(image[None])[1], clusters, mask.shape)[0].argmax(dim=0)
        nothing = np.zeros(shown.shape[:2], np.uint8)
        drawn = (shown, colours[cluster.cpu().numpy()])
        pictures += [blend(picture, nothing, colours, SIDE) for picture in drawn]
        titles += [name, "clusters"]
    save_picture(path, overview(pictures, titles, heading))
