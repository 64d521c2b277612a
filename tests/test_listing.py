"""Which files of a folder are images: folders laid out by hand, and what must come out."""

from __future__ import annotations

import os
import socket
import unicodedata
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from imaging.listing import (
    BESIDE,
    COPIES,
    DRAWN,
    HIDDEN,
    NOWHERE,
    RESULTS,
    TWICE,
    UPWARDS,
    Listing,
    Lookup,
    by_drawn_names,
    in_mask_folders,
    is_drawn,
    labels_of_twins,
    natural_order,
    some_names,
    unread,
)
from utils.files import DataError


def make(root: Path, *names: str) -> Path:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    return root


def link(path: Path, target: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        path.symlink_to(target, target_is_directory=target.is_dir())
    except OSError:
        pytest.skip("links cannot be made here")


def found(listing: Listing) -> list[str]:
    return [path.relative_to(listing.folder).as_posix() for path in listing.images()]


def reasons(listing: Listing) -> dict[str, list[str]]:
    return {
        reason: sorted(path.relative_to(listing.folder).as_posix() for path in paths)
        for reason, paths in listing.left_out.items()
        if paths
    }


def test_all_suffixes_at_any_depth(tmp_path: Path) -> None:
    names = ("a.jpg", "b.JPEG", "c.jpe", "d.jfif", "e.PNG", "f.bmp", "g.tif", "h.TIFF", "i.webp")
    make(tmp_path, *names, "x/y z/k.png", "x/notes.txt")
    assert found(Listing(tmp_path)) == [*names, "x/y z/k.png"]


def test_what_systems_put_beside_files_is_named(tmp_path: Path) -> None:
    folders = ("@eaDir", "#recycle", "$RECYCLE.BIN", "System Volume Information", ".thumbnails",
               "@__thumb", "Trash", "RECYCLER", "__MACOSX")  # fmt: skip
    make(tmp_path, "a.png", "._a.png", "Thumbs.db", ".DS_Store", "~$a.docx")
    make(tmp_path, *(f"{name}/x.png" for name in folders), "#12/b.png", "@3/c.png")
    listing = Listing(tmp_path)
    assert found(listing) == ["#12/b.png", "@3/c.png", "a.png"]  # specimens are numbered so
    assert reasons(listing) == {HIDDEN: sorted([*folders, "._a.png"])}
    (line,) = listing.lines()
    assert line.startswith(
        f"{tmp_path}: 10 file(s) and folder(s) left out, hidden or of the system"
    )


@pytest.mark.parametrize(
    ("files", "left"),
    [
        (["p/predicted.jsonl", "p/classes/a.png", "p/gray/a.png", "p/overlay/a.png", "p/sheet.png"],
         ["p/classes", "p/gray", "p/overlay", "p/sheet.png"]),
        (["p/classes/a.png", "p/gray/a.png", "p/overlay/a.png"],
         ["p/classes", "p/gray", "p/overlay"]),
        (["r/1_0/state_fine.pt", "r/1_0/epoch_9/t.png", "r/1_0/sheet_fine.png", "r/1_0/curves.png"],
         ["r/1_0/curves.png", "r/1_0/epoch_9", "r/1_0/sheet_fine.png"]),
        (["r/metrics.jsonl", "r/probe_10.png", "r/sheet_sup_extremes.png"],
         ["r/probe_10.png", "r/sheet_sup_extremes.png"]),
        (["kept/epoch_19/a.png"], ["kept/epoch_19"]),
        (["ranked/ranking.csv", "ranked/ranking.png"], ["ranked/ranking.png"]),
        (["results/values.csv", "results/values.png"], ["results/values.png"]),
        (["set/prepare_report.txt", "set/train_numf/img/a.png"], ["set"]),
    ],
)  # fmt: skip
def test_own_results_are_no_images(tmp_path: Path, files: list[str], left: list[str]) -> None:
    make(tmp_path, "mine/a.png", "mine/sheet.png", "epoch_2/a.tif", *files)
    listing = Listing(tmp_path)
    assert found(listing) == ["epoch_2/a.tif", "mine/a.png", "mine/sheet.png"]
    assert reasons(listing) == {RESULTS: left}
    assert not [path for path in listing.files if path.suffix in (".jsonl", ".pt", ".csv")]


def test_images_beside_results_are_read(tmp_path: Path) -> None:
    """``--out`` may have been the folder above the images."""
    make(tmp_path, "predicted.jsonl", "classes/a.png", "img/a.png", "img/b.png")
    assert found(Listing(tmp_path)) == ["img/a.png", "img/b.png"]


def test_copies_and_masks_of_a_set_are_no_images(tmp_path: Path) -> None:
    make(tmp_path, "prepare_report.txt", "train_numf/img/a.png", "train_numf/gt/a.png")
    make(tmp_path, "sup_num1_0/img/a.png", "sup_num1_0/gt/a.png", "test_numf/img/b.png")
    listing = Listing(tmp_path)
    assert reasons(listing) == {COPIES: ["sup_num1_0"]}
    listing.say(BESIDE, in_mask_folders(listing.images(), tmp_path))
    assert found(listing) == ["test_numf/img/b.png", "train_numf/img/a.png"]


def test_links_are_followed_and_nothing_is_read_twice(tmp_path: Path) -> None:
    root = make(tmp_path / "img", "z.png", "sub/b.png")
    make(tmp_path / "disk", "heat1/c.png", "one.png")
    link(root / "a.png", root / "z.png")  # sorted before what it leads to
    link(root / "heats", tmp_path / "disk")
    link(root / "more", tmp_path / "disk" / "heat1")
    link(root / "sub" / "circle", root)
    link(root / "sub" / "up", tmp_path)
    link(root / "gone.png", tmp_path / "nothing.png")
    os.link(root / "z.png", root / "zz.png")
    listing = Listing(root)
    assert found(listing) == ["heats/heat1/c.png", "heats/one.png", "sub/b.png", "z.png"]
    assert reasons(listing) == {
        TWICE: ["a.png", "more", "sub/circle", "zz.png"],
        UPWARDS: ["sub/up"],
        NOWHERE: ["gone.png"],
    }


def test_links_into_folders_of_another_purpose_are_not_followed(tmp_path: Path) -> None:
    root = make(tmp_path / "img", "a.png")
    make(tmp_path, "gt/a.png", "run/predicted.jsonl", "run/overlay/a.png")
    link(root / "masks", tmp_path / "gt")
    link(root / "pictures", tmp_path / "run" / "overlay")
    link(root / "one.png", tmp_path / "run" / "overlay" / "a.png")
    listing = Listing(root, [tmp_path / "gt"])
    assert found(listing) == ["a.png"]
    assert reasons(listing) == {RESULTS: ["one.png", "pictures"]}


def test_what_is_no_file_is_named_and_not_opened(tmp_path: Path, monkeypatch) -> None:
    make(tmp_path, "a.png")
    os.mkfifo(tmp_path / "pipe.png")
    monkeypatch.chdir(tmp_path)  # the path of a socket is short
    with socket.socket(socket.AF_UNIX) as end:
        end.bind("s.png")
        link(tmp_path / "zero.png", Path("/dev/zero"))
        listing = Listing(tmp_path)
    assert found(listing) == ["a.png"]
    assert reasons(listing) == {
        "a pipe, no file": ["pipe.png"],
        "a socket, no file": ["s.png"],
        "a device, no file": ["zero.png"],
    }


def test_a_link_that_vanishes_while_the_folder_is_walked_leads_nowhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(tmp_path / "images", "a.png")
    link(tmp_path / "images" / "exe", tmp_path / "elsewhere")
    real = os.path.realpath

    def gone(path: str | Path, **how: bool) -> str:
        if os.path.basename(path) == "exe":  # as os.readlink does
            raise FileNotFoundError(2, "No such file or directory", str(path))
        return str(real(path, **how))

    monkeypatch.setattr(os.path, "realpath", gone)
    listing = Listing(tmp_path / "images")
    assert found(listing) == ["a.png"] and reasons(listing) == {NOWHERE: ["exe"]}


def test_names_of_a_folder_that_may_not_be_looked_into_end_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder that may be listed and not entered: of each name there is nothing but the name."""
    make(tmp_path, "a.png", "closed/b.png")
    own = {name: getattr(os, name) for name in ("stat", "lstat")}

    def refuse(name: str, path: object, **how: object) -> os.stat_result:
        if os.path.basename(os.path.dirname(str(path))) == "closed":
            raise PermissionError(13, "Permission denied", str(path))
        result: os.stat_result = own[name](path, **how)
        return result

    for name in own:
        monkeypatch.setattr(os, name, partial(refuse, name))
    listing = Listing(tmp_path)
    assert found(listing) == ["a.png"] and reasons(listing) == {NOWHERE: ["closed/b.png"]}


@pytest.mark.skipif(getattr(os, "geteuid", int)() == 0, reason="root may list every folder")
def test_a_sub_folder_that_may_not_be_listed_is_a_line(tmp_path: Path) -> None:
    make(tmp_path, "a.png", "closed/b.png")
    (tmp_path / "closed").chmod(0)
    listing = Listing(tmp_path)
    (tmp_path / "closed").chmod(0o700)
    assert found(listing) == ["a.png"] and "closed: cannot be listed" in listing.unlisted[0]


def test_a_folder_that_may_not_be_listed_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nowhere: cannot be listed"):
        Listing(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("stem", "drawn"),
    [
        ("a_mask", True), ("a-overlay", True), ("a mask (1)", True), ("a.labels", True),
        ("a_gt", True), ("mask_a", True), ("GT-a", True), ("a_segmentation2", True),
        ("a_colour", True), ("a Maske", True), ("máscara-a", True),
        ("a_1", False), ("b_mask", False), ("a", False), ("amask", False),
        ("a_masked_steel", False), ("a_segregation", False), ("unmask_a", False),
    ],
)  # fmt: skip
def test_names_of_masks_and_overlays(stem: str, drawn: bool) -> None:
    assert is_drawn(stem, {"a"}) is drawn


def test_masks_by_name_whatever_the_case_of_letters(tmp_path: Path) -> None:
    images = [tmp_path / name for name in ("A.tif", "a_MASK.png", "sub/b.tif", "b_Overlay.jpg")]
    assert by_drawn_names(images) == [images[1], images[3]]


def test_masks_by_folder_need_an_image_of_the_name_elsewhere(tmp_path: Path) -> None:
    names = ("img/a.tif", "masks/a.png", "train_masks/a_mask.png", "labels/other.png", "gtx/a.png")
    images = [tmp_path / name for name in names]
    assert in_mask_folders(images, tmp_path) == images[1:3]
    assert in_mask_folders([tmp_path / "masks" / "a.png"], tmp_path) == []


def test_of_two_suffixes_the_one_with_few_values_is_the_mask(tmp_path: Path) -> None:
    levels = np.arange(17, dtype=np.uint8)[None].repeat(20, axis=0)
    for name, values in (("a.tif", levels), ("a.png", levels % 16), ("b.png", levels % 2)):
        Image.fromarray(values).save(tmp_path / name)
    (tmp_path / "c.png").write_text("no image")
    Image.fromarray(levels % 3).save(tmp_path / "c.bmp")
    images = [tmp_path / name for name in ("a.tif", "a.png", "b.png", "c.png", "c.bmp")]
    assert labels_of_twins(images) == [tmp_path / "a.png", tmp_path / "c.bmp"]
    Image.fromarray(levels).save(tmp_path / "a.png")
    assert labels_of_twins(images[:2]) == []


def test_pictures_that_are_not_read_are_lines_and_other_files_are_not() -> None:
    lines, others = unread(map(Path, ["a.czi", "b.png", "c.txt", "d.GIF", "e"]))
    assert [line.split(":")[0] for line in lines] == ["a.czi", "d.GIF"]
    assert all("export it as TIFF or PNG" in line for line in lines)
    assert [path.name for path in others] == ["c.txt", "e"]


def test_ten_names_are_shown() -> None:
    assert some_names("abc") == "a, b, c"
    assert some_names("abcdefghijkl") == "a, b, c, d, e, f, g, h, i, j and 2 more"


def test_what_is_left_out_is_no_longer_among_the_files(tmp_path: Path) -> None:
    listing = Listing(make(tmp_path, "a.png", "a_mask.png", "b.txt"))
    listing.say(DRAWN, by_drawn_names(listing.images()))
    assert found(listing) == ["a.png"] and [path.name for path in listing.files] == [
        "a.png",
        "b.txt",
    ]
    assert listing.lines() == [f"{tmp_path}: 1 file(s) left out, {DRAWN}: a_mask.png"]


def test_names_are_sorted_as_people_count() -> None:
    """Numbers by their value, folder by folder; equal values by their text."""
    names = ["b/1", "s_10", "s_2", "s_1", "7", "s_1_10", "s_1_9", "a/x", "007", "a10/x", "a2/x"]
    assert sorted(names, key=natural_order) == [
        "007", "7", "a/x", "a2/x", "a10/x", "b/1", "s_1", "s_1_9", "s_1_10", "s_2", "s_10",
    ]  # fmt: skip


MAC = unicodedata.normalize("NFD", "Prüf_1")  # as macOS writes it: u and a mark of its own


@pytest.mark.parametrize(
    ("asked", "there", "own"),
    [
        ("a", ["a.png"], "a.png"),
        ("a", ["a.PNG"], "a.PNG"),
        ("a", ["a.PNG", "a.png"], "a.png"),  # as it is comes first
        ("a", ["a.PNG", "a.Png"], None),  # which one nobody can tell
        ("Prüf_1", [f"{MAC}.png"], f"{MAC}.png"),
        (MAC, ["Prüf_1.Png"], "Prüf_1.Png"),
        (f"{MAC}/b", ["Prüf_1/b.png"], "Prüf_1/b.png"),
        ("a", ["a.tif", "a.PNG"], "a.tif"),
        ("a", ["a.TIF", "a.PNG"], "a.PNG"),  # .png is the first suffix
        ("a", ["A.png"], "A.png"),
        ("c", ["C.png"], None),  # of the two images c and C, which are both asked for
        ("sub/a", ["SUB/A.png"], "SUB/A.png"),
        ("sub/a", ["a.png"], None),
        ("a", ["a.jpg"], None),
    ],
)
def test_a_file_named_as_another_one(
    tmp_path: Path, asked: str, there: list[str], own: str | None
) -> None:
    make(tmp_path, *there)
    if len({*os.listdir(tmp_path)}) < len({name.partition("/")[0] for name in there}):
        pytest.skip("this file system knows no letter cases")
    lookup = Lookup(tmp_path, [Path(name) for name in (asked, "c", "C")])
    expected = None if own is None else tmp_path / own
    assert lookup.find(Path(asked), (".png", ".tif")) == expected


def test_any_letter_case_counts_only_among_names_that_are_told(tmp_path: Path) -> None:
    make(tmp_path, "A.png")
    if (tmp_path / "a.png").exists():
        pytest.skip("this file system knows no letter cases")
    assert Lookup(tmp_path).find(Path("a"), (".png",)) is None
