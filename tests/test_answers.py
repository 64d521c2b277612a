"""Published class maps, and those that the user corrected: never lost, whatever is killed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from segmentation.answers import KINDS, Answers
from utils.checkpoint import load, save
from utils.files import DataError

OLD, NEW = np.zeros((4, 4), np.uint8), np.ones((4, 4), np.uint8)


def work(place: Path, ids: np.ndarray) -> Path:  # type: ignore[type-arg]
    for kind in KINDS:
        (place / kind / "b").mkdir(parents=True, exist_ok=True)
        for name in ("a", "b/c"):
            Image.fromarray(ids).save(place / kind / f"{name}.png")
    return place


@pytest.fixture
def out(tmp_path: Path) -> Path:
    Answers(tmp_path / "out").publish(work(tmp_path / "one", OLD), ["a", "b/c"], "me")
    return tmp_path / "out"


def test_what_is_published_is_no_correction_and_what_is_changed_is_one(out: Path) -> None:
    assert Answers(out).by == "me" and Answers(out).corrections() == {}
    Image.fromarray(NEW).save(out / "classes" / "b" / "c.png")
    found = Answers(out).corrections()
    assert list(found) == ["b/c"] and found["b/c"].is_relative_to(out / "corrected")
    assert list(Answers(out).corrections()) == ["b/c"]  # from now on


def test_a_correction_saved_as_tiff_counts_once_until_it_is_saved_again(
    out: Path, tmp_path: Path
) -> None:
    own = out / "classes" / "a.tif"
    Image.fromarray(OLD).save(own)  # nothing was changed
    assert Answers(out).corrections() == {}
    Image.fromarray(NEW).save(own)
    found = Answers(out).corrections()
    assert (np.asarray(Image.open(found["a"])) == NEW).all() and own.is_file()
    Answers(out).publish(work(tmp_path / "two", OLD), ["a", "b/c"], "you")
    Image.fromarray(OLD + 2).save(out / "classes" / "a.png")  # newer than the TIFF
    assert (np.asarray(Image.open(Answers(out).corrections()["a"])) == 2).all()
    Image.fromarray(NEW + 2).save(own)
    assert (np.asarray(Image.open(Answers(out).corrections()["a"])) == 3).all()


def test_a_file_packed_otherwise_is_no_correction(out: Path) -> None:
    Image.fromarray(OLD).save(out / "classes" / "a.png", compress_level=0, dpi=(300, 300))
    assert Answers(out).corrections() == {}


def test_corrections_made_during_a_run_are_kept_before_they_are_overwritten(
    out: Path, tmp_path: Path
) -> None:
    answers = Answers(out)
    mine = OLD.copy()
    mine[0, 0] = 1
    Image.fromarray(mine).save(out / "classes" / "a.png")
    answers.publish(work(tmp_path / "two", NEW), ["a", "b/c"], "you")
    assert (np.asarray(Image.open(out / "classes" / "a.png")) == NEW).all()
    assert (np.asarray(Image.open(out / "corrected" / "a.png")) == mine).all()


@pytest.mark.parametrize("copied", [0, 1, 2, 5])
def test_a_kill_while_publishing_leaves_no_false_correction(
    out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, copied: int
) -> None:
    import segmentation.answers as module

    real, count = module._copy, iter(range(100))

    def stop(source: Path, target: Path) -> None:
        if next(count) == copied:
            raise KeyboardInterrupt
        real(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(module, "_copy", stop)
        with pytest.raises(KeyboardInterrupt):
            Answers(out).publish(work(tmp_path / "two", NEW), ["a", "b/c"], "you")
    assert Answers(out).corrections() == {}
    Answers(out).publish(tmp_path / "two", ["a", "b/c"], "you")
    assert Answers(out).corrections() == {} and Answers(out).by == "you"


def test_an_image_that_was_taken_away_leaves_no_map_but_its_correction(
    out: Path, tmp_path: Path
) -> None:
    Image.fromarray(NEW).save(out / "classes" / "b" / "c.png")
    Answers(out).publish(work(tmp_path / "two", NEW), ["a"], "me")
    left = sorted(p.relative_to(out).as_posix() for p in out.rglob("*.png"))
    assert left == [
        "classes/a.png",
        "corrected/b/c.png",
        "doubt/a.png",
        "gray/a.png",
        "overlay/a.png",
    ]


def test_a_file_that_is_no_class_map_is_named(out: Path) -> None:
    (out / "classes" / "a.png").write_bytes(b"no picture")
    with pytest.raises(DataError, match="a.png"):
        Answers(out).corrections()


def test_the_model_for_new_images_is_the_one_that_answers(tmp_path: Path) -> None:
    (tmp_path / "sup.pt").write_bytes(b"network")
    answers = Answers(tmp_path / "out")
    (tmp_path / "out").mkdir()
    answers.publish_model(tmp_path / "sup.pt")
    assert (tmp_path / "out" / "model.pt").read_bytes() == b"network"
    answers.publish_model(None)  # the pixel classifier answers
    assert not (tmp_path / "out" / "model.pt").exists()


def test_the_model_for_new_images_has_the_names_that_were_given_after_it_was_trained(
    out: Path, tmp_path: Path
) -> None:
    save(tmp_path / "sup.pt", {"settings": {"class_names": ["a", "b"], "mapping": [0, 255]}})
    Answers(out).publish_model(tmp_path / "sup.pt", ("matrix", "pore"))
    assert load(out / "model.pt")["settings"] == {
        "class_names": ["matrix", "pore"],
        "mapping": [0, 255],
    }
    assert load(tmp_path / "sup.pt")["settings"]["class_names"] == ["a", "b"]
