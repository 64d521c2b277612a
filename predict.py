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
import hashlib
import json
import math
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from utils import leave_while_loading

if __name__ == "__main__":  # before the imports that take seconds
    leave_while_loading()

import torch

from annotation.outlines import SUFFIX, packed
from config import ConfigError
from dataset.set_file import NAME, set_of
from imaging.drawing import class_colours, default_names
from imaging.field import FieldRule, read_crop
from imaging.imagefile import read_header, read_image, read_mask, reading_of
from imaging.listing import names_of, some_names
from metallography import ranking
from metallography.export import check_target
from metallography.folder import Folder
from metallography.items import Item, Items, digest_of, list_images
from metallography.measure import BOUNDARY_PX
from metallography.particles import MINIMUM_PX, SCALES_UM, unit_of
from metallography.scales import Scales, find_scales
from metallography.segmenter import Segmenter, check_number
from metallography.summary import is_share, phases_csv, warnings, words, write_tables
from metallography.tiling import DEFAULT_OVERLAP, DEFAULT_TILE
from report.laboratory import Told, page_name, place_of, sample_of, write_laboratory
from report.page import experiment_of, write_report
from report.sheets import predicted_sheet, ranked_sheet
from report.workbook import WORKBOOK, tables_of, write_workbook
from utils.commandline import Parser, UserError, complain, exit_code
from utils.files import (
    IMAGE_SUFFIXES,
    MOST_BYTES,
    DataError,
    confined,
    cut_name,
    leads_out,
    list_files,
    remove_leftovers,
    replace_file,
    writing,
)
from utils.log import to_terminal
from utils.ranks import group
from utils.run_folder import locked

ABOUT = "Apply a trained model to images without masks: class maps, overlays, measurements."

# Options that a task ignores; they are refused, because a result would be missing.
MEASURING = ("min_px", "grain_classes", "connectivity", "boundary_classes", "boundary_px",
             "probabilities", "particles")  # fmt: skip
SCALED = ("um_per_px", "scales", "resample")
OTHER_SCALE = "rank those of one magnification at a time"
OF_NO_EFFECT: dict[str, tuple[str, ...]] = {
    "images": ("annotated",),
    "rank": (*MEASURING, "resample", "report", "outlines", "xlsx", "sample"),
    "export": (
        "out",
        "masks",
        "crop",
        "roi",
        "tta",
        "annotated",
        *MEASURING,
        *SCALED,
        "report",
        "outlines",
        "xlsx",
        "sample",
    ),
}


def parser() -> argparse.ArgumentParser:
    """The options; what cannot be read ends the program with one line and exit code 2."""
    made = Parser(prog="predict.py", description=ABOUT)
    add = made.add_argument
    add("--weights", required=True, help="fine.pt or sup.pt, or the folder of a finished run")
    task = made.add_mutually_exclusive_group(required=True).add_argument
    task("--images", help="predict and measure: a folder of images with sub-folders, or one image")
    task("--rank", metavar="IMAGES", help="sort images by how much the model's predictions of "
         "their 8 flips and turns disagree; with --annotated by their doubt")  # fmt: skip
    task("--export", metavar="FILE", help="write the model for other programs: .onnx or .pt2")
    add("--out", help="folder of the results; default: predicted_<images> or ranked_<images>, "
        "beside the weights (of the folder img of a set predicted_<set>_<split>_img)")  # fmt: skip
    add("--masks", help="folder of true masks to compare the predictions with")
    add("--annotated", help="with --rank: the annotated images of the model, a folder with img and "
        "gt; a pixel classifier that learns them gives a second opinion")  # fmt: skip
    add("--crop", help="pixels that are cut off before prediction: top,bottom,left,right; default: "
        "as the training images were cut")  # fmt: skip
    add("--roi", help="folder of masks of the region of interest, named as the images: what is 0 "
        "in them is not measured")  # fmt: skip
    add("--um_per_px", type=float, help="micrometres per pixel; default: as the files say, else "
        "all lengths in pixels")  # fmt: skip
    add("--scales", help="a CSV file of scales for single images, which count before --um_per_px: "
        "file,um_per_px")  # fmt: skip
    add("--resample", type=float, metavar="UM", help="show all images to the network at UM "
        "micrometres per pixel; results stay at the images' own size")  # fmt: skip
    add("--min_px", type=int, default=MINIMUM_PX, help="smallest particle (%(default)s pixels)")
    add("--connectivity", type=int, help="pixels of one particle touch by a side (4) or also by a "
        "corner (8); default: 4 for grain classes, 8 for all others")  # fmt: skip
    add("--grain_classes", type=int, nargs="*", default=[], metavar="CLASS",
        help="classes whose particles are grains: an ASTM grain-size number is given")  # fmt: skip
    add("--boundary_classes", type=int, nargs="*", metavar="CLASS", help="classes that are "
        "boundaries of the grains; default: every class that is no grain class")  # fmt: skip
    add("--boundary_px", type=float, default=BOUNDARY_PX,
        help="with --masks: outlines this close agree (%(default)s px)")  # fmt: skip
    add("--resize", type=int, help="predict at N x N pixels, 0: as they are; default: as trained")
    add("--tta", action="store_true", help="average over 8 flips and quarter turns")
    add("--tile", type=int, default=DEFAULT_TILE, help="largest side of a tile (%(default)s px)")
    add("--overlap", type=int, default=DEFAULT_OVERLAP,
        help="pixels that tiles share (%(default)s: tiling of a UNet is exact)")  # fmt: skip
    add("--probabilities", action="store_true", help="write them too: .npy, float16 (H, W, C)")
    add("--particles", action="store_true", help="write particles.csv too, a line per particle")
    add("--outlines", choices=("geojson", "roi"), help="write the outlines of all particles too: "
        "GeoJSON (QuPath), or RoiSet.zip (ImageJ, Fiji)")  # fmt: skip
    add("--xlsx", action="store_true", help="write the tables as one Excel workbook too")
    add("--sample", default="", help="what the images show, for the head of report.html; default: "
        "the name of their folder, of a folder img of that above")  # fmt: skip
    add("--report", action="store_true", help="write the page on the model's "
        "experiment too, with these measurements")  # fmt: skip
    add("--overwrite", action="store_true", help="predict again the images that are done")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps")
    add("--threads", type=int, default=0, help="CPU threads; 0: as many as PyTorch chooses")
    return made


def run(options: argparse.Namespace) -> int:
    """Predict, rank or export; returns 0, or 1 if some files could not be used."""
    task = "export" if options.export else "rank" if options.rank else "images"
    default = parser().get_default
    lines = [
        f"--{name}: of no effect with --{task}; leave it out"
        for name in OF_NO_EFFECT[task]
        if getattr(options, name) != default(name)
    ]
    if lines:
        raise ConfigError("\n".join(lines))
    check_number("threads", options.threads, 0, least=1)
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.export:
        check_target(Path(options.export))
    how = {name: getattr(options, name) for name in ("device", "resize", "tta", "tile", "overlap")}
    check_weights(Path(options.weights))
    segmenter = Segmenter(options.weights, **how)
    to_terminal(segmenter.about)
    if options.export:
        to_terminal("\n".join(group.by_writer(lambda: segmenter.export(options.export))))
        return 0
    bad = (rank_images if options.rank else predict_images)(segmenter, options)
    if not group.writes():
        return int(bool(bad))
    return complain(f"{len(bad)} file(s) could not be used:\n" + "\n".join(bad), 1) if bad else 0


def check_weights(weights: Path) -> None:
    """Say why there is no network in a folder of ``segment.py`` that has none; UserError."""
    if weights.exists():
        return
    # Here, as scikit-learn takes a second to load.
    from segmentation.answers import Answers
    from segmentation.predictors import FOREST

    if Answers(weights.parent).by == FOREST:
        raise UserError(
            f"{weights}: not written, because the {FOREST} answered there and no network; add the "
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
    return out, list_images(images, out, masks)


@contextmanager
def claimed(out: Path) -> Iterator[None]:
    """Lock the folder of the results, and remove what a killed process left there."""
    if not group.writes():  # rank 0 does
        with confined(out):
            yield
        return
    with locked(out, flag="--out", work="predicting", other="--out"):
        remove_leftovers(out)
        yield


def field_rule(
    segmenter: Segmenter, options: argparse.Namespace, items: Sequence[Item]
) -> tuple[FieldRule, list[str]]:
    """Which part of each image counts, and lines on it: by flags, the images' set, the model."""
    images = Path(options.rank or options.images)
    roi = Path(options.roi) if options.roi else None
    if roi and not roi.is_dir():
        raise ConfigError(f"--roi: {roi} is no folder; give the folder of the masks")
    known, own = set_of(images), segmenter.crop
    if options.crop is not None:
        crop, lines = read_crop(options.crop), []
        if any(own) and crop != own and not known:
            lines = [f"Warning: --crop {crop} where the training images were cut by {own}; "
                     f"{crop} is used"]  # fmt: skip
        return FieldRule(crop, roi=roi), lines + cut_lines(FieldRule(crop), items)
    if known or not any(own):  # the images of a prepared set are cut already
        return FieldRule(roi=roi), []
    said = "as the training images were; --crop 0,0,0,0 cuts nothing"
    rule = FieldRule(own, frozenset(segmenter.cropped_sizes), roi)
    return rule, [f"{line}, {said}" for line in cut_lines(rule, items)]


def cut_lines(rule: FieldRule, items: Sequence[Item]) -> list[str]:
    """What is cut off which of the images: some may have been cut before."""
    if not any(rule.crop):
        return []
    sizes = [size_of(item) for item in items] if rule.cropped_sizes else []
    known = [size for size in sizes if size is not None]
    cut = sum(any(rule.crop_of(size)) for size in known)
    which = "each image" if cut == len(known) else f"{cut} of {len(known)} images"
    before = "" if cut == len(known) else " (the others have the size of images that were cut)"
    return [f"Cut off {which}{before}: {rule.crop.words()}"]


def size_of(item: Item) -> tuple[int, int] | None:
    """Height and width of an image, by its header where that tells them; None: it is unusable."""
    with suppress(DataError):
        header = None if reading_of(item.path, item.page) else read_header(item.path)
        height, width = (header or read_image(item.path, page=item.page).shape)[:2]
        return height, width
    return None


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


def find_all_scales(segmenter: Segmenter, options: argparse.Namespace, items: Items) -> Scales:
    """The scale of each image; ConfigError if the flags do not go together."""
    images, known = Path(options.images), set_of(Path(options.images))
    unit_of(options.um_per_px)
    table = Path(options.scales) if options.scales else None
    of_set = known.scale_of if known else lambda name: None
    scales = find_scales(items, images, options.um_per_px, table, of_set)
    if options.resample is not None:
        least, most = SCALES_UM
        if not least <= options.resample <= most:
            raise ConfigError(f"--resample: found {options.resample}; give micrometres per pixel")
        if segmenter.resize:
            size = f"{segmenter.resize}x{segmenter.resize}"
            raise ConfigError(f"--resample: the model sees images at {size}; give --resize 0 too")
        if None in scales.of.values():
            name = next(name for name, um in scales.of.items() if um is None)
            raise ConfigError(f"--resample: the pixel size of {name} is not known; give --scales")
    return scales


def predict_images(segmenter: Segmenter, options: argparse.Namespace) -> list[str]:
    """``--images``: predict, measure, draw; returns a line for each file that cannot be used."""
    out, items = places(segmenter, options)
    experiment = experiment_of(segmenter.path, out) if options.report else None
    terms = {name: getattr(options, name) for name in MEASURING}
    field, notes = field_rule(segmenter, options, items)
    scales = find_all_scales(segmenter, options, items)
    notes += [*take_names(segmenter, Path(options.images)), *scales.lines]
    for line in notes:
        to_terminal(line)
    how: dict[str, Any] = {"field": field, "scales": scales.of, "resample": options.resample or 0.0}
    images = Path(options.images).resolve()
    how["images"] = images.parent if images.is_file() else images
    with claimed(out):
        how["replaces"] = ["summary.md", "sheet.png", page_name(out)]
        how["replaces"] += [WORKBOOK] if options.xlsx else []
        folder = Folder(segmenter, items, out, overwrite=options.overwrite, **how, **terms)
        folder.bad, folder.left_out = list(items.bad), items.left_out
        folder.notes = notes
        folder.predict_shared()
        return group.by_writer(lambda: measure_images(folder, options, experiment))


def measure_images(
    folder: Folder, options: argparse.Namespace, experiment: Path | None
) -> list[str]:
    """Predict what is not done, measure and write all tables and pages; see ``predict_images``."""
    out = folder.out
    folder.run()
    folder.warned = [] if options.xlsx else remove_workbook(folder)
    write_tables(folder)
    written = write_outlines(folder, options.outlines) + remove_outlines(folder, options.outlines)
    if options.xlsx:
        sheets = tables_of(out, phases=phases_csv(folder))
        written += write_workbook(out / WORKBOOK, sheets, words, is_share)
        digest = hashlib.sha256((out / WORKBOOK).read_bytes()).hexdigest()
        folder.record.add({"name": "", "workbook": digest})
    predicted_sheet(folder)
    page = write_laboratory(folder, told(folder, options))
    for line in [*warnings(folder), *written]:
        to_terminal(line)
    to_terminal(f"{out}: {folder.predicted} image(s) predicted, {folder.skipped} were done already")
    to_terminal(f"Report: {page}")
    if experiment:
        to_terminal(f"Report on the experiment: {write_report(experiment)}")
    folder.record.finish()
    return folder.bad


def told(folder: Folder, options: argparse.Namespace) -> Told:
    """What the page of a prediction has to be told: the sample, and which images look odd."""
    names = folder.segmenter.class_names
    odd = ranking.outlying(ranking.fractions_of(folder.rows, len(names)), names)
    sample = options.sample or sample_of(Path(options.images))
    marks = {image: "; ".join(reasons) for image, reasons in odd.items()}
    by = f"the network {folder.segmenter.path}" if isinstance(folder.segmenter, Segmenter) else ""
    return Told(sample, by=by, marks=marks, place=place_of(Path(options.images)))


def write_outlines(folder: Folder, kind: str | None) -> list[str]:
    """Write each image's outlines as ``kind``, geojson or roi, into ``outlines``; None: nothing.

    A file that is not as this program wrote it is left, unless all is overwritten: returns lines.
    """
    names, colours = folder.segmenter.class_names, folder.segmenter.colours.tolist()
    kept: list[str] = []
    for image in folder.done if kind else ():
        classes = folder.file("classes", image.item)
        path = folder.file("outlines", image.item, SUFFIX[kind or ""])
        try:
            found = packed(read_mask(classes), kind or "", names, colours)
        except DataError as error:
            folder.bad.append(f"{path}: {error}")
            continue
        before, own = path.read_bytes() if path.is_file() else found, hashlib.sha256(found)
        known = folder.record.done[image.item.name]
        written, of = known.get("outlines", {}), known.get("outlined", {})
        foreign = before != found and hashlib.sha256(before).hexdigest() != written.get(kind)
        if foreign and not folder.overwrite:
            kept.append(path.as_posix())
            continue
        replace_file(path, found, "--out", durable=False)
        now = {"outlines": written | {kind: own.hexdigest()}}
        now["outlined"] = of | {kind: outlined(folder, image.item)}
        if not now.items() <= known.items():
            folder.record.add(known | now)
    cure = "left as they are; --overwrite writes them anew"
    what = f"{len(kept)} file(s) of outlines differ from their class maps: {some_names(kept)}"
    return [f"Warning: {what}; {cure}"] if kept else []


def outlined(folder: Folder, item: Item) -> str:
    """A digest of what decides an image's outlines: its class map, by the record, and classes."""
    looks = folder.segmenter.class_names, folder.segmenter.colours.tolist()
    entry = folder.record.done[item.name]
    drawn = entry.get("drawn", entry.get("map"))  # of an early version neither
    of = json.dumps([drawn or digest_of(read_mask(folder.file("classes", item))), *looks])
    return hashlib.sha256(of.encode()).hexdigest()


def remove_outlines(folder: Folder, kind: str | None) -> list[str]:
    """Remove this program's outlines of class maps that are no more, but of ``kind``; lines.

    What a user saved there stays.
    """
    names, colours = folder.segmenter.class_names, folder.segmenter.colours.tolist()
    gone: list[str] = []
    for item, *_ in folder.done:
        known = folder.record.done[item.name]
        written = known.get("outlines", {})
        for other in sorted(written.keys() & SUFFIX.keys() - {kind}):
            path = folder.file("outlines", item, SUFFIX[other])
            before = path.read_bytes() if path.is_file() else b""
            own = hashlib.sha256(before).hexdigest() == written[other]
            if not own or leads_out(path, folder.out):
                continue
            of, now = known.get("outlined", {}), outlined(folder, item)
            if of.get(other) == now:
                continue
            # Of an earlier version without that digest, or of another class map.
            if packed(read_mask(folder.file("classes", item)), other, names, colours) != before:
                path.unlink()
                gone.append(path.as_posix())
                continue
            known = known | {"outlined": of | {other: now}}
            folder.record.add(known)
    what = f"{len(gone)} file(s) of outlines of earlier class maps removed: {some_names(gone)}"
    return [f"{what}; --outlines writes new ones"] if gone else []


def remove_workbook(folder: Folder) -> list[str]:
    """Remove the workbook of an earlier run; a line if it is not known to be this program's."""
    path = folder.out / WORKBOOK
    if not path.is_file():
        return []
    own = folder.record.done.get("", {}).get("workbook")
    if hashlib.sha256(path.read_bytes()).hexdigest() == own:
        with writing(path, "--out"):
            path.unlink()
        return []
    why = "not as this program wrote it" if own else "of an earlier version, or your own"
    what = f"{path}: {why}, so it is left; its numbers may be of an earlier run"
    return [f"{what}: --xlsx replaces it"]


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
    field, notes = field_rule(segmenter, options, items)
    known = set_of(Path(options.rank))
    table = Path(options.scales) if options.scales else None
    of_set = known.scale_of if known else lambda name: None
    scales = find_scales(items, Path(options.rank), options.um_per_px, table, of_set, OTHER_SCALE)
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
