"""Reading the measured inputs and outputs of the published program in ``tests/golden``."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from utils.geometry import ViewGeometry

FOLDER = Path(__file__).parent / "golden"


class Golden:
    """One npz file; keys are paths."""

    def __init__(self, name: str) -> None:
        self.file = np.load(FOLDER / f"{name}.npz")

    def __getitem__(self, key: str) -> Tensor:
        array = self.file[key]
        if array.dtype.kind == "U":
            raise TypeError(key)
        return torch.from_numpy(np.ascontiguousarray(array)).reshape(array.shape)

    def text(self, key: str) -> list[str]:
        """A string array."""
        return [str(x) for x in np.atleast_1d(self.file[key])]

    def state(self) -> dict[str, Tensor]:
        """The state dict, under the published key names."""
        keys = [k for k in self.file.files if k.startswith("state/")]
        return {k.removeprefix("state/"): self[k] for k in keys}

    def geometry(self, prefix: str) -> list[ViewGeometry]:
        """The views of a batch."""
        flip, turns = self[f"{prefix}/in/flip"], self[f"{prefix}/in/rot_k"]
        parts = [self[f"{prefix}/in/r{i}"].tolist() for i in (1, 2, 3, 4)]
        return [
            ViewGeometry(int(flip[b]) == 1, int(turns[b]), *(p[b] for p in parts))
            for b in range(len(flip))
        ]


def assert_agrees(actual: Tensor, expected: Tensor, tolerance: float = 1e-4) -> None:
    """Equal to ``tolerance`` of the expected tensor's largest magnitude."""
    actual = actual.detach().to(expected.dtype)
    assert actual.shape == expected.shape, (actual.shape, expected.shape)
    error = (actual - expected).abs().max() / expected.abs().max().clamp(min=1e-12)
    assert error <= tolerance, f"differs by {float(error):.2e} of the largest magnitude"
