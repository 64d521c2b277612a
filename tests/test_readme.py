"""What the README says is so: its settings table, its files, and every command in it."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_set import make_set

import config
import reproduce

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^ *```bash\n(.*?)^ *```", README, re.S | re.M)
COMMANDS = [line.split("#")[0].strip() for block in BLOCKS for line in block.splitlines()]
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
    assert set(COMMANDS) - set(TRAINING) - set(TABLES) <= elsewhere
    assert len(TRAINING) >= 7 and len(TABLES) >= 4
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


def test_the_files_it_names_are_written(folder: Path) -> None:
    run = folder / "steel_simclr" / "1_0"
    for name in ("log_self.txt", "log_fine.txt", "metrics.jsonl", "fine.pt", "fine_last.pt"):
        assert name in README
        assert (run / name).is_file()
    assert (run / "sheet_fine.png").is_file() and (folder / "steel_simclr" / "eval.txt").is_file()


def test_the_pictures_are_there() -> None:
    for path in re.findall(r"!\[[^\]]*\]\(([^)]+)\)", README):
        assert (ROOT / path).is_file()
