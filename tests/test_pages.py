"""Numbers of pages, of files that Pillow wrote and of headers written by hand."""

from __future__ import annotations

import os
import struct
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from imaging.pages import count_pages


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
