"""The folders of a set on the disk: which there are, and how they are written, all or none."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import cv2
import numpy as np
from numpy.typing import NDArray

from imaging.imagefile import Pixels
from utils.files import writing

LAYOUT = """\
  <data_dir>/train_numf/img/*.png    all training images; gt/ beside img/ holds their masks
  <data_dir>/test_numf/{img,gt}/     test images and masks
  <data_dir>/sup_num1_0/{img,gt}/    one annotated image (sup_num1_1 ... for other choices)
  A mask has its image's name, .png, one channel, pixel value = class id 0, 1, 2, ...
  `python train_defect.py` runs now, with a small set that it makes here."""


@contextmanager
def replacing_set(folder: Path, flag: str = "--out") -> Iterator[Path]:
    """An empty folder that takes the place of ``folder`` when the block ends without an error.

    If that cannot be written, ``folder`` stays as it was and a UserError names the option ``flag``.
    """
    with writing(folder, flag):
        folder.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(
            prefix=f".{folder.name}-", dir=folder.parent, ignore_cleanup_errors=True
        ) as place:
            new, old = Path(place, "new"), Path(place, "old")
            new.mkdir()
            yield new
            try:
                if folder.exists():
                    os.replace(folder, old)
                os.replace(new, folder)
            finally:
                if old.exists() and not folder.exists():  # stopped between the two renames
                    os.replace(old, folder)


def write_png(path: Path, pixels: Pixels, clear: NDArray[np.bool_] | None = None) -> None:
    """Write pixels, (H, W) or (H, W, 3) in RGB order, as a PNG; missing folders are made.

    Where ``clear`` (H, W) is true the picture is transparent.
    """
    stored = pixels[..., ::-1] if pixels.ndim == 3 else pixels  # OpenCV writes BGR
    if clear is not None and clear.any():
        colours = stored if stored.ndim == 3 else np.repeat(stored[..., None], 3, axis=2)
        stored = np.dstack([colours, np.where(clear, 0, 255).astype(np.uint8)])
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(cv2.imencode(".png", np.ascontiguousarray(stored))[1].tobytes())
