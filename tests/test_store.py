"""The memory for decoded files: bounded, shared, and true to what was read first."""

from __future__ import annotations

import os
import pickle
import threading
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny_set import files, make_set, train

import data
from data import find_split, listed_split
from dataset.check import check_data
from imaging import index
from imaging import store as store_module
from imaging.index import index_file
from imaging.store import ImageStore, fingerprint
from utils.files import DataError


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A set of pictures of 32 x 40 pixels: 1280 bytes each, and as many of a mask."""
    return make_set(tmp_path / "set", train=6)


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the files that are decoded."""
    found: list[str] = []
    for name in ("decode", "read_mask"):
        real = getattr(store_module, name)

        def read(path: Path, real: object = real) -> object:
            found.append(path.name)
            return real(path)  # type: ignore[operator]

        monkeypatch.setattr(store_module, name, read)
    return found


def images(root: Path) -> list[Path]:
    return [sample.image for sample in find_split(root, "train_numf")]


def test_what_was_not_used_for_the_longest_time_makes_room(root: Path, reads: list[str]) -> None:
    a, b, c = images(root)[:3]
    store = ImageStore(cache=2 * 1280)
    for path in (a, b, a, c, a, b):  # c displaces b, which then displaces c
        store.image(path)
    assert reads == [a.name, b.name, c.name, b.name]
    assert store._bytes == 2 * 1280 and store.bytes_seen() == 3 * 1280


def test_without_a_cache_everything_is_read_once(root: Path, reads: list[str]) -> None:
    store = ImageStore()
    for path in images(root) * 3:
        store.image(path)
    assert sorted(reads) == sorted(p.name for p in images(root))


def test_sizes_shapes_and_ids_are_remembered_without_pixels(root: Path, reads: list[str]) -> None:
    store = ImageStore(image_size=16, cache=0)
    sample = find_split(root, "train_numf")[0]
    assert sample.mask is not None
    pixels = store.mask(sample.mask).numpy()
    store.image(sample.image)
    number = len(reads)
    assert store.file_size("image", sample.image) == (32, 40)
    assert store.shape(sample.image) == (1, 16, 16)
    assert list(store.ids(sample.mask)) == np.unique(pixels).tolist()
    assert store._bytes == 0 and len(reads) == number


def test_the_hash_of_a_set_is_the_same_whatever_is_kept(root: Path, reads: list[str]) -> None:
    samples = find_split(root, "train_numf") + find_split(root, "sup_num1_0")
    others = find_split(root, "train_numf") + find_split(root, "sup_num1_1")
    whole, little = ImageStore(), ImageStore(cache=3000)
    expected = [fingerprint(s, whole) for s in (samples, others)]
    reads.clear()
    assert [fingerprint(s, little) for s in (samples, others, samples)] == [*expected, expected[0]]
    assert len(reads) == 2 * (6 + 1 + 1)  # of each folder once, though not all is kept


@pytest.mark.parametrize("cache", [None, 0])
def test_a_set_that_is_not_kept_is_hashed_while_it_is_checked(
    root: Path, reads: list[str], cache: int | None
) -> None:
    samples = find_split(root, "train_numf")
    expected = fingerprint(samples, ImageStore())
    for sample in samples[1::2]:  # some with masks, some without
        sample.mask.unlink()  # type: ignore[union-attr]
    mixed = find_split(root, "train_numf")
    both = [fingerprint(s, ImageStore()) for s in (mixed, [*mixed, *find_split(root, "test_numf")])]
    assert both[0] != expected
    report = check_data(root, num_classes=3, stages=["self"], needs_annotated=False, cache=cache)
    reads.clear()
    assert fingerprint(mixed, report.store) == both[0] and reads == []
    assert fingerprint([*mixed, *find_split(root, "test_numf")], report.store) == both[1]


def test_an_unreadable_mask_that_nobody_asked_for_stops_no_check(root: Path) -> None:
    samples = find_split(root, "train_numf")
    samples[1].mask.write_bytes(b"none")  # type: ignore[union-attr]
    report = check_data(root, num_classes=3, stages=["self"], needs_annotated=False)
    assert samples[:1] != samples and tuple(samples) not in report.store.digests


def test_the_memory_that_a_set_takes_is_told_before_it_is_decoded(
    root: Path, reads: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    Image.new("RGB", (40, 32)).save(root / "train_numf/img/colour.tif")
    more = {"num_classes": 3, "stages": ["self"], "needs_annotated": False}
    (root / "train_numf/img/b0_0_0_0.png").write_bytes(b"broken: counts as nothing")
    with pytest.raises(DataError):
        check_data(root, cache=1000, **more)  # type: ignore[arg-type]
    images = len(find_split(root, "train_numf"))
    known = 1280 * (images - 2) + 3 * 1280
    said = (
        f"{root}: its {images} images and masks take about {known / 1000:.0f} KB, of which 1.0 KB"
    )
    assert capsys.readouterr().out.startswith(said)
    with pytest.raises(DataError):
        check_data(root, cache=known, **more)  # type: ignore[arg-type]
    assert capsys.readouterr().out == ""


def test_a_file_that_changed_is_refused_when_it_is_read_again(root: Path) -> None:
    path = images(root)[0]
    store = ImageStore(cache=0)
    before = store.image(path).clone()
    raw = path.read_bytes()
    Image.fromarray(255 - before[0].numpy()).save(path)
    with pytest.raises(DataError) as error:
        store.image(path)
    assert str(error.value) == (
        f"{path}: not as it was when the set was checked (it has other pixels); put it back and "
        "give the same command, which goes on"
    )
    path.unlink()
    with pytest.raises(DataError, match=r"\(cannot be opened \(No such file or directory\)\)"):
        store.image(path)
    path.write_bytes(raw)  # with another time of change: the pixels count
    assert store.image(path).equal(before)


def test_what_is_kept_needs_no_file(root: Path) -> None:
    path = images(root)[0]
    store = ImageStore(cache=10**6)
    before = store.image(path).clone()
    path.unlink()
    assert store.image(path).equal(before)


def test_a_later_start_reads_no_file_of_a_large_set(
    root: Path, reads: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(index, "LARGE", 5)
    samples = find_split(root, "train_numf")
    file = index_file(root, root)
    first = ImageStore(index=file)
    expected = fingerprint(samples, first)
    first.keep_index()
    reads.clear()
    second = ImageStore(index=file)
    assert fingerprint(samples, second) == expected and reads == []
    assert second.shape(samples[0].image) == (1, 32, 40) and reads == []
    assert second.image(samples[0].image).equal(first.image(samples[0].image))
    path, raw = samples[1].image, samples[1].image.read_bytes()
    os.utime(path, ns=(0, 0))  # of another time: it is read again
    third = ImageStore(index=file)
    reads.clear()
    assert third.shape(samples[0].image) == third.shape(path) and reads == [path.name]
    assert fingerprint(samples, third) == expected
    stamp = path.stat().st_mtime_ns
    Image.fromarray(np.zeros((32, 40), np.uint8)).save(path)
    with open(path, "ab") as out:
        out.write(bytes(len(raw) - path.stat().st_size))
    os.utime(path, ns=(stamp, stamp))  # other pixels in the guise of the same file
    third.keep_index()
    fourth = ImageStore(index=file)
    assert fingerprint(samples, fourth) == expected
    with pytest.raises(DataError, match="it has other pixels"):
        fourth.image(path)
    assert not file.exists()  # so that the same command looks anew
    assert fingerprint(samples, ImageStore(index=file)) != expected


@pytest.mark.parametrize("text", ["", "[]", "{", '{"terms": [1, 0, null], "files": [[1]]}', "3"])
def test_a_damaged_index_is_none(tmp_path: Path, text: str) -> None:
    (tmp_path / "i.json").write_text(text)
    assert index.read_index(tmp_path / "i.json", (0, None)) == ({}, {})
    assert index.read_index(tmp_path / "absent.json", (0, None)) == ({}, {})


def test_an_index_is_that_of_its_terms_and_of_large_sets(root: Path) -> None:
    store, file = ImageStore(), index_file(root, root)
    fingerprint(find_split(root, "train_numf"), store)
    index.write_index(file, (0, None), store._seen, {})
    assert not file.exists()  # 12 files are read faster than looked up
    large = {
        ("image", root / f"{i}.png"): seen
        for i in range(1000)
        for seen in [*store._seen.values()][:1]
    }
    index.write_index(file, (0, None), {**store._seen, **large}, {"a": "b"})
    assert index.read_index(file, (0, None)) == (store._seen, {"a": "b"})  # others are not there
    assert index.read_index(file, (64, None)) == ({}, {})


def test_processes_share_a_cache_that_is_too_small_and_keep_a_whole_set(root: Path) -> None:
    store = ImageStore(cache=4 * 1280)
    for path in images(root)[:4]:
        store.image(path)
    store.share(4)
    assert store._bytes == 4 * 1280
    store.image(images(root)[4])
    for _ in range(2):  # said twice, it is the same
        store.share(4)
        assert store._bytes == 1280


def test_a_store_travels_to_another_process(root: Path) -> None:
    store = ImageStore(cache=2000)
    fingerprint(find_split(root, "train_numf"), store)
    copy = pickle.loads(pickle.dumps(store))
    for path in images(root):
        assert copy.image(path).equal(store.image(path))


def test_threads_read_the_same_pixels(root: Path) -> None:
    paths, store = images(root), ImageStore(cache=2 * 1280)
    expected = {path: ImageStore().image(path).clone() for path in paths}
    wrong: list[Path] = []

    def work(seed: int) -> None:
        for number in np.random.default_rng(seed).integers(len(paths), size=60):
            path = paths[number]
            if not store.image(path).equal(expected[path]):
                wrong.append(path)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and store._bytes <= 2 * 1280


def test_a_folder_is_listed_once(root: Path) -> None:
    store = ImageStore()
    before = listed_split(store, root, "train_numf")
    images(root)[0].unlink()
    assert listed_split(store, root, "train_numf") == before
    assert len(data.pretraining_samples(store, root, use_unlabelled=False)) == 6
    assert len(data.pretraining_samples(ImageStore(), root, use_unlabelled=False)) == 5


@pytest.mark.parametrize(("workers", "stages"), [(0, "self-fine"), (2, "self")])
def test_the_cache_changes_no_byte_of_a_run(
    tmp_path: Path, root: Path, monkeypatch: pytest.MonkeyPatch, workers: int, stages: str,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    found = []
    for name, cache in (("a", "1GB"), ("b", "3kB")):
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)
        assert train(root, Path("."), stages=stages, workers=workers, cache=cache) == 0
        found.append(files(Path(".")))
        if cache == "3kB":
            line = "of which 3.0 KB are kept in memory; the others are read again whenever"
            assert capsys.readouterr().out.count(line) == 1
    names = [n for n in found[0] if "state" not in n and "log" not in n]  # these name the setting
    assert found[0].keys() == found[1].keys() and len(names) > 3
    assert [n for n in names if found[0][n] != found[1][n]] == []


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.slow
def test_a_run_whose_image_vanished_ends_in_a_line_and_goes_on_when_it_is_back(
    tmp_path: Path, root: Path, monkeypatch: pytest.MonkeyPatch, workers: int,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    from stages.pretraining import SelfSupervised

    settings = {"stages": "self", "self_max_epoch": 4, "workers": workers}
    for name in ("whole", "broken"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "whole")
    assert train(root, Path("."), **settings, cache="0KB") == 0
    victim, original = images(root)[2], SelfSupervised.train_epoch
    raw = victim.read_bytes()

    def train_epoch(self: SelfSupervised, epoch: int, step_done: object) -> None:
        if epoch == 2:
            victim.unlink()
        original(self, epoch, step_done)  # type: ignore[arg-type]

    monkeypatch.chdir(tmp_path / "broken")
    with monkeypatch.context() as patch:
        patch.setattr(SelfSupervised, "train_epoch", train_epoch)
        capsys.readouterr()
        assert train(root, Path("."), **settings, cache="0KB") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"{victim}: not as it was when the set was checked (cannot be opened")
    victim.write_bytes(raw)
    assert train(root, Path("."), **settings, cache="0KB") == 0
    assert files(tmp_path / "whole") == files(tmp_path / "broken")


def test_a_set_in_memory_goes_on_without_its_files(
    tmp_path: Path, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from stages.pretraining import SelfSupervised

    original = SelfSupervised.train_epoch

    def train_epoch(self: SelfSupervised, epoch: int, step_done: object) -> None:
        for path in root.rglob("*.png"):
            path.unlink()
        original(self, epoch, step_done)  # type: ignore[arg-type]

    monkeypatch.setattr(SelfSupervised, "train_epoch", train_epoch)
    assert train(root, tmp_path / "out", stages="self-fine") == 0
