"""The images of pretraining, kept on the device from the first time that they come there.

Of later steps only where crops begin and what the colour jitter makes of each gray level is
uploaded. Where the images do not fit, views are uploaded as 8 bits, one batch ahead.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from data import Batch
from imaging.store import ImageStore
from utils.device import free_device_memory, size_of, upload

SHARE = 0.25  # of the device's free memory that images may take


class KeptImages:
    """Gray images of any sizes on a device, 8 bits each pixel, one image after the other.

    ``crop`` is the side of the crops of which views are made; 0: whole images, all of one size.
    """

    def __init__(
        self, files: Sequence[Path], store: ImageStore, device: torch.device, crop: int = 0
    ) -> None:
        self.store, self.missing = store, set(files)
        self.places: dict[Path, tuple[int, int]] = {}  # where an image begins, and its width
        end = 0
        for file in dict.fromkeys(files):
            _, height, width = store.shape(file)
            self.places[file] = end, width
            end += height * width
        self.size = (crop, crop) if crop else store.shape(files[0])[-2:]
        self.pixels = torch.empty(end, dtype=torch.uint8, device=device)

    def views(self, batch: Batch) -> Batch:
        """A batch of a dataset's ``kept`` items as one of its ``unfinished`` ones, on the device.

        Pixels are the same, bit by bit.
        """
        for file in self.missing.intersection(batch["file"]):
            self._fill(file)
        device, (rows, columns) = self.pixels.device, self.size
        numbers = []  # of each image the place of its crop's first pixel, and of the next row's
        for file, (top, left) in zip(batch["file"], batch["corner"], strict=True):
            start, width = self.places[file]
            numbers.append((start + top * width + left, width))
        first, width = upload(torch.tensor(numbers).T[:, :, None, None], device)  # (B, 1, 1) each
        down = torch.arange(rows, device=device)[:, None]
        index = first + down * width + torch.arange(columns, device=device)  # (B, rows, columns)
        levels = self.pixels[index].flatten(1).long()
        tables = batch["tables"]  # (B, 2, 256)
        q, k = (
            tables[:, view].gather(1, levels).view(-1, 1, rows, columns)  # (B, 1, rows, columns)
            for view in range(2)
        )
        rest = {n: v for n, v in batch.items() if n not in ("file", "corner", "tables")}
        return {**rest, "view_q": q, "view_k": k}

    def _fill(self, file: Path) -> None:
        image = self.store.image(file).flatten()
        start, _ = self.places[file]
        self.pixels[start : start + len(image)] = upload(image, self.pixels.device)
        self.missing.discard(file)


def why_not(files: Sequence[Path], store: ImageStore, device: torch.device) -> str:
    """Why images cannot be kept on a device; '' if they can."""
    shapes = [store.shape(file) for file in set(files)]
    if any(channels > 1 for channels, _, _ in shapes):
        return "some have colours, whose jitter is computed before the upload"
    need, free = sum(height * width for _, height, width in shapes), free_device_memory(device)
    if free is None:
        return "it is not known how much of its memory is free"
    if need > SHARE * free:
        # Not how much is free, which would make logs of equal runs differ.
        return f"they are {size_of(need)}, more than a quarter of what is free there"
    return ""
