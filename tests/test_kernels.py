"""The kernels for CUDA against their plain twins, by Triton's interpreter: no GPU is needed."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from unittest.mock import patch

import pytest
import torch

from pscl import assignment, fast_matching
from pscl.fast_matching import Limits
from tests.test_matching import UNDECIDED, generator, normalised, slow_match

triton = pytest.importorskip("triton")
LIMITS = Limits(candidates=5, slices=4, held=0, all_of=0)


INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # read when Triton is imported
interpreted = pytest.mark.skipif(not INTERPRETED, reason="run in a process of its own, see below")


@pytest.mark.slow
def test_interpreted_kernels_are_their_twins() -> None:
    words = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-k",
        "the_kernel",
        __file__,
    ]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    ran = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
    assert ran.returncode == 0 and "7 passed" in ran.stdout, ran.stdout


@interpreted
@pytest.mark.parametrize("case", [name for name in UNDECIDED if "more want" not in name])
def test_the_kernel_assigns_what_the_rule_assigns(case: str) -> None:
    template, keys, valid = UNDECIDED[case]
    kernels = importlib.import_module("pscl.kernels")
    with patch.object(fast_matching, "assign", kernels.assign):
        found = fast_matching.match(template, keys, valid, LIMITS)
    assert found.tolist() == slow_match(template, keys, valid)


@interpreted
@pytest.mark.parametrize("kind", ["real", "whole"])
def test_the_kernel_assigns_among_candidates_and_among_all(kind: str) -> None:
    random = generator(3)
    template, keys = normalised(1, 3, 12, seed=1)[0], normalised(2, 3, 280, seed=2)
    if kind == "whole":  # many cells are equal
        template = torch.randint(-1, 3, (3, 9), generator=random).float()
        keys = torch.randint(-1, 3, (2, 280, 3), generator=random).float().transpose(1, 2)
    valid = torch.arange(280) < torch.tensor([[280], [201]])
    kernels = importlib.import_module("pscl.kernels")
    with patch.object(fast_matching, "assign", kernels.assign):
        found = fast_matching.match(template, keys, valid, LIMITS)
    assert found.tolist() == slow_match(template, keys, valid)


def test_without_a_compiler_matching_goes_on_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton compiles its launcher with the machine's C compiler, which may be absent."""
    kernels = importlib.import_module("pscl.kernels")

    def broken(*inputs: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("Failed to find C compiler.\nPlease specify CC")

    monkeypatch.setattr(kernels, "assign", broken)
    monkeypatch.setattr(assignment, "without_kernel", False)
    template, keys = normalised(1, 4, 6, seed=1)[0], normalised(2, 4, 300, seed=2)
    valid = torch.ones(2, 300) > 0
    with patch.object(fast_matching, "assign", assignment.on_cuda):
        with pytest.warns(UserWarning, match="slower: Failed to find C compiler.$"):
            found = fast_matching.match(template, keys, valid)
        again = fast_matching.match(template, keys, valid)  # without another word
    assert found.tolist() == again.tolist() == slow_match(template, keys, valid)


@pytest.mark.slow
@pytest.mark.skipif(INTERPRETED, reason="nothing is compiled")
@pytest.mark.parametrize("capability", [75, 80, 90])
def test_a_kernel_compiles_for_the_usual_cards(capability: int) -> None:
    from triton.backends.compiler import GPUTarget

    kernels = importlib.import_module("pscl.kernels")
    pointers = {
        "*i64": ("cell", "sure", "chosen"),
        "*i1": ("highest", "valid"),
        "*fp32": ("template", "keys"),
        "*i32": ("taken",),
        "i32": ("templates", "cells", "dim", "length"),
        "constexpr": ("room", "width", "some"),
    }
    signature = {name: kind for kind, names in pointers.items() for name in names}
    constants = {"room": 64, "width": 64, "some": 128}
    source = triton.compiler.ASTSource(kernels._assign, signature, constants)
    assert triton.compile(source, target=GPUTarget("cuda", capability, 32)).asm["cubin"]
