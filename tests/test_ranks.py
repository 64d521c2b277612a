"""Two processes with half a batch each compute what one process computes of the whole batch."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from rank_pool import Pool, command, pool
from tiny_set import TINY, make_set
from torch import nn

import config_run
import data
import pscl.sampling
from config import Config
from data import ANNOTATED, FINE, TRAIN, Draw
from imaging.store import ImageStore
from model import METHODS, build_method
from stages.finetuning import Supervised
from utils.commandline import UserError
from utils.device import mixed_seed
from utils.ranks import group
from utils.ranks.tensors import (
    all_ranks,
    mean_of_ranks,
    of_first_rank,
    shuffled,
    sum_gradients,
    take_first_ranks,
)

SMALL = {
    "channels": (4, 8, 16, 32),
    "hidden_dim": 16,
    "embed_dim": 8,
    "top_k": 2,
    "queue_size": 13,
    "num_classes": 3,
}
STEPS = 3


@pytest.fixture(scope="module")
def ranks() -> Iterator[Pool]:
    with pool(2) as made:
        yield made


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_set(tmp_path_factory.mktemp("ranks") / "set", size=(32, 32), train=8)


def evaluating(module: nn.Module) -> nn.Module:
    """The module in training, but for BatchNorm, which uses its running statistics."""
    module.train()
    for part in module.modules():
        if isinstance(part, nn.modules.batchnorm._BatchNorm):
            part.eval()
    return module


def by_position(template: torch.Tensor, keys: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """Takes the place of matching: cells whose choice no rounding can change."""
    return (7 * torch.arange(template.shape[1])).remainder(64).expand(len(keys), -1)


def steps(folder: Path, self_mode: str, norm: str, admit_matches: str = "all") -> dict[str, Any]:
    """Losses and gradients of every step of a training, then weights and queues.

    The first step matches patches. Later ones take them by position, since the rounding of a first
    step decides which of two equally similar patches is matched.
    """
    matching = pscl.sampling.match
    torch.manual_seed(3)
    method = build_method(self_mode, {**SMALL, "norm": norm, "admit_matches": admit_matches})
    evaluating(method)
    store = ImageStore()
    sets = [data.find_split(folder, split) for split in ("train_numf", "sup_num1_0")]
    annotated = sets[1] if METHODS[self_mode].needs_annotated else []
    views = data.TwoViewDataset(sets[0], annotated, store, num_classes=3, seed=0)
    batches = data.Batches(views, 8)
    trained = [p for p in method.parameters() if p.requires_grad]
    # Not Adam, which would make a step of the rounding of a gradient near 0.
    optimizer = torch.optim.SGD(trained, 1e-3)
    losses, gradients = [], []
    for epoch in range(STEPS):  # of one step each
        for batch in batches.epoch(epoch):
            torch.manual_seed(mixed_seed(0, epoch))
            pscl.sampling.match = by_position if epoch else matching  # type: ignore[assignment]
            found = method(batch)
            pscl.sampling.match = matching
            optimizer.zero_grad()
            found["loss"].backward()
            sum_gradients(method.parameters())
            losses.append({name: value.detach() for name, value in found.items()})
            gradients.append([p.grad.clone() for p in trained if p.grad is not None])
            optimizer.step()
    return {"losses": losses, "gradients": gradients, "state": method.state_dict()}


@pytest.mark.parametrize("norm", ["group", "batch"])
@pytest.mark.parametrize("self_mode", METHODS)
def test_two_ranks_of_four_images_equal_one_process_of_eight(
    self_mode: str, norm: str, ranks: Pool, images: Path
) -> None:
    whole = steps(images, self_mode, norm)
    first, second = ranks.run(steps, images, self_mode, norm)
    for step in range(STEPS):
        losses, own = whole["losses"][step], first["losses"][step]
        assert losses.keys() == own.keys()
        for name, value in losses.items():
            torch.testing.assert_close(own[name], value, rtol=1e-5, atol=2e-6)
        gradients, found = whole["gradients"][step], first["gradients"][step]
        assert len(gradients) == len(found)
        largest = max(float(g.abs().max()) for g in gradients)
        # Once weights differ by roundings, these may decide on which side of 0 a LeakyReLU is, and
        # so the slope of one cell: with torch 2.6, DenseCL and GroupNorm, one of up1's 8x8 is, and
        # gradients of what lies before it differ by 7e-5 of the largest, the others by 4e-7.
        most = (2e-4 if step else 2e-5) * largest
        for g, h in zip(gradients, found, strict=True):
            torch.testing.assert_close(h, g, rtol=1e-4, atol=most)
    for name, value in whole["state"].items():
        torch.testing.assert_close(first["state"][name], value, rtol=1e-4, atol=1e-5)
        assert torch.equal(first["state"][name], second["state"][name]), name
    assert [float(v["loss"]) for v in first["losses"]] == [
        float(v["loss"]) for v in second["losses"]
    ]


def test_ranks_tell_the_share_that_the_whole_batch_admits(ranks: Pool, images: Path) -> None:
    whole = steps(images, "simclr", "group", "cycle")
    first, second = ranks.run(steps, images, "simclr", "group", "cycle")
    shares = {name: value for name, value in whole["losses"][0].items() if "admitted" in name}
    assert len(shares) == 3 and any(0 < float(share) < 1 for share in shares.values())
    for name, share in shares.items():
        assert float(first["losses"][0][name]) == pytest.approx(float(share), abs=1e-6)
        assert float(second["losses"][0][name]) == pytest.approx(float(share), abs=1e-6)


def labelled_steps(folder: Path, norm: str, settings: dict[str, Any]) -> dict[str, Any]:
    """The same of a training with labels, of which some images have few."""
    values = {**TINY, "data_dir": str(folder), "output_dir": "none", "num_classes": 3, "norm": norm}
    recipe = {"stages": "sup", "data_size": "5", "class_weight": (1.0, 2.0, 5.0), "fine_clip": 0.5}
    more = {"fine_average": 0.9, "ignore_label": 255, "fine_max_epoch": STEPS}
    config = Config(**{**values, **recipe, **more, **settings}).resolved()
    stage = Supervised(config_run.open_set(config)[0][0])
    stage.seed()
    stage.build()
    evaluating(stage.module)
    stage.optimizer = torch.optim.SGD(stage.module.parameters(), 1e-2)
    losses: list[dict[str, torch.Tensor]] = []
    gradients, parts = [], []
    for epoch in range(STEPS):
        for batch in islice(stage.batches.epoch(epoch), STEPS - len(losses)):
            found = stage.losses(batch)
            stage.optimizer.zero_grad()
            found["loss"].backward()
            sum_gradients(stage.module.parameters())
            losses.append({name: value.detach() for name, value in found.items()})
            gradients.append([p.grad.clone() for p in stage.module.parameters()])  # type: ignore[union-attr]
            parts.append(len(batch["image"]))
            stage.update()
    states = {"state": stage.module.state_dict(), "average": stage.scored.state_dict()}
    return {"losses": losses, "gradients": gradients, "parts": parts, **states}


@pytest.fixture(scope="module")
def half_labelled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five annotated images: one with a single labelled row, one without labels in most crops."""
    made = make_set(tmp_path_factory.mktemp("labels") / "set", size=(32, 32))
    for number, rows in enumerate((32, 1, 32, 4, 20)):
        path = next((made / "sup_num5_0/gt").glob(f"*_{number}.png"))
        mask = np.array(Image.open(path))
        mask[rows:] = 255
        Image.fromarray(mask).save(path)
    return made


@pytest.mark.parametrize(
    ("settings", "parts"),
    [
        ({"fine_steps": STEPS, "fine_batch_size": 8, "fine_crop": 16}, ([4, 4, 4], [4, 4, 4])),
        # Five images in batches of three and two.
        ({"fine_batch_size": 3}, ([1, 1, 1], [2, 1, 2])),
        # Of four and one: the one is smaller than the ranks, which both have it.
        ({"fine_batch_size": 4}, ([2, 1, 2], [2, 1, 2])),
    ],
)
@pytest.mark.parametrize("norm", ["group", "batch"])
def test_two_ranks_learn_from_labels_as_one_process_does(
    norm: str,
    settings: dict[str, Any],
    parts: tuple[list[int], list[int]],
    ranks: Pool,
    half_labelled: Path,
) -> None:
    whole = labelled_steps(half_labelled, norm, settings)
    first, second = ranks.run(labelled_steps, half_labelled, norm, settings)
    assert (first["parts"], second["parts"]) == parts
    for step, losses in enumerate(whole["losses"]):
        for name, value in losses.items():
            torch.testing.assert_close(first["losses"][step][name], value, rtol=1e-5, atol=1e-6)
        gradients, found = whole["gradients"][step], first["gradients"][step]
        largest = max(float(g.abs().max()) for g in gradients)
        for g, h in zip(gradients, found, strict=True):
            # A rounding may decide which of two pixels is the larger one, and so where it goes.
            torch.testing.assert_close(h, g, rtol=1e-4, atol=1e-4 * largest)
    for kind in ("state", "average"):
        for name, value in whole[kind].items():
            torch.testing.assert_close(first[kind][name], value, rtol=1e-4, atol=1e-5)
            assert torch.equal(first[kind][name], second[kind][name]), name


def _rows(counts: list[int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    number = group.rank()
    rows = torch.arange(3.0 * counts[number]).view(-1, 3) + 100 * number
    rows.requires_grad_()
    whole, numbers = all_ranks(rows, torch.full((counts[number],), number))
    (whole * torch.arange(1.0, len(whole) + 1)[:, None]).sum().backward()
    assert rows.grad is not None
    return whole.detach(), numbers, rows.grad


def test_rows_come_in_the_order_of_the_ranks_with_their_gradients(ranks: Pool) -> None:
    first, second = ranks.run(_rows, [3, 2])
    expected = torch.cat([torch.arange(9.0).view(3, 3), torch.arange(6.0).view(2, 3) + 100])
    for whole, numbers, _ in (first, second):
        assert torch.equal(whole, expected) and numbers.tolist() == [0, 0, 0, 1, 1]
    assert first[2][:, 0].tolist() == [1, 2, 3] and second[2][:, 0].tolist() == [4, 5]


def _mean(values: list[list[float]]) -> tuple[float, list[float]]:
    own = torch.tensor(values[group.rank()], requires_grad=True)
    mean = mean_of_ranks(own * 1.0)
    mean.backward()
    assert own.grad is not None
    return float(mean), own.grad.tolist()


def test_a_mean_is_over_the_numbers_of_all_ranks(ranks: Pool) -> None:
    first, second = ranks.run(_mean, [[1.0, 2.0, 6.0], [11.0]])
    assert first == (5.0, [0.25, 0.25, 0.25]) and second == (5.0, [0.25])


def _weighted(values: list[float], weights: list[int]) -> tuple[float, float]:
    own = torch.tensor(values[group.rank()], requires_grad=True)
    mean = mean_of_ranks(own, torch.tensor(weights[group.rank()]))
    mean.backward()
    assert own.grad is not None
    return float(mean), float(own.grad)


def test_means_of_ranks_count_by_what_they_are_of(ranks: Pool) -> None:
    """(2 * 3 + 6 * 1) / 4; a rank without anything counts nothing, and of nothing the mean is 0."""
    assert ranks.run(_weighted, [2.0, 6.0], [3, 1]) == [(3.0, 0.75), (3.0, 0.25)]
    assert ranks.run(_weighted, [2.0, 0.0], [3, 0]) == [(2.0, 1.0), (2.0, 0.0)]
    assert ranks.run(_weighted, [0.0, 0.0], [0, 0]) == [(0.0, 0.0), (0.0, 0.0)]


def _weights() -> tuple[list[float], list[float], float]:
    torch.manual_seed(group.rank())
    layer = nn.Linear(2, 1)
    take_first_ranks(layer)
    layer(torch.full((1, 2), group.rank() + 1.0)).sum().backward()
    sum_gradients(layer.parameters())
    assert layer.weight.grad is not None
    sent = float(of_first_rank(torch.tensor(7.0 + group.rank())))
    return layer.weight.flatten().tolist(), layer.weight.grad.flatten().tolist(), sent


def test_weights_are_the_first_ranks_and_gradients_the_sum(ranks: Pool) -> None:
    first, second = ranks.run(_weights)
    assert first == second and first[1:] == ([3.0, 3.0], 7.0)


def _shuffled() -> tuple[list[float], list[float]]:
    seen: list[float] = []

    def encode(images: torch.Tensor) -> tuple[torch.Tensor]:
        seen.extend(images[:, 0, 0, 0].tolist())
        return (images.flatten(1) * 2,)

    images = torch.arange(4.0).view(4, 1, 1, 1) + 10 * group.rank()
    (found,) = shuffled(encode, images)
    return seen, found[:, 0].tolist()


def test_shuffled_images_come_back_to_their_rank(ranks: Pool) -> None:
    for _ in range(3):
        (seen, own), (others, theirs) = ranks.run(_shuffled)
        assert own == [0, 2, 4, 6] and theirs == [20, 22, 24, 26]
        assert sorted(seen + others) == [0, 1, 2, 3, 10, 11, 12, 13]
    assert seen != [0, 1, 2, 3]


def _staying() -> tuple[list[float], list[list[float]]]:
    seen: list[float] = []

    def encode(images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        seen.extend(images[:, 0, 0, 0].tolist())
        return images.flatten(1) * 2, images + 1 + group.rank()

    images = torch.arange(4.0).view(4, 1, 1, 1) + 10 * group.rank()
    images[0] = 99
    return seen, [rows.flatten().tolist() for rows in shuffled(encode, images, 1)]


def test_what_every_rank_has_is_not_shuffled(ranks: Pool) -> None:
    """Image 99 is encoded by each rank for itself, by the second one as 101."""
    for _ in range(3):
        (seen, own), (others, theirs) = ranks.run(_staying)
        assert seen[0] == others[0] == 99 and own[1][0] == 100 and theirs[1][0] == 101
        assert own[0] == [198, 2, 4, 6] and theirs[0] == [198, 22, 24, 26]
        assert sorted(seen[1:] + others[1:]) == [1, 2, 3, 11, 12, 13]


def _shuffled_method(folder: Path, self_mode: str, evaluated: bool = True) -> dict[str, Any]:
    torch.manual_seed(0)
    method = build_method(self_mode, {**SMALL, "batch_norm_ranks": "shuffle"})
    if evaluated:
        evaluating(method)
    sets = [data.find_split(folder, split) for split in ("train_numf", "sup_num1_0")]
    annotated = sets[1] if METHODS[self_mode].needs_annotated else []
    views = data.TwoViewDataset(sets[0], annotated, ImageStore(), num_classes=3, seed=0)
    (batch,) = data.Batches(views, 8).epoch(0)
    if annotated:  # one process draws no order, so the noise would be another one

        def draw_noise(shape: Sequence[int], device: torch.device) -> torch.Tensor:
            return torch.rand(tuple(shape), generator=torch.Generator().manual_seed(1))

        method.draw_noise = draw_noise  # type: ignore[assignment]
    with pytest.MonkeyPatch.context() as patch:
        if evaluated:  # no rounding is to change what is matched
            patch.setattr(pscl.sampling, "match", by_position)
        found = method(batch)
    return {name: value.detach() for name, value in found.items()} | {
        name: value for name, value in method.state_dict().items() if "queue" in name
    }


def test_shuffled_maps_are_matched_like_a_ranks_own(ranks: Pool, images: Path) -> None:
    """With statistics of their parts the ranks keep one queue, and losses that are finite."""
    first, second = ranks.run(_shuffled_method, images, "moco", False)
    assert all(torch.equal(first[name], second[name]) for name in first if "patch_up" not in name)
    assert all(value.isfinite().all() for value in first.values())


@pytest.mark.parametrize("self_mode", ["moco", "plain-moco", "densecl"])
def test_shuffling_changes_nothing_but_the_statistics(
    self_mode: str, ranks: Pool, images: Path
) -> None:
    whole = _shuffled_method(images, self_mode)
    for found in ranks.run(_shuffled_method, images, self_mode):
        for name, value in whole.items():
            torch.testing.assert_close(found[name], value, rtol=2e-5, atol=2e-6)


def _own_part(draws: list[Draw]) -> list[int]:
    return [draw.image for draw in data.part_of_rank(draws)]


def test_a_batch_is_divided_and_its_annotated_image_is_everybodys(ranks: Pool) -> None:
    others = [Draw(TRAIN, 0, n, n) for n in (5, 3, 8, 1)]
    assert ranks.run(_own_part, others) == [[5, 3], [8, 1]]
    assert ranks.run(_own_part, [Draw(ANNOTATED, 0, 0, 9), *others]) == [[9, 5, 3], [9, 8, 1]]
    assert _own_part(others) == [5, 3, 8, 1]


def test_a_batch_with_labels_is_divided_as_evenly_as_it_can(ranks: Pool) -> None:
    draws = [Draw(FINE, 0, n, n) for n in (5, 3, 8)]
    assert ranks.run(_own_part, draws) == [[5], [3, 8]]
    assert ranks.run(_own_part, draws[:1]) == [[5], [5]]
    assert _own_part(draws) == [5, 3, 8]


def _uneven() -> str:
    try:
        data.part_of_rank([Draw(TRAIN, 0, n, n) for n in range(3)])
    except ValueError as error:
        return str(error)
    return ""


def test_no_image_is_dropped_where_a_batch_does_not_divide(ranks: Pool) -> None:
    assert ranks.run(_uneven) == ["3 images do not divide among 2 ranks"] * 2


def _work() -> tuple[Any, ...]:
    before = group.rank(), group.size(), group.writes()
    result = group.by_writer(lambda: (group.rank(), group.size(), 42))
    with group.alone():
        inside = group.rank(), group.size(), group.writes(), list(group.share([1, 2, 3]))
    return before, result, inside, list(group.share([1, 2, 3])), group.gather_objects(before[0])


def test_rank_0_works_for_all_and_each_can_be_alone(ranks: Pool) -> None:
    first, second = ranks.run(_work)
    alone = (0, 1, True, [1, 2, 3])
    assert first == ((0, 2, True), (0, 1, 42), alone, [1, 3], [0, 1])
    assert second == ((1, 2, False), (0, 1, 42), alone, [2], [0, 1])
    assert _work() == ((0, 1, True), (0, 1, 42), alone, [1, 2, 3], [0])


def _hang(pid_file: Path) -> int:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    pid_file.write_text(str(os.getpid()))
    time.sleep(600)
    return 0


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_a_rank_that_hangs_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It hears no signal that it can ignore, and would outlive the tests."""
    monkeypatch.setattr("rank_pool.PATIENCE", 2)
    files = [tmp_path / name for name in "ab"]
    with pytest.raises(AssertionError, match="a rank hangs"):
        command(_hang, [(file,) for file in files])
    started = [int(text) for file in files if file.exists() and (text := file.read_text())]
    assert started and not any(_alive(pid) for pid in started)


LEFT = """
import os, sys, threading, time
from pathlib import Path
sys.path[:0] = [{tests!r}, {root!r}]
import test_ranks

if __name__ == "__main__":
    files = [Path("a"), Path("b")]
    words = (test_ranks._hang, [(file,) for file in files])
    threading.Thread(target=test_ranks.command, args=words, daemon=True).start()
    while not all(file.exists() and file.read_text() for file in files):
        time.sleep(0.05)
    os._exit(0)  # as pytest-timeout ends a process
"""


@pytest.mark.slow  # seconds: 10, a process that starts a server of ranks
def test_ranks_end_with_the_process_that_started_them(tmp_path: Path) -> None:
    tests = Path(__file__).parent
    code = LEFT.format(tests=str(tests), root=str(tests.parent))
    (tmp_path / "left.py").write_text(code)
    subprocess.run([sys.executable, "left.py"], cwd=tmp_path, check=True, timeout=200)
    until = time.monotonic() + 60
    left = {int((tmp_path / name).read_text()) for name in "ab"}
    while any(_alive(pid) for pid in left) and time.monotonic() < until:
        time.sleep(0.05)
    assert [pid for pid in left if _alive(pid)] == []


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("cuda:1", "--device: found cuda:1 with 2 ranks; give cuda, cpu or auto"),
        ("mps", "--device: found mps with 2 ranks; give cuda, cpu or auto"),
        ("auto", r"1 GPU\(s\) for process 1 of this machine; give torchrun --nproc_per_node 1"),
    ],
)
def test_every_rank_has_a_device_of_its_own(
    name: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(group, "_group", SimpleNamespace(rank=1, size=2, alone=0))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert group.own_device("cpu") == "cpu"
    with pytest.raises(UserError, match=said):
        group.own_device(name)
    chosen: list[int] = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    assert group.own_device("auto") == group.own_device("cuda") == "cuda:1" and chosen == [1, 1]


def test_ranks_of_a_machine_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    assert group.on_this_machine() == 1
    monkeypatch.setattr(group, "_group", SimpleNamespace(rank=1, size=8, alone=0))
    assert group.on_this_machine() == 8 and group.names_ranks() == ", 8 ranks"
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert group.on_this_machine() == 4 and not group.shows_progress()


def test_for_one_process_everything_is_the_identity() -> None:
    x = torch.randn(3, 2, requires_grad=True)
    assert all_ranks(x, x)[1] is x and of_first_rank(x) is x
    scalar = x.sum()
    assert mean_of_ranks(scalar) is scalar and torch.equal(mean_of_ranks(x), x.mean())
    with group.joined(), group.agreed(), contextlib.suppress(RuntimeError):
        group.meet()
    assert group.names_ranks() == "" and group.own_device("cuda:3") == "cuda:3"
