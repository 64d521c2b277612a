"""A trained network as one file that other programs can run: ONNX, or PyTorch's own .pt2.

The file maps images of any size, float RGB 0 ... 255, to class probabilities, normalisation
included. Before it gets its name it is read back and compared with the network in PyTorch on images
of three sizes.
"""

from __future__ import annotations

import importlib.util
import io
import json
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from data import MEAN, SMALLEST_DEVIATION, STD
from imaging.field import SMALLEST_SIDE
from metallography.tiling import Floats, Predict
from utils.commandline import UserError
from utils.files import replacing

Run = Callable[[Floats], Floats]
"""An exported model: float32 (1, 3, H, W) to probabilities (1, C, H, W)."""

SUFFIXES = (".onnx", ".pt2")
ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")
LARGEST_SIDE = 65536
POOLED = 8  # the network halves an image three times
TOLERANCE = 1e-4  # of probabilities: other programs sum float32 in another order
CHECKED = ((64, 96), (83, 102), (121, 77))  # height and width of the images of the check


class Deployed(nn.Module):
    """A network, (B, 3, H, W) to logits (B, C, H, W), between normalisation and softmax.

    ``standardize``: normalised by each image's own mean and standard deviation, not by fixed ones.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, network: nn.Module, standardize: bool) -> None:
        super().__init__()
        self.network, self.standardize = network, standardize
        self.register_buffer("mean", torch.tensor(MEAN)[:, None, None])
        self.register_buffer("std", torch.tensor(STD)[:, None, None])

    def forward(self, image: Tensor) -> Tensor:
        """RGB 0 ... 255 (B, 3, H, W) to class probabilities (B, C, H, W)."""
        image, mean, std = image / 255, self.mean, self.std
        if self.standardize:
            mean = image.mean(dim=(1, 2, 3), keepdim=True)
            variance = (image - mean).square().mean(dim=(1, 2, 3), keepdim=True)
            std = variance.sqrt().clamp(min=SMALLEST_DEVIATION)
        return self.network((image - mean) / std).softmax(dim=1)


def check_target(path: Path, overwrite: bool = True) -> None:
    """Raise UserError if a file of this name cannot be written here, or is not to be replaced."""
    if path.suffix not in SUFFIXES:
        raise UserError(f"--export: found {path}; give a name that ends in .onnx or .pt2")
    if not path.parent.is_dir():
        raise UserError(f"--export: {path.parent} is no folder; give a file in one that exists")
    if path.exists() and not overwrite:
        raise UserError(f"--export: {path} is there already; give another name, or --overwrite")
    missing = [name for name in ONNX_PACKAGES if importlib.util.find_spec(name) is None]
    if path.suffix == ".onnx" and missing:
        raise UserError(
            f"--export: {path.name} needs packages that are missing here: pip install "
            f"{' '.join(missing)}; or give a name that ends in .pt2, which needs none"
        )


def export(model: Deployed, path: Path, reference: Predict, facts: Mapping[str, Any]) -> list[str]:
    """Write a model that is on the CPU to a .onnx or .pt2 file, and check what was written.

    The file's predictions are compared with those of ``reference``. The file stores ``facts`` as
    JSON: ``classes`` (their names), ``mapping`` (their gray values), ``image_size`` N of the
    training images, 0 if they were not resized. Returns lines on input, output and the check.

    UserError if a package is missing, or the predictions differ.
    """
    check_target(path)
    write, read = (_write_onnx, load_onnx) if path.suffix == ".onnx" else (_write_pt2, load_pt2)
    with warnings.catch_warnings(), replacing(path, "--export") as partial:
        warnings.simplefilter("ignore")  # the exporters warn about their own internals
        program, step, remainder = trace(model.eval(), facts["image_size"] % POOLED)
        about = {
            **facts,
            "input": "image: float32 (1, 3, H, W), RGB, 0 ... 255",
            "output": "probabilities: float32 (1, C, H, W)",
            "side_step": step,
            "side_remainder": remainder,
        }
        write(program, partial, json.dumps(about))
        run = read(partial)
        checks = []
        for size in CHECKED:
            height, width = (side - side % step + remainder for side in size)
            difference = largest_difference(run, reference, height, width)
            if not difference <= TOLERANCE:
                raise UserError(
                    f"--export: {path} not written: it differs from PyTorch by {difference:g} at "
                    f"{height}x{width} pixels; try the other of .onnx, .pt2"
                )
            checks.append(f"check at {height}x{width}: largest difference {difference:.1e}")
    classes, side = len(facts["classes"]), facts["image_size"]
    return [
        f"{path}: {classes} classes, checked against PyTorch",
        f"input: image, float32 (1, 3, H, W), RGB 0 ... 255 (a gray image three times), "
        f"{_sides(step, remainder)}; the normalisation is in the model"
        + (", by each image's own mean and standard deviation" if model.standardize else ""),
        f"output: probabilities, float32 (1, {classes}, H, W); the class is the largest",
        *([f"size: resize images to {side}x{side} before, as predict.py does"] if side else []),
        *checks,
    ]


def _sides(step: int, remainder: int) -> str:
    """Which heights and widths an exported model takes, in words."""
    if step == 1:
        return f"any H and W from {SMALLEST_SIDE} on"
    rest = f" plus {remainder}" if remainder else ""
    return (
        f"H and W multiples of {step}{rest}, from {SMALLEST_SIDE + remainder} on "
        f"(PyTorch {torch.__version__} can export no others, a newer one can)"
    )


def trace(model: Deployed, remainder: int = 0) -> tuple[torch.export.ExportedProgram, int, int]:
    """Record the computation for sides of any length, else for ``POOLED`` n + ``remainder``.

    How far the network pads on its way up depends on the remainders of the sides; PyTorch 2.6 can
    record that for one remainder only. Returns the recording, step and remainder of the sides.
    """

    def record(size: tuple[int, int], sides: Sequence[Any]) -> torch.export.ExportedProgram:
        shapes = {"image": {2: sides[0], 3: sides[1]}}
        with torch.no_grad():
            example = (torch.zeros(1, 3, *size),)
            return torch.export.export(model, example, dynamic_shapes=shapes, strict=False)

    dim, least, most = torch.export.Dim, SMALLEST_SIDE, LARGEST_SIDE
    try:
        sides = [dim(name, min=least, max=most) for name in ("height", "width")]
        return record((83, 102), sides), 1, 0
    except (RuntimeError, ValueError, AssertionError):  # constraints on the sides
        least, most = least // POOLED, most // POOLED
        counts = [dim(name, min=least, max=most) for name in ("rows", "columns")]
        linear = [POOLED * count + remainder if remainder else POOLED * count for count in counts]
        return record((64 + remainder, 80 + remainder), linear), POOLED, remainder


def _write_pt2(program: torch.export.ExportedProgram, path: Path, about: str) -> None:
    contents = io.BytesIO()  # of a path, PyTorch complains unless its name ends in .pt2
    torch.export.save(program, contents, extra_files={"about.json": about})
    path.write_bytes(contents.getvalue())


def _write_onnx(program: torch.export.ExportedProgram, path: Path, about: str) -> None:
    names = {"input_names": ["image"], "output_names": ["probabilities"]}
    written = torch.onnx.export(program, dynamo=True, verbose=False, **names)  # type: ignore[arg-type]
    assert written is not None
    written.model.metadata_props["about"] = about
    written.save(str(path), external_data=False)


def load_pt2(path: Path) -> Run:
    """Read a .pt2 file."""
    module = torch.export.load(io.BytesIO(path.read_bytes())).module()
    return lambda image: module(torch.from_numpy(image)).detach().numpy()


def load_onnx(path: Path) -> Run:
    """Read an .onnx file into ONNX Runtime, on the CPU."""
    import onnxruntime  # type: ignore[import-untyped,import-not-found,unused-ignore]

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return lambda image: session.run(["probabilities"], {"image": image})[0]


def largest_difference(run: Run, reference: Predict, height: int, width: int) -> float:
    """How far two predictions of one random image differ at most; inf if their shapes do."""
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    image = np.ascontiguousarray(pixels.transpose(2, 0, 1)[None], np.float32)
    given, expected = run(image)[0], reference(pixels)
    return float(np.abs(given - expected).max()) if given.shape == expected.shape else math.inf
