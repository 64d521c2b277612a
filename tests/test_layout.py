"""A set is written in full or not at all, whatever stops it."""

import os

import cv2
import numpy as np
import pytest
from PIL import Image

from dataset.layout import replacing_set, write_png
from utils.commandline import UserError


def test_the_new_set_takes_the_place_of_the_old_one(tmp_path):
    for text in ("first", "second"):
        with replacing_set(tmp_path / "above" / "set") as root:
            assert list(root.iterdir()) == []
            (root / text).write_text(text)
    assert os.listdir(tmp_path / "above") == ["set"]
    assert os.listdir(tmp_path / "above" / "set") == ["second"]


@pytest.mark.parametrize("stop", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_a_stop_leaves_the_old_set_and_nothing_else(tmp_path, stop):
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "mine").write_text("x")
    with (
        pytest.raises((KeyboardInterrupt, UserError)) as caught,
        replacing_set(tmp_path / "set", "--here") as root,
    ):
        (root / "half").write_text("y")
        raise stop
    if caught.type is UserError:
        assert "set: cannot be written (No space left on device)" in str(caught.value)
        assert "--here" in str(caught.value)
    assert os.listdir(tmp_path) == ["set"] and os.listdir(tmp_path / "set") == ["mine"]


def test_a_stop_between_the_two_renames_brings_the_old_set_back(tmp_path, monkeypatch):
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "mine").write_text("x")
    rename, calls = os.replace, []

    def stop(source, target):
        calls.append(target)
        if len(calls) == 2:
            raise KeyboardInterrupt
        rename(source, target)

    monkeypatch.setattr(os, "replace", stop)
    with pytest.raises(KeyboardInterrupt), replacing_set(tmp_path / "set") as root:
        (root / "new").write_text("y")
    assert os.listdir(tmp_path) == ["set"] and os.listdir(tmp_path / "set") == ["mine"]


@pytest.mark.parametrize("shape", [(5, 7), (5, 7, 3)])
def test_a_png_holds_the_pixels_in_their_order(tmp_path, shape):
    pixels = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    for given in (pixels, np.ascontiguousarray(pixels[::-1])[::-1]):  # contiguous or not
        write_png(tmp_path / "deep" / "er" / "a.png", given)
        found = np.asarray(Image.open(tmp_path / "deep" / "er" / "a.png"))
        np.testing.assert_array_equal(found, pixels)
    stored = cv2.imread(str(tmp_path / "deep/er/a.png"), cv2.IMREAD_UNCHANGED)
    assert stored is not None and stored.shape == shape
