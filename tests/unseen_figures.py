"""Figures that runs draw on their way, when nobody looks: digests of what they would show.

Matplotlib takes longer over them than a tiny run over its training. tests/test_figures.py draws.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
from PIL import Image

from comparison import notes
from report import figures, laboratory
from utils.files import replace_file


def _digest(shown: str) -> Image.Image:
    """A small picture that differs where ``shown`` does."""
    pixels = np.frombuffer(hashlib.sha256(shown.encode()).digest(), np.uint8)
    return Image.fromarray(pixels.reshape(4, 8)).convert("RGB")


def _png(shown: str) -> bytes:
    file = io.BytesIO()
    _digest(shown).save(file, format="PNG")
    return file.getvalue()


def _learning_curve(png_path: str | Path, metrics_jsonl: str | Path) -> Path:
    lines = [e for e in figures.read_metrics(metrics_jsonl) if e.keys() & {"epoch", "evaluation"}]
    replace_file(png_path, _png(json.dumps(lines)))
    return Path(png_path)


def _size_picture(title: str, diameters: Any, unit: str, colour: str = "") -> Image.Image:
    return _digest(f"{title} {diameters.tolist()} {unit}")


DIGESTS = (
    (figures, "learning_curve", _learning_curve),
    (laboratory, "size_picture", _size_picture),
    (notes, "dots_png", lambda panels: _png(repr(panels))),
)
DRAWN = [getattr(owner, name) for owner, name, _ in DIGESTS]


@contextmanager
def figures_unseen(unseen: bool = True) -> Iterator[None]:
    """In this process figures are digests meanwhile, or drawn after all."""
    with ExitStack() as patches:
        for (owner, name, digest), drawn in zip(DIGESTS, DRAWN, strict=True):
            patches.enter_context(patch.object(owner, name, digest if unseen else drawn))
        yield
