"""The pretraining methods, a class each: one UNet, one pair of views, different objectives.

Shapes and ranks as in ``methods.py``, which has what they share.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from methods import Method, MomentumMethod, QueueMethod, unit
from networks import SCALES, PredictionHead, ProjectedUNet, ProjectionHead, Up
from pscl.coordinates import coordinates
from pscl.fast_matching import CELLS
from pscl.geometry import Correspondence, cell_numbers, correspond_by
from pscl.lazy_map import LazyMap, lazy_maps
from pscl.losses import byol_loss, dense_info_nce, info_nce, nt_xent, patch_nt_xent, soft_info_nce
from pscl.sampling import (
    Patches,
    agreed,
    found_again,
    label_at,
    sample_patches,
    sureness,
    with_annotated,
)
from utils.device import precision, upload
from utils.ranks import group
from utils.ranks.tensors import all_ranks, mean_of_ranks


class Judge(NamedTuple):
    """Who decides which matches take part: by which maps of view k, projected how, by what rule.

    ``admits`` takes what ``pscl.sampling.found_again`` takes, and the scale.
    """

    maps: Sequence[LazyMap]
    head: ProjectionHead
    admits: Callable[[Tensor, Tensor, Tensor, Tensor, int], Tensor]  # bool (B, C, K)


class PSCL(Method):
    """What both variants share: the sampling of patches at three scales.

    Args:
        num_classes: C.
        temperature: of both losses.
        global_local_ratio: r in (1 - r) * image loss + r * patch loss.
        top_k: K at the coarsest scale; None for ``default_top_k``.
        sample_ratio: factor by which K grows from scale to scale.
        label_guided: False sets the label map to zero, so that sampling is random (ablation).
        scale_weights: weight of each scale's patch loss.
    """

    needs_annotated = True
    default_top_k: ClassVar[int]
    normalise_keys: ClassVar[bool]  # True: patches are matched by cosine, False: by inner product

    def __init__(
        self,
        *,
        num_classes: int = 4,
        temperature: float = 0.5,
        global_local_ratio: float = 0.7,
        top_k: int | None = None,
        sample_ratio: int = 2,
        label_guided: bool = True,
        scale_weights: Sequence[float] = (1.0, 1.0, 1.0),
        **settings: Any,
    ) -> None:
        super().__init__(**settings)
        self.num_classes, self.label_guided = num_classes, label_guided
        self.temperature, self.ratio = temperature, global_local_ratio
        coarsest = self.default_top_k if top_k is None else top_k
        self.templates = [coarsest * sample_ratio**scale for scale in range(SCALES)]
        self.scale_weights = tuple(scale_weights)

    @staticmethod
    def scale_parts(sample_ratio: int) -> list[int]:
        """Parts that the scales have in the patch loss, those of 1/4 size first, at equal weights.

        Here their losses are averaged, so that all have the same.
        """
        return [1] * SCALES

    def draw_noise(self, shape: Sequence[int], device: torch.device) -> Tensor:
        """Uniform noise in [0, 1), which orders equally pure cells: the same on every device."""
        return upload(torch.rand(tuple(shape)), device)

    def encode(self, network: ProjectedUNet, view: Tensor) -> tuple[Tensor, list[LazyMap]]:
        """Embeddings (B, D) of images, and the maps up1, up2, up3."""
        return lazy_maps(network, view, self.recompute)

    def planned(self, batch: Mapping[str, Any], *, fixed: bool = False) -> dict[str, Any]:
        """Also where the cells of each scale lie, and labels and noise of the annotated image's.

        They take the place of the ``geometry`` of the views and of the ``label`` of image 0. A crop
        of fewer cells than templates is not padded, since it gives its cells repeatedly.
        """
        if "cells" in batch:
            return dict(batch)
        geometry, label = batch["geometry"], batch["label"][0].float()
        device = label.device
        sizes = self.encoder_q.encode.map_sizes(*batch["view_k"].shape[-2:])
        numbers = torch.stack([cell_numbers(geometry, *size) for size in sizes])
        plan = {"cells": upload(numbers, device)}  # (3, 8, B, 1)
        for scale, size in enumerate(sizes):
            on_cells = label_at(label, geometry[0], *size)  # (C, h'*w')
            noise = self.draw_noise(on_cells.shape, device)
            if not self.label_guided:
                on_cells = torch.zeros_like(on_cells)
            if fixed and on_cells.shape[1] >= self.templates[scale]:
                missing = size[0] * size[1] - on_cells.shape[1]
                on_cells = F.pad(on_cells, (0, missing), value=-torch.inf)  # never the purest
                noise = F.pad(noise, (0, missing))
            plan |= {f"label_up{scale + 1}": on_cells, f"noise_up{scale + 1}": noise}
        rest = {key: value for key, value in batch.items() if key != "label"}
        return super().planned(rest) | plan

    def sample(
        self,
        maps_q: Sequence[LazyMap],
        maps_k: Sequence[LazyMap],
        head_k: ProjectionHead,
        batch: Mapping[str, Any],
        judge: Judge | None = None,
    ) -> list[tuple[Tensor, Tensor, Patches]]:
        """Choose, match and project the patches of all scales (paper, patch sampling).

        ``maps_q`` and ``maps_k`` are up1, up2, up3 of both views; ``head_k`` projects view k;
        ``batch`` is planned; ``judge`` decides which patches take part, None: all. Returns of each
        scale the embeddings (B, C, K, D) of the patches in view q and in view k, in single
        precision, and the patches.
        """
        sampled = []
        for scale, (map_q, map_k) in enumerate(zip(maps_q, maps_k, strict=True)):
            places = correspond_by(batch["cells"][scale], *map_k.size, CELLS)
            label, noise = (batch[f"{name}_up{scale + 1}"] for name in ("label", "noise"))
            with torch.no_grad():
                keys = self.keys(map_k, places.key, head_k, scale)  # (B, d, P)
                with precision(None, label.device):
                    patches = sample_patches(keys, places, label, noise, self.templates[scale])
                del keys  # large
                if judge:
                    patches = self.judged(patches, places, label, judge, scale)
            query = self.project(map_q.at(patches.query), self.encoder_q.decode, scale)
            key = self.project(map_k.at(patches.key), head_k, scale)  # (B, C, K, D)
            sampled.append((query, key, patches))
        return sampled

    def judged(
        self, patches: Patches, places: Correspondence, label: Tensor, judge: Judge, scale: int
    ) -> Patches:
        """The patches, of which the ``judge`` admits those that it takes for their class."""
        seen, head = judge.maps[scale], judge.head
        own = self.keys(seen, patches.key, head, scale)  # (B, d, C*K)
        cells = self.keys(seen.of_first(), places.key[:1], head, scale)[0]  # (d, P)
        with precision(None, label.device):
            admitted = judge.admits(own, cells, places.valid[0], label, scale)
        return replace(patches, admitted=admitted)

    def keys(self, map_k: LazyMap, index: Tensor, head: ProjectionHead, scale: int) -> Tensor:
        """Vectors by which the cells at positions (B, P) are matched: (B, d, P), d <= D."""
        # The features have no name here, so that they are freed early: they are large.
        keys = coordinates(head, map_k.at(index).transpose(1, 2), scale)
        if self.normalise_keys:  # F.normalize, in place
            keys /= keys.norm(dim=1, keepdim=True).clamp_(min=1e-12)
        return keys

    def project(self, features: Tensor, head: ProjectionHead, scale: int) -> Tensor:
        """Features of patches (B, C*K, c) to embeddings (B, C, K, D), in single precision."""
        embedded = head.patch(features.transpose(1, 2), scale).transpose(1, 2).float()
        return embedded.unflatten(1, (self.num_classes, -1))

    def counted(self, rows: Tensor) -> Tensor:
        """The rows (B, ...) that count: every rank has the annotated image, rank 0 counts it."""
        return rows if group.rank() == 0 else rows[1:]

    def all_rows(self, *rows: Tensor) -> tuple[Tensor, ...]:
        """The rows (B, ...) of all ranks' images, the annotated one's in front."""
        return all_ranks(*(self.counted(each) for each in rows))

    def combine(self, image: Tensor, patch: Tensor) -> Tensor:
        """(1 - r) * image loss + r * patch loss."""
        return (1 - self.ratio) * image + self.ratio * patch


class SureMatches(nn.Module):
    """A slowly moving encoder, and how sure of a match it has to be: few at first, more later.

    For each class and scale there is a bar that the surest ``share`` of its matches in other images
    pass, over the steps of the recent past, so that a batch without the class has few of them. The
    share is 0 for the first ``RISE[0]`` steps, rises to ``RISE[1]`` and then stays. (Ours.)
    """

    RISE: ClassVar[tuple[int, int]] = (100, 1500)  # steps
    SLOW: ClassVar[float] = 0.99  # share of the slow encoder that each step keeps
    MEMORY: ClassVar[float] = 0.95  # share of the bar that each step keeps

    steps: Tensor
    bar: Tensor

    def __init__(self, encoder: ProjectedUNet, num_classes: int, share: float) -> None:
        super().__init__()
        self.encoder = copy.deepcopy(encoder).requires_grad_(False)
        self.average, self.most = get_ema_multi_avg_fn(self.SLOW), share
        self.register_buffer("steps", torch.zeros(()))
        self.register_buffer("bar", torch.zeros(SCALES, num_classes))

    @torch.no_grad()
    def follow(self, encoder: ProjectedUNet) -> None:
        """Begin a step: move a little towards the encoder that learns."""
        self.average(list(self.encoder.parameters()), list(encoder.parameters()), None)
        self.steps += 1

    @property
    def share(self) -> Tensor:
        """The share of matches that takes part in this step."""
        first, last = self.RISE
        return self.most * ((self.steps - first) / (last - first)).clamp(0, 1)

    def above(self, sure: Tensor, others: Tensor, scale: int) -> Tensor:
        """Which of the patches (B, C, K) are sure enough: above the bar, and above 0.

        The bar of the scale follows ``others``, how sure all patches (N, C, K) of other images are.
        """
        here = others.transpose(0, 1).flatten(1).quantile(1 - self.share, dim=1)  # (C,)
        keep = torch.where(self.steps > 1, self.MEMORY, 0.0)
        self.bar[scale] = keep * self.bar[scale] + (1 - keep) * here
        return (sure > self.bar[scale].clamp(min=0)[:, None]) & (self.share > 0)


class PSCL_SimCLR(PSCL):
    """PSCL on SimCLR: one encoder; negatives are the batch's images, and patches of other classes.

    Args:
        intra_view_negatives: whether patches of the same image and view may be negatives.
        admit_matches: "all", or (ours) of the other images only some patches: "classifier", those
            that a pixel classifier sees as their template's class; what it sees is the batch's
            ``seen``; "cycle", those of ``pscl.sampling.found_again``; "sure", the surest share of
            a slowly moving encoder (``SureMatches``).
        admit_share: the share that "sure" admits in the end.
    """

    default_top_k = 4
    normalise_keys = False

    def __init__(
        self,
        *,
        intra_view_negatives: bool = True,
        admit_matches: str = "all",
        admit_share: float = 0.3,
        **settings: Any,
    ) -> None:
        super().__init__(**settings)
        self.intra_view_negatives, self.admit_matches = intra_view_negatives, admit_matches
        self.admit_share = admit_share
        if admit_matches == "sure":
            self.sure = SureMatches(self.encoder_q, self.num_classes, admit_share)

    def judge(self, maps_k: Sequence[LazyMap], view_k: Tensor) -> Judge | None:
        """Who decides which matches take part, by features; None: nobody."""
        if self.admit_matches == "cycle":
            return Judge(maps_k, self.encoder_q.decode, lambda *keys: found_again(*keys[:4]))
        if self.admit_matches != "sure":
            return None
        self.sure.follow(self.encoder_q)
        with torch.no_grad():
            _, maps = self.encode(self.sure.encoder, view_k)
        return Judge(maps, self.sure.encoder.decode, self.admit_surest)

    def admit_surest(
        self, keys: Tensor, annotated: Tensor, valid: Tensor, label: Tensor, scale: int
    ) -> Tensor:
        """The patches (B, C, K) of which the slow encoder is surest, on all ranks together."""
        sure = sureness(keys, annotated, valid, label)
        (whole,) = self.all_rows(sure)
        return with_annotated(self.sure.above(sure, whole[1:], scale))

    def forward(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """Losses of one batch whose image 0 is annotated: ``loss, image, patch, patch_up1..3``.

        ``patch_up1..3`` are already multiplied by ``scale_weights``; ``patch`` is their mean.
        """
        batch = self.planned(batch)
        # Two passes, not one of both views joined: BatchNorm's statistics are per view.
        image_q, maps_q = self.encode(self.encoder_q, batch["view_q"])  # (B, D), 3 maps
        image_k, maps_k = self.encode(self.encoder_q, batch["view_k"])
        judge = self.judge(maps_k, batch["view_k"])
        sampled = self.sample(maps_q, maps_k, self.encoder_q.decode, batch, judge)
        losses, told = {}, {}
        for scale, (query, key, patches) in enumerate(sampled):  # (B, C, K, D)
            admitted = patches.admitted
            if self.admit_matches == "classifier":
                admitted = agreed(patches, batch["seen"], *maps_k[scale].size)  # (B, C, K)
            if admitted is not None:
                (admitted,) = self.all_rows(admitted)
                told[f"admitted_up{scale + 1}"] = admitted[1:].float().mean()
            query, key = self.all_rows(query, key)
            loss = patch_nt_xent(query, key, self.temperature, self.intra_view_negatives, admitted)
            losses[f"patch_up{scale + 1}"] = self.scale_weights[scale] * loss
        image_q, image_k = self.all_rows(image_q, image_k)
        image = nt_xent(image_q, image_k, self.temperature)
        patch = torch.stack(list(losses.values())).mean()
        parts = {"image": image, "patch": patch, **losses, **told}
        return {"loss": self.combine(image, patch), **parts}


class PSCL_MoCo(PSCL, QueueMethod):
    """PSCL on MoCo: a momentum encoder computes the keys, queues keep them, targets are soft.

    Keys of the row's own production batch are positives too, and so are all patch keys of its
    class, with weights that decay while a key ages in the queue.

    Args:
        group_decay: factor per step of the weight in the image queue, same production batch.
        patch_group_decay: the same in the patch queue.
        freshness_decay: factor per step of the weight in the patch queue, any production batch.
    """

    needs_groups = weighs_purity = True
    default_top_k = 30
    normalise_keys = True

    patch_queue: Tensor
    queue_group: Tensor
    group_affinity: Tensor
    patch_group_affinity: Tensor
    freshness: Tensor

    def __init__(
        self,
        *,
        group_decay: float = 0.2,
        patch_group_decay: float = 0.5,
        freshness_decay: float = 0.2,
        **settings: Any,
    ) -> None:
        super().__init__(**settings)
        self.decays = (group_decay, patch_group_decay, freshness_decay)
        # Entry e of class c is row e*C + c; published checkpoints hold a fourth, unused scale.
        size = len(self.queue)
        noise = torch.randn(SCALES + 1, size * self.num_classes, self.embed_dim)
        self.register_buffer("patch_queue", noise)
        self.register_buffer("queue_group", torch.full((size,), -1))
        for name in ("group_affinity", "patch_group_affinity", "freshness"):
            self.register_buffer(name, torch.zeros(size))

    @staticmethod
    def scale_parts(sample_ratio: int) -> list[int]:
        """As many as rows: the loss is averaged over those of all scales together."""
        return [sample_ratio**scale for scale in range(SCALES)]

    def encode_view_k(self, view: Tensor) -> tuple[Tensor, list[LazyMap]]:
        """``encode`` by the momentum encoder, without gradients, see ``encode_keys``."""
        blocks: list[Up | None] = []

        def encode(images: Tensor) -> tuple[Tensor, ...]:
            image, maps = self.encode(self.encoder_k, images)
            blocks[:] = [each.unfinished for each in maps]
            return image, *(each.features for each in maps)

        image, *features = self.encode_keys(encode, view)
        return image, [LazyMap(*each) for each in zip(features, blocks, strict=True)]

    def image_targets(self, group: Tensor) -> Tensor:
        """Soft targets (B, Q) of the image queue for images of the production batches (B,)."""
        return self.group_affinity * (self.queue_group == group[:, None])

    def patch_targets(self, group: Tensor) -> Tensor:
        """Soft targets (B, C, Q*C) of the patch queue: entries of the row's class only."""
        affinity = self.patch_group_affinity * (self.queue_group == group[:, None]) + self.freshness
        same_class = torch.eye(self.num_classes, device=group.device)
        return (affinity[:, None, :, None] * same_class[:, None, :]).flatten(2)

    @torch.no_grad()
    def enqueue(self, image_k: Tensor, patch_k: Tensor, group: Tensor) -> None:
        """Write the batch's keys over the oldest, then decay all weights, the newest included.

        ``image_k`` are unit vectors (B, D), ``patch_k`` purity-weighted sums (3, B, C, D).
        """
        entry = self.replace_oldest(queue=image_k, queue_group=group)
        by_entry = self.patch_queue.view(SCALES + 1, len(self.queue), self.num_classes, -1)
        by_entry[:SCALES, entry] = patch_k[:, -len(entry) :]
        weights = (self.group_affinity, self.patch_group_affinity, self.freshness)
        for weight, decay in zip(weights, self.decays, strict=True):
            weight.index_fill_(0, entry, 1.0)
            weight.mul_(decay)

    def forward(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """Losses of one batch whose image 0 is annotated: ``loss, image, patch, patch_up1..3``.

        ``patch_up1..3`` are means over the annotated image's rows, as in the published log, each
        row already multiplied by K, its purity and the scale's weight; ``patch`` is the mean over
        all rows of all scales.
        """
        batch = self.planned(batch)
        self.update_key_encoder()
        image_q, maps_q = self.encode(self.encoder_q, batch["view_q"])  # (B, D), 3 maps
        image_k, maps_k = self.encode_view_k(batch["view_k"])
        sampled = self.sample(maps_q, maps_k, self.encoder_k.decode, batch)
        targets = self.patch_targets(batch["group"])[:, :, None]  # (B, C, 1, Q*C)
        rows, sums, parts = [], [], {}
        for scale, (query, key, patches) in enumerate(sampled):
            query, key, queue = unit(query), unit(key), self.patch_queue[scale].clone()
            weight = self.scale_weights[scale] * self.templates[scale] * patches.purity
            loss = soft_info_nce(query, key, queue, targets, weight, self.temperature)
            rows.append(self.counted(loss).flatten(1))  # (B, C*K)
            sums.append((patches.purity[..., None] * key).sum(dim=2))  # (B, C, D)
            parts[f"patch_up{scale + 1}"] = loss[0].mean().detach()
        image_q, image_k, queue = unit(image_q), unit(image_k), self.queue.clone()
        targets, weight = self.image_targets(batch["group"]), queue.new_ones(1)
        loss = soft_info_nce(image_q, image_k, queue, targets, weight, self.temperature)
        image = mean_of_ranks(self.counted(loss))
        patch = mean_of_ranks(torch.cat(rows, dim=1))
        keys = self.all_rows(image_k, torch.stack(sums, dim=1), batch["group"])
        self.enqueue(keys[0], keys[1].transpose(0, 1), keys[2])
        return {"loss": self.combine(image, patch), "image": image, "patch": patch, **parts}


class MoCo(QueueMethod):
    """Momentum contrast of whole images (He 2020, algorithm 1): no label, no production batch.

    The paper has momentum 0.999, 65,536 keys and temperature 0.07; here methods share a setting.
    """

    trains_ups = False

    def __init__(self, *, temperature: float = 0.5, **settings: Any) -> None:
        super().__init__(**settings)
        self.temperature = temperature
        self.queue = unit(self.queue)  # as in its published program

    def forward(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """Loss of one batch: ``loss`` is ``image``, its only part."""
        self.update_key_encoder()
        query = self.encoder_q.embed(batch["view_q"])  # (B, D)
        (key,) = self.encode_keys(lambda view: (self.encoder_k.embed(view),), batch["view_k"])
        query, key = unit(query), unit(key)
        loss = mean_of_ranks(info_nce(query, key, self.queue.clone(), self.temperature))
        self.replace_oldest(queue=all_ranks(key)[0])
        return {"loss": loss, "image": loss}


class SimCLR(Method):
    """Contrast of the two views within the batch (Chen 2020, algorithm 1): one encoder, no label.

    The paper has batches of 256 to 8192 images; a batch of 8 has 14 negatives a row.
    """

    least_images = 2  # one image alone has no negatives
    trains_ups = False

    def __init__(self, *, temperature: float = 0.5, **settings: Any) -> None:
        super().__init__(**settings)
        self.temperature = temperature

    def forward(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """Loss of one batch: ``loss`` is ``image``, its only part."""
        # Two passes, as in PSCL-SimCLR: BatchNorm's statistics are per view.
        image_q = self.encoder_q.embed(batch["view_q"])  # (B, D)
        image_k = self.encoder_q.embed(batch["view_k"])  # (B, D)
        image_q, image_k = all_ranks(image_q, image_k)
        loss = nt_xent(image_q, image_k, self.temperature)
        return {"loss": loss, "image": loss}


class BYOL(MomentumMethod):
    """Predict a momentum encoder's embedding of the other view (Grill 2020, algorithm 1).

    No negatives and no label. ``encoder_q`` is the online network, ``encoder_k`` the target. In the
    paper the momentum rises from 0.996 to 1, and the projector has a BatchNorm; here the momentum
    is constant and all methods have the same projector.
    """

    least_images = least_of_rank = 2  # the predictor's BatchNorm has one value per image
    trains_ups = False

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.predictor = PredictionHead(self.embed_dim, self.hidden_dim)

    def forward(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """Losses of one batch: ``loss`` is the sum of ``predict_k`` and ``predict_q``."""
        self.update_key_encoder()
        losses = {}
        for seen, other in (("q", "k"), ("k", "q")):
            prediction = self.predictor(self.encoder_q.embed(batch[f"view_{seen}"]))  # (B, D)
            with torch.no_grad():
                target = self.encoder_k.embed(batch[f"view_{other}"])  # (B, D)
            losses[f"predict_{other}"] = mean_of_ranks(byol_loss(prediction, target))
        return {"loss": losses["predict_k"] + losses["predict_q"], **losses}


class DenseCL(QueueMethod):
    """MoCo of whole images and MoCo of the cells of a grid, half each (Wang 2021, figure 2).

    The dense map is the last one, up3, averaged over a grid of P = dense_grid**2 cells (S**2 in the
    paper) and projected by up3's patch head. The paper's last map has 1/32 of the image's size;
    this one has the full size, so that the whole UNet learns. Both queues have Q entries; for the
    other settings see ``MoCo``.
    """

    dense_queue: Tensor

    def __init__(self, *, dense_grid: int = 7, temperature: float = 0.5, **settings: Any) -> None:
        super().__init__(**settings)
        self.dense_grid, self.temperature = dense_grid, temperature
        self.queue = unit(self.queue)
        self.register_buffer("dense_queue", unit(torch.randn_like(self.queue)))  # (Q, D)

    def forward(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """Losses of one batch: ``loss``, and its halves ``image`` and ``dense``."""
        self.update_key_encoder()
        image_q, dense_q, features_q = self.encode(self.encoder_q, batch["view_q"])
        encode = partial(self.encode, self.encoder_k)
        image_k, dense_k, features_k = self.encode_keys(encode, batch["view_k"])
        image_q, image_k = unit(image_q), unit(image_k)
        image = mean_of_ranks(info_nce(image_q, image_k, self.queue.clone(), self.temperature))
        queue = self.dense_queue.clone()
        dense = dense_info_nce(dense_q, dense_k, features_q, features_k, queue, self.temperature)
        dense = mean_of_ranks(dense)
        keys = all_ranks(image_k, unit(dense_k.mean(dim=2)))  # (B, D) each
        self.replace_oldest(queue=keys[0], dense_queue=keys[1])
        return {"loss": 0.5 * image + 0.5 * dense, "image": image, "dense": dense}

    def encode(self, encoder: ProjectedUNet, view: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Embeddings of images (B, D) and of cells (B, D, P), and the cells' features (B, c, P)."""
        image, maps = encoder(view)
        features = F.adaptive_avg_pool2d(maps[-1], self.dense_grid).flatten(2)  # (B, c, P)
        dense = encoder.decode.patch(features, SCALES - 1)  # (B, D, P)
        return image, dense.float(), features.float()


METHODS: dict[str, type[Method]] = {
    "moco": PSCL_MoCo,
    "simclr": PSCL_SimCLR,
    "plain-moco": MoCo,
    "plain-simclr": SimCLR,
    "byol": BYOL,
    "densecl": DenseCL,
}


def settings_of(self_mode: str) -> set[str]:
    """Names of the settings that a method's class takes, those of its bases included."""
    bases = [base for base in METHODS[self_mode].__mro__ if issubclass(base, Method)]
    parameters = [p for base in bases for p in inspect.signature(base).parameters.values()]
    return {p.name for p in parameters if p.kind is p.KEYWORD_ONLY}


def build_method(self_mode: str, settings: Mapping[str, Any]) -> Method:
    """The method called ``self_mode``, with those of the settings that its class takes."""
    names = settings_of(self_mode)
    return METHODS[self_mode](**{k: v for k, v in settings.items() if k in names})
