"""Scores against the published program, a slow twin with plain loops, scikit-learn, hand counts."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.golden_files import Golden
from utils.metrics import (
    IGNORED,
    Scores,
    SegmentationScores,
    confusion,
    dice,
    format_mean_std,
    image_dice,
    mean_score,
    mean_std,
    pooled,
)


def slow_confusion(prediction: Tensor, truth: Tensor, num_classes: int) -> list[list[int]]:
    table = [[0] * num_classes for _ in range(num_classes)]
    for p, t in zip(prediction.flatten().tolist(), truth.flatten().tolist(), strict=True):
        table[t][p] += 1
    return table


def random_masks(count: int, num_classes: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shape = (count, 9, 7)
    return (
        torch.randint(num_classes, shape, generator=generator),
        torch.randint(num_classes, shape, generator=generator),
    )


def test_scores_agree_with_the_published_program() -> None:
    golden = Golden("supervised_loss_and_metrics")
    scores = SegmentationScores(4)
    scores.add(golden["in/logits"].argmax(1), golden["in/label_onehot"].argmax(1))
    found = scores.compute()
    assert found.acc == pytest.approx(float(golden["out/acc"]), abs=1e-12)
    # 1e-4: the published metric adds a small number to both sides of the fraction.
    assert found.dice == pytest.approx(golden["out/dice_metric"].tolist(), rel=1e-4)
    assert found.mean_dice == pytest.approx(float(golden["out/dice_metric_mean"]), rel=1e-4)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64])
@pytest.mark.parametrize("num_classes", [2, 4, 17])
def test_confusion_is_the_table_of_a_plain_loop(num_classes: int, dtype: torch.dtype) -> None:
    prediction, truth = random_masks(2, num_classes)
    counted = confusion(prediction.to(dtype), truth.to(dtype), num_classes)
    assert counted.dtype == torch.int64
    assert counted.tolist() == slow_confusion(prediction, truth, num_classes)


def test_rows_are_truth_and_columns_prediction() -> None:
    counted = confusion(torch.tensor([1, 1, 0]), torch.tensor([0, 0, 0]), 2)
    assert counted.tolist() == [[1, 2], [0, 0]]


def test_confusion_agrees_with_scikit_learn() -> None:
    sklearn_metrics = pytest.importorskip("sklearn.metrics")
    prediction, truth = (masks.flatten() for masks in random_masks(3, 5))
    expected = sklearn_metrics.confusion_matrix(truth.numpy(), prediction.numpy())
    assert confusion(prediction, truth, 5).tolist() == expected.tolist()
    scores = SegmentationScores(5)
    scores.add(prediction[None], truth[None])
    dice = sklearn_metrics.f1_score(truth.numpy(), prediction.numpy(), average=None)
    iou = sklearn_metrics.jaccard_score(truth.numpy(), prediction.numpy(), average=None)
    assert scores.compute().dice == pytest.approx(dice[1:].tolist())
    assert scores.compute().iou == pytest.approx(iou[1:].tolist())


@pytest.mark.parametrize(("wrong", "name"), [(4, "4"), (254, "254"), (-1, "-1")])
def test_an_id_that_is_no_class_is_named(wrong: int, name: str) -> None:
    good, bad = torch.zeros(3, dtype=torch.int64), torch.tensor([0, wrong, 0])
    with pytest.raises(ValueError, match=rf"truth holds class id {name};.*0 \.\.\. 3"):
        confusion(good, bad, 4)
    with pytest.raises(ValueError, match=f"prediction holds class id {name};"):
        confusion(bad, good, 4)


def test_shapes_must_agree() -> None:
    with pytest.raises(ValueError, match="differ in shape"):
        confusion(torch.zeros(2, 3, dtype=torch.int64), torch.zeros(3, 2, dtype=torch.int64), 2)


def test_a_hand_count() -> None:
    scores = SegmentationScores(3)
    scores.add(torch.tensor([[0, 1], [1, 2]]), torch.tensor([[0, 1], [2, 2]]))  # 3 of 4 right
    scores.add(torch.tensor([[1, 1]]), torch.tensor([[1, 0]]))  # 1 of 2 right, another size
    found = scores.compute()
    assert found.acc == pytest.approx((3 / 4 + 1 / 2) / 2)  # not 4/6: a mean over images
    # Class 1: predicted 4 times, true 2 times, both 2.  Class 2: predicted 1, true 2, both 1.
    assert found.dice == pytest.approx((2 * 2 / 6, 2 * 1 / 3))
    assert found.iou == pytest.approx((2 / 4, 1 / 2))
    assert found.mean_dice == pytest.approx(2 / 3)
    assert found.mean_iou == pytest.approx(1 / 2)
    assert found.truth_pixels == (2, 2, 2)
    assert (found.classes_scored, found.images) == (2, 2)
    assert found.as_dict()["dice1"] == found.dice[0]
    assert found.as_dict()["iou2"] == found.iou[1]


def test_dice_is_pooled_over_the_set_and_not_a_mean_of_images() -> None:
    scores = SegmentationScores(2)
    scores.add(torch.ones(10, 10, dtype=torch.int64), torch.ones(10, 10, dtype=torch.int64))
    missed = torch.zeros(10, 10, dtype=torch.int64)
    missed[0, 0] = 1
    scores.add(torch.zeros(10, 10, dtype=torch.int64), missed)
    assert scores.compute().dice == pytest.approx((200 / 201,))  # a mean of images would be 1/2


def test_a_class_that_the_truth_lacks_is_nan_and_left_out_of_the_mean() -> None:
    scores = SegmentationScores(5)
    scores.add(torch.tensor([[1, 1, 2, 0]]), torch.tensor([[1, 1, 0, 4]]))
    found = scores.compute()
    # Class 2 is predicted only, class 3 is nowhere: neither can be found. Class 4 is missed: 0.
    assert found.dice[0] == 1.0 and found.dice[3] == 0.0
    for c in (1, 2):
        assert math.isnan(found.dice[c]) and math.isnan(found.iou[c])
    assert (found.mean_dice, found.mean_iou, found.classes_scored) == (0.5, 0.5, 2)
    assert found.truth_pixels == (1, 2, 0, 0, 1) and found.predicted_pixels == (1, 2, 1, 0, 0)
    assert found.as_dict()["predicted_pixels"] == [1, 2, 1, 0, 0]


def test_background_alone_and_no_images_give_nan() -> None:
    background = SegmentationScores(3)
    background.add(torch.zeros(4, 4, dtype=torch.int64), torch.zeros(4, 4, dtype=torch.int64))
    found = background.compute()
    assert found.acc == 1.0 and math.isnan(found.mean_dice) and found.classes_scored == 0
    nothing = SegmentationScores(3).compute()
    assert nothing.images == 0 and math.isnan(nothing.acc) and len(nothing.dice) == 2


def test_a_batch_counts_as_its_images() -> None:
    prediction, truth = random_masks(3, 4)
    whole, single = SegmentationScores(4), SegmentationScores(4)
    whole.add(prediction, truth)
    for p, t in zip(prediction, truth, strict=True):
        single.add(p, t)
    assert whole.compute() == single.compute()
    assert whole.compute().images == 3
    with pytest.raises(ValueError, match=r"\[H, W\]"):
        whole.add(prediction[0, 0], truth[0, 0])


def test_counts_beyond_single_precision_are_exact() -> None:
    size = 2**24 + 1  # the first integer that float32 cannot hold
    ones = torch.ones(size, dtype=torch.uint8)
    assert confusion(ones, ones, 2)[1, 1].item() == size


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_nothing_waits_for_the_device_until_the_end() -> None:
    prediction, truth = random_masks(2, 4)
    on_cpu, on_gpu = SegmentationScores(4), SegmentationScores(4)
    on_cpu.add(prediction, truth)
    prediction, truth = prediction.cuda(), truth.cuda()
    torch.cuda.set_sync_debug_mode("error")
    try:
        on_gpu.add(prediction, truth)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert on_gpu.compute() == on_cpu.compute()


def test_mean_and_sample_deviation() -> None:
    mean, std = mean_std([2.0, 4.0, 4.0, 4.0, 5.0, 5.0, 7.0, 9.0])
    assert mean == 5.0
    assert std == pytest.approx(math.sqrt(32 / 7))  # 2 would be the population's
    assert format_mean_std([0.5, 0.7]) == "0.6000 ± 0.1414"


def test_what_is_not_known_is_a_dash() -> None:
    mean, std = mean_std([0.25])
    assert mean == 0.25 and math.isnan(std)
    assert format_mean_std([0.25]) == "0.2500 ± -"
    assert format_mean_std([]) == "- ± -"
    assert format_mean_std([0.5, math.nan]) == "- ± -"


def test_pixels_that_nobody_labelled_are_not_counted() -> None:
    truth = torch.tensor([[0, 1], [IGNORED, IGNORED]])
    prediction = torch.tensor([[0, 1], [1, 0]])
    assert confusion(prediction, truth, 2).tolist() == [[1, 0], [0, 1]]
    scores = SegmentationScores(2)
    scores.add(prediction, truth)
    assert scores.compute().acc == 1.0
    assert scores.compute().truth_pixels == (1, 1)


ABSENT = np.array([[[3, 0, 1], [0, 0, 0], [0, 0, 4]], [[2, 2, 0], [0, 0, 0], [0, 0, 0]]])
"""Counts of two images: the truth has no class 1, which the second is given twice."""


def test_all_scores_agree_when_a_class_is_absent() -> None:
    scores = Scores.from_confusion(ABSENT)
    again = SegmentationScores(3)
    again.add(torch.tensor([[0, 0, 0, 2, 2, 2, 2, 2]]), torch.tensor([[0, 0, 0, 0, 2, 2, 2, 2]]))
    again.add(torch.tensor([[0, 0, 1, 1]]), torch.tensor([[0, 0, 0, 0]]))
    assert again.counts().tolist() == ABSENT.tolist()
    assert str(again.compute()) == str(scores)  # as text, in which nan equals nan
    # Class 2: shared 4, predicted 5, true 4.
    assert math.isnan(scores.dice[0]) and scores.dice[1] == pytest.approx(8 / 9)
    assert scores.mean_dice == pytest.approx(8 / 9) and scores.mean_iou == pytest.approx(4 / 5)
    assert scores.acc == pytest.approx((7 / 8 + 2 / 4) / 2) and scores.classes_scored == 1
    assert scores.predicted_pixels == (5, 2, 5) and scores.truth_pixels == (8, 0, 4)
    # The same by resampling, each image once; and the second image twice, which lacks class 2 too.
    assert mean_score(dice(pooled(ABSENT))) == pytest.approx(scores.mean_dice)
    of_resamples = mean_score(dice(pooled(ABSENT, [[1, 1], [0, 2]])))
    assert of_resamples[0] == pytest.approx(scores.mean_dice) and math.isnan(of_resamples[1])
    # Of one image a class counts if truth or prediction has it.
    first, second = image_dice(ABSENT)
    assert math.isnan(first[1]) and first[2] == pytest.approx(8 / 9)
    assert second[1] == 0 and math.isnan(second[2]) and mean_score(second) == 0


def test_an_image_without_labels_has_no_accuracy() -> None:
    counts = np.array([[[0, 0], [0, 0]], [[1, 1], [0, 2]]])
    assert Scores.from_confusion(counts).acc == pytest.approx(3 / 4)
