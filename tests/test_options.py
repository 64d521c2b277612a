"""Which rows the command line of the table asks for, trained how, written where."""

from __future__ import annotations

from pathlib import Path

import pytest

from comparison.options import ABLATIONS, PUBLISHED, read_options
from config import Config, ConfigError
from model import METHODS


@pytest.mark.parametrize("name", ABLATIONS)
def test_every_ablation_has_legal_values_of_a_setting_that_is_used(name: str) -> None:
    options = read_options(["--ablate", name, "--data_dir", "dataset/steel"])
    setting, values = ABLATIONS[name]
    assert len(options.variants) == len(values)
    names = [v.name for v in options.variants]
    assert len(set(names)) == len(names) and names.count("steel") == 1
    found = [dict(v.settings).get(setting, "as it is") for v in options.variants]
    assert found.count("as it is") == 1
    for variant in options.variants:
        config = {"self_mode": variant.method, "name": variant.name, **dict(variant.settings)}
        assert Config(**config)


# A mean over scales; a mean over rows, of which a scale has 1, 2 and 4 of 7, or 1, 3 and 9 of 13.
ALONE = [
    ("simclr", 2, (3.0, 3.0, 3.0)),
    ("moco", 2, (7.0, 3.5, 1.75)),
    ("moco", 3, (13.0, 4.333333, 1.444444)),
    ("moco", 1, (3.0, 3.0, 3.0)),
]


@pytest.mark.parametrize(("method", "ratio", "weights"), ALONE)
def test_a_single_scale_keeps_the_share_of_the_patch_loss(
    method: str, ratio: int, weights: tuple[float, ...]
) -> None:
    words = ["--ablate", "scales", "--methods", method, "--sample_ratio", str(ratio)]
    _, *alone = [dict(v.settings).get("scale_weights") for v in read_options(words).variants]
    assert alone == [(weights[0], 0.0, 0.0), (0.0, weights[1], 0.0), (0.0, 0.0, weights[2])]


def test_a_value_of_the_command_line_is_one_more_variant() -> None:
    options = read_options(["--ablate", "temperature", "--temperature", "0.2"])
    assert [v.key for v in options.variants] == ["simclr 0.2", "simclr 0.07", "simclr 0.5"]
    assert not options.variants[0].settings


def test_a_budget_gives_defaults_that_flags_win_over() -> None:
    paper = read_options([]).config
    assert (paper.self_max_epoch, paper.epochs_for("1"), paper.eval_every_for("1")) == (
        *(200, 1000, 200),
    )
    cpu = read_options(["--budget", "cpu", "--fine_max_epoch", "50"]).config
    assert (cpu.self_max_epoch, cpu.epochs_for("1"), cpu.eval_every_for("1")) == (20, 50, 100)
    assert cpu.save_every == 20  # no checkpoints in between, unless asked for
    assert read_options(["--save_every=5"]).config.save_every == 5


@pytest.mark.parametrize("words", [["--report", "--commands"], ["--plan", "--piece", "sup:0"]])
def test_what_ends_the_command_is_asked_for_once(words: list[str]) -> None:
    with pytest.raises(ConfigError, match=f"{words[0]} and {words[1]}: each ends the command"):
        read_options(words)


def test_names_and_folders_follow_the_set() -> None:
    options = read_options(["--data_dir", "dataset/steel/"])
    assert options.config.name == "steel" and options.out == Path("results/steel")
    assert options.config.output_dir == str(Path("results/steel/runs"))
    options = read_options(["--name", "a", "--runs", "b", "--out", "c"])
    assert (options.config.name, options.config.output_dir) == ("a", "b")
    assert options.out == Path("c")


def test_the_rows_are_those_of_the_paper_in_its_order() -> None:
    found = [v.key for v in read_options([]).variants]
    assert [key for key in found if key in PUBLISHED] == list(PUBLISHED)
    assert list(PUBLISHED)[:2] == ["sup", "forest"] and list(PUBLISHED)[-2:] == ["moco", "simclr"]
    assert set(found) == {"sup", "forest", *METHODS}
    words = ["--methods", "simclr", "sup", "--image_size", "64"]
    options = read_options(words)
    assert [v.key for v in options.variants] == ["sup", "simclr"]
    assert options.config.image_size == 64


def test_an_imagenet_row_stands_in_runs_of_its_own_and_is_asked_for_by_name() -> None:
    options = read_options(["--methods", "imagenet,sup", "--name", "steel"])
    plain, row = options.variants
    assert plain.key == "sup" and not plain.settings
    assert (row.method, row.name, row.stages) == ("sup", "steel-imagenet", ("sup",))
    assert dict(row.settings) == {"encoder": "efficientnet_lite0"}
    assert row.title == "no pretraining, ImageNet encoder" and not row.shared
