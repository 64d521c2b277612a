"""The benchmarks at sizes that take no time: what they report, not how fast it was."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import (
    devices,
    finetune,
    large_set,
    matching,
    measure,
    precision,
    prediction,
    step,
)
from config import Config
from data import one_hot
from model import METHODS, PSCL, build_method
from networks import Encoder
from stages.job import Runner
from tests.tiny_set import TINY, add, draw
from utils.checkpoint import load, save, to_published

CASE = {"size": 16, "batch": 2, "steps": 1, "device": "cpu", "threads": 0, "recompute": 0}


@pytest.mark.parametrize("method", METHODS)
def test_a_step_is_reported_with_its_parts(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The one that warms up is not among them."""
    monkeypatch.setattr(step, "WARM_UP", 1)
    result = step.measure_case({"kind": "step", "method": method, "precision": "fp32", **CASE})
    (whole,) = result["seconds"]
    parts = {name: result[name][0] for name in step.PARTS}
    assert sum(parts.values()) == pytest.approx(whole)
    assert (parts.pop("sampling") > 0) == issubclass(METHODS[method], PSCL)
    assert min(parts.values()) > 0
    assert result["megabytes"] > 0 and 0 < result["views"] < result["calls"]
    assert len(result["cost"]) == 1 and result["cost"][0] > 0


def test_what_a_part_calls_of_another_is_not_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sampling takes 2 s, then 5 s in the encoder, then 1 s; a whole pass of the encoder 7 s."""
    clock = [0.0]
    monkeypatch.setattr(measure, "now", lambda device: clock[0])

    class Busy(torch.nn.Module):
        def last(self) -> None:
            clock[0] += 5

        def whole(self) -> None:
            clock[0] += 2
            self.last()

        def sample(self) -> None:
            clock[0] += 2
            self.last()
            clock[0] += 1

    busy: Any = Busy()
    watch = measure.Stopwatch(torch.device("cpu"))
    for name, part in (("last", "encode"), ("whole", "encode"), ("sample", "sampling")):
        setattr(busy, name, watch.timed(getattr(busy, name), part))
    busy.sample()
    assert (watch.parts["sampling"], watch.parts["encode"]) == (3, 5)
    busy.whole()
    assert (watch.parts["sampling"], watch.parts["encode"]) == (3, 12)


def test_the_floor_counts_every_convolution_of_the_encoders() -> None:
    """A UNet has 17: two in each of seven blocks, three transposed; its way down has 8.

    PSCL needs the last of view q at the patches alone.
    """
    counts = {
        name: step.measure_case(
            {"kind": "floor", "method": name, "precision": "fp32", **CASE, "size": 32}
        )
        for name in METHODS
    }
    assert {name: result["convolutions"] for name, result in counts.items()} == {
        "simclr": 33,
        "moco": 33,
        "densecl": 34,
        "plain-simclr": 16,
        "plain-moco": 16,
        "byol": 32,
    }
    assert all(result["cost"][0] > 0 for result in counts.values())


def test_calls_are_counted_where_they_are_made() -> None:
    watch = measure.Stopwatch(torch.device("cpu"))
    calls = measure.OperatorCalls(watch)
    image, kernel = torch.ones(1, 3, 8, 8), torch.ones(2, 3, 3, 3, requires_grad=True)
    with calls:
        with watch.part("encode"):
            torch.nn.functional.conv2d(image, kernel, padding=1)
            with torch.no_grad():
                torch.nn.functional.conv2d(image, kernel)
        with watch.part("losses"):
            torch.ones(2).exp()
            torch.ones(2).view(2, 1)
    assert calls.counts == {"encode": 2, "losses": 4} and calls.views == {"losses": 1}
    (first, learns), (_, learns_not) = ((c[:2], c[-1]) for c in calls.convolutions)
    assert first == ((1, 3, 8, 8), (2, 3, 3, 3)) and learns and not learns_not


def test_what_a_platform_does_not_tell_is_no_number(monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows has neither a load average nor the module of a process's resources."""
    assert measure.process_megabytes() > 50 and measure.load_average() >= 0
    monkeypatch.delattr("os.getloadavg")
    monkeypatch.setitem(sys.modules, "resource", None)
    assert math.isnan(measure.process_megabytes()) and math.isnan(measure.load_average())


def test_bytes_are_counted_while_they_live() -> None:
    with measure.LiveBytes() as memory:
        x = torch.ones(1000)
        y = x + 1
        assert memory.live == 8000
        rows = y.view(10, 100)  # the same memory
        y += 1
        del x
        assert memory.live == 4000
        z = y * 2
        del y, z
        assert memory.live == 4000 and memory.peak == 8000
        del rows
        assert memory.live == 0


def test_the_patch_loss_holds_two_matrices_of_logits_and_three_going_back() -> None:
    """In single precision; some copies of the features come on top."""
    result = step.measure_case({"kind": "loss", **CASE})
    rows = 2 * (CASE["batch"] + 1) * 4 * 16
    logits, features = 4 * rows * (1 + 0.75 * rows) / 2**20, 4 * rows * 64 / 2**20
    assert logits <= result["forward"][0] <= 2 * logits + 7 * features
    assert result["forward"][0] <= result["backward"][0] <= 3 * logits + 7 * features


def test_the_unit_computes_what_the_encoder_computes() -> None:
    torch.manual_seed(0)
    encoder = Encoder()
    image = torch.randn(2, 3, 20, 28)
    expected = encoder(image)
    state = encoder.state_dict()
    step.make_plain(encoder)
    encoder.load_state_dict(state)
    for one, other in zip(encoder(image), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    assert step.measure_case({"kind": "unit", **CASE})["cost"][0] > 0


def test_the_summary_divides_by_the_unit_and_by_the_floor() -> None:
    given = step.parse(["--methods", "simclr", "--precisions", "bf16", "--batch", "8"])
    cases = step.cases_of(given)
    assert [case["kind"] for case in cases] == ["unit", "step", "floor", "engine", "calls", "loss"]
    parts = {"encode": [3.0], "sampling": [0.5], "losses": [0.25], "backward": [5.0]}
    whole = {"optimizer": [0.25], "data": [1.0], "seconds": [10.0, 90.0, 11.0]}
    more = {
        "first_batch": [2.0],
        "cost": [19.0],
        "megabytes": 2048.0,
        "calls": 300,
        "views": 9,
    }
    found = step.summary(
        cases,
        [
            [{"cost": [37.0, 38.0, 900.0], "megabytes": 1024.0}],
            [{**parts, **whole, **more}],
            [{"cost": [9.5], "convolutions": 34}],
            [{"cost": [18.0, 18.5, 20.0]}],
            [{"calls": [900, 902], "views": 5, "again": 90, "waits": 0}],
            [{"forward": [6.0], "backward": [7.0]}],
        ],
    )
    assert [list(row.values()) for row in found["memory"]] == [["forward", 6.0], ["backward", 7.0]]
    assert [list(row.values()) for row in found["calls"]] == [
        ["simclr", "bf16", 902, 900, 5, 90, 0]
    ]
    assert found["E"] == 38.0 and found["E GB"] == 1.0
    (row,) = found["rows"]
    assert row["cost"] == 19.0 and row["cost in train.py"] == 18.5
    assert row["seconds"] == 11.0 and row["in E"] == 0.5 and row["in floors"] == 2.0
    assert row["sampling+losses+optimizer"] == pytest.approx(1 / 11) and row["GB"] == 2.0
    assert row["s/epoch"] == 24 * 11 and row["h/run"] == pytest.approx(24 * 11 * 200 / 3600)


@pytest.mark.slow
def test_a_step_is_measured_as_train_py_does_it_on_a_set_of_ones_own(tmp_path: Path) -> None:
    measure.draw_set(tmp_path, 40, 8, num_classes=3)
    case = {**CASE, "kind": "engine", "method": "simclr", "precision": "bf16", "steps": 2}
    own = {"data_dir": str(tmp_path), "num_classes": 3}
    for kind in ("step", "calls"):  # of one batch an epoch
        assert step.measure_case({**case, "kind": kind, **own, "batch": 8, "steps": 1})["calls"]
    for more in ({}, own):
        result = step.measure_case({**case, **more})
        assert len(result["cost"]) == 2 and min(result["cost"]) > 0
    config = step.config_of({**case, **own}, tmp_path)
    assert (config.data_dir, config.image_size) == (str(tmp_path), case["size"])


def test_prediction_is_measured_beside_the_serial_form(tmp_path: Path) -> None:
    """With the same bytes; what differs is noticed."""
    sizes = ["--images", "3", "--size", "32", "--large", "300", "--tile", "256", "--rounds", "1"]
    given = prediction.parse([*sizes, "--device", "cpu", "--channels", "4,8,16,32"])
    found = prediction.report(given)
    assert [(row["images"], row["form"]) for row in found["rows"]] == [
        (images, form) for images in ("3 of 32x32", "1 of 300x300") for form in prediction.FORMS
    ]
    for row in found["rows"]:
        assert row["other bytes"] == 0 and row["cost ms"] > 0
        parts = [row[f"{part} ms"] for part in prediction.PARTS]
        if row["form"] == "serial":
            assert 0 < sum(parts) <= row["cost ms"] and row["of serial"] == 1
    assert [row["images at once"] for row in found["at_once"]] == [1, 4, 16]
    for name, text in (("one", "a"), ("other", "b")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(text)
    assert prediction.differing(tmp_path / "one", tmp_path / "other") == ["file"]


@pytest.mark.parametrize("variant", list(finetune.VARIANTS))
def test_fine_tuning_is_reported_with_its_parts(variant: str) -> None:
    case = {"variant": variant, "size": 16, "images": 2, "steps": 1, "device": "cpu", "threads": 0}
    result = finetune.measure_case(case)
    parts = [result[name][0] for name in finetune.PARTS]
    assert min(parts) > 0 and result["seconds"] == [pytest.approx(sum(parts))]
    assert result["evaluation"][0] > 0 and result["megabytes"] > 0 and not result["graphs"]


@pytest.mark.parametrize("variant", list(finetune.VARIANTS))
def test_fine_tuning_is_timed_as_train_py_does_it_on_cuda(
    variant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the stage's graph of the passes, if it has one: the stand-in notes its batches."""
    shapes: list[torch.Size] = []

    class Stand:
        recordings = (1,)

        def __init__(self, stage: Runner) -> None:
            self.stage = stage

        def __call__(self, batch: dict[str, Any]) -> dict[str, torch.Tensor]:
            shapes.append(batch["image"].shape)
            return self.stage.passes(batch)

    def replay_steps(stage: Runner) -> None:
        if stage.config.cuda_graphs:
            monkeypatch.setattr(stage, "graphs", Stand(stage))

    monkeypatch.setattr(Runner, "replay_steps", replay_steps)
    case = {"variant": variant, "size": 16, "images": 1, "steps": 1, "device": "cpu", "threads": 0}
    result = finetune.measure_case(case)
    assert len(shapes) == 3 * result["graphs"] and result["graphs"] == (variant != "plain")


def tf32_of_backward(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether convolutions may be in TF32, at every backward pass from now on."""
    noted, backward = list[bool](), torch.autograd.backward

    def noting(*given: Any, **how: Any) -> None:
        noted.append(torch.backends.cudnn.allow_tf32)
        backward(*given, **how)

    monkeypatch.setattr(torch.autograd, "backward", noting)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)  # as PyTorch has it
    return noted


@pytest.mark.parametrize("kind", ["unit", "step", "engine", "calls", "loss", "fine-tuning"])
@pytest.mark.parametrize("how", step.PRECISIONS)
def test_single_precision_is_not_tf32(kind: str, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On CUDA PyTorch's convolutions would round to 10 bits otherwise, unlike train.py's."""
    noted = tf32_of_backward(monkeypatch)
    monkeypatch.setattr(step, "WARM_UP", 1)
    if kind == "fine-tuning":
        finetune.measure_case({**CASE, "variant": how, "images": 1})
    else:
        own = {} if kind in ("unit", "loss") else {"method": "plain-moco", "precision": how}
        step.measure_case({"kind": kind, **own, **CASE})
    whole = how == "fp32" or kind in ("unit", "loss")
    assert noted and set(noted) == {not whole} and torch.backends.cudnn.allow_tf32


def test_both_precisions_are_compared_without_tf32(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measure.draw_set(tmp_path, 16, 3, num_classes=4)
    noted = tf32_of_backward(monkeypatch)
    config = Config(data_dir=str(tmp_path), self_mode="plain-moco", self_batch_size=2).resolved()
    list(precision.compare(config, torch.device("cpu"), 1))
    assert noted == [how is not None for how in precision.PRECISIONS.values()]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--data_dir", "nowhere"], "nowhere/train_numf/img: no image"),
        (["--data_dir", "nowhere", "--image_size", "-3"], "image_size: found -3"),
        (["--data_dir", "nowhere", "--device", "cuda:99"], "device: found cuda:99"),
    ],
)
def test_precision_says_what_is_wrong(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert precision.main(words) == 2
    assert said in capsys.readouterr().err


def test_both_precisions_start_from_the_same_loss(tmp_path: Path) -> None:
    measure.draw_set(tmp_path / "set", 32, 2, num_classes=4)
    config = Config(data_dir=str(tmp_path / "set"), self_batch_size=2).resolved()
    lines = list(precision.compare(config, torch.device("cpu"), 2))
    assert [line["step"] for line in lines] == [0, 1]
    single, half = lines[0]["fp32"], lines[0]["bf16"]
    assert set(single) == set(half) == {"loss", "image", "patch", *(f"patch_up{s}" for s in "123")}
    assert single["loss"] == pytest.approx(half["loss"], rel=0.05) and single != half


@pytest.mark.parametrize(
    "words", [["--methods", "simcrl"], ["--precisions", "fp16"], ["--size", "8"], ["--rounds", "0"]]
)
def test_what_cannot_be_measured_is_refused(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        step.parse(words)
    assert stop.value.code == 2
    assert words[1] in capsys.readouterr().err.splitlines()[-1]


def test_every_method_is_measured_by_default() -> None:
    assert step.parse([]).methods == list(METHODS)


def test_a_case_is_measured_in_a_process_of_its_own(tmp_path: Path) -> None:
    script = tmp_path / "half.py"
    script.write_text("import json, sys\nprint('so'); print(json.loads(sys.argv[2])['n'] / 2)\n")
    assert measure.in_own_process(str(script), {"n": 3}) == 1.5
    with pytest.raises(SystemExit, match="half.py: case .* ended with code 1"):
        measure.in_own_process(str(script), {})


def test_the_process_of_a_case_prints_its_result_last(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measure, "keep_freed_memory", lambda: True)
    case = {"kind": "floor", "method": "simclr", "precision": "fp32", **CASE, "size": 32}
    assert step.main(["--case", json.dumps(case)]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["convolutions"] == 33


@pytest.mark.slow
def test_the_command_prints_one_object(capfd: pytest.CaptureFixture[str]) -> None:
    words = "--size 16 --batch 2 --methods simclr --precisions fp32 --rounds 1 --steps 1 --json"
    assert step.main(words.split()) == 0
    found = json.loads(capfd.readouterr().out)
    assert found["size"] == 16 and found["E"] > 0
    (row,) = found["rows"]
    assert row["method"] == "simclr" and all(
        math.isfinite(row[name]) for name in ("seconds", "in E", "floor", *step.PARTS)
    )


def test_growth_finds_the_power_that_seconds_follow(monkeypatch: pytest.MonkeyPatch) -> None:
    def took(script: str, case: dict) -> dict:
        pixels, images = case["size"] ** 2, case["batch"] + 1
        return {
            **{part: [1e-6 * pixels * images] for part in step.PARTS},
            "seconds": [1e-9 * pixels**1.5 * images**2],
            "megabytes": 512.0,
        }

    monkeypatch.setattr(measure, "in_own_process", took)
    words = "--size 160 --batch 8 --methods moco --precisions fp32 --rounds 1"
    found = step.growth(step.parse(words.split()))
    assert len({row["size"] for row in found["rows"]}) == 4
    assert len({row["batch"] for row in found["rows"]}) == 4
    by_pixels, by_images = found["slopes"]
    assert by_pixels["seconds"] == pytest.approx(1.5) and by_images["seconds"] == pytest.approx(2)
    assert by_pixels["losses"] == pytest.approx(1) and by_images["losses"] == pytest.approx(1)


def pretrained(folder: Path, self_mode: str) -> str:
    """A checkpoint of a network that has learnt nothing, with three classes."""
    settings = {
        **TINY,
        "channels": (16, 32, 64, 128),  # with fewer, many pixels have the same embedding
        "hidden_dim": 32,
        "embed_dim": 32,
        "self_mode": self_mode,
        "num_classes": 3,
        "image_size": 0,
        "ignore_label": None,
    }
    torch.manual_seed(0)
    weights = build_method(self_mode, settings).state_dict()
    run = folder / self_mode / "1_0"
    run.mkdir(parents=True)
    save(run / "moco0.pt", {"moco": to_published(weights), "settings": settings})
    return str(run / "moco0.pt")


def test_equal_images_match_themselves(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Where all images are the annotated one, each template's most similar cell is its own."""
    for number in range(matching.BATCH):
        add(tmp_path / "train_numf", f"15_{number}_0_0", 3, 3, (40, 48))
    add(tmp_path / "sup_num1_0", "15_90_0_0", 3, 3, (40, 48))
    words = [pretrained(tmp_path, "moco"), "--data_dir", str(tmp_path), "--json"]
    assert matching.main(words) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["scale"] for row in rows] == [1, 2, 3]
    for row in rows:
        assert row["right"] > 0.9  # a neighbour may be as similar to the last digit
        assert row["templates"] == pytest.approx(1)  # two pure cells of each class there are
        # Every image has every class, and of the annotated image's cells a match's own is nearest.
        assert row["present"] == 1 and row["right if present"] == row["right"]
        assert row["kept"] > 0.9 and row["right if kept"] >= row["right"]
        assert row["kept"] >= row["voted"] > 0  # few cells of the annotated image are pure
    mask = draw(3, 3, 40, 48)[1]
    assert [rows[2][f"chance {c}"] for c in range(3)] == pytest.approx(
        [(mask == c).mean() for c in range(3)]
    )
    assert rows[2]["chance"] == pytest.approx(1 / 3)


def test_absent_classes_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of eight images two have no class 2: its matches there cannot be right."""
    for number in range(matching.BATCH):
        add(tmp_path / "train_numf", f"15_{number}_0_0", 3, 3 if number > 1 else 2, (40, 48))
    add(tmp_path / "sup_num1_0", "15_90_0_0", 3, 3, (40, 48))
    words = [pretrained(tmp_path, "simclr"), "--data_dir", str(tmp_path), "--json"]
    assert matching.main(words) == 0
    for row in json.loads(capsys.readouterr().out):
        assert [row[f"present {c}"] for c in range(3)] == [1, 1, 6 / 8]
        assert row["right if present 2"] * 6 / 8 == pytest.approx(row["right 2"])


def test_a_plain_network_is_judged_by_what_pscl_would_match(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Equal encoders match alike, whatever trained them."""
    for number in range(matching.BATCH):
        add(tmp_path / "train_numf", f"15_{number}_0_0", 3, 3, (40, 48))
    add(tmp_path / "sup_num1_0", "15_90_0_0", 3, 3, (40, 48))
    pscl, plain = load(pretrained(tmp_path, "simclr")), load(pretrained(tmp_path, "plain-simclr"))
    save(tmp_path / "plain.pt", {"moco": pscl["moco"], "settings": plain["settings"]})
    rows = []
    for file in (tmp_path / "simclr/1_0/moco0.pt", tmp_path / "plain.pt"):
        words = [str(file), "--data_dir", str(tmp_path), "--annotated", "sup_num1_0", "--json"]
        assert matching.main(words) == 0
        rows.append(json.loads(capsys.readouterr().out))
    names = matching.COLUMNS
    assert [[r[n] for n in names] for r in rows[0]] == [[r[n] for n in names] for r in rows[1]]


def test_matching_needs_a_checkpoint_of_pretraining_and_masks(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--data_dir", str(tmp_path)]
    save(tmp_path / "other.pt", {"net": {}})
    assert matching.main([str(tmp_path / "other.pt"), *words]) == 2
    assert "not of pretraining" in capsys.readouterr().err
    file = pretrained(tmp_path, "simclr")
    assert matching.main([file, *words]) == 2
    assert "sup_num1_0/img: no image; give --annotated" in capsys.readouterr().err
    add(tmp_path / "sup_num1_0", "15_90_0_0", 3, 3, (40, 48))
    assert matching.main([file, *words]) == 2
    assert "train_numf/img: found 0 images besides the annotated one" in capsys.readouterr().err


def test_cells_that_nobody_labelled_are_of_no_class() -> None:
    mask = torch.tensor([[0, 0, 255, 255], [0, 1, 255, 255], [2, 2, 1, 1], [2, 2, 1, 255]])
    cells = matching.masks_at(one_hot(mask, 3)[None], 4, 4)
    assert torch.equal(cells[0].view(4, 4), mask.where(mask != 255, 3))


def test_the_step_of_many_devices_follows_from_two_measured_ones() -> None:
    """An image takes 1 s, the rest 2 s; of 250 bytes, half are sent at 125 bytes a second."""
    rows = devices.estimate(8, 1, 11.0, 7.0, (100, 50), 3, 125.0, 0.0)
    assert [row["devices"] for row in rows] == [1, 2, 4, 8]
    assert [row["s per step"] for row in rows] == pytest.approx([11, 7 + 1, 5 + 1.5, 4 + 1.75])
    assert rows[1]["faster"] == pytest.approx(11 / 8) and rows[1]["used"] == pytest.approx(11 / 16)
    late = devices.estimate(8, 1, 11.0, 7.0, (0, 0), 3, 125.0, 0.1)
    assert [row["of it exchange"] for row in late] == pytest.approx([0, 0.3, 0.9, 2.1])


@pytest.mark.slow  # seconds: 40, four processes
def test_a_set_larger_than_memory_is_measured_and_deleted(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    words = ["--images", "20", "--distinct", "9", "--in_memory", "16", "--side", "128"]
    words += ["--steps", "1", "--folder", str(tmp_path), "--threads", "1"]
    assert large_set.main(words) == 0
    lines = [json.loads(line) for line in capfd.readouterr().out.splitlines() if line[0] == "{"]
    assert len(lines) == 4 and all(line["step, processor s"] > 0 for line in lines)
    assert list(tmp_path.iterdir()) == []
