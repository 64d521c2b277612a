"""The numbers of ``metrics.jsonl`` for TensorBoard, where that is installed.

``metrics.jsonl`` stays the record: at the start of every run the event files of its stage are
written anew from it, so that a run which was killed and goes on shows no epoch twice.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from utils.commandline import UserError

FOLDER = "tensorboard"
_FILES = "events.out.tfevents.*"


def require_tensorboard() -> None:
    """Raise UserError if TensorBoard is not installed."""
    if importlib.util.find_spec("tensorboard") is None:
        raise UserError(
            "tensorboard: the package is not installed; pip install tensorboard, or leave out "
            "--tensorboard (metrics.jsonl holds the same numbers)"
        )


def clear(run_dir: str | Path, stage: str) -> None:
    """Remove the event files of a stage, and the folders if they are then empty."""
    folder = Path(run_dir) / FOLDER / stage
    with _writing(folder):
        for path in folder.glob(_FILES):
            path.unlink(missing_ok=True)
    with suppress(OSError):  # somebody put more into them, or they were never made
        folder.rmdir()
        folder.parent.rmdir()


class Events:
    """Event files of one stage, in ``<run>/tensorboard/<stage>``.

    Args:
        run_dir: folder of the run.
        stage: ``self``, ``fine`` or ``sup``.

    Raises:
        UserError: TensorBoard is not installed, or a file cannot be written; also in the methods.
    """

    def __init__(self, run_dir: str | Path, stage: str) -> None:
        require_tensorboard()
        from torch.utils.tensorboard import SummaryWriter

        self.folder = Path(run_dir) / FOLDER / stage
        clear(run_dir, stage)
        with _writing(self.folder):
            self._writer = SummaryWriter(str(self.folder))  # type: ignore[no-untyped-call]

    def add(self, values: Mapping[str, Any]) -> None:
        """Write a line of ``metrics.jsonl``: losses as ``train/...``, scores as ``test/...``."""
        with _writing(self.folder):
            for name, step, value in scalars(values):
                self._writer.add_scalar(name, value, step)  # type: ignore[no-untyped-call]
            self._writer.flush()  # type: ignore[no-untyped-call]

    def close(self) -> None:
        """Close the files."""
        with _writing(self.folder):
            self._writer.close()  # type: ignore[no-untyped-call]


def scalars(values: Mapping[str, Any]) -> Iterable[tuple[str, int, float]]:
    """(name, epoch, value) of the numbers in a line of ``metrics.jsonl``; null is left out."""
    found = values.get("evaluation")
    group, source = ("test", found) if isinstance(found, Mapping) else ("train", values)
    for name, value in source.items():
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if number and name != "epoch" and "epoch" in source:
            yield f"{group}/{name}", int(source["epoch"]), float(value)


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{path}: cannot be written ({error.strerror or error}); free disk space or leave out "
            "--tensorboard"
        ) from error
