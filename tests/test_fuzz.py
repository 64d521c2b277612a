"""Thousands of damaged files: each is read, or refused in one line that names it.

The damage is drawn from a seed: flipped bits, cuts, splices of two files, and numbers written over
the header, where sizes and offsets stand. A reader that hangs ends by pytest's own time limit.
"""

from __future__ import annotations

import io
import struct
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from dataset.mask_values import histogram_of, to_codes
from dataset.source_files import read_pixels
from imaging.gray_range import EACH_IMAGE
from imaging.imagefile import MAX_PIXELS, decode, has_colour, read_image, read_mask
from imaging.pages import count_pages
from utils.checkpoint import CheckpointError, load
from utils.files import DataError

MEGABYTES = 300  # more memory than that is not taken for any one small file

NUMBERS = (0, 1, 255, 19_999, 60_000, 65_535, 2**31 - 1, 2**32 - 1)


def mutated(files: list[bytes], number: int, rng: np.random.Generator) -> bytes:
    """File ``number`` with damage of one of six kinds."""
    raw = bytearray(files[number])
    place, kind = int(rng.integers(len(raw) - 4)), int(rng.integers(6))
    if kind == 0:  # flipped bits
        for where in rng.integers(len(raw), size=rng.integers(1, 6)):
            raw[where] ^= 1 << int(rng.integers(8))
    elif kind == 1:  # cut short
        del raw[place:]
    elif kind == 2:  # goes on as another file
        other = files[rng.integers(len(files))]
        raw[place:] = other[rng.integers(len(other)) :]
    elif kind == 3:  # a header of other bytes
        for where in rng.integers(min(len(raw), 200), size=3):
            raw[where] = rng.integers(256)
    elif kind == 4:  # another number in the header
        place %= 200
        raw[place : place + 4] = struct.pack(rng.choice(["<I", ">I"]), int(rng.choice(NUMBERS)))
    else:  # a part that is lost or overwritten
        length = int(rng.integers(1, 40))
        raw[place : place + length] = rng.bytes(length) if rng.random() < 0.5 else b""
    return bytes(raw)


def peak_memory() -> int:
    """The most memory that this process ever had, in bytes; 0 where the system does not say."""
    try:
        import resource
    except ImportError:  # Windows
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def refused_or_read(read: Callable[[Path], Any], path: Path, allowed: type[ValueError]) -> Any:
    """What ``read`` returns, None if it refuses the file as it should; other ways out fail."""
    memory, result = peak_memory(), None
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        try:
            result = read(path)
        except allowed as error:
            message = str(error)
            assert message.startswith(f"{path}: ") and message.isprintable(), message
    assert [str(w.message) for w in warned] == []
    assert peak_memory() - memory < MEGABYTES * 1_000_000
    return result


def survives(
    files: list[bytes],
    count: int,
    readers: dict[Callable[[Path], Any], type[ValueError]],
    check: Callable[[Any], bool],
    path: Path,
) -> tuple[int, int]:
    """Damage files ``count`` times; returns how many were read, and how many refused."""
    rng = np.random.default_rng(0)
    read = refused = 0
    for number in range(count):
        raw = mutated(files, number % len(files), rng)
        path.write_bytes(raw)
        for reader, allowed in readers.items():
            try:
                result = refused_or_read(reader, path, allowed)
            except BaseException as error:  # the damage must be known to be looked into
                error.args = (f"case {number}, {reader.__name__}: {error!r}; {raw[:400]!r}",)
                raise
            assert result is None or check(result)
            read, refused = read + (result is not None), refused + (result is None)
    return read, refused


# --- pictures -------------------------------------------------------------------------------------


def picture(pixels: Any, kind: str, mode: str | None = None, **options: Any) -> bytes:
    """The bytes of a picture file."""
    stream = io.BytesIO()
    image = Image.fromarray(pixels)
    (image if mode is None else image.convert(mode)).save(stream, kind, **options)
    return stream.getvalue()


def pictures() -> list[bytes]:
    """Small files of each kind that is read, and of kinds that are refused."""
    rng = np.random.default_rng(1)
    gray = rng.integers(0, 256, (20, 24), dtype=np.uint8)
    rgb = rng.integers(0, 256, (20, 24, 3), dtype=np.uint8)
    ids = rng.integers(0, 4, (20, 24), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6
    pages: dict[str, Any] = {"save_all": True, "append_images": [Image.fromarray(ids)]}
    deep = rgb.astype(np.uint16) * 200
    return [
        picture(gray, "png"),
        picture(rgb, "png", exif=exif, icc_profile=b"x" * 50, dpi=(90, 90)),
        picture(gray, "png", "P", transparency=b"\0\1\2"),
        picture(ids, "png", "P", bits=2),
        picture(ids > 1, "png"),
        picture(rgb, "png", "RGBA"),
        picture(gray.astype(np.uint16) * 99, "png"),
        cv2.imencode(".png", deep)[1].tobytes(),
        picture(gray, "png", **pages),
        picture(gray, "jpeg"),
        picture(rgb, "jpeg", progressive=True, exif=exif),
        picture(rgb, "jpeg", "CMYK"),
        picture(gray, "bmp"),
        picture(rgb, "bmp"),
        picture(ids, "bmp", "P"),
        picture(gray, "tiff", exif=exif),
        picture(rgb, "tiff", compression="tiff_lzw"),
        picture(gray, "tiff", compression="tiff_adobe_deflate", **pages),
        picture(rgb, "tiff", compression="jpeg"),
        picture(ids > 1, "tiff", compression="group4"),
        picture(gray, "tiff", compression="packbits", tiffinfo={274: 3}),
        picture(rgb, "webp"),
        picture(ids, "webp", lossless=True, exif=exif),
        picture(gray.astype(np.float32), "tiff"),
        picture(ids.astype(np.float32), "tiff"),
        picture(gray.astype(np.int32), "tiff"),
        picture(rgb, "tiff", "LAB"),
        picture(rgb, "tiff", "CMYK"),
        cv2.imencode(".tif", deep)[1].tobytes(),
        cv2.imencode(".tif", rgb.astype(np.float32))[1].tobytes(),
    ]


def sound(pixels: Any) -> bool:
    """What the readers promise of pixels, and as many as were asked for."""
    return bool(
        pixels.dtype == np.uint8
        and pixels.ndim in (2, 3)
        and 0 < pixels.size <= 3 * MAX_PIXELS
        and pixels.shape[2:] in ((), (3,))
    )


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("count", [1500, pytest.param(6000, marks=pytest.mark.slow)])
def test_damaged_pictures_and_masks_are_read_or_refused(tmp_path, capfd, count):
    readers: Any = {read_image: DataError, read_mask: DataError}
    read, refused = survives(pictures(), count, readers, sound, tmp_path / "a b.png")
    assert read > count / 5 and refused > count / 2  # both happen, or the damage is of no use
    assert capfd.readouterr() == ("", "")


def raw_picture(path: Path) -> Any:
    """An image as ``prepare.py`` reads it."""
    return decode(path).values


def second_page(path: Path) -> Any:
    """The page after the first, where there is one."""
    return read_image(path, EACH_IMAGE, 2)


def raw_mask(path: Path) -> Any:
    """The values of a mask as ``prepare.py`` reads and counts them."""
    assert count_pages(path) >= 1
    pixels = read_pixels(path)
    codes = to_codes(path, pixels, has_colour(pixels))
    assert sum(histogram_of(codes).values()) == codes.size
    return pixels[..., 0] if pixels.ndim == 3 else pixels


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("count", [800, pytest.param(4000, marks=pytest.mark.slow)])
def test_damaged_sources_of_a_set_are_read_or_refused(tmp_path, capfd, count):
    readers: Any = {raw_picture: DataError, second_page: DataError, raw_mask: DataError}
    read, refused = survives(
        pictures(),
        count,
        readers,
        lambda pixels: pixels.ndim in (2, 3) and 0 < pixels.shape[0] * pixels.shape[1] < MAX_PIXELS,
        tmp_path / "a b.tif",
    )
    assert read > count / 3 and refused > count / 2
    assert capfd.readouterr() == ("", "")


def chunk(kind: bytes, body: bytes) -> bytes:
    """A part of a PNG file."""
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def claims(width: int, height: int) -> dict[str, bytes]:
    """Files of a few hundred bytes that claim to be large."""
    gray = np.zeros((8, 8), np.uint8)
    png, jpeg, bmp, tiff = (picture(gray, kind) for kind in ("png", "jpeg", "bmp", "tiff"))
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    frame = jpeg.index(b"\xff\xc0")  # its size stands 5 bytes on
    deep = bytearray(cv2.imencode(".tif", np.zeros((8, 8, 3), np.uint16))[1].tobytes())
    files = {"tiff": bytearray(tiff), "16-bit tiff": deep, "real tiff": bytearray(
        cv2.imencode(".tif", np.zeros((8, 8, 3), np.float32))[1].tobytes()
    )}  # fmt: skip
    for raw in files.values():
        start = struct.unpack_from("<L", raw, 4)[0]
        for entry in range(start + 2, start + 2 + 12 * raw[start], 12):
            tag = struct.unpack_from("<H", raw, entry)[0]
            if tag in (256, 257, 278):  # width, height, rows of a strip
                struct.pack_into("<HLL", raw, entry + 2, 4, 1, width if tag == 256 else height)
    return {
        "png": png[:8] + chunk(b"IHDR", header) + png[33:],
        "jpeg": jpeg[: frame + 5] + struct.pack(">HH", height, width) + jpeg[frame + 9 :],
        "bmp": bmp[:18] + struct.pack("<II", width, height) + bmp[26:],
        **{kind: bytes(raw) for kind, raw in files.items()},
    }


@pytest.mark.parametrize("kind", claims(60_000, 60_000))
def test_a_small_file_that_claims_to_be_large_is_refused_at_once(tmp_path, kind, capfd):
    path = tmp_path / "large.tif"
    path.write_bytes(claims(60_000, 60_000)[kind])
    memory = peak_memory()
    for reader in (read_image, read_mask, raw_picture, read_pixels):
        with pytest.raises(DataError) as caught:
            reader(path)
        assert str(caught.value).startswith(f"{path}: 60000x60000 pixels, more than the 400 mill")
        assert "\n" not in str(caught.value) and "cut it into smaller" in str(caught.value)
    assert peak_memory() - memory < 100_000_000
    path.write_bytes(claims(20_001, 20_000)[kind])
    with pytest.raises(DataError, match="20001x20000 pixels"):
        read_image(path)
    assert capfd.readouterr() == ("", "")


def test_pictures_above_the_limit_of_pillow_and_below_ours_are_read(tmp_path):
    path = tmp_path / "wide.png"
    Image.new("1", (60_000, 3_000)).save(path)  # 180 million pixels, 22 kB
    assert read_image(path).shape == (3_000, 60_000)


def test_a_tiff_that_lacks_rows_is_not_filled_with_black(tmp_path):
    raw = bytearray(picture(np.full((8, 8), 7, np.uint8), "tiff"))
    start = struct.unpack_from("<L", raw, 4)[0]
    for entry in range(start + 2, start + 2 + 12 * raw[start], 12):
        if struct.unpack_from("<H", raw, entry)[0] == 257:
            struct.pack_into("<HLL", raw, entry + 2, 4, 1, 64)
    path = tmp_path / "a.tif"
    path.write_bytes(bytes(raw))
    with pytest.raises(DataError, match="cut short"):
        read_image(path)


# --- checkpoints ----------------------------------------------------------------------------------


def checkpoints() -> list[bytes]:
    """Small checkpoints in both of PyTorch's file formats."""
    generator = torch.Generator().manual_seed(0)
    network = {
        "encoder_q.encode.inc.con1.weight": torch.randn(4, 3, 3, 3, generator=generator),
        "queue": torch.randn(5, 8, generator=generator).half(),
        "queue_ptr": torch.zeros(1, dtype=torch.long),
    }
    contents = {
        "moco": network,
        "epoch": 3,
        "settings": {"channels": (4, 8), "self_lr": 1e-4, "pretrained": None, "name": "x"},
        "optimizer": [{"lr": 1e-3, "params": [0, 1]}],
    }
    published = {"finetune": network, "epoch": 3, "acc": np.float64(0.5)}
    files = []
    for obj in (contents, published):
        for zipped in (True, False):
            stream = io.BytesIO()
            torch.save(obj, stream, _use_new_zipfile_serialization=zipped)
            files.append(stream.getvalue())
    return files


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("count", [2000, pytest.param(8000, marks=pytest.mark.slow)])
def test_damaged_checkpoints_are_read_or_refused(tmp_path, capfd, count):
    readers: Any = {load: CheckpointError}
    read, refused = survives(
        checkpoints(), count, readers, lambda c: type(c) is dict, tmp_path / "a b.pt"
    )
    assert read > count / 20 and refused > count / 2
    assert capfd.readouterr() == ("", "")
