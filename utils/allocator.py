"""How the system hands out memory for tensors, where it is glibc that does.

Imports nothing large: it is asked before all else. Whoever sets one of glibc's own variables
decides for himself, and nothing is done.
"""

from __future__ import annotations

import ctypes
import os
import platform
import sys

OWN = ("MALLOC_MMAP_MAX_", "MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_")
TUNABLES = "glibc.malloc.tcache_count=0"


def ours() -> bool:
    """Whether glibc hands out memory here and nobody told it how but, perhaps, this program."""
    if platform.libc_ver()[0] != "glibc" or any(name in os.environ for name in OWN):
        return False
    return os.environ.get("GLIBC_TUNABLES", TUNABLES) == TUNABLES


def debugged() -> bool:
    """Whether somebody traces this process: he would lose it."""
    monitoring = getattr(sys, "monitoring", None)  # Python 3.12 and later
    tool = monitoring.get_tool(monitoring.DEBUGGER_ID) if monitoring else None
    return tool is not None or sys.gettrace() is not None


def is_the_script() -> bool:
    """Whether the process was started for the sake of the script that ``sys.argv`` names.

    It was not where the script comes through standard input, or where a program that is doing
    something else runs it.
    """
    argv = sys.argv
    return os.path.isfile(argv[0]) and sys.orig_argv[-len(argv) :] == argv and bool(sys.executable)


def start_again() -> None:
    """Start this script again, once, as the same process, without glibc's cache of small pieces.

    Tensors begin at multiples of 64 bytes, and the slivers cut off around them go into that cache,
    which counts as in use: between them freed memory does not grow together again, and a
    PSCL-SimCLR step at 376x376 in bf16 takes half a gigabyte more (results/speed). glibc asks
    whether to have the cache only when a process begins. Nothing is done under a debugger, nor
    where the process is not the script's own.
    """
    if not ours() or "GLIBC_TUNABLES" in os.environ or debugged() or not is_the_script():
        return
    told = {**os.environ, "GLIBC_TUNABLES": TUNABLES}
    try:
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], told)
    except OSError:
        return  # a little more memory, then


def keep_freed_memory() -> bool:
    """Have glibc keep the memory of freed tensors for the next ones; call before large tensors.

    By default every tensor above 32 MB is mapped afresh and its pages are cleared by the system one
    by one: 2.4 million page faults, a quarter of the processor's time, in a PSCL-SimCLR step at
    376x376. Kept memory is reused as it is. The price is that the process stays as large as it once
    was, and larger because the pieces do not fit together without gaps, see ``start_again``.

    Returns:
        Whether glibc took it; False on other systems, where nothing is done.
    """
    if not ours():
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    trim_threshold, mmap_max = -1, -4  # names of malloc.h
    # No mappings of their own for large pieces, and nothing given back (-1: without any threshold).
    return bool(mallopt(mmap_max, 0)) and bool(mallopt(trim_threshold, -1))
