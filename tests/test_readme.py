"""What the README says is so: its settings table, its files, and every command in it."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tiny_set import make_set

import config
import predict
import reproduce

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^ *```bash\n(.*?)^ *```", README, re.S | re.M)
COMMANDS = [line.split("#")[0].strip() for block in BLOCKS for line in block.splitlines()]
SNIPPETS = re.findall(r"^```python\n(.*?)^```", README, re.S | re.M)
PREDICTING = [c for c in COMMANDS if c.startswith("python predict.py ")]
TRAINING = [c for c in COMMANDS if re.match(r"python train\.py -", c)]
TABLES = [c for c in COMMANDS if c.startswith("python reproduce.py ")]
SMALL = (
    "--self_max_epoch 1 --fine_max_epoch 1 --channels 4,8,16,32 --hidden_dim 8 --embed_dim 8 "
    "--top_k 2 --queue_size 12 --device cpu --threads 1 --image_size 0"
)


def test_the_settings_table_is_that_of_the_program() -> None:
    table = README.split("<!-- settings -->")[1].split("<!-- end of settings -->")[0]
    assert table.strip() == config.settings_table().strip()


def test_every_command_is_one_that_tests_or_ci_run() -> None:
    elsewhere = {
        "make demo",
        "make test",
        "pip install -r requirements.txt",
        "python train_defect.py",
    }
    assert set(COMMANDS) - set(TRAINING) - set(PREDICTING) - set(TABLES) <= elsewhere
    assert len(TRAINING) >= 7 and len(PREDICTING) >= 5 and len(SNIPPETS) == 2
    assert len(TABLES) >= 4
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert "train_defect.py" in makefile and "-r requirements.txt" in makefile
    ci = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert "make test" in ci and "make demo" in ci


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working folder with tiny sets where the README's commands look for them."""
    here = tmp_path_factory.mktemp("readme")
    for name in ("steel", "aluminum"):
        make_set(here / "dataset" / name)
    return here


@pytest.mark.parametrize("command", TRAINING)
def test_a_training_command_runs(command: str, folder: Path) -> None:
    words = shlex.split(command)
    words = [sys.executable, str(ROOT / "train.py"), *words[2:]]
    if "-h" not in words:
        words += shlex.split(SMALL)
        pretrained = next(folder.glob("steel_simclr/1_0/moco1.pt"), None)
        if "--pretrained" in words:
            assert pretrained is not None  # the first two commands have made it
            (folder / "moco200.pt").write_bytes(pretrained.read_bytes())
            words += ["--overwrite"]
    done = subprocess.run(
        words, cwd=folder, env={**os.environ, "COLUMNS": "100"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("command", TABLES)
def test_a_command_of_the_table_runs(
    command: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    words = [*shlex.split(command)[2:], *shlex.split(SMALL), "--repeats", "0"]
    words += [] if "--ablate" in words else ["--methods", "sup", "simclr"]
    assert reproduce.main(words) == 0
    results = folder / "results" / "steel"
    if "--plan" in words:
        assert not results.exists()
    elif "--ablate" in words:
        assert (results / "ablate_ratio.md").is_file()
    else:
        for name in ("table.md", "table.csv", "values.csv", "values.png", "run.md", "run.json"):
            assert name in README and (results / name).is_file()


@pytest.mark.parametrize("command", PREDICTING)
def test_a_predicting_command_runs(
    command: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if command.endswith(".onnx"):
        for package in ("onnx", "onnxscript", "onnxruntime"):
            pytest.importorskip(package)
    words = [*shlex.split(command)[2:], "--device", "cpu", "--threads", "1"]
    monkeypatch.chdir(folder)
    assert predict.main(words) == 0
    if "--export" in words:
        assert (folder / words[words.index("--export") + 1]).is_file()


def test_the_four_lines_of_python(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Image.open(folder / "dataset/steel/test_numf/img/15_t0.png") as file:
        names: dict[str, Any] = {"image": np.asarray(file)}
    monkeypatch.chdir(folder)
    exec(SNIPPETS[0], names)
    with Image.open(folder / "steel_simclr/1_0/predicted_img/classes/15_t0.png") as file:
        assert np.array_equal(names["mask"], np.asarray(file))
    counts = [int((names["mask"] == c).sum()) for c in range(4)]
    assert [row["area_fraction"] * 32 * 40 for row in names["table"]] == pytest.approx(counts)


def test_the_exported_model_runs_without_torch(folder: Path) -> None:
    pytest.importorskip("onnxruntime")
    if not (folder / "steel.onnx").exists():
        pytest.skip("the packages that export it are not installed")
    image = folder / "dataset/steel/test_numf/img/15_t0.png"
    (folder / "micrograph.png").write_bytes(image.read_bytes())
    code = f"import sys\nsys.modules['torch'] = None\n{SNIPPETS[1]}\nnp.save('mask.npy', mask)"
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with Image.open(folder / "steel_simclr/1_0/predicted_img/classes/15_t0.png") as file:
        expected = np.asarray(file)
    # A pixel on which two classes are as good as equal may fall to the other.
    assert (np.load(folder / "mask.npy") == expected).mean() > 0.999


def test_the_files_it_names_are_written(folder: Path) -> None:
    run = folder / "steel_simclr" / "1_0"
    for name in ("log_self.txt", "log_fine.txt", "metrics.jsonl", "fine.pt", "fine_last.pt"):
        assert name in README
        assert (run / name).is_file()
    for name in ("sheet_fine.png", "sheet_fine_extremes.png", "curves.png"):
        assert name in README
        assert (run / name).is_file()
    assert (folder / "steel_simclr" / "eval.txt").is_file()
    predicted = run / "predicted_img"
    for name in ("measurements.csv", "batches.csv", "summary.md", "sheet.png"):
        assert f"    {name}" in README
        assert (predicted / name).is_file()
    for name in ("overlay", "classes", "gray"):
        assert f"    {name}/<image>.png" in README or f" {name}/<image>.png" in README
        assert (predicted / name / "15_t0.png").is_file()


def test_the_pictures_are_there() -> None:
    for path in re.findall(r"!\[[^\]]*\]\(([^)]+)\)", README):
        assert (ROOT / path).is_file()
