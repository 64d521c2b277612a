"""Activation checkpointing of the UNet: less memory, a little more time, equal results.

PyTorch's own, wrapped around the blocks of ``networks.Encoder`` from outside (Chen 2016, "Training
deep nets with sublinear memory cost").
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import checkpoint
from torch.utils.checkpoint import CheckpointPolicy

from networks import Encoder

LEVELS = (("inc", "up3"), ("down1", "up2"), ("down2", "up1"), ("down3",))  # the full size first


def recompute_activations(encoder: Encoder, levels: int) -> None:
    """Let the backward pass recompute activations of an encoder instead of keeping them.

    ``levels`` 0: what is cheap, that is norms, activations, pooling, joins, the stem's first
    convolution and the transposed ones. At 376x376 that adds some 5 % to the time of a step and
    takes more than a third off its memory (results/speed). 1 to 4: also everything else in so many
    levels, the full size first. -1: nothing.
    """
    for level, names in enumerate(LEVELS):
        for name in names:
            if not hasattr(encoder, name):  # an encoder with another way down, which is kept
                continue
            block = encoder.get_submodule(name)
            block.forward = recomputed(block.forward, block, level, levels)


def recomputed(
    run: Callable[..., Tensor], block: nn.Module, level: int, levels: int
) -> Callable[..., Tensor]:
    """``run``, which uses the parameters of ``block``, with activations recomputed.

    ``level`` is the block's, 0 at full size to 3; for ``levels`` see ``recompute_activations``.
    Autocast must not cache casted weights meanwhile, see ``utils.device.precision``.
    """
    # Not a closure: a deep copy of the network copies what a partial refers to.
    return run if levels < 0 else partial(_checkpointed, run, block, level < levels)


def _checkpointed(
    run: Callable[..., Tensor], block: nn.Module, everything: bool, *inputs: Tensor
) -> Tensor:
    if not torch.is_grad_enabled():
        return run(*inputs)

    def contexts() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
        if everything:
            return nullcontext(), _SecondPass(block, nullcontext())
        first, second = checkpoint.create_selective_checkpoint_contexts(_keep_costly)
        return first, _SecondPass(block, second)

    settings: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}
    output: Tensor = checkpoint.checkpoint(run, *inputs, context_fn=contexts, **settings)
    return output


def _keep_costly(context: Any, operator: Any, *inputs: Any, **named: Any) -> CheckpointPolicy:
    """Keep the outputs of convolutions, except transposed ones and those of 3-channel images.

    Also weights that autocast has cast: they are small, and every call costs a device's host time.
    """
    if operator is torch.ops.aten._to_copy.default and isinstance(inputs[0], nn.Parameter):
        return CheckpointPolicy.MUST_SAVE
    if operator is torch.ops.aten.convolution.default:
        weight, transposed = inputs[1], inputs[6]
        if not transposed and weight.shape[1] > 3:
            return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE


class _SecondPass:
    """Context of a block's second forward pass: it updates copies of the running statistics.

    It can be entered again, for a second backward pass through the same graph.
    """

    def __init__(self, block: nn.Module, inner: AbstractContextManager[Any]) -> None:
        self.block, self.inner = block, inner

    def __enter__(self) -> None:
        modules = self.block.modules()
        self.kept = [(m, name, b) for m in modules for name, b in m.named_buffers(recurse=False)]
        for module, name, buffer in self.kept:
            setattr(module, name, buffer.clone())
        self.inner.__enter__()

    def __exit__(self, *error: Any) -> None:
        self.inner.__exit__(*error)
        for module, name, buffer in self.kept:
            setattr(module, name, buffer)
