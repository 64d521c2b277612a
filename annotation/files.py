"""Read annotations that are outlines: labelme JSON, ImageJ regions, GeoJSON."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from annotation import geojson, imagej, labelme
from annotation.names import class_id
from annotation.shapes import Shape, paint
from imaging.imagefile import Pixels
from utils.files import DataError

ANNOTATION_SUFFIXES = (".json", ".geojson", ".zip", ".roi")
KINDS_READ = "LabelMe JSON, GeoJSON (QuPath), ImageJ .roi and RoiSet.zip"
LARGEST = 2**30  # bytes of a file


def read_annotation(
    path: str | Path,
    size: tuple[int, int],
    names: Sequence[str],
    *,
    told: list[str] | None = None,
) -> Pixels:
    """Class ids of an image, uint8 (H, W), from the outlines in a file; 0 where none is.

    ``size`` is (H, W) of the image and ``names`` the class of each id, see
    ``annotation.names.class_names``; which pixels an outline covers stands in
    ``annotation.shapes``. ``told`` gets lines of warning. Raises DataError for what cannot be read,
    was drawn on an image of another size, lies outside of it, or has another class.
    """
    shapes, drawn_on = _read(Path(path))
    if drawn_on not in (None, size):
        assert drawn_on is not None
        found = f"{path}: drawn on an image of {drawn_on[1]}x{drawn_on[0]} pixels"
        raise DataError(f"{found}, its image has {size[1]}x{size[0]}; draw on the same image")
    try:
        labels = [class_id(shape.name, names) for shape in shapes]
    except DataError as error:
        raise DataError(f"{path}: {error}") from None
    return paint(zip(labels, shapes, strict=True), size, str(path), told)


def names_in(path: str | Path) -> set[str]:
    """Names of the classes in a file, '' for shapes without one. Raises DataError."""
    return {shape.name for shape in _read(Path(path))[0]}


def is_annotation(path: Path) -> bool:
    """Whether a file's name ends as those that ``read_annotation`` reads."""
    return path.suffix.lower() in ANNOTATION_SUFFIXES


def another_kind(path: Path) -> str:
    """What a sound file is that ends like an annotation but is none; '' if it may be one."""
    if not is_annotation(path):
        return ""
    with suppress(OSError, ValueError, RecursionError, MemoryError, zipfile.BadZipFile):
        raw = path.read_bytes() if path.is_file() and path.stat().st_size <= LARGEST else b"{"
        if raw.startswith(b"PK"):
            with zipfile.ZipFile(io.BytesIO(raw)) as archive:
                names = archive.namelist()
            regions = any(name.lower().endswith(".roi") for name in names)
            return "" if regions or not names else "ZIP without regions of ImageJ"
        if not raw.startswith(b"Iout"):
            content = json.loads(raw.decode("utf-8-sig"))
            shapes = isinstance(content, dict) and isinstance(content.get("shapes"), list)
            return "" if shapes or geojson.is_geojson(content) else _kind(content)
    return ""


def _read(path: Path) -> tuple[list[Shape], tuple[int, int] | None]:
    """The shapes of a file, and (H, W) of the image that was drawn on, if it is told."""
    try:
        if not path.is_file():
            raise DataError(f"{path}: no regular file; remove or replace it")
        if path.stat().st_size > LARGEST:
            raise DataError(f"{path}: more than 1 GB of outlines; export fewer of them")
        raw = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be opened ({error.strerror}); check the path") from None
    try:
        if raw.startswith((b"PK", b"Iout")):
            return imagej.shapes_of(raw), None
        content = json.loads(raw.decode("utf-8-sig"))
        if isinstance(content, dict) and isinstance(content.get("shapes"), list):
            return labelme.shapes_of(content), labelme.size_of(content)
        if geojson.is_geojson(content):
            return geojson.shapes_of(content), None
    except DataError:
        raise
    except MemoryError:
        raise DataError(f"{path}: does not fit into the memory; export fewer outlines") from None
    except Exception as error:  # whatever a damaged file leads to
        own = type(error) is ValueError and "\n" not in str(error)
        what = str(error) if own else "damaged or cut short"
        raise DataError(f"{path}: {what}; {_cure()}") from None
    raise DataError(f"{path}: {_kind(content)}; {_cure()}")


def _kind(content: Any) -> str:
    """What a JSON file of another kind is."""
    if isinstance(content, dict) and {"images", "annotations"} <= content.keys():
        return "COCO, all images in one file"
    return "JSON of another kind"


def _cure() -> str:
    return f"export it again as one of these: {KINDS_READ}, or as a PNG of class ids"
