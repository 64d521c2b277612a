"""The synthetic micrographs of the demo."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import segmentation.demo.micrographs as micrographs
from imaging.imagefile import read_image, read_mask
from segmentation.demo.micrographs import draw_micrograph, make_micrographs
from utils.commandline import UserError


def test_every_image_shows_every_phase_and_images_differ_in_light() -> None:
    means = []
    for number in range(8):
        image, mask = draw_micrograph(np.random.default_rng([0, 1, number]))
        assert image.shape == mask.shape == (micrographs.SIDE, micrographs.SIDE)
        shares = np.bincount(mask.ravel(), minlength=4) / mask.size
        assert (shares > (0.3, 0.1, 0.05, 0.005)).all() and len(shares) == 4
        means.append(float(image[mask == micrographs.FERRITE].mean()))
        # Gray levels in the order of the phases: dark boundaries, bright particles.
        levels = [image[mask == c].mean() for c in range(4)]
        assert np.argsort(levels).tolist() == [1, 2, 0, 3]
    assert max(means) - min(means) > 20


def test_the_set_is_made_once_and_has_one_mask(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(micrographs, "IMAGES", 3)
    folder = make_micrographs(tmp_path / "set")
    names = {kind: sorted(p.name for p in (folder / kind).iterdir())
             for kind in ("images", "masks", "truth")}  # fmt: skip
    assert len(names["images"]) == 3 and names["truth"] == names["images"]
    assert names["masks"] == names["images"][:1]
    assert read_image(folder / "images" / "steel_01.png").ndim == 2
    assert read_mask(folder / "masks" / "steel_00.png").max() == 3
    monkeypatch.setattr(micrographs, "draw_micrograph", None)
    assert make_micrographs(folder) == folder
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "mine.txt").write_text("x", encoding="utf-8")
    with pytest.raises(UserError, match="holds other files"):
        make_micrographs(tmp_path / "other")
