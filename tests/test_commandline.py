"""A command line taken apart by hand."""

from __future__ import annotations

import os
import signal
import sys
import threading

import pytest

from utils.commandline import (
    MANY,
    NONE,
    ONE,
    Termination,
    choice_problems,
    split_flags,
    termination_as_interrupt,
    value_problems,
)

KINDS = {"methods": MANY, "out": ONE, "plan": NONE}


def test_own_flags_and_the_rest() -> None:
    words = "--methods sup forest --image_size 188 -out here --plan --class_weight 1 2 --x=3 stray"
    flags = split_flags(words.split(), KINDS)
    assert flags.own == {"methods": ["sup", "forest"], "out": ["here"], "plan": []}
    assert flags.rest == ["--image_size", "188", "--class_weight", "1", "2", "--x=3", "stray"]
    assert flags.named == {"image_size", "class_weight", "x"}
    assert flags.one("out") == "here" and flags.one("methods") == "sup"
    assert flags.one("name", "other") == "other"
    assert value_problems(flags, KINDS) == []


def test_a_flag_takes_as_many_words_as_it_should() -> None:
    flags = split_flags(["--out", "a", "b", "--methods=c", "d", "-1"], KINDS)
    assert flags.own == {"out": ["a"], "methods": ["c"]} and flags.rest == ["b", "d", "-1"]
    assert split_flags(["--plan", "a"], KINDS).rest == ["a"]
    twice = split_flags(["--out", "a", "--out", "b"], KINDS)
    assert twice.own == {"out": ["b"]}


def test_values_that_are_missing_or_too_many() -> None:
    flags = split_flags(["--out", "--plan=yes", "--methods="], KINDS)
    assert value_problems(flags, KINDS) == [
        "--out: no value found",
        "--plan: found 'yes'; it takes no value",
        "--methods: no value found",
    ]


def test_a_word_near_a_known_one() -> None:
    assert choice_problems("budget", "cpu", ["paper", "cpu"]) == []
    assert choice_problems("budget", "cpuu", {"paper": 1, "cpu": 2}) == [
        "--budget: found 'cpuu'; allowed: paper, cpu; did you mean cpu?"
    ]
    assert choice_problems("budget", "zzz", ["paper"]) == ["--budget: found 'zzz'; allowed: paper"]


on_unix = pytest.mark.skipif(sys.platform == "win32", reason="signals as Unix knows them")


@on_unix
def test_sigterm_is_raised_as_an_interrupt() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt) as error, termination_as_interrupt():
        os.kill(os.getpid(), signal.SIGTERM)
        pytest.fail("went on")
    assert isinstance(error.value, Termination)
    assert signal.getsignal(signal.SIGTERM) is before


@on_unix
def test_another_thread_changes_nothing() -> None:
    before = signal.getsignal(signal.SIGTERM)
    seen: list[object] = []

    def work() -> None:
        with termination_as_interrupt():
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [before]
