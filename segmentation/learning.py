"""The trainings of a job: the stages of ``train.py`` on the laid-out set, with labels of choice."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import count, islice
from pathlib import Path
from typing import Any

import torch

from config import Config
from data import Sample
from imaging.field import read_visible
from imaging.imagefile import read_image, read_mask
from imaging.store import ImageStore
from presets import PRESETS
from segmentation.intake import Intake
from segmentation.predictors import Costs, costs_of
from segmentation.request import Request
from stages.finetuning import Finetune, Supervised
from stages.job import Job, Runner
from stages.presets import choose, fitting_crops, look
from stages.pretraining import SelfSupervised
from utils.device import choose_device, choose_precision, keep_freed_memory, to_device
from utils.files import remove_leftovers
from utils.log import only_progress, to_terminal
from utils.metrics import IGNORED
from utils.run_folder import locked

TIMED_STEPS = 3
NO_MATTER = ("amp", "data_dir")  # settings that change nothing in a finished network


@dataclass(frozen=True)
class JobPlaces:
    """Where the trainings of a job lie, and what belongs to them, in its folder ``out``.

    A training has a name, and its runs a folder of that name and their method's; what has no run of
    its own, such as labels, lies in a folder of the name alone.
    """

    out: Path

    @property
    def trainings(self) -> Path:
        """The folder of all trainings."""
        return self.out / "training"

    @staticmethod
    def training(number: int) -> str:
        """The name of the training of a round, on all its labels."""
        return f"round_{number}"

    @staticmethod
    def twin(number: int) -> str:
        """The name of the training of a round's twin."""
        return f"{JobPlaces.training(number)}_twin"

    @staticmethod
    def without(number: int, fold: Sequence[int], longer: bool = False) -> str:
        """The name of the training of a round that leaves a fold out, or of the longer one."""
        name = f"{JobPlaces.training(number)}_without_{'_'.join(map(str, fold))}"
        return f"{name}_longer" if longer else name

    def networks(self, name: str) -> list[Path]:
        """The files that a training may have given: with pretraining, or without."""
        runs = [self.trainings / f"{name}_{method}" / "f" for method in ("simclr", "sup")]
        return [run / file for run in runs for file in ("fine.pt", "sup.pt")]

    def labels(self, number: int) -> Path:
        """The folder of the labels of a round."""
        return self.trainings / self.training(number) / "labels"

    def labels_of(self, name: str) -> Path:
        """The folder of the labels of a training that leaves a fold out."""
        return self.trainings / name

    def sure(self, name: str) -> Path:
        """The folder of strokes that a training learns, with the sure labels beside them."""
        return self.trainings / f"{name}_sure"

    def answer(self, name: str) -> Path:
        """The folder of an answer: of a round's training by its name, or of another method."""
        return self.trainings / "answers" / name


@dataclass(frozen=True)
class Lesson(Job):
    """A run whose annotated images have the labels of another folder."""

    labels: Path = Path()

    def annotated(self) -> list[Sample]:
        """The annotated images that have a file of labels there."""
        found = super().annotated()
        own = [(s.image, self.labels / f"{s.image.stem}.png") for s in found]
        return [Sample(image, labels) for image, labels in own if labels.is_file()]


class Learning:
    """Everything that is trained in a job, each training in a run folder of its own."""

    def __init__(self, request: Request, intake: Intake, began: float | None = None) -> None:
        self.request, self.intake = request, intake
        self.places = JobPlaces(request.out)
        self.store = ImageStore(0, IGNORED)
        keep_freed_memory()
        if request.threads:
            torch.set_num_threads(request.threads)
        self.threads = torch.get_num_threads()
        self.device = choose_device(request.device)
        self.amp = choose_precision("auto", self.device)
        self.began = time.monotonic() if began is None else began  # of the job
        self.values, self.reasons = self.preset()

    def preset(self) -> tuple[dict[str, Any], list[str]]:
        """The values of the preset, and what it took from the images, with the reasons."""
        preset = self.request.preset
        annotated = {p.name for p in self.intake.annotated}
        looks = {p.name: look(*read_visible(p.file)) for p in self.intake.pictures}
        sizes = {each.size for each in looks.values()}
        self.smallest_side = min(map(min, sizes))
        self.request.refuse_mixed(sizes)
        if preset == "paper":
            return {"self_crop": 0}, []
        by = choose if preset == "auto" else fitting_crops
        own, reasons = by(list(looks.values()), [looks[name] for name in sorted(annotated)])
        plain = {name: getattr(value, "item", lambda v=value: v)() for name, value in own.items()}
        return {**PRESETS[preset], **plain}, list(reasons.values())

    @property
    def usual_steps(self) -> int:
        """The steps of fine-tuning that the preset would do."""
        return int(self.values.get("fine_steps") or 1000)

    def config(self, name: str, **values: Any) -> Config:
        """The settings of one training; a step of fine-tuning is an epoch."""
        request, intake = self.request, self.intake
        steps = values.pop("steps", self.usual_steps)
        length = "fine_max_epoch" if request.preset == "paper" else "fine_steps"
        chosen: dict[str, Any] = {
            **self.values,
            "preset": request.preset,
            "name": name,
            "data_dir": str(intake.folder.resolve()),
            "output_dir": str(self.places.trainings),
            "data_size": "f",
            "num_classes": intake.num_classes,
            "ignore_label": IGNORED,
            "class_names": request.class_names,
            "use_unlabelled": False,  # all images lie in train_numf
            "seed": request.seed,
            "device": request.device,
            "threads": request.threads,
            "save_seconds": 20.0,
            length: steps,
            **values,
        }
        return Config(**chosen).resolved()

    def lesson(self, config: Config, labels: Path | None = None) -> Lesson:
        """A run on all images with these labels, those of the set if None."""
        folder = labels or self.intake.folder / "sup_numf" / "gt"
        place = self.store, "f", 0, self.device, self.amp, (), folder
        # Nobody named settings of the pretraining to this training: it is not compared with them.
        return Lesson(config, *place, named=frozenset())

    def pretrain(self, epochs: int, number: int) -> Path:
        """Pretrain with PSCL-SimCLR in a round; returns the checkpoint."""
        own = {"stages": "self", "self_max_epoch": epochs, "save_every": epochs}
        config = self.config(self.places.training(number), **own)
        runner = SelfSupervised(self.lesson(config))
        self.run(runner, "Pretraining")
        return runner.run_dir / f"moco{epochs}.pt"

    def finetune(
        self,
        name: str,
        steps: int,
        start: Path | None,
        labels: Path | None,
        title: str,
        **values: Any,
    ) -> Path:
        """Train with labels, from a pretrained file or from random weights; returns the network.

        ``values`` are settings of this training alone.
        """
        stage = Finetune if start else Supervised
        own = {"stages": stage.stage, "steps": steps, "pretrained": str(start or ""), **values}
        runner = stage(self.lesson(self.config(name, **own), labels))
        self.run(runner, title)
        return runner.run_dir / f"{stage.stage}.pt"

    def run(self, runner: Runner, title: str) -> None:
        """Run a stage, or go on with it; a run of other settings is trained anew.

        One that is finished serves on every device, whatever its precision was, and in a folder
        that was renamed.
        """
        with locked(runner.run_dir):
            remove_leftovers(runner.run_dir)
            state = runner.state.load() if runner.conflicts(runner.identity()) else None
            old, new = state["settings"] if state else {}, runner.identity()
            changed = runner.differences(old, new) if state else []
            own = ({n: v for n, v in each.items() if n not in NO_MATTER} for each in (old, new))
            if state and state["finished"] and not runner.differences(*own):
                return
            if changed:
                said = "; ".join(map(str, changed))
                to_terminal(f"{title}: trained anew, as an earlier run differs: {said}")
                runner.config = replace(runner.config, overwrite=True)
            with only_progress(title):
                runner.run()

    def seconds_per_step(self, stage: type[Runner]) -> float:
        """Time of a step: the median of a few, which are forgotten again."""
        runner = stage(self.lesson(self.config("timed", stages=stage.stage)))
        runner.seed()
        runner.build()
        runner.module.train()
        took = []
        try:
            for batch in islice(_batches(runner), TIMED_STEPS + 1):
                started = time.monotonic()
                losses = runner.step(runner.prepared(to_device(batch, self.device)))
                float(losses["loss"])
                took.append(time.monotonic() - started)
        finally:
            runner.release()  # the trainings that follow want the memory
        return sorted(took[1:] or took)[len(took[1:] or took) // 2]

    @torch.inference_mode()
    def seconds_per_megapixel(self) -> float:
        """Time of a prediction, by an untrained network on the first image, at most 512 a side."""
        runner = Supervised(self.lesson(self.config("timed", stages="sup")))
        runner.seed()
        runner.build()
        runner.module.eval()
        image = runner.pixels(runner.annotated[0])[:512, :512]
        x = torch.from_numpy(image.reshape(*image.shape[:2], -1)).movedim(2, 0)[None].float() / 255
        x = x.expand(-1, 3, -1, -1).to(self.device, memory_format=torch.channels_last)
        float(runner.module(x).sum())  # waited for: what is called first takes longer
        started = time.monotonic()
        float(runner.module(x).sum())
        return (time.monotonic() - started) / (image.shape[0] * image.shape[1] / 1e6)

    def classifier_costs(self) -> Costs:
        """What the pixel classifier takes."""
        images = [read_image(p.file) for p in self.intake.annotated]
        labels = [read_mask(p.labels) for p in self.intake.annotated if p.labels]
        return costs_of(images, labels, self.intake.num_classes, self.threads)

    def spent(self) -> float:
        """Seconds since the job began."""
        return time.monotonic() - self.began


def _batches(runner: Runner) -> Iterator[dict[str, Any]]:
    for epoch in count():
        yield from runner.batches.epoch(epoch)
