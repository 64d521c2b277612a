"""Changes of colour, contrast, light and sharpness as values: drawn, then applied."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
import torchvision.transforms.v2.functional as F
from torch import Tensor
from torch.nn.functional import interpolate

PROBABILITY = 0.8  # of a jitter
OF_BLUR = 0.5  # its probability
STEPS = ("brightness", "contrast", "saturation", "hue")


@dataclass(frozen=True)
class ColorJitter:
    """Change of brightness, contrast, saturation and hue of one view (published loader).

    The steps are applied in ``order``; without any the image stays as it is. Brightness, contrast
    and saturation are factors, the hue is a shift in turns of the colour wheel.
    """

    order: tuple[str, ...] = ()
    brightness: float = 1.0
    contrast: float = 1.0
    saturation: float = 1.0
    hue: float = 0.0

    @classmethod
    def draw(cls, rng: np.random.Generator, strength: float) -> ColorJitter:
        """Draw all four steps in random order with ``PROBABILITY``, else none.

        Factors are uniform in [max(0, 1 - 0.8 strength), 1 + 0.8 strength], the hue shift in
        [-0.2 strength, 0.2 strength].
        """
        order = tuple(STEPS[i] for i in rng.permutation(len(STEPS)))
        reach = 0.8 * strength
        low, high = max(0.0, 1.0 - reach), 1.0 + reach
        brightness, contrast, saturation = rng.uniform(low, high, 3).tolist()
        hue = float(rng.uniform(-0.2 * strength, 0.2 * strength))
        applied = rng.random() < PROBABILITY
        return cls(order, brightness, contrast, saturation, hue) if applied else cls()

    def apply(self, image: Tensor) -> Tensor:
        """Jitter a uint8 image (1 or 3, H, W), values rounded to whole levels after every step.

        The steps are torchvision's, save that the mean gray level, which contrast needs, is summed
        in integers: torch's parallel sum depends on the number of threads. Gray images (one
        channel) have neither hue nor saturation; in the published program, which gives these steps
        three equal channels, their rounding lowers some values by a level.
        """
        if not self.order:
            return image
        if image.shape[0] > 1:
            return self._apply_colour(image)
        table = self.table(torch.bincount(image.flatten(), minlength=256))
        return torch.from_numpy(table.numpy()[image.numpy()])

    def table(self, counts: Tensor) -> Tensor:
        """What the 256 levels of a gray image become: uint8 (256,); ``counts`` are its pixels."""
        table = torch.arange(256, dtype=torch.uint8).view(1, 1, 256)
        pixels = int(counts.sum())
        for step in self.order:
            if step == "brightness":
                table = F.adjust_brightness(table, self.brightness)
            elif step == "contrast":
                total = int((counts * table.flatten().long()).sum())
                table = _blend(table, total / pixels, self.contrast)
        return table.flatten()

    def _apply_colour(self, image: Tensor) -> Tensor:
        for step in self.order:
            if step == "contrast":
                gray = F.rgb_to_grayscale(image)
                image = _blend(image, int(gray.long().sum()) / gray.numel(), self.contrast)
            else:
                image = getattr(F, f"adjust_{step}")(image, getattr(self, step))
        return image


@dataclass(frozen=True)
class ContrastJitter:
    """``gain * image + offset`` of a normalised image, for sets that differ in contrast.

    ``ColorJitter`` works on 8-bit pixels and rounds them; this neither rounds nor clips.
    """

    gain: float = 1.0
    offset: float = 0.0

    @classmethod
    def draw(cls, rng: np.random.Generator, strength: float) -> ContrastJitter:
        """Draw log(gain) and offset, both uniform in [-strength, strength]."""
        reach, offset = rng.uniform(-strength, strength, 2).tolist()
        return cls(math.exp(reach), offset)

    def apply(self, image: Tensor) -> Tensor:
        """Jitter a float image of any shape."""
        return image * self.gain + self.offset


def _blend(image: Tensor, level: float, factor: float) -> Tensor:
    """``factor * image + (1 - factor) * level``, rounded down to whole levels as in torchvision."""
    mixed = image.float().mul_(factor).add_(level * (1.0 - factor))
    return mixed.clamp_(0, 255).to(torch.uint8)


@dataclass(frozen=True)
class Illumination:
    """Smooth light and shade: a cubic surface through 3x3 ``levels``, added to the image."""

    levels: tuple[tuple[float, ...], ...]

    @classmethod
    def draw(cls, rng: np.random.Generator, deviation: float) -> Illumination:
        """Draw 3x3 normal numbers of a standard deviation, in the image's own gray range."""
        return cls(tuple(map(tuple, (deviation * rng.standard_normal((3, 3))).tolist())))

    def apply(self, image: Tensor) -> Tensor:
        """Add it to a float image (c, H, W), all channels alike."""
        size = [image.shape[-2], image.shape[-1]]
        coarse = torch.tensor(self.levels)[
            None, None
        ]  # (1, 1, 3, 3), at the corners, edges, centre
        surface = interpolate(coarse, size, mode="bicubic", align_corners=True)
        return image + surface[0].to(image.dtype)


@dataclass(frozen=True)
class Blur:
    """Gaussian blur with a standard deviation in pixels; beyond its edges the image is mirrored."""

    deviation: float

    @classmethod
    def draw(cls, rng: np.random.Generator, largest: float) -> Blur:
        """Draw a standard deviation, uniform in [0, largest], with ``OF_BLUR``, else none."""
        deviation = float(rng.uniform(0, largest))
        return cls(deviation if rng.random() < OF_BLUR else 0.0)

    def apply(self, image: Tensor) -> Tensor:
        """Blur a float image (c, H, W)."""
        reach = math.ceil(3 * self.deviation)
        reach = min(reach, image.shape[-2] - 1, image.shape[-1] - 1)  # what mirroring can give
        if reach < 1:
            return image
        return F.gaussian_blur(image, [2 * reach + 1] * 2, [self.deviation] * 2)


@dataclass(frozen=True)
class Noise:
    """Independent normal noise of every value; equal seeds give equal noise."""

    deviation: float
    seed: int

    @classmethod
    def draw(cls, rng: np.random.Generator, largest: float) -> Noise:
        """Draw a standard deviation, uniform in [0, largest], and a seed."""
        return cls(float(rng.uniform(0, largest)), int(rng.integers(2**63)))

    def apply(self, image: Tensor) -> Tensor:
        """Add it to a float image of any shape."""
        drawn = np.random.default_rng(self.seed).standard_normal(image.shape, np.float32)
        return image + self.deviation * torch.from_numpy(drawn)
