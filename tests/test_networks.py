"""The networks against the published program's maps, hand-counted parameters, and plain loops."""

from __future__ import annotations

import copy
from unittest.mock import Mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import networks
from networks import (
    ChannelLayerNorm,
    PredictionHead,
    ProjectedUNet,
    ProjectionHead,
    UNet,
    normalisation,
)
from tests.golden_files import Golden, assert_agrees

CHANNELS = (8, 16, 32, 64)


def small_projected() -> ProjectedUNet:
    return ProjectedUNet(CHANNELS, hidden_dim=24, embed_dim=16)


@pytest.fixture(scope="module")
def golden() -> Golden:
    return Golden("unet")


def load(golden: Golden) -> UNet:
    unet = UNet(4, CHANNELS)
    unet.load_state_dict(golden.state())
    return unet


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_maps_and_logits_of_the_published_unet(golden: Golden, memory_format: torch.memory_format):
    unet = load(golden).to(memory_format=memory_format).eval()
    image = golden["in/image"].contiguous(memory_format=memory_format)
    with torch.no_grad():
        maps, logits = unet.encode(image), unet(image)
    for name, value in zip(("x4", "up1", "up2", "up3"), maps, strict=True):
        assert_agrees(value, golden[f"out/{name}_eval"])
    assert_agrees(logits, golden["out/logits_eval"])


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_training_pass_of_the_published_unet(golden: Golden, memory_format: torch.memory_format):
    unet = load(golden).to(memory_format=memory_format).train()
    logits = unet(golden["in/image"].contiguous(memory_format=memory_format))
    assert_agrees(logits, golden["out/logits_train"])
    mean = unet.encode.inc.norm1.running_mean
    assert mean is not None
    assert_agrees(mean, golden["out/running_mean_after_train"])
    assert not torch.equal(mean, golden["state/encode.inc.norm1.running_mean"])


def test_the_default_networks_have_the_published_numbers_of_parameters():
    assert sum(p.numel() for p in UNet().parameters()) == 2_142_148
    assert sum(p.numel() for p in ProjectedUNet().parameters()) == 2_192_992


def test_state_dicts_have_the_published_names_and_shapes(golden: Golden):
    def shapes(state: dict[str, Tensor]) -> dict[str, torch.Size]:
        return {name: value.shape for name, value in state.items()}

    assert shapes(UNet(4, CHANNELS).state_dict()) == shapes(golden.state())
    moco = Golden("pscl_moco_steps").state()
    for encoder in ("encoder_q.", "encoder_k."):
        published = {k.removeprefix(encoder): v for k, v in moco.items() if k.startswith(encoder)}
        assert shapes(small_projected().state_dict()) == shapes(published)


def test_a_published_name_decides_which_weight_it_is(golden: Golden):
    """Loaded by name, not by order: two tensors of one shape, exchanged, give another result."""
    state = golden.state()
    a, b = "encode.up3.conv.norm1.weight", "encode.up3.conv.norm2.weight"
    state[a], state[b] = state[b], state[a]
    unet = UNet(4, CHANNELS)
    unet.load_state_dict(state)
    logits = unet.eval()(golden["in/image"])
    assert (logits - golden["out/logits_eval"]).abs().max() > 1e-2


@settings(max_examples=25)
@given(st.integers(8, 45), st.integers(8, 45), st.integers(2, 5), st.integers(1, 2))
def test_any_size_gives_the_right_shapes(height: int, width: int, classes: int, images: int):
    unet, projected = UNet(classes, (4, 8, 16, 32)), ProjectedUNet((4, 8, 16, 32), 8, 12)
    image = torch.randn(images, 3, height, width)
    with torch.no_grad():
        maps, logits = unet.eval().encode(image), unet(image)
        embedding, projected_maps = projected.eval()(image)
    # Pooling floors at each of the levels, which is the floor of the eighth.
    levels = [(32, 8), (16, 4), (8, 2), (4, 1)]
    shapes = [(images, c, height // d, width // d) for c, d in levels]
    assert [tuple(m.shape) for m in maps] == shapes
    assert [tuple(m.shape) for m in projected_maps] == shapes[1:]
    assert tuple(logits.shape) == (images, classes, height, width)
    assert tuple(embedding.shape) == (images, 12)


@pytest.mark.parametrize("scale", [0, 1, 2])
def test_projecting_positions_is_projecting_the_map_and_gathering(scale: int):
    torch.manual_seed(scale)
    head = ProjectionHead(CHANNELS, hidden_dim=24, embed_dim=16)
    randomise(head)
    channels = (32, 16, 8)[scale]
    full = torch.randn(2, channels, 5, 7)
    index = torch.randint(35, (2, 11))
    gather = index[:, None].expand(-1, channels, -1)
    some = head.patch(full.flatten(2).gather(2, gather), scale)
    assert [head.patch_layers(scale)[n].groups for n in (0, 2)] == [4, 4]
    everywhere = published_patch_head(head, full, scale).flatten(2)  # (B, D, H*W)
    assert some.shape == (2, 16, 11)
    assert_agrees(some, everywhere.gather(2, index[:, None].expand(-1, 16, -1)), 1e-6)


def published_patch_head(head: ProjectionHead, maps: Tensor, scale: int) -> Tensor:
    """The head on a whole map, layer by layer: grouped 1x1, LayerNorm, ReLU, grouped 1x1."""
    first, norm, second = (
        head.get_submodule(f"conv_x4up{scale + 1}_{name}") for name in ("conv1", "norm1", "conv2")
    )
    assert isinstance(first, nn.Conv2d) and isinstance(second, nn.Conv2d)
    assert first.groups == second.groups
    x = first(maps)
    mean, var = x.mean(1, keepdim=True), x.var(1, keepdim=True, unbiased=False)
    x = (x - mean) / (var + 1e-5).sqrt()
    x = x * norm.weight[:, None, None] + norm.bias[:, None, None]
    return second(x.clamp(min=0))


def randomise(module: nn.Module) -> None:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_()


def test_published_embeddings_and_patches_are_those_of_the_head():
    golden = Golden("pscl_simclr_step")
    projected = small_projected()
    state = {k.removeprefix("encoder_q."): v for k, v in golden.state().items()}
    projected.load_state_dict(state)
    for view in ("q", "k"):
        with torch.no_grad():
            embedding, maps = projected.train()(golden[f"in/x_{view}"])
        assert_agrees(embedding, golden[f"out/{view}"])
        for scale in range(3):
            index = golden[f"out/index_{view}_scale{scale + 1}"]
            flat = maps[scale].flatten(2)
            there = flat.gather(2, index[:, None].expand(-1, flat.shape[1], -1))
            patches = projected.decode.patch(there, scale).transpose(1, 2).flatten(0, 1)
            assert_agrees(patches, golden[f"out/{view}_dense{scale + 1}"])


@pytest.mark.parametrize("make", [lambda: UNet(3, CHANNELS), small_projected])
def test_channels_last_gives_what_the_default_format_gives(make):
    torch.manual_seed(0)
    network = make().train()
    image = torch.randn(2, 3, 29, 37)
    reference = flatten(network(image))
    last = network.to(memory_format=torch.channels_last)
    for a, b in zip(
        flatten(last(image.to(memory_format=torch.channels_last))), reference, strict=True
    ):
        assert_agrees(a, b, 1e-5)


def flatten(output) -> list[Tensor]:
    if isinstance(output, Tensor):
        return [output]
    return [tensor for part in output for tensor in flatten(part)]


def test_layer_norm_is_over_the_channels_of_each_pixel():
    torch.manual_seed(1)
    norm = ChannelLayerNorm(5)
    randomise(norm)
    x = 3 * torch.randn(2, 5, 2, 3)
    actual = norm(x)
    for b in range(2):
        for i in range(2):
            for j in range(3):
                pixel = x[b, :, i, j].double()
                unit = (pixel - pixel.mean()) / ((pixel - pixel.mean()).pow(2).mean() + 1e-5).sqrt()
                expected = unit * norm.weight.double() + norm.bias.double()
                assert_agrees(actual[b, :, i, j], expected, 1e-5)


def test_gradients_reach_every_parameter():
    torch.manual_seed(2)
    projected = small_projected()
    embedding, maps = projected(torch.randn(2, 3, 24, 40))
    patches = [projected.decode.patch(maps[s].flatten(2)[:, :, ::7], s) for s in range(3)]
    # The sum over channels of a normalised map is constant: weigh the outputs at random.
    loss = sum((x * torch.randn_like(x)).sum() for x in [embedding, *patches])
    loss.backward()
    for name, parameter in projected.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name


def test_the_prediction_head_is_linear_batch_norm_relu_linear():
    """BYOL's predictor: 64 * 128 + 128, 2 * 128, 128 * 64 + 64 parameters; then by its formula."""
    assert sum(p.numel() for p in PredictionHead().parameters()) == 16_832
    torch.manual_seed(0)
    head, x = PredictionHead(4, 6), torch.randn(5, 4)
    first, norm, _, last = head.mlp
    with torch.no_grad():
        norm.weight.uniform_(0.5, 2)
        norm.bias.uniform_(-1, 1)
    hidden = x @ first.weight.T + first.bias
    spread = ((hidden - hidden.mean(0)) ** 2).mean(0)
    hidden = (hidden - hidden.mean(0)) / (spread + 1e-5).sqrt() * norm.weight + norm.bias
    expected = hidden.clamp(min=0) @ last.weight.T + last.bias
    assert_agrees(head(x).detach(), expected.detach(), 1e-5)


# --- GroupNorm ------------------------------------------------------------------------------------


def plain_group_norm(x: Tensor, groups: int) -> Tensor:
    """Each image's channels in groups, less their mean, over their deviation (Wu and He 2018)."""
    out = torch.empty_like(x)
    size = x.shape[1] // groups
    for image in range(len(x)):
        for first in range(0, x.shape[1], size):
            block = x[image, first : first + size].double()
            variance = ((block - block.mean()) ** 2).mean()
            out[image, first : first + size] = (block - block.mean()) / (variance + 1e-5).sqrt()
    return out


@pytest.mark.parametrize(("channels", "groups"), [(4, 4), (12, 4), (32, 8), (256, 8)])
def test_group_norm_by_plain_loops(channels: int, groups: int):
    x = torch.randn(2, channels, 5, 6) * 3 + 1
    torch.testing.assert_close(normalisation("group", channels)(x), plain_group_norm(x, groups))


def test_group_norm_stands_where_batch_norm_does_under_the_same_names():
    batch, group = UNet(3, CHANNELS), UNet(3, CHANNELS, "group")
    learned = {name for name, _ in batch.named_parameters()}
    assert {name for name, _ in group.named_parameters()} == learned == set(group.state_dict())
    kinds = [type(m) for m in group.modules() if "Norm" in type(m).__name__]
    # Stem and three downs have two each, the three ups one and a LayerNorm over channels.
    assert kinds.count(nn.GroupNorm) == 11 and kinds.count(ChannelLayerNorm) == 3
    assert nn.BatchNorm2d not in kinds
    assert "norm1.running_mean" in " ".join(batch.state_dict())


def test_with_group_norm_an_image_does_not_depend_on_its_company():
    torch.manual_seed(0)
    images = torch.randn(3, 3, 24, 32)
    for network in (UNet(3, CHANNELS, "group"), ProjectedUNet(CHANNELS, 24, 16, norm="group")):
        first = network.train()(images)
        alone = network.eval()(images[:1])
        for all_of_them, one in zip(flat(first), flat(alone), strict=True):
            torch.testing.assert_close(all_of_them[:1], one, atol=1e-5, rtol=1e-4)
    unet = UNet(3, CHANNELS).train()
    assert (unet(images)[:1] - unet(images[:1])).abs().max() > 1e-2  # BatchNorm's does


def flat(result: Tensor | tuple[Tensor, tuple[Tensor, ...]]) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else [result[0], *result[1]]


def trained(network: nn.Module, image: Tensor) -> list[Tensor]:
    """Maps, gradients and buffers of one pass."""
    maps = network(image)
    sum(m.float().square().mean() for m in maps).backward()  # type: ignore[union-attr]
    gradients = [p.grad for p in network.parameters() if p.grad is not None]
    return [*maps, *gradients, *network.buffers()]


def by_pytorch(
    rows: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, variance: Tensor, *how: float
) -> Tensor:
    """As the kernel of BatchNorm, for any device."""
    momentum, eps, slope = how
    normed = F.batch_norm(rows, mean, variance, weight, bias, True, momentum, eps)
    return F.leaky_relu(normed, slope)


def test_norms_by_their_kernel_compute_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Maps, gradients, statistics and counters; the kernel is in use in training alone."""
    kernel = Mock(side_effect=by_pytorch)
    torch.manual_seed(0)
    plain = networks.Encoder(CHANNELS).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    other = copy.deepcopy(plain)
    image = torch.randn(2, 3, 24, 20).contiguous(memory_format=torch.channels_last)
    expected = trained(plain, image)
    of = {"batch_norm": kernel}
    monkeypatch.setattr(networks, "kernel_for", lambda name, x: of.get(name))
    found = trained(other, image)
    assert kernel.call_count == 11  # two of the stem and of each down, one of each up
    for own, value in zip(found, expected, strict=True):
        torch.testing.assert_close(own, value, rtol=2e-3, atol=1e-5)
    other.eval()(image)
    grouped = networks.Encoder(CHANNELS, "group")
    grouped(image)
    assert kernel.call_count == 11


def test_statistics_taken_anew_are_pytorchs(monkeypatch: pytest.MonkeyPatch) -> None:
    """``update_bn`` has no momentum; of one value PyTorch says that it has no statistics."""
    monkeypatch.setattr(networks, "kernel_for", Mock(side_effect=AssertionError))
    norm = nn.BatchNorm2d(4, momentum=None)
    networks.activated(norm, torch.randn(2, 4, 3, 3))
    assert norm.num_batches_tracked == 1
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        networks.activated(nn.BatchNorm2d(4), torch.randn(1, 4, 1, 1))


@pytest.mark.parametrize("how", [{"affine": False}, {"track_running_stats": False}])
def test_a_norm_without_weights_or_running_statistics_is_pytorchs(
    how: dict[str, bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(networks, "kernel_for", Mock(side_effect=AssertionError))
    x = torch.randn(2, 4, 3, 3)
    expected = F.leaky_relu(F.batch_norm(x, None, None, training=True), 0.01)
    torch.testing.assert_close(networks.activated(nn.BatchNorm2d(4, **how), x), expected)


def test_memory_that_runs_out_at_a_kernels_first_use_is_said_as_such(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """And the kernel is not left out from then on."""
    module = Mock()
    module.check.side_effect = torch.OutOfMemoryError("none left")
    monkeypatch.setattr(networks.importlib, "import_module", lambda name: module)
    with pytest.raises(torch.OutOfMemoryError):
        networks.norm_kernel.__wrapped__("row_norm", torch.device("cpu"), torch.float32)


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_groups_as_one_matrix_are_the_groups(groups: int) -> None:
    """Of a 1x1 convolution: values, and gradients of its weights."""
    conv = nn.Conv2d(8, 12, 1, groups=groups)
    x = torch.randn(2, 8, 3, 5)
    found = F.linear(x.permute(0, 2, 3, 1), networks.dense_weight(conv), conv.bias)
    expected = conv(x).permute(0, 2, 3, 1)
    torch.testing.assert_close(found, expected)
    assert torch.equal(networks.pointwise(conv, x), expected.permute(0, 3, 1, 2))
    own, other = (torch.autograd.grad(y.sin().sum(), conv.weight)[0] for y in (found, expected))
    torch.testing.assert_close(own, other)


def test_double_precision_has_no_kernel() -> None:
    for dtype, cuda in ((torch.float64, True), (torch.float32, False)):
        assert networks.kernel_for("batch_norm", Mock(dtype=dtype, is_cuda=cuda)) is None
