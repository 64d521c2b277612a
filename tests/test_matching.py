"""Matching: the plain form against a slow twin, and the fast one against both."""

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

from pscl import assignment, matching
from pscl.assignment import AllCells
from pscl.fast_matching import Limits, largest, match

SEEDS = st.integers(0, 2**31)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


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


class Searched:
    """In how many images templates that candidates did not decide searched all cells."""

    def __init__(self) -> None:
        self.images, original = 0, AllCells

        def counted(*arguments: Tensor) -> AllCells:
            self.images += 1
            return original(*arguments)

        self.patched = patch.object(assignment, "AllCells", counted)


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


@pytest.mark.parametrize("cells", [129, 301])  # more than candidates
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
    expected = slow_match(template, keys, valid)
    assert matching.match(template, keys, valid).tolist() == expected
    assert match(template, keys, valid).tolist() == expected


@settings(max_examples=60)
@given(st.integers(1, 2), st.integers(1, 25), st.integers(1, 200), st.integers(2, 8), SEEDS)
def test_match_of_real_numbers(images: int, templates: int, cells: int, dim: int, seed: int):
    random = generator(seed)
    template = torch.randn(dim, templates, generator=random)
    keys = torch.randn(images, dim, cells, generator=random)
    valid = torch.arange(cells) < torch.randint(1, cells + 1, (images, 1), generator=random)
    expected = slow_match(template, keys, valid)
    assert matching.match(template, keys, valid).tolist() == expected
    assert match(template, keys, valid).tolist() == expected


@pytest.mark.parametrize("templates", [7, 64, 130])
@pytest.mark.parametrize("cells", [500, 9216, 20000])
def test_fast_is_plain_at_the_sizes_of_training(templates: int, cells: int):
    """All similarities held, and the largest of slices, in pieces of two sizes."""
    random = generator(cells + templates)
    template = torch.randn(33, templates, generator=random)
    keys = torch.randn(2, cells, 33, generator=random).transpose(1, 2)
    valid = torch.arange(cells) < torch.tensor([[cells], [cells - cells // 5]])
    expected = matching.match(template, keys, valid)
    for limits in (
        Limits(),
        Limits(held=0, all_of=0),
        Limits(held=0, all_of=0, piece=2**16, few=8),
    ):
        assert torch.equal(match(template, keys, valid, limits), expected)


def normalised(*shape: int, seed: int) -> Tensor:
    return F.normalize(torch.randn(*shape, generator=generator(seed)), dim=-2)


@pytest.mark.parametrize("length", [1.0, 30.0])
@pytest.mark.parametrize("best", range(0, 200, 9))
def test_the_best_of_many_that_single_precision_takes_for_equal(best: int, length: float):
    """More than are candidates: whether one is surely the best hangs on how long vectors are."""
    template = torch.full((3, 1), 0.5)
    keys = torch.tensor([1.0, 2.0**-30, 0])[None, :, None].repeat(1, 1, 200)
    keys[0, 2, best] = 2.0**-31
    assert match(template, length * keys, torch.ones(1, 200) > 0).tolist() == [[best]]


def test_how_long_vectors_are_is_known_image_by_image():
    """The second image alone is looked at again, with more candidates; they do not suffice."""
    keys = torch.zeros(2, 3, 256)
    keys[0, 0] = torch.linspace(0, 0.001, 256)
    keys[1, 0], keys[1, 1], keys[1, 2, 200] = 1000.0, 1000 * 2.0**-30, 1000 * 2.0**-31
    limits = Limits(candidates=4, slices=2, held=0, all_of=0)
    found = match(torch.ones(3, 1), keys, torch.ones(2, 256) > 0, limits)
    assert found.tolist() == [[255], [200]]


@pytest.mark.parametrize("held", [0, 2**40])
def test_valid_may_lie_in_memory_as_it_likes(held: int):
    keys = normalised(2, 4, 1280, seed=1)
    template = normalised(1, 4, 5, seed=2)[0]
    valid = (torch.arange(1280)[:, None] < torch.tensor([1280, 900])).T
    limits = Limits(held=held, all_of=0, slices=8)
    assert match(template, keys, valid, limits).tolist() == slow_match(template, keys, valid)


@pytest.mark.parametrize("seed", [1, 2, 4])
def test_of_very_many_cells_with_equal_features_too(seed: int):
    """More rows than a matrix product has in blocks of equal size."""
    random = generator(seed)
    row = torch.randn(1, 33, 1, generator=random)
    keys = row.transpose(1, 2).repeat(1, 40000, 1).transpose(1, 2)
    template = torch.randn(33, 10, generator=random)
    assert int(match(template, keys, torch.ones(1, 40000) > 0)[0, 0]) == 0


def test_candidates_decide_typical_images():
    """Many cells, templates that resemble cells by class: nobody has to wait for his turn."""
    for seed in range(5):
        keys = normalised(3, 16, 1500, seed=seed)
        template = normalised(1, 16, 48, seed=seed + 100)[0]
        valid = torch.arange(1500) < torch.tensor([[1500], [1400], [1225]])
        searched = Searched()
        with searched.patched:
            cell = match(template, keys, valid)
        assert searched.images == 0
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
    limits = Limits(
        slices=slices, held=0, all_of=0, few=few, whole=whole, piece=piece, cached=cached
    )
    found = match(template, keys, valid, limits).tolist()
    assert found == slow_match(template, keys, valid)
    assert found[0][0] == cells - 1


@settings(max_examples=100)
@given(
    st.integers(1, 4),
    st.integers(1, 14),
    st.integers(129, 170),
    st.sampled_from([0, 2**20]),
    SEEDS,
)
def test_slices_of_cells_that_are_often_equal(
    images: int, templates: int, cells: int, whole: int, seed: int
):
    """Few candidates from few slices: the best cell often lies in neither, or is one of equals."""
    random = generator(seed)
    template = torch.randint(-1, 3, (2, templates), generator=random).float()
    keys = torch.randint(-1, 3, (images, 2, cells), generator=random).float()
    few = torch.rand(images, 1, cells, generator=random) < 0.1
    keys = torch.where(few, 2 * keys, keys)
    keys[0] = torch.randn(2, cells, generator=random)  # the candidates often decide this one
    valid = torch.arange(cells) < torch.randint(1, cells + 1, (images, 1), generator=random)
    limits = Limits(6, slices=2, held=0, all_of=0, whole=whole, few=7, piece=200)
    assert match(template, keys, valid, limits).tolist() == slow_match(template, keys, valid)


def test_a_slice_left_out_may_hold_the_next_best_cell():
    """Of three cells in three slices two slices are looked into; the third template wants more."""
    keys = torch.zeros(1, 1, 80)
    keys[0, 0, 8], keys[0, 0, 30], keys[0, 0, 50] = 4.0, 3.0, 2.0
    keys[0, 0, 9], keys[0, 0, 31] = 1.0, 1.5
    template, valid = torch.ones(1, 3), torch.ones(1, 80) > 0
    limits = Limits(candidates=16, slices=2, held=0, all_of=0)
    assert match(template, keys, valid, limits).tolist() == [[8, 30, 50]]


@pytest.mark.parametrize("first", [0, 16, 40])
def test_the_first_of_a_slice_of_equal_cells_may_be_no_candidate(first: int):
    keys = torch.zeros(1, 1, 80)
    keys[..., first : first + 8] = 5.0
    limits = Limits(candidates=4, slices=2, held=0, all_of=0)
    found = match(torch.ones(1, 1), keys, torch.ones(1, 80) > 0, limits)
    assert found.tolist() == [[first]]


@pytest.mark.parametrize("cells", [5, 60, 600])
def test_so_few_cells_have_no_slices_however_many_templates(cells: int):
    template, keys = normalised(1, 4, 30, seed=cells)[0], normalised(2, 4, cells, seed=2)
    valid = torch.ones(2, cells) > 0
    found = match(template, keys, valid, Limits(held=0))
    assert found.tolist() == slow_match(template, keys, valid)


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


UNDECIDED = {
    "more want the same cells than there are candidates": crowd(200, 400),
    "all similarities zero": all_zero(),
    "more templates than cells": more_templates_than_cells(),
    "one cell": one_cell(),
    "all similarities negative": all_negative(),
    "a lowered cell wins": a_lowered_cell_wins(),
}


@pytest.mark.parametrize("case", UNDECIDED)
def test_what_candidates_do_not_decide_is_searched_everywhere(case: str):
    template, keys, valid = UNDECIDED[case]
    searched = Searched()
    with searched.patched:
        assert match(template, keys, valid).tolist() == slow_match(template, keys, valid)
    assert searched.images > 0


@pytest.mark.parametrize("templates", [2, 30, 100])
def test_a_template_pushes_out_the_next_which_pushes_out_the_next(templates: int):
    """Templates 0 and 1 want cell 0; every later one wants the cell before its own, then its own.

    Whoever is refused wants what the next one holds, so that as many rounds are needed.
    """
    similarity = torch.ones(templates, 300)
    for t in range(templates):
        similarity[t, t], similarity[t, max(t - 1, 0)] = 8, 9
    valid = torch.ones(1, 300) > 0
    found = match(torch.eye(templates), similarity[None], valid)
    assert found.tolist() == [list(range(templates))]


@pytest.mark.parametrize("templates", [33, 64, 200])
@pytest.mark.parametrize("cells", [3, 40, 300])
def test_templates_that_all_want_the_same_cells_take_them_in_turn(cells: int, templates: int):
    """The best cell first; when all are taken, each is lowered by the largest similarity, once for
    every time that it was taken, so that they are taken in the same order again."""
    template, keys, valid = crowd(templates, cells)
    expected = [cells - 1 - t % cells for t in range(templates)]
    assert match(template, keys, valid).tolist() == [expected]


def test_a_cell_far_better_than_all_others_is_taken_many_times():
    """Lowered by 1 each time, a cell at 1 is better than cells at -40 for 41 templates."""
    similarity = torch.full((60, 70), -40.0)
    similarity[:, 3] = 1.0
    found = match(torch.eye(60), similarity[None], torch.ones(1, 70) > 0)
    # Template 41 finds it at -40, equal to the others, of which cell 0 is the first.
    assert found.tolist() == [[3] * 41 + [0, 1, 2, 3, *range(4, 19)]]


def test_all_candidates_are_asked_before_all_cells():
    """Twenty templates want the same cells in the same order."""
    template, keys, valid = crowd(20, 400)
    searched = Searched()
    with searched.patched:
        assert match(template, keys, valid).tolist() == [list(range(399, 379, -1))]
    assert searched.images == 0


def test_images_decided_and_not_keep_their_places():
    """All cells are searched in the images that candidates do not decide, and in no others."""
    template = normalised(1, 8, 10, seed=7)[0]
    keys = normalised(4, 8, 300, seed=8)
    keys[1] = keys[1, :, :1]  # all cells equal
    keys[3] = keys[3, :, :1]
    valid = torch.ones(4, 300) > 0
    searched = Searched()
    with searched.patched:
        cell = match(template, keys, valid)
    assert searched.images == 2
    assert cell.tolist() == slow_match(template, keys, valid)


def test_templates_that_must_search_come_late():
    """More templates than a block want the best cells; the last ones are left without candidates.

    Two of them are sure of cells of their own meanwhile.
    """
    cells, templates = 300, 80
    template = torch.stack([torch.ones(templates), torch.linspace(0, 0.1, templates)])
    template[:, [70, 75]] = torch.tensor([[0.0, 0], [1, -1]])
    keys = torch.stack([torch.linspace(1, 2, cells), torch.zeros(cells)])[None]
    keys[0, :, 7], keys[0, :, 9] = torch.tensor([0.0, 3]), torch.tensor([0.0, -3])
    limits, valid = Limits(candidates=16, slices=4, held=0, all_of=0), torch.ones(1, cells) > 0
    found = match(template, keys, valid, limits)
    assert found.tolist() == slow_match(template, keys, valid)
    assert found[0, [70, 75]].tolist() == [7, 9]


def test_numbers_that_are_none_choose_something():
    """The loss then says that they are none; padding is not a reason to stop here."""
    keys = normalised(2, 4, 300, seed=1)
    keys[1] = torch.nan
    found = match(normalised(1, 4, 5, seed=2)[0], keys, torch.ones(2, 300) > 0)
    assert found.shape == (2, 5) and 0 <= int(found.min()) <= int(found.max()) < 300


def test_by_hand():
    """The published rule on a matrix that fits on a page."""
    similarity = torch.tensor([[3.0, 9, 1, 0], [2, 8, 7, 0], [1, 6, 5, 2]])  # templates x cells
    # The peak is 9. Template 0: cell 1. Template 1: cell 2 (7; cell 1 is 8 - 9). Template 2:
    # cell 3 (2; cells 1 and 2 are 6 - 9 and 5 - 9, cell 0 is 1).
    for form in (matching.match, match):
        assert form(torch.eye(3), similarity[None], torch.ones(1, 4) > 0).tolist() == [[1, 2, 3]]


def test_nearly_equal_similarities_are_told_apart_in_double_precision():
    """Two cells whose products differ by less than single precision can add up."""
    template = torch.tensor([[1.0], [1.0], [1.0]])
    keys = torch.zeros(1, 3, 100)
    keys[0, :, 40] = torch.tensor([1.0, 2.0**-30, 0])
    keys[0, :, 70] = torch.tensor([1.0, 2.0**-30, 2.0**-31])
    for form in (matching.match, match):
        assert form(template, keys, torch.ones(1, 100) > 0).tolist() == [[70]]


@pytest.mark.parametrize(("cells", "count"), [(9024, 64), (8192, 64), (704, 5), (64, 7), (32, 32)])
def test_the_largest_are_found_block_by_block(cells: int, count: int) -> None:
    rng = np.random.default_rng(cells)
    values = rng.permutation(6 * cells).reshape(2, 3, cells).astype(np.float32)
    values[1, :, cells // 3 :] = -np.inf  # padding; fewer than count cells may be left
    found, index = largest(torch.from_numpy(values), count)
    for row, got, where in zip(
        values.reshape(-1, cells),
        found.reshape(-1, count).tolist(),
        index.reshape(-1, count).tolist(),
        strict=True,
    ):
        assert got == sorted(row.tolist(), reverse=True)[:count]
        assert [row[i] for i in where] == got and len(set(where)) == count
