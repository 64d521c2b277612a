"""The UNet and its heads. Knows no loss and no data.

Attribute names such as ``encode.inc.con1`` are those of the published checkpoints: state dicts are
exchanged with them without translation.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

NORM_GROUPS = 8


class ChannelLayerNorm(nn.LayerNorm):
    """LayerNorm over the channels of each pixel of (B, C, H, W), eps 1e-5.

    In channels-last memory the two permutations are views, so nothing is copied.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Normalise (B, C, H, W) over C."""
        return self.rows(input.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)

    def rows(self, input: Tensor) -> Tensor:
        """Normalise (..., C) over C."""
        return super().forward(input)

    def activated(self, input: Tensor) -> Tensor:
        """The same, then LeakyReLU 0.01 in place.

        It works on the rows themselves: in place on the view that ``forward`` returns, autograd
        would copy every gradient, and the copies do not lie as the kernels like it.
        """
        rows = self.rows(input.permute(0, 2, 3, 1))
        return F.leaky_relu(rows, 0.01, inplace=True).permute(0, 3, 1, 2)


def normalisation(norm: str, channels: int) -> nn.Module:
    """BatchNorm2d ('batch'), or GroupNorm ('group') with 8 groups, or as many as divide channels.

    GroupNorm (Wu and He 2018) knows no other image and no running statistics, so it computes the
    same in training and evaluation; the published program has BatchNorm alone.
    """
    if norm == "group":
        return nn.GroupNorm(math.gcd(NORM_GROUPS, channels), channels)
    return nn.BatchNorm2d(channels)


class Unnoticed:
    """What BatchNorm notes of the pictures that pass meanwhile is forgotten again.

    Args:
        module: holds the BatchNorms; a context that can be entered again after it was left.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __enter__(self) -> None:
        modules = self.module.modules()
        self.noted = [(m, name, b) for m in modules for name, b in m.named_buffers(recurse=False)]
        for owner, name, buffer in self.noted:
            setattr(owner, name, buffer.clone())

    def __exit__(self, *_: object) -> None:
        for owner, name, buffer in self.noted:
            setattr(owner, name, buffer)


def recomputed(module: nn.Module, run: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    """``run(*inputs)``; what it keeps for the backward pass is computed again there.

    A last layer that needs its input alone, as a convolution does, is not: it is reached, and
    what is wanted is there. Chen 2016, "sublinear memory cost"; results are the same.

    Args:
        module: holds the BatchNorms of ``run``, which are to note what they see only once.
        run: from the inputs to a tensor.
        inputs: kept instead.
    """
    if not torch.is_grad_enabled():
        return run(*inputs)

    def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        return nullcontext(), Unnoticed(module)  # of the first pass, of the second

    output: Tensor = checkpoint(
        run, *inputs, use_reentrant=False, preserve_rng_state=False, context_fn=contexts
    )
    return output


class Lean(nn.Module):
    """A module that keeps for the backward pass what is dear to compute, and little else.

    Attributes:
        lean: False keeps everything.
    """

    lean = True

    def recomputed(self, run: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        """``run(*inputs)``, if lean by the function of this name.

        Meant for norms, activations and joins with the convolution after them. At 376x376 that
        adds some 5 % to the time of a step and takes more than a third off its memory
        (results/speed).
        """
        return recomputed(self, run, *inputs) if self.lean else run(*inputs)


class DoubleConv(Lean):
    """Twice (3x3 convolution without bias, norm, LeakyReLU 0.01): (B, in, H, W) to (B, out, H, W).

    Args:
        channels_in, channels_out: numbers of channels.
        norm: 'batch' or 'group', see ``normalisation``.
        layer_norm: whether the second norm is a LayerNorm over channels instead.
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
        return self.finish(self.con1(x))

    def finish(self, x: Tensor) -> Tensor:
        """What follows the first convolution, from its output on: (B, out, H, W) to the same."""
        return self.activate(self.recomputed(lambda x: self.con2(self.between(x)), x))

    def between(self, x: Tensor) -> Tensor:
        """What lies between the convolutions: (B, out, H, W) to the same."""
        return F.leaky_relu(self.norm1(x), 0.01, inplace=True)

    def first(self, x: Tensor) -> Tensor:
        """The first convolution with what follows it: (B, in, H, W) to (B, out, H, W)."""
        return self.between(self.con1(x))

    def second(self, x: Tensor) -> Tensor:
        """The second convolution with what follows it: (B, out, H, W) to the same."""
        return self.activate(self.con2(x))

    def activate(self, x: Tensor) -> Tensor:
        """What follows the second convolution: (B, out, H, W) to the same."""
        if isinstance(self.norm2, ChannelLayerNorm):
            return self.norm2.activated(x)
        return F.leaky_relu(self.norm2(x), 0.01, inplace=True)

    def second_at(self, x: Tensor, index: Tensor) -> Tensor:
        """``second`` at some positions alone, where its norm is over channels.

        Args:
            x: (B, out, H, W).
            index: (B, T) positions in the flattened H*W map.

        Returns:
            (B, T, out).
        """
        if not isinstance(self.norm2, ChannelLayerNorm):
            raise TypeError("a norm over positions needs all of them")
        rows, columns = x.shape[-2:]
        step = torch.arange(-1, 2, device=x.device)
        row = (index // columns)[..., None] + step.repeat_interleave(3)  # (B, T, 9)
        column = (index % columns)[..., None] + step.repeat(3)
        near_row, near_column = row.clamp(0, rows - 1), column.clamp(0, columns - 1)
        around = at_positions(x, (near_row * columns + near_column).flatten(1))  # (B, T*9, out)
        outside = ((near_row != row) | (near_column != column))[..., None]
        around = around.view(*row.shape, -1).masked_fill(outside, 0.0).flatten(2)
        weight = self.con2.weight.permute(0, 2, 3, 1).flatten(1)  # (out, 9*out)
        return F.leaky_relu(self.norm2.rows(F.linear(around, weight)), 0.01, inplace=True)


class Stem(DoubleConv):
    """DoubleConv of a picture: its first convolution costs so little that it is recomputed too."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) to (B, out, H, W)."""
        return self.activate(self.recomputed(lambda x: self.con2(self.first(x)), x))


class Down(Lean):
    """Max-pool by 2, then DoubleConv: (B, in, H, W) to (B, out, H//2, W//2)."""

    def __init__(self, channels_in: int, channels_out: int, norm: str = "batch") -> None:
        super().__init__()
        self.conv = DoubleConv(channels_in, channels_out, norm)

    def forward(self, x: Tensor) -> Tensor:
        """Halve the grid."""
        begun = self.recomputed(lambda x: self.conv.con1(F.max_pool2d(x, 2)), x)
        return self.conv.finish(begun)


class Up(Lean):
    """Transposed convolution to half the channels, joined with the skip, then DoubleConv."""

    def __init__(self, channels_in: int, norm: str = "batch") -> None:
        super().__init__()
        half = channels_in // 2
        self.up = nn.ConvTranspose2d(channels_in, half, 3, stride=2, padding=1)
        self.conv = DoubleConv(channels_in, half, norm, layer_norm=True)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        """(B, c, h, w) and the skip (B, c/2, H, W) to (B, c/2, H, W)."""
        return self.conv.finish(self.begin(x, skip))

    def first(self, x: Tensor, skip: Tensor) -> Tensor:
        """The same without ``self.conv.second``."""
        # As a view: an output that was changed in place is kept by what recomputes it, which is
        # kept by the output, until Python looks for such circles.
        return self.recomputed(lambda x: self.conv.between(x).view_as(x), self.begin(x, skip))

    def begin(self, x: Tensor, skip: Tensor) -> Tensor:
        """As far as the output of the first convolution."""
        return self.recomputed(lambda x, skip: self.conv.con1(self.join(x, skip)), x, skip)

    def join(self, x: Tensor, skip: Tensor) -> Tensor:
        """Bring (B, c, h, w) to the size of the skip (B, c/2, H, W) and join both: (B, c, H, W)."""
        # The bias is added outside: with one, oneDNN's transposed convolution takes 4 to 16 times
        # as long in bf16, 1.3 to 2 times in single precision.
        x = F.conv_transpose2d(x, self.up.weight, None, stride=2, padding=1)
        x += self.up.get_parameter("bias").to(x.dtype)[:, None, None]
        rows, columns = skip.shape[-2] - x.shape[-2], skip.shape[-1] - x.shape[-1]
        x = F.pad(x, (columns // 2, columns - columns // 2, rows // 2, rows - rows // 2))
        return torch.cat([skip, x], dim=1)


def at_positions(features: Tensor, index: Tensor) -> Tensor:
    """The features (B, c, H, W) at some positions (B, T) of the flattened map: (B, T, c)."""
    images, channels, rows, columns = features.shape
    first = torch.arange(0, images * rows * columns, rows * columns, device=index.device)
    # Channels last: a view of one row for each position.
    table = features.permute(0, 2, 3, 1).reshape(-1, channels)
    return F.embedding(index + first[:, None], table)


class FeatureMap:
    """A map (B, c, H, W) of which some positions are wanted.

    Attributes:
        size: H, W.
    """

    def __init__(self, features: Tensor) -> None:
        self.features = features
        self.size = (features.shape[-2], features.shape[-1])

    def whole(self) -> Tensor:
        """All of it, (B, c, H, W)."""
        return self.features

    def at(self, index: Tensor) -> Tensor:
        """Positions (B, T) of the flattened map: (B, T, c)."""
        return at_positions(self.features, index)


class UnfinishedMap(FeatureMap):
    """A map whose last convolution is computed where somebody asks for it.

    The gradient of a few positions of it then passes few positions of that convolution.

    Args:
        features: what ``block.first`` gave.
        block: whose ``second`` is left to do.
    """

    def __init__(self, features: Tensor, block: DoubleConv) -> None:
        super().__init__(features)
        self.block = block

    def whole(self) -> Tensor:
        """All of it, (B, c, H, W)."""
        return self.block.second(self.features)

    def at(self, index: Tensor) -> Tensor:
        """Positions (B, T) of the flattened map: (B, T, c)."""
        return self.block.second_at(self.features, index)


class Encoder(nn.Module):
    """Everything of the UNet but its last layer: stem, three downs, three ups.

    Args:
        channels: channels at full, 1/2, 1/4 and 1/8 of the image's size.
        norm: 'batch' or 'group', see ``normalisation``.
        recompute: so many levels, the finest first, keep nothing inside their blocks for the
            backward pass, which computes it again. With 0 that holds of what is cheap to compute,
            see ``Lean``, with -1 of nothing. Results are the same; memory falls, time grows.
    """

    def __init__(
        self,
        channels: Sequence[int] = (32, 64, 128, 256),
        norm: str = "batch",
        recompute: int = 0,
    ) -> None:
        super().__init__()
        self.recompute = recompute
        c0, c1, c2, c3 = channels
        self.inc = Stem(3, c0, norm)
        self.down1 = Down(c0, c1, norm)
        self.down2 = Down(c1, c2, norm)
        self.down3 = Down(c2, c3, norm)
        self.up1 = Up(c3, norm)
        self.up2 = Up(c2, norm)
        self.up3 = Up(c1, norm)
        for module in self.modules():
            if isinstance(module, Lean):
                module.lean = recompute >= 0

    def contract(self, image: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The way down, (B, 3, H, W) to x1 (full size), x2 (1/2), x3 (1/4) and x4 (1/8)."""
        x1 = self.block(0, self.inc, image)  # (B, c0, H, W)
        x2 = self.block(1, self.down1, x1)  # (B, c1, H/2, W/2)
        x3 = self.block(2, self.down2, x2)  # (B, c2, H/4, W/4)
        x4 = self.block(3, self.down3, x3)  # (B, c3, H/8, W/8)
        return x1, x2, x3, x4

    def block(
        self,
        level: int,
        module: nn.Module,
        *inputs: Tensor,
        run: Callable[..., Tensor] | None = None,
    ) -> Tensor:
        """A block at full size (level 0), 1/2 (1), 1/4 (2) or 1/8 (3), recomputed if asked to.

        Args:
            level: see above.
            module: the block.
            inputs: of the block.
            run: what to compute with it; None: all of it.
        """
        run = run or module
        return recomputed(module, run, *inputs) if level < self.recompute else run(*inputs)

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(B, 3, H, W) to x4 (1/8 of the size), up1 (1/4), up2 (1/2) and up3 (full size)."""
        x1, x2, x3, x4 = self.contract(image)
        up1, up2 = self.expand(x4, x3, x2)
        up3 = self.block(0, self.up3, up2, x1)
        return x4, up1, up2, up3

    def expand(self, x4: Tensor, x3: Tensor, x2: Tensor) -> tuple[Tensor, Tensor]:
        """The way up but for its last block: up1 (1/4) and up2 (1/2)."""
        up1 = self.block(2, self.up1, x4, x3)
        return up1, self.block(1, self.up2, up1, x2)

    def unfinished(self, image: Tensor) -> tuple[Tensor, FeatureMap, FeatureMap, FeatureMap]:
        """``forward`` without the last convolution: x4 as a tensor, the others as maps."""
        x1, x2, x3, x4 = self.contract(image)
        up1, up2 = self.expand(x4, x3, x2)
        first = self.block(0, self.up3, up2, x1, run=self.up3.first)
        return x4, FeatureMap(up1), FeatureMap(up2), UnfinishedMap(first, self.up3.conv)


class PixelClassifier(nn.Module):
    """One linear layer per pixel: (B, c, H, W) to class logits (B, C, H, W)."""

    def __init__(self, channels: int, num_classes: int) -> None:
        super().__init__()
        self.outc = nn.ModuleDict({"fc1": nn.Linear(channels, num_classes)})

    def forward(self, up3: Tensor) -> Tensor:
        """Logits of each pixel."""
        return self.outc["fc1"](up3.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class ProjectionHead(nn.Module):
    """Embeddings of the whole image and of single positions at the three decoder scales.

    Args:
        channels: the encoder's.
        hidden_dim: hidden units of the image head, and at most of a patch head.
        embed_dim: D.
        groups: groups of the patch heads' 1x1 convolutions.
    """

    def __init__(
        self,
        channels: Sequence[int] = (32, 64, 128, 256),
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
            hidden = min(hidden_dim, c)
            self.add_module(f"conv_x4up{scale}_conv1", nn.Conv2d(c, hidden, 1, groups=groups))
            self.add_module(f"conv_x4up{scale}_norm1", ChannelLayerNorm(hidden))
            self.add_module(
                f"conv_x4up{scale}_conv2", nn.Conv2d(hidden, embed_dim, 1, groups=groups)
            )

    def image(self, x4: Tensor) -> Tensor:
        """Embedding of each image: (B, c3, H/8, W/8) to (B, D)."""
        # As rows: the gradient of a mean over two dimensions is not channels-last, which is slow.
        return self.mlp(x4.permute(0, 2, 3, 1).flatten(1, 2).mean(dim=1))

    def patch(self, features: Tensor, scale: int) -> Tensor:
        """Embedding of positions at scale 0, 1, 2 (up1, up2, up3): (B, c, P) to (B, D, P).

        The head is a function of each pixel alone, so it is applied to just the positions wanted.
        """
        embedded: Tensor = self.last(scale)(self.hidden(features, scale))
        return embedded.squeeze(2)

    def hidden(self, features: Tensor, scale: int) -> Tensor:
        """What the last layer of ``patch`` gets: (B, c, P) to (B, hidden, 1, P)."""
        name = f"conv_x4up{scale + 1}"
        # A single row of pixels: features whose c numbers lie together are channels-last memory,
        # which convolutions take, and give, without a copy. A single column is not.
        x = self.get_submodule(f"{name}_conv1")(features.unsqueeze(2))
        return F.relu(self.get_submodule(f"{name}_norm1")(x), inplace=True)

    def last(self, scale: int) -> nn.Conv2d:
        """The last layer of ``patch``."""
        layer = self.get_submodule(f"conv_x4up{scale + 1}_conv2")
        assert isinstance(layer, nn.Conv2d)
        return layer

    def coordinates(self, features: Tensor, scale: int) -> Tensor:
        """Numbers with the inner products of ``patch``'s: (B, c, P) to (B, d, P), d <= D.

        For what is compared only among itself. Embeddings are W h + b of the hidden units h, so
        they lie in the space that the columns of W and b span, of at most hidden + 1 dimensions.
        With [W, b] = QR and Q orthonormal, R [h, 1] has their lengths and inner products. So d is
        hidden + 1 where that is less than D (by default 33 of 64 at the finest scale alone), which
        saves as much memory and as many multiplications of a comparison; else it is D.

        Returns:
            Numbers in single precision, computed in it where d < D (on CUDA as far as PyTorch's
            convolutions are set to it); no gradient reaches the last layer then.
        """
        last = self.last(scale)
        if last.in_channels + 1 >= last.out_channels or features.is_mps:  # MPS has no doubles
            return self.patch(features, scale).float()
        hidden = self.hidden(features, scale)
        del features
        with torch.autocast(hidden.device.type, enabled=False):
            weight = torch.block_diag(*last.weight.detach().flatten(1).chunk(last.groups))
            columns = [weight, last.get_parameter("bias").detach()[:, None]]
            r = torch.linalg.qr(torch.cat(columns, dim=1).double(), mode="r").R.float()  # (d, d)
            hidden = hidden.float()
            return F.conv2d(hidden, r[:, :-1, None, None], r[:, -1]).squeeze(2)


class PredictionHead(nn.Module):
    """BYOL's predictor, (B, D) to (B, D): linear, BatchNorm, ReLU, linear (Grill 2020, 3.3).

    BatchNorm takes its statistics over the B images, so training needs two of them.

    Args:
        embed_dim: D.
        hidden_dim: hidden units.
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

    Args:
        num_classes: C.
        channels: channels at full, 1/2, 1/4 and 1/8 of the image's size.
        norm, recompute: see ``Encoder``.
    """

    def __init__(
        self,
        num_classes: int = 4,
        channels: Sequence[int] = (32, 64, 128, 256),
        norm: str = "batch",
        recompute: int = 0,
    ) -> None:
        super().__init__()
        self.encode = Encoder(channels, norm, recompute)
        self.decode = PixelClassifier(channels[0], num_classes)

    def forward(self, image: Tensor) -> Tensor:
        """Class logits of each pixel."""
        return self.decode(self.encode(image)[-1])


class ProjectedUNet(nn.Module):
    """Encoder with the projection head in the place of the segmentation layer (pretraining)."""

    def __init__(
        self,
        channels: Sequence[int] = (32, 64, 128, 256),
        hidden_dim: int = 128,
        embed_dim: int = 64,
        groups: int = 4,
        norm: str = "batch",
        recompute: int = 0,
    ) -> None:
        super().__init__()
        self.encode = Encoder(channels, norm, recompute)
        self.decode = ProjectionHead(channels, hidden_dim, embed_dim, groups)

    def forward(self, image: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
        """Image embedding (B, D), and the maps up1, up2, up3 from which patches are projected."""
        x4, up1, up2, up3 = self.encode(image)
        return self.decode.image(x4), (up1, up2, up3)

    def unfinished(self, image: Tensor) -> tuple[Tensor, tuple[FeatureMap, FeatureMap, FeatureMap]]:
        """The same for whom a few positions of the maps are enough.

        The last convolution is a sixteenth of the network's work. Of up3 only the positions of the
        chosen patches carry a gradient, and of view q only they are needed at all.
        """
        x4, up1, up2, up3 = self.encode.unfinished(image)
        return self.decode.image(x4), (up1, up2, up3)

    def embed(self, image: Tensor) -> Tensor:
        """Image embedding (B, D) alone: it comes from x4, so the way up is not computed."""
        return self.decode.image(self.encode.contract(image)[-1])
