"""Where to compute, how precisely, and with which random numbers."""

from __future__ import annotations

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
    if name == "auto":
        if torch.cuda.is_available():
            name = "cuda"
        elif torch.backends.mps.is_available():
            name = "mps"
        else:
            name = "cpu"
    device = torch.device(name)
    absent = (device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count()) or (
        device.type == "mps" and not torch.backends.mps.is_available()
    )
    if absent:
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
    """The batch with its tensors on the device, pictures (4 dimensions) channels last."""
    moved = {}
    for key, value in batch.items():
        if isinstance(value, Tensor) and value.ndim == 4:
            value = value.to(device, memory_format=torch.channels_last, non_blocking=True)
        elif isinstance(value, Tensor):
            value = value.to(device, non_blocking=True)
        moved[key] = value
    return moved


def mixed_seed(*numbers: int) -> int:
    """One seed out of several numbers, each 0 or more: 63 bits that all of them decide."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> np.uint64(1))
