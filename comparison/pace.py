"""How long work takes: seconds of each kind, as timed beforehand and as it then took."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from utils.files import replace_file


class Pace:
    """Seconds that a whole piece of work of each kind takes, kept in a file from run to run.

    Args:
        path: of the file, JSON; None: kept in memory only. One that cannot be read counts for none.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.seconds = self._read()

    def _read(self) -> dict[str, float]:
        if self.path is not None:
            with suppress(OSError, ValueError, TypeError):
                found = dict(json.loads(self.path.read_text(encoding="utf-8")))
                return {str(kind): float(seconds) for kind, seconds in found.items()}
        return {}

    def learn(self, kind: str, seconds: float, share: float = 1.0) -> None:
        """Note that a share (0 ... 1) of a piece of work took so long; none of it says nothing."""
        if share > 0:
            self.seconds |= self._read()  # another process may have learnt something
            self.seconds[kind] = seconds / share
            if self.path is not None:
                text = json.dumps({k: round(v, 3) for k, v in self.seconds.items()}, indent=1)
                replace_file(self.path, text + "\n", "--out")

    def left(self, pieces: Mapping[str, float]) -> float:
        """Seconds of so many pieces of each kind; kinds of which nothing is known count nothing."""
        return sum(self.seconds.get(kind, 0.0) * number for kind, number in pieces.items())


def duration(seconds: float) -> str:
    """A time in words: '45 s', '12 min', '3 h 20 min', '2 d 5 h'."""
    if seconds < 90:
        return f"{round(seconds)} s"
    minutes = round(seconds / 60)
    if minutes < 90:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    if hours < 48:
        return f"{hours} h {minutes} min"
    return f"{hours // 24} d {hours % 24} h"
