"""Training the UNet with labels: from random weights, or from a pretrained network."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import cached_property, partial
from itertools import groupby, islice
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

import data
from config import BALANCED
from data import Sample
from dataset.set_file import read_set_file
from encoders import make_encoder
from imaging.drawing import class_colours, save_prediction
from imaging.gray_range import Conversion, EachImage, GrayPool
from imaging.imagefile import read_mask
from imaging.listing import some_names
from imaging.store import ImageStore
from metallography.tiling import average_batch
from networks import UNet
from pscl.losses import supervised_loss
from pscl.recompute import recompute_activations
from report import sheets
from report.results import FIT
from stages.job import GRAY, WEIGHTS, Job, due
from stages.labels import balanced_weights, far_lines, label_counts, label_line, weight_line
from stages.pretraining import SelfSupervised
from stages.rates import AveragedWeights, make_optimizer, rate_schedule
from stages.scored import Scored
from stages.start import OF_PRETRAINING, Start, pretrained_file, read_start
from utils.checkpoint import (
    UNET,
    CheckpointError,
    load,
    network_state,
    save,
    to_published,
    transfer,
)
from utils.device import upload
from utils.files import Behind, DataError
from utils.log import METRICS_FILE, drop_evaluations, evaluation_lines
from utils.metrics import IGNORED, Scores, SegmentationScores
from utils.ranks import group
from utils.ranks.tensors import mean_of_ranks, take_first_ranks
from utils.run_folder import pretrained_name, remove_outputs
from utils.training import ANEW, LONGER

EVALUATION_BATCH = 8
EVALUATION_PIXELS = 2**22  # of a batch of several images
STATISTICS_BATCHES = 32  # of which BatchNorm's statistics of averaged weights are taken


class Supervised(Scored):
    """Training the UNet with labels from random weights, scored on the test set."""

    stage, number = "sup", 3
    wrapper: ClassVar[str] = "super"
    scored: nn.Module  # the network that is scored and saved
    lengths: ClassVar[tuple[str, ...]] = ("fine_max_epoch", "fine_steps")
    start = "Supervised training from random weights"

    def __init__(self, job: Job) -> None:
        super().__init__(job)
        self.known = known = read_set_file(self.config.data_dir)
        self.facts = known.facts() if known else {}  # for prediction

    def build(self) -> None:
        """UNet, optimizer and batches."""
        c, samples = self.config, self.annotated
        self.ranks = group.size() if self.fits_ranks() else 1
        self.module = self.to_memory(self.network())
        self.average = AveragedWeights(self.module, c.fine_average) if c.fine_average else None
        self.module = self.synchronised(self.module)  # the average's are rank 0's, see below
        self.scored = self.average.module if self.average else self.module
        # On a CPU, unlike pretraining, not fused: that rounds otherwise, and runs with labels would
        # no longer be bit by bit those of before.
        fused, decay = self.device.type == "cuda" or None, c.fine_weight_decay
        self.optimizer = make_optimizer(c.fine_optimizer, self.parameter_groups(), decay, fused)
        self.epochs = c.epochs_for(self.job.size)
        self.class_weight = torch.tensor(self.weights(), device=self.device)
        self.replay_steps()
        strengths = [getattr(c, f"fine_{name}") for name in data.Augmentation._fields]
        annotated = self.dataset = data.SegmentationDataset(
            samples,
            self.job.store,
            seed=c.seed,
            augmentation=data.Augmentation(*strengths),
            crops=c.fine_crops,
            steps=c.fine_steps > 0,
            standardize=c.standardize,
        )
        self.batches = data.Batches(annotated, self.batch_size(), c.workers)
        self.steps = self.epochs * len(self.batches)
        self.schedule = rate_schedule(self.optimizer, c.fine_schedule, self.steps, c.fine_warmup)

    def batch_size(self) -> int:
        """Annotated images of a step; the same one may be drawn again where steps are counted."""
        size = self.config.fine_batch_size
        return size if self.config.fine_steps else min(size, len(self.annotated))

    def crops_of_step(self) -> int:
        """Crops, or whole images, that a step sees."""
        return self.batch_size() * (1 if self.config.fine_steps else self.config.fine_crops)

    def fits_ranks(self) -> bool:
        """Whether a step has something for every rank."""
        return self.crops_of_step() >= group.size()

    def update(self) -> None:
        """Clip the gradients, step, and follow with the rates and the averaged weights."""
        if self.config.fine_clip:
            nn.utils.clip_grad_norm_(self.module.parameters(), self.config.fine_clip)
        super().update()
        if self.schedule and self.schedule.last_epoch < self.steps - 1:
            self.schedule.step()
        if self.average:
            self.average.update_parameters(self.module)

    def more_state(self) -> dict[str, Any]:
        """The averaged weights, if there are any."""
        return {} if self.average is None else {"average": self.average}

    def restore(self, state: Mapping[str, Any]) -> int:
        """Also the place in the schedule, which follows from the epoch and the step."""
        first = super().restore(state)
        if "longer" in state:
            self.evaluations = self.of_due(state)
            extra = set(state["outputs"]) - set(self.outputs())
            group.by_writer(lambda: remove_outputs(self.run_dir, extra))
        if self.schedule:
            done = first * len(self.batches) + self.within.get("steps", 0)
            self.schedule.last_epoch = min(done, self.steps - 1)
        return first

    def logged(self, state: Mapping[str, Any]) -> Mapping[str, int]:
        """Without the evaluations that a longer run has not."""
        found = dict(super().logged(state))
        if "longer" in state:
            extra = {e["epoch"] for e in state["evaluations"]} - {*self.due()}
            path = self.run_dir / METRICS_FILE
            group.by_writer(lambda: drop_evaluations(path, self.stage, extra))
            found["metrics_lines"] -= len(extra)
        return found

    def train_epoch(self, epoch: int, step_done: Callable[[], object]) -> None:
        """Of ranks that do not share batches one trains; the others wait to evaluate."""
        if self.ranks > 1:
            super().train_epoch(epoch, step_done)
        elif group.writes():
            with group.alone():
                super().train_epoch(epoch, step_done)

    @torch.no_grad()
    def take_statistics(self) -> None:
        """BatchNorm's statistics of the averaged network, which are not those of an average."""
        if self.average is None:
            return
        crops = self.dataset.for_statistics(self.batches.batch_size, STATISTICS_BATCHES)
        images = (x.to(self.device, memory_format=torch.channels_last) for x in crops)
        with self.precision():
            update_bn(images, self.scored)

    def network(self) -> nn.Module:
        """The UNet before training."""
        c = self.config
        encoder = make_encoder(c.encoder, c.channels, c.norm)
        network = UNet(c.num_classes, c.channels, c.norm, encoder)
        # The batches are small: by default nothing is recomputed, which is faster.
        recompute_activations(network.encode, c.recompute or -1)
        return network

    def parameter_groups(self) -> list[dict[str, Any]]:
        """All parameters at one learning rate; what comes from ImageNet at the encoder's."""
        return self.two_rates(("encode.trunk.",), self.config.sup_lr)

    def two_rates(self, slow_parts: tuple[str, ...], rate: float) -> list[dict[str, Any]]:
        """Parameters whose names start so at ``fine_lr_encoder``, if there are any; all others."""
        rest = dict(self.module.named_parameters())
        slow = [rest.pop(name) for name in list(rest) if name.startswith(slow_parts)]
        groups = [{"params": slow, "lr": self.config.fine_lr_encoder}] if slow else []
        return [*groups, {"params": list(rest.values()), "lr": rate}]

    def decisive_settings(self) -> dict[str, Any]:
        """Also the rate of what comes from ImageNet."""
        c, own = self.config, super().decisive_settings()
        return own if c.encoder == UNET else {**own, "fine_lr_encoder": c.fine_lr_encoder}

    def unsuitable(self) -> list[str]:
        """A line for each annotated image smaller than the crops, or if batches do not fit."""
        if lines := self.smaller_than("fine_crop", self.annotated) or self.not_synchronised():
            return lines
        return self.too_few_values(self.smallest_batch(), self.config.fine_crop, self.annotated)

    def smallest_batch(self) -> int:
        """Crops, or whole images, of the smallest step: the last of an epoch may have fewer."""
        if self.config.fine_steps:
            return self.batch_size()
        rest = len(self.annotated) % max(self.batch_size(), 1)
        return (rest or self.batch_size()) * self.config.fine_crops

    def new_length(self, state: Mapping[str, Any], settings: Mapping[str, Any]) -> str:
        """Longer at constant rates: goes on. With a schedule, or longer pretraining: anew."""
        changed = self.lengthened(state["settings"], settings)
        if not changed or (WEIGHTS in changed and "self_max_epoch" not in changed):
            return ""
        same = self.config.fine_schedule == "constant" and "module" in state
        goes_on = same and changed <= set(Supervised.lengths) and not self.best_is_extra(state)
        return LONGER if goes_on else ANEW

    def of_due(self, state: Mapping[str, Any]) -> list[dict[str, Any]]:
        """The evaluations of a state that this run has, too: a shorter one has one at its end."""
        return [e for e in state["evaluations"] if e["epoch"] in self.due()]

    def best_is_extra(self, state: Mapping[str, Any]) -> bool:
        """Whether the network that was kept is of an evaluation that this run has not.

        Where no other came before, it does not matter: the next one will be the best.
        """
        own = self.of_due(state)
        best = max(state["evaluations"], key=lambda e: e["acc"], default=None)
        return bool(own) and best not in own

    def reason(self, state: Mapping[str, Any]) -> str:
        """Also that the best network is of an evaluation that a longer run has not."""
        lines = super().reason(state)
        if self.config.fine_schedule == "constant" and self.best_is_extra(state):
            lines += ", and the best evaluation was one that the longer run has not"
        return lines

    def losses(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Half cross-entropy by labelled pixels, half Dice loss by images, of all ranks' batch."""
        mask = batch["mask"]
        own = supervised_loss(self.module(batch["image"]), mask, self.class_weight)
        if self.ranks == 1:
            return own
        cross_entropy = mean_of_ranks(own["cross_entropy"], (mask != IGNORED).sum())
        dice = mean_of_ranks(own["dice_loss"], len(mask))
        loss = 0.5 * cross_entropy + 0.5 * dice
        return {"loss": loss, "cross_entropy": cross_entropy, "dice_loss": dice}

    def header(self) -> list[str]:
        """Start, training data and test set."""
        c, every = self.config, self.config.eval_every_for(self.job.size)
        crops = f"steps of {c.fine_batch_size} crops, each an epoch," if c.fine_steps else "epochs"
        saved = "" if self.average else "; rank 0's are saved"
        statistics = f"of each rank's part{saved}"
        return [
            *self.job.notes,
            f"{self.start} for {self.epochs} {crops} on {self.images(self.annotated)} with labels "
            f"of {self.config.data_dir}: {some_names(s.name for s in self.annotated)}",
            *self.about_ranks(self.crops_of_step(), statistics),
            *self.about_labels(),
            *self.about_test(f"every {every} epochs and after the last"),
        ]

    def masks(self) -> list[NDArray[np.uint8]]:
        """Class ids (H, W) of the annotated images."""
        return [self.job.store.mask(s.mask).numpy() for s in self.annotated if s.mask]

    def insides(self) -> list[NDArray[np.bool_] | None]:
        """Where the annotated images are visible, bool (H, W); None: everywhere."""
        found = [self.job.store.inside(s.image) for s in self.annotated if s.mask]
        return [None if inside is None else inside.numpy() for inside in found]

    def weights(self) -> Sequence[float]:
        """The weight of each class in the cross-entropy."""
        c = self.config
        if isinstance(c.class_weight, str):
            counts = label_counts(self.masks(), c.num_classes)
            return balanced_weights(counts, BALANCED[c.class_weight])
        return tuple(map(float, c.class_weight))

    def about_labels(self) -> list[str]:
        """Pixels and, where they are balanced, weights of each class; what is far from any."""
        c, masks = self.config, self.masks()
        insides = self.insides()
        lines = [label_line(masks, c.num_classes, (), insides)]
        if isinstance(c.class_weight, str):
            counts = label_counts(masks, c.num_classes)
            lines.append(weight_line(c.class_weight, self.weights(), counts))
        return lines + far_lines(masks, [s.name for s in self.annotated if s.mask], insides)

    def due(self) -> list[int]:
        """The epochs, counted from 0, that are evaluated."""
        c, size = self.config, self.job.size
        every = c.eval_every_for(size) if self.test else c.epochs_for(size)
        return [done - 1 for done in due(every, c.epochs_for(size)) if done]

    def outputs(self) -> list[str]:
        """Also the best and the last network, the sheets and the predictions."""
        names = ("{}.pt", "{}_last.pt", "sheet_{}.png", "sheet_{}_extremes.png")
        own = [name.format(self.stage) for name in names]
        tested = [picture_name(s.name) for s in self.tested]
        pictures = [f"epoch_{epoch}/{name}" for epoch in self.due() for name in tested]
        return [*super().outputs(), *own, *pictures]

    def epoch_done(self, epoch: int) -> None:
        """Evaluate when due; save the network if its ACC is the best, and the last one.

        Without a test set there is nothing to choose by: the last is both.
        """
        if epoch not in self.due():
            return
        group.by_writer(self.take_statistics)
        take_first_ranks(self.scored)
        counts = self.evaluate(epoch) if self.test else None
        group.by_writer(lambda: self.note(epoch, counts))

    def note(self, epoch: int, counts: NDArray[np.int64] | None) -> None:
        """Log an evaluation and save the network, see ``epoch_done``."""
        entry: dict[str, Any] = {"epoch": epoch}
        best = True
        if counts is not None:
            scores = Scores.from_confusion(counts)
            entry |= scores.as_dict() | ({FIT: True} if self.fit else {})
            best = all(scores.acc > e["acc"] for e in self.evaluations)
            self.evaluations = [*self.evaluations, {**entry, "confusion": counts.tolist()}]
            for line in evaluation_lines(scores):
                self.log.line(line)
            self.log.metrics({"evaluation": entry})
        names = [f"{self.stage}.pt"] if best else []
        names += [f"{self.stage}_last.pt"] if epoch + 1 == self.epochs else []
        for name in names:
            state = to_published(self.scored.state_dict())
            settings = {**self.true_settings(), **self.config.appearance(), **self.facts}
            settings[GRAY] = self.gray().saved()
            save(self.run_dir / name, {self.wrapper: state, **entry, "settings": settings})
        if counts is not None and epoch + 1 == self.epochs:
            self.draw(epoch, counts)

    def true_settings(self) -> dict[str, Any]:
        """The decisive settings, as the saved network tells them."""
        return self.settings

    def gray(self) -> Conversion:
        """How images of more than 8 bits are read for this network: as its own set was.

        If it has seen 8 bits only, they are brought to the levels of its annotated images.
        """
        store, pool = self.job.store, GrayPool()
        if not isinstance(store.gray, EachImage):
            return store.gray
        for sample in self.annotated:
            pool.add(store.image(sample.image).numpy())
        return EachImage(pool.levels() or store.gray.levels)

    @torch.inference_mode()
    def evaluate(self, epoch: int) -> NDArray[np.int64]:
        """Write predictions of the test set, of which every rank makes a part.

        Returns the confusion matrices (n, C, C) of the test images, true class as row.
        """
        self.scored.eval()
        folder, store = self.run_dir / f"epoch_{epoch}", self.job.store
        shapes = [store.shape(sample.image) for sample in self.tested]
        parts: list[tuple[list[int], SegmentationScores]] = []
        behind = Behind()
        for places in group.share(equal_sizes(shapes)):
            parts.append((places, SegmentationScores(self.config.num_classes)))
            own = [self.tested[place] for place in places]
            items = data.items_of_test(own, store, self.config.standardize)
            each = list(zip(*items, strict=True))
            images, masks, names = torch.stack(each[0]), torch.stack(each[1]), each[2]
            with self.precision():
                x = upload(images, self.device, torch.channels_last)
                probable = average_batch(self.scored, x) if self.config.eval_tta else self.scored(x)
                prediction = probable.argmax(dim=1)
            parts[-1][1].add(prediction, upload(masks, self.device))
            behind.do(self.write_pictures, folder, names, prediction.to(torch.uint8))
        behind.wait()
        found: dict[int, NDArray[np.int64]] = {}
        for places, scores in parts:  # counted on the device until now
            found |= zip(places, scores.counts(), strict=True)
        for others in group.gather_objects(found):
            found |= others
        return np.stack([found[place] for place in range(len(self.tested))])

    def write_pictures(self, folder: Path, names: Sequence[str], classes: Tensor) -> None:
        """Write predictions (B, H, W) of test images; while the next batch is computed."""
        for name, picture in zip(names, classes.cpu().numpy(), strict=True):
            save_prediction(folder / picture_name(name), picture, self.config.mapping)

    def scales(self) -> list[tuple[int, float | None]]:
        """Of each tested image the width in its file, pixels, and micrometres per pixel there."""
        widths = [self.job.store.file_size("image", s.image)[1] for s in self.tested]
        known = [self.known.scale_of(s.name) if self.known else None for s in self.tested]
        return list(zip(widths, known, strict=True))

    def draw(self, epoch: int, counts: NDArray[np.int64]) -> None:
        """Draw sheets of the tested images; last, because an error here must lose no scores."""
        c, folder = self.config, self.run_dir / f"epoch_{epoch}"
        rows = TestRows(self.tested, self.job.store, folder, c.mapping)
        colours = class_colours(c.num_classes, c.class_colours)
        names = [sample.name for sample in self.tested]
        heading = f"{self.run_dir.parent.name}/{self.run_dir.name}, epoch {epoch}"
        heading += f": {FIT} to learnt labels" if self.fit else ""
        write = partial(sheets.write_sheets, self.run_dir, self.stage, heading=heading)
        look = {"class_names": c.class_names, "colours": colours}
        write(rows, names, counts, scales=self.scales(), **look)
        kind = "learnt" if self.fit else "test"
        self.log.note(f"Pictures of {kind} images: {self.run_dir / f'sheet_{self.stage}.png'}")


class Finetune(Supervised):
    """Fine-tuning a pretrained network; its stem and downs have a lower learning rate."""

    stage, number = "fine", 2
    lengths = (*Supervised.lengths, "self_max_epoch")
    wrapper = "finetune"

    def pretrained(self) -> Path:
        """The pretrained file."""
        return pretrained_file(self.config, self.run_dir)

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
            others = ", ".join(sorted(p.name for p in path.parent.glob(pretrained_name("*"))))
            hint = f"--self_max_epoch (there is {others})" if others else "--pretrained FILE"
            cure = "pretrain first (-stages self-fine)"
            if "self" in self.config.stage_list and not self.config.pretrained:
                cure = "it was removed after pretraining was finished: give --overwrite to pretrain"
                cure += " again, put it back"
            return [f"{path}: no such file; {cure}, or give {hint}"]
        try:
            transfer(super().network(), self.encoder(), source=path)
        except CheckpointError as error:
            return [str(error)]
        own = not self.config.pretrained and "self" not in self.config.stage_list
        if own and (lines := self.begun_with.refused(self.config)):
            return lines
        return self.unsuitable() + self.conflicts(self.identity())

    def network(self) -> nn.Module:
        """The UNet with everything but its last layer pretrained."""
        network, path = super().network(), self.pretrained()
        self.start = f"Fine-tuning from {path} ({transfer(network, self.encoder(), source=path)})"
        return network

    def header(self) -> list[str]:
        """Also a warning if the pretraining was another one than this command's."""
        first, *rest = super().header()
        named = self.job.named if self.config.pretrained else None
        return [first, *self.begun_with.warnings(self.config, named), *rest, *self._seen()]

    @cached_property
    def begun_with(self) -> Start:
        """The pretrained file, and how it was made."""
        return read_start(self.pretrained())

    def described(self) -> dict[str, Any]:
        """All settings, with those of the pretraining that was."""
        return super().described() | self.begun_with.of_pretraining

    def true_settings(self) -> dict[str, Any]:
        """Of the pretraining those that the file tells."""
        own = {n: v for n, v in super().true_settings().items() if n not in OF_PRETRAINING}
        return own | self.begun_with.of_pretraining

    def _seen(self) -> list[str]:
        """A line if pretraining saw test images, as it may, without their labels."""
        others = [s for i, s in enumerate(self.test) if i not in self.learnt]
        c = self.config
        train = data.pretraining_samples(self.job.store, c.data_dir, c.use_unlabelled)
        seen = self.cut_from(others, train, self.pixels_if_any)
        if not seen:
            return []
        names = some_names(others[number].name for number in seen)
        return [
            f"{len(seen)} of the test images are among the images of pretraining, without their "
            f"labels, which no stage learns; they are scored like the others: {names}"
        ]

    def pixels_if_any(self, sample: Sample) -> NDArray[np.uint8]:
        """``file_pixels``; none, (0, 0), of a file that cannot be read, as pretraining reports."""
        try:
            return self.file_pixels(sample)
        except DataError:
            return np.zeros((0, 0), np.uint8)

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Stem and downs at one rate, ups and the last layer at another."""
        down = ("encode.inc.", "encode.down", "encode.trunk.", "encode.laterals.")
        return self.two_rates(down, self.config.fine_lr_decoder)


class TestRows(Sequence[sheets.Row]):
    """Image, true mask and predicted classes of the test images, read when they are asked for."""

    __test__ = False  # no class of tests

    def __init__(
        self, test: Sequence[Sample], store: ImageStore, folder: Path, mapping: Sequence[int]
    ) -> None:
        self.test, self.store, self.folder = test, store, folder
        self.classes = np.zeros(256, np.uint8)  # by the gray of a picture
        self.classes[list(mapping)] = np.arange(len(mapping))

    def __len__(self) -> int:
        return len(self.test)

    def __getitem__(self, number: Any) -> Any:
        sample = self.test[number]
        picture = self.classes[read_mask(self.folder / picture_name(sample.name))]
        image = self.store.image(sample.image).movedim(0, -1).squeeze(-1).numpy()
        assert sample.mask is not None  # which the check of the set requires
        return image, self.store.mask(sample.mask).numpy(), picture


def picture_name(image: str) -> str:
    """File name of the prediction of a test image."""
    return f"{Path(image).stem}.png"


def equal_sizes(shapes: Sequence[tuple[int, ...]]) -> list[list[int]]:
    """Numbers of images (c, H, W), batched where neighbours have equal sizes."""
    batches = []
    for size, numbers in groupby(range(len(shapes)), key=lambda number: shapes[number][-2:]):
        most = min(EVALUATION_BATCH, max(EVALUATION_PIXELS // (size[0] * size[1]), 1))
        while batch := list(islice(numbers, most)):
            batches.append(batch)
    return batches
