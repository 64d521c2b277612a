"""What is asked of one job: the options of ``segment.py``, checked."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import MISSING, dataclass, fields
from pathlib import Path

from annotation.outlines import SUFFIX
from config import Config, ConfigError
from dataset.batches import read_rule
from dataset.mask_values import Reading, palette_text
from imaging.listing import sample_of
from metallography.particles import MINIMUM_PX, unit_of
from metallography.scales import read_scales
from metallography.segmenter import check_number
from utils.commandline import options_told
from utils.device import choose_device
from utils.files import DataError

PRETRAIN = ("never", "always")


@dataclass(frozen=True)
class Request:
    """One job. ConfigError, a line for each value out of range."""

    images: Path  # folder, with sub-folders
    masks: tuple[Path, ...]  # files and folders
    out: Path
    minutes: float = 20.0
    preset: str = "auto"
    pretrain: str = "never"
    class_names: tuple[str, ...] = ()
    class_colours: tuple[str, ...] = ()  # hexadecimal; (): as before; auto: as in masks
    um_per_px: float | None = None  # 0: as the files say, whatever an earlier run was told
    reading: Reading = Reading()  # how images and masks are read
    device: str = "auto"
    threads: int = 0
    seed: int = 0
    min_px: int = MINIMUM_PX
    grain_classes: tuple[int, ...] = ()  # class ids whose pieces are grains, of which G is given
    outlines: str = ""  # geojson or roi: the outlines of all particles are written, too
    particles: bool = False  # a table of them is written, too
    scales: Path | None = None  # a CSV file of scales for single images
    batch_from: str = ""  # how production batches are told; '': by the names
    sample: str = ""  # what the images show; '' is the name of their folder

    def __post_init__(self) -> None:
        problems = []
        limits = (("minutes", 0.1, 100_000), ("threads", 0, 1024), ("min_px", 1, math.inf))
        for name, least, most in limits:
            try:
                check_number(name, getattr(self, name), least=least, most=most)
            except ConfigError as error:
                problems.append(str(error))
        try:
            unit_of(self.um_per_px or None)
        except ConfigError as error:
            problems.append(str(error))
        if self.outlines not in ("", *SUFFIX):
            problems.append(f"--outlines: found {self.outlines}; give {' or '.join(SUFFIX)}")
        if self.scales is not None:
            try:
                read_scales(self.scales)
            except DataError as error:
                problems.append(str(error))
        try:
            read_rule(self.batch_from)
        except DataError as error:
            problems.append(str(error))
        if self.pretrain not in PRETRAIN:
            problems.append(f"--pretrain: found {self.pretrain}; give {', '.join(PRETRAIN)}")
        if not self.masks:
            problems.append("--masks: no file given; give a mask, or a folder of masks")
        problems += [f"{p}: no such file or folder; correct --masks" for p in self.missing_masks()]
        if not self.images.is_dir():
            problems.append(f"{self.images}: no such folder; give --images a folder of images")
        try:
            if self.out.exists() and not self.out.is_dir():
                problems.append(f"{self.out}: a file, not a folder; give another --out")
            problems += self.inside()
        except OSError as error:  # such as a name that is too long
            problems.append(f"--out: {error.strerror}; give another --out")
        if problems:
            raise ConfigError("\n".join(problems))
        # Its own messages. How many names are needed is not known yet.
        Config(
            preset=self.preset,
            seed=self.seed,
            threads=self.threads,
            num_classes=max(2, len(self.class_names)),
            class_names=self.class_names if len(self.class_names) > 1 else (),
        )
        choose_device(self.device)

    def head(self) -> list[tuple[str, str]]:
        """What the tables say of the job: sample, folder, masks, options that are no defaults."""
        given = {name: value for name, value in vars(self).items() if name != "reading"}
        own = {f.name: f.default for f in fields(self) if f.default is not MISSING}
        reading = {f.name: getattr(self.reading, f.name) for f in fields(Reading)}
        reading["palette"] = palette_text(reading["palette"]) or ()
        reading["ignore"] = tuple(",".join(map(str, value)) for value in reading["ignore"])
        default = {f.name: f.default for f in fields(Reading) if f.name != "named"}
        masks = ", ".join(map(str, self.masks))
        return [
            ("Sample", self.sample or sample_of(self.images)),
            ("Folder", str(self.images)),
            ("Masks", masks),
            ("Options", options_told(given | reading, own | default)),
        ]

    def refuse_mixed(self, shapes: Collection[tuple[int, ...]]) -> None:
        """ConfigError if the preset cannot have images of these shapes in one batch."""
        if self.preset == "paper" and len(shapes) > 1:
            found = f"--preset paper: found images of {len(shapes)} sizes, which it cannot mix"
            raise ConfigError(f"{found}; give --preset auto")

    def missing_masks(self) -> list[Path]:
        """The files and folders of --masks that are not there."""
        return [path for path in self.masks if not path.exists()]

    def inside(self) -> list[str]:
        """A line if results would be written among the user's files."""
        out = self.out.resolve()
        read = {"--images": self.images, **{f"--masks {p}": p for p in self.masks if p.is_dir()}}
        return [
            f"--out: found {self.out}, which is the folder of {option}, or holds it; give another"
            for option, folder in read.items()
            if folder.resolve() == out or (option == "--images" and out in folder.resolve().parents)
        ]
