"""The UNet and its heads, without losses or data.

Names of layers such as ``encode.inc.con1`` are those of the published checkpoints, whose state
dicts load as they are.
"""

from __future__ import annotations

import functools
import importlib
import math
import warnings
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CHANNELS = (32, 64, 128, 256)  # at full, 1/2, 1/4 and 1/8 of the image's size
NORM_GROUPS = 8
SCALES = 3  # maps of the way up whose cells are projected: up1, up2, up3


class ChannelLayerNorm(nn.LayerNorm):
    """LayerNorm over the channels of each pixel of (B, C, H, W), eps 1e-5."""

    def forward(self, input: Tensor) -> Tensor:
        """Normalise (B, C, H, W) over C."""
        # In channels-last memory both permutations are views, so nothing is copied.
        return self.rows(input.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)

    def rows(self, input: Tensor) -> Tensor:
        """Normalise (..., C) over C."""
        return super().forward(input)

    def activated_rows(
        self, input: Tensor, slope: float = 0.01, dtype: torch.dtype | None = None
    ) -> Tensor:
        """Normalise (..., C) over C, then LeakyReLU; on CUDA the result may be of another type."""
        if kernel := kernel_for("row_norm", input):
            return kernel(input, self.weight, self.bias, self.eps, slope, dtype)
        return F.leaky_relu(self.rows(input), slope, inplace=True)


def kernel_for(name: str, x: Tensor) -> Callable[..., Tensor] | None:
    """The kernel of a norm of ``x``, if it has one: on CUDA, in single precision or less."""
    if not x.is_cuda or x.dtype == torch.float64:
        return None
    return norm_kernel(name, x.device, x.dtype)


@functools.cache
def norm_kernel(
    name: str, device: torch.device, dtype: torch.dtype
) -> Callable[..., Tensor] | None:
    """``norm_leaky`` of a module of ``utils.cuda``; None, after one line, where it can't be had."""
    try:
        # It needs Triton, which comes with PyTorch for CUDA.
        module = importlib.import_module(f"utils.cuda.{name}")
        module.check(device, dtype)
    except torch.OutOfMemoryError:  # which says nothing about the kernel
        raise
    except Exception as error:  # whatever a compiler may miss on somebody's machine
        why = (str(error).splitlines() or [type(error).__name__])[0]
        norm = {"row_norm": "LayerNorm", "batch_norm": "BatchNorm"}[name]
        warnings.warn(f"{norm} has no kernel of its own here and is slower: {why}", stacklevel=2)
        return None
    found: Callable[..., Tensor] = module.norm_leaky
    return found


def normalisation(norm: str, channels: int) -> nn.Module:
    """BatchNorm2d ('batch'), or GroupNorm ('group') with gcd(8, channels) groups.

    GroupNorm (Wu and He 2018) sees one image at a time and has no running statistics, so it is the
    same in training and evaluation; the published program has BatchNorm alone.
    """
    if norm == "group":
        return nn.GroupNorm(math.gcd(NORM_GROUPS, channels), channels)
    return nn.BatchNorm2d(channels)


def activated(norm: nn.Module, x: Tensor) -> Tensor:
    """A norm, then LeakyReLU 0.01 in place: (B, C, H, W) to the same."""
    if isinstance(norm, ChannelLayerNorm):
        # On the rows: for an in-place operation on the permuted view that the norm returns,
        # autograd would copy every gradient, and the copies would not be channels-last.
        return norm.activated_rows(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    own = type(norm) is nn.BatchNorm2d and takes_statistics(norm, x)
    if own and (kernel := kernel_for("batch_norm", x)):
        assert isinstance(norm, nn.BatchNorm2d) and norm.num_batches_tracked is not None
        norm.num_batches_tracked.add_(1)
        rows = x.permute(0, 2, 3, 1)
        statistics = (norm.running_mean, norm.running_var, norm.momentum, norm.eps)
        found = kernel(rows.flatten(0, 2), norm.weight, norm.bias, *statistics, 0.01)
        return found.view(rows.shape).permute(0, 3, 1, 2)
    return F.leaky_relu(norm(x), 0.01, inplace=True)


def takes_statistics(norm: nn.BatchNorm2d, x: Tensor) -> bool:
    """Whether a BatchNorm takes statistics of (B, C, H, W), which its running ones follow.

    Without a momentum those are taken anew (``torch.optim.swa_utils.update_bn``); one value has
    none, and PyTorch says so. A norm that others made may have no running ones, or no weights.
    """
    whole = norm.track_running_stats and norm.affine and norm.momentum is not None
    return norm.training and whole and x.numel() > x.shape[1]


def rectified(norm: nn.Module, x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """A LayerNorm over channels, then ReLU, of (B, C, H, W); ``dtype`` of the result on CUDA."""
    if x.is_cuda and isinstance(norm, ChannelLayerNorm):
        return norm.activated_rows(x.permute(0, 2, 3, 1), 0.0, dtype).permute(0, 3, 1, 2)
    return F.relu(norm(x), inplace=True)


def pointwise(conv: nn.Module, x: Tensor) -> Tensor:
    """A 1x1 convolution of (B, C, H, W); of several groups on CUDA as one matrix.

    There cuDNN takes the groups apart, one by one, and the bias is another pass over the result.
    """
    if not isinstance(conv, nn.Conv2d) or conv.groups == 1 or not x.is_cuda:
        return conv(x)  # type: ignore[no-any-return]
    return F.linear(x.permute(0, 2, 3, 1), dense_weight(conv), conv.bias).permute(0, 3, 1, 2)


def dense_weight(conv: nn.Conv2d) -> Tensor:
    """The weights (out, in) of a 1x1 convolution, 0 between its groups."""
    return torch.block_diag(*conv.weight.flatten(1).chunk(conv.groups))


class DoubleConv(nn.Module):
    """Twice (3x3 convolution without bias, norm, LeakyReLU 0.01): (B, in, H, W) to (B, out, H, W).

    ``layer_norm``: the second norm is a LayerNorm over channels instead of ``normalisation``'s.
    """

    def __init__(
        self, channels_in: int, channels_out: int, norm: str = "batch", layer_norm: bool = False
    ) -> None:
        super().__init__()
        self.con1 = nn.Conv2d(channels_in, channels_out, 3, padding=1, bias=False)
        self.norm1 = normalisation(norm, channels_out)
        self.con2 = nn.Conv2d(channels_out, channels_out, 3, padding=1, bias=False)
        self.norm2 = (
            ChannelLayerNorm(channels_out) if layer_norm else normalisation(norm, channels_out)
        )

    def forward(self, x: Tensor) -> Tensor:
        """(B, in, H, W) to (B, out, H, W)."""
        x = activated(self.norm1, self.con1(x))
        return activated(self.norm2, self.con2(x))


class Down(nn.Module):
    """Max-pool by 2, then DoubleConv: (B, in, H, W) to (B, out, H//2, W//2)."""

    def __init__(self, channels_in: int, channels_out: int, norm: str = "batch") -> None:
        super().__init__()
        self.conv = DoubleConv(channels_in, channels_out, norm)

    def forward(self, x: Tensor) -> Tensor:
        """Halve the grid."""
        return self.conv(F.max_pool2d(x, 2))


class Up(nn.Module):
    """Transposed convolution to half the channels, joined with the skip, then DoubleConv."""

    def __init__(self, channels_in: int, norm: str = "batch") -> None:
        super().__init__()
        half = channels_in // 2
        self.up = nn.ConvTranspose2d(channels_in, half, 3, stride=2, padding=1)
        self.conv = DoubleConv(channels_in, half, norm, layer_norm=True)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        """(B, c, h, w) and the skip (B, c/2, H, W) to (B, c/2, H, W)."""
        return self.conv(self.join(x, skip))

    def join(self, x: Tensor, skip: Tensor) -> Tensor:
        """Bring (B, c, h, w) to the size of the skip (B, c/2, H, W) and join both: (B, c, H, W)."""
        # The bias is added outside: with one, oneDNN's transposed convolution takes 4 to 16 times
        # as long in bf16, 1.3 to 2 times in single precision.
        x = F.conv_transpose2d(x, self.up.weight, None, stride=2, padding=1)
        x += self.up.get_parameter("bias").to(x.dtype)[:, None, None]
        rows, columns = skip.shape[-2] - x.shape[-2], skip.shape[-1] - x.shape[-1]
        x = F.pad(x, (columns // 2, columns - columns // 2, rows // 2, rows - rows // 2))
        return torch.cat([skip, x], dim=1)


class Encoder(nn.Module):
    """The UNet without its last layer: stem, three downs, three ups.

    ``channels`` are those at full, 1/2, 1/4 and 1/8 of the image's size; for ``norm`` see
    ``normalisation``.
    """

    def __init__(self, channels: Sequence[int] = CHANNELS, norm: str = "batch") -> None:
        super().__init__()
        c0, c1, c2, c3 = channels
        self.inc = DoubleConv(3, c0, norm)
        self.down1 = Down(c0, c1, norm)
        self.down2 = Down(c1, c2, norm)
        self.down3 = Down(c2, c3, norm)
        self.up1 = Up(c3, norm)
        self.up2 = Up(c2, norm)
        self.up3 = Up(c1, norm)

    def map_sizes(self, rows: int, columns: int) -> list[tuple[int, int]]:
        """Rows and columns of up1, up2 and up3 for images of ``rows x columns``."""
        return [(rows // 4, columns // 4), (rows // 2, columns // 2), (rows, columns)]

    def contract(self, image: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The contracting path: (B, 3, H, W) to x1 (full size), x2 (1/2), x3 (1/4), x4 (1/8)."""
        x1 = self.inc(image)  # (B, c0, H, W)
        x2 = self.down1(x1)  # (B, c1, H/2, W/2)
        x3 = self.down2(x2)  # (B, c2, H/4, W/4)
        x4 = self.down3(x3)  # (B, c3, H/8, W/8)
        return x1, x2, x3, x4

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(B, 3, H, W) to x4 (1/8 of the size), up1 (1/4), up2 (1/2) and up3 (full size)."""
        x1, x2, x3, x4 = self.contract(image)
        up1 = self.up1(x4, x3)  # (B, c2, H/4, W/4)
        up2 = self.up2(up1, x2)  # (B, c1, H/2, W/2)
        up3 = self.up3(up2, x1)  # (B, c0, H, W)
        return x4, up1, up2, up3


class SegmentationHead(nn.Module):
    """One linear layer per pixel: (B, c, H, W) to class logits (B, C, H, W)."""

    def __init__(self, channels: int, num_classes: int) -> None:
        super().__init__()
        self.outc = nn.ModuleDict({"fc1": nn.Linear(channels, num_classes)})

    def forward(self, up3: Tensor) -> Tensor:
        """Logits of each pixel."""
        return self.outc["fc1"](up3.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class ProjectionHead(nn.Module):
    """Embeddings of the whole image and of single positions at the three decoder scales.

    The image head has ``hidden_dim`` hidden units, a patch head at most as many as the map has
    channels; D is ``embed_dim``; ``groups`` are those of the patch heads' 1x1 convolutions.
    """

    def __init__(
        self,
        channels: Sequence[int] = CHANNELS,
        hidden_dim: int = 128,
        embed_dim: int = 64,
        groups: int = 4,
    ) -> None:
        super().__init__()
        c0, c1, c2, c3 = channels
        self.mlp = nn.Sequential(
            nn.Linear(c3, hidden_dim), nn.ReLU(inplace=True), nn.Linear(hidden_dim, embed_dim)
        )
        for scale, c in enumerate((c2, c1, c0), start=1):
            name, hidden = f"conv_x4up{scale}", min(hidden_dim, c)
            self.add_module(f"{name}_conv1", nn.Conv2d(c, hidden, 1, groups=groups))
            self.add_module(f"{name}_norm1", ChannelLayerNorm(hidden))
            self.add_module(f"{name}_conv2", nn.Conv2d(hidden, embed_dim, 1, groups=groups))

    def image(self, x4: Tensor) -> Tensor:
        """Embedding of each image: (B, c3, H/8, W/8) to (B, D)."""
        # As rows: the gradient of a mean over two dimensions is not channels-last, which is slow.
        return self.mlp(x4.permute(0, 2, 3, 1).flatten(1, 2).mean(dim=1))

    def patch(self, features: Tensor, scale: int) -> Tensor:
        """Embedding of positions at scale 0, 1, 2 (up1, up2, up3): (B, c, P) to (B, D, P)."""
        conv1, norm1, conv2 = self.patch_layers(scale)
        # As one row of pixels, for which features whose c numbers lie together are channels-last
        # memory: convolutions need no copy of it. As one column they would not be.
        hidden = rectified(norm1, pointwise(conv1, features.unsqueeze(2)))
        return pointwise(conv2, hidden).squeeze(2)

    def patch_layers(self, scale: int) -> list[nn.Module]:
        """First convolution, norm and second convolution of ``patch`` at scale 0, 1, 2."""
        names = [f"conv_x4up{scale + 1}_{layer}" for layer in ("conv1", "norm1", "conv2")]
        return [self.get_submodule(name) for name in names]


class PredictionHead(nn.Module):
    """BYOL's predictor, (B, D) to (B, D): linear, BatchNorm, ReLU, linear (Grill 2020, 3.3).

    BatchNorm takes its statistics over the B images, so training needs at least two.
    """

    def __init__(self, embed_dim: int = 64, hidden_dim: int = 128) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(embed_dim, hidden_dim),
            nn.BatchNorm1d(hidden_dim),
            nn.ReLU(inplace=True),
            nn.Linear(hidden_dim, embed_dim),
        )

    def forward(self, embedding: Tensor) -> Tensor:
        """Predict another network's embeddings from this one's."""
        return self.mlp(embedding)


class UNet(nn.Module):
    """Encoder with a segmentation layer: (B, 3, H, W) to (B, C, H, W), any H, W >= 8.

    ``encoder``: another one of these channels, in the place of the UNet's own.
    """

    def __init__(
        self,
        num_classes: int = 4,
        channels: Sequence[int] = CHANNELS,
        norm: str = "batch",
        encoder: Encoder | None = None,
    ) -> None:
        super().__init__()
        self.encode = encoder or Encoder(channels, norm)
        self.decode = SegmentationHead(channels[0], num_classes)

    def forward(self, image: Tensor) -> Tensor:
        """Class logits of each pixel."""
        return self.decode(self.encode(image)[-1])


class ProjectedUNet(nn.Module):
    """Encoder with the projection head in the place of the segmentation layer (pretraining).

    ``encoder`` as for ``UNet``.
    """

    def __init__(
        self,
        channels: Sequence[int] = CHANNELS,
        hidden_dim: int = 128,
        embed_dim: int = 64,
        groups: int = 4,
        norm: str = "batch",
        encoder: Encoder | None = None,
    ) -> None:
        super().__init__()
        self.encode = encoder or Encoder(channels, norm)
        self.decode = ProjectionHead(channels, hidden_dim, embed_dim, groups)

    def forward(self, image: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
        """Image embedding (B, D), and the maps up1, up2, up3 whose patches are to be projected."""
        x4, up1, up2, up3 = self.encode(image)
        return self.decode.image(x4), (up1, up2, up3)

    def embed(self, image: Tensor) -> Tensor:
        """Image embedding (B, D) alone: it comes from x4, so the ups are not computed."""
        return self.decode.image(self.encode.contract(image)[-1])
