"""What is asked of glibc, seen from outside: page faults, and a process that began twice."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from utils import allocator

ROOT = Path(__file__).resolve().parents[1]
GLIBC = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")

FAULTS = """
import resource, torch
from utils.allocator import keep_freed_memory
print(keep_freed_memory())
def faults(rounds):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(rounds):
        several = [torch.empty(mb << 20, dtype=torch.uint8).fill_(1) for mb in (33, 64, 48, 40)]
        del several
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults(10)  # until the pieces fit together
print(faults(10) / (10 * (33 + 64 + 48 + 40) * 2**20 / resource.getpagesize()))
"""


def environment(**own: str) -> dict[str, str]:
    """That of a user who told glibc nothing but what is given."""
    told = {name: text for name, text in os.environ.items() if "MALLOC" not in name}
    told.pop("GLIBC_TUNABLES", None)
    return {**told, "PYTHONPATH": str(ROOT), **own}


@GLIBC
@pytest.mark.parametrize("own", ["", "MALLOC_MMAP_MAX_"])
def test_freed_memory_is_kept_unless_the_user_decides(own: str) -> None:
    told = environment(**({own: "65536"} if own else {}))
    command = [sys.executable, "-c", FAULTS]
    ran = subprocess.run(command, env=told, capture_output=True, text=True, check=True)
    kept, share = ran.stdout.split()
    assert kept == str(not own)
    # The share of the pages that the system had to map anew: all of them, or next to none.
    assert float(share) > 0.9 if own else float(share) < 0.1


BEGIN = """
import os, sys
print(os.getpid(), os.environ.get("GLIBC_TUNABLES"), sys.flags.optimize, *sys.argv[1:], flush=True)
from utils.allocator import keep_freed_memory, start_again
start_again()
print(keep_freed_memory())
"""


@GLIBC
@pytest.mark.parametrize("own", ["", "MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES"])
def test_a_script_starts_again_once_as_the_same_process(own: str, tmp_path: Path) -> None:
    script = tmp_path / "a script.py"
    script.write_text(BEGIN)
    value = {"GLIBC_TUNABLES": "glibc.malloc.arena_max=4"}.get(own, "131072")
    told = environment(**({own: value} if own else {}))
    command = [sys.executable, "-O", str(script), "--a", "b c"]
    with subprocess.Popen(command, env=told, stdout=subprocess.PIPE, text=True) as process:
        said = process.communicate()[0].splitlines()
    assert process.returncode == 0
    before = told.get("GLIBC_TUNABLES")
    expected = [f"{process.pid} {before} 1 --a b c"]
    if not own:
        expected.append(f"{process.pid} {allocator.TUNABLES} 1 --a b c")
    assert said == [*expected, str(not own)]


@GLIBC
def test_a_debugger_is_not_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor does a process end that cannot be started again."""
    began = []

    def execve(*command: object) -> None:
        began.append(command)
        raise OSError

    for name in (*allocator.OWN, "GLIBC_TUNABLES"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os, "execve", execve)
    monkeypatch.setattr(sys, "gettrace", lambda: None)
    allocator.start_again()
    assert len(began) == 1
    monkeypatch.setattr(sys, "gettrace", lambda: print)
    allocator.start_again()
    assert len(began) == 1


def test_other_systems_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    monkeypatch.setattr(os, "execve", lambda *_: pytest.fail("started again"))
    allocator.start_again()
    assert allocator.keep_freed_memory() is False


@pytest.mark.parametrize("script", ["train.py", "train_defect.py"])
def test_scripts_start_again_before_anything_large_is_imported(script: str) -> None:
    lines = (ROOT / script).read_text().splitlines()
    first = next(n for n, line in enumerate(lines) if line.strip() == "start_again()")
    before = [line for line in lines[:first] if line.startswith(("import ", "from "))]
    allowed = {"import sys", "from pathlib import Path", "from typing import Any"}
    assert set(before) <= allowed | {"from utils.allocator import start_again"}
