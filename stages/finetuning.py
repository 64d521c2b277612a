"""Training the UNet with labels: from random weights, or from a pretrained network."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from functools import partial
from itertools import groupby, islice
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

import data
from config import FIELDS
from data import Sample, find_split
from imaging.drawing import class_colours, save_prediction
from networks import UNet
from pscl.losses import supervised_loss
from pscl.recompute import recompute_activations
from report import sheets
from stages.job import (
    WEIGHTS,
    Job,
    Runner,
    due,
    some_names,
)
from stages.pretraining import SelfSupervised
from utils.checkpoint import CheckpointError, load, network_state, save, to_published, transfer
from utils.log import evaluation_lines
from utils.metrics import IGNORED, Scores, SegmentationScores

EVALUATION_BATCH = 8


class Supervised(Runner):
    """Training the UNet with labels from random weights, scored on the test set."""

    stage, number = "sup", 3
    wrapper: ClassVar[str] = "super"
    start = "Supervised training from random weights"

    def __init__(self, job: Job) -> None:
        super().__init__(job)
        self.annotated, self.test = job.annotated(), find_split(self.config.data_dir, "test_numf")

    def build(self) -> None:
        """UNet, optimizer and batches."""
        c, samples = self.config, self.annotated
        self.module = self.to_memory(self.network())
        self.optimizer = torch.optim.Adam(self.parameter_groups())
        self.epochs = c.epochs_for(self.job.size)
        self.class_weight = torch.tensor(c.class_weight, device=self.device)
        strengths = [getattr(c, f"fine_{name}") for name in data.Augmentation._fields]
        annotated = data.SegmentationDataset(
            samples,
            self.job.store,
            seed=c.seed,
            augmentation=data.Augmentation(*strengths),
            crops=c.fine_crops,
            standardize=c.standardize,
        )
        self.batches = data.Batches(annotated, min(c.fine_batch_size, len(samples)), c.workers)

    def network(self) -> nn.Module:
        """The UNet before training."""
        c = self.config
        network = UNet(c.num_classes, c.channels, c.norm)
        # The batches are small: by default nothing is recomputed, which is faster.
        recompute_activations(network.encode, c.recompute or -1)
        return network

    def parameter_groups(self) -> list[dict[str, Any]]:
        """All parameters at one learning rate."""
        return [{"params": list(self.module.parameters()), "lr": self.config.sup_lr}]

    def samples(self) -> list[Sample]:
        """Annotated images and test images."""
        return self.annotated + self.test

    def unsuitable(self) -> list[str]:
        """A line for each annotated image that is smaller than the crops."""
        side, paths = self.config.fine_crop, [s.image for s in self.annotated]
        sizes = {path: self.job.store.image(path).shape[-2:] for path in paths}
        return [
            f"{path}: {w}x{h} pixels; fine_crop: found {side}; give at most {min(h, w)}, or 0"
            for path, (h, w) in sizes.items()
            if min(h, w) < side
        ]

    def losses(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Half cross-entropy, half Dice loss."""
        return supervised_loss(self.module(batch["image"]), batch["mask"], self.class_weight)

    def header(self) -> list[str]:
        """Start, training data and test set."""
        every = self.config.eval_every_for(self.job.size)
        return [
            f"{self.start} for {self.epochs} epochs on {self.images(self.annotated)} with labels "
            f"of {self.config.data_dir}: {some_names(self.annotated)}",
            self.labelled(),
            f"Scored on {self.images(self.test)} of the test set every {every} epochs and "
            "after the last; Dice is pooled over the set, without background",
        ]

    def labelled(self) -> str:
        """How many pixels of the annotated images have which class."""
        masks = [self.job.store.mask(s.mask).numpy() for s in self.annotated if s.mask]
        counts = sum((np.bincount(m.ravel(), minlength=256) for m in masks), np.zeros(256, int))
        known = counts.sum() - counts[IGNORED]
        classes = ", ".join(f"class {c} {counts[c]}" for c in range(self.config.num_classes))
        return f"Labelled: {known} pixels, {known / counts.sum():.1%} of them: {classes}"

    def due(self) -> list[int]:
        """The epochs, counted from 0, that are evaluated."""
        c, size = self.config, self.job.size
        return [done - 1 for done in due(c.eval_every_for(size), c.epochs_for(size)) if done]

    def outputs(self) -> list[str]:
        """Also the best and the last network, the sheets and the predictions."""
        names = ("{}.pt", "{}_last.pt", "sheet_{}.png", "sheet_{}_extremes.png")
        own = [name.format(self.stage) for name in names]
        tested = [picture_name(s.name) for s in self.test]
        pictures = [f"epoch_{epoch}/{name}" for epoch in self.due() for name in tested]
        return [*super().outputs(), *own, *pictures]

    def epoch_done(self, epoch: int) -> None:
        """Evaluate when due; save the network if its ACC is the best, and the last one."""
        if epoch not in self.due():
            return
        counts = self.evaluate(epoch)
        scores = Scores.from_confusion(counts)
        entry = {"epoch": epoch, **scores.as_dict()}
        best = all(scores.acc > e["acc"] for e in self.evaluations)
        self.evaluations = [*self.evaluations, {**entry, "confusion": counts.tolist()}]
        for line in evaluation_lines(scores):
            self.log.line(line)
        self.log.metrics({"evaluation": entry})
        names = [f"{self.stage}.pt"] if best else []
        names += [f"{self.stage}_last.pt"] if epoch + 1 == self.epochs else []
        for name in names:
            state = to_published(self.module.state_dict())
            settings = {**self.settings, **self.config.appearance()}
            save(self.run_dir / name, {self.wrapper: state, **entry, "settings": settings})

    @torch.inference_mode()
    def evaluate(self, epoch: int) -> NDArray[np.int64]:
        """Write predictions of the test set, after the last epoch sheets, too.

        Returns the confusion matrices (n, C, C) of the test images, true class as row.
        """
        self.module.eval()
        scores = SegmentationScores(self.config.num_classes)
        folder = self.run_dir / f"epoch_{epoch}"
        rows: list[tuple[NDArray[Any], NDArray[Any], NDArray[Any]]] = []
        items = data.test_items(self.test, self.job.store, self.config.standardize)
        for images, masks, names in equal_sizes(items):
            with self.precision():
                x = images.to(self.device, memory_format=torch.channels_last)
                prediction = self.module(x).argmax(dim=1)
            scores.add(prediction, masks.to(self.device))
            classes = prediction.to(torch.uint8).cpu().numpy()
            for name, mask, picture in zip(names, masks, classes, strict=True):
                save_prediction(folder / picture_name(name), picture, self.config.mapping)
                if epoch + 1 == self.epochs:
                    rows.append((self.pixels(self.test[len(rows)]), mask.numpy(), picture))
        counts = scores.counts()
        if rows:
            c = self.config
            colours = class_colours(c.num_classes, c.class_colours)
            names = [sample.name for sample in self.test]
            heading = f"{self.run_dir.parent.name}/{self.run_dir.name}, epoch {epoch}"
            write = partial(sheets.write_sheets, self.run_dir, self.stage, heading=heading)
            write(rows, names, counts, class_names=c.class_names, colours=colours)
            self.log.note(f"Pictures of test images: {self.run_dir / f'sheet_{self.stage}.png'}")
        return counts


class Finetune(Supervised):
    """Fine-tuning a pretrained network; its stem and downs have a lower learning rate."""

    stage, number = "fine", 2
    wrapper = "finetune"

    def pretrained(self) -> Path:
        """The pretrained file: ``--pretrained``, or the run's own pretraining."""
        if self.config.pretrained:
            return Path(self.config.pretrained)
        return self.run_dir / f"moco{self.config.self_max_epoch}.pt"

    def encoder(self) -> dict[str, Tensor]:
        """The tensors of the pretrained file."""
        return network_state(load(self.pretrained()), source=self.pretrained())

    def made_first(self) -> bool:
        """Whether this command writes the pretrained file before."""
        if self.config.pretrained or "self" not in self.config.stage_list:
            return False
        with suppress(CheckpointError):  # which pretraining itself reports
            state = SelfSupervised(self.job).saved()
            return state is None or not state["finished"]
        return True

    def start_weights(self) -> dict[str, str]:
        """A digest of the pretrained encoder."""
        encoder = sorted((k, v) for k, v in self.encoder().items() if k.startswith("encode."))
        contents = b"".join(v.float().contiguous().numpy().tobytes() for _, v in encoder)
        return {WEIGHTS: hashlib.sha256(contents).hexdigest()[:16]}

    def problems(self) -> list[str]:
        """Also if the pretrained file is missing, does not fit or has changed."""
        path = self.pretrained()
        if self.made_first():
            return super().problems()
        if not path.exists():
            others = ", ".join(sorted(p.name for p in path.parent.glob("moco*.pt")))
            hint = f"--self_max_epoch (there is {others})" if others else "--pretrained FILE"
            return [f"{path}: no such file; pretrain first (-stages self-fine), or give {hint}"]
        try:
            transfer(super().network(), self.encoder(), source=path)
        except CheckpointError as error:
            return [str(error)]
        return self.unsuitable() + self.conflicts(self.identity())

    def network(self) -> nn.Module:
        """The UNet with everything but its last layer pretrained."""
        network, path = super().network(), self.pretrained()
        self.start = f"Fine-tuning from {path} ({transfer(network, self.encoder(), source=path)})"
        return network

    def header(self) -> list[str]:
        """Also a warning if the images of pretraining were prepared in another way."""
        first, *rest = super().header()
        path, warnings = self.pretrained(), []
        old: Any = load(path).get("settings")  # a published file has none
        for name in ("standardize", "image_size") if isinstance(old, Mapping) else ():
            was, new = old.get(name, FIELDS[name].default), getattr(self.config, name)
            if was != new:
                said = f"{path}: pretrained with {name} {was}, fine-tuned with {new}"
                warnings.append(f"Warning: {said}; give --{name} {was} unless you mean it")
        return [first, *warnings, *rest]

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Stem and downs at one rate, ups and the last layer at another."""
        rest = dict(self.module.named_parameters())
        down = [name for name in rest if name.startswith(("encode.inc.", "encode.down"))]
        slow = [rest.pop(name) for name in down]
        return [
            {"params": slow, "lr": self.config.fine_lr_encoder},
            {"params": list(rest.values()), "lr": self.config.fine_lr_decoder},
        ]


def picture_name(image: str) -> str:
    """File name of the prediction of a test image."""
    return f"{Path(image).stem}.png"


def equal_sizes(
    items: Iterable[tuple[Tensor, Tensor, str]],
) -> Iterator[tuple[Tensor, Tensor, list[str]]]:
    """Images (B, 3, H, W), masks (B, H, W) and names, batched where neighbours have equal sizes."""
    for _, group in groupby(items, key=lambda item: item[0].shape):
        while batch := list(islice(group, EVALUATION_BATCH)):
            images, masks, names = zip(*batch, strict=True)
            yield torch.stack(images), torch.stack(masks), list(names)
