"""The rule of ``pscl.matching`` among candidates: one operator, ``assign``, for all images at once.

On CUDA it is a kernel (``pscl.kernels``) that never waits for the host. Elsewhere templates propose
in rounds, all at once: each proposes to its best cell that no earlier template holds, and of those
who propose to a cell the earliest holds it (Gale and Shapley 1962, with one ranking for all cells).

Why that is the rule, and ends: whom a cell refuses it refuses for ever, since its holder is only
ever followed by an earlier one. Template 0 is never refused; once templates 0 ... t-1 have settled,
template t settles in the next round (or in a later one where its list is longer than ``PART``). So
T rounds are enough for T templates, and then each has its best cell of those that earlier ones
left, as in turn. A fixed number below T is not: a template can push out the next, which pushes out
the next. On micrographs 3 to 12 rounds settle 16 to 480 templates of 8 images (``docs/speed.md``).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pscl.matching import match

BLOCK = 32  # templates whose similarities to all cells are computed together
PART = 32  # places of a list that are looked at in a round
NOWHERE = 0  # in the place of a cell: the list has ended
with_kernel: bool | None = None  # whether the kernel works here; None: not known yet

Numbers = NDArray[np.int64]
Floats = NDArray[np.float64]


def assign(
    cell: Tensor, sure: Tensor, highest: Tensor, template: Tensor, keys: Tensor, valid: Tensor
) -> Tensor:
    """Let templates choose in turn among candidates, and among all cells where those don't decide.

    Args:
        cell: (B, T, L) candidates of each template, the most similar first.
        sure: (B, T), how many of them, from the first on, are more similar than any cell that is
            taken, and than any that is not among them.
        highest: (B, T), whether a template may have the image's largest similarity.
        template, keys, valid: as for ``pscl.matching.match``.

    Returns:
        The cell of each template in each image, int64 (B, T), as ``pscl.matching.match``.
    """
    chosen: Tensor = torch.ops.pscl.assign(cell, sure, highest, template, keys, valid)
    return chosen


def in_rounds(
    cell: Tensor, sure: Tensor, highest: Tensor, template: Tensor, keys: Tensor, valid: Tensor
) -> Tensor:
    """``assign`` on the host; tensors of another device are waited for.

    A template whose candidates are all taken goes on with all cells of its image. If all are taken,
    or less similar than taken ones that are lowered once, it goes on with cells lowered once, then
    with those lowered up to 3, 7, ... times. An image without a positive similarity, of which no
    candidate is sure, is left to the plain form.
    """
    device, (images, templates, _) = keys.device, cell.shape
    inputs = (tensor.cpu() for tensor in (cell, sure, highest, template, keys, valid))
    cell, sure, highest, template, keys, valid = inputs
    proposals = Proposals(cell.numpy(), sure.numpy(), valid.shape[1])
    proposals.settle()
    undecided = np.unique(proposals.left() // templates).tolist()
    found = {i: AllCells(template, keys[i], valid[i], highest[i]) for i in undecided}
    plain = [image for image, cells in found.items() if not cells.peak > 0]
    copies = -(-templates // valid.shape[1])
    while len(left := proposals.left(plain)):
        for image in np.unique(left // templates).tolist():
            numbers = left[left // templates == image]
            proposals.extend(numbers, found[image].lists(numbers % templates, copies))
        proposals.settle()
        copies *= 2
    chosen = torch.from_numpy(proposals.cell_of_each()).view(images, templates)
    for image in plain:
        own = slice(image, image + 1)
        chosen[image] = match(template, keys[own], valid[own])[0]
    return chosen.to(device)


class Proposals:
    """To which place every template proposes, and which template holds each place.

    Templates are numbered image by image. A place is a cell of an image, or one that was taken so
    many times before; ``NOWHERE``, with which a list ends, is held by a template before the first.
    """

    def __init__(self, cell: Numbers, sure: Numbers, cells: int) -> None:
        images, self.templates, length = cell.shape
        self.cells, self.places = cells, images * cells
        first = np.arange(images)[:, None, None] * cells + 1  # of an image's places
        lists = np.where(np.arange(length) < sure[..., None], cell + first, NOWHERE)
        self.lists = [lists.reshape(-1, length)]
        self.turn = np.tile(np.arange(self.templates), images)  # (B*T,) of each template
        self.which = np.zeros_like(self.turn)  # which of the lists is a template's
        self.row = np.arange(len(self.turn))  # and which row of it
        self.column = np.zeros_like(self.turn)  # and how far it got in that
        self.place = self.lists[0][:, 0].copy()  # to which it proposes
        self.holder = np.full(self.places + 1, self.templates)  # of each place; T: nobody
        self.holder[NOWHERE] = -1

    def settle(self) -> None:
        """Propose until nobody is refused who has another place to propose to."""
        proposing = np.arange(len(self.turn))
        while len(proposing):
            np.minimum.at(self.holder, self.place[proposing], self.turn[proposing])
            refused = np.flatnonzero(self.holder[self.place] != self.turn)
            refused = refused[self.place[refused] != NOWHERE]
            for which, lists in enumerate(self.lists):
                self._go_on(refused[self.which[refused] == which], lists)
            proposing = refused[self.place[refused] != NOWHERE]

    def _go_on(self, own: Numbers, lists: Numbers) -> None:
        """Let refused templates find, in the next part of their lists, a place that they may hold.

        Without one they stay refused, and look on in the next round.
        """
        length = lists.shape[1]
        column = np.minimum(self.column[own, None] + np.arange(min(PART, length)), length - 1)
        wanted = lists[self.row[own, None], column]  # (n, PART)
        free = self.holder[wanted] > self.turn[own, None]
        found, first = free.any(axis=1), free.argmax(axis=1)
        best = wanted[np.arange(len(own)), first]
        self.column[own] += np.where(found, first, PART)
        ended = np.where(self.column[own] < length, self.place[own], NOWHERE)
        self.place[own] = np.where(found, best, ended)

    def left(self, images: Sequence[int] = ()) -> Numbers:
        """Numbers of the templates whose lists have ended, without those of some images."""
        left = np.flatnonzero(self.place == NOWHERE)
        return left[~np.isin(left // self.templates, images)]

    def extend(self, numbers: Numbers, lists: Sequence[tuple[Numbers, Numbers]]) -> None:
        """Give templates of one image the lists of ``AllCells.lists``."""
        first = numbers[0] // self.templates * self.cells + 1
        cell, before = (np.concatenate(parts) for parts in zip(*lists, strict=True))
        places = np.where(cell < 0, NOWHERE, cell + first + before * self.places)
        missing = max(int(places.max()) + 1 - len(self.holder), 0)
        self.holder = np.append(self.holder, np.full(missing, self.templates))
        self.which[numbers], self.row[numbers] = len(self.lists), np.arange(len(numbers))
        self.place[numbers], self.column[numbers] = places[:, 0], 0
        self.lists.append(places)

    def cell_of_each(self) -> Numbers:
        """The cells (B*T,) that templates have proposed to last."""
        return (self.place - 1) % self.places % self.cells


class AllCells:
    """Similarities of all cells of an image, in double precision, a block of templates at a time.

    Blocks are of equal size: a matrix product adds in another order at the edges of its own blocks,
    so that equal cells would differ by a rounding. The number of cells is a multiple of ``BLOCK``.
    """

    def __init__(self, template: Tensor, keys: Tensor, valid: Tensor, highest: Tensor) -> None:
        self.template, self.keys, self.padding = template.double(), keys.double(), ~valid
        some = highest.nonzero().squeeze(1)
        peaks = [float(self.similarity(t).amax()) for t in some.split(BLOCK) if len(t)]
        self.peak = max(peaks, default=math.nan)  # none is highest where numbers are not finite

    def similarity(self, number: Tensor) -> Tensor:
        """Of up to ``BLOCK`` templates, the last one repeated: (BLOCK, P), -inf for padding."""
        filled = torch.arange(BLOCK).clamp_(max=len(number) - 1)
        rows = self.template.T[number[filled]]  # (BLOCK, D)
        return (rows @ self.keys).masked_fill_(self.padding, -torch.inf)

    def lists(self, turns: Numbers, copies: int) -> list[tuple[Numbers, Numbers]]:
        """The best places of some templates, block by block, as far as they are sure.

        A place is a cell that was taken up to ``copies - 1`` times, lowered by the largest
        similarity every time; it is sure if no cell taken more often is better. Of equals the first
        cell comes first. Others hold fewer than T places, so that T of them are enough.

        Returns:
            Cells, -1 after the last, and how many times they were taken before: (n, L) each.
        """
        found, most = [], self.template.shape[1]
        for own in torch.from_numpy(turns).split(BLOCK):
            values = self.similarity(own)[: len(own)].numpy()
            cell = largest(values, min(most, values.shape[1]))  # (n, kept)
            lowered = np.full((*cell.shape, copies + 1), self.peak)
            lowered[:, :, 0] = np.take_along_axis(values, cell, axis=1)
            lowered = np.subtract.accumulate(lowered, axis=2)  # one by one, as in turn
            bound = lowered[:, :, copies].max(axis=1) if copies < most else np.array([-np.inf])
            items = lowered[:, :, :copies].reshape(len(cell), -1)
            order = np.argsort(-items, axis=1, kind="stable")[:, :most]
            sure = np.take_along_axis(items, order, axis=1) > bound[:, None]
            cell = np.take_along_axis(cell, order // copies, axis=1)
            found.append((np.where(sure, cell, -1), np.where(sure, order % copies, 0)))
        return found


def largest(values: Floats, count: int) -> Numbers:
    """Indices of the ``count`` largest of each row (n, P), by size of index; of equals the first:
    (n, count)."""
    least = np.partition(values, -count, axis=1)[:, -count, None]
    above, equal = values > least, values == least
    missing = count - above.sum(axis=1, keepdims=True)
    chosen = above | (equal & (equal.cumsum(axis=1) <= missing))
    return np.nonzero(chosen)[1].reshape(-1, count)


def on_cuda(
    cell: Tensor, sure: Tensor, highest: Tensor, template: Tensor, keys: Tensor, valid: Tensor
) -> Tensor:
    """``assign`` by a kernel, or, after one line where that does not work, on the host.

    The kernel's first result is compared with the host's.
    """
    global with_kernel
    inputs = (cell, sure, highest, template, keys, valid)
    if with_kernel is False:
        return in_rounds(*inputs)
    try:
        from pscl import kernels  # Triton comes with PyTorch for CUDA alone

        chosen = kernels.assign(*inputs)
        if with_kernel is None and not torch.equal(chosen, in_rounds(*inputs)):
            raise RuntimeError("its choices differ from those of the rule")
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever a compiler may miss on somebody's machine
        with_kernel = False
        why = (str(error).splitlines() or [type(error).__name__])[0]
        warnings.warn(f"Matching has no CUDA kernel here and is slower: {why}", stacklevel=2)
        return in_rounds(*inputs)
    with_kernel = True
    return chosen


# Not ``torch.library.custom_op``, which imports PyTorch's compiler: that takes a while.
LIBRARY = torch.library.Library("pscl", "DEF")
NAMES = ("cell", "sure", "highest", "template", "keys", "valid")
LIBRARY.define(f"assign({', '.join(f'Tensor {name}' for name in NAMES)}) -> Tensor")
LIBRARY.impl("assign", in_rounds, "CompositeExplicitAutograd")
LIBRARY.impl("assign", on_cuda, "CUDA")
