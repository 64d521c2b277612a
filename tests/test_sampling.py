"""Choosing and matching patches against the published program and slow twins with plain loops."""

from __future__ import annotations

import itertools
from unittest.mock import patch

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pscl import sampling
from pscl.geometry import ViewGeometry, correspond
from pscl.sampling import choose, label_at, sample_patches
from tests.golden_files import Golden

SEEDS = st.integers(0, 2**31)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# --- the published program ------------------------------------------------------------------------

CASES = ("rare_and_absent_class", "not_label_guided", "more_templates_than_positions")


@pytest.mark.parametrize("case", CASES)
def test_published_indices(case: str):
    golden = Golden("sampling_cases")
    views = golden.geometry(f"{case}/")
    label = golden[f"{case}/in/y_sup"][0]
    if not golden[f"{case}/in/label_guided"]:
        label = torch.zeros_like(label)
    sides = [label.shape[-1] // factor for factor in (4, 2, 1)]
    features = [golden[f"{case}/in/k_scale{n}"] for n in (1, 2, 3)]  # (B, D, H*W)
    places = [correspond(views, side, side) for side in sides]
    pairs = zip(features, places, strict=True)
    patches = sample_patches(
        [f.gather(2, p.key[:, None].expand(-1, f.shape[1], -1)) for f, p in pairs],
        places,
        [label_at(label, views[0], side, side) for side in sides],
        [golden[f"{case}/in/noise_scale{n}"] for n in (1, 2, 3)],
        [int(golden[f"{case}/in/top_k"]) * factor for factor in (1, 2, 4)],
    )
    for number, found in enumerate(patches, start=1):
        assert torch.equal(found.query, golden[f"{case}/out/index_q_scale{number}"])
        assert torch.equal(found.key, golden[f"{case}/out/index_k_scale{number}"])


# --- choose ---------------------------------------------------------------------------------------


def slow_choose(label: list, noise: list, templates: int) -> tuple[list, list]:
    """Class by class, the largest of label + 0.1*noise + history, one cell after the other."""
    cells = len(label[0])
    peak = max(value for row in label for value in row)
    history = [0.0] * cells
    indices, values = [], []
    for label_c, noise_c in zip(label, noise, strict=True):
        score = [label_c[p] + 0.1 * noise_c[p] + history[p] for p in range(cells)]
        free = set(range(cells))
        taken: list[int] = []
        while free and len(taken) < templates:
            taken.append(max(free, key=lambda p: score[p]))
            free.remove(taken[-1])
        for p in taken:
            history[p] -= peak
        there = [taken[n % len(taken)] for n in range(templates)]  # repeated in order
        indices.append(there)
        values.append([score[p] for p in there])
    return indices, values


def spread_noise(classes: int, cells: int, seed: int) -> Tensor:
    """Noise in [0, 1) without two equal values for a class, so that the order is beyond doubt."""
    order = [torch.randperm(cells, generator=generator(seed + c)) for c in range(classes)]
    return torch.stack(order).float() / cells


@settings(max_examples=120)
@given(
    st.integers(2, 7),
    st.integers(1, 60),
    st.integers(1, 20),
    st.sampled_from(["fractions", "pure", "absent", "zero"]),
    SEEDS,
)
def test_choose_is_the_published_rule(
    classes: int, cells: int, templates: int, kind: str, seed: int
):
    """Any number of classes, crops smaller than C*K and than K, classes absent or all."""
    if kind == "fractions":  # fifths of a pixel
        label = 51.0 * torch.randint(6, (classes, cells), generator=generator(seed))
    else:
        present = 1 if kind == "absent" else classes
        ids = torch.randint(present, (cells,), generator=generator(seed))
        label = 255.0 * F.one_hot(ids, classes).T.float()
    if kind == "zero":
        label = torch.zeros_like(label)
    noise = spread_noise(classes, cells, seed)
    index, purity = choose(label, noise, templates)
    expected, values = slow_choose(label.tolist(), noise.tolist(), templates)
    assert index.tolist() == expected
    assert index.dtype == torch.int64 and purity.shape == (classes, templates)
    for row, value in zip(purity.tolist(), values, strict=True):
        total, size = sum(value), sum(map(abs, value))
        if size < 100 * abs(total):  # values of both signs cancel, and few digits remain
            assert row == pytest.approx([v / total for v in value], rel=1e-3, abs=1e-3)


def test_purity_sums_to_one_for_each_class():
    for seed, (classes, cells, templates) in enumerate([(2, 50, 4), (4, 300, 30), (7, 100, 10)]):
        label = 255 * torch.rand(classes, cells, generator=generator(seed))
        _, purity = choose(label, spread_noise(classes, cells, seed), templates)
        assert torch.allclose(purity.sum(1), torch.ones(classes), atol=1e-5)
        _, purity = choose(torch.zeros_like(label), spread_noise(classes, cells, seed), templates)
        assert torch.allclose(purity.sum(1), torch.ones(classes), atol=1e-5)


def test_without_any_label_or_noise_all_patches_count_alike():
    _, purity = choose(torch.zeros(3, 10), torch.zeros(3, 10), 4)
    assert torch.equal(purity, torch.full((3, 4), 0.25))


def test_purity_by_hand():
    label = torch.tensor([[255.0, 153, 0, 51], [0, 102, 255, 204]])
    index, purity = choose(label, torch.zeros(2, 4), 2)
    assert index.tolist() == [[0, 1], [2, 3]]
    assert purity.flatten().tolist() == pytest.approx([255 / 408, 153 / 408, 255 / 459, 204 / 459])


def test_a_class_with_few_pixels_is_completed_by_cells_that_nobody_took():
    """Class 1 has two pixels; the rest of its four come from cells free of a history."""
    ids = torch.tensor([1, 1, *[0] * 18])
    index, purity = choose(255 * F.one_hot(ids).T.float(), spread_noise(2, 20, 0), 4)
    assert set(index[1].tolist()) >= {0, 1}
    assert not set(index[0].tolist()) & set(index[1].tolist())
    assert float(purity[1, :2].sum()) > 0.99  # the strangers weigh almost nothing


def test_random_sampling_may_share_cells_and_ignores_the_label():
    """Without a label the history never falls, so one order of noise gives one choice."""
    noise = spread_noise(1, 30, 3).expand(3, -1)
    index, _ = choose(torch.zeros(3, 30), noise, 5)
    best = noise[0].argsort(descending=True)[:5].tolist()
    assert index.tolist() == [best] * 3


# --- match ----------------------------------------------------------------------------------------


def slow_match(template: Tensor, keys: Tensor, valid: Tensor) -> list[list[int]]:
    """Template after template takes the first of its most similar cells, which is then lowered."""
    columns = template.double().T.tolist()  # T rows of D
    chosen = []
    for image, there in zip(keys.double(), valid.tolist(), strict=True):
        cells = [p for p, is_there in enumerate(there) if is_there]
        vectors = image.T.tolist()
        similarity = [
            {p: sum(a * b for a, b in zip(t, vectors[p], strict=True)) for p in cells}
            for t in columns
        ]
        peak = max(max(row.values()) for row in similarity)
        of_image = []
        for row in similarity:
            best = max(row.values())
            cell = next(p for p in cells if row[p] == best)
            of_image.append(cell)
            for other in similarity:
                other[cell] -= peak
        chosen.append(of_image)
    return chosen


def match(template: Tensor, keys: Tensor, valid: Tensor) -> Tensor:
    """``sampling.match`` of one scale."""
    return sampling.match([template], [keys], [valid])[0]


class Counter:
    """How often, and for how many images each time, the rule was followed template by template."""

    def __init__(self) -> None:
        self.images: list[int] = []
        self.original = sampling._match_in_turn

    @property
    def calls(self) -> int:
        return len(self.images)

    def __call__(self, *arguments: Tensor) -> Tensor:
        self.images.append(len(arguments[1]))
        return self.original(*arguments)


@pytest.mark.parametrize("cells", [3, 9, 31, 50])
@pytest.mark.parametrize("templates", [1, 2])
def test_of_cells_with_equal_features_the_first_is_taken(cells: int, templates: int):
    """Whatever their number: a matrix product may sum the last odd rows in another order."""
    for seed in range(20):
        random = generator(seed)
        keys = torch.randn(1, 64, 1, generator=random).expand(1, 64, cells).contiguous()
        template = keys[0, :, :1] + 0.1 * torch.randn(64, templates, generator=random)
        chosen = match(template, keys, torch.ones(1, cells, dtype=torch.bool))
        assert chosen.tolist() == [list(range(templates))]


@pytest.mark.parametrize("cells", [129, 301])  # more than take part in the rounds: done in turn
@pytest.mark.parametrize("templates", [1, 3, 33])
@pytest.mark.parametrize("dim", [16, 64])
def test_of_many_cells_with_equal_features_too(dim: int, templates: int, cells: int):
    for seed, images in itertools.product(range(5), (1, 5)):
        random = generator(seed)
        keys = torch.randn(images, dim, 1, generator=random).repeat(1, 1, cells)
        template = torch.randn(dim, templates, generator=random)
        for layout in (keys, keys.transpose(1, 2).contiguous().transpose(1, 2)):
            chosen = match(template, layout, torch.ones(images, cells) > 0)
            assert chosen[:, 0].tolist() == [0] * images


@settings(max_examples=150)
@given(
    st.integers(1, 3),
    st.integers(1, 12),
    st.integers(1, 90),
    st.integers(1, 4),
    st.sampled_from(["any", "positive", "negative", "zero"]),
    st.booleans(),
    SEEDS,
)
def test_match_is_the_published_rule(
    images: int, templates: int, cells: int, dim: int, sign: str, padded: bool, seed: int
):
    """Whole numbers as features: products are exact, and ties abound."""
    random = generator(seed)
    template = torch.randint(-2, 3, (dim, templates), generator=random).float()
    keys = torch.randint(-2, 3, (images, dim, cells), generator=random).float()
    if sign in ("positive", "negative"):
        template, keys = template.abs() + 1, keys.abs() + 1
    if sign == "negative":  # the largest entry is below zero, and lowering by it raises
        keys = -keys
    if sign == "zero":
        keys = torch.zeros_like(keys)
    count = torch.randint(1, cells + 1, (images, 1), generator=random) if padded else cells
    valid = torch.arange(cells).expand(images, -1) < count
    assert match(template, keys, valid).tolist() == slow_match(template, keys, valid)


@settings(max_examples=60)
@given(st.integers(1, 2), st.integers(1, 25), st.integers(1, 200), st.integers(2, 8), SEEDS)
def test_match_of_real_numbers(images: int, templates: int, cells: int, dim: int, seed: int):
    random = generator(seed)
    template = torch.randn(dim, templates, generator=random)
    keys = torch.randn(images, dim, cells, generator=random)
    valid = torch.arange(cells) < torch.randint(1, cells + 1, (images, 1), generator=random)
    assert match(template, keys, valid).tolist() == slow_match(template, keys, valid)


def normalised(*shape: int, seed: int) -> Tensor:
    return F.normalize(torch.randn(*shape, generator=generator(seed)), dim=-2)


@pytest.mark.parametrize("unit", [True, False])
@pytest.mark.parametrize("best", range(0, 200, 9))
def test_the_best_of_many_that_single_precision_takes_for_equal(best: int, unit: bool):
    """More than are candidates: whether one is surely the best hangs on how long vectors are."""
    template = torch.full((3, 1), 0.5)
    keys = torch.tensor([1.0, 2.0**-30, 0])[None, :, None].repeat(1, 1, 200)
    keys[0, 2, best] = 2.0**-31
    (found,) = sampling.match([template], [keys], [torch.ones(1, 200) > 0], unit)
    assert found.tolist() == [[best]]


def test_how_long_vectors_are_is_known_image_by_image():
    """The second image alone is looked at again, with more candidates; they do not suffice."""
    keys = torch.zeros(2, 3, 256)
    keys[0, 0] = torch.linspace(0, 0.001, 256)
    keys[1, 0], keys[1, 1], keys[1, 2, 200] = 1000.0, 1000 * 2.0**-30, 1000 * 2.0**-31
    small = {"_CANDIDATES": 4, "_SLICES": 2, "_EFFORT": 2, "_HELD": 0}
    with patch.multiple(sampling, **small):
        assert match(torch.ones(3, 1), keys, torch.ones(2, 256) > 0).tolist() == [[255], [200]]


@pytest.mark.parametrize("held", [0, 2**40])
def test_valid_may_lie_in_memory_as_it_likes(held: int):
    keys = normalised(2, 4, 1280, seed=1)
    template = normalised(1, 4, 5, seed=2)[0]
    valid = (torch.arange(1280)[:, None] < torch.tensor([1280, 900])).T
    with patch.multiple(sampling, _HELD=held, _SLICES=8):
        assert match(template, keys, valid).tolist() == slow_match(template, keys, valid)


@pytest.mark.parametrize("seed", [1, 2, 4])
def test_of_very_many_cells_with_equal_features_too(seed: int):
    """More rows than a matrix product has in blocks of equal size."""
    random = generator(seed)
    row = torch.randn(1, 33, 1, generator=random)
    keys = row.transpose(1, 2).repeat(1, 40000, 1).transpose(1, 2)
    template = torch.randn(33, 10, generator=random)
    assert int(match(template, keys, torch.ones(1, 40000) > 0)[0, 0]) == 0


def test_typical_images_are_settled_in_rounds_alone():
    """Many cells, templates that resemble cells by class: nobody has to wait for his turn."""
    for seed in range(5):
        keys = normalised(3, 16, 1500, seed=seed)
        template = normalised(1, 16, 48, seed=seed + 100)[0]
        valid = torch.arange(1500) < torch.tensor([[1500], [1400], [1225]])
        counter = Counter()
        with patch.object(sampling, "_match_in_turn", counter):
            cell = match(template, keys, valid)
        assert counter.calls == 0
        assert all(len(set(row)) == 48 for row in cell.tolist())  # each cell once
        if seed == 0:
            few = template[:, :20]
            assert match(few, keys, valid).tolist() == slow_match(few, keys, valid)


@pytest.mark.parametrize(  # pieces of an image; of all, for few templates or without a cache
    ("few", "cached"), [(0, ("cpu",)), (7, ("cpu",)), (0, ())]
)
@pytest.mark.parametrize("piece", [1, 3000, 2**24])  # a slice, some, all at once
@pytest.mark.parametrize("slices", [8, 9])  # as many cells in them as candidates, and more
@pytest.mark.parametrize("cells", [1536, 1203])  # a multiple of 256, and filled up to one
def test_slices_whose_similarities_are_not_all_held(
    cells: int, slices: int, piece: int, few: int, cached: tuple[str, ...]
):
    keys = torch.randn(3, 6, cells, generator=generator(cells))
    template = torch.randn(6, 7, generator=generator(piece))
    valid = torch.arange(cells) < torch.tensor([[cells], [cells - 1], [cells // 2]])
    keys = torch.where(valid[:, None], keys, 9 * template[:, :1])  # padding is what all want
    keys[0, :, -1] = 5 * template[:, 0]
    whole = 3 * 7 * 8 * 40  # forty slices of all images are a piece
    sizes = {"_SLICES": slices, "_HELD": 0, "_FEW": few, "_WHOLE": whole, "_PIECE": piece}
    with patch.multiple(sampling, **sizes, _CACHED=cached):
        found = match(template, keys, valid).tolist()
    assert found == slow_match(template, keys, valid)
    assert found[0][0] == cells - 1


@settings(max_examples=100)
@given(
    st.integers(1, 4),
    st.integers(1, 14),
    st.integers(129, 170),
    st.sampled_from([1, 2]),
    st.sampled_from([0, 2**20]),
    SEEDS,
)
def test_slices_of_cells_that_are_often_equal(
    images: int, templates: int, cells: int, effort: int, whole: int, seed: int
):
    """Few candidates from few slices: the best cell often lies in neither, or is one of equals."""
    random = generator(seed)
    template = torch.randint(-1, 3, (2, templates), generator=random).float()
    keys = torch.randint(-1, 3, (images, 2, cells), generator=random).float()
    few = torch.rand(images, 1, cells, generator=random) < 0.1
    keys = torch.where(few, 2 * keys, keys)
    keys[0] = torch.randn(2, cells, generator=random)  # the candidates often decide this one
    valid = torch.arange(cells) < torch.randint(1, cells + 1, (images, 1), generator=random)
    small = {"_CANDIDATES": 6, "_SLICES": 2, "_EFFORT": effort, "_HELD": 0, "_WHOLE": whole}
    with patch.multiple(sampling, **small, _FEW=7, _PIECE=200):
        assert match(template, keys, valid).tolist() == slow_match(template, keys, valid)


def test_a_slice_left_out_may_hold_the_next_best_cell():
    """Of three cells in three slices two slices are looked into; the third template wants more."""
    keys = torch.zeros(1, 1, 80)
    keys[0, 0, 8], keys[0, 0, 30], keys[0, 0, 50] = 4.0, 3.0, 2.0
    keys[0, 0, 9], keys[0, 0, 31] = 1.0, 1.5
    template, valid = torch.ones(1, 3), torch.ones(1, 80) > 0
    small = {"_CANDIDATES": 16, "_SLICES": 2, "_EFFORT": 1, "_HELD": 0}
    with patch.multiple(sampling, **small):
        assert match(template, keys, valid).tolist() == [[8, 30, 50]]


@pytest.mark.parametrize("first", [0, 16, 40])
def test_the_first_of_a_slice_of_equal_cells_may_be_no_candidate(first: int):
    keys = torch.zeros(1, 1, 80)
    keys[..., first : first + 8] = 5.0
    small = {"_CANDIDATES": 4, "_SLICES": 2, "_EFFORT": 1, "_HELD": 0}
    with patch.multiple(sampling, **small):
        assert match(torch.ones(1, 1), keys, torch.ones(1, 80) > 0).tolist() == [[first]]


@pytest.mark.parametrize("cells", [5, 60, 600])
def test_so_few_cells_have_no_slices_however_many_templates(cells: int):
    template, keys = normalised(1, 4, 30, seed=cells)[0], normalised(2, 4, cells, seed=2)
    valid = torch.ones(2, cells) > 0
    with patch.object(sampling, "_HELD", 0):
        assert match(template, keys, valid).tolist() == slow_match(template, keys, valid)


def crowd(templates: int, cells: int) -> tuple[Tensor, Tensor, Tensor]:
    """All templates want the same cells in the same order."""
    template = torch.ones(1, templates)
    keys = torch.linspace(1, 2, cells)[None, None]
    return template, keys, torch.ones(1, cells, dtype=torch.bool)


def all_zero() -> tuple[Tensor, Tensor, Tensor]:
    """Lowered by nothing, the first cell stays the first of equals."""
    return torch.zeros(3, 7), torch.ones(2, 3, 9), torch.ones(2, 9, dtype=torch.bool)


def more_templates_than_cells() -> tuple[Tensor, Tensor, Tensor]:
    return normalised(1, 4, 30, seed=1)[0], normalised(2, 4, 11, seed=2), torch.ones(2, 11) > 0


def one_cell() -> tuple[Tensor, Tensor, Tensor]:
    valid = torch.tensor([[False, True, False], [True, True, True]])
    return normalised(1, 4, 6, seed=3)[0], normalised(2, 4, 3, seed=4), valid


def all_negative() -> tuple[Tensor, Tensor, Tensor]:
    keys = -torch.rand(2, 3, 40, generator=generator(5)) - 0.1
    return torch.rand(3, 8, generator=generator(6)) + 0.1, keys, torch.ones(2, 40) > 0


def a_lowered_cell_wins() -> tuple[Tensor, Tensor, Tensor]:
    """Template 1 prefers the taken cell, lowered by the peak, to all others: -1 against -5."""
    template = torch.tensor([[1.0, 0], [0, 1]])
    keys = torch.tensor([[[2.0, 1, 1], [1, -5, -6]]])
    return template, keys, torch.ones(1, 3, dtype=torch.bool)


IN_TURN = {
    "more want the same cells than there are candidates": crowd(200, 400),
    "all similarities zero": all_zero(),
    "more templates than cells": more_templates_than_cells(),
    "one cell": one_cell(),
    "all similarities negative": all_negative(),
    "a lowered cell wins": a_lowered_cell_wins(),
}


@pytest.mark.parametrize("case", IN_TURN)
def test_what_rounds_cannot_decide_is_done_in_turn(case: str):
    template, keys, valid = IN_TURN[case]
    expected = slow_match(template, keys, valid)
    counter = Counter()
    with patch.object(sampling, "_match_in_turn", counter):
        assert match(template, keys, valid).tolist() == expected
    assert counter.calls == 1


def test_images_settled_and_open_keep_their_places():
    """Only the open images of a batch are done in turn, and go back to where they belong."""
    template = normalised(1, 8, 10, seed=7)[0]
    keys = normalised(4, 8, 300, seed=8)
    keys[1] = keys[1, :, :1]  # all cells equal
    keys[3] = keys[3, :, :1]
    valid = torch.ones(4, 300) > 0
    counter = Counter()
    with patch.object(sampling, "_match_in_turn", counter):
        cell = match(template, keys, valid)
    assert counter.calls == 1
    assert cell.tolist() == slow_match(template, keys, valid)
    with patch.object(sampling, "_WHOLE", 0):  # room for one image at a time
        assert torch.equal(match(template, keys, valid), cell)


@pytest.mark.parametrize(
    ("effort", "whole", "calls"), [(1, 0, 2), (4, 0, 0), (4, 8000, 0)]
)  # one open image at a time, or both
def test_images_that_few_candidates_do_not_decide_get_more(effort: int, whole: int, calls: int):
    """In images 1 and 3 ten templates want the same ten cells, in the others each its own."""
    cells = 300
    template = torch.stack([torch.ones(10), torch.linspace(0, 1, 10)])
    keys = normalised(4, 2, cells, seed=1)
    keys[::2, :, 20:30] = 2 * F.normalize(template, dim=0)  # one cell for each template
    keys[1::2, 0], keys[1::2, 1] = torch.linspace(1, 2, cells), 0
    valid = torch.arange(cells) < torch.tensor([[cells], [cells - 3], [cells], [cells - 50]])
    counter = Counter()
    with (
        patch.object(sampling, "_match_in_turn", counter),
        patch.multiple(sampling, _CANDIDATES=4, _SLICES=2, _EFFORT=effort, _HELD=0),
        patch.object(sampling, "_WHOLE", whole),
    ):
        assert match(template, keys, valid).tolist() == slow_match(template, keys, valid)
    assert counter.calls == calls


@settings(max_examples=60)
@given(
    st.integers(1, 3), st.lists(st.tuples(st.integers(1, 9), st.integers(1, 90)), max_size=4), SEEDS
)
def test_scales_do_not_meddle_with_each_other(images: int, sizes: list[tuple[int, int]], seed: int):
    """Each as if alone, whatever the others: some are settled in rounds and some are not."""
    random = generator(seed)
    one = crowd(80, 100)
    template, keys = ([F.pad(part, (0, 0, 0, 2))] for part in one[:2])
    keys, valid = [keys[0].expand(images, -1, -1)], [one[2].expand(images, -1)]
    for templates, cells in sizes:
        template.append(torch.randint(-2, 3, (3, templates), generator=random).float())
        keys.append(torch.randint(-2, 3, (images, 3, cells), generator=random).float())
        count = torch.randint(1, cells + 1, (images, 1), generator=random)
        valid.append(torch.arange(cells) < count)
    order = torch.randperm(len(valid), generator=random).tolist()
    template, keys, valid = ([part[n] for n in order] for part in (template, keys, valid))
    found = sampling.match(template, keys, valid)
    for t, k, v, cell in zip(template, keys, valid, found, strict=True):
        assert cell.tolist() == slow_match(t, k, v)


def test_by_hand():
    """The published rule on a matrix that fits on a page."""
    similarity = torch.tensor([[3.0, 9, 1, 0], [2, 8, 7, 0], [1, 6, 5, 2]])  # templates x cells
    # The peak is 9. Template 0: cell 1. Template 1: cell 2 (7; cell 1 is 8 - 9). Template 2:
    # cell 3 (2; cells 1 and 2 are 6 - 9 and 5 - 9, cell 0 is 1).
    assert match(torch.eye(3), similarity[None], torch.ones(1, 4) > 0).tolist() == [[1, 2, 3]]


def test_nearly_equal_similarities_are_told_apart_in_double_precision():
    """Two cells whose products differ by less than single precision can add up."""
    template = torch.tensor([[1.0], [1.0], [1.0]])
    keys = torch.zeros(1, 3, 100)
    keys[0, :, 40] = torch.tensor([1.0, 2.0**-30, 0])
    keys[0, :, 70] = torch.tensor([1.0, 2.0**-30, 2.0**-31])
    assert match(template, keys, torch.ones(1, 100) > 0).tolist() == [[70]]


# --- sample_patches -------------------------------------------------------------------------------


@settings(max_examples=40)
@given(st.integers(2, 7), st.integers(1, 3), st.integers(1, 12), st.integers(2, 9), SEEDS)
def test_patches_of_tiny_crops_are_where_the_slow_twins_say(
    classes: int, images: int, templates: int, side: int, seed: int
):
    """Grids smaller than C*K and than K, H != W, absent classes: twins all the way."""
    rng = np.random.default_rng(seed)
    views = [ViewGeometry.draw(rng, 0.5) for _ in range(images)]
    rows, columns = side, side + 3
    places = correspond(views, rows, columns)
    cells = places.valid.shape[1]
    own_cells = int(places.valid[0].sum())
    ids = torch.randint(max(1, classes - 1), (own_cells,), generator=generator(seed))
    label = 255.0 * F.one_hot(ids, classes).T.float()
    noise = spread_noise(classes, own_cells, seed)
    features = torch.randn(images, 6, rows * columns, generator=generator(seed + 1))
    keys = features.gather(2, places.key[:, None].expand(-1, 6, cells))
    (patches,) = sample_patches([keys], [places], [label], [noise], [templates])

    own, _ = slow_choose(label.tolist(), noise.tolist(), templates)
    chosen = [[p for row in own for p in row]]
    template = keys[0][:, chosen[0]]
    chosen += slow_match(template, keys[1:], places.valid[1:])
    assert patches.query.shape == patches.key.shape == (images, classes * templates)
    for b, row in enumerate(chosen):
        assert patches.query[b].tolist() == [int(places.query[b, p]) for p in row]
        assert patches.key[b].tolist() == [int(places.key[b, p]) for p in row]


@pytest.mark.parametrize("turns", [1, 2, 3, 4])
@pytest.mark.parametrize("flip", [False, True])
def test_patches_of_a_class_lie_in_it_in_both_views(flip: bool, turns: int):
    """From pixels to patches: the label travels with view k, the choice comes back to view q."""
    rows, columns = 64, 88
    mask = torch.zeros(rows, columns, dtype=torch.long)
    mask[:, 30:] = 1
    mask[36:, 30:60] = 2
    view = ViewGeometry(flip, turns, 0.85, 0.9, 0.1, 0.05)
    # Blurred, so that the middle of a class is its purest and cells at its border play no part.
    one_hot = F.one_hot(mask, 3).permute(2, 0, 1).float()
    label = view.apply(255 * F.avg_pool2d(one_hot, 9, 1, 4, count_include_pad=False))
    for scale in (1, 2, 4):
        grid = rows // scale, columns // scale
        places = correspond([view], *grid)
        on_cells = label_at(label, view, *grid)
        noise = torch.rand(on_cells.shape, generator=generator(turns))
        keys = torch.zeros(1, 2, on_cells.shape[1])
        (patches,) = sample_patches([keys], [places], [on_cells], [noise], [5])
        mask_q = mask[::scale, ::scale]
        mask_k = view.apply_mask(mask)[::scale, ::scale]
        wanted = torch.arange(3).repeat_interleave(5).tolist()
        assert mask_q.flatten()[patches.query[0]].tolist() == wanted
        assert mask_k.flatten()[patches.key[0]].tolist() == wanted


def test_identical_images_are_matched_to_the_chosen_cells_themselves():
    """Cosine: nothing is more similar to a patch than itself."""
    views = [ViewGeometry(True, 3, 0.9, 0.8, 0.05, 0.1)] * 3
    places = correspond(views, 20, 26)
    cells = places.valid.shape[1]
    keys = normalised(1, 8, cells, seed=11).expand(3, -1, -1)
    own = int(places.valid[0].sum())
    label = 255 * torch.rand(4, own, generator=generator(12))
    (patches,) = sample_patches([keys], [places], [label], [torch.rand(4, own)], [6])
    assert torch.equal(patches.query, patches.query[:1].expand(3, -1))
    assert torch.equal(patches.key, patches.key[:1].expand(3, -1))


@pytest.mark.parametrize(("cells", "count"), [(9024, 64), (8192, 64), (704, 5), (64, 7), (32, 32)])
def test_the_largest_are_found_block_by_block(cells: int, count: int) -> None:
    rng = np.random.default_rng(cells)
    values = rng.permutation(6 * cells).reshape(2, 3, cells).astype(np.float32)
    values[1, :, cells // 3 :] = -np.inf  # padding; fewer than count cells may be left
    found, index = sampling._largest(torch.from_numpy(values), count)
    for row, got, where in zip(
        values.reshape(-1, cells),
        found.reshape(-1, count).tolist(),
        index.reshape(-1, count).tolist(),
        strict=True,
    ):
        assert got == sorted(row.tolist(), reverse=True)[:count]
        assert [row[i] for i in where] == got and len(set(where)) == count
