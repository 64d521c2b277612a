"""Pixel sizes out of files whose size is known, and none out of a printer's resolution."""

import os
import struct

import numpy as np
import pytest
import tifffile
from PIL import Image

from imaging.pixel_size import PixelSize, pixel_size
from utils.files import DataError

PIXELS = np.zeros((16, 20), np.uint8)
FEI = "[System]\r\nType=SEM\r\n[Scan]\r\nPixelWidth=3.4e-009\r\nPixelHeight=3.4e-009\r\n"
ZEISS = (
    "\r\n0\r\n0\r\n0\r\n1.2e-8\r\n0\r\nAP_MAG\r\nMag =  1.00 K X\r\n"
    "AP_PIXEL_SIZE\r\nPixel Size = 24.00 nm\r\n"
    "AP_IMAGE_PIXEL_SIZE\r\nImage Pixel Size = 12.00 nm\r\n"
)
TESCAN = "[MAIN]\r\nMagnification=1000\r\nPixelSizeX=2.5e-008\r\nPixelSizeY=2.5e-008\r\n"
OME = (
    '<?xml version="1.0" encoding="UTF-8"?><OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06">'
    '<Image ID="Image:0"><Pixels ID="Pixels:0" SizeX="20" SizeY="16" {}/></Image></OME>'
)


def write(path, **options):
    tifffile.imwrite(path, PIXELS, **{"metadata": None, **options})
    return path


def tag(number: int, text: str) -> list:
    return [(number, "s", 0, text.encode("cp1252"), True)]


KNOWN = {
    # name: (options of tifffile.imwrite, um of a pixel by hand, what the place is called)
    "FEI": ({"extratags": tag(34680, FEI)}, 0.0034, "FEI"),
    "FEI Helios": ({"extratags": tag(34682, FEI)}, 0.0034, "FEI"),
    "Zeiss": ({"extratags": tag(34118, ZEISS)}, 0.012, "Zeiss"),
    "Zeiss, in um": (
        {"extratags": tag(34118, "\r\nAP_PIXEL_SIZE\r\nPixel Size = 1.25 \u00b5m\r\n")},
        1.25,
        "Zeiss",
    ),
    "TESCAN": ({"extratags": tag(50431, TESCAN)}, 0.025, "TESCAN"),
    "OME": ({"description": OME.format('PhysicalSizeX="0.25" PhysicalSizeY="0.25"')}, 0.25, "OME"),
    "OME in nm": (
        {
            "description": OME.format(
                'PhysicalSizeX="80" PhysicalSizeXUnit="nm" PhysicalSizeY="0.08"'
            )
        },
        0.08,
        "OME",
    ),
    "ImageJ micrometers": (
        {"imagej": True, "resolution": (10, 10), "metadata": {"unit": "micrometers"}},
        0.1,
        "ImageJ",
    ),
    "ImageJ nanometres": (
        {"imagej": True, "resolution": (0.02, 0.02), "metadata": {"unit": "Nanometres"}},
        0.05,
        "ImageJ",
    ),
    "ImageJ micron": (
        {"imagej": True, "resolution": (10, 10), "metadata": {"unit": "micron"}},
        0.1,
        "ImageJ",
    ),
    "ImageJ um": (
        {"imagej": True, "resolution": (4, 4), "metadata": {"unit": "um"}},
        0.25,
        "ImageJ",
    ),
    "ImageJ \\u00B5m": (
        {"imagej": True, "resolution": (20, 20), "metadata": {"unit": "\\u00B5m"}},
        0.05,
        "ImageJ",
    ),
    "ImageJ \\u00c5": (
        {"imagej": True, "resolution": (0.05, 0.05), "metadata": {"unit": "\\u00c5"}},
        0.002,
        "ImageJ",
    ),
    "ImageJ \\u03BCm": (
        {"imagej": True, "resolution": (20, 20), "metadata": {"unit": "\\u03BCm"}},
        0.05,
        "ImageJ",
    ),
    "Zeiss, in \u00c5": (
        {"extratags": tag(34118, "\r\nAP_PIXEL_SIZE\r\nPixel Size = 50 \u00c5\r\n")},
        0.005,
        "Zeiss",
    ),
    "ImageJ nm": (
        {"imagej": True, "resolution": (0.05, 0.05), "metadata": {"unit": "nm"}},
        0.02,
        "ImageJ",
    ),
    "ImageJ mm": (
        {"imagej": True, "resolution": (50, 50), "metadata": {"unit": "mm"}},
        20,
        "ImageJ",
    ),
    "ImageJ cm": (
        {
            "imagej": True,
            "resolution": (40_000, 40_000),
            "resolutionunit": 3,
            "metadata": {"unit": "cm"},
        },
        0.25,
        "resolution tags",
    ),
    "centimetres": ({"resolution": (20_000, 20_000), "resolutionunit": 3}, 0.5, "resolution tags"),
    "inches": ({"resolution": (127_000, 127_000), "resolutionunit": 2}, 0.2, "resolution tags"),
    "5 um in centimetres": (
        {"resolution": (2_000, 2_000), "resolutionunit": 3},
        5,
        "resolution tags",
    ),
    "more dots an inch than a printer has": (
        {"resolution": (10_000, 10_000), "resolutionunit": 2},
        2.54,
        "resolution tags",
    ),
    "an instrument beside a printer's resolution": (
        {"extratags": tag(34680, FEI), "resolution": (96, 96), "resolutionunit": 2},
        0.0034,
        "FEI",
    ),
    "an instrument that the resolution agrees with": (
        {
            "extratags": tag(50431, TESCAN),
            "resolution": (400_000, 400_000),
            "resolutionunit": 3,
        },
        0.025,
        "TESCAN",
    ),
}


@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("kind", KNOWN)
def test_sizes_that_files_tell_are_found(tmp_path, kind, order):
    options, um, where = KNOWN[kind]
    found = pixel_size(write(tmp_path / "a.tif", byteorder=order, **options))
    assert found is not None and found.um == pytest.approx(um, rel=1e-6)
    assert where in found.where


@pytest.mark.parametrize(
    "options",
    [
        {},
        *({"resolution": (n, n), "resolutionunit": 2} for n in (1, 72, 96, 300, 600, 1200, 2400)),
        *({"resolution": (n, n), "resolutionunit": 2} for n in (3600, 4800, 5760, 7200, 9600)),
        *({"resolution": (n, n), "resolutionunit": 3} for n in (1, 28.346, 37.795, 118.11, 999)),
        {"resolution": (50_000, 50_000), "resolutionunit": 1},
        {"imagej": True, "resolution": (10, 10), "metadata": {"unit": "pixel"}},
        {"imagej": True, "resolution": (72, 72), "metadata": {"unit": "inch"}},
        {"imagej": True, "resolution": (28.35, 28.35), "metadata": {"unit": "cm"}},
        {"imagej": True},
        {"extratags": tag(34680, "[Scan]\nPixelWidth=0\nPixelHeight=0\n")},
        {"extratags": tag(34680, "[Scan]\nPixelWidth=nan\nPixelHeight=nan\n")},
        {"extratags": tag(34118, "\nAP_PIXEL_SIZE\nPixel Size = 3 parsec\n")},
        {"extratags": tag(50431, "nothing")},
        {"description": OME.format("")},
        {"description": "<OME>damaged OME>"},
    ],
)
def test_files_that_tell_no_size_have_none(tmp_path, options, capfd):
    assert pixel_size(write(tmp_path / "a.tif", **options)) is None
    assert capfd.readouterr() == ("", "")


def test_olympus_sizes_are_found(tmp_path):
    name = b"x".ljust(32, b"\0")
    head = struct.pack("<4s6xhhhhh6x32sH", b"SIS0", 1, 2, 3, 4, 105, name, 1)
    body = struct.pack("<10xhdd8xd2x34s32s", -6, 0.125, 0.125, 50.0, b"", b"")
    extra = [(33560, "B", 0, head + struct.pack("<hhI", 1, 1, 0) + body, True)]
    path = write(tmp_path / "a.tif", extratags=extra)
    raw = bytearray(path.read_bytes())
    start = raw.index(b"SIS0")
    struct.pack_into("<I", raw, start + len(head) + 4, start + len(head) + 8)
    path.write_bytes(raw)
    found = pixel_size(path)
    assert found is not None and found.um == pytest.approx(0.125) and "Olympus" in found.where


@pytest.mark.parametrize(
    ("dots", "um"), [((5_000_000, 5_000_000), 0.2), ((3780, 3780), None), ((11811, 11811), None)]
)
def test_png_tells_pixels_a_metre(tmp_path, dots, um):
    path = tmp_path / "a.png"
    Image.fromarray(PIXELS).save(path, dpi=tuple(n * 0.0254 for n in dots))
    found = pixel_size(path)
    if um is None:
        assert found is None
    else:
        assert found == PixelSize(pytest.approx(um, rel=1e-6), "resolution of the PNG (pHYs)")


@pytest.mark.parametrize(
    "options",
    [
        {"imagej": True, "resolution": (10, 20), "metadata": {"unit": "um"}},
        {"resolution": (20_000, 10_000), "resolutionunit": 3},
        {"extratags": tag(34680, "[Scan]\nPixelWidth=1e-9\nPixelHeight=2e-9\n")},
        {"description": OME.format('PhysicalSizeX="0.25" PhysicalSizeY="0.30"')},
    ],
)
def test_pixels_that_are_not_square_are_refused(tmp_path, options):
    with pytest.raises(DataError, match=r"a\.tif: pixels of .* not square.*--um_per_px") as caught:
        pixel_size(write(tmp_path / "a.tif", **options))
    assert "\n" not in str(caught.value)


def test_a_file_that_contradicts_itself_is_refused(tmp_path):
    options = {"extratags": tag(34680, FEI), "resolution": (20_000, 20_000), "resolutionunit": 3}
    with pytest.raises(DataError, match=r"0\.0034 µm by .*FEI.*, 0\.5 µm by .*--um_per_px"):
        pixel_size(write(tmp_path / "a.tif", **options))


@pytest.mark.parametrize("raw", [b"", b"II*\0", b"MM\0*\0\0\0\x08\0\1", b"\x89PNG\r\n", b"hello"])
def test_what_is_no_image_tells_nothing(tmp_path, raw, capfd):
    path = tmp_path / "a.tif"
    path.write_bytes(raw)
    assert pixel_size(path) is None
    assert pixel_size(tmp_path / "gone.tif") is None and pixel_size(tmp_path) is None
    assert capfd.readouterr() == ("", "")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes on this system")
def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "a.tif")
    assert pixel_size(tmp_path / "a.tif") is None
