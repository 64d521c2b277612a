"""What a run writes down: text log, metrics for programs and for TensorBoard, meters, header lines.

The text log and the metrics file hold no clock times, so two runs with one seed write the same
bytes; anything that differs from run to run goes to the terminal alone (:meth:`RunLog.note`).
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import platform
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor
from tqdm import tqdm

from utils.commandline import UserError
from utils.files import replace_file, writing
from utils.metrics import Scores
from utils.run_folder import remove_outputs

VERSION = "1.0.0"  # of this program, printed at the head of every log

METRICS_FILE = "metrics.jsonl"
EVENTS_FOLDER = "tensorboard"


class RunLog:
    """The text log of one stage and its lines in the run's ``metrics.jsonl``.

    Args:
        run_dir: folder of the run, made if missing.
        stage: ``self``, ``fine``, ``sup`` ...; the text log is ``log_<stage>.txt``.
        resume_at: None for a fresh start, which empties the stage's text log and drops the stage's
            lines from ``metrics.jsonl``; or :meth:`offsets` as saved with the training state, to
            which both are cut back. Lines of other stages are always kept.
        enabled: False makes every method do nothing.
        tensorboard: write the numbers of the metrics as event files, too, in
            ``tensorboard/<stage>``. They are written anew from the metrics at the start, so that a
            run which was stopped and goes on shows no epoch twice.

    Every line is flushed as it is written.

    Raises:
        UserError: a file cannot be opened or written, here and in every writing method.
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
        self.stage = stage
        self.text_path = Path(run_dir) / f"log_{stage}.txt"
        self.metrics_path = Path(run_dir) / METRICS_FILE
        self._enabled = enabled
        self._text: BinaryIO | None = None
        self._metrics: BinaryIO | None = None
        self._metrics_lines = 0
        self._events: Any = None
        if not enabled:
            return
        if tensorboard or not resume_at:
            events = Path(run_dir).glob(f"{EVENTS_FOLDER}/{stage}/events.out.tfevents.*")
            remove_outputs(run_dir, [str(path.relative_to(run_dir)) for path in events])
        resume_at = resume_at or {}
        with writing(self.text_path):
            self.text_path.parent.mkdir(parents=True, exist_ok=True)
            self._text = open(self.text_path, "ab")  # noqa: SIM115  (closed by close())
            if self._text.tell() > resume_at.get("text", 0):
                self._text.truncate(resume_at.get("text", 0))
                self._text.seek(0, os.SEEK_END)
        with writing(self.metrics_path):
            self._metrics_lines = _cut_metrics(
                self.metrics_path, stage, resume_at.get("metrics_lines", 0)
            )
            self._metrics = open(self.metrics_path, "ab")  # noqa: SIM115
        if tensorboard:
            self._open_events(Path(run_dir) / EVENTS_FOLDER / stage)

    def _open_events(self, folder: Path) -> None:
        """Write event files anew from the metrics that are kept."""
        require_tensorboard()
        from torch.utils.tensorboard import SummaryWriter

        with writing(folder):
            self._events = SummaryWriter(str(folder))  # type: ignore[no-untyped-call]
        for entry in read_metrics(self.metrics_path):
            if entry.get("stage") == self.stage:
                self._add_events(entry)

    def _add_events(self, entry: Mapping[str, Any]) -> None:
        if self._events is not None:
            with writing(self._events.log_dir):
                for name, epoch, value in scalars(entry):
                    self._events.add_scalar(name, value, epoch)
                self._events.flush()

    def offsets(self) -> dict[str, int]:
        """Where the logs stand: bytes of the text log, lines of this stage among the metrics."""
        text = self._text.tell() if self._text is not None else 0
        return {"text": text, "metrics_lines": self._metrics_lines}

    def header(self, lines: Iterable[str]) -> None:
        """Write the head of the text log; one that goes on after a resume has its head already."""
        at_start = self._text is not None and self._text.tell() == 0
        for line in lines:
            if at_start:
                self._write(line)
            self.note(line)

    def line(self, text: str) -> None:
        """Write one line to the text log and show it on the terminal."""
        self._write(text)
        self.note(text)

    def note(self, text: str) -> None:
        """Show a line on the terminal only: the place for times, rates and dates."""
        if self._enabled:
            to_terminal(text)

    def metrics(self, values: Mapping[str, Any]) -> None:
        """Append one line to ``metrics.jsonl``; nan and infinities become null."""
        if self._metrics is None:
            return
        entry = _json_value({"stage": self.stage, **values})
        with writing(self.metrics_path):
            self._metrics.write(_json_line(entry))
            self._metrics.flush()
        self._add_events(entry)
        self._metrics_lines += 1

    def close(self) -> None:
        """Close all files; further lines are an error."""
        files: list[Any] = [self._text, self._metrics, self._events]
        paths = (self.text_path, self.metrics_path, Path(EVENTS_FOLDER))
        for path, file in zip(paths, files, strict=True):
            if file is not None:
                with writing(path):
                    file.close()

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _write(self, text: str) -> None:
        if self._text is not None:
            with writing(self.text_path):
                self._text.write(_encode(text + "\n"))
                self._text.flush()


def _encode(text: str) -> bytes:
    # A file name that is no valid text holds surrogates, which UTF-8 cannot write.
    return text.encode("utf-8", errors="backslashreplace")


def _json_line(values: Mapping[str, Any]) -> bytes:
    return _encode(json.dumps(_json_value(values), ensure_ascii=False, allow_nan=False) + "\n")


def _json_value(value: Any) -> Any:
    """Turn tensors, arrays and NumPy numbers into plain ones, and what is not finite into None."""
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
    """The lines of a ``metrics.jsonl``; half a line, left when a run was killed, is passed over.

    Raises:
        OSError: the file cannot be read.
    """
    entries = []
    for line in Path(path).read_bytes().splitlines():
        with suppress(ValueError):
            entry = json.loads(line)
            if isinstance(entry, dict):
                entries.append(entry)
    return entries


def require_tensorboard() -> None:
    """Raise UserError if TensorBoard is not installed."""
    if importlib.util.find_spec("tensorboard") is None:
        raise UserError(
            "tensorboard: the package is not installed; pip install tensorboard, or leave out "
            "--tensorboard (metrics.jsonl holds the same numbers)"
        )


def scalars(values: Mapping[str, Any]) -> Iterator[tuple[str, int, float]]:
    """(name, epoch, value) of the numbers in a line of ``metrics.jsonl``; null is left out.

    Losses are called ``train/...``, scores ``test/...``.
    """
    scores = values.get("evaluation")
    group, source = ("test", scores) if isinstance(scores, Mapping) else ("train", values)
    for name, value in source.items():
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if number and name != "epoch" and "epoch" in source:
            yield f"{group}/{name}", int(source["epoch"]), float(value)


def _cut_metrics(path: Path, stage: str, keep: int) -> int:
    """Keep the first ``keep`` lines of ``stage``, and all others; return how many of it there are.

    Lines that are no JSON (half a line, left when a run was killed) go.
    """
    if not path.exists():
        return 0
    old = path.read_bytes()
    kept: list[bytes] = []
    own = 0
    for line in old.splitlines():
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        if isinstance(entry, dict) and entry.get("stage") == stage:
            if own == keep:
                continue
            own += 1
        kept.append(line + b"\n")
    new = b"".join(kept)
    if new != old:
        replace_file(path, new)
    return own


def to_terminal(text: str) -> None:
    """Print a line above any progress bar; a terminal that went away does not stop a training."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    printable = text.encode(encoding, errors="backslashreplace").decode(encoding)
    with suppress(OSError):
        tqdm.write(printable, file=sys.stdout)
        sys.stdout.flush()


class AverageMeter:
    """Last value and running mean of named numbers, kept on their device until they are read."""

    def __init__(self) -> None:
        self._last: dict[str, Tensor] = {}
        self._sum: dict[str, Tensor] = {}
        self._count: dict[str, int] = {}

    def add(self, name: str, value: Tensor | float) -> None:
        """Add a scalar; a tensor is neither waited for nor kept in the autograd graph."""
        # A copy, because a captured graph writes the next step's loss into the same memory.
        last = torch.as_tensor(value).detach().to(torch.float32, copy=True)  # ()
        self._last[name] = last
        self._sum[name] = self._sum[name] + last if name in self._sum else last.clone()
        self._count[name] = self._count.get(name, 0) + 1

    def read(self) -> dict[str, tuple[float, float]]:
        """Return ``{name: (last, average)}`` in the order of first use, with one wait for all."""
        tensors = [*self._last.values(), *self._sum.values()]
        if not tensors:
            return {}
        # Python numbers were kept on the CPU; they join the tensors' device without a wait.
        device = next((t.device for t in tensors if t.device.type != "cpu"), tensors[0].device)
        values = torch.stack([t.to(device, non_blocking=True) for t in tensors]).tolist()
        half = len(self._last)
        names = zip(self._last, values[:half], values[half:], strict=True)
        return {name: (last, total / self._count[name]) for name, last, total in names}


def progress(total: int, desc: str) -> tqdm[Any]:
    """Return a bar of ``total`` steps on a terminal's stderr; elsewhere one that shows nothing.

    Use it in a ``with`` statement and call ``update()``; log lines are printed above it.
    """
    return tqdm(
        total=total,
        desc=desc,
        file=sys.stderr,
        disable=not sys.stderr.isatty(),
        leave=False,
        dynamic_ncols=True,
    )


def environment_line(device: torch.device | str, amp: str = "off") -> str:
    """Return one line for the header: versions, device by name, CPU threads, mixed precision."""
    device = torch.device(device)
    versions = [f"program {VERSION}", f"python {platform.python_version()}"]
    versions += [f"{name} {_version(name)}" for name in ("torch", "torchvision", "numpy")]
    return ", ".join(
        [
            *versions,
            f"device {device.type} ({_device_name(device)})",
            f"threads {torch.get_num_threads()}",
            f"amp {amp}",
        ]
    )


def _version(package: str) -> str:
    if package == "torch":
        return str(torch.__version__)
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "absent"


def _device_name(device: torch.device) -> str:
    if device.type == "cuda" and torch.cuda.is_available():
        return torch.cuda.get_device_name(device)
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return " ".join(line.partition(":")[2].split())
    return platform.processor() or platform.machine()


def format_epoch(
    epoch: int,
    max_epoch: int,
    step: int,
    steps: int,
    meters: Mapping[str, tuple[float, float]],
) -> str:
    """Return ``Epoch: [e/max][i/n] Loss v (avg:a) ...``, the published program's epoch line.

    ``meters`` is what :meth:`AverageMeter.read` returns; a name's first letter is made a capital.
    """
    parts = [f"Epoch: [{epoch}/{max_epoch}][{step}/{steps}]"]
    for name, (last, average) in meters.items():
        parts.append(f"{name[:1].upper()}{name[1:]} {_digits(last)} (avg:{_digits(average)})")
    return " ".join(parts)


def _digits(value: float) -> str:
    """Four decimals, or three digits where those would show nothing (a learning rate)."""
    return f"{value:.3g}" if 0 < abs(value) < 1e-3 else f"{value:.4f}"


def evaluation_lines(scores: Scores) -> list[str]:
    """Return the lines of an evaluation, each score alone on its line: ``ACC``, ``Dice``, ...

    A class that the whole test set lacks has the score ``nan``; ``Classes scored`` tells over how
    many classes the means then are, and how often the others were predicted all the same.
    """
    lines = [f"ACC: {scores.acc:.4f}", f"Dice: {scores.mean_dice:.4f}"]
    lines += _class_lines("Dice", scores.dice)
    lines.append(f"mIoU: {scores.mean_iou:.4f}")
    lines += _class_lines("IoU", scores.iou)
    if scores.classes_scored < len(scores.dice):
        lines.append(f"Classes scored: {scores.classes_scored} of {len(scores.dice)}")
        counts = zip(scores.truth_pixels, scores.predicted_pixels, strict=False)
        lines += [
            f"Class {c} is not scored: no pixel of it in the truth, {predicted} predicted"
            for c, (truth, predicted) in enumerate(counts)
            if c and not truth
        ]
    return lines


def _class_lines(name: str, values: Sequence[float]) -> list[str]:
    return [f"{name}{c}: {value:.4f}" for c, value in enumerate(values, start=1)]
