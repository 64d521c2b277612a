"""What the benchmarks share: a clock, peak memory, counters of calls, a set of drawn pictures.

Every case is measured in a process of its own, so that peak memory is the case's alone and glibc's
allocator can be as the case wants it; rounds of all cases follow each other, so that a busy machine
slows all of them.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a benchmark is run as a script

from utils.allocator import start_again  # noqa: E402
from utils.commandline import exit_code  # noqa: E402
from utils.device import choose_device  # noqa: E402

Case = dict[str, Any]
Result = dict[str, Any]


def require_least(
    parser: argparse.ArgumentParser, given: argparse.Namespace, **limits: int
) -> None:
    """End with one line and exit code 2 if an option is below its least value."""
    for name, least in limits.items():
        if getattr(given, name) < least:
            parser.error(f"--{name}: found {getattr(given, name)}; at least {least}")


def add_common_options(parser: argparse.ArgumentParser) -> None:
    """Options of the benchmarks that measure cases in processes of their own."""
    add = parser.add_argument
    add("--rounds", type=int, default=3, help="rounds of all cases [3]")
    add("--threads", type=int, default=0, help="CPU threads; 0: PyTorch's choice [0]")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps [auto]")
    add("--json", action="store_true", help="print JSON instead of tables")
    add("--case", type=json.loads, help=argparse.SUPPRESS)


def run_benchmark(
    given: argparse.Namespace,
    names: Sequence[str],
    measure: Callable[[Case], Result],
    report: Callable[[], Result],
) -> int:
    """Measure the one case of this process, or print the report on all; returns the exit code.

    Args:
        given: the options, those of ``add_common_options`` among them.
        names: of the options that decide the numbers and head the report.
        measure: what a case's process does; the allocator stays as it is for a ``plain`` case.
        report: measures all cases; lists of rows that it gives become tables.
    """

    def work() -> None:
        if given.case is not None:
            if not given.case.get("plain"):
                start_again()
            print(json.dumps(measure(given.case)))
            return
        head = {name: getattr(given, name) for name in names}
        head |= {"device": str(choose_device(given.device))}
        head |= {"threads": given.threads or torch.get_num_threads(), "torch": torch.__version__}
        found = report()
        if given.json:
            print(json.dumps({**head, **found}))
            return
        print(", ".join(f"{name} {value}" for name, value in head.items()))
        for key, value in found.items():
            if not isinstance(value, list):
                print(f"{key} = {value:.3g}")
            elif value:
                print(f"\n{table(value, list(value[0]))}")

    return exit_code(work, "Nothing of it was kept")


def now(device: torch.device) -> float:
    """Seconds, after the device has done all it was asked to."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
    return time.perf_counter()


def peak_megabytes(device: torch.device) -> float:
    """Most memory so far: of CUDA's tensors, else of this process; nan where nobody counts."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    try:
        import resource
    except ImportError:  # Windows
        return float("nan")
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20


class OperatorCalls(TorchDispatchMode):
    """Counts calls of the tensor library, views included, and keeps those of convolutions.

    Attributes:
        counts: calls by the ``section`` that was set when they were made.
        views: those that only look at the same memory in another way, but for in-place ones.
        convolutions: arguments of the convolutions, tensors as their shapes, and whether a
            gradient will be wanted.
    """

    def __init__(self) -> None:
        super().__init__()
        self.section = ""
        self.counts: dict[str, int] = {}
        self.views: dict[str, int] = {}
        self.convolutions: list[tuple[Any, ...]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        """Count and carry on."""
        self.counts[self.section] = self.counts.get(self.section, 0) + 1
        aliases = [r.alias_info for r in func._schema.returns]
        if any(alias is not None and not alias.is_write for alias in aliases):
            self.views[self.section] = self.views.get(self.section, 0) + 1
        if func is torch.ops.aten.convolution.default and self.section == "encode":
            shapes = tuple(
                tuple(a.shape if isinstance(a, torch.Tensor) else a)
                if isinstance(a, torch.Tensor | list | tuple)
                else a
                for a in args
            )
            self.convolutions.append((*shapes, torch.is_grad_enabled()))
        return func(*args, **(kwargs or {}))


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the tensors that were made under it and are still alive.

    Attributes:
        live, peak: now, and at most so far. What a call needs inside itself is not seen, nor what a
            tensor grows by later.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.known: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        """Carry on and count what came of it."""
        given = {id(t.untyped_storage()) for t in tree_leaves((args, kwargs)) if _is_tensor(t)}
        result = func(*args, **(kwargs or {}))
        for storage in [t.untyped_storage() for t in tree_leaves(result) if _is_tensor(t)]:
            if id(storage) not in self.known | given:
                self.known.add(id(storage))
                self.live += storage.nbytes()
                weakref.finalize(storage, self.forget, id(storage), storage.nbytes())
        self.peak = max(self.peak, self.live)
        return result

    def forget(self, number: int, size: int) -> None:
        """A tensor's memory was freed."""
        self.known.discard(number)
        self.live -= size


def _is_tensor(value: Any) -> bool:
    return isinstance(value, torch.Tensor)


def convolution_seconds(
    call: tuple[Any, ...], dtype: torch.dtype, device: torch.device, repeats: int
) -> float:
    """Median seconds of one convolution alone, forward and, if wanted, backward, channels last.

    Args:
        call: an entry of ``OperatorCalls.convolutions``.
        dtype, device: of all tensors.
        repeats: how often it is timed, after once to warm up.
    """
    shape_x, shape_w, shape_b, *rest, backward = call
    last = torch.channels_last
    x = torch.randn(shape_x, device=device).to(dtype).contiguous(memory_format=last)
    w = torch.randn(shape_w, device=device).to(dtype).contiguous(memory_format=last)
    b = None if shape_b is None else torch.zeros(shape_b, device=device, dtype=dtype)
    convolution = torch.ops.aten.convolution.default
    gradient = torch.randn_like(convolution(x, w, b, *rest))
    wanted = [shape_x[1] > 3, True, b is not None]  # nobody wants the picture's own gradient
    seconds = []
    for _ in range(repeats + 1):
        start = now(device)
        convolution(x, w, b, *rest)
        if backward:
            torch.ops.aten.convolution_backward(gradient, x, w, shape_b, *rest, wanted)
        seconds.append(now(device) - start)
    return statistics.median(seconds[1:])


def draw_set(folder: Path, size: int, images: int, num_classes: int) -> None:
    """Draw a set of smooth random pictures, one of them annotated, all classes in every mask."""
    rng = np.random.default_rng(0)
    for split in ("train_numf", "sup_num1_0", "test_numf"):
        for kind in ("img", "gt"):
            (folder / split / kind).mkdir(parents=True)
    for number in range(images):
        coarse = rng.standard_normal((size // 16 + 2, size // 16 + 2)).astype(np.float32)
        field = cv2.resize(coarse, (size, size), interpolation=cv2.INTER_CUBIC)
        mask = np.digitize(field, np.quantile(field, np.arange(1, num_classes) / num_classes))
        pixels = 40 + 50 * mask + 12 * rng.standard_normal((size, size))
        name = f"{15 * (number % 6 + 1)}_{number}_0_0.png"
        for split in ("train_numf", "test_numf", *(["sup_num1_0"] if number == 0 else [])):
            cv2.imwrite(str(folder / split / "img" / name), pixels.clip(0, 255).astype(np.uint8))
            cv2.imwrite(str(folder / split / "gt" / name), mask.astype(np.uint8))


def in_own_process(script: str, case: Case) -> Result:
    """Measure a case by ``script --case JSON`` in a process of its own."""
    command = [sys.executable, script, "--case", json.dumps(case)]
    ran = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if ran.returncode:
        raise SystemExit(f"{Path(script).name}: case {case} ended with code {ran.returncode}")
    result: Result = json.loads(ran.stdout.splitlines()[-1])
    return result


def interleaved(
    cases: Sequence[Case], rounds: int, measure: Callable[[Case], Result]
) -> list[list[Result]]:
    """Results of every case, one a round; in a round all cases follow each other."""
    results: list[list[Result]] = [[] for _ in cases]
    for done in range(rounds):
        for case, found in zip(cases, results, strict=True):
            if sys.stderr.isatty():
                print(f"round {done + 1}/{rounds}: {case}", file=sys.stderr)
            found.append(measure(case))
    return results


def pooled(results: Sequence[Result], key: str) -> float:
    """Median of all timings of the rounds under ``key``."""
    return statistics.median(value for result in results for value in result[key])


def table(rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> str:
    """Rows as a Markdown table, numbers with three digits that count."""
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    for row in rows:
        cells = [row.get(column, "") for column in columns]
        shown = [f"{c:.3g}" if isinstance(c, float) and c < 1000 else _plain(c) for c in cells]
        lines.append("| " + " | ".join(shown) + " |")
    return "\n".join(lines)


def _plain(value: Any) -> str:
    return f"{value:.0f}" if isinstance(value, float) else str(value)
