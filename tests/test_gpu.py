"""What the script for a GPU reports, without one."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import torch

from benchmarks import gpu, gpu_speed, measure

CPU = torch.device("cpu")


def test_busy_is_the_union_of_what_the_device_did() -> None:
    """Of 0-10, 5-12, 6-8 and 20-21 thousandths of a second, 13 are busy."""

    def event(
        name: str, start: int, end: int, on_device: bool = True, *, named: bool = False
    ) -> Any:
        kind = torch.autograd.DeviceType.CUDA if on_device else torch.autograd.DeviceType.CPU
        span = SimpleNamespace(start=1000 * start, end=1000 * end)
        about = {"name": name, "device_type": kind, "is_user_annotation": named}
        return SimpleNamespace(time_range=span, **about)

    launches = [event("cudaLaunchKernel", n, n + 1, on_device=False) for n in range(3)]
    works = [event("gemm", 5, 12), event("Memcpy", 0, 10), event("add", 6, 8), event("mul", 20, 21)]
    step = event("Optimizer.step#Adam.step", 0, 30, named=True)  # a name for a span, gaps included
    assert gpu_speed.busy([*launches, *works, step]) == (13, 3)


def test_matches_are_compared_with_the_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [row["right"] for row in gpu.check_matching(CPU, quick=True)] == ["True", "True"]
    monkeypatch.setattr(gpu, "match", lambda t, k, v: torch.zeros(2, t.shape[1]).long())
    assert [row["right"] for row in gpu.check_matching(CPU, quick=True)] == ["False", "False"]


def test_what_waits_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with gpu.waiting_refused(CPU) as names:
        torch.ones(1).item()
    assert "item" in names

    def refused(mode: str) -> None:
        monkeypatch.setattr(torch.cuda, "mode", mode, raising=False)

    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", refused)

    def wait() -> None:
        assert torch.cuda.mode == "error"
        raise RuntimeError("called a synchronizing CUDA operation\nat ...")

    with gpu.waiting_refused(torch.device("cuda")) as names:
        wait()
    assert names == ["called a synchronizing CUDA operation"] and torch.cuda.mode == "default"


@pytest.mark.slow
def test_the_same_losses_are_no_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "METHODS", ["simclr"])
    rows = gpu.check_losses(CPU, 16)
    assert [(row["found"], row["right"]) for row in rows] == [(0, "True")] * 3


def test_a_step_is_timed_without_a_gpu_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_speed, "WARM_UP", 1)
    row = gpu_speed.measure_speed("simclr", 16, "bf16", CPU, 1)
    assert row["ms"] > 0 and row["GiB"] > 0 and "launches" not in row


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_rehearsal_goes_through_everything(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert gpu.main(["--device", "cpu", "--quick", "--json"]) == 0
    found = json.loads(capfd.readouterr().out)
    assert found["failed"] == found["left_out"] == []
    assert [row for row in found["checks"] if row["right"] != "True"] == []
    assert measure.table(found["speed"]) and measure.table(found["labels"])
    assert {row["waits"] for row in found["train"]} == {"none"} and found["deterministic"]
    norms = [row for row in found["checks"] if row["check"].startswith("BatchNorm")]
    assert len(norms) == (4 if importlib.util.find_spec("triton") else 0)
    assert [row["other bytes"] for row in found["predicted"]] == [0] * 4 and found["at_once"]


@pytest.mark.slow
def test_the_norm_kernel_is_checked_without_a_gpu_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the interpreter, in a process of its own; here it would be told that nothing is right."""
    pytest.importorskip("triton")
    rows = gpu.check_norm_of_many_rows(CPU)
    assert [row["right"] for row in rows] == ["True"] * 4 and "TRITON_INTERPRET" not in os.environ
    batch_norm = importlib.import_module("utils.cuda.batch_norm")
    asked = Mock(side_effect=RuntimeError("its numbers differ"))
    monkeypatch.setattr(batch_norm, "check", asked)
    rows = gpu.norm_of_rows(CPU, [(8, 2)])
    assert [row["right"] for row in rows] == ["False"] * 2 and "numbers differ" in rows[0]["check"]
    assert asked.call_args.args[2:] == (((8, 2),), batch_norm.PROGRAMS)


def test_weights_that_are_not_finite_are_to_be_found(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [row["found"] for row in gpu.check_finite(CPU)] == [0]
    monkeypatch.setattr(gpu, "all_finite", lambda module: True)
    assert [row["found"] for row in gpu.check_finite(CPU)] == [9]


@pytest.mark.slow
def test_losses_of_two_sizes_are_compared_with_and_without_graphs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(gpu, "OURS", ["simclr"])
    assert [row["found"] for row in gpu.check_two_shapes(CPU, 16)] == [0, 0]
    train, sizes = gpu.train, list[int]()

    def disturbed(method: Any, batches: Any, *more: Any, graphs: bool, made: Any) -> Any:
        sizes.extend(batch["view_q"].shape[-1] for batch in batches)
        for loss in train(method, batches, *more, graphs=graphs, made=made):
            yield loss * (1 + graphs / 100)

    monkeypatch.setattr(gpu, "train", disturbed)
    losses, _ = gpu.check_two_shapes(CPU, 16)
    assert losses["found"] == pytest.approx(0.01, rel=1e-4) and losses["right"] == "False"
    assert sizes == [16, 24] * 10


@pytest.mark.slow
def test_losses_with_labels_are_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [row["found"] for row in gpu.check_labels(CPU, 16)] == [0, 0, 0]
    calls, with_labels = iter(range(4)), gpu.with_labels

    def another_network(*given: Any) -> Any:
        stage = with_labels(*given)
        if next(calls) % 2:  # the device's
            with torch.no_grad():
                list(stage.module.parameters())[-1].add_(torch.tensor([0.1, 0, 0, 0]))
        return stage

    monkeypatch.setattr(gpu, "with_labels", another_network)
    assert [row["right"] for row in gpu.check_labels(CPU, 16)] == ["False"] * 3


def test_what_waits_within_an_epoch_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measure.draw_set(tmp_path / "set", 16, 4, num_classes=4)
    stage = gpu_speed.with_labels(tmp_path, CPU, "paper")
    for group in stage.optimizer.param_groups:
        group["fused"] = True  # as on CUDA
    assert gpu_speed.measure_epochs(stage, 1)["waits"] == "none"
    update = stage.update

    def waiting() -> None:
        update()
        next(stage.module.parameters()).isfinite().all().tolist()

    monkeypatch.setattr(stage, "update", waiting)
    assert gpu_speed.measure_epochs(stage, 1)["waits"] == "tolist"


def test_views_finished_here_are_the_cpus() -> None:
    views, labels = gpu.check_views(CPU, 32)
    assert views["right"] == labels["right"] == "True"
    assert 0 < views["found"] < 1e-3 and labels["found"] < 1e-3


def test_images_that_stay_are_the_uploaded_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    pixels, waits = gpu.check_kept(CPU, 32)
    assert (pixels["found"], waits["found"]) == (0, 0)
    monkeypatch.setattr(gpu.KeptImages, "_fill", lambda self, file: self.pixels.zero_())
    pixels, _ = gpu.check_kept(CPU, 32)
    assert pixels["right"] == "False"


def test_a_second_run_of_the_same_numbers_has_the_same_bits(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(gpu, "METHODS", ["plain-simclr"])
    assert [row["found"] for row in gpu.check_deterministic(CPU, 16)] == [0, 0]
    seeds = iter(range(99))
    monkeypatch.setattr(
        torch, "manual_seed", lambda seed: torch.random.default_generator.manual_seed(next(seeds))
    )
    assert all(row["found"] > 0 for row in gpu.check_deterministic(CPU, 16))


def test_patches_may_differ_where_two_cells_are_equally_similar() -> None:
    """Cells 0 and 1 are alike, 2 is not; templates after the first that differs do not count."""
    template, valid = torch.ones(1, 2), torch.ones(1, 3) > 0
    keys = torch.tensor([[[1.0, 1.0 + 1e-6, 0.5]]])
    for found, wrong in (([0, 1], 0), ([1, 0], 0), ([1, 2], 0), ([2, 1], 1), ([0, 2], 1)):
        cells = [torch.tensor([each]) for each in ([0, 1], found)]
        assert gpu.elsewhere(template, keys, valid, *cells) == wrong, found


def test_patches_of_a_device_are_the_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [row["found"] for row in gpu.check_positions(CPU, 16)] == [0, 0]
    calls = iter(range(99))

    def wrong_at_second(*given: Any) -> Any:  # the device comes after the CPU
        cells = match(*given)
        return cells if next(calls) % 6 < 3 else cells.flip(1)

    match = gpu.match
    monkeypatch.setattr(gpu, "match", wrong_at_second)
    assert all(row["found"] > 0 for row in gpu.check_positions(CPU, 16))


def test_going_on_elsewhere_changes_nothing_on_the_same_device(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(gpu, "METHODS", ["plain-moco"])
    assert [row["found"] for row in gpu.check_resumed(CPU, 16)] == [0, 0]


def test_bf16_is_compared_with_the_spread_of_seeds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seeds give 1, 2 and 4; bf16 adds 1.5: half a spread."""
    monkeypatch.setattr(gpu, "OURS", ["simclr"])
    monkeypatch.setattr(gpu, "method_on", lambda name, device, seed: [1.0, 2.0, 4.0][seed])

    def train(loss: float, batches: Any, device: Any, dtype: Any) -> list[torch.Tensor]:
        return [torch.tensor(9.0), torch.tensor(loss + (1.5 if dtype else 0.0))]

    monkeypatch.setattr(gpu, "train", train)
    (row,) = gpu.check_bf16(CPU, 16, 2)
    assert row["found"] == pytest.approx(0.5) and row["right"] == "True"


def test_a_part_that_fails_or_comes_too_late_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(size: int) -> None:
        raise RuntimeError("out of memory\nat ...")

    def right() -> Any:
        return [gpu.verdict("all", 0, 0)]

    parts = [("speed", partial(refused, 3)), ("checks", partial(right))]
    monkeypatch.setattr(gpu, "parts_of", lambda given: iter(parts))
    found = gpu.report(SimpleNamespace(minutes=9))
    assert found["failed"] == [{"failed": "refused 3", "why": "RuntimeError: out of memory"}]
    assert len(found["checks"]) == 1 and found["left_out"] == []
    found = gpu.report(SimpleNamespace(minutes=-1))
    assert [row["left out, for want of time"] for row in found["left_out"]] == [
        "refused 3",
        "right",
    ]
