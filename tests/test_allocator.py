"""What is asked of glibc, seen from outside: page faults, and a process that began twice."""

from __future__ import annotations

import ast
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


class Monitoring:
    """Of Python 3.12 and later, with a debugger or without."""

    DEBUGGER_ID = 0

    def __init__(self, debugger: str | None) -> None:
        self.debugger = debugger

    def get_tool(self, number: int) -> str | None:
        return self.debugger if number == self.DEBUGGER_ID else None


@GLIBC
def test_whom_it_would_disturb_is_not_started_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor does a process end that cannot be started again."""
    began = []

    def execve(*command: object) -> None:
        began.append(command)
        raise OSError

    for name in (*allocator.OWN, "GLIBC_TUNABLES"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os, "execve", execve)
    monkeypatch.setattr(sys, "gettrace", lambda: None)
    monkeypatch.setattr(sys, "monitoring", Monitoring(None), raising=False)
    monkeypatch.setattr(sys, "argv", [__file__, "-x"])
    monkeypatch.setattr(sys, "orig_argv", ["python", "-O", __file__, "-x"])
    allocator.start_again()
    assert len(began) == 1
    with monkeypatch.context() as traced:
        traced.setattr(sys, "gettrace", lambda: print)
        allocator.start_again()
    with monkeypatch.context() as monitored:
        monitored.setattr(sys, "monitoring", Monitoring("debugpy"), raising=False)
        allocator.start_again()
    # Through standard input; by a program that does something else.
    for argv, orig in ((["-"], ["python", "-"]), ([__file__], ["python", "caller.py"])):
        monkeypatch.setattr(sys, "argv", argv)
        monkeypatch.setattr(sys, "orig_argv", orig)
        allocator.start_again()
    assert len(began) == 1


def test_other_systems_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    monkeypatch.setattr(os, "execve", lambda *_: pytest.fail("started again"))
    allocator.start_again()
    assert allocator.keep_freed_memory() is False


@pytest.mark.parametrize("script", ["train.py", "train_defect.py"])
def test_scripts_start_again_before_anything_large_is_imported(script: str) -> None:
    before = []
    for node in ast.parse((ROOT / script).read_text()).body:
        if isinstance(node, ast.If):
            break
        before.append(ast.unparse(node))
    assert ast.unparse(node) == "if __name__ == '__main__':\n    start_again()"
    imports = {line for line in before if line.startswith(("import ", "from "))}
    small = {"import sys", "from pathlib import Path", "from typing import Any"}
    assert imports <= small | {"from utils.allocator import start_again"}


SMALL = """
import ctypes
from utils.allocator import start_again
start_again()
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
class Info(ctypes.Structure):
    _fields_ = [(n, ctypes.c_int) for n in "arena o s h hd u free_and_small used free k".split()]
libc.mallinfo.restype = Info
pieces = [libc.malloc(100) for _ in range(5)]
before = libc.mallinfo().free_and_small
for piece in pieces:
    libc.free(piece)
print(libc.mallinfo().free_and_small - before)
"""


@GLIBC
def test_the_cache_of_small_pieces_is_off(tmp_path: Path) -> None:
    """What is freed counts as free: 5 pieces of 112 bytes. In the cache it would not."""
    script = tmp_path / "script.py"
    script.write_text(SMALL)
    for own, off in (({}, True), ({"MALLOC_MMAP_MAX_": "65536"}, False)):
        command = [sys.executable, str(script)]
        ran = subprocess.run(
            command, env=environment(**own), capture_output=True, text=True, check=True
        )
        assert (int(ran.stdout) >= 5 * 112) == off
