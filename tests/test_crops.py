"""Crops at native resolution: of images of any sizes, placed where classes and labels are."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_set import add, make_set, train

import data
from data import ANNOTATED, FINE, TRAIN, Draw, Sample, find_split
from imaging.store import ImageStore
from model import METHODS, PSCL_SimCLR
from pscl.augmentation import ColorJitter
from pscl.geometry import ViewGeometry
from pscl.sampling import VOTES
from stages.pretraining import stack_centres
from utils.metrics import IGNORED


@pytest.fixture(scope="module")
def unequal(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A set whose images all differ in size; its annotated image is the largest."""
    root = make_set(tmp_path_factory.mktemp("set"))
    for number, size in enumerate([(33, 47), (64, 32), (41, 41)]):
        add(root / "train_numf", f"15_u{number}", number, 3, size)
        add(root / "sup_num5_0", f"15_u{number}", number, 3, size)
        add(root / "test_numf", f"15_tu{number}", 50 + number, 3, size)
    add(root / "sup_num1_0", "15_0", 0, 3, (80, 96))
    return root


def two_views(root: Path, **more: Any) -> data.TwoViewDataset:
    """Views of a set with crops of 24 pixels."""
    train_samples, annotated = find_split(root, "train_numf"), find_split(root, "sup_num1_0")
    store = ImageStore()
    return data.TwoViewDataset(
        train_samples, annotated, store, num_classes=3, seed=0, crop=24, **more
    )


def test_views_of_crops_have_their_size_whatever_the_image(unequal: Path) -> None:
    views = two_views(unequal)
    for draws in views.draws(0, 3):
        batch = data.collate([views[draw] for draw in draws])
        assert batch["view_q"].shape == batch["view_k"].shape == (4, 3, 24, 24)
        assert batch["label"].shape == (1, 3, 24, 24)


def test_a_crop_is_a_part_of_the_image_at_its_own_resolution(
    unequal: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ColorJitter, "draw", lambda rng, strength: ColorJitter())
    monkeypatch.setattr(ViewGeometry, "draw", lambda rng, crop: ViewGeometry(False, 4))
    views, store = two_views(unequal), ImageStore()
    for stream, samples in ((TRAIN, views.train), (ANNOTATED, views.annotated)):
        item = views[Draw(stream, 3, 0, 0)]
        whole = data.to_input(store.image(samples[0].image))
        windows = whole.unfold(1, 24, 1).unfold(2, 24, 1)  # (3, rows, columns, 24, 24)
        same = (windows == item["view_q"][:, None, None]).all(dim=(0, 3, 4))
        assert same.sum() == 1
        assert torch.equal(item["view_k"], item["view_q"])
        if stream == ANNOTATED:
            assert samples[0].mask is not None
            (top, left) = same.nonzero()[0].tolist()
            mask = store.mask(samples[0].mask)[top : top + 24, left : left + 24]
            assert torch.equal(item["label"], data.one_hot(mask, 3))


def test_crops_are_normalised_by_the_whole_image(unequal: Path) -> None:
    views = two_views(unequal, standardize=True, jitter_strength=0.0, random_crop=0.0)
    item = views[Draw(TRAIN, 0, 0, 0)]
    whole = data.image_input(views.train[0], ImageStore(), standardize=True)
    assert set(item["view_q"].flatten().tolist()) <= set(whole.flatten().tolist())


def test_without_crops_the_views_are_those_of_the_whole_image(unequal: Path) -> None:
    views = two_views(unequal)
    views.crop = 0
    assert views[Draw(TRAIN, 0, 0, 0)]["view_q"].shape == (3, 32, 40)


def test_a_crop_shows_every_class_where_one_can() -> None:
    mask = np.zeros((60, 80), np.uint8)
    mask[20:24, 30:34], mask[26:30, 30:34], mask[20:24, 40:44] = 1, 2, 3
    rng = np.random.default_rng(0)
    found = [data.place_showing_classes(rng, mask, 40) for _ in range(50)]
    shown = [set(np.unique(mask[t : t + 40, left : left + 40])) for t, left in found]
    assert sum(len(classes) == 4 for classes in shown) >= 45
    assert len(set(found)) > 20
    assert all(0 <= t <= 20 and 0 <= left <= 40 for t, left in found)


def test_a_class_far_from_the_others_is_shown_in_its_share_of_crops() -> None:
    mask = np.full((100, 200), IGNORED, np.uint8)
    mask[:10, :10], mask[5:10, 10:15], mask[95:, 195:] = 0, 1, 2
    rng = np.random.default_rng(0)
    places = [data.place_showing_classes(rng, mask, 16) for _ in range(300)]
    shown = [np.unique(mask[t : t + 16, left : left + 16]).tolist() for t, left in places]
    assert abs(sum(2 in classes for classes in shown) / 300 - 1 / 3) < 0.1
    assert all(set(classes) - {IGNORED} for classes in shown)


def test_a_mask_without_labels_gives_any_crop() -> None:
    mask = np.full((20, 30), IGNORED, np.uint8)
    found = {data.place_showing_classes(np.random.default_rng(i), mask, 16) for i in range(40)}
    assert len(found) > 20 and max(found) <= (4, 14)


def steps_of(samples: list[Sample], store: ImageStore, **more: Any) -> data.SegmentationDataset:
    """Training with labels in steps of crops of 16 pixels."""
    own = data.Augmentation(crop=16)
    return data.SegmentationDataset(samples, store, seed=0, augmentation=own, steps=True, **more)


def test_steps_take_the_images_in_turn(unequal: Path) -> None:
    samples = find_split(unequal, "sup_num5_0")
    dataset, count = steps_of(samples, ImageStore()), len(samples)
    steps = [dataset.draws(step, 3) for step in range(2 * count)]
    assert all(len(batches) == 1 and len(batches[0]) == 3 for batches in steps)
    images = [draw.image for (batch,) in steps for draw in batch]
    rounds = [images[start : start + count] for start in range(0, len(images), count)]
    assert all(sorted(round_) == list(range(count)) for round_ in rounds)
    assert len({tuple(round_) for round_ in rounds}) > 1
    drawn = [(d.stream, d.epoch, d.number) for (batch,) in steps for d in batch]
    assert len(set(drawn)) == len(drawn)


def test_one_image_fills_a_batch_with_different_crops(unequal: Path) -> None:
    dataset = steps_of(find_split(unequal, "sup_num1_0"), ImageStore())
    (batch,) = dataset.draws(5, 4)
    crops = [dataset[draw]["image"] for draw in batch]
    assert all(crop.shape == (3, 16, 16) for crop in crops)
    assert not any(torch.equal(crops[0], other) for other in crops[1:])
    assert torch.equal(dataset[batch[2]]["image"], crops[2])  # whatever was drawn before


def test_crops_show_labels_where_few_pixels_have_one(unequal: Path) -> None:
    (sample,) = find_split(unequal, "sup_num1_0")
    store = ImageStore()
    assert sample.mask is not None
    store.mask(sample.mask)[:, 30:] = IGNORED  # the store's own memory
    counted = {}
    for steps in (True, False):
        dataset = steps_of([sample], store)
        dataset.steps = steps
        masks = [dataset[Draw(FINE, 0, number, 0)]["mask"] for number in range(60)]
        counted[steps] = sum(bool((mask != IGNORED).any()) for mask in masks)
    assert counted[True] >= 59 and counted[False] < 50


@pytest.mark.parametrize("more", [{}, {"scale": 1.4, "rotation": 30.0}])
def test_steps_of_whole_oblong_images_make_batches(tmp_path: Path, more: dict[str, float]) -> None:
    samples = find_split(make_set(tmp_path / "set", size=(24, 40)), "sup_num1_0")
    dataset = steps_of(samples, ImageStore())
    dataset.augmentation = data.Augmentation(jitter=0.0, **more)
    (batch,) = dataset.draws(0, 8)
    items = [dataset[draw] for draw in batch]
    assert all(x["image"].shape == (3, 24, 40) and x["mask"].shape == (24, 40) for x in items)
    assert data.collate(items)["image"].shape == (8, 3, 24, 40)
    dataset.steps = False  # without steps an image is turned in the same way
    for draw, item in zip(batch, items, strict=True):
        assert torch.equal(dataset[draw]["image"], item["image"])
        assert torch.equal(dataset[draw]["mask"], item["mask"])


def test_steps_of_whole_square_images_are_those_of_crops_of_their_size(tmp_path: Path) -> None:
    (sample,) = find_split(make_set(tmp_path / "set", size=(32, 32)), "sup_num1_0")
    store, shown = ImageStore(), {}
    assert sample.mask is not None
    store.mask(sample.mask)[:, 3:] = IGNORED  # the store's own memory: a stroke at the edge
    whole, crops = steps_of([sample], store), steps_of([sample], store)
    for side, dataset in ((0, whole), (32, crops)):
        dataset.augmentation = data.Augmentation(scale=1.4, crop=side)
    (batch,) = whole.draws(0, 40)
    for draw in batch:
        assert torch.equal(whole[draw]["image"], crops[draw]["image"])
        assert torch.equal(whole[draw]["mask"], crops[draw]["mask"])
    for steps in (True, False):
        whole.steps = steps
        shown[steps] = sum(bool((whole[draw]["mask"] != IGNORED).any()) for draw in batch)
    assert shown[True] == 40 > shown[False]


def test_statistics_see_crops_that_no_step_sees_and_always_the_same(unequal: Path) -> None:
    dataset = steps_of(find_split(unequal, "sup_num1_0"), ImageStore())
    first, again = (list(dataset.for_statistics(2, 5)) for _ in range(2))
    assert len(first) == 5 and all(x.shape == (2, 3, 16, 16) for x in first)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    trained = [dataset[draw]["image"] for step in range(5) for draw in dataset.draws(step, 2)[0]]
    assert not any(torch.equal(x, y) for batch in first for x in batch for y in trained)


def test_images_of_unequal_sizes_pass_all_stages(unequal: Path, tmp_path: Path) -> None:
    words = "--self_crop 24 --fine_crop 24 --probe 1"
    code = train(unequal, tmp_path, words, stages="self-fine-sup", data_size="5", self_max_epoch=1)
    assert code == 0
    text = (tmp_path / "tiny_simclr/5_0/log_self.txt").read_text()
    assert "The views are made of crops of 24x24 pixels" in text


def test_matches_that_a_pixel_classifier_admits(unequal: Path, tmp_path: Path) -> None:
    words = "--self_crop 24 --admit_matches classifier"
    assert train(unequal, tmp_path, words, stages="self", data_size="5", self_max_epoch=1) == 0
    text = (tmp_path / "tiny_simclr/5_0/log_self.txt").read_text()
    assert "that a pixel classifier, learnt from the annotated images, sees" in text
    shares = [float(word) for word in re.findall(r"Admitted_up\d (\S+)", text)]
    assert len(shares) == 3 and all(0 < share < 1 for share in shares)


def test_matches_that_lead_back_to_annotated_patches(unequal: Path, tmp_path: Path) -> None:
    words = "--self_crop 24 --admit_matches cycle"
    assert train(unequal, tmp_path, words, stages="self", data_size="5", self_max_epoch=1) == 0
    text = (tmp_path / "tiny_simclr/5_0/log_self.txt").read_text()
    assert f"whose {VOTES} most similar patches of the annotated image" in text
    shares = [float(word) for word in re.findall(r"Admitted_up\d (\S+)", text)]
    assert len(shares) == 3 and all(0 <= share < 1 for share in shares)


class PSCLVariant(PSCL_SimCLR):
    """A method of somebody's own, which takes the settings of its base."""


def test_a_method_of_ones_own_asks_for_what_its_settings_need(
    unequal: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(METHODS, "byol", PSCLVariant)
    words = "--self_crop 24 --self_mode byol --admit_matches classifier"
    assert train(unequal, tmp_path, words, stages="self", data_size="5", self_max_epoch=1) == 0
    text = (tmp_path / "tiny_byol/5_0/log_self.txt").read_text()
    assert "that a pixel classifier, learnt from the annotated images, sees" in text
    assert len(re.findall(r"Admitted_up\d (\S+)", text)) == 3


def test_the_surest_matches_wait_for_the_first_steps(unequal: Path, tmp_path: Path) -> None:
    words = "--self_crop 24 --admit_matches sure"
    assert train(unequal, tmp_path, words, stages="self", data_size="5", self_max_epoch=1) == 0
    text = (tmp_path / "tiny_simclr/5_0/log_self.txt").read_text()
    assert "of which a slowly moving encoder is surest, none at first" in text
    assert "rises for 1500 steps, and this run has 3: 0 of the matches count in the end" in text
    shares = [float(word) for word in re.findall(r"Admitted_up\d (\S+)", text)]
    assert shares == [0, 0, 0]


@pytest.mark.parametrize(("top_k", "told"), [(2, False), (3, True)])
def test_crops_of_fewer_cells_than_patches_are_warned_about(
    unequal: Path, tmp_path: Path, top_k: int, told: bool
) -> None:
    """A crop of 24 pixels of which .8 are kept has (24 * .8 / 4) ** 2 = 23.04 cells at scale 1."""
    words = f"--self_crop 24 --self_mode moco --random_crop 0.2 --num_classes 8 --top_k {top_k}"
    assert train(unequal, tmp_path, words, stages="self", data_size="5", self_max_epoch=1) == 0
    text = (tmp_path / "tiny_moco/5_0/log_self.txt").read_text()
    line = "may have 23 cells, of which 8 classes take 3 each at scale 1"
    assert (line in text) is told


def test_random_patches_have_no_class_to_be_admitted_by(
    unequal: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = "--self_crop 24 --admit_matches cycle --label_guided False"
    assert train(unequal, tmp_path, words, stages="self") == 2
    assert "admit_matches: found cycle; allowed: all, where label_guided" in capsys.readouterr().err


def test_without_crops_unequal_sizes_are_refused_with_both_cures(
    unequal: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(unequal, tmp_path, stages="self-fine", data_size="5") == 2
    error = capsys.readouterr().err
    for name in ("--self_crop N, at most 32", "--fine_crop N, at most 32", "--image_size N"):
        assert name in error


def test_crops_larger_than_an_image_are_refused(
    unequal: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(unequal, tmp_path, "--self_crop 33", stages="self") == 2
    error = capsys.readouterr().err
    assert "15_0.png: 40x32 pixels; self_crop: found 33; give at most 32, or 0" in error


def test_images_left_out_of_pretraining_are_told(tmp_path: Path) -> None:
    root = make_set(tmp_path / "set")
    for number in range(3):
        add(root / "train_unlabelled", f"u_{number}", 70 + number, 3, (32, 40))
    for words, said in (("", True), ("--use_unlabelled", False)):
        out = tmp_path / ("all" if words else "some")
        assert train(root, out, words, stages="self", self_max_epoch=1) == 0
        log = (out / "tiny_simclr/1_0/log_self.txt").read_text()
        line = f"3 images of {root}/train_unlabelled are left out; --use_unlabelled pretrains"
        assert (line in log) == said


def test_the_middles_of_unequal_images_make_a_batch() -> None:
    one, other = torch.arange(5 * 8.0).view(1, 5, 8), torch.arange(7 * 4.0).view(1, 7, 4)
    found = stack_centres([one, other])
    assert torch.equal(found, torch.stack([one[:, :, 2:6], other[:, 1:6]]))
