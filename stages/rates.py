"""How a training uses its gradients: the optimizer, its rates over the steps, averaged weights."""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, OneCycleLR
from torch.optim.swa_utils import AveragedModel

LOWEST = 1 / 25 / 1e4  # share of the highest rate at the end of one cycle


def make_optimizer(
    kind: str, groups: Iterable[dict[str, Any]], decay: float, fused: bool | None
) -> torch.optim.Optimizer:
    """Adam, or AdamW with its weight ``decay``.

    Args:
        kind: 'adam' or 'adamw'.
        groups: parameters (``params``) and their learning rates (``lr``).
        decay: of AdamW only.
        fused: whether the step is one kernel; None: as PyTorch does without being asked. They round
            differently, so that another choice gives other weights.
    """
    if kind == "adamw":
        return torch.optim.AdamW(groups, weight_decay=decay, fused=fused)
    return torch.optim.Adam(groups, fused=fused)


def rate_schedule(
    optimizer: torch.optim.Optimizer, kind: str, steps: int, warmup: float
) -> LRScheduler | None:
    """A schedule whose highest rates are those of the optimizer; ``step()`` it after every step.

    Args:
        optimizer: its groups have the highest rates.
        kind: 'onecycle': from 1/25 of the rate up and down to 1/250,000 of it, both as half a
            cosine (Smith, arXiv:1708.07120; the defaults of PyTorch, but with constant momentum);
            where at most one step would rise, the first step has the highest rate.
            'cosine': up by equal parts, then half a cosine down to 0 (Loshchilov and Hutter,
            arXiv:1608.03983). 'constant': None.
        steps: number of steps of the training.
        warmup: share of the steps in which the rates rise.
    """
    if kind == "onecycle":
        if warmup * steps <= 1:  # PyTorch's never has the highest rate, or divides by 0
            return LambdaLR(optimizer, partial(_falling, last=max(steps - 1, 1)))
        highest = [float(group["lr"]) for group in optimizer.param_groups]
        return OneCycleLR(
            optimizer, highest, total_steps=steps, pct_start=warmup, cycle_momentum=False
        )
    if kind == "cosine":
        rising = math.ceil(warmup * steps)

        def factor(step: int) -> float:
            if step < rising:
                return (step + 1) / rising
            return 0.5 * (1 + math.cos(math.pi * (step - rising) / max(steps - rising, 1)))

        return LambdaLR(optimizer, factor)
    return None


def _falling(step: int, last: int) -> float:
    """Half a cosine from 1 at step 0 down to 1/250,000 at the last step."""
    return LOWEST + (1 - LOWEST) * 0.5 * (1 + math.cos(math.pi * step / last))


class AveragedWeights(AveragedModel):
    """An exponential moving average of a network's weights; call ``update_parameters`` every step.

    After n steps the next one keeps min(decay, (1 + n) / (10 + n)) of the average, so that the
    random weights of the beginning are soon forgotten (as TensorFlow's and timm's averages).
    Buffers, such as BatchNorm's statistics, are those of the network. PyTorch's own waits for the
    device once for every tensor; this never does.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        super().__init__(module)
        self.decay = decay

    @torch.no_grad()
    def update_parameters(self, model: nn.Module) -> None:
        """Take the weights after a step into the average."""
        averaged: list[Tensor] = [*self.module.parameters()]
        current: list[Tensor] = [*model.parameters()]
        steps = self.n_averaged  # stays on the CPU
        kept = torch.clamp((1 + steps) / (10 + steps), max=self.decay) if steps else torch.zeros(())
        torch._foreach_lerp_(averaged, current, float(1 - kept))
        for own, other in zip(self.module.buffers(), model.buffers(), strict=True):
            own.copy_(other)
        self.n_averaged += 1
