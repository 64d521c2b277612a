"""What the benchmarks share: a stopwatch, peak memory, counters of calls, a set of drawn images.

Every case is measured in a process of its own, so that peak memory and glibc's settings are the
case's alone, and in rounds over all cases, so that a busy machine slows all of them.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
import weakref
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a benchmark is run as a script

from config import Config
from data import Batches, TwoViewDataset, find_split
from imaging.store import ImageStore
from model import METHODS
from utils.commandline import Parser, exit_code
from utils.device import choose_device, keep_freed_memory
from utils.tables import markdown

Case = dict[str, Any]
Result = dict[str, Any]


def at_least(least: int) -> Callable[[str], int]:
    """The type of an option: a whole number, ``least`` or more."""

    def whole_number(text: str) -> int:
        if int(text) < least:
            raise argparse.ArgumentTypeError(f"found {text}; at least {least}")
        return int(text)

    return whole_number


def some_of(known: Iterable[str]) -> Callable[[str], list[str]]:
    """The type of an option: some of the known words, separated by commas."""

    def words(text: str) -> list[str]:
        found = [word for word in text.split(",") if word]
        wrong = [word for word in found if word not in known]
        if wrong or not found:
            shown = ", ".join(wrong) or "none"
            raise argparse.ArgumentTypeError(f"found {shown}; known: {', '.join(known)}")
        return found

    return words


def parser_of(doc: str | None) -> argparse.ArgumentParser:
    """A command line with the options of all benchmarks, described by the first line of ``doc``."""
    style = argparse.ArgumentDefaultsHelpFormatter
    parser = Parser(description=str(doc).splitlines()[0], formatter_class=style)
    parser.add_argument("--threads", type=at_least(0), default=0, help="CPU threads, 0: PyTorch's")
    return parser


def parser_of_cases(doc: str | None) -> argparse.ArgumentParser:
    """The same for the benchmarks that measure cases in processes of their own."""
    parser = parser_of(doc)
    parser.add_argument("--rounds", type=at_least(1), default=3, help="rounds of all cases")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    parser.add_argument("--case", type=json.loads, help=argparse.SUPPRESS)
    return parser


def use_threads(number: int) -> None:
    """Set the number of PyTorch's CPU threads; 0 changes nothing."""
    if number:
        torch.set_num_threads(number)


def print_case(case: Case, measure: Callable[[Case], Result]) -> None:
    """Measure the one case of this process, and print the result as JSON.

    glibc stays as it is for a ``plain`` case.
    """
    use_threads(case["threads"])
    if not case.get("plain"):
        keep_freed_memory()
    print(json.dumps(measure(case)))


def run_benchmark(
    given: argparse.Namespace,
    names: Sequence[str],
    measure: Callable[[Case], Result],
    report: Callable[[argparse.Namespace], Result],
) -> int:
    """Measure the one case of this process, or print the report on all; returns the exit code.

    Args:
        given: the options, those of ``parser_of_cases`` among them.
        names: of the options that decide the numbers and head the report.
        measure: measures one case, see ``print_case``.
        report: measures all cases; lists of rows are printed as tables.
    """

    def work() -> None:
        if given.case is not None:
            print_case(given.case, measure)
            return
        head = {name: getattr(given, name) for name in names}
        head |= {"device": str(choose_device(given.device))}
        head |= {"threads": given.threads or torch.get_num_threads(), "torch": torch.__version__}
        found = report(given)
        if given.json:
            print(json.dumps({**head, **found}))
            return
        print(", ".join(f"{name} {value}" for name, value in head.items()))
        for key, value in found.items():
            if not isinstance(value, list):
                print(f"{key} = {value:.3g}")
            elif value:
                print(f"\n{table(value)}")

    return exit_code(work, "Nothing of it was kept")


def interleaved(script: str, cases: Sequence[Case], rounds: int) -> list[list[Result]]:
    """Results of every case, one a round; a round goes through all cases."""
    results: list[list[Result]] = [[] for _ in cases]
    for done in range(rounds):
        for case, found in zip(cases, results, strict=True):
            if sys.stderr.isatty():
                print(f"round {done + 1}/{rounds}: {case}", file=sys.stderr)
            found.append(in_own_process(script, case))
    return results


def in_own_process(script: str, case: Case) -> Result:
    """Measure a case by ``script --case JSON``."""
    command = [sys.executable, script, "--case", json.dumps(case)]
    ran = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if ran.returncode:
        raise SystemExit(f"{Path(script).name}: case {case} ended with code {ran.returncode}")
    result: Result = json.loads(ran.stdout.splitlines()[-1])
    return result


def pooled(results: Sequence[Result], key: str) -> float:
    """Median of all timings of the rounds under ``key``."""
    return statistics.median(value for result in results for value in result[key])


def gigabytes(results: Sequence[Result]) -> float:
    """Most memory of the rounds."""
    return max(result["megabytes"] for result in results) / 1024


def table(rows: Sequence[Result]) -> str:
    """A Markdown table with the columns of the first row, numbers to three significant digits."""

    def shown(value: Any) -> str:
        small = isinstance(value, float) and value < 1000
        return f"{value:.3g}" if small else f"{value:.0f}" if isinstance(value, float) else value

    columns = list(rows[0])
    return "\n".join(markdown(columns, [[shown(row.get(c, "")) for c in columns] for row in rows]))


def now(device: torch.device) -> float:
    """Seconds, once the device has finished its queued work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
    return time.perf_counter()


def spent(device: torch.device) -> float:
    """What a comparison counts: seconds of all processors on a CPU, whose wall clock counts other
    programs too; of a device, once it has finished, its own."""
    return time.process_time() if device.type == "cpu" else now(device)


def peak_megabytes(device: torch.device) -> float:
    """Peak memory so far: of CUDA's tensors, else of this process; nan where it is unknown."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return process_megabytes()


def process_megabytes() -> float:
    """Peak memory of this process so far; nan on Windows, which has no such count."""
    try:
        import resource
    except ImportError:
        return float("nan")
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20


def load_average() -> float:
    """Processes that wanted a processor in the last minute; nan on Windows, which does not tell."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else float("nan")


class Stopwatch:
    """Adds up the seconds of each part of a step, without those of the parts nested in it.

    ``section`` is the part that is being timed.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self.section = device, ""
        self.parts: dict[str, float] = defaultdict(float)
        self.inside = 0.0  # seconds of the parts within the one that is being timed

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Time the block as this part."""
        outer, self.section = self.section, name
        before, self.inside = self.inside, 0.0
        start = now(self.device)
        yield
        seconds = now(self.device) - start
        self.parts[name] += seconds - self.inside
        self.section, self.inside = outer, before + seconds

    def timed(self, function: Callable[..., Any], part: str) -> Callable[..., Any]:
        """A function that is timed as ``part``."""

        def in_part(*args: Any, **kwargs: Any) -> Any:
            with self.part(part):
                return function(*args, **kwargs)

        return in_part


class HostReads(TorchFunctionMode):
    """Notices what makes the host wait for a device, at whatever device tensors are.

    ``found`` counts them by name: numbers read from tensors, branches on them, copies to the host,
    shapes that depend on values. On a CPU nothing waits, so that this shows there what would.
    """

    READS = ("item", "tolist", "cpu", "numpy", "equal", "is_nonzero", "allclose", "__contains__")
    SHAPES = ("nonzero", "argwhere", "masked_select", "unique", "unique_consecutive", "bincount")
    NUMBERS = ("__bool__", "__int__", "__float__", "__index__", "__array__")

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Count the call and do it."""
        name = getattr(func, "__name__", "")
        if name in (*self.READS, *self.SHAPES, *self.NUMBERS):
            self.found[name] += 1
        return func(*args, **(kwargs or {}))


class OperatorCalls(TorchDispatchMode):
    """Counts PyTorch's operator calls, and keeps those of convolutions.

    Attributes:
        counts: calls by section of the stopwatch.
        views: those of them that return a view and are not in-place.
        waits: by name, what makes the host wait for a device; see ``HostReads``.
        convolutions: of the section ``encode``: their arguments, tensors as their shapes, and
            whether gradients are enabled.
        casts: of each parameter, by its id: how often autocast made it another type.
    """

    MASKS = (torch.ops.aten.index.Tensor, torch.ops.aten.index_put_.default)
    READS = (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)

    def __init__(self, watch: Stopwatch) -> None:
        super().__init__()
        self.watch = watch
        self.counts: Counter[str] = Counter()
        self.views: Counter[str] = Counter()
        self.waits: Counter[str] = Counter()
        self.convolutions: list[tuple[Any, ...]] = []
        self.casts: Counter[int] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Count the call and do it."""
        section = self.watch.section
        self.counts[section] += 1
        aliases = [r.alias_info for r in func._schema.returns]
        if any(alias is not None and not alias.is_write for alias in aliases):
            self.views[section] += 1
        masks = func in self.MASKS and any(i is not None and i.dtype == torch.bool for i in args[1])
        if masks or func in self.READS:
            self.waits[str(func)] += 1
        if func is torch.ops.aten._to_copy.default and isinstance(args[0], torch.nn.Parameter):
            self.casts[id(args[0])] += 1
        if func is torch.ops.aten.convolution.default and section == "encode":
            shapes = [a.shape if isinstance(a, Tensor) else a for a in args]
            hashable = (tuple(a) if isinstance(a, list | torch.Size) else a for a in shapes)
            self.convolutions.append((*hashable, torch.is_grad_enabled()))
        return func(*args, **(kwargs or {}))


@contextmanager
def counted(watch: Stopwatch) -> Iterator[OperatorCalls]:
    """Operator calls of the block, and in ``waits`` all that makes the host wait for a device."""
    with HostReads() as reads, OperatorCalls(watch) as calls:
        yield calls
    calls.waits += reads.found


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the tensors made under it: ``live`` now, and their ``peak``.

    What an operator needs inside itself is not seen, nor what a tensor grows by later.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Do the call and count the new storages of its result."""
        given = {id(storage) for storage in storages((args, kwargs))}
        result = func(*args, **(kwargs or {}))
        for storage in storages(result):
            if id(storage) not in self.known | given:
                self.known.add(id(storage))
                self.live += storage.nbytes()
                weakref.finalize(storage, self.forget, id(storage), storage.nbytes())
        self.peak = max(self.peak, self.live)
        return result

    def forget(self, number: int, size: int) -> None:
        """Subtract a storage that was freed."""
        self.known.discard(number)
        self.live -= size


def storages(values: Any) -> list[torch.UntypedStorage]:
    """The storages of all tensors in nested lists, tuples and dicts."""
    return [t.untyped_storage() for t in tree_leaves(values) if isinstance(t, Tensor)]


def convolution_seconds(
    call: tuple[Any, ...], dtype: torch.dtype, device: torch.device, repeats: int
) -> float:
    """Median cost of one of ``OperatorCalls.convolutions``, backward included if it had one."""
    shape_x, shape_w, shape_b, *rest, backward = call
    drawn = (torch.randn(shape, device=device, dtype=dtype) for shape in (shape_x, shape_w))
    x, w = (tensor.contiguous(memory_format=torch.channels_last) for tensor in drawn)
    b = None if shape_b is None else torch.zeros(shape_b, device=device, dtype=dtype)
    convolution = torch.ops.aten.convolution.default
    gradient = torch.randn_like(convolution(x, w, b, *rest))
    wanted = [shape_x[1] > 3, True, b is not None]  # the image needs no gradient
    seconds = []
    for _ in range(repeats + 1):
        start = spent(device)
        convolution(x, w, b, *rest)
        if backward:
            torch.ops.aten.convolution_backward(gradient, x, w, shape_b, *rest, wanted)
        seconds.append(spent(device) - start)
    return statistics.median(seconds[1:])


def batches_of(config: Config) -> Batches:
    """Pretraining batches of these settings, with the annotated image of ``sup_num1_0`` if used."""
    annotated = METHODS[config.self_mode].needs_annotated
    views = TwoViewDataset(
        find_split(config.data_dir, "train_numf"),
        find_split(config.data_dir, "sup_num1_0") if annotated else [],
        ImageStore(config.image_size),
        num_classes=config.num_classes,
        seed=config.seed,
        jitter_strength=config.self_jitter,
        random_crop=config.random_crop,
    )
    return Batches(views, config.self_batch_size)


def draw_set(folder: Path, size: int, images: int, num_classes: int) -> None:
    """Draw a set of smooth random images, one of them annotated, all classes in every mask."""
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
