"""Checkpoint files: atomic saving, safe loading, published key names, asserted transfer.

Format (``{'moco': state, 'epoch': ...}`` and so on) and tensor names are the published program's,
whose models load here. Unpickling runs no code from the file, nor NumPy's own unpickling code;
thousands of damaged files end in one line each (tests/test_fuzz.py). The zip format carries a
checksum of each of its parts, which PyTorch does not look at; here a flipped bit is found by it.
"""

from __future__ import annotations

import io
import json
import re
import warnings
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from utils.commandline import UserError, lack_of_memory
from utils.files import replace_file, special_kind

WRAPPERS = ("moco", "finetune", "super")  # hold the network: pretraining, fine.pt, sup.pt
DOS_FOLDER = 0x10  # among the attributes of a zip file's part
UNET, IMAGENET = "unet", "efficientnet_lite0"  # values of the setting ``encoder``

_INSIDE = {"queue2": "patch_queue"}  # this program's name by the published one
_PUBLISHED = {inside: published for published, inside in _INSIDE.items()}


class CheckpointError(UserError):
    """A checkpoint cannot be read, written or used; the message names the file and the cure."""


def save(path: str | Path, obj: Mapping[str, Any]) -> None:
    """Write a checkpoint atomically (``replace_file``); equal contents give equal bytes.

    ``obj`` holds tensors, numbers (NumPy's too), text, bytes, None and dicts, lists, tuples of
    these. Raises TypeError for anything else, UserError if the file cannot be written.
    """
    _require_plain(obj, "checkpoint")
    buffer = io.BytesIO()
    torch.save(obj, buffer)
    replace_file(path, buffer.getvalue())


_PLAIN = (str, bytes, int, float, bool, type(None), torch.Size, torch.dtype, torch.device)


def _require_plain(obj: Any, where: str) -> None:
    """Raise TypeError unless :func:`load` can read ``obj`` back without running any code."""
    if isinstance(obj, Mapping):
        for key, value in obj.items():
            _require_plain(key, f"a key of {where}")
            _require_plain(value, f"{where}[{key!r}]")
    elif type(obj) in (list, tuple):
        for i, value in enumerate(obj):
            _require_plain(value, f"{where}[{i}]")
    elif not (
        type(obj) in _PLAIN
        or isinstance(obj, Tensor)
        or (isinstance(obj, np.generic) and obj.dtype.kind in "biuf" and obj.itemsize <= 8)
    ):
        raise TypeError(f"{where} is a {type(obj).__name__}: make it a tensor, number or text")


class _NumberKind:
    """Replaces ``numpy.dtype`` during unpickling: a type of number, nothing else."""

    def __init__(self, code: str, *_: object) -> None:
        if re.fullmatch(r"b1|[iu][1248]|f[248]", str(code)) is None:
            what = f"refused, because it holds a NumPy value of kind {code!r}, which is no number"
            raise CheckpointError(f"{what}; save tensors, numbers and text only")
        self.code, self.order = str(code), "="

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.order = state[1] if state[1] in ("<", ">") else "="


def _number(kind: _NumberKind, data: bytes) -> Any:
    """Replaces ``numpy.core.multiarray.scalar`` during unpickling: a plain Python number."""
    return np.frombuffer(data, np.dtype(kind.order + kind.code), count=1)[0].item()


# Names in published files, of NumPy 1 (numpy.core) and 2 (numpy._core), and what replaces them.
_SCALARS = ("numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar")
_ALLOWED: list[Any] = [(_NumberKind, "numpy.dtype"), *((_number, name) for name in _SCALARS)]


def load(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint in either of PyTorch's file formats, running no code from it.

    Tensors come back on the CPU, NumPy numbers as Python's. Raises CheckpointError if the file is
    missing, empty, damaged, no checkpoint, or holds anything but data.
    """
    path = Path(path)
    contents = _read(path)
    try:
        _require_checksums(contents)
        with torch.serialization.safe_globals(list(_ALLOWED)), warnings.catch_warnings():
            # An odd pickle protocol, say, is no news to a user: the file loads or is refused below.
            warnings.simplefilter("ignore")
            stream = io.BytesIO(contents)
            loaded = torch.load(stream, map_location="cpu", weights_only=True)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error
    except MemoryError:
        raise
    # Damaged files make torch.load raise exceptions of any type.
    except Exception as error:
        if contents[:2] == b"PK" and lack_of_memory(error):  # of parts that are whole, see above
            raise MemoryError(lack_of_memory(error)) from error
        raise CheckpointError(f"{path}: {_why_unreadable(error)}") from error
    if not isinstance(loaded, dict):
        what = f"holds a {type(loaded).__name__}, not a dict of named tensors"
        raise CheckpointError(f"{path}: {what}; give a checkpoint of this program")
    return dict(loaded)


def _read(path: Path) -> bytes:
    """The bytes of what looks like a checkpoint; CheckpointError for anything else."""
    cure = "give the path of a checkpoint file (.pt)"
    try:
        if kind := special_kind(path):  # reading a pipe may never end
            raise CheckpointError(f"{path}: {kind}, not a file; {cure}")
        contents = path.read_bytes()
    except OSError as error:
        reason = error.strerror or error
        raise CheckpointError(f"{path}: cannot be read ({reason}); {cure}") from error
    if not contents:
        raise CheckpointError(f"{path}: the file is empty; copy it again or train it again")
    if contents[:2] != b"PK" and contents[:1] != b"\x80":
        what = f"not a checkpoint (it begins with {contents[:4]!r})"
        raise CheckpointError(f"{path}: {what}; give a file of this program")
    return contents


def _require_checksums(contents: bytes) -> None:
    """Raise BadZipFile unless each part of a zip file has the checksum that it was written with.

    The old format has none. PyTorch can be told to compute none: all are 0 then, and the list of
    parts is compared with the parts alone. Of one that is marked as a folder (DOS's bit, which no
    checksum guards) PyTorch reads nothing and says nothing: its tensor is what the memory held.
    """
    if contents[:2] != b"PK":
        return
    with zipfile.ZipFile(io.BytesIO(contents)) as archive:
        parts = archive.infolist()
        for part in parts:
            if part.is_dir() or part.external_attr & DOS_FOLDER:
                raise zipfile.BadZipFile(f"{part.filename} is marked as a folder")
        if any(part.CRC for part in parts):
            if (wrong := archive.testzip()) is not None:
                raise zipfile.BadZipFile(f"the checksum of {wrong} is wrong")
            return
        for part in parts:
            archive.open(part).close()  # raises if another part stands there
            if part.compress_type != zipfile.ZIP_STORED:  # as PyTorch writes all of them
                raise zipfile.BadZipFile(f"{part.filename} is marked as compressed")


def _why_unreadable(error: Exception) -> str:
    text = str(error)
    if foreign := re.search(r"GLOBAL\s+([\w.]+)", text):
        return (
            f"refused, because it holds '{foreign[1]}', which is code and not data; save tensors, "
            "numbers and text only (state_dict(), not the model)"
        )
    # torch.load wraps its reason in advice on unsafe loading, which is left out.
    reason = (text.split("WeightsUnpickler error:")[-1].strip().splitlines() or [""])[0].strip()
    if not reason or "Weights only load failed" in reason:
        reason = type(error).__name__
    reason = "".join(c if c.isprintable() else "?" for c in reason[:120])
    return f"damaged, cut off or no checkpoint ({reason}); copy it again or train it again"


def to_published(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the keys of this program's modules to the published ones, which files hold."""
    return _rename(state_dict, _PUBLISHED)


def from_published(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename published keys to those of this program's modules; unknown ones stay.

    DataParallel's prefix is dropped. Raises CheckpointError if two keys become one.
    """
    return _rename(state_dict, _INSIDE)


def _rename(state_dict: Mapping[str, Tensor], names: Mapping[str, str]) -> dict[str, Tensor]:
    renamed: dict[str, Tensor] = {}
    for key, value in state_dict.items():
        bare = re.sub(r"^(module\.)+", "", key)  # torch.nn.DataParallel puts it before every key
        new = names.get(bare, bare)
        if new in renamed:
            what = f"two tensors are called {new!r} (the second as {key!r})"
            raise CheckpointError(f"{what}; give a file of this program")
        renamed[new] = value
    return renamed


def network_state(
    checkpoint: Mapping[str, Any], *, source: str | Path = "checkpoint"
) -> dict[str, Tensor]:
    """Tensors ``encode.*``, ``decode.*`` of a checkpoint's network, or of a bare state dict.

    Of pretraining it is the query encoder. Raises CheckpointError, naming the file ``source``, if
    there is no network, or its tensors cannot be weights (``unfit``).
    """
    wrapped = (checkpoint[name] for name in WRAPPERS if isinstance(checkpoint.get(name), Mapping))
    state: Mapping[str, Any] = next(wrapped, checkpoint)
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
        cure = "give a file of pretraining (moco<epochs>.pt), fine.pt or sup.pt"
        raise CheckpointError(f"{source}: no network in it (found: {found}); {cure}")
    if lines := [f"{source}: {problem}" for problem in unfit(network)]:
        raise CheckpointError("\n".join(lines))
    return network


def unfit(state: Mapping[str, Tensor]) -> list[str]:
    """What forbids to use named tensors as a network's weights: a line, or none.

    They are finite numbers of 16 to 64 bits, or whole ones that count, each in its own memory.
    """
    faults = {key: fault for key, tensor in state.items() if (fault := _fault(tensor))}
    if not faults:
        return []
    key, fault = next(iter(faults.items()))
    more = f" (and {len(faults) - 1} more tensors)" if len(faults) > 1 else ""
    cure = "save finite single-precision weights, copy the file again or train it again"
    return [f"tensor {key!r}{more} {fault}; {cure}"]


_REAL = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_WHOLE = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def _kind(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _fault(tensor: Tensor) -> str:
    """Why a tensor is no network's; '' if it may be."""
    kinds = {"nested": tensor.is_nested, "sparse": tensor.layout != torch.strided}
    kinds |= {"quantised": tensor.is_quantized, "without values (meta)": tensor.is_meta}
    for kind, found in kinds.items():
        if found:
            return f"is {kind}"
    if tensor.dtype not in (*_REAL, *_WHOLE):
        return f"holds {_kind(tensor)} values, which are no weights"
    if not tensor.numel():
        return f"has no values (shape {tuple(tensor.shape)})"
    # A few bytes may claim to be many values, repeated: copying them would take any memory.
    if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        return f"repeats its values (shape {tuple(tensor.shape)})"
    if tensor.is_floating_point() and not tensor.isfinite().all():
        return "holds NaN or infinity"
    return ""


def settings_in(checkpoint: Mapping[str, Any], source: str | Path) -> dict[str, Any] | None:
    """The settings that a network was trained with; None in published files, which have none.

    Raises CheckpointError, naming the file ``source``, if they are not names with plain values.
    """
    found = checkpoint.get("settings")
    if found is not None and not (isinstance(found, Mapping) and is_plain(found)):
        what = "its settings are not names with numbers or texts"
        raise CheckpointError(f"{source}: {what}; copy the file again or train it again")
    return None if found is None else dict(found)


def is_plain(value: Any) -> bool:
    """Whether JSON can hold a value: numbers, texts, lists and dicts of these; no tensors."""
    try:
        json.dumps(value)
    except (TypeError, ValueError, RecursionError):
        return False
    return True


def norm_of(state: Mapping[str, Tensor]) -> str:
    """The setting ``norm`` of a network's tensors: of the two, BatchNorm has a running mean."""
    return "batch" if any(key.endswith("norm1.running_mean") for key in state) else "group"


def encoder_of(state: Mapping[str, Tensor]) -> str:
    """The setting ``encoder`` of a network's tensors."""
    return IMAGENET if any(key.startswith("encode.trunk.") for key in state) else UNET


def channels_of(state: Mapping[str, Tensor]) -> tuple[int, ...]:
    """The setting ``channels`` of a UNet's tensors; shorter if parts of it are missing."""
    down = ("down1.conv", "down2.conv", "down3.conv")
    parts = down if encoder_of(state) == UNET else ("laterals.0", "laterals.1", "laterals.2")
    keys = [f"encode.{part}.con1.weight" for part in ("inc", *parts)]
    return tuple(len(state[key]) for key in keys if key in state and state[key].ndim)


def other_network(state: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> str:
    """The setting in which two networks' tensors differ in kind, with the cure; '' if in none."""
    for name, kind_of in (("norm", norm_of), ("encoder", encoder_of)):
        theirs, ours = kind_of(state), kind_of(own)
        if theirs != ours:
            what = f"its network was trained with --{name} {theirs}, this one has {ours}"
            return f"{name}: {what}; give --{name} {theirs}"
    return ""


@dataclass(frozen=True)
class TransferReport:
    """What :func:`transfer` copied, and the keys outside the prefix that it did not."""

    matched: int  # tensors copied
    total: int  # tensors of the module under the prefix
    missing: list[str]  # from the file
    unexpected: list[str]  # by the module
    mismatched: list[str]  # in shape

    def __str__(self) -> str:
        """One line for the log."""
        kept = sorted({key.split(".")[0] for key in self.missing + self.mismatched})
        rest = f"; not loaded: {', '.join(kept)}" if kept else ""
        return f"{self.matched} of {self.total} tensors loaded{rest}"


def transfer(
    module: nn.Module,
    state: Mapping[str, Tensor],
    *,
    prefix: str = "encode.",
    source: str | Path = "checkpoint",
) -> TransferReport:
    """Copy every tensor whose key begins with ``prefix`` from ``state`` into ``module``.

    Under the prefix the keys and shapes must agree exactly, buffers included, or nothing is copied.

    Raises:
        CheckpointError: nothing matched, the norms differ, tensors are missing or unexpected,
            shapes differ, or values cannot be weights; a line for each problem, naming the file
            ``source``.
    """
    own = module.state_dict()
    missing = [key for key in own if key not in state]
    unexpected = [key for key in state if key not in own]
    mismatched = [key for key in own if key in state and own[key].shape != state[key].shape]
    wanted = [key for key in own if key.startswith(prefix)]
    found = [key for key in wanted if key in state]
    if not found:
        seen = f"found: {', '.join(list(state)[:3]) or 'no tensors'}"
        what = f"none of the network's {len(wanted)} tensors '{prefix}*' is in it ({seen})"
        cure = "give a checkpoint of this program"
        raise CheckpointError(f"{source}: nothing matched: {what}; {cure}")
    if problem := other_network(state, own):
        raise CheckpointError(f"{source}: {problem}, or pretrain again")
    channels, ours = channels_of(state), channels_of(own)
    problems = []
    if channels != ours and len(channels) == len(ours):
        theirs, mine = (",".join(map(str, each)) for each in (channels, ours))
        what = f"channels: its network has {theirs}, this one has {mine}"
        problems.append(f"{what}; give --channels {theirs}, or pretrain again")
    for keys, text in ((missing, "missing in the file"), (unexpected, "unknown to the network")):
        named = [key for key in keys if key.startswith(prefix)]
        shown = ", ".join(named[:5]) + (" ..." if named[5:] else "")
        cure = "give a checkpoint of this program, or copy the file again"
        problems += [f"{len(named)} tensors {text}: {shown}; {cure}"] if named else []
    problems += [
        f"{key} has shape {tuple(state[key].shape)}, in the network {tuple(own[key].shape)}; use "
        "the settings the file was trained with"
        for key in mismatched
        if key.startswith(prefix)
    ]
    problems += [
        f"{key} holds {_kind(state[key])} values, in the network {_kind(own[key])}; give a file "
        "whose weights were not converted"
        for key in found
        if state[key].is_floating_point() != own[key].is_floating_point()
    ]
    problems = problems or unfit({key: state[key] for key in found})
    if problems:
        raise CheckpointError("\n".join(f"{source}: {problem}" for problem in problems))
    with torch.no_grad():
        for key in found:
            own[key].copy_(state[key])
    return TransferReport(len(found), len(wanted), missing, unexpected, mismatched)
