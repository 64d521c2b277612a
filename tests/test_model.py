"""Both PSCL variants against the published program's own steps."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from golden_files import Golden, assert_agrees

import model
from model import METHODS, PSCL_MoCo, PSCL_SimCLR, build_method, take
from utils.checkpoint import from_published, to_published

SMALL = {"channels": (8, 16, 32, 64), "hidden_dim": 24, "embed_dim": 16}


def golden_batch(golden: Golden, prefix: str) -> dict:
    return {
        "view_q": golden[f"{prefix}in/x_q"],
        "view_k": golden[f"{prefix}in/x_k"],
        "geometry": golden.geometry(prefix.rstrip("/")) if prefix else golden.geometry("."),
        "label": golden[f"{prefix}in/y_sup"],
    }


class Recorder:
    """Feeds the golden noise to a method, and keeps what it sampled and what its losses saw."""

    def __init__(self, method: model.PSCL, monkeypatch: pytest.MonkeyPatch) -> None:
        self.noise: Iterator = iter(())
        self.patches: list = []
        self.calls: list[tuple] = []
        monkeypatch.setattr(method, "draw_noise", lambda shape, device: next(self.noise))
        sample = model.sample_patches
        monkeypatch.setattr(
            model, "sample_patches", lambda *a: self.patches.append(sample(*a)) or self.patches[-1]
        )
        info_nce = model.soft_info_nce
        monkeypatch.setattr(model, "soft_info_nce", lambda *a: self.calls.append(a) or info_nce(*a))

    def start(self, golden: Golden, prefix: str) -> None:
        self.noise = iter([golden[f"{prefix}in/noise_scale{s}"] for s in (1, 2, 3)])
        self.patches.clear()
        self.calls.clear()
