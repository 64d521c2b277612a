"""What ``--preset robust`` and ``auto`` take from the images of a set."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

import data
from config import Config, ConfigError, parse_config
from data import Sample, find_split
from dataset.set_file import SetDefaults
from imaging.field import read_visible, resized_field
from imaging.store import resize_image
from presets import PRESETS
from utils.files import DataError

SMALLEST_CROP = 16
BRIGHTER = 0.5  # spreads of the annotated images by which the mean of others lies away
STRONGER = 1.25  # factor by which the spread of others differs
OF_OTHER_CONTENT = 2.0  # factor: plain images beside full ones, whose noise would be blown up
SHARPER = 2.0  # factor by which the sharpness of others differs
MOST_BLUR, MOST_STEPS = 1.5, 1600
SEEN = 20  # times that crops show every annotated pixel, on average

Pixels = NDArray[np.uint8]
Choice = tuple[dict[str, Any], dict[str, str]]
"""Values of settings by name; and by name a line why, also of some that stay as they are."""


class Look(NamedTuple):
    """What is measured of an image; mean, spread and sharpness of gray levels 0 ... 1."""

    size: tuple[int, int]  # rows, columns
    mean: float
    spread: float  # standard deviation
    sharpness: float  # standard deviation of the Laplacian, in spreads


def look(image: Pixels, inside: NDArray[np.bool_] | None = None) -> Look:
    """Measure an image, uint8 (H, W) or (H, W, 3), where it is ``inside`` (H, W); None: all."""
    counted: Any = ... if inside is None else inside
    gray = (image if image.ndim == 2 else cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)) / np.float32(255)
    spread = max(float(gray[counted].std(dtype=np.float64)), data.SMALLEST_DEVIATION)
    edges = float(cv2.Laplacian(gray, cv2.CV_32F)[counted].std(dtype=np.float64))
    size = (image.shape[0], image.shape[1])
    return Look(size, float(gray[counted].mean(dtype=np.float64)), spread, edges / spread)


def choose(others: Sequence[Look], annotated: Sequence[Look]) -> Choice:
    """What the preset ``auto`` sets beyond ``robust``, and why.

    ``others`` are of all images that will be seen, ``annotated`` of those with labels, as the
    network gets them. Without any, nothing is chosen.
    """
    if not others or not annotated:
        return {}, {}
    values, reasons = fitting_crops(others, annotated)
    for name, (text, value) in _by_looks(others, annotated).items():
        values |= {} if value is None else {name: value}
        reasons[name] = text
    robust = PRESETS["robust"]
    area = sum(rows * columns for rows, columns in (v.size for v in annotated))
    step = robust["fine_batch_size"] * values.get("fine_crop", robust["fine_crop"]) ** 2
    steps = min(max(robust["fine_steps"], math.ceil(SEEN * area / step)), MOST_STEPS)
    if steps > robust["fine_steps"]:
        values["fine_steps"] = steps
        reasons["fine_steps"] = f"fine_steps {steps}: {area / 1e6:.1f} megapixels are annotated"
    return values, reasons


def _by_looks(
    others: Sequence[Look], annotated: Sequence[Look]
) -> dict[str, tuple[str, float | bool | None]]:
    """A line, and a value if it is not that of ``robust``, by the name of the setting."""
    mean, spread, sharpness = (
        float(np.median([getattr(v, name) for v in annotated]))
        for name in ("mean", "spread", "sharpness")
    )
    shift = float(np.percentile([abs(v.mean - mean) / spread for v in others], 75))
    contrast = _factor([v.spread / spread for v in others])
    sharp = _factor([v.sharpness / max(sharpness, 1e-6) for v in others])
    differ = (shift > BRIGHTER or contrast > STRONGER) and contrast < OF_OTHER_CONTENT
    several = len(others) > 1
    who = f"a quarter of the {len(others)} images differ" if several else "the only image differs"
    seen = (
        f"{who} from the annotated ones in brightness by {shift:.2f} times their contrast and in "
        f"contrast by a factor of {contrast:.2f}{', or by more' if several else ''}"
        + (", as images of other content do" if contrast >= OF_OTHER_CONTENT else "")
    )
    blur = MOST_BLUR if sharp > SHARPER else None
    used = PRESETS["robust"]["fine_blur"] if blur is None else blur
    return {
        "standardize": (f"standardize {differ}: {seen}", differ or None),
        "fine_blur": (
            f"fine_blur {used}: {'a quarter differ' if several else 'it differs'} by a factor of "
            f"{sharp:.2f} in sharpness{', or more' if several else ''}",
            blur,
        ),
    }


def _factor(ratios: Sequence[float]) -> float:
    """The factor, up or down, that a quarter of the ratios reach."""
    return float(np.exp(np.percentile(np.abs(np.log(np.maximum(ratios, 1e-6))), 75)))


def fitting_crops(others: Sequence[Look], annotated: Sequence[Look]) -> Choice:
    """The crops of ``robust`` where images are smaller.

    Crops in pretraining are left out if all images have one size that is no larger.
    """
    values: dict[str, Any] = {}
    reasons: dict[str, str] = {}
    robust = PRESETS["robust"]
    sizes, own = ({v.size for v in looks} for looks in ([*others, *annotated], annotated))
    smallest = {"self_crop": min(map(min, sizes)), "fine_crop": min(map(min, own))}
    for name, side in smallest.items():
        if side < robust[name]:
            values[name] = max(side, SMALLEST_CROP)
            why = f"the smallest image has a side of {side} pixels"
            reasons[name] = f"{name} {values[name]}: {why}"
    if len(sizes) == 1 and max(map(max, sizes)) <= robust["self_crop"]:
        values["self_crop"] = 0
        reasons.pop("self_crop", None)
    return values, reasons


def read_config(
    argv: list[str] | None = None, beside: Sequence[str] = (), **defaults: Any
) -> tuple[Config, list[str]]:
    """``config.parse_config``, with what the set says and the preset takes from its images.

    Also returns lines on both.
    """
    known = SetDefaults(argv, defaults)
    defaults = known.values | defaults
    named = known.flags
    # A length in epochs counts only without one in steps, such as a preset's.
    epochs = {"fine_steps": 0} if "fine_max_epoch" in named and "fine_steps" not in named else {}
    config = parse_config(argv, beside, epochs, **defaults)
    require_effect(config, named)
    if config.preset == "paper":
        return config, known.lines(config)
    chosen, reasons = choose_for_set(config)
    config = parse_config(argv, beside, chosen | epochs, **defaults)
    kept = [line for name, line in reasons.items() if _holds(config, chosen, name)]
    return config, known.lines(config) + [f"Preset {config.preset}: {line}" for line in kept]


def require_effect(config: Config, named: Collection[str]) -> None:
    """Raise ConfigError if a setting given as a flag would count for nothing beside others."""
    if config.pretrained and ("fine" not in config.stage_list or "self" in config.stage_list):
        what = f"found {config.pretrained}, from which fine-tuning starts; stages {config.stages}"
        other = "pretrains a network of its own" if "self" in config.stage_list else "has none"
        raise ConfigError(f"pretrained: {what} {other}; give -stages fine, or no --pretrained")
    steps = f"with fine_steps {config.fine_steps}"
    if config.fine_steps and "fine_max_epoch" in named:
        what = f"found {config.fine_max_epoch}, which is of no effect {steps}"
        raise ConfigError(f"fine_max_epoch: {what}; give one of the two, or --fine_steps 0")
    if config.fine_steps and "fine_crops" in named and config.fine_crops > 1:
        what = f"found {config.fine_crops}, which is of no effect {steps}"
        cure = (
            "give --fine_batch_size, the crops of a step, or a length in epochs, --fine_max_epoch"
        )
        raise ConfigError(f"fine_crops: {what}; {cure}")


def _holds(config: Config, chosen: dict[str, Any], name: str) -> bool:
    """Whether no flag overrides what was chosen."""
    return name not in chosen or getattr(config, name) == chosen[name]


def choose_for_set(config: Config) -> Choice:
    """What the preset of ``config`` takes from its set; files at fault are left out."""
    root = Path(config.data_dir)
    with suppress(DataError):
        unlabelled = find_split(root, "train_unlabelled")
        splits = {
            data.annotated_split(root, size, repeat)
            for size in config.sizes
            for repeat in data.annotated_repeats(root, size, config.repeat_list)
        }
        labelled = [sample for split in sorted(splits) for sample in find_split(root, split)]
        name = "use_unlabelled"
        own: dict[str, Any] = {name: bool(unlabelled)}
        said = {name: f"{name} True: train_unlabelled has {len(unlabelled)} images"}
        annotated = list(_looks(labelled, config.image_size))
        others = list(_looks(find_split(root, "train_numf") + unlabelled, config.image_size))
        by = choose if config.preset == "auto" else fitting_crops
        values, reasons = by(others or annotated, annotated) if annotated else ({}, {})
        return own | values, (said if unlabelled else {}) | reasons
    return {"use_unlabelled": False}, {}


def _looks(samples: Sequence[Sample], image_size: int) -> Iterator[Look]:
    for sample in samples:
        with suppress(DataError):
            pixels, inside = read_visible(sample.image)
            pixels = resize_image(pixels, image_size) if image_size else pixels
            yield look(pixels, resized_field(inside, pixels.shape))
