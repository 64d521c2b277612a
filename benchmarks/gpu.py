"""Everything that only a GPU can show, in one go: right, never waiting, how fast, how busy.

    python benchmarks/gpu.py --json > gpu.json       # some minutes on a card
    python benchmarks/gpu.py --device cpu --quick    # a rehearsal

Every row of ``checks`` has what was found, what is wanted and whether it is so. ``speed`` has the
milliseconds of a step, what the device did in it, and its memory; ``train`` those of train.py;
``predicted`` and ``at_once`` are ``benchmarks/prediction.py``'s. A part that fails is named in
``failed`` and the others go on; what would begin after ``--minutes`` is named in ``left_out``. What
each part found is written to the error output as soon as it is known.
"""

from __future__ import annotations

import argparse
import copy
import importlib
import importlib.util
import io
import itertools
import json
import math
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import Mock, patch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # when it is run as a script

from utils import leave_while_loading

if __name__ == "__main__":  # before the imports that take seconds
    leave_while_loading()

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import measure
from benchmarks.gpu_speed import (
    batches_for,
    deterministic_cost,
    measure_at_once,
    measure_folders,
    measure_labels,
    measure_speed,
    measure_train,
    method_on,
    train,
    waiting_refused,
    with_labels,
)
from benchmarks.measure import Result
from benchmarks.step import PRECISIONS, make_adam
from config import Config
from data import STD, Batch, finish_views
from methods import Method
from model import METHODS
from networks import norm_kernel
from pscl import assignment, matching, sampling
from pscl.fast_matching import match
from stages.kept_images import KeptImages
from utils.cuda.step_graph import StepGraphs
from utils.device import arithmetic, choose_device, to_device
from utils.training import all_finite

OURS = ("simclr", "moco")
CPU = torch.device("cpu")
Matched = tuple[Tensor, Tensor, Tensor, Tensor]  # what ``match`` was given, and what it gave


def plans(method: Method, batches: Sequence[Batch]) -> list[Batch]:
    """Batches as the method takes them, made on the CPU: views, labels, noise.

    A device's own labels differ in the last bit, and of patches that are equally pure within it
    another one may be chosen (``check_views``).
    """
    torch.manual_seed(1)
    return [method.planned(finish_views(batch, 4), fixed=True) for batch in batches]


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


def check_kernels(device: torch.device) -> list[Result]:
    """Kernels that this card does not take; on CUDA each says in a warning why."""
    kernels = itertools.product(("batch_norm", "row_norm"), PRECISIONS)
    missing = [
        f"{name} in {how}"
        for name, how in kernels
        if norm_kernel(name, device, PRECISIONS[how] or torch.float32) is None
    ]
    missing += [] if assignment.with_kernel else ["matching"]  # check_matching has tried
    said = f" ({', '.join(missing)})" if missing else ""
    return [verdict(f"kernels that do not run here{said}", len(missing), 0)]


def check_norm_of_many_rows(device: torch.device) -> list[Result]:
    """BatchNorm's kernel on as many rows as a step has at 376 px: its sums over all programs.

    Without CUDA on few, by Triton's interpreter, in a process of its own, since Triton reads that
    it is to interpret when it is loaded. Their numbers recur after 1009 rows.
    """
    if device.type == "cuda":
        return norm_of_rows(device, [(9 * 376**2, 32), (9 * 47**2, 256)])
    case = {"threads": 1, "rows": [(2 * 1009, 32), (1009, 256)], "programs": 6}
    with patch.dict(os.environ, {"TRITON_INTERPRET": "1"}):
        rows: list[Result] = measure.in_own_process(__file__, case)["checks"]
    return rows


def norm_of_rows(
    device: torch.device, sizes: Iterable[Sequence[int]], programs: int | None = None
) -> list[Result]:
    """BatchNorm's kernel on rows of these sizes (N, C), which so many programs share."""
    batch_norm = importlib.import_module("utils.cuda.batch_norm")  # needs Triton
    most, rows = programs or batch_norm.PROGRAMS, []
    for how, (count, channels) in itertools.product(PRECISIONS, sizes):
        dtype, said = PRECISIONS[how] or torch.float32, ""
        try:
            batch_norm.check(device, dtype, ((count, channels),), most)
        except RuntimeError as error:
            said = f" ({error})"
        what = f"BatchNorm of {count} rows of {channels} in {how} differs{said}"
        rows.append(verdict(what, bool(said), 0))
    return rows


def measure_case(case: Result) -> Result:
    """``norm_of_rows`` in this process."""
    return {"checks": norm_of_rows(CPU, case["rows"], case["programs"])}


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


def check_finite(device: torch.device) -> list[Result]:
    """Weights that are taken for finite, or not, and are the contrary."""
    wrong = 0
    for bad in (float("nan"), float("inf"), float("-inf"), torch.finfo(torch.float32).max):
        for at in (0, 70000, -1):  # a kernel takes a large tensor in parts
            module = torch.nn.Bilinear(300, 300, 2, device=device)
            with torch.no_grad():
                module.weight.view(-1)[at] = bad
            wrong += bool(all_finite(module)) != math.isfinite(bad)
    return [verdict("weights wrongly taken for finite, or not", wrong, 0)]


def first_losses(
    name: str,
    batches: Sequence[Batch],
    device: torch.device,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """The losses of training on these batches without autocast and TF32; on the CPU.

    With ``dtype`` double the networks compute in it; losses and comparisons stay as they are.
    """
    method = method_on(name, device)
    method.to(dtype)
    for key, queue in method.named_buffers(recurse=False):
        setattr(method, key, queue.float() if queue.is_floating_point() else queue)
    given = plans(method_on(name, CPU), batches)
    for batch, key in itertools.product(given, ("view_q", "view_k")):
        batch[key] = batch[key].to(dtype)
    torch.manual_seed(1)
    with arithmetic(None, deterministic=False):
        return torch.stack(list(train(method, given, device, None))).cpu().double()


def difference(one: Tensor, other: Tensor) -> float:
    """The largest relative difference of losses."""
    return float(((one - other) / one).abs().max())


def check_losses(device: torch.device, size: int) -> list[Result]:
    """Relative difference of the first three losses from the CPU's, without TF32.

    In single precision a gradient next to 0 may have either sign, and Adam's first steps are as
    long for small gradients as for large ones; so beside it stands how far the CPU's own losses are
    from those of double precision, in which rounding has no say.
    """
    rows = []
    for name in METHODS:
        with tempfile.TemporaryDirectory() as folder:
            batches = batches_for(name, size, 4, 3, Path(folder))
        cpu, own = (first_losses(name, batches, at) for at in (CPU, device))
        exact = [first_losses(name, batches, at, torch.float64) for at in (CPU, device)]
        yardstick = f"the CPU's own rounding {difference(exact[0], cpu):.1e}"
        what = f"{name}: losses beside the CPU's, relative,"
        rows += [
            verdict(f"{what} the first", difference(cpu[:1], own[:1]), 1e-5),
            verdict(f"{what} of three ({yardstick})", difference(cpu, own), 1e-4),
            verdict(f"{what} of three, networks in double precision", difference(*exact), 1e-5),
        ]
    return rows


def check_two_shapes(device: torch.device, size: int) -> list[Result]:
    """Relative difference of losses with and without graphs, of images of two sizes in turn.

    The second size is recorded when it comes again, in the memory of the first one's graph; then
    both are replayed in turn, and what one wrote over of the other's would be seen.
    """
    rows = []
    for name in OURS:
        sizes = []
        for each in (size, size + size // 2):
            with tempfile.TemporaryDirectory() as folder:
                sizes.append(batches_for(name, each, 4, 5, Path(folder)))
        batches = [batch for both in zip(*sizes, strict=True) for batch in both]
        found, made = [], list[StepGraphs]()
        for graphs in (False, True):
            torch.manual_seed(1)
            given, method = (
                plans(method_on(name, CPU), copy.deepcopy(batches)),
                method_on(name, device),
            )
            with arithmetic(None, deterministic=True):  # the same kernels both times
                losses = list(train(method, given, device, None, graphs=graphs, made=made))
            found.append(torch.stack(losses).cpu().double())
        missing = 2 * (device.type == "cuda") - sum(len(run.recordings) for run in made)
        rows += [
            verdict(f"{name}: losses of two sizes with graphs, relative", difference(*found), 1e-4),
            verdict(f"{name}: graphs of two sizes that are missing", missing, 0),
        ]
    return rows


def losses_with_labels(folder: Path, device: torch.device, dtype: torch.dtype) -> Tensor:
    """The losses of the first three steps of training with labels, as train.py does them."""
    stage = with_labels(folder, device, "paper", "--amp off")
    stage.module.to(dtype)
    stage.log = log = Mock()

    def prepared(batch: dict[str, Any]) -> dict[str, Any]:
        return {**batch, "image": batch["image"].to(dtype)}

    with (
        patch.object(stage, "prepared", prepared),
        arithmetic(None, deterministic=False),
        stage.preparing(0, 3),
    ):
        for epoch in range(3):  # of one step each
            stage.train_epoch(epoch, lambda: None)
    losses = [call.args[0]["loss"] for call in log.metrics.call_args_list]
    return torch.tensor(losses, dtype=torch.float64)


def check_labels(device: torch.device, size: int) -> list[Result]:
    """As ``check_losses``, of training with labels."""
    with tempfile.TemporaryDirectory() as folder:
        measure.draw_set(Path(folder) / "set", size, 4, num_classes=4)
        cpu, own, *exact = (
            losses_with_labels(Path(folder), at, dtype)
            for dtype in (torch.float32, torch.float64)
            for at in (CPU, device)
        )
    yardstick = f"the CPU's own rounding {difference(exact[0], cpu):.1e}"
    what = "training with labels: losses beside the CPU's, relative,"
    return [
        verdict(f"{what} the first", difference(cpu[:1], own[:1]), 1e-5),
        verdict(f"{what} of three ({yardstick})", difference(cpu, own), 1e-4),
        verdict(f"{what} of three, networks in double precision", difference(*exact), 1e-5),
    ]


def check_positions(device: torch.device, size: int) -> list[Result]:
    """Images whose patches lie elsewhere than the CPU's, in the first step, single precision.

    Both have the same plan. Up to the first template that differs both had the same choice; it
    counts unless its two cells are equally similar, within 1e-5 of the largest similarity.
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

            planned = plans(method_on(name, CPU), [copy.deepcopy(batch)])
            with patch.object(sampling, "match", noted), arithmetic(None, deterministic=False):
                list(train(method_on(name, where), planned, where, None, graphs=False))
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
            batches = plans(method_on(name, CPU), batches_for(name, size, 2, 3, Path(folder)))
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
            with arithmetic(PRECISIONS[how], deterministic=False):
                running = list(train(method, copy.deepcopy(batches), device, PRECISIONS[how]))
            losses[how, seed] = float(torch.stack(running[steps // 2 :]).mean())
        single = [losses["fp32", seed] for seed in range(3)]
        apart = max(abs(losses["bf16", seed] - single[seed]) for seed in range(3))
        found = apart / (max(single) - min(single))
        rows.append(verdict(f"{name}: losses in bf16, in spreads of seeds", found, 1))
    return rows


def check_views(device: torch.device, size: int) -> list[Result]:
    """How far views and labels finished on the device are from the CPU's, in gray levels."""
    with tempfile.TemporaryDirectory() as folder:
        measure.draw_set(Path(folder), size, 8, num_classes=4)
        batches = measure.batches_of(Config(data_dir=folder, self_mode="simclr"))
        expected = next(batches.epoch(0))
        batches.dataset.unfinished = True  # type: ignore[union-attr]
        found = finish_views(to_device(next(batches.epoch(0)), device), 4)
    keys = ("view_q", "view_k")
    most = max(float((found[key].cpu() - expected[key]).abs().max()) for key in keys)
    labels = float((found["label"].cpu() - expected["label"]).abs().max())
    return [
        verdict("views beside the CPU's, gray levels", 255 * min(STD) * most, 0.1),
        verdict("labels beside the CPU's, of 255", labels, 0.01),
    ]


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


def parts_of(given: argparse.Namespace) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Everything in order, what matters most first: the table's name, and what gives its rows."""
    device, quick = choose_device(given.device), given.quick
    sizes, steps = ((32,), 1) if quick else ((376, 128), 20)
    small, epochs = 32 if quick else 128, 1 if quick else 6
    yield "checks", partial(check_matching, device, quick)
    if device.type == "cuda":
        yield "checks", partial(check_kernels, device)
    if device.type == "cuda" or importlib.util.find_spec("triton"):
        yield "checks", partial(check_norm_of_many_rows, device)
    yield "checks", partial(check_waits, device)
    yield "checks", partial(check_finite, device)
    yield "checks", partial(check_losses, device, small // 2)
    yield "checks", partial(check_positions, device, small)
    yield "checks", partial(check_two_shapes, device, small // 2)
    yield "checks", partial(check_labels, device, small // 2)
    for size, name, how in itertools.product(sizes, OURS, PRECISIONS):
        yield "speed", partial(measure_speed, name, size, how, device, steps)
    for size, name in itertools.product(sizes, OURS[: 1 if quick else 2]):
        yield "train", partial(measure_train, name, size, device, epochs)
    yield "labels", partial(measure_labels, device, sizes[-1], 1 if quick else 40)
    yield "checks", partial(check_kept, device, sizes[0])
    yield "train", partial(measure_train, OURS[0], sizes[0], device, epochs, "cpu")
    yield "checks", partial(check_views, device, sizes[0])
    yield "checks", partial(check_resumed, device, 32 if quick else 64)
    yield "checks", partial(check_bf16, device, 32 if quick else 64, 2 if quick else 20)
    for size, name in itertools.product(sizes, OURS[: 1 if quick else 2]):
        yield "speed", partial(measure_speed, name, size, "bf16", device, steps, graphs=False)
    yield "deterministic", partial(deterministic_cost, device, sizes[0], steps)
    yield "checks", partial(check_deterministic, device, small)
    yield "at_once", partial(measure_at_once, device, quick)
    yield "predicted", partial(measure_folders, device, quick)  # mostly the processor's time


def report(given: argparse.Namespace) -> Result:
    """All checks and measurements; ``--quick`` at sizes that take no time."""
    tables = ("checks", "speed", "deterministic", "train", "labels", "predicted")
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
            with redirect_stdout(sys.stderr):  # the output itself is the report
                rows = part()
        except Exception as error:  # whatever a device may refuse: the rest is wanted too
            why = (str(error).splitlines() or [""])[0]
            found["failed"].append({"failed": what, "why": f"{type(error).__name__}: {why}"})
            continue
        rows = rows if isinstance(rows, list) else [rows]
        found[table] += rows
        found["took"].append({"part": what, "seconds": time.monotonic() - begun})
        # At once: what was found stays if a later part is cut off.
        print(json.dumps({**found["took"][-1], "found": rows}), file=sys.stderr, flush=True)
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    # cuBLAS reads it when it starts; without it its products are not deterministic.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    parser = measure.parser_of_cases(__doc__)
    parser.add_argument("--quick", action="store_true", help="use tiny sizes, as a rehearsal")
    parser.add_argument(
        "--minutes", type=float, default=8.0, help="begin no new part after so many minutes"
    )
    return measure.run_benchmark(parser.parse_args(argv), ("quick",), measure_case, report)


if __name__ == "__main__":
    sys.exit(main())
