"""The demo is judged by its truth: exit code 1 for a phase that was missed."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

import segment
from segmentation.demo import judged as demo

# Four phases, a band each; half of a band of 10 rows found is a Dice of 2 * 5 / (5 + 10) = 0.67.
TRUTH = np.repeat(np.arange(4, dtype=np.uint8), 10)[:, None].repeat(8, axis=1)
FOUND_HALF = TRUTH.copy()
FOUND_HALF[35:] = 2
MISSED = TRUTH.copy()
MISSED[32:] = 2  # 2 of 10 rows of the last phase: a Dice of 4 / 12, which counts as found
ALMOST_NONE = TRUTH.copy()
ALMOST_NONE[31:] = 2  # 1 of 10 rows: 2 / 11, which does not


def job(root: Path, answer: np.ndarray) -> SimpleNamespace:  # type: ignore[type-arg]
    """A job that is done, whose answer and first answer are these class maps; no network."""
    for kind, pixels in (("truth", TRUTH), ("out/classes", answer), ("first/classes", TRUTH)):
        (root / kind).mkdir(parents=True)
        for name in ("a", "b"):
            Image.fromarray(pixels).save(root / kind / f"{name}.png")
    Image.fromarray(255 - TRUTH).save(root / "out/classes/a.png")  # annotated: not judged
    (root / "images").mkdir()
    schedule = SimpleNamespace(pretrain_steps=0, fine_steps=0)
    return SimpleNamespace(
        annotated=[SimpleNamespace(name="a")],
        this=SimpleNamespace(by="network"),
        out=root / "out",
        first=root / "first",
        schedule=schedule,
        methods=SimpleNamespace(start=lambda this: None),
    )


@pytest.mark.parametrize(
    ("answer", "code", "said"),
    [
        (FOUND_HALF, 0, "Every phase was found"),
        (MISSED, 0, "Every phase was found"),
        (ALMOST_NONE, 1, "NOT found: particle"),
    ],
)
def test_a_phase_that_was_missed_is_exit_code_1(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    answer: np.ndarray,  # type: ignore[type-arg]
    code: int,
    said: str,
) -> None:
    work = job(tmp_path, answer)
    monkeypatch.setattr(demo, "run", lambda request: work)
    monkeypatch.setattr(demo, "given", lambda: (tmp_path / "images", (tmp_path / "truth",)))
    assert segment.main(["--demo", "--out", str(tmp_path / "out")]) == code
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == said


def test_an_answer_is_judged_by_the_images_that_nobody_annotated(tmp_path: Path) -> None:
    work = job(tmp_path, FOUND_HALF)
    found = demo.judge(work.out / "classes", tmp_path / "truth", ["a"])
    assert found.images == 1 and found.worst == ("b",)
    # The third phase has 10 rows and 5 that are not its own: 20 / 25.
    assert found.dice == pytest.approx((1, 1, 0.8, 2 / 3))
    assert found.area_error == pytest.approx((0, 0, 12.5, 12.5))  # 5 of 40 rows
    assert found.miou == pytest.approx((1 + 1 + 10 / 15 + 5 / 10) / 4)
