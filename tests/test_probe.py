"""Looking at pretraining: closed forms, scikit-learn and brute force; and that nothing changes."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from sklearn.cluster import KMeans
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from tiny_set import files, make_set, train
from torch import Tensor, nn

import stages.pretraining
from methods import Method
from networks import ProjectedUNet
from report import probe
from stages.pretraining import SelfSupervised
from utils.checkpoint import load
from utils.metrics import IGNORED, Scores

SIZE = (21, 26)
NO_SCORES = Scores.from_confusion(np.zeros((0, 3, 3)))


def some_maps(seed: int = 0) -> list[Tensor]:
    """up1, up2, up3 of an image of 21x26: sides halved and rounded down twice."""
    generator = torch.Generator().manual_seed(seed)
    sizes = ((8, 5, 6), (4, 10, 13), (2, *SIZE))
    return [torch.randn(1, *size, generator=generator) for size in sizes]


def enlarged(maps: list[Tensor]) -> Tensor:
    """All features of all pixels, (H*W, F), the plain way."""
    full = [F.interpolate(m, SIZE, mode="bilinear", align_corners=False) for m in maps]
    return torch.cat(full, dim=1)[0].flatten(1).T


# --- features -------------------------------------------------------------------------------------


def test_features_at_pixels_are_those_of_the_enlarged_maps():
    maps = some_maps()
    every = torch.arange(SIZE[0] * SIZE[1])
    torch.testing.assert_close(probe.at_pixels(maps, every, SIZE), enlarged(maps))
    some = torch.tensor([0, 25, 26, 300, 545])
    torch.testing.assert_close(probe.at_pixels(maps, some, SIZE), enlarged(maps)[some])


def test_a_linear_function_of_the_maps_is_one_of_the_enlarged_features():
    maps = some_maps()
    linear = probe.Linear(torch.randn(5, 14), torch.randn(5))
    found = probe.apply_linear(maps, linear, SIZE)
    expected = enlarged(maps) @ linear.weight.T + linear.bias
    torch.testing.assert_close(found[0].flatten(1).T, expected, atol=1e-4, rtol=1e-4)


def test_drawn_pixels_are_labelled_and_each_comes_once():
    mask = torch.full((20, 30), IGNORED, dtype=torch.long)
    mask[3:9, 4:14] = 1
    for count, expected in ((25, 25), (60, 60), (500, 60), (0, 1)):
        place = probe.draw_pixels(mask, count, np.random.default_rng(0))
        assert len(set(place.tolist())) == len(place) == expected
        assert (mask.flatten()[place] == 1).all()


# --- classifier and clusters ----------------------------------------------------------------------


def blobs(classes: list[int]) -> tuple[Tensor, Tensor]:
    """Features around a centre for each class, of different units, and one that is constant."""
    rng = np.random.default_rng(3)
    labels = rng.choice(classes, 400)
    centres = rng.normal(0, 1, (max(classes) + 1, 5))
    features = (centres[labels] + rng.normal(0, 0.7, (400, 5))) * [1, 100, 0.01, 5, 1] + 40
    features[:, 4] = 7.0
    return torch.from_numpy(features).float(), torch.from_numpy(labels)


@pytest.mark.parametrize("classes", [[0, 1], [0, 2], [0, 1, 2, 3], [1, 3, 4]])
def test_the_classifier_decides_as_scikit_learns_pipeline(classes: list[int]):
    features, labels = blobs(classes)
    found = probe.fit_classifier(features, labels, 5)
    logits = features @ found.weight.T + found.bias
    twin = make_pipeline(StandardScaler(), LogisticRegression(max_iter=300))
    expected = twin.fit(features.numpy(), labels.numpy()).predict(features.numpy())
    assert (logits.argmax(dim=1).numpy() == expected).mean() > 0.99
    assert set(logits.argmax(dim=1).tolist()) <= set(classes)  # never one without a label
    right = (expected == labels.numpy()).mean()
    assert 0.6 < right < 1


def test_with_one_class_there_is_only_that_class():
    found = probe.fit_classifier(torch.randn(30, 4), torch.full((30,), 2), 3)
    assert (torch.randn(9, 4) @ found.weight.T + found.bias).argmax(dim=1).tolist() == [2] * 9


def test_the_classifier_does_not_depend_on_the_number_of_threads():
    features, labels = blobs([0, 1, 2])
    before = torch.get_num_threads()
    first = probe.fit_classifier(features, labels, 3)
    assert torch.get_num_threads() == before
    torch.set_num_threads(2)
    try:
        second = probe.fit_classifier(features, labels, 3)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_a_pixel_belongs_to_the_nearest_centre_of_k_means():
    features, _ = blobs([0, 1, 2])
    found = probe.fit_clusters(features, 3, seed=5)
    cluster = (features @ found.weight.T + found.bias).argmax(dim=1).numpy()
    scaled = StandardScaler().fit_transform(features.double().numpy()).astype(np.float32)
    twin = KMeans(3, n_init=3, random_state=5).fit(scaled)
    distance = ((scaled[:, None] - twin.cluster_centers_[None]) ** 2).sum(axis=2)
    nearest = distance.argmin(axis=1)
    pairs = {(a, b) for a, b in zip(cluster, nearest, strict=True)}
    assert len(pairs) == 3  # the same parts, in another order
    sizes = np.bincount(cluster, minlength=3)
    assert (np.diff(sizes) <= 0).all()  # from the largest to the smallest


# --- the spread -----------------------------------------------------------------------------------


def test_spread_in_closed_form():
    one = torch.tensor([[0.3, -2.0, 1.0]])
    assert probe.spread(one.repeat(7, 1) * torch.arange(1, 8)[:, None]) < 1e-7
    assert probe.spread(torch.cat([one, -5 * one])) == pytest.approx(1)
    for n in (2, 5, 9):  # orthogonal directions: the mean has length 1 / sqrt(n)
        assert probe.spread(3 * torch.eye(n)) == pytest.approx(math.sqrt(1 - 1 / n))
    corner = torch.tensor([[1.0, 0.0], [math.cos(0.2), math.sin(0.2)]])
    assert probe.spread(corner) == pytest.approx(math.sin(0.1))  # half the angle between them
    assert math.isnan(probe.spread(one))


class WithoutDoubles(Tensor):
    """On MPS, as far as double precision goes: there is none before it is on the processor."""

    def double(self) -> Tensor:  # type: ignore[override]
        raise TypeError("Cannot convert a MPS Tensor to float64 dtype")

    def cpu(self) -> Tensor:  # type: ignore[override]
        return self.as_subclass(Tensor)


def test_a_device_needs_no_double_precision():
    features = blobs([0, 1, 2])[0]
    elsewhere = features.as_subclass(WithoutDoubles)
    assert probe.spread(elsewhere) == probe.spread(features)
    found, expected = (probe.fit_clusters(x, 3, seed=5) for x in (elsewhere, features))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


class Constant(ProjectedUNet):
    """An encoder that says the same of every image, or of every pixel."""

    def __init__(self, what: str) -> None:
        super().__init__((4, 8, 16, 32), 16, 8)
        last: Any = self.decode.mlp[-1] if what == "images" else self.decode.conv_x4up3_conv2
        nn.init.zeros_(last.weight)
        nn.init.ones_(last.bias)


@pytest.mark.parametrize("norm", ["batch", "group"])
def test_a_random_network_has_not_collapsed_and_a_constant_one_has(norm: str):
    torch.manual_seed(0)
    images = torch.rand(4, 3, 32, 40)
    with torch.no_grad():
        for channels in ((4, 8, 16, 32), (8, 16, 32, 64)):
            network = ProjectedUNet(channels, 16, 8, norm=norm)
            assert min(probe.embedding_spreads(network, images)) > 10 * probe.COLLAPSED
        for what, place in (("images", 0), ("pixels", 1)):
            spreads = probe.embedding_spreads(Constant(what), images)
            assert spreads[place] < 1e-6 and spreads[1 - place] > 10 * probe.COLLAPSED
            _, said = probe.Findings(NO_SCORES, spreads).lines(30)
            assert f"after 30 epochs the embeddings of all {what}" in said and "\n" not in said
            assert len(probe.Findings(NO_SCORES, spreads).lines(0)) == 1


def test_measuring_the_spread_leaves_the_network_as_it_was():
    network = ProjectedUNet((4, 8, 16, 32), 16, 8).eval()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    with torch.no_grad():
        probe.embedding_spreads(network, torch.rand(4, 3, 32, 40))
    assert not any(module.training for module in network.modules())
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


# --- a look ---------------------------------------------------------------------------------------


def items(count: int, seed: int) -> list[probe.Item]:
    """Images whose first channel is the class, and their masks."""
    generator = torch.Generator().manual_seed(seed)
    masks = torch.randint(0, 3, (count, *SIZE), generator=generator)
    images = torch.stack([masks.float(), *torch.rand(2, count, *SIZE, generator=generator)], 1)
    return [(i, m, f"{n}.png") for n, (i, m) in enumerate(zip(images, masks, strict=True))]


def encoder_of(keep: float) -> Callable[[Tensor], tuple[Tensor, list[Tensor]]]:
    """Maps whose finest is the image, its first channel times ``keep``."""

    def encode(images: Tensor) -> tuple[Tensor, list[Tensor]]:
        up3 = images * torch.tensor([keep, 1, 1])[:, None, None]
        coarse = [F.avg_pool2d(images[:, 1:], size) for size in (4, 2)]
        return images.mean((2, 3)), [*coarse, up3]

    return encode


def test_features_that_tell_the_classes_have_a_dice_of_one_and_others_have_not():
    annotated, test = items(2, seed=1), items(4, seed=2)

    def found(keep: float) -> tuple[Scores, probe.Linear]:
        return probe.look(encoder_of(keep), annotated, test, 3, np.random.default_rng(0))

    (good, clusters), (again, same), (poor, _) = found(1.0), found(1.0), found(0.0)
    assert good.mean_dice == 1 and good.acc == 1 and good.images == 4
    assert 0.1 < poor.mean_dice < 0.45  # a third would be guessing
    assert torch.equal(clusters.weight, same.weight) and again == good


def test_the_picture_shows_each_pixels_cluster(tmp_path: Path):
    test = items(2, seed=2)
    clusters = probe.Linear(torch.zeros(3, 7), torch.tensor([0.0, -0.5, -2.0]))
    clusters.weight[:, 4] = torch.arange(3)  # x, up1 and up2 having two each: class by its nearest
    pixels = [np.full(SIZE, 99, np.uint8)] * 2
    path = tmp_path / "sub" / "probe_3.png"
    probe.draw_clusters(path, encoder_of(1.0), test, pixels, clusters, "three clusters")
    sheet = np.asarray(Image.open(path))
    colours = probe.palette(3)
    enlarged_by = 400 // 26
    for number in range(2):
        top, left = 10 + 26 + 26, 10 + 410 * (2 * number + 1)
        mask = test[number][1].numpy().repeat(enlarged_by, 0).repeat(enlarged_by, 1)
        shown = sheet[top : top + mask.shape[0], left : left + mask.shape[1]]
        np.testing.assert_array_equal(shown, colours[mask])


# --- whole runs -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_set(tmp_path_factory.mktemp("data") / "set")


def entries(run: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line["probe"] for line in lines if "probe" in line]


def comparable(value: Any) -> Any:
    """A state with its tensors as lists, which can be compared."""
    if isinstance(value, Tensor):
        return value.tolist()
    if isinstance(value, dict):
        return {name: comparable(part) for name, part in value.items()}
    return [comparable(part) for part in value] if isinstance(value, list | tuple) else value


@pytest.mark.parametrize("mode", ["simclr", "moco", "byol", "densecl"])
def test_a_run_that_is_looked_at_ends_with_the_same_bytes(data: Path, tmp_path: Path, mode: str):
    kwargs: dict[str, Any] = {"stages": "self-fine", "self_mode": mode, "self_max_epoch": 3}
    for name, every in (("plain", 0), ("probed", 2)):
        assert train(data, tmp_path / name, probe=every, **kwargs) == 0
    plain, probed = (files(tmp_path / name / f"tiny_{mode}/1_0") for name in ("plain", "probed"))
    pictures = {f"probe_{done}.png" for done in (0, 2, 3)}
    assert set(probed) - set(plain) == pictures
    differ = {name for name in plain if plain[name] != probed[name]}
    # The states name the settings, and that of pretraining the files that it writes.
    states = {"state_self.pt", "state_fine.pt"}
    assert differ <= {"log_self.txt", "log_fine.txt", "metrics.jsonl"} | states
    one, other = (
        load(tmp_path / name / f"tiny_{mode}/1_0/state_fine.pt") for name in ("plain", "probed")
    )
    changed = {name for name, value in one["config"].items() if value != other["config"][name]}
    assert changed == {"output_dir", "probe"}
    about = [
        line.replace(str(tmp_path / "plain"), str(tmp_path / "probed")) for line in one["about"]
    ]
    assert about == other["about"]  # which names the file that fine-tuning starts from
    for state in (one, other):
        del state["config"], state["about"], state["log"]  # the logs have other lines
    assert comparable(one) == comparable(other)
    assert {"moco3.pt", "fine.pt", "fine_last.pt"} <= set(plain)
    found = entries(tmp_path / "probed" / f"tiny_{mode}" / "1_0")
    assert [one["epochs_done"] for one in found] == [0, 2, 3]
    for one in found:
        assert 0 <= one["dice"] <= 1 and 0 < one["acc"] <= 1 and one["images"] == 2
        assert one["image_spread"] > probe.COLLAPSED < one["pixel_spread"]
    text = probed["log_self.txt"].decode()
    assert text.count("Probe: after ") == 3 and "Warning" not in text
    assert f"Probe: after 2 epochs, Dice {found[1]['dice']:.4f}" in text
    settings = load(tmp_path / "probed" / f"tiny_{mode}" / "1_0" / "moco3.pt")["settings"]
    assert "probe" not in settings


def test_a_run_that_was_stopped_looks_at_the_same(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    kwargs: dict[str, Any] = {"stages": "self", "self_max_epoch": 3, "probe": 1}
    assert train(data, Path("run"), **kwargs) == 0
    expected = files(Path("run"))
    (tmp_path / "run").rename(tmp_path / "whole")
    real = SelfSupervised.train_epoch

    def stop(self: SelfSupervised, epoch: int, step_done: Callable[[], object]) -> None:
        if epoch == 2:
            raise KeyboardInterrupt
        real(self, epoch, step_done)

    with monkeypatch.context() as patch:
        patch.setattr(SelfSupervised, "train_epoch", stop)
        assert train(data, Path("run"), **kwargs) == 130
    assert train(data, Path("run"), **kwargs) == 0
    assert files(Path("run")) == expected


def test_a_collapsed_run_is_warned_of_and_goes_on(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    real = stages.pretraining.build_method

    def collapsed(self_mode: str, settings: dict[str, Any]) -> Method:
        method = real(self_mode, settings)
        encoder: Any = method.encoder_q
        nn.init.zeros_(encoder.decode.mlp[-1].weight)
        return method

    monkeypatch.setattr("stages.pretraining.build_method", collapsed)
    assert train(data, tmp_path, stages="self", probe=1, self_lr=1e-12) == 0
    text = (tmp_path / "tiny_simclr" / "1_0" / "log_self.txt").read_text()
    warned = [line for line in text.splitlines() if line.startswith("Warning: collapse")]
    # Not before training: what a network starts with is no collapse.
    assert len(warned) == 2 and "after 1 epochs" in warned[0] and "after 2 epochs" in warned[1]
    assert "--self_lr" in warned[0] and warned[0] in capsys.readouterr().out


def test_a_probe_needs_masks_and_a_test_set_and_says_so_before_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    root = make_set(tmp_path / "set")
    (root / "test_numf" / "gt" / "15_t0.png").unlink()
    assert train(root, tmp_path / "out", stages="self", probe=1) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "15_t0.png: no mask" in error
    assert error.endswith(", or leave out --probe, which alone reads it\n")
    assert train(root, tmp_path / "out", stages="self-fine", probe=1) == 2
    assert "--probe" not in capsys.readouterr().err  # fine-tuning wants the masks, too
    assert not list((tmp_path / "out").rglob("*.pt"))
    assert train(root, tmp_path / "out", stages="self") == 0


def test_a_probe_wants_the_annotated_image_that_the_method_does_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    for mode, alone in (("byol", True), ("simclr", False)):
        root = make_set(tmp_path / mode)
        (root / "sup_num1_0" / "gt" / "15_0.png").unlink()
        assert train(root, tmp_path / "out", stages="self", self_mode=mode, probe=1) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and "sup_num1_0/img/15_0.png: no mask" in error
        assert ("leave out --probe" in error) is alone


@pytest.mark.parametrize(("mode", "said"), [("plain-moco", True), ("byol", True), ("moco", False)])
def test_the_log_says_where_the_probe_looks_through_ups_that_nobody_trains(
    data: Path, tmp_path: Path, mode: str, said: bool
):
    assert train(data, tmp_path, stages="self", self_mode=mode, probe=2) == 0
    run = tmp_path / f"tiny_{mode}" / "1_0"
    assert ("trains the way down only" in (run / "log_self.txt").read_text()) is said
    first, last = (torch.load(run / f"moco{n}.pt", weights_only=True)["moco"] for n in ("0", "2"))
    ups = [key for key in first if ".up3." in key and "encoder_k" not in key]
    assert ups and all(torch.equal(first[key], last[key]) for key in ups) is said


def test_images_that_may_be_probed(data: Path, tmp_path: Path):
    """Five annotated images, standardised, GroupNorm, one training image, ignored pixels."""
    kwargs: dict[str, Any] = {"stages": "self", "probe": 2, "self_max_epoch": 2}
    assert train(data, tmp_path / "a", data_size="5", standardize=True, norm="group", **kwargs) == 0
    assert len(entries(tmp_path / "a" / "tiny_simclr" / "5_0")) == 2
    root = make_set(tmp_path / "one", train=1)
    path = root / "sup_num1_0" / "gt" / "15_0.png"
    mask = np.array(Image.open(path))
    mask[:, :20] = 255
    Image.fromarray(mask).save(path)
    assert train(root, tmp_path / "b", ignore_label=255, use_unlabelled=False, **kwargs) == 0
    (first, _) = entries(tmp_path / "b" / "tiny_simclr" / "1_0")
    assert first["image_spread"] is None and first["pixel_spread"] > 0
