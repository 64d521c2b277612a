"""Reading the measured inputs and outputs of the published program in ``tests/golden``."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pscl.geometry import ViewGeometry

FOLDER = Path(__file__).parent / "golden"


class Golden:
    """One npz file; keys are paths."""

    def __init__(self, name: str) -> None:
        with np.load(FOLDER / f"{name}.npz") as file:
            self.arrays: dict[str, np.ndarray] = dict(file)

    def __contains__(self, key: str) -> bool:
        return key in self.arrays

    def __getitem__(self, key: str) -> Tensor:
        array = self.arrays[key]
        if array.dtype.kind == "U":
            raise TypeError(f"{key} holds text")
        return torch.from_numpy(array.copy())  # a test may change what it reads

    def text(self, key: str) -> list[str]:
        """A string array."""
        return [str(x) for x in np.atleast_1d(self.arrays[key])]

    def state(self) -> dict[str, Tensor]:
        """The state dict, under the published key names."""
        keys = [key for key in self.arrays if key.startswith("state/")]
        return {key.removeprefix("state/"): self[key] for key in keys}

    def geometry(self, prefix: str = "") -> list[ViewGeometry]:
        """The views of a batch whose keys start with ``prefix``, which ends in a slash."""
        flip, turns = self[f"{prefix}in/flip"].tolist(), self[f"{prefix}in/rot_k"].tolist()
        crops = zip(*(self[f"{prefix}in/r{i}"].tolist() for i in (1, 2, 3, 4)), strict=True)
        return [
            ViewGeometry(f == 1, turn, *crop)
            for f, turn, crop in zip(flip, turns, crops, strict=True)
        ]


def assert_agrees(actual: Tensor, expected: Tensor, tolerance: float = 1e-4) -> None:
    """Equal to ``tolerance`` of the expected tensor's largest magnitude."""
    actual = actual.detach().to(expected.dtype)
    assert actual.shape == expected.shape, (actual.shape, expected.shape)
    error = (actual - expected).abs().max() / expected.abs().max().clamp(min=1e-12)
    assert error <= tolerance, f"differs by {float(error):.2e} of the largest magnitude"
