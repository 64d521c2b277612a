"""Numbers of pages, of files that Pillow wrote and of headers written by hand."""

from __future__ import annotations

import os
import struct
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tifffile import TiffWriter

from imaging.pages import by_page, count_pages, images_of, place_of


def pictures(number: int) -> list[Image.Image]:
    return [Image.fromarray(np.full((20, 24), 10 * k, np.uint8)) for k in range(number)]


@pytest.mark.parametrize("number", [1, 2, 5])
@pytest.mark.parametrize("suffix", [".tif", ".png", ".webp"])
def test_pages_that_pillow_wrote(tmp_path: Path, number: int, suffix: str) -> None:
    path, (first, *more) = tmp_path / f"a{suffix}", pictures(number)
    first.save(path, save_all=True, append_images=more, lossless=True)
    assert count_pages(path) == number


def tiff(kinds: list[int], order: str, big: bool, circle: bool = False) -> bytes:
    """Directories of one entry each: tag 254 with these values."""
    head = b"II" if order == "<" else b"MM"
    step = 8 + 20 + 8 if big else 2 + 12 + 4
    start = 16 if big else 8
    head += struct.pack(order + ("HHHQ" if big else "HI"), *((43, 8, 0) if big else (42,)), start)
    body = b""
    for number, kind in enumerate(kinds, start=1):
        after = start + number * step if number < len(kinds) else start if circle else 0
        value = struct.pack(f"{order}I", kind)
        entry = struct.pack(order + ("HHQ" if big else "HHI"), 254, 4, 1) + value + bytes(4 * big)
        body += struct.pack(order + ("Q" if big else "H"), 1) + entry
        body += struct.pack(order + ("Q" if big else "I"), after)
    return head + body


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("big", [False, True])
def test_previews_and_masks_of_transparency_are_no_pages(tmp_path, order, big) -> None:
    path = tmp_path / "a.tif"
    path.write_bytes(tiff([0, 1, 0, 4, 2], order, big))  # 1 a preview, 4 transparency, 2 a page
    assert count_pages(path) == 3
    path.write_bytes(tiff([0, 0], order, big, circle=True))
    assert count_pages(path) == 2


def test_what_cannot_be_read_has_one_page(tmp_path: Path) -> None:
    path = tmp_path / "a.tif"
    for contents in (b"", b"II*\0", b"II*\0\xff\xff\xff\xff", b"\x89PNG", b"hello"):
        path.write_bytes(contents)
        assert count_pages(path) == 1
    os.mkfifo(tmp_path / "pipe.tif")
    assert count_pages(tmp_path / "pipe.tif") == 1  # and does not wait
    assert count_pages(tmp_path) == count_pages(tmp_path / "nothing.tif") == 1


def test_pages_of_another_size_or_kind_are_no_images(tmp_path: Path) -> None:
    path = tmp_path / "a.tif"
    gray, other = np.zeros((20, 24), np.uint8), np.zeros((20, 24, 3), np.uint8)
    with TiffWriter(path) as file:
        for page in (gray[:10], gray, other, gray.astype(np.uint16), gray):
            file.write(page, contiguous=False)
        file.write(gray[::2, ::2], subfiletype=1)
    others = ["preview 12x10", "page 1 24x10", "page 3 24x20", "page 4 24x20"]
    assert images_of(path) == ([2, 5], others) and count_pages(path) == 5
    assert [place_of(path, number) for number in (1, 2, 5)] == [0, 1, 4]
    with TiffWriter(path) as file:  # a thumbnail in front
        file.write(gray[:5, :5])
        file.write(gray, contiguous=False)
    assert images_of(path) == ([2], ["page 1 5x5"])


def test_pages_have_names_of_their_own(tmp_path: Path) -> None:
    first, *more = pictures(2)
    first.save(tmp_path / "a.tif", save_all=True, append_images=more)
    first.save(tmp_path / "b.png")
    pages, lines = by_page([tmp_path / "a.tif", tmp_path / "b.png"], tmp_path)
    assert [(page.number, str(page.below)) for page in pages] == [
        (1, "a-p1.tif"), (2, "a-p2.tif"), (1, "b.png"),
    ]  # fmt: skip
    assert lines == [f"{tmp_path}: every page is an image of its own: a.tif (2 pages)"]
