"""What annotated masks hold, against scikit-learn and counts by hand."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.utils.class_weight import compute_class_weight
from tiny_set import make_set, train

from imaging.drawing import write_png
from imaging.imagefile import read_mask
from pscl.losses import supervised_loss
from stages.labels import (
    MOST_LINES,
    balanced_weights,
    far_lines,
    in_strokes,
    label_counts,
    label_line,
    labelled_share,
)
from utils.checkpoint import load


def test_pixels_of_images_of_any_size_are_counted_without_unlabelled_ones() -> None:
    masks = [np.array([[0, 0, 2], [255, 255, 2]], np.uint8), np.array([[2, 255]], np.uint8)]
    assert label_counts(masks, 4).tolist() == [2, 0, 3, 0]
    assert label_counts([], 3).tolist() == [0, 0, 0]
    line = "Labelled: 5 pixels, 62.5% of them: class 0 2, class 1 0, class 2 3, class 3 0"
    assert label_line(masks, 4) == line
    named = line.replace("class 0", "ferrite").replace("class 2", "pore")
    assert label_line(masks, 4, ["ferrite", "class 1", "pore", "class 3"]) == named


def test_balanced_weights_are_those_of_scikit_learn() -> None:
    counts = np.array([70, 5, 20, 5])
    pixels = np.repeat(np.arange(4), counts)
    expected = compute_class_weight("balanced", classes=np.arange(4), y=pixels)
    np.testing.assert_allclose(balanced_weights(counts), expected)
    assert balanced_weights(np.array([70, 5, 20, 5])) == (100 / 280, 5.0, 1.25, 5.0)


def test_a_class_without_labels_has_no_weight_and_takes_none_from_the_others() -> None:
    present = compute_class_weight("balanced", classes=np.array([0, 2]), y=np.array([0, 0, 0, 2]))
    assert balanced_weights(np.array([3, 0, 1])) == (present[0], 0.0, present[1])
    assert balanced_weights(np.zeros(2, np.int64)) == (0.0, 0.0)
    root = balanced_weights(np.array([70, 5, 20, 0]), 0.5)  # 95 / 3 / each
    assert root == pytest.approx([(95 / 210) ** 0.5, (95 / 15) ** 0.5, (95 / 60) ** 0.5, 0.0])


def test_every_class_counts_alike_in_the_loss() -> None:
    """With equal logits every pixel costs log C, so the classes cost in all what they weigh."""
    mask = torch.tensor([[[0, 0, 0, 0, 0, 0, 1, 255]]])
    weight = torch.tensor(balanced_weights(label_counts([mask.numpy().astype(np.uint8)], 2)))
    logits = torch.zeros(1, 2, 1, 8, requires_grad=True)
    loss = supervised_loss(logits, mask, weight)["cross_entropy"]
    assert loss.item() == pytest.approx(np.log(2))  # the weights average 1
    loss.backward()
    assert logits.grad is not None
    pull = logits.grad[0, 0, 0]
    assert pull[:6].sum().item() == pytest.approx(-pull[6].item())


def test_what_is_far_from_any_label_is_told_of_partially_labelled_images() -> None:
    whole, strip, edge = (np.zeros((20, 100), np.uint8) for _ in range(3))
    strip[:, 50:] = 255  # a tenth of 20 is 2 pixels: columns 52 to 99 are farther
    edge[:, 98:] = 255
    names = ["whole.png", "strip.png", "edge.png"]
    (line,) = far_lines([whole, strip, edge], names)
    assert line.startswith(
        "strip.png: 48.0% of its pixels are farther than 0.1 of its shorter side"
    )
    many = far_lines([strip] * (MOST_LINES + 2), [f"{i}.png" for i in range(MOST_LINES + 2)])
    assert len(many) == MOST_LINES + 1 and many[-1] == "and so for 2 more images"


def test_a_balanced_run_logs_its_weights_and_is_another_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = make_set(tmp_path / "steel")
    path = data / "sup_num1_0" / "gt" / "15_0.png"
    mask = read_mask(path)
    mask[:, 30:] = 7
    write_png(path, mask)
    options = {"ignore_label": 7, "name": "rare", "class_weight": "balanced"}
    assert train(data, tmp_path, "-stages sup", **options) == 0
    counts = np.bincount(mask.ravel(), minlength=8)[:3]
    weights = [counts.sum() / (3 * n) for n in counts]
    each = [f"class {c} {w:.4g} ({counts[c]} pixels)" for c, w in enumerate(weights)]
    log = (tmp_path / "rare_sup" / "1_0" / "log_sup.txt").read_text(encoding="utf-8")
    assert f"Class weights, balanced: {', '.join(each)}" in log
    assert "class_weight = balanced\n" in log
    state = load(tmp_path / "rare_sup" / "1_0" / "state_sup.pt")
    assert state["settings"]["class_weight"] == "balanced"
    assert json.loads(json.dumps(state["config"]))["class_weight"] == "balanced"
    capsys.readouterr()
    assert train(data, tmp_path, "-stages sup", **options) == 0
    assert "finished already" in capsys.readouterr().out
    assert train(data, tmp_path, "-stages sup", **{**options, "class_weight": (1.0,)}) == 2
    said = capsys.readouterr().err
    assert "class_weight was balanced, is [1.0, 1.0, 1.0]" in said


@pytest.mark.parametrize(("how", "power"), [("balanced", 1), ("balanced_sqrt", 0.5)])
def test_numbers_that_are_the_balanced_ones_train_the_same_network(
    tmp_path: Path, how: str, power: float
) -> None:
    data = make_set(tmp_path / "steel")
    counts = np.bincount(read_mask(data / "sup_num1_0" / "gt" / "15_0.png").ravel())
    given = tuple(float(counts.sum() / (3 * n)) ** power for n in counts)
    for name, weight in (("by_hand", given), ("balanced", how)):
        assert train(data, tmp_path, "-stages sup", name=name, class_weight=weight) == 0
    one, other = (
        (tmp_path / f"{name}_sup" / "1_0" / "sup_last.pt") for name in ("by_hand", "balanced")
    )
    for key, tensor in load(one)["super"].items():
        assert torch.equal(tensor, load(other)["super"][key]), key


def test_masks_of_few_labels_are_strokes_and_half_a_mask_or_none_is_not() -> None:
    strokes = np.full((10, 10), 255, np.uint8)
    strokes[0] = 1
    half = np.full((10, 10), 255, np.uint8)
    half[:5] = 0
    assert in_strokes([strokes]) and not in_strokes([half])
    assert not in_strokes([np.full((4, 4), 255, np.uint8)])
    assert not in_strokes([strokes, np.zeros((10, 10), np.uint8)])  # all images count together


def test_labels_are_counted_among_the_pixels_that_can_be_seen() -> None:
    mask = np.full((10, 40), 255, np.uint8)
    mask[:, 20:23] = [0, 1, 1]
    inside = np.broadcast_to(np.arange(40) >= 20, mask.shape)
    assert labelled_share([mask], [inside]) == 0.15  # 30 of 200
    assert labelled_share([mask, mask], [inside, None]) == 0.1  # 60 of 600
    line = "Labelled: 30 pixels, 15.0% of them: class 0 10, class 1 20"
    assert label_line([mask], 2, (), [inside]) == line
    whole = np.where(inside, 1, 255).astype(np.uint8)
    few = np.where(np.arange(40) < 38, 255, 1)[None].repeat(10, axis=0).astype(np.uint8)
    narrow = np.broadcast_to(np.arange(40) >= 35, few.shape)
    assert in_strokes([few]) and not in_strokes([few], [narrow])  # 2 of 40 columns, 2 of 5
    # Nobody has to label what cannot be seen.
    assert far_lines([whole], ["a.png"]) and not far_lines([whole], ["a.png"], [inside])
