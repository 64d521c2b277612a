"""Activation checkpointing: results equal to keeping everything, in less memory."""

from __future__ import annotations

import copy
import gc
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.measure import LiveBytes
from networks import ProjectedUNet, UNet
from pscl.lazy_map import lazy_maps
from pscl.recompute import recompute_activations
from tests.test_networks import CHANNELS
from utils.device import precision

CPU = torch.device("cpu")
LEVELS = [0, 1, 2, 3, 4]


def unet(levels: int, norm: str = "batch") -> UNet:
    torch.manual_seed(0)
    network = UNet(3, CHANNELS, norm).train()
    recompute_activations(network.encode, levels)
    return network


def trained(levels: int, norm: str = "batch", dtype: torch.dtype | None = None) -> dict[str, Any]:
    """Gradients and BatchNorm's running statistics after two passes forward, then backward."""
    network = unet(levels, norm)
    weight = torch.randn(2, 3, 27, 34)
    with precision(dtype, CPU):
        logits = network(torch.randn(2, 3, 27, 34)), network(torch.randn(2, 3, 27, 34))
    (sum(logits) * weight).sum().backward()
    gradients = {f"gradient of {n}": p.grad for n, p in network.named_parameters()}
    assert all(g is not None for g in gradients.values())
    return {**gradients, **dict(network.named_buffers())}


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("norm", ["batch", "group"])
@pytest.mark.parametrize("levels", LEVELS)
def test_recomputed_activations_change_nothing_that_is_learnt(
    levels: int, norm: str, dtype: torch.dtype | None
):
    kept, recomputed = trained(-1, norm, dtype), trained(levels, norm, dtype)
    assert kept.keys() == recomputed.keys()
    for name, value in kept.items():
        assert torch.equal(value, recomputed[name]), name


@pytest.mark.parametrize("levels", [-1, *LEVELS])
def test_running_statistics_are_updated_once_a_pass(levels: int):
    network = unet(levels)
    network(torch.randn(2, 3, 24, 24)).square().sum().backward()
    assert {int(b) for n, b in network.named_buffers() if n.endswith("batches_tracked")} == {1}


def test_a_graph_whose_levels_are_recomputed_can_be_gone_back_through_twice():
    network = unet(4)
    loss = network(torch.randn(2, 3, 24, 24)).square().sum()
    once = torch.autograd.grad(loss, list(network.parameters()), retain_graph=True)
    again = torch.autograd.grad(loss, list(network.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))
    assert {int(b) for n, b in network.named_buffers() if n.endswith("batches_tracked")} == {1}


def kept_bytes(levels: int) -> int:
    """What lives between the forward and the backward pass, the output left out."""
    network, image = unet(levels), torch.randn(1, 3, 64, 64)
    gc.disable()  # in the middle it would decide what lives
    try:
        with LiveBytes() as memory:
            up3 = network.encode(image)[-1]
    finally:
        gc.enable()
    return memory.live - up3.nbytes


def test_the_more_is_recomputed_the_less_is_kept_for_the_backward_pass():
    sizes = [kept_bytes(levels) for levels in (-1, *LEVELS)]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[1] < 0.6 * sizes[0] and sizes[-1] < 0.4 * sizes[0]


@pytest.mark.parametrize("levels", [0, 4])
def test_nothing_is_left_after_a_step_until_python_looks_for_circles(levels: int):
    """Graphs that hold themselves would keep the activations of several steps."""
    network, image = ProjectedUNet(CHANNELS, 24, 16), torch.randn(2, 3, 32, 32)
    recompute_activations(network.encode, levels)

    def step() -> None:
        embedding, maps = lazy_maps(network, image, levels)
        index = torch.zeros(2, 1, dtype=torch.long)
        (embedding.sum() + sum(each.at(index).square().sum() for each in maps)).backward()

    step()  # makes the gradients
    gc.disable()
    try:
        with LiveBytes() as memory:
            step()
            network.zero_grad()
    finally:
        gc.enable()
    assert memory.peak > 100_000 and memory.live < 1000


class Convolutions(TorchDispatchMode):
    """Counts convolutions, and transposed ones, of a forward pass or of one that is recomputed."""

    def __init__(self) -> None:
        super().__init__()
        self.plain = self.transposed = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.convolution.default:
            self.transposed += args[6]
            self.plain += not args[6]
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("levels", "again"), [(-1, (0, 0)), (0, (1, 3)), (1, (4, 3)), (4, (14, 3))]
)
def test_by_default_the_stems_and_transposed_convolutions_alone_are_computed_again(
    levels: int, again: tuple[int, int]
):
    """Of 14 convolutions and 3 transposed ones: all with 4 levels; stem and up3 have 2 each."""
    loss = unet(levels)(torch.randn(2, 3, 24, 24)).sum()
    with Convolutions() as counted:
        loss.backward()
    assert (counted.plain, counted.transposed) == again


def test_a_copy_is_recomputed_with_its_own_weights():
    """As of the momentum encoder: deepcopy of a network, then other weights."""
    network = unet(0)
    twin = copy.deepcopy(network)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.mul_(0.5)
    image = torch.randn(2, 3, 24, 24)
    plain = unet(-1)
    plain.load_state_dict(twin.state_dict())
    for each in (twin, plain):
        each(image).square().sum().backward()
    assert all(p.grad is None for p in network.parameters())
    for name, parameter in twin.named_parameters():
        assert torch.equal(parameter.grad, plain.get_parameter(name).grad), name


def test_names_of_tensors_stay():
    assert list(unet(4).state_dict()) == list(unet(-1).state_dict())


def test_without_gradients_nothing_is_recomputed():
    with torch.no_grad():
        logits: Tensor = unet(4)(torch.randn(1, 3, 24, 24))
    assert logits.grad_fn is None
