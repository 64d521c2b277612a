"""The training loop: epochs, losses, log and states, for any network.

All random numbers of an epoch follow from the seed and the epoch, so a run that was killed resumes
from its last state, which may be of the middle of an epoch, and gives bit-equal results.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, closing, contextmanager
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from utils.checkpoint import CheckpointError, transfer, unfit
from utils.commandline import TrainingError, UserError
from utils.cuda.step_graph import StepGraphs
from utils.device import fuses_optimizers, mixed_seed, on_device, precision
from utils.files import remove_leftovers
from utils.log import (
    AverageMeter,
    RunLog,
    changed_source,
    environment_line,
    format_epoch,
    progress,
    remark,
    to_terminal,
)
from utils.ranks import group
from utils.ranks.tensors import sum_gradients, take_first_ranks
from utils.run_folder import Difference, RunFolder, differences

Batch = dict[str, Any]
Settings = Mapping[str, Any]
LONGER, ANEW = "longer", "anew"  # what becomes of a run on disk whose length is changed


class Training:
    """One stage of a run: train epoch by epoch, log, save, resume.

    Subclasses give the network, the optimizer, the batches, the losses and the outputs. ``config``
    is a ``config.Config``; ``amp`` is the dtype of autocast, None for full precision.
    """

    stage: ClassVar[str]
    number: ClassVar[int]  # part of the seed: stages draw different random numbers
    module: nn.Module
    optimizer: torch.optim.Optimizer
    batches: Any  # len() steps an epoch; epoch(number) yields them, epochs(numbers) ahead
    epochs: int
    log: RunLog

    def __init__(
        self, config: Any, folder: RunFolder, device: torch.device, amp: torch.dtype | None
    ) -> None:
        self.config, self.device, self.amp = config, device, amp
        self.folder, self.run_dir, self.state = folder, folder.path, folder.state
        self.evaluations: list[dict[str, Any]] = []
        self.settings: dict[str, Any] = {}
        self.about: list[str] = []  # header lines
        self.environment = ""
        self.within: dict[str, Any] = {}  # an epoch that has begun: what a state holds of it
        self.saved_at = time.monotonic()
        self.graphs: StepGraphs | None = None  # of the passes, where they are replayed
        self.coming: Iterator[Batch] | None = None  # of several epochs, see ``preparing``

    def build(self) -> None:
        """Make ``module``, ``optimizer``, ``batches`` and ``epochs``."""
        raise TypeError("a stage has its own")

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """Losses of one prepared batch by name; ``loss`` is the one that is minimised."""
        raise TypeError("a stage has its own")

    def prepared(self, batch: Batch) -> Batch:
        """What ``losses`` takes, made of a batch on the device by what the host decides."""
        return batch

    def passes(self, batch: Batch) -> dict[str, Tensor]:
        """Losses of one prepared batch, without their graph, and the gradients of the weights."""
        with self.precision():
            losses = self.losses(batch)
        losses["loss"].backward()
        return {name: value.detach() for name, value in losses.items()}

    def step(self, batch: Batch) -> dict[str, Tensor]:
        """Train on one prepared batch; returns its losses by name, which are not waited for."""
        self.optimizer.zero_grad()
        losses = (self.graphs or self.passes)(batch)
        sum_gradients(self.module.parameters())
        self.update()
        return losses

    def update(self) -> None:
        """Change the weights by their gradients."""
        self.optimizer.step()

    def more_state(self) -> dict[str, Any]:
        """What else a state holds, by name: objects with a ``state_dict``."""
        return {}

    def decisive_settings(self) -> dict[str, Any]:
        """What decides the result, as far as it is known before earlier stages have run."""
        raise TypeError("a stage has its own")

    def described(self) -> dict[str, Any]:
        """All settings, as the log and the report show them."""
        return dict(self.config.to_dict())

    def start_weights(self) -> dict[str, str]:
        """A digest of the pretrained weights, if any."""
        return {}

    def outputs(self) -> list[str]:
        """Files that only this stage writes, relative to the run's folder."""
        return [f"log_{self.stage}.txt"]

    def foreign(self) -> list[Path]:
        """Files that this program did not write if this stage has no state."""
        return [self.run_dir / name for name in self.outputs()]

    def header(self) -> list[str]:
        """Lines for the head of the log, warnings included; called after ``build``."""
        return []

    def epoch_done(self, epoch: int) -> None:
        """Evaluate or write a checkpoint when due; epoch -1 is the start."""

    def finish(self) -> None:
        """Write what belongs at the end of the run."""

    def run(self) -> list[dict[str, Any]]:
        """Train to the end, resuming a run that was killed; returns the evaluations.

        Of several ranks all train, and rank 0 reads and writes the run's folder.
        """
        ranks = group.names_ranks()
        state = group.by_writer(lambda: self.ready(ranks))
        if state and state["finished"]:
            return list(state["evaluations"])
        self.seed()
        self.build()
        self.about = group.by_writer(self.header)
        first = self.restore(state) if state else group.by_writer(self.begin)
        take_first_ranks(self.module)
        logged, events = self.logged(state) if state else None, self.config.tensorboard
        how: dict[str, Any] = {"enabled": group.writes(), "tensorboard": events}
        with RunLog(self.run_dir, self.stage, logged, **how) as self.log:
            self.write_head(state)
            if state and "longer" in state:
                self.save_state(first)  # from now on the folder holds the longer run
            self.train(first)
            group.by_writer(self.finish)
            self.log.require_files()
            last = self.whole_state(self.epochs, finished=True)
        group.by_writer(lambda: self.state.finish(last))
        self.release()
        return self.evaluations

    def release(self) -> None:
        """Let go of graphs and gradients, which hold most of a device's memory.

        Blocks that recompute refer to themselves, so Python keeps them until it looks for cycles.
        """
        self.graphs = None
        for parameter in self.module.parameters():
            parameter.grad = None

    def ready(self, ranks: str = "") -> dict[str, Any] | None:
        """The state on disk, finished or to resume from; UserError if this stage must not run.

        ``ranks`` says how many compute, for the log.
        """
        self.settings = self.identity()
        if problems := self.conflicts(self.settings):
            raise UserError("\n".join(problems))
        remove_leftovers(self.run_dir)
        self.environment = environment_line(self.device, "bf16" if self.amp else "off") + ranks
        state = self.saved(to_terminal)
        if state and state["finished"]:
            remark(f"{self.run_dir}: stage {self.stage} is finished already")
            for change in self.restyled(state):
                remark(f"Of no effect, as it is finished: {change}")
            if changed := changed_source(state["environment"]):
                remark(f"Warning: {self.run_dir}: stage {self.stage} was {changed}")
            for line in self.gone(state["outputs"]):
                to_terminal(line)
            self.state.remove_previous()
        return state

    def identity(self) -> dict[str, Any]:
        """Everything that decides the result; a run that differs in it is another run."""
        return {**self.decisive_settings(), **self.start_weights()}

    def conflicts(self, settings: Settings) -> list[str]:
        """Why the run on disk may be neither resumed nor overwritten, a line each."""
        if links := self.folder.links_out(self.outputs()):
            return links
        if self.config.overwrite:
            return []
        return self.folder.conflicts(settings, self.foreign(), self.compare)

    def compare(self, old: Settings, new: Settings) -> list[Difference]:
        """The decisive settings on disk that differ from the new ones."""
        return differences(old, new)

    def saved(self, say: Callable[[str], object] | None = None) -> dict[str, Any] | None:
        """The state of a run that is finished or can be resumed, None to start anew."""
        if self.config.overwrite or self.config.resume == "never":
            return None
        state = self.state.load(say)
        if not state or not (state["finished"] or "module" in state):
            return None
        change = self.new_length(state, self.settings or self.decisive_settings())
        if change == ANEW:
            if say is not None:
                say(
                    f"{self.run_dir}: stage {self.stage} is made anew, because {self.reason(state)}"
                )
            return None
        return {**state, "finished": False, "longer": True} if change == LONGER else state

    def new_length(self, state: Settings, settings: Settings) -> str:
        """How a state on disk serves a run whose settings are longer: ``LONGER`` or ``ANEW``.

        '' for a state of equal settings, and for one of another run.
        """
        return ""

    def reason(self, state: Settings) -> str:
        """Which lengths differ from those of a state on disk."""
        return "; ".join(map(str, differences(state["settings"], self.settings)))

    def begin(self) -> int:
        """Claim the folder and remove an earlier run's outputs; returns epoch 0."""
        self.folder.begin(self.snapshot())
        return 0

    def restore(self, state: Settings) -> int:
        """Load a saved state; returns the epoch to resume at."""
        path = self.state.path
        try:
            transfer(self.module, state["module"], prefix="", source=path)
            require_fitting(self.optimizer, state["optimizer"])
            self.optimizer.load_state_dict(state["optimizer"])
            for own in self.optimizer.param_groups:  # the state may come from another device
                if own.get("fused") and not fuses_optimizers(self.device):
                    own["fused"] = False
            for name, part in self.more_state().items():
                part.load_state_dict(state[name])
            if within := dict(state.get("within", {})):
                AverageMeter().go_on(within["meter"], self.device)
                torch.Generator().set_state(within["random"])
                within["steps"] = int(within["steps"])
                if not 0 < within["steps"] < len(self.batches):
                    raise ValueError("an epoch has other steps")
            self.within = within
        except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
            tensors = f"{error}\n" if isinstance(error, CheckpointError) else ""
            cure = "does not fit this program; train again with --overwrite"
            raise CheckpointError(f"{tensors}{path}: {cure}") from error
        self.evaluations = state["evaluations"]
        return int(state["epoch"])

    def logged(self, state: Settings) -> Mapping[str, int]:
        """Where the logs of a saved state go on, ``RunLog.offsets``."""
        return dict(state["log"])

    def gone(self, names: Iterable[str]) -> list[str]:
        """A warning if checkpoints among the outputs of this run are not there any more."""
        lost = [n for n in names if n.endswith(".pt") and not (self.run_dir / n).exists()]
        what = f"Warning: {self.run_dir}: {', '.join(lost)} was removed since this run wrote it"
        return lost and [f"{what}; --overwrite trains anew, should it be needed"]

    def write_head(self, resumed: Settings | None) -> None:
        """Write the head of the log; for a resumed run, its epoch and a changed environment."""
        described = self.config.describe(**self.described())
        self.log.header([*self.about, *described, self.environment])
        if resumed is None:
            self.epoch_done(-1)
            return
        run = "a run that is made longer" if "longer" in resumed else "the run that was stopped"
        where = f"after epoch {resumed['epoch'] - 1}"
        if steps := self.within.get("steps", 0):
            where = f"in epoch {resumed['epoch']}, after {steps} of {len(self.batches)} steps,"
        self.log.note(f"Going on {where} of {run}")
        longer = differences(resumed["settings"], self.settings) if "longer" in resumed else []
        for change in longer + self.restyled(resumed):
            self.log.line(f"From epoch {resumed['epoch']} on: {change}")
        for line in self.gone(resumed.get("written", ())):
            self.log.line(line)
        if resumed["environment"] != self.environment:
            self.log.line(f"From epoch {resumed['epoch']} on with {self.environment}")

    def restyled(self, state: Settings) -> list[Difference]:
        """Names, colours and grays of the classes that differ from those of a state."""
        new = self.config.appearance()
        old = replace(
            self.config, **{n: v for n, v in state.get("config", {}).items() if n in new}
        ).appearance()
        return differences(old, new)

    def snapshot(self, *, finished: bool = False, **more: Any) -> dict[str, Any]:
        """The entries of every state of this run, and ``more``."""
        common = {
            "settings": self.settings,
            "outputs": self.outputs(),
            "evaluations": self.evaluations,
            "finished": finished,
            "config": self.described(),
            "environment": self.environment,
            "about": self.about,
        }
        # Through JSON text: the bytes must not depend on whether entries were read from a file.
        return {**json.loads(json.dumps(common)), **more}

    def save_state(self, epoch: int) -> None:
        """Save everything needed to resume at ``epoch``."""
        if not group.writes():
            return
        self.log.require_files()  # or the folder would be made anew
        self.state.save(self.whole_state(epoch))

    def whole_state(self, epoch: int, *, finished: bool = False) -> dict[str, Any]:
        """Everything needed to go on in ``epoch``; at the end too, for a run that is lengthened."""
        parts = {"module": self.module, "optimizer": self.optimizer, **self.more_state()}
        states = {name: part.state_dict() for name, part in parts.items()}
        more = {"log": self.log.offsets(), "written": self.written()}
        more |= {"within": self.within} if self.within else {}
        return self.snapshot(finished=finished, epoch=epoch, **more, **states)

    def written(self) -> list[str]:
        """The checkpoints among the outputs that are there."""
        return [n for n in self.outputs() if n.endswith(".pt") and (self.run_dir / n).exists()]

    def seed(self, *numbers: int) -> None:
        """Seed PyTorch from the run's seed, the stage and ``numbers``."""
        torch.manual_seed(mixed_seed(self.config.seed, self.number, *numbers))

    def precision(self) -> AbstractContextManager[object]:
        """Autocast, if mixed precision is on."""
        return precision(self.amp, self.device)

    def train(self, first: int) -> None:
        """Train the epochs from ``first`` on; save the state every ``save_seconds``.

        With 0 seconds that is after every epoch, else also within one (``save_within``).
        """
        self.saved_at = time.monotonic()
        steps, within = self.epochs * len(self.batches), int(self.within.get("steps", 0))
        with (
            progress(steps, f"{self.run_dir.name} {self.stage}") as bar,
            self.preparing(first, self.epochs, within),
        ):
            bar.update(first * len(self.batches) + within)
            for epoch in range(first, self.epochs):
                started = time.monotonic()
                self.train_epoch(epoch, bar.update)
                self.log.require_files()  # before a checkpoint makes a removed folder anew
                self.epoch_done(epoch)
                if epoch == first:
                    took = time.monotonic() - started
                    self.log.note(f"First epoch took {took:.1f} s, {self.epochs - first} to do")
                if epoch + 1 < self.epochs and self.save_is_due():
                    self.save_state(epoch + 1)
                    self.saved_at = time.monotonic()

    @contextmanager
    def preparing(self, first: int, end: int, within: int = 0) -> Iterator[None]:
        """Within the block ``train_epoch``, called for these epochs in turn, finds them prepared.

        ``first`` begins after ``within`` steps, ``end`` is not among them. An epoch may be a single
        step; its batch is then made, and uploaded, while the device computes the step before.
        Worker processes draw from the run's generator when an epoch begins, and of ranks each may
        train alone for an epoch: there all begins with the epoch. The block ends the threads.
        """
        if self.config.workers or group.size() > 1:
            yield
            return
        made = self.batches.epochs(range(first, end), within)
        try:
            with closing(made), closing(on_device(made, self.device)) as self.coming:
                yield
        finally:
            self.coming = None

    def save_is_due(self) -> bool:
        """Whether ``save_seconds`` have passed since a state was saved."""
        return time.monotonic() - self.saved_at >= float(self.config.save_seconds)

    def save_within(self, epoch: int, steps: int, meter: AverageMeter) -> None:
        """Save a state after ``steps`` of an epoch, unless its numbers are not finite."""
        sound = math.isfinite(meter.read()["loss"][1])  # the mean, so all of them
        if sound and all_finite(self.module):
            random = torch.get_rng_state()
            self.within = {"steps": steps, "meter": meter.state(), "random": random}
            self.save_state(epoch)
            self.within = {}
        self.saved_at = time.monotonic()

    def train_epoch(self, epoch: int, step_done: Callable[[], object]) -> None:
        """One pass over the batches: one log line, one device synchronisation."""
        self.module.train()
        meter, begun, self.within = AverageMeter(), self.within, {}
        first, steps = int(begun.get("steps", 0)), len(self.batches)
        names: dict[int, list[str]] = {}
        bad_step = torch.full((), float("inf"), device=self.device)
        coming = self.coming or on_device(self.batches.epoch(epoch, first), self.device)
        for step, batch in enumerate(islice(coming, steps - first), first):
            if step == first:  # not sooner: starting worker processes draws from the same generator
                self.seed(epoch + 1)
                if begun:
                    meter.go_on(begun["meter"], self.device)
                    torch.set_rng_state(begun["random"])
            names[step] = batch["name"]
            batch = self.prepared(batch)  # under its name, so that what it was made of can go
            if step + 1 == steps:  # the logged rate, of this step
                rate = max(own["lr"] for own in self.optimizer.param_groups)
            losses = self.step(batch)
            for name, value in losses.items():
                meter.add(name, value)
            finite = losses["loss"].isfinite()
            bad_step = torch.where(finite, bad_step, bad_step.clamp(max=step))
            step_done()
            if self.config.save_seconds and step + 1 < steps and self.save_is_due():
                self.save_within(epoch, step + 1, meter)
        # The last step may have spoilt the weights after its finite loss; they are saved next.
        bad_step = torch.where(all_finite(self.module), bad_step, bad_step.clamp(max=step))
        meter.add("bad", bad_step)
        values = meter.read()
        bad, _ = values.pop("bad")
        if bad != float("inf"):  # on all ranks alike
            shown = [n for own in group.gather_objects(names[int(bad)]) for n in own]
            raise TrainingError(
                f"{self.run_dir}: the numbers are not finite in epoch {epoch}, step {int(bad)} "
                f"({', '.join(shown)}); what was saved before is kept. Look at these "
                "files, try a lower learning rate or --amp off"
            )
        line = format_epoch(epoch, self.epochs, steps, steps, values)
        self.log.line(f"{line} lr {rate:g}")
        averages = {name: average for name, (_, average) in values.items()}
        self.log.metrics({"epoch": epoch, **averages, "lr": rate})


@torch.no_grad()
def all_finite(module: nn.Module) -> Tensor:
    """Whether no weight is infinite or nan: one number, which is not waited for.

    By the largest size of a number of each weight, which is infinite or nan if one of them is, and
    never else: it is one of the numbers itself, where a sum, of squares all the more, may be too
    large for its type. A few calls for all weights, where ``isfinite`` takes some for each. MPS's
    maximum may pass over nan, so there sizes are added; the sum of weights that could still be
    trained is far from too large.
    """
    weights: list[Tensor] = list(module.parameters())
    norm = 1.0 if weights[0].device.type == "mps" else float("inf")
    return torch.stack(torch._foreach_norm(weights, norm)).isfinite().all()


def require_fitting(optimizer: torch.optim.Optimizer, saved: Mapping[str, Any]) -> None:
    """Raise ValueError unless a saved state is one of this optimizer.

    Its settings must be equal but for the rates, which a schedule may have changed, and for how the
    step is computed (``fused``), which older versions and other devices do otherwise; its
    averages must have the shapes of the parameters: PyTorch itself would stretch them.
    """
    groups, own = saved["param_groups"], optimizer.state_dict()["param_groups"]
    for old, new in zip(groups, own, strict=True):
        fixed = (old.keys() & new.keys()) - {"lr", "fused", "foreign"}
        if type(old["lr"]) is not float or any(old[name] != new[name] for name in fixed):
            raise ValueError("the optimizer has other settings")
    parameters = [p for own in optimizer.param_groups for p in own["params"]]
    for number, entry in saved["state"].items():
        tensors = {f"{number} {name}": value for name, value in entry.items()}
        shapes = {(), tuple(parameters[number].shape)}
        if any(tuple(value.shape) not in shapes for value in tensors.values()):
            raise ValueError("the optimizer's averages have other shapes")
        if problems := unfit(tensors):
            raise ValueError(problems[0])
