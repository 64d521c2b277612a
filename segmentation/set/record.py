"""What is remembered of a set that was laid out: ``record.json`` in its folder."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from filecmp import cmp
from pathlib import Path
from typing import Any, NamedTuple

from dataset.mask_values import parse_palette
from imaging.field import Crop, read_crop
from segmentation.request import Request
from segmentation.set.files import Entry, Fingerprint, UserFiles
from utils.files import DataError, name_key

SET, RECORD = "set", "record.json"  # the folder of a set in OUT, and the file in it
VERSION = 7  # of what is laid out: a set of another one is made anew


class Laid(NamedTuple):
    """An image of the set."""

    name: str  # of its results
    stem: str  # of its files in the set
    annotated: bool
    below: str  # the path of the user's file below --images


@dataclass(frozen=True)
class SetRecord:
    """How a set was read, and what it holds; of no set nothing.

    Later runs compare the signature, and read by the meaning of values, names, crop and colours.
    """

    signature: tuple[Any, ...] = ()  # of options and files, see ``signature_of``
    images: str = ""  # the folder of images
    pictures: tuple[Laid, ...] = ()
    num_classes: int = 0
    pixels: int = 0  # of all images
    palette: str = ""  # what values of masks mean, as --palette says it; '' without any
    class_names: tuple[str, ...] = ()
    mask_kind: str = ""  # as given by the user
    crop: Crop = Crop()
    gray_range: Any = None  # how more than 8 bits became 8, as a checkpoint has it
    class_colours: tuple[str, ...] = ()
    own_colours: tuple[str, ...] = ()  # of these, as the user gave them
    our_order: bool = False  # classes are in an order of values that nobody gave
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    # Of each picture, by its name.
    fingerprints: Mapping[str, Fingerprint] = field(default_factory=dict)

    def to_json(self) -> str:
        """The text of its file."""
        return json.dumps(asdict(self), indent=1)


def read_record(path: Path) -> tuple[SetRecord, bool]:
    """The record in a file, and whether it is whole.

    What is missing, as in one of an earlier version, or damaged is as of no set: the rest still
    tells whose the folder is, and what values meant.
    """
    found: Any = None
    with suppress(OSError, ValueError):
        found = json.loads(path.read_text(encoding="utf-8"))
    known: dict[str, Any] = {}
    for name, read in _READ.items():
        with suppress(KeyError, TypeError, ValueError, DataError):
            known[name] = read(found[name])
    return SetRecord(**known), len(known) == len(_READ)


def signature_of(request: Request, files: UserFiles, entries: Sequence[Entry]) -> tuple[Any, ...]:
    """The options, and the ``entries`` of all files read: equal ones give an equal set."""
    reading = {name: v for name, v in asdict(request.reading).items() if name != "named"}
    read = [reading, files.have_pages, str(request.images.resolve()), *request.class_names]
    read += request.class_colours
    return tuple(json.loads(json.dumps([[VERSION, *read], *entries])))  # as it is read back


def another_job(record: SetRecord, images: Path, files: Iterable[Path]) -> Path | None:
    """The folder whose results lie with a ``record``, if it is another job than ``images``.

    A folder that was moved or renamed, or one that some images came to, has an image in common.
    """
    before = Path(record.images)
    if not record.images or before == images.resolve():
        return None
    known: defaultdict[str, list[tuple[Path, int]]] = defaultdict(list)
    with suppress(ValueError, TypeError, IndexError):
        for path, size, *_ in record.signature[1:]:
            known[name_key(Path(path).name)].append((Path(path), int(size)))
    for file in files:
        for path, size in known[name_key(file.name)]:
            if file.stat().st_size == size and (not path.is_file() or cmp(path, file, False)):
                return None
    return before


def _of(kind: type[Any]) -> Callable[[Any], Any]:
    """Reads a value of one kind; TypeError for another."""

    def read(value: Any) -> Any:
        if type(value) is not kind:
            raise TypeError(f"{value!r} is no {kind.__name__}")
        return value

    return read


def _texts(values: Any) -> tuple[str, ...]:
    return tuple(map(_of(str), _of(list)(values)))


def _pictures(values: Any) -> tuple[Laid, ...]:
    kinds = str, str, bool, str
    rows = ([_of(k)(v) for k, v in zip(kinds, row, strict=True)] for row in _of(list)(values))
    return tuple(Laid(*row) for row in rows)


def _crop(sides: Any) -> Crop:
    return read_crop(",".join(map(str, _of(list)(sides))))


def _palette(text: Any) -> str:
    parse_palette(_of(str)(text) or "0=0")  # DataError for another text
    return str(text)


_READ: Mapping[str, Callable[[Any], Any]] = {
    "signature": lambda value: tuple(_of(list)(value)),
    "images": _of(str),
    "pictures": _pictures,
    "num_classes": _of(int),
    "pixels": _of(int),
    "palette": _palette,
    "class_names": _texts,
    "mask_kind": _of(str),
    "crop": _crop,
    "gray_range": lambda value: value,
    "class_colours": _texts,
    "own_colours": _texts,
    "our_order": _of(bool),
    "notes": _texts,
    "warnings": _texts,
    "fingerprints": lambda value: {n: _texts(own) for n, own in _of(dict)(value).items()},
}
