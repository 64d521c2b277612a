"""Tensors of all ranks: rows as if they were of one batch, one mean, one sum of gradients.

Ranks with a part of the batch each are to equal one process with all of it. So a loss is computed
of the rows of all ranks, on every rank alike (``all_ranks``), or is the mean over the rows of each
(``mean_of_ranks``). Either way the backward pass of a rank gives the part of the gradient that
comes through its own images, and the whole gradient is their sum (``sum_gradients``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from utils.ranks import group


def all_ranks(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The rows (B, ...) of all ranks, in their order: (all B, ...) of each tensor.

    On a rank all tensors have as many rows; ranks may differ. What is computed of the result has to
    be the same on all ranks; its gradient flows to the rank's own rows.
    """
    if group.size() == 1:
        return tensors
    counts = _counts(len(tensors[0]))
    return tuple(_Rows.apply(tensor, counts) for tensor in tensors)


def _counts(own: int) -> list[int]:
    """How many rows each rank has; by gloo, so that no GPU is waited for."""
    counts = [torch.zeros(1, dtype=torch.long) for _ in range(group.size())]
    dist.all_gather(counts, torch.tensor([own]))
    return [int(count) for count in counts]


class _Rows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, counts: Sequence[int]) -> Tensor:
        ctx.first, ctx.count = sum(counts[: group.rank()]), len(rows)
        most = max(counts)
        padded = rows.new_zeros(most, *rows.shape[1:])
        padded[: len(rows)] = rows
        found = [torch.empty_like(padded) for _ in counts]
        # As bytes: gloo does not know every type of number.
        dist.all_gather([x.view(torch.uint8) for x in found], padded.view(torch.uint8))
        return torch.cat([x[:count] for x, count in zip(found, counts, strict=True)])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0].narrow(0, ctx.first, ctx.count), None


def mean_of_ranks(rows: Tensor, weight: Tensor | int = 1) -> Tensor:
    """The mean () of all numbers of all ranks; of scalars of one rank each, theirs.

    A rank's numbers count ``weight`` times (): of a mean, give how many things it is of, 0 for a
    rank that has none of them. The gradient flows to the rank's own numbers.
    """
    if group.size() == 1:
        return rows.mean() if rows.ndim else rows
    mean: Tensor = _Mean.apply(rows, weight)
    return mean


class _Mean(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor | int) -> Tensor:
        ctx.shape, ctx.weight = rows.shape, torch.as_tensor(weight).to(rows.device, torch.float32)
        both = torch.stack([rows.detach().float().sum(), ctx.weight.new_full((), rows.numel())])
        both *= ctx.weight
        dist.all_reduce(both)
        ctx.total = both[1].clamp(min=1)  # where no rank has any, the mean is 0
        return both[0] / ctx.total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return (gradients[0] * ctx.weight / ctx.total).expand(ctx.shape), None


def of_first_rank(tensor: Tensor) -> Tensor:
    """Rank 0's tensor, of equal shape on all, on all ranks; without gradient."""
    if group.size() == 1:
        return tensor
    sent = tensor.detach().contiguous().clone()
    dist.broadcast(sent, 0)
    return sent


def sum_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Replace every gradient by the sum over the ranks, in one exchange."""
    if group.size() == 1:
        return
    gradients = [p.grad for p in parameters if p.grad is not None]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(flat)
    start = 0
    for gradient in gradients:
        gradient.copy_(flat[start : start + gradient.numel()].view(gradient.shape))
        start += gradient.numel()


@torch.no_grad()
def take_first_ranks(module: nn.Module) -> None:
    """Give every rank the parameters and buffers of rank 0."""
    if group.size() > 1:
        for tensor in (*module.parameters(), *module.buffers()):
            tensor.copy_(of_first_rank(tensor))


@torch.no_grad()
def shuffled(
    encode: Callable[[Tensor], Sequence[Tensor]], images: Tensor, staying: int = 0
) -> tuple[Tensor, ...]:
    """``encode(images)`` by ranks that exchanged their images at random (ShuffleBN, He 2020, 3.3).

    A rank's BatchNorm then sees others than in the query's encoder. Ranks have as many images, of
    which the first ``staying`` are not exchanged: those that every rank has.
    """
    if group.size() == 1:
        return tuple(encode(images))
    (everything,) = all_ranks(images[staying:])
    order = of_first_rank(torch.randperm(len(everything)))
    each = len(images) - staying
    own = slice(group.rank() * each, (group.rank() + 1) * each)
    mine = torch.cat([images[:staying], everything[order[own].to(images.device)]])
    back = order.argsort()[own].to(images.device)
    found = []
    for rows in encode(mine.contiguous(memory_format=torch.channels_last)):
        (all_rows,) = all_ranks(rows[staying:])  # one kind at a time: maps are large
        rows = torch.cat([rows[:staying], all_rows[back]])
        like_a_map = torch.channels_last if rows.ndim == 4 else torch.contiguous_format
        found.append(rows.contiguous(memory_format=like_a_map))
    return tuple(found)
