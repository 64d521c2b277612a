"""Prediction of folders: against the network itself, files counted by hand, and bad input."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

import predict
from data import IMAGE_SUFFIXES, to_input
from metallography.folder import RECORD, list_images
from networks import UNet
from predict import Segmenter, main
from utils.checkpoint import CheckpointError, save
from utils.drawing import bar_length, overlay
from utils.imagefile import resize_image

CHANNELS = (4, 8, 16, 32)


def network(num_classes: int = 3) -> UNet:
    torch.manual_seed(3)
    net = UNet(num_classes, CHANNELS).eval()
    torch.nn.init.normal_(net.decode.outc["fc1"].weight, std=3)
    return net


def write_weights(path: Path, settings: dict | None = None, num_classes: int = 3) -> Path:
    contents = {"finetune": network(num_classes).state_dict(), "epoch": 1, "acc": 0.5}
    if settings is not None:
        contents["settings"] = {"num_classes": num_classes, "image_size": 0} | settings
    save(path, contents)
    return path


def picture(seed: int, *shape: int) -> np.ndarray:
    coarse = np.random.default_rng(seed).integers(0, 256, (9, 9, *shape[2:]), dtype=np.uint8)
    return cv2.resize(coarse, shape[1::-1], interpolation=cv2.INTER_CUBIC)


def write_images(folder: Path, *names: str, shape: tuple[int, ...] = (40, 48)) -> Path:
    for seed, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture(seed, *shape)).save(path)
    return folder


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def expected_mask(image: np.ndarray, num_classes: int = 3) -> np.ndarray:
    """What the network says of a whole picture, by the plain way."""
    image = image.copy()
    chw = (
        torch.from_numpy(image)[None] if image.ndim == 2 else torch.from_numpy(image).movedim(2, 0)
    )
    with torch.no_grad():
        return network(num_classes)(to_input(chw)[None])[0].argmax(0).numpy()


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    return write_weights(tmp_path / "run" / "fine.pt", {})


# ---------------------------------------------------------------- from Python


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
    "bad", [np.zeros((8, 8)), np.zeros((2, 8, 8, 3), np.uint8), np.zeros((0, 8), np.uint8)]
)
def test_an_array_that_is_no_image_is_refused(weights: Path, bad: np.ndarray) -> None:
    with pytest.raises(ValueError, match=r"image: found .*; give uint8"):
        Segmenter(weights)(bad)


def test_the_view_average_turns_with_the_image(weights: Path) -> None:
    image = picture(4, 40, 56)
    segmenter = Segmenter(weights, tta=True)
    turned = segmenter.probabilities(np.ascontiguousarray(np.rot90(image)))
    expected = np.rot90(segmenter.probabilities(image), axes=(1, 2))
    np.testing.assert_allclose(turned, expected, atol=1e-5)
    plain = Segmenter(weights).probabilities(image)
    assert np.abs(plain - segmenter.probabilities(image)).max() > 1e-3


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
    own = {"mapping": [0, 9, 200], "class_names": ["Al", "Si", "Cu"]}
    own["class_colours"] = ["000000", "#ff0000", "0000FF"]
    segmenter = Segmenter(write_weights(tmp_path / "fine.pt", own))
    assert segmenter.mapping == (0, 9, 200) and segmenter.class_names == ["Al", "Si", "Cu"]
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
    assert predict.find_weights(tmp_path / "no.pt") == tmp_path / "no.pt"
    with pytest.raises(CheckpointError, match="no fine.pt or sup.pt"):
        predict.find_weights(tmp_path)
    one = write_weights(tmp_path / "a_sup" / "1_0" / "sup.pt", {})
    assert predict.find_weights(tmp_path / "a_sup" / "1_0") == one
    assert predict.find_weights(tmp_path / "a_sup") == one
    write_weights(tmp_path / "a_sup" / "1_1" / "sup.pt", {})
    with pytest.raises(CheckpointError, match=r"several runs \(1_0, 1_1\)"):
        predict.find_weights(tmp_path / "a_sup")


# ---------------------------------------------------------------- a folder


def test_a_folder_with_all_outputs(tmp_path: Path, weights: Path) -> None:
    images = write_images(
        tmp_path / "imgs", "15_a_0_0.png", "60_b.tif", "sub/Gefüge-中.jpg", "twin.png", "twin.bmp"
    )
    (images / "notes.txt").write_text("no image")
    (images / ".hidden.png").write_text("no image")
    out = tmp_path / "out"
    options = ["--weights", str(weights), "--images", str(images), "--out", str(out)]
    assert main([*options, "--um_per_px", "0.1", "--particles", "--probabilities"]) == 0
    names = ["15_a_0_0", "60_b", "sub/Gefüge-中", "twin.bmp", "twin.png"]
    for name in names:
        for kind in ("classes", "gray", "overlay"):
            assert (out / kind / f"{name}.png").is_file(), (kind, name)
    sources = {
        name: images / f"{name}{suffix}"
        for name, suffix in zip(names, (".png", ".tif", ".jpg", "", ""), strict=True)
    }
    for name, source in sources.items():
        ids = np.asarray(Image.open(out / "classes" / f"{name}.png"))
        np.testing.assert_array_equal(ids, expected_mask(np.asarray(Image.open(source))))
        gray = np.asarray(Image.open(out / "gray" / f"{name}.png"))
        np.testing.assert_array_equal(gray, np.array([0, 128, 255])[ids])
        given = np.load(out / "probabilities" / f"{name}.npy")
        assert given.shape == (40, 48, 3) and given.dtype == np.float16
        np.testing.assert_allclose(given.sum(2, dtype=np.float32), 1, atol=2e-3)
        sure = np.sort(given, axis=2)
        clear = sure[..., 2] - sure[..., 1] > 2e-3
        np.testing.assert_array_equal(given.argmax(2)[clear], ids[clear])
    rows = rows_of(out / "measurements.csv")
    assert [r["image"] for r in rows[::3]] == names and len(rows) == 15
    assert [r["batch"] for r in rows[::3]] == ["15", "60", "Gefüge", "", ""]
    shares = [sum(float(r["area_fraction"]) for r in rows[i : i + 3]) for i in range(0, 15, 3)]
    assert shares == pytest.approx([1] * 5)
    particles = rows_of(out / "particles.csv")
    counted = sum(
        int(r["particles_whole"]) + int(r["particles_cut"]) for r in rows if r["class"] != "0"
    )
    assert len(particles) == counted > 0
    summary = (out / "summary.md").read_text(encoding="utf-8")
    assert "0.1 µm per pixel" in summary and "By production batch" in summary
    assert Image.open(out / "sheet.png").size[0] > 1000
    assert {r["batch"] for r in rows_of(out / "batches.csv")} == {"15", "60", "Gefüge", ""}


def test_a_report_with_the_measurements(tmp_path: Path, capsys) -> None:
    run = tmp_path / "steel_simclr" / "1_0"
    weights = write_weights(run / "fine.pt", {"class_names": ["matrix", "θ phase", "void"]})
    words = ["--images", str(write_images(tmp_path / "in", "30_a.png")), "--device", "cpu"]
    words += ["--report", "--weights", str(weights)]
    assert predict.main(words) == 2
    assert "is not in the folder of a run" in capsys.readouterr().err
    (run / "log_fine.txt").write_text("Fine-tuning\n")
    assert predict.main([*words, "--out", str(tmp_path / "out")]) == 2
    assert "so leave --out out" in capsys.readouterr().err
    assert not list(tmp_path.glob("**/report.html")) and not (tmp_path / "out").exists()
    assert predict.main(words) == 0
    page = (run.parent / "report.html").read_text(encoding="utf-8")
    assert "θ phase" in page and "1_0/predicted_in" in page
    sheet = re.search(
        r"1_0/predicted_in: some of its images</figcaption><img src=.data:([^;]*)", page
    )
    assert sheet and sheet[1] == "image/jpeg"


def test_what_is_done_is_skipped(tmp_path: Path, weights: Path, capsys) -> None:
    images = write_images(tmp_path / "imgs", "a.png", "b.png")
    options = ["--weights", str(weights), "--images", str(images), "--out", str(tmp_path / "o")]
    assert main(options) == 0
    assert "2 image(s) predicted, 0 were done" in capsys.readouterr().out
    first = (tmp_path / "o" / "measurements.csv").read_text()
    assert main(options) == 0
    assert "0 image(s) predicted, 2 were done" in capsys.readouterr().out
    assert (tmp_path / "o" / "measurements.csv").read_text() == first
    Image.fromarray(picture(9, 30, 30)).save(images / "b.png")  # another image now
    (tmp_path / "o" / "gray" / "a.png").unlink()
    write_images(images, "c.png")
    assert main(options) == 0
    assert "3 image(s) predicted, 0 were done" in capsys.readouterr().out
    assert main([*options, "--tta"]) == 2
    error = capsys.readouterr().err
    assert "tta was False, is True" in error and error.count("\n") == 1
    assert main([*options, "--tta", "--overwrite"]) == 0
    assert "3 image(s) predicted" in capsys.readouterr().out


def test_another_scale_measures_and_draws_anew_without_predicting(
    tmp_path: Path, weights: Path, monkeypatch
) -> None:
    images = write_images(tmp_path / "imgs", "a.png")
    options = ["--weights", str(weights), "--images", str(images), "--out", str(tmp_path / "o")]
    assert main([*options, "--particles"]) == 0
    assert (tmp_path / "o" / "particles.csv").exists()
    before = (tmp_path / "o" / "overlay" / "a.png").read_bytes()
    monkeypatch.setattr(Segmenter, "bands", None)  # predicting would fail
    assert main([*options, "--um_per_px", "0.3"]) == 0
    assert (tmp_path / "o" / "overlay" / "a.png").read_bytes() != before
    assert "number_per_mm2" in rows_of(tmp_path / "o" / "measurements.csv")[0]
    assert not (tmp_path / "o" / "particles.csv").exists()  # its lengths were in pixels


def test_a_run_goes_on_after_bad_files(tmp_path: Path, weights: Path, capsys) -> None:
    images = write_images(tmp_path / "imgs", "a.png", "z.png")
    (images / "broken.png").write_bytes((images / "a.png").read_bytes()[:60])
    (images / "empty.tif").write_bytes(b"")
    options = ["--weights", str(weights), "--images", str(images), "--out", str(tmp_path / "o")]
    assert main(options) == 1
    lines = capsys.readouterr().err.strip().splitlines()[-3:]
    assert lines[0] == "2 file(s) could not be used:"
    assert "broken.png" in lines[1] and "empty.tif" in lines[2]
    assert [r["image"] for r in rows_of(tmp_path / "o" / "measurements.csv")[::3]] == ["a", "z"]
    assert "broken.png" in (tmp_path / "o" / "summary.md").read_text(encoding="utf-8")


def test_comparison_with_true_masks(tmp_path: Path, weights: Path, capsys) -> None:
    images = write_images(tmp_path / "imgs", "a.png", "sub/b.png", "c.png", "d.png")
    masks = tmp_path / "gt"
    for name in ("a.png", "sub/b.png"):
        truth = expected_mask(np.asarray(Image.open(images / name))).astype(np.uint8)
        (masks / name).parent.mkdir(parents=True, exist_ok=True)
        if name == "a.png":
            truth[:, :10] = 0
        Image.fromarray(truth).save(masks / name)
    Image.fromarray(np.zeros((40, 47), np.uint8)).save(masks / "d.png")  # not the image's size
    out = tmp_path / "o"
    options = ["--weights", str(weights), "--images", str(images), "--masks", str(masks)]
    assert main([*options, "--out", str(out)]) == 1
    assert "4 image(s) predicted, 0 were done" in capsys.readouterr().out
    assert main([*options, "--out", str(out)]) == 1
    assert "0 image(s) predicted, 4 were done" in capsys.readouterr().out
    rows = rows_of(out / "comparison.csv")
    assert [r["image"] for r in rows] == ["a"] * 3 + ["sub/b"] * 3
    predicted = np.asarray(Image.open(out / "classes" / "a.png"))
    truth = np.asarray(Image.open(masks / "a.png"))
    for c in range(3):
        error = (predicted == c).mean() - (truth == c).mean()
        assert float(rows[c]["area_fraction_error"]) == pytest.approx(error)
        assert float(rows[3 + c]["area_fraction_error"]) == float(rows[3 + c]["number_error"]) == 0
    summary = (out / "summary.md").read_text(encoding="utf-8")
    assert "1 image(s) without a true mask (first: c)" in summary
    assert "d.png: 47x40, its image is 48x40" in summary
    matrix = summary.split("predicted class")[1].split("##")[0].split("\n| ")[3:6]
    counts = np.array([[int(v) for v in line.rstrip(" |\n").split(" | ")[1:]] for line in matrix])
    both = np.asarray(Image.open(out / "classes" / "sub" / "b.png"))
    for true in range(3):
        for found in range(3):
            by_hand = ((truth == true) & (predicted == found)).sum() + (both == true).sum() * (
                true == found
            )
            assert counts[true, found] == by_hand


def test_outputs_inside_the_folder_are_no_images(tmp_path: Path) -> None:
    images = write_images(tmp_path / "imgs", "a.png", "o/classes/a.png", "gt/a.png")
    (tmp_path / "imgs" / ".git").mkdir()
    found = list_images(images, IMAGE_SUFFIXES, [images / "o", images / "gt"])
    assert [item.name for item in found] == ["a"]
    assert [item.name for item in list_images(images / "a.png", IMAGE_SUFFIXES)] == ["a"]


def test_the_scale_bar_is_round_and_true() -> None:
    for widest, expected in [(99, 50), (100, 100), (3, 2), (0.7, 0.5), (1234, 1000)]:
        assert bar_length(widest) == pytest.approx(expected)
    image, mask = np.full((500, 600), 200, np.uint8), np.zeros((500, 600), np.uint8)
    mask[100:200, 100:200] = 1
    colours = np.array([[0, 0, 0], [255, 0, 0]], np.uint8)
    drawn = overlay(image, mask, ["matrix", "β"], colours, 0.1)
    # A quarter of 60 um is 15 um, so the bar is 10 um = 100 px.
    bar = (drawn[500 + 8 + 10, : 10 + 100 + 6] == 20).all(axis=1)  # left of the words
    assert bar.sum() == 100
    assert drawn[150, 150].tolist() == [int(110 + 0.45 * 255), 110, 110]
    assert drawn[50, 50].tolist() == [200, 200, 200]


def test_a_large_picture_has_a_reduced_overlay_with_a_true_bar() -> None:
    mask = np.zeros((2100, 4096), np.uint8)
    drawn = overlay(mask, mask, ["0"], np.zeros((1, 3), np.uint8), None)
    assert drawn.shape[1] == 2048
    # 4096 px / 4 = 1024 -> 1000 px of the file, 500 drawn.
    assert abs(int((drawn[1050 + 18, : 10 + 500 + 6] == 20).all(axis=1).sum()) - 500) <= 1


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (["--um_per_px", "0"], "--um_per_px: found 0.0; give"),
        (["--um_per_px", "nan"], "--um_per_px: found nan; give"),
        (["--min_px", "0"], "--min_px: found 0; give"),
        (["--resize", "3"], "--resize: found 3; give 0 or a number of at least 16"),
        (["--overlap", "800"], "overlap 800"),
        (["--grain_classes", "3"], "--grain_classes: found 3; classes are 0 ... 2"),
        (["--masks", "nowhere"], "--masks: nowhere is no folder"),
        (["--images", "nowhere"], "nowhere: no such folder"),
        (["--weights", "nowhere.pt"], "nowhere.pt: cannot be read"),
        (["--device", "toaster"], "--device: found toaster; give auto"),
        (["--threads", "-3"], "--threads: found -3; give 0 or"),
    ],
)
def test_a_bad_option_is_one_line(tmp_path, weights, capsys, change, said) -> None:
    images = write_images(tmp_path / "imgs", "a.png")
    options = ["--weights", str(weights), "--images", str(images), "--out", str(tmp_path / "o")]
    assert main([*options, *change]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize(
    ("what", "of_no_effect"),
    [
        ("rank", [["--report"], ["--particles"], ["--um_per_px", "0.1"], ["--min_px", "20"]]),
        ("export", [["--report"], ["--masks", "m"], ["--out", "o"], ["--grain_classes", "1"]]),
    ],
)
def test_an_option_that_would_do_nothing_is_refused(weights, capsys, what, of_no_effect) -> None:
    words = ["--weights", str(weights), f"--{what}", "model.pt2"]
    for option in of_no_effect:
        assert main([*words, *option]) == 2
        error = capsys.readouterr().err
        assert error == f"{option[0]}: of no effect with --{what}; leave it out\n"


@pytest.mark.parametrize("flag", ["images", "rank", "masks"])
def test_results_do_not_go_among_the_images(tmp_path, weights, capsys, flag) -> None:
    """There a contact sheet would be an image of the set from then on."""
    images, masks = (write_images(tmp_path / name, "a.png") for name in ("imgs", "gt"))
    words = ["--weights", str(weights), "--rank" if flag == "rank" else "--images", str(images)]
    out = masks if flag == "masks" else images
    assert main([*words, "--masks", str(masks), "--out", str(out)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and f"--out: found {out}, the folder of --{flag}" in error
    assert [p.name for p in out.iterdir()] == ["a.png"]


@pytest.mark.parametrize("change", [["--min_px", "x"], ["--nonsense"]])
def test_an_option_that_cannot_be_read_is_one_line(capsys, change) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["--weights", "w", "--images", "i", *change])
    error = capsys.readouterr().err
    assert exit_.value.code == 2 and error.count("\n") == 1 and change[0] in error


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


def test_an_output_folder_that_cannot_be_made(tmp_path: Path, weights: Path, capsys) -> None:
    images = write_images(tmp_path / "imgs", "a.png")
    (tmp_path / "file").write_text("")
    out = tmp_path / "file" / "o"
    assert main(["--weights", str(weights), "--images", str(images), "--out", str(out)]) == 2
    error = capsys.readouterr().err
    assert str(out.parent) in error and "--out" in error and error.count("\n") == 1


def test_a_record_cut_off_by_a_kill_is_taken_up(tmp_path: Path, weights: Path, capsys) -> None:
    images = write_images(tmp_path / "imgs", "a.png", "b.png")
    options = ["--weights", str(weights), "--images", str(images), "--out", str(tmp_path / "o")]
    assert main(options) == 0
    record = tmp_path / "o" / RECORD
    lines = record.read_text().splitlines()
    assert [json.loads(line)["name"] for line in lines[1:]] == ["a", "b"]
    record.write_text("\n".join([*lines[:2], lines[2][:9]]))
    capsys.readouterr()
    assert main(options) == 0
    assert "1 image(s) predicted, 1 were done" in capsys.readouterr().out
    assert main(options) == 0
    assert "0 image(s) predicted, 2 were done" in capsys.readouterr().out


def test_results_go_beside_the_weights_by_default(tmp_path: Path, weights: Path) -> None:
    images = write_images(tmp_path / "imgs", "a.png")
    assert main(["--weights", str(weights.parent), "--images", str(images)]) == 0
    assert (weights.parent / "predicted_imgs" / "summary.md").is_file()
