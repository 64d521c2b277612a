"""Reading: every kind of pixels comes out as 8 bits, every broken file as one line."""

import io
import os
import struct
import warnings
import zlib
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from imaging.gray_range import BY_DEPTH, GrayRange
from imaging.imagefile import TURNS, decode, read_image, read_mask, turned
from imaging.store import ImageStore, resize_image, resize_mask
from utils.files import DataError

RNG = np.random.default_rng(0)
GRAY = RNG.integers(0, 256, (20, 24), dtype=np.uint8)
RGB = RNG.integers(0, 256, (20, 24, 3), dtype=np.uint8)
IDS = RNG.integers(0, 4, (20, 24), dtype=np.uint8)


def save(path: Path, pixels: np.ndarray, mode: str | None = None, **options) -> Path:
    image = Image.fromarray(pixels)
    (image if mode is None else image.convert(mode)).save(path, **options)
    return path


def save_deep(path: Path, pixels: np.ndarray) -> Path:
    """16 bits a value, by OpenCV (which wants BGR)."""
    bgr = pixels if pixels.ndim == 2 else pixels[..., [2, 1, 0, 3][: pixels.shape[2]]]
    path.write_bytes(cv2.imencode(path.suffix.lower(), bgr)[1].tobytes())
    return path


@pytest.mark.parametrize("suffix", [".png", ".bmp", ".tif", ".tiff", ".PNG", ".TIF", ".Bmp"])
@pytest.mark.parametrize("pixels", [GRAY, RGB], ids=["gray", "rgb"])
def test_lossless_8_bit_images_are_read_as_they_are(tmp_path, suffix, pixels):
    path = save(tmp_path / f"ä 像_1{suffix}", pixels)
    np.testing.assert_array_equal(read_image(path), pixels)


@pytest.mark.parametrize("suffix", [".jpg", ".jpeg", ".JPG"])
def test_jpeg_is_read_in_rgb_order(tmp_path, suffix):
    flat = np.zeros((16, 16, 3), np.uint8)
    flat[...] = (200, 100, 30)
    result = read_image(save(tmp_path / f"a{suffix}", flat, quality=100))
    assert np.abs(result.astype(int) - (200, 100, 30)).max() <= 2


def test_transparency_is_dropped(tmp_path):
    alpha = np.full((20, 24, 1), 7, np.uint8)
    np.testing.assert_array_equal(
        read_image(save(tmp_path / "a.png", np.dstack([RGB, alpha]))), RGB
    )
    picture = Image.merge("LA", (Image.fromarray(GRAY), Image.fromarray(alpha[..., 0])))
    picture.save(tmp_path / "b.png")
    np.testing.assert_array_equal(read_image(tmp_path / "b.png"), GRAY)


def test_palette_and_one_bit(tmp_path):
    picture = Image.fromarray(IDS).convert("P")
    colours = [(10, 20, 30), (200, 0, 0), (0, 200, 0), (5, 5, 250)]
    picture.putpalette(sum(colours, ()))
    picture.save(tmp_path / "p.png")
    np.testing.assert_array_equal(read_image(tmp_path / "p.png"), np.array(colours, np.uint8)[IDS])
    Image.fromarray(IDS > 1).save(tmp_path / "b.png")
    np.testing.assert_array_equal(read_image(tmp_path / "b.png"), (IDS > 1) * np.uint8(255))


def test_equal_channels_are_kept_as_one(tmp_path):
    path = save(tmp_path / "a.png", np.repeat(GRAY[..., None], 3, axis=2))
    np.testing.assert_array_equal(read_image(path), GRAY)
    assert ImageStore().image(path).shape == (1, 20, 24)


@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_16_bits_become_8_by_the_range_that_is_given(tmp_path, suffix):
    pixels = np.linspace(0, 60000, 20 * 24).astype(np.uint16).reshape(20, 24)
    path = save_deep(tmp_path / f"a{suffix}", pixels)
    found = read_image(path, GrayRange(1000, 51_000))
    expected = np.clip((pixels - 1000.0) / 50_000, 0, 1) * 255
    np.testing.assert_allclose(found, expected, atol=0.5001)
    np.testing.assert_allclose(read_image(path, BY_DEPTH), pixels * 255.0 / 65535, atol=0.5001)


@pytest.mark.parametrize("suffix", [".png", ".tif"])
@pytest.mark.parametrize("channels", [3, 4])
def test_16_bit_colour_keeps_order_and_contrast(tmp_path, suffix, channels):
    pixels = RNG.integers(0, 4096, (20, 24, channels)).astype(np.uint16)
    pixels[..., 1] //= 4
    result = read_image(save_deep(tmp_path / f"a{suffix}", pixels), GrayRange(0, 4095))
    np.testing.assert_allclose(result, pixels[..., :3] * 255.0 / 4095, atol=0.5001)


# Where the pixel of row 0, column 0 of the file is seen: the standard's words (EXIF 2.32, 4.6.4),
# row 0 is the visual top, ..., column 0 the visual left-hand side, ...
FIRST = {
    2: ("top", "right"),
    3: ("bottom", "right"),
    4: ("bottom", "left"),
    5: ("left", "top"),
    6: ("right", "top"),
    7: ("right", "bottom"),
    8: ("left", "bottom"),
}


@pytest.mark.parametrize("orientation", FIRST)
def test_an_orientation_is_applied_as_the_standard_words_it(orientation):
    row, column = FIRST[orientation]
    stored = np.zeros((3, 5), int)
    stored[0, :], stored[:, 0], stored[0, 0] = 1, 2, 3
    seen = turned(stored, orientation)
    sides = {"top": seen[0], "bottom": seen[-1], "left": seen[:, 0], "right": seen[:, -1]}
    assert sorted(sides[row]) == [1] * 4 + [3] and sorted(sides[column]) == [2] * 2 + [3]


@pytest.mark.parametrize("orientation", TURNS)
@pytest.mark.parametrize("suffix", [".jpg", ".png", ".tif", ".webp"])
def test_camera_orientation_is_applied_everywhere(tmp_path, suffix, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"a{suffix}"
    smooth = np.add.outer(np.arange(16) * 4, np.arange(24) * 7).astype(np.uint8)
    Image.fromarray(smooth).save(path, exif=exif, quality=100, lossless=True)
    found = decode(path)
    assert found.orientation == orientation
    expected = turned(smooth, orientation)
    assert read_image(path).shape == expected.shape
    assert np.abs(read_image(path).astype(int) - expected).max() <= 3
    if suffix != ".jpg":
        np.testing.assert_array_equal(read_mask(path), expected)


@pytest.mark.parametrize("orientation", TURNS)
def test_16_bit_colour_png_is_turned_once(tmp_path, orientation):
    pixels = (RGB.astype(np.uint16) * 257)[:, :19]
    raw = cv2.imencode(".png", pixels[..., ::-1])[1].tobytes()
    exif = b"II*\0\x08\0\0\0\x01\0" + struct.pack("<HHIHHI", 0x0112, 3, 1, orientation, 0, 0)
    chunk = b"eXIf" + exif
    chunk = struct.pack(">I", len(exif)) + chunk + struct.pack(">I", zlib.crc32(chunk))
    path = tmp_path / "a.png"
    path.write_bytes(raw[:33] + chunk + raw[33:])
    np.testing.assert_array_equal(decode(path).values, turned(pixels, orientation))


def test_an_orientation_that_makes_no_sense_turns_nothing(tmp_path):
    for value in (0, 1, 9, 300):
        exif = Image.Exif()
        exif[0x0112] = value
        Image.fromarray(GRAY).save(tmp_path / "a.png", exif=exif)
        np.testing.assert_array_equal(read_image(tmp_path / "a.png"), GRAY)
    raw = (tmp_path / "a.png").read_bytes()
    (tmp_path / "b.png").write_bytes(raw.replace(b"Exif\0\0", b"Exif!!"))
    np.testing.assert_array_equal(read_image(tmp_path / "b.png"), GRAY)


def png_bytes(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "png")
    return buffer.getvalue()


def tiff_bytes(pixels: np.ndarray) -> bytes:
    return cv2.imencode(".tif", pixels)[1].tobytes()


BROKEN = {
    "empty": (b"", "empty file"),
    "text": (b"hello, I am no picture", "not an image"),
    "half a png": (png_bytes(RGB)[: len(png_bytes(RGB)) // 2], "cut short"),
    "a png without its end": (png_bytes(RGB)[:-80], "cut short"),
    "half a 16-bit png": (png_bytes(GRAY.astype(np.uint16) * 99)[:300], "cut short"),
    "half a jpg": (cv2.imencode(".jpg", RGB)[1].tobytes()[:700], "cut short"),
    "half a bmp": (cv2.imencode(".bmp", RGB)[1].tobytes()[:700], "cut short"),
    "half a tif": (tiff_bytes(RGB)[:400], "cut short"),
    "half a 16-bit tif": (tiff_bytes(RGB.astype(np.uint16) * 99)[:900], "cut short"),
    "no number": (tiff_bytes(np.where(GRAY > 99, np.nan, GRAY).astype(np.float32)), "value nan"),
    "infinity": (tiff_bytes(np.where(GRAY > 99, -np.inf, GRAY).astype(np.float64)), "value -inf"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_broken_file_is_one_line_with_its_name(tmp_path, kind, capfd):
    raw, what = BROKEN[kind]
    path = tmp_path / "a b.tif"
    path.write_bytes(raw)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        with pytest.raises(DataError) as caught:
            read_image(path)
    assert warned == []
    message = str(caught.value)
    assert message.startswith(f"{path}: ") and what in message and "\n" not in message
    assert capfd.readouterr() == ("", "")


def test_missing_file_is_one_line(tmp_path):
    for read in (read_image, read_mask):
        with pytest.raises(DataError, match=r"gone\.png: cannot be opened"):
            read(tmp_path / "gone.png")


def test_masks_keep_their_ids(tmp_path):
    np.testing.assert_array_equal(read_mask(save(tmp_path / "gray.png", IDS)), IDS)
    picture = Image.fromarray(IDS).convert("P")
    picture.putpalette([9, 9, 9, 255, 0, 0, 0, 255, 0, 0, 0, 255])
    for bits in (2, 4, 8):
        picture.save(tmp_path / "palette.png", bits=bits)
        np.testing.assert_array_equal(read_mask(tmp_path / "palette.png"), IDS)
    Image.fromarray(IDS > 1).save(tmp_path / "bit.png")
    np.testing.assert_array_equal(read_mask(tmp_path / "bit.png"), IDS > 1)
    three = np.repeat(IDS[..., None], 3, axis=2)
    np.testing.assert_array_equal(read_mask(save(tmp_path / "rgb.png", three)), IDS)
    four = np.dstack([three, np.full_like(IDS, 255)])
    np.testing.assert_array_equal(read_mask(save(tmp_path / "rgba.png", four)), IDS)
    deep = save_deep(tmp_path / "deep.png", IDS.astype(np.uint16))
    np.testing.assert_array_equal(read_mask(deep), IDS)
    deep = save_deep(tmp_path / "deeprgb.png", three.astype(np.uint16))
    np.testing.assert_array_equal(read_mask(deep), IDS)


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_gray_masks_of_few_bits_keep_their_ids(tmp_path, bits):
    ids = RNG.integers(0, 2**bits, (6, 16), dtype=np.uint8)
    spread = np.unpackbits(ids[..., None], axis=2)[..., 8 - bits :].reshape(6, -1)
    rows = b"".join(b"\0" + row.tobytes() for row in np.packbits(spread, axis=1))

    def chunk(kind: bytes, body: bytes) -> bytes:
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    header = struct.pack(">IIBBBBB", 16, 6, bits, 0, 0, 0, 0)
    parts = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    path = tmp_path / "m.png"
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + parts)
    np.testing.assert_array_equal(read_mask(path), ids)


def test_bad_masks_are_one_line(tmp_path):
    path = save(tmp_path / "m.png", RGB)
    with pytest.raises(DataError, match=r"m\.png: coloured mask.*class id") as caught:
        read_mask(path)
    assert "\n" not in str(caught.value)
    with pytest.raises(DataError, match=r"m\.png: value 300"):
        read_mask(save_deep(path, np.full((8, 8), 300, np.uint16)))
    path.write_bytes(b"nothing")
    with pytest.raises(DataError, match=r"m\.png: not an image"):
        read_mask(path)


def test_shrinking_averages_areas_and_enlarging_interpolates():
    image = RNG.integers(0, 256, (24, 36), dtype=np.uint8)
    blocks = image.reshape(12, 2, 12, 3).mean(axis=(1, 3))
    np.testing.assert_allclose(resize_image(image, 12), blocks, atol=0.51)
    ramp = np.tile(np.arange(0, 240, 10, dtype=np.uint8), (24, 1))
    result = resize_image(ramp, 48)
    expected = np.clip((np.arange(48) + 0.5) / 2 - 0.5, 0, 23) * 10
    np.testing.assert_allclose(result, np.tile(expected, (48, 1)), atol=0.51)
    assert resize_image(RGB, 9).shape == (9, 9, 3)


@pytest.mark.parametrize("size", [5, 13, 24, 50])
def test_mask_takes_the_pixel_under_each_centre(size):
    mask = RNG.integers(0, 200, (24, 31), dtype=np.uint8)
    rows, columns = (np.floor((np.arange(size) + 0.5) * n / size).astype(int) for n in mask.shape)
    np.testing.assert_array_equal(resize_mask(mask, size), mask[np.ix_(rows, columns)])


def test_store_reads_each_file_once(tmp_path):
    path = save(tmp_path / "a.png", RGB)
    mask = save(tmp_path / "m.png", IDS)
    store = ImageStore(image_size=10)
    first = store.image(path)
    assert first.shape == (3, 10, 10) and first.dtype == torch.uint8
    assert store.mask(mask).shape == (10, 10)
    os.remove(path)
    assert store.image(path).data_ptr() == first.data_ptr()
    assert store.file_size("image", path) == (20, 24) == store.file_size("mask", mask)


# ---------------------------------------------------------------- other names and kinds of files


@pytest.mark.parametrize("pixels", [GRAY, RGB], ids=["gray", "rgb"])
def test_a_webp_without_loss_is_read_as_it_is(tmp_path, pixels):
    path = save(tmp_path / "a.webp", pixels, lossless=True)
    np.testing.assert_array_equal(read_image(path), pixels)
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(DataError, match="damaged or cut short"):
        read_image(path)


def test_a_webp_as_mask_must_be_without_loss(tmp_path):
    np.testing.assert_array_equal(read_mask(save(tmp_path / "a.webp", IDS, lossless=True)), IDS)
    for options in ({}, {"icc_profile": b"profile"}):
        with pytest.raises(DataError, match="with loss.*changes class ids: export"):
            read_mask(save(tmp_path / "b.webp", IDS, **options))


@pytest.mark.parametrize("suffix", [".jfif", ".jpe"])
def test_a_jpeg_by_any_name(tmp_path, suffix):
    path = tmp_path / f"a{suffix}"
    Image.fromarray(GRAY).save(path, format="JPEG", quality=100)
    assert np.abs(read_image(path).astype(int) - GRAY).max() < 4


@pytest.mark.parametrize("read", [read_image, read_mask])
def test_pipes_and_devices_are_refused_unopened(tmp_path, read):
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "zero.png").symlink_to("/dev/zero")
    for name, kind in (("pipe.png", "a pipe"), ("zero.png", "a device")):
        with pytest.raises(DataError, match=f"{name}: {kind}, not a file; give"):
            read(tmp_path / name)
