"""The class maps that the user sees: published as a whole, and never over what the user corrected.

``OUT/classes`` is the user's to correct. What this program wrote there is known by its hash, so a
map with another one was corrected: it is copied to ``OUT/corrected`` and from then on a mask.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from imaging.imagefile import read_mask
from metallography.folder import MEASUREMENTS, SUMMARY
from utils.files import list_files, replace_file, replacing

RECORD, CORRECTED = "answer.json", "corrected"
KINDS = ("classes", "gray", "overlay")
TABLES = (MEASUREMENTS, "batches.csv", SUMMARY, "summary.md", "sheet.png", "doubt.csv")


class Answers:
    """The published answer of a job in its folder."""

    def __init__(self, out: Path) -> None:
        self.out, self.path, self.classes = out, out / RECORD, out / KINDS[0]
        self.record: dict[str, Any] = {"by": "", "files": {}}
        with suppress(OSError, ValueError):
            self.record |= json.loads(self.path.read_text(encoding="utf-8"))

    @property
    def by(self) -> str:
        """Whose answer is published; '' if there is none."""
        return str(self.record["by"])

    def corrections(self) -> dict[str, Path]:
        """All class maps that the user corrected, by the name of their image; new ones are kept."""
        known = self.record["files"]
        for path in list_files(self.classes, (".png",), below=True) if known else ():
            name = path.relative_to(self.classes).as_posix().removesuffix(".png")
            if name in known and digest(path) not in known[name]:
                with replacing(self.out / CORRECTED / f"{name}.png", "--out") as temporary:
                    shutil.copyfile(path, temporary)
                known[name].append(digest(path))
                self._save()
        kept = list_files(self.out / CORRECTED, (".png",), below=True)
        folder = self.out / CORRECTED
        return {p.relative_to(folder).as_posix().removesuffix(".png"): p for p in kept}

    def publish(self, work: Path, names: Iterable[str], by: str) -> None:
        """Publish a predicted folder; a kill leaves files of both answers, all of them known."""
        names = list(names)
        self.corrections()  # those made meanwhile are kept for the next time
        new = {name: digest(work / KINDS[0] / f"{name}.png") for name in names}
        old = self.record["files"]
        self.record["files"] = {
            n: list(dict.fromkeys([*old.get(n, []), d])) for n, d in new.items()
        }
        self._save()
        for kind in KINDS:
            for name in names:
                _copy(work / kind / f"{name}.png", self.out / kind / f"{name}.png")
        for table in TABLES:
            if (work / table).exists():
                _copy(work / table, self.out / table)
        self.record = {"by": by, "files": {name: [value] for name, value in new.items()}}
        self._save()

    def _save(self) -> None:
        replace_file(self.path, json.dumps(self.record, indent=1) + "\n", "--out")


def digest(path: Path) -> str:
    """A short hash of the values of a class map, however its file is packed; DataError."""
    ids = read_mask(path)
    return hashlib.sha256(f"{ids.shape}".encode() + ids.tobytes()).hexdigest()[:16]


def _copy(source: Path, target: Path) -> None:
    with replacing(target, "--out", durable=False) as temporary:
        shutil.copyfile(source, temporary)
