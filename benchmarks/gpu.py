"""Everything that only a GPU can show, in one go: right, never waiting, how fast, how busy.

    python benchmarks/gpu.py --json > gpu.json       # some minutes on a card
    python benchmarks/gpu.py --device cpu --quick    # a rehearsal

Every row of ``checks`` has what was found, what is wanted and whether it is so. ``speed`` has the
milliseconds of a step, what the device did in it, and its memory; ``train`` those of train.py;
``predicted`` and ``at_once`` are ``benchmarks/prediction.py``'s. A part that fails is named in
``failed`` and the others go on; what would begin after ``--minutes`` is named in ``left_out``.
"""

from __future__ import annotations

import argparse
import copy
import io
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # when it is run as a script

import utils  # noqa: E402, F401  first: Ctrl-C while the others load is one line

# isort: split
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import measure, prediction
from benchmarks.measure import Result
from benchmarks.step import PRECISIONS, make_adam
from config import Config
from data import STD, Batch, finish_views
from metallography.tiling import DEFAULT_TILE
from model import METHODS, Method, build_method
from networks import UNet, compile_norms
from pscl import matching, sampling
from pscl.fast_matching import match
from pscl.losses import supervised_loss
from stages.kept_images import KeptImages
from utils.device import arithmetic, choose_device, on_device, precision, to_device

ROOT = Path(__file__).resolve().parents[1]
OURS = ("simclr", "moco")
WARM_UP, PROFILED = 5, 3
CPU = torch.device("cpu")
Matched = tuple[Tensor, Tensor, Tensor, Tensor]  # what ``match`` was given, and what it gave


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
) -> Iterator[Tensor]:
    """Train step by step as the engine does; gives the losses, which nobody waits for."""
    optimizer = optimizer or make_adam(method, device)
    for batch in on_device(batches, device):
        with precision(dtype, device):
            loss = method(finish_views(batch, 4))["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        yield loss.detach()


def verdict(check: str, found: float, most: float) -> Result:
    """A row of ``checks``: wanted is ``most`` at most."""
    return {"check": check, "found": found, "at most": most, "right": str(found <= most)}


def check_matching(device: torch.device, quick: bool) -> list[Result]:
    """Templates of the size of training whose cell is not that of the plain rule on the CPU."""
    rows = []
    for templates, cells in ((64, 1000), (48, 5000)) if quick else ((64, 112896), (480, 16384)):
        random = torch.Generator().manual_seed(templates)
        keys = F.normalize(torch.randn(2, cells, 33, generator=random), dim=2).transpose(1, 2)
        template = F.normalize(torch.randn(33, templates, generator=random), dim=0)
        keys[1, :, : cells // 2] = keys[1, :, :1]  # of equals, candidates do not decide
        valid = torch.arange(cells) < torch.tensor([[cells], [cells - cells // 5]])
        plain = matching.match(template, keys, valid)
        found = match(template.to(device), keys.to(device), valid.to(device)).cpu()
        wrong = int((found != plain).sum())
        rows.append(verdict(f"matches unlike the rule's, {templates} of {cells}", wrong, 0))
    return rows


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


def check_waits(device: torch.device) -> list[Result]:
    """Whether three steps of each method wait for the device anywhere."""
    rows = []
    for name in METHODS:
        with tempfile.TemporaryDirectory() as folder:
            batches = batches_for(name, 64, 2, 4, Path(folder))
        steps = train(method_on(name, device), batches, device, None)
        next(steps)  # kernels are compiled, Adam makes its state
        with waiting_refused(device) as names:
            for _ in steps:
                pass
        said = f" ({names[0]})" if names else ""
        rows.append(verdict(f"{name} waits for the device{said}", len(names), 0))
    return rows


def first_losses(method: Method, batches: Sequence[Batch], device: torch.device) -> Tensor:
    """The losses of training on these batches in single precision, without TF32; on the CPU."""
    torch.manual_seed(1)
    with arithmetic(None, deterministic=False):
        steps = list(train(method, copy.deepcopy(batches), device, None))
    return torch.stack(steps).cpu().double()


def difference(one: Tensor, other: Tensor) -> float:
    """The largest relative difference of losses."""
    return float(((one - other) / one).abs().max())


def check_losses(device: torch.device, size: int) -> list[Result]:
    """Relative difference of the first three losses from the CPU's, single precision, no TF32."""
    rows = []
    for name in METHODS:
        with tempfile.TemporaryDirectory() as folder:
            batches = batches_for(name, size, 4, 3, Path(folder))
        cpu, own = (first_losses(method_on(name, at), batches, at) for at in (CPU, device))
        found = difference(cpu, own)
        rows.append(verdict(f"{name}: losses beside the CPU's, relative", found, 1e-4))
    return rows


def check_positions(device: torch.device, size: int) -> list[Result]:
    """Images whose patches lie elsewhere than the CPU's, in the first step, single precision.

    Up to the first template that differs both had the same choice; it counts unless its two cells
    are equally similar, within 1e-5 of the largest similarity.
    """
    rows = []
    for name in OURS:
        with tempfile.TemporaryDirectory() as folder:
            (batch,) = batches_for(name, size, 4, 1, Path(folder))
        calls: dict[str, list[Matched]] = {}
        for kind, where in (("cpu", CPU), ("device", device)):
            own = calls[kind] = []

            def noted(
                template: Tensor, keys: Tensor, valid: Tensor, own: list[Matched] = own
            ) -> Tensor:
                own.append((template, keys, valid, match(template, keys, valid)))
                return own[-1][-1]

            torch.manual_seed(1)
            with patch.object(sampling, "match", noted), arithmetic(None, deterministic=False):
                method = method_on(name, where)
                torch.manual_seed(1)
                list(train(method, [copy.deepcopy(batch)], where, None))
        both = zip(calls["cpu"], calls["device"], strict=True)
        wrong = sum(elsewhere(*own, found[-1].cpu()) for own, found in both)
        rows.append(verdict(f"{name}: images with other patches than the CPU's", wrong, 0))
    return rows


def elsewhere(
    template: Tensor, keys: Tensor, valid: Tensor, expected: Tensor, found: Tensor
) -> int:
    """Images whose first cell of ``found`` (B, T) that is not ``expected`` is less similar."""
    wrong = 0
    for image in range(len(keys)):
        unlike = (expected[image] != found[image]).nonzero().flatten().tolist()
        if not unlike:
            continue
        similarity = template[:, unlike[0]].double() @ keys[image].double()  # (P,)
        one, other = (similarity[cells[image, unlike[0]]] for cells in (expected, found))
        wrong += bool((one - other).abs() > 1e-5 * similarity[valid[image]].abs().max())
    return wrong


def check_resumed(device: torch.device, size: int) -> list[Result]:
    """Third loss of a training whose state after two steps goes to the other device and back.

    Its relative difference from that of a training which stays on the CPU, in single precision.
    """
    rows = []
    for name, (first, then) in itertools.product(METHODS, ((device, CPU), (CPU, device))):
        with tempfile.TemporaryDirectory() as folder:
            batches = batches_for(name, size, 2, 3, Path(folder))
        with arithmetic(None, deterministic=False):
            stayed = third_loss(name, batches, CPU, CPU)
            moved = third_loss(name, batches, first, then)
        kinds = f"{first.type} to {then.type}"
        found = abs(moved - stayed) / abs(stayed)
        rows.append(verdict(f"{name}: loss after going on from {kinds}, relative", found, 1e-4))
    return rows


def third_loss(
    name: str, batches: Sequence[Batch], first: torch.device, then: torch.device
) -> float:
    """The loss of the third step, before which everything goes through a file to ``then``."""
    method = method_on(name, first)
    optimizer, file = make_adam(method, first), io.BytesIO()
    torch.manual_seed(1)
    for _ in train(method, copy.deepcopy(batches[:2]), first, None, optimizer):
        pass
    torch.save([method.state_dict(), optimizer.state_dict()], file)
    file.seek(0)
    state, moments = torch.load(file, map_location="cpu")
    method = method_on(name, then)
    optimizer = make_adam(method, then)
    method.load_state_dict(state)
    optimizer.load_state_dict(moments)
    torch.manual_seed(2)
    (loss,) = train(method, copy.deepcopy(batches[2:]), then, None, optimizer)
    return float(loss)


def check_compiled(device: torch.device, size: int) -> list[Result]:
    """What ``--compile on`` changes in fine-tuning's first loss and its gradients, relative.

    Of the gradients the length of the difference, in single precision. Pretraining would say less:
    which of two equally similar patches is matched hangs on the last bit. So does the slope of a
    unit at the bend of its LeakyReLU, which changed gradients by up to .002;
    ``networks.check_norm`` compares a norm alone, and more strictly.
    """
    random = torch.Generator().manual_seed(0)
    images = torch.randn(4, 3, size, size, generator=random).to(device)
    mask = torch.randint(4, (4, size, size), generator=random).to(device)
    losses, gradients = [], []
    for compiled in (False, True):
        torch.manual_seed(0)
        network = UNet(4).to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        if compiled:
            compile_norms(network, device, None)
        with arithmetic(None, deterministic=False):
            loss = supervised_loss(network(images), mask, torch.ones(4, device=device))["loss"]
            loss.backward()
        losses.append(loss.detach().cpu().double())
        gradients.append(torch.cat([p.grad.flatten() for p in network.parameters()]).cpu().double())
    apart = float((gradients[0] - gradients[1]).norm() / gradients[0].norm())
    return [
        verdict("compiled: loss of fine-tuning, relative", difference(*losses), 1e-5),
        verdict("compiled: gradients of fine-tuning, relative", apart, 1e-2),
    ]


def check_bf16(device: torch.device, size: int, steps: int) -> list[Result]:
    """How far losses in bf16 are from single precision's, in spreads of three seeds.

    A loss is the mean of the second half of the steps; a seed draws weights and patches, and the
    spread is the largest less the smallest in single precision.
    """
    rows = []
    for name in OURS:
        with tempfile.TemporaryDirectory() as folder:
            batches = batches_for(name, size, 4, steps, Path(folder))
        losses = {}
        for how, seed in itertools.product(PRECISIONS, range(3)):
            method = method_on(name, device, seed)
            running = list(train(method, copy.deepcopy(batches), device, PRECISIONS[how]))
            losses[how, seed] = float(torch.stack(running[steps // 2 :]).mean())
        single = [losses["fp32", seed] for seed in range(3)]
        apart = max(abs(losses["bf16", seed] - single[seed]) for seed in range(3))
        found = apart / (max(single) - min(single))
        rows.append(verdict(f"{name}: losses in bf16, in spreads of seeds", found, 1))
    return rows


def check_views(device: torch.device, size: int) -> list[Result]:
    """How far views finished on the device are from those of the CPU, in gray levels."""
    with tempfile.TemporaryDirectory() as folder:
        measure.draw_set(Path(folder), size, 8, num_classes=4)
        batches = measure.batches_of(Config(data_dir=folder, self_mode="simclr"))
        expected = next(batches.epoch(0))
        batches.dataset.unfinished = True  # type: ignore[union-attr]
        found = finish_views(to_device(next(batches.epoch(0)), device), 4)
    keys = ("view_q", "view_k")
    most = max(float((found[key].cpu() - expected[key]).abs().max()) for key in keys)
    return [verdict("views beside the CPU's, gray levels", 255 * min(STD) * most, 0.1)]


def check_kept(device: torch.device, size: int) -> list[Result]:
    """Pixels of views that differ where images stay on the device, and what waits for it."""
    with tempfile.TemporaryDirectory() as folder:
        measure.draw_set(Path(folder), size, 16, num_classes=4)
        batches = measure.batches_of(Config(data_dir=folder, self_mode="simclr"))
        views: Any = batches.dataset
        views.unfinished = True
        expected = list(batches.epoch(0))
        views.kept = True
        coming = [to_device(batch, device) for batch in batches.epoch(0)]
        files = [sample.image for sample in (*views.train, *views.annotated)]
        kept = KeptImages(files, views.store, device)
        made = [kept.views(batch) for batch in coming]  # all have come now
    with waiting_refused(device) as names:
        made = [kept.views(batch) for batch in coming]
    both = itertools.product(zip(made, expected, strict=True), ("view_q", "view_k"))
    wrong = sum(int((own[key].cpu() != other[key]).sum()) for (own, other), key in both)
    said = f" ({names[0]})" if names else ""
    return [
        verdict("pixels unlike the uploaded ones' where images stay on the device", wrong, 0),
        verdict(f"images that stay there wait for it{said}", len(names), 0),
    ]


def check_deterministic(device: torch.device, size: int) -> list[Result]:
    """Weights that differ in any bit after three steps, in two runs with ``--deterministic``."""
    rows = []
    for name, how in itertools.product(METHODS, PRECISIONS):
        with tempfile.TemporaryDirectory() as folder:
            batches = batches_for(name, size, 4, 3, Path(folder))
        weights = []
        for _ in range(2):
            method = method_on(name, device)
            torch.manual_seed(1)
            with arithmetic(PRECISIONS[how], deterministic=True):
                list(train(method, copy.deepcopy(batches), device, PRECISIONS[how]))
            weights.append(method.state_dict())
        unequal = sum(not torch.equal(weights[0][key], weights[1][key]) for key in weights[0])
        rows.append(verdict(f"{name} {how}: tensors unlike those of a second run", unequal, 0))
    return rows


def busy(events: Sequence[Any]) -> tuple[float, int]:
    """Milliseconds in which the device did something, and the number of launches, of a profile."""
    spans = sorted(
        (e.time_range.start, e.time_range.end)
        for e in events
        if e.device_type == torch.autograd.DeviceType.CUDA
    )
    total, until = 0.0, float("-inf")
    for start, end in spans:
        total += max(0.0, end - max(start, until))
        until = max(until, end)
    launches = sum("LaunchKernel" in e.name for e in events)
    return total / 1000, launches


def measure_speed(
    name: str, size: int, how: str, device: torch.device, steps: int, compiled: bool = False
) -> Result:
    """A row of ``speed``: whole steps, nothing waiting between them; ``first s`` are the warm-up's.

    ``compiled`` as with ``--compile on``.
    """
    with tempfile.TemporaryDirectory() as folder:
        batches = batches_for(name, size, 8, WARM_UP + steps + PROFILED, Path(folder))
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    method, start = method_on(name, device), measure.now(device)
    if compiled:
        compile_norms(method, device, PRECISIONS[how])
    running = train(method, batches, device, PRECISIONS[how])
    for _ in itertools.islice(running, WARM_UP):
        pass
    first, start = measure.now(device) - start, measure.now(device)
    for _ in itertools.islice(running, steps):
        pass
    milliseconds = 1000 * (measure.now(device) - start) / steps
    row: Result = {"method": name, "size": size, "precision": how, "ms": milliseconds}
    row["first s"] = first
    row["GiB"] = measure.peak_megabytes(device) / 1024
    if device.type != "cuda":
        return row
    kinds = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=kinds) as profile:
        for _ in itertools.islice(running, PROFILED):
            pass
        measure.now(device)
    milliseconds_busy, launches = busy(list(profile.events()))
    row |= {"busy ms": milliseconds_busy / PROFILED, "launches": launches / PROFILED}
    return row | {"busy": row["busy ms"] / milliseconds}


def measure_train(
    name: str, size: int, device: torch.device, epochs: tuple[int, int], how: str = ""
) -> Result:
    """Milliseconds of a step of train.py: the difference of two runs of different length.

    ``how`` are more words of the command.
    """
    images, seconds = 48, []
    with tempfile.TemporaryDirectory() as folder:
        measure.draw_set(Path(folder) / "set", size, images, num_classes=4)
        for count in epochs:
            words = f"-stages self --self_mode {name} --self_max_epoch {count} --save_every {count}"
            more = f"--data_dir {folder}/set --output_dir {folder}/{count} --repeats 0"
            seconds.append(run_script("train.py", f"{words} {more} {how}", device))
    steps = (epochs[1] - epochs[0]) * (images // 8)
    each = (seconds[1] - seconds[0]) / steps
    beside = seconds[0] - epochs[0] * (images // 8) * each
    row: Result = {"train.py": f"{name} {how}".strip(), "size": size, "ms": 1000 * each}
    return row | {"seconds beside the steps": beside}


def run_script(script: str, words: str, device: torch.device) -> float:
    """Seconds of a command of the program."""
    command = [sys.executable, str(ROOT / script), *words.split(), "--device", str(device)]
    start = time.perf_counter()
    subprocess.run(command, stdout=subprocess.DEVNULL, check=True)
    return time.perf_counter() - start


def measure_labels(device: torch.device, size: int, epochs: tuple[int, int]) -> list[Result]:
    """Training with labels, and evaluation: differences of runs of different length."""
    images, rows = 48, []
    with tempfile.TemporaryDirectory() as folder:
        measure.draw_set(Path(folder) / "set", size, images, num_classes=4)
        common = f"-stages sup --data_dir {folder}/set --repeats 0 --output_dir {folder}"
        for what, evaluated in (("step with labels", epochs[1]), ("step, evaluated", 1)):
            seconds = []
            for count in epochs:
                words = f"--name {evaluated}x{count} --fine_max_epoch {count}"
                words += f" --eval_every {min(evaluated, count)}"
                seconds.append(run_script("train.py", f"{common} {words}", device))
            each = (seconds[1] - seconds[0]) / (epochs[1] - epochs[0])
            rows.append({"with labels": what, "size": size, "ms": 1000 * each})
    return rows


def predicting(device: torch.device, quick: bool) -> argparse.Namespace:
    """The options of ``benchmarks/prediction.py``: 2,000 small images and a large one."""
    images, size, large = (3, 32, 320) if quick else (2000, 200, 4000)
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
    with arithmetic(torch.bfloat16, deterministic=True):
        return {"deterministic": "yes", **measure_speed("simclr", size, "bf16", device, steps)}


def parts_of(given: argparse.Namespace) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Everything in order, what matters most first: the table's name, and what gives its rows."""
    device, quick = choose_device(given.device), given.quick
    sizes, steps = ((32,), 1) if quick else ((376, 128), 20)
    small, epochs = 32 if quick else 128, (1, 2) if quick else (3, 13)
    yield "checks", partial(check_matching, device, quick)
    yield "checks", partial(check_waits, device)
    yield "checks", partial(check_losses, device, small)
    yield "checks", partial(check_positions, device, small)
    for size, name, how in itertools.product(sizes, OURS, PRECISIONS):
        yield "speed", partial(measure_speed, name, size, how, device, steps)
    for size, name in itertools.product(sizes, OURS[: 1 if quick else 2]):
        yield "train", partial(measure_train, name, size, device, epochs)
    yield "labels", partial(measure_labels, device, sizes[0], (1, 2) if quick else (5, 55))
    yield "checks", partial(check_kept, device, sizes[0])
    yield "at_once", partial(measure_at_once, device, quick)
    yield "predicted", partial(measure_folders, device, quick)
    uploading = "--cache_on cpu"
    yield "train", partial(measure_train, OURS[0], sizes[0], device, epochs, uploading)
    yield "checks", partial(check_views, device, sizes[0])
    yield "checks", partial(check_resumed, device, 32 if quick else 64)
    yield "checks", partial(check_bf16, device, 32 if quick else 64, 2 if quick else 20)
    yield "checks", partial(check_compiled, device, small)
    for size, name in itertools.product(sizes, OURS[: 1 if quick else 2]):
        yield "compiled", partial(measure_speed, name, size, "bf16", device, steps, True)
    yield "deterministic", partial(deterministic_cost, device, sizes[0], steps)
    yield "checks", partial(check_deterministic, device, small)


def report(given: argparse.Namespace) -> Result:
    """All checks and measurements; ``--quick`` at sizes that take no time."""
    tables = ("checks", "speed", "compiled", "deterministic", "train", "labels", "predicted")
    more = ("at_once", "took", "failed", "left_out")
    found: dict[str, list[Result]] = {n: [] for n in (*tables, *more)}
    started = time.monotonic()
    for table, part in parts_of(given):
        what = " ".join(map(str, (part.func.__name__, *part.args)))  # type: ignore[attr-defined]
        begun = time.monotonic()
        if begun - started > 60 * given.minutes:
            found["left_out"].append({"left out, for want of time": what})
            continue
        try:
            rows = part()
        except Exception as error:  # whatever a device may refuse: the rest is wanted too
            why = (str(error).splitlines() or [""])[0]
            found["failed"].append({"failed": what, "why": f"{type(error).__name__}: {why}"})
            continue
        rows = rows if isinstance(rows, list) else [rows]
        found[table] += [{table: "yes", **row} for row in rows] if table == "compiled" else rows
        found["took"].append({"part": what, "seconds": time.monotonic() - begun})
        print(json.dumps(found["took"][-1]), file=sys.stderr, flush=True)
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    # cuBLAS reads it when it starts; without it its products are not deterministic.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    parser = measure.parser_of_cases(__doc__)
    parser.add_argument("--quick", action="store_true", help="a rehearsal at tiny sizes")
    parser.add_argument("--minutes", type=float, default=8.0, help="begin nothing new after")
    return measure.run_benchmark(parser.parse_args(argv), ("quick",), lambda case: {}, report)


if __name__ == "__main__":
    sys.exit(main())
