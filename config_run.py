"""The three stages (self, fine, sup) as subclasses of ``Training``, and whole experiments.

``run(config)`` checks everything it needs, then trains each data size, annotated image and stage.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import partial
from itertools import groupby, islice
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

import data
from config import FIELDS, SELF_MODES, Config, ConfigError, format_value, parse_config
from data import Sample, find_split
from dataset.check import check_data
from model import METHODS, build_method, settings_of
from networks import UNet
from pscl.losses import supervised_loss
from pscl.recompute import recompute_activations
from report import figures, page, probe, results, sheets
from utils.checkpoint import CheckpointError, load, network_state, save, to_published, transfer
from utils.commandline import exit_code
from utils.device import choose_device, choose_precision, keep_freed_memory
from utils.drawing import class_colours, save_prediction
from utils.imagefile import ImageStore
from utils.log import METRICS_FILE, evaluation_lines, require_tensorboard, to_terminal
from utils.metrics import Scores, SegmentationScores
from utils.run_folder import RunFolder, differences, fingerprint, locked
from utils.training import Training

EVALUATION_BATCH = 8
WEIGHTS = "pretrained weights"


@dataclass(frozen=True)
class Job:
    """One run: settings, data and device."""

    config: Config  # resolved
    store: ImageStore
    size: str  # data size '1', '5' or 'f'
    repeat: int  # number of the annotated image; 0 for 'f'
    device: torch.device
    amp: torch.dtype | None  # of autocast; None: full precision

    def annotated(self) -> list[Sample]:
        """The annotated images of this size and repeat."""
        root = self.config.data_dir
        return find_split(root, data.annotated_split(root, self.size, self.repeat))


class Runner(Training):
    """A stage of a run: a training on the images of a set."""

    batches: data.Batches

    def __init__(self, job: Job) -> None:
        run_dir = experiment_dir(job.config, self.stage) / run_label(job.size, job.repeat)
        super().__init__(job.config, RunFolder(run_dir, self.stage), job.device, job.amp)
        self.job, self.config = job, job.config

    def samples(self) -> list[Sample]:
        """The images that this stage is trained on or scored on."""
        raise TypeError("a stage has its own")

    def decisive_settings(self) -> dict[str, Any]:
        """The settings (``Config.training_settings``) and a fingerprint of the files."""
        settings = self.config.training_settings(self.stage, self.job.size)
        for name in ("data_dir", "pretrained"):
            settings.pop(name, None)  # paths may change: the contents are compared
        settings["amp"] = "bf16" if self.amp else "off"
        return {**settings, "files": fingerprint(self.samples(), self.job.store)}

    def compare(self, old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
        """The settings that differ; the weights only if they are known already."""
        known = {k: v for k, v in old.items() if k != WEIGHTS or k in new}
        return setting_differences(self.config, known, new)

    def unsuitable(self) -> list[str]:
        """Images or settings that this stage cannot use, a line each."""
        return []

    def problems(self) -> list[str]:
        """Why this stage must not run, a line each, as far as known before earlier stages ran."""
        return self.unsuitable() + self.conflicts(self.decisive_settings())

    def finish(self) -> None:
        """Draw the learning curves of all stages so far."""
        path = figures.learning_curve(self.run_dir / "curves.png", self.run_dir / METRICS_FILE)
        self.log.note(f"Learning curves: {path}")

    def to_memory(self, module: nn.Module) -> nn.Module:
        """Move a network to the device in channels-last format: norms and heads work per pixel."""
        return module.to(self.device, memory_format=torch.channels_last)  # type: ignore[call-overload]

    def images(self, samples: Sequence[Sample]) -> str:
        """Number and sizes of samples: '48 images 188x188'."""
        sizes = sorted({tuple(self.job.store.image(s.image).shape[-2:]) for s in samples})
        shown = ", ".join(f"{w}x{h}" for h, w in sizes[:2]) + (" and others" if sizes[2:] else "")
        return f"{len(samples)} image{'s' if len(samples) != 1 else ''} {shown}"

    def pixels(self, sample: Sample) -> NDArray[np.uint8]:
        """An image's own pixels, uint8 (H, W) or (H, W, 3)."""
        return self.job.store.image(sample.image).movedim(0, -1).squeeze(-1).numpy()


class SelfSupervised(Runner):
    """Pretraining without labels by the method that ``self_mode`` names."""

    stage, number = "self", 1

    def __init__(self, job: Job) -> None:
        super().__init__(job)
        c, self.method = self.config, METHODS[self.config.self_mode]
        self.train_samples = data.pretraining_samples(c.data_dir, c.use_unlabelled)
        self.annotated = job.annotated() if self.method.needs_annotated else []

    def build(self) -> None:
        """The method, Adam or AdamW, and batches of two views with an annotated image in front."""
        c = self.config
        self.module = self.to_memory(build_method(c.self_mode, c.to_dict()))
        self.epochs = c.self_max_epoch
        trained = [p for p in self.module.parameters() if p.requires_grad]
        self.optimizer = torch.optim.Adam(trained, c.self_lr)
        if c.self_optimizer == "adamw":
            decay = c.self_weight_decay
            self.optimizer = torch.optim.AdamW(trained, c.self_lr, weight_decay=decay)
        views = data.TwoViewDataset(
            self.train_samples,
            self.annotated,
            self.job.store,
            num_classes=c.num_classes,
            seed=c.seed,
            jitter_strength=c.self_jitter,
            random_crop=c.random_crop,
            standardize=c.standardize,
        )
        self.batches = data.Batches(views, c.self_batch_size, c.workers)

    def samples(self) -> list[Sample]:
        """All images of pretraining."""
        return self.train_samples + self.annotated

    def losses(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """The method's own."""
        return dict(self.module(batch))

    def header(self) -> list[str]:
        """Method, data and steps, settings without effect, and a note on the method's loss."""
        c, annotated = self.config, self.annotated
        name, batch = SELF_MODES[c.self_mode], min(c.self_batch_size, len(self.train_samples))
        lines = [
            f"Pretraining with {name} for {self.epochs} epochs on "
            f"{self.images(self.train_samples)} of {c.data_dir}, labels unused, "
            f"{len(self.batches)} steps of {batch} images an epoch"
        ]
        if annotated:
            one = "One of the annotated images" if annotated[1:] else "The annotated image"
            lines.append(f"{one} rides along in every batch: {some_names(annotated)}")
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

    def unsuitable(self) -> list[str]:
        """A line if the batches are too small for the method's loss."""
        c, least, images = self.config, self.method.least_images, len(self.train_samples)
        if min(c.self_batch_size, images) + bool(self.annotated) >= least:
            return []
        if images < least:
            what = f"{images} image to pretrain on; {SELF_MODES[c.self_mode]} needs {least}"
            return [f"{c.data_dir}: {what} in a batch; add images, or give another --self_mode"]
        cure = f"allowed: at least {least} with --self_mode {c.self_mode}"
        return [f"self_batch_size: found {c.self_batch_size}; {cure}"]

    def train_epoch(self, epoch: int, step_done: Callable[[], object]) -> None:
        """With ``self_schedule`` the rate is a tenth from 50 % on, a hundredth from 75 % on."""
        if self.config.self_schedule:
            drops = (epoch >= 0.5 * self.epochs) + (epoch >= 0.75 * self.epochs)
            for group in self.optimizer.param_groups:
                group["lr"] = self.config.self_lr * 0.1**drops
        super().train_epoch(epoch, step_done)

    def outputs(self) -> list[str]:
        """Also the checkpoints and the pictures of the probe."""
        c, end = self.config, self.config.self_max_epoch
        checkpoints = [f"moco{done}.pt" for done in due(c.save_every, end)]
        return [*super().outputs(), *checkpoints, *(f"probe_{n}.png" for n in due(c.probe, end))]

    def foreign(self) -> list[Path]:
        """Also any ``moco*.pt``, which fine-tuning might take for this run's."""
        return [*sorted(self.run_dir.glob("moco*.pt")), *super().foreign()]

    def epoch_done(self, epoch: int) -> None:
        """Write ``moco<epochs done>.pt`` and probe the features when due."""
        c, done = self.config, epoch + 1
        if done in due(c.save_every, c.self_max_epoch):
            state = to_published(self.module.state_dict())
            contents = {"moco": state, "epoch": done, "settings": self.settings}
            save(self.run_dir / f"moco{done}.pt", contents)
        if done in due(c.probe, c.self_max_epoch):
            self.probe(done)

    def probe(self, epochs_done: int) -> None:
        """Probe the frozen features: log lines, metrics and a picture."""
        c, store, annotated = self.config, self.job.store, self.job.annotated()
        test = find_split(c.data_dir, "test_numf")
        some = probe.evenly(self.train_samples, probe.SPREAD_IMAGES)
        shown = [*annotated[:1], *probe.evenly(test, 3)]
        found = probe.probe(
            self.module.get_submodule("encoder_q"),
            images=torch.stack([data.image_input(s, store, c.standardize) for s in some]),
            annotated=list(data.test_items(annotated, store, c.standardize)),
            test=data.test_items(test, store, c.standardize),
            shown=list(data.test_items(shown, store, c.standardize)),
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
            f"Scored on {self.images(self.test)} of the test set every {every} epochs and "
            "after the last; Dice is pooled over the set, without background",
        ]

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


STAGES: dict[str, type[Runner]] = {"self": SelfSupervised, "fine": Finetune, "sup": Supervised}


def setting_differences(
    config: Config, old: Mapping[str, Any], new: Mapping[str, Any]
) -> list[str]:
    """How the settings of a run on disk differ from new ones, a line each.

    Settings that the method does not take are left out. A run older than a setting has its default.
    """
    unused = unused_settings(config)
    names = [n for n in {**old, **new} if n not in unused]
    defaults = {n: FIELDS[n].default for n in names if n in FIELDS}
    before, now = ({n: (defaults | dict(each)).get(n) for n in names} for each in (old, new))
    return differences(before, now)


def unused_settings(config: Config) -> list[str]:
    """The settings that only other methods take."""
    taken = settings_of(config.self_mode)
    return [n for n, f in FIELDS.items() if f.metadata["group"] == "Method" and n not in taken]


def run_label(size: str, repeat: int) -> str:
    """Folder name of a run: '1_0', '5_3', 'f'."""
    return "f" if size == "f" else f"{size}_{repeat}"


def experiment_dir(config: Config, stage: str) -> Path:
    """Folder of an experiment's runs: ``<name>_<self_mode>``, or ``<name>_sup``."""
    kind = config.self_mode if stage in ("self", "fine") else stage
    return Path(config.output_dir) / f"{config.name}_{kind}"


def due(every: int, end: int) -> list[int]:
    """Multiples of ``every`` from 0 to ``end``, and ``end`` itself; none if ``every`` is 0."""
    return [done for done in range(end + 1) if done % every == 0 or done == end] if every else []


def some_names(samples: Sequence[Sample]) -> str:
    """The names of at most five samples."""
    return ", ".join(s.name for s in samples[:5]) + (" ..." if samples[5:] else "")


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


def run(config: Config) -> None:
    """Check everything the experiment needs (UserError), then train and score."""
    config = config.resolved()
    if config.threads:
        torch.set_num_threads(config.threads)
    if config.tensorboard:
        require_tensorboard()
    keep_freed_memory()
    jobs, warnings = open_set(config)
    runs = [(job, STAGES[name]) for job in jobs for name in config.stage_list]
    with ExitStack() as stack:
        for folder in dict.fromkeys(stage(job).run_dir for job, stage in runs):
            stack.enter_context(locked(folder))
        problems = [line for job, stage in runs for line in stage(job).problems()]
        if problems:
            raise ConfigError("\n".join(dict.fromkeys(problems)))
        for warning in warnings:
            to_terminal(f"Warning: {warning}")
        for job, stage in runs:
            stage(job).run()
            if stage is not SelfSupervised:
                results.write_results(experiment_dir(config, stage.stage), stage.stage)
    scored = {experiment_dir(config, s): s for s in config.stage_list if s != "self"}
    if scored:
        to_terminal(results.results_table(scored))
    if config.report:
        for folder in dict.fromkeys(experiment_dir(config, s) for s in config.stage_list):
            to_terminal(f"Report: {page.write_report(folder)}")


def open_set(config: Config) -> tuple[list[Job], Sequence[str]]:
    """Decode and check the set (UserError); returns the runs and the warnings."""
    device, method = choose_device(config.device), METHODS[config.self_mode]
    amp = choose_precision(config.amp, device)
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
        for repeat in data.annotated_repeats(config.data_dir, size, config.repeat_list)
    ]
    return jobs, report.warnings


def main(
    argv: list[str] | None = None, prepare: Callable[[Config], None] | None = None, **defaults: Any
) -> int:
    """Run an experiment from the command line; returns the exit code, see ``exit_code``.

    ``argv`` overrides the script's ``defaults``; ``prepare`` gets the settings before the checks.
    """

    def work() -> None:
        config = parse_config(argv, **defaults)
        if prepare is not None:
            prepare(config)
        run(config)

    return exit_code(work)
