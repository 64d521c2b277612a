"""How often a matched patch shows the class of its template, where the training images have masks.

    python benchmarks/matching.py RUN/1_0/moco0.pt RUN/1_0/moco20.pt --data_dir dataset/uhcs

PSCL assumes that matched patches of unlabelled images show their template's class. ``right`` is how
often they do, by the masks of train_numf, which pretraining never sees: with each checkpoint's
network, without augmentation, in whole batches as in training. ``chance`` is the class's share of
the cells, what random matches would reach; ``templates`` is how often the patches chosen in the
annotated image show their class. Unlabelled cells are left out of all three.

A template is sought in every image, also where its class is absent. ``present`` is the share of the
matches whose image has the class, ``right if present`` how often these are right. Can absence
be told without masks? A match is kept by cycle consistency if, of all cells of the annotated
image, the most similar one (by cosine) has the template's class again: ``kept`` is the share of
these matches, ``right if kept`` how often they are right. ``voted`` asks more, that so do the five
most similar ones, as ``--admit_matches cycle`` does.

Networks of the plain methods are judged by PSCL-SimCLR's patches: what would it match with them?
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # when it is run as a script

from utils import leave_while_loading

if __name__ == "__main__":  # before the imports that take seconds
    leave_while_loading()

import torch
from torch import Tensor

from benchmarks.measure import parser_of, table, use_threads
from data import Sample, find_split, image_input, one_hot
from imaging.store import ImageStore
from model import METHODS, PSCL, build_method
from networks import SCALES, ProjectedUNet
from pscl.geometry import ViewGeometry, resize
from pscl.lazy_map import LazyMap
from pscl.sampling import own_votes
from utils.checkpoint import CheckpointError, from_published, load, transfer
from utils.commandline import exit_code
from utils.files import DataError

UNCHANGED = ViewGeometry(flip=False, quarter_turns=4)
BATCH = 8  # images beside the annotated one
SHARES = {"right if present": "present", "right if kept": "kept", "right if voted": "voted"}
KINDS = ("right", "chance", "templates", *SHARES)
COLUMNS = (*KINDS[:3], *(name for of, share in SHARES.items() for name in (share, of)))


def method_of(path: str) -> tuple[PSCL, dict[str, Any]]:
    """The method of a pretraining checkpoint, PSCL-SimCLR for a plain one, and its settings."""
    file = load(path)
    settings: Any = file.get("settings")
    weights: Any = file.get("moco")
    complete = isinstance(settings, dict) and isinstance(weights, dict)
    if not complete or settings.get("self_mode") not in METHODS:
        raise CheckpointError(f"{path}: not of pretraining; give moco0.pt ... of such a run")
    of_pscl = issubclass(METHODS[settings["self_mode"]], PSCL)
    method = build_method(settings["self_mode"] if of_pscl else "simclr", settings)
    assert isinstance(method, PSCL)
    prefix = "" if of_pscl else "encoder_q."
    transfer(method, from_published(weights), prefix=prefix, source=path)
    return method.to(memory_format=torch.channels_last), settings  # type: ignore[call-overload]


def masks_at(masks: Tensor, rows: int, columns: int) -> Tensor:
    """The prevailing class of each cell of a grid: one-hot (B, C, H, W) to (B, rows*columns).

    C where it is unlabelled.
    """
    shares = resize(masks, (rows, columns)).flatten(2)  # (B, C, P)
    return shares.argmax(dim=1).masked_fill(shares.sum(dim=1) < 1, masks.shape[1])


def annotated_of(path: str, data_dir: str, split: str | None) -> tuple[str, Sample]:
    """The annotated image of a checkpoint's run, by the name of its folder (1_0) or the split."""
    if not split:
        size, _, number = Path(path).resolve().parent.name.partition("_")
        if size not in ("1", "5") or not number.isdigit():
            raise DataError(f"{path}: not in a folder such as 1_0; give --annotated sup_num1_0")
        split = f"sup_num{size}_{number}"
    sample = next(iter(find_split(data_dir, split)), None)
    if sample is None:
        raise DataError(f"{data_dir}/{split}/img: no image; give --annotated SPLIT")
    return split, sample


def batches(
    annotated: Sample, samples: Sequence[Sample], settings: dict[str, Any]
) -> Iterator[tuple[Tensor, Tensor]]:
    """Images (B, 3, H, W) and one-hot masks (B, C, H, W), the annotated image first."""
    store = ImageStore(settings["image_size"], settings["ignore_label"])
    for start in range(0, len(samples) - BATCH + 1, BATCH):
        images, masks = [], []
        for sample in (annotated, *samples[start : start + BATCH]):
            if sample.mask is None:
                raise DataError(
                    f"{sample.image}: no mask, so matches cannot be judged; save it in gt"
                )
            images.append(image_input(sample, store, settings.get("standardize", False)))
            masks.append(one_hot(store.mask(sample.mask), settings["num_classes"]))
        view = torch.stack(images).contiguous(memory_format=torch.channels_last)
        yield view, torch.stack(masks)


def cycle_consistent(
    encoder: ProjectedUNet, map_k: LazyMap, scale: int, truth: Tensor, key: Tensor
) -> tuple[Tensor, Tensor]:
    """Which matches of a batch the nearest cell keeps, and the nearest few: bool (B-1, C, K).

    ``map_k`` is the map of all images, ``truth`` (P,) the classes of the annotated image's cells,
    ``key`` (B, C, K, D) the embeddings of the patches.
    """
    every = torch.arange(len(truth)).expand(len(key), -1)
    cells = encoder.decode.patch(map_k.at(every).transpose(1, 2), scale)[0].float()  # (D, P)
    own = own_votes(key[1:].flatten(1, 2).mT, cells, truth >= 0, truth, key.shape[1])
    return own[..., 0], own.all(dim=-1)


@torch.no_grad()
def judge(path: str, data_dir: str, split: str | None) -> list[dict[str, Any]]:
    """A row for each scale of a checkpoint, with the shares class by class."""
    method, settings = method_of(path)
    encoder = getattr(method, "encoder_k", method.encoder_q)
    split, annotated = annotated_of(path, data_dir, split)
    samples = [s for s in find_split(data_dir, "train_numf") if s.name != annotated.name]
    if len(samples) < BATCH:
        found = f"{len(samples)} images besides the annotated one"
        raise DataError(
            f"{data_dir}/train_numf/img: found {found}; at least {BATCH} are needed: add images"
        )
    classes = settings["num_classes"]
    # Of each kind of cells: how many show class c, how many are labelled.
    hits, labelled = torch.zeros(2, SCALES, len(KINDS), classes, dtype=torch.float64)
    torch.manual_seed(0)
    for view, masks in batches(annotated, samples, settings):
        _, maps = method.encode(encoder, view)
        batch = {"view_k": view, "geometry": [UNCHANGED] * len(view), "label": masks[:1]}
        sampled = method.sample(maps, maps, encoder.decode, method.planned(batch))
        for scale, (_, key, patches) in enumerate(sampled):
            truth = masks_at(masks, *maps[scale].size)  # (B, P)
            shown = truth.gather(1, patches.key).view(len(view), classes, -1)  # (B, C, K)
            everywhere = truth[1:].expand(classes, -1, -1)  # (C, B-1, P)
            matched = shown[1:].transpose(0, 1)  # (C, B-1, K)
            own = torch.arange(classes)[:, None]
            present = (everywhere == own[..., None]).any(dim=2, keepdim=True)  # (C, B-1, 1)
            kept, voted = cycle_consistent(encoder, maps[scale], scale, truth[0], key)
            cells = {
                "right": matched.flatten(1),
                "chance": everywhere.flatten(1),
                "templates": shown[0],
                "right if present": matched.masked_fill(~present, classes).flatten(1),
                "right if kept": matched.masked_fill(~kept.transpose(0, 1), classes).flatten(1),
                "right if voted": matched.masked_fill(~voted.transpose(0, 1), classes).flatten(1),
            }
            for kind, name in enumerate(KINDS):
                hits[scale, kind] += (cells[name] == own).sum(dim=1)
                labelled[scale, kind] += (cells[name] < classes).sum(dim=1)
    rows: list[dict[str, Any]] = []
    checkpoint = "/".join(Path(path).parts[-3:])
    for scale, shares in enumerate((hits / labelled).tolist()):
        line: dict[str, Any] = {"checkpoint": checkpoint, "annotated": split, "scale": scale + 1}
        share_of = dict(zip(KINDS, shares, strict=True))
        for of, what in SHARES.items():
            part = labelled[scale, KINDS.index(of)] / labelled[scale, KINDS.index("right")]
            share_of[what] = part.tolist()
        for what in COLUMNS:
            known = [value for value in share_of[what] if not math.isnan(value)]
            line[what] = sum(known) / len(known) if known else math.nan
            line |= {f"{what} {c}": value for c, value in enumerate(share_of[what])}
        rows.append(line)
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = parser_of(__doc__)
    parser.add_argument("checkpoints", nargs="+", help="moco0.pt, moco20.pt ... of pretraining")
    parser.add_argument("--data_dir", required=True, help="folder of the set")
    parser.add_argument("--annotated", help="split of the annotated image; default: the run's")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    given = parser.parse_args(argv)

    def work() -> None:
        use_threads(given.threads)
        folder, split = given.data_dir, given.annotated
        rows = [row for path in given.checkpoints for row in judge(path, folder, split)]
        print(json.dumps(rows) if given.json else table(rows))

    return exit_code(work, "The same command begins again")


if __name__ == "__main__":
    sys.exit(main())
