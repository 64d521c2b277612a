"""Checkpoint files: what is written comes back, nothing is run, and every failure is one line."""

from __future__ import annotations

import errno
import io
import os
import pickle
import resource
import warnings
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from networks import UNet
from tests.golden_files import Golden
from utils import checkpoint
from utils.checkpoint import (
    CheckpointError,
    from_published,
    load,
    network_state,
    norm_of,
    save,
    settings_in,
    to_published,
    transfer,
)
from utils.commandline import UserError


def message(error: pytest.ExceptionInfo[CheckpointError]) -> str:
    text = str(error.value)
    assert "\n" not in text and text
    return text


# --- saving ---------------------------------------------------------------------------------------


def training_state() -> dict[str, Any]:
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4)
    model(torch.randn(4, 3)).sum().backward()
    optimizer.step()
    return {
        "moco": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "epoch": 7,
        "acc": float("nan"),
        "config": {"scale_weights": (1.0, 2.0), "name": "钢", "data_size": None, "amp": True},
        "rng": {
            "torch": torch.get_rng_state(),
            "numpy": np.random.default_rng(0).bit_generator.state,
        },
    }


def assert_same(actual: Any, expected: Any) -> None:
    if isinstance(expected, Tensor):
        assert actual.dtype == expected.dtype and torch.equal(actual, expected)
    elif isinstance(expected, dict):
        assert list(actual) == list(expected)
        for key in expected:
            assert_same(actual[key], expected[key])
    elif isinstance(expected, (list, tuple)):
        assert type(actual) is type(expected) and len(actual) == len(expected)
        for one, other in zip(actual, expected, strict=True):
            assert_same(one, other)
    else:
        assert actual == expected or (actual != actual and expected != expected)


def test_what_is_saved_comes_back(tmp_path: Path) -> None:
    state = training_state()
    save(tmp_path / "new" / "moco7.pt", state)
    assert_same(load(tmp_path / "new" / "moco7.pt"), state)
    assert os.listdir(tmp_path / "new") == ["moco7.pt"]


def test_equal_contents_give_equal_bytes(tmp_path: Path) -> None:
    state = training_state()
    save(tmp_path / "a.pt", state)
    save(tmp_path / "other_name.pt", state)
    assert (tmp_path / "a.pt").read_bytes() == (tmp_path / "other_name.pt").read_bytes()


def test_a_saved_file_obeys_the_umask(tmp_path: Path) -> None:
    old = os.umask(0o022)
    try:
        save(tmp_path / "a.pt", {"epoch": 1})
    finally:
        os.umask(old)
    assert (tmp_path / "a.pt").stat().st_mode & 0o777 == 0o644


def test_a_full_disk_harms_nothing(tmp_path: Path) -> None:
    path = tmp_path / "fine.pt"
    save(path, {"epoch": 1})
    before = path.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(UserError) as error:
            save(path, {"weight": torch.zeros(100_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert str(path) in message(error) and "free disk space" in message(error)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["fine.pt"]


@pytest.mark.parametrize("step", ["fsync", "replace"])
@pytest.mark.parametrize("failure", [OSError(errno.ENOSPC, "No space left"), KeyboardInterrupt()])
def test_a_failure_at_any_step_harms_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str, failure: BaseException
) -> None:
    path = tmp_path / "fine.pt"
    save(path, {"epoch": 1})

    def fail(*_: object) -> None:
        raise failure

    monkeypatch.setattr(os, step, fail)
    expected = UserError if isinstance(failure, OSError) else KeyboardInterrupt
    with pytest.raises(expected):
        save(path, {"epoch": 2})
    monkeypatch.undo()
    assert load(path) == {"epoch": 1}
    assert os.listdir(tmp_path) == ["fine.pt"]


def test_the_file_takes_its_place_only_after_it_is_on_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[str] = []
    for name in ("fsync", "replace"):
        real = getattr(os, name)

        def note(*args: Any, name: str = name, real: Any = real) -> None:
            steps.append(name)
            real(*args)

        monkeypatch.setattr(os, name, note)
    save(tmp_path / "a.pt", {"epoch": 1})
    assert steps == ["fsync", "replace", "fsync"]


def test_a_folder_that_cannot_be_written_to_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError) as error:
        save(tmp_path / "file" / "a.pt", {"epoch": 1})
    assert str(tmp_path / "file" / "a.pt") in message(error)


@pytest.mark.parametrize(
    "foreign", [np.zeros(3), Path("a"), object(), {1, 2}, np.longdouble(1), np.str_("a")]
)
def test_what_could_not_be_loaded_is_not_saved(tmp_path: Path, foreign: object) -> None:
    with pytest.raises(TypeError, match=r"checkpoint\['config'\]\[0\]"):
        save(tmp_path / "a.pt", {"config": [foreign]})
    assert not list(tmp_path.iterdir())


# --- loading --------------------------------------------------------------------------------------

NUMBERS = [
    np.bool_(True),
    *(kind(-3) for kind in (np.int8, np.int16, np.int32, np.int64)),
    *(kind(3) for kind in (np.uint8, np.uint16, np.uint32, np.uint64)),
    *(kind(0.625) for kind in (np.float16, np.float32, np.float64)),
]


@pytest.mark.parametrize("zip_format", [True, False])
@pytest.mark.parametrize("number", NUMBERS, ids=lambda n: n.dtype.name)
def test_published_files_with_numpy_numbers_load(
    tmp_path: Path, number: np.generic, zip_format: bool
) -> None:
    path = tmp_path / "fine.pt"
    state = OrderedDict(weight=torch.arange(3.0))
    torch.save({"finetune": state, "acc": number}, path, _use_new_zipfile_serialization=zip_format)
    loaded = load(path)
    assert loaded["acc"] == number.item() and type(loaded["acc"]) is type(number.item())
    assert torch.equal(loaded["finetune"]["weight"], torch.arange(3.0))


@pytest.mark.parametrize("module", [b"numpy.core.multiarray", b"numpy._core.multiarray"])
def test_numbers_of_numpy_1_and_of_numpy_2_load(tmp_path: Path, module: bytes) -> None:
    buffer = io.BytesIO()
    torch.save(
        {"epoch": np.int64(200), "acc": np.float64(0.9)},
        buffer,
        _use_new_zipfile_serialization=False,
    )
    written = buffer.getvalue()
    own = b"numpy._core.multiarray" if b"numpy._core" in written else b"numpy.core.multiarray"
    assert own in written
    (tmp_path / "a.pt").write_bytes(written.replace(own, module))
    assert load(tmp_path / "a.pt") == {"epoch": 200, "acc": 0.9}


def test_numbers_of_the_other_byte_order_load(tmp_path: Path) -> None:
    number = np.array(513, dtype=">i4")[()]
    swapped = np.dtype(">i4").type(number)
    torch.save({"a": swapped}, tmp_path / "a.pt")
    assert load(tmp_path / "a.pt") == {"a": 513}
    kind = checkpoint._NumberKind("i4", False, True)
    kind.__setstate__((3, ">", None, None, None, -1, -1, 0))
    assert checkpoint._number(kind, b"\x00\x00\x02\x01") == 513
    kind.__setstate__((3, "<", None, None, None, -1, -1, 0))
    assert checkpoint._number(kind, b"\x00\x00\x02\x01") == 0x01020000


class Attack:
    """Runs a function with arguments when it is unpickled the ordinary way."""

    def __init__(self, function: Any, *arguments: object) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


@pytest.mark.parametrize("way", ["zip", "old", "bare pickle"])
@pytest.mark.parametrize(
    "function", [open, os.mkdir, eval, Path.touch, np.save], ids=lambda f: f.__name__
)
def test_nothing_in_a_file_is_run(tmp_path: Path, way: str, function: Any) -> None:
    victim = tmp_path / "victim"
    arguments: dict[Any, tuple[object, ...]] = {
        open: (str(victim), "w"),
        os.mkdir: (str(victim),),
        eval: (f"open({str(victim)!r}, 'w')",),
        Path.touch: (victim,),
        np.save: (str(victim), 0),
    }
    attack = {"moco": {"weight": torch.zeros(1)}, "epoch": Attack(function, *arguments[function])}
    path = tmp_path / "evil.pt"
    if way == "bare pickle":
        path.write_bytes(pickle.dumps(attack, protocol=2))
    else:
        torch.save(attack, path, _use_new_zipfile_serialization=way == "zip")
    with pytest.raises(CheckpointError) as error:
        load(path)
    assert str(path) in message(error)
    assert not any(name.startswith("victim") for name in os.listdir(tmp_path))
    if way != "bare pickle":
        assert "refused" in message(error)
    # The attack is a real one: PyTorch's trusting way of loading runs it.
    if way == "zip":
        torch.load(path, weights_only=False)
        assert any(name.startswith("victim") for name in os.listdir(tmp_path))


@pytest.mark.parametrize(
    "foreign", [np.zeros(3), np.array(None, dtype=object), np.str_("text"), nn.Linear(1, 1)]
)
def test_anything_but_data_is_refused_by_name(tmp_path: Path, foreign: object) -> None:
    torch.save({"moco": foreign}, tmp_path / "a.pt")
    with pytest.raises(CheckpointError) as error:
        load(tmp_path / "a.pt")
    assert "refused, because it holds" in message(error) and "a.pt" in message(error)


def test_loading_leaves_the_process_as_strict_as_it_was(tmp_path: Path) -> None:
    before = set(torch.serialization.get_safe_globals())
    torch.save({"epoch": np.int64(1)}, tmp_path / "a.pt")
    load(tmp_path / "a.pt")
    assert set(torch.serialization.get_safe_globals()) == before


@pytest.mark.parametrize("zip_format", [True, False])
def test_a_file_cut_off_anywhere_is_named(tmp_path: Path, zip_format: bool) -> None:
    buffer = io.BytesIO()
    torch.save(
        {"moco": {"weight": torch.randn(64)}, "epoch": np.int64(1)},
        buffer,
        _use_new_zipfile_serialization=zip_format,
    )
    whole = buffer.getvalue()
    path = tmp_path / "cut.pt"
    for length in range(0, len(whole) - 1, max(1, len(whole) // 60)):
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError) as error:
            load(path)
        assert str(path) in message(error)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "empty"),
        (b"\x89PNG\r\n\x1a\n" + bytes(100), "not a checkpoint"),
        (b"epoch: 3\n", "not a checkpoint"),
        (b"PK\x03\x04" + bytes(100), "damaged"),
        (b"\x80\x02" + bytes(100), "damaged"),
    ],
)
def test_a_foreign_file_is_named_with_the_cure(
    tmp_path: Path, content: bytes, expected: str
) -> None:
    (tmp_path / "a.pt").write_bytes(content)
    with pytest.raises(CheckpointError) as error:
        load(tmp_path / "a.pt")
    assert str(tmp_path / "a.pt") in message(error) and expected in message(error)


def test_a_missing_file_a_folder_and_a_bare_tensor_are_named(tmp_path: Path) -> None:
    torch.save(torch.zeros(3), tmp_path / "tensor.pt")
    for name, expected in (
        ("absent.pt", "No such file"),
        (".", "Is a directory"),
        ("tensor.pt", "holds a Tensor"),
    ):
        with pytest.raises(CheckpointError) as error:
            load(tmp_path / name)
        assert expected in message(error) and str(tmp_path / name) in message(error)


def test_loading_is_silent(tmp_path: Path) -> None:
    torch.save({"epoch": np.int64(1), "w": torch.zeros(2)}, tmp_path / "a.pt")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load(tmp_path / "a.pt")


# --- checksums ------------------------------------------------------------------------------------


def zipped(obj: Any, checksums: bool = True) -> bytes:
    buffer = io.BytesIO()
    torch.serialization.set_crc32_options(checksums)
    try:
        torch.save(obj, buffer)
    finally:
        torch.serialization.set_crc32_options(True)
    return buffer.getvalue()


def test_a_flipped_bit_is_noticed_or_changes_nothing(tmp_path: Path) -> None:
    state = training_state()
    whole, path = zipped(state), tmp_path / "state_self.pt"
    rng = np.random.default_rng(0)
    noticed = 0
    for place in rng.integers(len(whole), size=300):
        raw = bytearray(whole)
        raw[place] ^= 1 << int(rng.integers(8))
        path.write_bytes(raw)
        try:
            assert_same(load(path), state)  # of the padding, or of a time
        except CheckpointError as error:
            assert str(error).startswith(f"{path}: ") and str(error).isprintable()
            noticed += 1
    assert noticed > 50  # a zip of small tensors is mostly padding


@pytest.mark.parametrize("checksums", [True, False])
def test_no_bit_of_a_zip_files_list_of_parts_changes_what_is_read(
    tmp_path: Path, checksums: bool
) -> None:
    """No checksum guards the list: names, places, sizes, attributes. Every bit of it is tried."""
    state = {"moco": {"weight": torch.arange(8.0), "bias": torch.ones(8)}}
    whole, path = zipped(state, checksums), tmp_path / "a.pt"
    with zipfile.ZipFile(io.BytesIO(whole)) as parts:
        start, entries = parts.start_dir, len(parts.infolist())
    folders = 0
    for bit in range(8 * start, 8 * len(whole)):
        raw = bytearray(whole)
        raw[bit // 8] ^= 1 << bit % 8
        path.write_bytes(raw)
        try:
            assert_same(load(path), state)  # of a time, or of a version of the format
        except CheckpointError as error:
            assert str(error).startswith(f"{path}: ") and str(error).isprintable()
            folders += "is marked as a folder" in str(error)
    assert folders >= entries


def test_a_flipped_bit_of_a_weight_is_always_noticed(tmp_path: Path) -> None:
    weight = torch.arange(64.0)
    whole, path = zipped({"moco": {"weight": weight}}), tmp_path / "a.pt"
    start = whole.index(weight.numpy().tobytes())
    for bit in range(0, 64 * 32, 17):
        raw = bytearray(whole)
        raw[start + bit // 8] ^= 1 << bit % 8
        path.write_bytes(raw)
        with pytest.raises(CheckpointError, match="checksum of archive/data/0 is wrong.*copy it"):
            load(path)


def test_a_file_that_was_written_without_checksums_loads(tmp_path: Path) -> None:
    (tmp_path / "a.pt").write_bytes(zipped({"epoch": 3}, checksums=False))
    assert load(tmp_path / "a.pt") == {"epoch": 3}


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="pipes as Unix knows them")
def test_a_pipe_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match=r"a\.pt: a pipe, not a file; give the path"):
        load(tmp_path / "a.pt")


# --- tensors and settings that are none -----------------------------------------------------------

WEIGHT = torch.randn(4, 3, 3, 3, generator=torch.Generator().manual_seed(0))
ODD: dict[str, tuple[Tensor, str]] = {
    "nan": (WEIGHT.clone().index_fill_(0, torch.tensor([2]), float("nan")), "holds NaN or infin"),
    "infinite": (WEIGHT / 0, "holds NaN or infinity"),
    "half infinite": ((WEIGHT * 1e9).half(), "holds NaN or infinity"),
    "complex": (WEIGHT.to(torch.complex64), "complex64"),
    "boolean": (WEIGHT > 0, "bool"),
    "sparse": (WEIGHT.to_sparse(), "is sparse"),
    "meta": (WEIGHT.to("meta"), "without values"),
    "eight bits": (WEIGHT.to(torch.float8_e4m3fn), "float8_e4m3fn"),
    "empty": (WEIGHT[:0], "has no values"),
    "repeated": (torch.zeros(1).expand(10**6, 10**6), "repeats its values"),
}


@pytest.mark.parametrize("kind", ODD)
def test_tensors_that_cannot_be_weights_are_named(tmp_path: Path, kind: str) -> None:
    tensor, expected = ODD[kind]
    torch.save({"finetune": {"encode.inc.con1.weight": tensor}}, tmp_path / "a.pt")
    with pytest.raises(CheckpointError) as error:
        network_state(load(tmp_path / "a.pt"), source="a.pt")
    text = message(error)
    assert text.startswith("a.pt: tensor 'encode.inc.con1.weight' ")
    assert expected in text and "copy the file again" in text


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_of_other_real_numbers_load(dtype: torch.dtype) -> None:
    source, target = Network(), Network()
    state = {k: v.to(dtype) if v.is_floating_point() else v for k, v in source.state_dict().items()}
    found = network_state({"finetune": state})
    assert transfer(target, found, prefix="").matched == 9
    for key, value in target.state_dict().items():
        assert value.dtype == source.state_dict()[key].dtype
        assert torch.equal(value, state[key].to(value.dtype))


def test_whole_numbers_are_no_weights_of_a_network() -> None:
    state = dict(Network().state_dict())
    state["encode.0.weight"] = state["encode.0.weight"].mul(100).int()
    assert_refused(Network(), state, "encode.0.weight holds int32 values, in the network float32")


@pytest.mark.parametrize("odd", ["text", 3, [1], {"image_size": torch.zeros(2)}, {(1, 2): 3}])
def test_settings_that_are_none_are_named(odd: object) -> None:
    with pytest.raises(CheckpointError, match=r"^a\.pt: its settings are not names with numbers"):
        settings_in({"settings": odd}, "a.pt")
    assert settings_in({}, "a.pt") is None and settings_in({"settings": {}}, "a.pt") == {}


# --- key names ------------------------------------------------------------------------------------


def test_the_published_queue_is_our_patch_queue_and_back() -> None:
    published = Golden("pscl_moco_steps").state()
    inside = from_published(published)
    assert set(published) - set(inside) == {"queue2"}
    assert set(inside) - set(published) == {"patch_queue"}
    assert inside["patch_queue"] is published["queue2"]
    assert list(to_published(inside)) == list(published)


def test_the_prefix_of_dataparallel_is_dropped() -> None:
    one = torch.zeros(1)
    assert from_published({"module.queue2": one, "module.module.queue": one}) == {
        "patch_queue": one,
        "queue": one,
    }
    with pytest.raises(CheckpointError, match="'queue'"):
        from_published({"module.queue": one, "queue": one})


@pytest.mark.parametrize("name", ["pscl_moco_steps", "pscl_simclr_step"])
@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("wrapped", [True, False])
def test_the_query_encoder_of_a_pretraining_file_is_found(
    name: str, prefix: str, wrapped: bool
) -> None:
    published = Golden(name).state()
    state = {prefix + key: value for key, value in published.items()}
    found = network_state({"moco": state, "epoch": 200} if wrapped else state)
    assert found["encode.inc.con1.weight"] is published["encoder_q.encode.inc.con1.weight"]
    assert set(found) == {
        key.removeprefix("encoder_q.") for key in published if key.startswith("encoder_q.")
    }


@pytest.mark.parametrize("wrapper", ["finetune", "super", None])
def test_the_network_of_a_segmentation_file_is_found(wrapper: str | None) -> None:
    published = Golden("unet").state()
    found = network_state({wrapper: published, "epoch": 3, "acc": 0.9} if wrapper else published)
    assert found == published


@pytest.mark.parametrize("content", [{}, {"epoch": 3}, {"state_dict": {"conv1.weight": 1}}])
def test_a_file_without_a_network_is_named(content: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError, match=r"^resnet\.pt: no network") as error:
        network_state(content, source="resnet.pt")
    message(error)


# --- transfer -------------------------------------------------------------------------------------


class Network(nn.Module):
    """Like the UNet from outside: an ``encode`` with buffers and a ``decode``."""

    def __init__(self, channels: int = 4, classes: int = 3) -> None:
        super().__init__()
        self.encode = nn.Sequential(nn.Conv2d(1, channels, 3), nn.BatchNorm2d(channels))
        self.decode = nn.Linear(channels, classes)


def test_everything_but_decode_is_copied() -> None:
    torch.manual_seed(0)
    source, target = Network(classes=3), Network(classes=5)
    source.state_dict()["encode.1.running_mean"].fill_(0.5)
    state = dict(source.state_dict(), **{"decode.mlp.0.weight": torch.zeros(1)})
    kept = target.decode.weight.detach().clone()
    report = transfer(target, state)
    for key, value in target.encode.state_dict().items():
        assert torch.equal(value, source.encode.state_dict()[key])
    assert torch.equal(target.decode.weight, kept)
    assert (report.matched, report.total) == (7, 7)  # 2 + 2 weights and biases, 3 buffers
    assert report.missing == []
    assert report.unexpected == ["decode.mlp.0.weight"]
    assert report.mismatched == ["decode.weight", "decode.bias"]
    assert str(report) == "7 of 7 tensors loaded; not loaded: decode"


def test_an_empty_prefix_asks_for_everything() -> None:
    report = transfer(Network(), Network().state_dict(), prefix="")
    assert (report.matched, report.total, str(report)) == (9, 9, "9 of 9 tensors loaded")


def assert_refused(target: Network, state: dict[str, Tensor], *expected: str) -> None:
    before = {key: value.clone() for key, value in target.state_dict().items()}
    with pytest.raises(CheckpointError) as error:
        transfer(target, state, source="moco200.pt")
    lines = str(error.value).splitlines()
    assert len(lines) == len(expected)
    for line, part in zip(lines, expected, strict=True):
        assert line.startswith("moco200.pt: ") and part in line
    assert_same(dict(target.state_dict()), before)


def test_nothing_matched_is_an_error() -> None:
    decode_only = {"decode.weight": torch.zeros(3, 4)}
    assert_refused(Network(), decode_only, "nothing matched")
    assert_refused(Network(), {}, "nothing matched")
    foreign = {f"backbone.{key}": value for key, value in Network().state_dict().items()}
    assert_refused(Network(), foreign, "nothing matched: none of the network's 7 tensors")


def test_tensors_that_are_missing_or_unknown_are_named() -> None:
    state = dict(Network().state_dict())
    del state["encode.1.running_var"], state["encode.0.bias"]
    state["encode.2.weight"] = torch.zeros(1)
    assert_refused(
        Network(),
        state,
        "2 tensors missing in the file: encode.0.bias, encode.1.running_var",
        "1 tensors unknown to the network: encode.2.weight",
    )


def test_shapes_that_differ_are_named_tensor_by_tensor() -> None:
    target = Network(channels=4)
    state = dict(target.state_dict())
    state["encode.0.weight"] = torch.zeros(8, 1, 3, 3)
    state["encode.0.bias"] = torch.zeros(8)
    assert_refused(
        target,
        state,
        "encode.0.weight has shape (8, 1, 3, 3), in the network (4, 1, 3, 3)",
        "encode.0.bias has shape (8,), in the network (4,)",
    )


@pytest.mark.parametrize(("own", "other"), [("batch", "group"), ("group", "batch")])
def test_another_normalisation_is_one_line_with_the_cure(own: str, other: str) -> None:
    network, file = (UNet(3, (4, 8, 16, 32), norm) for norm in (own, other))
    before = {key: value.clone() for key, value in network.state_dict().items()}
    with pytest.raises(CheckpointError) as error:
        transfer(network, file.state_dict(), source="moco9.pt")
    text = message(error)
    assert text.startswith(f"moco9.pt: norm: its network was trained with --norm {other}, ")
    assert f"give --norm {other}" in text
    assert_same(dict(network.state_dict()), before)
    assert norm_of(file.state_dict()) == other
    assert norm_of(Golden("unet").state()) == "batch"
