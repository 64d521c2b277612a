"""How long fine-tuning on one image takes, and evaluating the test set.

    python benchmarks/finetune.py
    python benchmarks/finetune.py --size 96 --json

``plain`` is the unit: single precision, default memory format, glibc as it is, transposed
convolutions with their bias. The others are what the engine does; its own stage is timed.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # when it is run as a script

from benchmarks.measure import (  # noqa: E402
    Case,
    Result,
    add_case_options,
    at_least,
    draw_set,
    in_own_process,
    interleaved,
    now,
    parser_of,
    peak_megabytes,
    pooled,
    run_benchmark,
)
from benchmarks.step import PRECISIONS, make_plain  # noqa: E402
from config import Config  # noqa: E402
from config_run import Job, Supervised  # noqa: E402
from data import ImageStore  # noqa: E402
from networks import UNet  # noqa: E402
from utils.device import choose_device, to_device  # noqa: E402

VARIANTS: dict[str, torch.dtype | None] = {"plain": None, **PRECISIONS}
PARTS = ("data", "forward", "backward", "optimizer")


class Plain(Supervised):
    """The same training with a network written plainly, in the default memory format."""

    def network(self) -> nn.Module:
        """The UNet with ``PlainUp``."""
        network = super().network()
        assert isinstance(network, UNet)
        make_plain(network.encode)
        return network

    def to_memory(self, module: nn.Module) -> nn.Module:
        """Move a network to the device as it is."""
        return module.to(self.device)


def measure(case: Case) -> Result:
    """Seconds of the steps by parts, and of an evaluation of the drawn test set."""
    plain = case["variant"] == "plain"
    device = choose_device(case["device"])
    found: dict[str, list[float]] = {name: [] for name in (*PARTS, "seconds", "evaluation")}
    with tempfile.TemporaryDirectory() as folder:
        draw_set(Path(folder) / "set", case["size"], case["images"], num_classes=4)
        config = Config(
            data_dir=f"{folder}/set", output_dir=folder, stages="sup", recompute=-1 if plain else 0
        ).resolved()
        job = Job(config, ImageStore(), "1", 0, device, VARIANTS[case["variant"]])
        stage = (Plain if plain else Supervised)(job)
        torch.manual_seed(0)
        stage.build()
        for epoch in range(case["steps"] + 2):
            marks = step(stage, epoch, plain)
            if epoch >= 2:  # memory is still being mapped in the first two
                for name, seconds in zip(PARTS, marks, strict=True):
                    found[name].append(seconds)
                found["seconds"].append(sum(marks))
        for number in range(2):
            start = now(device)
            stage.evaluate(0)
            if number:
                found["evaluation"].append(now(device) - start)
    return {**found, "megabytes": peak_megabytes(device)}


def step(stage: Supervised, epoch: int, plain: bool) -> list[float]:
    """Seconds of an epoch of one step: data, forward, backward, optimizer."""
    stage.module.train()
    marks = [now(stage.device)]
    batch: dict[str, Any] = next(stage.batches.epoch(epoch))
    if not plain:
        batch = to_device(batch, stage.device)
    else:
        batch = {k: v.to(stage.device) if hasattr(v, "to") else v for k, v in batch.items()}
    marks.append(now(stage.device))
    with stage.precision():
        loss = stage.losses(batch)["loss"]
    marks.append(now(stage.device))
    stage.optimizer.zero_grad()
    loss.backward()
    marks.append(now(stage.device))
    stage.optimizer.step()
    marks.append(now(stage.device))
    return [b - a for a, b in itertools.pairwise(marks)]


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line; SystemExit 2 with one line for what is not legal."""
    parser = parser_of(__doc__)
    add = parser.add_argument
    add("--size", type=at_least(16), default=376, help="pixels a side")
    add("--images", type=at_least(1), default=16, help="test images")
    add("--steps", type=at_least(1), default=5, help="timed steps of a round, after two to warm up")
    add_case_options(parser)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    given = parse(argv)

    def report() -> Result:
        common = {n: getattr(given, n) for n in ("size", "images", "steps", "device", "threads")}
        cases = [{"variant": name, "plain": name == "plain", **common} for name in VARIANTS]
        results = interleaved(cases, given.rounds, lambda case: in_own_process(__file__, case))
        unit = pooled(results[0], "seconds")
        rows = [
            {
                "variant": case["variant"],
                "s/step": pooled(found, "seconds"),
                "of plain": pooled(found, "seconds") / unit,
                **{part: pooled(found, part) for part in PARTS},
                "evaluation s/image": pooled(found, "evaluation") / given.images,
                "GB": statistics.median(result["megabytes"] for result in found) / 1024,
            }
            for case, found in zip(cases, results, strict=True)
        ]
        return {"rows": rows}

    return run_benchmark(given, ("size", "images", "steps", "rounds"), measure, report)


if __name__ == "__main__":
    sys.exit(main())
