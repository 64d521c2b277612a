"""The command line of ``reproduce.py``: which rows, trained how, written where."""

from __future__ import annotations

import dataclasses
import math
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from config import SELF_MODES, Config, ConfigError, settings_help
from model import METHODS, PSCL, settings_of
from stages.presets import read_config
from utils.checkpoint import IMAGENET
from utils.commandline import (
    MANY,
    NONE,
    ONE,
    UserError,
    choice_problems,
    format_value,
    split_flags,
    value_problems,
)

TITLES = {"sup": "no pretraining", "forest": "forest (no network)", **SELF_MODES}
# A row that is left out unless it is named: what users would take instead needs two more packages.
IMAGENET_ROW = "imagenet"
UNKNOWN = (math.nan, math.nan, math.nan)
# The paper's rows in its order (other methods follow), and its results on its aluminium set with
# one annotated image: Dice, its standard deviation, ACC.
PUBLISHED = {
    "sup": (0.5134, 0.0609, 0.9167),
    "forest": UNKNOWN,
    "plain-moco": (0.5696, math.nan, math.nan),
    "plain-simclr": (0.5712, math.nan, math.nan),
    "byol": (0.5437, math.nan, math.nan),
    "densecl": (0.5622, math.nan, math.nan),
    "moco": (0.6284, 0.0316, 0.9546),
    "simclr": (0.6296, 0.0522, 0.9574),
}
BUDGETS: dict[str, dict[str, Any]] = {
    "paper": {},
    "cpu": {"self_max_epoch": 20, "fine_max_epoch": 300, "eval_every": 100},
}
# Scales of the patch loss that take part; ``values_of`` gives a single one more weight.
SCALES = ((1.0, 1.0, 1.0), (1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0))
ABLATIONS: dict[str, tuple[str, tuple[Any, ...]]] = {
    "ratio": ("global_local_ratio", (0.0, 0.3, 0.5, 0.7, 1.0)),
    "scales": ("scale_weights", SCALES),
    "guided": ("label_guided", (True, False)),
    "temperature": ("temperature", (0.07, 0.5)),
    "top_k": ("top_k", (1, 4, 10, 30)),
    "negatives": ("intra_view_negatives", (True, False)),
}
ABLATED = "simclr"  # the method whose setting is varied unless --methods names another
OPTIONS = {
    "methods": "rows of the table, such as: sup forest simclr; default: all but imagenet (an "
    "encoder from ImageNet, no pretraining); with --ablate one method, default simclr",
    "budget": "paper: the published lengths; cpu: 20 epochs of pretraining, 300 of fine-tuning, "
    "evaluated every 100; settings given as flags win over both",
    "out": "folder of the table; default: results/NAME",
    "runs": "folder of the run folders; default: OUT/runs",
    "plan": "time a few steps, print how long everything will take, and stop",
    "report": "write the table from what is finished, and stop",
    "ablate": "vary one setting: " + ", ".join(ABLATIONS),
    "devices": "runs in parallel, a process on each device: 0,1,2,3 (GPUs) or cpu,cpu",
    "commands": "print a command for each run, for a scheduler, and stop; --report collects later",
    "piece": "do only one run, named as by --commands, and write no table",
    "pretraining": "NAME of a table whose pretrained networks are fine-tuned anew; --runs is then "
    "results/NAME/runs unless it is given",
}
KINDS = dict.fromkeys(OPTIONS, ONE) | {"methods": MANY, "plan": NONE, "report": NONE}
KINDS |= {"commands": NONE}
# Settings of which a table takes less than train.py, and what --help says of them.
NARROWER = {
    "data_size": "annotated images: 1, 5 or f (all of them); default 1",
    "repeats": "numbers of the annotated images as digits, such as 014; default: all of 01234 that "
    "the set has",
}
DECIDED = {  # settings that cannot be given, and what to give instead
    "stages": "choose rows with --methods",
    "self_mode": "choose rows with --methods",
    "output_dir": "choose folders with --out and --runs",
    "pretrained": "--pretraining takes the networks of another table",
    "multi_round": "give --repeats 0 for annotated image number 0 alone",
}


@dataclass(frozen=True)
class Variant:
    """A row of the table: a method, and the settings in which it differs from the others."""

    key: str
    title: str
    method: str
    name: str  # of its run folders
    settings: tuple[tuple[str, Any], ...] = ()

    @property
    def shared(self) -> bool:
        """Whether one pretraining serves all repeats, because it sees no annotated image."""
        return self.method in METHODS and not METHODS[self.method].needs_annotated

    @property
    def stages(self) -> tuple[str, ...]:
        """The stages of each run."""
        return ("self", "fine") if self.method in METHODS else (self.method,)


@dataclass(frozen=True)
class Options:
    """What the command line asks for, see ``OPTIONS``; ``command`` is the line as typed."""

    config: Config
    variants: tuple[Variant, ...]
    budget: str
    out: Path
    plan: bool
    report: bool
    ablate: str
    command: str
    notes: tuple[str, ...] = ()  # what the set's file says, why the preset chose what it did
    argv: tuple[str, ...] = ()
    devices: str = ""
    commands: bool = False
    piece: str = ""
    pretraining: str = ""  # name of the table whose pretrained networks are taken

    def path(self, name: str) -> Path:
        """A file in ``out``: ``table.md``, ``run.json``; of an ablation ``ablate_ratio.md`` ..."""
        if not self.ablate:
            return self.out / name
        method = self.variants[0].method
        stem = f"ablate_{self.ablate}" + ("" if method == ABLATED else f"_{method}")
        return self.out / (stem + f"_{name}".removeprefix("_table"))


def read_options(argv: Sequence[str], about: str = "") -> Options:
    """Read the command line; ``-h`` prints ``about`` and all flags, and exits with 0.

    Raises:
        ConfigError: one line per problem.
    """
    flags = split_flags(argv, KINDS)
    budget, ablate = flags.one("budget", "paper"), flags.one("ablate")
    if {"h", "help"} & flags.named:
        own = OPTIONS | NARROWER
        lines = [f"  --{name:{max(map(len, own))}} {text}" for name, text in own.items()]
        settings = settings_help(left_out={*DECIDED, *own})
        print("\n".join([about.strip(), "", *lines, "", settings]), end="")
        raise SystemExit(0)
    decided = [(name, cure) for name, cure in DECIDED.items() if name in flags.named]
    problems = [f"--{name}: decided by reproduce.py itself; {cure}" for name, cure in decided]
    problems += value_problems(flags, KINDS) + choice_problems("budget", budget, BUDGETS)
    problems += choice_problems("ablate", ablate, ABLATIONS) if ablate else []
    jobs = [f"--{name}" for name in ("plan", "report", "commands", "piece") if name in flags.own]
    if len(jobs) > 1:
        problems.append(f"{' and '.join(jobs)}: each ends the command; give one of them")
    try:
        config, notes = read_config(flags.rest, tuple(OPTIONS), **BUDGETS.get(budget, {}))
        if len(found := config.data_size) > 1:
            problems.append(f"data_size: found {found}; give one: a table is of one size")
    except UserError as error:
        problems.append(str(error))
    if problems:
        raise ConfigError("\n".join(problems))
    folder = Path(config.data_dir).resolve().name
    name = config.name if "name" in flags.named else folder or config.name
    out = Path(flags.one("out") or Path("results", name))
    pretraining = flags.one("pretraining")
    beside_runs = Path("results", pretraining) if pretraining else out
    runs = flags.one("runs") or str(beside_runs / "runs")
    derived: dict[str, Any] = {"name": name, "output_dir": runs}
    if "save_every" not in flags.named:  # a table needs no checkpoints in between
        derived["save_every"] = config.self_max_epoch
    config = dataclasses.replace(config, **derived)
    words = [w for text in flags.own.get("methods", []) for w in text.split(",") if w]
    variants = ablation_rows(config, ablate, words) if ablate else method_rows(config, words)
    command = shlex.join(["python", "reproduce.py", *argv])
    plan, report = "plan" in flags.own, "report" in flags.own
    beside = (tuple(argv), flags.one("devices"), "commands" in flags.own, flags.one("piece"))
    if pretraining and ablate:
        raise ConfigError("--pretraining: not with --ablate, whose rows differ in pretraining")
    if pretraining == name:
        raise ConfigError(f"--pretraining: found {name}, this table; give --name another name")
    return Options(
        config, variants, budget, out, plan, report, ablate, command, tuple(notes), *beside,
        pretraining,
    )  # fmt: skip


def method_rows(config: Config, words: Sequence[str] = ()) -> tuple[Variant, ...]:
    """The rows of these names, in the table's order; ConfigError for unknown names.

    Without any: all methods, but not ``IMAGENET_ROW``.
    """
    methods = [
        m for m in dict.fromkeys([*PUBLISHED, *METHODS]) if m in METHODS or m not in SELF_MODES
    ]
    known = [*methods, IMAGENET_ROW]
    problems = [line for word in words for line in choice_problems("methods", word, known)]
    if problems:
        raise ConfigError("\n".join(problems))
    return tuple(_row(name, config) for name in known if name in (words or methods))


def known_rows(config: Config) -> tuple[Variant, ...]:
    """All rows that a table may have."""
    return (*method_rows(config), _row(IMAGENET_ROW, config))


def _row(name: str, config: Config) -> Variant:
    if name != IMAGENET_ROW:
        return Variant(name, TITLES.get(name, name), name, config.name)
    title = f"{TITLES['sup']}, ImageNet encoder"
    return Variant(name, title, "sup", f"{config.name}-{name}", (("encoder", IMAGENET),))


def values_of(ablate: str, method: str, sample_ratio: int) -> tuple[Any, ...]:
    """The values that a setting takes for a method.

    A single scale has as much weight as all three have together, so that the patch loss keeps its
    share: 3 for PSCL-SimCLR; for PSCL-MoCo, whose finer scales count more, 7, 3.5 and 1.75 with a
    ``sample_ratio`` of 2.
    """
    values, cls = ABLATIONS[ablate][1], METHODS[method]
    if values is not SCALES or not issubclass(cls, PSCL):
        return values
    parts = cls.scale_parts(sample_ratio)
    factors = [
        sum(parts) / sum(p * w for p, w in zip(parts, taken, strict=True)) for taken in SCALES
    ]
    return tuple(
        tuple(round(factor * weight, 6) for weight in taken)
        for factor, taken in zip(factors, SCALES, strict=True)
    )


def ablation_rows(config: Config, ablate: str, words: Sequence[str]) -> tuple[Variant, ...]:
    """A row for each value of a setting; the value of ``config`` uses the runs of the full table.

    Raises:
        ConfigError: ``words`` are no method, several, or one that does not use the setting.
    """
    setting = ABLATIONS[ablate][0]
    method = words[0] if words else ABLATED
    problems = choice_problems("methods", method, METHODS)
    if len(words) > 1:
        problems.append(f"--methods: found {' '.join(words)}; --ablate takes one method")
    if method in METHODS and setting not in settings_of(method):
        problems.append(f"--methods: {method} does not use {setting}, which {ablate} varies")
    if problems:
        raise ConfigError("\n".join(problems))
    current = getattr(dataclasses.replace(config, self_mode=method).resolved(), setting)
    variants, values = [], values_of(ablate, method, config.sample_ratio)
    for value in values if current in values else (current, *values):
        text = format_value(value)
        key, title = f"{method} {text}", f"{TITLES[method]}, {setting} {text}"
        own = {} if value == current else {setting: value}
        name = f"{config.name}-{ablate}-{text.replace(',', '-')}" if own else config.name
        variants.append(Variant(key, title, method, name, tuple(own.items())))
    return tuple(variants)
