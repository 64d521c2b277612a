"""The device, its precision, its memory, and seeds."""

from __future__ import annotations

import ctypes
import os
import platform
import re
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from utils.commandline import UserError
from utils.ranks.group import own_device


def choose_device(name: str) -> torch.device:
    """The device called ``name``; 'auto' takes CUDA, then MPS, then the CPU; of ranks each its own.

    Raises:
        UserError: it is none of auto, cpu, cuda, cuda:N and mps, or is not here.
    """
    name = own_device(name)
    if name == "auto":
        mps = torch.backends.mps.is_available()
        name = "cuda" if torch.cuda.is_available() else "mps" if mps else "cpu"
    if not re.fullmatch(r"cpu|mps|cuda(:\d{1,3})?", name):
        raise UserError(f"--device: found {name}; give auto, cpu, cuda, cuda:N or mps")
    device = torch.device(name) if int(name.partition(":")[2] or 0) < 128 else None
    if device is None or not is_here(device):  # PyTorch has numbers of seven bits
        raise UserError(f"--device: found {name}, which PyTorch does not see; give --device auto")
    return device


def is_here(device: torch.device) -> bool:
    """Whether PyTorch sees the device."""
    if device.type == "mps":
        return torch.backends.mps.is_available()
    return device.type != "cuda" or (device.index or 0) < torch.cuda.device_count()


def choose_precision(amp: str, device: torch.device) -> torch.dtype | None:
    """The dtype of autocast, None for full precision.

    ``amp``: 'off', 'bf16', or 'auto', which takes bf16 where the device multiplies it natively.
    """
    if amp == "bf16" or (amp == "auto" and native_bf16(device)):
        return torch.bfloat16
    return None


def precision(dtype: torch.dtype | None, device: torch.device) -> torch.autocast:
    """Autocast to ``dtype``; with None full precision, inside another autocast too."""
    # No cache of casted weights: the second forward pass of pscl.recompute casts them anew.
    return torch.autocast(device.type, dtype, enabled=dtype is not None, cache_enabled=False)


@contextmanager
def arithmetic(dtype: torch.dtype | None, deterministic: bool) -> Iterator[None]:
    """How PyTorch computes within the block.

    In full precision (``dtype`` None) CUDA's convolutions multiply single precision, not TF32,
    which keeps 10 of its 23 bits. With ``deterministic`` algorithms are taken that give the same
    bits in every run, where PyTorch has them; it warns where it has none.
    """
    cudnn = torch.backends.cudnn
    filling: Any = torch.utils.deterministic
    filled = filling.fill_uninitialized_memory
    before = (
        cudnn.allow_tf32,
        cudnn.deterministic,
        cudnn.benchmark,
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    try:
        if dtype is None:
            cudnn.allow_tf32 = False
        if deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it at start
            cudnn.deterministic, cudnn.benchmark = True, False
            torch.use_deterministic_algorithms(True, warn_only=True)
            filling.fill_uninitialized_memory = False  # which nothing here reads
        yield
    finally:
        filling.fill_uninitialized_memory = filled
        cudnn.allow_tf32, cudnn.deterministic, cudnn.benchmark, was, warned = before
        if deterministic:  # else nothing was changed; the call imports a compiler, for a second
            torch.use_deterministic_algorithms(was, warn_only=warned)


def native_bf16(device: torch.device, cpu_file: str = "/proc/cpuinfo") -> bool:
    """Whether bf16 is faster than fp32: CUDA from Ampere on, CPUs with AMX or AVX-512 BF16.

    With AVX-512 BF16 convolutions ran at twice the speed of single precision (benchmarks/step.py);
    on CPUs with neither bf16 is slower. ``cpu_file`` lists the CPU's flags; without it: no.
    """
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device)[0] >= 8
    if device.type != "cpu":
        return False
    try:
        flags = Path(cpu_file).read_text(encoding="utf-8").split()
    except OSError:
        return False
    return "amx_bf16" in flags or "avx512_bf16" in flags


def fuses_optimizers(device: torch.device) -> bool:
    """Whether Adam's step is one kernel here instead of nine small ones for every parameter."""
    return device.type in ("cpu", "cuda")


def upload(
    tensor: Tensor, device: torch.device, layout: torch.memory_format = torch.preserve_format
) -> Tensor:
    """The tensor on the device; CUDA copies it while the program goes on, and is never waited for.

    ``utils.cuda.step_graph`` relies on that. Other devices are waited for: nothing says that a
    tensor which is freed meanwhile would be copied whole.
    """
    on_cuda = device.type == "cuda"
    if on_cuda and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()  # from other memory it would be waited for
    return tensor.to(device, memory_format=layout, non_blocking=on_cuda)


def to_device(batch: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """The batch with its tensors on the device, images (4 dimensions) channels last."""
    moved = dict(batch)
    for key, value in batch.items():
        if isinstance(value, Tensor):
            layout = torch.channels_last if value.ndim == 4 else torch.preserve_format
            moved[key] = upload(value, device, layout)
    return moved


@cache
def upload_stream(device: torch.device) -> torch.cuda.Stream:
    """The stream of all uploads to a device.

    It is one, because the memory of freed tensors is kept for every stream that they were made on,
    and an epoch may be a single step.
    """
    return torch.cuda.Stream(device)


def on_device(
    batches: Iterable[dict[str, Any]], device: torch.device
) -> Generator[dict[str, Any], None, None]:
    """The batches, each as of ``to_device``; to CUDA one is copied while another is used."""
    if device.type != "cuda":
        yield from (to_device(batch, device) for batch in batches)
        return
    coming, stream = iter(batches), upload_stream(device)

    def copy_next() -> tuple[dict[str, Any], torch.cuda.Event] | None:
        batch = next(coming, None)
        if batch is None:
            return None
        with torch.cuda.stream(stream):
            return to_device(batch, device), stream.record_event()

    with ThreadPoolExecutor(1) as thread:
        pending = thread.submit(copy_next)
        while (ready := pending.result()) is not None:
            pending = thread.submit(copy_next)
            batch, copied = ready
            using = torch.cuda.current_stream(device)
            using.wait_event(copied)
            for value in batch.values():
                if isinstance(value, Tensor):
                    value.record_stream(using)  # its memory is not given away before
            yield batch


def mixed_seed(*numbers: int) -> int:
    """A seed of 63 bits that depends on all of several numbers, each 0 or more."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> np.uint64(1))


def keep_freed_memory() -> bool:
    """Have glibc keep the memory of freed tensors for the next ones; call before large tensors.

    By default the system maps every tensor above 32 MB afresh and clears its pages one by one: 2.4
    million page faults, a quarter of the processor's time, in a PSCL-SimCLR step at 376x376. The
    price of keeping it is that the process never shrinks, and fragmentation. The environment
    variable ``GLIBC_TUNABLES=glibc.malloc.tcache_count=0``, which glibc reads when a process
    begins, takes about 0.5 GB off that: the slivers left by aligning tensors to 64 bytes are then
    not cached between freed pieces that could be merged.

    Returns:
        Whether glibc took it; False on other systems, and where glibc's own variables already
        decide how it maps and trims memory.
    """
    tunables = os.environ.get("GLIBC_TUNABLES", "")
    decided = any(
        f"MALLOC_{name.upper()}_" in os.environ or f"glibc.malloc.{name}" in tunables
        for name in ("mmap_max", "mmap_threshold", "trim_threshold")
    )
    if decided or platform.libc_ver()[0] != "glibc":
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    trim_threshold, mmap_max = -1, -4  # names of malloc.h
    # Large pieces get no mapping of their own, and nothing is given back (-1: no threshold).
    return bool(mallopt(mmap_max, 0)) and bool(mallopt(trim_threshold, -1))


UNITS = {"K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}


def cache_bytes(text: str) -> int | None:
    """Bytes of a size such as '4GB' or '500 MB'; of '' half of the free memory, None if unknown."""
    if not text:
        free = free_memory()
        return None if free is None else free // 2
    number, unit = re.fullmatch(r"([\d.]+)\s*([KMGT])B?", text.strip().upper()).groups()  # type: ignore[union-attr]
    return int(float(number) * UNITS[unit])


def size_of(size: float) -> str:
    """Bytes in words: '4.2 GB', '100 MB'."""
    unit = next((u for u, each in reversed(UNITS.items()) if size >= each), "K")
    value = size / UNITS[unit]
    return f"{value:.1f} {unit}B" if value < 10 else f"{value:.0f} {unit}B"


def free_device_memory(device: torch.device) -> int | None:
    """Bytes that are free on a device; None if unknown."""
    if device.type == "cuda":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + kept  # PyTorch keeps what was freed
    return free_memory()


def free_memory(root: str | Path = "/") -> int | None:
    """Bytes that this process may still take, by the machine and its container; None if unknown.

    ``root`` is where the system's files ``proc`` and ``sys`` are.
    """
    root, found = Path(root), []
    try:
        lines = (root / "proc/meminfo").read_text(encoding="utf-8").splitlines()
        found += [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
    except (OSError, ValueError, IndexError):
        return None
    groups = root / "sys/fs/cgroup"  # of containers and batch systems: version 2, then version 1
    for limit, used in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        with suppress(OSError, ValueError):  # none, or "max"
            numbers = [int((groups / name).read_text(encoding="utf-8")) for name in (limit, used)]
            found.append(max(numbers[0] - numbers[1], 0))
    return min(found, default=None)
