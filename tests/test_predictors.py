"""The two who answer, on pictures that they must be able to tell."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from imaging.gray_range import EachImage
from metallography.folder import Folder
from metallography.items import Item
from metallography.segmenter import Certainty, PredictedBands, Segmenter
from metallography.summary import write_tables
from metallography.tiling import average_and_votes, average_views, disagreement
from segmentation.answers import merged
from segmentation.blocks import Annotation
from segmentation.comparison import annotation
from segmentation.predictors import (
    AnswerFolder,
    Classifier,
    Watched,
    area_weights,
    beside_strokes,
    costs_of,
    part_text,
    reduced_labels,
    second_opinion,
    sure_labels,
    taught,
    write_maps,
)
from tests.trained_model import write_weights
from utils.files import DataError
from utils.metrics import IGNORED

MASK = np.repeat(np.repeat(np.array([[0, 1], [2, 0]], np.uint8), 20, 0), 24, 1)  # 40 x 48
IMAGE = (60 + 60 * MASK).astype(np.uint8)


def test_what_is_timed_of_few_pixels_becomes_the_costs_of_all(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Features, learning with features, and predicting the image that shows three classes.
    took = iter([0.02, 0.12, 0.05])
    monkeypatch.setattr("segmentation.predictors._seconds", lambda do: (do(), next(took))[1])
    strokes = np.full(MASK.shape, IGNORED, np.uint8)  # 255 is no class that it would show
    strokes[0, :7] = [0, 1, 2, 0, 1, 2, 0]
    found = costs_of([IMAGE, IMAGE], [strokes, MASK], 3, threads=1)
    assert found.labelled == (963, 482, 482) and found.annotated == pytest.approx(2 * 1920e-6)
    n = 3 * 500  # at most 500 of a class, of an image repeated to 200x240 pixels
    assert found.learning == pytest.approx(0.1 / (n * np.log2(n)))
    assert found.features == pytest.approx(0.02 / 0.048)
    assert found.megapixel == pytest.approx(1.5 * 0.05 / 0.048)


@pytest.mark.parametrize("reduce", [1, 3])
def test_flat_regions_are_found_at_the_images_own_size(reduce: int) -> None:
    model = Classifier(3, (), reduce, seed=0, threads=1)
    noisy = IMAGE + np.random.default_rng(0).integers(0, 9, IMAGE.shape, dtype=np.uint8)
    model.fit([noisy], [MASK])
    found = np.concatenate([band.argmax(0) for _, band in model.bands(noisy)])
    assert found.shape == MASK.shape and (found == MASK).mean() > 0.9
    assert model.digest and "pixel classifier" in model.about


def test_the_classifier_knows_three_channels_and_unlabelled_pixels() -> None:
    labels = np.where(np.arange(48) < 40, MASK, IGNORED).astype(np.uint8)
    model = Classifier(3, ("a", "b", "c"), 1, seed=0, threads=1)
    model.fit([np.repeat(IMAGE[..., None], 3, axis=2)], [labels])
    ((top, band),) = model.bands(np.repeat(IMAGE[..., None], 3, axis=2))
    assert top == 0 and band.shape == (3, 40, 48) and band.sum(0) == pytest.approx(1, abs=1e-5)
    assert (band.argmax(0) == MASK).mean() > 0.9


def test_labels_win_over_the_prediction_and_are_counted(tmp_path: Path) -> None:
    model = Classifier(3, (), 1, seed=0, threads=1)
    model.fit([IMAGE], [MASK])
    labels = np.full(MASK.shape, IGNORED, np.uint8)
    labels[:5] = 2  # 5 * 48 pixels, where 0 and 1 are seen
    Image.fromarray(IMAGE).save(tmp_path / "a.png")
    Image.fromarray(labels).save(tmp_path / "labels.png")
    folder = AnswerFolder(model, [Item(tmp_path / "a.png", "a")], tmp_path / "out",  # type: ignore[arg-type]
                    labels={"a": tmp_path / "labels.png"})  # fmt: skip
    folder.run()
    ids = np.asarray(Image.open(tmp_path / "out" / "classes" / "a.png"))
    assert (ids[:5] == 2).all() and (ids[5:] == MASK[5:]).mean() > 0.9
    shares = {row["class"]: row["area_fraction"] for row in folder.rows}
    assert shares[2] == pytest.approx((ids == 2).mean())


def test_the_measurements_tell_last_whose_labels_were_learnt(tmp_path: Path) -> None:
    model = Classifier(3, (), 1, seed=0, threads=1)
    model.fit([IMAGE], [MASK])
    for name in "abc":
        Image.fromarray(IMAGE).save(tmp_path / f"{name}.png")
    part = np.full_like(MASK, IGNORED)
    part[:7] = MASK[:7]  # of 40 rows: 17.5 %
    labels = {"b": tmp_path / "labels.png", "c": tmp_path / "part.png"}
    Image.fromarray(MASK).save(labels["b"])
    Image.fromarray(part).save(labels["c"])
    items, tables = [Item(tmp_path / f"{name}.png", name) for name in "abc"], {}
    for kind, more in ((AnswerFolder, {"labels": labels}), (Folder, {})):
        folder = kind(model, items, tmp_path / kind.__name__, **more)  # type: ignore[arg-type]
        folder.run()
        write_tables(folder)
        lines = (folder.out / "measurements.csv").read_text(encoding="utf-8").splitlines()
        tables[kind] = [line.split(",") for line in lines]
        assert (folder.out / "batches.csv").exists() == (kind is Folder)  # no name tells a batch
    marked, plain = tables[AnswerFolder], tables[Folder]
    assert [row[:-1] for row in marked[:1]] == plain[:1]  # old columns keep names and order
    told = [(row[0], row[-1]) for row in marked]
    rows = [("a", "no"), ("b", "yes"), ("c", "18 %")]
    assert told == [("image", "annotated"), *(row for row in rows for _ in range(3))]
    titles = [AnswerFolder(model, items, tmp_path, labels=labels).title_of(item) for item in items]
    assert titles == ["a", "b (annotated)", "c (18 % annotated)"]


def test_an_image_that_is_labelled_but_for_a_pixel_is_not_said_to_be_labelled_whole() -> None:
    assert [part_text(share) for share in (0.9996, 0.175, 0.0049)] == ["99 %", "18 %", "0.49 %"]


@pytest.mark.parametrize(("reduce", "words"), [(1, "at their own size"), (2, "by a factor of 2")])
def test_it_is_told_at_which_size_images_are_predicted(
    tmp_path: Path, reduce: int, words: str
) -> None:
    model = Classifier(3, (), reduce, seed=0, threads=1)
    folder = AnswerFolder(model, [], tmp_path)  # type: ignore[arg-type]
    assert words in folder.size_words() and ("reduced" in folder.size_words()) == (reduce > 1)


def certain(unsure: float) -> Certainty:
    return Certainty(unsure, np.zeros((1, 1), np.uint8), math.nan)


def test_what_is_noted_of_images_survives_a_kill_amid_a_line(tmp_path: Path) -> None:
    model = Classifier(3, (), 1, seed=0, threads=1)
    folder = AnswerFolder(model, [], tmp_path)  # type: ignore[arg-type]
    for name, unsure in (("a", 0.25), ("b", 0.5)):
        folder._note(name, certain(unsure))
    noted = tmp_path / "votes.jsonl"
    noted.write_bytes(noted.read_bytes()[:-7])
    again = AnswerFolder(model, [], tmp_path)  # type: ignore[arg-type]
    assert again.noted("unsure") == {"a": 0.25}
    for name, unsure in (("b", 0.75), ("a", 0.125)):
        again._note(name, certain(unsure))
    assert again.noted("unsure") == {"a": 0.125, "b": 0.75}
    assert all(math.isnan(votes) for votes in again.noted("votes").values())


def reader(num_classes: int, ignore_label: int = IGNORED) -> Any:
    """What of a ``Segmenter`` says how images and masks are read."""
    return SimpleNamespace(num_classes=num_classes, ignore_label=ignore_label, gray=EachImage())


def test_a_second_opinion_knows_its_error_on_held_out_halves(tmp_path: Path) -> None:
    folder = tmp_path / "sup_num1_0"
    for kind, pixels in (("img", IMAGE), ("gt", MASK)):
        (folder / kind).mkdir(parents=True)
        Image.fromarray(pixels).save(folder / kind / "a.png")
    second = second_opinion(folder, reader(3))
    assert (second.ids(IMAGE, None) == MASK).mean() > 0.9
    # Blocks 0 and 3 are class 0, which nobody knows who learnt the classes 1 and 2 of the others;
    # 1 and 2 cannot be held out, because one class would be left.
    assert second.error == 1
    with pytest.raises(DataError, match=r"value 2 .* 2 classes"):
        second_opinion(folder, reader(2))
    with pytest.raises(DataError, match="no image with a mask"):
        second_opinion(tmp_path, reader(3))
    Image.fromarray(MASK[:-1]).save(folder / "gt" / "a.png")
    with pytest.raises(DataError, match="48x39, its image is 48x40"):
        second_opinion(folder, reader(3))
    Image.fromarray(np.full_like(MASK, IGNORED)).save(folder / "gt" / "a.png")
    with pytest.raises(DataError, match="no pixel has a class"):
        second_opinion(folder, reader(3))
    # Of masks in which 3 is unlabelled, and of a model that knows so.
    Image.fromarray(np.where(MASK == 2, 3, MASK).astype(np.uint8)).save(folder / "gt" / "a.png")
    assert set(np.unique(second_opinion(folder, reader(3, 3)).ids(IMAGE, None))) <= {0, 1}
    half = np.where(np.arange(48) < 24, MASK, IGNORED).astype(np.uint8)
    half[20:] = IGNORED  # block 0 alone has labels, so that nothing can be held out
    half[:5, :24] = 2
    Image.fromarray(half).save(folder / "gt" / "a.png")
    assert np.isnan(second_opinion(folder, reader(3)).error)


HIDDEN = (0, 117, 255)


def half_hidden(path: Path, hidden: int, shown: np.ndarray = IMAGE) -> Path:  # type: ignore[type-arg]
    """An image whose left half is transparent, of one gray below that."""
    clear = np.broadcast_to(np.arange(shown.shape[1]) < shown.shape[1] // 2, shown.shape)
    path.parent.mkdir(parents=True, exist_ok=True)
    gray = np.where(clear, hidden, shown).astype(np.uint8)
    alpha = np.where(clear, 0, 255).astype(np.uint8)
    Image.fromarray(np.dstack([gray, alpha]), "LA").save(path)
    return path


@pytest.mark.parametrize("reduce", [1, 2])
def test_what_transparent_pixels_hide_changes_nothing_of_the_classifier(
    tmp_path: Path, reduce: int
) -> None:
    noisy = IMAGE + np.random.default_rng(0).integers(0, 25, IMAGE.shape, dtype=np.uint8)
    labels = np.where(np.arange(48) < 24, IGNORED, MASK).astype(np.uint8)
    found = {}
    for hidden in HIDDEN:
        own = tmp_path / str(hidden)
        path = half_hidden(own / "a.png", hidden, noisy)
        Image.fromarray(labels).save(own / "labels.png")
        model = Classifier(3, (), reduce, seed=0, threads=1)
        model.fit(*zip(annotation(path, own / "labels.png"), strict=True))
        folder = AnswerFolder(model, [Item(path, "a")], own / "out")  # type: ignore[arg-type]
        folder.run()
        ids = np.asarray(Image.open(own / "out" / "classes" / "a.png"))
        assert (ids[:, :24] == IGNORED).all() and (ids[:, 24:] == MASK[:, 24:]).mean() > 0.9
        found[hidden] = ids.tolist(), folder.noted("unsure"), model.digest
    assert found[0] == found[117] == found[255]
    # As the visible half is segmented that is an image of its own.
    alone = taught([Annotation(noisy[:, 24:], MASK[:, 24:])], 3).ids(noisy[:, 24:])
    assert reduce > 1 or (np.array(found[0][0])[:, 24:] == alone).mean() > 0.95


@pytest.mark.parametrize("views", [1, 8])
def test_what_transparent_pixels_hide_changes_nothing_of_a_network(
    tmp_path: Path, views: int
) -> None:
    weights = write_weights(tmp_path / "fine.pt", {"standardize": True})
    found: dict[int, list[Any]] = {}
    for hidden in HIDDEN:
        network = Watched(Segmenter(weights, device="cpu"), views)
        path = half_hidden(tmp_path / str(hidden) / "a.png", hidden)
        folder = AnswerFolder(network, [Item(path, "a")], path.parent / "out")  # type: ignore[arg-type]
        folder.run()
        ids = np.asarray(Image.open(folder.out / "classes" / "a.png"))
        noted = [*folder.noted("unsure").values(), *folder.noted("votes").values()]
        found[hidden] = [ids.tolist(), str(noted)]
        write_maps(path.parent / "twin", network, {"a": path}, "twin")
        found[hidden].append(np.asarray(Image.open(path.parent / "twin" / "a.png")).tolist())
    assert found[0] == found[117] == found[255]


def test_what_transparent_pixels_hide_changes_no_second_opinion(tmp_path: Path) -> None:
    noisy = IMAGE + np.random.default_rng(0).integers(0, 25, IMAGE.shape, dtype=np.uint8)
    found = []
    for hidden in HIDDEN:
        folder = tmp_path / str(hidden) / "sup_num1_0"
        half_hidden(folder / "img" / "a.png", hidden, np.hstack([noisy, noisy]))
        (folder / "gt").mkdir()  # which labels what is hidden, too
        Image.fromarray(np.hstack([MASK, MASK])).save(folder / "gt" / "a.png")
        second = second_opinion(folder, reader(3))
        found.append((second.ids(noisy, None).tolist(), str(second.error)))
    assert found[0] == found[1] == found[2]


def test_strokes_get_no_labels_beside_them_where_nothing_can_be_seen(tmp_path: Path) -> None:
    strokes = np.full(MASK.shape, IGNORED, np.uint8)
    strokes[::4, 24:] = MASK[::4, 24:]
    Image.fromarray(strokes).save(tmp_path / "labels.png")
    given = [annotation(half_hidden(tmp_path / "a.png", 120), tmp_path / "labels.png")]
    (labels,), shares = beside_strokes(taught(given, 3), given)
    assert (labels[:, :24] == IGNORED).all() and (labels[:, 24:] != IGNORED).mean() > 0.5
    # The visible half has the classes 1 above and 0 below.
    assert shares == pytest.approx([0.5, 0.5, 0], abs=0.1)


def test_merged_by_hand() -> None:
    found = merged(np.array([[1, 2]], np.uint8), np.array([[IGNORED, 0]], np.uint8))
    assert found.tolist() == [[1, 0]]


def test_one_pass_over_the_views_gives_their_average_and_their_votes() -> None:
    def predict(image: np.ndarray) -> np.ndarray:  # type: ignore[type-arg]
        share = (image + np.linspace(0, 255, image.shape[1])) / 510  # depends on the turn
        return np.stack([share, 1 - share]).astype(np.float32)

    found = average_and_votes(predict)(IMAGE)
    assert found[:2] == pytest.approx(average_views(predict)(IMAGE), abs=1e-6)
    assert found[2] == pytest.approx(disagreement(predict)(IMAGE)[0], abs=1e-6)


def test_the_pixel_classifier_tells_how_unsure_it_is() -> None:
    model = Classifier(3, (), 1, seed=0, threads=1)
    model.fit([IMAGE], [MASK])
    bands = PredictedBands(model.bands(IMAGE))
    ((_, probabilities),) = bands
    expected = np.mean([1 - max(pixel) for pixel in probabilities.reshape(3, -1).T.tolist()])
    assert bands.certainty is not None
    assert bands.certainty.unsure == pytest.approx(expected, abs=1e-6)
    assert bands.certainty.uncertain.mean() / 255 == pytest.approx(expected, abs=0.5 / 255)
    assert math.isnan(bands.certainty.votes)


@pytest.mark.parametrize("views", [0, 1, 8])
def test_how_sure_it_is_is_the_mean_of_what_counts(tmp_path: Path, views: int) -> None:
    model: Any = Classifier(3, (), 1, seed=0, threads=1)
    if views:
        model = Watched(Segmenter(write_weights(tmp_path / "fine.pt"), device="cpu"), views)
    else:
        model.fit([IMAGE + np.arange(48, dtype=np.uint8)], [MASK])
    inside = np.broadcast_to(np.arange(48) >= 30, IMAGE.shape)
    bands = PredictedBands(model.bands(IMAGE, inside))
    likeliest = np.concatenate([band for _, band in bands], axis=1).max(axis=0)
    assert bands.certainty is not None
    assert bands.certainty.unsure == pytest.approx(1 - likeliest[:, 30:].mean(), abs=1e-6)
    assert abs(bands.certainty.unsure - (1 - likeliest.mean())) > 1e-3  # of all it is another one
    if views == 8:
        votes = model.segmenter.disagreement(IMAGE, inside)[0]
        assert bands.certainty.votes == pytest.approx(votes[:, 30:].mean(), abs=1e-6)


def test_an_image_of_which_all_that_is_visible_is_labelled_is_annotated(tmp_path: Path) -> None:
    path, model = half_hidden(tmp_path / "a.png", 0), Classifier(3, (), 1, seed=0, threads=1)
    labels = np.where(np.arange(48) < 24, IGNORED, MASK).astype(np.uint8)
    for row, share in ((0, 1), (10, 0.75)):
        labels[:row] = IGNORED
        Image.fromarray(labels).save(tmp_path / "labels.png")
        files = {"a": tmp_path / "labels.png"}
        folder = AnswerFolder(model, [Item(path, "a")], tmp_path / "out", labels=files)  # type: ignore[arg-type]
        assert folder.annotated == {"a": share}


def test_labels_are_reduced_by_their_majority_and_strokes_are_kept() -> None:
    labels = np.full((4, 5), IGNORED, np.uint8)
    labels[0, 0] = 2  # one labelled pixel of its block
    labels[2:4, 2:4] = [[1, 0], [1, IGNORED]]
    labels[:, 4] = 0  # blocks that the edge cuts
    expected = [[2, IGNORED, 0], [IGNORED, 1, 0]]
    assert reduced_labels(labels, 2, 3).tolist() == expected
    assert reduced_labels(labels, 1, 3) is labels


@pytest.mark.parametrize("views", [1, 8])
def test_a_watched_network_returns_how_sure_it_is_of_all_its_bands(
    tmp_path: Path, views: int
) -> None:
    network = Segmenter(write_weights(tmp_path / "fine.pt"), device="cpu")
    plain = PredictedBands(network.bands(IMAGE))
    assert len(list(plain)) and plain.certainty is None  # nobody asked it
    watched = Watched(network, views)
    bands = PredictedBands(watched.bands(IMAGE))
    missing = 1 - np.concatenate([band for _, band in bands], axis=1).max(axis=0)
    found = bands.certainty
    assert found is not None and found.unsure == pytest.approx(missing.mean(), abs=1e-6)
    assert (found.uncertain == np.rint(255 * missing)).all()
    if views == 1:
        assert math.isnan(found.votes)
    else:
        assert found.votes == pytest.approx(network.disagreement(IMAGE)[0].mean(), abs=1e-6)


def test_classes_are_weighted_from_their_share_of_the_strokes_to_that_of_the_area() -> None:
    # Half of the strokes are of class 1, which has a tenth of the area: five times too many.
    weights = area_weights(np.array([0.9, 0.1, 0.0]), np.array([50, 50, 0]))
    np.testing.assert_allclose(weights, [0.9 / 0.5, 0.1 / 0.5, 0])


def test_sure_pixels_are_added_by_weighted_probability_and_no_label_is_changed() -> None:
    labels = np.array([[1, 255, 255, 255]], np.uint8)
    of_one = np.array([[0.0, 0.5, 0.9, 0.05]])
    probabilities = np.stack([1 - of_one, of_one])
    plain, halved = np.array([1.0, 1.0]), np.array([1.0, 0.1])
    assert sure_labels(labels, probabilities, plain).tolist() == [[1, 255, 1, 0]]
    # 0.5 and 0.05 become 0.09 of class 1; 0.1 and 0.09 are even.
    assert sure_labels(labels, probabilities, halved).tolist() == [[1, 0, 255, 0]]
