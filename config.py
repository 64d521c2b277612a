"""Every setting once: name, type, default, unit, meaning, source; validation; the flags.

A ``Config`` that exists is valid: whatever is wrong is raised as one ``ConfigError`` that holds one
line per problem. Scripts give their own defaults to ``parse_config``, the command line overrides
them, and ``--help``, the log header and the README table are written from the same fields.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import math
import numbers
import operator
import os
import re
import shutil
import sys
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from utils.commandline import UserError

# Values of self_mode with the method's name. A new method of model.py is one more line here.
SELF_MODES = {
    "moco": "PSCL-MoCo",
    "simclr": "PSCL-SimCLR",
    "plain-moco": "MoCo",
    "plain-simclr": "SimCLR",
    "byol": "BYOL",
    "densecl": "DenseCL",
}
STAGES = ("self", "fine", "sup")  # in the order in which they run

# What a setting left open becomes (published program).
TOP_K = {"moco": 30, "simclr": 4}  # other methods sample no patches: None
FINE_MAX_EPOCH = {"1": 1000, "5": 500, "f": 50}
EVAL_EVERY = {"1": 200, "5": 100, "f": 10}
CLASS_WEIGHT_OF_4 = (1.0, 1.0, 10.0, 10.0)
MAPPING_OF_4 = (0, 128, 64, 255)

OURS = "this program"
PUBLISHED = "published program"
ALL_STAGES = "self fine sup"
# The stages whose result a setting of the group decides, where the setting does not say otherwise.
GROUPS = {
    "Experiment": "",
    "Running": "",
    "Network": "self fine",
    "Views": "self fine",
    "Pretraining": "self fine",
    "Method": "self fine",
    "Fine-tuning and supervised": "fine sup",
}

COMPARISONS = {
    "at least": operator.ge,
    "above": operator.gt,
    "at most": operator.le,
    "below": operator.lt,
}
COUNT = {"at least": 1, "at most": 1_000_000}
POSITIVE = {"above": 0}
RATE = {"above": 0, "at most": 1e30}  # beyond single precision an optimizer cannot even start
NOT_NEGATIVE = {"at least": 0}
FRACTION = {"at least": 0, "at most": 1}
# A jitter of d changes the hue by up to 0.2 * d of the colour circle, and half a circle is all.
JITTER = {"at least": 0, "at most": 2.5}

NAME_PATTERN = r"\w(?:[\w .+-]{0,62}[\w+-])?"
PATH_PATTERN = r"[^\x00-\x1f\x7f]+"
NOTHING_TWICE = r"(?!.*(.).*\1)"
STAGES_PATTERN = r"(?!.*(self|fine|sup).*\1)(?:self|fine|sup)(?:-(?:self|fine|sup))*"
PATH_MEANING = "a path without control characters"
CLASS_NAME_PATTERN = r"(?=\S)[^\x00-\x1f\x7f,]{1,40}(?<=\S)"
COLOUR_PATTERN = r"#?[0-9a-fA-F]{6}"

BOOLEANS = {"true": True, "1": True, "yes": True, "on": True}
BOOLEANS |= {"false": False, "0": False, "no": False, "off": False}
KINDS = {
    "str": "text",
    "bool": "True or False",
    "int": "a whole number",
    "int | None": "None or a whole number",
    "float": "a number",
    "tuple[int, ...]": "whole numbers",
    "tuple[float, ...]": "numbers",
    "tuple[str, ...]": "texts",
}


class ConfigError(UserError):
    """Settings that cannot be used. The message holds one line per problem."""


def setting(
    group: str,
    default: Any,
    meaning: str,
    *,
    unit: str = "",
    source: str = PUBLISHED,
    published: str = "",
    decides: str | None = None,
    limits: Mapping[str, float] | None = None,
    choices: Sequence[str] = (),
    pattern: str = "",
    allowed: str = "",
    later: bool = False,
) -> Any:
    """Make a dataclass field that knows what it means.

    Args:
        group: its heading, a key of ``GROUPS``.
        default: its value when nobody says otherwise.
        meaning: one sentence without a full stop.
        unit: of its value; empty where it has none.
        source: where the default comes from.
        published: its name in the published program, where that was another.
        decides: the stages whose result it decides; None for those of its group.
        limits: bounds by the words of ``COMPARISONS``; of a tuple, for each entry.
        choices, pattern: the legal texts, or the regular expression of them.
        allowed: the legal values in words, where limits and choices do not say it.
        later: runs were made before the setting existed, with what is now its default; there it
            is left out of ``training_settings``, so that their files and new ones stay equal.
    """
    decides = GROUPS[group] if decides is None else decides
    metadata = {
        "group": group,
        "help": meaning,
        "unit": unit,
        "source": source,
        "published": published,
        "decides": tuple(decides.split()),
        "limits": dict(limits or {}),
        "choices": tuple(choices),
        "pattern": pattern,
        "allowed": allowed,
        "later": later,
    }
    return dataclasses.field(default=default, metadata=metadata)


@dataclass(frozen=True)
class Config:
    """All settings of one experiment; the meaning of each is in its field's metadata.

    Lists become tuples and whole numbers become floats where the setting is one.

    Raises:
        ConfigError: one line per setting that is not of its type or not in its range.
    """

    # fmt: off
    name: str = setting("Experiment", "aluminum", "stem of the run folders, NAME_SELFMODE",
        pattern=NAME_PATTERN, allowed="1 to 64 letters, digits, '_', and inside also ' .+-'")
    data_dir: str = setting("Experiment", "dataset/aluminum", "folder of the images and masks",
        decides=ALL_STAGES, pattern=PATH_PATTERN, allowed=PATH_MEANING)
    output_dir: str = setting("Experiment", ".", "folder in which the run folders are made",
        source=OURS, pattern=PATH_PATTERN, allowed=PATH_MEANING)
    stages: str = setting("Experiment", "self-fine",
        "what to run: self (pretraining), fine (fine-tuning), sup (supervised), or several joined "
        "by '-'",
        pattern=STAGES_PATTERN, allowed="self, fine, sup, or several joined by '-', each once")
    self_mode: str = setting("Experiment", "simclr",
        "pretraining method: " + ", ".join(f"{k} = {v}" for k, v in SELF_MODES.items()),
        decides="self fine", choices=tuple(SELF_MODES))
    data_size: str = setting("Experiment", "1",
        "annotated images: 1, 5 or f (all of them), or several such as 15f, one after the other",
        pattern=NOTHING_TWICE + "[15f]+", allowed="1, 5, f, or several such as 15f, each once")
    multi_round: bool = setting("Experiment", True,
        "repeat with each of the five annotated images; False: only with number 0")
    repeats: str = setting("Experiment", "",
        "numbers of the annotated images as digits, such as 014, whatever multi_round says; empty: "
        "those of 01234 that the set has, or 0 without multi_round",
        source=OURS, pattern=NOTHING_TWICE + "[0-9]*", allowed="digits such as 01234, each once")
    num_classes: int = setting(
        "Experiment", 4, "classes of the masks, class 0 being the matrix or background",
        unit="classes", decides=ALL_STAGES, limits={"at least": 2, "at most": 255})
    ignore_label: int | None = setting("Experiment", None,
        "value of mask pixels that nobody labelled, such as 255: they count in no loss, no "
        "sampling and no score; None: every pixel has a class",
        source=OURS, decides=ALL_STAGES, limits={"at least": 2, "at most": 255})
    image_size: int = setting(
        "Experiment", 0, "images are resized to this height and width at loading; 0: as they are",
        unit="pixels", source=OURS, decides=ALL_STAGES, limits={"at least": 0, "at most": 32768})
    mapping: tuple[int, ...] = setting("Experiment", (),
        "gray of each class in the pictures of predictions; empty: 0,128,64,255 for 4 classes, "
        "else evenly spread", unit="gray value", limits={"at least": 0, "at most": 255})
    class_names: tuple[str, ...] = setting("Experiment", (),
        "names of the classes in legends and tables; empty: 0 background, 1, 2 ...",
        source=OURS, pattern=CLASS_NAME_PATTERN,
        allowed="a name for each class, separated by commas, of 1 to 40 characters each")
    class_colours: tuple[str, ...] = setting("Experiment", (),
        "colours of the classes in pictures, six hexadecimal digits each, such as e69f00; empty: "
        "colours that colour-blind readers tell apart",
        source=OURS, pattern=COLOUR_PATTERN,
        allowed="a colour for each class, separated by commas, such as 333333,e69f00")
    class_weight: tuple[float, ...] = setting("Experiment", (),
        "weight of each class in the cross-entropy; empty: 1,1,10,10 for 4 classes, else all 1",
        decides="fine sup", limits=NOT_NEGATIVE)
    use_unlabelled: bool = setting(
        "Experiment", False, "pretrain on the images of train_unlabelled too",
        source=OURS, decides="self fine")
    standardize: bool = setting("Experiment", False,
        "every image is normalised by the mean and deviation of its own pixels; False: by fixed "
        "ones", source=OURS, decides=ALL_STAGES, later=True)

    seed: int = setting("Running", 0, "seed of all random numbers",
        source=OURS, decides=ALL_STAGES, limits={"at least": 0, "at most": 2**32 - 1})
    device: str = setting("Running", "auto", "where to compute: auto, cpu, cuda, cuda:N or mps",
        source=OURS, pattern="auto|cpu|mps|cuda(?::[0-9]{1,3})?",
        allowed="auto, cpu, cuda, cuda:N or mps")
    amp: str = setting("Running", "auto",
        "mixed precision: auto (where the device gains by it), off, bf16 (bfloat16)",
        source=OURS, decides=ALL_STAGES, choices=("auto", "off", "bf16"))
    workers: int = setting("Running", 0, "processes that prepare batches; 0: the main process does",
        unit="processes", source=OURS, limits={"at least": 0, "at most": 256})
    threads: int = setting("Running", 0, "CPU threads that compute; 0: PyTorch's choice",
        unit="threads", source=OURS, limits={"at least": 0, "at most": 1024})
    save_seconds: float = setting(
        "Running", 60.0, "at most this much training is lost when a run is killed",
        unit="seconds", source=OURS, limits=NOT_NEGATIVE)
    overwrite: bool = setting(
        "Running", False, "train anew over a run whose settings differ", source=OURS)
    resume: str = setting(
        "Running", "auto", "auto: go on where a run was cut off; never: start it again",
        source=OURS, choices=("auto", "never"))
    report: bool = setting(
        "Running", False, "write report.html, a page on the experiment, when all runs are done",
        source=OURS)
    tensorboard: bool = setting(
        "Running", False, "write the numbers of metrics.jsonl for TensorBoard too",
        source=OURS)

    channels: tuple[int, ...] = setting("Network", (32, 64, 128, 256),
        "channels of the UNet at full, 1/2, 1/4 and 1/8 size, each twice the one before",
        unit="channels", published="channel", decides=ALL_STAGES,
        limits={"at least": 1, "at most": 65536})
    embed_dim: int = setting("Network", 64, "length of the embeddings that are contrasted",
        unit="channels", published="confea", limits={"at least": 1, "at most": 65536})
    hidden_dim: int = setting("Network", 128, "hidden units of the projection heads",
        unit="channels", published="hidfea", limits={"at least": 1, "at most": 65536})
    groups: int = setting("Network", 4, "groups of the 1x1 convolutions of the patch heads",
        unit="groups", published="multihead", limits={"at least": 1, "at most": 65536})
    norm: str = setting("Network", "batch",
        "normalisation inside the UNet: batch (BatchNorm) or group (GroupNorm, which looks at one "
        "image at a time)",
        source=OURS, decides=ALL_STAGES, choices=("batch", "group"), later=True)
    recompute: int = setting("Network", 0,
        "levels of the UNet, the full size first, that compute everything again in the backward "
        "pass instead of keeping it, at most 4: less memory, more time, the same result; 0: only "
        "what is cheap to compute, and nothing in fine-tuning; -1: nothing",
        unit="levels", source=OURS, decides="", limits={"at least": -1, "at most": 4})

    random_crop: float = setting(
        "Views", 0.2, "a view's crop keeps at least 1 - random_crop of each side",
        unit="fraction", published="random_c", limits={"at least": 0, "below": 1})
    self_jitter: float = setting(
        "Views", 0.2, "strength d of the colour jitter in pretraining: 0.8*d, hue 0.2*d",
        limits=JITTER)
    fine_jitter: float = setting("Views", 0.1,
        "strength d of the colour jitter in fine-tuning and supervised training",
        decides="fine sup", limits=JITTER)
    fine_contrast: float = setting("Views", 0.0,
        "strength d of a change of contrast after normalisation, in fine-tuning and supervised "
        "training: gain exp(-d) to exp(d), offset -d to d; 0: none",
        source=OURS, decides="fine sup", limits={"at least": 0, "at most": 2}, later=True)
    fine_crop: int = setting("Views", 0,
        "side of the random crops of fine-tuning and supervised training; 0: the whole image",
        unit="pixels", source=OURS, decides="fine sup", limits={"at least": 0, "at most": 32768},
        later=True)
    fine_scale: float = setting("Views", 1.0,
        "they are enlarged or reduced by up to this factor; 1: neither",
        source=OURS, decides="fine sup", limits={"at least": 1, "at most": 2}, later=True)
    fine_rotation: float = setting("Views", 0.0,
        "they are turned by up to this angle either way, besides flip and quarter turns",
        unit="degrees", source=OURS, decides="fine sup", limits={"at least": 0, "at most": 45},
        later=True)

    self_batch_size: int = setting(
        "Pretraining", 8, "images per batch, the annotated one comes on top",
        unit="images", limits=COUNT)
    self_max_epoch: int = setting(
        "Pretraining", 200, "length of pretraining", unit="epochs", limits=COUNT)
    self_lr: float = setting("Pretraining", 1e-4, "learning rate", limits=RATE)
    self_optimizer: str = setting(
        "Pretraining", "adam", "optimizer: adam or adamw", choices=("adam", "adamw"))
    self_weight_decay: float = setting(
        "Pretraining", 1e-3, "weight decay, of adamw only", limits=NOT_NEGATIVE)
    self_schedule: bool = setting(
        "Pretraining", False, "learning rate x 0.1 at 50 % and again at 75 % of the epochs")
    save_every: int = setting(
        "Pretraining", 10, "a checkpoint named by the epochs done is kept this often",
        unit="epochs", decides="", limits=COUNT)
    probe: int = setting("Pretraining", 0,
        "the frozen features are looked at this often: a linear classifier on the annotated "
        "images' pixels scored on the test set, and a k-means picture; 0: never",
        unit="epochs", source=OURS, decides="", limits={"at least": 0, "at most": 1_000_000})

    temperature: float = setting(
        "Method", 0.5, "temperature of the image loss and of the patch loss", limits=POSITIVE)
    global_local_ratio: float = setting("Method", 0.7, "r in (1 - r) * image loss + r * patch loss",
        unit="fraction", limits=FRACTION)
    top_k: int | None = setting("Method", None,
        "patches per class and image at the coarsest scale; None: 4 for simclr, 30 for moco",
        unit="patches", limits={"at least": 1, "at most": 65536})
    sample_ratio: int = setting("Method", 2, "the patches grow by this factor from scale to scale",
        limits={"at least": 1, "at most": 64})
    label_guided: bool = setting(
        "Method", True, "choose patches by the annotated image's label map; False: at random",
        published="Patch_sup")
    scale_weights: tuple[float, ...] = setting(
        "Method", (1.0, 1.0, 1.0), "weights of the patch losses at 1/4, 1/2 and full size",
        published="self_scale_weight", limits=NOT_NEGATIVE)
    intra_view_negatives: bool = setting(
        "Method", True, "PSCL-SimCLR: patches of the same image and view may be negatives",
        published="simclrinner")
    momentum: float = setting(
        "Method", 0.99, "share of the momentum encoder that each step keeps", limits=FRACTION)
    queue_size: int = setting("Method", 504, "images that the queues remember",
        unit="images", limits={"at least": 1, "at most": 10_000_000})
    group_decay: float = setting("Method", 0.2,
        "PSCL-MoCo: decay per step of the image queue's weight of the same production batch",
        published="lab_size_decay", limits=FRACTION)
    patch_group_decay: float = setting("Method", 0.5,
        "PSCL-MoCo: decay per step of the patch queue's weight of the same production batch",
        published="patch_size_decay", limits=FRACTION)
    freshness_decay: float = setting("Method", 0.2,
        "PSCL-MoCo: decay per step of the patch queue's weight whatever the production batch",
        published="patch_lab_decay", limits=FRACTION)
    dense_grid: int = setting("Method", 7,
        "DenseCL: the dense map is averaged over a grid of so many cells a side",
        unit="cells", source="DenseCL's paper, `S`", limits={"at least": 1, "at most": 64})

    fine_batch_size: int = setting(
        "Fine-tuning and supervised", 6, "images per batch; never more than there are",
        unit="images", limits=COUNT)
    fine_crops: int = setting("Fine-tuning and supervised", 1,
        "crops (or whole images, without fine_crop) that a step sees of each of its images",
        source=OURS, limits={"at least": 1, "at most": 1024}, later=True)
    fine_max_epoch: int | None = setting("Fine-tuning and supervised", None,
        "length of the training; None: 1000, 500, 50 for data size 1, 5, f",
        unit="epochs", limits=COUNT)
    eval_every: int | None = setting("Fine-tuning and supervised", None,
        "evaluated this often and after the last epoch; None: 200, 100, 10 for data size 1, 5, f",
        unit="epochs", limits=COUNT)
    fine_lr_encoder: float = setting(
        "Fine-tuning and supervised", 1e-4, "learning rate of stem and downs in fine-tuning",
        published="fineturn_lr_en", decides="fine", limits={"at least": 0, "at most": 1e30})
    fine_lr_decoder: float = setting(
        "Fine-tuning and supervised", 1e-3, "learning rate of ups and decode in fine-tuning",
        decides="fine", limits=RATE)
    sup_lr: float = setting(
        "Fine-tuning and supervised", 1e-3, "learning rate in supervised training",
        decides="sup", limits=RATE)
    pretrained: str = setting("Fine-tuning and supervised", "",
        "file that fine-tuning starts from; empty: the last checkpoint of the run's pretraining",
        source=OURS, decides="fine", pattern=f"(?:{PATH_PATTERN})?", allowed=PATH_MEANING)
    # fmt: on

    def __post_init__(self) -> None:
        values, problems = check({name: getattr(self, name) for name in FIELDS})
        if problems:
            raise ConfigError("\n".join(problems))
        for name, value in values.items():
            object.__setattr__(self, name, value)

    @property
    def stage_list(self) -> tuple[str, ...]:
        """The stages in the order in which they run, whatever the order they were named in."""
        named = self.stages.split("-")
        return tuple(stage for stage in STAGES if stage in named)

    @property
    def sizes(self) -> tuple[str, ...]:
        """The data sizes ``1``, ``5``, ``f`` in the order given."""
        return tuple(self.data_size)

    @property
    def repeat_list(self) -> tuple[int, ...] | None:
        """The numbers of the annotated images in the order given; None: all that are there."""
        if self.repeats or not self.multi_round:
            return tuple(int(digit) for digit in self.repeats or "0")
        return None

    def resolved(self) -> Config:
        """Fill what was left open: top_k, class_weight and mapping.

        ``fine_max_epoch`` and ``eval_every`` depend on the data size and stay as they are: ask
        ``epochs_for`` and ``eval_every_for``. ``repeats`` depends on the data: ask ``repeat_list``.
        """
        classes = self.num_classes
        spread = tuple(round(255 * label / (classes - 1)) for label in range(classes))
        return dataclasses.replace(
            self,
            top_k=TOP_K.get(self.self_mode) if self.top_k is None else self.top_k,
            class_weight=self.class_weight
            or (CLASS_WEIGHT_OF_4 if classes == 4 else (1.0,) * classes),
            mapping=self.mapping or (MAPPING_OF_4 if classes == 4 else spread),
        )

    def epochs_for(self, size: str) -> int:
        """Epochs of fine-tuning and supervised training for data size ``1``, ``5`` or ``f``."""
        return (
            _by_size(FINE_MAX_EPOCH, size) if self.fine_max_epoch is None else self.fine_max_epoch
        )

    def eval_every_for(self, size: str) -> int:
        """Epochs from one evaluation to the next for data size ``1``, ``5`` or ``f``."""
        return _by_size(EVAL_EVERY, size) if self.eval_every is None else self.eval_every

    def training_settings(self, stage: str, size: str | None = None) -> dict[str, Any]:
        """Those settings, resolved and JSON-able, which decide the result of a stage.

        Two runs of the same data size and repeat with equal dicts compute the same, wherever and
        in whatever company they ran. Fine-tuning depends on the pretraining before it.

        Args:
            stage: ``self``, ``fine`` or ``sup``.
            size: the run's data size, to fill ``fine_max_epoch`` and ``eval_every`` too.
        """
        if stage not in STAGES:
            raise ConfigError(f"stage: found {_found(stage)}; allowed: {', '.join(STAGES)}")
        values = self.resolved().to_dict()
        if size is not None:
            values["fine_max_epoch"] = self.epochs_for(size)
            values["eval_every"] = self.eval_every_for(size)
        return {n: v for n, v in values.items() if _counts(FIELDS[n], stage, v)}

    def appearance(self) -> dict[str, Any]:
        """Those settings, resolved and JSON-able, which say how classes are called and drawn."""
        values = self.resolved().to_dict()
        return {n: values[n] for n in ("mapping", "class_names", "class_colours")}

    def to_dict(self) -> dict[str, Any]:
        """All settings by name, as JSON knows them (tuples are lists)."""
        values = {name: getattr(self, name) for name in FIELDS}
        return {n: list(v) if isinstance(v, tuple) else v for n, v in values.items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Config:
        """The inverse of ``to_dict``; a setting that is not there has its default.

        Raises:
            ConfigError: an unknown key or a value that is not legal.
        """
        if not isinstance(values, Mapping):
            raise ConfigError(f"settings: found {_found(values)}; allowed: names with their values")
        return _build(values, [])

    def describe(self) -> list[str]:
        """Lines for a log: each setting that is not at its default, then the others in one line."""
        shown = {name: format_value(getattr(self, name)) for name in FIELDS}
        changed = [n for n in FIELDS if getattr(self, n) != FIELDS[n].default]
        rest = ", ".join(f"{n}={text}" for n, text in shown.items() if n not in changed)
        return [*(f"{n} = {shown[n]}" for n in changed), *([f"defaults: {rest}"] if rest else [])]


FIELDS: dict[str, dataclasses.Field[Any]] = {f.name: f for f in dataclasses.fields(Config)}
# What a run that does not name these settings was made with.
LATER: dict[str, Any] = {n: f.default for n, f in FIELDS.items() if f.metadata["later"]}


def _counts(field: dataclasses.Field[Any], stage: str, value: Any) -> bool:
    """Whether a setting of this value belongs to what decides a stage's result."""
    left_out = field.metadata["later"] and value == field.default
    return stage in field.metadata["decides"] and not left_out


# Validation


def check(values: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Clean values of known settings, and one line per problem in the order of the settings."""
    clean: dict[str, Any] = {}
    problems: list[str] = []
    for name, value in values.items():
        try:
            clean[name] = _convert(FIELDS[name], value)
        except (TypeError, ValueError, OverflowError):
            problems.append(_problem(name, value))
    return clean, problems + list(_combinations(clean))


def _convert(field: dataclasses.Field[Any], value: Any) -> Any:
    """The value in the field's type; ValueError or TypeError if it is not legal."""
    kind, rules = str(field.type), field.metadata
    if kind == "bool":
        if not isinstance(value, bool):
            raise TypeError
        return value
    if kind == "str":
        text = os.fspath(value)
        legal = re.fullmatch(rules["pattern"], text) if rules["pattern"] else None
        if not isinstance(text, str) or not (legal or text in rules["choices"]):
            raise ValueError
        return text
    if kind.endswith("None") and value is None:
        return None
    if kind == "tuple[str, ...]":
        if not isinstance(value, list | tuple):
            raise TypeError
        if not all(re.fullmatch(rules["pattern"], text) for text in value):
            raise ValueError
        return tuple(value)
    whole = "float" not in kind
    if kind.startswith("tuple"):
        if not isinstance(value, list | tuple):
            raise TypeError
        return tuple(_number(entry, whole, rules["limits"]) for entry in value)
    return _number(value, whole, rules["limits"])


def _number(value: Any, whole: bool, limits: Mapping[str, float]) -> Any:
    """The value as int (whole) or float; ValueError if it is not finite or not in the limits."""
    wanted = numbers.Integral if whole else numbers.Real
    if isinstance(value, bool) or not isinstance(value, wanted):
        raise TypeError
    convert: Any = int if whole else float
    number = convert(value)
    inside = all(COMPARISONS[word](number, bound) for word, bound in limits.items())
    if not math.isfinite(number) or not inside:
        raise ValueError
    return number


def _combinations(c: Mapping[str, Any]) -> Iterable[str]:
    """One line per rule between settings that is broken; rules of missing settings are skipped."""
    classes, groups = c.get("num_classes"), c.get("groups")
    for name in ("mapping", "class_names", "class_colours", "class_weight"):
        if classes and c.get(name) and len(c[name]) != classes:
            kind = f"as many values as num_classes, {classes}, or none"
            yield f"{name}: found {len(c[name])} values; allowed: {kind}"
    for name, what in (("mapping", "gray"), ("class_names", "name")):
        if len(set(c.get(name, ()))) < len(c.get(name, ())):
            yield f"{name}: found {_found(c[name])}; allowed: each {what} once"
    if c.get("class_weight") and not any(c["class_weight"]):
        yield f"class_weight: found {_found(c['class_weight'])}; allowed: at least one above 0"
    if classes and (c.get("ignore_label") or classes) < classes:
        kind = f"None or at least num_classes, {classes}"
        yield f"ignore_label: found {c['ignore_label']}; allowed: {kind}"
    for name in ("image_size", "fine_crop"):
        if 0 < c.get(name, 0) < 16:
            yield f"{name}: found {c[name]}; allowed: 0 or at least 16 pixels"
    if 0 < c.get("image_size", 0) < c.get("fine_crop", 0):
        kind = f"at most image_size, {c['image_size']}"
        yield f"fine_crop: found {c['fine_crop']}; allowed: {kind}"
    if "scale_weights" in c and len(c["scale_weights"]) != 3:
        yield f"scale_weights: found {len(c['scale_weights'])} values; allowed: 3 values"
    channels = c.get("channels")
    if channels is not None and (
        len(channels) != 4 or any(b != 2 * a for a, b in zip(channels, channels[1:], strict=False))
    ):
        wanted = "4 values, each twice the one before, such as 32,64,128,256"
        yield f"channels: found {_found(channels)}; allowed: {wanted}"
        channels = None
    if not groups:
        return
    kind = f"a multiple of groups, {groups}"
    if c.get("embed_dim", 0) % groups:
        yield f"embed_dim: found {c['embed_dim']}; allowed: {kind}"
    if channels and channels[0] % groups:
        yield f"channels: found {_found(channels)}; allowed: each {kind}"
    # The patch head of a scale has min(hidden_dim, its channels) hidden units.
    elif any(min(c.get("hidden_dim", groups), width) % groups for width in (channels or ())[:3]):
        yield f"hidden_dim: found {c['hidden_dim']}; allowed: {kind}"


def allowed_values(name: str) -> str:
    """The legal values of a setting in words."""
    field = FIELDS[name]
    rules = field.metadata
    if rules["allowed"]:
        return str(rules["allowed"])
    if rules["choices"]:
        return ", ".join(rules["choices"])
    bounds = " and ".join(f"{word} {bound}" for word, bound in rules["limits"].items())
    kind = KINDS[str(field.type)]
    return f"{kind}, each {bounds}" if kind.endswith("s") else f"{kind} {bounds}".strip()


def _problem(name: str, value: Any) -> str:
    line = f"{name}: found {_found(value)}; allowed: {allowed_values(name)}"
    choices = FIELDS[name].metadata["choices"]
    near = difflib.get_close_matches(value.lower(), choices, 1) if isinstance(value, str) else []
    return f"{line}; did you mean {near[0]}?" if near else line


def _unknown(what: str, name: str, dashes: str = "", beside: Sequence[str] = ()) -> str:
    """One line for a name that is no setting, with the nearest that is one, or is ``beside``."""
    plain = str(name).replace("-", "_")
    published = {f.metadata["published"]: n for n, f in FIELDS.items() if f.metadata["published"]}
    near = published.get(plain) or next(
        iter(difflib.get_close_matches(plain.lower(), [*beside, *FIELDS], 1, cutoff=0.5)), ""
    )
    cure = f"did you mean {dashes}{near}?" if near else "--help lists all settings"
    return f"unknown {what} {dashes}{_shorten(str(name))}; {cure}"


def _found(value: Any) -> str:
    return _shorten(repr(value))


def _shorten(text: str) -> str:
    """At most 60 characters in one line that a terminal can show."""
    text = "".join(c if c.isprintable() else " " for c in text)
    return text if len(text) <= 60 else text[:57] + "..."


def _by_size(table: Mapping[str, int], size: str) -> int:
    if size not in table:
        raise ConfigError(f"data size: found {_found(size)}; allowed: {', '.join(table)}")
    return table[size]


def _build(values: Mapping[str, Any], problems: list[str]) -> Config:
    """The Config of the values, or ConfigError with the problems known and those found here."""
    unknown = [_unknown("setting", name) for name in values if name not in FIELDS]
    known = {name: value for name, value in values.items() if name in FIELDS}
    defaults = {name: field.default for name, field in FIELDS.items()}
    problems = [*problems, *unknown, *check(defaults | known)[1]]
    if problems:
        raise ConfigError("\n".join(problems))
    return Config(**known)


# Command line


def parse_config(
    argv: list[str] | None = None, beside: Sequence[str] = (), **defaults: Any
) -> Config:
    """Make the Config of a script from its own defaults and the command line, which wins.

    Every setting is a flag, ``--name value``, ``--name=value`` or ``-name value``, spelled in full.
    A flag given twice has its last value. ``-h`` and ``--help`` print all settings and exit with 0.

    Args:
        argv: the words after the script's name; None for those of this process.
        beside: names of flags that the script takes besides, to be guessed when one is misspelt.
        defaults: the script's settings.

    Raises:
        ConfigError: all problems together, one line each.
    """
    words, problems = _read_flags(sys.argv[1:] if argv is None else argv, beside)
    if "help" in words:
        print(help_text(defaults), end="")
        raise SystemExit(0)
    values = dict(defaults)
    for name, texts in words.items():
        try:
            values[name] = _from_words(FIELDS[name], texts)
        except ValueError:
            values.pop(name, None)  # the problem below is the one to report
            if texts:
                problems.append(_problem(name, " ".join(texts)))
            else:
                problems.append(f"{name}: no value found; allowed: {allowed_values(name)}")
    return _build(values, problems)


def _read_flags(
    argv: Sequence[str], beside: Sequence[str] = ()
) -> tuple[dict[str, list[str]], list[str]]:
    """The words after each flag, and one line for each word that belongs to none.

    argparse would take ``-stage`` for ``-stages`` even where abbreviations are switched off, and
    stops at its first problem; it only writes the help.
    """
    words: dict[str, list[str]] = {}
    problems: list[str] = []
    name, room = "", 0  # the flag being read and how many more words it takes
    for word in argv:
        flag = re.fullmatch(r"(--?)([^\W\d][\w-]*)(?:=(.*))?", word, re.DOTALL)
        if flag:
            dashes, name, value = flag.groups()
            name = "help" if name == "h" else name
            room = 0
            if name in FIELDS:
                words[name] = [] if value is None else [value]
                several = str(FIELDS[name].type).startswith("tuple")
                room = 0 if value is not None else len(argv) if several else 1
            elif name == "help":
                words[name] = []
            else:
                problems.append(_unknown("flag", name, dashes, beside))
                room = 1 if value is None else 0
        elif room:
            room -= 1
            if name in FIELDS:
                words[name].append(word)
        else:
            problems.append(f"unexpected word {_found(word)}; settings are given as --name value")
    return words, problems


def _from_words(field: dataclasses.Field[Any], words: Sequence[str]) -> Any:
    """The value that the words after a flag spell; ValueError if they spell none."""
    kind = str(field.type)
    if kind == "bool" and not words:
        return True
    if not words:
        raise ValueError
    text = " ".join(words)
    if kind == "str":
        return text
    plain = text.strip().lower()
    if kind == "bool":
        if plain not in BOOLEANS:
            raise ValueError
        return BOOLEANS[plain]
    if plain == "none" and kind.endswith("None"):
        return None
    if kind == "tuple[str, ...]":
        # With commas, a name may hold blanks; without any, each word is one.
        entries = text.split(",") if "," in text else words
        return () if plain in ("", "none") else tuple(entry.strip() for entry in entries)
    number = float if "float" in kind else int
    if kind.startswith("tuple"):
        if plain == "none":
            return ()
        return tuple(number(entry) for entry in re.split(r"[,\s]+", plain.strip("()[], ")) if entry)
    return number(plain)


# Showing


def format_value(value: Any) -> str:
    """A value as it is written on the command line: ``32,64``, ``0.7``, ``''`` for an empty one."""
    if isinstance(value, list | tuple):
        return ",".join(format_value(entry) for entry in value) or "''"
    if isinstance(value, float):
        return f"{value:.0e}".replace("e-0", "e-") if _is_power(value) else repr(value)
    return str(value) or "''"


def _is_power(value: float) -> bool:
    """Whether a small value reads better as 1e-4."""
    return 0 < value < 0.01 and float(f"{value:.0e}") == value


def help_text(defaults: Mapping[str, Any] | None = None) -> str:
    """The page of ``--help``, with a script's own defaults in place of the general ones."""
    script = Path(sys.argv[0]).name
    script = script if script.endswith(".py") else "train.py"
    head = [
        f"usage: python {script} [--setting value ...]",
        "",
        "Pretrain a UNet by patch-sampled contrastive learning, fine-tune it on a few",
        "annotated images and score it on the test set. Every setting is a flag.",
        "",
        "examples:",
        f"  python {script} -stages self-fine",
        f"  python {script} -stages self --self_mode moco --self_max_epoch 20",
        f"  python {script} -stages sup --data_dir dataset/mine --device cpu",
    ]
    return "\n".join([*head, "", settings_help(defaults)])


def settings_help(defaults: Mapping[str, Any] | None = None, left_out: Collection[str] = ()) -> str:
    """All settings by group, as the page of ``--help`` lists them.

    Args:
        defaults: a script's own, in place of the general ones.
        left_out: settings that the script decides itself, or has a flag of that name for.
    """
    width = min(shutil.get_terminal_size((100, 24)).columns, 100)
    parser = argparse.ArgumentParser(
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(
            prog, max_help_position=27, width=width
        ),
        usage=argparse.SUPPRESS,
        add_help=False,
    )
    sections = {title: parser.add_argument_group(title) for title in GROUPS}
    for name, field in FIELDS.items():
        if name in left_out:
            continue
        rules = field.metadata
        unit = f"{rules['unit']}, " if rules["unit"] else ""
        default = format_value((defaults or {}).get(name, field.default))
        text = f"{rules['help']} [{unit}default {default}]".replace("%", "%%")
        metavar = {"str": "TEXT", "bool": "BOOL"}.get(str(field.type), "N")
        if str(field.type).startswith("tuple"):
            metavar = "TEXT,.." if "str" in str(field.type) else "N,N,.."
        sections[rules["group"]].add_argument(f"--{name}", metavar=metavar, help=text)
    page = parser.format_help()
    return page + "\nBOOL is True or False; the flag alone means True. -name works like --name.\n"


def settings_table() -> str:
    """All settings as a Markdown table: setting, default, unit, meaning, source."""
    lines = ["| setting | default | unit | meaning | source |", "|---|---|---|---|---|"]
    group = ""
    for name, field in FIELDS.items():
        rules = field.metadata
        if rules["group"] != group:
            group = rules["group"]
            lines.append(f"| **{group}** | | | | |")
        source = rules["source"] + (f", `{rules['published']}`" if rules["published"] else "")
        meaning = rules["help"].replace("|", "\\|").replace("*", "\\*").replace("<", "&lt;")
        default = format_value(field.default)
        lines.append(f"| `{name}` | `{default}` | {rules['unit']} | {meaning} | {source} |")
    return "\n".join(lines) + "\n"
