"""Images that stay on the device: the pixels of those that are uploaded, once each."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_set import TINY, noise, noise_set

import stages.kept_images
import utils.device
from config import Config
from config_run import open_set
from data import Batches, TwoViewDataset, collate, find_split, finish_views
from imaging.store import ImageStore
from stages.kept_images import KeptImages, why_not
from stages.pretraining import SelfSupervised

CPU = torch.device("cpu")


def datasets(root: Path, crop: int, standardize: bool) -> tuple[TwoViewDataset, TwoViewDataset]:
    """The same items without and with images that are kept."""
    train, annotated = (find_split(root, split) for split in ("train_numf", "sup_num1_0"))
    how: dict[str, Any] = {"num_classes": 4, "seed": 3, "crop": crop, "standardize": standardize}
    how |= {"jitter_strength": 1.0, "unfinished": True}
    plain, kept = (
        TwoViewDataset(train, annotated, ImageStore(), kept=k, **how) for k in (False, True)
    )
    return plain, kept


@pytest.mark.parametrize("standardize", [False, True])
@pytest.mark.parametrize("crop", [0, 16])
def test_views_have_the_pixels_of_those_that_are_uploaded(
    tmp_path: Path, crop: int, standardize: bool
) -> None:
    """In two epochs; crops are cut out of images of several sizes too."""
    noise_set(tmp_path)
    if crop:
        noise(tmp_path / "train_numf", "45_wide_0_0", (24, 50))
        noise(tmp_path / "train_numf", "45_high_0_0", (50, 24))
    plain, kept = datasets(tmp_path, crop, standardize)
    files = [sample.image for sample in (*kept.train, *kept.annotated)]
    images = KeptImages(files, kept.store, CPU, crop)
    for epoch in range(2):
        for draws in plain.draws(epoch, 3):
            expected = collate([plain[draw] for draw in draws])
            found = images.views(collate([kept[draw] for draw in draws]))
            assert found.keys() == expected.keys()
            for key, value in expected.items():
                if isinstance(value, torch.Tensor):
                    assert torch.equal(found[key], value), key
                else:
                    assert found[key] == value
            finish_views(found, 4)


def test_a_later_epoch_uploads_no_image_and_reads_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 7 images of 32x32 a step uploads 2 views of 4 images: here tables and one mask."""
    stage = stage_on(noise_set(tmp_path / "set"), tmp_path, cache_on="device")
    uploaded: list[int] = []
    upload = utils.device.upload

    def noted(tensor: torch.Tensor, *more: Any) -> torch.Tensor:
        uploaded.append(tensor.nbytes)
        return upload(tensor, *more)

    for module in (utils.device, stages.kept_images):
        monkeypatch.setattr(module, "upload", noted)
    read: list[Path] = []
    image = stage.job.store.image
    monkeypatch.setattr(stage.job.store, "image", lambda path: read.append(path) or image(path))
    totals = []
    for epoch in range(4):
        uploaded.clear()
        read.clear()
        stage.train_epoch(epoch, lambda: None)
        totals.append(sum(uploaded))
    steps, images = 2, 4  # of an epoch, of a step
    assert not read and stage.kept and not stage.kept.missing
    assert totals[-1] <= steps * (images * (2 * 256 + 100) + 32 * 32) < totals[0]
    assert steps * images * 2 * 32 * 32 > 2 * totals[-1]  # what uploading views takes


def stage_on(data_dir: Path, output: Path, **how: Any) -> SelfSupervised:
    settings = TINY | {"data_dir": str(data_dir), "num_classes": 4, "output_dir": str(output)}
    settings |= {"self_batch_size": 3, "augment_on": "device", **how}
    stage = SelfSupervised(open_set(Config(**settings).resolved())[0][0])
    stage.seed()
    stage.build()
    stage.log = Mock()
    return stage


@pytest.mark.parametrize("workers", [0, 1])
def test_training_has_the_same_weights(tmp_path: Path, workers: int) -> None:
    root, weights = noise_set(tmp_path / "set"), []
    for where in ("cpu", "device"):
        stage = stage_on(root, tmp_path, cache_on=where, workers=workers, self_crop=16)
        for epoch in range(2):
            stage.train_epoch(epoch, lambda: None)
        weights.append(stage.module.state_dict())
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])


def test_what_cannot_be_kept_is_uploaded_as_before_and_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = noise_set(tmp_path / "set")
    kept = stage_on(root, tmp_path, cache_on="device")
    assert "Images stay on the device once they came there (8.2 KB)" in kept.header()
    for how, why in (
        ({"augment_on": "cpu"}, "their views are finished on the CPU (augment_on)"),
        ({}, "they are 8.2 KB, more than a quarter of what is free there"),
    ):
        monkeypatch.setattr(stages.kept_images, "free_device_memory", lambda device: 32_000)
        stage = stage_on(root, tmp_path, cache_on="device", **how)
        views = stage.batches.dataset
        assert stage.kept is None and isinstance(views, TwoViewDataset) and not views.kept
        assert f"Images are uploaded in every step: {why}" in stage.header()
        stage.train_epoch(0, lambda: None)
    quiet = stage_on(root, tmp_path)
    assert quiet.kept is None and not any("device" in line for line in quiet.header())


def test_a_quarter_of_the_free_memory_is_enough(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two images of 10x10, one of them named twice: 200 bytes."""
    files = [tmp_path / "a.png", tmp_path / "b.png"]
    for file in files:
        Image.fromarray(np.zeros((10, 10), np.uint8)).save(file)
    for free, fits in ((800, True), (796, False), (None, False)):
        monkeypatch.setattr(stages.kept_images, "free_device_memory", lambda device, f=free: f)
        assert (why_not([*files, files[0]], ImageStore(), CPU) == "") is fits
    Image.fromarray(np.zeros((10, 10, 3), np.uint8) + np.arange(3, dtype=np.uint8)).save(files[0])
    monkeypatch.setattr(stages.kept_images, "free_device_memory", lambda device: 10**9)
    assert "some have colours" in why_not(files, ImageStore(), CPU)


def test_worker_processes_make_the_same_items(tmp_path: Path) -> None:
    noise_set(tmp_path)
    _, kept = datasets(tmp_path, 0, True)
    alone, with_worker = (list(Batches(kept, 3, workers).epoch(1)) for workers in (0, 1))
    for one, other in zip(alone, with_worker, strict=True):
        assert torch.equal(one["tables"], other["tables"]) and one["corner"] == other["corner"]
