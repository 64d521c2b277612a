"""The user's images and masks as segment.py lays them out: which class, which image, which part."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from config import ConfigError
from dataset.mask_values import Reading, parse_palette
from dataset.prepare import prepare, read_settings
from imaging import pages
from imaging.field import Crop
from imaging.imagefile import read_mask
from imaging.listing import Listing
from metallography.items import Item
from metallography.scales import find_scales
from segmentation import intake as intake_file
from segmentation.answers import Answers
from segmentation.intake import Intake, read
from segmentation.request import Request
from segmentation.set.record import SetRecord, read_record
from utils.entries import split_entries
from utils.files import DataError

SIDE = 48
RED, BLUE, BLACK = (255, 0, 0), (0, 0, 255), (0, 0, 0)


def save(path: Path, pixels: np.ndarray[Any, Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return path


def image(path: Path, seed: int = 0) -> Path:
    """A picture of noise, so that nobody takes it for a mask."""
    levels = np.random.default_rng(seed).integers(40, 200, (SIDE, SIDE))
    return save(path, levels.astype(np.uint8))


def bands(path: Path, *values: Any) -> Path:
    """A mask of bands of equal height, from the top, a value each."""
    rows = np.repeat(np.array(values, np.uint8), SIDE // len(values), axis=0)
    return save(path, np.repeat(rows[:, None], SIDE, axis=1))


def read_in(root: Path, *masks: Path, **more: Any) -> Intake:
    return read(Request(images=root / "images", masks=masks, out=root / "out", **more))


def learnt(intake: Intake) -> dict[str, list[int]]:
    """The class of each band in the labels of each annotated image."""
    read_from = {p.name: read_mask(p.labels) for p in intake.annotated if p.labels}
    return {name: list(dict.fromkeys(ids[:, 0].tolist())) for name, ids in read_from.items()}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for number, name in enumerate("abc"):
        image(tmp_path / f"images/{name}.png", number)
    return tmp_path


NAMES = ("matrix", "carbide", "pore")


def test_names_that_are_given_leave_one_meaning_to_the_values_of_all_masks(root: Path) -> None:
    masks = bands(root / "a.png", 0, 255), bands(root / "b.png", 0, 128, 255)
    assert learnt(read_in(root, *masks, class_names=NAMES)) == {"a": [0, 1], "b": [0, 2, 1]}


def test_names_that_are_given_leave_the_meaning_of_earlier_runs(root: Path) -> None:
    first, second = bands(root / "a.png", BLACK, RED), bands(root / "b.png", BLACK, BLUE, RED)
    assert learnt(read_in(root, first, class_names=NAMES[:2])) == {"a": [0, 1]}
    found = learnt(read_in(root, first, second, class_names=NAMES))
    assert found == {"a": [0, 1], "b": [0, 2, 1]}


def test_a_palette_that_renumbers_corrected_classes_is_refused_with_names_too(root: Path) -> None:
    mask = bands(root / "a.png", 0, 255)
    read_in(root, mask, class_names=NAMES[:2])
    bands(root / "out/corrected/b.png", 0, 1)
    record = {"by": "pixel classifier", "files": {"a": ["x"], "b": ["x"]}, "crop": [0, 0, 0, 0]}
    (root / "out/answer.json").write_text(json.dumps(record))
    with pytest.raises(DataError, match="corrected class map"):
        read_in(
            root, mask, class_names=NAMES[:2], reading=Reading(palette=((0, (255,)), (1, (0,))))
        )


def test_a_mask_beside_the_images_is_none_of_them(root: Path) -> None:
    """a.tif and its mask a.png in the folder of images; the mask alone is given."""
    (root / "images/a.png").unlink()
    levels = np.random.default_rng(9).integers(40, 200, (SIDE, SIDE)).astype(np.uint8)
    Image.fromarray(levels).save(root / "images/a.tif")
    intake = read_in(root, bands(root / "images/a.png", 0, 1))
    assert [p.name for p in intake.pictures] == ["a", "b", "c"]
    assert learnt(intake) == {"a": [0, 1]}


def test_a_mask_for_images_of_one_name_is_refused_with_the_place_that_tells(root: Path) -> None:
    image(root / "images/x/s7.png", 4), image(root / "images/y/s7.png", 5)
    mask = bands(root / "s7.png", 0, 1)
    with pytest.raises(DataError, match=r"2 images have its name \(x/s7.png, y/s7.png\).*x/s7.png"):
        read_in(root, mask)
    save(root / "masks/y/s7.png", np.asarray(Image.open(mask)))
    assert learnt(read_in(root, root / "masks")) == {"y/s7": [0, 1]}
    image(root / "images/x/s7.tif", 6)
    with pytest.raises(DataError, match="2 images have its name .*rename one"):
        read_in(root, bands(root / "images/x/s7_mask.png", 1, 0))
    (root / "images/x/s7.tif").unlink()
    beside = bands(root / "images/x/s7_mask.png", 1, 0)
    assert learnt(read_in(root, beside)) == {"x/s7": [1, 0]}


def test_a_mask_may_differ_from_its_image_in_the_case_of_letters(root: Path) -> None:
    assert learnt(read_in(root, bands(root / "A.png", 0, 1))) == {"a": [0, 1]}


@pytest.mark.parametrize("other", ["s7-1.png", "x_s7.png"])
def test_images_that_a_set_could_not_tell_apart_are_all_read(root: Path, other: str) -> None:
    for number, name in enumerate(("x/s7.png", "y/s7.png", other)):
        image(root / "images" / name, number)
    intake = read_in(root, bands(root / "a.png", 0, 1))
    assert len(intake.pictures) == 6 and len({p.file for p in intake.pictures}) == 6


def test_long_names_of_sub_folders_are_cut(root: Path) -> None:
    long = f"images/{'f' * 150}/{'n' * 120}.png"
    image(root / long)
    intake = read_in(root, bands(root / "a.png", 0, 1))
    assert len(intake.pictures) == 4 and all(p.file.is_file() for p in intake.pictures)


def test_results_of_an_earlier_job_are_no_images(root: Path) -> None:
    read_in(root, bands(root / "a.png", 0, 1))
    earlier = root / "images/results"
    (root / "out").rename(earlier)
    bands(earlier / "corrected/b.png", 0, 1)
    image(earlier / "doubt/b.png", 3)
    for made in ((), ("rounds.json",)):  # stopped while it was read, and later
        for name in made:
            (earlier / name).write_text("[]")
        names = {path.relative_to(root / "images").as_posix() for path in
                 Listing(root / "images").images()}  # fmt: skip
        assert names >= {"a.png", "b.png", "c.png"}
        assert not any(name.startswith("results/set") for name in names)
    assert names == {"a.png", "b.png", "c.png"}


def test_what_is_transparent_is_no_part_of_the_field(root: Path, tmp_path: Path) -> None:
    """Left half transparent: no label there, and no class in the answer."""
    levels = np.asarray(Image.open(root / "images/a.png"))
    opaque = np.full((SIDE, SIDE), 255, np.uint8)
    opaque[:, : SIDE // 2] = 0
    Image.fromarray(np.dstack([levels, opaque]), "LA").save(root / "images/a.png")
    intake = read_in(root, bands(root / "a.png", 0, 1))
    (picture,) = intake.annotated
    labels = read_mask(picture.labels)
    assert (labels[:, : SIDE // 2] == 255).all() and set(labels[:, SIDE // 2 :].flat) == {0, 1}
    shown = Image.open(picture.file)
    assert shown.mode == "RGBA"
    seen = levels.copy()  # the nearest visible pixels are those of the first visible column
    seen[:, : SIDE // 2] = levels[:, [SIDE // 2]]
    np.testing.assert_array_equal(np.asarray(shown)[..., :3], np.dstack([seen] * 3))


def test_a_given_pixel_size_is_not_asked_for(root: Path) -> None:
    levels = np.random.default_rng(3).integers(40, 200, (SIDE, SIDE)).astype(np.uint8)
    (root / "images/a.png").unlink()
    Image.fromarray(levels).save(root / "images/a.tif", resolution_unit=3, x_resolution=100000.0,
                                 y_resolution=50000.0)  # fmt: skip
    mask = bands(root / "a.png", 0, 1)
    told = read_in(root, mask, um_per_px=0.3)
    assert not any("um_per_px" in line for line in (*told.warnings, *told.notes))
    items = [Item(p.source, p.name) for p in told.pictures]
    for given, asked in ((None, True), (0.3, False)):  # of the scales, which are told once
        lines = find_scales(items, root / "images", given, None).lines
        assert any("not square" in line and "give --um_per_px" in line for line in lines) == asked


def test_transparent_pixels_of_a_mask_hide_one_value_at_most(root: Path) -> None:
    """A drawing on a transparent layer is read; erased paint, still red there, is refused."""
    red = np.zeros((SIDE, SIDE), bool)
    red[SIDE // 2 :] = True
    colours = np.where(red[..., None], RED, BLACK).astype(np.uint8)
    drawn = np.where(red, 255, 0).astype(np.uint8)
    save(root / "a.png", np.dstack([colours, drawn]))
    assert learnt(read_in(root, root / "a.png")) == {"a": [0, 1]}
    drawn[-8:] = 0
    save(root / "a.png", np.dstack([colours, drawn]))
    with pytest.raises(DataError, match="transparent pixels hide several values.*255,0,0; flatten"):
        read_in(root, root / "a.png")


def test_a_correction_of_before_a_crop_is_cut_as_its_image(root: Path) -> None:
    mask = bands(root / "a.png", 0, 1)
    read_in(root, mask)
    bands(root / "out/corrected/b.png", 0, 1, 1)
    intake = read_in(root, mask, reading=Reading(crop=Crop(bottom=24)))
    (b,) = (read_mask(p.labels) for p in intake.annotated if p.name == "b" and p.labels)
    assert b.shape == (SIDE - 24, SIDE) and (b[:16] == 0).all() and (b[16:] == 1).all()


def published(root: Path, intake: Intake, ids: np.ndarray[Any, Any]) -> Answers:
    """An answer that is the same for all images."""
    for kind in ("classes", "gray", "overlay", "doubt"):
        for picture in intake.pictures:
            save(root / "work" / kind / f"{picture.name}.png", ids)
    answers, names = Answers(root / "out"), [p.name for p in intake.pictures]
    answers.publish(
        root / "work", names, "me", intake.class_names, intake.crop, intake.fingerprints
    )
    return Answers(root / "out")


ZEROS = np.zeros((SIDE, SIDE), np.uint8)


@pytest.mark.parametrize("kept", [False, True])
def test_a_correction_is_no_label_of_another_picture_of_its_name(root: Path, kept: bool) -> None:
    """Neither one that was learnt from already, nor one that no run has seen."""
    mask = bands(root / "a.png", 0, 1)
    published(root, read_in(root, mask), ZEROS)
    save(root / "out/classes/b.png", ZEROS + 1)
    if kept:
        assert learnt(read_in(root, mask)) == {"a": [0, 1], "b": [1]}
    image(root / "images/b.png", seed=7)
    place = "corrected" if kept else "classes"
    for _ in range(2):
        with pytest.raises(
            DataError, match=rf"{place}.b\.png: drawn on another picture than .*b\."
        ):
            read_in(root, mask)
    (root / "mine").mkdir()  # it is right for this one, too: the message says how to say so
    (root / f"out/{place}/b.png").rename(root / "mine/b.png")
    assert learnt(read_in(root, mask, root / "mine")) == {"a": [0, 1], "b": [1]}


def test_a_correction_stays_when_its_picture_is_saved_anew_or_cut(root: Path) -> None:
    mask = bands(root / "a.png", 0, 1)
    published(root, read_in(root, mask), ZEROS)
    save(root / "out/classes/b.png", ZEROS + 1)
    path, same = root / "images/b.png", {"a": [0, 1], "b": [1]}
    assert learnt(read_in(root, mask)) == same
    pixels = np.asarray(Image.open(path))
    Image.fromarray(np.dstack([pixels] * 3)).save(path, compress_level=0)  # gray, as RGB
    assert learnt(read_in(root, mask)) == same
    assert learnt(read_in(root, mask, reading=Reading(crop=Crop(0, 8, 0, 0)))) == same
    # A map that somebody puts in the place of a kept one tells nothing of its picture.
    image(path, seed=7)
    save(root / "out/corrected/b.png", ZEROS)
    assert learnt(read_in(root, mask)) == {"a": [0, 1], "b": [0]}


def test_a_correction_of_an_earlier_version_is_taken_as_it_is(root: Path) -> None:
    """That noted of no picture how it looked."""
    mask, path = bands(root / "a.png", 0, 1), root / "out/answer.json"
    published(root, read_in(root, mask), ZEROS)
    known = json.loads(path.read_text())
    for name in ("fingerprints", "drawn_on"):
        del known[name]
    path.write_text(json.dumps(known))
    save(root / "out/classes/b.png", ZEROS + 1)
    image(root / "images/b.png", seed=7)
    assert learnt(read_in(root, mask)) == {"a": [0, 1], "b": [1]}


def test_corrected_class_maps_alone_ask_for_the_mask(root: Path) -> None:
    read_in(root, bands(root / "a.png", 0, 1))
    bands(root / "out/corrected/b.png", 0, 1, 1)
    (root / "out/classes").mkdir()
    with pytest.raises(DataError, match="out: give --masks the mask that you began with, too"):
        read_in(root, root / "out/classes")


def test_lines_on_a_single_mask_name_the_users_file(root: Path) -> None:
    image(root / "images/x/s7.png", 4)
    mask = save(root / "s7.png", np.zeros((SIDE // 2, SIDE), np.uint8))
    with pytest.raises(DataError, match=f"^{re.escape(str(mask))}: 48x24"):
        read_in(root, mask)


def test_the_image_that_is_like_the_mask_is_the_example(root: Path) -> None:
    image(root / "images/A17 heat treated.png", 4)
    with pytest.raises(DataError, match="such as A17 heat treated.png"):
        read_in(root, bands(root / "A17_mask.png", 0, 1))


def test_an_empty_folder_of_masks_is_said_to_be_empty(root: Path) -> None:
    (root / "masks").mkdir()
    with pytest.raises(DataError, match="masks: no mask in it; give the file of a mask"):
        read_in(root, root / "masks")


def labelled(path: Path, labels: list[str], kind: str) -> Path:
    """Outlines of two rows of squares, a label each, from the left."""
    squares = [[[x, 4], [x + 8, 4], [x + 8, 12], [x, 12], [x, 4]] for x in (2, 14, 26, 38)]
    both = list(zip(labels, squares, strict=False))
    if kind == "labelme":
        shapes = [{"label": n, "shape_type": "polygon", "points": at[:4]} for n, at in both]
        content: Any = {"shapes": shapes, "imageHeight": SIDE, "imageWidth": SIDE}
    else:
        content = {"type": "FeatureCollection", "features": [
            {"type": "Feature", "geometry": {"type": "Polygon", "coordinates": [at]},
             "properties": {"classification": {"name": n}}} for n, at in both]}  # fmt: skip
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


COMMAS = ["M/A, α' laths", 'a "b", c', "pore"]


@pytest.mark.parametrize("kind", ["labelme", "geojson"])
def test_class_names_may_hold_commas(root: Path, kind: str) -> None:
    first = labelled(root / f"a.{'json' if kind == 'labelme' else kind}", COMMAS, kind)
    intake = read_in(root, first)
    (mask,) = (read_mask(p.labels) for p in intake.annotated if p.labels)
    assert intake.class_names == ("background", 'a "b", c', "M/A, α' laths", "pore")
    assert mask[8, [5, 17, 29, 41]].tolist() == [2, 1, 3, 0]
    (line,) = (note for note in intake.notes if "--class_names" in note)
    told = shlex.split(line[line.index("--class_names") :])[1]
    assert split_entries(told) == intake.class_names  # as a shell would give it
    second = labelled(root / f"b.{first.suffix[1:]}", COMMAS[::-1], kind)  # known from then on
    assert read_in(root, first, second).class_names == intake.class_names


@pytest.mark.parametrize(
    ("given", "drawn", "expected"),
    [
        (("matrix", "net", "pore"), ["matrix", "NET", "pore", "ignore"], ()),
        (("matrix", "net"), ["net", "void", "carbide"], ("carbide", "void")),
        (("matrix", "net"), ["1", "matrix"], ()),  # a number is the id
        (("class 0", "class 1"), ["3", "1"], ("class 2", "class 3")),
        (("matrix", "net"), ["background", "net"], ()),
    ],
)
def test_names_once_given_hold_in_later_runs(
    root: Path, given: tuple[str, ...], drawn: list[str], expected: tuple[str, ...]
) -> None:
    first = labelled(root / "a.json", [given[1], given[0], given[1]], "labelme")
    assert read_in(root, first, class_names=given).class_names == given
    second = labelled(root / "b.json", drawn, "labelme")
    assert read_in(root, first, second).class_names == (*given, *expected)


def test_names_of_outlines_beside_a_mask_of_pixels_are_given_in_the_order_of_its_ids(
    root: Path,
) -> None:
    """The line that says which option is missing is one that a shell understands."""
    (root / "masks").mkdir()
    labelled(root / "masks/a.json", COMMAS, "labelme")
    bands(root / "masks/b.png", 0, 1, 2, 3)
    settings = ["--images", str(root / "images"), "--masks", str(root / "masks")]
    settings += ["--out", str(root / "made"), "--test", "0"]
    with pytest.raises(DataError, match="say which class is which id") as caught:
        prepare(read_settings(settings))
    words = shlex.split(str(caught.value).partition("which id: ")[2])
    known = set_file_of(prepare, [*settings, *words], root / "made")
    assert known == ["background", 'a "b", c', "M/A, α' laths", "pore"]


def set_file_of(make: Any, words: list[str], made: Path) -> list[str]:
    """The names in ``set.json`` of a set that is made by these words."""
    make(read_settings(words))
    return list(json.loads((made / "set.json").read_text(encoding="utf-8"))["class_names"])


@pytest.mark.parametrize("label", ["grids", "numbered"])
def test_names_of_classes_say_nothing_of_how_masks_were_read(root: Path, label: str) -> None:
    """``grids`` holds ``ids``, and no class of it is the background here."""
    shape = {"label": label, "shape_type": "rectangle", "points": [[0, 0], [SIDE, SIDE]]}
    pore = {"label": "pore", "shape_type": "rectangle", "points": [[3, 3], [9, 9]]}
    content = {"shapes": [shape, pore], "imageHeight": SIDE, "imageWidth": SIDE}
    (root / "a.json").write_text(json.dumps(content), encoding="utf-8")
    warned = [line for line in read_in(root, root / "a.json").warnings if "class 0" in line]
    assert warned == []


def test_images_without_a_mask_are_those_to_be_segmented(root: Path) -> None:
    intake = read_in(root, bands(root / "a.png", 0, 1))
    assert intake.notes[-1] == "2 image(s) without labels, to be segmented: b.png, c.png"
    bands(root / "images/a_mask.png", 0, 1)
    intake = read_in(root, root / "images", reading=Reading(mask_pattern="{stem}_mask.png"))
    assert intake.notes[-1] == "2 image(s) without labels, to be segmented: b.png, c.png"
    assert not any("without a mask" in line for line in intake.warnings)
    (root / "images/a_mask.png").unlink()
    (root / "masks").mkdir()
    intake = read_in(root, bands(root / "masks/a.png", 0, 1), bands(root / "b.png", 0, 1))
    assert not any("without a mask" in line for line in (*intake.notes, *intake.warnings))


def test_results_among_the_files_of_the_user_are_refused(root: Path) -> None:
    (root / "masks").mkdir()
    bands(root / "masks/a.png", 0, 1)
    told = "which is the folder of {}, or holds it; give another"
    cases = {root / "images": "--images", root: "--images", root / "masks": "--masks .*masks"}
    for out, option in cases.items():
        with pytest.raises(ConfigError, match=f"--out: found {out}, {told.format(option)}"):
            Request(images=root / "images", masks=(root / "masks",), out=out)
    Request(images=root / "images", masks=(root / "masks",), out=root / "images/new")  # beside them


@pytest.mark.parametrize("place", [0, 1, 3])
def test_a_record_whose_names_lead_elsewhere_is_made_anew(root: Path, place: int) -> None:
    mask = bands(root / "a.png", 0, 1)
    before = read_in(root, mask)
    path = root / "out/set/record.json"
    record = json.loads(path.read_text(encoding="utf-8"))
    record["pictures"][1][place] = "../../b"
    path.write_text(json.dumps(record), encoding="utf-8")
    assert read_in(root, mask).pictures == before.pictures


YELLOW = (255, 255, 0)


def test_names_on_colours_in_an_order_that_nobody_gave_are_warned_of(root: Path) -> None:
    mask = bands(root / "a.png", YELLOW, BLACK, BLACK, BLUE)
    first = read_in(root, mask, class_names=NAMES)
    said = [line for line in first.warnings if line.startswith("Names in the order")]
    assert len(said) == 1
    assert "of the colours, dark to bright: matrix = black (0,0,0), 50.0% of the labels" in said[0]
    assert "carbide = blue (0,0,255), 25.0% of the labels; pore = yellow (255,255,0)" in said[0]
    palette = "0=0,0,0 1=0,0,255 2=255,255,0"
    assert f'give --palette "{palette}", with the numbers changed' in said[0]
    more = bands(root / "b.png", BLACK, YELLOW)  # read by what is known: still nobody's order
    assert said[0][:50] in [line[:50] for line in read_in(root, mask, more).warnings]
    given = read_in(root, mask, class_names=NAMES, reading=Reading(palette=parse_palette(palette)))
    assert not [line for line in given.warnings if line.startswith("Names in the order")]


@pytest.mark.parametrize("values", [(0, 1, 2), (BLACK, BLUE, YELLOW)])
def test_names_of_class_ids_and_classes_without_names_are_no_warning(root: Path, values) -> None:
    mask = bands(root / "a.png", *values)
    names = NAMES if values == (0, 1, 2) else ()
    warned = read_in(root, mask, class_names=names).warnings
    assert not [line for line in warned if line.startswith("Names in the order")]


def test_gray_levels_in_an_order_that_nobody_gave_are_warned_of(root: Path) -> None:
    warned = read_in(root, bands(root / "a.png", 0, 128, 255), class_names=NAMES).warnings
    assert any("gray levels, dark to bright: matrix = 0, 33.3% of the labels" in w for w in warned)


def test_the_colours_of_a_mask_are_those_of_its_classes(root: Path) -> None:
    mask = bands(root / "a.png", BLACK, BLUE, YELLOW)
    assert read_in(root, mask).class_colours == ("333333", "0000ff", "ffff00")
    own = ("111111", "aaaaaa", "bbbbbb")
    found = read_in(root, mask, class_colours=own)
    assert found.class_colours == own
    assert read_in(root, mask).class_colours == own  # as an earlier run was told
    drawn = ("333333", "0000ff", "ffff00")
    assert read_in(root, mask, class_colours=("auto",)).class_colours == drawn
    assert read_in(root, mask).class_colours == drawn
    assert read_in(root, mask, class_colours=own).class_colours == own
    with pytest.raises(DataError, match="--class_colours: found 1 values; allowed"):
        read_in(root, mask, class_colours=("111111",))


def test_colours_that_do_not_fit_are_told_before_anything_is_written(root: Path) -> None:
    mask = bands(root / "a.png", BLACK, BLUE, YELLOW)
    with pytest.raises(DataError, match="--class_colours: found 1 values; allowed"):
        read_in(root, mask, class_colours=("111111",))
    assert [*(root / "out").iterdir()] == []


def test_colours_of_fewer_classes_are_said_to_be_lost(root: Path) -> None:
    mask = bands(root / "a.png", BLACK, BLUE)
    assert read_in(root, mask, class_colours=("111111", "aaaaaa")).class_colours[1] == "aaaaaa"
    found = read_in(root, mask, bands(root / "b.png", BLACK, BLUE, YELLOW))
    assert found.class_colours == ("333333", "0000ff", "ffff00")
    said = "--class_colours of an earlier run are 2, the masks have 3 classes: they are not used"
    assert [line for line in found.warnings if line.startswith(said)] == [
        f"{said} any more; give 3 colours"
    ]


def test_equal_pages_are_named_by_page(root: Path) -> None:
    page = np.random.default_rng(7).integers(40, 200, (SIDE, SIDE)).astype(np.uint8)
    pages = [Image.fromarray(p) for p in (page, 255 - page, page)]
    pages[0].save(root / "images/s.tif", save_all=True, append_images=pages[1:])
    found = read_in(root, bands(root / "a.png", 0, 255))
    (said,) = (line for line in found.warnings if "equal to another one" in line)
    assert "pixel by pixel: s-p3.tif (as s-p1.tif);" in said


def test_masks_without_colours_leave_the_usual_ones(root: Path) -> None:
    assert read_in(root, bands(root / "a.png", 0, 128, 255)).class_colours == ()


def test_results_of_another_folder_are_not_overwritten(root: Path, tmp_path: Path) -> None:
    mask = bands(root / "a.png", 0, 255)
    read_in(root, mask)
    for number, name in enumerate("abc", start=7):
        image(tmp_path / f"other/images/{name}.png", number)
    other = Request(images=tmp_path / "other/images", masks=(mask,), out=root / "out")
    said = f"{root / 'out'}: holds the results of {root / 'images'}; give another --out"
    with pytest.raises(DataError, match=f"^{re.escape(said)}$"):
        read(other)
    shutil.copy(root / "images/b.png", tmp_path / "other/images/b.png")
    assert len(read(other).pictures) == 3  # a folder with an image of the job's is the job's


def test_a_folder_that_was_moved_goes_on(root: Path) -> None:
    mask = bands(root / "a.png", 0, 255)
    read_in(root, mask)
    (root / "images").rename(root / "new")
    image(root / "new/d.png", 5)
    moved = Request(images=root / "new", masks=(mask,), out=root / "out")
    assert len(read(moved).pictures) == 4


def test_copies_of_an_image_are_warned_of_and_stay(root: Path) -> None:
    shutil.copy(root / "images/a.png", root / "images/a - Kopie (2).png")
    (root / "images/a.png").rename(root / "images/a annotated, of a long name.png")
    mask = bands(root / "a annotated, of a long name.png", 0, 255)
    found = read_in(root, mask)
    said = [line for line in found.warnings if "equal to another one" in line]
    assert said == [
        "1 image(s) equal to another one, pixel by pixel: a - Kopie (2).png (as a annotated, of a "
        "long name.png); each counts as a field, so intervals are too narrow: take these away"
    ]
    assert len(found.pictures) == 4


def meanwhile(monkeypatch: pytest.MonkeyPatch, saved: Callable[[], Path]) -> None:
    """Have a user save a file while it is read: its pixels are read, the record is not written."""
    write = intake_file._write

    def written(*args: Any) -> Any:
        found = write(*args)
        path = saved()
        os.utime(path, ns=(path.stat().st_atime_ns, path.stat().st_mtime_ns + 10**9))
        return found

    monkeypatch.setattr(intake_file, "_write", written)


@pytest.mark.parametrize("changed", ["a.png", "images/b.png", "masks/c.png"])
def test_a_file_that_is_saved_while_it_is_read_is_read_by_the_next_run(
    root: Path, changed: str
) -> None:
    masks = bands(root / "a.png", 0, 1), bands(root / "masks/c.png", 0, 1).parent
    with pytest.MonkeyPatch.context() as patch:
        meanwhile(patch, lambda: bands(root / changed, 1, 0, 1))
        first = read_in(root, *masks)
    old = {p.name: read_mask(p.labels or p.file).tolist() for p in first.pictures}
    record = root / "out/set/record.json"
    new = {p.name: read_mask(p.labels or p.file).tolist() for p in read_in(root, *masks).pictures}
    assert [name for name in old if old[name] != new[name]] == [Path(changed).stem]
    before = record.stat().st_mtime_ns
    read_in(root, *masks)
    assert record.stat().st_mtime_ns == before  # nothing has changed since


@pytest.mark.parametrize("place", ["classes/b.png", "classes/b.tif", "corrected/b.png"])
@pytest.mark.parametrize("given", [True, False])
def test_a_correction_that_is_saved_while_it_is_read_is_read_by_the_next_run(
    root: Path, place: str, given: bool
) -> None:
    """One that was there before, or one that came meanwhile."""
    mask = bands(root / "a.png", 0, 1)
    read_in(root, mask)
    file = {"by": "pixel classifier", "files": {"a": ["x"], "b": ["x"]}, "crop": [0, 0, 0, 0]}
    (root / "out/answer.json").write_text(json.dumps(file))
    if given:
        bands(root / "out" / place, 0, 1)
    else:
        bands(root / "out/corrected/c.png", 0, 1)  # for the set to be made anew
    with pytest.MonkeyPatch.context() as patch:
        meanwhile(patch, lambda: bands(root / "out" / place, 1, 0))
        found = learnt(read_in(root, mask))
    assert found.get("b") == ([0, 1] if given else None)
    assert learnt(read_in(root, mask))["b"] == [1, 0]
    record = root / "out/set/record.json"
    before = record.stat().st_mtime_ns
    read_in(root, mask)
    assert record.stat().st_mtime_ns == before


def test_files_are_listed_and_asked_for_their_pages_few_times(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened, walked = Counter[str](), Counter[Path]()
    directories, listed = pages._directories, Listing.__init__

    def counted(path: str | Path) -> Any:
        opened[Path(path).name] += 1
        return directories(path)

    def listing(self: Listing, folder: Path, *more: Any) -> None:
        walked[folder] += 1
        listed(self, folder, *more)

    monkeypatch.setattr(pages, "_directories", counted)
    monkeypatch.setattr(Listing, "__init__", listing)
    mask, images = bands(root / "a.png", 0, 1), root / "images"
    read_in(root, mask)
    # By the list of files, to find the mask's image, by Pairs 3 times, by Plan, for transparency
    # 3 times: for the gray range, for what is written, and to look at it.
    assert opened["b.png"] <= 9 and walked[images] <= 3
    opened.clear(), walked.clear()
    read_in(root, mask)
    assert (opened["b.png"], walked[images]) == (1, 1)  # nothing has changed


# As a version 5 of before ``SetRecord`` wrote it, and what came to it since.
WRITTEN = """{"signature": [[5, {"crop": [0, 8, 0, 0]}, false, "/i", "a", "b"],
["/i/x.png", 4724, 3]], "num_classes": 2, "pixels": 5760,
"palette": "0=0,0,0 1=255,0,0", "crop": [0, 8, 0, 0],
"gray_range": [149.0, 59952.0], "notes": ["masks: colours"], "warnings": [],
"pictures": [["s/x", "s__x", true, "s/x.png"]], "class_names": ["a", "b"], "mask_kind": "",
"images": "/i", "class_colours": ["333333", "ff0000"], "own_colours": [], "our_order": true,
"fingerprints": {"s/x": ["0123456789abcdef"]}}"""


def test_a_record_is_read_as_it_was_always_written(tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    path.write_text(WRITTEN)
    record, whole = read_record(path)
    assert whole and json.loads(record.to_json()) == json.loads(WRITTEN)
    assert (record.crop, record.class_names) == (Crop(0, 8, 0, 0), ("a", "b"))
    assert (record.pictures[0].annotated, record.pictures[0].below) == (True, "s/x.png")
    path.write_text(record.to_json())
    assert read_record(path) == (record, True)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("signature", "x"), ("images", 3), ("pictures", [["a", "a", True]]), ("num_classes", "2"),
        ("pixels", None), ("palette", "0=x"), ("class_names", "ab"), ("class_names", [1]),
        ("mask_kind", []), ("crop", "x"), ("crop", [0, 1]), ("crop", [0, 0, 0, -1]),
        ("class_colours", None), ("own_colours", {}), ("our_order", "yes"), ("notes", "n"),
        ("warnings", [None]), ("fingerprints", {"a": 3}), ("fingerprints", [1]), ("our_order", ...),
    ],
)  # fmt: skip
def test_what_is_damaged_in_a_record_is_not_known_and_the_rest_is(
    tmp_path: Path, name: str, value: object
) -> None:
    path = tmp_path / "record.json"
    path.write_text(WRITTEN)
    sound, _ = read_record(path)
    damaged = json.loads(WRITTEN) | {name: value}
    if value is ...:  # of an earlier version
        del damaged[name]
    path.write_text(json.dumps(damaged))
    expected = replace(sound, **{name: getattr(SetRecord(), name)})
    assert read_record(path) == (expected, False)


@pytest.mark.parametrize("text", ["", "[]", "3", "null", '"x"', "{"])
def test_a_file_that_is_no_record_tells_nothing(tmp_path: Path, text: str) -> None:
    (tmp_path / "record.json").write_text(text)
    assert read_record(tmp_path / "record.json") == (SetRecord(), False)
    assert read_record(tmp_path / "none.json") == (SetRecord(), False)


def test_a_set_whose_record_is_damaged_is_made_anew(root: Path) -> None:
    mask = bands(root / "a.png", BLACK, RED)
    before = read_in(root, mask, class_names=("matrix", "carbide"))
    path = root / "out/set/record.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"class_colours": "x"}))
    again = read_in(root, mask, class_names=("matrix", "carbide"))
    assert again.class_colours == before.class_colours != () and read_record(path)[1]
