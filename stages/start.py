"""The file that fine-tuning starts from: how it was pretrained, and what is otherwise now."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from config import ALWAYS, FIELDS, PRETRAINING, Config, deciding
from stages.job import setting_differences
from utils.checkpoint import load, settings_in
from utils.run_folder import Difference, pretrained_name

OF_PRETRAINING = deciding(PRETRAINING)
# What the way to the images and the machine decide may differ from stage to stage.
OF_ALL = [n for n in deciding(ALWAYS) if n not in ("data_dir", "amp")]
FORM = ("standardize", "image_size")  # of the images, which the network expects
COMPARED = {*FORM, "channels", "norm", "encoder"}  # compared whether named or not


@dataclass(frozen=True)
class Start:
    """A file with a network, and the settings that it tells; a published one tells none."""

    path: Path
    settings: Mapping[str, Any]

    @property
    def of_pretraining(self) -> dict[str, Any]:
        """The settings that pretraining alone has; empty where the file tells of none."""
        if "self_mode" not in self.settings:
            return {}
        return {n: self.settings.get(n, FIELDS[n].default) for n in OF_PRETRAINING}

    def differences(self, config: Config, named: Collection[str] | None = None) -> list[Difference]:
        """The settings of pretraining that were otherwise than now.

        ``named``: of the others than ``COMPARED`` these alone; None: all.
        """
        if not self.settings:
            return []
        before, now = dict(self.settings), config.training_settings("self")
        names = OF_ALL + (OF_PRETRAINING if self.of_pretraining else [])
        names = [n for n in names if named is None or n in {*named, *COMPARED}]
        old, new = ({n: v for n, v in each.items() if n in names} for each in (before, now))
        return setting_differences(config, old, new)

    def refused(self, config: Config) -> list[str]:
        """A line if the run's own pretraining is another one than the settings say."""
        changed = "; ".join(map(str, self.differences(config)))
        cure = f"give those of then, another --name, or --pretrained {self.path}"
        return [f"{self.path}: pretrained with other settings ({changed}); {cure}"] * bool(changed)

    def warnings(self, config: Config, named: Collection[str] | None = None) -> list[str]:
        """Lines for the log: what was otherwise, or that the file does not tell.

        ``named`` as for ``differences``.
        """
        what = "those below are this command's, and say nothing of it"
        unknown = [f"{self.path} tells no settings of a pretraining: {what}"]
        unknown = [] if self.of_pretraining else unknown
        changed = self.differences(config, named)
        if not changed:
            return unknown
        form = [n for n in FORM if n in {difference.name for difference in changed}]
        cure = " ".join(f"--{n} {self.settings.get(n, FIELDS[n].default)}" for n in form)
        cure = f"; give {cure} unless you mean it" if cure else ""
        what = (
            f"pretrained with other settings than this command's ({'; '.join(map(str, changed))})"
        )
        return [*unknown, f"Warning: {self.path}: {what}{cure}"]


def pretrained_file(config: Config, run_dir: Path) -> Path:
    """The file that fine-tuning in a run's folder starts from: ``--pretrained``, or its own."""
    return Path(config.pretrained or run_dir / pretrained_name(config.self_max_epoch))


def read_start(path: Path) -> Start:
    """The settings in a file; of a pretraining at constant rates up to its own epoch."""
    found = load(path)
    told = settings_in(found, path) or {}
    epoch = found.get("epoch")
    if "moco" in found and type(epoch) is int and not told.get("self_schedule"):
        told |= {"self_max_epoch": epoch} if "self_max_epoch" in told else {}
    return Start(path, told)
