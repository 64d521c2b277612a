"""The answers of a job: published class maps, corrections, and the rounds of labels.

``OUT/classes`` is the user's to correct, in place or as a TIFF beside it, and so are outlines in
``OUT/outlines``. What this program wrote there is known by its hash, so a map with another one was
corrected: it is copied to ``OUT/corrected`` and from then on a mask.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from annotation.files import is_annotation, read_annotation
from annotation.outlines import SUFFIX
from config import ConfigError
from imaging.drawing import write_png
from imaging.field import Crop
from imaging.imagefile import Pixels, read_header, read_image, read_mask
from imaging.listing import UNREAD_PICTURES, longest_start, some_names
from metallography.items import MEASUREMENTS, SUMMARY, digest_of
from metallography.particles import unit_of
from metallography.scales import NOT_GIVEN, Given
from metallography.segmenter import MODEL
from metallography.summary import Table
from report.workbook import WORKBOOK
from segmentation.set.files import Fingerprint
from utils.checkpoint import load, save
from utils.commandline import UserError
from utils.files import (
    IMAGE_SUFFIXES,
    DataError,
    copy_file,
    inside,
    is_of_system,
    replace_file,
    replacing,
)
from utils.metrics import IGNORED
from utils.tables import percent

CORRECTED = "corrected"  # folder of the corrections that are learnt from
RECORD, ROUNDS = "answer.json", "rounds.json"
NO_CROP = Crop()
NO_FINGERPRINTS: Mapping[str, Fingerprint] = MappingProxyType({})
SUFFIXES = (".png", ".tif", ".tiff")  # in which programs save a corrected class map
KINDS = ("classes", "gray", "overlay", "doubt")
OUTLINES = "outlines"  # folder of the files that other programs read
TABLES = (MEASUREMENTS, "batches.csv", "sizes.csv", "particles.csv", SUMMARY, "summary.md",
          "sheet.png", "doubt.csv", WORKBOOK)  # fmt: skip


class Answers:
    """The published answer of a job in its folder."""

    def __init__(self, out: Path) -> None:
        self.out, self.path, self.classes = out, out / RECORD, out / KINDS[0]
        self.outlines = out / OUTLINES
        # Class maps that were corrected and are not kept yet, by the name of their image.
        self._new: dict[str, Path] = {}
        self.record: dict[str, Any] = {"by": "", "files": {}, "beside": {}, "outlines": {}}
        self.record |= {"crop": list(NO_CROP), "fingerprints": {}, "drawn_on": {}}
        with suppress(OSError, ValueError):
            found = json.loads(self.path.read_text(encoding="utf-8"))
            if _is_sound(found):
                self.record |= found
        self.kept: list[str] = []  # the images of corrections that were kept since it was opened
        self.told: list[str] = []  # on outlines that were corrected, and on files that were not

    @property
    def by(self) -> str:
        """Whose answer is published; '' if there is none."""
        return str(self.record["by"])

    @property
    def crop(self) -> Crop:
        """What was cut off the images that the published class maps are of."""
        return Crop(*self.record["crop"])

    def uncut(self, ids: Pixels) -> Pixels:
        """A class map of such an image in the size before the crop, 255 where it was cut."""
        return np.asarray(self.crop.back(ids, self.crop.uncut(ids.shape), IGNORED), np.uint8)

    @property
    def scales(self) -> Given:
        """The pixel sizes that the user gave, now or to an earlier run; what is damaged is none."""
        with suppress(TypeError, ValueError, AttributeError, ConfigError):
            found = self.record.get("scales", {})
            um, rows = found.get("um_per_px"), dict(found.get("rows", {}))
            for each in (um, *rows.values()):
                unit_of(None if each is None else float(each))
            return Given(None if um is None else float(um), {n: float(v) for n, v in rows.items()})
        return NOT_GIVEN

    def keep_scales(self, given: Given) -> None:
        """Remember pixel sizes, so that a run without the flag does not measure in pixels."""
        self.record["scales"] = given._asdict()
        self._save()

    def of_image(self, name: str) -> list[Path]:
        """The corrected class maps of an image: the one that is kept, then the one offered."""
        new = [self._new[name]] if name in self._new else []
        return [path for path in (self.place(name), *new) if path.is_file()]

    def offered(self, classes: int = 0) -> dict[str, Path]:
        """All class maps that the user corrected, by the name of their image.

        New ones are not kept yet but where the user saved them, so that what is wrong with them can
        be made good there, and then ``keep`` keeps them. What was drawn in ``OUT/outlines`` is kept
        at once, as class maps, and so is the older one of two class maps of an image. DataError for
        a file that cannot be read, and for one of these that does not fit its image, or is of none
        of so many ``classes`` (0: as many as the published answer has).
        """
        self._new.clear()
        for path in self._by_time():
            self._offer(path, classes)
        return self.corrected() | self._new

    def _by_time(self) -> list[Path]:
        """The files that may be corrections, the oldest first: the newest wins."""
        both = [*self.classes.rglob("*"), *self.outlines.rglob("*")] if self.record["files"] else []
        there = [path for path in both if path.is_file()]
        return sorted(there, key=lambda path: (path.stat().st_mtime_ns, path))

    def _offer(self, path: Path, classes: int) -> None:
        if path.is_relative_to(self.outlines):
            self._take_outlines(path, classes)
        elif self._is_new(path):
            name = path.relative_to(self.classes).with_suffix("").as_posix()
            self._keep_checked(name, classes)  # an older one
            self._new[name] = path

    def keep(self) -> dict[str, Path]:
        """Keep what was offered, and checked; all class maps that are kept, by image."""
        for name in [*self._new]:
            self._keep_new(name)
        return self.corrected()

    def corrections(self, classes: int = 0) -> dict[str, Path]:
        """All class maps that the user corrected, by the name of their image; new ones are kept.

        DataError for a file that cannot be read, that does not fit its image, or with ids of none
        of so many ``classes`` (0: as many as the published answer has).
        """
        self.offered(classes)
        for name, path in self._new.items():
            self._check_new(name, path, classes)
        return self.keep()

    def _take_meanwhile(self, classes: int) -> set[str]:
        """Keep what was corrected while a run went on; the files below OUT that are at fault.

        There is a line on each of these, and nothing of it is kept.
        """
        left = set[str]()
        self._new.clear()
        for path in self._by_time():
            try:
                self._offer(path, classes)
                for name in [*self._new]:
                    self._keep_checked(name, classes)
            except DataError as error:
                self._new.clear()
                left.add(path.relative_to(self.out).as_posix())
                self.told.append(f"{error}. {path} stays as it is, and nothing of it was kept")
        return left

    def check(
        self, path: Path, ids: Pixels, whole: tuple[int, ...], shown: tuple[int, ...], classes: int
    ) -> None:
        """DataError for a corrected class map of another image, or with ids of none of the classes.

        ``whole`` is the size of its image before the crop, ``shown`` after it.
        """
        if whole not in (ids.shape, self.crop.uncut(ids.shape)):
            size, wanted = (f"{s[1]}x{s[0]}" for s in (ids.shape, shown))
            kept = path.is_relative_to(self.out / CORRECTED)
            cure = "delete it" if kept else "save it in the same size, or remove it"
            raise DataError(f"{path}: {size}, its image is {wanted}; {cure}")
        wrong = ids[(ids >= classes) & (ids != IGNORED)]
        if wrong.size:
            raise DataError(
                f"{path}: value {wrong.max()} in a class map of {classes} classes; class ids are "
                f"0..{classes - 1}, and {IGNORED} where you do not know: correct it or remove it"
            )

    def check_picture(self, name: str, path: Path, image: Path, fingerprint: Fingerprint) -> None:
        """DataError for a corrected class map of ``of_image`` drawn on another picture.

        ``fingerprint`` is that of ``image`` as it is now. What an earlier version kept or
        published, and a map that somebody else put in ``OUT/corrected``, tells nothing of its
        picture.
        """
        drawn_on = self.record["fingerprints"].get(name)
        if path == self.place(name):
            ids, *drawn_on = self.record["drawn_on"].get(name) or [""]
            drawn_on = drawn_on if ids == digest(path) else None
        if drawn_on and not {*drawn_on} & {*fingerprint}:
            found = f"{path}: drawn on another picture than {image} is now"
            cure = (
                "delete it, or, if it is right for this one, too, move it to a folder of your own"
            )
            raise DataError(f"{found}; {cure} and give --masks that folder as well")

    def place(self, name: str) -> Path:
        """Where the corrected class map of an image is kept."""
        return self.out / CORRECTED / f"{name}.png"

    def not_taken(self) -> list[str]:
        """A line for each picture in ``OUT/classes`` that is no correction, by its name or kind.

        One for each TIFF that was taken in before, if no map of its image is kept. And one for each
        file of ``OUT/outlines`` of which some outlines cover no pixel.
        """
        known, lines = self.record["files"], [*self.told]
        for path in sorted(self.classes.rglob("*")) if known else []:
            kind, below = path.suffix.lower(), path.relative_to(self.classes)
            name = below.with_suffix("").as_posix()
            picture = kind in (*IMAGE_SUFFIXES, *UNREAD_PICTURES) and not is_of_system(path.name)
            if not picture or not path.is_file():
                continue
            if name in known and kind in SUFFIXES:
                if self._taken_before(path) and not self.place(name).exists():
                    found = f"{path}: taken in before, and no {self.place(name)} is there any more"
                    cure = f"save it as {self.classes / name}.png"
                    lines.append(f"{found}: not learnt from; to learn from it again, {cure}")
                continue
            found, own = "no image has its name", longest_start(name, known)
            if name in known:
                found, own = f"{path.suffix} is none of {', '.join(SUFFIXES)}", name
            target = self.classes / f"{own or next(iter(known))}.png"
            cure = f"save it as {target}" if own else f"name it as its image, such as {target}"
            lines.append(f"{path}: not taken as a correction, {found}; {cure}")
        return lines

    def corrected(self) -> dict[str, Path]:
        """The class maps in ``OUT/corrected``, by the name of their image."""
        folder = self.out / CORRECTED
        every = sorted(folder.rglob("*.png"))
        return {p.relative_to(folder).as_posix().removesuffix(".png"): p for p in every}

    def _is_new(self, path: Path) -> bool:
        """Whether a file is a class map that was corrected, or saved as a TIFF beside it."""
        below = path.relative_to(self.classes)
        known = self.record["files"].get(below.with_suffix("").as_posix())
        if path.suffix.lower() not in SUFFIXES or known is None or digest(path) in known:
            return False
        return not self._taken_before(path)

    def _taken_before(self, path: Path) -> bool:
        """Whether a file beside a class map was taken in as it is now."""
        before = self.record["beside"].get(path.relative_to(self.classes).as_posix())
        return before is not None and bool(before == digest(path))

    def _shape(self, name: str) -> tuple[int, int] | None:
        """The size of an image of the published answer, by a picture that nobody corrects."""
        header = read_header(self.out / KINDS[1] / f"{name}.png")
        return None if header is None else header[:2]

    def _check_new(self, name: str, path: Path, classes: int) -> None:
        """DataError for a class map that does not fit the published answer, or what is kept."""
        ids, place = read_mask(path), self.place(name)
        shape = self._shape(name) or ids.shape
        classes = classes or len(self.record.get("class_names") or []) or IGNORED
        for file, found in ((path, ids), (place, read_mask(place) if place.is_file() else None)):
            if found is not None:
                self.check(file, found, self.crop.uncut(shape), shape, classes)

    def _keep_checked(self, name: str, classes: int) -> None:
        """Keep a class map that was offered, if there is one of this image; DataError."""
        if name in self._new:
            self._check_new(name, self._new[name], classes)
        self._keep_new(name)

    def _keep_new(self, name: str) -> None:
        """Keep a class map that was offered, and checked, if there is one of this image."""
        path = self._new.pop(name, None)
        if path is None:
            return
        own = digest(path)
        if path.suffix.lower() == ".png":
            self._write(name, read_mask(path))
            self.record["files"][name].append(own)
            self._save()
        else:
            self._keep(name, read_mask(path), path.relative_to(self.classes).as_posix(), own)

    def _write(self, name: str, ids: Pixels) -> None:
        """Write a corrected class map; where it is 255, what earlier ones labelled stays.

        It gets the size of the image before the crop, 255 there, so that another crop may follow.
        DataError where a map of another size is kept, which is of another image.
        """
        place, shape = self.place(name), self._shape(name)
        if shape is None or ids.shape != self.crop.uncut(shape):  # not of the whole image
            ids = self.uncut(ids)
        if place.is_file():
            before = read_mask(place)
            self.check(place, before, ids.shape, ids.shape, IGNORED)
            ids = merged(before, ids)
        # First: killed in between, what is kept is of a picture that is not known.
        self.record["drawn_on"][name] = [digest_of(ids), *self.record["fingerprints"].get(name, [])]
        self._save()
        with replacing(place, "--out") as temporary:
            write_png(temporary, ids)
        self.kept.append(name)

    def _take_outlines(self, path: Path, number: int) -> None:
        """Keep the class map of outlines that were corrected in another program."""
        below = path.relative_to(self.outlines)
        name, beside = below.with_suffix("").as_posix(), f"{OUTLINES}/{below.as_posix()}"
        classes = self.classes / f"{name}.png"
        if name not in self.record["files"] or not is_annotation(path) or not classes.is_file():
            return
        found = _digest_of_bytes(path)
        if found in (*self._own_outlines(below.as_posix()), self.record["beside"].get(beside)):
            return
        self._keep_checked(name, number)  # a class map that is older
        names, crop = self.record.get("class_names") or [], self.crop
        whole = crop.uncut(self._shape(name) or read_mask(classes).shape)
        ids = read_annotation(path, whole, names, told=self.told)
        self._keep(name, crop.of(ids), beside, found)

    def _own_outlines(self, below: str) -> list[str]:
        """Hashes of the file of outlines that this program wrote."""
        return list(self.record["outlines"].get(below, []))

    def _keep(self, name: str, ids: Pixels, beside: str, found: str) -> None:
        """Keep class ids from a file beside the class map, unless nothing was changed."""
        if digest_of(ids) not in self.record["files"][name]:
            self._write(name, ids)
            self.record["files"][name].append(digest_of(ids))
        self.record["beside"][beside] = found
        self._save()

    def publish(
        self,
        work: Path,
        names: Iterable[str],
        by: str,
        classes: Sequence[str] = (),
        crop: Crop = NO_CROP,
        fingerprints: Mapping[str, Fingerprint] = NO_FINGERPRINTS,
    ) -> None:
        """Publish a predicted folder; a kill leaves files of both answers, all of them known.

        ``classes`` are the names of the classes in its outlines, if it has some, which are those of
        the images before ``crop``; ``fingerprints`` are those of the images. Corrections that are
        at fault stay where they are, with a line.
        """
        names = list(names)
        left = self._take_meanwhile(len(classes))  # the others are kept for the next time
        new = {name: digest(work / KINDS[0] / f"{name}.png") for name in names}
        old = self.record["files"]
        if gone := sorted(old.keys() - set(names)):
            what = f"{len(gone)} image(s) of the last answer are not in the folder any more"
            self.told.append(f"{what}, and their results were removed: {some_names(gone)}")
        self.record["files"] = {
            n: list(dict.fromkeys([*old.get(n, []), d])) for n, d in new.items()
        }
        seen = {n: list(fingerprints[n]) for n in names if n in fingerprints}
        before = self.record["fingerprints"]
        self.record["fingerprints"] = {n: own for n, own in seen.items() if before.get(n) == own}
        self._save()
        for kind in KINDS:
            for below in (f"{kind}/{name}.png" for name in names):
                if below not in left:
                    copy_file(work / below, self.out / below)
            for name in old.keys() - set(names):  # its image was taken away
                path = inside(self.out, f"{kind}/{name}.png")
                if path is not None:
                    path.unlink(missing_ok=True)
        self._publish_outlines(work, names, left)
        for table in TABLES:
            if (work / table).exists():
                copy_file(work / table, self.out / table)
        self.record |= {"by": by, "files": {name: [value] for name, value in new.items()}}
        self.record |= {"class_names": list(classes), "crop": list(crop)}
        self.record["fingerprints"] = seen
        self._save()

    def publish_summary(self, work: Path) -> None:
        """Publish the summary of a predicted folder alone, unless another program holds it open."""
        for name in (SUMMARY, "summary.md"):
            with suppress(UserError):
                copy_file(work / name, self.out / name)

    def forget(self) -> None:
        """Make nothing of the published class maps: their class ids have come to mean others."""
        self.record |= {"by": "", "files": {}}
        self._save()

    def _publish_outlines(self, work: Path, names: Sequence[str], left: set[str]) -> None:
        """Replace this program's own outlines by those of a predicted folder, or by none."""
        every = [f"{name}{suffix}" for name in names for suffix in SUFFIX.values()]
        new = [below for below in every if (work / OUTLINES / below).is_file()]
        old = self.record["outlines"]
        for below in old.keys() - set(new):
            path = inside(self.out, f"{OUTLINES}/{below}")
            if path and path.is_file() and _digest_of_bytes(path) in self._own_outlines(below):
                path.unlink()  # of an answer before; what a user saved there stays
        own = {below: _digest_of_bytes(work / OUTLINES / below) for below in new}
        self.record["outlines"] = {b: [*self._own_outlines(b), d] for b, d in own.items()}
        self._save()
        for below in new:
            if f"{OUTLINES}/{below}" not in left:
                copy_file(work / OUTLINES / below, self.outlines / below)
        self.record["outlines"] = {below: [value] for below, value in own.items()}

    def publish_model(
        self,
        network: Path | None,
        names: Sequence[str] = (),
        facts: Mapping[str, Any] = MappingProxyType({}),
    ) -> None:
        """Put the network that answers at ``OUT/model.pt``, for new images; None: there is none.

        Its classes get these names, which may have been given after it was trained. ``facts`` are
        what is known of its images, so that new ones are read alike: crop, gray range, scale.
        """
        model = self.out / MODEL
        if network is None:
            model.unlink(missing_ok=True)
        else:
            copy_file(network, model)
            contents = load(model) if names or facts else {}
            settings = contents.get("settings")
            named = {"class_names": list(names)} if names else {}
            if settings:
                save(model, {**contents, "settings": {**settings, **named, **facts}})

    def _save(self) -> None:
        replace_file(self.path, json.dumps(self.record, indent=1) + "\n", "--out")


def _is_sound(found: object) -> bool:
    """Whether a record has the shape of those that ``Answers`` writes, as far as it has entries."""
    if not isinstance(found, dict) or "files" not in found:
        return False
    kinds = "files", "outlines", "fingerprints", "drawn_on", "beside"
    tables = [found.get(kind, {}) for kind in kinds]
    if not all(isinstance(each, dict) for each in tables):
        return False
    hashes = [each for table in tables[:-1] for each in table.values()]
    crop = found.get("crop", list(NO_CROP))
    whole = isinstance(crop, list) and len(crop) == len(NO_CROP)
    sides = whole and all(isinstance(side, int) and side >= 0 for side in crop)
    return sides and all(isinstance(each, list) for each in hashes)


def merged(below: Pixels, labels: Pixels) -> Pixels:
    """The labels (H, W) where there are any, else those below: earlier ones, or a prediction."""
    return np.where(labels == IGNORED, below, labels).astype(np.uint8)


def digest(path: Path) -> str:
    """``digest_of`` a class map in a file; DataError."""
    return digest_of(read_mask(path))


def _digest_of_bytes(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


@dataclass
class Round:
    """One set of labels, and what came of it."""

    number: int
    key: str  # hash of the labels, and of what else decides the result
    classes: int
    labels: dict[str, str]  # hash of the labels of each annotated image
    scores: dict[str, list[Any]] = field(default_factory=dict)  # name: held-out confusion matrices
    curve: dict[str, list[Any]] = field(default_factory=dict)  # blocks learnt from: the same
    kept: str = ""  # the name of the scores that won
    start: str = ""  # the pretrained file; '' for random weights
    answer: str = ""  # folder of the predictions
    network: str = ""  # file of the network that answers; '' if the pixel classifier does
    by: str = ""  # who answers, in words
    method: int = 0  # number of the round whose training answers
    fractions: dict[str, list[float]] = field(default_factory=dict)  # area fractions by image
    shares: list[float] = field(default_factory=list)  # of strokes: expected area of each class
    views: int = 0  # of which a network's answer is the average; 0: as an earlier version chose
    plan: dict[str, int] = field(default_factory=dict)  # steps that differ from the schedule's
    sure: float = 0.0  # of strokes: share of the pixels that a network learns beside them
    corrected: dict[str, list[int]] = field(default_factory=dict)  # pixels changed, and labelled


class Rounds:
    """All rounds of a job, in a file that survives a kill."""

    def __init__(self, out: Path) -> None:
        self.path = out / ROUNDS
        self.all: list[Round] = []
        with suppress(OSError, ValueError, TypeError):
            found = [Round(**each) for each in json.loads(self.path.read_text(encoding="utf-8"))]
            places = [place for r in found for place in (r.start, r.answer, r.network) if place]
            if all(inside(out, place) for place in places):  # else the file is not of this program
                self.all = found

    def open(self, labels: dict[str, str], classes: int, decides: Mapping[str, Any]) -> Round:
        """The round of these labels: the last one if nothing has changed, else a new one.

        ``labels`` has a ``pair_digest`` of each annotated image, by name.
        """
        key = _key(labels, classes, decides)
        if not self.all or self.all[-1].key != key:
            self.all.append(Round(len(self.all) + 1, key, classes, labels))
            self.save()
        return self.all[-1]

    def before(self, this: Round) -> Round | None:
        """The last finished round before this one, if it knew the same classes."""
        finished = [r for r in self.all[: this.number - 1] if r.answer]
        return finished[-1] if finished and finished[-1].classes == this.classes else None

    def save(self) -> None:
        """Store all rounds."""
        text = json.dumps([asdict(each) for each in self.all], indent=1)
        replace_file(self.path, text + "\n", "--out")


def _key(labels: Mapping[str, str], classes: int, decides: Mapping[str, Any]) -> str:
    text = json.dumps([dict(labels), classes, dict(decides)], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def pair_digest(image: Path, labels: Path) -> str:
    """A short hash of an image and its labels."""
    pixels, ids = read_image(image), read_mask(labels)
    found = hashlib.sha256(f"{ids.shape}".encode() + ids.tobytes() + pixels.tobytes())
    return found.hexdigest()[:16]


NEW_LABELS = ("image", "pixels that differ from the last answer", "labelled pixels")


def changes(this: Round, before: Round | None) -> list[list[str]]:
    """Images whose area fractions changed, the most first: a line of cells each."""
    if before is None:
        return []
    rows = []
    for image, now in this.fractions.items():
        was = before.fractions.get(image)
        if was and len(was) == len(now):
            moved = [abs(a - b) for a, b in zip(was, now, strict=True)]
            rows.append((max(moved), image, was, now))
    rows.sort(key=lambda row: (-row[0], row[1]))
    return [
        [image, *(f"{percent(a)} → {percent(b)}" for a, b in zip(was, now, strict=True))]
        for most, image, was, now in rows
        if most >= 0.0005
    ]


def change_tables(
    this: Round, before: Round | None, names: Sequence[str], own: Mapping[str, str]
) -> list[Table]:
    """What new labels and area fractions changed since the answer before."""
    corrected = [[own[name], str(n), str(all_)] for name, (n, all_) in this.corrected.items()]
    moved = [[own[name], *cells] for name, *cells in changes(this, before)]
    title = "What changed: area fraction before → after, %"
    new = {"title": "Labels that are new", "head": [*NEW_LABELS], "rows": corrected}
    other = {"title": title, "head": ["image", *names],
             "rows": moved or [["none", *("-" for _ in names)]]}  # fmt: skip
    return [*([new] if corrected else []), *([other] if before is not None else [])]
