"""The logs of a run: text, ``metrics.jsonl``, TensorBoard events, running means, header lines.

Text log and metrics hold no clock times, so equal seeds give equal bytes; what differs from run to
run goes to the terminal only (:meth:`RunLog.note`).
"""

from __future__ import annotations

import hashlib
import importlib.util
import io
import json
import math
import os
import platform
import re
import sys
import time
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from utils.commandline import UserError
from utils.files import (
    open_to_append,
    read_plain,
    refuse_links,
    replace_file,
    special_kind,
    writing,
)
from utils.metrics import Scores
from utils.ranks import group
from utils.run_folder import remove_outputs

VERSION = "1.0.0"  # of this program, printed at the head of every log
ROOT = Path(__file__).resolve().parents[1]
# The sources that decide a training, as patterns below the program's folder.
SOURCES = ("data.py", "encoders.py", "methods.py", "model.py", "networks.py", "imaging/*.py",
           "pscl/*.py", "stages/*.py", "utils/cuda/*.py", "utils/device.py", "utils/metrics.py",
           "utils/training.py")  # fmt: skip

METRICS_FILE = "metrics.jsonl"
EVENTS_FOLDER = "tensorboard"

WARNING = "Warning: "  # how a line begins that everybody should read


class RunLog:
    """The text log ``log_<stage>.txt`` of one stage and its lines in the run's ``metrics.jsonl``.

    Both are truncated to ``resume_at``, the :meth:`offsets` saved with the training state, or
    emptied; lines of other stages stay. With ``tensorboard`` the event files in
    ``tensorboard/<stage>`` are made anew from the metrics, so that a resumed run shows every epoch
    once. Without ``enabled`` no method does anything. All methods raise UserError if a file cannot
    be opened or written.
    """

    def __init__(
        self,
        run_dir: str | Path,
        stage: str,
        resume_at: Mapping[str, int] | None = None,
        *,
        enabled: bool = True,
        tensorboard: bool = False,
    ) -> None:
        run_dir, resume_at = Path(run_dir), resume_at or {}
        self.stage, self.enabled = stage, enabled
        self.text_path, self.metrics_path = run_dir / f"log_{stage}.txt", run_dir / METRICS_FILE
        self._files: dict[Path, Any] = {}
        self._events: Any = None
        self._metrics_lines = 0
        self._lost: list[Path] = []  # logs that are shorter than they were
        if not enabled:
            return
        events = run_dir / EVENTS_FOLDER / stage
        if tensorboard or not resume_at:
            old = events.glob("events.out.tfevents.*")
            remove_outputs(run_dir, [str(path.relative_to(run_dir)) for path in old])
        with writing(self.text_path):
            run_dir.mkdir(parents=True, exist_ok=True)
            text = self._files[self.text_path] = open_to_append(self.text_path)
            if text.tell() < resume_at.get("text", 0):
                self._lost.append(self.text_path)
            if text.tell() > resume_at.get("text", 0):
                text.truncate(resume_at.get("text", 0))
                text.seek(0, os.SEEK_END)
        with writing(self.metrics_path):
            keep = resume_at.get("metrics_lines", 0)
            self._metrics_lines = _cut_metrics(self.metrics_path, stage, keep)
            self._files[self.metrics_path] = open_to_append(self.metrics_path)
            if self._metrics_lines < keep:
                self._lost.append(self.metrics_path)
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            refuse_links(events / "events")
            with writing(events):
                self._events = SummaryWriter(str(events))  # type: ignore[no-untyped-call]
            self._files[events] = self._events
            for entry in read_metrics(self.metrics_path):
                if entry.get("stage") == stage:
                    self._add_events(entry)

    def offsets(self) -> dict[str, int]:
        """Bytes of the text log, and lines of this stage in the metrics."""
        text = self._files[self.text_path].tell() if self.enabled else 0
        return {"text": text, "metrics_lines": self._metrics_lines}

    def header(self, lines: Iterable[str]) -> None:
        """Write the head of an empty text log; a resumed log has one, so show it only."""
        show = self.note if self.offsets()["text"] else self.line
        for line in lines:
            show(line)
        for path in self._lost:
            what = f"{path} was removed or cut short since the run was stopped"
            self.line(f"Warning: {what}; what it held of the epochs until then is lost")

    def line(self, text: str) -> None:
        """Write a line to the text log and the terminal."""
        self._append(self.text_path, text)
        self.note(text)

    def note(self, text: str) -> None:
        """Show a line on the terminal only, such as times and rates."""
        if self.enabled:
            remark(text)

    def metrics(self, values: Mapping[str, Any]) -> None:
        """Append one line to ``metrics.jsonl``; nan and infinities become null."""
        if not self.enabled:
            return
        entry = _json_value({"stage": self.stage, **values})
        self._append(self.metrics_path, json.dumps(entry, ensure_ascii=False, allow_nan=False))
        self._add_events(entry)
        self._metrics_lines += 1

    def close(self) -> None:
        """Close all files."""
        for path, file in self._files.items():
            with writing(path):
                file.close()

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def require_files(self) -> None:
        """Raise UserError if a log that is being written is no longer in the run's folder."""
        for path in (self.text_path, self.metrics_path) if self.enabled else ():
            if not path.exists():
                what = f"{path}: was removed or moved while the training writes it"
                cure = "put the folder back, or give the same command again to begin anew"
                raise UserError(f"{what}; the training is ended: {cure}")

    def _append(self, path: Path, text: str) -> None:
        if self.enabled:
            self.require_files()
            with writing(path):
                # File names that are not valid UTF-8 hold surrogates, which cannot be encoded.
                self._files[path].write(f"{text}\n".encode(errors="backslashreplace"))
                self._files[path].flush()

    def _add_events(self, entry: Mapping[str, Any]) -> None:
        if self._events is not None:
            with writing(self._events.log_dir):
                for name, epoch, value in scalars(entry):
                    self._events.add_scalar(name, value, epoch)
                self._events.flush()


def _json_value(value: Any) -> Any:
    """Tensors, arrays and NumPy numbers as plain ones; what is not finite becomes None."""
    if isinstance(value, Mapping):
        return {str(key): _json_value(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_json_value(item) for item in value]
    if hasattr(value, "tolist"):
        return _json_value(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """The lines of a ``metrics.jsonl`` but for an incomplete one of a killed run; or OSError."""
    return [entry for _, entry in _whole_lines(read_plain(path))]


def _whole_lines(contents: bytes) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """Each line that is a JSON object, and the object."""
    for line in contents.splitlines():
        with suppress(ValueError):
            entry = json.loads(line)
            if isinstance(entry, dict):
                yield line, entry


def _cut_metrics(path: Path, stage: str, keep: int) -> int:
    """Keep ``keep`` lines of ``stage`` and all others; returns how many of the stage are left."""
    if kind := special_kind(path):
        raise UserError(f"{path}: {kind}, not a file; remove it")
    old = path.read_bytes() if path.exists() else b""
    kept: list[bytes] = []
    own = 0
    for line, entry in _whole_lines(old):
        mine = entry.get("stage") == stage
        if not mine or own < keep:
            kept.append(line + b"\n")
            own += mine
    if b"".join(kept) != old:
        replace_file(path, b"".join(kept))
    return own


def drop_evaluations(path: Path, stage: str, epochs: Collection[int]) -> None:
    """Remove the lines of a ``metrics.jsonl`` on evaluations of ``stage`` after some epochs."""
    old = path.read_bytes() if path.is_file() else b""
    lines = _whole_lines(old)
    kept = [line for line, entry in lines if not _evaluated(entry, stage, epochs)]
    new = b"".join(line + b"\n" for line in kept)
    if new != old:
        replace_file(path, new)


def _evaluated(entry: Mapping[str, Any], stage: str, epochs: Collection[int]) -> bool:
    evaluation = entry.get("evaluation")
    if entry.get("stage") != stage or not isinstance(evaluation, dict):
        return False
    return evaluation.get("epoch") in epochs


def require_tensorboard() -> None:
    """Raise UserError if TensorBoard is not installed."""
    if importlib.util.find_spec("tensorboard") is None:
        cure = "pip install tensorboard, or leave out --tensorboard"
        same = "metrics.jsonl holds the same numbers"
        raise UserError(f"tensorboard: the package is not installed; {cure} ({same})")


def scalars(values: Mapping[str, Any]) -> Iterator[tuple[str, int, float]]:
    """(name, epoch, value) of a line of ``metrics.jsonl``: ``train/<loss>`` or ``test/<score>``."""
    scores = values.get("evaluation")
    group, source = ("test", scores) if isinstance(scores, Mapping) else ("train", values)
    for name, value in source.items():
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if number and name != "epoch" and "epoch" in source:
            yield f"{group}/{name}", int(source["epoch"]), float(value)


_SHOWN: list[str] = []  # title of the progress shown, see ``only_progress``
SECONDS_BETWEEN_LINES = 20.0  # of progress, where stderr is no terminal


@contextmanager
def only_progress(title: str) -> Iterator[None]:
    """Show progress under this title, and no ``remark`` but warnings, while the block runs.

    Logs are written as ever, and ``to_terminal`` prints as ever. Where stderr is no terminal a line
    says now and then how far the work is.
    """
    _SHOWN.append(title)
    try:
        yield
    finally:
        _SHOWN.pop()


def remark(text: str) -> None:
    """``to_terminal`` of a line that is in a log anyway: in ``only_progress`` warnings alone."""
    if not _SHOWN or text.startswith(WARNING):
        to_terminal(text)


def to_terminal(text: str) -> None:
    """Print a line above any progress bar; a closed terminal does not stop the training.

    Of several ranks, those that write (``utils.ranks.group``) print.
    """
    if not group.writes() or sys.stdout is None:  # a scheduler may close it
        return
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    printable = text.encode(encoding, errors="backslashreplace").decode(encoding)
    with suppress(OSError):
        tqdm.write(printable, file=sys.stdout)
        sys.stdout.flush()


def print_result(text: str) -> None:
    """Print what a command is run for; UserError if it cannot be written, unless nobody reads it.

    Unlike ``to_terminal``, whose lines are in a log as well.
    """
    try:
        print(text, flush=True)
    except OSError as error:
        with suppress(OSError):  # what is left in the buffer goes nowhere at the end of Python
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if not isinstance(error, BrokenPipeError):  # whose reader has enough
            raise UserError(f"standard output: cannot be written ({error.strerror})") from None


class AverageMeter:
    """Last value and mean of named numbers, kept on their device until they are read."""

    def __init__(self) -> None:
        self._last: dict[str, Tensor] = {}
        self._sum: dict[str, Tensor] = {}
        self._count: dict[str, int] = {}

    def add(self, name: str, value: Tensor | float) -> None:
        """Add a scalar, without synchronising the device or keeping the autograd graph."""
        # A copy, because a captured graph writes the next step's loss into the same memory.
        last = torch.as_tensor(value).detach().to(torch.float32, copy=True)  # ()
        self._last[name] = last
        self._sum[name] = self._sum[name] + last if name in self._sum else last.clone()
        self._count[name] = self._count.get(name, 0) + 1

    def state(self) -> dict[str, Any]:
        """Everything added so far, to be saved."""
        return {"last": dict(self._last), "sum": dict(self._sum), "count": dict(self._count)}

    def go_on(self, state: Mapping[str, Any], device: torch.device) -> None:
        """Take what ``state`` returned; LookupError or TypeError if that is damaged."""
        self._count = {str(name): int(count) for name, count in state["count"].items()}
        for kept, saved in ((self._last, state["last"]), (self._sum, state["sum"])):
            kept.update(
                {name: saved[name].to(device, torch.float32).reshape(()) for name in self._count}
            )

    def read(self) -> dict[str, tuple[float, float]]:
        """``{name: (last, average)}`` in the order of first use; one device synchronisation."""
        tensors = [*self._last.values(), *self._sum.values()]
        if not tensors:
            return {}
        # Python numbers lie on the CPU; moving them to the device does not synchronise it.
        device = next((t.device for t in tensors if t.device.type != "cpu"), tensors[0].device)
        values = torch.stack([t.to(device, non_blocking=True) for t in tensors]).tolist()
        half = len(self._last)
        names = zip(self._last, values[:half], values[half:], strict=True)
        return {name: (last, total / self._count[name]) for name, last, total in names}


class SparseBar(tqdm):  # type: ignore[type-arg]
    """Progress as a line now and then, for logs and pipes: 'TITLE: 30 of 400, 2:05 left'."""

    def display(self, msg: str | None = None, pos: int | None = None) -> bool:
        """Print a line if the last one is old enough, or nothing has been said yet."""
        now = time.time()  # as tqdm's own
        last = float(getattr(self, "said", getattr(self, "start_t", now)))
        if self.n and now - last >= SECONDS_BETWEEN_LINES:
            self.said = now
            found = self.format_dict
            left = ((self.total or 0) - self.n) * found["elapsed"] / self.n
            line = f"{self.desc}: {self.n} of {self.total}, {tqdm.format_interval(left)} left"
            with suppress(OSError):
                print(line, file=sys.stderr, flush=True)
        return True

    def clear(self, nolock: bool = False) -> None:
        """Nothing to clear: lines stay."""

    def close(self) -> None:
        """End without a last line."""
        self.disable = True


def progress(total: int, desc: str, lines: bool = False) -> tqdm[Any]:
    """A progress bar of ``total`` steps, hidden where stderr is no terminal.

    With ``lines``, and in ``only_progress``, a line now and then takes its place there.
    """
    shows = group.shows_progress()
    hidden, err = not sys.stderr.isatty() or not shows, sys.stderr
    if (_SHOWN or lines) and shows:
        desc = _SHOWN[-1] if _SHOWN else desc
        if hidden:
            often = min(1.0, SECONDS_BETWEEN_LINES)
            return SparseBar(total=total, desc=desc, file=io.StringIO(), mininterval=often)
    return tqdm(total=total, desc=desc, file=err, disable=hidden, leave=False, dynamic_ncols=True)


@cache
def source_digest() -> str:
    """A short digest of ``SOURCES``: runs by a changed method, or loss, can be told by it."""
    files = sorted(path for pattern in SOURCES for path in ROOT.glob(pattern))
    whole = hashlib.sha256()
    for path in files:
        whole.update(f"{path.relative_to(ROOT).as_posix()}\n".encode() + path.read_bytes())
    return whole.hexdigest()[:8]


def source_of(environment: str) -> str:
    """The digest of the sources in an ``environment_line``; '' in one that has none."""
    found = re.search(r"\bsource ([0-9a-f]{8}),", environment)
    return found[1] if found else ""


def changed_source(environment: str) -> str:
    """That a run of this ``environment`` had other sources than now, in words; '' if not."""
    before, now = source_of(environment), source_digest()
    words = f"computed by another program (source {before}, now {now})"
    return words if before not in ("", now) else ""


def environment_line(device: torch.device | str, amp: str = "off") -> str:
    """One line for the header: program, versions, device by name, CPU threads, mixed precision."""
    device = torch.device(device)
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in ("torchvision", "numpy"))
    return (
        f"program {VERSION}, source {source_digest()}, python {platform.python_version()}, "
        f"torch {torch.__version__}, {versions}, device {device.type} ({_device_name(device)}), "
        f"threads {torch.get_num_threads()}, amp {amp}"
    )


def _device_name(device: torch.device) -> str:
    if device.type == "cuda" and torch.cuda.is_available():
        return torch.cuda.get_device_name(device)
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return " ".join(line.partition(":")[2].split())
    return platform.processor() or platform.machine()


def format_epoch(
    epoch: int, max_epoch: int, step: int, steps: int, meters: Mapping[str, tuple[float, float]]
) -> str:
    """``Epoch: [e/max][i/n] Loss v (avg:a) ...``, the published program's epoch line.

    ``meters`` is what :meth:`AverageMeter.read` returns.
    """
    parts = [f"Epoch: [{epoch}/{max_epoch}][{step}/{steps}]"]
    for name, (last, average) in meters.items():
        parts.append(f"{name[:1].upper()}{name[1:]} {_digits(last)} (avg:{_digits(average)})")
    return " ".join(parts)


def _digits(value: float) -> str:
    """Four decimals, or three significant digits of a smaller value (a learning rate)."""
    return f"{value:.3g}" if 0 < abs(value) < 1e-3 else f"{value:.4f}"


def evaluation_lines(scores: Scores) -> list[str]:
    """The lines of an evaluation: a score each, then the classes that the whole truth lacks."""
    lines = [f"ACC: {scores.acc:.4f}", f"Dice: {scores.mean_dice:.4f}"]
    lines += [f"Dice{c}: {value:.4f}" for c, value in enumerate(scores.dice, start=1)]
    lines.append(f"mIoU: {scores.mean_iou:.4f}")
    lines += [f"IoU{c}: {value:.4f}" for c, value in enumerate(scores.iou, start=1)]
    if scores.classes_scored < len(scores.dice):
        lines.append(f"Classes scored: {scores.classes_scored} of {len(scores.dice)}")
        counts = zip(scores.truth_pixels, scores.predicted_pixels, strict=False)
        lines += [
            f"Class {c} is not scored: no pixel of it in the truth, {predicted} predicted"
            for c, (truth, predicted) in enumerate(counts)
            if c and not truth
        ]
    return lines
