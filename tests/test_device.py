"""Devices, precision, memory and seeds; what needs an accelerator is pretended."""

from __future__ import annotations

import copy
import os
import platform
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch

from utils import device as room
from utils.commandline import UserError
from utils.device import (
    arithmetic,
    cache_bytes,
    choose_device,
    choose_precision,
    free_device_memory,
    free_memory,
    fuses_optimizers,
    keep_freed_memory,
    mixed_seed,
    on_device,
    precision,
    size_of,
    to_device,
)
from utils.training import require_fitting

CPU = torch.device("cpu")
ROOT = Path(__file__).resolve().parents[1]


def pretend(monkeypatch: pytest.MonkeyPatch, cuda: int, mps: bool = False) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)


@pytest.mark.parametrize(
    ("cuda", "mps", "expected"), [(2, True, "cuda"), (0, True, "mps"), (0, False, "cpu")]
)
def test_auto_takes_the_best_there_is(
    monkeypatch: pytest.MonkeyPatch, cuda: int, mps: bool, expected: str
) -> None:
    pretend(monkeypatch, cuda, mps)
    assert choose_device("auto") == torch.device(expected)


def test_a_device_that_is_there_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, cuda=2)
    assert choose_device("cpu") == CPU
    assert choose_device("cuda") == torch.device("cuda")
    assert choose_device("cuda:1") == torch.device("cuda:1")


@pytest.mark.parametrize("name", ["toaster", "", "CPU", "cuda:", "cuda:-1", "meta"])
def test_a_name_that_is_no_device_is_one_line(name: str) -> None:
    with pytest.raises(UserError) as error:
        choose_device(name)
    assert str(error.value) == f"--device: found {name}; give auto, cpu, cuda, cuda:N or mps"


@pytest.mark.parametrize(("name", "cuda"), [("cuda", 0), ("cuda:2", 2), ("mps", 2)])
def test_a_device_that_is_absent_is_one_line(
    monkeypatch: pytest.MonkeyPatch, name: str, cuda: int
) -> None:
    pretend(monkeypatch, cuda)
    with pytest.raises(UserError) as error:
        choose_device(name)
    assert name in str(error.value) and "--device auto" in str(error.value)
    assert "\n" not in str(error.value)


def test_precision_follows_the_processor_only_when_it_may(monkeypatch: pytest.MonkeyPatch) -> None:
    for native in (False, True):
        monkeypatch.setattr(room, "native_bf16", lambda device, native=native: native)
        assert choose_precision("off", CPU) is None
        assert choose_precision("bf16", CPU) is torch.bfloat16
        assert choose_precision("auto", CPU) is (torch.bfloat16 if native else None)


@pytest.mark.parametrize(("capability", "expected"), [((7, 5), False), ((8, 0), True)])
def test_bf16_is_native_from_ampere_on(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], expected: bool
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert room.native_bf16(torch.device("cuda")) is expected


def test_bf16_is_native_on_a_cpu_that_lists_it(tmp_path: Path) -> None:
    listed = tmp_path / "cpuinfo"
    for flags, expected in (("fma avx2 amx_bf16 amx_tile", True), ("fma amx_bf16x", False)):
        listed.write_text(f"flags : {flags}\nbugs : none\n")
        assert room.native_bf16(CPU, str(listed)) is expected
    for last in ("amx_bf16", "avx512_bf16"):
        listed.write_text(f"flags : fma {last}\n")
        assert room.native_bf16(CPU, str(listed))
    assert not room.native_bf16(CPU, str(tmp_path / "absent"))
    assert not room.native_bf16(torch.device("mps"), str(listed))


def test_a_batch_moves_and_keeps_what_is_no_tensor() -> None:
    picture = torch.randn(2, 3, 4, 5)
    batch = {"image": picture, "mask": torch.ones(2, 4, 5), "name": ["a", "b"]}
    moved = to_device(batch, CPU)
    assert list(moved) == ["image", "mask", "name"] and moved["name"] == ["a", "b"]
    assert torch.equal(moved["image"], picture) and torch.equal(moved["mask"], batch["mask"])
    assert moved["image"].is_contiguous(memory_format=torch.channels_last)
    assert batch["image"] is picture


def test_on_the_cpu_batches_move_one_by_one() -> None:
    taken: list[int] = []
    batches = (
        {"image": torch.full((1, 3, 2, 2), float(n)), "n": taken.append(n)} for n in range(3)
    )
    for number, batch in enumerate(on_device(batches, CPU)):
        assert int(batch["image"][0, 0, 0, 0]) == number and taken == list(range(number + 1))


def test_cuda_copies_a_batch_while_the_one_before_it_is_used(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each is waited for by the stream that uses it; what a batch raises is raised in its turn."""
    stream = Mock()
    monkeypatch.setattr(room, "upload_stream", lambda device: stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    monkeypatch.setattr(room, "to_device", lambda batch, device: {**batch, "on": device})
    asked = threading.Event()

    def batches() -> Iterator[dict[str, int]]:
        yield {"n": 0}
        asked.set()
        yield {"n": 1}
        raise ValueError("a file is gone")

    moved = on_device(batches(), torch.device("cuda"))
    assert next(moved) == {"n": 0, "on": torch.device("cuda")}
    assert asked.wait(10)  # nobody has asked for number 1 yet
    assert next(moved)["n"] == 1 and stream.wait_event.call_count == 2
    with pytest.raises(ValueError, match="a file is gone"):
        next(moved)


def test_all_uploads_to_a_device_have_one_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    """An epoch may be one step: PyTorch hands out 32 streams in turn, each with freed memory."""
    made: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: made.append(device) or Mock())
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Mock())
    monkeypatch.setattr(room, "to_device", lambda batch, device: batch)
    room.upload_stream.cache_clear()
    try:
        for _ in range(3):
            assert list(on_device([{"n": 0}], torch.device("cuda"))) == [{"n": 0}]
        list(on_device([{"n": 0}], torch.device("cuda:1")))
    finally:
        room.upload_stream.cache_clear()
    assert made == [torch.device("cuda"), torch.device("cuda:1")]


def test_a_state_keeps_the_adam_of_its_run() -> None:
    """States of before Adam was fused go on bit by bit as they were."""
    assert fuses_optimizers(CPU) and not fuses_optimizers(torch.device("mps"))
    start = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))

    def steps(adam: torch.optim.Adam, weight: torch.Tensor, count: int) -> list[float]:
        for _ in range(count):
            weight.grad = weight.detach().cos()
            adam.step()
        return weight.flatten().tolist()

    for fused in (None, True):
        weight = torch.nn.Parameter(start.clone())
        adam = torch.optim.Adam([weight], 1e-2, fused=fused)
        steps(adam, weight, 3)
        again = torch.nn.Parameter(weight.detach().clone())
        resumed = torch.optim.Adam([again], 1e-2, fused=True)
        require_fitting(resumed, adam.state_dict())
        resumed.load_state_dict(copy.deepcopy(adam.state_dict()))
        assert resumed.param_groups[0]["fused"] is fused
        assert steps(resumed, again, 3) == steps(adam, weight, 3)


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_arithmetic_holds_in_its_block_alone(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype | None, deterministic: bool
) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")  # somebody's choice is left alone
    cudnn = torch.backends.cudnn

    def now() -> tuple[bool, ...]:
        found = (
            cudnn.allow_tf32,
            cudnn.deterministic,
            torch.are_deterministic_algorithms_enabled(),
        )
        return (*found, torch.is_deterministic_algorithms_warn_only_enabled())

    before = now()
    with pytest.raises(KeyError), arithmetic(dtype, deterministic):
        tf32 = before[0] and dtype is not None
        assert now() == (tf32, *[deterministic] * 3)
        raise KeyError
    assert now() == before and os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"


def test_mixed_seeds_differ_in_every_number_and_in_order() -> None:
    seeds = {mixed_seed(a, b, c) for a in range(4) for b in range(4) for c in range(4)}
    assert len(seeds) == 64
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert mixed_seed(1, 2) == mixed_seed(1, 2)


def test_precision_is_that_of_products_and_full_inside_another() -> None:
    x = torch.ones(2, 2)
    with precision(torch.bfloat16, CPU):
        assert (x @ x).dtype == torch.bfloat16
        with precision(None, CPU):
            assert (x @ x).dtype == torch.float32
        assert (x @ x).dtype == torch.bfloat16
    with precision(None, CPU):
        assert (x @ x).dtype == torch.float32
    assert (x @ x).dtype == torch.float32


def test_weights_are_casted_anew_each_time() -> None:
    """A graph that computes activations again casts them again; a cache would hide that."""
    weight = torch.ones(2, 2, requires_grad=True)
    with precision(torch.bfloat16, CPU):
        assert not torch.is_autocast_cache_enabled()
        first, second = weight @ weight, weight @ weight
    (first + second).sum().backward()
    assert weight.grad is not None and weight.grad.dtype == torch.float32
    assert torch.is_autocast_cache_enabled()


FAULTS = """
import ctypes, resource, sys
from unittest.mock import MagicMock
# Importing PyTorch takes seconds; pieces are taken as it takes them.
names = ("torch", "torch.distributed", "torch.distributed.rendezvous")
sys.modules |= {name: MagicMock() for name in names}
from utils.device import keep_freed_memory
print(keep_freed_memory())
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
libc.malloc.argtypes = libc.free.argtypes = [ctypes.c_size_t]
def faults(rounds):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(rounds):
        several = [(libc.malloc(mb << 20), mb << 20) for mb in (33, 64, 48, 40)]
        for place, size in several:
            ctypes.memset(place, 1, size)
        for place, _ in several:
            libc.free(place)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults(4)  # until the pieces fit together
print(faults(4) / (4 * (33 + 64 + 48 + 40) * 2**20 / resource.getpagesize()))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")
@pytest.mark.parametrize(
    ("told", "kept"),
    [
        ({}, True),
        ({"GLIBC_TUNABLES": "glibc.malloc.tcache_count=0"}, True),
        ({"MALLOC_MMAP_MAX_": "65536"}, False),
        ({"GLIBC_TUNABLES": "glibc.malloc.mmap_max=65536"}, False),
    ],
)
def test_freed_memory_is_kept_unless_the_user_decides(told: dict[str, str], kept: bool) -> None:
    """Seen from outside, by the share of the pages that the system had to map anew."""
    others = {n: text for n, text in os.environ.items() if "MALLOC" not in n and "GLIBC" not in n}
    environment = {**others, "PYTHONPATH": str(ROOT), **told}
    command = [sys.executable, "-c", FAULTS]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    said, share = ran.stdout.split()
    assert said == str(kept)
    assert float(share) < 0.1 if kept else float(share) > 0.9


def test_other_systems_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    assert keep_freed_memory() is False


# --- memory ---------------------------------------------------------------------------------------


def machine(root: Path, available: int, limit: str = "", used: str = "") -> Path:
    """The files in which Linux tells of its memory (kB) and of a container's (bytes)."""
    (root / "proc").mkdir(parents=True)
    text = f"MemTotal: 99 kB\nMemAvailable:   {available} kB\n"
    (root / "proc/meminfo").write_text(text)
    if limit:
        (root / "sys/fs/cgroup").mkdir(parents=True)
        (root / "sys/fs/cgroup/memory.max").write_text(limit + "\n")
        (root / "sys/fs/cgroup/memory.current").write_text(used + "\n")
    return root


def test_free_memory_is_that_of_the_machine_or_of_its_container(tmp_path: Path) -> None:
    assert free_memory(machine(tmp_path / "a", 1000)) == 1_024_000
    assert free_memory(machine(tmp_path / "b", 1000, "max", "5")) == 1_024_000
    assert free_memory(machine(tmp_path / "c", 1000, "9000", "2000")) == 7000
    assert free_memory(machine(tmp_path / "d", 1000, "9000", "9500")) == 0
    assert free_memory(tmp_path / "of another system") is None


def test_sizes_are_read_and_written_in_words() -> None:
    assert [cache_bytes(t) for t in ("4GB", "1.5 gb", "500M", "2k", "0KB")] == [
        4_000_000_000, 1_500_000_000, 500_000_000, 2000, 0,
    ]  # fmt: skip
    assert (cache_bytes("") is None) == (free_memory() is None)
    assert [size_of(n) for n in (4.2e9, 84e6, 999, 3.4e12)] == [
        "4.2 GB", "84 MB", "1.0 KB", "3.4 TB",
    ]  # fmt: skip


def test_what_pytorch_keeps_of_a_card_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 10 bytes 3 are free, and of the 6 that PyTorch has 4 are used; the last is another's."""
    for name, found in (("mem_get_info", (3, 10)), ("memory_reserved", 6), ("memory_allocated", 4)):
        monkeypatch.setattr(torch.cuda, name, lambda device, found=found: found)
    assert free_device_memory(torch.device("cuda")) == 5
    assert (free_device_memory(torch.device("cpu")) is None) == (free_memory() is None)
