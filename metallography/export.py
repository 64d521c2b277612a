"""A trained network as one file that other programs can run: ONNX, or PyTorch's own .pt2.

The file takes pictures of any size as float RGB 0 ... 255 and gives class probabilities; the
normalisation is in it. It is written beside its place, read back, compared with the network in
PyTorch on pictures of three sizes, and only then put into its place.
"""

from __future__ import annotations

import importlib.util
import json
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from utils.commandline import UserError
from utils.files import replacing

Floats = NDArray[np.float32]
Run = Callable[[Floats], Floats]
"""An exported model: float32 (1, 3, H, W) to probabilities (1, C, H, W)."""

SUFFIXES = (".onnx", ".pt2")
ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")
SMALLEST_SIDE, LARGEST_SIDE = 16, 65536
POOLED = 8  # the network halves a picture three times
TOLERANCE = 1e-4  # of probabilities: other programs sum float32 in another order
SIZES = {1: ((64, 96), (83, 102), (121, 77)), POOLED: ((64, 96), (88, 104), (136, 72))}
"""Height and width of the pictures of the check, by step; the remainder is added."""


class Difference(NamedTuple):
    """Exported against PyTorch on one picture: its size, and the largest difference."""

    height: int
    width: int
    largest: float


class Exported(NamedTuple):
    """What was written: it takes sides of ``step`` n + ``remainder``; how equal it is."""

    step: int
    remainder: int
    differences: list[Difference]


class Deployed(nn.Module):
    """A network with what comes before and after it.

    Args:
        network: normalised (B, 3, H, W) to logits (B, C, H, W).
        mean, std: of the three channels, for values 0 ... 1.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, network: nn.Module, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.network = network
        self.register_buffer("mean", torch.tensor(mean)[:, None, None])
        self.register_buffer("std", torch.tensor(std)[:, None, None])

    def normalise(self, image: Tensor) -> Tensor:
        """What the network takes, from values 0 ... 1."""
        return (image - self.mean) / self.std

    def forward(self, image: Tensor) -> Tensor:
        """RGB 0 ... 255 (B, 3, H, W) to class probabilities (B, C, H, W)."""
        return self.network(self.normalise(image / 255)).softmax(dim=1)


class Standardized(Deployed):
    """A network whose input is normalised by each image's own mean and deviation.

    Args:
        network: as above.
        least: the smallest deviation that is divided by, for values 0 ... 1.
    """

    def __init__(self, network: nn.Module, least: float) -> None:
        super().__init__(network, (0.0,) * 3, (1.0,) * 3)
        self.least = least

    def normalise(self, image: Tensor) -> Tensor:
        """Each image less its mean, over its deviation."""
        centred = image - image.mean(dim=(1, 2, 3), keepdim=True)
        deviation = centred.square().mean(dim=(1, 2, 3), keepdim=True).sqrt()
        return centred / deviation.clamp(min=self.least)


def check_target(path: Path) -> None:
    """Raise UserError if a file of this name cannot be written here."""
    if path.suffix not in SUFFIXES:
        raise UserError(f"--export: found {path}; give a name that ends in .onnx or .pt2")
    if not path.parent.is_dir():
        raise UserError(f"--export: {path.parent} is no folder; give a file in one that exists")
    missing = [name for name in ONNX_PACKAGES if importlib.util.find_spec(name) is None]
    if path.suffix == ".onnx" and missing:
        raise UserError(
            f"--export: {path.name} needs packages that are missing here: pip install "
            f"{' '.join(missing)}; or give a name that ends in .pt2, which needs none"
        )


def export(
    model: Deployed,
    path: Path,
    reference: Callable[[NDArray[np.uint8]], Floats],
    about: Mapping[str, Any],
    side: int = 0,
) -> Exported:
    """Write a model (on the CPU, in evaluation mode), and check what was written.

    Args:
        model: the network as other programs see it.
        path: .onnx or .pt2; a file of that name is replaced.
        reference: what predictions are compared with: uint8 (H, W, 3) to (C, H, W).
        about: facts on the model, stored in the file as JSON.
        side: of the images the model was made for; 0: any.

    Raises:
        UserError: a package is missing, or the file's predictions differ from PyTorch's.
    """
    check_target(path)
    with _quiet(), replacing(path, "--export") as partial:
        program, step, remainder = trace(model, side % POOLED)
        write = _write_onnx if path.suffix == ".onnx" else _write_pt2
        sides = {"side_step": step, "side_remainder": remainder}
        write(program, partial, json.dumps({**about, **sides}))
        load = load_onnx if path.suffix == ".onnx" else load_pt2
        sizes = [(h + remainder, w + remainder) for h, w in SIZES[step]]
        differences = list(compare(load(partial), reference, sizes))
        wrong = [d for d in differences if not d.largest <= TOLERANCE]
        if wrong:
            raise UserError(
                f"--export: {path} not written: it differs from PyTorch by {wrong[0].largest:g}"
                f" at {wrong[0].height}x{wrong[0].width} pixels; try the other of .onnx, .pt2"
            )
    return Exported(step, remainder, differences)


def trace(model: Deployed, remainder: int = 0) -> tuple[torch.export.ExportedProgram, int, int]:
    """Record the computation for sides of any length, else for ``POOLED`` n + ``remainder``.

    How far the network pads on its way up depends on the remainders of the sides. PyTorch 2.6 can
    record that for one remainder only.

    Returns:
        The recording; step and remainder of the sides it takes.
    """
    dim = torch.export.Dim
    sizes = [dim(name, min=SMALLEST_SIDE, max=LARGEST_SIDE) for name in ("height", "width")]
    least, most = SMALLEST_SIDE // POOLED, LARGEST_SIDE // POOLED
    try:
        return _record(model, (83, 102), sizes), 1, 0
    except (RuntimeError, ValueError, AssertionError):  # constraints on the sides
        counts = [dim(name, min=least, max=most) for name in ("rows", "columns")]
        linear = [POOLED * count + remainder if remainder else POOLED * count for count in counts]
        size = (64 + remainder, 80 + remainder)
        return _record(model, size, linear), POOLED, remainder


def _record(
    model: Deployed, size: tuple[int, int], sides: Sequence[Any]
) -> torch.export.ExportedProgram:
    example = torch.zeros(1, 3, *size)
    shapes = {"image": {2: sides[0], 3: sides[1]}}
    with torch.no_grad():
        return torch.export.export(model, (example,), dynamic_shapes=shapes, strict=False)


def _write_pt2(program: torch.export.ExportedProgram, path: Path, about: str) -> None:
    torch.export.save(program, path, extra_files={"about.json": about})


def _write_onnx(program: torch.export.ExportedProgram, path: Path, about: str) -> None:
    written = torch.onnx.export(
        program,
        dynamo=True,
        input_names=["image"],
        output_names=["probabilities"],
        verbose=False,
    )
    assert written is not None
    written.model.metadata_props["about"] = about
    written.save(str(path), external_data=False)


def load_pt2(path: Path) -> Run:
    """Read a .pt2 file."""
    module = torch.export.load(path).module()

    def run(image: Floats) -> Floats:
        with torch.no_grad():
            return module(torch.from_numpy(image)).numpy()

    return run


def load_onnx(path: Path) -> Run:
    """Read an .onnx file into ONNX Runtime, on the CPU."""
    import onnxruntime  # type: ignore[import-untyped,import-not-found,unused-ignore]

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return lambda image: session.run(["probabilities"], {"image": image})[0]


def compare(
    run: Run,
    reference: Callable[[NDArray[np.uint8]], Floats],
    sizes: Sequence[tuple[int, int]],
) -> Iterator[Difference]:
    """Compare predictions on a random picture of each size (height, width)."""
    rng = np.random.default_rng(0)
    for height, width in sizes:
        picture = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        image = np.ascontiguousarray(picture.transpose(2, 0, 1)[None], np.float32)
        given, expected = run(image)[0], reference(picture)
        same_shape = given.shape == expected.shape
        largest = float(np.abs(given - expected).max()) if same_shape else float("inf")
        yield Difference(height, width, largest)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporters' remarks on their own workings from the terminal."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
