"""The same program with the defaults of the surface-defect demo: ``python train_defect.py``.

Without dataset/NEU_Seg-demo a synthetic stand-in set is made and used in its place, with a budget
of about three minutes on two processor cores. A set given by ``--data_dir`` is trained on as long
as published.
"""

import sys
from pathlib import Path
from typing import Any

from utils import leave_while_loading

if __name__ == "__main__":  # before the imports that take seconds
    leave_while_loading()

from config import Config
from config_run import main
from dataset.make_demo import make_demo_set
from utils.commandline import ONE, split_flags

REAL = Path("dataset/NEU_Seg-demo")
STANDIN = Path("dataset/NEU_Seg-standin")
EXPERIMENT: dict[str, Any] = dict(
    name="defect",
    data_dir=REAL if REAL.is_dir() else STANDIN,
    stages="self-fine",
    self_mode="simclr",
    data_size="f",
    multi_round=False,
)
ON_STANDIN: dict[str, Any] = dict(
    name="standin",
    data_dir=STANDIN,
    image_size=128,
    self_max_epoch=10,
    fine_max_epoch=20,
    eval_every=10,
)
DATA = split_flags(sys.argv[1:], {"data_dir": ONE}).one("data_dir", str(EXPERIMENT["data_dir"]))
if Path(DATA) == STANDIN:
    EXPERIMENT |= ON_STANDIN


def prepare(config: Config) -> None:
    """Make the stand-in set if it is what the run reads."""
    if Path(config.data_dir) == STANDIN:
        make_demo_set(STANDIN)


if __name__ == "__main__":
    sys.exit(main(prepare=prepare, **EXPERIMENT))
