"""A run, and what its stages share: images, identity, names of folders."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar
from weakref import proxy

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

import data
from config import FIELDS, Config
from data import Sample
from imaging.imagefile import turn_text
from imaging.store import ImageStore, fingerprint
from model import METHODS, settings_of
from report import figures
from utils.checkpoint import UNET
from utils.cuda.step_graph import StepGraphs
from utils.log import METRICS_FILE, to_terminal
from utils.run_folder import Difference, RunFolder, differences
from utils.training import Training

TRUNK_SCALE = 32  # by which the encoder from ImageNet reduces an image
WEIGHTS = "pretrained weights"
FILES = "files"  # among settings: a fingerprint of them
GRAY = "gray_range"  # among settings: how more than 8 bits became 8, ``Conversion.saved``


@dataclass(frozen=True)
class Job:
    """One run: settings, data and device."""

    config: Config  # resolved
    store: ImageStore
    size: str  # data size '1', '5' or 'f'
    repeat: int  # number of the annotated image; 0 for 'f'
    device: torch.device
    amp: torch.dtype | None  # of autocast; None: full precision
    notes: tuple[str, ...] = ()  # lines for the head of the logs
    ranks: int = field(default=1, kw_only=True)  # that pretrain together
    named: frozenset[str] | None = field(default=None, kw_only=True)  # settings; None: not known

    def split(self, name: str) -> list[Sample]:
        """The images of a folder of the set, listed once for all stages, repeats and checks."""
        return data.listed_split(self.store, self.config.data_dir, name)

    def annotated(self) -> list[Sample]:
        """The annotated images of this size and repeat."""
        kept, key = self.store.lists, (self.config.data_dir, self.size, self.repeat)
        if key not in kept:
            kept[key] = self.split(data.annotated_split(*key))
        return kept[key]


class Runner(Training):
    """A stage of a run: a training on the images of a set."""

    batches: data.Batches
    lengths: ClassVar[tuple[str, ...]] = ()  # settings that may be raised for a run on disk

    def __init__(self, job: Job) -> None:
        run_dir = experiment_dir(job.config, self.stage) / run_label(job.size, job.repeat)
        super().__init__(job.config, RunFolder(run_dir, self.stage), job.device, job.amp)
        self.job, self.config = job, job.config
        self.ranks = 1  # that share a batch, known by ``build``

    def samples(self) -> list[Sample]:
        """The images that this stage is trained on or scored on."""
        raise TypeError("a stage has its own")

    def decisive_settings(self) -> dict[str, Any]:
        """The settings (``Config.training_settings``) and a fingerprint of the files."""
        settings = self.config.training_settings(self.stage, self.job.size)
        for name in ("data_dir", "pretrained"):
            settings.pop(name, None)  # paths may change: the contents are compared
        settings["amp"] = "bf16" if self.amp else "off"
        files = fingerprint(self.samples(), self.job.store)
        return {**settings, FILES: files, GRAY: self.job.store.gray.saved()}

    def compare(self, old: Mapping[str, Any], new: Mapping[str, Any]) -> list[Difference]:
        """The settings that differ; the weights only if they are known already."""
        changed = self.differences(old, new)
        state = self.state.load() if changed else None
        return [] if state and self.new_length(state, new) else changed

    def differences(self, old: Mapping[str, Any], new: Mapping[str, Any]) -> list[Difference]:
        """The settings that differ, lengths included."""
        known = {k: v for k, v in old.items() if k != WEIGHTS or k in new}
        changed = setting_differences(self.config, known, new)
        anew = read_anew(self.job.store, GRAY in old)
        return [d._replace(reason=anew) if d.name == FILES else d for d in changed]

    def reason(self, state: Mapping[str, Any]) -> str:
        """Which lengths differ from those of a state on disk."""
        return "; ".join(map(str, self.differences(state["settings"], self.settings)))

    def lengthened(self, old: Mapping[str, Any], new: Mapping[str, Any]) -> set[str]:
        """Names of the settings that differ, if they are lengths and none is shorter; else none."""
        changed = {difference.name for difference in self.differences(old, new)}
        lengths = changed - {WEIGHTS}
        there = lengths <= {*self.lengths} and all(old.get(n) and new.get(n) for n in lengths)
        return changed if there and all(new[n] > old[n] for n in lengths) else set()

    def unsuitable(self) -> list[str]:
        """Images or settings that this stage cannot use, a line each."""
        return []

    def problems(self) -> list[str]:
        """Why this stage must not run, a line each, as far as known before earlier stages ran."""
        return self.unsuitable() + self.conflicts(self.decisive_settings())

    def finish(self) -> None:
        """Draw the learning curves of all stages so far."""
        path = figures.learning_curve(self.run_dir / "curves.png", self.run_dir / METRICS_FILE)
        self.log.note(f"Learning curves: {path}")

    def to_memory(self, module: nn.Module) -> nn.Module:
        """Move a network to the device in channels-last format: norms and heads work per pixel."""
        return module.to(self.device, memory_format=torch.channels_last)  # type: ignore[call-overload]

    def replay_steps(self) -> None:
        """Have passes replayed as a graph, on CUDA by a process that has whole batches."""
        if self.config.cuda_graphs and self.device.type == "cuda" and self.ranks == 1:
            # Not the method itself: with a cycle of references a stage that is done would keep
            # its memory on the device until Python looks for cycles.
            own = proxy(self)
            self.graphs = StepGraphs(lambda batch: own.passes(batch), self.module, to_terminal)

    def synchronised(self, module: nn.Module) -> nn.Module:
        """With BatchNorm's statistics of the whole batch, if ranks share it and that is wanted."""
        if self.ranks == 1 or self.config.batch_norm_ranks != "sync":
            return module
        return nn.SyncBatchNorm.convert_sync_batchnorm(module)  # type: ignore[no-any-return]

    def not_synchronised(self) -> list[str]:
        """A line if the ranks cannot have BatchNorm's statistics of the whole batch here."""
        c, kind = self.config, self.device.type
        if self.job.ranks == 1 or c.batch_norm_ranks != "sync":
            return []
        if c.encoder != UNET:  # its norms hold their activation, which the conversion would lose
            return [f"batch_norm_ranks: found sync with --encoder {c.encoder}; give own"]
        if c.norm != "batch":
            return []
        what = f"found sync on {kind}; PyTorch's SyncBatchNorm needs CUDA"
        return [f"batch_norm_ranks: {what}; give own, or --norm group"] if kind != "cuda" else []

    def fits_ranks(self) -> bool:
        """Whether a step has something for every rank."""
        return True

    def about_ranks(self, batch: int, statistics: str) -> list[str]:
        """How several ranks share a batch, and of what BatchNorm's ``statistics`` are."""
        least, most = batch // self.ranks, -(-batch // self.ranks)
        each = f"{least}" if least == most else f"{least} or {most}"
        own = f"{self.ranks} ranks, {each} of the {batch} images of a step each"
        if self.config.batch_norm_ranks == "sync":
            statistics = "of the whole batch"
        has_batch_norm = self.config.norm == "batch" or self.config.encoder != UNET
        norm = f"; BatchNorm's statistics are {statistics}" if has_batch_norm else ""
        return [own + norm] if self.ranks > 1 else []

    def images(self, samples: Sequence[Sample]) -> str:
        """Number and sizes of samples: '48 images 188x188'."""
        sizes = sorted({self.job.store.shape(s.image)[-2:] for s in samples})
        shown = ", ".join(f"{w}x{h}" for h, w in sizes[:2]) + (" and others" if sizes[2:] else "")
        deep = sorted({self.job.store.deep.get(s.image, "") for s in samples} - {""})
        shown += f" ({', '.join(deep)}: {self.job.store.gray})" if deep else ""
        return f"{len(samples)} image{'s' if len(samples) != 1 else ''} {shown}"

    def smaller_than(self, name: str, samples: Sequence[Sample]) -> list[str]:
        """A line for each image that is smaller than the crops of the setting ``name``."""
        side, paths = getattr(self.config, name), dict.fromkeys(s.image for s in samples)
        sizes = {path: self.job.store.shape(path)[-2:] for path in paths if side}
        return [
            f"{path}: {w}x{h} pixels; {name}: found {side}; give at most {min(h, w)}, or 0"
            for path, (h, w) in sizes.items()
            if min(h, w) < side
        ]

    def too_few_values(self, batch: int, crop: int, samples: Sequence[Sample]) -> list[str]:
        """A line if a batch of one image leaves a channel of the encoder's BatchNorm one value.

        The smallest maps of the encoder from ImageNet have 1/32 of the image's sides.
        """
        if self.config.encoder == UNET or batch != 1:
            return []
        sides = [[crop]] if crop else [self.job.store.shape(s.image)[-2:] for s in samples]
        if not sides or min(map(max, sides)) > TRUNK_SCALE:
            return []
        what = (
            f"{self.config.encoder} on one image of at most {TRUNK_SCALE} pixels a side in a step"
        )
        cure = "give larger images or crops, larger batches, or --encoder unet"
        return [f"encoder: found {what}, whose BatchNorm needs more values of a channel; {cure}"]

    def pixels(self, sample: Sample) -> NDArray[np.uint8]:
        """An image's own pixels, uint8 (H, W) or (H, W, 3)."""
        return self.job.store.image(sample.image).movedim(0, -1).squeeze(-1).numpy()


def setting_differences(
    config: Config, old: Mapping[str, Any], new: Mapping[str, Any]
) -> list[Difference]:
    """The settings of a run on disk that differ from new ones.

    Settings that the method does not take are left out. A run older than a setting has its default.
    """
    unused = unused_settings(config)
    unused += [] if GRAY in old else [GRAY]  # where it mattered, the files differ
    names = [n for n in {**old, **new} if n not in unused]
    defaults = {n: FIELDS[n].default for n in names if n in FIELDS}
    before, now = ({n: (defaults | dict(each)).get(n) for n in names} for each in (old, new))
    return differences(before, now)


def read_anew(store: ImageStore, newer: bool) -> str:
    """Why a run of an older version of this program may have read images differently; '' if not.

    A ``newer`` one read all images as now but those that are transparent somewhere.
    """
    if path := store.transparent:
        return f"{path} has fully transparent pixels, which earlier versions counted"
    if newer:
        return ""
    if store.turned:
        path, orientation = next(iter(store.turned.items()))
        return f"{path} is now {turn_text(orientation)}"
    if store.deep:
        path, kind = next(iter(store.deep.items()))
        return f"{kind} values, as in {path}, now become 8 bits by one range for the set"
    return ""


def unused_settings(config: Config) -> list[str]:
    """The settings that only other methods, or another ``admit_matches``, take."""
    taken = settings_of(config.self_mode)
    taken |= {"batches"} if METHODS[config.self_mode].needs_groups else set()
    taken -= {"admit_share"} if config.admit_matches != "sure" else set()
    return [n for n, f in FIELDS.items() if f.metadata["group"] == "Method" and n not in taken]


def run_label(size: str, repeat: int) -> str:
    """Folder name of a run: '1_0', '5_3', 'f'."""
    return "f" if size == "f" else f"{size}_{repeat}"


def experiment_dir(config: Config, stage: str) -> Path:
    """Folder of an experiment's runs: ``<name>_<self_mode>``, or ``<name>_sup``."""
    kind = config.self_mode if stage in ("self", "fine") else stage
    return Path(config.output_dir) / f"{config.name}_{kind}"


def due(every: int, end: int) -> list[int]:
    """Multiples of ``every`` from 0 to ``end``, and ``end`` itself; none if ``every`` is 0."""
    return [done for done in range(end + 1) if done % every == 0 or done == end] if every else []
