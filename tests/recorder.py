"""What a pretraining method hands to the sampler and to its losses."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch

import model

LOSSES = ("nt_xent", "patch_nt_xent", "soft_info_nce", "info_nce", "dense_info_nce", "byol_loss")


class Recorder:
    """Keeps what the method handed to the sampler and to its losses, and what was sampled."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: dict[str, list[dict[str, Any]]] = {}
        for name in ("sample_patches", *LOSSES):
            self.calls[name] = []
            monkeypatch.setattr(model, name, self.recording(name, getattr(model, name)))

    def recording(self, name: str, function: Callable) -> Callable:
        def record(*args: Any, **kwargs: Any) -> Any:
            call = dict(inspect.signature(function).bind(*args, **kwargs).arguments)
            call["result"] = function(*args, **kwargs)
            call["autocast"] = torch.is_autocast_enabled("cpu")
            self.calls[name].append(call)
            return call["result"]

        return record

    def take(self, name: str) -> list[dict[str, Any]]:
        """The calls since the last time."""
        calls, self.calls[name] = self.calls[name], []
        return calls
