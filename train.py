"""Pretrain and fine-tune on your set: edit the few settings below, or give any on the command line.

``python train.py -stages self-fine --data_dir dataset/aluminum``; ``python train.py -h`` lists all.
"""

import sys
from typing import Any

from utils import leave_while_loading

if __name__ == "__main__":  # before the imports that take seconds
    leave_while_loading()

from config_run import main

EXPERIMENT: dict[str, Any] = dict(
    name="aluminum",  # runs go to <name>_<self_mode>/
    data_dir="dataset/aluminum",
    stages="self-fine",  # self, fine, sup, joined by '-'
    self_mode="simclr",  # simclr, moco: PSCL; -h names the methods without it
    data_size="1",  # annotated images: 1, 5, f (all), or several such as 15f
    multi_round=True,  # five annotated images in turn; False = only number 0
    temperature=0.5,
    global_local_ratio=0.7,  # share of the patch loss
)

if __name__ == "__main__":
    sys.exit(main(**EXPERIMENT))
