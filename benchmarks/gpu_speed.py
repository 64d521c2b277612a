"""How fast a GPU is: steps, train.py, training with labels, prediction. Used by gpu.py."""

from __future__ import annotations

import argparse
import gc
import itertools
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import torch
from torch import Tensor

from benchmarks import measure, prediction
from benchmarks.measure import Result
from benchmarks.step import PRECISIONS, make_adam
from config import Config
from config_run import open_set
from data import Batch, finish_views
from metallography.tiling import DEFAULT_TILE
from methods import Method
from model import build_method
from stages.finetuning import Supervised
from stages.job import Runner
from stages.presets import read_config
from stages.pretraining import SelfSupervised
from utils.cuda.step_graph import StepGraphs
from utils.device import arithmetic, on_device, precision

WARM_UP, PROFILED = 5, 3


def batches_for(method: str, size: int, batch: int, steps: int, folder: Path) -> list[Batch]:
    """Batches of drawn images, made before anything is timed; views are finished on the device."""
    measure.draw_set(folder, size, batch * steps, num_classes=4)
    batches = measure.batches_of(
        Config(data_dir=str(folder), self_mode=method, self_batch_size=batch)
    )
    batches.dataset.unfinished = True  # type: ignore[union-attr]
    return list(batches.epoch(0))


def method_on(name: str, device: torch.device, seed: int = 0) -> Method:
    """A method with the default settings, the same numbers on every device."""
    torch.manual_seed(seed)
    method = build_method(name, {**Config().to_dict(), "recompute": 0})
    method.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    return method


def train(
    method: Method,
    batches: Sequence[Batch],
    device: torch.device,
    dtype: torch.dtype | None,
    optimizer: torch.optim.Optimizer | None = None,
    *,
    graphs: bool = True,
    made: list[StepGraphs] | None = None,
) -> Iterator[Tensor]:
    """Train step by step as the engine does; gives the losses, which nobody waits for.

    Batches may be those of ``plans``. ``graphs`` as with ``--cuda_graphs``; they come into
    ``made``.
    """
    optimizer, replayed = optimizer or make_adam(method, device), graphs and device.type == "cuda"

    def passes(batch: dict[str, Any]) -> dict[str, Tensor]:
        with precision(dtype, device):
            losses = method(batch)
        losses["loss"].backward()
        return {name: loss.detach() for name, loss in losses.items()}

    run = StepGraphs(passes, method) if replayed else passes
    if made is not None and isinstance(run, StepGraphs):
        made.append(run)
    for batch in on_device(batches, device):
        planned = batch
        if "geometry" in batch:
            planned = method.planned(finish_views(batch, 4), fixed=replayed)
        optimizer.zero_grad()
        losses = run(planned)
        optimizer.step()
        yield losses["loss"].clone()


@contextmanager
def waiting_refused(device: torch.device) -> Iterator[list[str]]:
    """What waits is an error on CUDA; elsewhere its names are gathered."""
    names: list[str] = []
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield names
        except RuntimeError as error:
            names.append(str(error).splitlines()[0])
        finally:
            torch.cuda.set_sync_debug_mode("default")
        return
    with measure.counted(measure.Stopwatch(device)) as calls:
        yield names
    names += list(calls.waits)


def waits_of_epoch(stage: Runner, epoch: int) -> str:
    """What waits for the device in the steps of an epoch, before its log line; 'none'.

    On a CPU this counts what is the host's own, too: Adam's number of steps where Adam is not
    fused, that of averaged weights.
    """
    left = len(stage.batches)
    with ExitStack() as stack:
        names = stack.enter_context(waiting_refused(stage.device))

        def step_done() -> None:
            nonlocal left
            left -= 1
            if not left:  # the log line reads the numbers of the epoch
                stack.close()

        stage.train_epoch(epoch, step_done)
    return ", ".join(names) or "none"


def busy(events: Sequence[Any]) -> tuple[float, int]:
    """Milliseconds in which the device did something, and the number of launches, of a profile."""
    spans = sorted(
        (e.time_range.start, e.time_range.end)
        for e in events
        if e.device_type == torch.autograd.DeviceType.CUDA and not e.is_user_annotation
    )
    total, until = 0.0, float("-inf")
    for start, end in spans:
        total += max(0.0, end - max(start, until))
        until = max(until, end)
    launches = sum("LaunchKernel" in e.name for e in events)
    return total / 1000, launches


def measure_speed(
    name: str,
    size: int,
    how: str,
    device: torch.device,
    steps: int,
    *,
    graphs: bool = True,
    deterministic: bool = False,
) -> Result:
    """A row of ``speed``: whole steps, nothing waiting between them; ``first s`` are the warm-up's.

    ``graphs`` as with ``--cuda_graphs``; the row says whether there was one.
    """
    with arithmetic(PRECISIONS[how], deterministic):
        return _measure_speed(name, size, how, device, steps, graphs)


def _measure_speed(
    name: str, size: int, how: str, device: torch.device, steps: int, graphs: bool
) -> Result:
    with tempfile.TemporaryDirectory() as folder:
        batches = batches_for(name, size, 8, WARM_UP + steps + PROFILED, Path(folder))
    if device.type == "cuda":
        gc.collect()  # what earlier parts left in cycles of references, and blocks that were freed
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    method, start = method_on(name, device), measure.now(device)
    made: list[StepGraphs] = []
    running = train(method, batches, device, PRECISIONS[how], graphs=graphs, made=made)
    for _ in itertools.islice(running, WARM_UP):
        pass
    first, start = measure.now(device) - start, measure.now(device)
    for _ in itertools.islice(running, steps):
        pass
    milliseconds = 1000 * (measure.now(device) - start) / steps
    row: Result = {"method": name, "size": size, "precision": how}
    row["graphs"] = str(any(run.recordings for run in made))
    row["ms"] = milliseconds
    row["first s"] = first
    row["GiB"] = measure.peak_megabytes(device) / 1024
    if device.type != "cuda":
        return row
    row["GiB reserved"] = torch.cuda.max_memory_reserved(device) / 2**30
    kinds = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=kinds) as profile:
        for _ in itertools.islice(running, PROFILED):
            pass
        measure.now(device)
    milliseconds_busy, launches = busy(list(profile.events()))
    row |= {"busy ms": milliseconds_busy / PROFILED, "launches": launches / PROFILED}
    return row | {"busy": row["busy ms"] / milliseconds}


def measure_epochs(stage: Runner, epochs: int) -> Result:
    """Milliseconds of a step in the stage's own epochs, and what waits in one more of them.

    Before them are two epochs in which kernels and images come to the device.
    """
    stage.log, stage.saved_at = Mock(), float("inf")  # no state is due, which would be waited for
    with stage.preparing(0, 3 + epochs):
        stage.train_epoch(0, lambda: None)
        stage.train_epoch(1, lambda: None)
        start = measure.now(stage.device)
        for epoch in range(2, 2 + epochs):
            stage.train_epoch(epoch, lambda: None)
        seconds = measure.now(stage.device) - start
        waits = waits_of_epoch(stage, 2 + epochs)
    ms = 1000 * seconds / (epochs * len(stage.batches))
    return {"ms a step": ms, "graphs": has_graphs(stage), "waits": waits}


def measure_train(
    name: str, size: int, device: torch.device, epochs: int, cache_on: str = "auto"
) -> Result:
    """Milliseconds of a step of train.py: from the images to the log line, in the stage itself."""
    with tempfile.TemporaryDirectory() as folder:
        measure.draw_set(Path(folder) / "set", size, 80, num_classes=4)
        how: dict[str, Any] = {"device": str(device), "repeats": "0", "cache_on": cache_on}
        how |= {"data_dir": f"{folder}/set", "output_dir": folder, "self_mode": name}
        stage = SelfSupervised(open_set(Config(**how).resolved())[0][0])
        stage.seed()
        stage.build()
        found = measure_epochs(stage, epochs)
    return {"train.py": name, "size": size, "cache_on": cache_on, **found}


def has_graphs(stage: Runner) -> str:
    """Whether the steps of a stage were replayed, and not only meant to be."""
    return str(bool(stage.graphs and stage.graphs.recordings))


def with_labels(folder: Path, device: torch.device, preset: str, more: str = "") -> Supervised:
    """The stage of training with labels on the set of a folder, as of train.py's command line."""
    words = f"-stages sup --preset {preset} --data_dir {folder}/set --repeats 0 {more}"
    config = read_config(f"{words} --output_dir {folder} --device {device}".split())[0]
    stage = Supervised(open_set(config.resolved())[0][0])
    stage.seed()
    stage.build()
    return stage


def measure_labels(device: torch.device, size: int, steps: int) -> list[Result]:
    """Training on one image with labels, of the paper and of robust, and evaluation."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        measure.draw_set(Path(folder) / "set", size, 48, num_classes=4)
        for preset in ("paper", "robust"):
            stage = with_labels(Path(folder), device, preset)
            row = {"with labels": preset, "size": size, **measure_epochs(stage, steps)}
            stage.evaluate(0)
            start = measure.now(device)
            stage.evaluate(0)
            seconds = measure.now(device) - start
            rows.append(row | {"evaluation, ms an image": 1000 * seconds / len(stage.test)})
    return rows


def predicting(device: torch.device, quick: bool) -> argparse.Namespace:
    """The options of ``benchmarks/prediction.py``: 200 small images and a large one."""
    images, size, large = (3, 32, 320) if quick else (200, 200, 4000)
    given = argparse.Namespace(images=images, size=size, large=large, rounds=1)
    given.device, given.tile, given.channels = str(device), DEFAULT_TILE, Config().channels
    return given


def measure_folders(device: torch.device, quick: bool) -> list[Result]:
    """Folders predicted, as predict.py does and one thing after the other."""
    return prediction.folders(predicting(device, quick))


def measure_at_once(device: torch.device, quick: bool) -> list[Result]:
    """The network on several small images at a time."""
    return prediction.at_once(predicting(device, quick))


def deterministic_cost(device: torch.device, size: int, steps: int) -> Result:
    """A row of ``speed`` with ``--deterministic``."""
    row = measure_speed("simclr", size, "bf16", device, steps, deterministic=True)
    return {"deterministic": "yes", **row}
