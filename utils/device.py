"""Where to compute, how precisely, in which memory, and with which random numbers."""

from __future__ import annotations

import ctypes
import os
import platform
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from utils.commandline import UserError


def choose_device(name: str) -> torch.device:
    """The device called ``name``; 'auto' takes CUDA, then MPS, then the CPU.

    Raises:
        UserError: this machine or this PyTorch does not have it.
    """
    mps = torch.backends.mps.is_available()
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if mps else "cpu"
    device = torch.device(name)
    absent = {"cuda": (device.index or 0) >= torch.cuda.device_count(), "mps": not mps}
    if absent.get(device.type):
        raise UserError(
            f"device: found {name}, which PyTorch does not see here; give --device auto"
        )
    return device


def choose_precision(amp: str, device: torch.device) -> torch.dtype | None:
    """The dtype of autocast, None for full precision.

    Args:
        amp: 'off', 'bf16', or 'auto', which takes bf16 where the processor multiplies it natively.
        device: where the computing is done.
    """
    if amp == "bf16" or (amp == "auto" and native_bf16(device)):
        return torch.bfloat16
    return None


def precision(dtype: torch.dtype | None, device: torch.device) -> torch.autocast:
    """Autocast to ``dtype``; with None full precision, inside another autocast too."""
    # Without the cache of casted weights: what pscl.recompute computes again casts them anew.
    return torch.autocast(device.type, dtype, enabled=dtype is not None, cache_enabled=False)


def native_bf16(device: torch.device, cpu_file: str = "/proc/cpuinfo") -> bool:
    """Whether bf16 is faster than fp32: CUDA from Ampere on, CPUs that multiply it themselves.

    Those have AMX tiles or AVX-512 BF16; convolutions with the latter ran at twice the speed of
    single precision (benchmarks/step.py), without either bf16 is slower.

    Args:
        device: the device asked about.
        cpu_file: where the system lists the CPU's abilities; without it the answer is no.
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


def to_device(batch: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """The batch with its tensors on the device, images (4 dimensions) channels last."""
    moved = dict(batch)
    for key, value in batch.items():
        if isinstance(value, Tensor):
            layout = torch.channels_last if value.ndim == 4 else torch.preserve_format
            moved[key] = value.to(device, memory_format=layout, non_blocking=True)
    return moved


def mixed_seed(*numbers: int) -> int:
    """One seed out of several numbers, each 0 or more: 63 bits that all of them decide."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> np.uint64(1))


def keep_freed_memory() -> bool:
    """Have glibc keep the memory of freed tensors for the next ones; call before large tensors.

    By default every tensor above 32 MB is mapped afresh and its pages are cleared by the system one
    by one: 2.4 million page faults, a quarter of the processor's time, in a PSCL-SimCLR step at
    376x376. Kept memory is reused as it is. The price is that the process stays as large as it once
    was, and larger because the pieces do not fit together without gaps. The environment variable
    ``GLIBC_TUNABLES=glibc.malloc.tcache_count=0`` takes about 0.5 GB off that: tensors begin at
    multiples of 64 bytes, and the slivers cut off around them no longer lie in a cache between
    freed pieces that could grow together. glibc reads it only when a process begins.

    Returns:
        Whether glibc took it; False on other systems, and where glibc's own variables already say
        how it is to map and trim memory.
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
    # No mappings of their own for large pieces, and nothing given back (-1: without any threshold).
    return bool(mallopt(mmap_max, 0)) and bool(mallopt(trim_threshold, -1))
