"""The engine: one training loop, one evaluation, the three stages as small differences from it.

``run(config)`` checks everything that it will need, then trains each data size, annotated image and
stage in turn. A killed run is taken up at the last saved epoch and ends as if it had not been: all
random numbers of an epoch follow from the seed and the epoch.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from config import FIELDS, LATER, SELF_MODES, Config, ConfigError, format_value, parse_config
from data import (
    Augmentation,
    Batches,
    Sample,
    annotated_repeats,
    annotated_split,
    check_data,
    find_split,
    finetuning_batches,
    image_input,
    pretraining_batches,
    pretraining_samples,
    test_items,
)
from model import METHODS, build_method, settings_of
from networks import UNet
from pscl.losses import supervised_loss
from pscl.recompute import recompute_activations
from report.curves import learning_curve
from report.page import write_report
from report.probe import (
    COLLAPSED,
    SPREAD_IMAGES,
    alarm,
    draw_clusters,
    embedding_spreads,
    look,
    probe_line,
)
from report.results import results_table, write_results
from utils.checkpoint import (
    CheckpointError,
    StateFile,
    differences,
    load,
    network_state,
    remove_outputs,
    save,
    to_published,
    transfer,
)
from utils.commandline import AGAIN, AGAIN_AFRESH, TrainingError, complain, exit_code
from utils.device import (
    choose_device,
    choose_precision,
    keep_freed_memory,
    mixed_seed,
    precision,
    to_device,
)
from utils.drawing import best_median_worst, class_colours, contact_sheet, save_prediction
from utils.events import clear, require_tensorboard
from utils.files import remove_leftovers
from utils.imagefile import ImageStore
from utils.log import (
    METRICS_FILE,
    AverageMeter,
    RunLog,
    environment_line,
    evaluation_lines,
    format_epoch,
    progress,
    to_terminal,
)
from utils.metrics import Scores, SegmentationScores
from utils.run_folder import locked

EVALUATION_BATCH = 8
SHEET_ROWS = 8
CURVES = "curves.png"
STAGE_NUMBERS = {"self": 1, "fine": 2, "sup": 3}  # keep the stages' random numbers apart
WEIGHTS = "pretrained weights"


@dataclass(frozen=True)
class Job:
    """One run: where it computes, on what, and where it writes.

    Attributes:
        config: resolved settings.
        store: decoded files of the set.
        size, repeat: data size '1', '5', 'f' and number of the annotated image ('f': 0).
        device: where tensors live.
        amp: dtype of autocast, None for full precision.
    """

    config: Config
    store: ImageStore
    size: str
    repeat: int
    device: torch.device
    amp: torch.dtype | None

    @property
    def label(self) -> str:
        """Folder name of the run."""
        return run_label(self.size, self.repeat)

    def annotated(self) -> list[Sample]:
        """The annotated images of this size and repeat."""
        root = self.config.data_dir
        return find_split(root, annotated_split(root, self.size, self.repeat))


class Runner:
    """What every stage does: train epoch by epoch, evaluate, log, save, go on where it was killed.

    A stage says what its network, optimizer, batches and losses are, and what it writes.
    """

    stage: ClassVar[str]

    def __init__(self, job: Job) -> None:
        self.job, self.config, self.device = job, job.config, job.device
        self.run_dir = experiment_dir(self.config, self.stage) / job.label
        self.state = StateFile(self.run_dir / f"state_{self.stage}.pt")
        self.evaluations: list[dict[str, Any]] = []
        self.settings: dict[str, Any] = {}
        self.environment = ""
        self.epochs: int = 0
        self.module: nn.Module
        self.optimizer: torch.optim.Optimizer
        self.batches: Batches
        self.log: RunLog

    # What a stage is.

    def build(self) -> None:
        """Make ``module``, ``optimizer`` and ``batches``."""
        raise TypeError("a stage builds its own parts")

    def decisive_settings(self, ahead: bool = False) -> dict[str, Any]:
        """What decides the result of this run: settings, and a fingerprint of the files.

        Args:
            ahead: asked before the stages before this one have run.
        """
        settings = self.config.training_settings(self.stage, self.job.size)
        del settings["data_dir"]  # a set that was moved is the same: its files are compared
        settings["amp"] = "bf16" if self.job.amp is torch.bfloat16 else "off"
        settings["files"] = fingerprint(self.samples(), self.job.store)
        return settings

    def outputs(self) -> list[str]:
        """Names, relative to the run's folder, of the files that this stage writes alone."""
        return [f"log_{self.stage}.txt"]

    def samples(self) -> list[Sample]:
        """The images this stage learns from or is scored on."""
        raise TypeError("a stage names its own images")

    def losses(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Losses of one batch by name; ``loss`` is the one that is followed."""
        raise TypeError("a stage has its own losses")

    def header(self) -> list[str]:
        """What is trained on what, in words."""
        raise TypeError("a stage says what it does")

    def before_training(self) -> None:
        """Write what belongs at the start of the run."""

    def epoch_done(self, epoch: int) -> None:
        """Evaluate or write a checkpoint if it is time; ``epoch`` counts from 0."""

    def finish(self) -> None:
        """Write what belongs at the end of the run: the curves of all its stages so far."""
        curves = learning_curve(self.run_dir / CURVES, self.run_dir / METRICS_FILE)
        self.log.note(f"Learning curves: {curves}")

    # What all stages do.

    def problems(self, ahead: bool = False) -> list[str]:
        """Why this stage must not run, a line each; see ``decisive_settings``."""
        if self.config.overwrite:
            return []
        try:
            state = self.state.load()
        except CheckpointError as error:
            return [str(error)]
        if state is None:
            found = [path for path in self.foreign() if path.exists()][:1]
            return [
                f"{path}: would be overwritten or mixed up with this run, which has left no "
                f"{self.state.path.name}; give --overwrite, or another --name"
                for path in found
            ]
        settings = self.decisive_settings(ahead)
        old = {k: v for k, v in state["settings"].items() if k != WEIGHTS or k in settings}
        lines = setting_differences(self.config, old, settings)
        return lines and [
            f"{self.run_dir}: holds a run of stage {self.stage} with other settings "
            f"({'; '.join(lines)}); give --overwrite to train anew, or another --name"
        ]

    def foreign(self) -> list[Path]:
        """Files that are somebody's own or published ones if no state of this stage is there."""
        return [self.run_dir / name for name in self.outputs()]

    def saved(self, say: Callable[[str], object] | None = None) -> dict[str, Any] | None:
        """The state to go on from, None to start anew; see ``StateFile.load``."""
        if self.config.overwrite or self.config.resume == "never":
            return None
        return self.state.load(say)

    def ready(self) -> dict[str, Any] | None:
        """Look at what is there already; returns the state to go on from, if there is one.

        Raises:
            ConfigError: this stage must not run.
        """
        problems = self.problems()  # what fine-tuning starts from may be known only now
        if problems:
            raise ConfigError("\n".join(problems))
        remove_leftovers(self.run_dir)
        self.settings = self.decisive_settings()
        return self.saved(to_terminal)

    def run(self) -> list[dict[str, Any]]:
        """Train to the end, or from where a killed run was saved; returns the evaluations."""
        state = self.ready()
        if state is not None and state["finished"]:
            to_terminal(f"{self.run_dir}: stage {self.stage} is finished already")
            self.state.remove_previous()
            return state["evaluations"]
        torch.manual_seed(mixed_seed(self.config.seed, STAGE_NUMBERS[self.stage]))
        self.build()
        resumed = state if state is not None and "module" in state else None
        first = self.restore(resumed) if resumed else self.begin()
        self.environment = environment_line(self.device, self.settings["amp"])
        at = resumed["log"] if resumed else None
        show = self.config.tensorboard
        with RunLog(self.run_dir, self.stage, at, tensorboard=show) as self.log:
            self.log.header([*self.header(), *self.config.describe(), self.environment])
            if resumed is None:
                self.before_training()
            else:
                self.log.note(f"Going on after epoch {first - 1} of the run that was stopped")
                if resumed["environment"] != self.environment:
                    self.log.line(f"From epoch {first} on with {self.environment}")
            self.train(first)
            self.finish()
        self.state.finish(self.snapshot(finished=True))
        return self.evaluations

    def begin(self) -> int:
        """Mark the folder as this run's, remove what an earlier one wrote; returns epoch 0."""
        old: dict[str, Any] | None = None
        with suppress(CheckpointError):
            old = self.state.load()
        names = dict.fromkeys([*(old["outputs"] if old else []), *self.outputs()])
        self.state.begin({**self.snapshot(), "outputs": list(names)})
        remove_outputs(self.run_dir, names)
        clear(self.run_dir, self.stage)
        return 0

    def snapshot(self, *, finished: bool = False, **more: Any) -> dict[str, Any]:
        """What every state of this run holds, and more."""
        common = {
            "settings": self.settings,
            "outputs": self.outputs(),
            "evaluations": self.evaluations,
            "finished": finished,
        }
        # Through text, so that the bytes do not tell which of these came out of a file.
        return {**json.loads(json.dumps(common)), **more}

    def save_state(self, epoch: int) -> None:
        """Save all that training needs to go on with ``epoch``."""
        self.state.save(
            self.snapshot(
                epoch=epoch,
                module=self.module.state_dict(),
                optimizer=self.optimizer.state_dict(),
                log=self.log.offsets(),
                environment=self.environment,
            )
        )

    def restore(self, state: Mapping[str, Any]) -> int:
        """Take a saved state over; returns the epoch to go on with."""
        path = self.state.path
        try:
            transfer(self.module, state["module"], prefix="", source=path)
            self.optimizer.load_state_dict(state["optimizer"])
        except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
            tensors = f"{error}\n" if isinstance(error, CheckpointError) else ""  # named one by one
            raise CheckpointError(
                f"{tensors}{path}: does not fit this program; train again with --overwrite"
            ) from error
        self.evaluations = state["evaluations"]
        return int(state["epoch"])

    def train(self, first: int) -> None:
        """Train the epochs from ``first`` on; save the state now and then."""
        saved = time.monotonic()
        with progress(self.epochs * len(self.batches), f"{self.job.label} {self.stage}") as bar:
            bar.update(first * len(self.batches))
            for epoch in range(first, self.epochs):
                started = time.monotonic()
                self.train_epoch(epoch, bar.update)
                self.epoch_done(epoch)
                if epoch == first:
                    took = time.monotonic() - started
                    self.log.note(f"First epoch took {took:.1f} s, {self.epochs - first} to do")
                if epoch + 1 < self.epochs and time.monotonic() - saved >= self.config.save_seconds:
                    self.save_state(epoch + 1)
                    saved = time.monotonic()

    def train_epoch(self, epoch: int, step_done: Callable[[], object]) -> None:
        """One pass over the batches: one log line, one wait for the device."""
        self.module.train()
        meter = AverageMeter()
        names: list[list[str]] = []
        bad_step = torch.full((), float("inf"), device=self.device)
        for step, batch in enumerate(self.batches.epoch(epoch)):
            if step == 0:  # not sooner: worker processes that start draw from the same numbers
                torch.manual_seed(
                    mixed_seed(self.config.seed, STAGE_NUMBERS[self.stage], epoch + 1)
                )
            names.append(batch["name"])
            with self.precision():
                losses = self.losses(to_device(batch, self.device))
            self.optimizer.zero_grad()
            losses["loss"].backward()
            self.optimizer.step()
            for name, value in losses.items():
                meter.add(name, value)
            finite = losses["loss"].detach().isfinite()
            bad_step = torch.where(finite, bad_step, bad_step.clamp(max=step))
            step_done()
        # The last step may have spoilt the weights after its own loss: they are about to be saved.
        learned = torch.stack([p.detach().sum() for p in self.module.parameters()])
        bad_step = torch.where(learned.isfinite().all(), bad_step, bad_step.clamp(max=step))
        meter.add("bad", bad_step)
        values = meter.read()
        bad, _ = values.pop("bad")
        if bad != float("inf"):
            raise TrainingError(self.not_finite(epoch, int(bad), names[int(bad)]))
        rate = max(group["lr"] for group in self.optimizer.param_groups)
        self.log.line(
            format_epoch(epoch, self.epochs, len(names), len(names), values) + f" lr {rate:g}"
        )
        averages = {name: average for name, (_, average) in values.items()}
        self.log.metrics({"epoch": epoch, **averages, "lr": rate})

    def not_finite(self, epoch: int, step: int, names: Sequence[str]) -> str:
        """The message for a loss that is no number."""
        return (
            f"{self.run_dir}: the numbers are not finite in epoch {epoch}, step {step} "
            f"({', '.join(names)}); what was saved before is kept. Look at these files, try a "
            "lower learning rate or --amp off"
        )

    def precision(self) -> AbstractContextManager[object]:
        """Autocast if asked for."""
        return precision(self.job.amp, self.device)

    def to_memory(self, module: nn.Module) -> nn.Module:
        """Move a network to the device, channels last: its norms and heads work per pixel."""
        return module.to(self.device, memory_format=torch.channels_last)  # type: ignore[call-overload]

    def images(self, samples: Sequence[Sample]) -> str:
        """'48 images 188x188' of some samples."""
        sizes = sorted({tuple(self.job.store.image(s.image).shape[-2:]) for s in samples})
        shown = ", ".join(f"{w}x{h}" for h, w in sizes[:2]) + (" and others" if sizes[2:] else "")
        return f"{len(samples)} image{'s' if len(samples) != 1 else ''} {shown}"


class SelfSupervised(Runner):
    """Pretraining without labels by the method that ``self_mode`` names."""

    stage = "self"

    def build(self) -> None:
        """The method, Adam or AdamW, and batches of two views with an annotated image in front."""
        c = self.config
        self.module = self.to_memory(build_method(c.self_mode, c.to_dict()))
        self.epochs = c.self_max_epoch
        learning = [p for p in self.module.parameters() if p.requires_grad]
        if c.self_optimizer == "adamw":
            self.optimizer = torch.optim.AdamW(
                learning, c.self_lr, weight_decay=c.self_weight_decay
            )
        else:
            self.optimizer = torch.optim.Adam(learning, c.self_lr)
        self.batches = pretraining_batches(
            self.train_samples(),
            self.annotated(),
            self.job.store,
            num_classes=c.num_classes,
            batch_size=c.self_batch_size,
            seed=c.seed,
            jitter_strength=c.self_jitter,
            random_crop=c.random_crop,
            standardize=c.standardize,
            workers=c.workers,
        )

    def train_samples(self) -> list[Sample]:
        """The images without labels."""
        return pretraining_samples(self.config.data_dir, self.config.use_unlabelled)

    def annotated(self) -> list[Sample]:
        """The annotated images that ride along, if the method wants any."""
        return self.job.annotated() if METHODS[self.config.self_mode].needs_annotated else []

    def samples(self) -> list[Sample]:
        """All images of pretraining."""
        return self.train_samples() + self.annotated()

    def losses(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """The method's own."""
        losses: dict[str, Tensor] = self.module(batch)
        return losses

    def header(self) -> list[str]:
        """What is pretrained on what, and what the method says of its own loss."""
        c, annotated = self.config, self.annotated()
        batch = self.batches.order.batch_size
        lines = [
            f"Pretraining with {SELF_MODES[c.self_mode]} for {self.epochs} epochs on "
            f"{self.images(self.train_samples())} of {c.data_dir}, labels unused, "
            f"{len(self.batches)} steps of {batch} images an epoch"
        ]
        if annotated:
            lines.append(
                ("The annotated image" if len(annotated) == 1 else "One of the annotated images")
                + " rides along in every batch: "
                + ", ".join(s.name for s in annotated[:5])
                + (" ..." if annotated[5:] else "")
            )
        if c.probe and not METHODS[c.self_mode].trains_ups:
            lines.append(
                f"{SELF_MODES[c.self_mode]} trains the way down only: the probe sees it through "
                "ups that stay as they were initialised, so compare epochs, not methods"
            )
        note = METHODS[c.self_mode].log_note(c.queue_size, batch + bool(annotated))
        unused = [n for n in unused_settings(c) if getattr(c, n) != FIELDS[n].default]
        if unused:
            values = ", ".join(f"{n} = {format_value(getattr(c, n))}" for n in unused)
            lines.append(f"Of no effect on {SELF_MODES[c.self_mode]}: {values}")
        return lines + ([note] if note else [])

    def problems(self, ahead: bool = False) -> list[str]:
        """Also if the method's loss means nothing for batches as small as these."""
        c, method = self.config, METHODS[self.config.self_mode]
        images = len(self.train_samples())
        if min(c.self_batch_size, images) + bool(self.annotated()) >= method.least_images:
            return super().problems(ahead)
        name, least = SELF_MODES[c.self_mode], method.least_images
        if images < least:
            found = f"{c.data_dir}: {images} image to pretrain on; {name} needs {least} in a batch"
            return [f"{found}; add images, or give another --self_mode"]
        found = f"self_batch_size: found {c.self_batch_size}"
        return [f"{found}; allowed: at least {least} with --self_mode {c.self_mode}"]

    def train_epoch(self, epoch: int, step_done: Callable[[], object]) -> None:
        """An epoch at its learning rate: a tenth from 50 %, a hundredth from 75 % if asked for."""
        if self.config.self_schedule:
            drops = (epoch >= 0.5 * self.epochs) + (epoch >= 0.75 * self.epochs)
            for group in self.optimizer.param_groups:
                group["lr"] = self.config.self_lr * 0.1**drops
        super().train_epoch(epoch, step_done)

    def outputs(self) -> list[str]:
        """Also the checkpoints: at the start, each ``save_every`` epochs, at the end."""
        end = self.config.self_max_epoch
        due = dict.fromkeys([*range(0, end, self.config.save_every), end])
        pictures = [f"probe_{done}.png" for done in range(end + 1) if self.probe_due(done)]
        return [*super().outputs(), *(f"moco{done}.pt" for done in due), *pictures]

    def foreign(self) -> list[Path]:
        """Any ``moco*.pt``: fine-tuning might take it for one of this run."""
        return [*sorted(self.run_dir.glob("moco*.pt")), *super().foreign()]

    def before_training(self) -> None:
        """Keep the network as it starts."""
        self.epoch_done(-1)

    def probe_due(self, epochs_done: int) -> bool:
        """Whether the features are looked at now: before training, each ``probe``, at the end."""
        every, end = self.config.probe, self.config.self_max_epoch
        return bool(every) and (epochs_done % every == 0 or epochs_done == end)

    @torch.inference_mode()
    def probe(self, epochs_done: int) -> None:
        """Look at the features as they are: a line, a picture, and an alarm after a collapse."""
        c, store = self.config, self.job.store
        train, test = self.train_samples(), find_split(c.data_dir, "test_numf")
        encoder = self.module.get_submodule("encoder_q")
        training = encoder.training

        def encode(images: Tensor) -> tuple[Tensor, Sequence[Tensor]]:
            with self.precision():
                x = images.to(self.device, memory_format=torch.channels_last)
                embedding, maps = encoder(x)
            return embedding, maps

        def items(samples: Sequence[Sample]) -> Iterator[tuple[Tensor, Tensor, str]]:
            return test_items(samples, store, c.standardize)

        few = [image_input(s, store, c.standardize) for s in evenly(train, SPREAD_IMAGES)]
        with self.precision():
            x = torch.stack(few).to(self.device, memory_format=torch.channels_last)
            spreads = embedding_spreads(encoder, x)
        rng = np.random.default_rng((c.seed, STAGE_NUMBERS[self.stage], epochs_done))
        encoder.eval()  # BatchNorm's averages are used and stay as they are
        try:
            annotated = list(items(self.job.annotated()))
            found = look(encode, annotated, items(test), c.num_classes, rng)
            shown = [*self.job.annotated()[:1], *evenly(test, 3)]
            pixels = [store.image(s.image).movedim(0, -1).squeeze(-1).numpy() for s in shown]
            heading = f"{c.num_classes} clusters of the features after {epochs_done} epochs"
            path = self.run_dir / f"probe_{epochs_done}.png"
            draw_clusters(path, encode, items(shown), pixels, found.clusters, heading)
        finally:
            encoder.train(training)
        self.log.line(probe_line(epochs_done, found.scores, spreads))
        numbers = {**found.scores.as_dict(), **spreads._asdict()}
        self.log.metrics({"probe": {"epochs_done": epochs_done, **numbers}})
        if epochs_done and any(one < COLLAPSED for one in spreads):
            self.log.line(alarm(epochs_done, spreads))

    def epoch_done(self, epoch: int) -> None:
        """Write ``moco<epochs done>.pt`` when it is due, and look at the features."""
        name = f"moco{epoch + 1}.pt"
        if name in self.outputs():
            state = to_published(self.module.state_dict())
            save(
                self.run_dir / name, {"moco": state, "epoch": epoch + 1, "settings": self.settings}
            )
        if self.probe_due(epoch + 1):
            self.probe(epoch + 1)


class Supervised(Runner):
    """Training the UNet with labels, from nothing, scored on the test set."""

    stage = "sup"
    wrapper: ClassVar[str] = "super"

    def build(self) -> None:
        """UNet, optimizer, batches and the test set."""
        c, samples = self.config, self.job.annotated()
        self.module = self.to_memory(self.network())
        self.optimizer = torch.optim.Adam(self.parameter_groups())
        self.epochs = c.epochs_for(self.job.size)
        self.class_weight = torch.tensor(c.class_weight, device=self.device)
        self.batches = finetuning_batches(
            samples,
            self.job.store,
            batch_size=min(c.fine_batch_size, len(samples)),
            seed=c.seed,
            augmentation=Augmentation(
                c.fine_jitter, c.fine_contrast, c.fine_crop, c.fine_scale, c.fine_rotation
            ),
            crops=c.fine_crops,
            standardize=c.standardize,
            workers=c.workers,
        )
        self.test = find_split(c.data_dir, "test_numf")

    def problems(self, ahead: bool = False) -> list[str]:
        """Also if an annotated image is smaller than the crops of it."""
        side, lines = self.config.fine_crop, []
        for sample in self.job.annotated():
            rows, columns = self.job.store.image(sample.image).shape[-2:]
            if min(rows, columns) < side:
                lines.append(
                    f"{sample.image}: {columns}x{rows} pixels; fine_crop: found {side}; give at "
                    f"most {min(rows, columns)}, or 0"
                )
        return lines + super().problems(ahead)

    def network(self) -> nn.Module:
        """The UNet as it starts."""
        c = self.config
        # Its batches are small: by default nothing is computed again, which is faster.
        network = UNet(c.num_classes, c.channels, c.norm)
        recompute_activations(network.encode, c.recompute or -1)
        return network

    def parameter_groups(self) -> list[dict[str, Any]]:
        """All parameters at one learning rate."""
        return [{"params": list(self.module.parameters()), "lr": self.config.sup_lr}]

    def samples(self) -> list[Sample]:
        """Annotated images and test images."""
        return self.job.annotated() + find_split(self.config.data_dir, "test_numf")

    def losses(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Half cross-entropy, half Dice loss."""
        return supervised_loss(self.module(batch["image"]), batch["mask"], self.class_weight)

    def start(self) -> str:
        """What the network starts from, in words."""
        return "Supervised training from random weights"

    def header(self) -> list[str]:
        """What is trained on what, and scored on what."""
        samples, every = self.job.annotated(), self.config.eval_every_for(self.job.size)
        return [
            f"{self.start()} for {self.epochs} epochs on {self.images(samples)} with labels of "
            f"{self.config.data_dir}: {', '.join(s.name for s in samples[:5])}"
            + (" ..." if samples[5:] else ""),
            f"Scored on {self.images(self.test)} of the test set every {every} epochs and "
            "after the last; Dice is pooled over the set, without background",
        ]

    def due(self) -> list[int]:
        """The epochs, counted from 0, that are evaluated."""
        every, end = (
            f(self.job.size) for f in (self.config.eval_every_for, self.config.epochs_for)
        )
        return [epoch for epoch in range(end) if (epoch + 1) % every == 0 or epoch + 1 == end]

    def outputs(self) -> list[str]:
        """Also the best and the last network, and the pictures."""
        stage = self.stage
        names = [picture_name(s.name) for s in find_split(self.config.data_dir, "test_numf")]
        pictures = [f"epoch_{epoch}/{name}" for epoch in self.due() for name in names]
        own = [f"{stage}.pt", f"{stage}_last.pt"]
        own += [f"sheet_{stage}.png", f"sheet_{stage}_extremes.png"]
        return [*super().outputs(), *own, *pictures]

    def epoch_done(self, epoch: int) -> None:
        """Evaluate when it is due; keep the best by ACC, and the last."""
        if epoch not in self.due():
            return
        scores = self.evaluate(epoch)
        entry = {"epoch": epoch, **scores.as_dict()}
        best = all(scores.acc > e["acc"] for e in self.evaluations)
        self.evaluations = [*self.evaluations, entry]
        for line in evaluation_lines(scores):
            self.log.line(line)
        self.log.metrics({"evaluation": entry})
        names = [f"{self.stage}.pt"] if best else []
        names += [f"{self.stage}_last.pt"] if epoch + 1 == self.epochs else []
        for name in names:
            state = to_published(self.module.state_dict())
            settings = {**self.settings, **self.config.appearance()}
            contents = {self.wrapper: state, **entry, "settings": settings}
            save(self.run_dir / name, contents)

    @torch.inference_mode()
    def evaluate(self, epoch: int) -> Scores:
        """Score the test set as the network stands; write its predictions as PNG files."""
        self.module.eval()
        scores = SegmentationScores(self.config.num_classes)
        folder = self.run_dir / f"epoch_{epoch}"
        shown: list[tuple[Any, Any]] = []
        items = test_items(self.test, self.job.store, self.config.standardize)
        for images, masks, names in equal_sizes(items):
            with self.precision():
                x = images.to(self.device, memory_format=torch.channels_last)
                prediction = self.module(x).argmax(dim=1)
            scores.add(prediction, masks.to(self.device))
            classes = prediction.to(torch.uint8).cpu().numpy()
            for name, mask, picture in zip(names, masks, classes, strict=True):
                save_prediction(folder / picture_name(name), picture, self.config.mapping)
                shown.append((mask.numpy(), picture))
        if epoch + 1 == self.epochs:
            self.sheets(epoch, shown)
        return scores.compute()

    def sheets(self, epoch: int, shown: Sequence[tuple[Any, Any]]) -> None:
        """Write the contact sheets: images of the whole test set, and its worst, median and best.

        Args:
            epoch: the one of the predictions.
            shown: true mask and prediction of each test image.
        """
        c = self.config
        pixels = [self.job.store.image(s.image).movedim(0, -1).squeeze(-1) for s in self.test]
        rows = [(p.numpy(), *row) for p, row in zip(pixels, shown, strict=True)]
        names = [s.name for s in self.test]
        how: dict[str, Any] = {
            "heading": f"{self.run_dir.parent.name}/{self.run_dir.name}, epoch {epoch}",
            "class_names": c.class_names,
            "colours": class_colours(c.num_classes, c.class_colours),
        }
        path = self.run_dir / f"sheet_{self.stage}_extremes.png"
        best_median_worst(path, rows, names, c.num_classes, **how)
        path = self.run_dir / f"sheet_{self.stage}.png"
        contact_sheet(path, rows, names, c.num_classes, SHEET_ROWS, **how)

    def finish(self) -> None:
        """Also say where the pictures are."""
        super().finish()
        sheet = self.run_dir / f"sheet_{self.stage}.png"
        self.log.note(f"Pictures of test images, truth and prediction: {sheet}")


class Finetune(Supervised):
    """Training with labels from a pretrained encoder, whose stem and downs learn slower."""

    stage = "fine"
    wrapper = "finetune"

    def pretrained(self) -> Path:
        """The file that the encoder comes from: ``pretrained``, or the run's own pretraining."""
        if self.config.pretrained:
            return Path(self.config.pretrained)
        return self.run_dir / f"moco{self.config.self_max_epoch}.pt"

    def made_first(self) -> bool:
        """Whether this command is going to make the file that the encoder comes from."""
        if self.config.pretrained or "self" not in self.config.stage_list:
            return False
        with suppress(CheckpointError):
            state = SelfSupervised(self.job).saved()
            return state is None or not state["finished"]
        return True  # its own trouble is reported by pretraining

    def decisive_settings(self, ahead: bool = False) -> dict[str, Any]:
        """Also what the encoder is at the start, in the place of the file's name."""
        settings = super().decisive_settings(ahead)
        del settings["pretrained"]
        if ahead and self.made_first():
            return settings
        state = network_state(load(self.pretrained()), source=self.pretrained())
        digest = hashlib.sha256()
        for key in sorted(k for k in state if k.startswith("encode.")):
            digest.update(state[key].float().contiguous().numpy().tobytes())
        return {**settings, WEIGHTS: digest.hexdigest()[:16]}

    def problems(self, ahead: bool = False) -> list[str]:
        """Also if what it starts from is absent or does not fit."""
        path = self.pretrained()
        if ahead and self.made_first():
            return super().problems(ahead)
        if not path.exists():
            others = ", ".join(sorted(p.name for p in path.parent.glob("moco*.pt")))
            hint = f"--self_max_epoch (there is {others})" if others else "--pretrained FILE"
            return [f"{path}: no such file; pretrain first (-stages self-fine), or give {hint}"]
        try:
            transfer(super().network(), network_state(load(path), source=path), source=path)
        except CheckpointError as error:
            return [str(error)]
        return super().problems(ahead)

    def network(self) -> nn.Module:
        """The UNet with everything but its last layer pretrained."""
        network = super().network()
        path = self.pretrained()
        self.report = transfer(network, network_state(load(path), source=path), source=path)
        return network

    def start(self) -> str:
        """Where the weights come from and how many tensors matched."""
        return f"Fine-tuning from {self.pretrained()} ({self.report})"

    def header(self) -> list[str]:
        """Also a warning if pretraining saw the images in another form: it is allowed, and odd."""
        first, *rest = super().header()
        old = load(self.pretrained()).get("settings")
        if not isinstance(old, Mapping):  # a published file: nothing is known
            return [first, *rest]
        lines = []
        for name in ("standardize", "image_size"):
            was, new = old.get(name, FIELDS[name].default), getattr(self.config, name)
            if was != new:
                lines.append(
                    f"Warning: {self.pretrained()}: pretrained with {name} {was}, fine-tuned with "
                    f"{new}; give --{name} {was} unless you mean it"
                )
        return [first, *lines, *rest]

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Stem and downs at one rate, ups and the last layer at another."""
        slow: list[nn.Parameter] = []
        fast: list[nn.Parameter] = []
        for name, parameter in self.module.named_parameters():
            early = name.startswith(("encode.inc.", "encode.down"))
            (slow if early else fast).append(parameter)
        c = self.config
        return [
            {"params": slow, "lr": c.fine_lr_encoder},
            {"params": fast, "lr": c.fine_lr_decoder},
        ]


STAGES: dict[str, type[Runner]] = {"self": SelfSupervised, "fine": Finetune, "sup": Supervised}


# --- folders and files ----------------------------------------------------------------------------


def setting_differences(
    config: Config, old: Mapping[str, Any], new: Mapping[str, Any]
) -> list[str]:
    """In what the settings of a run on disk differ from those of this one, where it matters.

    Neither settings that the method does not take matter, nor ones that the older run does not name
    because they did not exist, as long as the new one leaves them at their defaults.
    """
    unused = unused_settings(config)
    return differences(
        *({k: v for k, v in (LATER | dict(each)).items() if k not in unused} for each in (old, new))
    )


def unused_settings(config: Config) -> list[str]:
    """The settings that are for other methods than the one chosen, in their order."""
    taken = settings_of(config.self_mode)
    methods = [n for n, field in FIELDS.items() if field.metadata["group"] == "Method"]
    return [name for name in methods if name not in taken]


def run_label(size: str, repeat: int) -> str:
    """Folder name of a run: '1_0', '5_3', 'f'."""
    return "f" if size == "f" else f"{size}_{repeat}"


def experiment_dir(config: Config, stage: str) -> Path:
    """Folder of all runs of an experiment: ``<name>_<self_mode>``, or ``<name>_sup``."""
    kind = "sup" if stage == "sup" else config.self_mode
    return Path(config.output_dir) / f"{config.name}_{kind}"


def evenly(samples: Sequence[Sample], count: int) -> list[Sample]:
    """At most ``count`` of the samples, taken evenly from the first on."""
    return list(samples[:: max(1, -(-len(samples) // count))])


def picture_name(image: str) -> str:
    """File name of the prediction of a test image."""
    return f"{Path(image).stem}.png"


def fingerprint(samples: Iterable[Sample], store: ImageStore) -> str:
    """A short hash of names and decoded pixels: two sets that differ have different ones."""
    digest = hashlib.sha256()
    for sample in samples:
        digest.update(sample.name.encode(errors="backslashreplace"))
        files = [store.image(sample.image)]
        files += [store.mask(sample.mask)] if sample.mask is not None else []
        for pixels in files:
            digest.update(f"{tuple(pixels.shape)}".encode() + pixels.numpy().tobytes())
    return digest.hexdigest()[:16]


def equal_sizes(
    items: Iterable[tuple[Tensor, Tensor, str]],
) -> Iterator[tuple[Tensor, Tensor, list[str]]]:
    """Test images in their order, joined to batches while their sizes agree.

    Yields:
        images (B, 3, H, W), masks (B, H, W), names.
    """
    waiting: list[tuple[Tensor, Tensor, str]] = []

    def batch() -> tuple[Tensor, Tensor, list[str]]:
        images, masks, names = zip(*waiting, strict=True)
        return torch.stack(images), torch.stack(masks), list(names)

    for item in items:
        if waiting and (len(waiting) == EVALUATION_BATCH or item[0].shape != waiting[0][0].shape):
            yield batch()
            waiting = []
        waiting.append(item)
    if waiting:
        yield batch()


# --- an experiment --------------------------------------------------------------------------------


def run(config: Config) -> None:
    """Check everything that the experiment needs, then train and score it.

    Args:
        config: the settings.

    Raises:
        UserError: something that the user can mend; the message has one line per problem.
        TrainingError: numbers that are not finite.
    """
    config = config.resolved()
    if config.threads:
        torch.set_num_threads(config.threads)
    if config.tensorboard:
        require_tensorboard()
    keep_freed_memory()
    device = choose_device(config.device)
    amp = choose_precision(config.amp, device)
    method = METHODS[config.self_mode]
    report = check_data(
        config.data_dir,
        num_classes=config.num_classes,
        image_size=config.image_size,
        ignore_label=config.ignore_label,
        stages=config.stage_list,
        sizes=config.sizes,
        repeats=config.repeat_list,
        use_unlabelled=config.use_unlabelled,
        self_mode_needs_groups=method.needs_groups,
        needs_annotated=method.needs_annotated,
        probe=config.probe > 0,
    )
    jobs = [
        Job(config, report.store, size, repeat, device, amp)
        for size in config.sizes
        for repeat in annotated_repeats(config.data_dir, size, config.repeat_list)
    ]
    stages = [STAGES[name] for name in config.stage_list]
    with ExitStack() as stack:
        for folder in dict.fromkeys(stage(job).run_dir for job in jobs for stage in stages):
            stack.enter_context(locked(folder))
        problems = [line for job in jobs for s in stages for line in s(job).problems(ahead=True)]
        if problems:
            raise ConfigError("\n".join(dict.fromkeys(problems)))
        for warning in report.warnings:
            to_terminal(f"Warning: {warning}")
        for job in jobs:
            for stage in stages:
                stage(job).run()
                if stage is not SelfSupervised:
                    write_results(experiment_dir(config, stage.stage), stage.stage)
    folders = {experiment_dir(config, s): s for s in config.stage_list if s != "self"}
    if folders:
        to_terminal(results_table(folders))
    if config.report:
        for folder in dict.fromkeys(experiment_dir(config, s) for s in config.stage_list):
            to_terminal(f"Report: {write_report(folder)}")


def main(
    argv: list[str] | None = None,
    prepare: Callable[[Config], None] | None = None,
    **defaults: Any,
) -> int:
    """Run an experiment from the command line.

    Args:
        argv: the words after the script's name; None for those of this process.
        prepare: called with the settings before anything is checked.
        defaults: the script's own settings, which the command line overrides.

    Returns:
        The exit code: 0, 2 for something the user can mend, 1 for numbers that went wrong, 130
        when interrupted, 143 when terminated.
    """
    try:
        config = parse_config(argv, **defaults)
    except ConfigError as error:
        return complain(str(error), 2)

    def work() -> None:
        if prepare is not None:
            prepare(config)
        run(config)

    afresh = config.overwrite or config.resume == "never"
    return exit_code(work, AGAIN_AFRESH if afresh else AGAIN)
