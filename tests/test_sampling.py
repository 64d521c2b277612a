"""Choosing and matching patches against the published program and slow twins with plain loops."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pscl.geometry import ViewGeometry, correspond
from pscl.sampling import (
    VOTES,
    Patches,
    agreed,
    choose,
    found_again,
    label_at,
    sample_patches,
    sureness,
)
from tests.golden_files import Golden
from tests.test_matching import generator, normalised, slow_match

SEEDS = st.integers(0, 2**31)


# --- the published program ------------------------------------------------------------------------

CASES = ("rare_and_absent_class", "not_label_guided", "more_templates_than_positions")


@pytest.mark.parametrize("case", CASES)
def test_published_indices(case: str):
    golden = Golden("sampling_cases")
    views = golden.geometry(f"{case}/")
    label = golden[f"{case}/in/y_sup"][0]
    if not golden[f"{case}/in/label_guided"]:
        label = torch.zeros_like(label)
    for number, factor in enumerate((4, 2, 1), start=1):
        side = label.shape[-1] // factor
        features = golden[f"{case}/in/k_scale{number}"]  # (B, D, H*W)
        places = correspond(views, side, side)
        found = sample_patches(
            features.gather(2, places.key[:, None].expand(-1, features.shape[1], -1)),
            places,
            label_at(label, views[0], side, side),
            golden[f"{case}/in/noise_scale{number}"],
            int(golden[f"{case}/in/top_k"]) * 4 // factor,
        )
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


def test_of_equally_pure_cells_the_first_are_chosen():
    """By hand: 255 and 254.9 occur often; later classes see the first one's cells lowered."""
    label = torch.tensor([[254.0, 255.0, 255.0, 0.0, 255.0, 254.0], [0.0] * 6])
    index, _ = choose(label, torch.zeros(2, 6), 4)
    assert index.tolist() == [[1, 2, 4, 0], [3, 5, 0, 1]]
    many = torch.full((1, 5000), 255.0)
    assert choose(many, torch.zeros(1, 5000), 70)[0].tolist() == [list(range(70))]


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


@pytest.mark.parametrize(("cells", "negative"), [(12, False), (11, True)])
def test_purity_is_negative_only_where_cells_have_to_be_taken_again(cells: int, negative: bool):
    """Three classes that take four each: of 12 cells none twice, of 11 one, at a loss of 255."""
    torch.manual_seed(0)
    classes = torch.arange(cells) % 3
    label = 255.0 * (classes == torch.arange(3)[:, None])
    _, purity = choose(label, torch.rand(3, cells), 4)
    assert bool((purity < 0).any()) is negative


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
    patches = sample_patches(keys, places, label, noise, templates)

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
        patches = sample_patches(keys, places, on_cells, noise, 5)
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
    patches = sample_patches(keys, places, label, torch.rand(4, own), 6)
    assert torch.equal(patches.query, patches.query[:1].expand(3, -1))
    assert torch.equal(patches.key, patches.key[:1].expand(3, -1))


def test_a_patch_is_agreed_on_where_its_class_has_most_of_its_cell():
    """Two classes, a map of 2x2 cells of 2x2 pixels; class 1 fills 4, 3, 1, 0 pixels of them."""
    ones = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0], [1, 0, 0, 0], [0, 0, 0, 0]])
    seen = 255 * torch.stack([1 - ones, ones])[None].float().repeat(2, 1, 1, 1)
    cells = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3]] * 2)  # all cells for both classes
    patches = Patches(cells, cells, torch.full((2, 4), 0.25))
    # Antialiasing lets neighbours weigh in, which changes no majority here.
    found = agreed(patches, seen, 2, 2)
    assert found[0].all()  # the annotated image's own
    assert found[1].tolist() == [[False, False, True, True], [True, True, False, False]]


def test_how_sure_a_match_is_by_loops():
    rand = torch.Generator().manual_seed(2)
    batch, classes, templates, dims, cells = 3, 3, 2, 4, 12
    keys = torch.randn(batch, dims, classes * templates, generator=rand)
    annotated = torch.randn(dims, cells + 2, generator=rand) * 10
    valid = torch.arange(cells + 2) < cells - 1
    label = torch.zeros(classes, cells)
    label[torch.arange(cells) % 2, torch.arange(cells)] = 200.0  # class 2 has no cell
    label[:, 3] = 100.0  # of nobody
    found = sureness(keys, annotated, valid, label)
    assert found.shape == (batch, classes, templates)
    usable = [p for p in range(cells - 1) if p != 3]
    for image, own, number in itertools.product(range(batch), range(classes), range(templates)):
        key = keys[image, :, own * templates + number]
        sides = []
        for same in (True, False):
            cosine = [
                float(key @ annotated[:, p] / key.norm() / annotated[:, p].norm())
                for p in usable
                if (p % 2 == own) is same
            ]
            nearest = (sorted(cosine, reverse=True) + [-1.0] * VOTES)[:VOTES]
            sides.append(sum(nearest) / VOTES)
        assert float(found[image, own, number]) == pytest.approx(sides[0] - sides[1], abs=1e-5)


def test_a_patch_is_found_again_if_its_nearest_annotated_cells_show_its_class():
    """Cell by cell, from the rule: valid cells alone, by cosine, more than half of a class."""
    rand = torch.Generator().manual_seed(3)
    batch, classes, templates, dims, cells = 3, 3, 4, 2, 40
    keys = torch.randn(batch, dims, classes * templates, generator=rand)
    annotated = torch.randn(dims, cells + 5, generator=rand) * 10
    shares = 255 * torch.rand(cells, generator=rand) ** 0.2  # nearly all more than half
    label = torch.zeros(classes, cells)
    sector = (torch.atan2(annotated[1], annotated[0])[:cells] + math.pi) / (2 * math.pi)
    label[(sector * classes).long().clamp(max=classes - 1), torch.arange(cells)] = shares
    valid = torch.arange(cells + 5) < cells - 3
    found = found_again(keys, annotated, valid, label)
    assert found[0].all()  # the annotated image's own
    for image in range(1, batch):
        for patch in range(classes * templates):
            key = keys[image, :, patch]
            cosine = {
                p: float(key @ annotated[:, p] / key.norm() / annotated[:, p].norm())
                for p in range(cells - 3)
            }
            nearest = sorted(cosine, key=lambda p: -cosine[p])[:VOTES]
            own = patch // templates
            expected = all(label[own, p] > 127.5 for p in nearest)
            assert found[image].flatten()[patch] == expected
    assert 0 < found[1:].float().mean() < 1
