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
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch

from annotation.outlines import outlines, to_geojson, to_rois
from config import ConfigError
from imaging.drawing import overview, save_picture
from imaging.imagefile import read_mask
from metallography import ranking
from metallography.export import check_target
from metallography.folder import TABLES, Folder, Item, list_images
from metallography.measure import BOUNDARY_PX
from metallography.particles import MINIMUM_PX
from metallography.segmenter import Segmenter, check_number
from metallography.summary import warnings, write_tables
from metallography.tiling import DEFAULT_OVERLAP, DEFAULT_TILE
from report.page import experiment_of, write_report
from report.sheets import predicted_sheet
from utils.commandline import Parser, complain, exit_code
from utils.files import replace_file
from utils.log import to_terminal
from utils.workbook import write_workbook

WORKBOOK = "measurements.xlsx"
# Options that a task ignores; they are refused, because a result would be missing.
MEASURING = ("um_per_px", "min_px", "grain_classes", "connectivity", "boundary_classes",
             "boundary_px", "probabilities", "particles")  # fmt: skip
OF_NO_EFFECT: dict[str, tuple[str, ...]] = {
    "images": (),
    "rank": (*MEASURING, "report", "outlines", "xlsx"),
    "export": ("out", "masks", "tta", *MEASURING, "report", "outlines", "xlsx"),
}


def parser() -> argparse.ArgumentParser:
    """The options; what cannot be read ends the program with one line and exit code 2."""
    made = Parser(prog="predict.py", description=(__doc__ or "").splitlines()[0])
    add = made.add_argument
    add("--weights", required=True, help="fine.pt or sup.pt, or the folder of a finished run")
    task = made.add_mutually_exclusive_group(required=True).add_argument
    task("--images", help="predict and measure: a folder of images with sub-folders, or one image")
    task("--rank", metavar="IMAGES", help="sort images by how much the model's predictions of "
         "their 8 flips and turns disagree")  # fmt: skip
    task("--export", metavar="FILE", help="write the model for other programs: .onnx or .pt2")
    add("--out", help="folder of the results; default: predicted_<images> or ranked_<images>, "
        "beside the weights")  # fmt: skip
    add("--masks", help="folder of true masks to compare the predictions with")
    add("--um_per_px", type=float, help="micrometres per pixel; default: all lengths in pixels")
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
        help="pixels that tiles share (%(default)s: tiling is exact)")  # fmt: skip
    add("--probabilities", action="store_true", help="write them too: .npy, float16 (H, W, C)")
    add("--particles", action="store_true", help="write particles.csv too, a line per particle")
    add("--outlines", choices=("geojson", "roi"), help="write the outlines of all particles too: "
        "GeoJSON (QuPath), or RoiSet.zip (ImageJ, Fiji)")  # fmt: skip
    add("--xlsx", action="store_true", help="write the tables as one Excel workbook too")
    add("--report", action="store_true", help="write report.html too: the page on the "
        "model's experiment, with these measurements")  # fmt: skip
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
    segmenter = Segmenter(options.weights, **how)
    to_terminal(segmenter.about)
    if options.export:
        to_terminal("\n".join(segmenter.export(options.export)))
        return 0
    bad = (rank_images if options.rank else predict_images)(segmenter, options)
    return complain(f"{len(bad)} file(s) could not be used:\n" + "\n".join(bad), 1) if bad else 0


def places(segmenter: Segmenter, options: argparse.Namespace) -> tuple[Path, list[Item]]:
    """The folder of the results, and the images; UserError if one folder would hold both."""
    flag, kind = ("rank", "ranked") if options.rank else ("images", "predicted")
    images = Path(options.rank or options.images)
    masks = Path(options.masks) if options.masks else None
    if masks and not masks.is_dir():
        raise ConfigError(f"--masks: {masks} is no folder; give the folder of the true masks")
    default = segmenter.path.parent / f"{kind}_{images.resolve().name or 'images'}"
    out = Path(options.out or default)
    for name, folder in ((flag, images), ("masks", masks)):
        if folder and folder.is_dir() and out.resolve() == folder.resolve():
            raise ConfigError(f"--out: found {out}, the folder of --{name}; give another folder")
    return out, list_images(images, out, masks)


def predict_images(segmenter: Segmenter, options: argparse.Namespace) -> list[str]:
    """``--images``: predict, measure, draw; returns a line for each file that cannot be used."""
    out, items = places(segmenter, options)
    experiment = experiment_of(segmenter.path, out) if options.report else None
    terms = {name: getattr(options, name) for name in MEASURING}
    folder = Folder(segmenter, items, out, overwrite=options.overwrite, **terms)
    folder.run()
    write_tables(folder)
    write_outlines(folder, options.outlines)
    written = write_workbook(out / WORKBOOK, tables_of(out)) if options.xlsx else []
    predicted_sheet(folder)
    for line in [*warnings(folder), *written]:
        to_terminal(line)
    to_terminal(f"{out}: {folder.predicted} image(s) predicted, {folder.skipped} were done already")
    if experiment:
        to_terminal(f"Report: {write_report(experiment)}")
    return folder.bad


def write_outlines(folder: Folder, kind: str | None) -> None:
    """Write each image's outlines as ``kind``, geojson or roi, into ``outlines``; None: nothing."""
    names, colours = folder.segmenter.class_names, folder.segmenter.colours.tolist()
    for image in folder.done if kind else ():
        found = outlines(read_mask(folder.file("classes", image.item)))
        text = to_geojson if kind == "geojson" else to_rois
        path = folder.file("outlines", image.item, ".geojson" if kind == "geojson" else ".zip")
        replace_file(path, text(found, names, colours), "--out", durable=False)


def tables_of(out: Path) -> dict[str, Path]:
    """The CSV files of a folder of results, by the name that their sheet gets."""
    return {
        path.stem: path
        for path in (out / name for name in TABLES)
        if path.suffix == ".csv" and path.is_file()
    }


def rank_images(segmenter: Segmenter, options: argparse.Namespace) -> list[str]:
    """``--rank``: write ``ranking.csv`` and ``ranking.png``; returns what cannot be used."""
    out, items = places(segmenter, options)
    found = ranking.rank(segmenter, items, out)
    if found.rows:
        sheet = overview(found.pictures, found.titles, ranking.HEADING)
        save_picture(out / "ranking.png", sheet, "--out")
        first = found.rows[0]["image"]
        to_terminal(f"{out}: {len(found.rows)} image(s) ranked; least sure of {first}")
    for line in ranking.agreement_lines(found.rows) if options.masks else ():
        to_terminal(line)
    return found.bad


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code: 0, 1 for bad files, 2, 130 or 143."""
    options = parser().parse_args(argv)
    rest = "goes on with the images not done yet" if options.images else "begins again"
    smaller = "a smaller --tile, such as 384"
    return exit_code(partial(run, options), f"The same command {rest}", smaller)


if __name__ == "__main__":
    sys.exit(main())
