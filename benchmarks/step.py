"""How long a pretraining step takes, where the time goes, what the convolutions alone would take.

    python benchmarks/step.py                                    # the paper's size, all methods
    python benchmarks/step.py --size 96 --batch 4 --methods simclr --json
    python benchmarks/step.py --growth --methods simclr          # over four sizes and four batches

E, the unit, is forward and backward of the UNet with its projection head on one view, written
plainly: single precision, default memory format, glibc as it is, the head on all positions. The
floor is every convolution of the method's encoders by itself, in the precision of the row; of the
last one, which PSCL does at patches alone, only the pass over all of view k, without backward.
"""

from __future__ import annotations

import argparse
import itertools
import math
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_leaves

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # when it is run as a script

from benchmarks.measure import (  # noqa: E402
    Case,
    LiveBytes,
    OperatorCalls,
    Result,
    add_case_options,
    at_least,
    convolution_seconds,
    draw_set,
    in_own_process,
    interleaved,
    now,
    parser_of,
    peak_megabytes,
    pooled,
    run_benchmark,
    some_of,
)
from config import Config  # noqa: E402
from data import Batch, Batches, ImageStore, find_split, pretraining_batches  # noqa: E402
from model import METHODS, PSCL, SCALES, Method, build_method  # noqa: E402
from networks import Encoder, ProjectedUNet, Up  # noqa: E402
from pscl.lazy_map import LazyMap  # noqa: E402
from pscl.losses import patch_nt_xent  # noqa: E402
from utils.device import choose_device, precision, to_device  # noqa: E402

PRECISIONS = {"fp32": None, "bf16": torch.bfloat16}
PARTS = ("encode", "sampling", "losses", "backward", "optimizer", "data")
PAPER_IMAGES, PAPER_EPOCHS = 198, 200
WARM_UP = 6  # steps of a method that are not timed: until then memory is still being mapped


class PlainUp(Up):
    """``Up`` as one would write it down: the transposed convolution with its bias."""

    def join(self, x: Tensor, skip: Tensor) -> Tensor:
        """Bring (B, c, h, w) to the size of the skip (B, c/2, H, W) and join both: (B, c, H, W)."""
        x = self.up(x)
        rows, columns = skip.shape[-2] - x.shape[-2], skip.shape[-1] - x.shape[-1]
        x = F.pad(x, (columns // 2, columns - columns // 2, rows // 2, rows - rows // 2))
        return torch.cat([skip, x], dim=1)


def make_plain(encoder: Encoder) -> None:
    """Give an encoder new decoder blocks, ``PlainUp``."""
    for name in ("up1", "up2", "up3"):
        setattr(encoder, name, PlainUp(getattr(encoder, name).up.in_channels))


def measure_unit(case: Case) -> Result:
    """E: seconds of forward and backward of the plain network on one view with its extra image."""
    device = choose_device(case["device"])
    network = ProjectedUNet(Config().channels)
    make_plain(network.encode)
    network.to(device)
    view = torch.randn(case["batch"] + 1, 3, case["size"], case["size"], device=device)
    seconds = []
    for _ in range(case["steps"] + 1):
        start = now(device)
        image, maps = network(view)
        patches = [network.decode.patch(maps[s].flatten(2), s) for s in range(SCALES)]
        torch.stack([x.mean() for x in (image, *patches)]).sum().backward()
        network.zero_grad()
        seconds.append(now(device) - start)
    return {"seconds": seconds[1:], "megabytes": peak_megabytes(device)}


class Stopwatch:
    """Adds up the seconds of the parts of a step; can count their calls in the same places."""

    def __init__(self, method: Method, device: torch.device) -> None:
        self.device = device
        self.parts = dict.fromkeys(PARTS, 0.0)
        self.inside = 0.0  # seconds of the parts within the one that is being timed
        self.calls: OperatorCalls | None = None
        for module in method.modules():
            if isinstance(module, ProjectedUNet):
                self.wrap(module, "forward", "encode")
                self.wrap(module, "embed", "encode")
        if isinstance(method, PSCL):
            self.wrap(method, "encode", "encode")
            self.wrap(method, "sample", "sampling")

    def wrap(self, owner: Any, name: str, part: str) -> None:
        """Time a method of an object as ``part``; what it calls of another part is that part's."""
        original = getattr(owner, name)

        def timed(*args: Any, **kwargs: Any) -> Any:
            outer = self.calls.section if self.calls else ""
            if self.calls:
                self.calls.section = part
            before, self.inside = self.inside, 0.0
            start = now(self.device)
            result = original(*args, **kwargs)
            seconds = now(self.device) - start
            self.parts[part] += seconds - self.inside
            self.inside = before + seconds
            if self.calls:
                self.calls.section = outer
            for lazy in tree_leaves(result):
                if isinstance(lazy, LazyMap):  # the encoder's last convolution is left to it
                    self.wrap(lazy, "at", part)
            return result

        setattr(owner, name, timed)

    def step(
        self,
        method: Method,
        optimizer: torch.optim.Optimizer,
        next_batch: Callable[[], Batch],
        dtype: torch.dtype | None,
    ) -> dict[str, float]:
        """One training step as the engine makes it; its seconds by part and as a whole."""
        self.parts, self.inside = dict.fromkeys(PARTS, 0.0), 0.0
        marks = [now(self.device)]
        batch = to_device(next_batch(), self.device)
        marks.append(now(self.device))
        with precision(dtype, self.device):
            loss = method(batch)["loss"]
        marks.append(now(self.device))
        optimizer.zero_grad()
        loss.backward()
        marks.append(now(self.device))
        optimizer.step()
        marks.append(now(self.device))
        data, forward, backward, update = (b - a for a, b in itertools.pairwise(marks))
        losses = forward - self.parts["encode"] - self.parts["sampling"]
        self.parts |= {"losses": losses, "backward": backward, "optimizer": update, "data": data}
        return {**self.parts, "seconds": marks[-1] - marks[0]}


def prepare(case: Case, folder: Path) -> tuple[Method, Batches]:
    """The method with the project's defaults, and batches of drawn pictures, enough for a run."""
    config, cls = Config(), METHODS[case["method"]]
    images = case["batch"] * (case["steps"] + WARM_UP + 1)
    draw_set(folder, case["size"], images, config.num_classes)
    torch.manual_seed(0)
    settings = {**config.to_dict(), "recompute": case["recompute"]}
    method = build_method(case["method"], settings)
    batches = pretraining_batches(
        find_split(folder, "train_numf"),
        find_split(folder, "sup_num1_0") if cls.needs_annotated else [],
        ImageStore(),
        num_classes=config.num_classes,
        batch_size=case["batch"],
        seed=0,
        jitter_strength=config.self_jitter,
        random_crop=config.random_crop,
    )
    return method, batches


def measure_step(case: Case) -> Result:
    """Seconds of a step of one method in one precision by parts, peak memory, calls."""
    device, dtype = choose_device(case["device"]), PRECISIONS[case["precision"]]
    with tempfile.TemporaryDirectory() as folder:
        method, batches = prepare(case, Path(folder))
        method.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        learning = [p for p in method.parameters() if p.requires_grad]
        optimizer = torch.optim.Adam(learning, Config().self_lr)
        watch = Stopwatch(method, device)
        source = batches.epoch(0)
        steps = [
            watch.step(method, optimizer, lambda: next(source), dtype)
            for _ in range(case["steps"] + WARM_UP)
        ]
        peak = peak_megabytes(device)
        with OperatorCalls() as calls, precision(dtype, device):
            watch.calls = calls
            method(to_device(next(source), device))
    own, views = (count.total() - count["encode"] for count in (calls.counts, calls.views))
    return {
        **{name: [step[name] for step in steps[WARM_UP:]] for name in steps[0]},
        "first_batch": [steps[0]["data"]],  # nobody prepared it
        "megabytes": peak,
        "calls": own,
        "views": views,
    }


def measure_floor(case: Case) -> Result:
    """Seconds of the convolutions of a method's encoders, each by itself, summed."""
    device, dtype = choose_device(case["device"]), PRECISIONS[case["precision"]]
    with tempfile.TemporaryDirectory() as folder:
        method, batches = prepare({**case, "steps": 0}, Path(folder))
        method.to(device)
        watch = Stopwatch(method, device)
        with OperatorCalls() as calls:
            watch.calls = calls
            method(to_device(next(batches.epoch(0)), device))
    found = calls.convolutions
    dtype = dtype or torch.float32
    alone = {c: convolution_seconds(c, dtype, device, case["steps"]) for c in set(found)}
    return {"seconds": [sum(alone[c] for c in found)], "convolutions": len(found)}


def measure_loss(case: Case) -> Result:
    """Memory of PSCL-SimCLR's patch loss at the largest scale, above its patches' features."""
    device, config = choose_device(case["device"]), Config()
    method = build_method("simclr", config.to_dict())
    assert isinstance(method, PSCL)
    shape = (case["batch"] + 1, config.num_classes, method.templates[-1], config.embed_dim)
    query, key = (torch.randn(shape, device=device, requires_grad=True) for _ in range(2))
    with LiveBytes() as memory:
        loss = patch_nt_xent(query, key, config.temperature)
        forward = memory.peak
        loss.backward()
    return {"forward": [forward / 2**20], "backward": [memory.peak / 2**20]}


MEASURES = {
    "unit": measure_unit,
    "step": measure_step,
    "floor": measure_floor,
    "loss": measure_loss,
}


def measure(case: Case) -> Result:
    """Measure a case in this process."""
    return MEASURES[case["kind"]](case)


def cases_of(given: argparse.Namespace) -> list[Case]:
    """The unit, then step and floor of every method and precision, and PSCL-SimCLR's patch loss."""
    names = ("size", "batch", "steps", "device", "threads", "recompute")
    common = {name: getattr(given, name) for name in names}
    cases: list[Case] = [{"kind": "unit", "plain": True, **common}]
    for method, kind in itertools.product(given.methods, ("step", "floor")):
        for name in given.precisions:
            cases.append({"kind": kind, "method": method, "precision": name, **common})
    if "simclr" in given.methods:
        cases.append({"kind": "loss", **common})
    return cases


def summary(cases: Sequence[Case], results: Sequence[Sequence[Result]]) -> dict[str, Any]:
    """Medians over the rounds: E, and a row for each method and precision."""
    unit = pooled(results[0], "seconds")
    floors = {
        (case["method"], case["precision"]): pooled(found, "seconds")
        for case, found in zip(cases, results, strict=True)
        if case["kind"] == "floor"
    }
    rows = []
    for case, found in zip(cases, results, strict=True):
        if case["kind"] != "step":
            continue
        seconds = pooled(found, "seconds")
        floor = floors[case["method"], case["precision"]]
        parts = {part: pooled(found, part) for part in PARTS}
        own = sum(parts[p] for p in ("sampling", "losses", "optimizer"))
        steps = PAPER_IMAGES // case["batch"]
        rows.append(
            {
                "method": case["method"],
                "precision": case["precision"],
                "seconds": seconds,
                "in E": seconds / unit,
                "floor": floor,
                "floor in E": floor / unit,
                "in floors": seconds / floor,
                **parts,
                "sampling+losses+optimizer": own / seconds,
                "first batch": pooled(found, "first_batch"),
                "GB": max(result["megabytes"] for result in found) / 1024,
                "calls": found[0]["calls"],
                "of them views": found[0]["views"],
                "s/epoch": seconds * steps,
                "h/run": seconds * steps * PAPER_EPOCHS / 3600,
            }
        )
    gigabytes = max(result["megabytes"] for result in results[0]) / 1024
    losses = [
        found[0] for case, found in zip(cases, results, strict=True) if case["kind"] == "loss"
    ]
    memory = [
        {"patch loss, largest scale": name, "MiB above the features": found[name][0]}
        for found in losses
        for name in ("forward", "backward")
    ]
    return {"E": unit, "E GB": gigabytes, "rows": rows, "memory": memory}


def growth(given: argparse.Namespace) -> dict[str, Any]:
    """Seconds over four sizes and four batches, and the powers of pixels and images they follow."""
    sizes = [max(16, round(given.size * f / 8) * 8) for f in (0.35, 0.5, 0.7, 1.0)]
    images = [max(1, round(given.batch * f)) for f in (0.25, 0.5, 1.0, 2.0)]
    cases = [
        {**case, "size": size, "batch": batch}
        for case in cases_of(given)
        if case["kind"] == "step"
        for size, batch in dict.fromkeys(
            [*((size, given.batch) for size in sizes), *((given.size, batch) for batch in images)]
        )
    ]
    results = interleaved(cases, given.rounds, lambda case: in_own_process(__file__, case))
    rows = [
        {
            **{name: case[name] for name in ("method", "precision", "size", "batch")},
            **{name: pooled(found, name) for name in ("seconds", *PARTS)},
            "GB": max(result["megabytes"] for result in found) / 1024,
        }
        for case, found in zip(cases, results, strict=True)
    ]
    slopes = []
    for method, name in itertools.product(given.methods, given.precisions):
        own = [r for r in rows if (r["method"], r["precision"]) == (method, name)]
        by_size = [(2 * math.log(r["size"]), r) for r in own if r["batch"] == given.batch]
        by_batch = [(math.log(r["batch"] + 1), r) for r in own if r["size"] == given.size]
        for axis, points in (("pixels", by_size), ("images", by_batch)):
            xs = [x for x, _ in points]
            powers = {
                part: statistics.linear_regression(xs, [math.log(r[part]) for _, r in points]).slope
                for part in ("seconds", "sampling", "losses", "backward")
                if all(r[part] > 0 for _, r in points)
            }
            slopes.append({"method": method, "precision": name, "power of": axis, **powers})
    return {"rows": rows, "slopes": slopes}


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line; SystemExit 2 with one line for what is not legal."""
    parser = parser_of(__doc__)
    add = parser.add_argument
    add("--size", type=at_least(16), default=376, help="pixels a side")
    add("--batch", type=at_least(1), default=8, help="images, the annotated one comes on top")
    add("--methods", type=some_of(list(METHODS)), default=list(METHODS))
    add("--precisions", type=some_of(list(PRECISIONS)), default=list(PRECISIONS))
    add(
        "--steps", type=at_least(1), default=3, help="timed steps of a round, after some to warm up"
    )
    add("--recompute", type=int, default=0, choices=range(-1, 5), help="as of a run, -1 to 4")
    add("--growth", action="store_true", help="over four sizes and four batches instead")
    add_case_options(parser)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    given = parse(argv)

    def report() -> Result:
        if given.growth:
            return growth(given)
        cases = cases_of(given)
        results = interleaved(cases, given.rounds, lambda case: in_own_process(__file__, case))
        return summary(cases, results)

    return run_benchmark(given, ("size", "batch", "steps", "rounds", "recompute"), measure, report)


if __name__ == "__main__":
    sys.exit(main())
