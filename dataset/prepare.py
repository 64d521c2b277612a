"""Lay out images and masks as the program reads them, or look at a set that is laid out."""

from __future__ import annotations

import sys
from argparse import RawDescriptionHelpFormatter
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # when it is run as a script

from utils import leave_while_loading

if __name__ == "__main__":  # before the imports that take seconds
    leave_while_loading()


from annotation.files import is_annotation  # noqa: E402
from annotation.names import BACKGROUND  # noqa: E402
from config import Config, ConfigError  # noqa: E402
from dataset.batches import SPLITS, read_rule  # noqa: E402
from dataset.check import LAYOUT, Problems  # noqa: E402
from dataset.mask_values import (  # noqa: E402
    KINDS,
    By,
    SetSettings,
    colours_of,
    names_option,
    palette_text,
    reading_of,
    refuse_unused,
)
from dataset.set_check import Entry, check_set, missing_classes, splits_table  # noqa: E402
from dataset.set_file import NAME, SetFile  # noqa: E402
from dataset.set_plan import EACH, Plan, Source, Tile  # noqa: E402
from imaging.drawing import write_png  # noqa: E402
from imaging.field import SMALLEST_SIDE  # noqa: E402
from imaging.gray_range import GrayRange  # noqa: E402
from imaging.pixel_size import POSSIBLE, is_possible  # noqa: E402
from utils.commandline import Parser, exit_code  # noqa: E402
from utils.entries import split_entries  # noqa: E402
from utils.files import DataError, recover_folder, replace_file, replacing_folder  # noqa: E402
from utils.log import to_terminal  # noqa: E402
from utils.metrics import IGNORED  # noqa: E402
from utils.tables import csv_text  # noqa: E402

# Not the docstring, which python -OO drops.
ABOUT = """\
Lay out images and masks as the program reads them, or look at a set that is laid out.

    python dataset/prepare.py --images raw/img --masks raw/gt --out dataset/my_set --test 0.3
    python dataset/prepare.py --check dataset/my_set

The set is written beside its place and then renamed, so it is there in full or not at all. What a
kill left beside it, or instead of it, the same command puts right.
docs/data.md shows the layout and examples.
"""
REPORT, SOURCES = "prepare_report.txt", "prepare_sources.csv"


def prepare(settings: SetSettings) -> list[str]:
    """Make the set, unless it is a dry run; the lines of the report. Raises UserError."""
    if not settings.dry_run and recover_folder(settings.out):
        to_terminal(f"{settings.out}: put back, as a kill while it was replaced left it elsewhere")
    _check_folders(settings)
    plan = Plan(settings)
    refuse_unused(settings, [plan.rule], settings.masks)
    known = set_file(plan)
    lines = report_lines(plan)
    if not settings.dry_run:
        with replacing_folder(settings.out) as root:
            _write_tiles(plan, root)
            known.write(root)
            # A file name that is no valid text holds surrogates: replace_file can write them.
            replace_file(root / REPORT, "\n".join([*lines, ""]), "--out")
            replace_file(root / SOURCES, _sources(plan), "--out")
    return lines


def _check_folders(settings: SetSettings) -> None:
    problems, out = Problems(), settings.out
    inputs = {"images": settings.images, "masks": settings.masks}
    missing = ((option, folder) for option, folder in inputs.items() if not folder.is_dir())
    problems += [f"{folder}: no such folder; correct --{option}" for option, folder in missing]
    if any(folder.resolve().is_relative_to(out.resolve()) for folder in inputs.values()):
        problems.append(f"{out}: holds the images or masks to be read; give another --out")
    elif out.exists() and not settings.overwrite:
        problems.append(f"{out}: is there already; give another --out, or --overwrite")
    elif out.exists() and not (out / REPORT).is_file():
        problems.append(f"{out}: has no {REPORT}, so it was not made here; remove it yourself")
    problems.refuse()


def _write_tiles(plan: Plan, root: Path) -> None:
    """Write each source's tiles to all splits they are in, so that a source is read once."""
    places: defaultdict[Source, list[tuple[str, Tile]]] = defaultdict(list)
    for split, tiles in plan.splits.items():
        for tile in tiles:
            places[tile.source].append((split, tile))
    for source, own in places.items():
        image = plan.image(source)
        ids = plan.ids(source) if source.mask else None
        clear = plan.clear(source)
        for split, tile in own:
            hidden = None if clear is None else tile.box.of(clear)
            write_png(root / split / "img" / f"{tile.name}.png", tile.box.of(image), hidden)
            if ids is not None and split != SPLITS["unlabelled"]:
                write_png(root / split / "gt" / f"{tile.name}.png", tile.box.of(ids))


def _sources(plan: Plan) -> str:
    """Where each image of the set comes from, as CSV."""
    head = ("name", "split", "file", "page", "top", "left", "batch", "sample", "specimen")
    rows: list[tuple[object, ...]] = [head]
    for split in SPLITS.values():
        for tile in plan.splits.get(split, []):
            source, box = tile.source, tile.source.box
            place = source.page, box.top + tile.box.top, box.left + tile.box.left
            ids = source.batch, source.sample, source.specimen
            rows.append((f"{tile.name}.png", split, source.below, *place, *ids))
    return csv_text(rows)


def set_file(plan: Plan) -> SetFile:
    """What the set will tell every later command."""
    settings, rule = plan.settings, plan.rule
    tiles = [tile for split in SPLITS.values() for tile in plan.splits.get(split, [])]
    unlabelled = any(t.annotated and t.counts is not None and t.counts[IGNORED] for t in tiles)
    sizes = {(tile.source.box.height, tile.source.box.width) for tile in tiles}
    names = settings.class_names or tuple(plan.masks.names) or rule.names
    colours = settings.class_colours
    if not colours and rule.colours:
        colours = colours_of(rule.palette, plan.num_classes)
    try:  # the rules of training's settings
        Config(num_classes=max(plan.num_classes, 2), class_names=names, class_colours=colours)
    except ConfigError as error:
        tip = strokes_tip([plan], names)
        lines = [line + tip * line.startswith("class_names") for line in str(error).splitlines()]
        raise DataError("\n".join(f"--{line}" for line in lines)) from None
    return SetFile(
        num_classes=plan.num_classes if plan.num_classes > 1 else None,
        class_names=names,
        class_colours=colours,
        ignore_label=IGNORED if unlabelled else None,
        palette="" if rule.names else palette_text(rule.palette),
        crop=settings.crop,
        cropped_sizes=tuple(sorted(sizes)) if any(settings.crop) else (),
        gray_range=plan.gray if isinstance(plan.gray, GrayRange) else None,
        um_per_px=_scales(plan, tiles),
    )


def _scales(plan: Plan, tiles: Sequence[Tile]) -> float | dict[str, float] | None:
    """Micrometres per pixel of the images, one number where they are one."""
    by_name = {f"{tile.name}.png": plan.scales.get(tile.source.image) for tile in tiles}
    known = {name: um for name, um in by_name.items() if um is not None}
    alone = len(set(known.values())) == 1 and len(known) == len(by_name)
    return next(iter(known.values())) if alone else known or None


def report_lines(plan: Plan) -> list[str]:
    """The report: what was made of what, and what to know about it."""
    settings = plan.settings
    state = "dry run, nothing written" if settings.dry_run else "written"
    lines = [f"{settings.out}: {plan.num_classes} classes, seed {settings.seed} ({state})", ""]
    lines += [f"masks: {plan.rule.note}", f"       {plan.rule.same_as()}"]
    if any(settings.crop):
        lines.append("cropped: {} top, {} bottom, {} left, {} right".format(*settings.crop))
    scales = sorted(set(plan.scales.values()))
    if scales:
        lines.append(f"pixel size: {' and '.join(f'{um:.4g}' for um in scales[:5])} µm")
    if settings.tile:
        lines.append(f"tiles: {settings.tile}x{settings.tile}, overlap {settings.overlap} or more")
    images = {}
    for split, tiles in plan.splits.items():
        kept = split != SPLITS["unlabelled"]  # masks there are not written
        images[split] = [
            Entry(t.source.batch, t.source.specimen, t.box[2:], t.counts if kept else None)
            for t in tiles
        ]
    lines += [*plan.notes, "", *splits_table(images, plan.num_classes, "specimens"), ""]
    missing = missing_classes(images, plan.num_classes)
    lines += missing or ["every class occurs in every split"]
    if settings.ignored_as != IGNORED and any(i == IGNORED for i, _ in plan.rule.palette):
        lines.append(f"pixels without a label are written as class {settings.ignored_as}")
    return lines + [f"warning: {line}" for line in (*plan.warnings, *_warnings(plan))]


def _warnings(plan: Plan) -> list[str]:
    """What may have been meant otherwise, or harms training."""
    found = []
    train, test = (plan.splits.get(SPLITS[name], []) for name in ("train", "test"))
    unlabelled = sum(int(t.counts[IGNORED]) for t in train + test if t.counts is not None)
    if unlabelled:
        cure = f"{NAME} tells training to leave them out; --ignored_as CLASS makes them a class"
        found.append(f"{unlabelled} pixels without a label are written as {IGNORED}: {cure}")
    sizes = {tile.box[2:] for tiles in plan.splits.values() for tile in tiles}
    if len(sizes) > 1:
        found.append(f"{len(sizes)} image sizes; train with --image_size N, or give --tile here")
    found += mask_warnings(plan)
    single = [t[0].source.specimen for s, t in plan.splits.items() if s.startswith("sup_num1_")]
    if len(set(single)) < len(single):
        reason = "repeats with images of one specimen are not independent"
        few = f"{len(single)} images of {len(set(single))} specimen(s)"
        found.append(f"sup_num1_*: {few}: {reason}")
    if not any(t.source.batch for t in train):
        found.append("no production batch is known; PSCL-MoCo needs --batch_from")
    return found


def mask_warnings(plan: Plan) -> list[str]:
    """What masks may mean otherwise: ids from 1, strokes, another class as the background."""
    found = _ids_without_zero(plan) + _scribbles(plan)
    shares = plan.counts(plan.splits.get(SPLITS["train"], [])).sum(0)
    if plan.rule.by in (By.LEVELS, By.PARTICLES) and shares[0] < shares.max():
        largest = f"is not the largest class, {shares.argmax()} is"
        background = f"class 0 (background, left out of the mean Dice) {largest}"
        found.append(f"{background}; if another one is the matrix, give --palette")
    return found


def _ids_without_zero(plan: Plan) -> list[str]:
    """Warn of class ids that begin with 1: the first class is then no background for the scores."""
    tiles = [t for own in plan.splits.values() for t in own if t.counts is not None]
    labels = sorted({value for i, (value, *_) in plan.rule.palette if i != IGNORED})
    if not labels or plan.rule.by is not By.IDS or plan.counts(tiles)[:, 0].any():
        return []
    palette = " ".join(f"{number}={value}" for number, value in enumerate(labels))
    palette += " ignore=255" if any(i == IGNORED for i, _ in plan.rule.palette) else ""
    found = f"class 0 is in no mask, ids begin with {labels[0]}: class 0 is the background, which"
    cure = f'if {labels[0]} is the matrix, give --palette "{palette}"'
    return [f"{found} the mean Dice leaves out, and no class would be left out; {cure}"]


def _scribbles(plan: Plan) -> list[str]:
    """Warn of masks in which only strokes are labelled, and one class is all the rest."""
    alike: defaultdict[tuple[int, str], list[Path]] = defaultdict(list)
    for path, value in plan.scribbled.items():
        alike[value, _unlabelled_cure(plan, path, value)].append(path)
    return [
        f"{own[0]}: {len(own)} mask(s) look like scribbles: strokes on class {value}; if nobody "
        f"labelled the rest, {cure}; if class {value} is drawn in full, all is well"
        for (value, cure), own in sorted(alike.items())
    ]


def _unlabelled_cure(plan: Plan, path: Path, value: int) -> str:
    """How to say that nobody labelled what has the class ``value`` in a mask of strokes."""
    names = plan.masks.names
    of_classes = "{class}" in plan.settings.mask_pattern
    if is_annotation(path) or of_classes:
        if of_classes and value:
            cure = f'call the file of {names[value]} "ignore"'
        elif of_classes:
            cure = 'add a file of the class "ignore" that is white everywhere'
        elif value:
            cure = f'call the shape of {names[value]} round them "ignore"'
        else:
            cure = 'draw a shape called "ignore" over the whole image (smaller ones stay on top: '
            cure += f'one of {names[0]} round them is to be called "ignore", too)'
        cure += "; --palette and --ignore have no effect on it"
        others = _names_left(plan, value)
        if len(others) < len(names):
            elsewhere = f"no other mask has {names[value]}"  # --masks of another folder
            which = f" and {elsewhere if value else 'none is called background'}"
            how = f"if one of the others is the matrix{which}, give them with it first"
            how = f"if {elsewhere}, give the others" if names[0] in others else how
            cure += f"; {how}: {names_option(others)}"
        return cure
    if path in plan.masks.id_maps:
        return f"save it with {IGNORED} there"
    palette = _palette_of_strokes(plan, value)
    return f'give --palette "{palette}"' if palette else "give its value as ignore= in --palette"


def _names_left(plan: Plan, value: int) -> list[str]:
    """Names of the classes that have pixels where nobody labelled what has the class ``value``.

    Without the background, if nobody named or drew it, and without the class round the strokes.
    """
    names, gone = plan.masks.names, {value}
    if names[0] in BACKGROUND:
        gone.add(0)
    elif not value:
        return names
    strokes = [path for path, label in plan.scribbled.items() if label == value]
    for tile in (tile for split in plan.splits.values() for tile in split):
        if tile.counts is not None:
            unlabelled = {value} if tile.source.mask in strokes else set[int]()
            gone -= {label for label in gone - unlabelled if tile.counts[label]}
    return [name for label, name in enumerate(names) if label not in gone]


def _palette_of_strokes(plan: Plan, value: int) -> str:
    """The palette in which what has the class ``value`` now is unlabelled; '' if there is none."""
    known = [label for label, _ in plan.rule.palette if label not in (value, IGNORED)]
    labels = {label: number for number, label in enumerate(sorted(set(known)))}
    labels |= {value: IGNORED, IGNORED: IGNORED}
    palette = [(labels[label], shown) for label, shown in plan.rule.palette]
    return palette_text(palette) if any(label == value for label, _ in plan.rule.palette) else ""


def strokes_tip(plans: Iterable[Plan], names: Sequence[str]) -> str:
    """A further cure for names that are one too few, if a mask looks like strokes; else ''."""
    for plan in plans if names else ():
        for path, value in plan.scribbled.items():
            if len(names) == plan.num_classes - 1:
                cure = _unlabelled_cure(plan, path, value)
                return f"; {path} looks like strokes: if nobody labelled class {value}, {cure}"
    return ""


def _parser() -> Parser:
    raw, layout = RawDescriptionHelpFormatter, f"The layout:\n{LAYOUT}"
    parser = Parser("prepare.py", description=ABOUT, epilog=layout, formatter_class=raw)
    add = parser.add_argument
    add("--check", type=Path, metavar="DIR", help="look at a set that is laid out")
    add("--sheet", type=Path, help="with --check: file of the contact sheet (<DIR>_check.png)")
    add(
        "--near",
        type=float,
        default=0.9,
        help="with --check: correlation from which images are copies (0.9)",
    )
    add("--num_classes", type=int, default=0, help="number of classes; default: highest id + 1")
    add("--images", type=Path, help="folder of the images")
    add("--masks", type=Path, help="folder of the masks; may be the same folder")
    add("--out", type=Path, help="folder of the set to make")
    add(
        "--mask_pattern",
        default="",
        help='names of masks, such as "{stem}_mask.png"; default: {stem}',
    )
    add("--mask_kind", choices=KINDS, default="auto", help="what mask values mean (auto)")
    add("--palette", default="", help='which class a mask value means: "0=0 1=128", or of colours '
        '"0=0,0,0 1=255,0,0 ignore=255,255,255"')  # fmt: skip
    add("--ignore", default="", help="mask values of unlabelled pixels; -1 always is one")
    add("--ignored_as", type=int, default=IGNORED, help="value written for unlabelled pixels (255)")
    add(
        "--tolerance",
        type=int,
        default=0,
        help="mask values that differ by at most this in each channel are one class (0)",
    )
    add("--page", default="", help="which page of TIFFs with several, counted from 1; or each")
    add("--crop", default="0,0,0,0", help="pixels to cut off: top,bottom,left,right")
    add("--um_per_px", type=float, help="micrometres per pixel; default: as the files say")
    add("--class_names", default="", help='names of class 0, 1, ..., such as "matrix,carbide"; '
        "default for outlines: 0 is what is not drawn, others by the alphabet")  # fmt: skip
    add("--class_colours", default="", help="their colours in pictures, such as 333333,e69f00; "
        "default: those of coloured masks")  # fmt: skip
    add(
        "--trim",
        type=int,
        default=0,
        help="crop up to N pixels where image and mask differ in size (0)",
    )
    add("--tile", type=int, default=0, help="side of square tiles in pixels; default: whole images")
    add("--overlap", type=int, default=0, help="least overlap of tiles in pixels (0)")
    add("--batch_from", default="", help="regular expression for the file name or, where that does "
        "not match, the path below --images, with a group (batch), a second one (sample), or "
        "named ones (batch, sample, specimen); or a CSV file with the columns "
        "file,batch[,sample][,specimen][,split]")  # fmt: skip
    add("--test", type=float, default=0.3, help="share of the images for testing (0.3)")
    add("--seed", type=int, default=0, help="seed of the draws (0)")
    add("--dry_run", action="store_true", help="print the report, write nothing")
    add("--overwrite", action="store_true", help="replace a set that was made here")
    return parser


class Look(NamedTuple):
    """A set that is laid out, and how it is looked at."""

    check: Path
    num_classes: int
    sheet: Path
    near: float


def read_settings(words: Sequence[str] | None = None) -> SetSettings | Look:
    """What the words of a command line ask for; DataError, a line for each wrong option."""
    problems = Problems()
    given = _parser().parse_args(words)
    for option in ("images", "masks", "out"):
        if given.check is None and getattr(given, option) is None:
            problems.append(f"--{option}: not given; --images, --masks and --out are needed")
    some, below = "0 or more", "0 or more, less than --tile"
    checks = (
        ("near", given.near, 0 < given.near <= 1, "a correlation above 0, at most 1"),
        ("num_classes", given.num_classes, 0 <= given.num_classes <= 255, "1 to 255"),
        ("ignored_as", given.ignored_as, 0 <= given.ignored_as <= 255, "0 to 255"),
        ("tile", given.tile, given.tile == 0 or given.tile >= SMALLEST_SIDE, "16 pixels or more"),
        ("overlap", given.overlap, 0 <= given.overlap < max(given.tile, 1), below),
        ("test", given.test, 0 <= given.test < 1, "a share of 0 or more, below 1"),
        ("seed", given.seed, given.seed >= 0, some),
    )
    problems += [f"--{name} {value}: give {cure}" for name, value, good, cure in checks if not good]
    if given.um_per_px is not None and not is_possible(given.um_per_px):
        shown = f"--um_per_px {given.um_per_px}"
        problems.append(f"{shown}: give micrometres per pixel, {POSSIBLE}")
    for name, parse in PARSERS.items():
        with problems.collect():
            setattr(given, name, parse(getattr(given, name)))
    reading = reading_of(given, problems)
    problems.refuse()
    if given.check is not None:
        sheet = given.sheet or Path(f"{given.check.resolve().name}_check.png")
        return Look(given.check, given.num_classes, sheet, given.near)
    own = {name: getattr(given, name) for name in SetSettings.__dataclass_fields__ if name in given}
    return SetSettings(**own | vars(reading))


def _page(words: str) -> int:
    if words in ("", "each"):
        return EACH if words else 0
    if not words.isdecimal() or int(words) < 1:
        raise DataError(f"--page {words!r}: give a number from 1, or each")
    return int(words)


def _texts(words: str) -> tuple[str, ...]:
    return split_entries(words) if words.strip() else ()


# How the text of an option is read; an empty one is as if it was not given.
PARSERS: dict[str, Callable[[str], object]] = {
    "page": _page,
    "class_names": _texts,
    "class_colours": _texts,
    "batch_from": read_rule,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""

    def work() -> None:
        settings = read_settings(argv)
        if isinstance(settings, SetSettings):
            lines, problems = prepare(settings), Problems()
        else:
            folder, classes, sheet, near = settings
            lines, problems = check_set(folder, classes, sheet, near)
        for line in lines:
            to_terminal(line)
        problems.refuse()

    return exit_code(work, "No set was made or changed", "smaller images, or close other programs")


if __name__ == "__main__":
    sys.exit(main())
