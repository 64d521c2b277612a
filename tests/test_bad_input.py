"""What users really give to the program: each wrong thing ends in one line, each odd one works.

Every case goes through the command line, over a folder that already holds a finished run. A wrong
input ends with exit code 2 and a line on stderr that names the file or setting, the value found and
the cure; nothing that was there before has changed.
"""

from __future__ import annotations

import io
import os
import shutil
import struct
import subprocess
import sys
import unicodedata
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from tiny_set import make_set

import config_run
from networks import UNet
from utils.checkpoint import save

ROOT = Path(__file__).resolve().parents[1]
RNG = np.random.default_rng(0)
SHAPE = (32, 32)
GRAY = RNG.integers(0, 256, SHAPE, dtype=np.uint8)
RGB = RNG.integers(0, 256, (*SHAPE, 3), dtype=np.uint8)
IDS = RNG.integers(0, 3, SHAPE, dtype=np.uint8)

# Image and mask that a supervised run reads, relative to the set's folder.
IMAGE, MASK = "sup_num1_0/img/15_0.png", "sup_num1_0/gt/15_0.png"
TRAIN, TEST, TEST_MASK = (
    "train_numf/img/15_0.png",
    "test_numf/img/15_t0.png",
    "test_numf/gt/15_t0.png",
)
TINY = (
    "--name tiny --stages sup --num_classes 3 --repeats 0 --device cpu --amp off --threads 1 "
    "--channels 4,8,16,32 --hidden_dim 8 --embed_dim 8 --top_k 2 --queue_size 8 "
    "--self_batch_size 2 --self_max_epoch 1 --fine_max_epoch 1"
)

Spoil = Callable[[Path], object]


class Bad(NamedTuple):
    """How to spoil the set, the words of the command line, and what one line of stderr holds."""

    spoil: Spoil
    words: str
    parts: tuple[str, ...]


class Good(NamedTuple):
    """How to change the set, and the words of the command line."""

    change: Spoil
    words: str = ""


# --- making files ---------------------------------------------------------------------------------


def encoded(pixels: Any, kind: str, mode: str | None = None, **options: Any) -> bytes:
    """The bytes of a picture file, by Pillow."""
    stream = io.BytesIO()
    image = Image.fromarray(pixels)
    (image if mode is None else image.convert(mode)).save(stream, kind, **options)
    return stream.getvalue()


def exif(orientation: int) -> Image.Exif:
    """EXIF data with an orientation."""
    data = Image.Exif()
    data[0x0112] = orientation
    return data


SIX = exif(6)


def deep(pixels: Any, suffix: str = ".png") -> bytes:
    """The bytes of a picture file of 16 bits, by OpenCV."""
    return bytes(cv2.imencode(suffix, pixels.astype(np.uint16) * 100)[1].tobytes())


def put(name: str, contents: bytes) -> Spoil:
    """Write a file of the set."""
    return lambda root: (root / name).write_bytes(contents)


def instead(name: str, new: str, contents: bytes | None = None) -> Spoil:
    """Give a file of the set another name, and other contents if wanted."""

    def change(root: Path) -> None:
        path = (root / name).rename((root / name).with_name(new))
        if contents is not None:
            path.write_bytes(contents)

    return change


def both(*changes: Spoil) -> Spoil:
    """One change after the other."""
    return lambda root: [change(root) for change in changes]


def cut(name: str) -> Spoil:
    """Keep two thirds of a file."""
    return lambda root: os.truncate(root / name, (root / name).stat().st_size * 2 // 3)


def remove(name: str) -> Spoil:
    """Remove a file or a folder."""
    return lambda root: (
        shutil.rmtree(root / name) if (root / name).is_dir() else (root / name).unlink()
    )


def dangling(name: str) -> Spoil:
    """Make a link to nothing out of a file."""
    return both(remove(name), lambda root: (root / name).symlink_to("gone.png"))


def folder(name: str) -> Spoil:
    """Make an empty folder out of what is there."""
    return both(remove(name), lambda root: (root / name).mkdir())


def unreadable(name: str) -> Spoil:
    """Take the permission to read away."""
    return lambda root: (root / name).chmod(0)


def nothing(root: Path) -> None:
    """Leave the set as it is."""


def huge_png() -> bytes:
    """A few bytes that claim 60000 x 60000 pixels."""
    body = b"IHDR" + struct.pack(">IIBBBBB", 60000, 60000, 8, 0, 0, 0, 0)
    chunk = struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body))
    return b"\x89PNG\r\n\x1a\n" + chunk + encoded(GRAY, "png")[33:]


def weights(root: Path) -> Path:
    """A sound checkpoint of a larger network."""
    save(root / "other.pt", {"super": UNet(3, (8, 16, 32, 64)).state_dict(), "epoch": 1})
    return root / "other.pt"


# --- what must be refused -------------------------------------------------------------------------

PNG, JPG = encoded(GRAY, "png"), encoded(RGB, "jpeg")

BAD_FILES = {
    "image of 0 bytes": Bad(put(IMAGE, b""), "", ("img/15_0.png: ", "0 bytes", "copy it again")),
    "half a png": Bad(cut(TEST), "", ("img/15_t0.png: ", "cut short", "export it again")),
    "half a jpg": Bad(
        instead(IMAGE, "15_0.jpg", JPG[: len(JPG) // 2]), "", ("15_0.jpg: ", "cut short", "again")
    ),
    "half a tif": Bad(
        instead(IMAGE, "15_0.tif", encoded(GRAY, "tiff")[:500]), "", ("15_0.tif: ", "cut short")
    ),
    "text called png": Bad(put(IMAGE, b"hello"), "", ("15_0.png: ", "not an image", "export it")),
    "gif called png": Bad(
        put(IMAGE, encoded(RGB, "gif")), "", ("15_0.png: ", "jpg, png, bmp, tif or webp", "export")
    ),
    "60000 x 60000 pixels": Bad(
        put(IMAGE, huge_png()), "", ("15_0.png: ", "60000x60000", "400 million", "cut it")
    ),
    "no numbers": Bad(
        instead(IMAGE, "15_0.tif", encoded(np.where(GRAY > 9, GRAY, np.float32(np.nan)), "tiff")),
        "",
        ("15_0.tif: ", "value nan", "export it again"),
    ),
    "mask of an image that a camera turned": Bad(
        both(
            instead(IMAGE, "15_0.jpg", encoded(GRAY[:20], "jpeg", exif=SIX)),
            put(MASK, encoded(IDS[:20], "png")),
        ),
        "",
        ("gt/15_0.png: ", "32x20", "20x32", "EXIF orientation (6)", "upright"),
    ),
    "one pixel": Bad(
        both(put(IMAGE, encoded(GRAY[:1, :1], "png")), put(MASK, encoded(IDS[:1, :1], "png"))),
        "",
        ("img/15_0.png: ", "1x1", "at least 16"),
    ),
    "link to nothing": Bad(
        dangling(IMAGE), "", ("img/15_0.png: ", "gone.png", "not there", "mend or remove")
    ),
    "folder called png": Bad(folder(IMAGE), "", ("img/15_0.png: ", "a folder", "remove it")),
    "mask is a link to nothing": Bad(
        dangling(MASK), "", ("gt/15_0.png: ", "gone.png", "not there", "mend or remove")
    ),
    "mask is a folder": Bad(folder(MASK), "", ("gt/15_0.png: ", "a folder", "remove it")),
    "mask of 0 bytes": Bad(put(MASK, b""), "", ("gt/15_0.png: ", "0 bytes", "copy it again")),
    "half a mask": Bad(cut(TEST_MASK), "", ("gt/15_t0.png: ", "cut short", "again")),
    "mask of another size": Bad(
        put(MASK, encoded(IDS[:, :30], "png")), "", ("gt/15_0.png: ", "30x32", "32x32", "size of")
    ),
    "mask turned by a quarter": Bad(
        both(put(IMAGE, encoded(GRAY[:20], "png")), put(MASK, encoded(IDS[:, :20], "png"))),
        "",
        ("gt/15_0.png: ", "20x32", "32x20"),
    ),
    "colour mask": Bad(
        put(TEST_MASK, encoded(RGB, "png")), "", ("gt/15_t0.png: ", "colours", "class id")
    ),
    "mask of 0 and 255": Bad(
        put(MASK, encoded((IDS > 1) * np.uint8(255), "png")),
        "",
        ("gt/15_0.png: ", "value 255", "0..2", "--num_classes"),
    ),
    "16-bit mask": Bad(
        put(MASK, deep(IDS + 3)), "", ("gt/15_0.png: ", "value 500", "must be class ids")
    ),
    "mask with fractions": Bad(
        put(MASK, encoded(IDS / np.float32(2), "tiff")), "", ("gt/15_0.png: ", "fractions", "ids")
    ),
    "class id of num_classes": Bad(
        put(MASK, encoded(IDS + 1, "png")), "", ("gt/15_0.png: ", "value 3", "0..2", "correct")
    ),
    "jpg mask": Bad(
        instead(MASK, "15_0.jpg", encoded(IDS, "jpeg")),
        "",
        ("img/15_0.png: ", "no mask", "15_0.jpg", "save its mask as"),
    ),
    "jpg mask called png": Bad(
        put(MASK, encoded(IDS, "jpeg")), "", ("gt/15_0.png: ", "JPEG", "export the mask as PNG")
    ),
    "no mask": Bad(remove(MASK), "", ("img/15_0.png: ", "no mask", "save its mask as")),
    "no gt folder": Bad(remove("sup_num1_0/gt"), "", ("img/15_0.png: ", "no mask", "save its")),
    "two images of one name": Bad(
        put("sup_num1_0/img/15_0.bmp", encoded(GRAY, "bmp")), "", ("15_0.bmp, 15_0.png", "rename")
    ),
    "two masks of one name": Bad(
        put("sup_num1_0/gt/15_0.PNG", encoded(IDS, "png")), "", ("15_0.PNG, 15_0.png", "rename")
    ),
    "no img folder": Bad(
        remove("train_numf/img"), "--stages self", ("train_numf", "no such folder", "put all")
    ),
    "empty img folder": Bad(
        folder("train_numf/img"), "--stages self", ("train_numf", "no image", "put all training")
    ),
    "only files of other types": Bad(
        instead(IMAGE, "15_0.gif"), "", ("sup_num1_0", "no image", "15_0.gif", "put annotated")
    ),
    "no annotated folder": Bad(
        remove("sup_num1_0"), "", ("sup_num1_0", "no such folder", "--repeats")
    ),
    "masks without test images": Bad(
        remove("test_numf/img"), "", ("test_numf", "no such folder", "put the test")
    ),
    "nothing to probe on": Bad(
        remove("test_numf"), "--stages self --probe 1", ("test_numf", "no such folder", "--probe")
    ),
    "no train_unlabelled": Bad(
        nothing, "--stages self --use_unlabelled", ("train_unlabelled", "leave out")
    ),
    "fewer annotated images than repeats": Bad(
        nothing, "--repeats 7", ("sup_num1_7", "no such folder", "--repeats")
    ),
    "mixed sizes": Bad(
        put(TRAIN, encoded(GRAY[:, :20], "png")),
        "--stages self",
        ("img/15_0.png: ", "20x32", "32x32", "--image_size N"),
    ),
    "values beside the ignore label": Bad(
        put(MASK, encoded(np.where(IDS > 1, np.uint8(255), IDS), "png")),
        "--ignore_label 9",
        ("gt/15_0.png: ", "value 255", "9", "--ignore_label"),
    ),
    "nothing but the ignore label": Bad(
        put(MASK, encoded(np.full(SHAPE, 9, np.uint8), "png")),
        "--ignore_label 9",
        ("gt/15_0.png: ", "no pixel has a class", "9", "label some"),
    ),
    "unreadable image": Bad(unreadable(IMAGE), "", ("img/15_0.png: ", "ermission", "check")),
    "unreadable folder": Bad(
        unreadable("sup_num1_0/img"), "", ("sup_num1_0", "ermission", "check its permissions")
    ),
}

# {here} is the folder of the set, its neighbours are the output folder and files made below.
BAD_SETTINGS = {
    "data_dir that is not there": ("--data_dir {here}/no", "no: ", "no such folder", "--data_dir"),
    "data_dir that is a file": ("--data_dir {here}/a_file", "a_file: ", "a file", "--data_dir"),
    "data_dir too long": ("--data_dir " + "n" * 300, "nnn: ", "no such folder", "--data_dir"),
    "output_dir that is a file": ("--output_dir {here}/a_file", "a_file", "--output_dir"),
    "output_dir in a file": ("--output_dir {here}/a_file/out", "a_file/out", "--output_dir"),
    "output_dir too long": ("--output_dir " + "n" * 300, "nnn", "too long", "--output_dir"),
    "unknown flag": ("--zzz 1", "--zzz", "--help"),
    "misspelt flag": ("--temprature 1", "--temprature", "did you mean --temperature"),
    "abbreviated flag": ("-stage sup", "-stage", "did you mean -stages"),
    "published name": ("--random_c 0.1", "--random_c", "did you mean --random_crop"),
    "stray word": ("sup", "'sup'", "--name value"),
    "no value": ("--temperature", "temperature: ", "no value", "at least 0.001"),
    "ratio above 1": ("--global_local_ratio 1.5", "global_local_ratio: ", "1.5", "at most 1"),
    "ratio below 0": ("--global_local_ratio -0.1", "global_local_ratio: ", "-0.1", "at least 0"),
    "ratio nan": ("--global_local_ratio nan", "global_local_ratio: ", "nan", "at most 1"),
    "rate infinite": ("--self_lr inf", "self_lr: ", "inf", "above 0"),
    "rate beyond single precision": ("--sup_lr 1e38", "sup_lr: ", "1e+38", "at most 1e+30"),
    "rate in words": ("--sup_lr fast", "sup_lr: ", "'fast'", "a number"),
    "epochs negative": ("--fine_max_epoch -3", "fine_max_epoch: ", "-3", "at least 1"),
    "epochs 0": ("--self_max_epoch 0", "self_max_epoch: ", "0", "at least 1"),
    "epochs fraction": ("--fine_max_epoch 2.5", "fine_max_epoch: ", "2.5", "whole number"),
    "batch 0": ("--fine_batch_size 0", "fine_batch_size: ", "0", "at least 1"),
    "queue 0": ("--queue_size 0", "queue_size: ", "0", "at least 1"),
    "top_k 0": ("--top_k 0", "top_k: ", "0", "at least 1"),
    "momentum 2": ("--momentum 2", "momentum: ", "2", "at most 1"),
    "temperature 0": ("--temperature 0", "temperature: ", "0", "at least 0.001"),
    "crop of everything": ("--random_crop 1", "random_crop: ", "1", "below 1"),
    "one class": ("--num_classes 1", "num_classes: ", "1", "at least 2"),
    "256 classes": ("--num_classes 256", "num_classes: ", "256", "at most 255"),
    "ignore_label that is a class": ("--ignore_label 2", "ignore_label: ", "2", "at least"),
    "ignore_label 256": ("--ignore_label 256", "ignore_label: ", "256", "at most 255"),
    "image_size 15": ("--image_size 15", "image_size: ", "15", "at least 16"),
    "mapping too short": ("--mapping 0,255", "mapping: ", "2 values", "num_classes"),
    "class_weight all 0": (
        "--class_weight 0,0,0",
        "class_weight: ",
        "at least one of 0.001 or more",
    ),
    "class_weight balance": (
        "--class_weight balance",
        "class_weight: ",
        "'balance'",
        "numbers",
        "did you mean balanced?",
    ),
    "channels not doubling": ("--channels 4,8,12,16", "channels: ", "12", "twice"),
    "groups that do not divide": ("--groups 3", "embed_dim: ", "8", "multiple of groups, 3"),
    "stages in one word": ("--stages selffine", "stages: ", "'selffine'", "joined by '-'"),
    "stage twice": ("--stages sup-sup", "stages: ", "'sup-sup'", "each once"),
    "data_size 2": ("--data_size 2", "data_size: ", "'2'", "1, 5, f"),
    "repeats twice": ("--repeats 00", "repeats: ", "'00'", "each once"),
    "unknown method": ("--self_mode mocoo", "self_mode: ", "'mocoo'", "did you mean moco"),
    "name with a slash": ("--name a/b", "name: ", "'a/b'", "letters"),
    "neither true nor false": ("--multi_round maybe", "multi_round: ", "'maybe'", "True or False"),
    "unknown device": ("--device gpu", "device: ", "'gpu'", "auto, cpu, cuda"),
    "unknown precision": ("--amp fp16", "amp: ", "'fp16'", "auto, off, bf16"),
    "workers negative": ("--workers -1", "workers: ", "-1", "at least 0"),
    "device that is not there": ("--device cuda:99", "device: ", "cuda:99", "--device auto"),
    "fine without pretraining": ("--stages fine", "moco1.pt: ", "no such file", "pretrain first"),
    "pretrained missing": ("--stages fine --pretrained {here}/no.pt", "no.pt: ", "--pretrained"),
    "pretrained folder": ("--stages fine --pretrained {here}/data", "data: ", "checkpoint"),
    "pretrained empty": ("--stages fine --pretrained {here}/empty", "empty: ", "is empty"),
    "pretrained garbage": ("--stages fine --pretrained {here}/a_file", "a_file: ", "give a file"),
    "pretrained cut off": ("--stages fine --pretrained {here}/half.pt", "half.pt: ", "copy it"),
    "pretrained larger": (
        "--stages fine --pretrained {here}/other.pt",
        "other.pt: ",
        "channels: its network has 8,16,32,64, this one has 4,8,16,32",
        "--channels 8,16,32,64",
    ),
    "other settings than the run there": (
        "--fine_jitter 0.2",
        "1_0: ",
        "fine_jitter was 0.1, is 0.2",
        "--overwrite",
    ),
}

BAD = BAD_FILES | {
    name: Bad(nothing, words, parts)
    for name, (words, *parts) in BAD_SETTINGS.items()  # type: ignore[arg-type]
}


# --- what must work -------------------------------------------------------------------------------


def renamed(stem: str, mask_stem: str = "") -> Spoil:
    """Give an annotated image and its mask another name."""
    return both(instead(IMAGE, f"{stem}.png"), instead(MASK, f"{mask_stem or stem}.png"))


def linked(root: Path) -> None:
    """Keep the files elsewhere, and links to them in the set."""
    for name in (IMAGE, MASK):
        real = (root / name).rename(root / name.replace("/", "_"))
        (root / name).symlink_to(real)


def clutter(root: Path) -> None:
    """What file managers and people leave behind."""
    for name in (".DS_Store", "._15_0.png", "Thumbs.db", "notes.txt"):
        (root / "sup_num1_0/img" / name).write_bytes(b"x")
    (root / "sup_num1_0/img/old").mkdir()


PAGES: dict[str, Any] = {"save_all": True, "append_images": [Image.fromarray(IDS)]}
OPAQUE = np.full(SHAPE, 255, np.uint8)

GOOD = {
    "spaces in names": Good(renamed("15 min_a b (2)")),
    "accents and Chinese": Good(renamed("15_é ß 金相")),
    "accents as macOS writes them": Good(renamed("15_é", unicodedata.normalize("NFD", "15_é"))),
    "names without a batch": Good(
        both(renamed("one"), instead(TRAIN, "two.png")), "--stages self --self_mode moco"
    ),
    "palette mask": Good(put(MASK, encoded(IDS, "png", "P"))),
    "palette mask of 2 bits": Good(put(MASK, encoded(IDS, "png", "P", bits=2))),
    "1-bit mask": Good(put(MASK, encoded(IDS > 1, "png"))),
    "16-bit mask of class ids": Good(put(MASK, encoded(IDS.astype(np.uint16), "png"))),
    "mask of three equal channels": Good(put(MASK, encoded(IDS, "png", "RGB"))),
    "mask with opacity": Good(put(MASK, encoded(np.dstack([IDS, IDS, IDS, OPAQUE]), "png"))),
    "mask with an ignore label": Good(
        put(MASK, encoded(np.where(IDS > 1, np.uint8(255), IDS), "png")), "--ignore_label 255"
    ),
    "ignore label below 255": Good(
        put(TEST_MASK, encoded(np.where(IDS > 1, np.uint8(9), IDS), "png")), "--ignore_label 9"
    ),
    "image with opacity": Good(put(IMAGE, encoded(np.dstack([RGB, OPAQUE]), "png"))),
    "gray image with opacity": Good(put(IMAGE, encoded(GRAY, "png", "LA"))),
    "palette image": Good(put(IMAGE, encoded(GRAY, "png", "P"))),
    "palette image with transparency": Good(
        put(IMAGE, encoded(GRAY, "png", "P", transparency=b"\0\1\2"))
    ),
    "gray and colour": Good(put(TRAIN, encoded(RGB, "png")), "--stages self-fine"),
    "16-bit gray": Good(put(IMAGE, deep(GRAY))),
    "16-bit colour": Good(put(IMAGE, deep(RGB))),
    "16-bit colour tif": Good(instead(IMAGE, "15_0.tif", deep(RGB, ".tif"))),
    "CMYK jpg": Good(instead(IMAGE, "15_0.jpg", encoded(RGB, "jpeg", "CMYK"))),
    "progressive jpeg": Good(instead(IMAGE, "15_0.jpeg", encoded(RGB, "jpeg", progressive=True))),
    "bmp": Good(instead(IMAGE, "15_0.bmp", encoded(GRAY, "bmp"))),
    "jpg called png": Good(put(IMAGE, JPG)),
    "capital suffixes": Good(both(instead(IMAGE, "15_0.JPG", JPG), instead(MASK, "15_0.PNG"))),
    "EXIF orientation of a jpg": Good(
        both(
            instead(IMAGE, "15_0.jpg", encoded(GRAY[:20], "jpeg", exif=SIX)),
            put(MASK, encoded(np.rot90(IDS[:20], -1), "png")),
        )
    ),
    "EXIF orientation of a tif": Good(
        both(
            instead(IMAGE, "15_0.tif", encoded(GRAY[:20], "tiff", exif=SIX)),
            put(MASK, encoded(np.rot90(IDS[:20], -1), "png")),
        )
    ),
    "real numbers": Good(instead(IMAGE, "15_0.tif", encoded(GRAY / np.float32(3), "tiff"))),
    "32-bit integers": Good(instead(IMAGE, "15_0.tif", encoded(GRAY.astype("i4") * 999, "tiff"))),
    "several pages": Good(instead(IMAGE, "15_0.tiff", encoded(GRAY, "tiff", **PAGES))),
    "animated png": Good(put(IMAGE, encoded(GRAY, "png", **PAGES))),
    "mixed sizes with image_size": Good(
        put(TRAIN, encoded(GRAY[:, :20], "png")), "--stages self-fine --image_size 24"
    ),
    "one pixel with image_size": Good(
        both(put(IMAGE, encoded(GRAY[:1, :1], "png")), put(MASK, encoded(IDS[:1, :1], "png"))),
        "--image_size 32",
    ),
    "test images of different sizes": Good(
        both(put(TEST, encoded(GRAY[:, :20], "png")), put(TEST_MASK, encoded(IDS[:, :20], "png")))
    ),
    "links": Good(linked),
    "clutter": Good(clutter),
    "no masks of the training images": Good(remove("train_numf/gt"), "--stages self"),
    "one training image": Good(
        lambda root: [p.unlink() for p in sorted((root / "train_numf/img").iterdir())[1:]],
        "--stages self",
    ),
    "absent class": Good(put(MASK, encoded(IDS // 2, "png"))),
    "image_size 16": Good(nothing, "--image_size 16 --stages self-fine"),
    "flag given twice": Good(nothing, "--fine_max_epoch 5 --fine_max_epoch 1"),
    "capital boolean": Good(nothing, "--multi_round FALSE"),
}


# --- the tests ------------------------------------------------------------------------------------


def contents(root: Path) -> dict[str, object]:
    """Everything below a folder: the bytes of files, the targets of links, and folders."""
    return {
        path.relative_to(root).as_posix(): os.readlink(path)
        if path.is_symlink()
        else path.is_file() and os.access(path, os.R_OK) and path.read_bytes()
        for path in sorted(root.rglob("*"))
    }


def run(place: Path, words: list[str]) -> int:
    """The program over the set in ``place``; the exit code."""
    start = [*TINY.split(), "--data_dir", str(place / "data"), "--output_dir", str(place / "out")]
    return config_run.main([*start, *words])


@pytest.fixture(scope="module")
def template(tmp_path_factory) -> Path:
    """A sound set, a finished run on it, and files that are no checkpoints."""
    place = Path(tmp_path_factory.mktemp("template"))
    make_set(place / "data", size=SHAPE)
    assert run(place, []) == 0
    (place / "a_file").write_bytes(b"hello")
    (place / "empty").touch()
    whole = weights(place).read_bytes()
    (place / "half.pt").write_bytes(whole[: len(whole) // 2])
    return place


@pytest.fixture
def place(template, tmp_path) -> Path:
    """A copy of it whose path has a space and letters of its own."""
    return Path(shutil.copytree(template, tmp_path / "mein Ördner 图", symlinks=True))


def test_there_are_cases_enough():
    assert len(BAD) >= 45 and len(GOOD) >= 20


@pytest.mark.parametrize("name", BAD)
def test_wrong_input_is_one_line_and_harms_nothing(name, place, capfd):
    case = BAD[name]
    if name.startswith("unreadable") and os.geteuid() == 0:
        pytest.skip("the superuser may read everything")
    if os.name == "nt" and "link" in name:
        pytest.skip("links need a privilege")
    case.spoil(place / "data")
    before = contents(place)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        code = run(place, [w.replace("{here}", str(place)) for w in case.words.split()])
    after = contents(place)
    for path in (place / "data").rglob("*"):
        if not path.is_symlink() and not os.access(path, os.R_OK):
            path.chmod(0o700)  # pytest wants to remove it
    shown = capfd.readouterr()
    assert code == 2, shown
    lines = shown.err.splitlines()
    assert any(all(part in line for part in case.parts) for line in lines), shown.err
    assert "Traceback" not in shown.err + shown.out
    assert [str(w.message) for w in warned] == []
    assert after == before


@pytest.mark.parametrize("name", GOOD)
def test_odd_input_works(name, place, capfd):
    case = GOOD[name]
    case.change(place / "data")
    before = contents(place)
    code = run(place, ["--name", "odd", *case.words.split()])
    shown = capfd.readouterr()
    assert code == 0, shown
    assert shown.err == ""
    after = contents(place)
    assert {key: after[key] for key in before} == before
    assert any(key.startswith("out/odd_") for key in after)


def test_all_problems_of_a_set_come_together(place, capfd):
    spoilt = (
        put(IMAGE, b""),
        put(TEST, PNG[:200]),
        put(TEST_MASK, encoded(RGB, "png")),
        remove("test_numf/gt/30_t1.png"),
        folder(TRAIN),
        put("train_numf/img/30_1.bmp", encoded(GRAY, "bmp")),
        put("train_numf/img/15_2.png", b"hello"),
    )
    both(*spoilt)(place / "data")
    assert run(place, ["--stages", "self-sup"]) == 2
    lines = capfd.readouterr().err.splitlines()
    for part in (
        "sup_num1_0/img/15_0.png",
        "test_numf/img/15_t0.png",
        "test_numf/img/30_t1.png",
        "train_numf/img/15_0.png",
        "30_1.bmp, 30_1.png",
        "train_numf/img/15_2.png",
    ):
        assert sum(part in line for line in lines) == 1, part
    assert len(lines) == 6  # the mask of an image that cannot be read is not looked at


def test_all_problems_of_the_settings_come_together(place, capfd):
    assert run(place, ["--temperature", "0", "--top_k", "x", "--zzz", "--momentum", "7"]) == 2
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 4
    for part in ("temperature", "top_k", "--zzz", "momentum"):
        assert any(part in line for line in lines)


PROCESSES = {
    "class id of num_classes": BAD["class id of num_classes"],
    "pretrained garbage": BAD["pretrained garbage"],
    "misspelt flag": BAD["misspelt flag"],
}


@pytest.mark.slow
def test_real_processes_end_in_the_same_way(template, tmp_path):
    running = {}
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "LC_ALL": "C", "PYTHONUTF8": "0"}
    for number, (name, case) in enumerate(PROCESSES.items()):
        place = Path(shutil.copytree(template, tmp_path / f"{number} é 图"))
        case.spoil(place / "data")
        before = contents(place)
        words = [sys.executable, str(ROOT / "train.py"), *TINY.split(), "--data_dir", "data"]
        words += ["--output_dir", "out", *case.words.replace("{here}", ".").split()]
        process = subprocess.Popen(
            words,
            cwd=place,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        running[name] = (process, place, before)
    for name, (process, place, before) in running.items():
        out, err = process.communicate(timeout=200)
        assert process.returncode == 2, (name, out, err)
        assert all(part in err for part in PROCESSES[name].parts), err
        assert "Traceback" not in err and len(err.splitlines()) <= 8
        assert contents(place) == before


def test_without_cuda_its_choice_is_refused(place, capfd, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert run(place, ["--device", "cuda"]) == 2
    assert "device: found cuda" in (err := capfd.readouterr().err) and "--device auto" in err
