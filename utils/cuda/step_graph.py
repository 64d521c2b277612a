"""Forward and backward pass of a training step as one CUDA graph.

Small kernels leave a device waiting for the host, which calls them one by one. A graph is recorded
once and replayed with one call. It reads and writes the same memory every time, so a batch is
copied to where it reads, and shapes have to stay.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

Losses = dict[str, Tensor]
Shapes = tuple[tuple[str, tuple[int, ...], torch.dtype], ...]
WARM_UP = 3  # passes before a recording: kernels are chosen and compiled, libraries take memory
MOST = 2  # graphs that are kept; batches of other shapes are computed without one


class Recording:
    """One graph: the tensors that it reads, the losses and the gradients that it writes.

    ``passes(batch)`` computes losses (detached) and the gradients of ``module``, which has none
    before; neither may wait for the device. It runs some times before it is recorded; what it
    changes in ``module`` is undone.
    """

    def __init__(
        self,
        passes: Callable[[dict[str, Tensor]], Losses],
        module: nn.Module,
        batch: Mapping[str, Tensor],
        pool: Any = None,
    ) -> None:
        self.batch = {name: tensor.clone() for name, tensor in batch.items()}
        self.parameters = [p for p in module.parameters() if p.requires_grad]
        state = [*module.parameters(), *module.buffers()]
        before = [tensor.detach().clone() for tensor in state]
        current, side = torch.cuda.current_stream(), torch.cuda.Stream()
        side.wait_stream(current)
        try:
            with torch.cuda.stream(side):
                for _ in range(WARM_UP):
                    passes(self.batch)
                    self.forget()
        finally:
            current.wait_stream(side)
            self.forget()
            with torch.no_grad():
                for tensor, kept in zip(state, before, strict=True):
                    tensor.copy_(kept)
        del before
        self.graph = torch.cuda.CUDAGraph()
        # Meanwhile a thread uploads the next batch, which only this thread's calls must not do.
        how: dict[str, Any] = {"pool": pool, "capture_error_mode": "thread_local"}
        try:
            with torch.cuda.graph(self.graph, **how):
                self.losses = passes(self.batch)
            self.gradients = [p.grad for p in self.parameters]
        finally:
            self.forget()

    def forget(self) -> None:
        """Drop the gradients, so that the next pass makes new ones."""
        for parameter in self.parameters:
            parameter.grad = None

    def replay(self, batch: Mapping[str, Tensor]) -> Losses:
        """The losses of a batch, valid until the next call, and the gradients."""
        for name, tensor in self.batch.items():
            tensor.copy_(batch[name], non_blocking=True)
        self.graph.replay()
        for parameter, gradient in zip(self.parameters, self.gradients, strict=True):
            parameter.grad = gradient
        return self.losses


class StepGraphs:
    """``passes``, recorded for the first batches of each shape and replayed for the others.

    ``passes`` and ``module`` as for ``Recording``. Where a recording fails, one line says why, and
    everything goes on without.
    """

    def __init__(self, passes: Callable[[dict[str, Tensor]], Losses], module: nn.Module) -> None:
        self.passes, self.module = passes, module
        self.recordings: dict[Shapes, Recording] = {}
        self.failed = False

    def __call__(self, batch: Mapping[str, Any]) -> Losses:
        """Losses and gradients of one batch; gradients there were are dropped."""
        tensors = {name: value for name, value in batch.items() if isinstance(value, Tensor)}
        shapes = tuple((name, tuple(t.shape), t.dtype) for name, t in tensors.items())
        with torch.cuda.device_of(next(self.module.parameters())):  # streams are the current one's
            if not self.failed and shapes not in self.recordings and len(self.recordings) < MOST:
                self.record(shapes, tensors)
            if shapes in self.recordings:
                return self.recordings[shapes].replay(tensors)
        return self.passes(tensors)

    def record(self, shapes: Shapes, tensors: Mapping[str, Tensor]) -> None:
        """Record a graph for batches of these shapes, in the memory of the others."""
        pools = [each.graph.pool() for each in self.recordings.values()]
        try:
            found = Recording(self.passes, self.module, tensors, *pools[:1])
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # whatever a library may refuse to have recorded
            if isinstance(error.__context__, torch.OutOfMemoryError):  # which ended the recording
                raise error.__context__ from None
            why = (str(error).strip().splitlines() or [type(error).__name__])[0]
            warnings.warn(
                f"Steps are not replayed as a graph, which is slower: {why}", stacklevel=2
            )
            self.failed = True
            return
        self.recordings[shapes] = found
