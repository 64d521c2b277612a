"""The command line of prediction: its options, its places, its exit codes."""

from __future__ import annotations

import html
import json
import os
import re
import time
import zipfile
from argparse import Namespace
from datetime import date
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from annotation.files import read_annotation
from annotation.outlines import packed
from imaging.drawing import bar_length, overlay
from imaging.listing import names_of
from metallography import outlines, ranking
from metallography.items import Record
from predict import NEEDS, TASKS, USED_BY, Segmenter, main, parser, ranked_lines
from tests.trained_model import rows_of, write_images, write_weights
from utils.commandline import Termination, UserError
from utils.files import DataError


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    return write_weights(tmp_path / "run" / "fine.pt", {})


def test_a_report_with_the_measurements(tmp_path: Path, capsys) -> None:
    run = tmp_path / "steel_simclr" / "1_0"
    weights = write_weights(run / "fine.pt", {"class_names": ["matrix", "θ phase", "void"]})
    words = ["--images", str(write_images(tmp_path / "in", "30_a.png")), "--device", "cpu"]
    words += ["--report", "--weights", str(weights)]
    (tmp_path / "gt").mkdir()
    Image.fromarray(np.ones((40, 48), np.uint8)).save(tmp_path / "gt" / "30_a.png")
    words += ["--masks", str(tmp_path / "gt")]
    assert main(words) == 2
    assert "is not in the folder of a run" in capsys.readouterr().err
    (run / "log_fine.txt").write_text("Fine-tuning\n")
    assert main([*words, "--out", str(tmp_path / "out")]) == 2
    assert "so leave --out out" in capsys.readouterr().err
    assert not list(tmp_path.glob("**/report.html")) and not (tmp_path / "out").exists()
    assert main(words) == 0
    page = (run.parent / "report.html").read_text(encoding="utf-8")
    assert "θ phase" in page and "1_0/predicted_in" in page
    summary = (run / "predicted_in" / "summary.md").read_text(encoding="utf-8")
    assert "Dice (pooled)" in summary and "D50" in summary and "predicted class" in summary
    for line in summary.splitlines():
        for cell in line.strip("| ").split(" | ") if line.startswith("| ") else ():
            assert f">{html.escape(cell)}</t" in page or cell.strip("-:") == ""
    sheet = re.search(
        r"1_0/predicted_in: some of its images</figcaption><img src=.data:([^;]*)", page
    )
    assert sheet and sheet[1] == "image/jpeg"


def test_a_report_from_within_the_folder_of_the_run(tmp_path: Path, monkeypatch) -> None:
    run = tmp_path / "steel_sup" / "1_0"
    write_weights(run / "sup.pt", {})
    (run / "log_sup.txt").write_text("Training\n")
    images = write_images(tmp_path / "in", "30_a.png")
    monkeypatch.chdir(run)
    words = ["--weights", "sup.pt", "--images", str(images), "--report", "--device", "cpu"]
    assert main(words) == 0
    assert "1_0/predicted_in" in (run.parent / "report.html").read_text(encoding="utf-8")


def test_results_go_beside_the_weights_by_default(tmp_path: Path, weights: Path) -> None:
    images = write_images(tmp_path / "imgs", "a.png")
    assert main(["--weights", str(weights.parent), "--images", str(images)]) == 0
    assert (weights.parent / "predicted_imgs" / "summary.md").is_file()


def test_the_folders_of_a_set_have_results_of_their_own(tmp_path: Path, weights: Path) -> None:
    for place in ("steel/test_numf", "steel/train_numf", "alu/test_numf"):
        images = write_images(tmp_path / place / "img", "a.png")
        for task in ("--images", "--rank"):
            assert main(["--weights", str(weights.parent), task, str(images)]) == 0
    found = {path.name for path in weights.parent.iterdir() if path.is_dir()}
    assert found == {
        f"{kind}_{own}_img"
        for kind in ("predicted", "ranked")
        for own in ("steel_test_numf", "steel_train_numf", "alu_test_numf")
    }


@pytest.mark.parametrize(
    ("place", "name"),
    [
        ("new", "new"),
        ("run7/img", "run7_img"),
        ("steel/sup_num4_0/img", "steel_sup_num4_0_img"),
        ("steel/sup_numf/IMG", "steel_sup_numf_IMG"),
        ("steel/train_unlabelled", "steel_train_unlabelled"),
        ("steel/val_numf/img", "steel_val_numf_img"),
        ("/", "images"),
        ("/img", "img"),
    ],
)
def test_a_folder_of_results_is_called_as_its_images(tmp_path, place: str, name: str) -> None:
    assert "_".join(names_of(tmp_path / place)) == name


@pytest.mark.parametrize("names", [("a.png",), ("z.png",)])
def test_results_of_another_folder_of_images_are_not_mixed(
    tmp_path, weights, capsys, names: tuple[str, ...]
) -> None:
    words = ["--weights", str(weights), "--out", str(tmp_path / "out"), "--images"]
    first, second = tmp_path / "steel", write_images(tmp_path / "alu", *names)
    write_images(first, "a.png", "b.png")
    assert main([*words, str(first)]) == 0
    record = tmp_path / "out" / "predicted.jsonl"
    assert json.loads(record.read_text().splitlines()[0])["images"] == str(first)
    before = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*.*")}
    capsys.readouterr()
    assert main([*words, str(second)]) == 2
    error = capsys.readouterr().err
    assert f"holds predictions of the images in {first}, not of those in {second}" in error
    assert "another --out, or --overwrite" in error and error.count("\n") == 1
    assert {path: path.read_bytes() for path in (tmp_path / "out").rglob("*.*")} == before
    (tmp_path / "link").symlink_to(first)  # the same by another path, or one image of it
    for same in (tmp_path / "link", first / "a.png"):
        assert main([*words, str(same)]) == 0
        assert "0 image(s) predicted" in capsys.readouterr().out
    assert main([*words, str(second), "--overwrite"]) == 0
    assert main([*words, str(second)]) == 0
    assert f"0 image(s) predicted, {len(names)} were done" in capsys.readouterr().out


def test_a_folder_of_the_programs_own_may_be_of_images_that_moved(tmp_path: Path) -> None:
    path, entry = tmp_path / "predicted.jsonl", {"name": "a", "bytes": 1}
    Record(path, {"weights": "w", "images": "/old"}, overwrite=False).add(entry)
    moved = {"weights": "w", "images": "/new"}
    with pytest.raises(UserError, match="of the images in /old, not of those in /new"):
        Record(path, moved, overwrite=False)
    assert Record(path, moved, overwrite=False, replaceable=True).done == {"a": entry}
    assert Record(path, {"weights": "w"}, overwrite=False).done == {"a": entry}  # of no folder


@pytest.mark.parametrize(("kind", "suffix"), [("geojson", ".geojson"), ("roi", ".zip")])
def test_outlines_are_the_class_maps_to_the_pixel_and_tables_a_workbook(
    tmp_path: Path, weights: Path, kind: str, suffix: str, capsys: pytest.CaptureFixture[str]
) -> None:
    images = write_images(tmp_path / "imgs", "a.png", "b.png")
    words = ["--weights", str(weights), "--images", str(images), "--out", str(tmp_path / "out")]
    assert main([*words, "--outlines", kind, "--xlsx", "--particles"]) == 0
    out, names = tmp_path / "out", Segmenter(weights).class_names
    for name in ("a", "b"):
        ids = np.asarray(Image.open(out / "classes" / f"{name}.png"))
        drawn = read_annotation(out / "outlines" / f"{name}{suffix}", ids.shape, names)
        assert len(np.unique(ids)) > 1 and (drawn == ids).all()
    with zipfile.ZipFile(out / "measurements.xlsx") as book:
        sheets = re.findall(r'sheet name="([a-z]+)"', book.read("xl/workbook.xml").decode())
    assert sheets == ["about", "measurements", "batches", "particles", "sizes", "phases"]
    head = json.loads((out / "summary.json").read_text(encoding="utf-8"))["head"]
    assert head["Program"].startswith("predict.py of PSCL ") and head["Sample"] == "imgs"
    assert head["Date"] == date.today().isoformat() and head["Fields"] == "2"
    assert head["Options"] == f"--particles --outlines {kind} --xlsx"
    assert "<dt>Program</dt><dd>predict.py of PSCL " in (out / "report.html").read_text()
    assert main(["--weights", str(weights), "--rank", str(images), "--xlsx"]) == 2
    # What somebody saved there afterwards is left, and told.
    mine = out / "outlines" / f"a{suffix}"
    mine.write_bytes(mine.read_bytes() + b" ")
    os.utime(mine, ns=(time.time_ns(), time.time_ns()))
    before = mine.read_bytes()
    capsys.readouterr()
    os.utime(images / "a.png", ns=(0, 0))  # predicted anew: its class map is newer then
    assert main([*words, "--outlines", kind]) == 0 and mine.read_bytes() == before
    assert f"1 file(s) of outlines differ from their class maps: {mine}" in (
        capsys.readouterr().out
    )
    other = {"geojson": "roi", "roi": "geojson"}[kind]
    assert main([*words, "--outlines", other]) == 0  # both kinds in one folder
    ours = out / "outlines" / f"b{suffix}"  # what nobody changed follows its class map
    Image.fromarray(np.zeros((40, 48), np.uint8)).save(out / "classes" / "b.png")
    assert main([*words, "--outlines", kind]) == 0
    assert (read_annotation(ours, (40, 48), names) == 0).all()
    assert main([*words, "--outlines", kind, "--overwrite"]) == 0 and mine.read_bytes() != before


def test_outlines_that_fit_are_not_traced_again(tmp_path, weights, monkeypatch, capsys) -> None:
    """By the digest of their class map in the record; without one, once."""
    images = write_images(tmp_path / "imgs", "a.png", "b.png")
    words = ["--weights", str(weights), "--images", str(images), "--out", str(tmp_path / "out")]
    traced: list[str] = []

    def counted(ids, kind, *how):
        traced.append(kind)
        return packed(ids, kind, *how)

    monkeypatch.setattr(outlines, "packed", counted)
    for kind in ("geojson", "roi"):  # the second leaves the first
        assert main([*words, "--outlines", kind]) == 0
    assert traced == ["geojson"] * 2 + ["roi"] * 2
    assert main(words) == 0 and len(traced) == 4
    record = tmp_path / "out" / "predicted.jsonl"
    lines = [json.loads(line) for line in record.read_text().splitlines()]
    for line in lines:
        line.pop("outlined", None)
    record.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert main(words) == 0 and len(traced) == 8
    assert main(words) == 0 and len(traced) == 8
    assert len(list((tmp_path / "out" / "outlines").iterdir())) == 4
    Image.fromarray(np.zeros((40, 48), np.uint8)).save(tmp_path / "out" / "classes" / "b.png")
    capsys.readouterr()
    assert main(words) == 0
    assert "2 file(s) of outlines of earlier class maps removed" in capsys.readouterr().out
    left = sorted(path.name for path in (tmp_path / "out" / "outlines").iterdir())
    assert left == ["a.geojson", "a.zip"]
    Image.fromarray(np.ones((40, 48), np.uint8)).save(tmp_path / "out" / "classes" / "a.png")

    def refused(ids, kind, *how):
        raise DataError("ImageJ's regions reach less")

    monkeypatch.setattr(outlines, "packed", refused)
    assert main(words) == 0 and not list((tmp_path / "out" / "outlines").iterdir())


def test_copies_of_an_image_are_warned_of(tmp_path: Path, weights: Path, capsys) -> None:
    images = write_images(tmp_path / "in", "a.png", "b.png")
    (images / "a - Kopie (2).png").write_bytes((images / "a.png").read_bytes())
    Image.fromarray(np.full((40, 48), 9, np.uint8)).save(images / "b.png")
    words = ["--images", str(images), "--weights", str(weights), "--device", "cpu"]
    said = "Warning: 1 image(s) equal to another one, pixel by pixel: a - Kopie (2) (as a); each"
    for _ in range(2):  # the second time nothing is predicted
        assert main(words) == 0
        out = weights.parent / "predicted_in"
        page = html.unescape((out / "report.html").read_text(encoding="utf-8"))
        assert said in capsys.readouterr().out
        for text in ((out / "summary.md").read_text(encoding="utf-8"), page):
            assert said.removeprefix("Warning: ") in text


def test_the_scale_bar_is_round_and_true() -> None:
    for widest, expected in [(99, 50), (100, 100), (3, 2), (0.7, 0.5), (1234, 1000)]:
        assert bar_length(widest) == pytest.approx(expected)
    image, mask = np.full((500, 600), 200, np.uint8), np.zeros((500, 600), np.uint8)
    mask[100:200, 100:200] = 1
    colours = np.array([[0, 0, 0], [255, 0, 0]], np.uint8)
    drawn = overlay(image, mask, ["matrix", "β"], colours, 0.1)
    # A quarter of 60 um is 15 um, so the bar is 10 um = 100 px.
    bar = (drawn[500 + 8 + 10, : 10 + 100 + 6] == 20).all(axis=1)  # left of the words
    assert bar.sum() == 100
    assert drawn[150, 150].tolist() == [int(110 + 0.45 * 255), 110, 110]
    assert drawn[50, 50].tolist() == [200, 200, 200]


def test_a_large_picture_has_a_reduced_overlay_with_a_true_bar() -> None:
    mask = np.zeros((2100, 4096), np.uint8)
    drawn = overlay(mask, mask, ["0"], np.zeros((1, 3), np.uint8), None)
    assert drawn.shape[1] == 2048
    # 4096 px / 4 = 1024 -> 1000 px of the file, 500 drawn.
    assert abs(int((drawn[1050 + 18, : 10 + 500 + 6] == 20).all(axis=1).sum()) - 500) <= 1


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (["--um_per_px", "0"], "--um_per_px: found 0.0; give"),
        (["--um_per_px", "-1"], "--um_per_px: found -1.0; give"),
        (["--um_per_px", "nan"], "--um_per_px: found nan; give"),
        (["--um_per_px", "1e308"], "--um_per_px: found 1e+308; give"),
        (["--um_per_px", "1e-300"], "--um_per_px: found 1e-300; give"),
        (["--connectivity", "6"], "--connectivity: found 6; give 4 or 8"),
        (
            ["--grain_classes", "1", "--boundary_classes", "3"],
            "--boundary_classes: found 3; classes are 0 ... 2",
        ),
        (["--min_px", "0"], "--min_px: found 0; give"),
        (["--resize", "3"], "--resize: found 3; give 0 or a number of at least 16"),
        (["--overlap", "800"], "overlap 800"),
        (["--grain_classes", "3"], "--grain_classes: found 3; classes are 0 ... 2"),
        (["--masks", "nowhere"], "--masks: nowhere is no folder"),
        (["--images", "nowhere"], "nowhere: no such folder"),
        (["--weights", "nowhere.pt"], "nowhere.pt: cannot be read"),
        (["--device", "toaster"], "--device: found toaster; give auto"),
        (["--threads", "-3"], "--threads: found -3; give 0 or"),
    ],
)
def test_a_bad_option_is_one_line(tmp_path, weights, capsys, change, said) -> None:
    images = write_images(tmp_path / "imgs", "a.png")
    options = ["--weights", str(weights), "--images", str(images), "--out", str(tmp_path / "o")]
    assert main([*options, *change]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1
    assert not (tmp_path / "o").exists()


OPTIONS = {a.dest: a for a in parser()._actions if a.dest != "help"}
VALUES = {
    "um_per_px": "0.3",
    "resample": "0.3",
    "outlines": "roi",
    "crop": "1,0,0,0",
    "sample": "s",
    "tta": "false",
}


def given(name: str) -> list[str]:
    """An option with a value that is not its default."""
    action = OPTIONS[name]
    value = VALUES.get(name, "40" if action.type in (int, float) else "x")
    return [f"--{name}", *([] if action.nargs == 0 else [value])]


def test_every_option_says_which_tasks_use_it() -> None:
    assert USED_BY.keys() == OPTIONS.keys() - {*TASKS}
    assert all(tasks and {*tasks} <= {*TASKS} for tasks in USED_BY.values())
    assert {*NEEDS, *NEEDS.values()} <= USED_BY.keys()


UNUSED = [(task, name) for name, tasks in USED_BY.items() for task in TASKS if task not in tasks]


@pytest.mark.parametrize(("task", "name"), UNUSED)
def test_an_option_that_would_do_nothing_is_refused(weights, capsys, task, name) -> None:
    assert main(["--weights", str(weights), f"--{task}", "model.pt2", *given(name)]) == 2
    assert capsys.readouterr().err == f"--{name}: of no effect with --{task}; leave it out\n"


@pytest.mark.parametrize(("name", "other"), NEEDS.items())
def test_an_option_that_waits_for_another_is_refused_without(weights, capsys, name, other) -> None:
    words = ["--weights", str(weights), "--images", "nowhere", *given(name)]
    assert main(words) == 2
    cure = f"leave it out, or give --{other} too"
    assert capsys.readouterr().err == f"--{name}: of no effect without --{other}; {cure}\n"
    assert main([*words, *given(other)]) == 2
    assert "of no effect" not in capsys.readouterr().err


@pytest.mark.parametrize("flag", ["images", "rank", "masks"])
def test_results_do_not_go_among_the_images(tmp_path, weights, capsys, flag) -> None:
    """There a contact sheet would be an image of the set from then on."""
    images, masks = (write_images(tmp_path / name, "a.png") for name in ("imgs", "gt"))
    words = ["--weights", str(weights), "--rank" if flag == "rank" else "--images", str(images)]
    out = masks if flag == "masks" else images
    assert main([*words, "--masks", str(masks), "--out", str(out)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and f"--out: found {out}, the folder of --{flag}" in error
    assert [p.name for p in out.iterdir()] == ["a.png"]


@pytest.mark.parametrize("change", [["--min_px", "x"], ["--nonsense"]])
def test_an_option_that_cannot_be_read_is_one_line(capsys, change) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["--weights", "w", "--images", "i", *change])
    error = capsys.readouterr().err
    assert exit_.value.code == 2 and error.count("\n") == 1 and change[0] in error


def test_an_output_folder_that_cannot_be_made(tmp_path: Path, weights: Path, capsys) -> None:
    images = write_images(tmp_path / "imgs", "a.png")
    (tmp_path / "file").write_text("")
    out = tmp_path / "file" / "o"
    assert main(["--weights", str(weights), "--images", str(images), "--out", str(out)]) == 2
    error = capsys.readouterr().err
    assert str(out.parent) in error and "--out" in error and error.count("\n") == 1


@pytest.mark.parametrize(
    ("stop", "code", "said"),
    [
        (KeyboardInterrupt(), 130, "Interrupted. The same command goes on with the images"),
        (Termination(), 143, "Terminated. The same command goes on with the images"),
        (MemoryError(), 2, "Out of memory; give a smaller --tile, such as 384"),
        (torch.OutOfMemoryError("CUDA out of memory"), 2, "give a smaller --tile, such as 384"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), 2, "give a smaller --tile"),
    ],
    ids=lambda value: str(value) if isinstance(value, int) else None,
)
def test_what_ends_it_early_is_said_and_what_is_done_is_kept(
    tmp_path, weights, capsys, monkeypatch, stop: BaseException, code: int, said: str
) -> None:
    images = write_images(tmp_path / "imgs", "a.png", "b.png")
    words = ["--weights", str(weights), "--images", str(images), "--out", str(tmp_path / "o")]
    bands, calls = Segmenter.bands, []

    def stopped(self, image, *how):
        calls.append(image)
        if len(calls) == 2:
            raise stop
        return bands(self, image)

    monkeypatch.setattr(Segmenter, "bands", stopped)
    assert main([*words, "--particles", "--probabilities"]) == code
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1
    left = {str(path.relative_to(tmp_path / "o")) for path in (tmp_path / "o").rglob("*.*")}
    assert left == {
        "predicted.jsonl", "classes/a.png", "gray/a.png", "overlay/a.png", "probabilities/a.npy",
        "measured/a.npz",
    }  # fmt: skip
    assert main([*words, "--particles", "--probabilities"]) == 0
    assert "1 image(s) predicted, 1 were done already" in capsys.readouterr().out


@pytest.mark.parametrize("names", [("a.tif", "c.tif", "b.png"), ("b.png",)])
def test_true_masks_beside_some_images_of_a_ranking(tmp_path, weights, names, capsys) -> None:
    images = write_images(tmp_path / "imgs", *names)
    for name in {*names} - {"b.png"}:
        labels = np.full((40, 48), 255, np.uint8)
        labels[:, :4] = 1
        Image.fromarray(labels).save((images / name).with_suffix(".png"))
    words = ["--weights", str(weights), "--rank", str(images), "--masks", str(images)]
    assert main([*words, "--out", str(tmp_path / "o")]) == 0
    rows = {row["image"]: row for row in rows_of(tmp_path / "o" / "ranking.csv")}
    assert rows.keys() == {Path(name).stem for name in names}
    counted = len(names) - 1  # but b.png, which is no mask of itself
    assert [name for name, row in rows.items() if row.get("accuracy")] == sorted(
        rows.keys() - {"b"}, key=[*rows].index
    )
    assert f"{counted} of {len(names)} images have a true mask" in capsys.readouterr().out


def test_a_ranking_with_true_masks_has_its_sheet(tmp_path, weights, capsys) -> None:
    images, masks = (write_images(tmp_path / name, "a.png", "b.png") for name in ("imgs", "gt"))
    for path in masks.iterdir():
        Image.fromarray(np.zeros((40, 48), np.uint8)).save(path)
    words = ["--weights", str(weights), "--rank", str(images), "--masks", str(masks)]
    assert main(words) == 0
    out = weights.parent / "ranked_imgs"
    assert f"{out}: 2 image(s) ranked; least sure of" in capsys.readouterr().out
    assert {float(row["rank"]) for row in rows_of(out / "ranking.csv")} == {1, 2}
    # Pictures of 48x40 pixels seven times enlarged, a line of titles and one of a heading above,
    # a bar and a legend below.
    assert Image.open(out / "ranking.png").size == (10 + 2 * 410, 10 + 26 + 26 + 7 * 40 + 10 + 26)


def test_an_annotated_image_is_not_the_one_to_label_next(tmp_path) -> None:
    write_images(tmp_path / "sup" / "img", "b.png", "sub__c.png")
    rows = [{"image": name} for name in ("sub/c", "b", "a")]
    found = ranking.Ranking(rows, [], [], [], [], [])
    lines = ranked_lines(found, Namespace(annotated=str(tmp_path / "sup")))
    assert lines[0] == "3 image(s) ranked; least sure of a"
    assert lines[1].startswith("2 of them annotated, by their names: sub/c, b;")
    assert ranked_lines(found, Namespace(annotated=None)) == [
        "3 image(s) ranked; least sure of sub/c"
    ]


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        ('{"by": "pixel classifier", "files": {}}', "because the pixel classifier answered"),
        ('{"by": "network", "files": {}}', "cannot be read"),
        ("[damaged", "cannot be read"),
    ],
)
def test_a_network_that_segment_did_not_write_is_not_only_missing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], answer: str, words: str
) -> None:
    images = write_images(tmp_path / "imgs", "a.png")
    (tmp_path / "answer.json").write_text(answer, encoding="utf-8")
    weights = tmp_path / "model.pt"
    assert main(["--weights", str(weights), "--images", str(images)]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"{weights}: ") and words in error and error.count("\n") == 1
    assert ("more --minutes" in error) == ("because" in words)


def test_the_folder_of_segment_is_its_model(tmp_path: Path, capsys) -> None:
    images = write_images(tmp_path / "imgs", "a.png")
    write_weights(tmp_path / "segmented" / "model.pt", {})
    words = ["--weights", str(tmp_path / "segmented"), "--images", str(images)]
    assert main([*words, "--out", str(tmp_path / "out")]) == 0
    assert str(tmp_path / "segmented" / "model.pt") in capsys.readouterr().out
    (tmp_path / "segmented" / "model.pt").unlink()
    assert main(words) == 2
    assert "no fine.pt, sup.pt or model.pt in it" in capsys.readouterr().err
    answer = '{"by": "pixel classifier", "files": {}}'
    (tmp_path / "segmented" / "answer.json").write_text(answer, encoding="utf-8")
    assert main(words) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"{tmp_path / 'segmented' / 'model.pt'}: not written, because the ")
    assert error.count("\n") == 1


def test_averaging_over_views_is_as_the_model_says_or_as_given(tmp_path, capsys) -> None:
    path = write_weights(tmp_path / "model.pt", {"views": 8})
    images = write_images(tmp_path / "imgs", "a.png")
    words = ["--weights", str(path), "--images", str(images), "--out", str(tmp_path / "o")]
    assert main(words) == 0
    assert "Averages over 8 flips and quarter turns, as segment.py" in capsys.readouterr().out
    assert main([*words, "--tta"]) == 0  # the same
    assert "0 image(s) predicted, 1 were done" in capsys.readouterr().out
    assert main([*words, "--tta", "false"]) == 2
    assert "tta was True, is False" in capsys.readouterr().err
    assert main([*words, "--tta=no", "--overwrite"]) == 0
    assert "Averages" not in capsys.readouterr().out
    assert main(words) == 2  # of an earlier version, which averaged over no views
    assert "tta was False, is True" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([*words, "--tta", "perhaps"])
    assert "found 'perhaps'; give true or false" in capsys.readouterr().err
    export = ["--weights", str(path), "--export", str(tmp_path / "m.pt2")]
    assert main([*export, "--tta", "false"]) == 2
    assert "--tta: of no effect with --export" in capsys.readouterr().err
