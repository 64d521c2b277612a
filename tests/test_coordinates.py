"""Coordinates: fewer numbers than the embeddings of the patch head, with their inner products."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from networks import ProjectionHead
from pscl.coordinates import coordinates
from tests.test_networks import CHANNELS, randomise
from utils.device import precision


@pytest.mark.parametrize("scale", [0, 1, 2])
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("dead", [False, True])
def test_coordinates_have_the_inner_products_of_embeddings(scale: int, dead: bool, groups: int):
    """In fewer numbers where the last layer has fewer inputs; also if its columns are dependent."""
    torch.manual_seed(scale)
    head = ProjectionHead(CHANNELS, hidden_dim=24, embed_dim=20, groups=groups)
    randomise(head)
    if dead:
        last = head.patch_layers(scale)[2]
        nn.init.zeros_(last.weight[:, :1])
        nn.init.zeros_(last.bias)
    features = torch.randn(2, (32, 16, 8)[scale], 50)
    found = coordinates(head, features, scale)
    assert found.shape == (2, (20, 17, 9)[scale], 50)
    embedded = head.patch(features, scale)  # (B, D, P)
    expected = embedded.double().transpose(1, 2) @ embedded.double()  # (B, P, P)
    products = found.double().transpose(1, 2) @ found.double()
    assert (products - expected).abs().max() < 1e-6 * expected.abs().max()


def test_coordinates_are_in_single_precision_whatever_the_network_computes_in():
    """And equal features have equal ones here, so that the first of equal cells is found."""
    torch.manual_seed(0)
    head = ProjectionHead()
    features = torch.randn(1, 1001, 32)
    features[:, 1:] = features[:, :1]
    with precision(torch.bfloat16, torch.device("cpu")):
        rounded = coordinates(head, features.bfloat16().transpose(1, 2), 2)
    exact = coordinates(head, features.transpose(1, 2), 2)
    assert rounded.dtype == exact.dtype == torch.float32
    assert (rounded - exact).norm() < 0.02 * exact.norm()
    assert torch.equal(exact, exact[..., :1].expand_as(exact))
