"""The demo's script: a short budget on the set that it draws, the published one on any other."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path
from typing import Any

import pytest

from config import Config, parse_config
from tests.tiny_set import ROOT

STANDIN = "dataset/NEU_Seg-standin"


def asked(monkeypatch: pytest.MonkeyPatch, *words: str) -> Config:
    """The settings of the script with these words; nothing is run."""
    found: dict[str, Any] = {}
    monkeypatch.setattr(sys, "argv", ["train_defect.py", *words])
    monkeypatch.setattr("config_run.main", lambda **given: found.update(given) or 0)
    with pytest.raises(SystemExit):
        runpy.run_path(str(ROOT / "train_defect.py"), run_name="__main__")
    found.pop("prepare")
    return parse_config(**found)


def lengths(config: Config) -> tuple[int, int, int]:
    return config.self_max_epoch, config.epochs_for("f"), config.image_size


def test_the_set_that_is_drawn_has_a_short_budget(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for words in ([], ["--data_dir", STANDIN], [f"-data_dir={STANDIN}"]):
        config = asked(monkeypatch, *words)
        assert (config.name, config.data_dir) == ("standin", STANDIN)
        assert lengths(config) == (10, 20, 128)
    assert lengths(asked(monkeypatch, "--fine_max_epoch", "200")) == (10, 200, 128)


@pytest.mark.parametrize("real", [False, True])
def test_another_set_is_trained_on_as_published(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, real: bool
) -> None:
    monkeypatch.chdir(tmp_path)
    words = [] if real else ["--data_dir", "dataset/mine"]
    if real:
        (tmp_path / "dataset" / "NEU_Seg-demo").mkdir(parents=True)
    config = asked(monkeypatch, *words)
    assert config.name == "defect" and lengths(config) == (200, 50, 0)  # as published for all
    assert config.data_dir == ("dataset/NEU_Seg-demo" if real else "dataset/mine")
