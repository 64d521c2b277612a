"""TIFF: over the product of its tags, the values that were written by hand, or a refusal by name.

The files are made here byte by byte, by the words of the standard (TIFF 6.0), not by a library.
"""

import importlib.util
import io
import itertools
import lzma
import struct
import tracemalloc
import zlib

import numpy as np
import pytest
import tifffile
from PIL import Image

from imaging.gray_range import EACH_IMAGE
from imaging.imagefile import decode, has_more_bits, read_image, read_mask
from utils.files import DataError

RNG = np.random.default_rng(0)
TYPES = {1: "B", 3: "H", 4: "I", 16: "Q"}
NONE, LZW, DEFLATE, OLD_DEFLATE, PACKBITS, LZMA = 1, 5, 8, 32946, 32773, 34925
KINDS = [("u", bits) for bits in (1, 2, 3, 4, 6, 7, 8, 9, 10, 12, 14, 15, 16, 17, 24, 31, 32, 64)]
KINDS += [("i", 8), ("i", 16), ("i", 32), ("i", 64), ("f", 16), ("f", 32), ("f", 64)]
FORMAT = {"u": 1, "i": 2, "f": 3}
ORDERS = [("<", False), (">", False), ("<", True), (">", True)]
LAYOUTS = [{}, {"rows": 2}, {"tile": (16, 16)}]


def tiff(tags: dict, parts: list[bytes], order: str = "<", big: bool = False) -> bytes:
    """A file of one page: tags {number: (type, values)}, and its strips or tiles."""
    offset, count, entry = ("Q", "Q", 20) if big else ("I", "H", 12)
    head = b"II" if order == "<" else b"MM"
    head += struct.pack(order + ("HHHQ" if big else "HI"), *((43, 8, 0, 16) if big else (42, 8)))
    tiled = 322 in tags
    size = 16 if big else 4
    tags = {**tags, 324 if tiled else 273: (size, [0] * len(parts))}
    tags |= {325 if tiled else 279: (size, [len(part) for part in parts])}
    room = 8 if big else 4
    start = len(head) + struct.calcsize(order + count) + entry * len(tags) + room
    places = [0] * len(parts)
    for _ in range(2):  # where the parts lie is known when the tags are laid out
        tags[324 if tiled else 273] = (size, places)
        body, lists = b"", b""
        for number, (kind, values) in sorted(tags.items()):
            raw = struct.pack(f"{order}{len(values)}{TYPES[kind]}", *values)
            if len(raw) > room:
                lists += b"\0" * (len(lists) % 2)
                place = struct.pack(order + offset, start + len(lists))
                lists, raw = lists + raw, place
            entry_head = struct.pack(f"{order}HH{offset}", number, kind, len(values))
            body += entry_head + raw.ljust(room, b"\0")
        lists += b"\0" * (len(lists) % 2)
        places = list(itertools.accumulate([start + len(lists), *map(len, parts[:-1])]))
    end = struct.pack(order + offset, 0)
    return head + struct.pack(order + count, len(tags)) + body + end + lists + b"".join(parts)


def packed(row: list, kind: str, bits: int, order: str) -> bytes:
    """One row of numbers: whole bytes in the file's order, else from the highest bit on."""
    if kind == "f":
        return np.array(row, f"{order}f{bits // 8}").tobytes()
    if bits % 8 == 0:
        return b"".join(
            int(v).to_bytes(bits // 8, "little" if order == "<" else "big", signed=kind == "i")
            for v in row
        )
    text = "".join(f"{int(v):0{bits}b}" for v in row)
    text += "0" * (-len(text) % 8)
    return bytes(int(text[i : i + 8], 2) for i in range(0, len(text), 8))


def differences(block: np.ndarray, predictor: int, order: str) -> list[bytes]:
    """A block (rows, columns, samples) as predictors 2 and 3 want it stored."""
    if predictor == 2:
        unsigned = block.view(f"u{block.itemsize}")
        first = np.zeros_like(unsigned[:, :1])
        stored = np.diff(unsigned, axis=1, prepend=first)
        return [row.astype(f"{order}u{block.itemsize}").tobytes() for row in stored]
    rows = []
    for row in block:
        big = (
            row.astype(f">f{block.itemsize}").reshape(-1).view(np.uint8).reshape(-1, block.itemsize)
        )
        shuffled = big.T.reshape(-1).astype(int)  # all highest bytes first
        step = block.shape[2]
        before = np.concatenate([np.zeros(step, int), shuffled[:-step]])
        rows.append(((shuffled - before) % 256).astype(np.uint8).tobytes())
    return rows


def lzw(data: bytes) -> bytes:
    """LZW of the standard, section 13: codes of 9 to 12 bits from the highest bit on."""
    table, width, out = {bytes([i]): i for i in range(256)}, 9, [(256, 9)]
    word = b""
    for byte in data:
        longer = word + bytes([byte])
        if longer in table:
            word = longer
            continue
        out.append((table[word], width))
        table[longer] = len(table) + 2
        width = 9 + (len(table) + 2 > 511) + (len(table) + 2 > 1023) + (len(table) + 2 > 2047)
        word = bytes([byte])
        if len(table) + 2 >= 4094:
            out.append((256, width))
            table, width = {bytes([i]): i for i in range(256)}, 9
    out += [(table[word], width)] if word else []
    out.append((257, width))
    text = "".join(f"{code:0{bits}b}" for code, bits in out)
    text += "0" * (-len(text) % 8)
    return bytes(int(text[i : i + 8], 2) for i in range(0, len(text), 8))


def packbits(data: bytes) -> bytes:
    """PackBits, section 9: here runs of up to 128 bytes, and literal bytes one by one."""
    out = b""
    for byte, run in itertools.groupby(data):
        length = len(list(run))
        while length:
            part = min(length, 128)
            out += bytes([257 - part if part > 1 else 0, byte])
            length -= part
    return out


PACK = {
    NONE: bytes,
    LZW: lzw,
    DEFLATE: zlib.compress,
    OLD_DEFLATE: zlib.compress,
    PACKBITS: packbits,
    LZMA: lzma.compress,
}
MIRRORED = bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))


def write(
    path, values, kind, bits, order="<", big=False, rows=0, tile=(), planar=1, compression=NONE,
    predictor=1, fill=1, photometric=1, extra=None,
):  # fmt: skip
    """Write values (H, W, S) with the tags that the arguments name."""
    height, width, samples = values.shape
    planes = [values] if planar == 1 else [values[..., [s]] for s in range(samples)]
    parts = []
    for plane in planes:
        blocks = []
        if tile:
            for top, left in itertools.product(range(0, height, tile[0]), range(0, width, tile[1])):
                block = np.zeros((*tile, plane.shape[2]), plane.dtype)
                found = plane[top : top + tile[0], left : left + tile[1]]
                block[: found.shape[0], : found.shape[1]] = found
                blocks.append(block)
        else:
            step = rows or height
            blocks = [plane[top : top + step] for top in range(0, height, step)]
        for block in blocks:
            stored = differences(block, predictor, order) if predictor > 1 else block
            lines = [
                row
                if isinstance(row, bytes)
                else packed(row.reshape(-1).tolist(), kind, bits, order)
                for row in stored
            ]
            part = PACK[compression](b"".join(lines))
            parts.append(part.translate(MIRRORED) if fill == 2 else part)
    tags = {
        256: (3, [width]), 257: (3, [height]), 258: (3, [bits] * samples), 259: (3, [compression]),
        262: (3, [photometric]), 277: (3, [samples]), 339: (3, [FORMAT[kind]] * samples),
    }  # fmt: skip
    tags |= {322: (3, [tile[1]]), 323: (3, [tile[0]])} if tile else {278: (3, [rows or height])}
    tags |= {284: (3, [planar])} if planar != 1 else {}
    tags |= {317: (3, [predictor])} if predictor != 1 else {}
    tags |= {266: (3, [fill])} if fill != 1 else {}
    tags |= extra or {}
    path.write_bytes(tiff({n: t for n, t in tags.items() if t}, parts, order, big))
    return path


def numbers(kind, bits, shape):
    """Values of every magnitude that the type holds."""
    if kind == "f":
        return RNG.normal(0, 100, shape).astype(f"f{bits // 8}")
    size = next(n for n in (8, 16, 32, 64) if n >= bits) // 8
    low, high = (0, 2**bits) if kind == "u" else (-(2 ** (bits - 1)), 2 ** (bits - 1))
    found = RNG.integers(low, high, shape, dtype=f"{'u' if kind == 'u' else 'i'}{size}")
    found.reshape(-1)[:2] = low, high - 1
    return found


@pytest.mark.parametrize("compression", PACK)
@pytest.mark.parametrize(("kind", "bits"), KINDS)
def test_every_combination_of_tags_gives_the_values_written(tmp_path, kind, bits, compression):
    predictors = [1]
    if bits in (8, 16, 32, 64) and compression not in (NONE, PACKBITS):
        predictors = [1, 2, 3] if kind == "f" else [1, 2]
    orders, layouts = itertools.cycle(ORDERS), itertools.cycle(LAYOUTS)
    samples = [(1, 1), (3, 1), (3, 2), (4, 1), (4, 2)]
    for predictor, (count, planar) in itertools.product(predictors, samples):
        values = numbers(kind, bits, (5, 19, count))
        (order, big), layout = next(orders), next(layouts)
        photometric = 2 if count > 1 else 1
        tags = {338: (3, [1])} if count == 4 else {}
        how = {"planar": planar, "photometric": photometric, "extra": tags, **layout}
        how |= {"compression": compression, "predictor": predictor}
        path = write(tmp_path / "a.tif", values, kind, bits, order, big, **how)
        found = decode(path, seen=False).values
        expected = values[..., 0] if count == 1 else values[..., :3]
        np.testing.assert_array_equal(found, expected, err_msg=str((order, big, how)))
        assert found.dtype.kind == kind
        assert has_more_bits(path) == (kind != "u" or bits > 8)


@pytest.mark.parametrize(("order", "big"), ORDERS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_order_and_layout_is_met_by_every_number_type(tmp_path, order, big, layout):
    for kind, bits in KINDS:
        values = numbers(kind, bits, (5, 19, 1))
        path = write(tmp_path / "a.tif", values, kind, bits, order, big, **layout)
        np.testing.assert_array_equal(decode(path, seen=False).values, values[..., 0])


@pytest.mark.parametrize(("order", "big"), ORDERS)
@pytest.mark.parametrize("bits", [bits for kind, bits in KINDS if kind == "u"])
def test_where_zero_is_white_images_are_inverted_and_ids_are_not(tmp_path, bits, order, big):
    values = numbers("u", bits, (6, 9, 1))
    path = write(tmp_path / "a.tif", values, "u", bits, order, big, photometric=0)
    stored, seen = decode(path, seen=False).values, decode(path).values
    np.testing.assert_array_equal(stored, values[..., 0])
    inverted = [2**bits - 1 - int(v) for v in values.reshape(-1)]
    if bits < 8:
        inverted = [round(v * 255 / (2**bits - 1)) for v in inverted]
    np.testing.assert_array_equal(seen.reshape(-1), np.array(inverted, seen.dtype))
    upright = write(tmp_path / "b.tif", values, "u", bits, order, big, photometric=1)
    # Few values are extremes at both ends: the same pixels are left out.
    both = read_image(path).astype(int) + read_image(upright)
    assert np.abs(both - 255).max() <= 1
    if bits <= 8:
        np.testing.assert_array_equal(read_mask(path), values[..., 0])


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("planar", [1, 2])
@pytest.mark.parametrize("wide", [1, 257])
def test_palettes_give_colours_to_images_and_indices_to_masks(tmp_path, bits, planar, wide):
    colours = RNG.integers(0, 256, (2**bits, 3))
    colours[0] = 255
    values = numbers("u", bits, (5, 7, 1))
    table = {320: (3, (colours.T * wide).reshape(-1).tolist())}  # 16 bits, or by mistake 8
    path = write(tmp_path / "a.tif", values, "u", bits, planar=planar, photometric=3, extra=table)
    np.testing.assert_array_equal(read_mask(path), values[..., 0])
    np.testing.assert_array_equal(decode(path).values, colours[values[..., 0]])
    palette = decode(path, seen=False).palette
    assert palette is not None
    np.testing.assert_array_equal(palette, colours)


@pytest.mark.parametrize("compression", [NONE, LZW, DEFLATE, PACKBITS])
@pytest.mark.parametrize("bits", [1, 4, 8, 12, 16])
def test_bits_that_are_stored_in_reverse_are_turned(tmp_path, bits, compression):
    values = numbers("u", bits, (5, 19, 1))
    path = write(tmp_path / "a.tif", values, "u", bits, compression=compression, fill=2)
    np.testing.assert_array_equal(decode(path, seen=False).values, values[..., 0])


def test_strips_longer_than_a_table_of_lzw(tmp_path):
    values = RNG.integers(0, 256, (90, 200, 1)).astype(np.uint8)
    values[40:] = 7
    for rows in (90, 13):
        path = write(tmp_path / "a.tif", values, "u", 8, compression=LZW, rows=rows)
        np.testing.assert_array_equal(decode(path).values, values[..., 0])


def test_opacity_is_dropped_and_other_channels_are_refused(tmp_path):
    values = numbers("u", 8, (5, 7, 2))
    for extra, good in (
        ({}, True),
        ({338: (3, [1])}, True),
        ({338: (3, [2])}, True),
        ({338: (3, [0])}, False),
    ):
        path = write(tmp_path / "a.tif", values, "u", 8, extra=extra)
        if good:
            np.testing.assert_array_equal(decode(path).values, values[..., 0])
        else:
            with pytest.raises(DataError, match=r"ExtraSamples \(TIFF tag 338\) is 0"):
                decode(path)


ONE = np.arange(63, dtype=np.uint8).reshape(7, 9, 1)
RGB = np.dstack([ONE, ONE, ONE])
INKS = np.dstack([RGB, ONE]).astype(np.uint16)
LZW_8 = {"compression": LZW}
REFUSED = {
    # what: (values, kind, bits, options of write, the tag and its value in the message)
    "JPEG 2000": (ONE, "u", 8, {"extra": {259: (3, [34712])}}, 259, "JPEG2000 (34712)"),
    "old JPEG": (ONE, "u", 8, {"extra": {259: (3, [6])}}, 259, "OJPEG (6)"),
    "unknown compression": (ONE, "u", 8, {"extra": {259: (3, [4321])}}, 259, "4321"),
    "Lab": (RGB, "u", 8, {"photometric": 8}, 262, "CIELAB (8)"),
    "YCbCr": (RGB, "u", 8, {"photometric": 6}, 262, "YCbCr without JPEG"),
    "unknown photometric": (ONE, "u", 8, {"photometric": 77}, 262, "77"),
    "no photometric": (ONE, "u", 8, {"extra": {262: None}}, 262, "missing"),
    "white of signed": (
        ONE.astype(np.int8), "i", 8, {"photometric": 0}, 262, "WhiteIsZero of int8 values"
    ),
    "white of floats": (
        ONE.astype("f4"), "f", 32, {"photometric": 0}, 262, "WhiteIsZero of float32 values"
    ),
    "CMYK of 16 bits": (INKS, "u", 16, {"photometric": 5}, 262, "CMYK of uint16"),
    "complex": (ONE.astype("f8"), "f", 64, {"extra": {339: (3, [6])}}, 339, "6 (complex"),
    "mixed bits": (
        RGB, "u", 8, {"photometric": 2, "extra": {258: (3, [8, 8, 16])}}, 258, "(8, 8, 16)"
    ),
    "odd signed": (ONE.astype(np.int8), "i", 8, {"extra": {258: (3, [12])}}, 258, "12, of"),
    "odd floats": (ONE.astype("f4"), "f", 32, {"extra": {258: (3, [24])}}, 258, "24, of floats"),
    "too many bits": (ONE, "u", 8, {"extra": {258: (3, [48])}}, 258, "48, of whole numbers"),
    "many channels": (np.dstack([RGB, RGB]), "u", 8, {}, 277, "6, where 1 make a pixel"),
    "RGB of 2": (np.dstack([ONE, ONE]), "u", 8, {"photometric": 2}, 277, "2, where 3 make"),
    "predictor without packing": (ONE, "u", 8, {"predictor": 2}, 317, "2 with 8 bits and"),
    "predictor of few bits": (
        ONE % 16, "u", 4, LZW_8 | {"extra": {317: (3, [2])}}, 317, "2 with 4 bits and"
    ),
    "predictor of floats": (ONE, "u", 8, LZW_8 | {"extra": {317: (3, [3])}}, 317, "3, which is"),
    "predictor 9": (ONE, "u", 8, LZW_8 | {"extra": {317: (3, [9])}}, 317, "9"),
    "planar 3": (ONE, "u", 8, {"extra": {284: (3, [3])}}, 284, "3"),
    "fill order 3": (ONE, "u", 8, {"extra": {266: (3, [3])}}, 266, "3"),
    "a volume": (ONE, "u", 8, {"extra": {32997: (3, [5])}}, 32997, "5"),
}  # fmt: skip
NAMES = {
    258: "BitsPerSample", 259: "Compression", 262: "PhotometricInterpretation", 266: "FillOrder",
    277: "SamplesPerPixel", 284: "PlanarConfiguration", 317: "Predictor", 339: "SampleFormat",
    32997: "ImageDepth",
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_not_read_is_refused_by_the_name_of_its_tag(tmp_path, what, capfd):
    values, kind, bits, options, tag, value = REFUSED[what]
    path = write(tmp_path / "a.tif", values, kind, bits, **options)
    with pytest.raises(DataError) as caught:
        read_image(path)
    message = str(caught.value)
    words = f"{path}: {NAMES[tag]} (TIFF tag {tag}) is {value}"
    assert message.startswith(words) and "\n" not in message
    assert "export it" in message or "save each" in message
    assert capfd.readouterr() == ("", "")


def test_what_has_no_photometric_tag_has_ids_all_the_same(tmp_path):
    path = write(tmp_path / "a.tif", ONE, "u", 8, extra={262: None})
    np.testing.assert_array_equal(read_mask(path), ONE[..., 0])


def test_zstd_is_read_or_refused_by_name(tmp_path, monkeypatch):
    path = tmp_path / "a.tif"
    try:
        pack = importlib.import_module("compression.zstd").compress  # of Python 3.14
    except ImportError:
        pack = bytes
    monkeypatch.setitem(PACK, 50000, pack)
    write(path, ONE, "u", 8, compression=50000)
    if pack is not bytes:
        np.testing.assert_array_equal(decode(path).values, ONE[..., 0])
        return
    if importlib.util.find_spec("imagecodecs"):
        pytest.skip("imagecodecs reads it")
    with pytest.raises(DataError, match=r"Compression \(TIFF tag 259\) is ZSTD.*imagecodecs"):
        decode(path)


@pytest.mark.parametrize("compression", ["group3", "group4", "tiff_ccitt"])
@pytest.mark.parametrize("orientation", [None, 6])
def test_fax_files_have_their_bits(tmp_path, compression, orientation):
    bits = RNG.random((20, 40)) < 0.5
    tags = {274: orientation} if orientation else {}
    Image.fromarray(bits).save(tmp_path / "a.tif", compression=compression, tiffinfo=tags)
    found = decode(tmp_path / "a.tif")
    expected = np.rot90(bits, -1) if orientation else bits  # 6: a quarter turn clockwise
    np.testing.assert_array_equal(found.values, expected * np.uint8(255))
    with tifffile.TiffFile(tmp_path / "a.tif") as file:
        white_is_zero = int(file.pages.first.photometric) == 0
    np.testing.assert_array_equal(read_mask(tmp_path / "a.tif"), expected ^ white_is_zero)


@pytest.mark.parametrize("mode", ["L", "RGB", "YCbCr"])
def test_jpeg_inside_is_read_as_an_image_and_refused_as_a_mask(tmp_path, mode):
    smooth = np.add.outer(np.arange(32) * 3, np.arange(48) * 2).astype(np.uint8)
    picture = Image.fromarray(smooth if mode == "L" else np.dstack([smooth, smooth, 255 - smooth]))
    path = tmp_path / "a.tif"
    picture.convert(mode).save(path, compression="jpeg", quality=97)
    assert np.abs(read_image(path).astype(int) - np.asarray(picture)).max() <= 12
    assert np.abs(read_image(path).astype(int) - np.asarray(picture)).mean() <= 2
    with pytest.raises(DataError, match="class ids"):
        read_mask(path)
    if mode == "L":
        raw = path.read_bytes()
        entry = raw.index(struct.pack("<HHIH", 262, 3, 1, 1))
        white = raw[: entry + 8] + b"\0\0" + raw[entry + 10 :]
        path.write_bytes(white)
        assert np.abs(255 - read_image(path).astype(int) - smooth).max() <= 12


def test_cmyk_of_8_bits_is_read_as_by_pillow(tmp_path):
    inks = np.array([[[0, 0, 0, 0], [255, 0, 0, 0]], [[0, 255, 0, 0], [0, 0, 0, 255]]], np.uint8)
    path = write(tmp_path / "a.tif", inks, "u", 8, photometric=5)
    expected = [[[255, 255, 255], [0, 255, 255]], [[255, 0, 255], [0, 0, 0]]]
    np.testing.assert_array_equal(decode(path).values, expected)


@pytest.mark.parametrize("dtype", ["u1", "u2", "u4", "i1", "i2", "i4", "f2", "f4", "f8"])
@pytest.mark.parametrize("shape", [(21, 33), (21, 33, 3), (3, 21, 33)])
def test_files_of_tifffile_are_read(tmp_path, dtype, shape):
    kind, size = dtype[0], int(dtype[1])
    values = numbers(kind, 8 * size, shape)
    photometric = "rgb" if len(shape) == 3 else "minisblack"
    planar = {"planarconfig": "separate"} if shape[0] == 3 else {}
    seen = values.transpose(1, 2, 0) if shape[0] == 3 else values
    for more in (
        {},
        {"tile": (16, 16)},
        {"compression": "zlib"},
        {"byteorder": ">"},
        {"bigtiff": True},
    ):
        path = tmp_path / "a.tif"
        tifffile.imwrite(path, values, photometric=photometric, **planar, **more)
        np.testing.assert_array_equal(decode(path).values, seen)


def test_pages_are_counted_without_previews(tmp_path):
    with tifffile.TiffWriter(tmp_path / "a.tif") as file:
        file.write(ONE[:4, :4, 0], subfiletype=1)
        file.write(ONE[..., 0])
        file.write(ONE[::-1, :, 0])
    np.testing.assert_array_equal(decode(tmp_path / "a.tif").values, ONE[..., 0])
    np.testing.assert_array_equal(decode(tmp_path / "a.tif", 2).values, ONE[::-1, :, 0])
    with pytest.raises(DataError, match="no page 3 in it; choose another --page"):
        decode(tmp_path / "a.tif", 3)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize(("order", "big"), ORDERS)
def test_orientation_turns_images_and_masks(tmp_path, orientation, order, big):
    turns = {
        1: ONE[..., 0], 2: ONE[:, ::-1, 0], 3: ONE[::-1, ::-1, 0], 4: ONE[::-1, :, 0],
        5: ONE[..., 0].T, 6: np.rot90(ONE[..., 0], -1), 7: np.rot90(ONE[..., 0].T, 2),
        8: np.rot90(ONE[..., 0]),
    }  # fmt: skip
    path = write(tmp_path / "a.tif", ONE, "u", 8, order, big, extra={274: (3, [orientation])})
    np.testing.assert_array_equal(read_mask(path), turns[orientation])
    np.testing.assert_array_equal(read_image(path), turns[orientation])


@pytest.mark.parametrize("kind", ["strip", "tile"])
@pytest.mark.parametrize("compression", [NONE, LZW, DEFLATE, PACKBITS])
def test_what_is_cut_short_is_refused(tmp_path, kind, compression):
    how = {"rows": 3} if kind == "strip" else {"tile": (16, 16)}
    values = RNG.integers(0, 256, (20, 30, 1)).astype(np.uint8)
    path = write(tmp_path / "a.tif", values, "u", 8, compression=compression, **how)
    raw = path.read_bytes()
    for cut in (len(raw) - 1, len(raw) - 40, len(raw) // 2, 60, 9):
        path.write_bytes(raw[:cut])
        with pytest.raises(DataError, match="damaged or cut short"):
            decode(path)


def test_a_file_that_claims_more_than_it_can_hold_is_refused(tmp_path):
    claimed = {256: (4, [19_000]), 257: (4, [19_000]), 278: (4, [19_000])}
    for compression in (NONE, LZW, DEFLATE, PACKBITS):
        path = write(tmp_path / "a.tif", ONE, "u", 8, compression=compression, extra=claimed)
        with pytest.raises(DataError, match="damaged or cut short"):
            decode(path)


def test_a_tile_larger_than_can_be_read_is_refused_before_it_is_unpacked(tmp_path):
    """What a file may unpack to is known by the size of its tiles, not by that of its page."""
    path, claimed = tmp_path / "a.tif", {322: (4, [40_000]), 323: (4, [20_000])}
    write(path, ONE, "u", 8, compression=DEFLATE, tile=(16, 16), extra=claimed)
    with pytest.raises(DataError, match="40000x20000 pixels, more than the 400 million"):
        decode(path)


@pytest.mark.parametrize("compression", [DEFLATE, LZMA])
def test_no_more_is_unpacked_than_a_page_holds(tmp_path, monkeypatch, compression):
    bomb = 50_000_000
    pack = PACK[compression]
    monkeypatch.setitem(PACK, compression, lambda part: pack(part + bytes(bomb)))
    path = write(tmp_path / "a.tif", ONE, "u", 8, compression=compression)
    tracemalloc.start()
    try:
        np.testing.assert_array_equal(decode(path).values, ONE[..., 0])
        assert tracemalloc.get_traced_memory()[1] < bomb / 2
    finally:
        tracemalloc.stop()


def test_channels_that_make_no_pixel_are_refused_before_they_are_unpacked(tmp_path):
    path = write(tmp_path / "a.tif", ONE, "u", 8, extra={277: (3, [9]), 258: (3, [8] * 9)})
    with pytest.raises(DataError, match=r"SamplesPerPixel \(TIFF tag 277\) is 9, where 1 make"):
        decode(path)  # it holds one channel: unpacked, it would be cut short


def test_strips_without_a_count_are_read_if_nothing_is_packed(tmp_path):
    path = write(tmp_path / "a.tif", ONE, "u", 8)
    raw = path.read_bytes()
    entry = raw.index(struct.pack("<HHI", 279, 4, 1))
    path.write_bytes(raw[:entry] + struct.pack("<H", 65_000) + raw[entry + 2 :])
    np.testing.assert_array_equal(decode(path).values, ONE[..., 0])


@pytest.mark.parametrize("dtype", ["int32", "uint32", "int64", "float16", "float32", "float64"])
def test_one_scene_is_one_picture_in_every_number_type(tmp_path, dtype):
    scene = np.add.outer(np.arange(30) * 9, np.arange(40) * 13).astype(np.uint16)
    tifffile.imwrite(tmp_path / "a.tif", scene)
    tifffile.imwrite(tmp_path / "b.tif", scene.astype(dtype))
    both = [read_image(tmp_path / f"{name}.tif", EACH_IMAGE) for name in "ab"]
    np.testing.assert_array_equal(*both)


def test_bytes_that_are_no_tiff_are_refused(tmp_path, capfd):
    path = tmp_path / "a.tif"
    for raw in (
        b"II*\0",
        b"MM\0*\0\0\0\x08",
        b"II+\0\x08\0\0\0",
        io.BytesIO(b"II*\0" + b"\xff" * 50).read(),
    ):
        path.write_bytes(raw)
        with pytest.raises(DataError, match="damaged or cut short"):
            decode(path)
    assert capfd.readouterr() == ("", "")


def test_an_imagej_stack_in_one_page_is_refused(tmp_path):
    stack = RNG.integers(0, 256, (5, 20, 30)).astype(np.uint8)
    tifffile.imwrite(tmp_path / "pages.tif", stack, imagej=True)
    np.testing.assert_array_equal(read_image(tmp_path / "pages.tif", page=4), stack[3])
    first = tmp_path / "first.tif"  # as ImageJ writes what is above 4 GB
    first.write_bytes((tmp_path / "pages.tif").read_bytes())
    with tifffile.TiffFile(first, mode="r+") as file:
        end = file.pages.first.offset + 2 + 12 * len(file.pages.first.tags)
    with first.open("r+b") as handle:
        handle.seek(end)
        handle.write(bytes(4))  # no further directory
    kept = tmp_path / "kept.tif"  # one page alone, whose words were kept
    tifffile.imwrite(kept, stack[2], description="ImageJ=1.54\nimages=5\nslices=5\n")
    np.testing.assert_array_equal(read_image(kept), stack[2])
    with pytest.raises(DataError, match="ImageJ stack of 5 images in one page.*sequence"):
        read_image(first)
