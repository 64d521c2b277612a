"""How many operators a whole training step calls, and that none of them waits for a device.

On a device every call costs the host some microseconds, whatever its size, and every wait leaves
the device without work. Both can be counted on a CPU.
"""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from tiny_set import TINY, make_set

from benchmarks import measure, step
from config import Config
from config_run import open_set
from model import METHODS, build_method
from presets import PRESETS
from pscl.fast_matching import match
from stages.finetuning import Finetune, Supervised
from stages.pretraining import SelfSupervised
from utils.checkpoint import save, to_published

MOST = {  # at 64 px, views left out
    ("simclr", "fp32"): 1000,
    ("simclr", "bf16"): 1200,
    ("moco", "fp32"): 900,
    ("moco", "bf16"): 1050,
}
CASE: dict[str, Any] = {"device": "cpu", "threads": 0, "recompute": -1, "precision": "fp32"}


@pytest.mark.parametrize(("method", "precision"), MOST)
def test_every_step_calls_the_same_few_operators_and_waits_for_none(
    method: str, precision: str
) -> None:
    """At 64 px, views left out; in bf16 weights are cast on top."""
    case = {**CASE, "method": method, "precision": precision, "size": 64, "batch": 2, "steps": 2}
    counts = step.count_steps(case)
    assert [dict(count.waits) for count in counts] == [{}] * 2
    calls = {count.counts.total() - count.views.total() for count in counts}
    assert len(calls) == 1 and calls.pop() <= MOST[method, precision]


@pytest.mark.parametrize("where", ["cpu", "device", "kept on device"])
@pytest.mark.parametrize("method", ["simclr", pytest.param("moco", marks=pytest.mark.slow)])
def test_an_epoch_of_train_py_waits_once_for_its_log_line(
    method: str, where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And every step of it calls as many operators; after the first, whose Adam makes its state."""
    monkeypatch.setattr(step, "WARM_UP", 4)  # images of six steps
    config = step.config_of({"method": method, "size": 16, "batch": 4, "steps": 1}, tmp_path)
    how = {"repeats": "0", "device": "cpu", "amp": "off", "augment_on": where.split()[-1]}
    how["cache_on"] = "device" if "kept" in where else "cpu"
    stage = SelfSupervised(open_set(dataclasses.replace(config, **how).resolved())[0][0])
    stage.seed()
    stage.build()
    stage.log = Mock()
    epoch = int(stage.kept is not None)
    if epoch:  # all images come to the device in the first one
        stage.train_epoch(0, lambda: None)
    after: list[int] = []
    with measure.counted(measure.Stopwatch(torch.device("cpu"))) as calls:

        def step_done() -> None:
            after.append(calls.counts.total())
            assert not calls.waits

        stage.train_epoch(epoch, step_done)
    steps = [one - other for other, one in itertools.pairwise(after)]
    assert len(steps) >= 5 and len(set(steps)) == 1
    assert dict(calls.waits) == {"tolist": 1}


# Of an epoch of one step, with the log line: most are the network's. Views are left out: they
# start nothing on a device, and torch 2.6 has 60 more of them, such as a second ``detach`` of the
# gradient of every weight. Of others it has 3 more.
MOST_OF_LABELS = 250


@pytest.mark.parametrize("preset", ["paper", "robust"])
@pytest.mark.parametrize("kind", [Supervised, Finetune])
def test_an_epoch_of_training_with_labels_waits_once_for_its_log_line(
    kind: type[Supervised], preset: str, tmp_path: Path
) -> None:
    """And its passes, which are to be replayed on CUDA, not at all."""
    data_dir = make_set(tmp_path / "set")
    own = {**TINY, "data_dir": str(data_dir), "output_dir": str(tmp_path), "device": "cpu"}
    own |= {"num_classes": 3, "stages": kind.stage, "amp": "off"}
    if preset == "robust":  # without its averaged weights, whose count of steps stays on the CPU
        own |= {**PRESETS[preset], "fine_crop": 16, "fine_steps": 6, "fine_average": 0.0}
    if kind is Finetune:
        method = build_method("simclr", Config(**own).resolved().to_dict())
        save(tmp_path / "moco.pt", {"moco": to_published(method.state_dict())})
        own["pretrained"] = str(tmp_path / "moco.pt")
    stage = kind(open_set(Config(**own).resolved())[0][0])
    stage.seed()
    stage.build()
    stage.log = Mock()
    for group in stage.optimizer.param_groups:
        group["fused"] = True  # as on CUDA: elsewhere a number of steps is read for every weight
    stage.train_epoch(0, lambda: None)  # Adam makes its state
    (batch,) = stage.batches.epoch(1)
    watch = measure.Stopwatch(torch.device("cpu"))
    with measure.counted(watch) as passes:
        stage.optimizer.zero_grad()
        stage.passes(stage.prepared(batch))
    assert passes.counts.total() > 0 and not passes.waits
    epochs = []
    for epoch in (1, 2):
        with measure.counted(watch) as calls:
            stage.train_epoch(epoch, lambda: None)
        assert dict(calls.waits) == {"tolist": 1}
        epochs.append(calls.counts.total() - calls.views.total())
    assert epochs[0] == epochs[1] <= MOST_OF_LABELS


@pytest.mark.parametrize("method", METHODS)
def test_no_method_waits(method: str) -> None:
    case = {**CASE, "method": method, "size": 16, "batch": 2, "steps": 2}
    counts = step.count_steps(case)
    assert [dict(count.waits) for count in counts] == [{}] * 2
    assert counts[0].counts == counts[1].counts


# Views that a weight sees; with patches, a head of view k also computes the keys.
SEES = {"simclr": 3, "moco": 2, "plain-simclr": 2, "plain-moco": 1, "byol": 2, "densecl": 1}


@pytest.mark.parametrize("method", METHODS)
def test_a_weight_is_cast_once_for_each_view(method: str) -> None:
    """No more often where activations are recomputed, as far as they are by default."""
    case = {**CASE, "method": method, "precision": "bf16", "size": 16, "batch": 2, "steps": 1}
    kept, again = (step.count_steps({**case, "recompute": n})[0].casts for n in (-1, 0))
    assert sorted(kept.values()) == sorted(again.values())
    assert max(kept.values()) == SEES[method]


def test_templates_that_candidates_do_not_decide_call_nothing_more() -> None:
    """Equal cells everywhere: all are searched."""
    watch = measure.Stopwatch(torch.device("cpu"))
    template, valid = torch.randn(4, 40), torch.ones(2, 300) > 0
    found = []
    for keys in (torch.randn(2, 4, 300), torch.ones(2, 4, 300)):
        with measure.counted(watch) as calls:
            match(template, keys, valid)
        found.append(calls.counts[""])
        assert not calls.waits
    assert found[0] == found[1]


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: x.sum().item(),
        lambda x: x.tolist(),
        lambda x: x.cpu(),
        lambda x: x.numpy(),
        lambda x: x if x.sum() > 0 else -x,
        lambda x: x[x > 0],
        lambda x: x.nonzero(),
        lambda x: x.new_zeros(3).index_put_((x > 0,), x.new_ones(())),
        lambda x: float(x[0]),
        lambda x: range(x.long()[0]),
        lambda x: torch.equal(x, x),
        lambda x: torch.unique(x),
        lambda x: x.masked_select(x > 0),
    ],
)
def test_what_waits_is_noticed(wait: Any) -> None:
    with measure.counted(measure.Stopwatch(torch.device("cpu"))) as calls:
        wait(torch.arange(3.0))
    assert calls.waits.total() > 0


def test_calls_that_do_not_wait_are_let_go() -> None:
    x = torch.arange(6.0).view(2, 3)
    with measure.counted(measure.Stopwatch(torch.device("cpu"))) as calls:
        (x[torch.tensor([1, 0])].where(x > 2, 0).masked_fill(x > 4, 1).sum() * 2).add_(1)
    assert not calls.waits


def test_gradients_and_moments_lie_in_memory_as_their_parameters() -> None:
    """As PyTorch's fused Adam on a CPU takes for granted: others it would mix up in silence."""
    case = {**CASE, "method": "simclr", "size": 32, "batch": 2, "steps": 1}
    with step.prepared(case) as (method, batches, watch):
        optimizer = step.make_adam(method, watch.device)
        step.train_step(watch, method, optimizer, lambda: next(batches.epoch(0)), None)
    assert optimizer.param_groups[0]["fused"]
    for parameter, state in optimizer.state.items():
        for tensor in (parameter.grad, state["exp_avg"], state["exp_avg_sq"]):
            assert tensor is not None and tensor.stride() == parameter.stride()


def test_the_table_of_calls_counts_recomputed_ones_beside() -> None:
    case = {**CASE, "method": "plain-simclr", "size": 32, "batch": 2, "steps": 2}
    kept = step.measure_case({"kind": "calls", **case})
    again = step.measure_case({"kind": "calls", **case, "recompute": 0})
    assert kept["again"] == 0 < again["again"] and kept["calls"] == again["calls"]
    assert kept["waits"] == 0 < kept["views"] and len(kept["calls"]) == 2
