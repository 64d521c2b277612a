"""MoCo, SimCLR, BYOL, DenseCL against their formulas and another implementation; whole runs."""

from __future__ import annotations

import copy
import itertools
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tiny_set import make_set, train
from torch import Tensor, nn

from config import SELF_MODES
from methods import MomentumMethod
from model import BYOL, METHODS, DenseCL, MoCo, SimCLR, build_method
from networks import ProjectedUNet, UNet
from pscl.geometry import ViewGeometry
from tests.golden_files import assert_agrees
from tests.recorder import LOSSES, Recorder
from utils.checkpoint import load, network_state, to_published, transfer
from utils.device import precision

SMALL = {
    "channels": (4, 8, 16, 32),
    "hidden_dim": 8,
    "embed_dim": 8,
    "top_k": 2,
    "queue_size": 6,
    "dense_grid": 4,
}
BASELINES = ("plain-moco", "plain-simclr", "byol", "densecl")
MOMENTUM = [mode for mode, cls in METHODS.items() if issubclass(cls, MomentumMethod)]
PARTS = {
    "moco": ["image", "patch", "patch_up1", "patch_up2", "patch_up3"],
    "simclr": ["image", "patch", "patch_up1", "patch_up2", "patch_up3"],
    "plain-moco": ["image"],
    "plain-simclr": ["image"],
    "byol": ["predict_k", "predict_q"],
    "densecl": ["image", "dense"],
}


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    return Recorder(monkeypatch)


def make(self_mode: str, **settings: Any) -> Any:
    torch.manual_seed(0)
    return build_method(self_mode, {**SMALL, **settings}).train()


def make_batch(seed: int, images: int = 3, size: tuple[int, int] = (32, 32)) -> dict[str, Any]:
    """A batch as the engine hands it over."""
    rng = np.random.default_rng(seed)
    random = torch.Generator().manual_seed(seed)
    mask = torch.randint(4, size, generator=random)
    views = [ViewGeometry.draw(rng, 0.2) for _ in range(images)]
    return {
        "view_q": torch.randn(images, 3, *size, generator=random),
        "view_k": torch.randn(images, 3, *size, generator=random),
        "geometry": views,
        "label": views[0].apply(255.0 * F.one_hot(mask, 4).permute(2, 0, 1))[None],
        "group": torch.zeros(images, dtype=torch.long),
        "name": [f"{i}.png" for i in range(images)],
    }


def adam(method: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Adam([p for p in method.parameters() if p.requires_grad], 1e-3)


def step(method: nn.Module, optimizer: torch.optim.Optimizer, batch: dict[str, Any]) -> Any:
    losses = method(batch)
    optimizer.zero_grad()
    losses["loss"].backward()
    optimizer.step()
    return losses


def unit(x: Tensor) -> Tensor:
    return x / x.norm(dim=1, keepdim=True)


# --- every method ---------------------------------------------------------------------------------


@pytest.mark.parametrize("amp", [False, True])
@pytest.mark.parametrize("self_mode", METHODS)
def test_two_steps_then_fine_tuning_loads_the_result(self_mode: str, amp: bool):
    method = make(self_mode)
    optimizer = adam(method)
    before = {name: value.clone() for name, value in method.encoder_q.state_dict().items()}
    for seed in range(2):
        with precision(torch.bfloat16 if amp else None, torch.device("cpu")):
            losses = method(make_batch(seed, size=(40, 32)))
        assert list(losses) == ["loss", *PARTS[self_mode]]
        assert all(v.shape == () and v.dtype == torch.float32 for v in losses.values())
        assert all(bool(v.isfinite()) for v in losses.values())
        optimizer.zero_grad()
        losses["loss"].backward()
        optimizer.step()
    state = to_published(method.state_dict())
    assert all(bool(value.isfinite().all()) for value in state.values())

    network = UNet(4, SMALL["channels"])
    report = transfer(network, network_state({"moco": state, "epoch": 2}))
    assert report.matched == report.total == len(network.encode.state_dict())
    for name, value in network.encode.state_dict().items():
        assert torch.equal(value, method.encoder_q.encode.state_dict()[name])
    for name in ("encode.inc.con1.weight", "encode.down3.conv.con2.weight"):
        assert not torch.equal(network.state_dict()[name], before[name])


def test_the_table_has_all_methods_of_the_paper_under_their_names():
    assert [METHODS[mode] for mode in BASELINES] == [MoCo, SimCLR, BYOL, DenseCL]
    assert [SELF_MODES[mode] for mode in BASELINES] == ["MoCo", "SimCLR", "BYOL", "DenseCL"]
    assert set(PARTS) == set(METHODS)
    for mode in BASELINES:
        assert not METHODS[mode].needs_annotated and not METHODS[mode].needs_groups


@pytest.mark.parametrize("self_mode", BASELINES)
def test_the_structure_is_that_of_the_patch_sampled_methods(self_mode: str):
    """'Identical model structure': every tensor of the encoder and its head, by name and shape."""

    def shapes(mode: str) -> dict[str, torch.Size]:
        return {k: v.shape for k, v in make(mode).encoder_q.state_dict().items()}

    assert shapes(self_mode) == shapes("moco") == shapes("simclr")


@pytest.mark.parametrize("self_mode", BASELINES)
def test_no_label_and_no_production_batch_is_read(self_mode: str):
    batch = make_batch(0)
    expected = make(self_mode)(batch)["loss"]
    views = {name: batch[name] for name in ("view_q", "view_k")}
    assert torch.equal(make(self_mode)(views)["loss"], expected)


def test_the_way_up_is_left_out_and_changes_no_embedding():
    torch.manual_seed(0)
    encoder = ProjectedUNet((4, 8, 16, 32), 8, 8, 4)
    twin, image = copy.deepcopy(encoder), torch.randn(2, 3, 40, 32)
    assert torch.equal(encoder.embed(image), twin(image)[0])
    counts = {
        name: int(value)
        for name, value in encoder.state_dict().items()
        if name.endswith("num_batches_tracked")
    }
    assert len(counts) == 11  # the ups have one BatchNorm each
    assert all(n == (0 if ".up" in name else 1) for name, n in counts.items())


# --- the image losses alone are those of PSCL -----------------------------------------------------


@pytest.mark.parametrize(("plain", "sampled"), [("plain-moco", "moco"), ("plain-simclr", "simclr")])
def test_the_plain_method_is_the_image_loss_of_the_sampled_one(plain: str, sampled: str):
    """PSCL with r = 0, before any soft target is there: same loss, same gradients, same keys."""
    both = [make(plain), make(sampled, global_local_ratio=0.0)]
    both[1].encoder_q.load_state_dict(both[0].encoder_q.state_dict())
    if plain == "plain-moco":
        both[1].encoder_k.load_state_dict(both[0].encoder_k.state_dict())
        both[1].queue.copy_(both[0].queue)
    losses = [method(make_batch(0)) for method in both]
    for each in losses:
        each["loss"].backward()
    assert_agrees(losses[0]["loss"].detach(), losses[1]["image"].detach(), 1e-6)
    for name, parameter in both[0].encoder_q.encode.named_parameters():
        expected = both[1].encoder_q.encode.get_parameter(name).grad
        if name.startswith("up"):
            assert parameter.grad is None and float(expected.abs().max()) == 0
        else:
            assert_agrees(parameter.grad, expected, 1e-5)
    if plain == "plain-moco":
        assert_agrees(both[0].queue, both[1].queue, 1e-6)


# --- momentum encoders ----------------------------------------------------------------------------


@pytest.mark.parametrize("self_mode", MOMENTUM)
def test_the_momentum_encoder_follows_by_the_formula(self_mode: str):
    """After each step: k = m*k + (1 - m)*q of the weights that the optimizer left before it."""
    method = make(self_mode, momentum=0.9)
    optimizer = adam(method)
    expected = {n: p.detach().double() for n, p in method.encoder_q.named_parameters()}
    for seed in range(3):
        for name, parameter in method.encoder_q.named_parameters():
            expected[name] = 0.9 * expected[name] + 0.1 * parameter.detach().double()
        step(method, optimizer, make_batch(seed))
        for name, parameter in method.encoder_k.named_parameters():
            torch.testing.assert_close(
                parameter.double(), expected[name], rtol=1e-5, atol=1e-7, msg=name
            )
    stem_q, stem_k = (e.encode.inc.con1.weight for e in (method.encoder_q, method.encoder_k))
    assert (stem_q - stem_k).abs().max() > 1e-4  # it has something to follow


def keys_of(recorder: Recorder) -> list[Tensor]:
    """What the momentum encoder gave to the losses of a step."""
    calls = [call for name in LOSSES for call in recorder.take(name)]
    assert calls
    return [call["target" if "target" in call else "key"] for call in calls]


@pytest.mark.parametrize("self_mode", MOMENTUM)
def test_the_momentum_encoder_makes_the_keys(self_mode: str, recorder: Recorder):
    original = make(self_mode, momentum=1.0)
    perturbed = copy.deepcopy(original)
    with torch.no_grad():
        for parameter in perturbed.encoder_k.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    losses, keys = [], []
    for method in (original, perturbed):
        torch.manual_seed(1)
        losses.append(float(method(make_batch(0))["loss"].detach()))
        keys.append(keys_of(recorder))
    assert abs(losses[0] - losses[1]) > 1e-3
    for one, other in zip(*keys, strict=True):
        assert (unit(one) - unit(other)).abs().max() > 1e-2
    for name, buffer in original.named_buffers():
        if name in ("queue", "dense_queue", "patch_queue"):
            assert not torch.equal(buffer, perturbed.get_buffer(name)), name


@pytest.mark.parametrize("self_mode", MOMENTUM)
def test_nothing_of_the_momentum_encoder_learns_by_gradient(self_mode: str):
    method = make(self_mode, momentum=1.0)
    before = copy.deepcopy(method.encoder_k.state_dict())
    optimizer = adam(method)
    for seed in range(2):
        step(method, optimizer, make_batch(seed))
    parameters = dict(method.encoder_k.named_parameters())
    for name, value in method.encoder_k.state_dict().items():
        if name in parameters:
            assert torch.equal(value, before[name]) and not parameters[name].requires_grad
    # Its BatchNorm works on its own batches, on buffers of its own.
    mean_q, mean_k = (e.encode.inc.norm1.running_mean for e in (method.encoder_q, method.encoder_k))
    assert not torch.equal(mean_k, before["encode.inc.norm1.running_mean"])
    assert not torch.equal(mean_k, mean_q)


# --- each against its paper -----------------------------------------------------------------------


def test_moco_step_by_step():
    """He 2020, algorithm 1, the queue a list of keys of which the oldest are dropped."""
    method = make("plain-moco", temperature=0.2, momentum=0.9, queue_size=7)
    online, momentum = copy.deepcopy(method.encoder_q), copy.deepcopy(method.encoder_q)
    queue = list(method.queue.clone())
    assert method.queue.norm(dim=1) == pytest.approx(torch.ones(7), abs=1e-6)
    optimizer, of_twin = adam(method), adam(online)
    for seed in range(4):
        batch = make_batch(seed)
        actual = step(method, optimizer, batch)["loss"]
        q = unit(online.embed(batch["view_q"]))
        k = unit(momentum.embed(batch["view_k"])).detach()
        losses = []
        for row in range(3):
            logits = torch.stack([q[row] @ k[row], *(q[row] @ entry for entry in queue)]) / 0.2
            losses.append(-torch.log(logits.exp()[0] / logits.exp().sum()))
        loss = torch.stack(losses).mean()
        of_twin.zero_grad()
        loss.backward()
        of_twin.step()
        with torch.no_grad():
            for target, source in zip(momentum.parameters(), online.parameters(), strict=True):
                target.copy_(0.9 * target + 0.1 * source)
        queue = [*queue, *k][3:]
        assert float(actual.detach()) == pytest.approx(float(loss.detach()), rel=1e-4)
    first = int(method.queue_ptr)
    assert first == 4 * 3 % 7
    assert_agrees(method.queue.roll(-first, 0), torch.stack(queue), 1e-4)


def test_simclr_step():
    """Chen 2020, equation 1 over the 2B embeddings of one encoder."""
    method = make("plain-simclr", temperature=0.3)
    twin, batch = copy.deepcopy(method.encoder_q), make_batch(0)
    rows = torch.cat([unit(twin.embed(batch[f"view_{v}"])) for v in "qk"]).tolist()
    losses = []
    for i, j in zip(range(6), (3, 4, 5, 0, 1, 2), strict=True):
        products = [sum(a * b for a, b in zip(rows[i], row, strict=True)) for row in rows]
        similar = [math.exp(product / 0.3) for product in products]
        losses.append(-math.log(similar[j] / (sum(similar) - similar[i])))
    actual = method(batch)
    assert float(actual["loss"].detach()) == pytest.approx(sum(losses) / 6, rel=1e-5)


def test_byol_step():
    """Grill 2020, equation 2: both orders, prediction by the online network alone, added up."""
    method = make("byol", momentum=0.9)
    with torch.no_grad():  # as far into the training: two encoders that differ
        for parameter in method.encoder_k.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    twin, batch = copy.deepcopy(method), make_batch(0)
    twin.update_key_encoder()
    expected = {}
    for seen, other in (("q", "k"), ("k", "q")):
        p = unit(twin.predictor.mlp(twin.encoder_q.embed(batch[f"view_{seen}"])))
        z = unit(twin.encoder_k.embed(batch[f"view_{other}"])).detach()
        expected[f"predict_{other}"] = ((p - z) ** 2).sum(1).mean()
    expected["loss"] = expected["predict_k"] + expected["predict_q"]
    losses = method(batch)
    for name, value in losses.items():
        assert float(value.detach()) == pytest.approx(float(expected[name].detach()), rel=1e-4)
    losses["loss"].backward()
    expected["loss"].backward()
    for name, parameter in method.named_parameters():
        if parameter.grad is not None and name.endswith(".weight"):  # biases before a norm: 0
            assert_agrees(parameter.grad, twin.get_parameter(name).grad, 1e-4)


def test_byol_is_symmetric_and_perfect_where_the_views_agree_and_nothing_is_predicted():
    batch = make_batch(0)
    swapped = batch | {"view_q": batch["view_k"], "view_k": batch["view_q"]}
    losses, other = make("byol")(batch), make("byol")(swapped)
    assert float(losses["loss"].detach()) == pytest.approx(float(other["loss"].detach()), rel=1e-5)
    assert_agrees(losses["predict_k"].detach(), other["predict_q"].detach(), 1e-5)
    method = make("byol")
    method.predictor = nn.Identity()
    same = method(batch | {"view_k": batch["view_q"]})
    assert float(same["loss"].detach()) == pytest.approx(0, abs=1e-5)


def test_densecl_step():
    """Wang 2021: cells of a 4 x 4 grid are blocks of 8 x 8 pixels of the last map; cell by cell."""
    method = make("densecl", temperature=0.3, momentum=0.9)
    twin, batch = copy.deepcopy(method), make_batch(0)
    (image_q, maps_q), (image_k, maps_k) = (
        encoder(batch[f"view_{v}"]) for v, encoder in (("q", twin.encoder_q), ("k", twin.encoder_k))
    )
    cells_q, cells_k = (
        maps[2].detach().unfold(2, 8, 8).unfold(3, 8, 8).mean((4, 5)).flatten(2)
        for maps in (maps_q, maps_k)
    )  # (B, c, 16)
    dense_q, dense_k = (
        encoder.decode.patch(cells, 2).detach()
        for encoder, cells in ((twin.encoder_q, cells_q), (twin.encoder_k, cells_k))
    )
    losses = []
    for b, i in itertools.product(range(3), range(16)):
        alike = [F.cosine_similarity(cells_q[b, :, i], cells_k[b, :, j], dim=0) for j in range(16)]
        j = max(range(16), key=lambda cell: float(alike[cell]))
        row = dense_q[b, :, i] / dense_q[b, :, i].norm()
        positive = float(row @ dense_k[b, :, j] / dense_k[b, :, j].norm()) / 0.3
        negative = [float(row @ entry) / 0.3 for entry in twin.dense_queue]
        losses.append(math.log(sum(math.exp(n - positive) for n in [positive, *negative])))
    dense = sum(losses) / len(losses)
    q, k = unit(image_q).detach(), unit(image_k).detach()
    logits = torch.cat([(q * k).sum(1, keepdim=True), q @ twin.queue.T], 1) / 0.3
    image = float(-logits.log_softmax(1)[:, 0].mean())

    actual = {name: float(value.detach()) for name, value in method(batch).items()}
    expected = {"loss": (image + dense) / 2, "image": image, "dense": dense}
    assert actual == pytest.approx(expected, rel=1e-4)
    assert_agrees(method.queue[:3], k, 1e-5)
    assert_agrees(method.dense_queue[:3], unit(dense_k.mean(2)), 1e-5)
    assert torch.equal(method.queue[3:], twin.queue[3:])
    assert torch.equal(method.dense_queue[3:], twin.dense_queue[3:])


def test_densecl_trains_the_decoder_and_its_head_of_the_full_size():
    method = make("densecl")
    method(make_batch(0))["loss"].backward()
    for name, parameter in method.encoder_q.named_parameters():
        of_other_scale = name.startswith(("decode.conv_x4up1", "decode.conv_x4up2"))
        assert (parameter.grad is None) == of_other_scale, name


# --- against another implementation ---------------------------------------------------------------


@pytest.fixture
def lightly() -> Any:
    """The losses of lightly, installed for tests only."""
    cure = "lightly is not installed: pip install --no-deps lightly"
    pytest.importorskip("lightly.loss", reason=cure)
    pytest.importorskip("lightly.models.utils", reason=cure)
    return pytest.importorskip("lightly")


def with_bank(lightly: Any, queue: Tensor, temperature: float) -> Any:
    """Its MoCo loss with our queue in its memory bank."""
    loss = lightly.loss.NTXentLoss(temperature, memory_bank_size=tuple(queue.shape))
    loss.memory_bank.bank = queue.clone()
    return loss


def test_simclr_agrees_with_lightly(lightly: Any):
    method = make("plain-simclr", temperature=0.2)
    twin, loss = copy.deepcopy(method.encoder_q), lightly.loss.NTXentLoss(0.2)
    optimizer, of_twin = adam(method), adam(twin)
    for seed in range(3):
        batch = make_batch(seed, images=4)
        actual = step(method, optimizer, batch)["loss"]
        expected = loss(twin.embed(batch["view_q"]), twin.embed(batch["view_k"]))
        assert float(actual.detach()) == pytest.approx(float(expected.detach()), rel=1e-4)
        of_twin.zero_grad()
        expected.backward()
        of_twin.step()


def test_moco_agrees_with_lightly(lightly: Any):
    """Five steps: its momentum update, its memory bank and its loss."""
    method = make("plain-moco", temperature=0.2, momentum=0.9, queue_size=9)
    q, k = copy.deepcopy(method.encoder_q), copy.deepcopy(method.encoder_k)
    loss = with_bank(lightly, method.queue, 0.2)
    optimizer, of_twin = adam(method), adam(q)
    for seed in range(5):
        batch = make_batch(seed)
        actual = step(method, optimizer, batch)["loss"]
        lightly.models.utils.update_momentum(q, k, m=0.9)
        expected = loss(q.embed(batch["view_q"]), k.embed(batch["view_k"]).detach())
        assert float(actual.detach()) == pytest.approx(float(expected.detach()), rel=1e-4)
        of_twin.zero_grad()
        expected.backward()
        of_twin.step()
        assert_agrees(method.queue, loss.memory_bank.bank, 1e-4)


def test_byol_agrees_with_lightly(lightly: Any):
    """Ours is 2 - 2 cos for each order, added; its loss is -cos."""
    method = make("byol", momentum=0.9)
    twin, loss = copy.deepcopy(method), lightly.loss.NegativeCosineSimilarity()
    optimizer, of_twin = adam(method), adam(twin)
    for seed in range(3):
        batch = make_batch(seed)
        actual = step(method, optimizer, batch)["loss"]
        lightly.models.utils.update_momentum(twin.encoder_q, twin.encoder_k, m=0.9)
        views = batch["view_q"], batch["view_k"]
        p0, p1 = (twin.predictor(twin.encoder_q.embed(v)) for v in views)
        z0, z1 = (twin.encoder_k.embed(v).detach() for v in views)
        expected = 4 + 2 * (loss(p0, z1) + loss(p1, z0))
        assert float(actual.detach()) == pytest.approx(float(expected.detach()), rel=1e-4)
        of_twin.zero_grad()
        expected.backward()
        of_twin.step()


def test_densecl_agrees_with_lightly(lightly: Any):
    """Its choice of the most similar cell and its loss; its bank keeps cells, ours their means."""
    method = make("densecl", temperature=0.2, momentum=0.9)
    q, k = copy.deepcopy(method.encoder_q), copy.deepcopy(method.encoder_k)
    optimizer, of_twin = adam(method), adam(q)
    for seed in range(3):
        batch = make_batch(seed)
        image_loss = with_bank(lightly, method.queue, 0.2)
        dense_loss = with_bank(lightly, method.dense_queue, 0.2)
        actual = step(method, optimizer, batch)
        lightly.models.utils.update_momentum(q, k, m=0.9)
        (image_q, maps_q), (image_k, maps_k) = q(batch["view_q"]), k(batch["view_k"])
        cells_q, cells_k = (F.adaptive_avg_pool2d(m[2], 4).flatten(2) for m in (maps_q, maps_k))
        dense_q = q.decode.patch(cells_q, 2).transpose(1, 2)  # (B, P, D)
        dense_k = k.decode.patch(cells_k, 2).transpose(1, 2).detach()
        positive = lightly.models.utils.select_most_similar(
            cells_q.transpose(1, 2), cells_k.transpose(1, 2), dense_k
        )
        image = image_loss(image_q, image_k.detach())
        dense = dense_loss(dense_q.flatten(0, 1), positive.flatten(0, 1))
        expected = {"loss": 0.5 * image + 0.5 * dense, "image": image, "dense": dense}
        for name, value in expected.items():
            assert float(actual[name].detach()) == pytest.approx(float(value.detach()), rel=1e-4)
        of_twin.zero_grad()
        expected["loss"].backward()
        of_twin.step()


# --- whole runs -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_set(tmp_path_factory.mktemp("data") / "set")


@pytest.mark.parametrize("self_mode", BASELINES)
def test_a_run_from_the_command_line(self_mode: str, data: Path, tmp_path: Path):
    """Pretraining reads no annotated image; fine-tuning starts from what it left."""
    bare = tmp_path / "bare"
    shutil.copytree(data / "train_numf" / "img", bare / "train_numf" / "img")
    assert train(bare, tmp_path, f"-stages self --self_mode {self_mode}") == 0
    run = tmp_path / f"tiny_{self_mode}" / "1_0"
    log = (run / "log_self.txt").read_text()
    assert log.startswith(f"Pretraining with {SELF_MODES[self_mode]} for 2 epochs on 4 images")
    assert "2 steps of 2 images an epoch" in log and "rides along" not in log
    assert ("queue of 10 keys" in log) == (self_mode in ("plain-moco", "densecl"))
    assert "is full of real keys after 5 steps" in log or "queue of" not in log
    for part in PARTS[self_mode]:
        assert f" {part[:1].upper()}{part[1:]} " in log
    pretrained = load(run / "moco2.pt")["moco"]

    settings = f"-stages self-fine --self_mode {self_mode} --overwrite"
    assert train(data, tmp_path, settings) == 0
    again = load(run / "moco2.pt")["moco"]  # the set with labels gives the same pretraining
    assert all(torch.equal(value, again[name]) for name, value in pretrained.items())
    assert "tensors loaded" in (run / "log_fine.txt").read_text()
    assert (tmp_path / f"tiny_{self_mode}" / "eval.txt").exists()


def test_settings_of_other_methods_neither_train_anew_nor_go_unsaid(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    settings = "-stages self --self_mode byol"
    assert train(data, tmp_path, settings) == 0
    log = (tmp_path / "tiny_byol" / "1_0" / "log_self.txt").read_text()
    assert "Of no effect on BYOL: top_k = 2, queue_size = 10\n" in log
    assert train(data, tmp_path, settings, top_k=7, queue_size=99, dense_grid=3) == 0
    capsys.readouterr()
    assert train(data, tmp_path, settings, momentum=0.5, top_k=7) == 2
    error = capsys.readouterr().err
    assert "momentum was 0.99, is 0.5" in error and "top_k" not in error


@pytest.mark.parametrize(
    ("self_mode", "images", "size", "found"),
    [
        ("byol", 4, 1, "self_batch_size: found 1; allowed: at least 2 with --self_mode byol"),
        ("plain-simclr", 4, 1, "self_batch_size: found 1; allowed: at least 2"),
        ("byol", 1, 2, "1 image to pretrain on; BYOL needs 2 in a batch"),
        ("plain-moco", 1, 2, ""),
        ("densecl", 4, 1, ""),
        ("simclr", 1, 1, ""),
    ],
)
def test_a_batch_of_one_image(
    self_mode: str,
    images: int,
    size: int,
    found: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
):
    root = make_set(tmp_path / "set", train=images)
    settings = {"self_mode": self_mode, "stages": "self", "self_batch_size": size}
    code = train(root, tmp_path / "out", self_max_epoch=1, **settings)
    error = capsys.readouterr().err
    assert code == (2 if found else 0), error
    if found:
        lines = error.splitlines()
        assert len(lines) == 1 and found in lines[0]
        assert not list((tmp_path / "out").rglob("moco*.pt"))
