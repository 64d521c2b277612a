"""The losses against slow twins with plain loops, closed forms, and the published program."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pscl.losses import (
    byol_loss,
    dense_info_nce,
    dice_loss,
    info_nce,
    nt_xent,
    patch_nt_xent,
    soft_info_nce,
    supervised_loss,
)
from tests.golden_files import Golden, assert_agrees
from utils.metrics import IGNORED

SEEDS = st.integers(0, 2**31)
TEMPERATURES = st.sampled_from([0.07, 0.5, 1.0, 2.0])


def randn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def cosine(a: list[float], b: list[float]) -> float:
    product = sum(x * y for x, y in zip(a, b, strict=True))
    return product / math.sqrt(sum(x * x for x in a)) / math.sqrt(sum(y * y for y in b))


def cross_entropy(positive: float, negatives: list[float]) -> float:
    """-log of the positive's share, all logits taken relative to the positive."""
    return math.log(1 + sum(math.exp(n - positive) for n in negatives))


# --- nt_xent --------------------------------------------------------------------------------------


def slow_nt_xent(query: Tensor, key: Tensor, temperature: float) -> float:
    """Chen 2020, equation 1: every one of the 2B rows against the 2B - 1 others."""
    rows = query.tolist() + key.tolist()
    images = len(query)
    losses = []
    for i, row in enumerate(rows):
        partner = (i + images) % (2 * images)
        others = [j for j in range(2 * images) if j not in (i, partner)]
        logits = [cosine(row, rows[j]) / temperature for j in others]
        losses.append(cross_entropy(cosine(row, rows[partner]) / temperature, logits))
    return sum(losses) / len(losses)


@settings(max_examples=40)
@given(st.integers(1, 6), st.integers(1, 9), TEMPERATURES, SEEDS)
def test_nt_xent_is_equation_1(images: int, dim: int, temperature: float, seed: int):
    query, key = randn(2, images, dim, seed=seed)
    actual = nt_xent(query, key, temperature)
    assert actual.shape == ()
    assert float(actual) == pytest.approx(slow_nt_xent(query, key, temperature), rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("images", [1, 2, 9])
@pytest.mark.parametrize("temperature", [0.1, 0.5])
def test_nt_xent_in_closed_form(images: int, temperature: float):
    same = torch.ones(images, 3) * torch.arange(1, images + 1)[:, None]  # the length plays no part
    loss = nt_xent(same, 2 * same, temperature)
    assert float(loss) == pytest.approx(math.log(2 * images - 1), abs=1e-6)
    # Partners equal, all others at a right angle.
    apart = torch.eye(images)
    expected = math.log(1 + (2 * images - 2) * math.exp(-1 / temperature))
    assert float(nt_xent(apart, apart, temperature)) == pytest.approx(expected, abs=1e-6)


# --- patch_nt_xent --------------------------------------------------------------------------------


def slow_patch_nt_xent(
    query: Tensor, key: Tensor, temperature: float, intra: bool, admitted: Tensor | None = None
) -> float:
    """Every patch of both views; positive: its correspondent; negatives: rows of other classes."""
    images, classes, templates = query.shape[:3]
    names = list(itertools.product("qk", range(images), range(classes), range(templates)))
    if admitted is not None:
        names = [name for name in names if admitted[name[1:]]]
    vector = {(v, *p): (query if v == "q" else key)[tuple(p)].tolist() for v, *p in names}
    losses = []
    for name in names:
        view, image, label, rank = name
        partner = ("k" if view == "q" else "q", image, label, rank)
        negatives = [
            other
            for other in names
            if other[2] != label and (intra or (other[0], other[1]) != (view, image))
        ]
        logits = [cosine(vector[name], vector[other]) / temperature for other in negatives]
        own = cosine(vector[name], vector[partner]) / temperature
        losses.append(cross_entropy(own, logits))
    return sum(losses) / len(losses)


@settings(max_examples=40)
@given(st.integers(1, 3), st.integers(1, 4), st.integers(1, 3), st.booleans(), TEMPERATURES, SEEDS)
def test_patch_nt_xent_is_its_definition(
    images: int, classes: int, templates: int, intra: bool, temperature: float, seed: int
):
    query, key = randn(2, images, classes, templates, 5, seed=seed)
    actual = patch_nt_xent(query, key, temperature, intra)
    assert actual.shape == ()
    expected = slow_patch_nt_xent(query, key, temperature, intra)
    assert float(actual) == pytest.approx(expected, rel=1e-4, abs=1e-5)


@settings(max_examples=30)
@given(st.integers(1, 3), st.integers(2, 4), st.integers(1, 3), st.booleans(), SEEDS)
def test_patches_that_are_not_admitted_give_no_row_and_no_negative(
    images: int, classes: int, templates: int, intra: bool, seed: int
):
    query, key = randn(2, images, classes, templates, 5, seed=seed)
    admitted = randn(images, classes, templates, seed=seed) > 0
    admitted[0] = True  # the annotated image's
    actual = patch_nt_xent(query, key, 0.5, intra, admitted)
    expected = slow_patch_nt_xent(query, key, 0.5, intra, admitted)
    assert float(actual) == pytest.approx(expected, rel=1e-4, abs=1e-5)
    everything = torch.ones_like(admitted)
    torch.testing.assert_close(
        patch_nt_xent(query, key, 0.5, intra, everything), patch_nt_xent(query, key, 0.5, intra)
    )


@pytest.mark.parametrize("intra", [True, False])
@pytest.mark.parametrize("temperature", [0.07, 0.5])
def test_the_gradient_of_patch_nt_xent_is_the_slope_of_its_definition(
    temperature: float, intra: bool
):
    pair = randn(2, 2, 3, 2, 4, seed=3)
    query, key = (x.clone().requires_grad_() for x in pair)
    (3 * patch_nt_xent(query, key, temperature, intra)).backward()
    exact, step = pair.double(), 1e-5
    for place in itertools.product((0, 1), (0, 1), (0, 2), (1,), (0, 3)):
        values = []
        for change in (step, -step):
            moved = exact.clone()
            moved[place] += change
            values.append(slow_patch_nt_xent(moved[0], moved[1], temperature, intra))
        slope = 3 * (values[0] - values[1]) / (2 * step)
        gradient = (query, key)[place[0]].grad
        assert gradient is not None
        assert float(gradient[place[1:]]) == pytest.approx(slope, rel=1e-3, abs=1e-5)


def test_patch_nt_xent_is_in_single_precision_under_autocast_too():
    query, key = (x.requires_grad_() for x in randn(2, 2, 3, 2, 4, seed=3).clone().unbind())
    alone = patch_nt_xent(query, key, 0.07)
    (expected,) = torch.autograd.grad(alone, query)
    with torch.autocast("cpu", torch.bfloat16):
        loss = patch_nt_xent(query, key, 0.07)
    assert loss.dtype == torch.float32 and torch.equal(loss, alone)
    loss.backward()
    assert torch.equal(query.grad, expected)


@pytest.mark.parametrize("intra", [True, False])
def test_patch_nt_xent_in_closed_form(intra: bool):
    images, classes, templates = 3, 4, 5
    same = torch.ones(images, classes, templates, 2)
    groups = 2 * images - (0 if intra else 1)  # an image in a view
    expected = math.log(1 + groups * (classes - 1) * templates)
    assert float(patch_nt_xent(same, same, 0.5, intra)) == pytest.approx(expected, abs=1e-5)


def test_patch_nt_xent_forgives_likeness_within_a_class_only():
    """Equal within a class and at right angles between classes is as good as it gets."""
    by_class = torch.eye(3)[None, :, None, :].expand(2, 3, 4, 3)
    best = math.log(1 + 2 * 2 * 2 * 4 * math.exp(-1 / 0.5))
    assert float(patch_nt_xent(by_class, by_class, 0.5)) == pytest.approx(best, abs=1e-5)
    by_rank = torch.eye(4)[None, None].expand(2, 3, 4, 4)  # equal between classes, by rank
    assert float(patch_nt_xent(by_rank, by_rank, 0.5)) > best + 0.5


def test_patch_nt_xent_of_one_class_has_no_negatives():
    query, key = randn(2, 2, 1, 3, 5, seed=0)
    assert float(patch_nt_xent(query, key, 0.5)) == pytest.approx(0, abs=1e-6)


# --- soft_info_nce --------------------------------------------------------------------------------


def slow_soft_info_nce(
    query: Tensor, key: Tensor, queue: Tensor, target: Tensor, weight: float, temperature: float
) -> float:
    """One row: minus the sum of target times log-probability over [positive, queue]."""
    products = [sum(q * k for q, k in zip(query.tolist(), key.tolist(), strict=True))]
    products += [
        sum(q * k for q, k in zip(query.tolist(), entry, strict=True)) for entry in queue.tolist()
    ]
    logits = [p / temperature for p in products]
    norm = math.log(sum(math.exp(x - max(logits)) for x in logits)) + max(logits)
    targets = [1.0, *target.tolist()]
    return -weight * sum(t * (x - norm) for t, x in zip(targets, logits, strict=True))


@settings(max_examples=40)
@given(st.integers(1, 4), st.integers(1, 6), st.integers(1, 7), TEMPERATURES, SEEDS)
def test_soft_info_nce_row_by_row(rows: int, queue: int, dim: int, temperature: float, seed: int):
    query, key = torch.nn.functional.normalize(randn(2, rows, dim, seed=seed), dim=-1)
    entries = randn(queue, dim, seed=seed + 1)
    target, weight = randn(rows, queue, seed=seed + 2).abs(), randn(rows, seed=seed + 3)
    actual = soft_info_nce(query, key, entries, target, weight, temperature)
    expected = [
        slow_soft_info_nce(query[i], key[i], entries, target[i], float(weight[i]), temperature)
        for i in range(rows)
    ]
    assert actual.tolist() == pytest.approx(expected, rel=1e-4, abs=1e-4)


def test_soft_info_nce_broadcasts_over_images_classes_and_ranks():
    """As the patch loss calls it: targets by image and class, weights by class and rank."""
    query, key = torch.nn.functional.normalize(randn(2, 2, 3, 4, 5, seed=0), dim=-1)
    queue, target = randn(6, 5, seed=1), randn(2, 3, 1, 6, seed=2).abs()
    weight = randn(3, 4, seed=3)
    actual = soft_info_nce(query, key, queue, target, weight, 0.5)
    assert actual.shape == (2, 3, 4)
    for b, c, k in itertools.product(range(2), range(3), range(4)):
        row = query[b, c, k], key[b, c, k], queue, target[b, c, 0], float(weight[c, k]), 0.5
        assert float(actual[b, c, k]) == pytest.approx(slow_soft_info_nce(*row), rel=1e-4)


def test_soft_info_nce_in_closed_form():
    """Nothing alike: all 1 + Q probabilities are equal, and targets add up, not normalised."""
    nothing = torch.zeros(2, 3)
    target = torch.tensor([[0.0, 0, 0, 0], [0.25, 0.5, 0, 0.25]])
    loss = soft_info_nce(nothing, nothing, torch.ones(4, 3), target, torch.tensor([1.0, 3.0]), 0.5)
    assert loss.tolist() == pytest.approx([math.log(5), 3 * (1 + 1) * math.log(5)])


def test_soft_info_nce_without_soft_targets_is_moco():
    query, key = torch.nn.functional.normalize(randn(2, 3, 4, seed=4), dim=-1)
    queue = torch.nn.functional.normalize(randn(5, 4, seed=5), dim=-1)
    loss = soft_info_nce(query, key, queue, torch.zeros(3, 5), torch.ones(3), 0.2)
    for i in range(3):
        negatives = [float(query[i] @ entry) / 0.2 for entry in queue]
        expected = cross_entropy(float(query[i] @ key[i]) / 0.2, negatives)
        assert float(loss[i]) == pytest.approx(expected, rel=1e-4)


# --- info_nce -------------------------------------------------------------------------------------


def slow_info_nce(query: Tensor, key: Tensor, queue: Tensor, temperature: float) -> float:
    """He 2020, equation 1: each query picks its key out of 1 + Q."""
    losses = []
    for q, k in zip(query.tolist(), key.tolist(), strict=True):
        positive = sum(a * b for a, b in zip(q, k, strict=True)) / temperature
        negatives = [
            sum(a * b for a, b in zip(q, entry, strict=True)) / temperature
            for entry in queue.tolist()
        ]
        losses.append(cross_entropy(positive, negatives))
    return sum(losses) / len(losses)


@settings(max_examples=40)
@given(st.integers(1, 4), st.integers(1, 6), st.integers(1, 7), TEMPERATURES, SEEDS)
def test_info_nce_is_equation_1(rows: int, queue: int, dim: int, temperature: float, seed: int):
    query, key = torch.nn.functional.normalize(randn(2, rows, dim, seed=seed), dim=-1)
    entries = torch.nn.functional.normalize(randn(queue, dim, seed=seed + 1), dim=-1)
    actual = info_nce(query, key, entries, temperature)
    assert actual.shape == ()
    expected = slow_info_nce(query, key, entries, temperature)
    assert float(actual) == pytest.approx(expected, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("temperature", [0.07, 0.5])
def test_info_nce_in_closed_form(temperature: float):
    query = torch.eye(8)[:3]
    other = torch.eye(8)[3:]  # 5 keys at a right angle to every query
    alike = info_nce(query, query, other, temperature)
    assert float(alike) == pytest.approx(math.log(1 + 5 * math.exp(-1 / temperature)), abs=1e-6)
    opposite = info_nce(query, -query, other, temperature)
    assert float(opposite) == pytest.approx(math.log(1 + 5 * math.exp(1 / temperature)), rel=1e-5)
    nothing = info_nce(query, query.roll(1, 0), other, temperature)
    assert float(nothing) == pytest.approx(math.log(6), rel=1e-6)


# --- dense_info_nce -------------------------------------------------------------------------------


def slow_dense_info_nce(
    query: Tensor, key: Tensor, features_q: Tensor, features_k: Tensor, queue: Tensor, t: float
) -> float:
    """Wang 2021, equations 2 and 4, cell by cell."""
    images, _, cells = query.shape
    losses = []
    for b, i in itertools.product(range(images), range(cells)):
        feature = features_q[b, :, i].tolist()
        alike = [cosine(feature, features_k[b, :, j].tolist()) for j in range(cells)]
        match = alike.index(max(alike))
        q = query[b, :, i].tolist()
        positive = cosine(q, key[b, :, match].tolist()) / t
        losses.append(cross_entropy(positive, [cosine(q, n) / t for n in queue.tolist()]))
    return sum(losses) / len(losses)


@settings(max_examples=40)
@given(st.integers(1, 3), st.integers(1, 6), st.integers(2, 5), TEMPERATURES, SEEDS)
def test_dense_info_nce_is_its_definition(
    images: int, cells: int, queue: int, temperature: float, seed: int
):
    query, key = randn(2, images, 5, cells, seed=seed)
    features_q, features_k = randn(2, images, 7, cells, seed=seed + 1)
    entries = torch.nn.functional.normalize(randn(queue, 5, seed=seed + 2), dim=-1)
    actual = dense_info_nce(query, key, features_q, features_k, entries, temperature)
    assert actual.shape == ()
    expected = slow_dense_info_nce(query, key, features_q, features_k, entries, temperature)
    assert float(actual) == pytest.approx(expected, rel=1e-4, abs=1e-5)


def test_dense_info_nce_finds_the_cells_that_were_moved():
    """View k is view q with its cells in another order; features of any length tell which."""
    order = torch.tensor([2, 0, 3, 1])
    features = randn(2, 6, 4, seed=0)
    projected = torch.eye(9)[:4].T.repeat(2, 1, 1)  # (2, 9, 4): a direction for each cell
    queue = torch.eye(9)[4:]
    moved = 3 * features[..., order], 5 * projected[..., order]
    loss = dense_info_nce(projected, moved[1], features, moved[0], queue, 0.5)
    assert float(loss) == pytest.approx(math.log(1 + 5 * math.exp(-1 / 0.5)), abs=1e-6)
    # By projection alone, or by place, the positive would be another cell at a right angle.
    unmoved = dense_info_nce(projected, moved[1], features, features, queue, 0.5)
    assert float(unmoved) == pytest.approx(math.log(6), abs=1e-6)


def test_dense_info_nce_learns_nothing_by_its_correspondence():
    query, key = randn(2, 2, 5, 4, seed=1).requires_grad_()
    features_q, features_k = (randn(2, 6, 4, seed=s).requires_grad_() for s in (2, 3))
    dense_info_nce(query, key, features_q, features_k, randn(3, 5, seed=4), 0.5).backward()
    assert features_q.grad is None and features_k.grad is None


# --- byol_loss ------------------------------------------------------------------------------------


def slow_byol(prediction: Tensor, target: Tensor) -> float:
    """Grill 2020, equation 2: the squared distance of the two vectors on the unit sphere."""
    losses = []
    for p, t in zip(prediction.tolist(), target.tolist(), strict=True):
        length_p, length_t = (math.sqrt(sum(x * x for x in v)) for v in (p, t))
        pairs = zip(p, t, strict=True)
        losses.append(sum((a / length_p - b / length_t) ** 2 for a, b in pairs))
    return sum(losses) / len(losses)


@settings(max_examples=40)
@given(st.integers(1, 6), st.integers(1, 9), SEEDS)
def test_byol_loss_is_equation_2(images: int, dim: int, seed: int):
    prediction, target = randn(2, images, dim, seed=seed)
    actual = byol_loss(prediction, target)
    assert actual.shape == ()
    assert float(actual) == pytest.approx(slow_byol(prediction, target), rel=1e-4, abs=1e-5)


def test_byol_loss_in_closed_form():
    one, other = torch.eye(4)[:2], torch.eye(4)[2:]
    assert float(byol_loss(3 * one, 0.1 * one)) == pytest.approx(0, abs=1e-6)
    assert float(byol_loss(one, 7 * other)) == pytest.approx(2)
    assert float(byol_loss(one, -one)) == pytest.approx(4)
    assert float(byol_loss(one, one + other)) == pytest.approx(2 - math.sqrt(2))


# --- dice and supervised --------------------------------------------------------------------------


def slow_probability(logits: Tensor) -> list:
    """Softmax over the classes: nested lists [image][class][row][column]."""
    exponents = logits.double().exp()
    return (exponents / exponents.sum(1, keepdim=True)).tolist()


def slow_dice(logits: Tensor, mask: Tensor, smooth: float) -> list[float]:
    probability = slow_probability(logits)
    images, classes, height, width = logits.shape
    values = []
    for c in range(classes):
        of_images = []
        for b in range(images):
            overlap = area = 0.0
            for i, j in itertools.product(range(height), range(width)):
                p, t = probability[b][c][i][j], float(mask[b, i, j] == c)
                overlap += p * t
                area += p + t
            of_images.append(1 - 2 * (overlap + smooth) / (area + smooth))
        values.append(sum(of_images) / images)
    return values


def slow_cross_entropy(logits: Tensor, mask: Tensor, weight: list[float]) -> float:
    """Weighted, but divided by the number of pixels."""
    probability = slow_probability(logits)
    images, _, height, width = logits.shape
    total = 0.0
    for b, i, j in itertools.product(range(images), range(height), range(width)):
        c = int(mask[b, i, j])
        total -= weight[c] * math.log(probability[b][c][i][j])
    return total / (images * height * width)


@settings(max_examples=30)
@given(st.integers(1, 3), st.integers(2, 5), st.integers(1, 5), st.integers(1, 5), SEEDS)
def test_supervised_loss_is_its_definition(
    images: int, classes: int, height: int, width: int, seed: int
):
    logits = 2 * randn(images, classes, height, width, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    mask = torch.randint(classes, (images, height, width), generator=generator)
    weight = [1.0, 10.0, 0.5, 3.0, 0.0][:classes]
    dice = slow_dice(logits, mask, 1e-4)
    assert dice_loss(logits, mask).tolist() == pytest.approx(dice, rel=1e-4, abs=1e-5)
    losses = supervised_loss(logits, mask, torch.tensor(weight))
    expected = {
        "cross_entropy": slow_cross_entropy(logits, mask, weight),
        "dice_loss": sum(dice[1:]) / (classes - 1),
    }
    expected["loss"] = 0.5 * expected["cross_entropy"] + 0.5 * expected["dice_loss"]
    assert {k: float(v) for k, v in losses.items()} == pytest.approx(expected, rel=1e-4, abs=1e-5)


def test_supervised_loss_of_the_published_program():
    golden = Golden("supervised_loss_and_metrics")
    logits = golden["in/logits"].requires_grad_()
    mask = golden["in/label_onehot"].argmax(1)
    losses = supervised_loss(logits, mask, torch.tensor([1.0, 1.0, 10.0, 10.0]))
    assert_agrees(losses["cross_entropy"], golden["out/ce"])
    assert_agrees(losses["dice_loss"], golden["out/dice_mean"])
    assert_agrees(losses["loss"], golden["out/loss"])
    for c in (1, 2, 3):
        assert_agrees(dice_loss(logits, mask)[c], golden[f"out/dice{c}"])
    losses["loss"].backward()
    assert_agrees(logits.grad, golden["out/grad_logits"])


def test_dice_loss_in_closed_form(monkeypatch):
    mask = torch.zeros(2, 4, 4, dtype=torch.long)
    mask[0, :2] = 1  # image 1 lacks class 1, and no image has class 2
    certain = 200 * torch.nn.functional.one_hot(mask, 3).permute(0, 3, 1, 2).float()
    # 1 - 2*s/s where a class is neither there nor said.
    assert dice_loss(certain, mask).tolist() == pytest.approx([0, (0 - 1) / 2, -1], abs=1e-5)
    # 16 pixels of class 0, each said to be class 1 with a probability of 1e-6.
    little = torch.tensor([0.0, math.log(1e-6)]).view(1, 2, 1, 1).expand(1, 2, 4, 4)
    found = dice_loss(little, torch.zeros(1, 4, 4, dtype=torch.long))[1]
    assert float(found) == pytest.approx(1 - 2 * 1e-4 / (16e-6 + 1e-4), rel=1e-4)
    # A probability of 1/3 everywhere: half, or none, or all of 16 pixels are the class.
    with monkeypatch.context() as patch:
        patch.setattr("pscl.losses.SMOOTH", 0.0)
        third = dice_loss(torch.zeros(2, 3, 4, 4), mask).tolist()
    half = 1 - 2 * (8 / 3) / (16 / 3 + 8)
    whole = 1 - 2 * (16 / 3) / (16 / 3 + 16)
    assert third == pytest.approx([(half + whole) / 2, (half + 1) / 2, 1])
    # All wrong: class 1 is said where there is 0.
    only_1 = torch.tensor([0.0, 200.0]).view(1, 2, 1, 1).expand(1, 2, 4, 4)
    wrong = dice_loss(only_1, torch.zeros(1, 4, 4, dtype=torch.long))
    assert wrong.tolist() == pytest.approx([1, 1], abs=1e-4)


# --- every loss: degenerate input and precision ---------------------------------------------------


def run_soft(query: Tensor, key: Tensor) -> Tensor:
    rows = query.shape[0]
    queue = randn(6, query.shape[-1], seed=9)
    return soft_info_nce(
        query, key, queue, torch.full((rows, 6), 0.3), torch.ones(rows), 0.5
    ).mean()


def run_queue(query: Tensor, key: Tensor) -> Tensor:
    return info_nce(query, key, randn(6, query.shape[-1], seed=9), 0.5)


def run_dense(query: Tensor, key: Tensor) -> Tensor:
    return dense_info_nce(query, key, query, key, randn(6, query.shape[1], seed=9), 0.5)


CONTRASTIVE: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], tuple[int, ...]]] = {
    "nt_xent": (lambda q, k: nt_xent(q, k, 0.5), (4, 8)),
    "nt_xent, one image": (lambda q, k: nt_xent(q, k, 0.5), (1, 8)),
    "patch": (lambda q, k: patch_nt_xent(q, k, 0.5), (2, 3, 2, 8)),
    "patch, other images": (lambda q, k: patch_nt_xent(q, k, 0.5, False), (2, 3, 2, 8)),
    "patch, other images, but there is one": (
        lambda q, k: patch_nt_xent(q, k, 0.5, False),
        (1, 3, 2, 8),
    ),
    "patch, one class": (lambda q, k: patch_nt_xent(q, k, 0.5), (2, 1, 3, 8)),
    "patch, one class, other images": (lambda q, k: patch_nt_xent(q, k, 0.5, False), (2, 1, 3, 8)),
    "patch, one row": (lambda q, k: patch_nt_xent(q, k, 0.5, False), (1, 1, 1, 8)),
    "soft_info_nce": (run_soft, (4, 8)),
    "info_nce": (run_queue, (4, 8)),
    "dense_info_nce": (run_dense, (2, 8, 5)),
    "dense_info_nce, one cell": (run_dense, (1, 8, 1)),
    "byol": (byol_loss, (4, 8)),
}


@pytest.mark.parametrize("name", CONTRASTIVE)
@pytest.mark.parametrize("zeros", ["all", "query", "one row", "none"])
def test_gradients_are_finite_whatever_the_embeddings(name: str, zeros: str):
    loss, shape = CONTRASTIVE[name]
    query, key = randn(2, *shape, seed=1)
    if zeros in ("all", "query"):
        query = torch.zeros_like(query)
    if zeros == "all":
        key = torch.zeros_like(key)
    if zeros == "one row":
        query[-1] = 0
    query.requires_grad_()
    key.requires_grad_()
    value = loss(query, key)
    value.backward()
    assert value.isfinite() and value >= -1e-6
    assert query.grad.isfinite().all() and key.grad.isfinite().all()


@pytest.mark.parametrize("name", CONTRASTIVE)
def test_half_precision_embeddings_give_a_single_precision_loss(name: str):
    """The loss of the rounded embeddings, computed in single precision."""
    loss, shape = CONTRASTIVE[name]
    query, key = 0.3 * randn(2, *shape, seed=2).to(torch.bfloat16)
    value = loss(query, key)
    assert value.dtype == torch.float32
    expected = float(loss(query.float(), key.float()))
    assert float(value) == pytest.approx(expected, rel=1e-6, abs=1e-6)


def test_half_precision_logits_give_a_single_precision_supervised_loss():
    logits = randn(2, 3, 6, 5, seed=3).to(torch.bfloat16)
    mask = torch.randint(3, (2, 6, 5), generator=torch.Generator().manual_seed(4))
    weight = torch.tensor([1.0, 2.0, 3.0])
    expected = supervised_loss(logits.float(), mask, weight)
    with torch.autocast("cpu", torch.bfloat16):  # as the training loop calls it
        inside = supervised_loss(logits, mask, weight)
    for name, value in supervised_loss(logits, mask, weight).items():
        assert value.dtype == inside[name].dtype == torch.float32
        assert float(value) == pytest.approx(float(expected[name]), rel=1e-6)
        assert float(inside[name]) == pytest.approx(float(expected[name]), rel=1e-6)


def test_supervised_gradients_are_finite_where_classes_are_absent_or_certain():
    for scale in (0.0, 1.0, 1e4):
        logits = (scale * randn(2, 4, 5, 5, seed=5)).requires_grad_()
        mask = torch.zeros(2, 5, 5, dtype=torch.long)
        loss = supervised_loss(logits, mask, torch.tensor([1.0, 1, 10, 10]))["loss"]
        loss.backward()
        assert loss.isfinite()
        assert logits.grad is not None and logits.grad.isfinite().all()


def test_pixels_that_nobody_labelled_change_no_supervised_loss() -> None:
    torch.manual_seed(0)
    weight = torch.tensor([1.0, 1.0, 10.0, 10.0])
    logits, mask = torch.randn(1, 4, 4, 6), torch.randint(4, (1, 4, 6))
    wider = torch.cat([logits, 9 * torch.randn(1, 4, 4, 5)], dim=3)
    unlabelled = torch.cat([mask, torch.full((1, 4, 5), IGNORED)], dim=2)
    alone, padded = (
        supervised_loss(logits, mask, weight),
        supervised_loss(wider, unlabelled, weight),
    )
    for name, value in alone.items():
        torch.testing.assert_close(padded[name], value)
