"""Exported models against PyTorch, and what cannot be exported."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from imaging.imagefile import read_mask
from metallography import export
from networks import UNet
from predict import main
from tests.trained_model import write_weights
from utils.checkpoint import save

MEAN, STD = (0.49139968, 0.48215841, 0.44653091), (0.24703223, 0.24348513, 0.26158784)


def network() -> UNet:
    torch.manual_seed(3)
    net = UNet(3, (4, 8, 16, 32)).eval()
    torch.nn.init.normal_(net.decode.outc["fc1"].weight, std=3)
    return net


def expected(image: np.ndarray) -> np.ndarray:
    """Probabilities by the plain way: float32 (1, 3, H, W) of 0 ... 255."""
    mean, std = (np.array(v, np.float32)[:, None, None] for v in (MEAN, STD))
    with torch.no_grad():
        return network()(torch.from_numpy((image / 255 - mean) / std)).softmax(1).numpy()


@pytest.mark.parametrize("suffix", [pytest.param(".onnx", marks=pytest.mark.slow), ".pt2"])
def test_an_exported_model_predicts_as_pytorch(tmp_path: Path, capsys, suffix: str) -> None:
    missing = [n for n in export.ONNX_PACKAGES if importlib.util.find_spec(n) is None]
    if suffix == ".onnx" and missing:
        pytest.skip(f"not installed: {' '.join(missing)}")
    state = {"finetune": network().state_dict(), "settings": {"num_classes": 3, "image_size": 20}}
    save(tmp_path / "fine.pt", state)
    path = tmp_path / f"model{suffix}"
    assert main(["--weights", str(tmp_path / "fine.pt"), "--export", str(path)]) == 0
    said = capsys.readouterr().out
    assert said.count("largest difference") == 3 and "resize images to 20x20" in said
    every = "any H and W" in said
    assert every or "multiples of 8 plus 4" in said
    run = (export.load_onnx if suffix == ".onnx" else export.load_pt2)(path)
    sizes = [(16 + i, 35 - 2 * i) for i in range(9)] if every else [(20, 20), (28, 84)]
    for size in sizes:
        image = np.random.default_rng(0).uniform(0, 255, (1, 3, *size)).astype(np.float32)
        np.testing.assert_allclose(run(image), expected(image), atol=1e-4)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["fine.pt", path.name]


@pytest.mark.parametrize(
    ("size", "resize"),
    [  # reduced; enlarged, and as it is, as in tests/test_readme.py
        ((90, 131), 48),
        pytest.param((40, 33), 64, marks=pytest.mark.slow),
        pytest.param((61, 70), 0, marks=pytest.mark.slow),
    ],
)
@pytest.mark.slow
def test_the_lines_of_the_page_predict_as_predict_py(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: tuple[int, int], resize: int
) -> None:
    missing = [n for n in export.ONNX_PACKAGES if importlib.util.find_spec(n) is None]
    if missing:
        pytest.skip(f"not installed: {' '.join(missing)}")
    monkeypatch.chdir(tmp_path)
    settings = {"num_classes": 3, "image_size": resize}
    save(tmp_path / "fine.pt", {"finetune": network().state_dict(), "settings": settings})
    noise = np.random.default_rng(1).normal(0, 1, (3, *size))
    smooth = [cv2.GaussianBlur(channel, (0, 0), 3.0) for channel in noise]
    image = np.stack([128 + 300 * channel for channel in smooth], axis=2).clip(0, 255)
    Image.fromarray(image.astype(np.uint8)).save("micrograph.png")
    assert main(["--weights", "fine.pt", "--export", "steel.onnx"]) == 0
    assert main(["--weights", "fine.pt", "--images", "micrograph.png", "--out", "out"]) == 0
    page = (Path(__file__).parents[1] / "docs" / "metallography.md").read_text(encoding="utf-8")
    code = next(c for c in re.findall(r"```python\n(.*?)```", page, re.S) if "onnxruntime" in c)
    found: dict[str, np.ndarray] = {}
    exec(code, found)
    expected = read_mask("out/classes/micrograph.png")
    assert len(np.unique(expected)) == 3
    assert (found["mask"] == expected).mean() >= 0.999


@pytest.mark.parametrize("norm", [pytest.param("batch", marks=pytest.mark.slow), "group"])
def test_an_exported_model_standardises_each_image(tmp_path: Path, capsys, norm: str) -> None:
    torch.manual_seed(3)
    net = UNet(3, (4, 8, 16, 32), norm).eval()
    torch.nn.init.normal_(net.decode.outc["fc1"].weight, std=3)
    settings = {"num_classes": 3, "image_size": 24, "standardize": True}
    save(tmp_path / "fine.pt", {"finetune": net.state_dict(), "settings": settings})
    path = tmp_path / "model.pt2"
    assert main(["--weights", str(tmp_path / "fine.pt"), "--export", str(path)]) == 0
    assert "by each image's own mean and standard deviation" in capsys.readouterr().out
    image = np.random.default_rng(0).uniform(0, 90, (1, 3, 24, 40)).astype(np.float32)
    with torch.no_grad():
        x = torch.from_numpy((image - image.mean()) / image.std())
        standardised = net(x).softmax(1).numpy()
    np.testing.assert_allclose(export.load_pt2(path)(image), standardised, atol=1e-4)


@pytest.mark.parametrize("name", ["model.h5", "nowhere/model.pt2"])
def test_a_bad_name_is_one_line(tmp_path: Path, capsys, name: str) -> None:
    assert main(["--weights", "w", "--export", str(tmp_path / name)]) == 2
    error = capsys.readouterr().err
    assert "; give a" in error and error.count("\n") == 1


def test_missing_packages_are_named(tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.setattr(export.importlib.util, "find_spec", lambda name: None)
    assert main(["--weights", "w", "--export", str(tmp_path / "m.onnx")]) == 2
    error = capsys.readouterr().err
    assert "pip install onnx onnxscript onnxruntime" in error and error.count("\n") == 1


def test_a_file_that_differs_is_not_written(tmp_path: Path) -> None:
    model = export.Deployed(torch.nn.Conv2d(3, 3, 1), standardize=False)
    facts = {"classes": ["a", "b", "c"], "mapping": [0, 1, 2], "image_size": 0}
    with pytest.raises(export.UserError, match="differs from PyTorch by"):
        export.export(
            model, tmp_path / "m.pt2", lambda p: np.zeros((3, *p.shape[:2]), np.float32), facts
        )
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_is_there_is_replaced_only_when_told(tmp_path: Path, capsys) -> None:
    weights = write_weights(tmp_path / "fine.pt", {})
    path = tmp_path / "model.pt2"
    path.write_bytes(b"mine")
    words = ["--weights", str(weights), "--export", str(path)]
    assert main(words) == 2 and path.read_bytes() == b"mine"
    assert capsys.readouterr().err == (
        f"--export: {path} is there already; give another name, or --overwrite\n"
    )
    assert main([*words, "--overwrite"]) == 0 and path.read_bytes() != b"mine"
