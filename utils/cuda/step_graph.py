"""Forward and backward pass of a training step as one CUDA graph.

Small kernels leave a device waiting for the host, which calls them one by one. A graph is recorded
once and replayed with one call. It reads and writes the same memory every time, so a batch is
copied to where it reads, and shapes have to stay.
"""

from __future__ import annotations

import gc
import warnings
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

Losses = dict[str, Tensor]
Shapes = tuple[tuple[str, tuple[int, ...], torch.dtype], ...]
WARM_UP = 3  # passes before a recording: kernels are chosen and compiled, libraries take memory
MOST = 4  # graphs that are kept; batches of other shapes are computed without one
WORTH = 16  # batches of a shape for which another's graph is given up: recording costs some steps


@cache
def stream_of(device: torch.device) -> torch.cuda.Stream:
    """The stream of all recordings on a device.

    It is one, because libraries keep memory for every stream that they were used on; and of high
    priority, because ordinary ones are handed out in turn, so that an upload could share it.
    """
    return torch.cuda.Stream(device, priority=-1)


@contextmanager
def as_in_a_recording() -> Iterator[None]:
    """Whatever waits for the device is an error, in all threads.

    A recording that breaks off may keep its memory for good, so it is not begun. Uploads go on
    meanwhile in a thread of their own, which never waits (``utils.device.upload``).
    """

    def switch(mode: int | str) -> None:
        with warnings.catch_warnings():  # PyTorch says that it does not see all that waits
            warnings.simplefilter("ignore")
            torch.cuda.set_sync_debug_mode(mode)

    before = torch.cuda.get_sync_debug_mode()
    switch("error")
    try:
        yield
    finally:
        switch(before)


@contextmanager
def no_collection() -> Iterator[None]:
    """Python does not look for cycles of references within the block, but before it.

    What it frees may be another graph, or an event: destroying one breaks a recording off.
    """
    was = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


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
        current, side = torch.cuda.current_stream(), stream_of(state[0].device)
        side.wait_stream(current)
        try:
            with torch.cuda.stream(side):
                for _ in range(WARM_UP - 1):
                    passes(self.batch)
                    self.forget()
                with as_in_a_recording():
                    passes(self.batch)
        finally:
            current.wait_stream(side)
            self.forget()
            with torch.no_grad():
                for tensor, kept in zip(state, before, strict=True):
                    tensor.copy_(kept)
        del before
        self.graph = torch.cuda.CUDAGraph()
        # Meanwhile a thread uploads the next batch, which only this thread's calls must not do.
        how: dict[str, Any] = {"pool": pool, "stream": side, "capture_error_mode": "thread_local"}
        try:
            with no_collection(), torch.cuda.graph(self.graph, **how):
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
    """``passes``, recorded for the shapes of batches that recur, and replayed.

    The first shape is recorded at once, since nearly always it is the only one; others when they
    come again. With ``MOST`` graphs the one that was used longest ago makes room for a shape that
    has come ``WORTH`` times since; so neither a last partial batch nor shapes that alternate drop
    what is in use. ``passes`` and ``module`` as for ``Recording``. ``say`` is given a line, once
    for each reason, where steps that recur go on without a graph.
    """

    def __init__(
        self,
        passes: Callable[[dict[str, Tensor]], Losses],
        module: nn.Module,
        say: Callable[[str], object] = warnings.warn,
    ) -> None:
        self.passes, self.module, self.say = passes, module, say
        self.recordings: dict[Shapes, Recording] = {}  # the one that was used last is the last
        self.calls = 0
        self.used: dict[Shapes, int] = {}  # the last call of each recording
        self.met: dict[Shapes, deque[int]] = defaultdict(lambda: deque(maxlen=WORTH))  # of others
        self.ended = self.said = False  # nothing more is recorded; too many shapes were told

    def __call__(self, batch: Mapping[str, Any]) -> Losses:
        """Losses and gradients of one batch; gradients there were are dropped."""
        tensors = {name: value for name, value in batch.items() if isinstance(value, Tensor)}
        shapes = tuple((name, tuple(t.shape), t.dtype) for name, t in tensors.items())
        self.calls += 1
        with torch.cuda.device_of(next(self.module.parameters())):  # streams are the current one's
            if shapes not in self.recordings and self.has_room(shapes):
                self.record(shapes, tensors)
            if recording := self.recordings.pop(shapes, None):
                self.recordings[shapes], self.used[shapes] = recording, self.calls
                return recording.replay(tensors)
        for parameter in self.module.parameters():
            parameter.grad = None
        return self.passes(tensors)

    def has_room(self, shapes: Shapes) -> bool:
        """Whether these shapes, which have no graph, are to have one; room is made for it."""
        if self.ended:
            return False
        if not self.recordings:
            return True
        met = self.met[shapes]
        met.append(self.calls)
        if len(self.recordings) < MOST:
            return len(met) > 1
        oldest = next(iter(self.recordings))
        if len(met) == WORTH and met[0] > self.used[oldest]:
            del self.recordings[oldest], self.used[oldest]  # its memory is the next one's
            return True
        if len(met) > 1 and not self.said:
            self.said = True
            cure = "crops or images of one size (--fine_crop, --image_size) have one shape"
            self.say(
                f"Batches come in more than {MOST} shapes; steps of others than these are not "
                f"replayed as a graph, which is slower: {cure}"
            )
        return False

    def record(self, shapes: Shapes, tensors: Mapping[str, Tensor]) -> None:
        """Record a graph for batches of these shapes, in the memory of the others.

        OutOfMemoryError, unless there are others: then they are kept, and nothing is recorded more.
        """
        pools = [each.graph.pool() for each in self.recordings.values()]
        try:
            found = Recording(self.passes, self.module, tensors, *pools[:1])
        except Exception as error:  # whatever a library may refuse to have recorded
            causes = list(_causes(error))  # lack of memory may have ended the recording
            short = next((e for e in causes if isinstance(e, torch.OutOfMemoryError)), None)
            if short and not pools:
                raise short from None
            lines = ["memory ran out"] if short else str(error).strip().splitlines()
            why, which = (lines or [type(error).__name__])[0], " of further shapes" if pools else ""
            self.ended = True
            del causes, short  # whose tracebacks would keep what the recording held in memory
            self.say(f"Steps{which} are not replayed as a graph, which is slower: {why}")
            return
        self.recordings[shapes] = found
        self.met.pop(shapes, None)


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """An error, and those in whose handling it was raised."""
    while error is not None:
        yield error
        error = error.__context__
