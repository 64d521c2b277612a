"""Steps replayed as a graph are the steps themselves: with a stand-in for CUDA, which needs none.

The stand-in records nothing; its replay computes the passes again, into the memory of the
recording, as a graph would.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import warnings
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock, Mock

import pytest
import torch
from torch import Tensor, nn

from benchmarks import step
from config_run import open_set
from stages.pretraining import SelfSupervised
from utils.cuda import step_graph
from utils.cuda.step_graph import Recording, StepGraphs


class Graph:
    """As ``torch.cuda.CUDAGraph``; ``of`` are the recordings."""

    of: list[Recording]
    modes: list[Any]  # whether what waits for the device is an error, as it was set
    passes: Any
    module: nn.Module

    def pool(self) -> str:
        return "pool"

    def replay(self) -> None:
        (own,) = (each for each in self.of if each.graph is self)
        own.forget()
        found = type(self).passes(own.batch)
        for name, loss in own.losses.items():
            loss.copy_(found[name])
        gradients = [p.grad for p in own.parameters]
        for kept, gradient in zip(own.gradients, gradients, strict=True):
            assert (kept is None) == (gradient is None)
            if kept is not None:
                kept.copy_(gradient)


@pytest.fixture
def standing_in(monkeypatch: pytest.MonkeyPatch) -> type[Graph]:
    @contextlib.contextmanager
    def recorded(graph: Graph, **how: Any) -> Iterator[None]:
        assert how["capture_error_mode"] == "thread_local"
        assert not gc.isenabled()  # which might destroy another graph
        state = Graph.module.state_dict()
        before = {name: tensor.clone() for name, tensor in state.items()}
        yield
        for name, tensor in state.items():  # nothing is computed while a graph is recorded
            tensor.copy_(before[name])

    Graph.of, Graph.modes = [], []
    new = Recording.__init__

    def noted(self: Recording, *given: Any) -> None:
        new(self, *given)
        Graph.of.append(self)

    monkeypatch.setattr(Recording, "__init__", noted)
    for name, fake in {
        "CUDAGraph": Graph,
        "Stream": lambda *given, **how: MagicMock(),
        "current_stream": MagicMock,
        "graph": recorded,
        "stream": lambda stream: contextlib.nullcontext(),
        "get_sync_debug_mode": lambda: 0,
        "set_sync_debug_mode": lambda mode: Graph.modes.append(mode),
    }.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    return Graph


class Small(nn.Module):
    """A network whose forward pass changes statistics, and a counter of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 1))
        self.unused = nn.Parameter(torch.ones(2))
        self.register_buffer("seen", torch.zeros(()))

    def passes(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        self.get_buffer("seen").add_(len(batch["x"]))
        loss = self.layers(batch["x"]).square().mean() * self.get_buffer("seen")
        loss.backward()
        return {"loss": loss.detach()}


def trained(graphs: bool, sizes: list[int]) -> tuple[list[float], dict[str, Tensor], list[int]]:
    """Losses, the end's state and the batches that have a graph, of a training on such batches."""
    torch.manual_seed(0)
    network = Small()
    optimizer = torch.optim.Adam(network.parameters(), 0.1)
    run = StepGraphs(network.passes, network) if graphs else network.passes
    if isinstance(run, StepGraphs):
        Graph.passes, Graph.module = network.passes, network
    losses = []
    for size in sizes:
        optimizer.zero_grad()
        losses.append(float(run({"x": torch.randn(size, 4)})["loss"]))
        optimizer.step()
    recordings = run.recordings.values() if isinstance(run, StepGraphs) else ()
    return losses, network.state_dict(), sorted(len(each.batch["x"]) for each in recordings)


@pytest.fixture
def few_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_graph, "MOST", 2)
    monkeypatch.setattr(step_graph, "WORTH", 3)


@pytest.mark.filterwarnings("ignore:Batches come in more")
@pytest.mark.usefixtures("few_graphs")
def test_a_replayed_training_is_the_training(standing_in: type[Graph]) -> None:
    """With batches of two shapes in turn, one of a third, which has no graph, and a new one."""
    sizes = [6, 6, 3, 6, 3, 5, 6, 3, 4, 4, 6, 4, 4, 4]
    losses, state, _ = trained(False, sizes)
    found, replayed, graphs = trained(True, sizes)
    assert found == losses and graphs == [4, 6]
    assert all(torch.equal(replayed[name], state[name]) for name in state)


@pytest.mark.filterwarnings("ignore:Batches come in more")
@pytest.mark.usefixtures("few_graphs")
@pytest.mark.parametrize(
    ("sizes", "graphs", "recorded"),
    [
        ([6], [6], 1),  # the first at once
        ([6, 3], [6], 1),
        ([3, 6, 6], [3, 6], 2),  # others when they recur
        ([6, 6, 6, 3, 6, 5, 6, 4, 6], [6], 1),
        ([6, 6, 6, 3] * 2 + [6, 6, 6, 5] * 2, [3, 6], 2),  # last partial batches
        ([6, 3, 3, *[6, 5, 5] * 4], [5, 6], 3),  # the other one is not met any more
        ([5, 3, 3, *[6] * 4], [3, 6], 3),
        ([5, 3, 3, *[6, 4] * 4], [4, 6], 4),
    ],
)
def test_what_recurs_has_a_graph(
    standing_in: type[Graph], sizes: list[int], graphs: list[int], recorded: int
) -> None:
    assert trained(True, sizes)[2] == graphs and len(standing_in.of) == recorded


def test_more_shapes_in_turn_than_graphs_are_said_once_and_record_no_more(
    standing_in: type[Graph], few_graphs: None
) -> None:
    """Not one after the other in the place of another: recording takes longer than steps do."""
    with pytest.warns(UserWarning, match=r"more than 2 shapes; .* slower: .*--fine_crop") as said:
        _, _, graphs = trained(True, [6, 3, 5, 4] * 12)
    assert len(said) == 1 and len(standing_in.of) == len(graphs) == 2


def test_a_shape_or_two_are_not_worth_a_word(standing_in: type[Graph]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert trained(True, [6, 6, 3] * 20)[2] == [3, 6]


@pytest.mark.filterwarnings("ignore:Batches come in more")
def test_a_graph_that_makes_room_is_gone_before_the_next_is_recorded_in_its_memory(
    standing_in: type[Graph], few_graphs: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The memory that graphs share is kept by those that are left; there must be one."""
    kept: list[weakref.ref[Recording]] = []
    there: list[int] = []  # graphs there are whenever one is recorded, and shares their memory
    noted = Recording.__init__

    def counting(self: Recording, *given: Any) -> None:
        standing_in.of.clear()  # which holds them, too
        there.append(sum(each() is not None for each in kept))
        assert [*given[3:]] == ["pool"] * min(there[-1], 1)
        kept.append(weakref.ref(self))
        noted(self, *given)

    monkeypatch.setattr(Recording, "__init__", counting)
    monkeypatch.setattr(Recording, "replay", lambda self, batch: self.losses)
    gc.disable()
    try:
        trained(True, [6, 3, 3, *[5] * 4])
    finally:
        gc.enable()
    assert there == [0, 1, 1]


def test_gradients_there_were_are_dropped_without_a_graph_too(standing_in: type[Graph]) -> None:
    torch.manual_seed(0)
    network = standing_in.module = Small()
    standing_in.passes = network.passes
    run, x = StepGraphs(network.passes, network), torch.randn(6, 4)
    run({"x": torch.randn(3, 4)})
    run({"x": x})
    found = [p.grad for p in network.parameters()]
    network.zero_grad()
    network.get_buffer("seen").fill_(3)
    network.passes({"x": x})
    assert len(standing_in.of) == 1
    for one, other in zip(found, (p.grad for p in network.parameters()), strict=True):
        assert (one is None) == (other is None)
        assert one is None or torch.equal(one, other)


def test_a_recording_changes_nothing(standing_in: type[Graph]) -> None:
    network = Small()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    standing_in.module = network
    Recording(network.passes, network, {"x": torch.randn(6, 4)})
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert all(parameter.grad is None for parameter in network.parameters())


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("was", [False, True])
def test_cycles_are_looked_for_before_a_recording_and_as_ever_after_it(
    standing_in: type[Graph], monkeypatch: pytest.MonkeyPatch, was: bool, fails: bool
) -> None:
    network = standing_in.module = Small()
    collected = Mock()
    monkeypatch.setattr(gc, "collect", collected)
    if fails:
        monkeypatch.setattr(torch.cuda, "graph", Mock(side_effect=RuntimeError("not permitted")))
    (gc.enable if was else gc.disable)()
    try:
        with pytest.raises(RuntimeError) if fails else contextlib.nullcontext():
            Recording(network.passes, network, {"x": torch.randn(6, 4)})
        assert gc.isenabled() is was and collected.call_count == 1
    finally:
        gc.enable()


def test_what_cannot_be_recorded_goes_on_without(
    standing_in: type[Graph], monkeypatch: pytest.MonkeyPatch
) -> None:
    why = "operation not permitted when stream is capturing\nmore of it"
    losses, state, _ = trained(False, [6, 6, 3])
    monkeypatch.setattr(torch.cuda, "graph", Mock(side_effect=RuntimeError(why)))
    with pytest.warns(UserWarning, match="slower: operation not permitted .* capturing$") as said:
        found, replayed, graphs = trained(True, [6, 6, 3])
    assert len(said) == 1 and graphs == [] and found == losses
    assert all(torch.equal(replayed[name], state[name]) for name in state)


def test_passes_that_wait_are_not_even_begun_to_be_recorded(
    standing_in: type[Graph], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A recording that breaks off keeps its memory for good in some versions of PyTorch."""
    begun = Mock()
    monkeypatch.setattr(torch.cuda, "graph", begun)
    network = Small()

    def passes(batch: dict[str, Tensor]) -> dict[str, Tensor]:
        if Graph.modes[-1:] == ["error"]:
            raise RuntimeError("called a synchronizing CUDA operation")
        return network.passes(batch)

    with pytest.warns(UserWarning, match="slower: called a synchronizing CUDA operation$"):
        StepGraphs(passes, network)({"x": torch.randn(6, 4)})
    assert Graph.modes == ["error", 0] and not begun.called


def test_passes_that_fail_before_a_recording_change_nothing(standing_in: type[Graph]) -> None:
    network = Small()
    before = {name: value.clone() for name, value in network.state_dict().items()}

    def passes(batch: dict[str, Tensor]) -> dict[str, Tensor]:
        network.passes(batch)
        raise RuntimeError("no kernel image is available")

    with pytest.raises(RuntimeError, match="no kernel image"):
        Recording(passes, network, {"x": torch.randn(6, 4)})
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert all(parameter.grad is None for parameter in network.parameters())


def test_memory_that_runs_out_is_said_as_such(
    standing_in: type[Graph], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "graph", Mock(side_effect=torch.OutOfMemoryError("none left")))
    with pytest.raises(torch.OutOfMemoryError):
        trained(True, [6])

    @contextlib.contextmanager
    def broken(graph: Graph, **how: Any) -> Iterator[None]:
        try:
            yield
        finally:
            try:
                raise RuntimeError("not permitted while a stream is captured")
            finally:
                raise RuntimeError("the recording was broken off")

    monkeypatch.setattr(torch.cuda, "graph", broken)
    passes = Mock(side_effect=[{}] * step_graph.WARM_UP + [torch.OutOfMemoryError("none left")])
    with pytest.raises(torch.OutOfMemoryError):
        StepGraphs(passes, Small())({"x": torch.randn(6, 4)})


@pytest.mark.parametrize("broken_off", [False, True])
def test_memory_that_runs_out_for_a_further_graph_ends_no_training(
    standing_in: type[Graph], monkeypatch: pytest.MonkeyPatch, broken_off: bool
) -> None:
    """It is enough without one, perhaps."""
    sizes = [6, 6, 3, 3, 6, 3, 5, 5]
    losses, state, _ = trained(False, sizes)
    whole = Recording.__init__

    def short(self: Recording, *given: Any) -> None:
        if given[3:]:
            try:
                raise torch.OutOfMemoryError("none left")
            finally:
                if broken_off:
                    raise RuntimeError("the recording was broken off")
        whole(self, *given)

    monkeypatch.setattr(Recording, "__init__", short)
    with pytest.warns(UserWarning, match="further shapes .* slower: memory ran out$") as said:
        found, replayed, graphs = trained(True, sizes)
    assert len(said) == 1 and graphs == [6] and found == losses
    assert all(torch.equal(replayed[name], state[name]) for name in state)


def test_what_a_recording_held_when_memory_ran_out_is_given_back_at_once(
    standing_in: type[Graph], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, held = Recording.__init__, list[weakref.ref[Tensor]]()

    def short(self: Recording, *given: Any) -> None:
        if given[3:]:
            activations = torch.zeros(3)
            held.append(weakref.ref(activations))
            raise torch.OutOfMemoryError("none left")
        whole(self, *given)

    monkeypatch.setattr(Recording, "__init__", short)
    gc.disable()  # which may come too late for the next step
    try:
        with pytest.warns(UserWarning, match="memory ran out"):
            trained(True, [6, 6, 3, 3])
        (activations,) = held
        assert activations() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("method", ["simclr", "moco"])
def test_a_replayed_epoch_of_pretraining_is_the_epoch(
    standing_in: type[Graph], method: str, tmp_path: Path
) -> None:
    """Bit by bit, with one graph for all steps: crops differ, the shapes of their plans do not."""
    case = {"method": method, "size": 16, "batch": 2, "steps": 1}
    config = step.config_of(case, tmp_path)
    how = {"repeats": "0", "device": "cpu", "amp": "off", "channels": (4, 8, 16, 32), "top_k": 2}
    states, logs = [], []
    for graphs in (False, True):
        stage = SelfSupervised(open_set(dataclasses.replace(config, **how).resolved())[0][0])
        stage.seed()
        stage.build()
        stage.log = Mock()
        if graphs:
            stage.graphs = StepGraphs(stage.passes, stage.module)
            standing_in.passes, standing_in.module = stage.passes, stage.module
        stage.train_epoch(0, lambda: None)
        states.append(stage.module.state_dict())
        logs.append(stage.log.line.call_args_list)
    assert len(standing_in.of) == 1 and logs[0] == logs[1]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_a_stage_that_is_done_gives_its_memory_back_at_once(tmp_path: Path) -> None:
    """Graphs, weights and moments: none waits until Python looks for cycles of references."""
    config = step.config_of({"method": "simclr", "size": 16, "batch": 2, "steps": 1}, tmp_path)
    how = {"repeats": "0", "device": "cpu", "amp": "off", "channels": (4, 8, 16, 32), "top_k": 2}
    stage = SelfSupervised(open_set(dataclasses.replace(config, **how).resolved())[0][0])
    stage.build()
    stage.device = torch.device("cuda")  # of which nothing is asked here
    stage.replay_steps()
    assert stage.graphs is not None
    left = [weakref.ref(each) for each in (stage.graphs, stage.module, stage.optimizer)]
    gc.disable()
    try:
        del stage
        assert [each() for each in left] == [None] * 3
    finally:
        gc.enable()
