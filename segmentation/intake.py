"""The user's images and masks, read and laid out as a set. Nothing of the user's is changed."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import reduce
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy as np

from annotation.files import another_kind, is_annotation, read_drawn
from annotation.names import class_id, class_names, is_numbered
from config import Config, ConfigError
from dataset.mask_values import (
    By,
    Palette,
    Reading,
    SetSettings,
    channels,
    colours_of,
    holds_ids,
    named_line,
    names_option,
    palette_text,
    parse_palette,
    refuse_unused,
    without_ignored,
)
from dataset.prepare import mask_warnings, strokes_tip
from dataset.set_masks import names_drawn
from dataset.set_plan import EACH, Plan, Source
from dataset.source_files import as_folder, check_palettes
from imaging.drawing import class_colours, write_png
from imaging.field import Crop
from imaging.gray_range import GrayRange
from imaging.imagefile import Pixels, read_mask
from imaging.listing import some_names
from metallography.items import digest_of, equal_lines, result_names
from segmentation.answers import NO_FINGERPRINTS, Answers, merged
from segmentation.request import Request
from segmentation.set.files import Fingerprint, UserFiles, fingerprint_of
from segmentation.set.record import (
    RECORD,
    SET,
    Laid,
    SetRecord,
    another_job,
    read_record,
    signature_of,
)
from utils.files import (
    MOST_BYTES,
    DataError,
    cut_name,
    inside,
    keep_times,
    replace_file,
    replacing_folder,
)
from utils.log import only_progress, progress, to_terminal
from utils.metrics import IGNORED

LONGEST_STEM = MOST_BYTES - len("-99999.png")  # bytes
FORGOTTEN = ("auto",)  # --class_colours: as if none had been given
NO_BATCH = re.compile("()")  # names of images may be any: none tells a batch


class Picture(NamedTuple):
    """An image of the user, as it is laid out."""

    name: str  # of its results: the path below --images without suffix
    file: Path
    labels: Path | None  # class ids, 255 where nobody labelled; None: not annotated
    source: Path = Path()  # the user's own file
    batch: str | None = None  # its production batch, as --batch_from tells; None: as its name does


class Intake(NamedTuple):
    """What is there to work with."""

    folder: Path  # of the set
    pictures: tuple[Picture, ...]
    num_classes: int
    pixels: int  # of all images
    notes: tuple[str, ...]  # how the files were read, and what was left out
    class_names: tuple[str, ...] = ()  # as given, or as files of outlines tell
    crop: Crop = Crop()  # what was cut off the user's images
    gray_range: Any = None  # how more than 8 bits became 8, as a checkpoint has it; None: no need
    warnings: tuple[str, ...] = ()  # what masks may mean otherwise, and what is odd in the files
    class_colours: tuple[str, ...] = ()  # as given, else as in coloured masks; () by default
    holds_ids: bool = False  # every value of the masks is the id of its class
    fingerprints: Mapping[str, Fingerprint] = NO_FINGERPRINTS  # of the pictures, by their names

    @property
    def annotated(self) -> tuple[Picture, ...]:
        """The pictures with labels."""
        return tuple(p for p in self.pictures if p.labels)


def read(request: Request, check: Callable[[Intake], object] = lambda intake: None) -> Intake:
    """Read all files and lay them out in ``OUT/set``, unless that was done; DataError.

    What ``check`` refuses of a new set, by a UserError, leaves the one before, and everything that
    later runs go by, as it was.
    """
    folder, files = request.out / SET, UserFiles(request.images, request.out)
    before, whole = read_record(folder / RECORD)
    if other := another_job(before, request.images, files.images):
        raise DataError(f"{request.out}: holds the results of {other}; give another --out")
    answers = Answers(request.out)
    corrected = answers.offered()
    own = answers.classes.resolve(), answers.outlines.resolve()
    masks = [m for m in request.masks if m.resolve() not in own]
    if not masks and not corrected:
        given = f"{request.masks[0]}: nothing in it was changed"
        raise DataError(f"{given}; correct one, or give --masks a mask of your own")
    request = _cut_as_before(request, before)
    files.note(masks, corrected)  # before they are read, or a change meanwhile would go unnoticed
    wanted = signature_of(request, files, files.entries())
    # Names that lead elsewhere are not of this program.
    names = (name for p in before.pictures for name in (p.name, p.stem, p.below))
    if whole and before.signature == wanted and all(inside(folder, name) for name in names):
        return _intake(request, before, answers.not_taken())
    if folder.exists() and not (folder / RECORD).is_file():
        raise DataError(f"{folder}: not made by segment.py; move it, or give another --out")
    request.out.mkdir(parents=True, exist_ok=True)
    # There, as the next run removes what a kill leaves.
    with TemporaryDirectory(prefix=f".{SET}-masks-", dir=request.out) as place:
        folders = [
            (as_folder(mask, request.images, request.out, Path(place)), mask) for mask in masks
        ]
        try:
            record = _read_all(request, folders, answers, before, files, check)
        except DataError as error:
            raise DataError(*_as_given([str(error)], folders)) from None
    return _intake(request, record, answers.not_taken())


def _cut_as_before(request: Request, before: SetRecord) -> Request:
    """The request, with the crop of the run before unless it has one, which is said at once."""
    crop, own = before.crop, request.reading
    if not any(crop) or any(own.crop) or "crop" in own.named:
        return request
    to_terminal(f"--crop {crop}, as an earlier run was told; --crop 0,0,0,0 cuts nothing")
    return replace(request, reading=replace(own, crop=crop))


def _read_all(
    request: Request,
    folders: Sequence[tuple[Path, Path]],
    answers: Answers,
    before: SetRecord,
    files: UserFiles,
    check: Callable[[Intake], object],
) -> SetRecord:
    """Lay all files out in ``OUT/set``, with the record of it; DataError."""
    if not folders:  # corrected class maps alone
        raise DataError(f"{request.out}: give --masks the mask that you began with, too")
    check_palettes([folder for folder, _ in folders])
    names = _names(request, files.masks, before.class_names)
    kind = _kind(request.reading)
    same = kind in ("", before.mask_kind)  # else what the user says now counts
    plans, known = _plans(request, files, folders, before.palette if same else "", names)
    classes = _count_classes(plans, request, names)
    changed = _changed(plans, before, names)
    look, warned = _look(  # before anything is written: colours may be wrong
        plans, parse_palette(known), names, before, bool(request.reading.palette)
    )
    with replacing_folder(request.out / SET) as root:
        record = _write(root, plans, answers, request, files, classes)
        keep_times(root, request.out / SET)  # so that no answer to them is made anew
        record = replace(record, **look, palette=known, class_names=tuple(names), mask_kind=kind)
        check(_intake(request, record, ()))
        if changed is not None and changed.renumbered:
            _renumber(answers, changed, files.corrected)
        notes = [*record.notes, *([changed.line] if changed else [])]
        kept = answers.keep()  # they are class maps of this set
        record = replace(
            record,
            signature=signature_of(request, files, files.entries_with(kept)),
            images=str(request.images.resolve()),
            notes=_as_given(notes, folders),
            warnings=(*_as_given(record.warnings, folders), *warned),
        )
        replace_file(root / RECORD, record.to_json())
    return record


def _look(
    plans: Sequence[Plan],
    palette: Palette,
    names: Sequence[str],
    before: SetRecord,
    given_palette: bool,
) -> tuple[dict[str, Any], list[str]]:
    """What is remembered of how classes look, and lines on names of values.

    ``palette`` is the meaning of all masks, ``before`` what was remembered. Names that were given
    in one order, for values that this program took in another, may be on the wrong phases, and no
    picture would tell. DataError if colours are wrong.
    """
    classes = max(plan.num_classes for plan in plans)
    given, kept = plans[0].settings.class_colours, before.own_colours
    remembered = kept if len(kept) == classes else ()
    own = () if given == FORGOTTEN else given or remembered
    try:
        Config(num_classes=max(classes, 2), class_colours=own)
    except ConfigError as error:
        raise DataError(f"--{error}") from None
    drawn = colours_of(palette, classes)
    if drawn and not any(dict(palette)[0]):  # black would hide what is below it
        drawn = (bytes(class_colours(1)[0].tolist()).hex(), *drawn[1:])
    ours = any(plan.rule.by is By.LEVELS for plan in plans) or before.our_order
    ours &= not given_palette
    ours &= not holds_ids(palette)
    tiles = [t for p in plans for s in ("train_numf", "train_unlabelled") for t in p.splits[s]]
    counts = sum((t.counts[:classes] for t in tiles if t.counts is not None), np.zeros(classes))
    lines = [named_line(palette, names, counts.tolist())] if ours and len(names) == classes else []
    if len(kept) not in (0, classes) and not given:
        lost = (
            f"--class_colours of an earlier run are {len(kept)}, the masks have {classes} classes"
        )
        lines.append(f"{lost}: they are not used any more; give {classes} colours")
    return {"class_colours": own or drawn, "own_colours": own, "our_order": ours}, lines


def _as_given(lines: Iterable[str], folders: Sequence[tuple[Path, Path]]) -> tuple[str, ...]:
    """Lines with the user's files in the place of the copies that are read for them."""
    copies = [pair for pair in folders if pair[0] != pair[1]]
    files = ((file, given) for folder, given in copies for file in folder.rglob("*"))
    names = [(str(file), str(given)) for file, given in files if file.is_file()]
    names += sorted(((str(folder), str(given)) for folder, given in copies), reverse=True)
    told = [*lines]
    for copied, given in names:
        told = [line.replace(copied, given) for line in told]
    return tuple(told)


def _intake(request: Request, record: SetRecord, more: Iterable[str]) -> Intake:
    """The intake of a set that is laid out, with further warnings."""
    folder, pictures = request.out / SET, []
    for name, stem, annotated, below in record.pictures:
        labels = folder / "sup_numf" / "gt" / f"{stem}.png" if annotated else None
        image = folder / "train_numf" / "img" / f"{stem}.png"
        pictures.append(Picture(name, image, labels, request.images / below))
    palette = parse_palette(record.palette) if record.palette else ()
    return Intake(
        folder,
        tuple(pictures),
        record.num_classes,
        record.pixels,
        record.notes,
        record.class_names,
        record.crop,
        record.gray_range,
        (*record.warnings, *more),
        record.class_colours,
        bool(palette) and record.mask_kind != "particles" and holds_ids(palette),
        record.fingerprints,
    )


def _kind(reading: Reading) -> str:
    """The kind of masks that the user gave, which may be the default one; '' if none."""
    given = reading.mask_kind != "auto" or "mask_kind" in reading.named
    return reading.mask_kind if given else ""


def _plans(
    request: Request,
    files: UserFiles,
    folders: Sequence[tuple[Path, Path]],
    known: str,
    names: Sequence[str],
) -> tuple[list[Plan], str]:
    """A plan for each folder of masks, and the meaning of their values, which is one for all.

    ``folders`` are read for what the user gave, ``known`` is what values meant before.
    """
    plans: list[Plan] = []
    given_palette = bool(request.reading.palette)
    known = "" if given_palette else without_ignored(known, request.reading)
    for folder, given in folders:
        settings = _settings(request, files, folder, names)
        tries: list[dict[str, Any]] = [{}]
        agree = known and not given_palette  # what the user says of values counts
        if agree:
            tries.insert(0, {"palette": parse_palette(known)})
            if plans:
                tries.append({"mask_kind": "ids", "num_classes": plans[0].num_classes})
        problem: DataError | None = None
        for more in tries:
            try:
                plan = _plan(replace(settings, **more), request)
                plans.append(_agreeing(plan, known, settings, given, request) if agree else plan)
                break
            except DataError as error:
                problem = problem or error
        else:
            assert problem is not None
            raise problem
        if _has_values(plans[-1]):
            known = palette_text(plans[-1].rule.palette)  # with what it adds to the one before
        known = known or palette_text(plans[0].rule.palette)
    refuse_unused(request.reading, [plan.rule for plan in plans], folders[0][1])
    return plans, known


def _settings(request: Request, files: UserFiles, masks: Path, names: Sequence[str]) -> SetSettings:
    """How a folder of masks is read, as ``dataset/prepare.py`` reads it, with every page."""
    return SetSettings(
        **vars(request.reading),
        images=request.images,
        masks=masks,
        out=request.out,
        class_names=tuple(names),
        class_colours=request.class_colours,
        page=EACH if files.have_pages else 0,
        batch_from=NO_BATCH,
        test=0.0,
    )


def _plan(settings: SetSettings, request: Request) -> Plan:
    """The plan of a folder of masks. Masks that were given one by one are no images."""
    masks = [mask.resolve() for mask in request.masks if mask.is_file()]
    return Plan(settings, of_a_job=True, no_images=masks)


def _has_values(plan: Plan) -> bool:
    """Whether values of its masks stand for classes: no class ids, and no names."""
    return plan.rule.by not in (By.IDS, By.NAMES)


class _Changed(NamedTuple):
    """What masks mean otherwise than in earlier runs."""

    line: str
    renumbered: bool  # a value is of another class now, so that class ids mean other things
    known: str  # the option that earlier runs read by


def _changed(plans: Sequence[Plan], before: SetRecord, names: Sequence[str]) -> _Changed | None:
    """What is read otherwise than in earlier runs of this OUT: by values, or ``names`` alone."""
    known, ids = before.palette, {n.casefold(): i for i, n in enumerate(before.class_names)}
    told: list[_Changed] = []
    tiles = (tile for plan in plans for split in plan.splits.values() for tile in split)
    named = any(tile.source.drawn for tile in tiles)  # maybe beside masks with values
    if named and any(ids.get(n.casefold(), i) != i for i, n in enumerate(names)):
        had = names_option(before.class_names)
        line = f"outlines are read by {names_option(names)} now; earlier runs had {had}"
        told.append(_Changed(line, renumbered=True, known=had))
    old = {channels(value): label for label, value in parse_palette(known)} if known else {}
    for plan in plans:
        if not _has_values(plan):
            continue
        new = {channels(value): label for label, value in plan.rule.palette}
        other = [v for v, label in new.items() if old.get(v, label) != label]
        if other:
            moved = any(IGNORED not in (old[value], new[value]) for value in other)
            line = f'masks are read by --palette "{palette_text(plan.rule.palette)}" now; '
            line += f'earlier runs read them by --palette "{known}"'
            told.append(_Changed(line, moved, f'--palette "{known}"'))
            break
    if not told:
        return None
    lines, moves, options = zip(*told, strict=True)
    return _Changed("; ".join(lines), any(moves), " ".join(options))


def _renumber(answers: Answers, changed: _Changed, corrected: Mapping[str, Path]) -> None:
    """Forget the answer, whose class ids mean other things now; DataError if it was corrected."""
    if corrected:
        shown = (
            f"{len(corrected)} corrected class map(s), such as {next(iter(corrected.values()))},"
        )
        found = f"{shown} have the class ids of earlier runs"
        cure = "keep these ids, give another --out, or delete these maps"
        raise DataError(f"{changed.known.split()[0]}: {found}, {changed.known}; {cure}")
    answers.forget()


def _agreeing(plan: Plan, known: str, settings: SetSettings, given: Path, request: Request) -> Plan:
    """The plan, read again if its classes are numbered otherwise than is known; DataError.

    New values become new classes, so that a class keeps its number.
    """
    if not _has_values(plan):
        return plan
    old = {value: label for label, value in parse_palette(known)}
    own = [(label, tuple(value)) for label, value in plan.rule.palette if label != IGNORED]
    unseen = [value for _, value in own if value not in old]
    if all(old.get(value, label) == label for label, value in own) and not unseen:
        return plan
    are_ids = all(value == (label,) for value, label in old.items())
    if unseen == [(IGNORED,)] and are_ids:
        # Class ids, and 255 in this mask alone: what nobody labelled, as everywhere.
        palette = parse_palette(f"{known} ignore={IGNORED}")
        return _plan(replace(settings, palette=palette), request)
    # Gray levels beside class ids, such as 127 and 254, are no further ids.
    strange = are_ids and any(v[0] >= len(old) + len(unseen) for v in unseen)
    if strange or len(own) == len(unseen) == 1 or {len(v) for v in unseen} - {len(v) for v in old}:
        shown = ", ".join(",".join(map(str, value)) for value in unseen[:3])
        found = f"{given}: values {shown}, which other masks do not have ({known})"
        raise DataError(f'{found}; say what they are: --palette "{known} ..."')
    first = 1 + max(label for label in old.values() if label != IGNORED)
    more = palette_text([*enumerate(unseen, start=first)])
    return _plan(replace(settings, palette=parse_palette(f"{known} {more}")), request)


def _names(request: Request, files: Iterable[Path], old: Sequence[str]) -> list[str]:
    """Names of the classes: as given, else of all files of outlines; those known keep their ids."""
    if request.class_names:
        return list(request.class_names)
    kind = request.reading.mask_kind
    drawn = [path for path in files if is_annotation(path) and not another_kind(path)]
    old = () if kind == "particles" else old
    found, _, _ = names_drawn([read_drawn(path) for path in drawn], kind, old)
    if not old:
        return class_names(found) if found else []
    new = {name for name in found if not _is_known(name, old)}
    if not new:
        return [*old]
    named = class_names(found if "" in new else new)  # from class 0, which has a name already
    return [*old, *named[len(old) if all(map(is_numbered, new)) else 1 :]]


def _is_known(name: str, names: Sequence[str]) -> bool:
    """Whether what is drawn under a name is one of the classes, or is to be ignored."""
    with suppress(DataError):
        return class_id(name, names) >= 0
    return False


def _write(
    root: Path,
    plans: Sequence[Plan],
    answers: Answers,
    request: Request,
    files: UserFiles,
    classes: int,
) -> SetRecord:
    """Write all images, and the labels of those that have some; their part of the record."""
    sources, masks = _by_image(plans, files)
    belows = sorted(sources)
    names = dict(zip(belows, result_names([Path(below) for below in belows]), strict=True))
    crop = plans[0].settings.crop
    pictures, taken, pixels, shapes = list[Laid](), set[str](), 0, set[tuple[int, ...]]()
    overruled: list[str] = []  # lines on masks that a correction overrules
    equal: defaultdict[str, list[str]] = defaultdict(list)  # images by their pixels
    annotated, fingerprints = list[str](), dict[str, Fingerprint]()
    with only_progress("Reading"), progress(len(sources), "Reading") as bar:
        for number, (below, source) in enumerate(sorted(sources.items())):
            stem = cut_name(names[below].replace("/", "__"), LONGEST_STEM)
            stem += f"-{number}" if stem.casefold() in taken else ""
            taken.add(stem.casefold())
            image = plans[0].image(source)
            equal[digest_of(image)].append(below)
            clear = plans[0].clear(source)
            known = fingerprints[names[below]] = fingerprint_of(source)
            labels = _labels(masks[below])
            overruled += _later_ones(masks[below], source.below)
            if found := answers.of_image(names[below]):
                for path in found:
                    answers.check_picture(names[below], path, source.image, known)
                own, given = _corrected(found, answers, image.shape[:2], classes, crop), labels
                labels = own if given is None else merged(given, own)
                overruled += _overruled(given, answers.place(names[below]), labels)
            write_png(root / "train_numf" / "img" / f"{stem}.png", image, clear)
            if labels is not None:
                write_png(root / "sup_numf" / "img" / f"{stem}.png", image, clear)
                write_png(root / "sup_numf" / "gt" / f"{stem}.png", labels)
                annotated.append(below)
            pictures.append(Laid(names[below], stem, labels is not None, source.below))
            shapes.add(image.shape[:2])
            pixels += image.shape[0] * image.shape[1]
            bar.update(1)
    if not annotated:
        raise DataError(
            f"{request.masks[0]}: no pixel has a class; label some, or correct --ignore"
        )
    request.refuse_mixed(shapes)
    gray = plans[0].gray
    notes, warned = _notes(plans, [p.below for p in pictures if not p.annotated])
    return SetRecord(
        pictures=tuple(pictures),
        num_classes=classes,
        pixels=pixels,
        crop=crop,
        gray_range=gray.saved() if isinstance(gray, GrayRange) else None,
        notes=(*notes, *overruled),
        warnings=(*warned, *equal_lines(equal.values(), annotated)),
        fingerprints=fingerprints,
    )


def _by_image(
    plans: Sequence[Plan], files: UserFiles
) -> tuple[dict[str, Source], Mapping[str, list[tuple[Plan, Source]]]]:
    """All images by their paths, and the masks of each, in the order in which they were given."""
    sources: dict[str, Source] = {}
    masks: defaultdict[str, list[tuple[Plan, Source]]] = defaultdict(list)
    for plan in plans:
        for split in ("train_numf", "train_unlabelled"):
            for tile in plan.splits[split]:
                below = files.below(tile.source)
                sources.setdefault(below, tile.source)
                if tile.annotated:
                    masks[below].append((plan, tile.source))
    return sources, masks


def _count_classes(plans: Sequence[Plan], request: Request, names: Sequence[str]) -> int:
    """The number of classes of all masks; DataError for one, or for ``names`` of others."""
    most = max(plans, key=lambda plan: plan.num_classes)
    classes = most.num_classes
    if classes < 2:
        found = f"one class in all masks ({plans[0].rule.same_as()})"
        raise DataError(f"{request.masks[0]}: {found}; two or more are needed: correct the mask")
    if not names or len(names) == classes:
        return classes
    if request.class_names:
        found = f"--class_names: found {len(names)} names, the masks have {classes} classes"
        cure = f" ({most.rule.same_as()}); give a name for each, from class 0 on"
    else:
        whose = "of an earlier run"
        if any(plan.rule.by is By.NAMES for plan in plans):
            whose = "of outlines, or of an earlier run,"
        found = f"--class_names {whose} are {len(names)} ({', '.join(names)}), "
        found += f"{most.settings.masks} has {classes} classes"
        cure = f": give {classes} names"
    raise DataError(found + cure + strokes_tip(plans, names))


def _overruled(given: Pixels | None, kept: Path, labels: Pixels) -> list[str]:
    """A line if a corrected class map wins over the mask that was given for its image."""
    unlike = 0 if given is None else int(((given != IGNORED) & (given != labels)).sum())
    what = f"{kept}: wins over the mask of its image in {unlike} pixel(s)"
    return [f"{what}; delete it to use the mask"] if unlike else []


def _later_ones(masks: Sequence[tuple[Plan, Source]], image: str) -> list[str]:
    """A line for each mask of an image that wins over one that was given before it."""
    lines: list[str] = []
    read = [(source.mask, plan.ids(source)) for plan, source in masks] if len(masks) > 1 else []
    for number, (path, ids) in enumerate(read):
        for other, before in read[:number]:
            unlike = int(((ids != before) & (ids != IGNORED) & (before != IGNORED)).sum())
            if unlike:
                wins = f"{path}: used for {image}, wins over {other} in {unlike} pixel(s)"
                lines.append(f"{wins}, in which they differ; give one of them to use it alone")
    return lines


def _notes(plans: Sequence[Plan], bare: Sequence[str]) -> tuple[list[str], list[str]]:
    """How the files were read, with the images that are ``bare`` of labels, and warnings."""
    notes = list(dict.fromkeys(note for plan in plans for note in plan.notes))
    warned = (line for plan in plans for line in (*plan.warnings, *mask_warnings(plan)))
    rules = {plan.rule.option: plan for plan in reversed(plans)}
    of = [f"{plan.settings.masks}: {plan.rule.told}" for plan in reversed(rules.values())]
    told = [f"masks: {plans[0].rule.told}"] if len(rules) == 1 else [f"masks: {t}" for t in of]
    told += notes
    if bare:
        told.append(f"{len(bare)} image(s) without labels, to be segmented: {some_names(bare)}")
    return told, list(dict.fromkeys(warned))


def _labels(masks: Iterable[tuple[Plan, Source]]) -> Pixels | None:
    """The labels of an image by its masks, of which later ones win; None if there are none."""
    labels: Pixels | None = None
    for plan, source in masks:
        ids = plan.ids(source)
        labels = ids if labels is None else merged(labels, ids)
    return None if labels is None or (labels == IGNORED).all() else labels


def _corrected(
    paths: Sequence[Path], answers: Answers, shape: tuple[int, ...], classes: int, crop: Crop
) -> Pixels:
    """The class ids of corrected class maps of one image, of which later ones win.

    They are of the size before the crop, or were cut as the images of the published answer.
    """
    maps: list[Pixels] = []
    for path in paths:
        ids, whole = read_mask(path), crop.uncut(shape)
        answers.check(path, ids, whole, shape, classes)
        maps.append(ids if ids.shape == whole else answers.uncut(ids))
    return np.asarray(crop.of(reduce(merged, maps)), np.uint8)
