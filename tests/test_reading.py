"""One scene is one picture for every command, in whatever number type it is stored."""

from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image
from tiny_set import make_set, noise_set, train

from dataset.check import check_data, set_conversion
from imaging.gray_range import BY_DEPTH, EACH_IMAGE, EachImage, GrayRange
from imaging.imagefile import read_image
from metallography.segmenter import Segmenter
from tests.trained_model import expected_mask, picture, write_weights
from utils.checkpoint import CheckpointError, load, save
from utils.files import DataError


def deepen(root: Path, gain: float = 13, offset: float = 700, kind: str = "uint16") -> None:
    """Make TIFF files of more bits of all images of a set."""
    for path in sorted(root.glob("*/img/*.png")):
        pixels = np.asarray(Image.open(path)).astype(float) * gain + offset
        tifffile.imwrite(path.with_suffix(".tif"), pixels.astype(kind))
        path.unlink()


def turn(root: Path, orientation: int) -> None:
    """Note an orientation in all images of a set."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    for path in sorted(root.glob("*/img/*.png")):
        Image.fromarray(np.array(Image.open(path))).save(path, exif=exif)


def test_a_set_has_the_range_of_its_training_images(tmp_path):
    deepen(make_set(tmp_path))
    pool = [tifffile.imread(p) for p in sorted((tmp_path / "train_numf/img").iterdir())]
    order = np.sort(np.concatenate(pool, axis=None))  # 5120 pixels: 5.12 are left out
    assert set_conversion(tmp_path) == GrayRange(order[5], order[-6])
    for path in sorted((tmp_path / "train_numf/img").iterdir()):
        path.unlink()
    assert set_conversion(tmp_path) == EACH_IMAGE  # there is a folder, and nothing in it
    (tmp_path / "train_numf/img").rmdir()
    assert isinstance(set_conversion(tmp_path), GrayRange)  # of the annotated images


def test_a_set_of_8_bits_needs_no_range_and_its_pixels_stay(tmp_path):
    assert set_conversion(noise_set(tmp_path)) == EACH_IMAGE
    store = check_data(tmp_path, num_classes=4).store
    path = tmp_path / "test_numf/img/15_t0_0_0.png"
    np.testing.assert_array_equal(store.image(path)[0], np.asarray(Image.open(path)))
    assert store.deep == {} and store.turned == {}


@pytest.mark.parametrize("kind", ["int32", "float32", "float64"])
def test_training_reads_every_number_type_as_one_picture(tmp_path, kind):
    stores = []
    for name in ("uint16", kind):
        root = make_set(tmp_path / name)
        deepen(root, kind=name)
        stores.append((root, check_data(root, num_classes=3).store))
    for path in sorted((tmp_path / kind).glob("train_numf/img/*.tif")):
        below = path.relative_to(tmp_path / kind)
        one, other = (store.image(root / below).numpy() for root, store in stores)
        np.testing.assert_array_equal(one, other)
        assert one.max() > 250 and one.min() < 5


def test_images_turned_by_half_are_named_once(tmp_path):
    turn(make_set(tmp_path), 3)
    warnings = check_data(tmp_path, num_classes=3, stages=("sup",)).warnings
    assert len(warnings) == 1 and "EXIF orientation (3)" in warnings[0]
    assert "and 2 other(s), their masks were not" in warnings[0]


def test_a_network_keeps_the_range_of_its_set(tmp_path, capsys):
    root = make_set(tmp_path / "set")
    deepen(root)
    assert train(root, tmp_path / "out", stages="sup") == 0
    weights = tmp_path / "out/tiny_sup/1_0/sup.pt"
    low, high = load(weights)["settings"]["gray_range"]
    assert set_conversion(root) == GrayRange(low, high)
    segmenter = Segmenter(weights)
    assert segmenter.gray == GrayRange(low, high) and f"{low:.6g}..{high:.6g}" in segmenter.about
    log = (weights.parent / "log_sup.txt").read_text()
    assert f"uint16: {low:.6g}..{high:.6g} as 0..255" in log
    values = tifffile.imread(next((root / "test_numf/img").iterdir()))
    np.testing.assert_array_equal(segmenter(values), segmenter(GrayRange(low, high).apply(values)))


def test_a_network_of_8_bits_keeps_the_levels_of_its_annotated_image(tmp_path):
    root = make_set(tmp_path / "set")
    assert train(root, tmp_path / "out", stages="sup") == 0
    weights = tmp_path / "out/tiny_sup/1_0/sup.pt"
    seen = np.sort(np.asarray(Image.open(next((root / "sup_num1_0/img").iterdir()))), axis=None)
    levels = [float(seen[1]), float(seen[-2])]  # 1280 pixels: 1.28 are left out
    assert load(weights)["settings"]["gray_range"] == {"levels": levels}
    assert Segmenter(weights).gray == EachImage((levels[0], levels[1]))


@pytest.mark.parametrize("change", [deepen, lambda root: turn(root, 3)], ids=["deep", "turned"])
def test_a_run_of_an_older_version_says_why_its_images_differ(tmp_path, capsys, change):
    root = make_set(tmp_path / "set")
    assert train(root, tmp_path / "out", stages="sup") == 0
    path = tmp_path / "out/tiny_sup/1_0/state_sup.pt"
    state = load(path)
    del state["settings"]["gray_range"]
    save(path, state)
    capsys.readouterr()
    assert train(root, tmp_path / "out", stages="sup") == 0  # 8 bits, upright: nothing changed
    assert "finished already" in capsys.readouterr().out
    change(root)
    assert train(root, tmp_path / "out", stages="sup") == 2
    error = capsys.readouterr().err
    words = "EXIF orientation (3)" if "turn" in error else "uint16 values, as in"
    assert "files was" in error and words in error and len(error.splitlines()) == 1


def test_checkpoints_of_before_keep_their_conversion(tmp_path):
    gray = picture(0, 40, 48)
    old, new = write_weights(tmp_path / "a.pt"), write_weights(tmp_path / "b.pt", {"norm": "batch"})
    for weights in (old, new):
        segmenter = Segmenter(weights)
        assert segmenter.gray == BY_DEPTH
        np.testing.assert_array_equal(segmenter(gray.astype(np.uint16) * 257), expected_mask(gray))


@pytest.mark.parametrize("saved", ["x", [5, 1], {"levels": "no"}, [float("nan"), 1]])
def test_a_checkpoint_with_an_odd_range_is_refused_in_a_line(tmp_path, saved):
    weights = write_weights(tmp_path / "a.pt", {"gray_range": saved})
    with pytest.raises(CheckpointError, match=r"a\.pt: gray.range") as caught:
        Segmenter(weights)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["int32", "float32", "float64", "int16"])
def test_the_api_reads_arrays_of_every_number_type(tmp_path, kind):
    segmenter = Segmenter(write_weights(tmp_path / "a.pt", {"gray_range": [100, 3160]}))
    gray = picture(1, 40, 48)
    values = gray.astype(kind) * 12 + 100
    np.testing.assert_array_equal(segmenter(values.astype(kind)), expected_mask(gray))
    tifffile.imwrite(tmp_path / "a.tif", values.astype(kind))
    np.testing.assert_array_equal(read_image(tmp_path / "a.tif", segmenter.gray), gray)
    if kind.startswith("float"):
        values[3, 3] = np.nan
        with pytest.raises(DataError, match="image: value nan"):
            segmenter(values)
