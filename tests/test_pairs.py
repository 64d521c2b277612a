"""Which files of a user's folders are images and masks, and what is said of the others."""

import csv
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_prepare import COLOURS, STRIPES, gray, ids_of, palette_image, png, run, write_raw
from tiny_set import noise_set

from data import find_split
from dataset import prepare as program
from dataset.check import check_data
from dataset.pairs import Pairs
from utils.files import SYSTEM_NAMES, DataError


def put(path: Path, contents: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(contents)


def unlabelled(root: Path) -> list[str]:
    return [sample.name for sample in find_split(root, "train_unlabelled")]


def in_palette(order) -> bytes:
    """STRIPES, stripe k in COLOURS[k], where colour k stands at index order[k]."""
    picture = Image.fromarray(np.array(order, np.uint8)[STRIPES])
    table = dict(zip(order, COLOURS, strict=True))
    picture.putpalette([level for index in range(max(order) + 1) for level in table[index]])
    return png(picture)


# ---------------------------------------------------------------- palettes


@pytest.mark.parametrize("order", [[0, 2, 1, 3], [3, 2, 1, 0]])
def test_palettes_are_compared_by_colour(tmp_path, capsys, order):
    write_raw(tmp_path, [in_palette([0, 1, 2, 3]), in_palette(order)] * 2)
    assert run(tmp_path) == 0
    report = capsys.readouterr().out
    assert "warning: palettes differ (index" in report and "--mask_kind ids" in report
    for ids in ids_of(tmp_path / "set").values():  # black, blue, red, green: from dark to bright
        np.testing.assert_array_equal(ids, np.array([0, 2, 1, 3])[STRIPES])
    assert run(tmp_path, "--mask_kind", "ids", out="by_index") == 0
    assert "read by index, as asked" in capsys.readouterr().out
    np.testing.assert_array_equal(
        ids_of(tmp_path / "by_index")["1_s1_0_0"], np.array(order)[STRIPES]
    )


def test_a_colour_at_two_indices_is_one_class(tmp_path, capsys):
    """No index has two colours among the pixels, but red is 1 in one mask and 3 in the other."""
    one, other = (Image.fromarray(STRIPES // 2 * index) for index in (1, 3))
    one.putpalette([0, 0, 0, 255, 0, 0])
    other.putpalette([0, 0, 0, 0, 9, 0, 0, 0, 9, 255, 0, 0])
    write_raw(tmp_path, [png(one), png(other)])
    assert run(tmp_path) == 0
    assert "colour (255, 0, 0) has index 1 in 0_s0_0_0.png, 3 in 1_s1" in capsys.readouterr().out
    for ids in ids_of(tmp_path / "set").values():
        np.testing.assert_array_equal(ids, STRIPES // 2)


def test_palettes_that_differ_in_unused_colours_are_one(tmp_path, capsys):
    longer = palette_image([*COLOURS, (9, 9, 9), (8, 8, 8)])
    write_raw(tmp_path, [png(palette_image(COLOURS)), png(longer), png(STRIPES)])
    assert run(tmp_path) == 0
    assert "palettes differ" not in capsys.readouterr().out
    for ids in ids_of(tmp_path / "set").values():
        np.testing.assert_array_equal(ids, STRIPES)


def test_palette_files_beside_masks_in_colours(tmp_path, capsys):
    colours = np.array(COLOURS, np.uint8)[STRIPES]
    write_raw(tmp_path, [png(palette_image(COLOURS)), png(colours)])
    assert run(tmp_path) == 0
    assert "some masks in colours: palette files are read by colour" in capsys.readouterr().out
    for ids in ids_of(tmp_path / "set").values():
        np.testing.assert_array_equal(ids, np.array([0, 2, 1, 3])[STRIPES])


def test_a_gray_mask_among_palettes_that_differ_is_refused(tmp_path, capsys):
    write_raw(tmp_path, [in_palette([0, 1, 2, 3]), in_palette([0, 2, 1, 3]), png(STRIPES)])
    assert run(tmp_path) == 2
    assert "2_s2_0_0.png: gray, where other masks have palettes" in capsys.readouterr().err


def test_training_refuses_palettes_that_differ(tmp_path):
    root = noise_set(tmp_path)
    for number, split in enumerate(("sup_num1_0", "test_numf")):
        path = sorted((root / split / "gt").iterdir())[0]
        mask = Image.fromarray(np.asarray(Image.open(path)))
        mask.putpalette([level for c in (COLOURS, COLOURS[::-1])[number] for level in c])
        mask.save(path)
        if number == 0:
            check_data(root, num_classes=4)
    with pytest.raises(DataError, match="palettes of masks differ: index 0 is .*; save all masks"):
        check_data(root, num_classes=4)


# ---------------------------------------------------------------- class ids


def test_ids_from_1_are_announced_with_the_palette_that_mends_them(tmp_path, capsys):
    write_raw(tmp_path, [png(STRIPES + 1)] * 3)
    assert run(tmp_path) == 0
    warning = next(x for x in capsys.readouterr().out.splitlines() if "class 0 is in no" in x)
    assert warning.startswith("warning: ") and '--palette "0=1 1=2 2=3 3=4"' in warning
    assert run(tmp_path, "--palette", "0=1 1=2 2=3 3=4", out="mended") == 0
    assert "class 0 is in no" not in capsys.readouterr().out
    for ids in ids_of(tmp_path / "mended").values():
        np.testing.assert_array_equal(ids, STRIPES)


def test_ids_from_1_with_unlabelled_pixels(tmp_path, capsys):
    write_raw(tmp_path, [png(np.array([1, 2, 3, 255], np.uint8)[STRIPES])] * 3)
    assert run(tmp_path) == 0
    assert '--palette "0=1 1=2 2=3 ignore=255"' in capsys.readouterr().out


def test_ids_of_which_one_mask_lacks_0_are_no_warning(tmp_path, capsys):
    write_raw(tmp_path, [png(STRIPES), png(np.maximum(STRIPES, 1))])
    assert run(tmp_path) == 0
    assert "class 0 is in no" not in capsys.readouterr().out


# ---------------------------------------------------------------- no mask: what is there instead


@pytest.mark.parametrize(
    ("files", "said"),
    [
        (["{0}-tag-pore-0.png", "{0}-tag-carbide-0.png"], ["-tag-", '"{stem}-tag-{class}-0.png"']),
        (["pore/{0}_x.png", "carbide/{0}_x.png"], ["pore/", '"{class}/{stem}_x.png"']),
        (["{0}/pore.png", "{0}/carbide.png"], ["/pore.png", '"{stem}/{class}.png"']),
        (["{0}.json"], ["0_s0_0_0.json", "JSON of another kind", "export"]),
        (["instances.json"], ["instances.json", "JSON of another kind", "export"]),
        (["{0}.xml"], ["0_s0_0_0.xml", "XML", "not read"]),
        (["{0}.txt"], ["0_s0_0_0.txt", "TXT", "not read"]),
        (["{0}_mask.png"], ["0_s0_0_0_mask.png", '--mask_pattern "{stem}_mask.png"']),
        (["m{0}.png"], ["m0_s0_0_0.png", "--mask_pattern"]),
    ],
)
def test_what_is_there_in_place_of_masks_is_named(tmp_path, capsys, files, said):
    for stem in write_raw(tmp_path, [None] * 3):
        for name in files:
            put(tmp_path / "gt" / name.format(stem), png(STRIPES) if "png" in name else b"{}")
    assert run(tmp_path) == 2
    captured = capsys.readouterr()
    first = captured.err.splitlines()[0]
    assert "no image has a mask" in first and ";" in first, captured.err
    assert all(text in first for text in said), first


def test_masks_of_one_class_each_in_folders_are_not_taken_for_each_other(tmp_path, capsys):
    for stem in write_raw(tmp_path, [None] * 3):
        for name in ("pore", "carbide"):
            put(tmp_path / "gt" / name / f"{stem}.png", png(STRIPES))
    assert run(tmp_path) == 2
    told = capsys.readouterr().err
    assert "2 masks (carbide/0_s0_0_0.png, pore/0_s0_0_0.png)" in told
    assert '--mask_pattern "{class}/{stem}.png"' in told


def test_outlines_and_files_of_one_class_beside_masks_are_named(tmp_path, capsys):
    stems = write_raw(tmp_path, [png(STRIPES)] * 3)
    for name in ("-pore.png", "-carbide.png", ".json"):
        put(tmp_path / "gt" / f"{stems[0]}{name}", png(STRIPES))
    put(tmp_path / "img" / "notes.docx", b"x")
    assert run(tmp_path) == 0
    report = capsys.readouterr().out
    assert f"{stems[0]}.json: 1 file(s) of outlines are not read" in report
    assert "2 mask(s) without an image; not used; files of one class each" in report
    assert "notes.docx: 1 file(s) among the images not read" in report


# ---------------------------------------------------------------- folders


def in_heats(folder: Path, name: str = "{0}_a") -> None:
    for number in range(6):
        place = ("", "heat2/", "heat2/b/")[number // 2]
        put(folder / "img" / place / f"{name.format(number)}.png", png(gray(number)))
        put(folder / "gt" / place / f"{name.format(number)}.png", png(np.roll(STRIPES, number)))


def test_sub_folders_are_read_and_named(tmp_path, capsys):
    in_heats(tmp_path)
    assert run(tmp_path) == 0
    report = capsys.readouterr().out
    assert "4 image(s) from sub-folders: heat2 (2), heat2/b (2)" in report
    found = ids_of(tmp_path / "set")
    assert sorted(found) == [f"{number}_a" for number in range(6)]
    for name, ids in found.items():
        np.testing.assert_array_equal(ids, np.roll(STRIPES, int(name[0])))
    with open(tmp_path / "set" / "prepare_sources.csv", encoding="utf-8") as file:
        rows = {row["name"]: row for row in csv.DictReader(file) if "sup" not in row["split"]}
    assert rows["5_a.png"]["file"] == "heat2/b/5_a.png" and rows["0_a.png"]["file"] == "0_a.png"
    assert rows["5_a.png"]["batch"] == "5"  # of the file name


def test_masks_in_one_folder_for_images_in_several(tmp_path):
    in_heats(tmp_path)
    for path in list((tmp_path / "gt").rglob("*.png")):
        path.rename(tmp_path / "gt" / path.name)
    assert run(tmp_path) == 0
    for name, ids in ids_of(tmp_path / "set").items():
        np.testing.assert_array_equal(ids, np.roll(STRIPES, int(name[0])))


@pytest.mark.parametrize("table", [False, True])
def test_the_batch_from_the_folder(tmp_path, capsys, table):
    """Equal names in several folders keep their own masks, and need --batch_from."""
    for heat in range(3):
        for number in range(2):
            mask = png(np.roll(STRIPES, heat * 2 + number))
            put(tmp_path / "img" / f"heat{heat}" / f"{number}.png", png(gray(heat)))
            put(tmp_path / "gt" / f"heat{heat}" / f"{number}.png", mask)
    assert run(tmp_path) == 2
    assert "in another folder; rename one, or give --batch_from" in capsys.readouterr().err
    batch_from = r"^heat(\d+)/(\d+)"
    if table:
        rows = [f"heat{h}/{n}.png,{h},{n}" for h in range(3) for n in range(2)]
        batch_from = str(tmp_path / "t.csv")
        Path(batch_from).write_text("\n".join(["file,batch,sample", *rows]))
    assert run(tmp_path, "--batch_from", batch_from) == 0
    assert "without an image" not in capsys.readouterr().out
    found = ids_of(tmp_path / "set")
    assert sorted(found) == [f"{h}_{n}_0_0" for h in range(3) for n in range(2)]
    for name, ids in found.items():
        np.testing.assert_array_equal(ids, np.roll(STRIPES, int(name[0]) * 2 + int(name[2])))


def test_an_expression_is_tried_on_the_file_name_first(tmp_path):
    put(tmp_path / "img/7min_old/a.txt", b"")
    for number in range(3):
        put(tmp_path / f"img/7min_old/{number}min_x.png", png(gray(number)))
        put(tmp_path / f"gt/7min_old/{number}min_x.png", png(STRIPES))
    assert run(tmp_path, "--batch_from", r"(\d+)min_(\w+)") == 0
    assert sorted(ids_of(tmp_path / "set")) == [f"{number}_x_0_0" for number in range(3)]


def test_folders_of_systems_and_of_results_hold_no_images(tmp_path, capsys):
    stems = write_raw(tmp_path, [png(STRIPES)] * 3)
    for name in ("@eaDir", "#recycle", "$RECYCLE.BIN", "__MACOSX", ".thumbnails"):
        put(tmp_path / "img" / name / "x_y.png", png(gray()))
        assert name.startswith(".") or name.lower() in SYSTEM_NAMES
    put(tmp_path / "img" / "result" / "overlay" / "r_y.png", png(gray()))
    put(tmp_path / "img" / "result" / "predicted.jsonl", b"")
    assert run(tmp_path) == 0
    report = capsys.readouterr().out
    assert "1 folder(s) left out, results of this program: result/overlay" in report
    assert (
        "left out, hidden or of the system: #recycle, $RECYCLE.BIN, .thumbnails, @eaDir" in report
    )
    assert sorted(ids_of(tmp_path / "set")) == stems and not unlabelled(tmp_path / "set")


def test_masks_below_the_images_are_no_images(tmp_path):
    stems = write_raw(tmp_path / "img", [None] * 3)
    for stem in stems:
        put(tmp_path / "img" / "gt" / f"{stem}.png", png(STRIPES))
    words = [
        "--images",
        tmp_path / "img",
        "--masks",
        tmp_path / "img/gt",
        "--out",
        tmp_path / "set",
    ]
    assert program.main([*map(str, words)]) == 0
    assert sorted(ids_of(tmp_path / "set")) == stems and not unlabelled(tmp_path / "set")


def test_training_names_sub_folders_that_it_leaves_out(tmp_path):
    root = noise_set(tmp_path)
    put(root / "train_numf/img/heat2/old/15_x.png", png(gray()))
    (root / "train_numf/img/empty").mkdir()
    (warning,) = check_data(root, num_classes=4).warnings
    assert "heat2: sub-folder with 1 image(s), left out; move them into" in warning


# ---------------------------------------------------------------- masks and overlays beside images


def beside(folder: Path, *options: str) -> int:
    words = ["--images", folder, "--masks", folder, "--out", folder.parent / "set"]
    return program.main([*map(str, words), "--mask_pattern", "{stem}_mask.png", *options])


def test_what_lies_beside_images_and_masks_is_named(tmp_path, capsys):
    raw = tmp_path / "raw"
    for number in range(6):
        put(raw / f"{number}_a.png", png(gray(number)))
        put(raw / f"{number}_a_{'mask.png' if number else 'Mask.PNG'}", png(STRIPES))
    put(raw / "1_a_overlay.png", png(gray(1)))
    put(raw / "9_z_mask.png", png(STRIPES))  # its image is not there
    put(raw / "7_b.png", png(gray(7)))
    assert beside(raw) == 0
    report = capsys.readouterr().out
    assert (
        "2 file(s) left out, named as masks or overlays of images are: 1_a_overlay.png, 9_z"
        in report
    )
    assert "1 image(s) without a mask, taken as unlabelled: 7_b.png" in report
    assert "1 mask(s) taken though the case of letters differs: 0_a_Mask.PNG" in report
    assert sorted(ids_of(tmp_path / "set")) == [f"{number}_a" for number in range(6)]
    assert unlabelled(tmp_path / "set") == ["7_b.png"]


def test_names_that_differ_only_in_case_keep_their_own_masks(tmp_path):
    raw = tmp_path / "raw"
    for number in range(3):
        put(raw / f"{number}_a.png", png(gray(number)))
        put(raw / f"{number}_a_mask.png", png(STRIPES))
    for stem in ("X_A", "x_a"):
        put(raw / f"{stem}.png", png(gray(8)))
    if len(list(raw.glob("*_?.png"))) < 5:
        pytest.skip("the file system does not tell cases apart")
    put(raw / "x_a_mask.png", png(STRIPES))
    masks = Pairs(raw, raw, "{stem}_mask.png", tmp_path / "set").masks
    assert masks[raw / "x_a.png"] == [raw / "x_a_mask.png"] and masks[raw / "X_A.png"] == []


def test_an_image_whose_name_goes_on_from_another_is_an_image(tmp_path):
    stems = write_raw(tmp_path, [png(STRIPES)] * 4, name="45_s{0}")
    more = write_raw(tmp_path, [png(STRIPES)] * 2, name="45_s0_{0}")
    labelled = write_raw(tmp_path, [png(STRIPES)], name="45_s{0}_seg")
    assert run(tmp_path) == 0
    assert sorted(ids_of(tmp_path / "set")) == sorted([*stems, *more, *labelled])


# ---------------------------------------------------------------- links, folders of masks, pages


def link(path: Path, target: Path) -> None:
    try:
        path.symlink_to(target, target_is_directory=target.is_dir())
    except OSError:
        pytest.skip("links cannot be made here")


def test_links_to_folders_are_walked_and_nothing_becomes_two_images(tmp_path, capsys):
    write_raw(tmp_path, [png(STRIPES)] * 3)
    for kind, pixels in (("img", gray(5)), ("gt", STRIPES)):
        put(tmp_path / "disk" / kind / "5_b.png", png(pixels))
        link(tmp_path / kind / "heat2", tmp_path / "disk" / kind)
        link(tmp_path / kind / "again", tmp_path / kind)
        link(tmp_path / kind / "0_twice.png", tmp_path / kind / "0_s0_0_0.png")
    assert run(tmp_path) == 0
    report = capsys.readouterr().out
    assert "left out, read already, under another name: 0_twice.png, again" in report
    assert sorted(ids_of(tmp_path / "set")) == ["0_s0_0_0", "1_s1_0_0", "2_s2_0_0", "5_b"]
    assert not unlabelled(tmp_path / "set")


@pytest.mark.parametrize("names", ["masks/{0}.png", "GT/{0}_mask.png", "labels_v2/sub/{0}.png"])
def test_folders_of_masks_among_the_images_are_no_images(tmp_path, capsys, names):
    for stem in write_raw(tmp_path, [png(STRIPES)] * 3):
        put(tmp_path / "img" / names.format(stem), png(STRIPES))
    assert run(tmp_path) == 0
    report = capsys.readouterr().out
    assert "3 file(s) left out, by their folder masks or overlays of images" in report
    assert len(ids_of(tmp_path / "set")) == 3 and not unlabelled(tmp_path / "set")


def test_one_folder_holds_images_and_a_folder_of_masks(tmp_path, capsys):
    stems = write_raw(tmp_path / "all", [png(np.roll(STRIPES, k)) for k in range(3)])
    words = ["--images", tmp_path / "all", "--masks", tmp_path / "all", "--out", tmp_path / "set"]
    assert program.main([*map(str, words)]) == 0
    found = ids_of(tmp_path / "set")
    assert sorted(found) == stems and not unlabelled(tmp_path / "set")
    for number, stem in enumerate(stems):
        np.testing.assert_array_equal(found[stem], np.roll(STRIPES, number))


def test_masks_beside_images_that_differ_in_the_suffix(tmp_path):
    raw = tmp_path / "raw"
    for number in range(3):
        put(raw / f"{number}_a.bmp", b"")
        Image.fromarray(gray(number)).save(raw / f"{number}_a.bmp")
        put(raw / f"{number}_a.png", png(STRIPES))
    words = ["--images", raw, "--masks", raw, "--out", tmp_path / "set"]
    assert program.main([*map(str, words)]) == 0
    assert sorted(ids_of(tmp_path / "set")) == [f"{number}_a" for number in range(3)]
    assert not unlabelled(tmp_path / "set")


def test_pictures_that_are_not_read_and_frames_are_named(tmp_path, capsys):
    stems = write_raw(tmp_path, [png(STRIPES)] * 3)
    put(tmp_path / "img" / "scan.czi", b"ZISRAWFILE")
    frames = [Image.fromarray(gray(k)) for k in range(2)]
    frames[0].save(tmp_path / "img" / f"{stems[0]}.png", save_all=True, append_images=frames[1:])
    assert run(tmp_path) == 0
    report = capsys.readouterr().out
    assert "scan.czi: .czi files are not read; export it as TIFF or PNG" in report
    assert f"1 file(s) of several pictures, of which the first is read: {stems[0]}.png" in report


def test_results_given_as_masks_say_how_to_take_them(tmp_path, capsys):
    stems = write_raw(tmp_path, [None] * 3)
    for stem in stems:
        for kind in ("classes", "gray", "overlay"):
            put(tmp_path / "p" / kind / f"{stem}.png", png(STRIPES))
    put(tmp_path / "p" / "predicted.jsonl", b"{}")
    words = ["--images", tmp_path / "img", "--masks", tmp_path / "p", "--out", tmp_path / "set"]
    assert program.main([*map(str, words)]) == 2
    assert f"give --masks {tmp_path / 'p' / 'classes'}" in capsys.readouterr().err
    words[3] = tmp_path / "p" / "classes"
    assert program.main([*map(str, words)]) == 0
    assert sorted(ids_of(tmp_path / "set")) == stems


def test_a_table_of_batches_that_is_a_pipe_is_refused(tmp_path, capsys):
    write_raw(tmp_path, [png(STRIPES)] * 3)
    os.mkfifo(tmp_path / "t.csv")
    assert run(tmp_path, "--batch_from", str(tmp_path / "t.csv")) == 2
    assert "t.csv: a pipe, not a file; correct --batch_from" in capsys.readouterr().err


def test_overwriting_a_set_keeps_what_its_links_lead_to(tmp_path):
    write_raw(tmp_path, [png(STRIPES)] * 3)
    assert run(tmp_path) == 0
    put(tmp_path / "outside" / "mine.txt", b"mine")
    (tmp_path / "set" / "test_numf").rename(tmp_path / "elsewhere")
    link(tmp_path / "set" / "test_numf", tmp_path / "outside")
    assert run(tmp_path, "--overwrite") == 0
    assert (tmp_path / "outside" / "mine.txt").read_bytes() == b"mine"
    assert [path.name for path in (tmp_path / "outside").iterdir()] == ["mine.txt"]


def test_training_names_what_it_leaves_out_or_reads_twice(tmp_path):
    root = noise_set(tmp_path)
    folder = root / "train_numf" / "img"
    put(folder / "@eaDir" / "a.jpg", b"")
    put(folder / "._15_s0_0_0.png", b"")
    put(folder / "heat2" / "predicted.jsonl", b"")
    put(folder / "heat2" / "overlay" / "a.png", b"")
    put(folder / "heat2" / "15_x.png", png(gray()))
    put(folder / "15_s0_0_0_overlay.png", png(gray()[:32, :32]))
    link(folder / "15_again.png", folder / "15_s0_0_0.png")
    frames = [Image.fromarray(gray(k)[:32, :32]) for k in range(2)]
    frames[0].save(folder / "15_stack.tif", save_all=True, append_images=frames[1:])
    said = "\n".join(check_data(root, num_classes=4, image_size=32).warnings)
    for text in (
        "heat2: sub-folder with 1 image(s), left out; move them into",
        "2 file(s) and folder(s) left out, hidden or of the system: ._15_s0_0_0.png, @eaDir",
        "1 folder(s) left out, results of this program: heat2/overlay",
        "1 file(s) read though named as masks or overlays of images are: 15_s0_0_0_overlay.png",
        "1 file(s) read though read already, under another name: 15_again.png",
        "1 file(s) of several pages, of which the first is read: 15_stack.tif",
    ):
        assert text in said, (text, said)


def test_two_masks_of_an_image_in_one_folder_are_refused_unless_a_pattern_chooses(tmp_path):
    images, masks = tmp_path / "img", tmp_path / "gt"
    for name in ("a", "b", "a_1"):
        put(images / f"{name}.png", png(STRIPES))
        put(masks / f"{name}.png", png(STRIPES))
    put(masks / "a_overlay.png", png(STRIPES))  # a picture of a mask is none
    put(masks / "old" / "b_mask.png", png(STRIPES))
    assert list(Pairs(images, masks, "", tmp_path / "set").check()) == []
    put(masks / "a_mask.png", png(STRIPES))
    put(masks / "label_b.png", png(STRIPES))
    first, second = Pairs(images, masks, "", tmp_path / "set").check()
    assert "a.png: 2 masks (a.png and a_mask.png in" in first and '"{stem}_mask.png"' in first
    assert "b.png: 2 masks (b.png and label_b.png in" in second and '"label_{stem}.png"' in second
    chosen = Pairs(images, masks, "{stem}_mask.png", tmp_path / "set")
    assert list(chosen.check()) == [] and chosen.masks[images / "a.png"] == [masks / "a_mask.png"]
