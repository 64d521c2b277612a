"""Settings: their defaults, what is legal, and how they are read from scripts and commands."""

import dataclasses
import json
import math
import subprocess
import sys
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import config
from config import SELF_MODES, Config, ConfigError, parse_config
from presets import ROBUST

# Written by hand from the method's description, not read from the program.
DEFAULTS = {
    "name": "aluminum",
    "data_dir": "dataset/aluminum",
    "output_dir": ".",
    "preset": "paper",
    "stages": "self-fine",
    "self_mode": "simclr",
    "data_size": "1",
    "multi_round": True,
    "repeats": "",
    "num_classes": 4,
    "ignore_label": None,
    "image_size": 0,
    "mapping": (),
    "class_names": (),
    "class_colours": (),
    "class_weight": (),
    "use_unlabelled": False,
    "standardize": False,
    "seed": 0,
    "device": "auto",
    "amp": "auto",
    "deterministic": False,
    "augment_on": "auto",
    "cache_on": "auto",
    "cuda_graphs": True,
    "workers": 0,
    "threads": 0,
    "cache": "",
    "save_seconds": 60.0,
    "overwrite": False,
    "resume": "auto",
    "report": False,
    "tensorboard": False,
    "channels": (32, 64, 128, 256),
    "embed_dim": 64,
    "hidden_dim": 128,
    "groups": 4,
    "norm": "batch",
    "encoder": "unet",
    "batch_norm_ranks": "own",
    "recompute": 0,
    "random_crop": 0.2,
    "self_crop": 0,
    "self_jitter": 0.2,
    "fine_jitter": 0.1,
    "fine_contrast": 0.0,
    "fine_crop": 0,
    "fine_scale": 1.0,
    "fine_rotation": 0.0,
    "fine_noise": 0.0,
    "fine_blur": 0.0,
    "fine_illumination": 0.0,
    "self_batch_size": 8,
    "self_max_epoch": 200,
    "self_lr": 0.0001,
    "self_optimizer": "adam",
    "self_weight_decay": 0.001,
    "self_schedule": False,
    "save_every": 10,
    "probe": 0,
    "temperature": 0.5,
    "global_local_ratio": 0.7,
    "top_k": None,
    "sample_ratio": 2,
    "label_guided": True,
    "scale_weights": (1.0, 1.0, 1.0),
    "intra_view_negatives": True,
    "admit_matches": "all",
    "admit_share": 0.3,
    "momentum": 0.99,
    "queue_size": 504,
    "batches": "names",
    "group_decay": 0.2,
    "patch_group_decay": 0.5,
    "freshness_decay": 0.2,
    "dense_grid": 7,
    "fine_batch_size": 6,
    "fine_crops": 1,
    "fine_max_epoch": None,
    "eval_every": None,
    "eval_tta": False,
    "fine_steps": 0,
    "fine_optimizer": "adam",
    "fine_weight_decay": 0.01,
    "fine_schedule": "constant",
    "fine_warmup": 0.3,
    "fine_clip": 0.0,
    "fine_average": 0.0,
    "fine_lr_encoder": 0.0001,
    "fine_lr_decoder": 0.001,
    "sup_lr": 0.001,
    "pretrained": "",
}


def problems_of(**values):
    """The lines of the error that these settings raise."""
    with pytest.raises(ConfigError) as error:
        Config(**values)
    return str(error.value).split("\n")


def problems_of_line(line, **defaults):
    """The lines of the error that this command line raises."""
    with pytest.raises(ConfigError) as error:
        parse_config(line.split() if isinstance(line, str) else line, **defaults)
    return str(error.value).split("\n")


def test_the_settings_and_their_defaults_are_those_of_the_method():
    fields = {f.name: f.default for f in dataclasses.fields(Config)}
    assert fields == DEFAULTS
    assert {n: type(v) for n, v in fields.items()} == {n: type(v) for n, v in DEFAULTS.items()}
    assert {n: getattr(Config(), n) for n in DEFAULTS} == DEFAULTS
    assert {n: getattr(parse_config([]), n) for n in DEFAULTS} == DEFAULTS


def test_a_config_cannot_be_changed_but_can_be_hashed():
    made: Any = Config()
    with pytest.raises(dataclasses.FrozenInstanceError):
        made.seed = 1
    lists: dict[str, Any] = {"channels": [8, 16, 32, 64]}
    assert hash(Config(**lists)) == hash(Config(channels=(8, 16, 32, 64)))


@pytest.mark.parametrize(
    ("given_values", "name", "value"),
    [
        ({"channels": [8, 16, 32, 64]}, "channels", (8, 16, 32, 64)),
        ({"temperature": 1}, "temperature", 1.0),
        ({"temperature": Fraction(1, 4)}, "temperature", 0.25),
        ({"seed": np.int64(7)}, "seed", 7),
        ({"self_lr": np.float32(0.5)}, "self_lr", 0.5),
        ({"class_weight": [1, 2, 3, 4]}, "class_weight", (1.0, 2.0, 3.0, 4.0)),
        ({"data_dir": Path("a") / "b"}, "data_dir", str(Path("a") / "b")),
    ],
)
def test_values_become_the_type_of_their_setting(given_values, name, value):
    found = getattr(Config(**given_values), name)
    assert found == value and type(found) is type(value)
    if isinstance(value, tuple):
        assert [type(entry) for entry in found] == [type(entry) for entry in value]


GOOD: list[tuple[str, list[Any]]] = [
    ("name", ["a", "铝合金", "NEU-Seg_2", "my set.v2+", "x" * 64]),
    ("data_dir", ["/data/铝", "C:\\data", "with space", ".."]),
    ("output_dir", [".", "out/put"]),
    ("stages", ["self", "fine", "sup", "self-fine-sup", "sup-self", "fine-self"]),
    ("self_mode", list(SELF_MODES)),
    ("data_size", ["1", "5", "f", "15f", "f1"]),
    ("repeats", ["", "0", "4", "314", "0123456789"]),
    ("num_classes", [2, 5, 255]),
    ("ignore_label", [None, 4, 255]),
    ("image_size", [0, 16, 376]),
    ("seed", [0, 2**32 - 1]),
    ("device", ["auto", "cpu", "cuda", "cuda:0", "cuda:15", "mps"]),
    ("augment_on", ["auto", "cpu", "device"]),
    ("cache_on", ["auto", "cpu", "device"]),
    ("amp", ["auto", "off", "bf16"]),
    ("resume", ["auto", "never"]),
    ("save_seconds", [0, 0.5, 1e9]),
    ("random_crop", [0, 0.999]),
    ("self_jitter", [0, 2.5]),
    ("self_optimizer", ["adam", "adamw"]),
    ("admit_matches", ["all", "classifier", "cycle", "sure"]),
    ("admit_share", [0, 1]),
    ("global_local_ratio", [0, 1]),
    ("momentum", [0, 1]),
    ("batches", ["names", "none"]),
    ("group_decay", [0, 1]),
    ("queue_size", [1, 7]),
    ("top_k", [None, 1, 30]),
    ("fine_max_epoch", [None, 1]),
    ("fine_lr_encoder", [0, 1e-8]),
    ("scale_weights", [(0, 0, 1)]),
    ("class_names", [("ferrite", "M/A, blocky", "Mg2Si (coarse)", "x" * 40)]),
    ("class_colours", [("000000", "#ffFF00", "e69f00", "e69f00")]),
    ("pretrained", ["", "runs/moco200.pt"]),
    ("standardize", [True, False]),
    ("norm", ["batch", "group"]),
    ("encoder", ["unet", "efficientnet_lite0"]),
    ("batch_norm_ranks", ["own", "sync"]),
    ("recompute", [-1, 0, 4]),
    ("fine_contrast", [0, 2]),
    ("fine_crop", [0, 16, 376]),
    ("fine_scale", [1, 1.4, 2]),
    ("fine_rotation", [0, 45]),
    ("fine_crops", [1, 8, 1024]),
    ("preset", ["paper", "robust", "auto"]),
    ("self_crop", [0, 16, 376]),
    ("class_weight", [(1.0,), (0.5,), "balanced"]),
    ("fine_noise", [0, 1]),
    ("fine_blur", [0, 16]),
    ("fine_illumination", [0, 1]),
    ("eval_tta", [True, False]),
    ("fine_steps", [0, 400]),
    ("fine_optimizer", ["adam", "adamw"]),
    ("fine_weight_decay", [0, 0.1]),
    ("fine_schedule", ["constant", "onecycle", "cosine"]),
    ("fine_warmup", [0.001, 0.999]),
    ("fine_clip", [0, 5]),
    ("fine_average", [0, 0.999]),
    ("probe", [0, 1, 20]),
]


@pytest.mark.parametrize(("name", "value"), [(n, v) for n, values in GOOD for v in values])
def test_legal_values(name, value):
    assert getattr(Config(**{name: value}), name) == value


NAN, INF = math.nan, math.inf
BAD: list[tuple[str, list[Any]]] = [
    ("name", ["", ".", "..", "a/b", "a\\b", "a:b", "-a", ".a", "a.", "a ", "a\n", "x" * 65, 3]),
    ("data_dir", ["", "a\0b", "a\nb", None, 1, b"a"]),
    ("output_dir", ["", "\t"]),
    ("stages", ["", "all", "self-", "-fine", "self-self", "fine-sup-fine", "self fine", "Self"]),
    ("self_mode", ["", "MoCo", "mo", None, ["moco"], "moco\n"]),
    ("data_size", ["", "2", "11", "1-5", "5 f", "fif", 1, "1\n"]),
    ("repeats", ["00", "0,1", "a", "-1", 0, None, "\u0661", "010"]),
    ("num_classes", [1, 0, -4, 256, 4.0, "4", None, True]),
    ("ignore_label", [0, 1, 3, 256, "255", True]),
    ("image_size", [-1, 1, 15, 32769, 0.5]),
    (
        "mapping",
        [(0, 1, 2), (0, 1, 2, 2), (0, 1, 2, 256), (-1, 0, 1, 2), 5, "0123", (0.5, 1, 2, 3)],
    ),
    ("class_weight", [(1,) * 5, (0,), (1, 1, 1, -1), (0,) * 4, (NAN, 1, 1, 1), (1, 1, 1, INF)]),
    (
        "class_names",
        [("a", "b", "c"), ("a", "b", "c", "c"), ("a", "b", "c", ""), ("a", "b", "c", " d"), "abcd"],
    ),
    ("class_names", [("a", "b", "c", "d\te"), ("a", "b", "c", "x" * 41), ("a", "b", "c", 4), 4]),
    ("class_colours", [("000000",) * 3, ("0",) * 4, ("red",) * 4, ("00000g",) * 4, (0,) * 4]),
    ("seed", [-1, 2**32, 1.0, "1", False]),
    ("device", ["", "gpu", "cuda:", "cuda:-1", "cuda:x", "cuda0", "CPU", "cpu "]),
    ("augment_on", ["", "cuda", "gpu", True, None]),
    ("cache_on", ["", "cuda", "gpu", True, None]),
    ("amp", ["", "fp16", True, None]),
    ("workers", [-1, 257, 1.5]),
    ("threads", [-1, 1025]),
    ("cache", ["4", "GB", "-1GB", "4 EB", "1e9GB", "4GB ", None, 4]),
    ("save_seconds", [-1, NAN, INF, "60", None]),
    ("resume", ["", "always", True]),
    ("channels", [(), (8,), (8, 16, 32), (8, 16, 32, 64, 128), (0, 0, 0, 0), (-4, -8, -16, -32)]),
    ("channels", [(32, 64, 128, 255), (32, 32, 32, 32), (2, 4, 8, 16), (6, 12, 24, 48), 32, "32"]),
    ("embed_dim", [0, -64, 62, 64.0]),
    ("hidden_dim", [0, 2, 126, 30]),
    ("groups", [0, -1, 4.0]),
    ("random_crop", [-0.1, 1, 1.5, NAN, INF, "0.2", None, True]),
    ("self_jitter", [-0.1, 2.6, NAN]),
    ("fine_jitter", [-0.1, 2.6, NAN]),
    ("self_optimizer", ["sgd", "Adam", None]),
    ("admit_matches", ["none", "forest", True]),
    ("admit_share", [-0.01, 1.01, NAN]),
    ("batches", ["folders", False]),
    ("self_weight_decay", [-1e-9, NAN, INF]),
    ("global_local_ratio", [-0.01, 1.01, NAN, INF, None]),
    ("top_k", [0, -1, 4.0, "4", True]),
    ("sample_ratio", [0, -2, 2.0, 65]),
    ("scale_weights", [(), (1,), (1, 1), (1,) * 4, (1, 1, -1), (1, 1, NAN), 1]),
    ("queue_size", [0, -504, 1.0, 10**8]),
    ("pretrained", ["a\nb", None]),
    ("norm", ["", "layer", "Batch", None]),
    ("encoder", ["", "resnet18", None]),
    ("batch_norm_ranks", ["", "all", None, "shuffle"]),  # which goes with other methods
    ("recompute", [-2, 5, 1.0, True, None]),
    ("fine_contrast", [-0.1, 2.1, NAN, "0.2"]),
    ("fine_crop", [-1, 1, 15, 32769, 128.0]),
    ("fine_scale", [0.9, 0, 2.1, NAN, None]),
    ("fine_rotation", [-1, 45.1, NAN, INF]),
    ("fine_crops", [0, -1, 1025, 8.0, None]),
    ("preset", ["", "Paper", "fast", None]),
    ("self_crop", [-1, 1, 15, 32769, 128.0]),
    ("fine_noise", [-0.1, 1.1, NAN]),
    ("fine_blur", [-0.1, 16.1, NAN]),
    ("fine_illumination", [-0.1, 1.1, NAN]),
    ("fine_steps", [-1, 1.0, None, True, 10**7]),
    ("fine_optimizer", ["sgd", "AdamW", None]),
    ("fine_weight_decay", [-1e-9, NAN, INF]),
    ("fine_schedule", ["", "linear", None]),
    ("fine_warmup", [0, 1, NAN]),
    ("fine_clip", [-1, NAN, INF]),
    ("fine_average", [-0.1, 1, NAN]),
    ("probe", [-1, 10**7, 1.0, None, True]),
]
BAD += [(n, [0, -1, NAN, INF, 10**400, "1"]) for n in ("temperature", "self_lr", "sup_lr")]
BAD += [("temperature", [1e-30, 1e-4, 1e4]), ("self_weight_decay", [1e7])]
BAD += [("class_weight", ["balance", "Balanced", "", "1,2,3,4", ("balanced",), None, 1.0])]
BAD += [("class_weight", [(1e7, 1, 1, 1), (1e-30,) * 4]), ("scale_weights", [(1, 1, 1e30)])]
BAD += [("fine_lr_decoder", [0, -1, NAN, INF]), ("fine_lr_encoder", [-1, NAN, INF])]
BAD += [(n, [-0.1, 1.1, NAN, INF]) for n in ("momentum", "group_decay", "freshness_decay")]
BAD += [("patch_group_decay", [-0.1, 1.1, NAN]), ("dense_grid", [0, -7, 65, 7.0, "7"])]
BAD += [(n, [0, -1, 1.0, "1", True, 10**7]) for n in ("self_batch_size", "self_max_epoch")]
BAD += [(n, [0, -1, 1.0, "1", True, 10**7]) for n in ("fine_batch_size", "fine_max_epoch")]
BAD += [(n, [0, -1, 1.0, "1", True, 10**7]) for n in ("save_every", "eval_every")]
BOOLEAN = ["multi_round", "use_unlabelled", "overwrite", "self_schedule", "label_guided"]
BOOLEAN += ["eval_tta", "standardize", "report", "tensorboard", "intra_view_negatives"]
BOOLEAN += ["deterministic", "cuda_graphs"]
BAD += [(n, [0, 1, "True", None, np.True_]) for n in BOOLEAN]


@pytest.mark.parametrize(("name", "value"), [(n, v) for n, values in BAD for v in values])
def test_each_bad_value_is_one_line_that_names_the_setting_and_what_is_allowed(name, value):
    (line,) = problems_of(**{name: value})
    assert line.startswith(f"{name}: found ") and "; allowed: " in line
    assert line.isprintable() and len(line) < 200
    assert line.split("; allowed: ")[1]


def test_every_setting_has_a_bad_value_above():
    assert {name for name, _ in BAD} == set(DEFAULTS)


@pytest.mark.parametrize(
    ("values", "line"),
    [
        (
            {"temperature": 0},
            "temperature: found 0; allowed: a number at least 0.001 and at most 1000.0",
        ),
        ({"random_crop": 1}, "random_crop: found 1; allowed: a number at least 0 and below 1"),
        (
            {"seed": "x"},
            f"seed: found 'x'; allowed: a whole number at least 0 and at most {2**32 - 1}",
        ),
        ({"multi_round": 1}, "multi_round: found 1; allowed: True or False"),
        (
            {"self_mode": "simclar"},
            f"found 'simclar'; allowed: {', '.join(SELF_MODES)}; did you mean simclr?",
        ),
        ({"num_classes": 3, "mapping": (0, 9)}, "mapping: found 2 values; allowed: as many values"),
        ({"embed_dim": 6}, "embed_dim: found 6; allowed: a multiple of groups, 4"),
        (
            {"image_size": 64, "fine_crop": 65},
            "fine_crop: found 65; allowed: at most image_size, 64",
        ),
        ({"name": "x" * 9999}, "x...; allowed: 1 to 64 letters"),
        ({"mapping": (0, 300, 1, 2)}, "allowed: whole numbers, each at least 0 and at most 255"),
    ],
)
def test_messages(values, line):
    assert line in problems_of(**values)[0]


@pytest.mark.parametrize(
    "values",
    [
        {"num_classes": 3, "mapping": (9, 0, 255), "class_weight": (0, 0, 1)},
        {"channels": (4, 8, 16, 32), "hidden_dim": 4, "embed_dim": 4},
        {"channels": (5, 10, 20, 40), "groups": 5, "hidden_dim": 15, "embed_dim": 5},
        {"channels": (1, 2, 4, 8), "groups": 1, "hidden_dim": 3, "embed_dim": 7},
        {"hidden_dim": 36},
        {"hidden_dim": 1000},
    ],
)
def test_legal_combinations(values):
    made = Config(**values)
    assert {name: getattr(made, name) for name in values} == values


def test_a_hidden_dim_above_the_channels_is_not_used_and_so_need_not_divide():
    # Heads of 32, 64 and 128 channels have min(hidden_dim, channels) units: 130 is never reached.
    assert Config(hidden_dim=130).hidden_dim == 130
    assert problems_of(hidden_dim=126) == [
        "hidden_dim: found 126; allowed: a multiple of groups, 4"
    ]


def test_all_problems_come_together_one_line_each():
    lines = problems_of(seed=-1, temperature=NAN, stages="x", embed_dim=6, scale_weights=(1, 1))
    assert [line.split(":")[0] for line in lines] == [
        "stages", "seed", "temperature", "scale_weights", "embed_dim",
    ]  # fmt: skip


# Command line


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("-stages self", {"stages": "self"}),
        ("--stages self", {"stages": "self"}),
        ("-stages=sup", {"stages": "sup"}),
        ("--stages=sup --seed 3", {"stages": "sup", "seed": 3}),
        ("--self_max_epoch 20", {"self_max_epoch": 20}),
        ("-self_max_epoch 20 -data_dir d -repeats 0",
         {"self_max_epoch": 20, "data_dir": "d", "repeats": "0"}),
        ("--self_mode moco --data_dir a/b --data_size 1 --repeats 0 --device cpu",
         {"self_mode": "moco", "data_dir": "a/b", "repeats": "0", "device": "cpu"}),
        ("--data_size 15f --device cuda:1", {"data_size": "15f", "device": "cuda:1"}),
        ("--use_unlabelled", {"use_unlabelled": True}),
        ("-use_unlabelled -seed 1", {"use_unlabelled": True, "seed": 1}),
        ("--use_unlabelled=1", {"use_unlabelled": True}),
        ("--multi_round False", {"multi_round": False}),
        ("--multi_round true", {"multi_round": True}),
        ("--multi_round 0", {"multi_round": False}),
        ("--multi_round=no --overwrite yes", {"multi_round": False, "overwrite": True}),
        ("--channels 8,16,32,64", {"channels": (8, 16, 32, 64)}),
        ("--channels 8 16 32 64 --seed 2", {"channels": (8, 16, 32, 64), "seed": 2}),
        ("--channels 8, 16, 32, 64", {"channels": (8, 16, 32, 64)}),
        ("--channels (8,16,32,64)", {"channels": (8, 16, 32, 64)}),
        ("--channels=[8,16,32,64]", {"channels": (8, 16, 32, 64)}),
        ("--scale_weights 0 .5 1e-2", {"scale_weights": (0.0, 0.5, 0.01)}),
        (["--channels", "8 16 32 64"], {"channels": (8, 16, 32, 64)}),
        (["--mapping", ""], {"mapping": ()}),
        ("--class_weight none", {"class_weight": ()}),
        ("--class_weight balanced --seed 3", {"class_weight": "balanced", "seed": 3}),
        ("--class_weight=balanced", {"class_weight": "balanced"}),
        ("--top_k None --fine_max_epoch none", {}),
        ("--top_k 6", {"top_k": 6}),
        ("--self_lr 1e-3 --temperature 2", {"self_lr": 0.001, "temperature": 2.0}),
        ("--seed 1 --seed 2", {"seed": 2}),
        ("--channels 1 2 --channels 8,16,32,64", {"channels": (8, 16, 32, 64)}),
        (["--data_dir", "with space"], {"data_dir": "with space"}),
        (["--data_dir=-dash"], {"data_dir": "-dash"}),
        (["--data_dir=a=b"], {"data_dir": "a=b"}),
        (["--repeats", ""], {}),
        ("--name none", {"name": "none"}),
        ("--self-max-epoch 7 -use-unlabelled", {"self_max_epoch": 7, "use_unlabelled": True}),
        ("--class_names a b c d --seed 3", {"class_names": ("a", "b", "c", "d"), "seed": 3}),
        (["--class_names", "a b, c,d,e"], {"class_names": ("a b", "c", "d", "e")}),
        (["--class_names", 'a, "M/A, b",c,"d"'], {"class_names": ("a", "M/A, b", "c", "d")}),
        (["--class_names", "a", "b,", "c,d,e"], {"class_names": ("a b", "c", "d", "e")}),
        (["--class_names", "b c", "d", "e", "f"], {"class_names": ("b c", "d", "e", "f")}),
        ("--class_names none", {}),
        ("--class_colours=000000,#ffff00,E69F00,123456",
         {"class_colours": ("000000", "#ffff00", "E69F00", "123456")}),
    ],
)  # fmt: skip
def test_command_lines(line, expected):
    made = parse_config(line.split() if isinstance(line, str) else line)
    assert {n: getattr(made, n) for n in DEFAULTS} == DEFAULTS | expected


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--stage self", "unknown flag --stage; did you mean --stages?"),
        ("-stage self", "unknown flag -stage; did you mean -stages?"),
        ("--self_max 20", "unknown flag --self_max; did you mean --self_max_epoch?"),
        ("--self-mod moco", "unknown flag --self-mod; did you mean --self_mode?"),
        ("--SEED=1", "unknown flag --SEED; did you mean --seed?"),
        ("-s self", "unknown flag -s; --help lists all settings"),
        ("--qqqqqq", "unknown flag --qqqqqq; --help lists all settings"),
        ("--simclrinner 0", "unknown flag --simclrinner; did you mean --intra_view_negatives?"),
        ("--Patch_sup False", "unknown flag --Patch_sup; did you mean --label_guided?"),
        ("--multihead 4", "unknown flag --multihead; did you mean --groups?"),
        ("--random_c .1", "unknown flag --random_c; did you mean --random_crop?"),
        ("-self-fine", "unknown flag -self-fine; did you mean -"),
        ("--seed", "seed: no value found; allowed: a whole number at least 0"),
        ("--seed --device cpu", "seed: no value found; allowed: a whole number at least 0"),
        ("--channels", "channels: no value found; allowed: whole numbers, each at least 1"),
        ("--seed abc", "seed: found 'abc'; allowed: a whole number"),
        ("--seed 1.0", "seed: found '1.0'; allowed: a whole number"),
        ("--self_max_epoch 1e3", "self_max_epoch: found '1e3'; allowed: a whole number"),
        ("--seed none", "seed: found 'none'; allowed: a whole number"),
        ("--seed " + "9" * 6000, "...; allowed: a whole number"),
        ("--self_lr -1e-4", "self_lr: found -0.0001; allowed: a number above 0"),
        ("--temperature nan", "temperature: found nan; allowed: a number at least 0.001"),
        ("--temperature 1e999", "temperature: found inf; allowed: a number at least 0.001"),
        ("--multi_round maybe", "multi_round: found 'maybe'; allowed: True or False"),
        ("--multi_round=", "multi_round: found ''; allowed: True or False"),
        ("--channels 8,x,32,64", "channels: found '8,x,32,64'; allowed: whole numbers"),
        ("--scale_weights 1,-1,1", "scale_weights: found (1.0, -1.0, 1.0); allowed: numbers"),
        ("self", "unexpected word 'self'; settings are given as --name value"),
        ("--seed 1 2", "unexpected word '2'; settings are given as --name value"),
        ("--", "unexpected word '--'; settings are given as --name value"),
        (
            "--self_mode mocco",
            f"self_mode: found 'mocco'; allowed: {', '.join(SELF_MODES)}; did you mean moco?",
        ),
        (["--data_dir", "a\nb"], "data_dir: found 'a\\nb'; allowed: a path"),
        (["--x\x1b[2J"], "unexpected word"),
    ],
)
def test_bad_command_lines_are_one_clear_line(line, message):
    (found,) = problems_of_line(line)
    assert message in found and found.isprintable()


def test_every_published_name_leads_to_its_new_one():
    names = {
        "confea": "embed_dim", "hidfea": "hidden_dim", "multihead": "groups",
        "fineturn_lr_en": "fine_lr_encoder", "simclrinner": "intra_view_negatives",
        "Patch_sup": "label_guided", "self_scale_weight": "scale_weights",
        "lab_size_decay": "group_decay", "patch_size_decay": "patch_group_decay",
        "patch_lab_decay": "freshness_decay", "random_c": "random_crop", "channel": "channels",
    }  # fmt: skip
    for old, new in names.items():
        assert problems_of_line([], **{old: 1}) == [f"unknown setting {old}; did you mean {new}?"]


def test_problems_of_the_command_line_and_of_the_script_come_together():
    lines = problems_of_line("--sed 1 --workers x", tempreature=1, momentum=2)
    assert [line.split("; ")[0] for line in lines] == [
        "unknown flag --sed", "workers: found 'x'", "unknown setting tempreature",
        "momentum: found 2",
    ]  # fmt: skip


def test_the_command_line_wins_over_the_script_and_the_script_over_the_defaults():
    made = parse_config(["--seed", "2"], seed=1, name="steel")
    assert (made.seed, made.name, made.workers) == (2, "steel", 0)
    assert parse_config(["--seed", "2"], seed="wrong") == Config(seed=2)


def test_without_arguments_the_words_of_the_process_are_read(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py", "-seed", "5"])
    assert parse_config() == Config(seed=5)


# Help


@pytest.mark.parametrize("flag", ["-h", "--help", "-help"])
def test_help_prints_and_exits_with_success(flag, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/somewhere/train_defect.py", "-stages", "sup", flag])
    with pytest.raises(SystemExit) as stop:
        parse_config(name="steel", seed=-7)
    printed = capsys.readouterr()
    assert stop.value.code == 0 and printed.err == ""
    words = " ".join(printed.out.split())  # a narrow terminal breaks the lines elsewhere
    assert "default steel" in words and "default -7" in words
    assert words.count("python train_defect.py -stages") == 3


@pytest.mark.parametrize("columns", [1, 80, 100, 250])
def test_help_lists_every_setting_with_default_and_unit_within_the_width(columns, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setattr(sys, "argv", ["train_defect.py"])
    page = config.help_text()
    listed = page.partition("Experiment:")[2].rpartition("\n\n")[0]
    assert max(map(len, listed.split("\n"))) <= min(max(columns, 60), 100)
    assert max(map(len, page.split("\n"))) <= min(max(columns, 80), 100)
    entries = page.split("\n  --")[1:]
    assert [entry.split()[0] for entry in entries] == list(DEFAULTS)
    units = {"image_size": "pixels", "save_seconds": "seconds", "self_max_epoch": "epochs"}
    defaults = {"channels": "32,64,128,256", "self_lr": "1e-4", "top_k": "None", "mapping": "''"}
    for entry in entries:
        name, text = entry.split()[0], " ".join(entry.split())
        assert units.get(name, "") in text
        assert f"default {defaults.get(name, '')}" in text
    headings = [line for line in page.split("\n") if line.endswith(":") and line[0] != " "]
    assert len(headings) == 1 + 7  # the examples and the groups
    assert "50 % and again" in " ".join(page.split())


def test_help_of_a_real_process_has_no_traceback():
    code = "import config; config.parse_config()"
    done = subprocess.run(
        [sys.executable, "-c", code, "--help"], capture_output=True, text=True, check=False,
        cwd=Path(config.__file__).parent,
    )  # fmt: skip
    assert done.returncode == 0 and done.stderr == "" and "--self_mode" in done.stdout


def test_the_module_needs_only_the_standard_library():
    code = "import sys, config; print({'torch', 'numpy', 'data'} & set(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True,
        cwd=Path(config.__file__).parent,
    )  # fmt: skip
    assert done.stdout.strip() == "set()"


def test_the_table_has_one_row_per_setting_with_five_cells():
    lines = config.settings_table().splitlines()
    assert lines[0] == "| setting | default | unit | meaning | source |"
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]
    assert {len(row) for row in rows} == {5}
    settings_rows = [row for row in rows if not row[0].startswith("**")]
    assert [row[0] for row in settings_rows] == [f"`{name}`" for name in DEFAULTS]
    assert all(row[1] and row[3] and row[4] for row in settings_rows)
    assert len(rows) == len(DEFAULTS) + 7
    by_name = {row[0].strip("`"): row for row in settings_rows}
    assert by_name["self_lr"][1] == "`1e-4`" and by_name["image_size"][2] == "pixels"
    assert "`hidfea`" in by_name["hidden_dim"][4]


# What a Config answers


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({}, {"repeats": "", "top_k": 4}),
        ({"self_mode": "moco"}, {"repeats": "", "top_k": 30}),
        ({"multi_round": False}, {"repeats": ""}),
        ({"multi_round": False, "repeats": "23"}, {"repeats": "23"}),
        ({"self_mode": "moco", "top_k": 7}, {"top_k": 7}),
        ({}, {"class_weight": (1, 1, 10, 10), "mapping": (0, 128, 64, 255)}),
        ({"num_classes": 2}, {"class_weight": (1, 1), "mapping": (0, 255)}),
        ({"num_classes": 6}, {"class_weight": (1,) * 6, "mapping": (0, 51, 102, 153, 204, 255)}),
        ({"num_classes": 255}, {"mapping": tuple(round(255 * c / 254) for c in range(255))}),
        ({"class_weight": (1, 2, 3, 4)}, {"class_weight": (1, 2, 3, 4)}),
        ({"class_weight": (1,)}, {"class_weight": (1, 1, 1, 1)}),
        ({"class_weight": (2,), "num_classes": 3}, {"class_weight": (2, 2, 2)}),
        ({"class_weight": "balanced"}, {"class_weight": "balanced"}),
        ({"mapping": (3, 2, 1, 0)}, {"mapping": (3, 2, 1, 0)}),
        ({}, {"fine_max_epoch": None, "eval_every": None}),
    ],
)
def test_resolved(values, expected):
    made = Config(**values).resolved()
    assert {name: getattr(made, name) for name in expected} == expected
    assert made.resolved() == made


def test_the_grays_are_distinct_for_every_number_of_classes():
    for classes in range(2, 256):
        mapping = Config(num_classes=classes).resolved().mapping
        assert len(set(mapping)) == classes and min(mapping) == 0 and max(mapping) == 255, classes


@pytest.mark.parametrize("self_mode", ["plain-moco", "plain-simclr", "byol", "densecl"])
def test_a_method_that_samples_no_patches_has_no_top_k(self_mode):
    assert Config(self_mode=self_mode).resolved().top_k is None


def test_lists():
    made = Config(data_size="f1", stages="sup-fine-self", repeats="314")
    assert made.sizes == ("f", "1")
    assert made.stage_list == ("self", "fine", "sup")
    assert made.repeat_list == (3, 1, 4)
    assert Config().repeat_list is None
    assert Config(multi_round=False).repeat_list == (0,)
    assert Config(stages="sup").stage_list == ("sup",)


@pytest.mark.parametrize(
    ("size", "epochs", "every"), [("1", 1000, 200), ("5", 500, 100), ("f", 50, 10)]
)
def test_epochs_by_data_size(size, epochs, every):
    assert (Config().epochs_for(size), Config().eval_every_for(size)) == (epochs, every)
    made = Config(fine_max_epoch=3, eval_every=2)
    assert (made.epochs_for(size), made.eval_every_for(size)) == (3, 2)


@pytest.mark.parametrize("size", ["1", "5", "f"])
def test_with_steps_every_data_size_has_the_same_length(size):
    made = Config(fine_steps=400, fine_max_epoch=3)
    assert (made.epochs_for(size), made.eval_every_for(size)) == (400, 100)
    assert Config(fine_steps=400, eval_every=50).eval_every_for(size) == 50
    assert made.training_settings("sup", size)["fine_max_epoch"] == 400


# Presets


def test_flags_win_over_a_preset_and_a_preset_over_the_script():
    made = parse_config(["--preset", "robust", "--fine_clip", "1"], fine_steps=7, seed=5)
    assert (made.preset, made.fine_clip, made.fine_steps, made.seed) == ("robust", 1, 400, 5)
    chosen = parse_config(
        ["--preset=robust", "--fine_blur=2"], (), {"fine_steps": 9, "fine_blur": 3}
    )
    assert (chosen.fine_steps, chosen.fine_blur) == (9, 2)
    assert parse_config(["--seed", "3"], preset="robust").fine_schedule == "onecycle"


def test_the_preset_paper_is_what_no_preset_is():
    assert parse_config(["--preset", "paper"]) == parse_config([]) == Config()


@pytest.mark.parametrize("classes", [2, 4, 9])
def test_the_values_of_a_preset_are_the_identity_and_its_name_is_not(classes):
    words = ["--num_classes", str(classes)]
    robust = parse_config([*words, "--preset", "robust"])
    given = {n: v for n, v in vars(robust).items() if n != "preset"}
    by_hand = Config(**given)
    for stage in ("self", "fine", "sup"):
        assert robust.training_settings(stage, "1") == by_hand.training_settings(stage, "1")
    assert robust.training_settings("sup")["class_weight"] == "balanced_sqrt"
    assert robust.training_settings("sup") != parse_config(words).training_settings("sup")


def test_every_value_of_a_preset_is_in_the_log():
    lines = parse_config(["--preset", "robust"]).describe()
    for name, value in ROBUST.items():
        same = value == DEFAULTS[name]
        shown = f"{name} = {config.format_value(value)}"
        assert (shown in lines) != same
    assert "preset = robust" in lines


def test_a_preset_takes_crops_no_larger_than_the_resized_images():
    made = parse_config(["--preset", "robust", "--image_size", "64"])
    assert (made.self_crop, made.fine_crop) == (64, 64)
    lines = problems_of_line("--preset robust --image_size 64 --fine_crop 96")
    assert lines == ["fine_crop: found 96; allowed: at most image_size, 64"]


def test_a_preset_that_is_not_there_is_one_line():
    (line,) = problems_of_line("--preset robst")
    assert line.endswith("allowed: paper, robust, auto; did you mean robust?")


def test_epochs_of_an_unknown_data_size():
    with pytest.raises(ConfigError, match="data size: found '2'; allowed: 1, 5, f"):
        Config().epochs_for("2")


def test_describe_has_a_line_per_change_and_one_for_the_rest():
    lines = Config(seed=3, channels=(8, 16, 32, 64), self_lr=0.00025).describe()
    assert lines[:3] == ["seed = 3", "channels = 8,16,32,64", "self_lr = 0.00025"]
    assert len(lines) == 4 and lines[3].startswith("defaults: name=aluminum, ")
    listed = [entry.split("=")[0] for entry in lines[3].removeprefix("defaults: ").split(", ")]
    assert set(listed) == set(DEFAULTS) - {"seed", "channels", "self_lr"}
    assert len(Config().describe()) == 1


# Which settings decide a result; a setting of one of these sets is nowhere else.
NEVER = {
    "name", "output_dir", "stages", "data_size", "multi_round", "repeats", "mapping", "device",
    "workers", "threads", "cache", "save_seconds", "overwrite", "resume", "save_every", "report",
    "tensorboard", "class_names", "class_colours", "probe",
    "recompute", "preset", "augment_on", "deterministic", "cuda_graphs",
    "cache_on",
}  # fmt: skip
ALWAYS = {
    "data_dir", "num_classes", "ignore_label", "image_size", "seed", "amp", "channels",
    "standardize", "norm", "encoder", "batch_norm_ranks",
}  # fmt: skip
FINE_AND_SUP = {
    "class_weight", "fine_jitter", "fine_batch_size", "fine_max_epoch", "eval_every",
    "fine_contrast", "fine_crop", "fine_scale", "fine_rotation", "fine_crops", "fine_noise",
    "fine_blur", "fine_illumination", "fine_steps", "fine_optimizer", "fine_weight_decay",
    "fine_schedule", "fine_warmup", "fine_clip", "fine_average", "eval_tta",
}  # fmt: skip
FINE_ONLY = {"fine_lr_encoder", "fine_lr_decoder", "pretrained"}


def test_every_setting_decides_stages_or_none():
    every = {"self fine sup", "self fine", "fine sup", "fine", "sup"}
    named = [name for stages in every for name in config.deciding(stages)]
    assert sorted(config.deciding("")) == sorted(NEVER)
    assert sorted([*named, *NEVER]) == sorted(DEFAULTS)


def test_training_settings():
    self_and_fine = set(DEFAULTS) - NEVER - ALWAYS - FINE_AND_SUP - FINE_ONLY - {"sup_lr"}
    made = Config()
    assert set(made.training_settings("self")) == ALWAYS | self_and_fine
    assert set(made.training_settings("sup")) == ALWAYS | FINE_AND_SUP | {"sup_lr"}
    everything = ALWAYS | self_and_fine | FINE_AND_SUP | FINE_ONLY
    assert set(made.training_settings("fine")) == everything
    assert {"self_mode", "use_unlabelled", "momentum", "self_lr", "embed_dim"} <= self_and_fine
    with pytest.raises(ConfigError, match="stage: found 'all'; allowed: self, fine, sup"):
        made.training_settings("all")


def test_balanced_weights_are_part_of_the_identity_as_the_text():
    made = Config(class_weight="balanced")
    assert Config.from_dict(json.loads(json.dumps(made.to_dict()))) == made
    for stage in ("fine", "sup"):
        assert made.training_settings(stage)["class_weight"] == "balanced"
    (line,) = problems_of_line("--class_weight balancd")
    numbers = "numbers, each at least 0 and at most 1000000.0; or balanced, balanced_sqrt"
    assert line == (f"class_weight: found 'balancd'; allowed: {numbers}; did you mean balanced?")


def test_what_is_left_open_and_what_is_spelled_out_are_the_same_training():
    spelled = Config(top_k=4, class_weight=(1, 1, 10, 10), fine_max_epoch=500, eval_every=100)
    for stage in ("self", "fine", "sup"):
        asked = Config(data_size="15f", workers=3).training_settings(stage, "5")
        assert asked == spelled.training_settings(stage, "5")
        assert asked == json.loads(json.dumps(asked))
    assert Config().training_settings("sup", "5")["fine_max_epoch"] == 500
    assert Config().training_settings("sup")["fine_max_epoch"] is None


CHANGES: dict[str, Any] = {
    "seed": 1, "data_dir": "x", "amp": "off", "image_size": 64, "standardize": True,
    "norm": "group", "fine_contrast": 0.2, "fine_crop": 64, "fine_scale": 1.4,
    "fine_rotation": 45, "fine_crops": 8, "fine_noise": 0.1, "fine_schedule": "cosine",
    "fine_average": 0.9, "eval_tta": True, "encoder": "efficientnet_lite0",
}  # fmt: skip


@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.parametrize("stage", ["self", "fine", "sup"])
def test_a_setting_changes_what_it_decides_and_nothing_else(name, stage):
    asked, before = (
        made.training_settings(stage) for made in (Config(**{name: CHANGES[name]}), Config())
    )
    decides = name in ALWAYS or stage != "self"
    assert asked == (before | {name: CHANGES[name]} if decides else before)


# There and back


def test_from_dict_refuses_what_it_does_not_know():
    strange: Any = {"seeds": 1, "workers": -1, 3: 4}
    entries: Any = [1]
    with pytest.raises(ConfigError) as error:
        Config.from_dict(strange)
    assert [line.split(";")[0] for line in str(error.value).split("\n")] == [
        "unknown setting seeds", "unknown setting 3", "workers: found -1",
    ]  # fmt: skip
    with pytest.raises(ConfigError, match="settings: found \\[1\\]"):
        Config.from_dict(entries)
    assert Config.from_dict({"seed": 4}) == Config(seed=4)


fractions = st.floats(0, 1)
moderate = st.floats(1e-3, 1e3)
positive = st.floats(1e-300, 1e30)
counts = st.integers(1, 10**6)
widths = st.tuples(st.integers(1, 6), st.integers(1, 6)).map(
    lambda ab: {
        "groups": ab[0],
        "channels": tuple(ab[0] * ab[1] * 2**i for i in range(4)),
        "embed_dim": 3 * ab[0],
        "hidden_dim": 2 * ab[0],
    }
)
letters = st.characters(exclude_categories=["C", "Z"])
names = st.text(letters, min_size=1, max_size=40)
classes = st.integers(2, 9).flatmap(
    lambda n: st.fixed_dictionaries(
        {
            "num_classes": st.just(n),
            "mapping": st.just(()) | st.permutations(range(9)).map(lambda p: tuple(p[:n])),
            "class_weight": st.sampled_from([(), "balanced"])
            | st.lists(moderate, min_size=n, max_size=n).map(tuple),
            "class_names": st.just(())
            | st.lists(names, min_size=n, max_size=n, unique=True).map(tuple),
            "class_colours": st.just(())
            | st.lists(st.from_regex("[0-9a-fA-F]{6}", fullmatch=True), min_size=n, max_size=n).map(
                tuple
            ),
        }
    )
)
singles = st.fixed_dictionaries(
    {
        "data_dir": st.text(st.characters(exclude_categories=["C"]), min_size=1),
        "stages": st.sampled_from(["self", "fine", "sup", "self-sup", "self-fine-sup"]),
        "self_mode": st.sampled_from(["moco", "simclr", "plain-simclr", "byol"]),
        "data_size": st.permutations("15f").flatmap(
            lambda p: st.integers(1, 3).map(lambda n: "".join(p[:n]))
        ),
        "repeats": st.sets(st.sampled_from("0123456789")).map("".join),
        "multi_round": st.booleans(),
        "overwrite": st.booleans(),
        "seed": st.integers(0, 2**32 - 1),
        "device": st.sampled_from(["auto", "cuda:3"]),
        "temperature": moderate,
        "self_lr": positive,
        "global_local_ratio": fractions,
        "momentum": fractions,
        "top_k": st.none() | st.integers(1, 65536),
        "fine_max_epoch": st.none() | counts,
        "self_batch_size": counts,
        "scale_weights": st.tuples(fractions, fractions, fractions),
    }
)
configs = st.builds(lambda a, b, c: Config(**a, **b, **c), singles, classes, widths)


@settings(max_examples=60, deadline=None)
@given(configs)
def test_to_dict_and_from_dict_are_inverse_even_through_json(made):
    assert Config.from_dict(json.loads(json.dumps(made.to_dict()))) == made
    assert made.to_dict().keys() == DEFAULTS.keys()


@settings(max_examples=60, deadline=None)
@given(configs)
def test_the_values_shown_are_values_that_the_command_line_takes(made):
    shown = {n: config.format_value(getattr(made, n)) for n in DEFAULTS}
    argv = [f"--{n}={'' if text == chr(39) * 2 else text}" for n, text in shown.items()]
    argv = [w if not w.startswith("--data_dir=") else f"--data_dir={made.data_dir}" for w in argv]
    assert parse_config(argv) == made


@settings(max_examples=150, deadline=None)
@given(st.lists(st.text(max_size=12) | st.sampled_from([f"--{n}" for n in DEFAULTS]), max_size=6))
def test_no_command_line_ends_in_anything_but_a_config_or_a_config_error(argv):
    if {"-h", "--h", "-help", "--help"} & {word.split("=")[0] for word in argv}:
        return
    try:
        made = parse_config(argv)
    except ConfigError as error:
        assert all(line.isprintable() and line for line in str(error).split("\n"))
    else:
        assert isinstance(made, Config)


def test_of_several_names_the_one_that_is_too_long_is_named() -> None:
    name = "proeutectoid carbide network with a long name"
    with pytest.raises(ConfigError) as error:
        Config(num_classes=2, class_names=("ferritic matrix", name))
    (line,) = str(error.value).splitlines()
    assert line == (
        f"class_names: found '{name}' of {len(name)} characters; allowed: a name for each class, "
        "separated by commas, of 1 to 40 characters each"
    )
