"""Read annotations that are outlines: labelme JSON, ImageJ regions, GeoJSON."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Collection, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from annotation import geojson, imagej, labelme
from annotation.names import (
    BACKGROUND,
    IGNORE,
    NO_NUMBERS,
    Numbers,
    class_id,
    class_of_region,
    numbers_of,
)
from annotation.planes import check_one, slices_of
from annotation.shapes import Shape, paint
from imaging.imagefile import Pixels
from utils.files import DataError
from utils.metrics import IGNORED

ANNOTATION_SUFFIXES = (".json", ".geojson", ".zip", ".roi")
KINDS_READ = "LabelMe JSON, GeoJSON (QuPath), ImageJ .roi and RoiSet.zip"
LARGEST = 2**30  # bytes of a file


class Drawn(NamedTuple):
    """What a file of outlines holds."""

    path: Path
    shapes: list[Shape]
    size: tuple[int, int] | None  # (H, W) of the image that was drawn on, if it is told
    regions: bool  # of ImageJ: their names may end with a number that only counts them

    def classes(self, known: Collection[str] = (), numbers: Numbers = NO_NUMBERS) -> list[str]:
        """The class of each shape by its name, see ``annotation.names.class_of_region``."""
        names, lower = [s.name for s in self.shapes], {name.strip().casefold() for name in known}
        return [class_of_region(n, lower, numbers) for n in names] if self.regions else names


def numbers_in(files: Iterable[Drawn]) -> Numbers:
    """What the numbers mean in the names of all regions, see ``annotation.names.numbers_of``."""
    return numbers_of([s.name for s in drawn.shapes] for drawn in files if drawn.regions)


def read_annotation(
    path: str | Path,
    size: tuple[int, int],
    names: Sequence[str],
    *,
    page: int = 0,
    particles: bool = False,
    told: list[str] | None = None,
) -> Pixels:
    """Class ids of an image, uint8 (H, W), from the outlines in a file; 0 where none is.

    ``size`` is (H, W) of the image and ``names`` the class of each id, see
    ``annotation.names.class_names``; which pixels an outline covers stands in
    ``annotation.shapes``. Of a stack's file those on the slice ``page`` count, see ``pages_in``;
    without it all, which must be of one slice then. Of ``particles`` every outline is class 1,
    whatever number it has. ``told`` gets lines of warning. Raises DataError for what cannot be
    read, was drawn on an image of another size, lies outside of it, or has another class.
    """
    drawn = read_drawn(path)
    if drawn.size not in (None, size):
        assert drawn.size is not None
        found = f"{path}: drawn on an image of {drawn.size[1]}x{drawn.size[0]} pixels"
        raise DataError(f"{found}, its image has {size[1]}x{size[0]}; draw on the same image")
    if not page:
        check_one((shape.plane for shape in drawn.shapes), path)
    try:
        own = drawn.classes(names)
        labels = [_particle(name) if particles else class_id(name, names) for name in own]
    except DataError as error:
        raise DataError(f"{path}: {error}") from None
    both = zip(labels, drawn.shapes, strict=True)
    here = [(label, shape) for label, shape in both if not page or shape.plane.slice == page]
    return paint(here, size, str(path), told)


def _particle(name: str) -> int:
    key = name.strip().casefold()
    return IGNORED if key in IGNORE else 0 if key in BACKGROUND else 1


def pages_in(path: str | Path) -> set[int]:
    """The pages of a stack that a file's outlines were drawn on; none if it tells no slice.

    Raises DataError where some have a slice, or where the file does not tell the page.
    """
    return slices_of((shape.plane for shape in read_drawn(path).shapes), path)


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


def read_drawn(path: str | Path) -> Drawn:
    """What a file of outlines holds. Raises DataError."""
    path = Path(path)
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
            return Drawn(path, imagej.shapes_of(raw), None, regions=True)
        content = json.loads(raw.decode("utf-8-sig"))
        if isinstance(content, dict) and isinstance(content.get("shapes"), list):
            size = labelme.size_of(content)
            return Drawn(path, labelme.shapes_of(content), size, regions=False)
        if geojson.is_geojson(content):
            return Drawn(path, geojson.shapes_of(content), None, regions=False)
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
