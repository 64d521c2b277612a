"""Learning rates over the steps, and averaged weights, against formulas and slow twins."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from benchmarks.measure import Stopwatch, counted
from stages.rates import AveragedWeights, make_optimizer, rate_schedule


def rates(kind: str, steps: int, warmup: float, highest: tuple[float, ...] = (1.0,)) -> list[Any]:
    """The rates of all groups at every step of a training."""
    groups: Any = [{"params": [nn.Parameter(torch.zeros(1))], "lr": rate} for rate in highest]
    optimizer = torch.optim.AdamW(groups)
    schedule = rate_schedule(optimizer, kind, steps, warmup)
    found = []
    for _ in range(steps):
        found.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        if schedule is not None:
            schedule.step()
    return found


def half_cosine(start: float, end: float, share: float) -> float:
    """From start to end while the share goes from 0 to 1."""
    return end + (start - end) / 2 * (1 + math.cos(math.pi * share))


@pytest.mark.parametrize("fused", [None, True])
@pytest.mark.parametrize("kind", ["adam", "adamw"])
def test_the_optimizer_steps_as_its_paper_says(kind: str, fused: bool | None) -> None:
    """Adam's first step is the rate, against the sign; AdamW first takes rate * decay off."""
    weight = nn.Parameter(torch.tensor([2.0, -2.0]))
    optimizer = make_optimizer(kind, [{"params": [weight], "lr": 0.1}], 0.5, fused)
    weight.grad = torch.tensor([3.0, 0.01])
    optimizer.step()
    start = 2.0 if kind == "adam" else 2 * (1 - 0.1 * 0.5)
    assert weight.tolist() == pytest.approx([start - 0.1, -start - 0.1], abs=1e-5)
    (group,) = optimizer.param_groups
    assert group["fused"] is fused and group["weight_decay"] == (0.5 if kind == "adamw" else 0)


def test_onecycle_rises_to_the_rate_and_falls_to_almost_nothing() -> None:
    found = [rate for (rate,) in rates("onecycle", 21, 0.3)]
    # The highest rate is at step 0.3 * 21 - 1 = 5.3; the last step is number 20.
    for step, rate in enumerate(found):
        if step <= 5.3:
            expected = half_cosine(1 / 25, 1.0, step / 5.3)
        else:
            expected = half_cosine(1.0, 1 / 25 / 1e4, (step - 5.3) / (20 - 5.3))
        assert rate == pytest.approx(expected, rel=1e-9)


SHORT = [(2, 0.5), (4, 0.25), (10, 0.1), (100, 0.01), (2, 0.3), (10, 0.05)]


@pytest.mark.parametrize(("steps", "warmup"), SHORT)
def test_onecycle_without_a_second_step_to_rise_in_begins_at_the_rate(
    steps: int, warmup: float
) -> None:
    found = [rate for (rate,) in rates("onecycle", steps, warmup)]
    falling = [half_cosine(1.0, 1 / 25 / 1e4, k / (steps - 1)) for k in range(steps)]
    assert found == pytest.approx(falling, rel=1e-6) and found[0] == 1


def test_cosine_rises_by_equal_parts_and_falls_to_nothing() -> None:
    found = [rate for (rate,) in rates("cosine", 10, 0.4)]
    assert found[:4] == pytest.approx([0.25, 0.5, 0.75, 1.0])
    falling = [half_cosine(1.0, 0.0, k / 6) for k in range(6)]
    assert found[4:] == pytest.approx(falling)


@pytest.mark.parametrize("kind", ["onecycle", "cosine"])
def test_every_group_has_its_own_highest_rate(kind: str) -> None:
    for slow, fast in rates(kind, 12, 0.3, (3e-4, 1e-3)):
        assert slow == pytest.approx(0.3 * fast)
    frozen = [slow for slow, _ in rates(kind, 12, 0.3, (0.0, 1e-3))]
    assert frozen == [0.0] * 12


def test_constant_rates_have_no_schedule() -> None:
    assert rates("constant", 3, 0.3) == [[1.0]] * 3


@pytest.mark.parametrize("kind", ["onecycle", "cosine"])
@pytest.mark.parametrize("steps", [1, 2, 3])
@pytest.mark.parametrize("warmup", [0.01, 0.3, 0.99])
def test_short_trainings_have_finite_rates(kind: str, steps: int, warmup: float) -> None:
    assert all(0 <= rate <= 1 + 1e-9 for (rate,) in rates(kind, steps, warmup))


def test_the_average_is_that_of_a_loop() -> None:
    torch.manual_seed(0)
    module = nn.Linear(3, 2)
    average = AveragedWeights(module, 0.4)
    twin = copy.deepcopy(module.state_dict())
    for step in range(6):
        with torch.no_grad():
            for p in module.parameters():
                p.add_(torch.randn_like(p))
        average.update_parameters(module)
        # The first update copies; then (1 + n) / (10 + n): 2/11, 3/12, ... below 0.4.
        kept = 0.0 if step == 0 else min(0.4, (1 + step) / (10 + step))
        for name, value in module.state_dict().items():
            twin[name] = kept * twin[name] + (1 - kept) * value
    for name, value in average.module.state_dict().items():
        torch.testing.assert_close(value, twin[name])


def test_the_average_keeps_its_share_later() -> None:
    module = nn.Linear(1, 1)
    average = AveragedWeights(module, 0.4)
    for _ in range(100):
        average.update_parameters(module)
    before = average.module.weight.item()
    with torch.no_grad():
        module.weight += 1
    average.update_parameters(module)
    assert average.module.weight.item() == pytest.approx(before + 0.6)


def test_the_average_is_bit_by_bit_that_of_pytorch_in_fewer_calls() -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.Conv2d(3, 2, 1))

    def mean(averaged: torch.Tensor, current: torch.Tensor, steps: Any) -> torch.Tensor:
        kept = torch.clamp(torch.as_tensor((1 + steps) / (10 + steps)), max=0.3)
        return torch.lerp(averaged, current, (1 - kept).to(averaged))

    own, plain = AveragedWeights(module, 0.3), AveragedModel(module, avg_fn=mean)
    for _ in range(8):
        module(torch.randn(2, 1, 5, 5)).sum().backward()  # new statistics
        with torch.no_grad():
            for p in module.parameters():
                p.add_(torch.randn_like(p))
        with counted(Stopwatch(torch.device("cpu"))) as calls:
            own.update_parameters(module)
        plain.update_parameters(module)
        assert sum(calls.counts.values()) <= 9 + len(list(module.buffers()))  # PyTorch's: 50
        both = own.state_dict(), plain.state_dict()
        assert both[0].keys() == both[1].keys()
        assert all(torch.equal(both[0][name], both[1][name]) for name in both[0])
