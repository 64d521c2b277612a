"""A command line taken apart by hand."""

from __future__ import annotations

import argparse
import errno
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from config import FIELDS, ConfigError, parse_config
from imaging.field import Crop
from utils import leave
from utils.commandline import (
    MANY,
    NONE,
    ONE,
    Parser,
    Termination,
    TrainingError,
    UserError,
    choice_problems,
    exit_code,
    format_value,
    found,
    lack_of_memory,
    options_told,
    split_flags,
    termination_as_interrupt,
    value_of,
    value_problems,
)

ROOT = Path(__file__).resolve().parents[1]
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


def test_flags_and_words_that_belong_to_nobody() -> None:
    words = ["stray", "--zzz", "its value", "-y=1", "stray", "--out", "a", "--"]
    flags = split_flags(words, KINDS)
    expected = [("", "stray"), ("--", "zzz"), ("-", "y"), ("", "stray"), ("", "--")]
    assert list(flags.strangers()) == expected


@pytest.mark.parametrize(
    ("kind", "words", "value"),
    [
        ("bool", [], True),
        ("bool", ["OFF"], False),
        ("str", ["a", "b"], "a b"),
        ("str", ["none"], "none"),
        ("int", [" 7 "], 7),
        ("int | None", ["None"], None),
        ("float", ["1e-3"], 0.001),
        ("tuple[int, ...]", ["(8,16,", "32)"], (8, 16, 32)),
        ("tuple[float, ...]", [".5", "1"], (0.5, 1.0)),
        ("tuple[float, ...] | str", [".5", "1"], (0.5, 1.0)),
        ("tuple[float, ...] | str", ["word"], "word"),
        ("tuple[float, ...] | str", ["None"], ()),
        ("tuple[str, ...]", ["a b", "c"], ("a b", "c")),
        ("tuple[str, ...]", ["a", "b, c"], ("a b", "c")),
        ("tuple[str, ...]", ["none"], ()),
        ("tuple[int, ...]", [""], ()),
    ],
)
def test_values_that_words_spell(kind: str, words: list[str], value: object) -> None:
    assert value_of(kind, words) == value and type(value_of(kind, words)) is type(value)


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("bool", ["maybe"]),
        ("bool", [""]),
        ("str", []),
        ("int", ["1.0"]),
        ("int", ["none"]),
        ("float", ["x"]),
        ("tuple[int, ...]", ["1,x"]),
        ("tuple[int, ...]", []),
    ],
)
def test_words_that_spell_no_value(kind: str, words: list[str]) -> None:
    with pytest.raises(ValueError):
        value_of(kind, words)


def test_values_as_a_command_line_spells_them() -> None:
    values = {"32,64": (32, 64), "1e-4": 1e-4, "0.25": 0.25, "60.0": 60.0, "''": "", "None": None}
    assert [format_value(value) for value in values.values()] == list(values)
    assert format_value(()) == "''" and format_value(0.00025) == "0.00025"


def test_what_was_found_is_one_short_line() -> None:
    assert found("a") == "'a'" and found(3) == "3"
    assert len(found("x" * 999)) == 60 and found("x" * 999).endswith("...")
    assert found("a\nb\x1b[2J").isprintable()


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (UserError("one\ntwo"), 2, "one\ntwo\n"),
        (TrainingError("not finite"), 1, "not finite\n"),
        (
            KeyboardInterrupt(),
            130,
            "Interrupted. The same command goes on from the last saved state",
        ),
        (Termination(), 143, "Terminated. The same command goes on"),
        (MemoryError(), 2, "Out of memory; give a smaller batch"),
    ],
)
def test_what_ends_a_command_early_is_a_line_and_a_code(
    error: BaseException, code: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def work() -> None:
        raise error

    assert exit_code(work) == code
    shown = capsys.readouterr()
    assert shown.err.startswith(said) and shown.out == ""
    assert exit_code(lambda: None) == 0


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(errno.ENOMEM, "Cannot allocate memory"), "[Errno 12] Cannot allocate memory"),
        (RuntimeError("MPS backend out of memory (MPS allocated: 9 GB)."), "MPS backend out of m"),
        (RuntimeError("Caught RuntimeError in DataLoader worker process 0.\n  File\nRuntimeError: "
                      "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't "
                      "allocate memory: you tried to allocate 8 bytes. Error code 12 (Cannot)"),
         "DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"),
        (type("error", (Exception,), {})("(-4:Insufficient memory) Failed to allocate 9 bytes"),
         "(-4:Insufficient memory)"),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
         "CUBLAS_STATUS_ALLOC_FAILED"),
        (RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"),
         "DEVICE_ALLOCATION_FAILED"),
    ],
)  # fmt: skip
def test_lack_of_memory_is_told_by_what_each_library_says(error: Exception, said: str) -> None:
    found = lack_of_memory(error)
    assert found is not None and said in found and "enforce" not in found

    def work() -> None:
        raise error

    assert exit_code(work) == 2


@pytest.mark.parametrize(
    "error", [RuntimeError("shape mismatch"), OSError(errno.ENOSPC, "No space"), KeyError(3)]
)
def test_what_is_no_lack_of_memory_stays_a_fault(error: Exception) -> None:
    def work() -> None:
        raise error

    assert lack_of_memory(error) is None
    with pytest.raises(type(error)):
        exit_code(work)


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


COMMANDS = ("train", "train_defect", "predict", "reproduce", "segment", "dataset/prepare")


@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
@pytest.mark.parametrize(
    ("command", "number", "said", "code"),
    [
        *((command, signal.SIGINT, "Interrupted.\n", 130) for command in COMMANDS),
        ("benchmarks/step", signal.SIGINT, "Interrupted.\n", 130),
        ("train", signal.SIGTERM, "Terminated.\n", 143),
    ],
)
def test_a_command_that_is_interrupted_while_it_loads_ends_with_a_line(
    tmp_path: Path, command: str, number: signal.Signals, said: str, code: int
) -> None:
    # A torch that takes long to import, and would swallow an exception.
    (tmp_path / "torch.py").write_text(
        "import time\nprint('loading', flush=True)\ntry:\n    time.sleep(30)\n"
        "except BaseException:\n    print('swallowed', flush=True)\n"
    )
    with subprocess.Popen(
        [sys.executable, ROOT / f"{command}.py"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as process:
        assert process.stdout is not None and process.stdout.readline() == "loading\n"
        process.send_signal(number)
        assert process.communicate(timeout=20) == ("", said)
    assert process.returncode == code


@pytest.mark.slow
def test_who_imports_the_program_keeps_his_own_interrupts(tmp_path: Path) -> None:
    script = tmp_path / "predict.py"  # of the name of a command
    script.write_text(
        "import signal, utils, config_run\nprint(signal.getsignal(signal.SIGINT).__name__)\n"
    )
    done = subprocess.run(
        [sys.executable, script],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert done.stdout == "default_int_handler\n"


@pytest.mark.parametrize("other", [False, True])
def test_an_interrupt_while_a_zip_file_is_opened_is_one_line(other: bool) -> None:
    """What else happens where nobody can catch it is shown."""
    code = f"""if True:
        import sys, zipfile
        from utils.commandline import exit_code
        class Other:
            def __del__(self):
                raise OSError("lost")
        def interrupted(*_):
            {"Other()" if other else "pass"}
            raise KeyboardInterrupt
        zipfile._check_compression = interrupted
        sys.exit(exit_code(lambda: zipfile.ZipFile("a.zip") and 0))
    """
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert done.returncode == 130
    assert (done.stderr.count("\n") == 1) is not other, done.stderr
    assert ("OSError: lost" in done.stderr) is other and "ZipFile" not in done.stderr


def test_work_that_is_interrupted_says_how_it_goes_on(capsys: pytest.CaptureFixture[str]) -> None:
    before = signal.signal(signal.SIGINT, leave)
    try:
        assert exit_code(lambda: signal.raise_signal(signal.SIGINT)) == 130
        assert signal.getsignal(signal.SIGINT) is leave
    finally:
        signal.signal(signal.SIGINT, before)
    assert capsys.readouterr().err.startswith("Interrupted. The same command goes on")


@pytest.mark.parametrize(
    ("word", "said"),
    [("0,1", "; write 0.1"), ("-3,5e-2", "; write -3.5e-2"), ("1,2,3", ""), ("wide", "")],
)
def test_a_decimal_comma_is_answered_with_the_point(
    word: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    made = Parser(prog="segment.py")
    made.add_argument("--minutes", type=float)
    with pytest.raises(SystemExit) as left:
        made.parse_args([f"--minutes={word}"])
    assert left.value.code == 2
    line = f"argument --minutes: invalid float value: '{word}'{said}; --help lists the options\n"
    assert capsys.readouterr().err == f"segment.py: {line}"


def test_a_setting_with_a_decimal_comma_is_answered_alike() -> None:
    with pytest.raises(ConfigError, match=r"found '0,5'.*; write 0\.5$"):
        parse_config(["--fine_noise", "0,5"])


def small_parser() -> Parser:
    made = Parser(prog="predict.py")
    made.add_argument("--weights", required=True)
    made.add_argument("--mask_kind", default="auto")
    return made


def test_a_hyphen_in_a_name_is_an_underscore_and_one_in_a_value_stays() -> None:
    for words in (["--mask-kind", "a-b"], ["--mask_kind=a-b"], ["--mask-kind=a-b"]):
        given = small_parser().parse_args(["--weights", "my-run", *words])
        assert (given.weights, given.mask_kind) == ("my-run", "a-b")
    flags = split_flags(["--mask-kind=a-b", "-self-mode", "x-y", "--is-no"], {"mask_kind": ONE})
    assert flags.own == {"mask_kind": ["a-b"]} and flags.named == {"self_mode", "is_no"}
    assert flags.rest == ["-self-mode", "x-y", "--is-no"]  # as they were typed


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--wei w", "unknown option --wei; did you mean --weights?"),
        ("--weights w --mask-k ids", "unknown option --mask-k; did you mean --mask_kind?"),
        ("-weights w", "unknown option -weights; did you mean --weights?"),
        ("--mask-kint=ids", "unknown option --mask-kint; did you mean --mask_kind?"),
        ("--m", "unknown option --m; did you mean --mask_kind?"),
        ("--zzz=3", "unknown option --zzz; --help lists the options"),
    ],
)
def test_an_option_is_spelled_in_full(
    words: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as left:
        small_parser().parse_args(words.split())
    assert left.value.code == 2
    assert capsys.readouterr().err == f"predict.py: {said}\n"


def test_a_word_that_is_no_option_stays_where_it_belongs() -> None:
    made = Parser(prog="data_bar.py")
    made.add_argument("set")
    made.add_argument("--crop")
    given = made.parse_args(["--crop=-1,0,0,0", "--", "--my-set"])
    assert (given.crop, given.set) == ("-1,0,0,0", "--my-set")
    given, rest = made.parse_known_args(["x", "--crop=1,0,0,0", "--max-epoch", "3"])
    assert given.set == "x" and rest == ["--max_epoch", "3"]  # another parser's


def option_names(script: str) -> dict[str, Callable[[list[str]], object]]:
    """Each option of two words of a script, and what reads its command line."""
    import predict
    import segment
    from comparison.options import read_options
    from dataset import prepare

    def of(made: argparse.ArgumentParser) -> dict[str, Callable[[list[str]], object]]:
        names = [name for action in made._actions for name in action.option_strings]
        return dict.fromkeys([n for n in names if "_" in n], made.parse_args)

    if script == "train":
        return dict.fromkeys([f"--{n}" for n in FIELDS if "_" in n], parse_config)
    if script == "reproduce":
        return {"--fine_max_epoch": read_options, "--self_max_epoch": read_options}
    parsers = {"predict": predict.parser, "segment": segment.parser, "prepare": prepare._parser}
    return of(parsers[script]())


@pytest.mark.parametrize("script", ["train", "reproduce", "predict", "segment", "prepare"])
def test_both_spellings_of_every_option_are_read(
    script: str, capsys: pytest.CaptureFixture[str]
) -> None:
    options = option_names(script)
    words = ["--weights", "w", "--images", "i"] if script == "predict" else []
    assert options
    for name, read in options.items():
        assert "-" not in name.removeprefix("--")  # what --help shows
        said = []
        for spelled in (name, name.replace("_", "-")):
            try:
                read([*words, spelled])
                said.append("read")
            except (SystemExit, ConfigError) as error:
                said.append(capsys.readouterr().err or str(error))
        assert said[0] == said[1] and "unknown" not in said[0]


@pytest.mark.parametrize("script", ["segment", "predict"])
def test_the_smallest_particle_is_a_whole_number_of_pixels(
    script: str, capsys: pytest.CaptureFixture[str]
) -> None:
    import predict
    import segment

    made = {"segment": segment, "predict": predict}[script].parser()
    words = ["--images", "i", *(["--weights", "w"] if script == "predict" else [])]
    assert made.parse_args([*words, "--min_px", "10"]).min_px == 10
    with pytest.raises(SystemExit) as left:
        made.parse_args([*words, "--min_px", "10.5"])
    error = capsys.readouterr().err
    assert left.value.code == 2 and error.count("\n") == 1
    assert error.startswith(f"{script}.py: argument --min_px: invalid int value: '10.5'")


def test_every_command_line_is_read_by_the_same_rules() -> None:
    scripts = [*ROOT.glob("*.py"), *ROOT.glob("*/*.py")]
    ours = [path for path in scripts if path.parent.name != "tests"]
    assert not [p for p in ours if "argparse.ArgumentParser(" in p.read_text(encoding="utf-8")]


@pytest.mark.parametrize("words", [["--roi", ""], ["--roi="], ["--roi", "a", "", "--n", "1"]])
def test_an_empty_word_is_no_value(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    made = Parser(prog="x.py")
    made.add_argument("--roi", nargs="+")
    made.add_argument("--n")
    with pytest.raises(SystemExit) as left:
        made.parse_args(words)
    assert left.value.code == 2
    said = "x.py: --roi: no value found ('' was given); give one, or leave it out\n"
    assert capsys.readouterr().err == said


def test_a_list_may_begin_with_a_negative_number() -> None:
    made = Parser()
    made.add_argument("--crop")
    made.add_argument("--n", type=int)
    found = made.parse_args(["--crop", "-1,0,0,0", "--n", "-2"])
    assert (found.crop, found.n) == ("-1,0,0,0", -2)


def test_options_are_told_as_they_are_given() -> None:
    given: dict[str, object] = {
        "crop": Crop(bottom=60),
        "tta": True,
        "grain_classes": [1, 2],
        "tile": 9,
        "out": "x",
    }
    given |= {"sample": "a b", "class_names": ("x", "y z")}
    default: dict[str, object] = {
        "crop": Crop(),
        "tta": None,
        "grain_classes": [],
        "tile": 9,
        "sample": "",
    }
    told = options_told(given, default | {"class_names": ()})
    assert told.startswith("--crop 0,60,0,0 --tta --grain_classes 1 2 --sample 'a b'")
    assert told.endswith("--class_names 'x,y z'") and options_told(given, {"tile": 9}) == (
        "all as by default"
    )
