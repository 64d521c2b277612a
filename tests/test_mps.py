"""What a step of pretraining asks of a device, beside what Apple's have (MPS)."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import step
from model import METHODS


class Names(TorchDispatchMode):
    """Names of the operators that are called below it, such as ``add.Tensor``."""

    def __init__(self) -> None:
        super().__init__()
        self.found: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Note the operator and do it."""
        self.found.add(str(func).removeprefix("aten."))
        return func(*args, **(kwargs or {}))


def without_mps() -> set[str]:
    """Operators, as of ``Names``, that a CPU has and Apple's devices do not.

    PyTorch's own table of operators comes with it: which devices have a kernel of their own, and
    which take another operator's (``structured_delegate``) or are made of others (composites).
    """
    table = Path(torch.__file__).parents[1] / "torchgen/packaged/ATen/native/native_functions.yaml"
    entries = {}
    for entry in re.split(r"^- func: ", table.read_text(encoding="utf-8"), flags=re.M)[1:]:
        name = re.match(r"[\w.]+", entry)
        assert name
        entries[name[0]] = entry

    def lacks(entry: str) -> bool:
        other = re.search(r"structured_delegate: ([\w.]+)", entry)
        if other:
            return lacks(entries[other[1]])
        kernels = re.search(r"^  dispatch:\n((?:    .*\n)+)", entry, flags=re.M)
        keys = (
            set(re.findall(r"\w+", " ".join(re.findall(r"^    ([^:#]+):", kernels[1], re.M))))
            if kernels
            else set()
        )
        return "CPU" in keys and not any(key == "MPS" or "Composite" in key for key in keys)

    missing = {name for name, entry in entries.items() if lacks(entry)}
    return {name if "." in name else f"{name}.default" for name in missing}


def test_the_table_of_operators_tells_what_apples_devices_lack() -> None:
    """As the symbols of its builds for macOS do: 2.6 and 2.14 have ``gather``, no ``take``."""
    missing = without_mps()
    assert (
        "take.default" in missing and not {"gather.default", "add.Tensor", "mm.default"} & missing
    )


@pytest.mark.parametrize("method", METHODS)
def test_a_step_of_pretraining_asks_nothing_that_apples_devices_lack(method: str) -> None:
    """But for what the program does otherwise there, see ``pscl.coordinates``, ``geometry``."""
    case = {"method": method, "precision": "fp32", "size": 32, "batch": 2, "steps": 1}
    with Names() as names:
        step.count_steps({**case, "device": "cpu", "threads": 0, "recompute": -1})
    assert "convolution.default" in names.found
    otherwise = {"linalg_qr.default", "_upsample_bilinear2d_aa.default"}
    assert not (names.found & without_mps()) - otherwise
