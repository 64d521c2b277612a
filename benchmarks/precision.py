"""Loss curves of the same pretraining in single precision and in bf16: a line of JSON a step.

    python benchmarks/precision.py --data_dir dataset/uhcs --image_size 188 --steps 50

Both start from the same weights and see the same batches and the same sampling noise.
"""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # when it is run as a script

from utils import leave_while_loading

if __name__ == "__main__":  # before the imports that take seconds
    leave_while_loading()

import torch

from benchmarks.measure import at_least, batches_of, parser_of, use_threads
from benchmarks.step import PRECISIONS
from config import Config
from model import METHODS, build_method
from utils.commandline import exit_code
from utils.device import (
    arithmetic,
    choose_device,
    keep_freed_memory,
    mixed_seed,
    precision,
    to_device,
)
from utils.files import DataError


def compare(config: Config, device: torch.device, steps: int) -> Iterator[dict[str, object]]:
    """Losses of both precisions, step by step on the same batch and noise."""
    runs = {}
    for name in PRECISIONS:
        torch.manual_seed(mixed_seed(config.seed, 1))
        method = build_method(config.self_mode, config.to_dict())
        method.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        learning = [p for p in method.parameters() if p.requires_grad]
        runs[name] = method.train(), torch.optim.Adam(learning, config.self_lr)
    batches = batches_of(config)
    if not len(batches):
        raise DataError(f"{config.data_dir}/train_numf/img: no image; give another --data_dir")
    source = itertools.chain.from_iterable(batches.epoch(epoch) for epoch in itertools.count())
    for step, batch in enumerate(itertools.islice(source, steps)):
        losses = {}
        for name, (method, optimizer) in runs.items():
            torch.manual_seed(mixed_seed(config.seed, 2, step))
            with arithmetic(PRECISIONS[name], deterministic=False):  # as train.py, without TF32
                with precision(PRECISIONS[name], device):
                    found = method(to_device(batch, device))
                optimizer.zero_grad()
                found["loss"].backward()
            optimizer.step()
            losses[name] = {key: round(value.item(), 5) for key, value in found.items()}
        yield {"step": step, **losses}


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = parser_of(__doc__)
    parser.add_argument("--data_dir", required=True, help="folder of the set")
    parser.add_argument("--image_size", type=int, default=188, help="side of the images in pixels")
    parser.add_argument("--method", choices=tuple(METHODS), default="simclr", help="pretraining")
    parser.add_argument("--steps", type=at_least(1), default=50, help="how many steps")
    parser.add_argument("--device", default="auto", help="where to compute")
    given = parser.parse_args(argv)

    def work() -> None:
        use_threads(given.threads)
        keep_freed_memory()
        size, method = given.image_size, given.method
        config = Config(data_dir=given.data_dir, image_size=size, self_mode=method).resolved()
        for line in compare(config, choose_device(given.device), given.steps):
            print(json.dumps(line), flush=True)

    return exit_code(work, "The same command begins again")


if __name__ == "__main__":
    sys.exit(main())
