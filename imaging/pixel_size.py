"""How large a pixel is, as the file itself says: micrometres, and where they were found.

Read are the tags of FEI and Thermo Fisher, Zeiss, TESCAN and Olympus, OME's XML, ImageJ's
description, and the resolution of TIFF and PNG files. A resolution counts only where a microscope
may have written it: 72, 96 or 300 dots an inch, say, are a printer's or a screen's.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree import ElementTree

from PIL.PngImagePlugin import PngImageFile
from tifffile import TiffFile

from imaging.imagefile import PNG_MAGIC
from imaging.tiff import TIFF_MAGIC
from utils.files import DataError

SAME = 0.01  # sizes that differ by less than this share of them are one
COARSEST = 10.0  # um: a coarser pixel in the resolution tags is no microscope's
PRINTERS, FINEST_PRINTER = (100, 360), 9600  # multiples of these dots an inch, up to that
INCH, CENTIMETRE = 25_400.0, 10_000.0  # um
# By their names in lower case: \u00e5 is that of the letter \u00c5 and of the sign \u212b.
UNITS = {"m": 1e6, "cm": CENTIMETRE, "mm": 1e3, "nm": 1e-3, "pm": 1e-6, "inch": INCH, "in": INCH}
UNITS |= dict.fromkeys(("um", "\u00b5m", "\u03bcm", "micron", "microns"), 1.0)
UNITS |= {"\u00e5": 1e-4, "a": 1e-4, "angstrom": 1e-4}
NAMES = {"micro": 1.0, "nano": 1e-3, "milli": 1e3}
UNITS |= {f"{name}met{end}": um for name, um in NAMES.items() for end in ("er", "ers", "re", "res")}
SCALES_UM = (1e-6, 1e6)
"""Smallest and largest side of a pixel in um that is believed: a picometre and a metre."""
POSSIBLE = f"{SCALES_UM[0]:g} to {SCALES_UM[1]:g}"
COPIED = ("inch", "in", "cm")
RESOLUTION_UNITS = {2: INCH, 3: CENTIMETRE, 4: 1e3, 5: 1.0}  # 4 and 5: of some programs
TESCAN_TAG = 50431

Found = tuple[float, float, str]  # um of a pixel along x and y, and where it was found


def is_possible(um: float) -> bool:
    """Whether micrometres per pixel are believed; nan is not."""
    return SCALES_UM[0] <= um <= SCALES_UM[1]


class PixelSize(NamedTuple):
    """The side of a square pixel."""

    um: float  # micrometres
    where: str  # in words for a user: "ImageJ's description"


def pixel_size(path: str | Path) -> PixelSize | None:
    """The size of an image's pixels, None if the file does not tell (or cannot be read).

    Raises DataError for pixels that are not square, and for a file that contradicts itself: both
    need ``--um_per_px``.
    """
    found = list(_sizes(Path(path)))
    for um_x, um_y, where in found:
        if not _same(um_x, um_y):
            what = f"pixels of {um_x:.4g} x {um_y:.4g} µm ({where}), which are not square"
            raise DataError(f"{path}: {what}; scale the image, or give --um_per_px")
    for um, _, where in found[1:]:
        if not _same(um, found[0][0]):
            what = f"a pixel is {found[0][0]:.4g} µm by {found[0][2]}, {um:.4g} µm by {where}"
            raise DataError(f"{path}: {what}; give --um_per_px")
    return PixelSize(found[0][0], found[0][2]) if found else None


def _same(one: float, other: float) -> bool:
    return abs(one - other) <= SAME * max(one, other)


def _sizes(path: Path) -> Iterator[Found]:
    """What each source in a file says, those of instruments first; damaged ones say nothing."""
    with suppress(Exception):  # of a damaged file: reading its pixels says so
        if not os.path.isfile(path):  # a pipe would be waited for
            return
        with open(path, "rb") as file:
            magic = file.read(4)
        if magic == PNG_MAGIC:
            with suppress(Exception), PngImageFile(path) as picture:
                # Pixels an inch, from the chunk pHYs.
                across, down = picture.info["dpi"]
                yield from _resolution(across, down, INCH, "resolution of the PNG (pHYs)")
        if magic in TIFF_MAGIC:
            with TiffFile(os.fspath(path)) as tiff:
                for source in SOURCES:
                    with suppress(Exception):
                        for um_x, um_y, where in source(tiff):
                            if all(math.isfinite(um) and um > 0 for um in (um_x, um_y)):
                                yield um_x, um_y, where


def _fei(tiff: TiffFile) -> Iterator[Found]:
    """FEI and Thermo Fisher: metres, in the section of the scan."""
    tags: Any = tiff.fei_metadata or {}
    sections = [name for name in ("Scan", "EScan", "IScan") if "PixelWidth" in tags.get(name, {})]
    for scan in (tags[name] for name in sections[:1]):
        where = "the microscope's tag (FEI)"
        yield float(scan["PixelWidth"]) * 1e6, float(scan["PixelHeight"]) * 1e6, where


def _zeiss(tiff: TiffFile) -> Iterator[Found]:
    """Zeiss: of the image as it is stored, else of the scan."""
    tags: Any = tiff.sem_metadata or {}
    for name in ("ap_image_pixel_size", "ap_pixel_size"):
        if len(tags.get(name, ())) == 3 and tags[name][2].lower() in UNITS:
            um = float(tags[name][1]) * UNITS[tags[name][2].lower()]
            yield um, um, "the microscope's tag (Zeiss)"
            return


def _tescan(tiff: TiffFile) -> Iterator[Found]:
    """TESCAN: metres, lines of a private tag."""
    text = tiff.pages.first.tags.valueof(TESCAN_TAG) or b""
    text = text.decode("latin-1") if isinstance(text, bytes) else str(text)
    found = dict(re.findall(r"^(PixelSize[XY])\s*=\s*(\S+)", text, re.MULTILINE))
    if found:
        where = "the microscope's tag (TESCAN)"
        yield float(found["PixelSizeX"]) * 1e6, float(found["PixelSizeY"]) * 1e6, where


def _olympus(tiff: TiffFile) -> Iterator[Found]:
    """Olympus: metres."""
    tags: Any = tiff.sis_metadata or {}
    if "pixelsizex" in tags:
        where = "the microscope's tag (Olympus)"
        yield float(tags["pixelsizex"]) * 1e6, float(tags["pixelsizey"]) * 1e6, where


def _ome(tiff: TiffFile) -> Iterator[Found]:
    """OME: attributes of the first image's pixels, micrometres unless they name a unit."""
    tree = ElementTree.fromstring(tiff.ome_metadata or "<none/>")
    pixels = next((each for each in tree.iter() if each.tag.endswith("Pixels")), None)
    if pixels is not None and pixels.get("PhysicalSizeX"):
        um = [
            float(pixels.get(f"PhysicalSize{axis}", ""))
            * UNITS[pixels.get(f"PhysicalSize{axis}Unit", "um").lower()]
            for axis in "XY"
        ]
        yield um[0], um[1], "OME's description"


def _imagej(tiff: TiffFile) -> Iterator[Found]:
    """ImageJ: the unit stands in the description, pixels a unit in the resolution tags.

    Inches and centimetres are left to the resolution tags: ImageJ copies them from there.
    """
    unit_x, unit_y = _imagej_units(tiff)
    if unit_x in UNITS and unit_y in UNITS and unit_x not in COPIED:
        per_x, per_y = _pixels_a_unit(tiff)
        yield UNITS[unit_x] / per_x, UNITS[unit_y] / per_y, "ImageJ's description"


def _imagej_units(tiff: TiffFile) -> list[str]:
    """The units along x and y, in lower case; inches if there is no description of ImageJ."""
    tags: Any = tiff.imagej_metadata or {}
    unit = tags.get("unit", "pixel" if tags else "inch")
    return [_unescaped(str(each)).lower() for each in (unit, tags.get("yunit", unit))]


def _unescaped(text: str) -> str:
    """ImageJ's ``\\u00B5m`` as the letters that it stands for."""
    return re.sub(r"\\u([0-9a-fA-F]{4})", lambda found: chr(int(found[1], 16)), text)


def _resolution_tags(tiff: TiffFile) -> Iterator[Found]:
    """XResolution, YResolution and ResolutionUnit; ImageJ's numbers have a unit of their own."""
    unit = RESOLUTION_UNITS.get(int(tiff.pages.first.tags.valueof(296, 2)))
    if unit and set(_imagej_units(tiff)) <= {*COPIED}:
        per_x, per_y = _pixels_a_unit(tiff)
        yield from _resolution(per_x, per_y, unit, "resolution tags of the TIFF")


def _pixels_a_unit(tiff: TiffFile) -> tuple[float, float]:
    tags = tiff.pages.first.tags
    (a, b), (c, d) = tags.valueof(282), tags.valueof(283, tags.valueof(282))
    return a / b, c / d


def _resolution(per_x: float, per_y: float, unit: float, where: str) -> Iterator[Found]:
    """The size by pixels a unit (in um), unless a printer or a screen is meant."""
    dots = per_x * INCH / unit
    whole = abs(dots - round(dots)) <= 1e-3 * dots
    printer = dots <= FINEST_PRINTER and whole and any(round(dots) % n == 0 for n in PRINTERS)
    if not printer and 0 < unit / per_x <= COARSEST:
        yield unit / per_x, unit / per_y, where


SOURCES: tuple[Callable[[TiffFile], Iterator[Found]], ...] = (
    _fei, _zeiss, _tescan, _olympus, _ome, _imagej, _resolution_tags,
)  # fmt: skip
