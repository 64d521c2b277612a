"""The kernels for CUDA against their plain twins, by Triton's interpreter: no GPU is needed."""

from __future__ import annotations

import importlib
import math
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any
from unittest.mock import Mock, patch

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

import networks
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
        "the_kernel or the_check",
        __file__,
    ]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    ran = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
    assert ran.returncode == 0 and "34 passed" in ran.stdout, ran.stdout


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
    monkeypatch.setattr(assignment, "with_kernel", None)
    template, keys = normalised(1, 4, 6, seed=1)[0], normalised(2, 4, 300, seed=2)
    valid = torch.ones(2, 300) > 0
    with patch.object(fast_matching, "assign", assignment.on_cuda):
        with pytest.warns(UserWarning, match="slower: Failed to find C compiler.$"):
            found = fast_matching.match(template, keys, valid)
        again = fast_matching.match(template, keys, valid)  # without another word
    assert found.tolist() == again.tolist() == slow_match(template, keys, valid)


def test_lack_of_memory_is_no_fault_of_a_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = importlib.import_module("pscl.kernels")
    monkeypatch.setattr(kernels, "assign", Mock(side_effect=torch.OutOfMemoryError("none left")))
    monkeypatch.setattr(assignment, "with_kernel", True)
    template, keys = normalised(1, 4, 6, seed=1)[0], normalised(2, 4, 300, seed=2)
    with (
        patch.object(fast_matching, "assign", assignment.on_cuda),
        pytest.raises(torch.OutOfMemoryError),
    ):
        fast_matching.match(template, keys, torch.ones(2, 300) > 0)
    assert assignment.with_kernel is True


def test_a_kernel_that_chooses_wrongly_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = importlib.import_module("pscl.kernels")
    monkeypatch.setattr(kernels, "assign", lambda cell, sure, *others: torch.zeros_like(sure))
    monkeypatch.setattr(assignment, "with_kernel", None)
    template, keys = normalised(1, 4, 6, seed=1)[0], normalised(2, 4, 300, seed=2)
    valid = torch.ones(2, 300) > 0
    with (
        patch.object(fast_matching, "assign", assignment.on_cuda),
        pytest.warns(UserWarning, match="slower: its choices differ"),
    ):
        found = fast_matching.match(template, keys, valid)
    assert found.tolist() == slow_match(template, keys, valid) and assignment.with_kernel is False


# --- LayerNorm and LeakyReLU ----------------------------------------------------------------------


@interpreted
@pytest.mark.parametrize("channels", [32, 24])
def test_the_kernel_of_norm_and_activation_is_pytorchs(channels: int) -> None:
    """Values and all gradients, of more rows than programs of the backward pass hold."""
    row_norm = importlib.import_module("utils.cuda.row_norm")
    random = generator(channels)
    rows = torch.randn(3, 50, channels, generator=random).transpose(0, 1)  # not in one piece
    weight, bias = torch.randn(2, channels, generator=random)
    inputs = [x.clone().requires_grad_() for x in (rows, weight, bias)]
    others = [x.clone().requires_grad_() for x in (rows, weight, bias)]
    with patch.object(row_norm, "PROGRAMS", 2), patch.object(row_norm, "TILE", 256):
        found = row_norm.norm_leaky(*inputs, 1e-5, 0.01)
        (found * rows.cos()).sum().backward()
    normed = F.layer_norm(others[0], (channels,), others[1], others[2], 1e-5)
    expected = F.leaky_relu(normed, 0.01)
    (expected * rows.cos()).sum().backward()
    torch.testing.assert_close(found, expected)
    for own, other in zip(inputs, others, strict=True):
        torch.testing.assert_close(own.grad, other.grad, rtol=1e-4, atol=1e-5)


@interpreted
def test_the_kernel_gives_rows_of_another_type() -> None:
    """ReLU of the projection heads: bf16 in, single precision out."""
    row_norm = importlib.import_module("utils.cuda.row_norm")
    rows = torch.randn(40, 32, generator=generator(1)).bfloat16().requires_grad_()
    weight, bias = torch.randn(2, 32, generator=generator(2))
    found = row_norm.norm_leaky(rows, weight, bias, 1e-5, 0.0, torch.float32)
    expected = F.layer_norm(rows.float(), (32,), weight, bias, 1e-5).relu()
    torch.testing.assert_close(found, expected)
    own, other = (torch.autograd.grad(x.square().sum(), rows)[0] for x in (found, expected))
    torch.testing.assert_close(own.float(), other.float(), rtol=1e-2, atol=1e-2)


@interpreted
def test_the_check_of_batch_norm_takes_rows_and_programs_as_given() -> None:
    kernels = importlib.import_module("utils.cuda.batch_norm")
    taken = []

    def noted(rows: torch.Tensor, *more: Any) -> torch.Tensor:
        taken.append((tuple(rows.shape), more[-1]))
        return statistics(rows, *more)

    statistics = kernels.take_statistics
    with patch.object(kernels, "take_statistics", noted):
        kernels.check(torch.device("cpu"), torch.float32, ((900, 5), (40, 256)), 6)
    assert taken == [((900, 5), 6), ((40, 256), 6)]


@interpreted
@pytest.mark.parametrize("name", ["row_norm", "batch_norm"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_kernel_passes_its_own_check(dtype: torch.dtype, name: str) -> None:
    kernels = importlib.import_module(f"utils.cuda.{name}")
    kernels.check(torch.device("cpu"), dtype)

    def block(x: torch.Tensor) -> torch.Tensor:
        kernels.check(torch.device("cpu"), dtype)  # at its first use, perhaps in such a block
        return x.exp().sin()

    x = torch.ones(3, requires_grad=True)
    checkpoint(block, x, use_reentrant=False).sum().backward()
    torch.testing.assert_close(x.grad, torch.full((3,), math.e * math.cos(math.e)))


@interpreted
@pytest.mark.parametrize("name", ["row_norm", "batch_norm"])
def test_the_kernel_passes_its_own_check_by_far(name: str) -> None:
    """A card adds in another order: what is right must not be next to the limit."""
    kernels, rows = (importlib.import_module(f"utils.cuda.{each}") for each in (name, "rows"))
    with patch.dict(rows.TOLERANCE, {torch.float32: rows.TOLERANCE[torch.float32] / 20}):
        kernels.check(torch.device("cpu"), torch.float32)


@interpreted
@pytest.mark.parametrize("number", [0, 1])
def test_the_check_takes_a_kernel_for_wrong_whose_statistics_stay(number: int) -> None:
    """Of as many rows as the numbers' period, whose mean may be 0: rounding would be an error."""
    kernels = importlib.import_module("utils.cuda.batch_norm")
    given: tuple[Any, ...] = (torch.device("cpu"), torch.float32, ((2 * 1009, 32),), 6)
    kernels.check(*given)
    whole = kernels.take_statistics

    def forgetful(rows: torch.Tensor, *more: Any) -> torch.Tensor:
        running = list(more)
        running[number] = more[number].clone()
        return whole(rows, *running)

    with (
        patch.object(kernels, "take_statistics", forgetful),
        pytest.raises(RuntimeError, match="differ from PyTorch's"),
    ):
        kernels.check(*given)


LAID_OUT: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "columns": lambda x: x.T.contiguous().T,
    "every second": lambda x: x.repeat_interleave(2, dim=1)[:, ::2],
}


@interpreted
@pytest.mark.parametrize("layout", LAID_OUT)
def test_the_kernel_assigns_whatever_the_layout(layout: str) -> None:
    """Its results lie in rows, however its inputs lie in memory."""
    template, keys = normalised(1, 3, 12, seed=1)[0], normalised(2, 3, 280, seed=2)
    valid = LAID_OUT[layout](torch.arange(280) < torch.tensor([[280], [201]]))
    kernel = importlib.import_module("pscl.kernels").assign

    def laid_out(cell: torch.Tensor, sure: torch.Tensor, *others: torch.Tensor) -> torch.Tensor:
        return kernel(cell, LAID_OUT[layout](sure), *others)  # type: ignore[no-any-return]

    with patch.object(fast_matching, "assign", laid_out):
        found = fast_matching.match(template, keys, valid, LIMITS)
    assert found.tolist() == slow_match(template, keys, valid)


@interpreted
def test_the_kernel_of_batch_norm_is_that_of_double_precision() -> None:
    """Values, all gradients and running statistics; far from 0, where squares would say nothing."""
    batch_norm = importlib.import_module("utils.cuda.batch_norm")
    random = generator(4)
    rows = 50 + 0.01 * torch.randn(333, 24, generator=random)
    weight, bias, mean, variance = torch.rand(4, 24, generator=random)
    gradient = torch.randn(333, 24, generator=random)

    def of(run: Callable[..., Any], dtype: torch.dtype) -> list[torch.Tensor]:
        learnt = [x.to(dtype, copy=True).requires_grad_() for x in (rows, weight, bias)]
        running = [x.to(dtype, copy=True) for x in (mean, variance)]
        result = run(*learnt, *running)
        return [result, *torch.autograd.grad((result * gradient).sum(), learnt), *running]

    def plain(x: Any, weight: Any, bias: Any, mean: Any, variance: Any) -> torch.Tensor:
        normed = F.batch_norm(x, mean, variance, weight, bias, True, 0.1, 1e-5)
        return torch.where(normed > 0, normed, 0.01 * normed)

    with patch.object(batch_norm, "PROGRAMS", 2), patch.object(batch_norm, "TILE", 256):
        found = of(lambda *given: batch_norm.norm_leaky(*given, 0.1, 1e-5, 0.01), torch.float32)
    expected, atols = of(plain, torch.float64), (1e-3, 0.1, 1e-2, 1e-3, 1e-5, 1e-7)
    for own, other, atol in zip(found, expected, atols, strict=True):
        torch.testing.assert_close(own.double(), other, rtol=1e-3, atol=atol)


def norm_of(name: str) -> Callable[..., torch.Tensor]:
    """``norm_leaky`` of rows, weight and bias."""
    kernel = importlib.import_module(f"utils.cuda.{name}").norm_leaky

    def run(rows: torch.Tensor, *learnt: torch.Tensor) -> torch.Tensor:
        channels = rows.shape[-1]
        running = (torch.zeros(channels), torch.ones(channels), 0.1)
        found: torch.Tensor = kernel(
            rows, *learnt, *(running if name == "batch_norm" else ()), 1e-5, 0.01
        )
        return found

    return run


@interpreted
@pytest.mark.parametrize("name", ["row_norm", "batch_norm"])
def test_the_kernel_refuses_a_second_derivative(name: str) -> None:
    """PyTorch's norms have one; beside other terms it would be 0 here, without a word."""
    rows, weight, bias = torch.randn(20, 8), torch.ones(8), torch.zeros(8)
    rows.requires_grad_()
    loss = norm_of(name)(rows, weight, bias).square().sum()
    (gradient,) = torch.autograd.grad(loss, rows, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice a function"):
        gradient.square().sum().backward()


LAYOUTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "columns": lambda x: x.T.contiguous().T,  # of a map that is not channels-last
    "parts": lambda x: x[::2, 1::3],
    "few": lambda x: x[:, 3:6],
    "half": lambda x: x.half(),
}


@interpreted
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["row_norm", "batch_norm"])
def test_the_kernel_takes_any_layout_and_type(name: str, layout: str) -> None:
    random, rows_of = generator(5), LAYOUTS[layout]
    x = torch.randn(70, 24, generator=random)
    channels = rows_of(x).shape[1]
    weight, bias = torch.randn(2, channels, generator=random)
    gradient = torch.randn(rows_of(x).shape, generator=random)
    inputs, others = ([y.clone().requires_grad_() for y in (x, weight, bias)] for _ in range(2))
    found = norm_of(name)(rows_of(inputs[0]), *inputs[1:])
    (found * gradient).sum().backward()
    rows = rows_of(others[0]).float()
    if name == "batch_norm":
        normed = F.batch_norm(rows, None, None, others[1], others[2], True)
    else:
        normed = F.layer_norm(rows, (channels,), *others[1:])
    (F.leaky_relu(normed) * gradient).sum().backward()
    assert found.dtype == rows_of(x).dtype
    close = {"rtol": 1e-2, "atol": 2e-2} if layout == "half" else {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(found.float(), F.leaky_relu(normed), **close)
    for own, other in zip(inputs, others, strict=True):
        torch.testing.assert_close(own.grad, other.grad, **close)


@interpreted
def test_the_kernel_of_norms_takes_no_rows() -> None:
    rows, weight, bias = torch.randn(0, 5, 8), torch.ones(8), torch.zeros(8)
    learnt = [x.requires_grad_() for x in (rows, weight, bias)]
    found = norm_of("row_norm")(*learnt)
    assert found.shape == rows.shape
    assert not any(g.any() for g in torch.autograd.grad(found.sum(), learnt))


@interpreted
def test_the_kernel_of_batch_norm_follows_nan_as_pytorch_does() -> None:
    """Running statistics that stayed finite would hide where a network broke."""
    batch_norm = importlib.import_module("utils.cuda.batch_norm")
    rows = torch.randn(40, 3)
    rows[7, 1] = math.nan
    weight, mean, variance = torch.rand(3, 3)
    batch_norm.norm_leaky(rows, weight, weight, mean, variance, 0.3, 1e-5, 0.01)
    for own in (mean, variance):
        assert own.isnan().tolist() == [False, True, False]


def test_a_norm_kernel_with_other_numbers_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    row_norm = importlib.import_module("utils.cuda.row_norm")
    monkeypatch.setattr(row_norm, "forward", lambda rows, *others: rows + 1)
    monkeypatch.setattr(row_norm, "backward", lambda gradient, rows, w, b, *others: (rows, w, b))
    with pytest.warns(UserWarning, match="slower: its numbers differ from PyTorch's by"):
        assert (
            networks.norm_kernel.__wrapped__("row_norm", torch.device("cpu"), torch.float32) is None
        )


@pytest.mark.slow
@pytest.mark.skipif(INTERPRETED, reason="nothing is compiled")
@pytest.mark.parametrize("capability", [75, 80, 90])
def test_a_kernel_compiles_for_the_usual_cards(capability: int) -> None:
    from triton.backends.compiler import GPUTarget

    kernels, row_norm = (
        importlib.import_module(n) for n in ("pscl.kernels", "utils.cuda.row_norm")
    )
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
    sources = [triton.compiler.ASTSource(kernels._assign, signature, constants)]
    rows = dict.fromkeys(("gradient", "rows", "result"), "*bf16")
    rows |= dict.fromkeys(("weight", "bias", "sums"), "*fp32")
    rows |= {"count": "i32", "channels": "i32", "programs": "i32", "eps": "fp32", "slope": "fp32"}
    blocks = {"width": 32, "block": 128}
    kernels_of: list[tuple[Any, dict[str, int]]] = [
        (row_norm._forward, blocks),
        (row_norm._backward, blocks),
        (row_norm._backward, {**blocks, "programs": 1}),  # of few rows: Triton takes in a 1
    ]
    batch_norm = importlib.import_module("utils.cuda.batch_norm")
    rows |= dict.fromkeys(("statistics", "mean", "variance", "found"), "*fp32")
    rows |= {"momentum": "fp32"}
    kernels_of += [(batch_norm._forward, blocks), (batch_norm._backward, blocks)]
    for few in ({}, {"programs": 1}):
        kernels_of += [
            (batch_norm._sums, {**blocks, **few}),
            (batch_norm._merge, {"some": 1024, **few}),
            (batch_norm._sums_backward, {**blocks, **few}),
        ]
    for kernel, constants in kernels_of:
        kinds = {n: "constexpr" if n in constants else rows[n] for n in kernel.arg_names}
        sources.append(triton.compiler.ASTSource(kernel, kinds, constants))
    for source in sources:
        assert triton.compile(source, target=GPUTarget("cuda", capability, 32)).asm["cubin"]
