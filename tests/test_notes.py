"""What stands above a table, of sets whose runs are not there yet; nothing is trained."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_set import make_set

from comparison.notes import head, rows_of, write_table
from comparison.options import ABLATIONS, read_options
from comparison.plan import Plan
from comparison.table import Comparison


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_set(tmp_path_factory.mktemp("sets") / "steel")


def plan_of(data: Path, out: Path, *words: str) -> Plan:
    own = ["--data_dir", str(data), "--out", str(out), "--num_classes=3", "--device=cpu"]
    return Plan(read_options([*own, "--report", *words]))


def notes(plan: Plan) -> list[str]:
    return head(plan, Comparison(rows_of(plan), plan.clusters, ["sup"], plan.repeats)).split("\n")


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (
            "--repeats 01",
            ("one annotated image, repeats 0 1; images as they are; pretraining 200",),
        ),
        ("--image_size 24", ("images 24x24;", "fine-tuning and supervised 1000, evaluated every")),
        ("--data_size 5 --repeats 0", ("five annotated images, repeats 0;", "supervised 500,")),
        ("--data_size f", ("all annotated images, repeats 0;", "a hash of the data: run.md.")),
        ("--ablate scales", ("A single scale has as much", "data: ablate_scales_run.md.")),
        ("--methods sup", ("Not finished, repeats in brackets: no pretraining (0, 1).",)),
    ],
)
def test_a_note_follows_its_setting(
    data: Path, tmp_path: Path, words: str, parts: tuple[str, ...]
) -> None:
    lines = notes(plan_of(data, tmp_path, *words.split()))
    for part in parts:
        assert sum(line.startswith("- ") and part in line for line in lines) == 1
    ablated = "--ablate" in words
    assert any("The best plain method is" in line for line in lines) != ablated
    assert not any("Not scored" in line for line in lines)  # no run says what the truth shows


@pytest.mark.parametrize("ablate", ["", *ABLATIONS])
def test_heading_notes_and_blank_lines_stand_as_markdown_wants_them(
    data: Path, tmp_path: Path, ablate: str
) -> None:
    words = ["--ablate", ablate] if ablate else []
    title, *rest = notes(plan_of(data, tmp_path, *words))
    what = f"{ABLATIONS[ablate][0]} varied" if ablate else "every method on one UNet"
    assert title == f"# steel: {what}"
    assert rest[0] == rest[-1] == "" and all(line.startswith("- ") for line in rest[1:-1])
    assert len(rest) > 6


def test_a_file_that_may_not_be_written_is_named(data: Path, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("a file")
    with pytest.raises(ValueError, match=r"table\.md: cannot be written .* --out"):
        write_table(plan_of(data, tmp_path / "out", "--methods=sup"))
