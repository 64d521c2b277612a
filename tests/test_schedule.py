"""Minutes become steps: a machine of known speed in the place of a real one."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from segmentation.predictors import Costs
from segmentation.schedule import (
    ENOUGH,
    FIRST_LOOK,
    GAINS,
    LATER,
    Images,
    Schedule,
    load_schedule,
    make_schedule,
    reduction,
    save_schedule,
)
from stages.pretraining import SelfSupervised

# Three classes of 20,000 pixels in 0.1 megapixels, on two threads.
COSTS = Costs((20_000, 20_000, 20_000), 0.1, learning=5e-6, features=0.3, megapixel=2.5)
# uhcs: 12 images of 376x376, one of them labelled, on a core that nobody else uses.
UHCS = Costs((102_851, 11_208, 14_008, 13_309), 0.141, 1.14e-5, features=0.3, megapixel=2.6)
UHCS_PIXELS = 12 * 376 * 376


@dataclass
class Asked:
    minutes: float = 20.0
    pretrain: str = "never"
    preset: str = "robust"


@dataclass
class Machine:
    """As ``Learning``: seconds of a step of 8 crops, of a step of pretraining, of a megapixel."""

    step: float = 0.2
    self_step: float = 3.0
    megapixel: float = 0.8
    request: Asked = field(default_factory=Asked)
    values: dict[str, Any] = field(default_factory=lambda: {"fine_batch_size": 8, "self_crop": 256})
    reasons: list[str] = field(default_factory=list)
    usual_steps: int = 400
    smallest_side: int = 376
    costs: Costs = COSTS
    since: float = 0.0

    @property
    def intake(self) -> Machine:
        return self

    @property
    def pictures(self) -> range:
        return range(30)

    def seconds_per_step(self, stage: type) -> float:
        if stage is SelfSupervised:
            return self.self_step * (self.values["self_crop"] / 256) ** 2
        return self.step * self.values["fine_batch_size"] / 8

    def seconds_per_megapixel(self) -> float:
        return self.megapixel

    def classifier_costs(self) -> Costs:
        return self.costs

    def spent(self) -> float:
        return self.since


def plan(minutes: float = 20, pixels: int = 30 * 376 * 376, **machine: Any) -> Schedule:
    request = Asked(minutes, machine.pop("pretrain", "never"))
    made = Machine(request=request, **machine)
    return make_schedule(made, {"pixels": pixels, "minutes": minutes})  # type: ignore[arg-type]


@pytest.mark.parametrize("minutes", [1.0, 2.2, 5.0, 20.0, 60.0])
@pytest.mark.parametrize("step", [0.02, 0.2, 2.0])
@pytest.mark.parametrize("pretrain", ["always", "never"])
def test_the_plan_keeps_within_the_minutes_and_its_parts(
    minutes: float, step: float, pretrain: str
) -> None:
    found = plan(minutes, step=step, self_step=15 * step, pretrain=pretrain)
    assert found.expected <= 60 * minutes
    held = [v for name, v in found.seconds.items() if "held-out" in name]
    assert len(held) == 1 and (held[0] <= 60 * minutes / 4 or not found.block_steps)
    assert found.seconds["first answer by the pixel classifier"] <= FIRST_LOOK
    batch = found.values.get("fine_batch_size", 8)
    assert found.block_steps <= found.fine_steps and found.fine_steps * batch <= 3 * 400 * 8
    # Without time for a comparison a network would hardly be kept: 30 steps of half of the labels.
    assert (found.block_steps >= 30) if found.fine_steps else found.block_steps == 0
    if found.fine_steps and pretrain != "always":
        # A block's network sees its labels at least .4 times as often as the final one sees all.
        learnt = 1 - len(found.folds[0]) / 4
        assert found.block_steps >= 0.4 * learnt * found.fine_steps - 1
    assert (found.pretrain_steps == 0) or pretrain != "never"


def test_twenty_minutes_give_three_times_the_usual_steps_without_pretraining() -> None:
    found = plan()
    assert (found.fine_steps, found.pretrain_epochs, found.views) == (1200, 0, 8)
    assert found.block_steps == 600 and found.values == {}  # of a half of the labels
    assert found.folds == [[0, 3], [1, 2]]
    (line,) = (line for line in found.reasons if "No pretraining" in line)
    assert line == f"No pretraining: {GAINS}; --pretrain always does it"


def test_a_twin_is_trained_where_its_steps_and_predictions_fit() -> None:
    found = plan()
    # 1,200 steps of .2 s, and 30 images of .14 megapixels at .8 s.
    seconds = 240 + 30 * 0.1414 * 0.8
    assert found.twin and found.seconds["twin network"] == pytest.approx(seconds, 0.01)
    assert found.expected <= 20 * 60
    short = plan(minutes=5)
    assert short.fine_steps and not short.twin and short.seconds["twin network"] == 0
    assert any("no time for a twin network" in line for line in short.reasons)
    none = plan(minutes=1, step=5.0)
    assert not none.fine_steps and not none.twin
    assert not any("twin" in line for line in none.reasons)


def test_four_blocks_are_held_out_where_each_can_learn_its_labels_as_often() -> None:
    # 3 x 400 steps, and four times three quarters of them: 4,800 steps of 0.1 s.
    found = plan(minutes=40, step=0.1)
    assert (found.fine_steps, found.block_steps) == (1200, 900)
    assert found.folds == [[0], [1], [2], [3]]


def test_pretraining_has_half_of_the_time_and_less_where_that_is_too_short_for_it() -> None:
    found = plan(minutes=300, pretrain="always")
    assert found.pretrain_steps >= ENOUGH
    assert 0.4 * 300 * 60 <= found.seconds["pretraining"] <= 0.5 * 300 * 60
    short = plan(pretrain="always")
    assert 0 < short.pretrain_steps < ENOUGH
    assert 0.25 * 20 * 60 < short.seconds["pretraining"] <= 0.35 * 20 * 60
    assert any(line.endswith(f"though {GAINS}") for line in short.reasons)
    none = plan(minutes=3, pretrain="always", self_step=300.0)
    assert "No pretraining: not one epoch fits into 35% of the time" in none.reasons


def test_short_crops_are_tried_with_the_whole_share_and_told_where_they_are_used() -> None:
    # 2,000 steps of 3 s and of crops of 96, .42 s: half of the time is between the two.
    found = plan(minutes=60, pretrain="always")
    assert found.values["self_crop"] == 96 and found.pretrain_steps >= ENOUGH
    assert found.pretrain_steps * 3.0 * (96 / 256) ** 2 > 0.4 * 60 * 60
    assert any("of crops of 96 pixels, as the time is short" in line for line in found.reasons)


@pytest.mark.parametrize("minutes", [1.0, 2.2, 20.0])
@pytest.mark.parametrize("pretrain", ["always", "never"])
def test_what_was_tried_while_timing_is_not_kept(minutes: float, pretrain: str) -> None:
    """It would be part of what a round is known by, and the next run would begin another one."""
    machine = Machine(request=Asked(minutes, pretrain), step=1.0)
    usual = dict(machine.values)
    asked = {"pixels": 30 * 376 * 376, "minutes": minutes}
    make_schedule(machine, asked)  # type: ignore[arg-type]
    assert machine.values == usual


def test_little_time_takes_smaller_steps_and_too_little_no_network() -> None:
    short = plan(minutes=2.2)
    assert short.values["fine_batch_size"] in (2, 4) and short.fine_steps > 400
    assert short.folds == [[0, 3], [1, 2]]
    none = plan(minutes=1, step=5.0)
    (told,) = (line for line in none.reasons if "for a network give" in line)
    enough = int(told.partition("--minutes ")[2].split()[0])
    assert plan(minutes=enough, step=5.0).fine_steps >= 60
    assert plan(minutes=enough - 1, step=5.0).fine_steps == 0
    assert none.fine_steps == none.block_steps == none.pretrain_epochs == 0
    assert any("pixel classifier answers alone" in line for line in none.reasons)


def test_pretraining_is_not_told_of_where_there_is_no_network() -> None:
    none = plan(minutes=1, step=1.0, self_step=2.0, pretrain="always")
    assert none.fine_steps == none.pretrain_epochs == 0
    assert not any("retraining has" in line or "pretraining sees" in line for line in none.reasons)


def learnt(*pixels: float) -> float:
    """Seconds in which so many pixels of each class are learnt, without their features."""
    return 5e-6 * sum(pixels) * math.log2(sum(pixels))


def test_many_pixels_are_reduced_for_the_first_answer_and_seen_in_one_view() -> None:
    many = plan(pixels=30 * 2048 * 1536, costs=COSTS._replace(megapixel=20 / 3))
    # 94.4 megapixels take 629 s. 36 s are 17.5 times less: by 5 squared; 180 s 3.5 times: by 2.
    assert many.views == 1 and many.reduce == [5, 2] and many.fine_steps
    # 800 pixels of each class are learnt; 141.6 s to measure and draw, 2.3 s for the page.
    first = 0.3 * 0.1 / 25 + learnt(800, 800, 800) + 94.371840 * (20 / 3 / 25 + 1.5) + 2.3
    assert many.seconds["first answer by the pixel classifier"] == pytest.approx(first)
    (line,) = (line for line in many.reasons if line.startswith("The first answer"))
    assert "reduced by a factor of 5: whole ones would take about 10 min longer" in line  # 604 s
    assert plan().reduce == [1, 1]


def reduced_lines(minutes: float, megapixels: float) -> list[str]:
    """What is said of images reduced, where a megapixel takes a second and nothing is learnt."""
    costs = Costs((0, 0), 0.0, learning=0.0, features=0.3, megapixel=1.0)
    images = Images(megapixels * 1e6, 9.0, costs, spent=0.0)
    return images.lines(images.fixed(60 * minutes)[0], views=0)


def test_more_minutes_are_advised_for_a_first_answer_only_where_they_help_it() -> None:
    give, soon = "more --minutes give that time", "to come sooner, whatever --minutes is"
    # All images take 100 s: the first answer has 36 s from 4 minutes on, the last one 15 %.
    first, last = reduced_lines(10, 100)
    assert first.startswith("The first answer") and first.endswith(soon)
    assert last.startswith("The last answer") and last.endswith(give)
    (first,) = reduced_lines(20, 100)
    assert first.startswith("The first answer") and first.endswith(soon)
    # 30 s: 18 s are the first answer's, and the last one's, in 2 minutes.
    assert [line.endswith(give) for line in reduced_lines(2, 30)] == [True, True]
    assert reduced_lines(4, 30) == reduced_lines(4, 36) == []
    assert reduced_lines(3.9, 36)[0].endswith(give)
    assert reduced_lines(100, 37)[0].endswith(soon)


def test_what_is_learnt_is_at_most_5000_pixels_of_a_class() -> None:
    assert COSTS.fit() == pytest.approx(0.03 + learnt(5000, 5000, 5000))
    assert COSTS.fit(0.2) == pytest.approx(0.03 + learnt(4000, 4000, 4000))
    # Halves: what learns from one and from two quarters, twice each, and predicts 0.1 megapixels.
    halves = 2 * (COSTS.fit(0.25) + COSTS.fit(0.5)) + 4 * 0.25
    assert COSTS.held(((0, 3), (1, 2)), 1) == pytest.approx(halves)


@pytest.mark.parametrize("features", [0.1, 0.35])
def test_a_faster_core_than_that_of_the_constants_is_not_counted_on(features: float) -> None:
    assert COSTS._replace(features=features).slower == 1
    assert COSTS._replace(features=0.7).slower == pytest.approx(2)


def test_a_minute_is_enough_for_twelve_images_that_are_not_reduced() -> None:
    found = plan(1, UHCS_PIXELS, step=0.7, megapixel=3.8, costs=UHCS, since=6)
    assert found.reduce == [1, 1] and not found.fine_steps
    assert "reduced" not in " ".join(found.reasons) and "8 views" not in " ".join(found.reasons)
    # 20,000 pixels learnt, 1.7 megapixels measured, a page; twice. They are predicted once.
    answer = 0.3 * 0.141 + 2.28 * learnt(*4 * [5000]) + 1.696512 * 1.5 + 2.3
    held = 4 * 0.141 * (0.3 + 2.6) + 2.3
    held += 2 * 2.28 * (learnt(5000, 2802, 3502, 3327.25) + learnt(*4 * [5000]))
    assert (
        found.expected == pytest.approx(6 + 2 * answer + 1.696512 * 2.6 + held)
        and found.expected < 60 / LATER
    )


@pytest.mark.parametrize(
    ("slow", "minutes"), [(1, 1), (2, 1), (2, 2), (3, 2), (3, 4), (8, 4), (8, 8)]
)
def test_a_busy_machine_reduces_as_far_as_the_answer_would_come_too_late(
    slow: int, minutes: int
) -> None:
    own = UHCS._replace(
        learning=slow * UHCS.learning, features=slow * 0.3, megapixel=slow * UHCS.megapixel
    )
    found = plan(minutes, UHCS_PIXELS, step=9, megapixel=30, costs=own, since=6 * slow)
    factor, whole = found.reduce[1], slow * 1.696512 * 2.6
    measured = max(1, slow * 0.3 / 0.35) * (1.5 * 1.696512 + 2.3)
    last = found.seconds["predictions, measurements, report"]
    assert not found.fine_steps

    def predicting(by: int) -> float:
        return 0 if by == found.reduce[0] else whole / by**2  # else the first answer's maps serve

    assert last == pytest.approx(own.fit(reduce=factor) + predicting(factor) + measured)
    held = own.held(((0, 3), (1, 2)), 1) + max(1, slow * 0.3 / 0.35) * 2.3
    rest = found.seconds["first answer by the pixel classifier"] + held + own.fit() + measured
    in_time = (60 * minutes - 6 * slow) / LATER
    assert rest + predicting(factor) <= in_time or whole / factor**2 <= 0.15 * 60 * minutes
    if factor > 1:  # one less would have been late
        assert rest + predicting(factor - 1) > in_time


@pytest.mark.parametrize(("held_out", "factor"), [(10.0, 1), (50.4, 1), (50.5, 2), (300.0, 2)])
def test_alone_the_pixel_classifier_has_all_the_time_but_a_quarter_in_reserve(
    held_out: float, factor: int
) -> None:
    # 100 megapixels are predicted in 100 s and measured in 152.3 s; nothing is learnt.
    free = Costs((0, 0), 0.0, learning=0.0, features=0.3, megapixel=1.0)
    images = Images(100e6, 9.0, free, spent=0.0)
    # Beside a network: 36 and 90 s, both by 2. First answer: 100 / 4 + 152.3 = 177.3 s.
    assert images.fixed(600.0)[0] == [2, 2]
    # 600 / 1.25 - 177.3 - 152.3 = 150.4 s, of which 100 are needed; by 2 the first answer serves.
    needed = {1: 252.3, 2: 152.3}[factor]
    assert images.alone(600.0, lambda _: held_out) == (factor, pytest.approx(needed))


def test_alone_images_are_reduced_until_held_out_blocks_are_in_time_too() -> None:
    free = Costs((0, 0), 0.0, learning=0.0, features=0.3, megapixel=1.0)
    images = Images(100e6, 9.0, free, spent=0.0)
    # As above 302.7 s are left. By 2: 160 + 152.3 s, by 3: 71.1 + 152.3 + 11.1 s.
    found = images.alone(600.0, lambda factor: 640 / factor**2)
    assert found == (3, pytest.approx(152.3 + 100 / 9))


def test_the_minutes_that_are_advised_give_a_network_and_so_do_more() -> None:
    """Though 18 do, and 20 to 22 do not: less reduced images take the time of the network."""
    costs = Costs((7_200_000, 4_800_000), 12.0, learning=9e-6, features=1.0, megapixel=3.0)
    asked = dict(pixels=60_000_000, costs=costs, step=1.5, pretrain="never", usual_steps=1000)
    steps = {minutes: plan(minutes=minutes, **asked).fine_steps for minutes in range(10, 100)}
    assert steps[18] and not any(steps[minutes] for minutes in (20, 21, 22))
    (line,) = (line for line in plan(minutes=10, **asked).reasons if "give --minutes" in line)
    enough = int(line.split("--minutes ")[1].split()[0])
    assert enough > 22 and not steps[enough - 1]
    assert all(steps[minutes] for minutes in range(enough, 2 * enough + 1))


def test_the_factor_of_a_reduction() -> None:
    assert reduction(36.0, 36.0) == 1
    assert reduction(37.0, 36.0) == 2
    assert reduction(36 * 9.1, 36.0) == 4
    assert reduction(16.0, -5.0) == 4  # no time left: as if a second were


def test_a_plan_is_stored_for_what_it_was_made_for(tmp_path: Path) -> None:
    found = plan()
    save_schedule(tmp_path, found)
    assert load_schedule(tmp_path, found.asked) == found
    assert load_schedule(tmp_path, {**found.asked, "minutes": 5}) is None
    (tmp_path / "plan.json").write_text("{", encoding="utf-8")
    assert load_schedule(tmp_path, found.asked) is None


def test_a_plan_that_an_earlier_version_stored_is_kept(tmp_path: Path) -> None:
    """It had what was timed among the seconds, as "per step of fine-tuning" and others."""
    found = plan()
    old = asdict(found)
    rates = old.pop("rates")
    assert [*rates] == [
        "step of fine-tuning", "megapixel predicted", "megapixel of the pixel classifier"
    ]  # fmt: skip
    old["seconds"] = {f"per {name}": value for name, value in rates.items()} | old["seconds"]
    (tmp_path / "plan.json").write_text(json.dumps(old), encoding="utf-8")
    again = load_schedule(tmp_path, found.asked)
    assert again == found and again.expected == sum(found.seconds.values()) > 0
    others: tuple[object, ...] = ({**old, "seconds": 3}, {"asked": found.asked}, [])
    for damaged in others:
        (tmp_path / "plan.json").write_text(json.dumps(damaged), encoding="utf-8")
        assert load_schedule(tmp_path, found.asked) is None


def test_the_plan_is_told_with_its_end() -> None:
    lines = plan().lines()
    assert lines[0].startswith("Plan for 20 minutes: the end is expected about ")
    assert lines[0].endswith(" after the start")
    assert any(line.startswith("  two held-out halves: about") for line in lines)


def test_an_end_after_the_minutes_given_is_not_called_at_most() -> None:
    first = plan(minutes=0.1, pixels=10**9).lines()[0]
    assert "Plan for" not in first and "later than the 0.1 minutes given" in first


def test_a_network_that_lost_after_few_steps_in_little_time_is_told() -> None:
    halves = [[0, 1], [2, 3]]  # each learns half of the labels, so 200 of 400 steps would be fair
    plan = Schedule({"minutes": 20}, 400, 124, halves, 0, 0, {}, 1, [1, 1], {}, [])
    (line,) = plan.early_lines(spent=210)
    assert line.startswith("This took 3.5 min of the 20 minutes. Networks were judged after 124")
    assert "where 200 would be fair" in line and "--minutes 40" in line
    assert plan.early_lines(spent=601) == []
    for steps in (0, 200):  # none was compared, or fairly
        assert replace(plan, block_steps=steps).early_lines(spent=1) == []


def test_networks_that_lost_learn_longer_where_steps_are_faster_than_timed() -> None:
    halves, seconds = [[0, 1], [2, 3]], {"reading": 312.0, "halves": 248.0, "fine-tuning": 400.0}
    plan = Schedule({"minutes": 20}, 400, 124, halves, 0, 0, {}, 1, [1, 1], seconds, ["timed"])
    plan = replace(plan, rates={"step of fine-tuning": 1.0})
    # Of 1,080 s, 960 are planned; 648 of these were for steps, of which 248 are done.
    assert plan.longer(0.8) == {}  # as planned, nearly
    assert plan.longer(0.5) == {"fine_steps": 600, "block_steps": 300}  # 600 s of 644 that are left
    assert plan.longer(0.25) == {"fine_steps": 1200, "block_steps": 600}  # 600 s of 706
    assert replace(plan, block_steps=200).longer(0.25) == {}  # it was fair
    assert replace(plan, rates={}).longer(0.25) == {}  # of an earlier version
    again = plan.lengthened(plan.longer(0.25))
    assert (again.fine_steps, again.block_steps, again.longer(0.1)) == (1200, 600, {})
    assert "after 124 steps" in again.reasons[-1] and "after 600 steps" in again.reasons[-1]
    assert plan.lengthened({}) is plan
