"""How the system hands out memory for tensors, where it is glibc that does.

Imports nothing large: it is asked before all else. Whoever sets one of glibc's own variables
decides for himself, and nothing is done.
"""

from __future__ import annotations

import ctypes
import os
import platform
import sys

OWN = ("MALLOC_MMAP_MAX_", "MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "LD_PRELOAD")
TUNABLES = "glibc.malloc.tcache_count=0"


def ours() -> bool:
    """Whether glibc hands out memory here and nobody told it how but, perhaps, this program."""
    if platform.libc_ver()[0] != "glibc" or any(name in os.environ for name in OWN):
        return False
    return os.environ.get("GLIBC_TUNABLES", TUNABLES) == TUNABLES


def start_again() -> None:
    """Start this script again, once, as the same process, without glibc's cache of small pieces.

    Tensors begin at multiples of 64 bytes, and the slivers cut off around them go into that cache,
    which counts as in use: between them freed memory does not grow together again, and a
    PSCL-SimCLR step at 376x376 in bf16 takes half a gigabyte more (results/speed). glibc asks
    whether to have the cache only when a process begins. Under a debugger nothing is done.
    """
    if not ours() or "GLIBC_TUNABLES" in os.environ or sys.gettrace() or not sys.executable:
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
