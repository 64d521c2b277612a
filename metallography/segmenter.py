"""A trained network, ready to predict: images in, maps of classes out, as NumPy arrays.

A network trained with ``image_size`` N has seen only images resized to N x N. Images are therefore
resized likewise, and the probabilities brought back to the image's own size. Images whose field of
view or proportions differ from the training images' need another ``resize``. Without
``image_size``, images are predicted as they are, large ones by tiles.
"""

from __future__ import annotations

import copy
import hashlib
import math
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from config import Config, ConfigError
from data import Statistics, own_statistics, to_input
from encoders import make_encoder
from imaging.drawing import class_colours, default_names
from imaging.field import SMALLEST_SIDE, Crop, resized_field
from imaging.gray_range import Conversion, conversion_of
from imaging.store import resize_image
from metallography import export, measure, tiling
from metallography.particles import MINIMUM_PX, Array, Row
from metallography.tiling import Floats
from networks import UNet
from utils.checkpoint import (
    UNET,
    CheckpointError,
    channels_of,
    encoder_of,
    load,
    network_state,
    norm_of,
    settings_in,
    transfer,
)
from utils.device import arithmetic, choose_device, upload
from utils.files import DataError
from utils.metrics import IGNORED

LARGEST_RESIZED = 16384  # side in pixels to which an image is resized at most
MODEL = "model.pt"  # of segment.py
ONE_VIEW = (
    f"The file predicts one view of an image; segment.py and predict.py average over {tiling.VIEWS}"
    " flips and quarter turns with this model, so their class maps differ from the file's a little"
)


def find_weights(path: str | Path) -> Path:
    """The model file itself, or the ``fine.pt`` (else ``sup.pt``) of a run's folder.

    In the folder of ``segment.py`` it is ``model.pt``, its answer. CheckpointError if there is
    none, or the folder holds several runs.
    """
    path = Path(path)
    if not path.is_dir():
        return path  # a missing one is reported on loading
    for pattern in ("fine.pt", "sup.pt", MODEL, "*/fine.pt", "*/sup.pt"):
        found = sorted(path.glob(pattern))
        if len(found) == 1:
            return found[0]
        if found:
            names = ", ".join(str(f.parent.name) for f in found)
            raise CheckpointError(f"{path}: holds several runs ({names}); give one of them")
    raise CheckpointError(
        f"{path}: no fine.pt, sup.pt or {MODEL} in it; give the folder of a finished run"
    )


@dataclass(frozen=True)
class Certainty:
    """How sure a predictor is of the image that it has just predicted."""

    unsure: float  # 1 - the probability of the likeliest class, mean of the pixels that count
    uncertain: NDArray[np.uint8]  # the same of each pixel (H, W), 255 for 1
    votes: float  # mean vote disagreement of the 8 views (``tiling``); nan of one view


Bands = Generator[tuple[int, Floats], None, Certainty | None]
"""(First row, class probabilities (C, rows, W)) from the top; returns how sure they are, or None
of a predictor that nobody asks: see ``PredictedBands``."""


class PredictedBands:
    """The bands of an image, to be read once; then ``certainty`` is what they returned."""

    def __init__(self, bands: Bands) -> None:
        self._bands = bands
        self.certainty: Certainty | None = None

    def __iter__(self) -> Iterator[tuple[int, Floats]]:
        self.certainty = yield from self._bands


class Predictor(Protocol):
    """What predicts the images of a folder: a ``Segmenter``, or what acts like one."""

    about: str
    digest: str
    num_classes: int
    class_names: list[str]
    mapping: tuple[int, ...]
    colours: Array
    resize: int
    reduce: int  # whole factor by which images are reduced before; class maps have their own size
    tta: bool
    tile: int
    overlap: int
    sight: tiling.Sight
    gray: Conversion
    um_per_px: tuple[float, float] | None
    ignore_label: int

    def bands(self, image: Array, inside: Array | None = None, factor: float = 1.0) -> Bands:
        """See ``Segmenter.bands``."""
        ...


class Segmenter:
    """A trained model, ready to predict: NumPy in, NumPy out.

    ``weights`` is ``fine.pt`` or ``sup.pt`` of this or of the published program, or a run's folder;
    ``device`` is auto, cpu, cuda, cuda:N or mps. Images are predicted at ``resize`` x ``resize``
    pixels (0: as they are, None: as in training), with ``tta`` as the average over 8 flips and
    quarter turns (eight times the work; None: if ``segment.py`` did so with this model, as its file
    says, so that results are those of ``segment.py``). Sides above ``tile`` pixels are cut, see
    ``metallography.tiling``; a network with GroupNorm then normalises by each tile's statistics,
    and one with an encoder from ImageNet sees farther than tiles overlap.

    It has ``path``, ``about`` and ``digest`` (the file loaded, a line on it, a checksum of its
    tensors), ``num_classes`` C and, of class 0 ... C-1, ``class_names``, ``mapping`` (gray values)
    and ``colours`` (RGB, uint8 (C, 3)). ``gray`` makes 8 bits of images with more, as in training.
    Of the training images it knows ``crop`` (what was cut off them; not cut here),
    ``cropped_sizes`` (height and width after that), ``um_per_px`` (smallest and largest, or None)
    and ``ignore_label`` (of their masks); of ``segment.py`` the ``views`` over which it averaged
    (1 or 8). UserError if the file or an option cannot be used.
    """

    reduce = 1  # never: what is too large is cut into tiles

    def __init__(
        self,
        weights: str | Path,
        *,
        device: str = "auto",
        resize: int | None = None,
        tta: bool | None = None,
        tile: int = tiling.DEFAULT_TILE,
        overlap: int = tiling.DEFAULT_OVERLAP,
    ) -> None:
        self.path = find_weights(weights)
        contents = load(self.path)
        state = network_state(contents, source=self.path)
        self.num_classes, channels = _shapes(state, self.path)
        with torch.device("meta"):  # takes no memory: a damaged file may ask for any amount
            transfer(self._network(state, channels), state, prefix="", source=self.path)
        self.network = self._network(state, channels)
        transfer(self.network, state, prefix="", source=self.path)
        self.digest = _digest(state)
        self.device = choose_device(device)
        self.network.eval().to(self.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        found = settings_in(contents, self.path)
        settings: Mapping[str, Any] = found or {}
        self._describe(settings)
        self._remember(settings)
        trained, self.standardize = _preparation(settings, self.path)
        try:
            self.gray: Conversion = conversion_of(settings.get("gray_range"))
        except DataError as error:
            raise CheckpointError(f"{self.path}: {error}") from None
        self.resize = trained if resize is None else resize
        check_number("resize", self.resize, 0, least=SMALLEST_SIDE, most=LARGEST_RESIZED)
        self.sight = tiling.UNETS if encoder_of(state) == UNET else tiling.WIDE
        tiling.cut_axis(1, tile, overlap, self.sight)  # refuses what does not fit
        self.tile, self.overlap = tile, overlap
        self.tta = self.views > 1 if tta is None else tta
        size = f"resized to {trained}x{trained}" if trained else "as they are"
        how = f"trained on images {size}" + (", each standardised" if self.standardize else "")
        if found is None:
            how = "no settings in it; if it was trained on resized images, give --resize"
        how += f", more than 8 bits: {self.gray}"
        shown = " ".join(map(str, channels))
        self.about = f"{self.path}: {self.num_classes} classes, channels {shown}, {how}"

    def _network(self, state: Mapping[str, Tensor], channels: Sequence[int]) -> UNet:
        """The network of these tensors, before they are loaded."""
        norm = norm_of(state)
        encoder = make_encoder(encoder_of(state), channels, norm, start=False)
        return UNet(self.num_classes, channels, norm, encoder)

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

    def _remember(self, settings: Mapping[str, Any]) -> None:
        """What is known of the training images, besides their gray range, and of ``segment.py``."""
        try:
            top, bottom, left, right = map(_pixels, settings.get("crop") or (0,) * 4)
            self.crop = Crop(top, bottom, left, right)
            sizes = settings.get("cropped_sizes") or ()
            self.cropped_sizes = {(_pixels(height), _pixels(width)) for height, width in sizes}
            um = settings.get("um_per_px") or ()
            self.um_per_px = (float(min(um)), float(max(um))) if um else None
            self.views = int(settings.get("views", 1))
            if self.views not in (1, tiling.VIEWS):
                raise ValueError
        except (TypeError, ValueError, AttributeError):
            what = "views, crop, cropped_sizes or um_per_px in it is none"
            raise CheckpointError(f"{self.path}: {what}; train it again") from None
        label = settings.get("ignore_label")
        self.ignore_label = label if type(label) is int and 0 <= label < 256 else IGNORED

    def __call__(self, image: Array, inside: Array | None = None) -> NDArray[np.uint8]:
        """Class ids, uint8 (H, W), of an image: see ``bands`` for what it may be."""
        bands = self.bands(image, inside)
        return np.concatenate([band.argmax(0).astype(np.uint8) for _, band in bands])

    def probabilities(self, image: Array) -> Floats:
        """Class probabilities, float32 (C, H, W)."""
        return np.concatenate([band for _, band in self.bands(image)], axis=1)

    def bands(self, image: Array, inside: Array | None = None, factor: float = 1.0) -> Bands:
        """Yield (first row, class probabilities (C, rows, W)) from the top, in bounded memory.

        The image is (H, W) or (H, W, 1, 3 or 4), colours as RGB, of any size and number type; more
        than 8 bits become 8 by ``gray``. Another array, or a nan in it, raises DataError. Where
        ``inside``, bool (H, W), is False the image counts in no statistic of it; but the network
        sees it near the edge (``FieldRule.part`` fills what means nothing). It is enlarged by
        ``factor`` (unless it is resized anyway).
        """
        yield from self._bands(image, inside, factor, tiling.average_views if self.tta else None)
        return None

    def bands_and_votes(
        self, image: Array, inside: Array | None = None, factor: float = 1.0
    ) -> Iterator[tuple[int, Floats]]:
        """``bands`` by the average over 8 views, their vote disagreement as a last channel."""
        yield from self._bands(image, inside, factor, tiling.average_and_votes, 1)

    def _bands(
        self,
        image: Array,
        inside: Array | None,
        factor: float,
        averaged: Callable[[tiling.Predict], tiling.Predict] | None,
        more: int = 0,
    ) -> Iterator[tuple[int, Floats]]:
        """See ``bands``; ``averaged`` over views, which has ``more`` channels than classes."""
        pixels = as_pixels(image, self.gray)
        small, predict = self._seen(pixels, inside, factor)
        predict = averaged(predict) if averaged else predict
        channels = self.num_classes + more
        how = self.tile, self.overlap, self.sight
        bands = tiling.predict_bands(small, predict, channels, *how)
        if pixels.shape[:2] != small.shape[:2]:
            whole = np.concatenate([band for _, band in bands], axis=1)
            bands = tiling.resized_bands(whole, *pixels.shape[:2])
        yield from bands

    def disagreement(self, image: Array, inside: Array | None = None) -> Floats:
        """``tiling.disagreement`` (3, h, w), of the size at which the image is predicted."""
        small, predict = self._seen(as_pixels(image, self.gray), inside)
        maps = tiling.disagreement(predict)
        how = self.tile, self.overlap, self.sight
        bands = tiling.predict_bands(small, maps, len(tiling.MEASURES), *how)
        return np.concatenate([band for _, band in bands], axis=1)

    def _seen(
        self, pixels: Array, inside: Array | None, factor: float = 1.0
    ) -> tuple[Array, tiling.Predict]:
        """An image as the network sees it, and a function that predicts tiles of it.

        They are normalised as the whole image is.
        """
        small = resize_image(pixels, self.resize) if self.resize else _enlarged(pixels, factor)
        counted = inside if inside is not None and inside.any() else None
        counted = resized_field(counted, small.shape)
        return small, self._predictor(small if counted is None else small[counted])

    def _predictor(self, whole: Array) -> tiling.Predict:
        """A function that predicts tiles of an image, normalised by the pixels ``whole``."""
        own = own_statistics(torch.from_numpy(np.array(whole))) if self.standardize else None
        one = partial(self._predict_tile, own=own)
        if self.device.type == "cpu":  # several at once take no less time there
            return one
        several = partial(self._predict_tiles, own=own)
        return tiling.Together(one, several, tiling.together(self.tile))

    def _predict_tile(self, pixels: Array, own: Statistics | None) -> Floats:
        """Class probabilities (C, h, w) of pixels (h, w) or (h, w, 3)."""
        return np.asarray(self._predict_tiles([pixels], own)[0])

    @torch.inference_mode()
    def _predict_tiles(self, tiles: Sequence[Array], own: Statistics | None) -> Floats:
        """Class probabilities (n, C, h, w) of n tiles of one size, (h, w) or (h, w, 3)."""
        height, width = tiles[0].shape[:2]
        images = torch.from_numpy(np.stack(tiles)).reshape(len(tiles), height, width, -1)
        x = to_input(upload(images.movedim(3, 1), self.device), own)
        missing = (0, max(0, SMALLEST_SIDE - width), 0, max(0, SMALLEST_SIDE - height))
        if any(missing):
            x = F.pad(x, missing, mode="replicate")
        with arithmetic(None, deterministic=False):  # single precision, not TF32
            logits = self.network(x.contiguous(memory_format=torch.channels_last))
        return logits.softmax(dim=1)[:, :, :height, :width].cpu().numpy()

    def export(self, path: str | Path) -> list[str]:
        """Write the model to a checked .onnx or .pt2 file, see ``export.export``."""
        if (encoder := encoder_of(self.network.state_dict())) != UNET:
            # PyTorch does not come to an end with its paddings for sides of any length.
            what = f"found a network with --encoder {encoder}, which cannot be exported"
            raise CheckpointError(f"{self.path}: {what}; train one with --encoder {UNET}")
        on_cpu = copy.copy(self)
        on_cpu.device = torch.device("cpu")
        on_cpu.network = copy.deepcopy(self.network).cpu().to(memory_format=torch.contiguous_format)
        model = export.Deployed(on_cpu.network, self.standardize)
        facts = {"classes": self.class_names, "mapping": self.mapping, "image_size": self.resize}
        facts |= {"gray_range": self.gray.saved(), "crop": list(self.crop)}
        lines = export.export(model, Path(path), lambda x: on_cpu._predictor(x)(x), facts)
        return [*lines, *([ONE_VIEW] if self.views > 1 else [])]

    def measure(
        self,
        mask: Array,
        um_per_px: float | None = None,
        minimum_px: int = MINIMUM_PX,
        grain_classes: Sequence[int] = (),
        connectivity: int | None = None,
        boundary_classes: Sequence[int] | None = None,
    ) -> list[Row]:
        """Measure every class of a mask (H, W): one dict per class, ``measure.measure_mask``."""
        terms = (um_per_px, minimum_px, grain_classes, connectivity, boundary_classes)
        return measure.measure_mask(mask, self.num_classes, *terms)[0]


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
    classes = (
        state["decode.outc.fc1.weight"].shape[0] if state["decode.outc.fc1.weight"].ndim else 0
    )
    if not 2 <= classes <= 255:
        what = f"its network has {classes} classes; allowed: 2 to 255"
        raise CheckpointError(f"{path}: {what}; give a fine.pt or sup.pt of this program")
    return classes, channels


def _preparation(settings: Mapping[str, Any], path: Path) -> tuple[int, bool]:
    """How images were prepared in training: ``image_size`` and ``standardize``."""
    names = ("image_size", "standardize")
    try:
        trained = Config.from_dict({n: settings[n] for n in names if settings.get(n) is not None})
    except ConfigError as error:
        found = str(error).partition("\n")[0]
        raise CheckpointError(
            f"{path}: its setting {found}; copy it again or train it again"
        ) from None
    return trained.image_size, trained.standardize


def _digest(state: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for key in sorted(state):
        # As bytes, because NumPy has no bfloat16.
        values = state[key].contiguous().reshape(-1).view(torch.uint8)
        digest.update(key.encode() + values.numpy().tobytes())
    return digest.hexdigest()[:16]


def _pixels(value: object) -> int:
    """A number of pixels; ValueError if it is none."""
    if type(value) is not int or not 0 <= value < 10**6:
        raise ValueError
    return value


def _enlarged(pixels: Array, factor: float) -> Array:
    """An image (H, W, ...) with each side times ``factor``: area average down, bilinear up."""
    if factor == 1:
        return pixels
    height, width = (max(1, round(side * factor)) for side in pixels.shape[:2])
    how = cv2.INTER_AREA if factor < 1 else cv2.INTER_LINEAR
    return np.asarray(cv2.resize(pixels, (width, height), interpolation=how), np.uint8)


def as_pixels(image: Array, gray: Conversion) -> NDArray[np.uint8]:
    """Check an image array and make it uint8 (H, W) or (H, W, 3); see ``Segmenter.bands``."""
    pixels = np.asarray(image)
    fits = pixels.ndim == 2 or (pixels.ndim == 3 and pixels.shape[2] in (1, 3, 4))
    if not fits or not pixels.size or pixels.dtype.kind not in "uif":
        raise DataError(
            f"image: found {pixels.dtype} {pixels.shape}; give numbers, (H, W) or (H, W, 3)"
        )
    if pixels.ndim == 3:
        pixels = pixels[..., 0] if pixels.shape[2] == 1 else pixels[..., :3]
    return gray.apply(pixels)


def check_number(
    name: str, value: float, *allowed: float, least: float, most: float = math.inf
) -> None:
    """ConfigError unless a value is one of ``allowed``, or finite, ``least`` to ``most``."""
    if value not in allowed and not (least <= value <= most and value < math.inf):
        also = "".join(f"{v} or " for v in allowed)
        upper = f" and at most {most}" if most < math.inf else ""
        raise ConfigError(
            f"--{name}: found {value}; give {also}a number of at least {least}{upper}"
        )
