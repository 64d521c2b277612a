"""What is asked for: the user's files, the folder of the results, the time."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from config import Config, ConfigError
from metallography.segmenter import check_number

PRETRAIN = ("auto", "always", "never")


@dataclass(frozen=True)
class Request:
    """One job. ConfigError, a line for each value out of range."""

    images: Path  # folder, with sub-folders
    masks: tuple[Path, ...]  # files and folders
    out: Path
    minutes: float = 20.0
    preset: str = "auto"
    pretrain: str = "auto"
    class_names: tuple[str, ...] = ()
    um_per_px: float | None = None
    reading: tuple[str, ...] = ()  # options of dataset/prepare.py on how masks are read
    device: str = "auto"
    threads: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        problems = []
        for name, least in (("minutes", 0.1), ("threads", 0)):
            try:
                check_number(name, getattr(self, name), least=least)
            except ConfigError as error:
                problems.append(str(error))
        if self.um_per_px is not None and not 0 < self.um_per_px < 1e9:
            problems.append(f"--um_per_px: found {self.um_per_px}; give micrometres, above 0")
        if self.pretrain not in PRETRAIN:
            problems.append(f"--pretrain: found {self.pretrain}; give {', '.join(PRETRAIN)}")
        if not self.masks:
            problems.append("--masks: no file given; give a mask, or a folder of masks")
        problems += [f"{p}: no such file or folder; correct --masks" for p in self.missing_masks()]
        if not self.images.is_dir():
            problems.append(f"{self.images}: no such folder; give --images a folder of images")
        elif self.out.exists() and not self.out.is_dir():
            problems.append(f"{self.out}: a file, not a folder; give another --out")
        problems += self.inside()
        if problems:
            raise ConfigError("\n".join(problems))
        Config(preset=self.preset, device=self.device, seed=self.seed)  # its own messages

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
            if folder.resolve() == out or (out in folder.resolve().parents and option == "--images")
        ]
