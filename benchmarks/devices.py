"""How a step of pretraining grows with the devices: measured by two processes, estimated for N.

    python benchmarks/devices.py --methods simclr,moco --size 128

Measured are 1 process with 1 and with 2 threads, and 2 processes with 1 thread each, in turn. The
estimate takes the seconds of an image, and of what every device does alike, from steps of a whole
and of half a batch, and the bytes that a step exchanges, counted; the batch stays the same.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # when it is run as a script

from utils import leave_while_loading

if __name__ == "__main__":  # before the imports that take seconds
    leave_while_loading()

import torch
from torch import Tensor

import model
from benchmarks.measure import (
    at_least,
    batches_of,
    draw_set,
    load_average,
    parser_of,
    print_case,
    some_of,
    table,
)
from config import SELF_MODES, Config
from model import METHODS, build_method
from utils.commandline import exit_code
from utils.device import choose_device, to_device
from utils.ranks import group
from utils.ranks.tensors import sum_gradients

NUMBERS = (1, 2, 4, 8, 16, 32)
HALF = 0.5  # efficiency below which another use of the devices is better


def steps(case: dict[str, Any]) -> dict[str, Any]:
    """Seconds of each step, the processor's too, and the bytes that ranks would exchange."""
    device = choose_device(case["device"])
    config = Config(data_dir=case["folder"], self_mode=case["method"],
                    self_batch_size=case["batch"]).resolved()  # fmt: skip
    torch.manual_seed(0)
    method = build_method(config.self_mode, config.to_dict()).train()
    method.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    trained = [p for p in method.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(trained, config.self_lr, fused=device.type in ("cpu", "cuda"))
    gathered: list[int] = []
    together = model.all_ranks

    def counted(*rows: Tensor) -> tuple[Tensor, ...]:
        gathered.extend(x.numel() * x.element_size() for x in rows)
        return together(*rows)

    model.all_ranks = counted
    batches = batches_of(config)
    source = itertools.chain.from_iterable(batches.epoch(n) for n in itertools.count())
    wall, processor = [], []
    for batch in itertools.islice(source, case["steps"] + 1):
        gathered.clear()
        start = time.perf_counter(), time.process_time()
        losses = method(to_device(batch, device))
        optimizer.zero_grad()
        losses["loss"].backward()
        sum_gradients(method.parameters())
        optimizer.step()
        losses["loss"].item()  # waits for the device
        wall.append(time.perf_counter() - start[0])
        processor.append(time.process_time() - start[1])
    gradients = sum(p.grad.numel() * 4 for p in trained if p.grad is not None)
    found = {"wall": wall[1:], "processor": processor[1:], "gradients": gradients}
    return {**found, "rows": sum(gathered), "exchanges": len(gathered) + 1}


def measured(case: dict[str, Any], ranks: int) -> dict[str, Any]:
    """What rank 0 of so many processes measures; the processor's seconds are of all ranks."""
    with socket.socket() as place:
        place.bind(("localhost", 0))
        port = place.getsockname()[1]
    told = {"WORLD_SIZE": ranks, "MASTER_ADDR": "localhost", "MASTER_PORT": port}
    words, running = [sys.executable, __file__, "--case", json.dumps(case)], []
    for rank in range(ranks):
        own = {
            name: str(value) for name, value in {**told, "RANK": rank, "LOCAL_RANK": rank}.items()
        }
        out = subprocess.PIPE if rank == 0 else subprocess.DEVNULL
        running.append(subprocess.Popen(words, stdout=out, env=os.environ | own, text=True))
    lines = running[0].communicate()[0].splitlines()
    if any(process.wait() for process in running):
        raise SystemExit(f"devices.py: case {case} failed")
    found: dict[str, Any] = json.loads(lines[-1])
    return {**found, "processor": [ranks * seconds for seconds in found["processor"]]}


def estimate(
    batch: int, annotated: int, whole: float, half: float, bytes_: tuple[int, int], exchanges: int,
    bandwidth: float, latency: float,
) -> list[dict[str, Any]]:  # fmt: skip
    """Seconds of a step by N devices that share a batch, and how much of them is used.

    ``whole`` and ``half`` are seconds with all and with half of the images; ``bytes_`` those of
    the gradients and of all rows. A ring sends gradients twice and rows once, but for 1 / N.
    """
    image = max(whole - half, 0.0) / (batch / 2)
    alike = whole - image * (batch + annotated)  # losses, optimizer
    rows = []
    for n in (n for n in NUMBERS if n <= batch):
        sent = (2 * bytes_[0] + bytes_[1]) * (n - 1) / n
        exchange = sent / bandwidth + (exchanges * latency * (n - 1) if n > 1 else 0.0)
        seconds = alike + image * (batch / n + annotated) + exchange
        rows.append({"devices": n, "s per step": seconds, "of it exchange": exchange,
                     "faster": whole / seconds, "used": whole / seconds / n})  # fmt: skip
    return rows


def report(given: argparse.Namespace) -> None:
    """Print the tables of all methods."""
    setups = {"1 x 1 thread": (1, 1, 1), "1 x 1 thread, half the batch": (1, 1, 2),
              "1 x 2 threads": (1, 2, 1), "2 x 1 thread": (2, 1, 1)}  # fmt: skip
    print(
        f"{given.size}x{given.size}, batch {given.batch}, {given.device}, torch {torch.__version__}"
    )
    with tempfile.TemporaryDirectory() as folder:
        draw_set(Path(folder, "set"), given.size, 4 * given.batch, 4)
        for method in given.methods:
            found: dict[str, list[dict[str, Any]]] = {name: [] for name in setups}
            loads = []
            for _ in range(given.rounds):
                for name, (ranks, threads, part) in setups.items():
                    case = {"method": method, "folder": f"{folder}/set", "threads": threads,
                            "batch": given.batch // part, "steps": given.steps,
                            "device": given.device}  # fmt: skip
                    found[name].append(measured(case, ranks))
                    loads.append(load_average())
            load = f"load of the machine {min(loads):.1f} to {max(loads):.1f}"
            print(f"\n{SELF_MODES[method]}, {load}\n")
            middle = {
                (name, key): statistics.median(v for one in rounds for v in one[key])
                for name, rounds in found.items()
                for key in ("wall", "processor")
            }
            rows = [{"processes": name, "s per step": middle[name, "wall"],
                     "processor s": middle[name, "processor"]} for name in setups]  # fmt: skip
            print(table(rows))
            first = found["1 x 1 thread"][0]
            sizes = first["gradients"], first["rows"]
            kind = "processor" if given.device == "cpu" else "wall"  # others may use the machine
            whole, half = (middle[name, kind] for name in list(setups)[:2])
            names = f"{sizes[0] / 1e6:.1f} MB of gradients, {sizes[1] / 1e6:.2f} MB of rows"
            print(f"\nEstimated: {names}, {given.bandwidth:g} GB/s, {given.latency:g} s\n")
            annotated = int(METHODS[method].needs_annotated)
            how = (given.bandwidth * 1e9, given.latency)
            guess = estimate(given.batch, annotated, whole, half, sizes, first["exchanges"], *how)
            print(table(guess))
            enough = [row["devices"] for row in guess if row["used"] >= HALF]
            print(f"\nUp to {max(enough)} devices more than half of them is used", flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = parser_of(__doc__)
    parser.add_argument(
        "--methods", type=some_of(METHODS), default=list(METHODS), help="methods to time"
    )
    parser.add_argument("--size", type=at_least(16), default=128, help="side of the images, pixels")
    parser.add_argument("--batch", type=at_least(4), default=8, help="images in a step")
    parser.add_argument("--steps", type=at_least(1), default=5, help="timed steps of a round")
    parser.add_argument("--rounds", type=at_least(1), default=2, help="rounds of all cases")
    parser.add_argument("--device", default="cpu", help="device of both processes")
    parser.add_argument(
        "--bandwidth", type=float, default=10.0, help="bandwidth between devices, GB/s"
    )
    parser.add_argument(
        "--latency", type=float, default=5e-5, help="latency of an exchange, seconds"
    )
    parser.add_argument("--case", type=json.loads, help=argparse.SUPPRESS)
    given = parser.parse_args(argv)

    def work() -> None:
        if given.case is None:
            report(given)
            return
        with group.joined():
            print_case(given.case, steps)

    return exit_code(work, "Nothing of it was kept")


if __name__ == "__main__":
    sys.exit(main())
