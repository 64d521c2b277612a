"""The whole table: every method of the paper on one UNet, from one command, with its uncertainty.

``python reproduce.py --data_dir dataset/steel`` runs what is not done yet, repeat by repeat, and
writes ``results/steel/table.md``. Killed at any moment, the same command goes on, and the numbers
are those of an uninterrupted run. ``--plan`` says how long it will take, ``--report`` writes the
table from what is finished, ``--ablate ratio`` varies one setting. ``-h`` lists everything.
"""

from __future__ import annotations

import dataclasses
import math
import shlex
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from itertools import islice
from pathlib import Path
from typing import Any

import torch

import config_run
from comparison import record
from comparison.bootstrap import LEVEL, REPLICATES, number_clusters
from comparison.bootstrap import SEED as BOOTSTRAP_SEED
from comparison.forest import TREES, PixelForest, forest_settings
from comparison.pace import Pace, duration
from comparison.table import PROTOCOLS, Comparison, Result, Row
from comparison.tally import Tally, count_pictures
from config import SELF_MODES, Config, ConfigError, format_value, parse_config, settings_help
from config_run import (
    STAGES,
    WEIGHTS,
    Finetune,
    Job,
    Runner,
    Supervised,
    experiment_dir,
    fingerprint,
    picture_name,
    run_label,
    setting_differences,
)
from data import (
    Batches,
    annotated_repeats,
    annotated_split,
    find_split,
    parse_name,
)
from dataset.check import check_data
from model import METHODS, settings_of
from report.dots import dots_png
from report.results import write_results
from utils.checkpoint import CheckpointError, StateFile
from utils.commandline import (
    AGAIN,
    AGAIN_AFRESH,
    MANY,
    NONE,
    ONE,
    UserError,
    choice_problems,
    complain,
    exit_code,
    split_flags,
    value_problems,
)
from utils.device import choose_device, choose_precision
from utils.drawing import save_prediction
from utils.files import replace_file
from utils.imagefile import ImageStore
from utils.log import RunLog, environment_line, evaluation_lines, to_terminal
from utils.metrics import SegmentationScores
from utils.run_folder import locked

# Rows of the paper's table in its order, then what it lacks; a method that is not here comes last.
ORDER = ("sup", "plain-moco", "plain-simclr", "byol", "densecl", "moco", "simclr")
TITLES = {"sup": "no pretraining", "forest": "forest (no network)", **SELF_MODES}
# The paper's aluminium set, one annotated image: Dice, its deviation, ACC.
PUBLISHED = {
    "sup": (0.5134, 0.0609, 0.9167),
    "plain-moco": (0.5696, math.nan, math.nan),
    "plain-simclr": (0.5712, math.nan, math.nan),
    "byol": (0.5437, math.nan, math.nan),
    "densecl": (0.5622, math.nan, math.nan),
    "moco": (0.6284, 0.0316, 0.9546),
    "simclr": (0.6296, 0.0522, 0.9574),
}
PAPERS_SET = ("aluminum", "aluminium")

BUDGETS: dict[str, dict[str, Any]] = {
    "paper": {},
    "cpu": {"self_max_epoch": 20, "fine_max_epoch": 300, "eval_every": 100},
}
# One scale alone has the weight of all three, so that r keeps its meaning.
SCALES = ((1.0, 1.0, 1.0), (3.0, 0.0, 0.0), (0.0, 3.0, 0.0), (0.0, 0.0, 3.0))
ABLATIONS: dict[str, tuple[str, tuple[Any, ...]]] = {
    "ratio": ("global_local_ratio", (0.0, 0.3, 0.5, 0.7, 1.0)),
    "scales": ("scale_weights", SCALES),
    "guided": ("label_guided", (True, False)),
    "temperature": ("temperature", (0.07, 0.5)),
    "top_k": ("top_k", (1, 4, 10, 30)),
    "negatives": ("intra_view_negatives", (True, False)),
}
ABLATED = "simclr"  # the method whose settings are varied, when nobody says which

OPTIONS = {
    "methods": "rows to run, such as: sup forest simclr; default: all; with --ablate one method, "
    "default simclr",
    "budget": "paper: the published lengths; cpu: 20 epochs of pretraining, 300 of fine-tuning, "
    "evaluated every 100; settings given as flags win over both",
    "out": "folder of the table; default: results/NAME",
    "runs": "folder of the run folders; default: OUT/runs",
    "plan": "time a few steps, print how long everything will take, and stop",
    "report": "write the table from what is finished, and stop",
    "ablate": "vary one setting: " + ", ".join(ABLATIONS),
}
KINDS = dict.fromkeys(OPTIONS, ONE) | {"methods": MANY, "plan": NONE, "report": NONE}
DECIDED = ("stages", "self_mode", "output_dir", "pretrained", "multi_round")


# --- the command line -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Variant:
    """A row of the table: a method, and the settings in which it differs from the others."""

    key: str
    title: str
    method: str
    name: str
    settings: tuple[tuple[str, Any], ...] = ()

    @property
    def shared(self) -> bool:
        """Whether one pretraining serves all repeats, because it sees no annotated image."""
        return self.method in METHODS and not METHODS[self.method].needs_annotated

    @property
    def stages(self) -> tuple[str, ...]:
        """What has to be done for it."""
        return ("self", "fine") if self.method in METHODS else (self.method,)


@dataclass(frozen=True)
class Options:
    """What the command line asks for; see ``OPTIONS``."""

    config: Config
    variants: tuple[Variant, ...]
    budget: str
    out: Path
    plan: bool
    report: bool
    ablate: str
    command: str

    @property
    def stem(self) -> str:
        """What the names of the files in ``out`` begin with; empty for the table itself."""
        if not self.ablate:
            return ""
        method = self.variants[0].method
        return f"ablate_{self.ablate}" + ("" if method == ABLATED else f"_{method}")


def read_options(argv: Sequence[str]) -> Options:
    """Read the command line.

    Raises:
        ConfigError: one line per problem.
    """
    flags = split_flags(argv, KINDS)
    if {"h", "help"} & flags.named:
        print(_help(), end="")
        raise SystemExit(0)
    problems = [
        f"--{name}: decided by reproduce.py itself; choose rows with --methods, folders with --out "
        "and --runs"
        for name in DECIDED
        if name in flags.named
    ]
    problems += value_problems(flags, KINDS)
    budget, ablate = flags.one("budget", "paper"), flags.one("ablate")
    problems += choice_problems("budget", budget, BUDGETS)
    problems += choice_problems("ablate", ablate, ABLATIONS) if ablate else []
    try:
        config = parse_config(flags.rest, tuple(OPTIONS), **BUDGETS.get(budget, {}))
    except ConfigError as error:
        raise ConfigError("\n".join([*problems, str(error)])) from None
    if len(config.data_size) > 1:
        problems.append(f"data_size: found {config.data_size}; give one: a table is of one size")
    if problems:
        raise ConfigError("\n".join(problems))
    changes: dict[str, Any] = {} if "name" in flags.named else {"name": _set_name(config)}
    if "save_every" not in flags.named:
        changes["save_every"] = config.self_max_epoch  # a table needs no checkpoints in between
    config = dataclasses.replace(config, **changes)
    out = Path(flags.one("out") or Path("results", config.name))
    config = dataclasses.replace(config, output_dir=flags.one("runs") or str(out / "runs"))
    words = [w for text in flags.own.get("methods", []) for w in text.split(",") if w]
    variants = _ablation(config, ablate, words) if ablate else _methods(config, words)
    command = shlex.join(["python", "reproduce.py", *argv])
    plan, report = "plan" in flags.own, "report" in flags.own
    return Options(config, variants, budget, out, plan, report, ablate, command)


def _set_name(config: Config) -> str:
    return Path(config.data_dir).resolve().name or config.name


def all_methods() -> tuple[str, ...]:
    """The rows of the table: no pretraining, the forest, the paper's methods, any others."""
    known = [m for m in ORDER if m == "sup" or m in METHODS]
    others = [m for m in METHODS if m not in known]
    return (*known[:1], "forest", *known[1:], *others)


def _methods(config: Config, words: Sequence[str]) -> tuple[Variant, ...]:
    """The rows that were asked for, in the table's order; all without any words."""
    known = all_methods()
    problems = [line for word in words for line in choice_problems("methods", word, known)]
    if problems:
        raise ConfigError("\n".join(problems))
    return tuple(method_row(config, m) for m in known if not words or m in words)


def method_row(config: Config, method: str) -> Variant:
    """A method with the settings of the command line."""
    return Variant(method, TITLES.get(method, method), method, config.name)


def _ablation(config: Config, ablate: str, words: Sequence[str]) -> tuple[Variant, ...]:
    """The values of the setting that is varied; the one in force is a row of the table itself."""
    setting, values = ABLATIONS[ablate]
    method = words[0] if words else ABLATED
    problems = choice_problems("methods", method, METHODS)
    if len(words) > 1:
        problems.append(f"--methods: found {' '.join(words)}; --ablate takes one method")
    if method in METHODS and setting not in settings_of(method):
        problems.append(f"--methods: {method} does not use {setting}, which {ablate} varies")
    if problems:
        raise ConfigError("\n".join(problems))
    current = getattr(dataclasses.replace(config, self_mode=method).resolved(), setting)
    variants = []
    for value in values if current in values else (current, *values):
        text = format_value(value)
        key, title = f"{method} {text}", f"{TITLES[method]}, {setting} {text}"
        if value == current:
            variants.append(Variant(key, title, method, config.name))
        else:
            name = f"{config.name}-{ablate}-{text.replace(',', '-')}"
            variants.append(Variant(key, title, method, name, ((setting, value),)))
    return tuple(variants)


def _help() -> str:
    lines = [f"  --{name:9} {text}" for name, text in OPTIONS.items()]
    # A setting that is refused, or hidden behind an own flag of its name, is none to offer.
    settings = settings_help(left_out={*DECIDED, *OPTIONS})
    return "\n".join([(__doc__ or "").strip(), "", *lines, "", settings])


# --- the forest -----------------------------------------------------------------------------------


class ForestRun(Supervised):
    """A pixel classifier in the place of the network: fitted once, scored, kept like other runs."""

    stage = "forest"

    def __init__(self, job: Job) -> None:
        super().__init__(job)
        self.run_dir = Path(self.config.output_dir) / f"{self.config.name}_forest" / job.label
        self.state = StateFile(self.run_dir / "state_forest.pt")
        self.epochs = 1
        self.test = find_split(self.config.data_dir, "test_numf")

    def due(self) -> list[int]:
        """It is evaluated once."""
        return [0]

    def outputs(self) -> list[str]:
        """Its log and its predictions."""
        names = [picture_name(s.name) for s in self.test]
        return [f"log_{self.stage}.txt", *(f"epoch_0/{name}" for name in names)]

    def decisive_settings(self, ahead: bool = False) -> dict[str, Any]:
        """The few settings that it looks at, and its own."""
        names = ("num_classes", "ignore_label", "image_size", "standardize", "seed")
        settings = {name: getattr(self.config, name) for name in names}
        files = fingerprint(self.samples(), self.job.store)
        mapping = list(self.config.mapping)
        return {**settings, "mapping": mapping, **forest_settings(), "files": files}

    def fit(self, trees: int | None = None) -> tuple[PixelForest, int]:
        """A forest that learnt from the annotated images, and from how many pixels."""
        samples, store = self.job.annotated(), self.job.store
        c = self.config
        forest = PixelForest(c.seed, c.standardize, torch.get_num_threads(), trees)
        images = [store.image(s.image).numpy() for s in samples]
        masks = [store.mask(s.mask).numpy() for s in samples if s.mask is not None]
        return forest, forest.fit(images, masks)

    def run(self) -> list[dict[str, Any]]:
        """Fit and score, unless that is done; a killed run starts again: it is short."""
        state = self.ready()
        if state is not None and state["finished"]:
            return list(state["evaluations"])
        self.begin()
        samples = self.job.annotated()
        with RunLog(self.run_dir, self.stage) as log:
            log.header(
                [
                    f"A random forest on {self.images(samples)} with labels of "
                    f"{self.config.data_dir}: {', '.join(s.name for s in samples[:5])}",
                    *(f"{name} = {value}" for name, value in self.settings.items()),
                    f"scikit-learn {metadata.version('scikit-learn')}",
                ]
            )
            forest, pixels = self.fit()
            log.line(f"Learnt from {pixels} pixels")
            scores = SegmentationScores(self.config.num_classes)
            for sample in self.test:
                prediction = forest.predict(self.job.store.image(sample.image).numpy())
                path = self.run_dir / "epoch_0" / picture_name(sample.name)
                save_prediction(path, prediction, self.config.mapping)
                if sample.mask is not None:
                    scores.add(torch.from_numpy(prediction), self.job.store.mask(sample.mask))
            found = scores.compute()
            for line in evaluation_lines(found):
                log.line(line)
            self.evaluations = [{"epoch": 0, **found.as_dict()}]
            log.metrics({"evaluation": self.evaluations[0]})
        self.state.finish(self.snapshot(finished=True))
        return self.evaluations


RUNNERS: dict[str, type[Runner]] = {**STAGES, "forest": ForestRun}


# --- the work -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Work:
    """One stage of one repeat of a row: what is done, or gone on with, as a whole."""

    variant: Variant
    repeat: int
    stage: str
    config: Config

    @property
    def kind(self) -> str:
        """What takes the same time: training with labels is the same after any pretraining."""
        if self.stage == "self":
            return f"pretraining, {self.variant.title}"
        return "forest" if self.stage == "forest" else "training with labels"

    @property
    def title(self) -> str:
        """For people."""
        what = {"self": "pretraining", "fine": "fine-tuning", "sup": "supervised"}
        if self.stage == "self" and self.variant.shared:
            return f"{self.variant.title}, pretraining for all repeats"
        return f"{self.variant.title}, repeat {self.repeat}, {what.get(self.stage, 'fit')}"


class Bench:
    """The set, decoded once, the work of a table, and how far it is.

    Raises:
        ConfigError, DataError, UserError: as ``config_run.run``, before anything is written.
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
        methods = [METHODS[v.method] for v in options.variants if v.method in METHODS]
        pretrains = bool(methods) and not options.report
        report = check_data(
            config.data_dir,
            num_classes=config.num_classes,
            image_size=config.image_size,
            ignore_label=config.ignore_label,
            stages=("self", "fine", "sup") if pretrains else ("sup",),
            sizes=config.sizes,
            repeats=config.repeat_list,
            use_unlabelled=config.use_unlabelled,
            self_mode_needs_groups=any(m.needs_groups for m in methods),
            needs_annotated=any(m.needs_annotated for m in methods),
        )
        self.store: ImageStore = report.store
        for warning in report.warnings:
            to_terminal(f"Warning: {warning}")
        self.test = find_split(config.data_dir, "test_numf")
        self.tallies: dict[Path, Tally] = {}
        # Tiles of one micrograph overlap or adjoin: they are no independent test images.
        self.clusters = number_clusters([parse_name(s.image.stem) for s in self.test])

    def works(self) -> list[Work]:
        """Everything that the rows need, repeat by repeat, so that a full row comes early."""
        works: dict[tuple[str, int, str], Work] = {}
        for repeat in self.repeats:
            for variant in self.options.variants:
                for stage in variant.stages:
                    number = 0 if stage == "self" and variant.shared else repeat
                    config = self.settings_of(variant, number, stage)
                    place = (variant.key, number, stage)
                    works.setdefault(place, Work(variant, number, stage, config))
        return list(works.values())

    def settings_of(self, variant: Variant, repeat: int, stage: str) -> Config:
        """The settings of a piece of work, as ``train.py`` would be given them."""
        values: dict[str, Any] = {
            "name": variant.name,
            "repeats": str(repeat),
            **dict(variant.settings),
        }
        if stage != "forest":
            values["stages"] = stage
        if variant.method in METHODS:
            values["self_mode"] = variant.method
        config = dataclasses.replace(self.options.config, **values)
        if stage == "fine" and variant.shared and repeat:
            folder = experiment_dir(config, "self") / run_label(self.size, 0)
            file = folder / f"moco{config.self_max_epoch}.pt"
            config = dataclasses.replace(config, pretrained=str(file))
        return config

    def runner(self, work: Work, stage: str = "") -> Runner:
        """What does a piece of work; nothing is written by making it."""
        config = work.config.resolved()
        job = Job(config, self.store, self.size, work.repeat, self.device, self.amp)
        return RUNNERS[stage or work.stage](job)

    def done(self, work: Work) -> float:
        """How much of a piece of work is done, 0 ... 1."""
        if self.config.overwrite or self.config.resume == "never":
            return 0.0
        state = self.runner(work).state.load()
        if state is None:
            return 0.0
        epochs = work.config.self_max_epoch
        epochs = epochs if work.stage == "self" else work.config.epochs_for(self.size)
        return 1.0 if state["finished"] else min(state.get("epoch", 0) / epochs, 1.0)

    def to_do(self) -> dict[Work, float]:
        """Work that is not finished, with the share of it that is left."""
        left = {work: 1 - self.done(work) for work in self.works()}
        wanted = {
            (w.variant, 0 if w.variant.shared else w.repeat)
            for w, share in left.items()
            if w.stage == "fine" and share
        }
        return {
            w: share
            for w, share in left.items()
            if share and (w.stage != "self" or (w.variant, w.repeat) in wanted)
        }

    def problems(self) -> list[str]:
        """Runs in the folders that are not of this table, a line each."""
        if self.config.overwrite:
            return []
        lines: list[str] = []
        for work in self.works():
            runner = self.runner(work)
            try:
                state = runner.state.load()
            except CheckpointError as error:
                lines.append(str(error))
                continue
            begun = state is not None or any(path.exists() for path in runner.foreign())
            if isinstance(runner, Finetune) and not runner.pretrained().exists():
                lines += self.other_settings(runner) if begun else []
            elif begun:
                lines += runner.problems()
        return list(dict.fromkeys(lines))

    def other_settings(self, runner: Runner) -> list[str]:
        """Whether a run has other settings than it should, whatever its pretraining was; a line."""
        state = runner.state.load()
        if state is None:
            return []
        old = {k: v for k, v in state["settings"].items() if k not in (WEIGHTS, "pretrained")}
        if isinstance(runner, ForestRun):
            new = runner.decisive_settings()
        else:
            new = Runner.decisive_settings(runner)
        new.pop("pretrained", None)
        lines = setting_differences(runner.config, old, new)
        return lines and [
            f"{runner.run_dir}: holds a run of stage {runner.stage} with other settings "
            f"({'; '.join(lines)}); give the settings of that run, or another --name"
        ]


class FewBatches(Batches):
    """The first batches of another's epochs."""

    def __init__(self, batches: Batches, number: int) -> None:
        super().__init__(batches.dataset, batches.order)
        self.number = number

    def epoch(self, epoch: int) -> Iterator[dict[str, Any]]:
        """So many batches, or all if there are fewer."""
        yield from islice(super().epoch(epoch), self.number)


def timed(bench: Bench, work: Work) -> float:
    """Seconds that a whole piece of work will take, by a few of its steps; nothing is kept."""
    runner = bench.runner(work, "sup" if work.stage == "fine" else "")
    if isinstance(runner, ForestRun):
        return _timed_forest(runner)
    steps = 2 if work.stage == "self" else 6
    with tempfile.TemporaryDirectory() as folder:
        runner.run_dir = Path(folder)
        runner.log = RunLog(folder, runner.stage, enabled=False)
        torch.manual_seed(bench.config.seed)
        runner.build()
        an_epoch, batches = len(runner.batches), runner.batches
        runner.batches = FewBatches(batches, 1)
        runner.train_epoch(0, lambda: None)  # the first step also sets things up
        runner.batches = FewBatches(batches, steps)
        counted: list[float] = []
        started = time.monotonic()
        for epoch in range(1, 1 + math.ceil(steps / an_epoch)):
            runner.train_epoch(epoch, lambda: counted.append(1))
        seconds = (time.monotonic() - started) / len(counted) * an_epoch * runner.epochs
        if isinstance(runner, Supervised):
            started = time.monotonic()
            runner.evaluate(runner.epochs)  # no epoch of the run, so that no sheet is drawn
            seconds += (time.monotonic() - started) * len(runner.due())
    return seconds


def _timed_forest(runner: ForestRun) -> float:
    few = 5
    started = time.monotonic()
    forest, _ = runner.fit(few)
    fitted = time.monotonic()
    image = runner.job.store.image(runner.test[0].image).numpy()
    forest.predict(image)
    one = time.monotonic() - fitted
    return (fitted - started + one * len(runner.test)) * TREES / few


def learn_pace(bench: Bench, pace: Pace, works: Sequence[Work]) -> None:
    """Time a few steps of every kind of work of which nothing is known yet."""
    for work in works:
        if work.kind not in pace.seconds:
            to_terminal(f"Timing a few steps: {work.kind}")
            pace.learn(work.kind, timed(bench, work))


def pieces(left: Mapping[Work, float]) -> dict[str, float]:
    """How many pieces of work of each kind are left."""
    found: dict[str, float] = {}
    for work, share in left.items():
        found[work.kind] = found.get(work.kind, 0.0) + share
    return found


def plan(bench: Bench) -> None:
    """Print how long what is left will take; write nothing."""
    left = bench.to_do()
    pace = Pace(None)
    learn_pace(bench, pace, list(left))
    total = len(bench.works())
    to_terminal(f"{len(left)} of {total} pieces of work are to do, on this machine as busy as now:")
    for kind, number in pieces(left).items():
        each = pace.seconds[kind]
        to_terminal(f"  {kind}: {number:.3g} x {duration(each)} = {duration(each * number)}")
    to_terminal(f"  all: {duration(pace.left(pieces(left)))}")
    first = {w: s for w, s in left.items() if w.repeat == bench.repeats[0] or w.stage == "self"}
    first = {w: s for w, s in first.items() if w.variant.shared or w.repeat == bench.repeats[0]}
    to_terminal(f"  of that, the first repeat of every row: {duration(pace.left(pieces(first)))}")


def run_all(bench: Bench) -> None:
    """Do what is not done, with the table written after each repeat of a row."""
    config = bench.config
    pace = Pace(Path(config.output_dir) / f"{config.name}_seconds.json")
    left = bench.to_do()
    total = len(bench.works())
    to_terminal(f"{total - len(left)} of {total} pieces of work are finished")
    write_record(bench, bench.options.command)
    write_report(bench)
    learn_pace(bench, pace, list(left))
    for number, work in enumerate(list(left), start=total - len(left) + 1):
        ahead = duration(pace.left(pieces(left)))
        here = duration(pace.seconds[work.kind] * left[work])
        to_terminal(f"[{number} of {total}] {work.title}: about {here} of {ahead} that are left")
        started = time.monotonic()
        do(bench, work)
        pace.learn(work.kind, time.monotonic() - started, left.pop(work))
        if work.stage != "self":
            write_report(bench)


def do(bench: Bench, work: Work) -> None:
    """One piece of work, from where it was left."""
    if work.stage != "forest":
        config_run.run(work.config)
        return
    runner = bench.runner(work)
    with locked(runner.run_dir):
        runner.run()
        write_results(runner.run_dir.parent, runner.stage)


# --- the report -----------------------------------------------------------------------------------


def rows_of(bench: Bench) -> list[Row]:
    """The rows asked for, and those of other methods that have finished runs of these settings."""
    asked = list(bench.options.variants)
    known = [method_row(bench.options.config, m) for m in all_methods()]
    if bench.options.ablate:
        variants = [v for v in known if v.method == "sup"] + asked
    else:
        variants = [v for v in known if v in asked] + [v for v in known if v not in asked]
        variants.sort(key=known.index)
    rows = [_row(bench, v, v in asked) for v in variants]
    return [row for row, v in zip(rows, variants, strict=True) if v in asked or row.repeats()]


def _row(bench: Bench, variant: Variant, asked: bool) -> Row:
    """What the finished repeats of a row scored."""
    results: dict[str, dict[int, Result]] = {protocol: {} for protocol in PROTOCOLS}
    stage = variant.stages[-1]
    for repeat in range(10) if bench.size != "f" else (0,):
        config = bench.settings_of(variant, repeat, stage)
        try:
            found = _results(bench, bench.runner(Work(variant, repeat, stage, config)))
        except UserError:
            if asked and repeat in bench.repeats:
                raise
            continue  # nobody asked for it
        for protocol, result in found.items():
            results[protocol][repeat] = result
    paper = not bench.options.ablate and Path(bench.config.data_dir).resolve().name in PAPERS_SET
    published = PUBLISHED.get(variant.method) if paper and bench.size == "1" else None
    return Row(variant.key, variant.title, results, variant.shared, published)


def _results(bench: Bench, runner: Runner) -> dict[str, Result]:
    """What a run scored under each protocol; nothing unless it is finished and of this table."""
    state = runner.state.load()
    if state is None or not state["finished"] or not state["evaluations"]:
        return {}
    if bench.other_settings(runner):  # of runs that were asked for, it was complained about
        return {}
    evaluations = state["evaluations"]
    best = max(evaluations, key=lambda e: e["acc"])  # of equals the first, as in fine.pt
    chosen = {"best": best, "last": evaluations[-1]}
    return {p: Result(e["epoch"], _tally(bench, runner, e)) for p, e in chosen.items()}


def _tally(bench: Bench, runner: Runner, evaluation: Mapping[str, Any]) -> Tally:
    """The pixel counts of an evaluation, out of its pictures; they must give its scores."""
    folder = runner.run_dir / f"epoch_{evaluation['epoch']}"
    if folder not in bench.tallies:
        pictures = [folder / picture_name(s.name) for s in bench.test]
        masks = (bench.store.mask(s.mask).numpy() for s in bench.test if s.mask is not None)
        tally = count_pictures(pictures, masks, bench.config.mapping)
        scores = tally.scores()
        for name in ("acc", "dice", "miou"):
            if not math.isclose(scores[name], evaluation[name], abs_tol=1e-6) and not (
                math.isnan(scores[name]) and math.isnan(evaluation[name])
            ):
                raise UserError(
                    f"{folder}: its pictures score {name} {scores[name]:.4f}, the run says "
                    f"{evaluation[name]:.4f}; they were changed: train this run again (--overwrite)"
                )
        bench.tallies[folder] = tally
    return bench.tallies[folder]


def write_report(bench: Bench) -> Comparison:
    """Write the table, all values and their plot from what is finished.

    Raises:
        ConfigError, DataError, UserError: a run does not fit, or a file cannot be written.
    """
    options = bench.options
    references = ["sup", "best plain"]
    if options.ablate:
        setting = ABLATIONS[options.ablate][0]
        current = [v.key for v in options.variants if not v.settings]
        references = [*current[:1], "sup"]
    comparison = Comparison(rows_of(bench), bench.clusters, references, bench.repeats)
    stem = options.stem or "table"
    what = f"{setting} varied" if options.ablate else "every method on one UNet"
    lines = [f"# {bench.config.name}: {what}", "", *notes(bench, comparison), ""]
    replace_file(
        options.out / f"{stem}.md", "\n".join([*lines, *comparison.markdown()]) + "\n", "--out"
    )
    replace_file(options.out / f"{stem}.csv", comparison.csv(), "--out")
    values = f"{stem}_values" if options.ablate else "values"  # the single ones
    replace_file(options.out / f"{values}.csv", comparison.values_csv(), "--out")
    panels = [
        (
            f"Dice, {title[0].lower()}{title[1:]}",
            [
                (row.title, {r: f.tally.scores()["dice"] for r, f in row.results[protocol].items()})
                for row in comparison.rows
            ],
        )
        for protocol, title in PROTOCOLS.items()
    ]
    replace_file(options.out / f"{values}.png", dots_png(panels), "--out")
    return comparison


def notes(bench: Bench, comparison: Comparison) -> list[str]:
    """What a reader of the table has to know, one line each."""
    c, size = bench.config, bench.size
    images, units = len(bench.clusters), int(bench.clusters.max()) + 1
    side = f"{c.image_size}x{c.image_size}" if c.image_size else "as they are"
    number = {"1": "one annotated image", "5": "five annotated images", "f": "all annotated images"}
    lines = [
        f"{number[size]}, repeats {' '.join(map(str, comparison.repeats))}; images {side}; "
        f"pretraining {c.self_max_epoch} epochs, fine-tuning and supervised {c.epochs_for(size)}, "
        f"evaluated every {c.eval_every_for(size)}; seed {c.seed}. Command, settings, versions and "
        f"a hash of the data: {record_stem(bench.options)}.md.",
        "Dice and mIoU are pooled over the test set, class by class, and averaged over the "
        "classes but the background; ACC is the mean over images of the share of correct pixels; "
        "std is the sample deviation over repeats, which differ in the annotated image.",
        "The best epoch is the evaluation with the highest ACC on the test set: it is chosen with "
        "the test labels, as in the paper, and flatters. Epochs count from 0.",
    ]
    shared = [row.title for row in comparison.rows if row.plain]
    if shared:
        lines.append(
            f"No annotated image in pretraining: {', '.join(shared)}. So one pretraining per seed "
            "is shared by all repeats; the deviation is that of the annotated image alone."
        )
    if any(row.key == "forest" for row in comparison.rows):
        lines.append(
            "forest: a random forest on filtered pixels of the annotated image, in the manner of "
            "Weka and ilastik; it has one evaluation, which stands under both protocols."
        )
    joined = (
        f"the {units} samples that the {images} test images come from (tiles of one sample are "
        "drawn together: they are not independent)"
        if units < images
        else f"the {images} test images"
    )
    lines.append(
        f"Differences are paired; [{LEVEL:.0%}] is a percentile bootstrap over the repeats and "
        f"over {joined}, {REPLICATES} replicates, seed {BOOTSTRAP_SEED}. With so few of either it "
        "is too narrow rather than too wide."
    )
    if not bench.options.ablate:
        lines.append(
            "The best plain method is the one with the highest mean Dice in the same table: chosen "
            "after the fact, so a difference to it is if anything too small."
        )
    elif bench.options.ablate == "scales":
        lines.append("A single scale has weight 3, so that the patch loss keeps its share.")
    missing = [
        f"{row.title} ({', '.join(str(r) for r in comparison.repeats if r not in row.repeats())})"
        for row in comparison.rows
        if len(row.repeats()) < len(comparison.repeats)
    ]
    if missing:
        lines.append(f"Not finished, repeats in brackets: {'; '.join(missing)}.")
    return [f"- {line}" for line in lines]


# --- the record -----------------------------------------------------------------------------------


def record_stem(options: Options) -> str:
    """Name of the record's files, without suffix."""
    return f"{options.stem}_run" if options.ablate else "run"


def write_record(bench: Bench, command: str = "") -> None:
    """Note in ``run.json`` and ``run.md`` how the numbers came about; commands are collected."""
    options, c = bench.options, bench.config
    amp = "bf16" if bench.amp is torch.bfloat16 else "off"
    packages = [f"{n} {_version(n)}" for n in ("scikit-learn", "opencv-python-headless", "pillow")]
    environment = ", ".join([environment_line(bench.device, amp), *packages])
    splits = {s: find_split(c.data_dir, s) for s in ("train_numf", "test_numf")}
    if c.use_unlabelled:
        splits["train_unlabelled"] = find_split(c.data_dir, "train_unlabelled")
    annotated = [annotated_split(c.data_dir, bench.size, repeat) for repeat in bench.repeats]
    splits |= {split: find_split(c.data_dir, split) for split in annotated}
    data = {
        split: {"images": len(samples), "hash": fingerprint(samples, bench.store)}
        for split, samples in splits.items()
    }
    names = {split: [sample.name for sample in splits[split]] for split in annotated}
    facts = {
        "budget": options.budget,
        "seed": c.seed,
        "bootstrap": {"replicates": REPLICATES, "seed": BOOTSTRAP_SEED, "level": LEVEL},
        "data": data,
        "annotated": names,
        "rows": {v.key: {"title": v.title, **dict(v.settings)} for v in options.variants},
        "settings": options.config.to_dict(),
        "forest": forest_settings(),
    }
    lines = ["Data (the hash is of names, decoded and resized pixels, and masks):", ""]
    lines += [f"- {s}: {d['images']} images, {d['hash']}" for s, d in data.items()]
    lines += ["", "Annotated images:", "", *(f"- {s}: {', '.join(n)}" for s, n in names.items())]
    lines += ["", f"Settings (budget {options.budget}, seed {c.seed}):", ""]
    lines += [f"- {line}" for line in options.config.describe()]
    path = options.out / f"{record_stem(options)}.json"
    record.write_record(path, command, environment, facts, lines)


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:  # OpenCV comes in packages of several names
        return "of another package"


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code, see ``config_run.main``."""
    words = sys.argv[1:] if argv is None else list(argv)
    try:
        options = read_options(words)
    except ConfigError as error:
        return complain(str(error), 2)

    def work() -> None:
        bench = Bench(options)
        problems = bench.problems()
        if problems:
            raise ConfigError("\n".join(problems))
        if options.plan:
            plan(bench)
        elif options.report:
            if not any(row.repeats() for row in write_report(bench).rows):
                to_terminal(
                    f"Warning: {bench.config.output_dir}: no finished run; the table is empty"
                )
            if not (options.out / f"{record_stem(options)}.json").exists():
                write_record(bench)
        else:
            run_all(bench)
        if not options.plan:
            to_terminal(f"{options.out}: table written")

    afresh = options.config.overwrite or options.config.resume == "never"
    return exit_code(work, AGAIN_AFRESH if afresh else AGAIN)


if __name__ == "__main__":
    sys.exit(main())
