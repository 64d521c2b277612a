"""set.json: written and read back, what is refused, and which of flag, set and default counts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from config import ConfigError
from dataset.set_file import NAME, SetFile, read_set_file, set_of
from imaging.field import Crop
from imaging.gray_range import GrayRange
from stages.presets import read_config
from tests.tiny_set import make_set, train
from utils.checkpoint import load
from utils.files import DataError

WHOLE = SetFile(
    num_classes=3,
    class_names=("matrix", "θ phase", "void"),
    class_colours=("000000", "ff0000", "0000ff"),
    ignore_label=255,
    palette="0=0,0,0 1=255,0,0 2=0,0,255",
    crop=Crop(bottom=60),
    cropped_sizes=((900, 1280),),
    gray_range=GrayRange(12.0, 4011.0),
    um_per_px={"15_a.png": 0.1, "15_b.png": 0.05},
)


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    for known in (WHOLE, SetFile(), SetFile(num_classes=2, um_per_px=0.1)):
        known.write(tmp_path)
        assert read_set_file(tmp_path) == known
    assert read_set_file(tmp_path / "nowhere") is None


def test_the_file_is_one_that_people_read_and_write(tmp_path: Path) -> None:
    WHOLE.write(tmp_path)
    text = (tmp_path / NAME).read_text(encoding="utf-8")
    assert ' "crop": "0,60,0,0",\n "cropped_sizes": ["1280x900"],\n' in text
    assert "θ phase" in text
    (tmp_path / NAME).write_text('{"num_classes": 3, "um_per_px": 0.1}')
    assert read_set_file(tmp_path) == SetFile(num_classes=3, um_per_px=0.1)


def test_scales_by_name_or_of_all() -> None:
    assert WHOLE.scale_of("15_b.png") == 0.05 and WHOLE.scale_of("x.png") is None
    assert SetFile(um_per_px=0.1).scale_of("x.png") == 0.1 and SetFile().scale_of("x.png") is None
    assert WHOLE.scales() == [0.05, 0.1] and SetFile().scales() == []


def test_the_set_that_an_image_belongs_to(tmp_path: Path) -> None:
    image = tmp_path / "set" / "test_numf" / "img" / "a.png"
    image.parent.mkdir(parents=True)
    WHOLE.write(tmp_path / "set")
    for path in (image, image.parent, tmp_path / "set"):
        assert set_of(path) == WHOLE
    assert set_of(tmp_path) is None


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "no JSON (line 1)"),
        ("{", "no JSON (line 1)"),
        ("[" * 100_000, "no JSON"),
        ("[]", "found []; it holds names"),
        ('{"num_classes": 3, "num_classes": 4}', "num_classes stands in it twice"),
        ('{"num_clases": 3}', "unknown entry 'num_clases'; did you mean num_classes?"),
        ('{"num_classes": 1}', "num_classes: found 1; allowed"),
        ('{"num_classes": "3"}', "num_classes: found '3'; allowed"),
        ('{"num_classes": true}', "num_classes: found True; allowed"),
        ('{"num_classes": 2, "class_names": ["a"]}', "class_names: found 1 values; allowed"),
        ('{"num_classes": 2, "class_names": "ab"}', "class_names: found 'ab'; allowed"),
        ('{"num_classes": 3, "ignore_label": 2}', "ignore_label: found 2; allowed"),
        ('{"crop": "60"}', "crop: found '60'; --crop '60': give four numbers"),
        ('{"crop": [0, 60, 0, 0]}', "crop: found [0, 60, 0, 0]; give a text"),
        ('{"cropped_sizes": ["big"]}', "cropped_sizes: found ['big']; give sizes"),
        ('{"cropped_sizes": "1x1"}', "cropped_sizes: found '1x1'; give a list"),
        ('{"gray_range": [5]}', "gray_range: found [5]; "),
        ('{"gray_range": [5, 1]}', "gray_range: found [5, 1]; "),
        ('{"gray_range": [NaN, 1]}', "gray_range: found [nan, 1]; "),
        ('{"gray_range": "image"}', "gray_range: found 'image'; "),
        ('{"um_per_px": 0}', "um_per_px: found 0; give micrometres"),
        ('{"um_per_px": {"a": "1"}}', "um_per_px: found {'a': '1'}; give micrometres"),
        ('{"um_per_px": [1]}', "um_per_px: found [1]; give micrometres"),
        ('{"palette": 3}', "palette: found 3; give it as text"),
    ],
)
def test_what_cannot_be_so_is_one_line(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / NAME).write_text(text)
    with pytest.raises(DataError) as caught:
        read_set_file(tmp_path)
    line = str(caught.value)
    assert line.startswith(f"{tmp_path / NAME}: ") and said in line and "\n" not in line


def test_all_that_is_wrong_is_said_at_once(tmp_path: Path) -> None:
    (tmp_path / NAME).write_text('{"num_classes": 1, "crop": "", "x": 1}')
    with pytest.raises(DataError) as caught:
        read_set_file(tmp_path)
    assert len(str(caught.value).splitlines()) == 3


def test_a_file_that_cannot_be_read_is_one_line(tmp_path: Path) -> None:
    (tmp_path / NAME).write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match="no JSON .not UTF-8."):
        read_set_file(tmp_path)
    (tmp_path / NAME).unlink()
    (tmp_path / NAME).mkdir()
    with pytest.raises(DataError, match="cannot be read"):
        read_set_file(tmp_path)


# ---------------------------------------------------------------- flag, set, default


def read(folder: Path, words: str = "", **defaults: Any) -> tuple[Any, list[str]]:
    return read_config(["--data_dir", str(folder), *words.split()], **defaults)


def test_the_set_says_what_no_flag_says(tmp_path: Path) -> None:
    WHOLE.write(tmp_path)
    config, lines = read(tmp_path)
    assert (config.num_classes, config.ignore_label) == (3, 255)
    assert config.class_names == WHOLE.class_names
    assert config.class_colours == WHOLE.class_colours
    [line] = lines
    assert line.startswith(f"From {tmp_path / NAME}: num_classes 3, ignore_label 255, class_names")
    assert read(tmp_path / "other")[0].num_classes == 4


def test_a_flag_counts_more_and_one_line_names_both(tmp_path: Path) -> None:
    WHOLE.write(tmp_path)
    config, lines = read(tmp_path, "--class_names a,b,c --ignore_label None")
    assert config.class_names == ("a", "b", "c") and config.ignore_label is None
    warnings = [line for line in lines if line.startswith("Warning")]
    assert len(warnings) == 2 and any(
        f"--class_names a,b,c where {tmp_path / NAME} says matrix,θ phase,void" in line
        for line in warnings
    )
    assert read(tmp_path, "--num_classes 3")[1][1:] == []  # the same: nothing to say


def test_so_does_a_script(tmp_path: Path) -> None:
    WHOLE.write(tmp_path)
    config, lines = read(tmp_path, num_classes=2)
    assert config.num_classes == 2 and config.class_names == ()  # names of three do not fit
    assert any("--num_classes 2 where" in line for line in lines)


def test_what_of_a_set_does_not_fit_the_flags_is_left_out(tmp_path: Path) -> None:
    SetFile(num_classes=3, ignore_label=4).write(tmp_path)
    assert read(tmp_path, "--num_classes 6")[0].ignore_label is None
    assert read(tmp_path, "--num_classes 3")[0].ignore_label == 4


def test_a_wrong_flag_is_reported_as_ever(tmp_path: Path) -> None:
    WHOLE.write(tmp_path)
    with pytest.raises(ConfigError, match="num_classes: found 'many'"):
        read(tmp_path, "--num_classes many")


def test_help_needs_no_set(tmp_path: Path, capsys) -> None:
    (tmp_path / NAME).write_text("{")
    with pytest.raises(SystemExit):
        read(tmp_path, "--help")
    assert "--num_classes" in capsys.readouterr().out
    with pytest.raises(DataError):
        read(tmp_path)


def test_a_run_takes_its_set_and_its_checkpoint_keeps_what_prediction_needs(
    tmp_path: Path, capsys
) -> None:
    root = make_set(tmp_path / "set")
    SetFile(num_classes=3, class_names=("a", "b", "c"), crop=Crop(bottom=9), um_per_px=0.1).write(
        root
    )
    words = f"-stages sup --data_dir {root} --output_dir {tmp_path}"
    settings = {"num_classes": 3}
    assert train(root, tmp_path, words, **settings) == 0
    assert "a,b,c" in capsys.readouterr().out
    kept = load(tmp_path / "tiny_sup" / "1_0" / "sup.pt")["settings"]
    assert kept["class_names"] == ["a", "b", "c"] and kept["num_classes"] == 3
    assert kept["crop"] == [0, 9, 0, 0] and kept["um_per_px"] == [0.1, 0.1]


def test_a_run_of_before_goes_on_when_its_set_gets_the_file(tmp_path: Path, capsys) -> None:
    root = make_set(tmp_path / "set")
    assert train(root, tmp_path, "-stages sup") == 0
    before = (tmp_path / "tiny_sup" / "1_0" / "sup.pt").read_bytes()
    SetFile(num_classes=3, crop=Crop(bottom=9), um_per_px=0.1).write(root)
    capsys.readouterr()
    assert train(root, tmp_path, "-stages sup") == 0
    assert "other settings" not in capsys.readouterr().err
    assert (tmp_path / "tiny_sup" / "1_0" / "sup.pt").read_bytes() == before


def test_json_is_what_other_programs_read(tmp_path: Path) -> None:
    WHOLE.write(tmp_path)
    values = json.loads((tmp_path / NAME).read_text(encoding="utf-8"))
    assert values["um_per_px"] == {"15_a.png": 0.1, "15_b.png": 0.05}
    assert values["gray_range"] == [12.0, 4011.0] and values["ignore_label"] == 255
