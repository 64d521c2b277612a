"""The engine: one training loop, one evaluation, the three stages as small differences from it.

``run(config)`` checks everything that it will need, then trains each data size, annotated image and
stage in turn. A killed run is taken up at the last saved epoch and ends as if it had not been: all
random numbers of an epoch follow from the seed and the epoch.
"""

from __future__ import annotations

import hashlib
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from config import SELF_MODES, Config, ConfigError, parse_config
from data import (
    Batches,
    DataError,
    Sample,
    annotated_split,
    check_data,
    find_split,
    finetuning_batches,
    pretraining_batches,
    pretraining_samples,
    test_items,
)
from model import METHODS, build_method
from networks import UNet
from utils.checkpoint import CheckpointError, load, network_state, save, to_published, transfer
from utils.imagefile import ImageStore
from utils.log import (
    AverageMeter,
    LogError,
    RunLog,
    environment_line,
    evaluation_lines,
    format_epoch,
    progress,
)
from utils.losses import supervised_loss
from utils.metrics import Scores, SegmentationScores
from utils.picture import PictureError, contact_sheet, save_prediction
from utils.results import results_table, write_results

USER_ERRORS = (ConfigError, DataError, CheckpointError, LogError, PictureError)
EVALUATION_BATCH = 8
SHEET_ROWS = 8
STAGE_NUMBERS = {"self": 1, "fine": 2, "sup": 3}  # keep the stages' random numbers apart


class TrainingError(ValueError):
    """Numbers went wrong; the message says where and what is kept."""


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
        self.state_path = self.run_dir / f"state_{self.stage}.pt"
        self.evaluations: list[dict[str, Any]] = []
        self.epochs: int = 0
        self.module: nn.Module
        self.optimizer: torch.optim.Optimizer
        self.batches: Batches
        self.log: RunLog

    # What a stage is.

    def build(self) -> None:
        """Make ``module``, ``optimizer`` and ``batches``."""
        raise TypeError("a stage builds its own parts")

    def settings(self) -> dict[str, Any]:
        """What decides the result of this run: settings, and a fingerprint of the files."""
        settings = self.config.training_settings(self.stage, self.job.size)
        settings["amp"] = "bf16" if self.job.amp is torch.bfloat16 else "off"
        settings["files"] = fingerprint(self.samples(), self.job.store)
        return settings

    def samples(self) -> list[Sample]:
        """The images this stage learns from or is scored on."""
        raise TypeError("a stage names its own images")

    def losses(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Losses of one batch by name; ``loss`` is the one that is followed."""
        raise TypeError("a stage has its own losses")

    def header(self) -> list[str]:
        """What is trained on what, in words."""
        raise TypeError("a stage says what it does")

    def epoch_done(self, epoch: int) -> None:
        """Evaluate or write a checkpoint if it is time; ``epoch`` counts from 0."""

    def finish(self) -> None:
        """Write what belongs at the end of the run."""

    # What all stages do.

    def run(self) -> list[dict[str, Any]]:
        """Train to the end, or from where a killed run was saved; returns the evaluations."""
        settings = self.settings()
        state = self.saved_state(settings)
        if state is not None and state["finished"]:
            print(f"{self.run_dir}: stage {self.stage} is finished already, with these settings")
            return state["evaluations"]
        torch.manual_seed(mixed_seed(self.config.seed, STAGE_NUMBERS[self.stage]))
        self.build()
        first = 0 if state is None else self.restore(state)
        with RunLog(self.run_dir, self.stage, state["log"] if state else None) as self.log:
            self.log.header(
                [
                    *self.header(),
                    *self.config.describe(),
                    environment_line(self.device, settings["amp"]),
                ]
            )
            if state is not None:
                self.log.note(f"Going on after epoch {first - 1} of the run that was stopped")
            elif self.stage == "self":
                self.epoch_done(-1)
            self.train(first, settings)
            self.finish()
        save(
            self.state_path,
            {"settings": settings, "finished": True, "evaluations": self.evaluations},
        )
        return self.evaluations

    def train(self, first: int, settings: dict[str, Any]) -> None:
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
                if epoch + 1 < self.epochs and time.monotonic() - saved > self.config.save_seconds:
                    self.save_state(epoch + 1, settings)
                    saved = time.monotonic()

    def train_epoch(self, epoch: int, step_done: Callable[[], object]) -> None:
        """One pass over the batches: one log line, one wait for the device."""
        torch.manual_seed(mixed_seed(self.config.seed, STAGE_NUMBERS[self.stage], epoch + 1))
        self.module.train()
        meter = AverageMeter()
        names: list[list[str]] = []
        bad_step = torch.full((), float("inf"), device=self.device)
        for step, batch in enumerate(self.batches.epoch(epoch)):
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
            f"{self.run_dir}: the loss is not finite in epoch {epoch}, step {step} "
            f"({', '.join(names)}); what was saved before is kept. Look at these files, try a "
            "lower learning rate or --amp off"
        )

    def precision(self) -> AbstractContextManager[object]:
        """Autocast if asked for."""
        if self.job.amp is None:
            return nullcontext()
        return torch.autocast(self.device.type, self.job.amp)

    def saved_state(self, settings: dict[str, Any]) -> dict[str, Any] | None:
        """The state of an earlier run in this folder, if it is to be taken up.

        Raises:
            ConfigError: the folder holds a run with other settings.
        """
        if self.config.overwrite or not self.state_path.exists():
            return None
        state = load(self.state_path)
        lines = differences(state.get("settings", {}), settings)
        if lines:
            raise ConfigError(
                f"{self.run_dir}: holds a run of stage {self.stage} with other settings "
                f"({'; '.join(lines)}); give --overwrite to train anew, or another --name"
            )
        if self.config.resume == "never":
            return None
        self.evaluations = state["evaluations"]
        return state

    def save_state(self, epoch: int, settings: dict[str, Any]) -> None:
        """Save all that training needs to go on with ``epoch``."""
        save(
            self.state_path,
            {
                "settings": settings,
                "finished": False,
                "epoch": epoch,
                "module": self.module.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "evaluations": self.evaluations,
                "log": self.log.offsets(),
            },
        )

    def restore(self, state: Mapping[str, Any]) -> int:
        """Take a saved state over; returns the epoch to go on with."""
        self.module.load_state_dict(state["module"])
        self.optimizer.load_state_dict(state["optimizer"])
        return int(state["epoch"])

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
                f"With every batch rides one of {self.images(annotated)} with labels: "
                + ", ".join(s.name for s in annotated[:5])
                + (" ..." if annotated[5:] else "")
            )
        note = METHODS[c.self_mode].log_note(c.queue_size, batch + bool(annotated))
        return lines + ([note] if note else [])

    def train_epoch(self, epoch: int, step_done: Callable[[], object]) -> None:
        """An epoch at its learning rate: a tenth from 50 %, a hundredth from 75 % if asked for."""
        if self.config.self_schedule:
            drops = (epoch >= 0.5 * self.epochs) + (epoch >= 0.75 * self.epochs)
            for group in self.optimizer.param_groups:
                group["lr"] = self.config.self_lr * 0.1**drops
        super().train_epoch(epoch, step_done)

    def epoch_done(self, epoch: int) -> None:
        """Write ``moco<epochs done>.pt`` when it is due: at the start, each ``save_every``, the end."""
        done = epoch + 1
        if done % self.config.save_every == 0 or done == self.epochs:
            state = to_published(self.module.state_dict())
            contents = {"moco": state, "epoch": done, "settings": self.settings()}
            save(pretrained_path(self.config, self.job.size, self.job.repeat, done), contents)


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
        self.every = c.eval_every_for(self.job.size)
        self.class_weight = torch.tensor(c.class_weight, device=self.device)
        self.batches = finetuning_batches(
            samples,
            self.job.store,
            batch_size=min(c.fine_batch_size, len(samples)),
            seed=c.seed,
            jitter_strength=c.fine_jitter,
            workers=c.workers,
        )
        self.test = find_split(c.data_dir, "test_numf")

    def network(self) -> nn.Module:
        """The UNet as it starts."""
        return UNet(self.config.num_classes, self.config.channels)

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
        samples = self.job.annotated()
        return [
            f"{self.start()} for {self.epochs} epochs on {self.images(samples)} with labels of "
            f"{self.config.data_dir}: {', '.join(s.name for s in samples[:5])}"
            + (" ..." if samples[5:] else ""),
            f"Scored on {self.images(self.test)} of the test set every {self.every} epochs and "
            "after the last; Dice is pooled over the set, without background",
        ]

    def epoch_done(self, epoch: int) -> None:
        """Evaluate when it is due; keep the best by ACC, and the last."""
        done = epoch + 1
        if done % self.every and done != self.epochs:
            return
        scores = self.evaluate(epoch)
        entry = {"epoch": epoch, **scores.as_dict()}
        best = max((e["acc"] for e in self.evaluations), default=-1.0)
        self.evaluations = [*self.evaluations, entry]
        for line in evaluation_lines(scores):
            self.log.line(line)
        self.log.metrics({"evaluation": entry})
        names = [f"{self.stage}.pt"] if scores.acc > best else []
        names += [f"{self.stage}_last.pt"] if done == self.epochs else []
        for name in names:
            state = to_published(self.module.state_dict())
            contents = {self.wrapper: state, **entry, "settings": self.settings()}
            save(self.run_dir / name, contents)

    @torch.inference_mode()
    def evaluate(self, epoch: int) -> Scores:
        """Score the test set as the network stands; write its predictions as PNG files."""
        self.module.eval()
        scores = SegmentationScores(self.config.num_classes)
        folder = self.run_dir / f"epoch_{epoch}"
        shown: list[tuple[Any, Any, Any]] = []
        for images, masks, names in equal_sizes(test_items(self.test, self.job.store)):
            with self.precision():
                x = images.to(self.device, memory_format=torch.channels_last)
                prediction = self.module(x).argmax(dim=1)
            scores.add(prediction, masks.to(self.device))
            classes = prediction.to(torch.uint8).cpu().numpy()
            for name, mask, picture in zip(names, masks, classes, strict=True):
                save_prediction(folder / f"{Path(name).stem}.png", picture, self.config.mapping)
                shown.append((None, mask.numpy(), picture))
        if epoch + 1 == self.epochs:
            pixels = [self.job.store.image(s.image).movedim(0, -1).squeeze(-1) for s in self.test]
            rows = [(p.numpy(), *row[1:]) for p, row in zip(pixels, shown, strict=True)]
            self.sheet = contact_sheet(
                self.run_dir / f"sheet_{self.stage}.png",
                rows,
                [s.name for s in self.test],
                self.config.num_classes,
                SHEET_ROWS,
                heading=f"{self.run_dir.parent.name}/{self.run_dir.name}, epoch {epoch}",
            )
        return scores.compute()

    def finish(self) -> None:
        """Say where the pictures are."""
        self.log.note(f"Pictures of test images, truth and prediction: {self.sheet}")


class Finetune(Supervised):
    """Training with labels that starts from a pretrained encoder; its stem and downs learn slower."""

    stage = "fine"
    wrapper = "finetune"

    def pretrained(self) -> Path:
        """The file that the encoder comes from."""
        return start_path(self.config, self.job.size, self.job.repeat)

    def settings(self) -> dict[str, Any]:
        """Also what the encoder was at the start."""
        settings = super().settings()
        state = network_state(load(self.pretrained()), source=self.pretrained())
        digest = hashlib.sha256()
        for key in sorted(k for k in state if k.startswith("encode.")):
            digest.update(state[key].contiguous().numpy().tobytes())
        settings["pretrained weights"] = digest.hexdigest()[:16]
        return settings

    def network(self) -> nn.Module:
        """The UNet with everything but its last layer pretrained."""
        network = super().network()
        path = self.pretrained()
        self.report = transfer(network, network_state(load(path), source=path), source=path)
        return network

    def start(self) -> str:
        """Where the weights come from and how many tensors matched."""
        return f"Fine-tuning from {self.pretrained()} ({self.report})"

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


def run_label(size: str, repeat: int) -> str:
    """Folder name of a run: '1_0', '5_3', 'f'."""
    return "f" if size == "f" else f"{size}_{repeat}"


def experiment_dir(config: Config, stage: str) -> Path:
    """Folder of all runs of an experiment: ``<name>_<self_mode>``, or ``<name>_sup``."""
    kind = "sup" if stage == "sup" else config.self_mode
    return Path(config.output_dir) / f"{config.name}_{kind}"


def pretrained_path(config: Config, size: str, repeat: int, epochs: int) -> Path:
    """Where pretraining writes its checkpoint after so many epochs."""
    return experiment_dir(config, "self") / run_label(size, repeat) / f"moco{epochs}.pt"


def start_path(config: Config, size: str, repeat: int) -> Path:
    """What fine-tuning starts from: ``pretrained``, or the run's own pretraining."""
    if config.pretrained:
        return Path(config.pretrained)
    return pretrained_path(config, size, repeat, config.self_max_epoch)


def fingerprint(samples: Iterable[Sample], store: ImageStore) -> str:
    """A short hash of names and decoded pixels: two sets that differ have different ones."""
    digest = hashlib.sha256()
    for sample in samples:
        digest.update(sample.name.encode(errors="backslashreplace"))
        digest.update(store.image(sample.image).numpy().tobytes())
        if sample.mask is not None:
            digest.update(store.mask(sample.mask).numpy().tobytes())
    return digest.hexdigest()[:16]


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """'name was old, is new' for each setting that differs; tuples come back as they were."""
    lines = []
    for name in sorted(old.keys() | new.keys()):
        before, now = old.get(name), new.get(name)
        if isinstance(before, (list, tuple)) and isinstance(now, (list, tuple)):
            before, now = list(before), list(now)
        if before != now:
            lines.append(f"{name} was {before}, is {now}")
    return lines


# --- numbers and batches --------------------------------------------------------------------------


def mixed_seed(*numbers: int) -> int:
    """One seed out of several numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> np.uint64(1))


def to_device(batch: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """The batch with its tensors on the device, pictures channels last."""
    moved = {}
    for key, value in batch.items():
        if isinstance(value, Tensor) and value.ndim == 4:
            value = value.to(device, memory_format=torch.channels_last, non_blocking=True)
        elif isinstance(value, Tensor):
            value = value.to(device, non_blocking=True)
        moved[key] = value
    return moved


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


def choose_device(name: str) -> torch.device:
    """The device called ``name``; 'auto' takes CUDA, then MPS, then the CPU.

    Raises:
        ConfigError: this machine or this PyTorch does not have it.
    """
    if name == "auto":
        if torch.cuda.is_available():
            name = "cuda"
        elif torch.backends.mps.is_available():
            name = "mps"
        else:
            name = "cpu"
    device = torch.device(name)
    absent = (device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count()) or (
        device.type == "mps" and not torch.backends.mps.is_available()
    )
    if absent:
        raise ConfigError(
            f"device: found {name}, which PyTorch does not see here; give --device auto"
        )
    return device


def choose_precision(amp: str, device: torch.device) -> torch.dtype | None:
    """The dtype of autocast; 'auto' takes bf16 where the processor multiplies it natively."""
    if amp == "off":
        return None
    if amp == "bf16" or native_bf16(device):
        return torch.bfloat16
    return None


def native_bf16(device: torch.device) -> bool:
    """Whether bf16 is faster than fp32: CUDA from Ampere on, CPUs with AMX tiles."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device)[0] >= 8
    if device.type != "cpu":
        return False
    try:
        return " amx_bf16 " in f"{Path('/proc/cpuinfo').read_text(encoding='utf-8')} ".replace(
            "\n", " "
        )
    except OSError:
        return False


# --- an experiment --------------------------------------------------------------------------------


def run(config: Config) -> None:
    """Check everything that the experiment needs, then train and score it.

    Args:
        config: the settings.

    Raises:
        ConfigError, DataError, CheckpointError, LogError, PictureError: something that the user
            can mend; the message has one line per problem.
        TrainingError: a loss that is not finite.
    """
    config = config.resolved()
    if config.threads:
        torch.set_num_threads(config.threads)
    device = choose_device(config.device)
    amp = choose_precision(config.amp, device)
    method = METHODS[config.self_mode]
    report = check_data(
        config.data_dir,
        num_classes=config.num_classes,
        image_size=config.image_size,
        stages=config.stage_list,
        sizes=config.sizes,
        repeats=config.repeat_list,
        use_unlabelled=config.use_unlabelled,
        self_mode_needs_groups=method.needs_groups,
        needs_annotated=method.needs_annotated,
    )
    runs = [(s, r) for s in config.sizes for r in (config.repeat_list if s != "f" else (0,))]
    check_starts(config, runs)
    for warning in report.warnings:
        print(f"Warning: {warning}")
    for size, repeat in runs:
        job = Job(config, report.store, size, repeat, device, amp)
        for stage in config.stage_list:
            STAGES[stage](job).run()
            if stage != "self":
                write_results(experiment_dir(config, stage), stage)
    folders = {experiment_dir(config, s): s for s in config.stage_list if s != "self"}
    if folders:
        print(results_table(folders))


def check_starts(config: Config, runs: Sequence[tuple[str, int]]) -> None:
    """Make sure that what fine-tuning starts from is there and fits, unless it is made before.

    Raises:
        CheckpointError: all files that do not, a line or more each.
    """
    if "fine" not in config.stage_list or ("self" in config.stage_list and not config.pretrained):
        return
    problems = []
    for path in dict.fromkeys(start_path(config, *r) for r in runs):
        try:
            network = UNet(config.num_classes, config.channels)
            transfer(network, network_state(load(path), source=path), source=path)
        except CheckpointError as error:
            problems.append(str(error))
    if problems:
        hint = "pretrain first (-stages self-fine), or give --pretrained FILE or --self_max_epoch"
        raise CheckpointError("\n".join([*problems, f"Fine-tuning cannot start: {hint}"]))


@contextmanager
def termination_as_interrupt() -> Iterator[None]:
    """Let SIGTERM end a run as Ctrl-C does, where a handler can be set."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


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
        when interrupted.
    """
    try:
        with termination_as_interrupt():
            config = parse_config(argv, **defaults)
            if prepare is not None:
                prepare(config)
            run(config)
    except USER_ERRORS as error:
        print(error, file=sys.stderr)
        return 2
    except TrainingError as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("Stopped. The same command goes on from the last saved epoch.", file=sys.stderr)
        return 130
    return 0
