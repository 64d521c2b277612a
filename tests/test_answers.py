"""Published class maps, and those that the user corrected: never lost, whatever is killed."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from annotation.outlines import SUFFIX, packed
from imaging.field import Crop
from segmentation.answers import KINDS, Answers, Rounds
from utils.checkpoint import load, save
from utils.files import DataError

CLASSES, COLOURS = ["matrix", "carbide", "pore"], [(0, 0, 0), (255, 0, 0), (0, 0, 255)]
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


def test_a_later_correction_in_part_leaves_an_earlier_one(out: Path, tmp_path: Path) -> None:
    first, second = np.full((2, 4, 4), 255, np.uint8)
    first[0], second[3], second[0, 0] = 1, 2, 2
    Image.fromarray(first).save(out / "classes" / "a.png")
    Answers(out).corrections()
    Answers(out).publish(work(tmp_path / "two", OLD), ["a", "b/c"], "you")
    Image.fromarray(second).save(out / "classes" / "a.png")
    kept = np.asarray(Image.open(Answers(out).corrections()["a"]))
    assert kept.tolist() == [[2, 1, 1, 1], [255] * 4, [255] * 4, [2] * 4]


def test_a_correction_in_part_leaves_a_whole_one_until_that_is_deleted(
    out: Path, tmp_path: Path
) -> None:
    """A map of 255 with a patch says nothing of the rest, however much was labelled before."""
    Image.fromarray(NEW).save(out / "classes" / "a.png")
    Answers(out).corrections()
    part = np.where(np.eye(4, dtype=bool), 2, 255).astype(np.uint8)
    for number, expected in enumerate((np.where(part == 2, part, NEW), part)):
        Answers(out).publish(work(tmp_path / f"{number}", NEW), ["a", "b/c"], "you")
        Image.fromarray(part).save(out / "classes" / "a.png")
        kept = out / "corrected" / "a.png"
        assert Answers(out).corrections()["a"] == kept
        np.testing.assert_array_equal(Image.open(kept), expected)
        kept.unlink()  # taken back


@pytest.mark.parametrize("whole", [True, False])
def test_labels_outside_of_the_crop_stay(tmp_path: Path, whole: bool) -> None:
    """What was labelled before the crop stays under a correction of what is left, whole or not."""
    crop, out = Crop(bottom=4), tmp_path / "out"
    Answers(out).publish(work(tmp_path / "0", np.zeros((24, 24), np.uint8)), ["a", "b/c"], "me")
    Image.fromarray(np.ones((24, 24), np.uint8)).save(out / "classes" / "a.png")
    Answers(out).corrections()
    cut = work(tmp_path / "1", np.zeros((20, 24), np.uint8))
    Answers(out).publish(cut, ["a", "b/c"], "me", CLASSES, crop)
    new = np.full((20, 24), 2, np.uint8)
    new[10:] = 2 if whole else 255
    Image.fromarray(new).save(out / "classes" / "a.png")
    kept = np.asarray(Image.open(Answers(out).corrections()["a"]))
    assert (kept[: 20 if whole else 10] == 2).all() and (kept[20 if whole else 10 :] == 1).all()


def test_a_kept_map_of_another_size_is_to_be_deleted(out: Path) -> None:
    """Its image was changed for another one of the same name; no correction of that mends it."""
    place = out / "corrected" / "a.png"
    place.parent.mkdir()
    old = np.ones((3, 3), np.uint8)
    Image.fromarray(old).save(place)
    Image.fromarray(NEW).save(out / "classes" / "a.png")
    with pytest.raises(DataError, match=r"corrected/a\.png: 3x3, its image is 4x4; delete it"):
        Answers(out).corrections()
    np.testing.assert_array_equal(Image.open(place), old)
    place.unlink()
    np.testing.assert_array_equal(Image.open(Answers(out).corrections()["a"]), NEW)


WRONG = {
    "classes/a.png: 3x3, its image is 20x20; save it": np.ones((3, 3), np.uint8),
    "classes/a.png: value 9 in a class map of 3 classes": np.full((20, 20), 9, np.uint8),
}


def kept_rows(tmp_path: Path) -> tuple[Path, np.ndarray]:  # type: ignore[type-arg]
    """OUT with a correction that was kept, and its labels."""
    out, ids = tmp_path / "out", np.zeros((20, 20), np.uint8)
    Answers(out).publish(drawn(tmp_path / "1", Crop(), ids), ["a", "b/c"], "me", CLASSES)
    good = np.full((20, 20), 255, np.uint8)
    good[:4] = 1
    Image.fromarray(good).save(out / "classes" / "a.png")
    Answers(out).corrections()
    return out, good


@pytest.mark.parametrize("newer", ["classes/a.tif", "outlines/a.geojson"])
@pytest.mark.parametrize("said", WRONG)
def test_an_older_one_of_two_corrections_is_checked_before_it_is_kept(
    tmp_path: Path, newer: str, said: str
) -> None:
    out, good = kept_rows(tmp_path)
    Image.fromarray(WRONG[said]).save(out / "classes" / "a.png")
    os.utime(out / "classes" / "a.png", (1, 1))
    right = np.full((20, 20), 2, np.uint8)
    if newer.endswith(".tif"):
        Image.fromarray(right).save(out / newer)
    else:
        (out / newer).write_bytes(packed(right, "geojson", CLASSES, COLOURS))
    for _ in range(2):  # told again, as nothing of it is kept
        with pytest.raises(DataError, match=said):
            Answers(out).offered()
        np.testing.assert_array_equal(Image.open(out / "corrected" / "a.png"), good)
    (out / "classes" / "a.png").write_bytes((tmp_path / "1" / "classes" / "a.png").read_bytes())
    np.testing.assert_array_equal(Image.open(Answers(out).corrections()["a"]), right)


@pytest.mark.parametrize("said", WRONG)
def test_a_wrong_map_that_was_saved_during_a_run_stays_and_is_not_kept(
    tmp_path: Path, said: str
) -> None:
    out, good = kept_rows(tmp_path)
    answers, mine = Answers(out), out / "classes" / "a.png"
    Image.fromarray(WRONG[said]).save(mine)
    Image.fromarray(np.full((20, 20), 2, np.uint8)).save(out / "classes" / "b" / "c.png")
    new = drawn(tmp_path / "2", Crop(), np.ones((20, 20), np.uint8))
    answers.publish(new, ["a", "b/c"], "you", CLASSES)
    (line,) = answers.told
    assert f"{said}" in line and line.endswith(f"{mine} stays as it is, and nothing of it was kept")
    assert answers.kept == ["b/c"] and answers.by == "you"
    np.testing.assert_array_equal(Image.open(out / "corrected" / "a.png"), good)
    np.testing.assert_array_equal(Image.open(mine), WRONG[said])
    assert (np.asarray(Image.open(out / "gray" / "a.png")) == 1).all()  # of the new answer
    with pytest.raises(DataError, match=said):
        Answers(out).corrections()


def test_wrong_outlines_that_were_saved_during_a_run_stay(tmp_path: Path) -> None:
    out, good = kept_rows(tmp_path)
    answers, mine = Answers(out), out / "outlines" / "a.geojson"
    other = packed(np.full((20, 20), 2, np.uint8), "geojson", ["x", "y", "oxide"], COLOURS)
    mine.write_bytes(other)
    new = drawn(tmp_path / "2", Crop(), np.ones((20, 20), np.uint8))
    answers.publish(new, ["a", "b/c"], "you", CLASSES)
    (line,) = answers.told
    assert "class 'oxide' is not one of" in line and f"{mine} stays as it is" in line
    assert mine.read_bytes() == other and answers.kept == []
    np.testing.assert_array_equal(Image.open(out / "corrected" / "a.png"), good)


def test_a_tiff_whose_kept_map_was_deleted_is_named(out: Path, tmp_path: Path) -> None:
    own = out / "classes" / "a.tif"
    Image.fromarray(NEW).save(own)
    Answers(out).corrections()["a"].unlink()  # taken back
    Answers(out).publish(work(tmp_path / "two", OLD), ["a", "b/c"], "you")
    Image.fromarray(NEW).save(own)
    answers = Answers(out)
    assert answers.corrections() == {}
    (line,) = answers.not_taken()
    assert line.startswith(f"{own}: taken in before, and no {out / 'corrected' / 'a.png'} is there")
    Image.fromarray(NEW).save(out / "classes" / "a.png")
    assert list(Answers(out).corrections()) == ["a"] and Answers(out).not_taken() == []


def drawn(place: Path, crop: Crop, ids: np.ndarray, kind: str = "geojson") -> Path:  # type: ignore[type-arg]
    """A predicted folder with the outlines of its class maps over the images before the crop."""
    work(place, ids)
    whole = (ids.shape[0] + crop.top + crop.bottom, ids.shape[1] + crop.left + crop.right)
    for name in ("a", "b/c"):
        path = place / "outlines" / f"{name}{SUFFIX[kind]}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(packed(crop.back(ids, whole, 0), kind, CLASSES, COLOURS))
    return place


@pytest.mark.parametrize("crop", [Crop(), Crop(2, 3, 0, 1)])
def test_outlines_that_were_corrected_are_a_correction_of_their_class_map(
    tmp_path: Path, crop: Crop
) -> None:
    old = np.zeros((20, 24), np.uint8)
    old[4:9, 4:9] = 1
    Answers(tmp_path / "out").publish(
        drawn(tmp_path / "one", crop, old), ["a", "b/c"], "me", CLASSES, crop
    )
    out = tmp_path / "out"
    path = out / "outlines" / "b" / "c.geojson"
    path.write_bytes(b" " + path.read_bytes())  # saved again, and nothing was changed
    assert Answers(out).corrections() == {}
    new = old.copy()
    new[10:15, 2:20] = 2
    size = (20 + crop.top + crop.bottom, 24 + crop.left + crop.right)
    path.write_bytes(packed(crop.back(new, size, 0), "geojson", CLASSES, COLOURS))
    found = Answers(out).corrections()
    assert list(found) == ["b/c"]
    np.testing.assert_array_equal(Image.open(found["b/c"]), crop.back(new, size, 255))
    # Another program's file beside it, of another image: the newest counts.
    corners = [[crop.left, crop.top + 3], [crop.left + 24, crop.top + 3],
               [crop.left + 24, crop.top + 7], [crop.left, crop.top + 7]]  # fmt: skip
    shape = {"label": "pore", "points": corners, "shape_type": "polygon"}
    whole = {"shapes": [shape], "imageHeight": size[0], "imageWidth": size[1]}
    (out / "outlines" / "a.json").write_text(json.dumps(whole))
    rows = np.zeros((20, 24), np.uint8)
    rows[3:7] = 2
    kept = np.asarray(Image.open(Answers(out).corrections()["a"]))
    np.testing.assert_array_equal(kept, crop.back(rows, size, 255))


def test_a_correction_of_the_whole_image_is_kept_as_it_is(tmp_path: Path) -> None:
    crop, out = Crop(bottom=4), tmp_path / "out"
    ids = np.zeros((20, 24), np.uint8)
    Answers(out).publish(work(tmp_path / "one", ids), ["a", "b/c"], "me", CLASSES, crop)
    whole = np.ones((24, 24), np.uint8)
    Image.fromarray(whole).save(out / "classes" / "a.png")
    np.testing.assert_array_equal(Image.open(Answers(out).corrections()["a"]), whole)


def test_corrected_outlines_that_cover_no_pixel_are_told(tmp_path: Path) -> None:
    out, ids = tmp_path / "out", np.ones((20, 24), np.uint8)
    Answers(out).publish(drawn(tmp_path / "one", Crop(), ids), ["a", "b/c"], "me", CLASSES)
    shape = {"label": "pore", "points": [[2.6, 2], [3.4, 9]], "shape_type": "rectangle"}
    whole = {"shapes": [shape], "imageHeight": 20, "imageWidth": 24}
    (out / "outlines" / "a.json").write_text(json.dumps(whole))
    answers = Answers(out)
    answers.offered()
    (line,) = answers.not_taken()
    assert line.startswith(f"{out / 'outlines' / 'a.json'}: 1 outline(s) without any pixel's")


def test_old_outlines_go_with_their_answer_and_those_of_the_user_stay(tmp_path: Path) -> None:
    out, ids = tmp_path / "out", np.ones((20, 24), np.uint8)
    Answers(out).publish(drawn(tmp_path / "one", Crop(), ids), ["a", "b/c"], "me", CLASSES)
    mine = out / "outlines" / "a.geojson"
    mine.write_bytes(packed(ids * 2, "geojson", CLASSES, COLOURS))
    Answers(out).publish(work(tmp_path / "two", ids), ["a", "b/c"], "you", CLASSES)
    assert [p.name for p in (out / "outlines").rglob("*") if p.is_file()] == ["a.geojson"]
    assert (np.asarray(Image.open(out / "corrected" / "a.png")) == 2).all()


def test_outlines_of_a_class_that_is_not_there_are_named(tmp_path: Path) -> None:
    out, ids = tmp_path / "out", np.ones((20, 24), np.uint8)
    Answers(out).publish(drawn(tmp_path / "one", Crop(), ids), ["a", "b/c"], "me", CLASSES)
    names = ["matrix", "carbide", "oxide"]
    (out / "outlines" / "a.geojson").write_bytes(packed(ids * 2, "geojson", names, COLOURS))
    with pytest.raises(DataError, match=r"a\.geojson: class 'oxide' is not one of matrix, carbide"):
        Answers(out).corrections()


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

    real, count = module.copy_file, iter(range(100))

    def stop(source: Path, target: Path) -> None:
        if next(count) == copied:
            raise KeyboardInterrupt
        real(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(module, "copy_file", stop)
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


def test_the_model_for_new_images_knows_how_its_own_were_read(out: Path, tmp_path: Path) -> None:
    save(tmp_path / "sup.pt", {"settings": {"gray_range": {"levels": [0, 255]}, "mapping": [0]}})
    facts = {"crop": [0, 60, 0, 0], "cropped_sizes": [[90, 80]], "gray_range": [300.0, 4000.0]}
    Answers(out).publish_model(tmp_path / "sup.pt", (), facts)
    assert load(out / "model.pt")["settings"] == {"mapping": [0], **facts}


@pytest.mark.parametrize("kind", [".png", ".tif"])
def test_a_correction_of_another_size_is_not_kept_and_can_be_undone(out: Path, kind: str) -> None:
    path, before = out / "classes" / f"a{kind}", (out / "classes" / "a.png").read_bytes()
    Image.fromarray(np.ones((5, 4), np.uint8)).save(path)
    with pytest.raises(DataError, match=rf"classes/a\{kind}: 4x5, its image is 4x4; save it"):
        Answers(out).corrections()
    assert Answers(out).offered() == {"a": path} and not (out / "corrected").exists()
    (out / "classes" / "a.png").write_bytes(before)
    (out / "classes" / "a.tif").unlink(missing_ok=True)
    assert Answers(out).corrections() == {}


def test_a_correction_is_offered_where_it_was_saved_until_it_is_kept(out: Path) -> None:
    Image.fromarray(NEW).save(out / "classes" / "a.png")
    answers = Answers(out)
    assert answers.offered() == {"a": out / "classes" / "a.png"}
    assert answers.keep() == {"a": out / "corrected" / "a.png"} == Answers(out).offered()


def test_pictures_among_the_class_maps_that_are_no_corrections_are_named(out: Path) -> None:
    folder = out / "classes"
    for name in ("a.jpg", "a_corrected.png", "b/c-new.tif", "x.png", "a.tif", ".a.png"):
        Image.fromarray(NEW).save(folder / name)
    (folder / "notes.txt").touch()
    lines = Answers(out).not_taken()
    told = [(line.partition(":")[0], line.partition(";")[2]) for line in lines]
    assert told == [
        (str(folder / "a.jpg"), f" save it as {folder / 'a.png'}"),
        (str(folder / "a_corrected.png"), f" save it as {folder / 'a.png'}"),
        (str(folder / "b" / "c-new.tif"), f" save it as {folder / 'b' / 'c.png'}"),
        (str(folder / "x.png"), f" name it as its image, such as {folder / 'a.png'}"),
    ]
    assert list(Answers(out).corrections()) == ["a"]  # the TIFF


def hostile(out: Path, tmp_path: Path, kind: str) -> Path:
    """A file beside OUT, with the folder ``sub`` of every kind of results linked to it there."""
    victims = tmp_path / "mine"
    victims.mkdir(exist_ok=True)
    for folder in (*KINDS, "outlines"):
        (out / folder).mkdir(exist_ok=True)
        (out / folder / "sub").symlink_to(victims, target_is_directory=True)
    victim = victims / f"victim{kind}"
    victim.write_bytes(b"mine")
    return victim


def test_names_in_a_record_that_lead_out_of_the_folder_are_left_alone(
    out: Path, tmp_path: Path
) -> None:
    victim = hostile(out, tmp_path, ".png")
    record = json.loads((out / "answer.json").read_text())
    for name in ("../../mine/victim", str(victim.with_suffix("")), "sub/victim", "a\0b"):
        record["files"][name] = []
    (out / "answer.json").write_text(json.dumps(record))
    Answers(out).publish(work(tmp_path / "two", NEW), ["a"], "me")
    assert victim.read_bytes() == b"mine" and Answers(out).by == "me"
    assert not (out / "gray" / "b" / "c.png").exists()  # its own, of an image that is no more


def test_names_of_outlines_that_lead_out_of_the_folder_are_left_alone(
    out: Path, tmp_path: Path
) -> None:
    victim = hostile(out, tmp_path, ".geojson")
    own = hashlib.sha256(b"mine").hexdigest()[:16]
    inside = out / "outlines" / "old.geojson"
    inside.write_bytes(b"mine")
    record = json.loads((out / "answer.json").read_text())
    names = ("old", "../../mine/victim", str(victim.with_suffix("")), "sub/victim")
    record["outlines"] = {f"{name}.geojson": [own] for name in names}
    (out / "answer.json").write_text(json.dumps(record))
    Answers(out).publish(work(tmp_path / "two", NEW), ["a"], "me")
    assert victim.read_bytes() == b"mine" and not inside.exists()


@pytest.mark.parametrize("entry", ["start", "answer", "network"])
def test_rounds_whose_files_lie_elsewhere_are_none(tmp_path: Path, entry: str) -> None:
    out, elsewhere = tmp_path / "out", tmp_path / "elsewhere"
    (out / "training").mkdir(parents=True)
    elsewhere.mkdir()
    (out / "linked").symlink_to(elsewhere, target_is_directory=True)
    known = {"number": 1, "key": "k", "classes": 2, "labels": {}}
    for place in ("../elsewhere/x.pt", str(elsewhere / "x.pt"), "linked/x.pt", 7):
        (out / "rounds.json").write_text(json.dumps([known | {entry: place}]))
        assert Rounds(out).all == [], place
    (out / "rounds.json").write_text(json.dumps([known | {entry: "training/x.pt"}]))
    assert [getattr(each, entry) for each in Rounds(out).all] == ["training/x.pt"]


@pytest.mark.parametrize(
    "damage",
    [{"files": {"a": 5}}, {"files": {}, "outlines": []}, {"files": {}, "outlines": {"a": None}},
     {"files": {}, "beside": 1}, {"files": {}, "crop": [1]}, {"files": {}, "crop": "0000"}],
)  # fmt: skip
def test_a_record_of_another_shape_is_none(
    out: Path, tmp_path: Path, damage: dict[str, object]
) -> None:
    (out / "answer.json").write_text(json.dumps({"by": "who", **damage}))
    assert Answers(out).by == "" and Answers(out).corrections() == {}
    Answers(out).publish(work(tmp_path / "two", NEW), ["a"], "me")
    assert Answers(out).by == "me"
