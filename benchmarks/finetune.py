"""How long fine-tuning on one image takes, and evaluating the test set.

    python benchmarks/finetune.py
    python benchmarks/finetune.py --size 96 --json

``plain`` is the unit: single precision, default memory format, glibc as it is, transposed
convolutions with their bias, no graph. The other variants time the engine's own stage as train.py
runs it: on CUDA its passes are replayed as a graph.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # when it is run as a script

from utils import leave_while_loading

if __name__ == "__main__":  # before the imports that take seconds
    leave_while_loading()

import torch
from torch import nn

from benchmarks import measure
from benchmarks.measure import Case, Result
from benchmarks.step import PRECISIONS, make_plain
from config import Config
from imaging.store import ImageStore
from networks import UNet
from stages.finetuning import Supervised
from stages.job import Job
from utils.device import arithmetic, choose_device, to_device

VARIANTS: dict[str, torch.dtype | None] = {"plain": None, **PRECISIONS}
PARTS = ("data", "passes", "optimizer")


class Plain(Supervised):
    """The same training with the plain network, in the default memory format."""

    def network(self) -> nn.Module:
        """The UNet with ``PlainUp``."""
        network = super().network()
        assert isinstance(network, UNet)
        make_plain(network.encode)
        return network

    def to_memory(self, module: nn.Module) -> nn.Module:
        """Move a network to the device in its own memory format."""
        return module.to(self.device)


def measure_case(case: Case) -> Result:
    """Measure a case in this process, computed as train.py would: in fp32 without TF32."""
    with arithmetic(VARIANTS[case["variant"]], deterministic=False):
        return measure_steps(case)


def measure_steps(case: Case) -> Result:
    """Seconds of the steps by parts, and of an evaluation of the drawn test set."""
    plain, device = case["variant"] == "plain", choose_device(case["device"])
    with tempfile.TemporaryDirectory() as folder:
        measure.draw_set(Path(folder) / "set", case["size"], case["images"], num_classes=4)
        own: dict[str, Any] = {"recompute": -1, "cuda_graphs": False} if plain else {"recompute": 0}
        config = Config(data_dir=f"{folder}/set", output_dir=folder, stages="sup", **own)
        job = Job(config.resolved(), ImageStore(), "1", 0, device, VARIANTS[case["variant"]])
        stage = (Plain if plain else Supervised)(job)
        torch.manual_seed(0)
        stage.build()
        # The first two steps and the first evaluation also map memory, and record the graph.
        steps = [step(stage, epoch, plain) for epoch in range(case["steps"] + 2)][2:]
        watch = measure.Stopwatch(device)
        for _ in range(2):
            watch.parts.clear()
            with watch.part("evaluation"):
                stage.evaluate(0)
    return {
        **{part: [found[part] for found in steps] for part in PARTS},
        "seconds": [sum(found.values()) for found in steps],
        "evaluation": [watch.parts["evaluation"]],
        "graphs": stage.graphs is not None and bool(stage.graphs.recordings),
        "megabytes": measure.peak_megabytes(device),
    }


def step(stage: Supervised, epoch: int, plain: bool) -> dict[str, float]:
    """Seconds by part of an epoch, which is one step."""
    stage.module.train()
    watch = measure.Stopwatch(stage.device)
    with watch.part("data"):
        batch: dict[str, Any] = next(stage.batches.epoch(epoch))
        if plain:
            batch = {k: v.to(stage.device) if hasattr(v, "to") else v for k, v in batch.items()}
        else:
            batch = to_device(batch, stage.device)
        batch = stage.prepared(batch)
    with watch.part("passes"):
        stage.optimizer.zero_grad()
        (stage.graphs or stage.passes)(batch)
    with watch.part("optimizer"):
        stage.update()
    return watch.parts


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line; SystemExit 2 with a line for what is wrong."""
    parser = measure.parser_of_cases(__doc__)
    add = parser.add_argument
    add("--size", type=measure.at_least(16), default=376, help="side of the images in pixels")
    add("--images", type=measure.at_least(1), default=16, help="how many test images")
    add(
        "--steps",
        type=measure.at_least(1),
        default=5,
        help="timed steps of a round, after warming up",
    )
    return parser.parse_args(argv)


def report(given: argparse.Namespace) -> Result:
    """Measure all variants."""
    common = {n: getattr(given, n) for n in ("size", "images", "steps", "device", "threads")}
    cases = [{"variant": name, "plain": name == "plain", **common} for name in VARIANTS]
    results = measure.interleaved(__file__, cases, given.rounds)
    rows = [
        {
            "variant": case["variant"],
            "graph": str(all(each["graphs"] for each in found)),
            "s/step": measure.pooled(found, "seconds"),
            "of plain": measure.pooled(found, "seconds") / measure.pooled(results[0], "seconds"),
            **{part: measure.pooled(found, part) for part in PARTS},
            "evaluation s/image": measure.pooled(found, "evaluation") / given.images,
            "GB": measure.gigabytes(found),
        }
        for case, found in zip(cases, results, strict=True)
    ]
    return {"rows": rows}


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    names = ("size", "images", "steps", "rounds")
    return measure.run_benchmark(parse(argv), names, measure_case, report)


if __name__ == "__main__":
    sys.exit(main())
