"""The bar that the benchmark draws is the one that prediction has to recognise."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from benchmarks.data_bar import PAPERS, lay_out, with_bar
from imaging.data_bar import Bar, find_bars
from imaging.field import Crop
from tests.tiny_set import make_set


@pytest.mark.parametrize("kind", PAPERS)
@pytest.mark.parametrize("shape", [(376, 376), (376, 376, 3), (200, 500)])
def test_a_bar_stands_below_the_field_and_its_crop_gives_that_back(
    kind: str, shape: tuple[int, ...]
) -> None:
    field = np.random.default_rng(0).integers(40, 200, shape, dtype=np.uint8)
    image, height = with_bar(field, *PAPERS[kind])
    assert height == max(24, round(0.08 * shape[0])) and image.shape == (
        shape[0] + height,
        *shape[1:],
    )
    np.testing.assert_array_equal(Crop(bottom=height).of(image), field)
    bar = image[-height:]
    paper, ink = PAPERS[kind]
    assert (bar == paper).mean() > 0.7 and (bar == ink).any()
    assert find_bars(image) == [Bar("bottom", height)] and not find_bars(field)


def test_fewer_images_replace_those_of_an_earlier_call(tmp_path: Path) -> None:
    pictures = sorted((make_set(tmp_path / "set", train=4) / "train_numf" / "img").iterdir())
    (tmp_path / "bars" / "images").mkdir(parents=True)
    (tmp_path / "bars" / "images" / "mine.png").touch()
    for number in (4, 2):
        assert lay_out(pictures[:number], tmp_path / "bars", "black") == 24
        left = {path.name for path in (tmp_path / "bars" / "images").iterdir()}
        assert left == {"mine.png", *(f"field{n:02d}.png" for n in range(number))}
