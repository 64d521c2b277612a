"""Dice after fine-tuning against the length of pretraining, from the checkpoints of one run.

    python benchmarks/doses.py --pretrained "SimCLR=runs/steel_plain-simclr/1_0" \
        "PSCL-SimCLR=runs/steel_simclr/1_{repeat}" --epochs 0,10,40,100,200 --out results/doses \
        --data_dir dataset/steel --preset robust --repeats 012

Give a name and a run's folder for each method; ``{repeat}`` stands for the number of the annotated
image, where a method sees it. Pretraining has a constant learning rate, so that ``moco40.pt`` of a
long run is what 40 epochs alone would give (save them with ``--save_every``). 0 epochs are no
pretraining (``-stages sup``), which all methods share. All other flags are those of ``train.py``.
It writes ``table.md`` and ``doses.png`` to ``--out`` and the runs to ``--output_dir``; the same
command goes on. The score is that of the last epoch, nothing chosen.
"""

from __future__ import annotations

import argparse
import dataclasses
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # when it is run as a script

from utils import leave_while_loading

if __name__ == "__main__":  # before the imports that take seconds
    leave_while_loading()

import config_run
from config import Config, ConfigError
from data import annotated_repeats, find_split
from report.figures import doses_png
from stages.job import experiment_dir, run_label
from stages.presets import read_config
from utils.commandline import Parser, exit_code
from utils.files import replace_file
from utils.log import read_metrics
from utils.run_folder import pretrained_name
from utils.tables import markdown

NONE = "no pretraining"
Doses = dict[int, dict[int, float]]  # epochs -> annotated image -> Dice


def named_run(text: str) -> tuple[str, str]:
    """The type of an option: NAME=FOLDER."""
    name, _, folder = text.partition("=")
    if not name or not folder:
        raise argparse.ArgumentTypeError(f"found {text}; give NAME=FOLDER of a run")
    return name, folder


def numbers(text: str) -> list[int]:
    """The type of an option: whole numbers, separated by commas, in order."""
    if not re.fullmatch(r"\d{1,6}(,\d{1,6})*", text):
        raise argparse.ArgumentTypeError(f"found {text}; give numbers such as 0,40,200")
    return sorted({int(word) for word in text.split(",")})


def started_from(folder: str, epochs: int, repeat: int) -> Path:
    """The checkpoint of a run after so many epochs; ConfigError if it is not there."""
    path = Path(folder.replace("{repeat}", str(repeat))) / pretrained_name(epochs)
    if not path.exists():
        there = ", ".join(sorted(p.name for p in path.parent.glob(pretrained_name("*")))) or "none"
        raise ConfigError(f"{path}: no such file (there: {there}); pretrain with --save_every")
    return path


def folder_word(method: str) -> str:
    """What stands for a method in the names of folders."""
    return re.sub(r"\W", "-", method)


def require_apart(methods: Sequence[str]) -> None:
    """ConfigError if two methods, or a method and no pretraining, would be taken for one."""
    words = [folder_word(name).casefold() for name in (NONE, *methods)]
    twice = [
        name for name, word in zip((NONE, *methods), words, strict=True) if words.count(word) > 1
    ]
    if twice:
        found = ", ".join(twice)
        raise ConfigError(f"--pretrained: found {found}; give names that differ in their letters")


def planned(
    config: Config, runs: Mapping[str, str], epochs: Sequence[int], repeats: Sequence[int]
) -> list[tuple[str, int, int, Config]]:
    """Every training: method, epochs of pretraining, annotated image, settings. ConfigError."""
    found = []
    for repeat in repeats:
        one = dataclasses.replace(config, repeats=str(repeat))
        if 0 in epochs:
            own = dataclasses.replace(one, stages="sup", name=f"{config.name}-doses")
            found.append((NONE, 0, repeat, own))
        for method, folder in runs.items():
            for count in filter(None, epochs):
                path = str(started_from(folder, count, repeat))
                name = f"{config.name}-doses-{folder_word(method)}-{count}"
                own = dataclasses.replace(one, stages="fine", name=name, pretrained=path)
                found.append((method, count, repeat, own))
    return found


def last_dice(config: Config, repeat: int) -> float:
    """Dice at the last evaluation of a finished run."""
    run = experiment_dir(config, config.stages) / run_label(config.data_size, repeat)
    scores = [e["evaluation"] for e in read_metrics(run / "metrics.jsonl") if "evaluation" in e]
    return float(scores[-1]["dice"])


def write(
    out: Path, found: Mapping[str, Doses], repeats: Sequence[int], steps: int, heading: str
) -> None:
    """Write the table and the figure of what was scored so far."""
    unit, factor = ("steps", steps) if steps else ("epochs", 1)
    rows, curves = [], {}
    none = found.get(NONE, {})
    for method, doses in found.items():
        for count, values in doses.items():
            cells = [f"{values[r]:.3f}" if r in values else "" for r in repeats]
            mean = f"{sum(values.values()) / len(values):.3f}"
            rows.append([method, str(count * factor), *cells, mean])
        if method != NONE or len(found) == 1:
            every = {**none, **doses}
            curves[method] = {c * factor: list(v.values()) for c, v in sorted(every.items())}
    head = ["pretraining", unit, *(f"annotated image {r}" for r in repeats), "mean"]
    lines = [heading, "", "Dice at the last epoch, nothing chosen.", "", *markdown(head, rows), ""]
    replace_file(out / "table.md", "\n".join(lines), "--out")
    title = f"Dice after fine-tuning, {', '.join(head[2:-1])}"
    replace_file(out / "doses.png", doses_png(title, f"{unit} of pretraining", curves), "--out")


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = Parser("doses.py", description=(__doc__ or "").splitlines()[0])
    named = "runs of pretraining with their names in the figure: NAME=FOLDER"
    parser.add_argument("--pretrained", type=named_run, nargs="+", required=True, help=named)
    parser.add_argument(
        "--epochs", type=numbers, required=True, help="lengths, such as 0,40,200; 0: not pretrained"
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of the table and figure")
    parser.add_argument(
        "--steps_an_epoch", type=int, default=0, help="steps per epoch for the axis; 0: show epochs"
    )
    given, rest = parser.parse_known_args(argv)

    def work() -> None:
        config, notes = read_config(rest, ("pretrained", "epochs", "out", "steps_an_epoch"))
        if len(config.sizes) > 1:
            raise ConfigError(f"data_size: found {config.data_size}; give one")
        require_apart([name for name, _ in given.pretrained])
        if not any(sample.mask for sample in find_split(config.data_dir, "test_numf")):
            raise ConfigError(
                f"{config.data_dir}/test_numf: no image with a mask, by which to score"
            )
        repeats = annotated_repeats(config.data_dir, config.data_size, config.repeat_list)
        heading = f"# {config.data_dir}: length of pretraining"
        found: dict[str, Doses] = {}
        for method, count, repeat, own in planned(
            config, dict(given.pretrained), given.epochs, repeats
        ):
            config_run.run(own, notes)
            doses = found.setdefault(method, {})
            doses.setdefault(count, {})[repeat] = last_dice(own, repeat)
            write(given.out, found, repeats, given.steps_an_epoch, heading)

    return exit_code(work, "The same command goes on")


if __name__ == "__main__":
    sys.exit(main())
