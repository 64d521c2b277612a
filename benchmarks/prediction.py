"""What predicting a folder takes, beside the same work done one thing after the other.

    python benchmarks/prediction.py                                 # on a CPU
    python benchmarks/prediction.py --images 2000 --device cuda     # on a card

Two folders are drawn: many small images, and one large image. ``serial`` decodes, predicts tile by
tile, measures and writes in turn; ``program`` is what predict.py does. Both write the same bytes,
which is checked. ``cost`` is what ``benchmarks.measure.spent`` counts; the parts are those of the
serial form. ``at_once`` is the network alone on so many small images at a time.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Generator, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # when it is run as a script

from utils import leave_while_loading

if __name__ == "__main__":  # before the imports that take seconds
    leave_while_loading()

import cv2
import numpy as np
import torch

from benchmarks import measure
from benchmarks.measure import Result
from metallography import tiling
from metallography.folder import Folder
from metallography.items import Item, list_images
from metallography.segmenter import Segmenter
from networks import CHANNELS, UNet
from utils.checkpoint import save

PARTS = ("decode", "network", "measure", "write")
AT_ONCE = (1, 4, 16)
FORMS = ("serial", "program")


class Serial(Folder):
    """The same work, one thing after the other; ``parts`` adds up the cost of each kind."""

    def each(self, items: Sequence[Item]) -> Generator[Item, None, None]:
        """The items in turn, nothing ahead and nothing behind."""
        self.parts: defaultdict[str, float] = defaultdict(float)
        yield from items

    def timed(self, part: str, work: Callable[..., Any], *given: Any) -> Any:
        """Do a work as this part."""
        device = self.segmenter.device  # type: ignore[attr-defined]
        start = measure.spent(device)
        found = work(*given)
        self.parts[part] += measure.spent(device) - start
        return found

    def read(self, *given: Any) -> Any:
        """As in the program."""
        return self.timed("decode", super().read, *given)

    def predict(self, *given: Any) -> Any:
        """As in the program."""
        return self.timed("network", super().predict, *given)

    def measure(self, *given: Any) -> Any:
        """As in the program."""
        return self.timed("measure", super().measure, *given)

    def keep(self, *given: Any) -> None:
        """As in the program."""
        self.timed("write", super().keep, *given)


def in_turn(
    image: tiling.Array,
    predict: tiling.Predict,
    places: Sequence[tuple[int, int]],
    size: tuple[int, int],
) -> Iterator[tiling.Floats]:
    """``tiling._predicted``, one tile after the other in the same thread."""
    for row, column in places:
        yield predict(image[row : row + size[0], column : column + size[1]])


def draw(folder: Path, images: int, side: int) -> Path:
    """So many smooth gray images of a side."""
    folder.mkdir()
    random = np.random.default_rng(0)
    for number in range(images):
        coarse = random.integers(0, 256, (side // 16 + 2,) * 2, np.uint8)
        pixels = cv2.resize(coarse, (side, side), interpolation=cv2.INTER_CUBIC)
        cv2.imwrite(str(folder / f"{number:05}.png"), pixels)
    return folder


def write_model(path: Path, channels: Sequence[int]) -> Path:
    """A model of random weights that tells four classes apart."""
    torch.manual_seed(0)
    network = UNet(4, channels)
    for _ in range(3):  # BatchNorm's statistics
        network(torch.randn(2, 3, 64, 64))
    torch.nn.init.normal_(network.decode.outc["fc1"].get_parameter("weight"), std=1.0)
    save(path, {"finetune": network.state_dict(), "settings": {"num_classes": 4, "image_size": 0}})
    return path


def predicted(form: str, segmenter: Segmenter, images: Path, out: Path) -> tuple[Result, Folder]:
    """Predict a folder in one of the forms: cost and seconds of an image."""
    kind = Serial if form == "serial" else Folder
    out.mkdir()
    folder = kind(segmenter, list_images(images, out), out)
    cost, wall = measure.spent(segmenter.device), time.perf_counter()
    if form == "serial":
        with patch.object(tiling, "_predicted", in_turn):
            folder.run()
    else:
        folder.run()
    count = len(folder.items)
    took = {"cost": measure.spent(segmenter.device) - cost, "wall": time.perf_counter() - wall}
    if folder.bad:
        raise SystemExit("\n".join(folder.bad))
    return {name: 1000 * seconds / count for name, seconds in took.items()}, folder


def differing(one: Path, other: Path) -> list[str]:
    """The files of two folders of results whose bytes differ; times of change aside."""
    names = sorted(path.relative_to(one) for path in one.rglob("*") if path.is_file())
    if names != sorted(path.relative_to(other) for path in other.rglob("*") if path.is_file()):
        return ["other files"]
    return [str(n) for n in names if (one / n).read_bytes() != (other / n).read_bytes()]


def rows_of(segmenter: Segmenter, images: Path, place: Path, rounds: int) -> list[Result]:
    """Both forms on a folder in turn, so that a busy machine slows both; medians of the rounds."""
    found: dict[str, list[Result]] = {form: [] for form in FORMS}
    for number, form in itertools.product(range(rounds), FORMS):
        row, folder = predicted(form, segmenter, images, place / f"{form}{number}")
        if isinstance(folder, Serial):
            row |= {part: 1000 * folder.parts[part] / len(folder.items) for part in PARTS}
        found[form].append(row)
    unlike = differing(place / "serial0", place / "program0")
    middle = {
        form: {name: float(np.median([row[name] for row in rows])) for name in rows[0]}
        for form, rows in found.items()
    }
    serial = middle["serial"]
    return [
        {
            "images": images.name,
            "form": form,
            "cost ms": row["cost"],
            "wall ms": row["wall"],
            "of serial": row["cost"] / serial["cost"],
            "wall, of serial": row["wall"] / serial["wall"],
            **{f"{part} ms": row.get(part, "") for part in PARTS},
            "other bytes": len(unlike),
        }
        for form, row in middle.items()
    ]


def at_once(given: argparse.Namespace) -> list[Result]:
    """Cost of the network on several small images at a time, as ratio to one by one."""
    with tempfile.TemporaryDirectory() as folder:
        weights = write_model(Path(folder, "fine.pt"), given.channels)
        segmenter = Segmenter(weights, device=given.device)
        images = draw(Path(folder, "small"), max(AT_ONCE), given.size)
        files = [item.read(segmenter.gray) for item in list_images(images, images / "out")]
    costs: dict[int, list[float]] = {count: [] for count in AT_ONCE}
    for number, count in itertools.product(range(given.rounds + 1), costs):
        start = measure.spent(segmenter.device)
        for first in range(0, len(files), count):
            segmenter._predict_tiles(files[first : first + count], None)
        if number:  # the first round also maps memory
            costs[count].append((measure.spent(segmenter.device) - start) / len(files))
    middle = {count: 1000 * float(np.median(each)) for count, each in costs.items()}
    return [
        {"images at once": count, "network ms": ms, "of one by one": ms / middle[1]}
        for count, ms in middle.items()
    ]


def folders(given: argparse.Namespace) -> list[Result]:
    """Rows of both folders in both forms."""
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        weights = write_model(place / "fine.pt", given.channels)
        segmenter = Segmenter(weights, device=given.device, tile=given.tile)
        rows = []
        for name, count, side in (("small", given.images, given.size), ("large", 1, given.large)):
            images = draw(place / f"{count} of {side}x{side}", count, side)
            warm = draw(place / f"{name} first", 1, min(side, given.tile))
            for form in FORMS:  # the first time maps memory, and loads kernels
                predicted(form, segmenter, warm, place / f"{name} {form}")
            (results := place / name).mkdir()
            rows += rows_of(segmenter, images, results, given.rounds)
    return rows


def report(given: argparse.Namespace) -> Result:
    """Both folders in both forms, and the network on several images."""
    return {"rows": folders(given), "at_once": at_once(given)}


def channels(text: str) -> tuple[int, ...]:
    """The type of ``--channels``: whole numbers with commas between."""
    return tuple(map(int, text.split(",")))


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line; SystemExit 2 with a line for what is wrong."""
    parser = measure.parser_of_cases(__doc__)
    add = parser.add_argument
    add("--images", type=measure.at_least(1), default=100, help="how many small images")
    add("--size", type=measure.at_least(16), default=200, help="side of the small images in pixels")
    add("--large", type=measure.at_least(16), default=4000, help="side of the large one in pixels")
    add(
        "--tile",
        type=measure.at_least(256),
        default=tiling.DEFAULT_TILE,
        help="--tile of predict.py",
    )
    add("--channels", type=channels, default=CHANNELS, help="channels of the network")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    given = parse(argv)
    measure.use_threads(given.threads)
    names = ("images", "size", "large", "tile", "rounds")
    return measure.run_benchmark(given, names, lambda case: {}, report)


if __name__ == "__main__":
    sys.exit(main())
