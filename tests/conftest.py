"""What holds for every test: one thread, no deadline per example, figures unseen."""

from __future__ import annotations

import gc
import os
import signal
from collections.abc import Callable, Iterator

# Tests run side by side, those in processes of their own too: one thread each.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import hypothesis  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
from unseen_figures import figures_unseen  # noqa: E402

# glibc's own default, said aloud: `keep_freed_memory` then leaves the process of the tests alone,
# some of which measure its memory.
os.environ["MALLOC_TRIM_THRESHOLD_"] = "131072"

torch.set_num_threads(1)
hypothesis.settings.register_profile("project", deadline=None)
hypothesis.settings.load_profile("project")


@pytest.fixture(autouse=True, scope="session")
def interrupts_as_python_has_them() -> None:
    """Ctrl-C raises KeyboardInterrupt, also where the tests were started with SIGINT ignored."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True, scope="session")
def circles_are_looked_for_among_new_objects() -> None:
    """Those of PyTorch and of all collected tests are many, and none of them becomes garbage."""
    gc.freeze()


@pytest.fixture(autouse=True, scope="session")
def figures_are_not_drawn() -> Iterator[None]:
    """Those of runs, which take longer than tiny runs do."""
    with figures_unseen():
        yield


@pytest.fixture
def stop_at_the_second_rename(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Called, it has the second renaming from then on interrupted."""
    rename, calls = os.replace, list[object]()

    def stop(source: str, target: str) -> None:
        calls.append(target)
        if len(calls) == 2:
            raise KeyboardInterrupt
        rename(source, target)

    return lambda: monkeypatch.setattr(os, "replace", stop)


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, int], list[float]]:
    """Called with an error of Windows and a number, it has so many of the next renamings refused.

    It returns the waits between tries, which are not waited.
    """
    rename, waits, left = os.replace, list[float](), [0]

    def refuse(source: str, target: str) -> None:
        if left[0] > 0:
            left[0] -= 1
            error = PermissionError(13, "Access is denied", str(source))
            error.winerror = number[0]  # type: ignore[attr-defined, unused-ignore]
            raise error
        rename(source, target)

    number = [0]

    def begin(error: int, times: int) -> list[float]:
        number[0], left[0] = error, times
        waits.clear()
        return waits

    monkeypatch.setattr(os, "replace", refuse)
    monkeypatch.setattr("utils.files.time.sleep", waits.append)
    return begin
