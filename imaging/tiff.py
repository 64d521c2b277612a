"""TIFF files, decoded as their tags say: the right pixels, or a refusal that names the tag.

tifffile reads the tags; the values are put together here, because the usual readers differ in what
they make of rare ones: Pillow mixes up 16-bit planes, OpenCV leaves 16-bit negatives negative.
"TIFF Revision 6.0" (Adobe, 1992) defines the tags, its Technical Notes JPEG (7) and the predictor
of floats (3).
"""

from __future__ import annotations

import io
import logging
import lzma
import re
import struct
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from PIL.TiffImagePlugin import TiffImageFile
from tifffile import COMPRESSION as COMPRESSIONS
from tifffile import PHOTOMETRIC as PHOTOMETRICS
from tifffile import TIFF, TiffFile

Array = NDArray[Any]

BIG_TIFF = (b"II+\0", b"MM\0+")  # with 64-bit offsets
TIFF_MAGIC = (b"II*\0", b"MM\0*", *BIG_TIFF)

# Tags by their names in the standard.
SUBFILE, WIDTH, HEIGHT, BITS, COMPRESSION, PHOTOMETRIC = 254, 256, 257, 258, 259, 262
FILL_ORDER, DESCRIPTION, STRIP_OFFSETS, ORIENTATION = 266, 270, 273, 274
SAMPLES, ROWS_PER_STRIP = 277, 278
STRIP_COUNTS, PLANAR, PREDICTOR, COLOUR_MAP = 279, 284, 317, 320
TILE_WIDTH, TILE_HEIGHT, TILE_OFFSETS, TILE_COUNTS = 322, 323, 324, 325
INK_SET, EXTRA_SAMPLES, SAMPLE_FORMAT, DEPTH = 332, 338, 339, 32997
PREVIEW, TRANSPARENCY = 1, 4  # of SUBFILE: pages that are none

WHITE_IS_ZERO, BLACK_IS_ZERO, RGB, PALETTE, CMYK, YCBCR = 0, 1, 2, 3, 5, 6
COLOURS = {WHITE_IS_ZERO: 1, BLACK_IS_ZERO: 1, RGB: 3, PALETTE: 1, CMYK: 4, YCBCR: 3}  # samples
CCITT, LZW, JPEG, DEFLATE, PACKBITS = (2, 3, 4), 5, 7, (8, 32946), 32773
LZMA, ZSTD = 34925, 50000
NUMBERS = {1: "u", 2: "i", 3: "f", 4: "u"}  # of SAMPLE_FORMAT; 4 is undefined: as without the tag
WORDS = {"u": "whole numbers", "i": "whole numbers with sign", "f": "floats"}
TOP_BITS = {"u": (*range(1, 33), 64), "i": (8, 16, 32, 64), "f": (16, 32, 64)}
MOST_PACKED = 3000  # bytes made of one: LZW packs no tighter; a file that claims more is damaged
SMALL = 8_000_000  # bytes: a picture so small may be packed tighter yet

logging.getLogger("tifffile").disabled = True  # what it logs about damage, one line here says


class Unread(Exception):
    """A tag whose value is not read; the text names both."""

    def __init__(self, tag: int, value: object, cure: str = "") -> None:
        name = TIFF.TAGS.get(tag, "tag")
        cure = cure or "export it as an uncompressed 8 or 16-bit TIFF, or as PNG"
        super().__init__(f"{name} (TIFF tag {tag}) is {value}, which is not read; {cure}")


class TiffPage(NamedTuple):
    """A page of a TIFF as it is stored."""

    values: Array  # (H, W), or (H, W, 3) RGB; palettes by index; not turned by the orientation
    photometric: int | None  # None: the file does not say
    bits: int  # of a sample
    palette: Array | None  # uint8 (2 ** bits, 3), of a palette file
    orientation: int  # 1 to 8, as in EXIF
    lossy: bool  # JPEG

    def seen(self) -> Array:
        """The values as they are meant to be seen: palette applied, zero black, few bits spread.

        Raises Unread where that cannot be known.
        """
        values, full = self.values, 2**self.bits - 1
        if self.photometric is None:
            raise Unread(PHOTOMETRIC, "missing", "export it again, with this tag")
        if self.palette is not None:
            return self.palette[values]
        if self.photometric == WHITE_IS_ZERO:
            if values.dtype.kind != "u":
                raise Unread(PHOTOMETRIC, f"WhiteIsZero of {values.dtype} values")
            values = np.asarray(full, values.dtype) - values
        if self.bits < 8:
            return ((np.arange(full + 1) * 255 + full // 2) // full).astype(np.uint8)[values]
        return values


@dataclass(frozen=True)
class Layout:
    """How the values of a page lie in the file."""

    width: int
    height: int
    samples: int
    bits: int
    kind: str  # of number: u, i, f
    order: str  # of bytes: < or >
    compression: int
    predictor: int
    reversed_bits: bool
    planes: int  # samples if each has a plane of its own, else 1
    rows: int  # of a strip or tile
    columns: int
    tiled: bool

    @property
    def together(self) -> int:
        """Samples of a pixel that lie side by side."""
        return self.samples // self.planes

    @property
    def bytes(self) -> int:
        """Of the whole page, unpacked."""
        return -(-self.width * self.samples * self.bits // 8) * self.height

    @property
    def row_bytes(self) -> int:
        """Of a strip or tile, unpacked."""
        return -(-self.columns * self.together * self.bits // 8)

    def segments(self) -> Iterator[tuple[int, int, int, int]]:
        """Plane, first row, first column and stored rows of each strip or tile, in their order."""
        for plane in range(self.planes):
            for top in range(0, self.height, self.rows):
                rows = self.rows if self.tiled else min(self.rows, self.height - top)
                for left in range(0, self.width, self.columns):
                    yield plane, top, left, rows


def read_page(raw: bytes, number: int, check_size: Callable[[int, int], None]) -> TiffPage:
    """Decode a page, counted from 1, of a TIFF's bytes; pages that are previews do not count.

    ``check_size`` gets width and height before memory is taken for them. Raises Unread for a tag
    that is not read, and any exception for damage; StopIteration if there is no such page.
    """
    with TiffFile(io.BytesIO(raw)) as tiff:
        index, tags = next(islice(_pages(tiff), number - 1, None))
        check_size(int(tags.valueof(WIDTH)), int(tags.valueof(HEIGHT)))
        if number := _hidden(tiff, tags):
            cure = "save it in ImageJ as an image sequence"
            raise Unread(DESCRIPTION, f"of an ImageJ stack of {number} images in one page", cure)
        found = tags.valueof(PHOTOMETRIC)
        photometric = None if found is None else int(found)
        layout = _layout(tags, tiff.byteorder, photometric)
        _check_samples(layout.samples, photometric)
        if layout.tiled:
            check_size(layout.columns, layout.rows)  # of a tile, which may be larger than its page
        if layout.bytes > max(SMALL, MOST_PACKED * len(raw)):
            raise ValueError("claims more than it can hold")
        if layout.compression in (*CCITT, JPEG):
            values = _by_pillow(_upright(raw, tags), index, layout, photometric)
        else:
            values = _assemble(layout, _unpacked(raw, layout, tags))
        values = _colours(values, photometric, tags)
        palette = None
        if photometric == PALETTE:
            palette = _palette(tags.valueof(COLOUR_MAP), layout.bits)
        orientation = int(tags.valueof(ORIENTATION, 1))
    lossy = layout.compression == JPEG
    return TiffPage(values, photometric, layout.bits, palette, orientation, lossy)


def has_more_bits(file: BinaryIO) -> bool:
    """Whether the first page has values other than whole numbers of 8 bits; any exception."""
    with TiffFile(file) as tiff:
        _, tags = next(_pages(tiff))
        kind = _kind(_same(SAMPLE_FORMAT, tags.valueof(SAMPLE_FORMAT, 1)))
        return kind != "u" or _same(BITS, tags.valueof(BITS, 1)) > 8


def is_plain(file: BinaryIO, number: int) -> bool:
    """Whether a page holds whole numbers of 8 or 16 bits, gray (0 = black) or RGB, upright.

    Of these every program makes the same pixels. Any exception.
    """
    with TiffFile(file) as tiff:
        _, tags = next(islice(_pages(tiff), number - 1, None))
        kind = _kind(_same(SAMPLE_FORMAT, tags.valueof(SAMPLE_FORMAT, 1)))
        bits, planes = _same(BITS, tags.valueof(BITS, 1)), int(tags.valueof(PLANAR, 1))
        colours, orientation = tags.valueof(PHOTOMETRIC), int(tags.valueof(ORIENTATION, 1))
        usual = kind == "u" and bits in (8, 16) and planes == 1 and not _hidden(tiff, tags)
        return usual and colours in (BLACK_IS_ZERO, RGB) and orientation == 1


def read_header(file: BinaryIO) -> tuple[int, int, int]:
    """Height, width and channels (1 or 3) of the first page, by its tags; any exception."""
    with TiffFile(file) as tiff:
        _, tags = next(_pages(tiff))
        coloured = int(tags.valueof(SAMPLES, 1)) > 2 or tags.valueof(PHOTOMETRIC) == PALETTE
        return int(tags.valueof(HEIGHT)), int(tags.valueof(WIDTH)), 3 if coloured else 1


def _pages(tiff: TiffFile) -> Iterator[tuple[int, Any]]:
    """The tags of each page, and its number among all directories of the file."""
    for index, page in enumerate(tiff.pages):
        tags: Any = page.tags  # type: ignore[union-attr]  # no frames: they are not asked for
        kind = int(tags.valueof(SUBFILE, 0))
        if not kind & (PREVIEW | TRANSPARENCY) and WIDTH in tags and HEIGHT in tags:
            yield index, tags


def _hidden(tiff: TiffFile, tags: Any) -> int:
    """Number of images of an ImageJ stack that has fewer pages; 0 where every image is a page.

    ImageJ writes stacks above 4 GB so: one page, and all other images behind its pixels.
    """
    words = str(tags.valueof(DESCRIPTION, ""))
    found = re.search(r"^images=(\d+)", words, re.MULTILINE) if words[:7] == "ImageJ=" else None
    if not found or int(found[1]) <= len(tiff.pages):
        return 0
    # A page that was saved alone may have kept the words.
    bits = max(_numbers(tags.valueof(BITS, 1))) * int(tags.valueof(SAMPLES, 1))
    page = int(tags.valueof(WIDTH)) * int(tags.valueof(HEIGHT)) * bits // 8
    return int(found[1]) if tiff.filehandle.size >= int(found[1]) * page else 0


def _layout(tags: Any, order: str, photometric: int | None) -> Layout:
    """Read and check the tags that say how values lie; raises Unread."""

    def number(tag: int, default: int, *allowed: int) -> int:
        value = int(tags.valueof(tag, default))
        if allowed and value not in allowed:
            raise Unread(tag, value)
        return value

    width, height, samples = number(WIDTH, 0), number(HEIGHT, 0), number(SAMPLES, 1)
    bits = _same(BITS, tags.valueof(BITS, 1))
    kind = _kind(_same(SAMPLE_FORMAT, tags.valueof(SAMPLE_FORMAT, 1)))
    compression, predictor = number(COMPRESSION, 1), number(PREDICTOR, 1, 1, 2, 3)
    reversed_bits = number(FILL_ORDER, 1, 1, 2) == 2
    planes = samples if number(PLANAR, 1, 1, 2) == 2 else 1
    number(DEPTH, 1, 1)
    if photometric is not None and photometric not in COLOURS:
        raise Unread(PHOTOMETRIC, _name(PHOTOMETRICS, photometric))
    if photometric == YCBCR and compression != JPEG:
        raise Unread(PHOTOMETRIC, "YCbCr without JPEG")
    if bits not in TOP_BITS[kind] or (photometric == PALETTE and (bits > 8 or kind != "u")):
        raise Unread(BITS, f"{bits}, of {WORDS[kind]}")
    if predictor != 1 and (bits not in (8, 16, 32, 64) or compression in (1, PACKBITS)):
        how = _name(COMPRESSIONS, compression)
        raise Unread(PREDICTOR, f"{predictor} with {bits} bits and compression {how}")
    if predictor == 3 and kind != "f":
        raise Unread(PREDICTOR, f"3, which is for floats, with {WORDS[kind]}")
    tiled = TILE_WIDTH in tags
    columns = number(TILE_WIDTH, width)
    rows = number(TILE_HEIGHT, 0) if tiled else min(number(ROWS_PER_STRIP, height), height)
    if min(samples, rows, columns) < 1:
        raise ValueError("a side of nothing")
    return Layout(
        width, height, samples, bits, kind, order, compression, predictor, reversed_bits, planes,
        rows, columns, tiled,
    )  # fmt: skip


def _kind(sample_format: int) -> str:
    if sample_format not in NUMBERS:
        raise Unread(SAMPLE_FORMAT, f"{sample_format} (complex or unknown)")
    return NUMBERS[sample_format]


def _name(names: Any, number: int) -> str:
    """A value of a tag in words, if it has some."""
    try:
        return f"{names(number).name} ({number})"
    except ValueError:
        return str(number)


def _same(tag: int, found: Any) -> int:
    """The one value that all samples have."""
    values = {int(value) for value in (found if isinstance(found, tuple) else (found,))}
    if len(values) != 1:
        raise Unread(tag, f"{found}, different for the samples of a pixel")
    return values.pop()


def _unpacked(raw: bytes, layout: Layout, tags: Any) -> list[Array]:
    """The bytes of each strip or tile without compression, uint8 (rows, bytes of a row)."""
    offsets = _numbers(tags.valueof(TILE_OFFSETS if layout.tiled else STRIP_OFFSETS))
    counts = _numbers(tags.valueof(TILE_COUNTS if layout.tiled else STRIP_COUNTS, ()))
    heights = [rows for *_, rows in layout.segments()]
    if not counts and layout.compression == 1:
        counts = [rows * layout.row_bytes for rows in heights]
    packed = []
    for offset, count in zip(offsets, counts, strict=False):
        part = raw[offset : offset + count]
        if len(part) != count or not count:
            raise ValueError("cut short")
        packed.append(part.translate(_REVERSED) if layout.reversed_bits else part)
    if len(packed) < len(heights):
        raise ValueError("strips or tiles are missing")
    pairs = [*zip(packed, heights, strict=False)]
    if layout.compression in (LZW, PACKBITS):
        return _by_libtiff(pairs, layout)
    if layout.compression == ZSTD:
        return [_rows(_by_codec(part, layout), rows, layout) for part, rows in pairs]
    most = layout.rows * layout.row_bytes  # what a strip or tile holds, whatever it unpacks to
    if layout.compression == LZMA:
        pairs = [(lzma.LZMADecompressor().decompress(part, most), rows) for part, rows in pairs]
    elif layout.compression in DEFLATE:
        pairs = [(zlib.decompressobj().decompress(part, most), rows) for part, rows in pairs]
    elif layout.compression != 1:
        raise Unread(COMPRESSION, _name(COMPRESSIONS, layout.compression))
    return [_rows(part, rows, layout) for part, rows in pairs]


_REVERSED = bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))


def _numbers(found: Any) -> list[int]:
    return [int(number) for number in (found if isinstance(found, tuple) else (found,))]


def _rows(data: bytes, rows: int, layout: Layout) -> Array:
    """Bytes as (rows, bytes of a row); ValueError if there are too few."""
    count = rows * layout.row_bytes
    return np.frombuffer(data, np.uint8, count).reshape(rows, layout.row_bytes)


def _by_codec(part: bytes, layout: Layout) -> bytes:
    """Unpack what tifffile needs a module for that may not be there; raises Unread without it."""
    try:
        return bytes(TIFF.DECOMPRESSORS[layout.compression](part))
    except (KeyError, ImportError):
        name = _name(COMPRESSIONS, layout.compression)
        cure = "install imagecodecs, or export it uncompressed"
        raise Unread(COMPRESSION, name, cure) from None


def _by_libtiff(packed: list[tuple[bytes, int]], layout: Layout) -> list[Array]:
    """Unpack by libtiff, which Pillow has: strips and tiles as those of one picture of bytes."""
    parts: list[Array] = []
    for run in _runs(packed, layout.rows):
        picture = TiffImageFile(io.BytesIO(_picture_of_bytes(run, layout)))
        parts += np.split(np.asarray(picture), np.cumsum([rows for _, rows in run])[:-1])
    return parts


def _runs(packed: list[tuple[bytes, int]], full: int) -> Iterator[list[tuple[bytes, int]]]:
    """Cut a list of strips after each that is lower than the others, which is a plane's last."""
    start = 0
    for index, (_, rows) in enumerate(packed):
        if rows < full or index == len(packed) - 1:
            yield packed[start : index + 1]
            start = index + 1


def _picture_of_bytes(run: list[tuple[bytes, int]], layout: Layout) -> bytes:
    """An 8-bit gray TIFF whose strips are packed alike, and whose pixels are the bytes wanted."""
    height = sum(rows for _, rows in run)
    count = len(run)
    tags = [
        (WIDTH, 4, [layout.row_bytes]), (HEIGHT, 4, [height]), (BITS, 3, [8]),
        (COMPRESSION, 3, [layout.compression]), (PHOTOMETRIC, 3, [BLACK_IS_ZERO]),
        (STRIP_OFFSETS, 4, []), (SAMPLES, 3, [1]), (ROWS_PER_STRIP, 4, [layout.rows]),
        (STRIP_COUNTS, 4, [len(part) for part, _ in run]),
    ]  # fmt: skip
    beyond = 8 + 2 + 12 * len(tags) + 4
    place = beyond + 8 * count
    for part, _ in run:
        tags[5][2].append(place)
        place += len(part)
    entries, lists = b"", b""
    for tag, kind, values in tags:
        value = struct.pack("<I", values[0])
        if len(values) > 1:
            value = struct.pack("<I", beyond + len(lists))
            lists += struct.pack(f"<{count}I", *values)
        entries += struct.pack("<HHI", tag, kind, len(values)) + value
    head = b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4)
    return b"".join([head, lists.ljust(8 * count, b"\0"), *(part for part, _ in run)])


def _assemble(layout: Layout, segments: list[Array]) -> Array:
    """Strips or tiles of bytes to values (H, W, samples)."""
    values: Array | None = None
    for (plane, top, left, _), data in zip(layout.segments(), segments, strict=True):
        part = _numbers_of(data, layout)  # (rows, columns, together)
        if values is None:
            values = np.empty((layout.height, layout.width, layout.samples), part.dtype)
        place = values[top : top + layout.rows, left : left + layout.columns]
        part = part[: place.shape[0], : place.shape[1]]
        if layout.planes == 1:
            place[...] = part
        else:
            place[..., plane] = part[..., 0]
    assert values is not None
    return values


def _numbers_of(data: Array, layout: Layout) -> Array:
    """Bytes (rows, bytes of a row) to numbers (rows, columns, together), the predictor undone."""
    shape = (len(data), layout.columns, layout.together)
    size, bits = layout.bits // 8, layout.bits
    if layout.predictor == 3:
        # Differences of bytes; then the highest byte of all numbers of the row, the next one, ...
        sums = data.reshape(len(data), -1, layout.together).cumsum(axis=1, dtype=np.uint8)
        planes = sums.reshape(len(data), size, -1)
        numbers = np.ascontiguousarray(planes.swapaxes(1, 2)).view(f">f{size}")
        return numbers.reshape(shape).astype(f"f{size}")
    if bits not in (8, 16, 32, 64):
        return _odd_bits(data, layout).reshape(shape)
    whole = np.ascontiguousarray(data).view(f"{layout.order}u{size}").reshape(shape)
    whole = whole.astype(f"u{size}")
    if layout.predictor == 2:
        whole = whole.cumsum(axis=1, dtype=whole.dtype)
    return whole.view(f"{layout.kind}{size}")


def _odd_bits(data: Array, layout: Layout) -> Array:
    """Unsigned numbers of 1 to 31 bits, packed within a row from the highest bit of each byte."""
    bits, count = layout.bits, layout.columns * layout.together
    kind = np.dtype("u1" if bits < 8 else "u2" if bits < 16 else "u4")
    if bits == 24 and layout.order == "<":  # whole bytes have the file's order
        data = data.reshape(len(data), -1, 3)[..., ::-1].reshape(len(data), -1)
    result = np.zeros((len(data), count), kind)
    for row, packed in enumerate(data):
        single = np.unpackbits(packed, count=count * bits).reshape(count, bits)
        for bit in range(bits):
            result[row] |= single[:, bit].astype(kind) << kind.type(bits - 1 - bit)
    return result


def _upright(raw: bytes, tags: Any) -> bytes:
    """The bytes without their orientation, which Pillow would apply."""
    if ORIENTATION not in tags:
        return raw
    edited = bytearray(raw)
    order = "<" if raw.startswith(b"II") else ">"
    struct.pack_into(f"{order}H", edited, tags[ORIENTATION].valueoffset, 1)
    return bytes(edited)


def _by_pillow(raw: bytes, index: int, layout: Layout, photometric: int | None) -> Array:
    """Decode JPEG and CCITT by libtiff, by way of Pillow; values (H, W, samples)."""
    fax, how = layout.compression in CCITT, _name(COMPRESSIONS, layout.compression)
    if layout.bits != (1 if fax else 8) or layout.kind != "u":
        raise Unread(BITS, f"{layout.bits} with compression {how}")
    if layout.planes > 1 or layout.samples not in ((1,) if fax else (1, 3)):
        raise Unread(SAMPLES, f"{layout.samples} with compression {how}")
    picture = TiffImageFile(io.BytesIO(raw))
    picture.seek(index)
    values = np.asarray(picture).astype(np.uint8)
    if photometric in (WHITE_IS_ZERO, None):  # Pillow has inverted it
        values = np.uint8(1 if fax else 255) - values
    values = values.reshape(*values.shape[:2], -1)
    if values.shape != (layout.height, layout.width, layout.samples):
        raise ValueError("other size than its tags say")
    return values


def _palette(found: Any, bits: int) -> Array:
    """The colours of a palette, uint8 (2 ** bits, 3)."""
    table = np.array(found, np.uint16).reshape(3, 2**bits).T
    # Some programs write 8 bits, where the standard wants 16.
    return (table if table.max() < 256 else table >> 8).astype(np.uint8)


def _check_samples(samples: int, photometric: int | None) -> int:
    """How many samples of a pixel are its colour; raises Unread for more than one beside them."""
    wanted = COLOURS[photometric] if photometric is not None else (1 if samples < 3 else 3)
    if not wanted <= samples <= wanted + 1:
        cure = "save each channel as an image of its own"
        raise Unread(SAMPLES, f"{samples}, where {wanted} make a pixel", cure)
    return wanted


def _colours(values: Array, photometric: int | None, tags: Any) -> Array:
    """Drop what is beside the colours, (H, W, samples) to (H, W) or (H, W, 3); raises Unread."""
    samples = values.shape[2]
    wanted = _check_samples(samples, photometric)
    extra = _numbers(tags.valueof(EXTRA_SAMPLES, ()))
    if wanted == 1 and samples == 2 and extra == [0]:
        raise Unread(EXTRA_SAMPLES, "0: a second channel that is no opacity")
    if photometric == CMYK:
        if values.dtype != np.uint8 or int(tags.valueof(INK_SET, 1)) != 1:
            raise Unread(PHOTOMETRIC, f"CMYK of {values.dtype}, or of other inks")
        inks = np.ascontiguousarray(values[..., :4])
        return np.asarray(Image.frombytes("CMYK", inks.shape[1::-1], inks).convert("RGB"))
    return values[..., 0] if wanted == 1 else values[..., :3]
