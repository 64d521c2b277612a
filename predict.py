"""Apply a trained model to images without masks: class maps, overlays, measurements.

``python predict.py --weights RUN_OR_FILE --images FOLDER --um_per_px 0.1``; all options: ``-h``.
``--rank FOLDER`` sorts images by how unsure the model is of them, ``--export model.onnx`` (or
``model.pt2``) writes it for other programs. From Python, with NumPy arrays in and out::

    from predict import Segmenter
    segmenter = Segmenter("aluminum_moco/1_0/fine.pt")
    mask = segmenter(image)  # uint8 (H, W) of class ids, of the image's own size
    table = segmenter.measure(mask, um_per_px=0.1)  # one dict per class

Whatever the model needs is read from its file. A model that was trained with ``image_size`` N saw
images resized to N x N and nothing else, so images are resized in the same way here, and the class
probabilities are brought back to the image's own size. That is right as long as the images have the
field of view and the proportions of the training images; for others give ``--resize``. Without
``image_size``, images are predicted as they are, large ones by tiles.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from config import Config, ConfigError
from data import (
    IMAGE_SUFFIXES,
    MEAN,
    SMALLEST_DEVIATION,
    STD,
    DataError,
    Statistics,
    own_statistics,
    parse_name,
    to_input,
)
from metallography import measure, ranking, tiling
from metallography.export import Deployed, Standardized, check_target, export
from metallography.folder import Folder, list_images
from metallography.summary import Item, Terms, warnings
from networks import UNet
from report.page import runs_of, write_report
from utils.checkpoint import CheckpointError, channels_of, load, network_state, norm_of, transfer
from utils.commandline import (
    INTERRUPTED,
    TERMINATED,
    Termination,
    UserError,
    termination_as_interrupt,
)
from utils.device import choose_device
from utils.drawing import class_colours, default_names
from utils.imagefile import resize_image, to_8_bit
from utils.log import to_terminal

Array = NDArray[Any]
Row = dict[str, Any]

DEFAULTS = {"min_px": measure.MINIMUM_PX, "boundary_px": measure.BOUNDARY_PX}
SMALLEST_SIDE = 16  # smaller pictures are continued by their edge pixels


# --- the model ------------------------------------------------------------------------------------


def find_weights(path: str | Path) -> Path:
    """The model file itself, or the ``fine.pt`` (else ``sup.pt``) of a run's folder.

    Raises:
        CheckpointError: there is none, or the folder holds several runs.
    """
    path = Path(path)
    if not path.is_dir():
        return path  # a missing file is reported on loading
    for pattern in ("fine.pt", "sup.pt", "*/fine.pt", "*/sup.pt"):
        found = sorted(path.glob(pattern))
        if len(found) == 1:
            return found[0]
        if found:
            names = ", ".join(str(f.parent.name) for f in found)
            raise CheckpointError(f"{path}: holds several runs ({names}); give one of them")
    raise CheckpointError(f"{path}: no fine.pt or sup.pt in it; give the folder of a finished run")


class Segmenter:
    """A trained model, ready to predict: NumPy in, NumPy out.

    Args:
        weights: ``fine.pt`` or ``sup.pt`` of this or of the published program, or a run's folder.
        device: auto, cpu, cuda, cuda:N or mps.
        resize: images are predicted at N x N; 0: as they are; None: as in training.
        tta: average over the 8 flips and quarter turns (eight times the work).
        tile, overlap: pictures with a side above ``tile`` are cut, see
            ``metallography.tiling``; of a network with GroupNorm every tile is normalised inside
            by itself.

    Attributes:
        num_classes: C.
        mapping: gray value of each class.
        class_names: of class 0 ... C-1.
        colours: uint8 (C, 3).
        resize: as above, never None.
        about: one line on what was loaded.

    Raises:
        CheckpointError, ConfigError: the file or an option cannot be used.
    """

    def __init__(
        self,
        weights: str | Path,
        *,
        device: str = "auto",
        resize: int | None = None,
        tta: bool = False,
        tile: int = tiling.DEFAULT_TILE,
        overlap: int = tiling.DEFAULT_OVERLAP,
    ) -> None:
        self.path = find_weights(weights)
        contents = load(self.path)
        state = network_state(contents, source=self.path)
        self.num_classes, channels = _shapes(state, self.path)
        self.network = UNet(self.num_classes, channels, norm_of(state))
        transfer(self.network, state, prefix="", source=self.path)
        self.digest = _digest(state)
        try:
            self.device = choose_device(device)
        except RuntimeError:  # PyTorch on a name that is no device
            raise ConfigError(
                f"--device: found {device}; give auto, cpu, cuda, cuda:N or mps"
            ) from None
        self.network.eval().to(self.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        settings = contents.get("settings")
        known = isinstance(settings, Mapping)
        values: Mapping[str, Any] = settings if isinstance(settings, Mapping) else {}
        self._describe(values)
        self.standardize = bool(values.get("standardize"))
        trained = int(values.get("image_size") or 0)
        self.resize = trained if resize is None else resize
        _check_number("resize", self.resize, 0, least=SMALLEST_SIDE)
        try:
            tiling.cut_axis(1, tile, overlap)
        except ValueError as error:
            raise ConfigError(f"--{error}") from None
        self.tile, self.overlap, self.tta = tile, overlap, tta
        shown = f"{self.num_classes} classes, channels {' '.join(map(str, channels))}"
        if known:
            how = f"resized to {trained}x{trained}" if trained else "as they are"
            how += ", each standardised" if self.standardize else ""
            self.about = f"{self.path}: {shown}, trained on images {how}"
        else:
            self.about = (
                f"{self.path}: no settings in it; {shown} read from its tensors; if it was trained "
                "on resized images, give --resize"
            )

    def _describe(self, settings: Mapping[str, Any]) -> None:
        """Names, colours and grays of the classes; what the settings lack gets its default."""
        c = self.num_classes
        look = Config(num_classes=c)
        own = {name: settings[name] for name in look.appearance() if name in settings}
        with suppress(ConfigError):  # of another number of classes, or of another program
            look = Config.from_dict({**own, "num_classes": c})
        self.mapping = look.resolved().mapping
        self.class_names = list(look.class_names) or default_names(c)
        self.colours = class_colours(c, look.class_colours)

    def __call__(self, image: Array) -> NDArray[np.uint8]:
        """Class ids, uint8 (H, W), of an image: see ``bands`` for what it may be."""
        pixels = as_pixels(image)
        mask = np.empty(pixels.shape[:2], np.uint8)
        for top, band in self.bands(pixels):
            mask[top : top + band.shape[1]] = band.argmax(axis=0)
        return mask

    def probabilities(self, image: Array) -> NDArray[np.float32]:
        """Class probabilities, float32 (C, H, W)."""
        return np.concatenate([band for _, band in self.bands(image)], axis=1)

    def bands(self, image: Array) -> Iterator[tuple[int, NDArray[np.float32]]]:
        """Class probabilities by rows from the top, so that memory stays bounded.

        Args:
            image: uint8 or uint16, (H, W) or (H, W, 1, 3 or 4), colours as RGB; of any size.

        Yields:
            first row, probabilities (C, rows, W).

        Raises:
            DataError: the array is not of that kind.
        """
        pixels = as_pixels(image)
        height, width = pixels.shape[:2]
        small = resize_image(pixels, self.resize) if self.resize else pixels
        piece = self._piece_of(small)
        predict = tiling.average_symmetries(piece) if self.tta else piece
        bands = tiling.predict_bands(small, predict, self.num_classes, self.tile, self.overlap)
        if self.resize and (height, width) != small.shape[:2]:
            whole = np.concatenate([band for _, band in bands], axis=1)
            bands = tiling.resized_bands(whole, height, width)
        yield from bands

    def _piece_of(self, whole: Array) -> tiling.Predict:
        """Predict pieces of an image (h, w) or (h, w, 3), normalised as the whole image is."""
        own = None
        if self.standardize:
            own = own_statistics(torch.from_numpy(np.array(whole)))
        return partial(self._piece, own=own)

    @torch.inference_mode()
    def _piece(self, pixels: Array, own: Statistics | None = None) -> NDArray[np.float32]:
        """Class probabilities (C, h, w) of pixels (h, w) or (h, w, 3)."""
        height, width = pixels.shape[:2]
        image = torch.from_numpy(np.array(pixels, order="C")).reshape(height, width, -1)
        x = to_input(image.movedim(2, 0).to(self.device), own)[None]
        missing = (0, max(0, SMALLEST_SIDE - width), 0, max(0, SMALLEST_SIDE - height))
        if any(missing):
            x = F.pad(x, missing, mode="replicate")
        logits = self.network(x.contiguous(memory_format=torch.channels_last))
        return logits[0].softmax(dim=0)[:, :height, :width].cpu().numpy()

    def disagreement(self, image: Array) -> NDArray[np.float32]:
        """Maps (3, h, w) of how far the 8 views differ, see ``ranking.disagreement``.

        They are of the size at which the image is predicted.
        """
        pixels = as_pixels(image)
        small = resize_image(pixels, self.resize) if self.resize else pixels
        maps = ranking.disagreement(self._piece_of(small))
        count = len(ranking.MEASURES)
        bands = tiling.predict_bands(small, maps, count, self.tile, self.overlap)
        return np.concatenate([band for _, band in bands], axis=1)

    def export(self, path: str | Path) -> list[str]:
        """Write the model to an .onnx or .pt2 file, checked; returns what to know, in lines.

        Raises:
            UserError: a package is missing, or the file does not predict as PyTorch does.
        """
        network = copy.deepcopy(self.network).cpu().to(memory_format=torch.contiguous_format)

        def reference(pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
            with torch.no_grad():
                image = torch.from_numpy(pixels).movedim(2, 0)
                x = to_input(image, own_statistics(image) if self.standardize else None)
                return network(x[None])[0].softmax(dim=0).numpy()

        about = {
            "classes": self.class_names,
            "mapping": self.mapping,
            "image_size": self.resize,
            "input": "image: float32 (1, 3, H, W), RGB, 0 ... 255",
            "output": "probabilities: float32 (1, C, H, W)",
        }
        deployed = Deployed(network, MEAN, STD)
        if self.standardize:
            deployed = Standardized(network, SMALLEST_DEVIATION)
        made = export(deployed.eval(), Path(path), reference, about, self.resize)
        sides = f"any H and W from {SMALLEST_SIDE} on"
        if made.step > 1:
            rest = f" plus {made.remainder}" if made.remainder else ""
            sides = (
                f"H and W multiples of {made.step}{rest}, from {SMALLEST_SIDE + made.remainder} on "
                f"(PyTorch {torch.__version__} can export no others, a newer one can)"
            )
        size = f"{self.resize}x{self.resize}"
        return [
            f"{path}: {self.num_classes} classes, checked against PyTorch",
            f"input: image, float32 (1, 3, H, W), RGB 0 ... 255 (a gray image three times), "
            f"{sides}; the normalisation is in the model"
            + (", by each image's own mean and deviation" if self.standardize else ""),
            f"output: probabilities, float32 (1, {self.num_classes}, H, W); class: largest",
            *([f"size: resize images to {size} before, as predict.py does"] if self.resize else []),
            *(f"check at {h}x{w}: largest difference {d:.1e}" for h, w, d in made.differences),
        ]

    def measure(
        self,
        mask: Array,
        um_per_px: float | None = None,
        minimum_px: int = measure.MINIMUM_PX,
        grain_classes: Sequence[int] = (),
    ) -> list[Row]:
        """Measure every class of a mask (H, W): one dict per class, ``measure.measure_class``."""
        return measure.measure_mask(mask, self.num_classes, um_per_px, minimum_px, grain_classes)[0]


def _shapes(state: Mapping[str, Tensor], path: Path) -> tuple[int, tuple[int, ...]]:
    """Number of classes, and channels, by the tensors' shapes."""
    if "decode.outc.fc1.weight" not in state:
        raise CheckpointError(
            f"{path}: holds a pretrained network, which knows no classes yet; fine-tune it "
            "(-stages fine) and give fine.pt"
        )
    channels = channels_of(state)
    if len(channels) < 4:
        raise CheckpointError(
            f"{path}: layers of the UNet are missing; give a fine.pt or sup.pt of this program"
        )
    return len(state["decode.outc.fc1.weight"]), channels


def _digest(state: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for key in sorted(state):
        digest.update(key.encode() + state[key].contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def as_pixels(image: Array) -> NDArray[np.uint8]:
    """Check an image array and make it uint8 (H, W) or (H, W, 3); see ``Segmenter.bands``."""
    pixels = np.asarray(image)
    fits = pixels.ndim == 2 or (pixels.ndim == 3 and pixels.shape[2] in (1, 3, 4))
    if not fits or not pixels.size or pixels.dtype not in (np.uint8, np.uint16):
        raise DataError(
            f"image: found {pixels.dtype} {pixels.shape}; give uint8 or uint16, (H, W) or (H, W, 3)"
        )
    if pixels.ndim == 3:
        pixels = pixels[..., 0] if pixels.shape[2] == 1 else pixels[..., :3]
    return pixels if pixels.dtype == np.uint8 else to_8_bit(pixels)


def _check_number(name: str, value: float, *allowed: float, least: float) -> None:
    if value not in allowed and not least <= value < math.inf:
        also = "".join(f"{v} or " for v in allowed)
        raise ConfigError(f"--{name}: found {value}; give {also}a number of at least {least}")


# --- the command line -----------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}; -h lists the options\n")


def read_options(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Options of the command line; exits with code 2 and one line if they cannot be read."""
    parser = _Parser(prog="predict.py", description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--weights", required=True, help="fine.pt or sup.pt, or the folder of a run")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--images", help="predict: folder of images (with sub-folders), or one image")
    what.add_argument("--rank", metavar="IMAGES",
        help="sort images by how far the model's 8 flips and turns of them disagree")  # fmt: skip
    what.add_argument("--export", metavar="FILE",
        help="write the model for other programs: .onnx or .pt2")  # fmt: skip
    add("--out", help="where results go; default: predicted_<images> or ranked_<images> beside "
        "the weights")  # fmt: skip
    add("--masks", help="folder of true masks, to compare with")
    add("--um_per_px", type=float, help="side of a pixel in micrometres; default: sizes in px")
    add("--min_px", type=int, default=measure.MINIMUM_PX, help="smallest particle (%(default)s px)")
    add(
        "--grain_classes",
        type=int,
        nargs="*",
        default=[],
        help="classes whose particles are grains",
    )
    add("--boundary_px", type=float, default=measure.BOUNDARY_PX,
        help="outlines this near agree (%(default)s px)")  # fmt: skip
    add("--resize", type=int, help="predict at N x N; 0: as they are; default: as in training")
    add("--tta", action="store_true", help="average over 8 flips and quarter turns")
    add("--tile", type=int, default=tiling.DEFAULT_TILE, help="largest tile (%(default)s px)")
    add("--overlap", type=int, default=tiling.DEFAULT_OVERLAP,
        help="of tiles (%(default)s px, which makes tiling exact)")  # fmt: skip
    add("--probabilities", action="store_true", help="also write them: .npy, float16 (H, W, C)")
    add("--particles", action="store_true", help="also write particles.csv, a line per particle")
    add("--report", action="store_true",
        help="also write report.html: the model's experiment and its measurements")  # fmt: skip
    add("--overwrite", action="store_true", help="predict again what is done")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps")
    add("--threads", type=int, default=0, help="CPU threads; 0: PyTorch's choice")
    return parser.parse_args(argv)


def check_options(o: argparse.Namespace, num_classes: int) -> None:
    """Raise ConfigError, a line for the first option out of range."""
    if o.um_per_px is not None and not 0 < o.um_per_px < math.inf:
        raise ConfigError(f"--um_per_px: found {o.um_per_px}; give a number above 0, such as 0.1")
    _check_number("min_px", o.min_px, least=1)
    _check_number("boundary_px", o.boundary_px, least=0)
    for c in o.grain_classes:
        if not 0 <= c < num_classes:
            raise ConfigError(f"--grain_classes: found {c}; classes are 0 ... {num_classes - 1}")
    if o.masks and not Path(o.masks).is_dir():
        raise ConfigError(f"--masks: {o.masks} is no folder; give the folder of the true masks")


# What ``--rank`` and ``--export`` do not look at: given all the same, a result would be missing.
MEASURING = ("um_per_px", "min_px", "grain_classes", "boundary_px", "probabilities", "particles")
OF_NO_EFFECT = {
    "rank": (*MEASURING, "report"),
    "export": ("out", "masks", *MEASURING, "report"),
}


def check_together(o: argparse.Namespace) -> None:
    """Raise ConfigError, a line for each option that what was asked for has no use for."""
    what = "rank" if o.rank else "export" if o.export else ""
    lines = [
        f"--{name}: of no effect with --{what}; leave it out"
        for name in OF_NO_EFFECT.get(what, ())
        if getattr(o, name) not in (None, False, [], DEFAULTS.get(name))
    ]
    if o.threads < 0:
        lines.append(f"--threads: found {o.threads}; give 0 or a number of at least 1")
    if lines:
        raise ConfigError("\n".join(lines))


def run(options: argparse.Namespace) -> int:
    """Predict, rank or export; returns 0, or 1 if some files could not be used."""
    check_together(options)
    if options.threads > 0:
        torch.set_num_threads(options.threads)
    # Pillow takes pictures above 180 megapixels for an attack; here they are micrographs.
    Image.MAX_IMAGE_PIXELS = None
    o = options
    if o.export:
        check_target(Path(o.export))
        if o.tta:
            raise ConfigError("--tta: is no part of an exported model; leave it out")
    segmenter = Segmenter(
        o.weights, device=o.device, resize=o.resize, tta=o.tta, tile=o.tile, overlap=o.overlap
    )
    check_options(o, segmenter.num_classes)
    to_terminal(segmenter.about)
    if o.export:
        for line in segmenter.export(o.export):
            to_terminal(line)
        return 0
    return rank_images(segmenter, o) if o.rank else predict_images(segmenter, o)


def _places(
    s: Segmenter, images: str, o: argparse.Namespace
) -> tuple[Path, Path | None, list[Item]]:
    """Output folder, folder of true masks, images."""
    name = Path(images).resolve().name or "images"
    kind = "ranked" if o.rank else "predicted"
    out = Path(o.out or s.path.parent / f"{kind}_{name}")
    masks = Path(o.masks) if o.masks else None
    for flag, given in (("rank" if o.rank else "images", Path(images)), ("masks", masks)):
        if given and given.is_dir() and out.resolve() == given.resolve():
            raise ConfigError(
                f"--out: found {out}, the folder of --{flag}, which results would be mixed up with;"
                " give a folder of its own"
            )
    return out, masks, list_images(images, IMAGE_SUFFIXES, [out, *([masks] if masks else [])])


def predict_images(segmenter: Segmenter, o: argparse.Namespace) -> int:
    """``--images``: predict and measure; returns the exit code."""
    out, masks, items = _places(segmenter, o.images, o)
    experiment = _experiment(segmenter, out) if o.report else None
    folder = Folder(
        segmenter,
        Path(o.images),
        items,
        out,
        masks=masks,
        terms=Terms(o.um_per_px, o.min_px, o.boundary_px, tuple(o.grain_classes)),
        batch_of=_batch_of,
        probabilities=o.probabilities,
        particles=o.particles,
        overwrite=o.overwrite,
    )
    results = folder.run()
    for line in warnings(segmenter, results):
        to_terminal(line.removeprefix("- "))
    fresh, old = results.predicted, results.skipped
    to_terminal(f"{out}: {fresh} image(s) predicted, {old} were done already")
    if experiment:
        to_terminal(f"Report: {write_report(experiment)}")
    return _report_bad(results.bad)


def _experiment(segmenter: Segmenter, out: Path) -> Path:
    """The folder that the report is about: of all runs of the model's experiment."""
    run = segmenter.path.resolve().parent
    if run not in runs_of(run.parent):
        raise ConfigError(
            f"--report: {segmenter.path} is not in the folder of a run, and the report is about "
            "runs; leave --report out, or give a run as --weights"
        )
    if out.resolve().parent not in (run, run.parent):
        raise ConfigError(
            f"--report: found --out {out}; the report shows what lies in {run.parent} or in its "
            "runs, so leave --out out"
        )
    return segmenter.path.parent.parent


def rank_images(segmenter: Segmenter, o: argparse.Namespace) -> int:
    """``--rank``: write ``ranking.csv`` and ``ranking.png``; returns the exit code."""
    out, masks, items = _places(segmenter, o.rank, o)
    rows, bad = ranking.rank(segmenter, Path(o.rank), items, out, masks, _batch_of)
    if rows:
        to_terminal(f"{out}: {len(rows)} image(s) ranked; least sure of {rows[0]['image']}")
    for line in ranking.agreement_lines(rows) if masks else ():
        to_terminal(line)
    return _report_bad(bad)


def _batch_of(stem: str) -> str:
    return parse_name(stem)[0]


def _report_bad(bad: Sequence[str]) -> int:
    """Name the files that could not be used; returns 1 if there are any."""
    if bad:
        print(f"{len(bad)} file(s) could not be used:", file=sys.stderr)
        print("\n".join(bad), file=sys.stderr)
    return 1 if bad else 0


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code: 0, 1 for bad files, 2 for bad options, 130."""
    options = read_options(argv)
    try:
        with termination_as_interrupt():
            return run(options)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    except OSError as error:
        where = error.filename or options.out or "the output folder"
        print(f"{where}: {error.strerror or error}; give an --out to write to", file=sys.stderr)
        return 2
    except (MemoryError, torch.cuda.OutOfMemoryError):
        print(
            f"--tile: out of memory with {options.tile}; give a smaller one, such as 384",
            file=sys.stderr,
        )
        return 2
    except KeyboardInterrupt as stop:
        print("Stopped. The same command goes on with the images not done yet.", file=sys.stderr)
        return TERMINATED if isinstance(stop, Termination) else INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
