"""Pretraining without labels."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import data
from config import FIELDS, SELF_MODES
from data import Sample
from imaging.listing import some_names
from methods import Method
from model import METHODS, PSCL, SureMatches, build_method, settings_of
from pscl.sampling import VOTES
from report import probe
from stages.forest import PixelForest, pixels_of
from stages.job import Job, Runner, due, unused_settings
from stages.kept_images import KeptImages, why_not
from stages.rates import make_optimizer
from utils.checkpoint import save, to_published
from utils.commandline import format_value
from utils.device import fuses_optimizers, size_of
from utils.log import progress
from utils.ranks import group
from utils.run_folder import pretrained_name
from utils.training import LONGER

ADMITTED = {  # how the log words the values of admit_matches
    "classifier": "that a pixel classifier, learnt from the annotated images, sees as their "
    "template's class",
    "cycle": f"whose {VOTES} most similar patches of the annotated image all show their template's "
    "class",
    "sure": "of which a slowly moving encoder is surest, none at first and then more of them",
}


class SelfSupervised(Runner):
    """Pretraining without labels by the method that ``self_mode`` names."""

    stage, number = "self", 1
    lengths = ("self_max_epoch",)

    def __init__(self, job: Job) -> None:
        super().__init__(job)
        c, self.method = self.config, METHODS[self.config.self_mode]
        self.train_samples = data.pretraining_samples(job.store, c.data_dir, c.use_unlabelled)
        self.annotated = job.annotated() if self.method.needs_annotated else []
        auto = c.augment_on == "auto" and self.device.type != "cpu"
        self.on_device = auto or c.augment_on == "device"  # views are finished there
        self.kept: KeptImages | None = None  # images that stay on the device
        self.not_kept = ""  # why they do not, where they should
        admits = c.admit_matches if "admit_matches" in settings_of(c.self_mode) else "all"
        self.admits = admits == "classifier"  # by what a pixel classifier sees
        self.judged = ADMITTED.get(admits, "")  # how it is told which matches count

    def build(self) -> None:
        """The method, Adam or AdamW, and batches of two views with an annotated image in front."""
        c = self.config
        self.ranks = group.size()
        self.module = self.to_memory(build_method(c.self_mode, c.to_dict()))
        self.module = self.synchronised(self.module)
        self.replay_steps()
        self.epochs = c.self_max_epoch
        trained = [p for p in self.module.parameters() if p.requires_grad]
        fused = fuses_optimizers(self.device)  # a loaded state has the choice of its run
        groups = [{"params": trained, "lr": c.self_lr}]
        self.optimizer = make_optimizer(c.self_optimizer, groups, c.self_weight_decay, fused)
        views = data.TwoViewDataset(
            self.train_samples,
            self.annotated,
            self.job.store,
            num_classes=c.num_classes,
            seed=c.seed,
            jitter_strength=c.self_jitter,
            random_crop=c.random_crop,
            crop=c.self_crop,
            standardize=c.standardize,
            unfinished=self.on_device,
            seen=self.seen_classes() if self.admits else None,
            kept=self.keep_images(),
            by_batch=c.batches == "names",
        )
        self.batches = data.Batches(views, c.self_batch_size, c.workers)

    def keep_images(self) -> bool:
        """Whether the images stay on the device (``cache_on``)."""
        c, files = self.config, [sample.image for sample in self.samples()]
        if c.cache_on == "cpu" or (c.cache_on == "auto" and self.device.type != "cuda"):
            return False
        self.not_kept = why_not(files, self.job.store, self.device)
        if not self.on_device:
            self.not_kept = "their views are finished on the CPU (augment_on)"
        if self.not_kept:
            return False
        self.kept = KeptImages(files, self.job.store, self.device, c.self_crop)
        return True

    def seen_classes(self) -> dict[Path, Tensor]:
        """What a pixel classifier, learnt from the annotated images, sees in each: ids (H, W)."""
        c, store = self.config, self.job.store
        forest = PixelForest(c.seed, c.standardize, quick=True)
        learnt = [(*pixels_of(store, s.image), store.mask(s.mask).numpy())
                  for s in self.annotated if s.mask]  # fmt: skip
        images, insides, masks = zip(*learnt, strict=True)
        forest.fit(images, masks, insides)
        seen, samples = dict[Path, Tensor](), self.samples()
        with progress(len(samples), "Pixel classifier") as bar:
            for sample in samples:
                ids = forest.predict(*pixels_of(store, sample.image))
                seen[sample.image] = torch.from_numpy(ids)
                bar.update(1)
        return seen

    def samples(self) -> list[Sample]:
        """All images of pretraining."""
        return self.train_samples + self.annotated

    def prepared(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Views finished, patches planned."""
        if self.kept:
            batch = self.kept.views(batch)
        if self.on_device:
            batch = data.finish_views(batch, self.config.num_classes)
        assert isinstance(self.module, Method)
        return self.module.planned(batch, fixed=self.graphs is not None)

    def losses(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """The method's own."""
        return dict(self.module(batch))

    def header(self) -> list[str]:
        """Method, data and steps, settings without effect, and a note on the method's loss."""
        c, annotated = self.config, self.annotated
        name, batch = SELF_MODES[c.self_mode], min(c.self_batch_size, len(self.train_samples))
        lines = [
            *self.job.notes,
            f"Pretraining with {name} for {self.epochs} epochs on "
            f"{self.images(self.train_samples)} of {c.data_dir}, labels unused, "
            f"{len(self.batches)} steps of {batch} images an epoch",
        ]
        left_out = [] if c.use_unlabelled else self.job.split("train_unlabelled")
        if left_out:
            lines.append(
                f"{len(left_out)} images of {c.data_dir}/train_unlabelled are left out; "
                "--use_unlabelled pretrains on them too"
            )
        lines += self.about_kept() + self.shares(batch)
        if c.self_crop:
            side = c.self_crop
            lines.append(f"The views are made of crops of {side}x{side} pixels, drawn every time")
        if annotated:
            one = "One of the annotated images" if annotated[1:] else "The annotated image"
            names = some_names(s.name for s in annotated)
            lines.append(f"{one} rides along in every batch: {names}")
        if self.method.needs_groups and c.batches == "none":
            lines.append("No production batches (--batches none): every image is its own")
        if self.judged:
            judged = f"Of matches in other images only those count {self.judged}"
            lines.append(f"{judged} (admitted: their share)")
            lines += self.short_of_share()
        lines += self.few_cells()
        if c.probe and not self.method.trains_ups:
            lines.append(
                f"{name} trains the way down only: the probe sees it through ups that stay as they "
                "were initialised, so compare epochs, not methods"
            )
        unused = [n for n in unused_settings(c) if getattr(c, n) != FIELDS[n].default]
        if unused:
            values = ", ".join(f"{n} = {format_value(getattr(c, n))}" for n in unused)
            lines.append(f"Of no effect on {name}: {values}")
        note = self.method.log_note(c.queue_size, batch + bool(annotated))
        return lines + ([note] if note else [])

    def short_of_share(self) -> list[str]:
        """A warning if training ends before ``admit_share`` is reached."""
        steps, (first, last) = self.epochs * len(self.batches), SureMatches.RISE
        if self.config.admit_matches != "sure" or steps >= last:
            return []
        share = self.config.admit_share * max(0, steps - first) / (last - first)
        found = f"--admit_matches sure rises for {last} steps, and this run has {steps}"
        wanted = f"not {self.config.admit_share:g}"
        return [f"Warning: {found}: {share:.2g} of the matches count in the end, {wanted}"]

    def few_cells(self) -> list[str]:
        """A warning if there may be fewer cells than patches to weigh by their purity.

        A cell that one class took counts 255 less for the next (``pscl.sampling.choose``), so that
        one that has to be taken again has a negative weight.
        """
        if not (self.method.weighs_purity and self.config.label_guided):
            return []
        c = self.config
        assert isinstance(self.module, PSCL)
        shapes = [self.job.store.shape(s.image)[-2:] for s in self.annotated]
        least = c.self_crop**2 or min(height * width for height, width in shapes)
        for scale, templates in enumerate(self.module.templates):  # at 1/4, 1/2 and full size
            cells = int(least * (1 - c.random_crop) ** 2 * 4**scale / 16)
            if cells < c.num_classes * templates:
                wanted = f"{c.num_classes} classes take {templates} each at scale {scale + 1}"
                found = f"a crop of the annotated image may have {cells} cells, of which {wanted}"
                effect = "what is taken twice gets a negative weight, as published"
                cure = "give a smaller --top_k, or larger images or crops"
                return [f"Warning: {found}: {effect}; {cure}"]
        return []

    def about_kept(self) -> list[str]:
        """Whether images stay on the device, where that was wanted."""
        if self.kept:
            size = size_of(len(self.kept.pixels))
            return [f"Images stay on the device once they came there ({size})"]
        line = f"Images are uploaded in every step: {self.not_kept}"
        return [line] if self.not_kept else []

    def shares(self, batch: int) -> list[str]:
        """How several ranks share a batch, and how many images an epoch leaves out."""
        keys = (
            ", keys shuffled"
            if self.config.batch_norm_ranks == "shuffle"
            else "; rank 0's are saved"
        )
        rest = len(self.train_samples) % batch
        left = f"; every epoch leaves out {rest} images, other ones each time" if rest else ""
        return [f"{line}{left}" for line in self.about_ranks(batch, f"of each rank's part{keys}")]

    def undivided(self) -> list[str]:
        """A line if the ranks cannot share a batch, or its statistics."""
        c, ranks = self.config, self.job.ranks
        batch = min(c.self_batch_size, len(self.train_samples))
        least = 1 if c.batch_norm_ranks == "sync" else self.method.least_of_rank
        if batch % ranks:
            what = f"found {batch} images, which do not divide among {ranks} ranks"
            return [f"self_batch_size: {what}; allowed: multiples of {ranks}"]
        if ranks > 1 and batch // ranks < least:
            cure = f"allowed: at least {least * ranks} for {least} images a rank"
            return [f"self_batch_size: found {batch}; {cure}, with --self_mode {c.self_mode}"]
        return self.not_synchronised()

    def unsuitable(self) -> list[str]:
        """A line for each image smaller than the crops, or if the batches do not fit."""
        if lines := self.smaller_than("self_crop", self.samples()) or self.undivided():
            return lines
        c, least, images = self.config, self.method.least_images, len(self.train_samples)
        batch = min(c.self_batch_size, images) // self.job.ranks + bool(self.annotated)
        if lines := self.too_few_values(batch, c.self_crop, self.samples()):
            return lines
        if min(c.self_batch_size, images) + bool(self.annotated) >= least:
            return []
        if images < least:
            what = f"{images} image to pretrain on; {SELF_MODES[c.self_mode]} needs {least}"
            return [f"{c.data_dir}: {what} in a batch; add images, or give another --self_mode"]
        cure = f"allowed: at least {least} with --self_mode {c.self_mode}"
        return [f"self_batch_size: found {c.self_batch_size}; {cure}"]

    def new_length(self, state: Mapping[str, Any], settings: Mapping[str, Any]) -> str:
        """At constant rates pretraining goes on; with a schedule it would be another run."""
        known = "module" in state and not self.config.self_schedule
        return LONGER if known and self.lengthened(state["settings"], settings) else ""

    def train_epoch(self, epoch: int, step_done: Callable[[], object]) -> None:
        """With ``self_schedule`` the rate is a tenth from 50 % on, a hundredth from 75 % on."""
        if self.config.self_schedule:
            drops = (epoch >= 0.5 * self.epochs) + (epoch >= 0.75 * self.epochs)
            for own in self.optimizer.param_groups:
                own["lr"] = self.config.self_lr * 0.1**drops
        super().train_epoch(epoch, step_done)

    def outputs(self) -> list[str]:
        """Also the checkpoints and the pictures of the probe."""
        c, end = self.config, self.config.self_max_epoch
        checkpoints = [pretrained_name(done) for done in due(c.save_every, end)]
        return [*super().outputs(), *checkpoints, *(f"probe_{n}.png" for n in due(c.probe, end))]

    def foreign(self) -> list[Path]:
        """Also any ``moco*.pt``, which fine-tuning might take for this run's."""
        return [*sorted(self.run_dir.glob(pretrained_name("*"))), *super().foreign()]

    def epoch_done(self, epoch: int) -> None:
        """Write ``moco<epochs done>.pt`` and probe the features when due; rank 0 does."""
        group.by_writer(lambda: self.save_and_probe(epoch))

    def save_and_probe(self, epoch: int) -> None:
        """What is due after an epoch."""
        c, done = self.config, epoch + 1
        if done in due(c.save_every, c.self_max_epoch):
            state = to_published(self.module.state_dict())
            contents = {"moco": state, "epoch": done, "settings": self.settings}
            save(self.run_dir / pretrained_name(done), contents)
        if done in due(c.probe, c.self_max_epoch):
            self.probe(done)

    def probe(self, epochs_done: int) -> None:
        """Probe the frozen features: log lines, metrics and a picture."""
        c, store, annotated = self.config, self.job.store, self.job.annotated()
        test = self.job.split("test_numf")
        some = probe.evenly(self.train_samples, probe.SPREAD_IMAGES)
        shown = [*annotated[:1], *probe.evenly(test, 3)]
        found = probe.probe(
            self.module.get_submodule("encoder_q"),
            images=stack_centres([data.image_input(s, store, c.standardize) for s in some]),
            annotated=list(data.items_of_test(annotated, store, c.standardize)),
            test=data.items_of_test(test, store, c.standardize),
            shown=list(data.items_of_test(shown, store, c.standardize)),
            pixels=[self.pixels(sample) for sample in shown],
            num_classes=c.num_classes,
            rng=np.random.default_rng((c.seed, self.number, epochs_done)),
            precision=self.precision,
            picture=self.run_dir / f"probe_{epochs_done}.png",
            heading=f"{c.num_classes} clusters of the features after {epochs_done} epochs",
        )
        for line in found.lines(epochs_done):
            self.log.line(line)
        self.log.metrics({"probe": {"epochs_done": epochs_done, **found.as_dict()}})


def stack_centres(images: Sequence[Tensor]) -> Tensor:
    """Images (c, H, W) of any sizes as one batch: the middle of each, of the smallest H and W."""
    rows, columns = (min(image.shape[axis] for image in images) for axis in (1, 2))
    tops, lefts = ([(x.shape[a] - n) // 2 for x in images] for a, n in ((1, rows), (2, columns)))
    places = zip(images, tops, lefts, strict=True)
    return torch.stack([x[:, top : top + rows, left : left + columns] for x, top, left in places])
