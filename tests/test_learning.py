"""Labels of choice for the trainings of a job, and settings that follow from the images."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from config import ConfigError
from presets import PRESETS
from segmentation.demo.micrographs import draw_micrograph
from segmentation.intake import read
from segmentation.learning import JobPlaces, Learning
from segmentation.request import Request
from stages.finetuning import Supervised
from stages.pretraining import SelfSupervised

SIDES = (48, 48)


def learning(place: Path, sides: tuple[int, ...] = SIDES, **asked: object) -> Learning:
    (place / "images").mkdir()
    for number, side in enumerate(sides):
        image, mask = draw_micrograph(np.random.default_rng(number), side)
        Image.fromarray(image).save(place / "images" / f"i{number}.png")
    Image.fromarray(mask).save(place / f"i{len(sides) - 1}.png")
    request = Request(place / "images", (place / f"i{len(sides) - 1}.png",), place / "out",
                      device="cpu", threads=1, **asked)  # type: ignore[arg-type]  # fmt: skip
    return Learning(request, read(request))


def test_a_lesson_has_the_labels_of_its_folder_alone(tmp_path: Path) -> None:
    own = learning(tmp_path)
    whole = own.lesson(own.config("a"))
    assert [s.name for s in whole.annotated()] == ["i1.png"]
    (tmp_path / "other").mkdir()
    assert own.lesson(own.config("a"), tmp_path / "other").annotated() == []
    Image.fromarray(np.zeros((48, 48), np.uint8)).save(tmp_path / "other" / "i1.png")
    (sample,) = own.lesson(own.config("a"), tmp_path / "other").annotated()
    assert sample.mask == tmp_path / "other" / "i1.png"


def test_the_preset_is_followed_and_crops_fit_into_every_image(tmp_path: Path) -> None:
    own = learning(tmp_path, (48, 64), preset="auto")
    config = own.config("a", steps=7)
    assert config.fine_steps == 7 and config.fine_crop == 64 and config.self_crop == 48
    assert config.fine_optimizer == PRESETS["robust"]["fine_optimizer"]
    assert config.num_classes == 4 and not config.use_unlabelled and config.ignore_label == 255
    assert all(isinstance(value, bool | int | float | str | tuple) for value in own.values.values())


def test_the_published_settings_need_one_size(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--preset paper: found images of 2 sizes"):
        learning(tmp_path, (48, 64), preset="paper")


def test_a_finished_network_serves_on_another_device_and_other_settings_train_anew(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """segment.py has no --overwrite, so that a run of other settings must not end it."""
    own = learning(tmp_path)
    own.values |= {"channels": (4, 8, 16, 32), "fine_batch_size": 1, "fine_average": 0.0}
    own.amp = None
    file = own.finetune("a", 1, None, None, "Fine-tuning")
    first = file.read_bytes()
    own.amp = torch.bfloat16
    assert own.finetune("a", 1, None, None, "Fine-tuning").read_bytes() == first
    assert "anew" not in capsys.readouterr().out
    assert own.finetune("a", 1, None, None, "Fine-tuning", seed=1).read_bytes() != first
    said = capsys.readouterr().out
    assert "Fine-tuning: trained anew, as an earlier run differs: " in said
    assert "seed was 0, is 1" in said and "--" not in said


def test_its_own_pretraining_is_not_said_to_be_of_other_settings(tmp_path: Path) -> None:
    own = learning(tmp_path)
    own.values |= {"channels": (4, 8, 16, 32), "fine_batch_size": 1, "self_crop": 32}
    start = own.pretrain(1, 1)
    own.finetune("a", 1, start, None, "Fine-tuning")
    log = (own.places.trainings / "a_simclr" / "f" / "log_fine.txt").read_text(encoding="utf-8")
    assert str(start.name) in log and "other settings" not in log
    with pytest.MonkeyPatch.context() as patch:  # what a network cannot do without is compared
        patch.setitem(own.values, "standardize", not own.config("b").standardize)
        own.finetune("b", 1, start, None, "Fine-tuning")
    log = (own.places.trainings / "b_simclr" / "f" / "log_fine.txt").read_text(encoding="utf-8")
    assert "other settings" in log and "standardize was" in log


def test_timing_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = learning(tmp_path)
    own.values |= {"channels": (4, 8, 16, 32), "fine_batch_size": 1}
    assert own.seconds_per_step(Supervised) > 0 and own.seconds_per_megapixel() > 0
    assert not own.places.trainings.exists()


@pytest.mark.parametrize("fails", [False, True])
def test_timing_lets_go_of_graphs_and_gradients(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: bool
) -> None:
    own, timed = learning(tmp_path), list[Supervised]()
    own.values |= {"channels": (4, 8, 16, 32), "fine_batch_size": 1}

    def update(stage: Supervised) -> None:
        timed.append(stage)
        assert any(p.grad is not None for p in stage.module.parameters())
        if fails:
            raise MemoryError

    monkeypatch.setattr(Supervised, "update", update)
    with pytest.raises(MemoryError) if fails else nullcontext():
        own.seconds_per_step(Supervised)
    assert all(p.grad is None for p in timed[0].module.parameters()) and timed[0].graphs is None


@pytest.mark.parametrize("where", ["cpu", "device"])
def test_steps_are_timed_wherever_views_are_finished(where: str, tmp_path: Path) -> None:
    """'device', as on CUDA: a batch comes without pixels, which the step makes of kept images."""
    own = learning(tmp_path)
    own.values |= {"channels": (4, 8, 16, 32), "augment_on": where, "cache_on": where}
    assert own.seconds_per_step(SelfSupervised) > 0


def test_the_places_of_a_job_stay_those_that_its_records_know() -> None:
    """``rounds.json`` of earlier versions has such paths, and a killed run goes on there."""
    places, training = JobPlaces(Path("out")), Path("out/training")
    assert places.trainings == training
    assert places.training(3) == "round_3" and places.twin(3) == "round_3_twin"
    assert places.without(3, (1, 2)) == "round_3_without_1_2"
    assert places.labels(3) == training / "round_3/labels"
    assert places.labels_of("round_3_without_0") == training / "round_3_without_0"
    assert places.sure("round_3") == training / "round_3_sure"
    assert places.answer("round_3") == training / "answers/round_3"
    assert places.networks("round_3") == [
        training / "round_3_simclr/f/fine.pt", training / "round_3_simclr/f/sup.pt",
        training / "round_3_sup/f/fine.pt", training / "round_3_sup/f/sup.pt",
    ]  # fmt: skip
