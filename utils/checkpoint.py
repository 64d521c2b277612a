"""Checkpoint files: atomic saving, safe loading, published key names, asserted transfer.

The published program's file format is kept (``{'moco': state, 'epoch': ...}`` and so on), so that
the models its authors publish load here. Whatever this program names otherwise is translated here.

Unpickling is strict by hand, measured better so than by libraries: NumPy's own unpickling code
never runs, and each of thousands of damaged files ends in one line (tests/test_fuzz.py).
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from utils.commandline import UserError
from utils.files import replace_file

WRAPPERS = ("moco", "finetune", "super")  # hold the network: pretraining, fine.pt, sup.pt

_PUBLISHED_TO_INSIDE = {"queue2": "patch_queue"}
_INSIDE_TO_PUBLISHED = {inside: published for published, inside in _PUBLISHED_TO_INSIDE.items()}


class CheckpointError(UserError):
    """A checkpoint cannot be read, written or used; the message names the file and the cure."""


# --- saving ---------------------------------------------------------------------------------------


def save(path: str | Path, obj: Mapping[str, Any]) -> None:
    """Write ``obj`` so that ``path`` holds the old file or the whole new one (``replace_file``).

    Equal contents give equal bytes whatever the path.

    Args:
        path: the file; missing parent folders are made.
        obj: tensors, numbers (NumPy's too), text, bytes, None and dicts, lists, tuples of these,
            which is what :func:`load` reads back.

    Raises:
        UserError: the disk is full or may not be written to; ``path`` is as it was before.
        TypeError: ``obj`` holds something that :func:`load` would refuse.
    """
    _require_plain(obj, "checkpoint")
    buffer = io.BytesIO()
    torch.save(obj, buffer)
    replace_file(path, buffer.getvalue())


_PLAIN = (str, bytes, int, float, bool, type(None), torch.Size, torch.dtype, torch.device)


def _require_plain(obj: object, where: str) -> None:
    """Raise TypeError unless :func:`load` can read ``obj`` back without running any code."""
    if isinstance(obj, Mapping):
        for key, value in obj.items():
            _require_plain(key, f"a key of {where}")
            _require_plain(value, f"{where}[{key!r}]")
    elif isinstance(obj, (list, tuple)) and type(obj) in (list, tuple):
        for i, value in enumerate(obj):
            _require_plain(value, f"{where}[{i}]")
    elif not (
        type(obj) in _PLAIN
        or isinstance(obj, Tensor)
        or (isinstance(obj, np.generic) and obj.dtype.kind in "biuf" and obj.itemsize <= 8)
    ):
        raise TypeError(f"{where} is a {type(obj).__name__}: make it a tensor, number or text")


# --- loading --------------------------------------------------------------------------------------


class _NumberKind:
    """Stands in for ``numpy.dtype`` while a file is read: a kind of number, nothing else."""

    def __init__(self, code: str, *_: object) -> None:
        if re.fullmatch(r"b1|[iu][1248]|f[248]", str(code)) is None:
            raise CheckpointError(
                f"refused, because it holds a NumPy value of kind {code!r}, which "
                "is no number; save tensors, numbers and text only"
            )
        self.code = str(code)
        self.order = "="

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.order = state[1] if state[1] in ("<", ">") else "="


def _number(kind: _NumberKind, data: bytes) -> Any:
    """Stand in for NumPy's scalar maker while a file is read; returns a plain Python number."""
    return np.frombuffer(data, np.dtype(kind.order + kind.code), count=1)[0].item()


# Names that published files hold, and what is run in their place.  NumPy's own unpickling code is
# never reached, so the same list serves NumPy 1 (numpy.core) and NumPy 2 (numpy._core).
_ALLOWED: list[tuple[Callable[..., Any], str]] = [
    (_NumberKind, "numpy.dtype"),
    (_number, "numpy.core.multiarray.scalar"),
    (_number, "numpy._core.multiarray.scalar"),
]


def load(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint without running anything that stands in it, tensors to the CPU.

    Tensors, numbers, text and their dicts, lists and tuples are read; NumPy numbers come back as
    Python's. Both of PyTorch's file formats (zip, and the older one) are read.

    Raises:
        CheckpointError: the file is missing, empty, damaged, not a checkpoint, or holds anything
            else than data.
    """
    path = Path(path)
    try:
        with open(path, "rb") as file:
            start = file.read(4)
    except OSError as error:
        raise CheckpointError(
            f"{path}: cannot be read ({error.strerror or error}); give the path of a checkpoint "
            "file (.pt)"
        ) from error
    if not start:
        raise CheckpointError(f"{path}: the file is empty; copy it again or train it again")
    if start[:2] != b"PK" and start[:1] != b"\x80":
        raise CheckpointError(
            f"{path}: not a checkpoint (it begins with {start!r}); give a file of this program"
        )
    try:
        with torch.serialization.safe_globals(list(_ALLOWED)), warnings.catch_warnings():
            # What torch warns of, such as an odd pickle protocol, is no news to a user: the file
            # is read all the same, or refused below.
            warnings.simplefilter("ignore")
            loaded = torch.load(path, map_location="cpu", weights_only=True)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error
    except MemoryError:
        raise
    # A damaged file makes the reader fail in any way whatever, so every failure is caught.
    except Exception as error:
        raise CheckpointError(f"{path}: {_why_unreadable(error)}") from error
    if not isinstance(loaded, dict):
        raise CheckpointError(
            f"{path}: holds a {type(loaded).__name__}, not a dict of named tensors; give a "
            "checkpoint of this program"
        )
    return dict(loaded)


def _why_unreadable(error: Exception) -> str:
    text = str(error)
    foreign = re.search(r"GLOBAL\s+([\w.]+)", text)
    if foreign is not None:
        return (
            f"refused, because it holds '{foreign[1]}', which is code and not data; save tensors, "
            "numbers and text only (state_dict(), not the model)"
        )
    # torch wraps its reason in advice on how to load the file unsafely, which is not repeated.
    reason = text.split("WeightsUnpickler error:")[-1]
    reason = next((line.strip() for line in reason.splitlines() if line.strip()), "")
    if not reason or "Weights only load failed" in reason:
        reason = type(error).__name__
    reason = "".join(c if c.isprintable() else "?" for c in reason[:120])
    return f"damaged, cut off or no checkpoint ({reason}); copy it again or train it again"


# --- key names ------------------------------------------------------------------------------------


def to_published(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the keys of this program's modules to the published ones, as files hold them."""
    return _rename(state_dict, _INSIDE_TO_PUBLISHED)


def from_published(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename published keys to those of this program's modules; unknown ones stay.

    DataParallel's prefix is dropped. Raises CheckpointError if two keys become one.
    """
    return _rename(state_dict, _PUBLISHED_TO_INSIDE)


def _rename(state_dict: Mapping[str, Tensor], names: Mapping[str, str]) -> dict[str, Tensor]:
    renamed: dict[str, Tensor] = {}
    for key, value in state_dict.items():
        bare = re.sub(r"^(module\.)+", "", key)  # torch.nn.DataParallel puts it before every key
        new = names.get(bare, bare)
        if new in renamed:
            raise CheckpointError(f"two tensors are called {new!r} (the second as {key!r})")
        renamed[new] = value
    return renamed


def network_state(
    checkpoint: Mapping[str, Any], *, source: str | Path = "checkpoint"
) -> dict[str, Tensor]:
    """Find the network in a checkpoint and return its tensors under ``encode.*``, ``decode.*``.

    Args:
        checkpoint: what :func:`load` returned: a file of pretraining (``'moco'``, of which the
            query encoder is taken), of fine-tuning (``'finetune'``), of supervised training
            (``'super'``), or a bare state dict of one of these.
        source: the file's name, for the message of an error.

    Raises:
        CheckpointError: no network is found.
    """
    state: Mapping[str, Any] = checkpoint
    for wrapper in WRAPPERS:
        if isinstance(checkpoint.get(wrapper), Mapping):
            state = checkpoint[wrapper]
            break
    tensors = {k: v for k, v in state.items() if isinstance(k, str) and isinstance(v, Tensor)}
    try:
        tensors = from_published(tensors)
    except CheckpointError as error:
        raise CheckpointError(f"{source}: {error}") from error
    start = "encoder_q."
    query = {k.removeprefix(start): v for k, v in tensors.items() if k.startswith(start)}
    network = query or tensors
    if not any(key.startswith("encode.") for key in network):
        found = ", ".join(map(str, list(state)[:4])) or "nothing"
        raise CheckpointError(
            f"{source}: no network in it (found: {found}); give a file of pretraining "
            "(moco<epochs>.pt), fine.pt or sup.pt"
        )
    return network


def norm_of(state: Mapping[str, Tensor]) -> str:
    """'batch' or 'group', the setting ``norm`` of a network's tensors: BatchNorm has a mean."""
    return "batch" if any(key.endswith("norm1.running_mean") for key in state) else "group"


def channels_of(state: Mapping[str, Tensor]) -> tuple[int, ...]:
    """The setting ``channels`` of a UNet's tensors; shorter where the state is of no whole UNet."""
    parts = ("inc", "down1.conv", "down2.conv", "down3.conv")
    keys = [f"encode.{part}.con1.weight" for part in parts]
    return tuple(len(state[key]) for key in keys if key in state)


# --- transfer -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TransferReport:
    """What :func:`transfer` did.

    ``matched`` tensors of the ``total`` that the module has under the prefix were copied (all, or
    there would be no report). The lists tell of the keys outside the prefix: ``missing`` in the
    file, ``unexpected`` by the module, ``mismatched`` in shape.
    """

    matched: int
    total: int
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    mismatched: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        """Say it in one line for the log, naming the parts that were not loaded."""
        kept = sorted({key.split(".")[0] for key in self.missing + self.mismatched})
        rest = f"; not loaded: {', '.join(kept)}" if kept else ""
        return f"{self.matched} of {self.total} tensors loaded{rest}"


def _other_channels(
    state: Mapping[str, Tensor], own: Mapping[str, Tensor], source: str | Path
) -> list[str]:
    """A line if two networks differ in the setting ``channels``."""
    theirs, ours = (",".join(map(str, channels_of(each))) for each in (state, own))
    if theirs == ours or theirs.count(",") != ours.count(","):
        return []
    return [
        f"{source}: channels: its network has {theirs}, this one has {ours}; give --channels "
        f"{theirs}, or pretrain again"
    ]


def transfer(
    module: nn.Module,
    state: Mapping[str, Tensor],
    *,
    prefix: str = "encode.",
    source: str | Path = "checkpoint",
) -> TransferReport:
    """Copy every tensor whose key begins with ``prefix`` from ``state`` into ``module``.

    Under the prefix the two must agree exactly, buffers included; ``prefix=''`` asks it of all.
    Nothing is copied unless everything fits.

    Args:
        module: the network; its own keys begin with the prefix too.
        state: as :func:`network_state` returns it.
        prefix: what to copy.
        source: the file's name, for the message of an error.

    Raises:
        CheckpointError: nothing matched, the networks are of other norms, tensors are missing or
            unexpected, or shapes differ (a line for each tensor, after one for ``channels``).
    """
    own = module.state_dict()
    shared = [key for key in own if key in state]
    mismatched = [key for key in shared if own[key].shape != state[key].shape]
    missing = [key for key in own if key not in state]
    unexpected = [key for key in state if key not in own]
    wanted = [key for key in own if key.startswith(prefix)]
    found = [key for key in shared if key.startswith(prefix)]
    if not found:
        raise CheckpointError(
            f"{source}: nothing matched: none of the network's {len(wanted)} tensors "
            f"'{prefix}*' is in it (found: {', '.join(list(state)[:3]) or 'no tensors'}); give a "
            "checkpoint of this program"
        )
    if norm_of(state) != norm_of(own):
        raise CheckpointError(
            f"{source}: norm: its network was trained with --norm {norm_of(state)}, this one has "
            f"{norm_of(own)}; give --norm {norm_of(state)}, or pretrain again"
        )
    problems = _other_channels(state, own, source)
    for keys, text in ((missing, "missing in the file"), (unexpected, "unknown to the network")):
        named = [key for key in keys if key.startswith(prefix)]
        problems += [f"{source}: {len(named)} tensors {text}: {', '.join(named)}"] if named else []
    problems += [
        f"{source}: {key} has shape {tuple(state[key].shape)}, in the network "
        f"{tuple(own[key].shape)}; use the settings the file was trained with"
        for key in mismatched
        if key.startswith(prefix)
    ]
    if problems:
        raise CheckpointError("\n".join(problems))
    with torch.no_grad():
        for key in found:
            own[key].copy_(state[key])
    return TransferReport(len(found), len(wanted), missing, unexpected, mismatched)
