"""How long a pretraining step takes, where the time goes, what the convolutions alone would take.

    python benchmarks/step.py                                    # the paper's size, all methods
    python benchmarks/step.py --size 96 --batch 4 --methods simclr --json
    python benchmarks/step.py --growth --methods simclr          # over four sizes and four batches

E, the unit, is forward and backward of the UNet with its projection head on one view, plainly:
single precision, default memory format, glibc as it is, the head on all positions. The floor is the
time of every convolution of the method's encoders by itself, in the precision of the row; of the
last one, which PSCL does at patches alone, only the pass over all of view k, without backward.
A step is measured twice: by its parts, and (``train.py``) in the stage's own epoch on the same
images. What is compared is its cost: on a CPU the seconds of all its cores, by which runs compare
even where others use the machine; ``seconds``, on the wall, do not.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import math
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
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
from benchmarks.measure import Case, Result
from config import Config
from config_run import open_set
from data import Batch, Batches
from methods import Method
from model import METHODS, PSCL, build_method
from networks import SCALES, Encoder, ProjectedUNet, Up
from pscl.lazy_map import LazyMap
from pscl.losses import patch_nt_xent
from stages.pretraining import SelfSupervised
from utils.device import arithmetic, choose_device, fuses_optimizers, precision, to_device

PRECISIONS = {"fp32": None, "bf16": torch.bfloat16}
PARTS = ("encode", "sampling", "losses", "backward", "optimizer", "data")
PAPER_IMAGES, PAPER_EPOCHS = 198, 200
KINDS = ("step", "floor", "engine", "calls")  # of measurements of a method
WARM_UP = 6  # untimed steps of a method: they also map memory


class PlainUp(Up):
    """``Up`` with the bias inside its transposed convolution."""

    def join(self, x: Tensor, skip: Tensor) -> Tensor:
        """As ``Up.join``."""
        x = self.up(x)
        rows, columns = skip.shape[-2] - x.shape[-2], skip.shape[-1] - x.shape[-1]
        x = F.pad(x, (columns // 2, columns - columns // 2, rows // 2, rows - rows // 2))
        return torch.cat([skip, x], dim=1)


def make_plain(encoder: Encoder) -> None:
    """Replace an encoder's decoder blocks by ``PlainUp``."""
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
        start = measure.spent(device)
        image, maps = network(view)
        patches = [network.decode.patch(maps[s].flatten(2), s) for s in range(SCALES)]
        torch.stack([x.mean() for x in (image, *patches)]).sum().backward()
        network.zero_grad()
        seconds.append(measure.spent(device) - start)
    return {"cost": seconds[1:], "megabytes": measure.peak_megabytes(device)}


def config_of(case: Case, folder: Path) -> Config:
    """The settings of a run of a case, on its set, or on images that are drawn into a folder."""
    images = case["batch"] * (case["steps"] + WARM_UP + 1)
    own: dict[str, Any] = {"data_dir": case.get("data_dir"), "image_size": case["size"]}
    if not own["data_dir"]:
        measure.draw_set(folder / "set", case["size"], images, num_classes=4)
        own = {"data_dir": str(folder / "set")}
    mode = {"self_mode": case["method"], "self_batch_size": case["batch"]}
    return Config(num_classes=case.get("num_classes", 4), output_dir=str(folder), **mode, **own)


@contextmanager
def prepared(case: Case) -> Iterator[tuple[Method, Batches, measure.Stopwatch]]:
    """The method with the default settings, batches of drawn images, a stopwatch on its parts."""
    device = choose_device(case["device"])
    watch = measure.Stopwatch(device)
    with (
        tempfile.TemporaryDirectory() as folder,
        patch.object(LazyMap, "at", watch.timed(LazyMap.at, "encode")),  # the last convolution
    ):
        config = config_of(case, Path(folder))
        torch.manual_seed(0)
        method = build_method(case["method"], {**config.to_dict(), "recompute": case["recompute"]})
        method.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        timed: list[tuple[Any, str, str]] = []
        for module in method.modules():
            if isinstance(module, ProjectedUNet):
                timed += [(module, "forward", "encode"), (module, "embed", "encode")]
        if isinstance(method, PSCL):
            timed += [(method, "encode", "encode"), (method, "sample", "sampling")]
        for owner, name, part in timed:
            setattr(owner, name, watch.timed(getattr(owner, name), part))
        yield method, measure.batches_of(config), watch


def train_step(
    watch: measure.Stopwatch,
    method: Method,
    optimizer: torch.optim.Optimizer,
    next_batch: Callable[[], Batch],
    dtype: torch.dtype | None,
) -> dict[str, float]:
    """Seconds by part of one training step as the engine does it."""
    watch.parts.clear()
    with watch.part("data"):
        batch = to_device(next_batch(), watch.device)
    with watch.part("losses"), precision(dtype, watch.device):
        loss = method(batch)["loss"]
    with watch.part("backward"):
        optimizer.zero_grad()
        loss.backward()
    with watch.part("optimizer"):
        optimizer.step()
    return {part: watch.parts[part] for part in PARTS}


def without_end(batches: Batches) -> Iterator[Batch]:
    """The batches of one epoch after the other: a set of one's own may have few."""
    return itertools.chain.from_iterable(map(batches.epoch, itertools.count()))


def make_adam(method: Method, device: torch.device) -> torch.optim.Optimizer:
    """The optimizer of a run with the default settings."""
    learning = [p for p in method.parameters() if p.requires_grad]
    return torch.optim.Adam(learning, Config().self_lr, fused=fuses_optimizers(device))


def count_steps(case: Case) -> list[measure.OperatorCalls]:
    """Operator calls of whole steps: upload, forward, backward and optimizer.

    The batches are made outside, and the step before the first one also makes Adam's state.
    """
    dtype, counts = PRECISIONS[case["precision"]], []
    with prepared(case) as (method, batches, watch):
        optimizer, source = make_adam(method, watch.device), without_end(batches)
        train_step(watch, method, optimizer, lambda: next(source), dtype)
        for batch in itertools.islice(source, case["steps"]):
            with measure.counted(watch) as calls:
                train_step(watch, method, optimizer, partial(dict, batch), dtype)
            counts.append(calls)
    return counts


def measure_calls(case: Case) -> Result:
    """Of whole steps at 64 px: calls without views if nothing is recomputed, and what waits.

    ``again`` are the calls that the case's ``recompute`` adds.
    """
    small = {**case, "size": min(case["size"], 64), "recompute": -1}
    counts = count_steps(small)
    again = count_steps({**small, "steps": 1, "recompute": case["recompute"]})[0]
    calls = [count.counts.total() - count.views.total() for count in counts]
    more = again.counts.total() - again.views.total() - calls[-1]
    views, waits = counts[-1].views.total(), sum(count.waits.total() for count in counts)
    return {"calls": calls, "views": views, "again": more, "waits": waits}


def measure_step(case: Case) -> Result:
    """Seconds of a step of one method in one precision by parts, peak memory, calls."""
    dtype = PRECISIONS[case["precision"]]
    with prepared(case) as (method, batches, watch):
        optimizer, source = make_adam(method, watch.device), without_end(batches)
        steps, cost = [], []
        for _ in range(case["steps"] + WARM_UP):
            before = measure.spent(watch.device)
            steps.append(train_step(watch, method, optimizer, lambda: next(source), dtype))
            cost.append(measure.spent(watch.device) - before)
        peak = measure.peak_megabytes(watch.device)
        with measure.OperatorCalls(watch) as calls, precision(dtype, watch.device):
            method(to_device(next(source), watch.device))
    own, views = (count.total() - count["encode"] for count in (calls.counts, calls.views))
    return {
        **{part: [step[part] for step in steps[WARM_UP:]] for part in PARTS},
        "seconds": [sum(step.values()) for step in steps[WARM_UP:]],
        "cost": cost[WARM_UP:],
        "first_batch": [steps[0]["data"]],  # later ones are prepared ahead
        "megabytes": peak,
        "calls": own,
        "views": views,
    }


def measure_engine(case: Case) -> Result:
    """Cost of a step as train.py does it, in the epoch of the stage itself."""
    costs: list[float] = []

    class Enough(Exception):
        pass

    with tempfile.TemporaryDirectory() as folder:
        amp = "off" if PRECISIONS[case["precision"]] is None else "bf16"
        more = {"amp": amp, "recompute": case["recompute"], "device": case["device"]}
        config = dataclasses.replace(config_of(case, Path(folder)), repeats="0", **more)
        stage = SelfSupervised(open_set(config.resolved())[0][0])
        stage.seed()
        stage.build()

        def step_done() -> None:
            costs.append(measure.spent(stage.device))
            if len(costs) > case["steps"] + WARM_UP:
                raise Enough

        most = case["steps"] + WARM_UP + 1  # epochs, of one step or more
        with suppress(Enough), stage.preparing(0, most):
            for epoch in range(most):
                stage.log = Mock()  # of an epoch that ends before
                stage.train_epoch(epoch, step_done)
    return {"cost": [b - a for a, b in itertools.pairwise(costs)][WARM_UP:]}


def measure_floor(case: Case) -> Result:
    """Sum of the costs of a method's convolutions, each by itself."""
    dtype = PRECISIONS[case["precision"]] or torch.float32
    repeats, case = case["steps"], {**case, "steps": 0}
    with prepared(case) as (method, batches, watch), measure.OperatorCalls(watch) as calls:
        method(to_device(next(batches.epoch(0)), watch.device))
    found = calls.convolutions
    alone = {c: measure.convolution_seconds(c, dtype, watch.device, repeats) for c in set(found)}
    return {"cost": [sum(alone[c] for c in found)], "convolutions": len(found)}


def measure_loss(case: Case) -> Result:
    """Memory of PSCL-SimCLR's patch loss at the largest scale, above its patches' features."""
    device, config = choose_device(case["device"]), Config()
    method = build_method("simclr", config.to_dict())
    assert isinstance(method, PSCL)
    shape = (case["batch"] + 1, config.num_classes, method.templates[-1], config.embed_dim)
    query, key = (torch.randn(shape, device=device, requires_grad=True) for _ in range(2))
    with measure.LiveBytes() as memory:
        loss = patch_nt_xent(query, key, config.temperature)
        forward = memory.peak
        loss.backward()
    return {"forward": [forward / 2**20], "backward": [memory.peak / 2**20]}


def measure_case(case: Case) -> Result:
    """Measure a case in this process, computed as train.py would: in fp32 without TF32."""
    kinds = {"unit": measure_unit, "step": measure_step, "floor": measure_floor}
    kinds |= {"engine": measure_engine}
    kinds |= {"calls": measure_calls, "loss": measure_loss}
    with arithmetic(PRECISIONS[case.get("precision", "fp32")], deterministic=False):
        return kinds[case["kind"]](case)


def cases_of(given: argparse.Namespace) -> list[Case]:
    """The unit, step, floor and calls of every method and precision, PSCL-SimCLR's patch loss."""
    names = ("size", "batch", "steps", "device", "threads", "recompute", "data_dir", "num_classes")
    common = {name: getattr(given, name) for name in names}
    rows = itertools.product(given.methods, KINDS, given.precisions)
    cases = [{"kind": k, "method": m, "precision": p, **common} for m, k, p in rows]
    loss = [{"kind": "loss", **common}] if "simclr" in given.methods else []
    return [{"kind": "unit", "plain": True, **common}, *cases, *loss]


def summary(cases: Sequence[Case], results: Sequence[Sequence[Result]]) -> dict[str, Any]:
    """Medians over the rounds: E, and a row for each method and precision."""
    unit = measure.pooled(results[0], "cost")
    by_kind: dict[str, list[tuple[Case, Sequence[Result]]]] = {
        kind: [] for kind in (*KINDS, "loss")
    }
    for case, found in zip(cases[1:], results[1:], strict=True):
        by_kind[case["kind"]].append((case, found))
    rows = []
    of_rows = zip(*(by_kind[kind] for kind in KINDS[:3]), strict=True)
    for (case, found), (_, of_floor), (_, of_engine) in of_rows:
        seconds, cost = measure.pooled(found, "seconds"), measure.pooled(found, "cost")
        floor = measure.pooled(of_floor, "cost")
        parts = {part: measure.pooled(found, part) for part in PARTS}
        own = sum(parts[p] for p in ("sampling", "losses", "optimizer"))
        epoch = seconds * (PAPER_IMAGES // case["batch"])
        rows.append(
            {
                "method": case["method"],
                "precision": case["precision"],
                "seconds": seconds,
                "cost": cost,
                "cost in train.py": measure.pooled(of_engine, "cost"),
                "in E": cost / unit,
                "floor": floor,
                "floor in E": floor / unit,
                "in floors": cost / floor,
                **parts,
                "sampling+losses+optimizer": own / seconds,
                "first batch": measure.pooled(found, "first_batch"),
                "GB": measure.gigabytes(found),
                "calls": found[0]["calls"],
                "of them views": found[0]["views"],
                "s/epoch": epoch,
                "h/run": epoch * PAPER_EPOCHS / 3600,
            }
        )
    calls = [
        {
            "method": case["method"],
            "precision": case["precision"],
            "calls of a step at 64 px": max(found[0]["calls"]),
            "fewest": min(found[0]["calls"]),
            "views beside": found[0]["views"],
            "recomputed beside": found[0]["again"],
            "waits": found[0]["waits"],
        }
        for case, found in by_kind["calls"]
    ]
    memory = [
        {"patch loss, largest scale": name, "MiB above the features": found[0][name][0]}
        for _, found in by_kind["loss"]
        for name in ("forward", "backward")
    ]
    return {"E": unit, "E GB": measure.gigabytes(results[0]), "rows": rows} | {
        "calls": calls,
        "memory": memory,
    }


def growth(given: argparse.Namespace) -> dict[str, Any]:
    """Seconds over four sizes and four batches, and the powers of pixels and images they follow."""
    sizes = [max(16, round(given.size * f / 8) * 8) for f in (0.35, 0.5, 0.7, 1.0)]
    images = [max(1, round(given.batch * f)) for f in (0.25, 0.5, 1.0, 2.0)]
    pairs = dict.fromkeys([(s, given.batch) for s in sizes] + [(given.size, b) for b in images])
    steps = [case for case in cases_of(given) if case["kind"] == "step"]
    cases = [{**case, "size": s, "batch": b} for case in steps for s, b in pairs]
    results = measure.interleaved(__file__, cases, given.rounds)
    rows = [
        {
            **{name: case[name] for name in ("method", "precision", "size", "batch")},
            **{name: measure.pooled(found, name) for name in ("seconds", *PARTS)},
            "GB": measure.gigabytes(found),
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
    """Read the command line; SystemExit 2 with a line for what is wrong."""
    parser = measure.parser_of_cases(__doc__)
    add = parser.add_argument
    add("--size", type=measure.at_least(16), default=376, help="side of the images in pixels")
    add("--batch", type=measure.at_least(1), default=8, help="images beside the annotated one")
    add("--methods", type=measure.some_of(METHODS), default=[*METHODS], help="methods to time")
    add(
        "--precisions",
        type=measure.some_of(PRECISIONS),
        default=[*PRECISIONS],
        help="fp32, bf16 or both",
    )
    add(
        "--steps",
        type=measure.at_least(1),
        default=3,
        help="timed steps of a round, after warming up",
    )
    add("--recompute", type=int, default=0, choices=range(-1, 5), help="--recompute of the run")
    add("--data_dir", help="a set whose images are used, resized; default: drawn images")
    add("--num_classes", type=measure.at_least(2), default=4, help="classes of that set")
    add("--growth", action="store_true", help="time four sizes and four batches instead")
    return parser.parse_args(argv)


def report(given: argparse.Namespace) -> Result:
    """Measure all cases, or how they grow."""
    if given.growth:
        return growth(given)
    cases = cases_of(given)
    return summary(cases, measure.interleaved(__file__, cases, given.rounds))


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    names = ("size", "batch", "steps", "rounds", "recompute")
    return measure.run_benchmark(parse(argv), names, measure_case, report)


if __name__ == "__main__":
    sys.exit(main())
