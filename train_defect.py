"""The same program with the defaults of the surface-defect demo: ``python train_defect.py``.

Without dataset/NEU_Seg-demo a synthetic stand-in set is made beside it and used in its place.
"""

import sys
from pathlib import Path
from typing import Any

from config import Config
from config_run import main
from dataset.make_demo import DEFAULT_FOLDER, make_demo_set

REAL = Path("dataset/NEU_Seg-demo")
EXPERIMENT: dict[str, Any] = dict(
    name="defect",
    data_dir=REAL if REAL.is_dir() else DEFAULT_FOLDER,
    stages="self-fine",
    self_mode="simclr",
    data_size="f",
    multi_round=False,
)


def prepare(config: Config) -> None:
    """Make the stand-in set if it is what the run reads."""
    if Path(config.data_dir) == DEFAULT_FOLDER:
        make_demo_set(DEFAULT_FOLDER)


if __name__ == "__main__":
    sys.exit(main(prepare=prepare, **EXPERIMENT))
