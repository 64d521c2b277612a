"""Finding, checking, views and batches, on small sets made here."""

import multiprocessing
import pickle
import random
import shutil
import sys
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_set import NAMES, noise, noise_set

import data
from benchmarks import measure
from data import Sample, find_split
from imaging.store import ImageStore
from pscl.augmentation import ColorJitter
from pscl.geometry import ViewGeometry
from utils.files import DataError
from utils.metrics import IGNORED

GOLDEN = Path(__file__).parent / "golden" / "views.npz"


@pytest.fixture
def root(tmp_path) -> Path:
    return noise_set(tmp_path)


# ---------------------------------------------------------------- names and folders


@pytest.mark.parametrize(
    ("stem", "ids"),
    [
        ("45_s7_0_0", ("45", "s7")),
        ("45-s7-0-0", ("45", "s7")),
        ("970C-90M-AR_235_0_0", ("970C-90M-AR", "235")),
        ("45_s7", ("45", "s7")),
        ("picture", ("", "picture")),
        ("_x", ("", "_x")),
        ("45_", ("", "45_")),
        ("", ("", "")),
        ("時効 45_試料7_0_0", ("時効 45", "試料7")),
    ],
)
def test_names(stem, ids):
    assert data.parse_name(stem) == ids


def test_name_of_the_published_loader():
    assert "_".join(data.parse_name("45_s7_0_0")) == str(np.load(GOLDEN)["out/id"])


def test_images_are_found_with_their_masks(tmp_path):
    for name, suffix in (("b_2", ".TIF"), ("a_1", ".jpg"), ("ü_3", ".BMP")):
        noise(tmp_path / "s", name, suffix=suffix, mask=name != "a_1")
    for stray in ("Thumbs.db", ".hidden.png", "notes.txt"):
        (tmp_path / "s" / "img" / stray).write_bytes(b"x")
    (tmp_path / "s" / "img" / "folder.png").mkdir()
    found = find_split(tmp_path, "s")
    assert [(s.name, s.mask and s.mask.name) for s in found] == [
        ("a_1.jpg", None),
        ("b_2.TIF", "b_2.png"),
        ("ü_3.BMP", "ü_3.png"),
    ]
    assert find_split(tmp_path, "absent") == []


def test_annotated_folders(root):
    assert data.annotated_split(root, "1", 3) == "sup_num1_3"
    assert data.annotated_split(root, "5", 0) == "sup_num5_0"
    assert data.annotated_split(root, "f") == "train_numf"
    noise(root / "sup_numf", NAMES[0])
    assert data.annotated_split(root, "f", 2) == "sup_numf"


def test_unlabelled_images_join_pretraining_when_wanted(root):
    noise(root / "train_unlabelled", "99_u_0_0", mask=False)
    assert len(data.pretraining_samples(ImageStore(), root, use_unlabelled=False)) == 7
    names = [s.name for s in data.pretraining_samples(ImageStore(), root, use_unlabelled=True)]
    assert len(names) == 8 and names[-1] == "99_u_0_0.png"


def test_groups_number_the_batches():
    names = ["30_a_0_0.png", "15_b_0_0.png", "plain.png", "30_c_0_0.png", "other.png"]
    train = [Sample(Path("img") / name, None) for name in names]
    annotated = [Sample(Path("sup") / name, None) for name in ("plain.png", "15_b_0_0.png")]
    groups = data.number_groups(train, annotated)
    assert {str(image): number for image, number in groups.items()} == {
        "img/15_b_0_0.png": 0,
        "sup/15_b_0_0.png": 0,
        "img/30_a_0_0.png": 1,
        "img/30_c_0_0.png": 1,
        "img/other.png": 2,
        "img/plain.png": 3,
        "sup/plain.png": 3,  # the same image
    }


def test_images_of_one_name_in_two_folders_are_two_groups():
    """Microscopes number every folder from 1; the annotated one is that of the first folder."""
    train = [Sample(Path(folder) / "x1.png", None) for folder in ("train_numf", "train_unlabelled")]
    groups = data.number_groups(train, [Sample(Path("sup") / "x1.png", None)])
    assert groups[train[0].image] == groups[Path("sup") / "x1.png"] == 0
    assert groups[train[1].image] == 1


def test_every_image_is_a_group_of_its_own_where_names_tell_no_batch():
    samples = [Sample(Path(n), None) for n in ("A_2_0_0.png", "A_1_0_0.png", "plain.png")]
    groups = data.number_groups(samples, by_batch=False)
    assert {image.name: number for image, number in groups.items()} == {
        "A_1_0_0.png": 0,
        "A_2_0_0.png": 1,
        "plain.png": 2,
    }


# ---------------------------------------------------------------- views


def golden_dataset(tmp_path: Path) -> tuple[data.TwoViewDataset, dict[str, np.ndarray]]:
    golden = dict(np.load(GOLDEN))
    for part, key in (("img", "in/image"), ("gt", "in/mask")):
        (tmp_path / "g" / part).mkdir(parents=True)
        Image.fromarray(golden[key]).save(tmp_path / "g" / part / "45_s7_0_0.png")
    samples = find_split(tmp_path, "g")
    return data.TwoViewDataset(samples, samples, ImageStore(), num_classes=4, seed=0), golden


@pytest.mark.parametrize("number", range(8))
def test_views_equal_the_published_loader(tmp_path, monkeypatch, number):
    dataset, golden = golden_dataset(tmp_path)
    drawn = {key: golden[f"draw{number}/in/{key}"] for key in ("flip", "rot_k", "r")}
    geometry = ViewGeometry(bool(drawn["flip"] == 1), int(drawn["rot_k"]), *drawn["r"].tolist())
    monkeypatch.setattr(ViewGeometry, "draw", lambda rng, random_crop: geometry)
    monkeypatch.setattr(ColorJitter, "draw", lambda rng, strength: ColorJitter())
    item = dataset[data.Draw(data.ANNOTATED, 0, 0, 0)]
    for key in ("view_q", "view_k", "label"):
        expected = golden[f"draw{number}/out/{key}"]
        assert item[key].dtype == torch.float32
        largest = np.abs(expected).max()
        np.testing.assert_allclose(item[key].numpy(), expected, rtol=0, atol=1e-4 * largest)


def test_gray_is_replicated_before_normalisation():
    gray = torch.tensor([[[0, 51, 255]]], dtype=torch.uint8)
    result = data.to_input(gray)
    for channel, (mean, std) in enumerate(
        [(0.49139968, 0.24703223), (0.48215841, 0.24348513), (0.44653091, 0.26158784)]
    ):
        expected = (np.array([0, 0.2, 1]) - mean) / std
        np.testing.assert_allclose(result[channel, 0], expected, rtol=1e-5)
    assert torch.equal(data.to_input(gray.expand(3, -1, -1)), result)


def test_one_hot_is_255_at_the_class():
    label = data.one_hot(torch.tensor([[0, 2], [1, 2]], dtype=torch.uint8), 4)
    assert label.tolist() == [
        [[255, 0], [0, 0]],
        [[0, 0], [255, 0]],
        [[0, 255], [0, 255]],
        [[0, 0], [0, 0]],
    ]


def test_the_two_views_have_their_own_jitter(root):
    samples = find_split(root, "train_numf")
    dataset = data.TwoViewDataset(samples, (), ImageStore(), num_classes=4, seed=0, random_crop=0)
    differ = 0
    for index in range(len(samples)):
        item = dataset[data.Draw(data.TRAIN, 0, index, index)]
        image = dataset.store.image(samples[index].image)
        before = data.normalise(item["geometry"].apply(image.float() / 255))
        plain_k = torch.equal(item["view_k"], before)
        plain_q = torch.equal(item["view_q"], data.to_input(image))
        differ += plain_k != plain_q
    assert differ  # a jitter shared by both views would make them plain together


@pytest.mark.parametrize("shape", [(24, 40), (40, 24, 3)])
def test_rectangular_images_keep_their_shape(tmp_path, shape):
    noise(tmp_path / "sup_num1_0", "15_a_0_0", shape=shape)
    samples, store = find_split(tmp_path, "sup_num1_0"), ImageStore()
    for epoch in range(6):
        views = data.TwoViewDataset(samples, samples, store, num_classes=4, seed=1)
        item = views[data.Draw(data.ANNOTATED, epoch, 0, 0)]
        assert item["view_q"].shape == item["view_k"].shape == (3, *shape[:2])
        assert item["label"].shape == (4, *shape[:2])
        fine = data.SegmentationDataset(samples, store, seed=1)[data.Draw(data.FINE, epoch, 0, 0)]
        assert fine["image"].shape == (3, *shape[:2]) and fine["mask"].shape == shape[:2]


def test_fine_tuning_mask_follows_the_image(tmp_path):
    ids = np.random.default_rng(0).integers(0, 4, (20, 20), dtype=np.uint8)
    for part, pixels in (("img", ids * 60), ("gt", ids)):
        (tmp_path / "s" / part).mkdir(parents=True)
        Image.fromarray(pixels).save(tmp_path / "s" / part / "a_b.png")
    dataset = data.SegmentationDataset(find_split(tmp_path, "s"), ImageStore(), seed=3)
    seen = set()
    for epoch in range(60):
        item = dataset[data.Draw(data.FINE, epoch, 0, 0)]
        # Jitter maps gray levels one to one here, so each class keeps one value of its own.
        values = [item["image"][0][item["mask"] == c].unique().numel() for c in range(4)]
        assert values == [1, 1, 1, 1] and item["mask"].dtype == torch.int64
        seen.add(tuple(item["mask"].flatten().tolist()))
    assert len(seen) == 8  # flip and four turns: the eight symmetries of the square


def test_test_images_are_unchanged(root):
    samples, store = find_split(root, "test_numf"), ImageStore()
    items = list(data.items_of_test(samples, store))
    assert [name for _, _, name in items] == ["15_t0_0_0.png", "30_t1_0_0.png", "30_t2_0_0.png"]
    for (image, mask, _), sample in zip(items, samples, strict=True):
        pixels = np.asarray(Image.open(sample.image)) / 255
        np.testing.assert_allclose(image[1], (pixels - 0.48215841) / 0.24348513, rtol=1e-4)
        np.testing.assert_array_equal(mask, np.asarray(Image.open(sample.mask)))
        assert mask.dtype == torch.int64


# ---------------------------------------------------------------- standardised images, crops


def standardised(pixels: np.ndarray, before: np.ndarray | None = None) -> np.ndarray:
    """By NumPy's mean and deviation, of other pixels if given."""
    from_ = pixels if before is None else before
    return (pixels.astype(np.float64) - from_.mean()) / from_.std()


@pytest.mark.parametrize("shape", [(1, 7, 9), (3, 30, 20), (1, 400, 300)])
def test_own_statistics_are_numpys(shape):
    pixels = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    mean, deviation = data.own_statistics(torch.from_numpy(pixels))
    assert mean == pytest.approx(pixels.mean() / 255, rel=1e-12)
    assert deviation == pytest.approx(pixels.std() / 255, rel=1e-12)
    x = data.to_input(torch.from_numpy(pixels), (mean, deviation))
    np.testing.assert_allclose(x, np.broadcast_to(standardised(pixels), x.shape), atol=1e-5)


def test_a_standardised_image_forgets_gain_and_offset():
    pixels = np.random.default_rng(0).integers(0, 60, (1, 32, 32), dtype=np.uint8)
    first, second = (torch.from_numpy(p) for p in (pixels, 4 * pixels + 7))
    a, b = (data.to_input(image, data.own_statistics(image)) for image in (first, second))
    torch.testing.assert_close(a, b, atol=1e-5, rtol=0)
    assert (data.to_input(first) - data.to_input(second)).abs().max() > 1


def test_an_image_of_one_level_is_zero_and_finite():
    image = torch.full((1, 16, 16), 77, dtype=torch.uint8)
    assert data.own_statistics(image) == (77 / 255, 1 / 255)
    assert data.to_input(image, data.own_statistics(image)).abs().max() < 1e-4


def test_all_stages_standardise_by_the_whole_image_before_the_jitter(root):
    samples, store = find_split(root, "sup_num1_0"), ImageStore()
    pixels = store.image(samples[0].image)
    kwargs: dict[str, Any] = {"seed": 1, "standardize": True}
    views = data.TwoViewDataset(samples, (), store, num_classes=4, **kwargs)
    item = views[data.Draw(data.TRAIN, 0, 0, 0)]
    rng = data.generator(1, data.TRAIN, 0)
    jittered = [ColorJitter.draw(rng, 0.2).apply(pixels).numpy() for _ in "qk"]
    expected = standardised(jittered[0], pixels.numpy())
    np.testing.assert_allclose(item["view_q"][:1], expected, atol=1e-5)
    assert abs(expected.std() - 1) > 0.01  # the jitter is not undone
    crop = data.Augmentation(jitter=0.0, crop=16)
    fine = data.SegmentationDataset(samples, store, augmentation=crop, **kwargs)
    whole = np.unique(standardised(pixels.numpy()))
    seen = fine[data.Draw(data.FINE, 0, 0, 0)]["image"]
    assert seen.shape == (3, 16, 16)
    assert np.abs(seen.numpy().reshape(-1, 1) - whole).min(axis=1).max() < 1e-4
    ((image, _, _),) = data.items_of_test(samples, store, standardize=True)
    np.testing.assert_allclose(image[:1], standardised(pixels.numpy()), atol=1e-5)


def test_crops_of_a_mask_follow_their_image(tmp_path):
    ids = np.random.default_rng(0).integers(0, 4, (20, 20), dtype=np.uint8)
    for part, pixels in (("img", ids * 60), ("gt", ids)):
        (tmp_path / "s" / part).mkdir(parents=True)
        Image.fromarray(pixels).save(tmp_path / "s" / part / "a_b.png")
    dataset = data.SegmentationDataset(
        find_split(tmp_path, "s"), ImageStore(), seed=3, augmentation=data.Augmentation(crop=16)
    )
    seen = set()
    for epoch in range(200):
        item = dataset[data.Draw(data.FINE, epoch, 0, 0)]
        assert item["mask"].shape == (16, 16)
        for c in range(4):
            values = item["image"][0][item["mask"] == c]
            assert values.numel() and values.max() - values.min() < 1e-4
        seen.add(tuple(item["mask"].flatten().tolist()))
    assert len(seen) > 100  # of 8 * 25 places and symmetries


def test_the_contrast_is_a_gain_and_an_offset_of_the_same_pixels(root):
    samples, store = find_split(root, "sup_num1_0"), ImageStore()
    plain, changed = (
        data.SegmentationDataset(samples, store, seed=0, augmentation=data.Augmentation(contrast=c))
        for c in (0.0, 0.4)
    )
    gains = set()
    for epoch in range(5):
        draw = data.Draw(data.FINE, epoch, 0, 0)
        x, y = (d[draw]["image"].double().flatten() for d in (plain, changed))
        gain, offset = np.polyfit(x, y, 1)
        np.testing.assert_allclose(y, gain * x + offset, atol=1e-5)
        assert abs(np.log(gain)) <= 0.4 and abs(offset) <= 0.4
        gains.add(round(gain, 6))
    assert len(gains) == 5


def test_turned_and_scaled_crops_have_labels_where_the_image_is(root):
    samples, store = find_split(root, "sup_num1_0"), ImageStore()
    wild = data.Augmentation(crop=32, scale=1.5, rotation=45.0)
    dataset = data.SegmentationDataset(samples, store, seed=0, augmentation=wild)
    ignored = 0
    for epoch in range(10):
        item = dataset[data.Draw(data.FINE, epoch, 0, 0)]
        assert item["image"].shape == (3, 32, 32) and item["image"].isfinite().all()
        assert set(item["mask"].unique().tolist()) <= {0, 1, 2, 3, IGNORED}
        ignored += int((item["mask"] == IGNORED).sum())
    assert 0 < ignored < 10 * 32 * 32 / 2


def test_a_step_has_several_crops_of_each_image(root):
    samples = find_split(root, "sup_num5_0")

    def batches(crops: int, epoch: int = 0) -> list[data.Batch]:
        dataset = data.SegmentationDataset(samples, ImageStore(), seed=0, crops=crops)
        return list(data.Batches(dataset, batch_size=2).epoch(epoch))

    first, three = batches(1), batches(3)
    assert [len(b["name"]) for b in three] == [3 * len(b["name"]) for b in first]
    for one, many in zip(first, three, strict=True):
        assert many["name"] == [name for name in one["name"] for _ in range(3)]
        # The first crop of each image is what it would have been alone; the others are others.
        assert torch.equal(many["image"][::3], one["image"])
        assert not torch.equal(many["image"][1::3], one["image"])
    assert_same(batches(3, 1), batches(3, 1))


# ---------------------------------------------------------------- batches


def pretraining(root: Path, batch_size=3, seed=0, workers=0, annotated="sup_num5_0"):
    extra = find_split(root, annotated) if annotated else []
    train, store = find_split(root, "train_numf"), ImageStore()
    dataset = data.TwoViewDataset(train, extra, store, num_classes=4, seed=seed)
    return data.Batches(dataset, batch_size, workers)


def assert_same(first: Iterable[data.Batch], second: Iterable[data.Batch]) -> None:
    for a, b in zip(list(first), list(second), strict=True):
        assert a.keys() == b.keys()
        for key in a:
            same = torch.equal(a[key], b[key]) if torch.is_tensor(a[key]) else a[key] == b[key]
            assert same, key


def test_pretraining_batch_holds_what_the_method_needs(root):
    batches = pretraining(root)
    items = list(batches.epoch(0))
    assert len(items) == len(batches) == 2  # seven images: the last one is left out
    for batch in items:
        assert batch["view_q"].shape == batch["view_k"].shape == (4, 3, 32, 32)
        assert batch["label"].shape == (1, 4, 32, 32)
        assert batch["group"].dtype == torch.int64 and len(batch["geometry"]) == 4
        # groups 15, 30, 45 are numbered 0, 1, 2
        assert batch["group"].tolist() == [int(n.split("_")[0]) // 15 - 1 for n in batch["name"]]
    names = [name for batch in items for name in batch["name"][1:]]
    assert len(set(names)) == 6 and set(names) <= {f"{name}.png" for name in NAMES}


@pytest.mark.parametrize("colour", [False, True])
@pytest.mark.parametrize("standardize", [False, True])
def test_views_finished_as_a_batch_are_those_finished_one_by_one(root, standardize, colour):
    """Of gray and colour images together, far within a gray level; the same jitter, bit by bit."""
    if colour:
        path = sorted((root / "train_numf" / "img").iterdir())[1]
        gray = np.array(Image.open(path).convert("L"))
        Image.fromarray(np.stack([gray, gray // 2, 255 - gray], axis=2)).save(path)
    found = []
    for unfinished in (False, True):
        batches = pretraining(root)
        batches.dataset.unfinished, batches.dataset.standardize = unfinished, standardize
        found.append(list(batches.epoch(1)))
    assert len(found[0]) == len(found[1]) > 1
    for expected, raw in zip(*found, strict=True):
        assert raw["view_q"].dtype == raw["view_k"].dtype == raw["label"].dtype == torch.uint8
        with measure.counted(measure.Stopwatch(torch.device("cpu"))) as calls:
            done = data.finish_views(raw, 4)
        assert not calls.waits and done.keys() == expected.keys()
        for key in ("view_q", "view_k"):
            assert done[key].shape == expected[key].shape
            torch.testing.assert_close(done[key], expected[key], rtol=0, atol=2e-5)
        torch.testing.assert_close(done["label"], expected["label"], rtol=0, atol=1e-3)
        assert all(done[key] == expected[key] for key in ("geometry", "name"))


def test_what_a_classifier_sees_goes_through_the_geometry_of_view_k(root):
    found = []
    for unfinished in (False, True):
        batches = pretraining(root)
        views, store = batches.dataset, ImageStore()
        samples = [*views.train, *views.annotated]
        seen = {s.image: store.mask(s.mask) for s in samples if s.mask}
        by_name = {s.name: store.mask(s.mask) for s in samples if s.mask}
        views.seen, views.unfinished = seen, unfinished
        found.append(list(batches.epoch(1)))
    for expected, raw in zip(*found, strict=True):
        assert raw["seen"].shape == (4, 32, 32) and raw["seen"].dtype == torch.uint8
        assert expected["seen"].shape == (4, 4, 32, 32)
        assert torch.equal(expected["seen"][:1], expected["label"])  # the true mask was given
        done = data.finish_views(raw, 4)
        torch.testing.assert_close(done["seen"], expected["seen"], rtol=0, atol=1e-3)
        for name, view, one in zip(raw["name"], raw["geometry"], expected["seen"], strict=True):
            torch.testing.assert_close(one, view.apply(data.one_hot(by_name[name], 4)))


def test_without_annotated_image_there_is_no_label(root):
    batch = next(iter(pretraining(root, annotated="").epoch(0)))
    assert "label" not in batch and batch["view_q"].shape[0] == 3


@pytest.mark.parametrize(
    ("batch_size", "steps", "size"), [(8, 1, 8), (7, 1, 8), (1, 7, 2), (4, 1, 5)]
)
def test_number_and_size_of_batches(root, batch_size, steps, size):
    batches = pretraining(root, batch_size=batch_size)
    sizes = [len(batch["name"]) for batch in batches.epoch(0)]
    assert sizes == [size] * steps and len(batches) == steps


def test_annotated_image_is_drawn_anew_for_each_step(root):
    batches = pretraining(root, batch_size=1)
    first = [batch for epoch in range(4) for batch in batches.epoch(epoch)]
    assert {batch["name"][0] for batch in first} == {f"{name}.png" for name in NAMES[:5]}
    assert len({batch["geometry"][0] for batch in first}) == len(first)
    for batch in first:  # the label really belongs to the view: it has gone the same way
        sample = next(s for s in find_split(root, "sup_num5_0") if s.name == batch["name"][0])
        ids = torch.from_numpy(np.array(Image.open(sample.mask)))
        expected = batch["geometry"][0].apply((ids[None] == torch.arange(4)[:, None, None]) * 255.0)
        torch.testing.assert_close(batch["label"][0], expected)


def test_epochs_and_seeds_differ_and_repeat(root):
    batches = pretraining(root)
    again = list(batches.epoch(2))
    torch.rand(3), random.random(), np.random.random()  # other generators play no part
    assert_same(again, pretraining(root).epoch(2))
    for other in (batches.epoch(1), pretraining(root, seed=1).epoch(2)):
        other = list(other)
        assert [b["name"] for b in other] != [b["name"] for b in again]
        assert all(a["geometry"] != b["geometry"] for a, b in zip(again, other, strict=True))


def test_a_sample_does_not_depend_on_its_place_in_the_batch(root):
    large = next(iter(pretraining(root, batch_size=7).epoch(0)))
    for batch in pretraining(root, batch_size=2).epoch(0):
        for place, name in enumerate(batch["name"][1:], start=1):
            other = large["name"].index(name, 1)
            assert torch.equal(batch["view_k"][place], large["view_k"][other])


def test_worker_processes_change_nothing(root):
    alone, helped = pretraining(root), pretraining(root, workers=2)
    for epoch in (0, 3, 1):  # persistent workers must follow the epoch
        assert_same(alone.epoch(epoch), helped.epoch(epoch))
    assert len(helped) == len(alone)
    method = "fork" if sys.platform == "linux" else multiprocessing.get_start_method()
    assert {w._popen.method for w in helped._loader._iterator._workers} == {method}


@pytest.mark.slow
def test_worker_processes_started_afresh_change_nothing(root):
    before = multiprocessing.get_start_method(allow_none=True)
    multiprocessing.set_start_method("spawn", force=True)  # as on Windows and macOS
    try:
        helped = pretraining(root, workers=2)
        batches = [list(helped.epoch(epoch)) for epoch in (0, 2)]
        assert {w._popen.method for w in helped._loader._iterator._workers} == {"spawn"}
        del helped  # ends its processes
    finally:
        multiprocessing.set_start_method(before, force=True)
    alone = pretraining(root)
    for epoch, found in zip((0, 2), batches, strict=True):
        assert_same(alone.epoch(epoch), found)


def test_datasets_travel_to_processes_started_afresh(root):
    batches = pretraining(root)
    key = next(iter(batches.order))[0]
    item, copy = batches.dataset[key], pickle.loads(pickle.dumps(batches.dataset))[key]
    assert_same([item], [copy])
    assert pickle.loads(pickle.dumps(data.collate)) is data.collate


def test_an_epoch_can_be_left_early(root):
    batches = pretraining(root, batch_size=1)
    next(iter(batches.epoch(0)))
    assert_same(batches.epoch(0), pretraining(root, batch_size=1).epoch(0))


def test_errors_of_the_preparing_thread_arrive(root):
    batches = pretraining(root)
    (root / "train_numf" / "img" / f"{NAMES[2]}.png").write_bytes(b"")
    with pytest.raises(DataError, match="empty file"):
        for epoch in range(3):
            list(batches.epoch(epoch))


def test_epochs_in_turn_are_the_epochs_one_by_one(root):
    for first in (0, 1):
        alone = pretraining(root)
        each = [b for n in (3, 1, 4) for b in alone.epoch(n, first if n == 3 else 0)]
        assert_same(pretraining(root).epochs([3, 1, 4], first), each)


def test_one_batch_is_prepared_beyond_the_end_of_an_epoch(root, monkeypatch):
    """And what it raises is raised in its turn; the thread ends with the epochs."""
    batches, made, asked = pretraining(root, batch_size=7), [], threading.Event()
    make, others = batches._make, threading.active_count()
    assert len(batches) == 1

    def noted(draws):
        made.append(draws[-1].epoch)
        if made[-1]:
            asked.set()
            raise DataError("a file is gone")
        return make(draws)

    monkeypatch.setattr(batches, "_make", noted)
    coming = batches.epochs([0, 1, 2])
    assert_same([next(coming)], pretraining(root, batch_size=7).epoch(0))
    assert asked.wait(10) and made == [0, 1]  # nobody has asked for epoch 1 yet
    with pytest.raises(DataError, match="a file is gone"):
        next(coming)
    assert threading.active_count() == others
    coming = batches.epochs([0, 0, 0])
    next(coming)
    coming.close()
    assert threading.active_count() == others


def test_fine_tuning_keeps_the_last_partial_batch(root):
    def finetuning(workers: int) -> data.Batches:
        samples = find_split(root, "sup_num5_0")
        dataset = data.SegmentationDataset(samples, ImageStore(), seed=0)
        return data.Batches(dataset, batch_size=2, workers=workers)

    batches = finetuning(0)
    first = list(batches.epoch(0))
    assert [len(batch["name"]) for batch in first] == [2, 2, 1] and len(batches) == 3
    names = [name for batch in first for name in batch["name"]]
    assert sorted(names) == [f"{name}.png" for name in sorted(NAMES[:5])]
    assert first[0]["image"].shape == (2, 3, 32, 32) and first[0]["mask"].shape == (2, 32, 32)
    orders = {tuple(n for b in batches.epoch(e) for n in b["name"]) for e in range(6)}
    assert len(orders) > 1
    assert_same(batches.epoch(4), finetuning(1).epoch(4))


def test_the_ignore_label_becomes_255_and_no_class(tmp_path: Path) -> None:
    mask = np.array([[0, 1], [7, 7]], np.uint8).repeat(16, 0).repeat(16, 1)
    Image.fromarray(mask).save(tmp_path / "m.png")
    ids = ImageStore(ignore_label=7).mask(tmp_path / "m.png")
    assert sorted(set(ids.flatten().tolist())) == [0, 1, 255]
    label = data.one_hot(ids, 2)
    assert label[:, 0, 0].tolist() == [255, 0] and label[:, 31, 31].tolist() == [0, 0]


def test_repeats_left_open_are_those_that_are_there(root: Path) -> None:
    shutil.rmtree(root / "sup_num1_1", ignore_errors=True)
    shutil.copytree(root / "sup_num1_0", root / "sup_num1_3")
    assert data.annotated_repeats(root, "1") == (0, 3)
    assert data.annotated_repeats(root, "1", "21") == (2, 1)
    assert data.annotated_repeats(root, "f", "21") == data.annotated_repeats(root, "f") == (0,)
    assert data.annotated_repeats(root / "nowhere", "1") == (0,)


def test_training_sees_nothing_of_what_transparent_pixels_hide(tmp_path):
    """The views and crops of a set are the same, whatever is below full transparency."""
    shown = np.random.default_rng(0).integers(0, 256, (24, 32), dtype=np.uint8)
    clear = np.broadcast_to(np.arange(32) < 12, shown.shape)
    Image.fromarray(np.where(clear, 255, shown % 2).astype(np.uint8)).save(tmp_path / "mask.png")
    seen = []
    for hidden in (0, 117, 255):
        gray = np.where(clear, hidden, shown).astype(np.uint8)
        alpha = np.where(clear, 0, 255).astype(np.uint8)
        path = tmp_path / f"{hidden}" / "a.png"
        path.parent.mkdir()
        Image.fromarray(np.dstack([gray, alpha]), "LA").save(path)
        sample, store = data.Sample(path, tmp_path / "mask.png"), ImageStore(0, 255)
        own = data.own_statistics(store.image(path), store.inside(path))
        visible = shown[:, 12:] / 255  # by NumPy
        assert own == pytest.approx((visible.mean(), visible.std()))
        tuned = data.SegmentationDataset([sample], store, seed=1, standardize=True)
        views = data.TwoViewDataset([sample], [sample], store, num_classes=2, seed=1,
                                    standardize=True)  # fmt: skip
        draw = data.Draw(data.FINE, 0, 0, 0)
        parts = [tuned[draw]["image"], views[draw]["view_q"], views[draw]["view_k"]]
        parts.append(data.image_input(sample, store, standardize=True))
        seen.append(torch.cat([part.flatten() for part in parts]))
    assert torch.equal(seen[0], seen[1]) and torch.equal(seen[0], seen[2])
