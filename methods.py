"""What all pretraining methods share: an encoder, a slowly moving copy of it, a queue of its keys.

``forward(batch)`` takes the dict of ``data.py`` and returns a dict of scalars: ``loss`` and its
named parts. Shapes stand at the end of the lines: B images, C classes, K templates per class,
T = C*K, P cells, D embedding, Q queue.

Where several ranks share a batch, B images are those of a rank. ``all_ranks`` and ``mean_of_ranks``
are the places where their numbers meet; for one process they are nothing.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from encoders import make_encoder
from networks import CHANNELS, ProjectedUNet
from pscl.recompute import recompute_activations
from utils.ranks.tensors import shuffled


def unit(x: Tensor) -> Tensor:
    """Vectors (..., D) of length 1, in single precision."""
    return F.normalize(x.float(), dim=-1)


class Method(nn.Module):
    """A pretraining method as the training loop sees it: an encoder, and a forward to losses.

    Most settings are those of ``networks.ProjectedUNet``; ``encoder`` is a kind of
    ``encoders.make_encoder``, ``recompute`` is the ``levels`` of
    ``pscl.recompute.recompute_activations``.
    """

    needs_annotated: ClassVar[bool] = False  # image 0 of every batch is annotated
    needs_groups: ClassVar[bool] = False  # production batches are used
    weighs_purity: ClassVar[bool] = False  # patches of the annotated image count by their purity
    least_images: ClassVar[int] = 1  # of a batch; with fewer the loss is undefined or constant
    least_of_rank: ClassVar[int] = 1  # the same of a rank, with BatchNorm's statistics of its own
    trains_ups: ClassVar[bool] = True  # False: the loss needs x4 alone, the ups stay as initialised

    def __init__(
        self,
        *,
        channels: Sequence[int] = CHANNELS,
        hidden_dim: int = 128,
        embed_dim: int = 64,
        groups: int = 4,
        norm: str = "batch",
        encoder: str = "unet",
        recompute: int = 0,
    ) -> None:
        super().__init__()
        self.hidden_dim, self.embed_dim, self.recompute = hidden_dim, embed_dim, recompute
        own = make_encoder(encoder, channels, norm)
        self.encoder_q = ProjectedUNet(channels, hidden_dim, embed_dim, groups, norm, own)
        recompute_activations(self.encoder_q.encode, recompute)

    def planned(self, batch: Mapping[str, Any], *, fixed: bool = False) -> dict[str, Any]:
        """A batch of ``data.py`` as ``forward`` takes it: with what the host decides of the step.

        ``forward`` does the same with a batch that is not planned. ``fixed``: tensors have the same
        shapes in every step, with padding that changes no result.
        """
        return {key: value for key, value in batch.items() if isinstance(value, Tensor)}

    @staticmethod
    def log_note(queue_size: int, batch_size: int) -> str:
        """What a reader of the log should know of the loss curve; empty if it simply falls."""
        return ""


class MomentumMethod(Method):
    """A method with a momentum encoder, the moving average of the one that learns (He 2020).

    Only parameters are averaged; its BatchNorm is in training mode, with running statistics of its
    own. ``forward`` updates it before it computes the keys; the papers do so after the optimizer's
    step, which is the same sequence, since the two encoders start equal.

    ``momentum`` is the share of the momentum encoder that each step keeps.
    """

    def __init__(self, *, momentum: float = 0.99, **settings: Any) -> None:
        super().__init__(**settings)
        self.encoder_k = copy.deepcopy(self.encoder_q).requires_grad_(False)
        self.average = get_ema_multi_avg_fn(momentum)

    @torch.no_grad()
    def update_key_encoder(self) -> None:
        """k = momentum * k + (1 - momentum) * q, parameters only."""
        self.average(list(self.encoder_k.parameters()), list(self.encoder_q.parameters()), None)


class QueueMethod(MomentumMethod):
    """A method that contrasts with a queue of Q earlier keys of whole images (He 2020).

    ``batch_norm_ranks`` 'shuffle': keys are computed by other ranks than their queries (ShuffleBN),
    which hides BatchNorm's statistics from the loss; of no effect on one process.
    """

    queue: Tensor
    queue_ptr: Tensor

    def __init__(
        self, *, queue_size: int = 504, batch_norm_ranks: str = "own", **settings: Any
    ) -> None:
        super().__init__(**settings)
        self.shuffle = batch_norm_ranks == "shuffle"
        self.register_buffer("queue", torch.randn(queue_size, self.embed_dim))  # (Q, D)
        self.register_buffer("queue_ptr", torch.zeros(1, dtype=torch.long))

    @staticmethod
    def log_note(queue_size: int, batch_size: int) -> str:
        """The loss rises while real keys replace the noise that the queues start with."""
        return (
            f"The loss rises at first: the queue of {queue_size} keys starts as noise, easy "
            f"to tell apart, and is full of real keys after {-(-queue_size // batch_size)} steps"
        )

    @torch.no_grad()
    def encode_keys(
        self, encode: Callable[[Tensor], Sequence[Tensor]], view: Tensor
    ) -> Sequence[Tensor]:
        """``encode(view)`` without gradients, by the ranks' own images or by shuffled ones.

        An annotated image in front, which every rank has, stays there.
        """
        staying = int(self.needs_annotated)
        return shuffled(encode, view, staying) if self.shuffle else encode(view)

    @torch.no_grad()
    def replace_oldest(self, **keys: Tensor) -> Tensor:
        """Write a batch's keys (B, ...), the last Q at most, over the oldest entries of the queues.

        ``keys`` are given by the names of their queues. Returns the indices of the entries.
        """
        size = len(self.queue)
        count = min(size, *(len(key) for key in keys.values()))
        entry = (self.queue_ptr + torch.arange(count, device=self.queue.device)) % size
        self.queue_ptr.copy_((self.queue_ptr + count) % size)
        for name, key in keys.items():
            self.get_buffer(name)[entry] = key[-count:]
        return entry
