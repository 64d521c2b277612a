"""The page on a job of ``segment.py``: its template is ``segmentation.html``, given data."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from imaging.drawing import Picture as Pixels
from report.page import Picture, write_page


def write_segmentation(path: Path, content: Mapping[str, Any], pictures: Pixels) -> Path:
    """Write the page; ``pictures`` is the overview of all images, RGB uint8 (H, W, 3)."""
    all_images = Picture("All images with their classes", Image.fromarray(pictures), "class maps")
    whole = {**content, "overview": all_images}
    return write_page(path, "segmentation.html", whole, [all_images])
