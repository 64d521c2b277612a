"""Gray ranges: one for a set, decided by no single pixel, the order of values kept."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from imaging.gray_range import (
    BY_DEPTH,
    EACH_IMAGE,
    EachImage,
    GrayPool,
    GrayRange,
    check_finite,
    conversion_of,
)
from utils.files import DataError

RNG = np.random.default_rng(0)
KINDS = ["uint16", "int16", "int8", "int32", "uint32", "int64", "float16", "float32", "float64"]


def test_the_ends_of_a_range_become_0_and_255_and_what_lies_beyond_is_cut():
    gray = GrayRange(1000, 1510)  # 2 values a level
    pixels = np.array([[0, 999, 1000, 1001, 1002, 1255], [1256, 1508, 1509, 1510, 1511, 65535]])
    for kind in ("uint16", "int32", "float32", "float64"):
        expected = [[0, 0, 0, 1, 1, 128], [128, 254, 255, 255, 255, 255]]
        np.testing.assert_array_equal(gray.apply(pixels.astype(kind)), expected)


def test_16_bits_that_repeat_the_byte_become_that_byte():
    levels = np.arange(256, dtype=np.uint8).reshape(16, 16)
    np.testing.assert_array_equal(GrayRange(0, 65535).apply(levels.astype(np.uint16) * 257), levels)


@pytest.mark.parametrize("gray", [GrayRange(7, 99), EACH_IMAGE, BY_DEPTH])
def test_8_bits_stay_as_they_are(gray):
    pixels = RNG.integers(3, 90, (9, 8, 3)).astype(np.uint8)
    np.testing.assert_array_equal(gray.apply(pixels), pixels)
    np.testing.assert_array_equal(gray.apply(pixels > 40), (pixels > 40) * np.uint8(255))
    assert GrayRange.of([pixels, pixels > 40]) is None


LEVELS = RNG.integers(40, 200, (30, 20)).astype(np.uint8)


@pytest.mark.parametrize(
    "stored",
    [
        LEVELS.astype(np.uint16) * 257,
        LEVELS.astype(np.uint16) * 256,
        LEVELS.astype(np.int32) * 257,
        LEVELS.astype(np.float32) * 257,
        LEVELS / 255,
        (LEVELS / 255).astype(np.float32),
    ],
    ids=str,
)
@pytest.mark.parametrize("burnt", [False, True])
def test_8_bit_levels_stored_with_more_bits_become_those_levels(stored, burnt):
    if burnt:
        stored = stored.copy()
        stored[3, 3] = 0.3777 if stored.max() < 1 else 12345
    for gray in (GrayRange.of([stored]), EACH_IMAGE, EachImage((70, 90))):
        assert gray is not None
        found = gray.apply(stored)
        assert (found != LEVELS).sum() <= burnt


def test_whole_numbers_to_255_are_no_hint_at_8_bits():
    # A dark exposure of a deep camera: no jump where its largest value passes 255.
    dark = np.linspace(20, 250, 10_000).reshape(100, 100)
    one, other = (EACH_IMAGE.apply((dark * gain).astype(np.uint16)) for gain in (1.0, 1.05))
    assert np.abs(one.astype(int) - other).max() <= 3  # of rounding to whole numbers


def test_images_of_more_bits_come_to_the_levels_that_a_network_has_seen():
    seen = RNG.normal(120, 12, (200, 200)).clip(0, 255).astype(np.uint8)
    pool = GrayPool()
    pool.add(seen)
    levels = pool.levels()
    assert levels is not None
    low, high = levels
    order = np.sort(seen, axis=None)
    assert (low, high) == (order[40], order[-41])
    for gain, offset in ((4, 2), (1000, 5000), (1e-6, -3)):
        found = EachImage((low, high)).apply(seen.astype(float) * gain + offset)
        assert np.abs(found.astype(int) - seen).max() <= 1


def test_beside_8_bit_images_others_come_to_their_levels():
    seen = RNG.normal(120, 12, (200, 200)).clip(0, 255).astype(np.uint8)
    deep = seen.astype(np.uint16) * 13 + 100
    found = GrayRange.of([seen, deep])
    assert found is not None and np.abs(found.apply(deep).astype(int) - seen).max() <= 1


@pytest.mark.parametrize("kind", KINDS)
def test_a_range_leaves_out_a_thousandth_of_the_pixels_at_each_end(kind):
    # 2 * 10 of 0.1 % are the extremes; the rest are 100 values in equal shares.
    body = np.repeat(np.arange(10, 110), 98)
    ends = np.repeat([-100, 127] if np.dtype(kind).kind != "u" else [0, 127], [9, 9])
    pixels = RNG.permutation(np.concatenate([body, ends])).astype(kind)
    assert GrayRange.of([pixels.reshape(-1, 2)]) == GrayRange(10, 109)
    more = np.repeat(ends, 2)
    assert GrayRange.of([np.concatenate([body, more]).astype(kind)]) == GrayRange(
        float(more.min()), 127
    )


@pytest.mark.parametrize("kind", ["uint16", "float32"])
def test_one_range_serves_the_set_however_its_pixels_are_divided(kind):
    pixels = (RNG.normal(3000, 400, (300, 40)) // 1).astype(kind)
    whole = GrayRange.of([pixels])
    assert whole == GrayRange.of(np.array_split(pixels, 7))
    assert whole == GrayRange.of(p for p in pixels.reshape(20, 15, 40)[::-1])
    assert GrayRange.of([pixels, np.full((9, 9), 255, np.uint8)]) == whole
    order = np.sort(pixels, axis=None)  # 12000 pixels: 12 are left out on each side
    assert whole == GrayRange(order[12], order[-13])


@pytest.mark.parametrize("side", [3, 8, 64, 200])
@pytest.mark.parametrize("value", [0, 1030, 65535])
def test_one_pixel_never_decides(side, value):
    pixels = RNG.integers(200, 1000, (side, side)).astype(np.uint16)
    burnt = pixels.copy()
    burnt[1, 1] = value
    plain, found = EACH_IMAGE.apply(pixels), EACH_IMAGE.apply(burnt)
    rest = np.ones((side, side), bool)
    rest[1, 1] = False
    order, own = np.sort(pixels[rest]), GrayRange.of([burnt])
    assert own is not None and order[0] <= own.low and own.high <= order[-1]
    if side == 200:  # 40 pixels are left out: one more or less moves little
        assert np.abs(plain[rest].astype(int) - found[rest]).max() <= 1


def test_a_scene_does_not_jump_when_its_largest_value_passes_a_power_of_two():
    scene = np.linspace(500, 4000, 10_000).reshape(100, 100)
    levels = [EACH_IMAGE.apply((scene * gain).astype(np.uint16)) for gain in (1.0, 1.02, 1.05)]
    assert (scene * 1.05).max() > 4096 > scene.max()
    for other in levels[1:]:
        assert np.abs(levels[0].astype(int) - other).max() <= 1


@given(st.lists(st.floats(-1e9, 1e9), min_size=2, max_size=30), st.floats(0, 1), st.floats(0, 1))
def test_no_range_changes_the_order_of_values(values, first, second):
    low, high = sorted((first, second))
    pixels = np.sort(np.array(values))
    for gray in (GrayRange(low, high), GrayRange(-1e9 * high, 1e9), EACH_IMAGE):
        assert (np.diff(gray.apply(pixels).astype(int)) >= 0).all()


@pytest.mark.parametrize("scale", [1e-90, 1e-3, 1.0, 1e80])
@pytest.mark.parametrize("shift", [0.0, -0.5, -1.0])
def test_floats_of_any_magnitude_fill_the_levels(scale, shift):
    pixels = (np.linspace(0, 1, 10_001).reshape(73, 137) + shift) * scale
    found = EACH_IMAGE.apply(pixels).astype(int)
    expected = np.clip((pixels / scale - shift - 0.001) / 0.998, 0, 1) * 255
    assert np.abs(found - expected).max() <= 0.6


def test_floats_keep_their_contrast_beside_a_large_offset():
    pixels = 30_000 + np.linspace(0, 100, 4000).reshape(40, 100)
    found = GrayRange.of([pixels.astype(np.float32)])
    assert found is not None and found.low == pytest.approx(30_000.1, abs=0.2)
    assert found.high == pytest.approx(30_099.9, abs=0.2)


def test_one_value_alone_is_black_and_what_is_brighter_white():
    pixels = np.full((40, 50), 7, np.uint16)
    assert EACH_IMAGE.apply(pixels).max() == 0
    pixels[0, 0] = 9
    assert GrayRange.of([pixels]) == GrayRange(7, 7)
    assert EACH_IMAGE.apply(pixels)[0, 0] == 255 and EACH_IMAGE.apply(pixels).sum() == 255


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e200])
def test_values_that_are_not_finite_are_refused_by_name(value):
    pixels = np.ones((5, 5))
    pixels[2, 2] = value
    for work in (GrayRange(0, 1).apply, EACH_IMAGE.apply, BY_DEPTH.apply, GrayPool().add):
        with pytest.raises(DataError, match=f"value {value:g}".replace("+", r"\+")):
            work(pixels)
    with pytest.raises(DataError, match=r"^a\.tif: value"):
        check_finite("a.tif", pixels)


@pytest.mark.parametrize("gray", [GrayRange(0.1, 1 / 3), EACH_IMAGE, EachImage((7, 9.5)), BY_DEPTH])
def test_conversions_survive_json(gray):
    assert conversion_of(json.loads(json.dumps(gray.saved()))) == gray


@pytest.mark.parametrize(
    "saved",
    [
        "depth",
        {"levels": [3]},
        {"low": 1},
        [1],
        [1, 2, 3],
        [2, 1],
        ["0", "1"],
        [True, 2],
        5,
        {},
        [0, float("nan")],
    ],
)
def test_saved_ranges_that_make_no_sense_are_refused_in_one_line(saved):
    with pytest.raises(DataError, match="gray.range") as caught:
        conversion_of(saved)
    assert "\n" not in str(caught.value)


def test_memory_of_a_pool_is_bounded_by_the_digits_of_floats():
    pool = GrayPool()
    for _ in range(3):
        pool.add(RNG.uniform(0.5, 1, (200, 1000)))
    assert len(pool._values) <= 2**17 + 1  # of 600000, all different
    assert pool.kinds == {"float64"}


@given(st.lists(st.integers(0, 65535), min_size=1, max_size=20))
def test_by_depth_keeps_the_order_of_16_bits(values):
    pixels = np.array(values, np.uint16)
    result = BY_DEPTH.apply(pixels).astype(int)
    order = np.argsort(pixels)
    assert (np.diff(result[order]) >= 0).all()
    if pixels.max() > pixels.min():
        depth = min(2**b - 1 for b in (8, 10, 12, 14, 16) if pixels.max() < 2**b)
        levels = (int(pixels.max()) - int(pixels.min())) * 255 / depth
        assert result.max() - result.min() >= min(levels, 64) - 1


@pytest.mark.parametrize(
    ("high", "full"),
    [(255, 255), (1000, 1023), (3000, 4095), (16000, 16383), (65000, 65535)],
)
@pytest.mark.parametrize("kind", ["uint16", "int32"])
def test_by_depth_scales_by_the_bits_of_the_largest_value(high, full, kind):
    pixels = np.linspace(0, high, 20 * 24).astype(kind).reshape(20, 24)
    np.testing.assert_allclose(BY_DEPTH.apply(pixels), pixels * 255.0 / full, atol=0.5001)


def test_by_depth_stretches_what_fills_fewer_than_64_levels():
    pixels = RNG.integers(30000, 30500, (20, 24)).astype(np.uint16)
    expected = (pixels - pixels.min()) / (pixels.max() - pixels.min()) * 255.0
    np.testing.assert_allclose(BY_DEPTH.apply(pixels), expected, atol=0.5001)
