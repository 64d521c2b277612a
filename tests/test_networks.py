"""The networks against the published program's maps, hand-counted parameters, and plain loops."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from networks import (
    ChannelLayerNorm,
    DoubleConv,
    FeatureMap,
    PredictionHead,
    ProjectedUNet,
    ProjectionHead,
    UNet,
    at_positions,
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
    assert head.last(scale).groups == 4
    everywhere = published_patch_head(head, full, scale).flatten(2)  # (B, D, H*W)
    assert some.shape == (2, 16, 11)
    assert_agrees(some, everywhere.gather(2, index[:, None].expand(-1, 16, -1)), 1e-6)


@pytest.mark.parametrize("scale", [0, 1, 2])
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("dead", [False, True])
def test_coordinates_have_the_inner_products_of_embeddings(scale: int, dead: bool, groups: int):
    """In fewer numbers where the last layer has fewer inputs; also if its columns are dependent."""
    torch.manual_seed(scale)
    head = ProjectionHead(CHANNELS, hidden_dim=24, embed_dim=20, groups=groups)
    randomise(head)
    if dead:
        nn.init.zeros_(head.last(scale).weight[:, :1])
        nn.init.zeros_(head.last(scale).get_parameter("bias"))
    features = torch.randn(2, (32, 16, 8)[scale], 50)
    coordinates = head.coordinates(features, scale)
    assert coordinates.shape == (2, (20, 17, 9)[scale], 50)
    embedded = published_patch_head(head, features[..., None], scale).squeeze(3)  # (B, D, P)
    expected = embedded.double().transpose(1, 2) @ embedded.double()  # (B, P, P)
    found = coordinates.double().transpose(1, 2) @ coordinates.double()
    assert (found - expected).abs().max() < 1e-6 * expected.abs().max()


def test_coordinates_are_in_single_precision_whatever_the_network_computes_in():
    """And equal features have equal ones here, so that the first of equal cells is found."""
    torch.manual_seed(0)
    head = ProjectionHead()
    features = torch.randn(1, 1001, 32)
    features[:, 1:] = features[:, :1]
    with torch.autocast("cpu", torch.bfloat16):
        rounded = head.coordinates(features.bfloat16().transpose(1, 2), 2)
    exact = head.coordinates(features.transpose(1, 2), 2)
    assert rounded.dtype == exact.dtype == torch.float32
    assert (rounded - exact).norm() < 0.02 * exact.norm()
    assert torch.equal(exact, exact[..., :1].expand_as(exact))


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


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 3), st.integers(1, 6), st.integers(1, 6), st.integers(1, 40), st.booleans())
def test_the_second_convolution_at_positions_is_that_of_the_whole_map(
    images: int, rows: int, columns: int, count: int, last: bool
):
    """Values and gradients; corners, edges, maps of one row or column, positions given twice."""
    torch.manual_seed(rows * 7 + columns)
    block = DoubleConv(3, 5, layer_norm=True).double()
    randomise(block)
    x = torch.randn(images, 5, rows, columns, dtype=torch.double)
    if last:
        x = x.contiguous(memory_format=torch.channels_last)
    x.requires_grad_()
    index = torch.randint(rows * columns, (images, count))
    weight = torch.randn(images, count, 5, dtype=torch.double)
    wanted = [x, block.con2.weight, *block.norm2.parameters()]
    whole = block.second(x).flatten(2).transpose(1, 2)  # (B, H*W, 5)
    expected = torch.stack([whole[b, index[b]] for b in range(images)])
    found = block.second_at(x, index)
    torch.testing.assert_close(found, expected)
    for a, b in zip(
        torch.autograd.grad((found * weight).sum(), wanted),
        torch.autograd.grad((expected * weight).sum(), wanted),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


def test_a_norm_over_positions_needs_all_of_them():
    with pytest.raises(TypeError, match="all of them"):
        DoubleConv(3, 5).second_at(torch.randn(1, 5, 4, 4), torch.zeros(1, 1, dtype=torch.long))


@pytest.mark.parametrize("recompute", [-1, 0, 4])
@pytest.mark.parametrize("size", [(24, 40), (27, 33)])
def test_unfinished_maps_are_those_of_the_whole_pass(size: tuple[int, int], recompute: int):
    torch.manual_seed(3)
    projected = ProjectedUNet(CHANNELS, 24, 16, recompute=recompute).train()
    image = torch.randn(2, 3, *size)
    embedding, maps = projected(image)
    again, unfinished = projected.unfinished(image)
    assert torch.equal(embedding, again)
    for expected, found in zip(maps, unfinished, strict=True):
        assert found.size == expected.shape[-2:]
        assert torch.equal(found.whole(), expected)
        index = torch.randint(found.size[0] * found.size[1], (2, 9))
        there = at_positions(expected, index)
        assert torch.equal(FeatureMap(expected).at(index), there)
        torch.testing.assert_close(found.at(index), there, atol=1e-5, rtol=1e-4)
        for b, t in ((0, 0), (1, 8)):
            row, column = divmod(int(index[b, t]), found.size[1])
            assert torch.equal(there[b, t], expected[b, :, row, column])


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


def trained(recompute: int, norm: str = "batch") -> dict[str, Tensor]:
    """Gradients, and what BatchNorm noted, after a pass forward and backward."""
    torch.manual_seed(0)
    unet = UNet(3, CHANNELS, norm, recompute).train()
    weight = torch.randn(2, 3, 27, 34)
    (unet(torch.randn(2, 3, 27, 34)) * weight).sum().backward()
    gradients = {f"gradient of {n}": p.grad for n, p in unet.named_parameters()}
    assert all(g is not None for g in gradients.values())
    return {**gradients, **dict(unet.named_buffers())}  # type: ignore[dict-item]


@pytest.mark.parametrize("norm", ["batch", "group"])
@pytest.mark.parametrize("levels", [0, 1, 2, 3, 4])
def test_recomputed_levels_change_nothing_that_is_learnt(levels: int, norm: str):
    kept, recomputed = trained(-1, norm), trained(levels, norm)
    assert kept.keys() == recomputed.keys()
    for name, value in kept.items():
        assert torch.equal(value, recomputed[name]), name


def test_a_recomputed_pass_can_be_gone_back_through_twice():
    unet = UNet(3, CHANNELS, recompute=4).train()
    loss = unet(torch.randn(2, 3, 24, 24)).square().sum()
    once = torch.autograd.grad(loss, list(unet.parameters()), retain_graph=True)
    again = torch.autograd.grad(loss, list(unet.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))
    assert {int(b) for n, b in unet.named_buffers() if n.endswith("batches_tracked")} == {1}


def test_recomputed_levels_keep_less_for_the_backward_pass():
    sizes = []
    for levels in range(-1, 5):
        unet = UNet(3, CHANNELS, recompute=levels).train()
        kept: dict[int, int] = {}

        def note(tensor: Tensor, kept: dict[int, int] = kept) -> Tensor:
            storage = tensor.untyped_storage()
            kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            unet.encode(torch.randn(1, 3, 64, 64))
        sizes.append(sum(kept.values()) - sum(p.nbytes for p in unet.parameters()))
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[1] < 0.6 * sizes[0] and sizes[-1] < 0.4 * sizes[0]


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


@pytest.mark.parametrize(("recompute", "again"), [(-1, (0, 0)), (0, (1, 3)), (4, (15, 6))])
def test_by_default_the_stems_and_transposed_convolutions_alone_are_computed_again(
    recompute: int, again: tuple[int, int]
):
    """Of 14 convolutions and 3 transposed ones; with whole blocks those within them once more.

    A block that is computed again stops at its last convolution: of 7 blocks 7 first convolutions
    and, for what the last norm keeps, 7 second ones; within them the stem's first once more.
    """
    unet = UNet(3, CHANNELS, recompute=recompute).train()
    loss = unet(torch.randn(2, 3, 24, 24)).sum()
    with Convolutions() as counted:
        loss.backward()
    assert (counted.plain, counted.transposed) == again
