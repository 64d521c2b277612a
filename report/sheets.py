"""Contact sheets of an evaluation: test images beside their truth and their prediction."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from utils.drawing import best_median_worst, contact_sheet

Row = tuple[NDArray[Any], NDArray[Any], NDArray[Any]]
"""Image, uint8 (H, W) or (H, W, 3), true classes and predicted classes (H, W)."""


def write_sheets(
    folder: Path,
    stage: str,
    rows: Sequence[Row],
    names: Sequence[str],
    counts: NDArray[Any],
    *,
    heading: str,
    class_names: Sequence[str],
    colours: NDArray[Any],
    max_rows: int = 8,
) -> None:
    """Write ``sheet_<stage>_extremes.png`` and ``sheet_<stage>.png``.

    Args:
        folder, stage: of the run.
        rows: of each test image.
        names: of each test image.
        counts: confusion matrix of each test image, (n, C, C).
        heading: words above.
        class_names: of each class, or none.
        colours: uint8 (C, 3).
        max_rows: images on the second sheet at most.
    """
    look: dict[str, Any] = {"heading": heading, "class_names": class_names, "colours": colours}
    classes = counts.shape[-1]
    best_median_worst(folder / f"sheet_{stage}_extremes.png", rows, names, classes, **look)
    contact_sheet(folder / f"sheet_{stage}.png", rows, names, classes, max_rows, **look)
