"""Lazy maps against positions gathered from the maps of the whole network."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from networks import ProjectedUNet, Up
from pscl.lazy_map import LazyMap, at_positions, lazy_maps
from pscl.recompute import recompute_activations
from tests.test_networks import CHANNELS, randomise


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 3), st.integers(1, 6), st.integers(1, 6), st.integers(1, 40), st.booleans())
def test_the_last_convolution_at_positions_is_that_of_the_whole_map(
    images: int, rows: int, columns: int, count: int, last: bool
):
    """Values and gradients; corners, edges, maps of one row or column, positions given twice."""
    torch.manual_seed(rows * 7 + columns)
    up = Up(10).double()
    randomise(up)
    x = torch.randn(images, 5, rows, columns, dtype=torch.double)
    if last:
        x = x.contiguous(memory_format=torch.channels_last)
    x.requires_grad_()
    index = torch.randint(rows * columns, (images, count))
    weight = torch.randn(images, count, 5, dtype=torch.double)
    wanted = [x, up.conv.con2.weight, *up.conv.norm2.parameters()]
    whole = torch.nn.functional.leaky_relu(up.conv.norm2(up.conv.con2(x)), 0.01)
    whole = whole.flatten(2).transpose(1, 2)  # (B, H*W, 5)
    expected = torch.stack([whole[b, index[b]] for b in range(images)])
    found = LazyMap(x, up).at(index)
    torch.testing.assert_close(found, expected)
    for a, b in zip(
        torch.autograd.grad((found * weight).sum(), wanted),
        torch.autograd.grad((expected * weight).sum(), wanted),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("recompute", [-1, 0, 4])
@pytest.mark.parametrize("size", [(24, 40), (27, 33)])
def test_lazy_maps_are_those_of_the_whole_pass(size: tuple[int, int], recompute: int):
    torch.manual_seed(3)
    network = ProjectedUNet(CHANNELS, 24, 16).train()
    recompute_activations(network.encode, recompute)
    image = torch.randn(2, 3, *size)
    embedding, maps = network(image)
    again, lazy = lazy_maps(network, image, recompute)
    assert torch.equal(embedding, again)
    for expected, found in zip(maps, lazy, strict=True):
        assert found.size == expected.shape[-2:]
        positions = found.size[0] * found.size[1]
        everywhere = torch.arange(positions).expand(2, -1)
        assert torch.equal(found.at(everywhere), at_positions(expected, everywhere))
        index = torch.randint(positions, (2, 9))
        there = at_positions(expected, index)
        torch.testing.assert_close(found.at(index), there, atol=1e-5, rtol=1e-4)
        for b, t in ((0, 0), (1, 8)):
            row, column = divmod(int(index[b, t]), found.size[1])
            assert torch.equal(there[b, t], expected[b, :, row, column])
