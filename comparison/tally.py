"""Pixel counts of a finished run: the confusion matrix of each test image at an evaluation.

They stand in the run's state. Runs that were made before they did have only the pictures of their
predictions, which are counted and must give the scores that the run noted.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from config_run import Runner, picture_name
from data import find_split
from utils.commandline import UserError
from utils.imagefile import DataError, read_mask
from utils.metrics import IGNORED, Counts, Scores, SegmentationScores


def counts_of(runner: Runner, evaluation: Mapping[str, Any], known: dict[Path, Counts]) -> Counts:
    """The confusion matrices (n, C, C) of an evaluation of a finished run.

    Args:
        runner: the run.
        evaluation: out of its state.
        known: those that were counted from pictures so far, by folder; grows.

    Raises:
        DataError, UserError: the pictures cannot be read, or were changed.
    """
    if "confusion" in evaluation:
        return np.asarray(evaluation["confusion"], np.int64)
    folder = runner.run_dir / f"epoch_{evaluation['epoch']}"
    if folder in known:
        return known[folder]
    test = find_split(runner.config.data_dir, "test_numf")
    pictures = [folder / picture_name(sample.name) for sample in test]
    masks = [runner.job.store.mask(sample.mask) for sample in test if sample.mask is not None]
    counts = count_pictures(pictures, masks, runner.config.mapping)
    scores = Scores.from_confusion(counts).as_dict()
    for name in ("acc", "dice", "miou"):
        if not np.isclose(scores[name], evaluation[name], rtol=0, atol=1e-6, equal_nan=True):
            raise UserError(
                f"{folder}: its pictures score {name} {scores[name]:.4f}, the run says "
                f"{evaluation[name]:.4f}; they were changed: train this run again (--overwrite)"
            )
    return known.setdefault(folder, counts)


def count_pictures(
    pictures: Sequence[Path], masks: Iterable[Tensor], mapping: Sequence[int]
) -> Counts:
    """Confusion matrices (n, C, C) of predictions, out of the PNG files that an evaluation wrote.

    Args:
        pictures: a file for each test image, gray value ``mapping[c]`` where class c is predicted.
        masks: the true class ids (H, W) of each, uint8, in the same order.
        mapping: gray value of each class, all different.

    Raises:
        DataError: a file cannot be read, has another size than its mask, or holds a gray value
            that is no class's.
    """
    classes = np.full(256, IGNORED, np.uint8)
    classes[list(mapping)] = np.arange(len(mapping))
    scores = SegmentationScores(len(mapping))
    cure = "the prediction was changed or is another run's; train this run again (--overwrite)"
    for path, mask in zip(pictures, masks, strict=True):
        prediction = torch.from_numpy(classes[read_mask(path)])
        if prediction.shape != mask.shape:
            found, wanted = (f"{s[1]}x{s[0]}" for s in (prediction.shape, mask.shape))
            raise DataError(f"{path}: {found}, its mask is {wanted}; {cure}")
        if (prediction == IGNORED).any():
            raise DataError(f"{path}: a gray value that stands for no class; {cure}")
        scores.add(prediction, mask)
    return scores.counts()
