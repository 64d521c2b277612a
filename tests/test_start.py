"""Fine-tuning says how the network that it starts from was pretrained, and refuses a mix-up."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_set import files, make_set, train

from utils.checkpoint import load, save


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_set(tmp_path_factory.mktemp("set"))


@pytest.fixture(scope="module")
def pretrained(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of a pretraining of two epochs at a rate of 3e-4."""
    out = tmp_path_factory.mktemp("pretrained")
    assert train(data, out, stages="self", self_lr=3e-4) == 0
    return out / "tiny_simclr" / "1_0"


def copied(run: Path, out: Path, *names: str) -> Path:
    """A run folder with the checkpoints of another one."""
    own = out / "tiny_simclr" / "1_0"
    own.mkdir(parents=True)
    for name in names:
        (own / name).write_bytes((run / name).read_bytes())
    return own


def test_the_runs_own_pretraining_of_other_settings_is_refused(
    data: Path, pretrained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copied(pretrained, tmp_path, "moco2.pt")
    before = files(tmp_path)
    for more in ({}, {"overwrite": True}):  # which would not pretrain again
        assert train(data, tmp_path, stages="fine", temperature=0.1, **more) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and "1_0/moco2.pt: pretrained with other settings" in error
        assert "(self_lr was 0.0003, is 0.0001; temperature was 0.5, is 0.1)" in error
        assert "another --name" in error and "--pretrained " in error
        assert files(tmp_path) == before
    # What the method does not use, what fine-tuning alone uses, and where it runs do not count.
    assert train(data, tmp_path, stages="fine", self_lr=3e-4, momentum=0.5, fine_jitter=0.2) == 0


def test_an_earlier_checkpoint_of_a_longer_pretraining_is_one_of_that_length(
    data: Path, pretrained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = copied(pretrained, tmp_path, "moco1.pt")
    assert load(own / "moco1.pt")["settings"]["self_max_epoch"] == 2
    assert train(data, tmp_path, stages="fine", self_lr=3e-4, self_max_epoch=1) == 0
    assert load(own / "fine.pt")["settings"]["self_max_epoch"] == 1
    # Not so with a schedule, whose rates follow from the length.
    state = load(own / "moco1.pt")
    state["settings"]["self_schedule"] = True
    other = copied(pretrained, tmp_path / "other")
    save(other / "moco1.pt", state)
    words = {"self_lr": 3e-4, "self_schedule": True, "self_max_epoch": 1}
    capsys.readouterr()
    assert train(data, tmp_path / "other", stages="fine", **words) == 2
    assert "(self_max_epoch was 2, is 1)" in capsys.readouterr().err


def test_a_given_file_is_told_as_it_was_made(data: Path, pretrained: Path, tmp_path: Path) -> None:
    start = pretrained / "moco2.pt"
    settings = {"stages": "fine", "pretrained": str(start)}
    words = "--self_max_epoch 7 --top_k=3 -self_lr 1e-4"
    assert train(data, tmp_path, words, **settings) == 0
    run = tmp_path / "tiny_simclr" / "1_0"
    lines = (run / "log_fine.txt").read_text(encoding="utf-8").splitlines()
    (warning,) = (line for line in lines if line.startswith("Warning: "))
    changed = "self_lr was 0.0003, is 0.0001; self_max_epoch was 2, is 7; top_k was 2, is 3"
    assert f"{start}: pretrained with other settings than this command's ({changed})" in warning
    assert {"self_lr = 3e-4", "self_max_epoch = 2", "top_k = 2"} <= {*lines}
    said = load(run / "fine.pt")["settings"]
    assert (said["self_lr"], said["self_max_epoch"], said["top_k"]) == (3e-4, 2, 2)
    assert said["fine_max_epoch"] == 2


def test_with_a_given_file_only_what_was_named_or_forms_the_network_is_compared(
    data: Path, pretrained: Path, tmp_path: Path
) -> None:
    start = pretrained / "moco2.pt"
    settings = {"stages": "fine", "self_max_epoch": 200, "pretrained": str(start)}
    assert train(data, tmp_path / "plain", **settings) == 0
    log = tmp_path / "plain" / "tiny_simclr" / "1_0" / "log_fine.txt"
    assert "pretrained with other settings" not in log.read_text(encoding="utf-8")
    assert train(data, tmp_path / "form", **settings, standardize=True) == 0
    log = tmp_path / "form" / "tiny_simclr" / "1_0" / "log_fine.txt"
    assert "(standardize was False, is True)" in log.read_text(encoding="utf-8")


def test_a_file_without_settings_says_nothing_of_its_pretraining(
    data: Path, pretrained: Path, tmp_path: Path
) -> None:
    own = copied(pretrained, tmp_path)
    save(own / "moco2.pt", {"moco": load(pretrained / "moco2.pt")["moco"], "epoch": 200})
    assert train(data, tmp_path, stages="fine", self_lr=0.5) == 0
    text = (own / "log_fine.txt").read_text(encoding="utf-8")
    assert "Warning" not in text and "moco2.pt tells no settings of a pretraining" in text
    assert not {"self_lr", "self_max_epoch", "self_mode"} & {*load(own / "fine.pt")["settings"]}


def test_a_setting_newer_than_the_file_counts_as_its_default(
    data: Path, pretrained: Path, tmp_path: Path
) -> None:
    state = load(pretrained / "moco2.pt")
    del state["settings"]["admit_matches"]
    own = copied(pretrained, tmp_path)
    save(own / "moco2.pt", state)
    assert train(data, tmp_path, stages="fine", self_lr=3e-4) == 0
    assert load(own / "fine.pt")["settings"]["admit_matches"] == "all"
