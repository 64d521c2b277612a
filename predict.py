"""Apply a trained model to images without masks: class maps, overlays, measurements.

``python predict.py --weights RUN_OR_FILE --images FOLDER --um_per_px 0.1``; all options: ``-h``.
From Python, with NumPy arrays in and out::

    from predict import Segmenter
    segmenter = Segmenter("aluminum_moco/1_0/fine.pt")
    mask = segmenter(image)  # uint8 (H, W) of class ids, of the image's own size
    table = segmenter.measure(mask, um_per_px=0.1)  # one dict per class
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

from utils import leave_while_loading

if __name__ == "__main__":  # before the imports that take seconds
    leave_while_loading()

import torch

from annotation.outlines import SUFFIX
from config import ConfigError
from dataset.batches import batches_of
from dataset.set_file import NAME, scale_by_set, set_of
from imaging.drawing import class_colours, default_names
from imaging.field import SMALLEST_SIDE, FieldRule
from imaging.imagefile import read_header
from imaging.listing import names_of, sample_of, some_names
from imaging.pixel_size import is_possible
from metallography import ranking
from metallography.export import check_target
from metallography.folder import Folder
from metallography.items import TABLES, Item, Items, field_rule, in_order, list_images, unusable
from metallography.measure import BOUNDARY_PX, fractions_of, outlying
from metallography.outlines import remove_outlines, write_outlines
from metallography.particles import MINIMUM_PX, unit_of
from metallography.scales import Scales, find_scales
from metallography.segmenter import MODEL, Segmenter, check_number, find_weights
from metallography.summary import equal_images, later_warnings, write_tables
from metallography.tiling import DEFAULT_OVERLAP, DEFAULT_TILE, VIEWS
from report.laboratory import Told, page_name, place_of, write_laboratory
from report.page import experiment_of, write_report
from report.provenance import how_measured
from report.sheets import predicted_sheet, ranked_sheet
from report.workbook import WORKBOOK, remove_workbook, write_folder_workbook
from utils.checkpoint import CheckpointError
from utils.commandline import Parser, UserError, complain, exit_code, options_told, value_of
from utils.files import (
    IMAGE_SUFFIXES,
    MOST_BYTES,
    confined,
    cut_name,
    list_files,
    refuse_held,
    remove_leftovers,
)
from utils.log import WARNING, to_terminal
from utils.ranks import group
from utils.run_folder import locked

ABOUT = "Apply a trained model to images without masks: class maps, overlays, measurements."

AS_SEGMENTED = (
    f"Averages over {VIEWS} flips and quarter turns, as segment.py did with this model; --tta "
    "false predicts one view, in an eighth of the time, and not as segment.py did"
)
MOST_ENLARGED = 2**28  # pixels of an image that --resample enlarges
OTHER_SCALE = "rank those of one magnification at a time"
# What decides measurements, by its name in ``Folder``; of --images alone.
MEASURING = ("min_px", "grain_classes", "connectivity", "boundary_classes", "boundary_px",
             "probabilities", "particles")  # fmt: skip
TASKS = ("images", "rank", "export")
# The tasks that use an option, for every option; with another task it is refused, because what it
# asks for would silently be missing.
USED_BY: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("weights", "resize", "device", "threads"), TASKS),
    **dict.fromkeys(("out", "masks", "crop", "roi", "um_per_px", "scales"), ("images", "rank")),
    **dict.fromkeys(("tile", "overlap", "batch_from"), ("images", "rank")),
    **dict.fromkeys((*MEASURING, "resample", "tta", "sample"), ("images",)),
    **dict.fromkeys(("report", "outlines", "xlsx"), ("images",)),
    "annotated": ("rank",),
    "overwrite": ("images", "export"),
}
# Options that do nothing unless another one is given, too.
NEEDS = {"boundary_px": "masks", "boundary_classes": "grain_classes"}


def parser() -> argparse.ArgumentParser:
    """The options; what cannot be read ends the program with one line and exit code 2."""
    made = Parser(prog="predict.py", description=ABOUT)
    add = made.add_argument
    add("--weights", required=True, help="fine.pt or sup.pt, or model.pt of segment.py, or the "
        "folder that holds it")  # fmt: skip
    task = made.add_mutually_exclusive_group(required=True).add_argument
    task("--images", help="predict and measure: a folder of images with sub-folders, or one image")
    task("--rank", metavar="IMAGES", help="sort images by how unsure the model is: how much its "
         "predictions of their 8 flips and turns disagree, with --annotated also how much a pixel "
         "classifier disagrees with it")  # fmt: skip
    task("--export", metavar="FILE", help="write the model for other programs: .onnx or .pt2")
    add("--out", help="folder of the results; default: predicted_<images> or ranked_<images> "
        "beside the weights; for the folder img of a set: predicted_<set>_<split>_img")  # fmt: skip
    add("--masks", help="folder of true masks to compare the predictions with")
    add("--annotated", help="with --rank: the annotated images of the model, a folder with img "
        "and gt; a pixel classifier trained on them gives a second opinion")  # fmt: skip
    add("--crop", help="pixels to cut off before prediction: top,bottom,left,right; default: as "
        "the training images were cut")  # fmt: skip
    add("--roi", help="folder of masks of the region of interest, named as the images; where they "
        "are 0 nothing is measured")  # fmt: skip
    add("--um_per_px", type=float, help="micrometres per pixel; default: as the files say, else "
        "all lengths in pixels")  # fmt: skip
    add("--scales", help="a CSV file of scales for single images, which count before --um_per_px: "
        "file,um_per_px")  # fmt: skip
    add("--batch_from", default="", metavar="EXPRESSION|CSV", help="production batches: a regular "
        "expression with a group, for the file name or the path below the folder; or a CSV file: "
        "file,batch; default: as names begin, 15 of 15_s7_2.png")  # fmt: skip
    add("--resample", type=float, metavar="UM", help="show all images to the network at UM "
        "micrometres per pixel; results keep the images' own size")  # fmt: skip
    add_measuring(add)
    add("--resize", type=int, help="predict at N x N pixels; 0: at their own size; default: as "
        "trained")  # fmt: skip
    add("--tta", type=true_or_false, nargs="?", const=True, metavar="true|false", help="average "
        "over 8 flips and quarter turns, at 8 times the work; default: as segment.py did with its "
        "model.pt, else false")  # fmt: skip
    add("--tile", type=int, default=DEFAULT_TILE, help="largest side of a tile (%(default)s px)")
    add("--overlap", type=int, default=DEFAULT_OVERLAP, help="pixels that neighbouring tiles share "
        "(%(default)s, with which tiling changes nothing for a UNet)")  # fmt: skip
    add("--probabilities", action="store_true", help="also write class probabilities (.npy), "
        "float16 (H, W, C)")  # fmt: skip
    add("--particles", action="store_true", help="also write particles.csv, one line per particle")
    add("--outlines", choices=tuple(SUFFIX), help="also write the outlines of all particles: "
        "GeoJSON (QuPath), or RoiSet.zip (ImageJ, Fiji)")  # fmt: skip
    add("--xlsx", action="store_true", help="also write the tables as one Excel workbook")
    add("--sample", default="", help="what the images show, for the head of report.html; default: "
        "the name of their folder; for a folder named img, its parent's name")  # fmt: skip
    add("--report", action="store_true", help="also write the page on the model's experiment, with "
        "these measurements")  # fmt: skip
    add("--overwrite", action="store_true", help="predict again the images that are done; with "
        "--export replace the file")  # fmt: skip
    add("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps")
    add("--threads", type=int, default=0, help="CPU threads; 0: as many as PyTorch chooses")
    return made


def add_measuring(add: Callable[..., object]) -> None:
    """The options that say what a particle and a grain are, and how true masks are compared."""
    add("--min_px", type=int, default=MINIMUM_PX, help="smallest particle (%(default)s pixels)")
    add("--connectivity", type=int, help="pixels of one particle touch by a side (4) or also by a "
        "corner (8); default: 4 for grain classes, 8 for all others")  # fmt: skip
    add("--grain_classes", type=int, nargs="*", default=[], metavar="CLASS",
        help="classes whose particles are grains: an ASTM grain-size number is given")  # fmt: skip
    add("--boundary_classes", type=int, nargs="*", metavar="CLASS", help="with --grain_classes: "
        "classes that are boundaries of the grains; default: all other classes")  # fmt: skip
    add("--boundary_px", type=float, default=BOUNDARY_PX, help="with --masks: tolerance in pixels "
        "when comparing outlines (%(default)s)")  # fmt: skip


def true_or_false(word: str) -> bool:
    """The value of an option that may also stand alone."""
    try:
        return bool(value_of("bool", [word]))
    except ValueError:
        raise argparse.ArgumentTypeError(f"found {word!r}; give true or false") from None


def run(options: argparse.Namespace) -> int:
    """Predict, rank or export; returns 0, or 1 if some files could not be used."""
    refuse_of_no_effect(options)
    check_number("threads", options.threads, 0, least=1, most=1024)
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.export:
        group.by_writer(lambda: check_target(Path(options.export), options.overwrite))
    how = {name: getattr(options, name) for name in ("device", "resize", "tta", "tile", "overlap")}
    check_weights(Path(options.weights))
    segmenter = Segmenter(options.weights, **how)
    to_terminal(segmenter.about)
    if options.images and options.tta is None and segmenter.tta:
        to_terminal(AS_SEGMENTED)
    if options.export:
        to_terminal("\n".join(group.by_writer(lambda: segmenter.export(options.export))))
        return 0
    bad = (rank_images if options.rank else predict_images)(segmenter, options)
    if not group.writes():
        return int(bool(bad))
    return complain(f"{len(bad)} file(s) could not be used:\n" + "\n".join(bad), 1) if bad else 0


def refuse_of_no_effect(options: argparse.Namespace) -> None:
    """ConfigError, a line each, if options are given that change nothing."""
    task = next(name for name in TASKS if getattr(options, name) is not None)
    default = parser().get_default
    given = {name for name in USED_BY if getattr(options, name) != default(name)}
    lines = [
        f"--{name}: of no effect with --{task}; leave it out"
        for name, tasks in USED_BY.items()
        if name in given and task not in tasks
    ]
    lines += [
        f"--{name}: of no effect without --{other}; leave it out, or give --{other} too"
        for name, other in NEEDS.items()
        if name in given and task in USED_BY[name] and other not in given
    ]
    if lines:
        raise ConfigError("\n".join(lines))


def check_weights(weights: Path) -> None:
    """Say why there is no network in a folder of ``segment.py`` that has none; UserError."""
    with suppress(CheckpointError):
        if find_weights(weights).exists():
            return
    # Here, as scikit-learn takes a second to load.
    from segmentation.answers import Answers
    from segmentation.predictors import FOREST

    folder = weights if weights.is_dir() else weights.parent
    if Answers(folder).by == FOREST:
        file = weights / MODEL if weights.is_dir() else weights
        raise UserError(
            f"{file}: not written, because the {FOREST} answered there and no network; add the "
            "new images to the folder of segment.py, or give it more --minutes, so that a network "
            "can win"
        )


def places(segmenter: Segmenter, options: argparse.Namespace) -> tuple[Path, Items]:
    """The folder of the results, and the images; UserError if one folder would hold both."""
    flag, kind = ("rank", "ranked") if options.rank else ("images", "predicted")
    images = Path(options.rank or options.images)
    masks = Path(options.masks) if options.masks else None
    if masks and not masks.is_dir():
        raise ConfigError(f"--masks: {masks} is no folder; give the folder of the true masks")
    default = segmenter.path.parent / cut_name("_".join([kind, *names_of(images)]), MOST_BYTES)
    out = Path(options.out or default)
    for name, folder in ((flag, images), ("masks", masks)):
        if folder and folder.is_dir() and out.resolve() == folder.resolve():
            raise ConfigError(f"--out: found {out}, the folder of --{name}; give another folder")
    return out, with_batches(list_images(images, out, masks), images, options.batch_from)


def with_batches(items: Items, images: Path, words: str) -> Items:
    """Images with the production batches that ``--batch_from`` tells; DataError."""
    folder = images.parent if images.is_file() else images
    found, warned = batches_of(words, [item.path for item in items], folder)
    told = (item._replace(told_batch=found.get(item.path)) for item in items)
    return Items(told, [*items.left_out, *(f"{WARNING}{line}" for line in warned)], items.bad)


@contextmanager
def claimed(out: Path) -> Iterator[None]:
    """Lock the folder of the results, and remove what a killed process left there."""
    if not group.writes():  # rank 0 does
        with confined(out):
            yield
        return
    with locked(out, flag="--out", work="predicting", other="--out"):
        remove_leftovers(out)
        refuse_held(out / name for name in (*TABLES, WORKBOOK, "ranking.csv"))
        yield


def field_of(
    segmenter: Segmenter, options: argparse.Namespace, items: Sequence[Item]
) -> tuple[FieldRule, list[str]]:
    """Which part of each image counts, and lines on it: by flags, the images' set, the model."""
    prepared = set_of(Path(options.rank or options.images)) is not None
    roi = Path(options.roi) if options.roi else None
    own = segmenter.crop, segmenter.cropped_sizes
    return field_rule(items, options.crop, roi, *own, prepared)


def take_names(segmenter: Segmenter, images: Path) -> list[str]:
    """Let names and colours of the images' set count, if it has any; lines where they differ."""
    known = set_of(images)
    if known is None:
        return []
    classes, lines = segmenter.num_classes, []
    if known.num_classes not in (None, classes):
        lines.append(f"Warning: the model has {classes} classes, the images' {NAME} says "
                     f"{known.num_classes}; {classes} are used")  # fmt: skip
    if len(known.class_names) == classes:
        names = list(known.class_names)
        if segmenter.class_names not in (names, default_names(classes)):
            old, new = (",".join(each) for each in (segmenter.class_names, names))
            lines.append(f"Warning: the model's classes are {old}, the images' {NAME} says {new}; "
                         f"{new} are used")  # fmt: skip
        segmenter.class_names = names
    if len(known.class_colours) == classes:
        segmenter.colours = class_colours(classes, known.class_colours)
    return lines


def find_all_scales(
    segmenter: Segmenter, options: argparse.Namespace, items: Items, field: FieldRule
) -> Scales:
    """The scale of each image; ConfigError if the flags do not go together."""
    images = Path(options.images)
    unit_of(options.um_per_px)
    table = Path(options.scales) if options.scales else None
    bad, told = partial(unusable, gray=segmenter.gray, field=field), scale_by_set(images)
    scales = find_scales(items, images, options.um_per_px, table, told, unusable=bad)
    if options.resample is not None:
        if not is_possible(options.resample):
            raise ConfigError(f"--resample: found {options.resample}; give micrometres per pixel")
        if segmenter.resize:
            size = f"{segmenter.resize}x{segmenter.resize}"
            raise ConfigError(f"--resample: the model sees images at {size}; give --resize 0 too")
        if None in scales.of.values():
            name = next(name for name, um in scales.of.items() if um is None)
            raise ConfigError(f"--resample: the pixel size of {name} is not known; give --scales")
        refuse_odd_sizes(items, scales, options.resample)
    return scales


def refuse_odd_sizes(items: Items, scales: Scales, resample: float) -> None:
    """ConfigError if ``--resample`` shows the network next to nothing of an image, or too much."""
    for item in items:
        header, um = read_header(item.path), scales.of.get(item.name)
        if header is None or um is None:  # an unreadable file, which is named when it is its turn
            continue
        height, width = (max(1, round(side * um / resample)) for side in header[:2])
        if min(height, width) < SMALLEST_SIDE or (um > resample and height * width > MOST_ENLARGED):
            seen = f"{item.own_path} would be seen at {width}x{height} pixels"
            cure = f"give a number nearer to its own {um:g} micrometres per pixel"
            raise ConfigError(f"--resample: found {resample:g}, with which {seen}; {cure}")


def predict_images(segmenter: Segmenter, options: argparse.Namespace) -> list[str]:
    """``--images``: predict, measure, draw; returns a line for each file that cannot be used."""
    out, items = places(segmenter, options)
    experiment = experiment_of(segmenter.path, out) if options.report else None
    terms = {name: getattr(options, name) for name in MEASURING}
    field, notes = field_of(segmenter, options, items)
    scales = find_all_scales(segmenter, options, items, field)
    notes += [*take_names(segmenter, Path(options.images)), *scales.lines]
    for line in notes:
        to_terminal(line)
    how: dict[str, Any] = {"field": field, "scales": scales.of, "resample": options.resample or 0.0}
    images = Path(options.images).resolve()
    how["images"] = images.parent if images.is_file() else images
    with claimed(out):
        how["replaces"] = ["summary.md", "sheet.png", page_name(out)]
        how["replaces"] += [WORKBOOK] if options.xlsx else []
        folder = Folder(
            segmenter, in_order(items), out, overwrite=options.overwrite, **how, **terms
        )
        folder.bad, folder.left_out = list(items.bad), items.left_out
        folder.notes = notes
        folder.predict_shared()
        return group.by_writer(lambda: measure_images(folder, options, experiment))


def measure_images(
    folder: Folder, options: argparse.Namespace, experiment: Path | None
) -> list[str]:
    """Predict what is not done, measure and write all tables and pages; see ``predict_images``."""
    out = folder.out
    given, default = vars(options), parser().get_default
    known = {n: default(n) for n in given if n not in ("weights", "images", "out", "sample")}
    folder.head = [
        ("Sample", sample_of_images(options)),
        ("Folder", options.images),
        ("Options", options_told(given, known)),
    ]
    folder.run()
    folder.warned = equal_images(folder) + ([] if options.xlsx else remove_workbook(folder))
    write_tables(folder, how_measured(folder))
    written = write_outlines(folder, options.outlines) + remove_outlines(folder, options.outlines)
    if options.xlsx:
        written += write_folder_workbook(folder)
    predicted_sheet(folder)
    page = write_laboratory(folder, told(folder, options))
    for line in [*later_warnings(folder), *written]:
        to_terminal(line)
    to_terminal(f"{out}: {folder.predicted} image(s) predicted, {folder.skipped} were done already")
    to_terminal(f"Report: {page}")
    if experiment:
        to_terminal(f"Report on the experiment: {write_report(experiment)}")
    folder.record.finish()
    return folder.bad


def sample_of_images(options: argparse.Namespace) -> str:
    """What the images show: as ``--sample`` says, else the name of their folder."""
    return options.sample or sample_of(Path(options.images))


def told(folder: Folder, options: argparse.Namespace) -> Told:
    """What the page of a prediction has to be told: the sample, and which images look odd."""
    names = folder.segmenter.class_names
    odd = outlying(fractions_of(folder.rows, len(names)), names)
    sample = sample_of_images(options)
    marks = {image: "; ".join(reasons) for image, reasons in odd.items()}
    by = f"the network {folder.segmenter.path}" if isinstance(folder.segmenter, Segmenter) else ""
    return Told(sample, by=by, marks=marks, place=place_of(Path(options.images)))


def second_of(segmenter: Segmenter, options: argparse.Namespace) -> ranking.SecondOpinion | None:
    """The second opinion of ``--annotated``; without it None, and a line that says so."""
    if not options.annotated:
        to_terminal(
            "Sorted by the model alone, which does not see what all its views get wrong; "
            "--annotated FOLDER adds a second opinion"
        )
        return None
    from segmentation.predictors import second_opinion  # scikit-learn takes a second to load

    found = second_opinion(Path(options.annotated), segmenter, torch.get_num_threads())
    if math.isnan(found.error):
        to_terminal("The second opinion's own error is not known: its labels cannot be held out")
    return found


def ranked_lines(found: ranking.Ranking, options: argparse.Namespace) -> list[str]:
    """What was ranked, and which image to look at first: none that is annotated, by its name."""
    folder = Path(options.annotated) / "img" if options.annotated else None
    own = {path.stem for path in list_files(folder, IMAGE_SUFFIXES)} if folder else set()
    names = [row["image"] for row in found.rows]
    known = [n for n in names if own & {Path(n).name, n.replace("/", "__")}]  # as sets name them
    first = next((name for name in names if name not in known), names[0])
    lines = [f"{len(names)} image(s) ranked; least sure of {first}"]
    if known:
        what = f"{len(known)} of them annotated, by their names: {some_names(known)}"
        lines.append(f"{what}; their labels are known, label others")
    return lines


def rank_images(segmenter: Segmenter, options: argparse.Namespace) -> list[str]:
    """``--rank``: write ``ranking.csv`` and ``ranking.png``; returns what cannot be used."""
    out, items = places(segmenter, options)
    field, notes = field_of(segmenter, options, items)
    table, images = Path(options.scales) if options.scales else None, Path(options.rank)
    told = items, images, options.um_per_px, table, scale_by_set(images), OTHER_SCALE
    scales = find_scales(*told, unusable=partial(unusable, gray=segmenter.gray, field=field))
    for line in [*notes, *scales.lines]:
        to_terminal(line)
    with claimed(out):
        found = ranking.rank(segmenter, items, out, field, second_of(segmenter, options))
        if found.rows and group.writes():
            ranked_sheet(out / "ranking.png", found, scales.of)
            for line in ranked_lines(found, options):
                to_terminal(f"{out}: {line}")
    for line in [*(f"Warning: {doubt}" for doubt in found.doubts), *items.left_out]:
        to_terminal(line)
    for line in ranking.agreement_lines(found.rows) if options.masks else ():
        to_terminal(line)
    return items.bad + found.bad


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code: 0, 1 for bad files, 2, 130 or 143."""
    options = parser().parse_args(argv)
    rest = "goes on with the images not done yet" if options.images else "begins again"
    smaller = "a smaller --tile, such as 384"

    def work() -> int:
        with group.joined():
            return run(options)

    return exit_code(work, f"The same command {rest}", smaller)


if __name__ == "__main__":
    sys.exit(main())
