"""A small trained model, images for it, and what it says of them computed by the plain way."""

from __future__ import annotations

import csv
from pathlib import Path

import cv2
import numpy as np
import torch
from PIL import Image

from data import to_input
from networks import UNet
from utils.checkpoint import save

CHANNELS = (4, 8, 16, 32)


def network(num_classes: int = 3) -> UNet:
    torch.manual_seed(3)
    net = UNet(num_classes, CHANNELS).eval()
    torch.nn.init.normal_(net.decode.outc["fc1"].weight, std=3)
    return net


def write_weights(path: Path, settings: dict | None = None, num_classes: int = 3) -> Path:
    contents = {"finetune": network(num_classes).state_dict(), "epoch": 1, "acc": 0.5}
    if settings is not None:
        contents["settings"] = {"num_classes": num_classes, "image_size": 0} | settings
    save(path, contents)
    return path


def picture(seed: int, *shape: int) -> np.ndarray:
    coarse = np.random.default_rng(seed).integers(0, 256, (9, 9, *shape[2:]), dtype=np.uint8)
    return cv2.resize(coarse, shape[1::-1], interpolation=cv2.INTER_CUBIC)


def write_images(folder: Path, *names: str, shape: tuple[int, ...] = (40, 48)) -> Path:
    for seed, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture(seed, *shape)).save(path)
    return folder


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def expected_mask(image: np.ndarray, num_classes: int = 3) -> np.ndarray:
    """What the network says of a whole picture, by the plain way."""
    image = image.copy()
    chw = (
        torch.from_numpy(image)[None] if image.ndim == 2 else torch.from_numpy(image).movedim(2, 0)
    )
    with torch.no_grad():
        return network(num_classes)(to_input(chw)[None])[0].argmax(0).numpy()
