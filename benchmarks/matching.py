"""How often a matched patch shows the class of its template, where the training images have masks.

    python benchmarks/matching.py RUN/1_0/moco0.pt RUN/1_0/moco20.pt --data_dir dataset/uhcs

PSCL takes the patches that it matches in unlabelled images for patches of the template's class. The
masks of train_numf, which pretraining never sees, say how often that is true: with the network of
each checkpoint, images unchanged, in batches as in training. ``chance`` is the class's share of the
cells, which a match at random would have; ``templates`` is how often the patches chosen in the
annotated image show their class themselves.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # when it is run as a script

from benchmarks.measure import table  # noqa: E402
from data import DataError, Sample, find_split, image_input, one_hot  # noqa: E402
from model import METHODS, PSCL, SCALES, build_method  # noqa: E402
from utils.checkpoint import CheckpointError, from_published, load, transfer  # noqa: E402
from utils.geometry import ViewGeometry, resize  # noqa: E402
from utils.imagefile import ImageStore  # noqa: E402

UNCHANGED = ViewGeometry(flip=False, quarter_turns=4)
BATCH = 8  # images beside the annotated one


def method_of(path: str) -> tuple[PSCL, dict[str, Any]]:
    """The method of a pretraining checkpoint, and the settings that it was made with.

    Raises:
        CheckpointError: the file is none of a PSCL method.
    """
    file = load(path)
    settings = file.get("settings", {})
    if not issubclass(METHODS.get(settings.get("self_mode", ""), object), PSCL):
        raise CheckpointError(f"{path}: not of PSCL's pretraining; give moco0.pt ... of such a run")
    method = build_method(settings["self_mode"], settings)
    assert isinstance(method, PSCL)
    transfer(method, from_published(file["moco"]), prefix="", source=path)
    return method.to(memory_format=torch.channels_last), settings  # type: ignore[call-overload]


def masks_at(masks: Tensor, rows: int, columns: int) -> Tensor:
    """The prevailing class of each cell: one-hot masks (B, C, H, W) to (B, rows*columns)."""
    return resize(masks, (rows, columns)).argmax(dim=1).flatten(1)


def batches(
    annotated: Sample, samples: Sequence[Sample], settings: dict[str, Any]
) -> Iterator[tuple[Tensor, Tensor]]:
    """Images (B, 3, H, W) and one-hot masks (B, C, H, W), the annotated image first."""
    store = ImageStore(settings["image_size"], settings["ignore_label"])
    for start in range(0, len(samples) - BATCH + 1, BATCH):
        chosen = [annotated, *samples[start : start + BATCH]]
        images, masks = [], []
        for sample in chosen:
            if sample.mask is None:
                raise DataError(f"{sample.image}: no mask; the matches cannot be judged")
            images.append(image_input(sample, store, settings.get("standardize", False)))
            masks.append(one_hot(store.mask(sample.mask), settings["num_classes"]))
        view = torch.stack(images).contiguous(memory_format=torch.channels_last)
        yield view, torch.stack(masks)


@torch.no_grad()
def judge(path: str, data_dir: str, repeat: int) -> list[dict[str, Any]]:
    """A row for each scale of a checkpoint, with the shares class by class."""
    method, settings = method_of(path)
    encoder = getattr(method, "encoder_k", method.encoder_q)
    split = f"sup_num1_{repeat}"
    annotated = next(iter(find_split(data_dir, split)), None)
    samples = find_split(data_dir, "train_numf")
    samples = [s for s in samples if annotated is None or s.name != annotated.name]
    if annotated is None or len(samples) < BATCH:
        one = "an" if annotated else "no"
        raise DataError(
            f"{data_dir}: found {len(samples)} other images in train_numf and {one} image in "
            f"{split}; at least {BATCH} and one are needed"
        )
    classes = settings["num_classes"]
    counts = torch.zeros(SCALES, 3, classes, dtype=torch.float64)  # right, at chance, templates
    number = 0
    torch.manual_seed(0)
    for view, masks in batches(annotated, samples, settings):
        _, maps = encoder(view)
        batch = {"geometry": [UNCHANGED] * len(view), "label": masks[:1]}
        for scale in range(SCALES):
            _, _, patches = method.sample(maps, maps, encoder.decode, batch, scale)
            truth = masks_at(masks, *maps[scale].shape[-2:])  # (B, P)
            found = truth.gather(1, patches.key).view(len(view), classes, -1)  # (B, C, K)
            hit = found == torch.arange(classes)[:, None]
            counts[scale, 0] += hit[1:].double().mean(dim=(0, 2))
            counts[scale, 1] += F.one_hot(truth[1:], classes).double().mean(dim=(0, 1))
            counts[scale, 2] += hit[0].double().mean(dim=1)
        number += 1
    rows = []
    for scale, shares in enumerate(counts / max(number, 1)):
        row: dict[str, Any] = {"checkpoint": "/".join(Path(path).parts[-3:]), "scale": scale + 1}
        for name, values in zip(("right", "chance", "templates"), shares.tolist(), strict=True):
            row[name] = sum(values) / classes
            row |= {f"{name} {c}": value for c, value in enumerate(values)}
        rows.append(row)
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("checkpoints", nargs="+", help="moco0.pt, moco20.pt ... of PSCL runs")
    parser.add_argument("--data_dir", required=True)
    parser.add_argument("--repeat", type=int, default=0, help="number of the annotated image [0]")
    parser.add_argument(
        "--threads", type=int, default=0, help="CPU threads; 0: PyTorch's choice [0]"
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    given = parser.parse_args(argv)
    if given.threads > 0:
        torch.set_num_threads(given.threads)
    try:
        rows = [r for path in given.checkpoints for r in judge(path, given.data_dir, given.repeat)]
    except (CheckpointError, DataError) as error:
        print(error, file=sys.stderr)
        return 2
    print(json.dumps(rows) if given.json else table(rows, list(rows[0])))
    return 0


if __name__ == "__main__":
    sys.exit(main())
