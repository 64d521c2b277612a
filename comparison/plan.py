"""The trainings that a table needs, of all rows and repeats: what is left, what they scored."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import config_run
from comparison.bootstrap import number_clusters
from comparison.forest import ForestRun
from comparison.options import Options, Variant
from comparison.table import Result
from config_run import STAGES
from data import annotated_repeats, listed_split, parse_name
from encoders import require_packages
from imaging.imagefile import read_mask
from model import METHODS
from report.results import FIT
from stages.finetuning import picture_name
from stages.job import WEIGHTS, Job, Runner, setting_differences
from stages.scored import Scored
from stages.start import pretrained_file
from utils.checkpoint import CheckpointError
from utils.commandline import UserError
from utils.device import choose_device, choose_precision
from utils.files import DataError
from utils.log import changed_source, to_terminal
from utils.metrics import IGNORED, Counts, Scores, SegmentationScores

NAMES = {"self": "pretraining", "fine": "fine-tuning", "sup": "supervised", "forest": "fit"}


@dataclass(frozen=True, eq=False)
class Work:
    """A piece of work: one stage of one run."""

    variant: Variant
    repeat: int
    runner: Runner

    @property
    def for_all(self) -> bool:
        """Whether it is a pretraining that all repeats share."""
        return self.runner.stage == "self" and self.variant.shared

    @property
    def kind(self) -> str:
        """Work of one kind takes equal time, training with labels after any pretraining too."""
        named = {"self": f"pretraining, {self.variant.title}", "forest": "forest"}
        encoder = dict(self.variant.settings).get("encoder", "")
        own = f"training with labels, {encoder}" if encoder else "training with labels"
        return named.get(self.runner.stage, own)

    @property
    def pace(self) -> str:
        """What takes equal time: work of one kind, of one length, on images of one size."""
        c, size, parts = self.runner.config, self.runner.job.size, [self.kind]
        if self.runner.stage == "self":
            parts.append(f"{c.self_max_epoch} epochs of {c.self_batch_size}, crop {c.self_crop}")
        elif self.runner.stage != "forest":
            unit = "steps" if c.fine_steps else "epochs"
            parts.append(f"{c.epochs_for(size)} {unit} of {c.fine_batch_size}, crop {c.fine_crop}")
            parts.append(f"evaluated every {c.eval_every_for(size)}")
        return ", ".join([*parts, f"image size {c.image_size}"])

    @property
    def title(self) -> str:
        """For people."""
        own = f"repeat {self.repeat}, {NAMES[self.runner.stage]}"
        return f"{self.variant.title}, {'pretraining for all repeats' if self.for_all else own}"

    def left(self) -> float:
        """The share of it that is left: 0 (finished) ... 1 (not begun)."""
        config, size = self.runner.config, self.runner.job.size
        state = self.runner.saved()
        if state is None:
            return 1.0
        epochs = config.self_max_epoch if self.runner.stage == "self" else config.epochs_for(size)
        return 0.0 if state["finished"] else max(1 - state.get("epoch", 0) / epochs, 0.0)

    def do(self) -> None:
        """Do it, or resume it."""
        if isinstance(self.runner, ForestRun):
            self.runner.run()
        else:
            config_run.run(self.runner.config, self.runner.job.notes, store=self.runner.job.store)


class Plan:
    """The data set, decoded once, and the trainings of a table on it.

    Raises:
        UserError: as ``config_run.run``, before anything is written.
    """

    def __init__(self, options: Options) -> None:
        self.options = options
        config = self.config = options.config.resolved()
        if config.threads:
            torch.set_num_threads(config.threads)
        self.device = choose_device(config.device)
        self.amp = choose_precision(config.amp, self.device)
        self.size = config.data_size
        self.repeats = annotated_repeats(config.data_dir, self.size, config.repeat_list)
        for variant in options.variants:
            require_packages(dict(variant.settings).get("encoder", config.encoder))
        methods = [METHODS[v.method] for v in options.variants if v.method in METHODS]
        stages = ("self", "fine", "sup") if methods and not options.report else ("sup",)
        data = config_run.check_set(config, methods, stages, needs_test=True)
        self.store = data.store
        self.store.share(config.workers + 1)
        for warning in data.warnings:
            to_terminal(f"Warning: {warning}")
        # Tiles of one micrograph overlap or adjoin: they are not independent test images.
        self.test = listed_split(self.store, config.data_dir, "test_numf")
        self.clusters = number_clusters([parse_name(s.image.stem) for s in self.test])
        self._counted: dict[Path, Counts] = {}  # by the folder of the pictures
        self._read: dict[tuple[Path, int, int, int], dict[str, Any]] = {}  # states, see ``_state``

    def work(self, variant: Variant, repeat: int, stage: str) -> Work:
        """A piece of work, with the settings that ``train.py`` would get for it."""
        other = self.options.pretraining
        name = other if other and stage == "self" else variant.name
        values: dict[str, Any] = {"name": name, "repeats": str(repeat)}
        if stage != "forest":
            values["stages"] = stage
        if variant.method in METHODS:
            values["self_mode"] = variant.method
        if stage == "fine" and (other or (variant.shared and repeat)):
            start = self.work(variant, 0 if variant.shared else repeat, "self")
            values["pretrained"] = str(pretrained_file(start.runner.config, start.runner.run_dir))
        config = dataclasses.replace(self.options.config, **values, **dict(variant.settings))
        notes = self.options.notes
        job = Job(config.resolved(), self.store, self.size, repeat, self.device, self.amp, notes)
        return Work(variant, repeat, STAGES.get(stage, ForestRun)(job))

    def works(self) -> list[Work]:
        """Everything that the rows need, repeat by repeat, so that every row soon has a result."""
        places = dict.fromkeys(
            (variant, 0 if stage == "self" and variant.shared else repeat, stage)
            for repeat in self.repeats
            for variant in self.options.variants
            for stage in variant.stages
        )
        return [self.work(*place) for place in places]

    def to_do(self) -> dict[Work, float]:
        """Work that is not finished, with the share of it that is left."""
        left = {work: share for work in self.works() if (share := work.left())}
        tuned = [w for w in left if w.runner.stage == "fine"]
        wanted = {(w.variant, 0 if w.variant.shared else w.repeat) for w in tuned}
        for work in [w for w in left if w.runner.stage == "self"]:
            if (work.variant, work.repeat) not in wanted:  # all its fine-tuning is finished
                del left[work]
        return left

    def doubts(self) -> list[str]:
        """A line on finished work that another state of the program's sources computed."""
        found = {work: work.runner.saved() for work in self.works()}
        changed = {
            work.title: line
            for work, state in found.items()
            if state and state["finished"] and (line := changed_source(state["environment"]))
        }
        if not changed:
            return []
        first, line = next(iter(changed.items()))
        cure = "--overwrite true computes all anew"
        return [f"Warning: {len(changed)} finished pieces of work, as {first}, were {line}; {cure}"]

    def problems(self) -> list[str]:
        """Why the work cannot be done, or which runs on disk have other settings, a line each."""
        lines = self._missing_pretrainings()
        for runner in (work.runner for work in self.works() if not self.config.overwrite):
            if self.options.report:  # a table is of what is there
                lines += [] if left_out(runner) else other_settings(runner)
            elif (
                runner.stage == "fine"
                and not pretrained_file(runner.config, runner.run_dir).exists()
            ):
                lines += other_settings(runner, longer=True)
            else:
                lines += runner.problems()
        return list(dict.fromkeys(lines))

    def _missing_pretrainings(self) -> list[str]:
        """A line if the table of ``--pretraining`` lacks a method, which is not trained for it."""
        other = self.options.pretraining
        wanted = {w.runner.run_dir.parent for w in self.works() if w.runner.stage == "self"}
        missing = sorted(folder.name for folder in wanted if not folder.is_dir())
        if not other or not missing or self.options.report:
            return []
        found = f"--pretraining: found {other}, but {self.config.output_dir} has no "
        cure = f"train the table {other} first, or give its folder of runs as --runs"
        return [f"{found}{', '.join(missing)}; {cure}"]

    def results(self, variant: Variant, repeat: int) -> dict[str, Result]:
        """What a run scored under each protocol; empty unless it is finished and of this table.

        A fit to learnt labels is no score, see ``is_fit``.

        Confusion matrices that its state does not hold are counted from its predicted masks.

        Raises:
            UserError: the predicted masks cannot be read, or do not give the run's scores.
        """
        runner, evaluations = self._evaluations(variant, repeat)
        if not evaluations or FIT in evaluations[-1]:
            return {}
        best = max(evaluations, key=lambda e: e["acc"])  # of equals the first: as fine.pt
        chosen, found = {"best": best, "last": evaluations[-1]}, {}
        places = np.array(runner.places, np.int64)
        for name, entry in chosen.items():
            counts = self._counts(runner, entry)
            if len(counts) != len(places):
                what = f"{len(counts)} images are scored, {len(places)} are to be"
                raise UserError(f"{runner.run_dir}: {what}; train this run again (--overwrite)")
            found[name] = Result(entry["epoch"], counts, places)
        return found

    def is_fit(self, variant: Variant, repeat: int) -> bool:
        """Whether a finished run was evaluated on images whose labels it learnt, and no others."""
        _, evaluations = self._evaluations(variant, repeat)
        return bool(evaluations) and FIT in evaluations[-1]

    def _evaluations(self, variant: Variant, repeat: int) -> tuple[Scored, list[dict[str, Any]]]:
        """A run and its evaluations; none unless it is finished and of this table."""
        runner = self.work(variant, repeat, variant.stages[-1]).runner
        assert isinstance(runner, Scored)
        with suppress(CheckpointError):
            state = self._state(runner)
            if state and not unlike(runner, state):
                return runner, list(state["evaluations"])
        return runner, []

    def _state(self, runner: Runner) -> dict[str, Any] | None:
        """Settings and evaluations of a finished run; its file is read once, until it changes.

        The table is written after each training, and the weights in the file are many.
        """
        try:
            about = runner.state.path.stat()
        except OSError:
            return None
        key = (runner.state.path, about.st_ino, about.st_mtime_ns, about.st_size)
        if key not in self._read:
            state = runner.state.load()
            if state is None or not state["finished"]:
                return None
            self._read[key] = {name: state[name] for name in ("settings", "evaluations")}
        return self._read[key]

    def _counts(self, runner: Scored, evaluation: Mapping[str, Any]) -> Counts:
        if "confusion" in evaluation:
            return np.asarray(evaluation["confusion"], np.int64)
        folder = runner.run_dir / f"epoch_{evaluation['epoch']}"
        if folder in self._counted:
            return self._counted[folder]
        tested = runner.tested
        pictures = [folder / picture_name(sample.name) for sample in tested]
        masks = [self.store.mask(sample.mask) for sample in tested if sample.mask is not None]
        counts = count_pictures(pictures, masks, self.config.mapping)
        scores = Scores.from_confusion(counts).as_dict()
        for name in ("acc", "dice", "miou"):
            if not np.isclose(scores[name], evaluation[name], rtol=0, atol=1e-6, equal_nan=True):
                raise UserError(
                    f"{folder}: its pictures score {name} {scores[name]:.4f}, the run says "
                    f"{evaluation[name]:.4f}; they were changed: train this run again (--overwrite)"
                )
        return self._counted.setdefault(folder, counts)


def count_pictures(
    pictures: Sequence[Path], masks: Iterable[Tensor], mapping: Sequence[int]
) -> Counts:
    """Confusion matrices (n, C, C) of predicted masks as PNG files.

    Their gray value is ``mapping[c]`` where class c is predicted; ``masks`` hold the true class ids
    (H, W), uint8. DataError for a file that cannot be read, or does not fit its mask or mapping.
    """
    classes = np.full(256, IGNORED, np.uint8)
    classes[list(mapping)] = np.arange(len(mapping))
    scores = SegmentationScores(len(mapping))
    cure = "the prediction was changed or is another run's; train this run again (--overwrite)"
    for path, mask in zip(pictures, masks, strict=True):
        prediction = torch.from_numpy(classes[read_mask(path)])
        if prediction.shape != mask.shape:
            found, wanted = (f"{s[1]}x{s[0]}" for s in (prediction.shape, mask.shape))
            raise DataError(f"{path}: {found}, its mask is {wanted}; {cure}")
        if (prediction == IGNORED).any():
            raise DataError(f"{path}: a gray value that stands for no class; {cure}")
        scores.add(prediction, mask)
    return scores.counts()


def other_settings(runner: Runner, longer: bool = False) -> list[str]:
    """A line if a run on disk has other settings, the checkpoint it started from left aside.

    ``longer``: none if it differs in lengths alone, and may be made longer.
    """
    try:
        state = runner.state.load()
    except CheckpointError as error:
        return [str(error)]
    return unlike(runner, state, longer) if state else []


def left_out(runner: Runner) -> bool:
    """Whether a report leaves out a forest that is to be made anew; says so."""
    own = isinstance(runner, ForestRun) and bool(other_settings(runner))
    if not own or other_settings(runner, longer=True):
        return False
    what = "was scored on test images whose labels it learnt, and is left out"
    to_terminal(f"{runner.run_dir}: {what}; without --report it is made anew, in seconds")
    return True


def unlike(runner: Runner, state: Mapping[str, Any], longer: bool = False) -> list[str]:
    """``other_settings`` of a run whose state has been read."""
    both, start = (state["settings"], runner.decisive_settings()), (WEIGHTS, "pretrained")
    old, new = ({k: v for k, v in found.items() if k not in start} for found in both)
    changed = "; ".join(map(str, setting_differences(runner.config, old, new)))
    if longer and runner.new_length({**state, "settings": old}, new):
        return []
    return [
        f"{runner.run_dir}: holds a run of stage {runner.stage} with other settings "
        f"({changed}); give the settings of that run, or another --name"
    ] * bool(changed)
