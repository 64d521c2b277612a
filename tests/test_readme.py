"""What README and docs/ say is so: every command runs, every file, link and number is there.

Commands run in this process, on sets of tiny images and with tiny networks; one of each script
also runs as the reader would start it. What only the installation can show is run by ``.ci/run``.
"""

from __future__ import annotations

import csv
import importlib
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import takewhile
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tiny_set import draw, environment, make_set

import config
from benchmarks import measure
from segmentation.doubt import doubts
from utils.log import VERSION

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
PAGES = {p.relative_to(ROOT).as_posix(): p for p in [README, *sorted((ROOT / "docs").glob("*.md"))]}
TEXTS = {name: path.read_text(encoding="utf-8") for name, path in PAGES.items()}
RUN_BY_CI = ("make demo", "make test", "pip install -r requirements.txt")

TINY_RUN = (
    "--self_max_epoch 1 --fine_max_epoch 1 --fine_steps 0 --channels 4,8,16,32 --hidden_dim 8 "
    "--embed_dim 8 --top_k 2 --queue_size 12 --device cpu --threads 1 --image_size 0"
)
# What is added to a command so that it takes no time: script -> words; the last of a flag counts.
ADDED = {
    "train.py": TINY_RUN,
    "train_defect.py": TINY_RUN + " --image_size 32",
    "reproduce.py": TINY_RUN + " --repeats 0",
    "predict.py": "--device cpu --threads 1",
    "segment.py": "--device cpu --threads 1 --minutes 0.1",
    "dataset/prepare.py": "",
    "benchmarks/step.py": "--size 24 --batch 2 --rounds 1 --steps 1 --threads 1 --device cpu "
    "--methods simclr --precisions fp32",
    "benchmarks/finetune.py": "--size 16 --images 1 --rounds 1 --steps 1 --threads 1 --device cpu",
    "benchmarks/prediction.py": "--images 2 --size 32 --large 300 --rounds 1 --threads 1 "
    "--channels 4,8,16,32 --device cpu",
    "benchmarks/precision.py": "--image_size 16 --steps 1 --threads 1 --device cpu",
    "benchmarks/matching.py": "--threads 1",
}


def commands_of(text: str) -> list[str]:
    """The commands of a page, in bash blocks (lines joined, no comments) and in its sentences."""
    blocks = re.findall(r"^ *```bash\n(.*?)^ *```", text, re.S | re.M)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    prose = re.sub(r"```.*?```", "", text, flags=re.S)
    lines += re.findall(r"`(python [^`\n]+\.py [^`\n]+)`", prose)
    return [words for line in lines if (words := re.split(r"\s+# ", line)[0].strip())]


def script_of(command: str) -> str:
    """``train.py`` of ``X=1 python train.py -stages self``; empty if it is none of Python."""
    found = re.match(r"(?:\w+=\S+ )*python (\S+\.py)\b", command)
    return found[1] if found else ""


COMMANDS = list(dict.fromkeys(c for text in TEXTS.values() for c in commands_of(text)))
SNIPPETS = re.findall(r"^```python\n(.*?)^```", TEXTS["docs/metallography.md"], re.S | re.M)


def of(script: str) -> list[str]:
    """All commands of a script."""
    return [command for command in COMMANDS if script_of(command) == script]


# Also run by the shell, in processes of their own; all run in this one. The scripts that are not
# here have a process of their own in test_reproduce.py and test_prepare.py.
AS_THE_READER = (
    next(c for c in of("train.py") if c.startswith("GLIBC_TUNABLES=")),
    of("predict.py")[0],
)


def here(*scripts: str) -> list[str]:
    """The commands of some scripts."""
    return [command for script in scripts for command in of(script)]


def words_of(command: str) -> list[str]:
    """The words after the script's name, and what makes the command take no time."""
    script = script_of(command)
    words = shlex.split(command.partition(script)[2])
    if "-h" in words:
        return words
    words += shlex.split(ADDED[script])
    if "--fine_crop" in words:  # the images here have 40x32 pixels
        words += ["--fine_crop", "16"]
    if script == "reproduce.py" and not {"--ablate", "--methods"} & set(words):
        words += ["--methods", "sup", "simclr"]
    return words


@contextmanager
def inside(folder: Path) -> Iterator[None]:
    """Work in a folder."""
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def run(command: str, folder: Path) -> int:
    """Run a command in a folder, in this process; returns its exit code."""
    script, words = script_of(command), words_of(command)
    with inside(folder):
        try:
            if script in ("train.py", "train_defect.py"):  # they are an experiment and one call
                with pytest.MonkeyPatch.context() as patch:
                    patch.setattr(sys, "argv", [script, *words])
                    runpy.run_path(str(ROOT / script), run_name="__main__")
            return int(module_of(script).main(words))
        except SystemExit as stop:
            return int(stop.code or 0)


def module_of(script: str) -> ModuleType:
    """``dataset.prepare`` of ``dataset/prepare.py``."""
    return importlib.import_module(script.removesuffix(".py").replace("/", "."))


# --- the folder in which the commands run ---------------------------------------------------------


def draw_raw(root: Path) -> None:
    """Images and masks as prepare.py is given them: ids; and colours, a bar, names that tell."""
    for i in range(6):
        image, mask = draw(i, 3, 32, 40)
        for kind, pixels in (("img", image), ("gt", mask)):
            (root / "raw" / kind).mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(root / "raw" / kind / f"s{i}.png")
    (root / "raw" / "all").mkdir()
    colours = np.array([(0, 0, 0), (255, 0, 0), (0, 0, 255)], np.uint8)
    for i in range(3):
        image, mask = draw(i, 3, 60 + 376, 400)
        stem = root / "raw" / "all" / f"{30 * (i + 1)}min_A{i}_s{i}"
        Image.fromarray(image).save(f"{stem}.tif")
        Image.fromarray(colours[mask]).save(f"{stem}_label.tif")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working folder with tiny sets, and the run that README's first commands make in it."""
    here = tmp_path_factory.mktemp("readme")
    for name, images in (("steel", 9), ("aluminum", 4), ("my_set", 4)):
        make_set(here / "dataset" / name, train=images)
    draw_raw(here)
    shutil.copy(here / "dataset/steel/test_numf/img/15_t0.png", here / "micrograph.png")
    first = [command for command in commands_of(TEXTS["README.md"]) if "--name steel" in command]
    assert [run(command, here) for command in first] == [0, 0]
    made = here / "steel_simclr" / "1_0" / "moco1.pt"
    for name in ("moco200.pt", "steel_simclr/1_0/moco200.pt"):  # after 200 epochs, in the pages
        shutil.copy(made, here / name)
    (here / "OUT").mkdir()  # as segment.py would leave it, and images of tomorrow
    shutil.copy(here / "steel_simclr" / "1_0" / "fine.pt", here / "OUT" / "model.pt")
    shutil.copytree(here / "dataset" / "steel" / "test_numf" / "img", here / "new_images")
    return here


# --- every command --------------------------------------------------------------------------------


def test_every_command_is_run_here_or_by_ci() -> None:
    assert {c for c in COMMANDS if not script_of(c)} == set(RUN_BY_CI)
    assert {script_of(c) for c in COMMANDS} - {""} == set(ADDED)
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert "segment.py --demo" in makefile and "-r requirements.txt" in makefile
    ci = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert "make test" in ci and "make demo" in ci


@pytest.mark.parametrize("command", here("train.py", "train_defect.py"))
def test_a_training_command_runs(command: str, folder: Path) -> None:
    assert run(command, folder) == 0


# The demo has no time here: `.ci/run` runs it.
@pytest.mark.parametrize("command", [c for c in of("segment.py") if "--demo" not in c])
def test_a_segmenting_command_runs(
    command: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("stages.forest.QUICK", (3, 5))
    (folder / "my_images").mkdir()
    for number in (6, 7):
        image, mask = draw(number, 3, 32, 40)
        Image.fromarray(image).save(folder / "my_images" / f"image{number}.png")
    Image.fromarray(mask).save(folder / "image7.png")
    assert run(command, folder) == 0
    assert (folder / "segmented_my_images" / "report.html").is_file()


def slow_export(command: str) -> Any:
    """One to ONNX takes 7 s; beside it stand that to .pt2, and tests/test_export.py."""
    return pytest.param(command, marks=pytest.mark.slow) if command.endswith(".onnx") else command


@pytest.mark.parametrize("command", [slow_export(command) for command in here("predict.py")])
def test_a_predicting_command_runs(command: str, folder: Path) -> None:
    if command.endswith(".onnx"):
        for package in ("onnx", "onnxscript", "onnxruntime"):
            pytest.importorskip(package)
    assert run(command, folder) == 0
    words = shlex.split(command)
    if "--export" in words:
        assert (folder / words[words.index("--export") + 1]).is_file()
    if "--rank" in words:
        assert (folder / "steel_simclr/1_0/ranked_steel_train_numf_img/ranking.csv").is_file()


def test_the_commands_of_the_table_run(folder: Path) -> None:
    table = folder / "results" / "steel"
    plan, *others = here("reproduce.py")
    assert "--plan" in plan and run(plan, folder) == 0 and not table.exists()
    for command in others:
        assert run(command, folder) == 0, command
    names = listing(TEXTS["docs/results.md"], "results/steel/table.md")
    assert len(names) == 8
    for name in names:
        assert (folder / name if "/" in name else table / name).exists(), name
    assert (folder / "results" / "forest" / "table.md").is_file()


def test_the_commands_of_a_set_run(folder: Path) -> None:
    commands = here("dataset/prepare.py")
    assert sum("--check" in c for c in commands) == 1 and len(commands) >= 4
    elsewhere = folder / "laid out"
    shutil.copytree(folder / "raw", elsewhere / "raw")
    for command in commands:
        assert run(command, elsewhere) == 0, command
    assert len(list((elsewhere / "dataset/my_set/train_numf/img").iterdir())) == 4
    assert len(list((elsewhere / "dataset/tiled/train_numf/img").iterdir())) == 4  # 2 tiles each
    assert (elsewhere / "my_set_check.png").is_file()
    assert not (elsewhere / "dataset" / "steel").exists()  # that was a dry run


@pytest.mark.parametrize("command", [c for c in COMMANDS if "benchmarks/" in c])
def test_a_benchmark_runs(command: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In this process, where each case would have one of its own; tests/test_benchmarks.py."""
    module = module_of(script_of(command))
    monkeypatch.setattr(measure, "in_own_process", lambda script, case: module.measure_case(case))
    if hasattr(module, "WARM_UP"):
        monkeypatch.setattr(module, "WARM_UP", 0)
    assert run(command, folder) == 0


@pytest.mark.slow  # seconds: 11; both commands run in this process, too
def test_training_and_predicting_run_as_the_reader_starts_them(folder: Path) -> None:
    """Both at once: they write to different places, and nothing is there that they would keep."""
    for made in ("lean_simclr", "steel_simclr/1_0/predicted_steel_test_numf_img"):
        shutil.rmtree(folder / made, ignore_errors=True)
    started = []
    for command in AS_THE_READER:
        before = command.partition("python ")[0]
        line = shlex.join([sys.executable, str(ROOT / script_of(command)), *words_of(command)])
        started.append(
            subprocess.Popen(
                before + line,
                shell=True,
                cwd=folder,
                env=environment(),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    ended = [(process.communicate(timeout=120)[1], process.returncode) for process in started]
    assert [code for _, code in ended] == [0, 0], ended
    assert (folder / "lean_simclr/1_0/moco1.pt").is_file()
    assert (folder / "steel_simclr/1_0/predicted_steel_test_numf_img/measurements.csv").is_file()


# --- what commands give ---------------------------------------------------------------------------


def listing(text: str, first: str) -> list[str]:
    """The names at the left of the plain block that begins with ``first``, an image's filled in."""
    block = re.search(rf"^```\n({re.escape(first)}.*?)^```", text, re.S | re.M)
    assert block
    names: list[str] = []
    for line in block[1].replace("<image>", "15_t0").splitlines():
        names += takewhile(lambda word: word[-1] == "/" or "." in word[:-1], line.split())
    return [name for name in names if name != "..."]


def test_the_files_of_a_run_are_written(folder: Path) -> None:
    """README's list: of the run, whose lengths are one epoch here; and of what reports on it."""
    experiment = folder / "steel_simclr"
    names = listing(TEXTS["README.md"], "steel_simclr/eval.txt")
    assert {"sheet_fine.png", "log_self.txt", "fine.pt", "epoch_999/15_t0.png"} <= set(names)
    later = {
        "predicted_steel_test_numf_img/",
        "steel_simclr/report.html",
        "steel_sup/",
        "steel_simclr/1_0/",
    }
    for name in set(names) - later:
        name = name.replace("epoch_999", "epoch_0").replace("moco200", "moco1")
        place = folder / name if name.startswith("steel_simclr/") else experiment / "1_0" / name
        assert place.is_file(), name


def test_the_files_and_columns_of_a_prediction_are_written(folder: Path) -> None:
    text = TEXTS["docs/metallography.md"]
    assert run(of("predict.py")[0], folder) == 0
    out, *names = listing(text, "steel_simclr/1_0/predicted_steel_test_numf_img/")
    assert len(names) == 11
    assert [name for name in names if not (folder / out / name).is_file()] == []
    (compare,) = (c for c in of("predict.py") if "--masks" in c)
    assert run(compare, folder) == 0
    for path, heading, unit in (
        (folder / out / "measurements.csv", "## What is measured", "um"),
        (folder / "compared" / "comparison.csv", "## Against true masks", "px"),
    ):
        with path.open(encoding="utf-8") as file:
            columns = set(next(csv.reader(file)))
        section = text.partition(heading)[2].partition("\n## ")[0]
        cells = [line.split("|")[1] for line in section.splitlines() if line.startswith("| `")]
        names = re.findall(r"`([^`]+)`", " ".join(cells))
        told = {re.sub(r"_u(2?)$", rf"_{unit}\1", name) for name in names} - {"number_per_Mpx"}
        columns = {re.sub(r"_\d+_px$", "_<a>_px", name) for name in columns}
        assert told == columns


@pytest.mark.parametrize("name", ["particles", "ranking", "doubt"])
def test_the_other_tables_have_the_columns_that_are_told(name: str, folder: Path) -> None:
    section = (
        TEXTS["docs/metallography.md"].partition(f"\n`{name}.csv`, by ")[2].partition("\n\n`")[0]
    )
    cells = [
        line.split("|")[1] for line in section.partition("\n## ")[0].splitlines() if "|" in line
    ]
    told = [re.sub(r"_u(2?)$", r"_px\1", n) for n in re.findall(r"`([^`]+)`", " ".join(cells))]
    if name == "doubt":
        (row,) = doubts(
            {"s7": [0.5, 0.5]}, ["a", "b"], annotated=[], votes={}, unsure={}, differs={}, places={}
        )
        columns = list(row)
    else:
        images, out = "dataset/steel/test_numf/img", folder / "other tables"
        task = f"--rank {images} --annotated dataset/steel/sup_num1_0"
        task += " --masks dataset/steel/test_numf/gt"
        task = task if name == "ranking" else f"--images {images} --particles --grain_classes 0"
        command = f"python predict.py --weights steel_simclr/1_0 {task} --out '{out}'"
        assert run(command, folder) == 0
        with (out / f"{name}.csv").open(encoding="utf-8") as file:
            columns = next(csv.reader(file))
    assert sorted(told) == sorted(columns)


def test_the_four_lines_of_python(folder: Path) -> None:
    with Image.open(folder / "micrograph.png") as file:
        names: dict[str, Any] = {"image": np.asarray(file)}
    with inside(folder):
        exec(SNIPPETS[0], names)
    assert run(of("predict.py")[0], folder) == 0
    with Image.open(
        folder / "steel_simclr/1_0/predicted_steel_test_numf_img/classes/15_t0.png"
    ) as file:
        assert np.array_equal(names["mask"], np.asarray(file))
    counts = [int((names["mask"] == c).sum()) for c in range(4)]
    assert [row["area_fraction"] * 32 * 40 for row in names["table"]] == pytest.approx(counts)


@pytest.mark.slow
def test_the_exported_model_runs_without_torch(folder: Path) -> None:
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    if not (folder / "steel.onnx").is_file():
        (command,) = (c for c in of("predict.py") if c.endswith(".onnx"))
        assert run(command, folder) == 0
    code = f"import sys\nsys.modules['torch'] = None\n{SNIPPETS[1]}\nnp.save('mask.npy', mask)"
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    from predict import Segmenter

    with Image.open(folder / "micrograph.png") as file:
        expected = Segmenter(folder / "steel_simclr/1_0", device="cpu")(np.asarray(file))
    # A pixel on which two classes are as good as equal may fall to the other.
    assert (np.load(folder / "mask.npy") == expected).mean() > 0.999


# --- what the pages say ---------------------------------------------------------------------------


def test_the_readme_is_short() -> None:
    assert README.stat().st_size <= 15_000


def test_the_page_of_settings_is_that_of_the_program() -> None:
    table = TEXTS["docs/settings.md"].partition("## All settings\n\n")[2]
    assert table == config.settings_table(), (
        "docs/settings.md: put there what this prints: "
        "python -c 'import config; print(config.settings_table(), end=str())'"
    )


def anchor(heading: str) -> str:
    """The name by which a heading is linked to, as GitHub makes it."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def test_links_lead_somewhere() -> None:
    found = [(p, link) for p in PAGES for link in re.findall(r"\]\((?!https?:)([^)]+)\)", TEXTS[p])]
    assert len(found) > 20  # not every page has one
    for page, link in found:
        file, _, part = link.partition("#")
        target = PAGES[page].parent / file if file else PAGES[page]
        assert target.is_file(), f"{page}: {link}"
        if part:
            headings = re.findall(r"^#+ (.+)$", target.read_text(encoding="utf-8"), re.M)
            assert part in map(anchor, headings), f"{page}: {link}"


OURS = r"(?:pscl|metallography|comparison|report|utils|dataset|docs|results|benchmarks|tests|\.ci)/"
THE_READERS = ("dataset/my_set", "dataset/steel", "dataset/aluminum", "results/steel")


@pytest.mark.parametrize("page", [*PAGES, "CHANGELOG.md"])
def test_files_that_are_named_exist(page: str) -> None:
    prose = re.sub(r"```.*?```", "", (ROOT / page).read_text(encoding="utf-8"), flags=re.S)
    named = re.findall(rf"`((?:{OURS})[\w./-]*|[\w-]+\.(?:py|cff)|LICENSE)`", prose)
    missing = {n for n in named if not n.startswith(THE_READERS) and not (ROOT / n).exists()}
    assert named or page in ("docs/settings.md",)
    assert missing == set()


DICE = re.compile(r"(\.\d{3}) ± (\.\d{3})")  # mean and standard deviation


def test_scores_are_those_of_the_tables_in_results() -> None:
    there: list[list[float]] = []
    for table in (ROOT / "results").glob("**/*.md"):
        rows = re.findall(r"of \d \| (0\S+) \| (0\S+) \|", table.read_text(encoding="utf-8"))
        there += [[float(mean), float(deviation)] for mean, deviation in rows]
    tables = np.array(there)  # four digits, where the pages have three
    told = np.array(DICE.findall(TEXTS["docs/results.md"]), float)
    apart = np.abs(told[:, None] - tables).max(axis=2).min(axis=1)
    assert len(told) > 15 and told[apart > 0.00051].tolist() == []


STUDENT_OF_3 = 4.3027  # t, two-sided 95 %, 2 degrees of freedom


def test_the_errors_of_area_fractions_are_those_of_the_table() -> None:
    rows = TEXTS["docs/results.md"].partition("area fractions off by |")[2].partition("\n\n")[0]
    points = sorted(float(p) for p in re.findall(r"([\d.]+) points", rows))
    assert len(points) == 4
    assert f"off by {points[0]} to {points[-1]} points" in " ".join(TEXTS["docs/output.md"].split())


LOGS = {  # of the table on what pretraining is worth
    "published, no pretraining": "paper_none",
    "published, MoCo, 5,000 steps": "paper_moco5000",
    "published, SimCLR, 5,000 steps": "paper_simclr5000",
    "published, BYOL, 5,000 steps": "paper_byol5000",
    "published, DenseCL, 5,000 steps": "paper_densecl5000",
    "robust, BYOL, 5,000 steps": "weights_byol5000",
    "robust, DenseCL, 5,000 steps": "weights_densecl5000",
    "robust, no pretraining": "weights_none",
    "robust, MoCo, 5,000 steps": "weights_moco5000",
    "robust, SimCLR, 1,000 steps": "weights_simclr1000",
    "robust, SimCLR, 5,000 steps": "weights_simclr5000",
    "robust with 1,200 steps, no pretraining": "weights1200_none",
    "published, PSCL-MoCo, 5,000 steps": "paper_psclmoco5000",
    "robust, PSCL-MoCo, 5,000 steps": "weights_psclmoco5000",
    "published, PSCL-SimCLR, 5,000 steps": "paper_psclsimclr5000",
    "robust, PSCL-SimCLR, 5,000 steps": "weights_psclsimclr5000",
}


def scores_of(log: Path) -> tuple[float, float]:
    """Dice of the last evaluation of a log, and of the one that is the most accurate on test."""
    found = re.findall(r"^ACC: (\S+)\nDice: (\S+)$", log.read_text(encoding="utf-8"), re.M)
    return float(found[-1][1]), float(max(found, key=lambda each: float(each[0]))[1])


@pytest.mark.parametrize("row", LOGS)
def test_what_pretraining_is_worth_is_what_the_logs_say(row: str) -> None:
    (cells,) = re.findall(rf"^\| {re.escape(row)} \| (.*) \|$", TEXTS["docs/results.md"], re.M)
    told = [float(cell) for cell in re.findall(r"\.\d{3}", cells)]
    logs = sorted((ROOT / "results/neuseg-5000/logs").glob(f"{LOGS[row]}_image[234]_seed0.txt"))
    last, best = np.array([scores_of(log) for log in logs]).T
    expected = [*last, last.mean(), best.mean()] if len(logs) == 3 else last  # else not all images
    assert len(logs) == len(re.findall(r"\.\d{3}", " ".join(cells.split(" | ")[:3])))
    assert told == pytest.approx(expected, abs=0.00051)


@pytest.mark.parametrize(
    ("row", "one", "other"),
    [("SimCLR - none", "simclr5000", "none"), ("PSCL-SimCLR - none", "psclsimclr5000", "none"),
     ("PSCL-SimCLR - SimCLR", "psclsimclr5000", "simclr5000")],
)  # fmt: skip
def test_gains_over_images_and_seeds_are_what_the_logs_say(row: str, one: str, other: str) -> None:
    folder = ROOT / "results/neuseg-5000"
    one_, other_ = (
        np.array([[scores_of(folder / f"logs/paper_{name}_image{i}_seed{s}.txt") for s in range(3)]
                  for i in (2, 3, 4)])
        for name in (one, other)
    )  # fmt: skip
    gains = one_ - other_  # of images, seeds, last and best
    text = (folder / "README.md").read_text(encoding="utf-8")
    (cells,) = re.findall(rf"^\| {re.escape(row)} \| (.*) \|$", text, re.M)
    last, last_above, best, best_above = cells.replace("*", "").split(" | ")
    for told, above, found in (
        (last, last_above, gains[..., 0]),
        (best, best_above, gains[..., 1]),
    ):
        each = found.mean(axis=1)
        half = STUDENT_OF_3 * each.std(ddof=1) / np.sqrt(3)
        expected = [each.mean(), each.mean() - half, each.mean() + half]
        assert [float(n) for n in re.findall(r"[+-]\.\d+", told)] == pytest.approx(
            expected, abs=6e-4
        )
        assert above == f"{(found > 0).sum()} of 9"


def test_the_readmes_scores_stand_on_the_page_of_results() -> None:
    results = TEXTS["README.md"].split("## Results so far")[1].split("## How it works")[0]
    told = set(re.findall(r"(?<!\d)\.\d{3}\b", results))
    assert (
        len(told) > 10 and told - set(re.findall(r"\.\d{3}\b", TEXTS["docs/results.md"])) == set()
    )


def test_seconds_and_memory_are_those_of_the_measured_step() -> None:
    measured = {}
    for line in (ROOT / "results/speed/step_376_now.txt").read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) > 10 and cells[1] in ("fp32", "bf16"):
            measured[cells[0], cells[1]] = [float(cells[i]) for i in (2, 19, 15)]
    titles = {title: name for name, title in config.SELF_MODES.items()}
    rows = re.findall(r"^\| ([\w-]+) \| (\d.*) \|$", TEXTS["docs/speed.md"], re.M)
    told_of = {titles[title] for title, _ in rows if title in titles}
    assert told_of == {name for name, _ in measured} <= set(config.SELF_MODES)
    for title, numbers in rows:
        if title in titles and "," not in numbers:  # those are counts
            told = [float(number) for number in numbers.split(" | ")]
            expected = measured[titles[title], "bf16"] + measured[titles[title], "fp32"]
            assert told == pytest.approx(expected, abs=0.051), title


def test_the_changelog_begins_with_this_version() -> None:
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.findall(r"^## (\S+) — \d{4}-\d\d-\d\d$", text, re.M)[0] == VERSION
