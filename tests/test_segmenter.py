"""Prediction of single images against the network itself, and what a model file says."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from data import to_input
from imaging.store import resize_image
from metallography.segmenter import Segmenter, find_weights
from networks import UNet
from tests.trained_model import CHANNELS, expected_mask, network, picture, write_weights
from utils.checkpoint import CheckpointError, save


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    return write_weights(tmp_path / "run" / "fine.pt", {})


@pytest.mark.parametrize("shape", [(40, 48), (37, 51, 3), (16, 16)])
def test_a_mask_is_what_the_network_says(weights: Path, shape: tuple[int, ...]) -> None:
    image = picture(1, *shape)
    segmenter = Segmenter(weights.parent, device="cpu")
    mask = segmenter(image)
    assert mask.dtype == np.uint8 and mask.shape == shape[:2]
    assert len(np.unique(mask)) > 1
    np.testing.assert_array_equal(mask, expected_mask(image))
    probabilities = segmenter.probabilities(image)
    assert probabilities.shape == (3, *shape[:2]) and probabilities.dtype == np.float32
    np.testing.assert_allclose(probabilities.sum(0), 1, atol=1e-5)
    np.testing.assert_array_equal(probabilities.argmax(0), mask)


@pytest.mark.parametrize("shape", [(1, 1), (3, 50), (15, 9, 3)])
def test_tiny_pictures_have_masks_too(weights: Path, shape: tuple[int, ...]) -> None:
    assert Segmenter(weights)(picture(1, *shape)).shape == shape[:2]


def test_tiles_agree_with_the_whole_picture(weights: Path) -> None:
    image = picture(2, 331, 300)
    tiled = Segmenter(weights, tile=256).probabilities(image)
    whole = Segmenter(weights, tile=768).probabilities(image)
    np.testing.assert_allclose(tiled, whole, atol=1e-4)


def test_sixteen_bits_and_channels(weights: Path) -> None:
    segmenter = Segmenter(weights)
    gray = picture(1, 32, 40)
    expected = segmenter(gray)
    for same in (gray[..., None], np.stack([gray] * 3, 2), gray.astype(np.uint16) * 257):
        np.testing.assert_array_equal(segmenter(same), expected)
    with_alpha = np.concatenate([picture(1, 32, 40, 3), np.zeros((32, 40, 1), np.uint8)], axis=2)
    np.testing.assert_array_equal(segmenter(with_alpha), segmenter(with_alpha[..., :3]))


@pytest.mark.parametrize(
    "bad",
    [
        np.zeros((8, 8), bool),
        np.zeros((8, 8), complex),
        np.zeros((2, 8, 8, 3), np.uint8),
        np.zeros((0, 8), np.uint8),
    ],
)
def test_an_array_that_is_no_image_is_refused(weights: Path, bad: np.ndarray) -> None:
    with pytest.raises(ValueError, match=r"image: found .*; give numbers"):
        Segmenter(weights)(bad)


def test_the_view_average_turns_with_the_image(weights: Path) -> None:
    image = picture(4, 40, 56)
    segmenter = Segmenter(weights, tta=True)
    turned = segmenter.probabilities(np.ascontiguousarray(np.rot90(image)))
    expected = np.rot90(segmenter.probabilities(image), axes=(1, 2))
    np.testing.assert_allclose(turned, expected, atol=1e-5)
    plain = Segmenter(weights).probabilities(image)
    assert np.abs(plain - segmenter.probabilities(image)).max() > 1e-3


def test_a_model_of_segment_py_is_averaged_as_it_was_there(tmp_path: Path) -> None:
    image, path = picture(4, 40, 56), write_weights(tmp_path / "model.pt", {"views": 8})
    averaged = Segmenter(path, tta=True).probabilities(image)
    np.testing.assert_array_equal(Segmenter(path).probabilities(image), averaged)
    plain = Segmenter(write_weights(tmp_path / "fine.pt", {})).probabilities(image)
    np.testing.assert_array_equal(Segmenter(path, tta=False).probabilities(image), plain)
    assert not Segmenter(write_weights(tmp_path / "one.pt", {"views": 1})).tta
    with pytest.raises(CheckpointError, match="views"):
        Segmenter(write_weights(tmp_path / "odd.pt", {"views": 3}))


def test_images_are_resized_as_in_training(tmp_path: Path) -> None:
    path = write_weights(tmp_path / "fine.pt", {"image_size": 32})
    image = picture(1, 64, 96)
    segmenter = Segmenter(path)
    assert segmenter.resize == 32 and "resized to 32x32" in segmenter.about
    small = resize_image(image, 32)
    x = to_input(torch.from_numpy(small)[None])[None]
    with torch.no_grad():
        logits = network()(x).softmax(1)
    expected = torch.nn.functional.interpolate(logits, (64, 96), mode="bilinear")[0]
    np.testing.assert_allclose(segmenter.probabilities(image), expected.numpy(), atol=1e-4)
    np.testing.assert_array_equal(segmenter(small), expected_mask(small))
    np.testing.assert_array_equal(Segmenter(path, resize=0)(image), expected_mask(image))


# ---------------------------------------------------------------- standardised images, GroupNorm


def test_a_picture_is_standardised_as_a_whole_also_by_tiles(tmp_path: Path) -> None:
    path = write_weights(tmp_path / "fine.pt", {"standardize": True})
    image = picture(2, 331, 300)
    image[:60] //= 4  # the tiles' own means differ much from the whole picture's
    x = ((image - image.mean()) / image.std()).astype(np.float32)
    with torch.no_grad():
        expected = network()(torch.from_numpy(x).expand(1, 3, -1, -1)).softmax(1)[0].numpy()
    segmenter = Segmenter(path, device="cpu")
    assert "each standardised" in segmenter.about
    np.testing.assert_allclose(segmenter.probabilities(image), expected, atol=1e-4)
    np.testing.assert_allclose(Segmenter(path, tile=256).probabilities(image), expected, atol=1e-4)
    darker = (image // 2 + 10).astype(np.uint8)
    assert (segmenter(darker) == segmenter(image)).mean() > 0.99
    plain = Segmenter(write_weights(tmp_path / "plain.pt", {}), device="cpu")
    assert np.abs(plain.probabilities(image) - expected).max() > 0.01
    turned = Segmenter(path, tta=True).probabilities(np.ascontiguousarray(np.rot90(image)))
    expected = np.rot90(Segmenter(path, tta=True).probabilities(image), axes=(1, 2))
    np.testing.assert_allclose(turned, expected, atol=1e-4)


def test_views_of_a_standardised_picture_are_ranked_alike(tmp_path: Path) -> None:
    segmenter = Segmenter(write_weights(tmp_path / "fine.pt", {"standardize": True}))
    dark = picture(1, 48, 40) // 2
    maps = segmenter.disagreement(dark)
    np.testing.assert_allclose(segmenter.disagreement(2 * dark), maps, atol=1e-4)
    assert maps.max() > 0


@pytest.mark.parametrize("settings", [None, {"norm": "group"}])
def test_a_model_with_group_norm_is_known_by_its_tensors(tmp_path: Path, settings) -> None:
    torch.manual_seed(5)
    group = UNet(3, CHANNELS, "group")
    torch.nn.init.normal_(group.decode.outc["fc1"].weight, std=3)
    contents = {"super": group.state_dict()} | ({"settings": settings} if settings else {})
    save(tmp_path / "sup.pt", contents)
    image = picture(1, 40, 48)
    with torch.no_grad():
        expected = group(to_input(torch.from_numpy(image.copy())[None])[None]).softmax(1)[0]
    found = Segmenter(tmp_path / "sup.pt", device="cpu").probabilities(image)
    np.testing.assert_allclose(found, expected.numpy(), atol=1e-3)


def test_measure_gives_a_row_per_class(weights: Path) -> None:
    mask = np.zeros((100, 100), np.uint8)
    mask[20:30, 20:60] = 2
    table = Segmenter(weights).measure(mask, um_per_px=0.1)
    assert [row["class"] for row in table] == [0, 1, 2]
    assert table[2]["area_fraction"] == pytest.approx(0.04)
    assert table[2]["mean_length_um"] == pytest.approx(4)
    assert table[2]["number_per_mm2"] == pytest.approx(1e4)


def test_measure_takes_the_terms_of_the_command_line(weights: Path) -> None:
    segmenter = Segmenter(weights)
    mask = np.ones((64, 64), np.uint8) - np.eye(64, dtype=np.uint8)
    grains = segmenter.measure(mask, 1.0, grain_classes=[1], boundary_classes=[0])[1]
    assert grains["particles_cut"] == 2 and grains["astm_g"] > 0
    joined = segmenter.measure(mask, 1.0, grain_classes=[1], connectivity=8)[1]
    assert joined["particles_cut"] == 1
    with pytest.raises(ValueError, match="^--um_per_px: found 0; give the side of a pixel"):
        segmenter.measure(mask, um_per_px=0)


# ---------------------------------------------------------------- what the file says


def test_a_published_file_is_read_by_its_shapes(tmp_path: Path) -> None:
    path = write_weights(tmp_path / "fine.pt", None, num_classes=5)
    segmenter = Segmenter(path)
    assert segmenter.num_classes == 5 and segmenter.resize == 0
    assert segmenter.about.count("\n") == 0
    assert "no settings" in segmenter.about and "channels 4 8 16 32" in segmenter.about
    four = Segmenter(write_weights(tmp_path / "four.pt", None, num_classes=4))
    assert four.mapping == (0, 128, 64, 255)


def test_names_colours_and_grays_come_from_the_file(tmp_path: Path) -> None:
    own = {"mapping": [0, 9, 200], "class_names": ["Al", "M/A, blocky", "Cu"]}
    own["class_colours"] = ["000000", "#ff0000", "0000FF"]
    segmenter = Segmenter(write_weights(tmp_path / "fine.pt", own))
    assert segmenter.mapping == (0, 9, 200) and segmenter.class_names == ["Al", "M/A, blocky", "Cu"]
    assert segmenter.colours.tolist() == [[0, 0, 0], [255, 0, 0], [0, 0, 255]]


@pytest.mark.parametrize(
    "own",
    [{"class_names": ["Al", "Si"]}, {"class_colours": [[0, 0, 0]] * 3}, {"mapping": "gray"}],
)
def test_names_and_colours_that_do_not_fit_give_way_to_the_defaults(tmp_path: Path, own) -> None:
    segmenter = Segmenter(write_weights(tmp_path / "fine.pt", own))
    assert segmenter.class_names == ["0 background", "1", "2"]
    assert segmenter.mapping == (0, 128, 255)
    assert segmenter.colours.tolist() == [[51, 51, 51], [230, 159, 0], [86, 180, 233]]


def test_a_run_folder_stands_for_its_file(tmp_path: Path) -> None:
    assert find_weights(tmp_path / "no.pt") == tmp_path / "no.pt"
    with pytest.raises(CheckpointError, match="no fine.pt, sup.pt or model.pt"):
        find_weights(tmp_path)
    one = write_weights(tmp_path / "a_sup" / "1_0" / "sup.pt", {})
    assert find_weights(tmp_path / "a_sup" / "1_0") == one
    assert find_weights(tmp_path / "a_sup") == one
    write_weights(tmp_path / "a_sup" / "1_1" / "sup.pt", {})
    with pytest.raises(CheckpointError, match=r"several runs \(1_0, 1_1\)"):
        find_weights(tmp_path / "a_sup")


@pytest.mark.parametrize(
    ("state", "said"),
    [
        ({"decode.mlp.0.weight": torch.zeros(2, 2)}, "pretrained network"),
        ({"decode.outc.fc1.weight": torch.zeros(3, 4)}, "layers of the UNet are missing"),
        ({}, "no network in it"),
    ],
)
def test_files_that_hold_no_segmenter(tmp_path: Path, state, said) -> None:
    rest = {"encode.x": torch.zeros(1)} if state else {}
    save(tmp_path / "m.pt", {"finetune": state | rest})
    with pytest.raises(CheckpointError, match=said) as error:
        Segmenter(tmp_path / "m.pt")
    assert "m.pt" in str(error.value)


def test_predictions_multiply_single_precision(
    weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """CUDA's convolutions would take TF32 otherwise."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    segmenter, seen = Segmenter(weights), []
    network = segmenter.network
    network.register_forward_hook(lambda *_: seen.append(torch.backends.cudnn.allow_tf32))
    segmenter(picture(1, 32, 40))
    assert seen == [False] and torch.backends.cudnn.allow_tf32
