"""A training that may be killed at any moment: epochs, losses, log, states; knows no network.

All random numbers of an epoch follow from the seed and the epoch, so a run that was killed resumes
at the last saved epoch and ends as if it had not been.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from utils.checkpoint import CheckpointError, transfer
from utils.commandline import TrainingError, UserError
from utils.device import mixed_seed, precision, to_device
from utils.files import remove_leftovers
from utils.log import AverageMeter, RunLog, environment_line, format_epoch, progress, to_terminal
from utils.run_folder import RunFolder, differences

Batch = dict[str, Any]
Settings = Mapping[str, Any]


class Training:
    """What every stage of a run does: train epoch by epoch, log, save, resume when killed.

    A stage says what its network, optimizer, batches and losses are, and what it writes. What lies
    in its folder already is the business of ``RunFolder``.

    Args:
        config: the run's settings (``config.Config``), of which this looks at ``seed`` and those
            about running.
        folder: where it writes.
        device: where tensors live.
        amp: dtype of autocast, None for full precision.
    """

    stage: ClassVar[str]
    number: ClassVar[int]  # keeps the stages' random numbers apart

    def __init__(
        self, config: Any, folder: RunFolder, device: torch.device, amp: torch.dtype | None
    ) -> None:
        self.config, self.device, self.amp = config, device, amp
        self.folder, self.run_dir, self.state = folder, folder.path, folder.state
        self.evaluations: list[dict[str, Any]] = []
        self.settings: dict[str, Any] = {}
        self.environment = ""
        self.epochs: int = 0
        self.module: nn.Module
        self.optimizer: torch.optim.Optimizer
        self.batches: Any  # their number in an epoch is len(), epoch(number) gives them
        self.log: RunLog

    # What a stage is.

    def build(self) -> None:
        """Make ``module``, ``optimizer``, ``batches`` and the number of ``epochs``."""
        raise TypeError("a stage builds its own parts")

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """Losses of one batch by name; ``loss`` is the one that is followed."""
        raise TypeError("a stage has its own losses")

    def decisive_settings(self) -> dict[str, Any]:
        """What decides the result, as far as it is known before the stages ahead of this one."""
        raise TypeError("a stage knows what decides its result")

    def start_weights(self) -> dict[str, str]:
        """A digest of what the training starts from, where the seed does not decide it."""
        return {}

    def outputs(self) -> list[str]:
        """Names, relative to the run's folder, of the files that this stage writes alone."""
        return [f"log_{self.stage}.txt"]

    def foreign(self) -> list[Path]:
        """Files that are somebody's own or published ones if no state of this stage is there."""
        return [self.run_dir / name for name in self.outputs()]

    def header(self) -> list[str]:
        """What is trained on what, in words."""
        return []

    def epoch_done(self, epoch: int) -> None:
        """Evaluate or write a checkpoint if it is time; -1 stands for the start."""

    def finish(self) -> None:
        """Write what belongs at the end of the run."""

    # A run.

    def run(self) -> list[dict[str, Any]]:
        """Train to the end, or from where a killed run was saved; returns the evaluations."""
        state = self.ready()
        if state is not None and state["finished"]:
            to_terminal(f"{self.run_dir}: stage {self.stage} is finished already")
            self.state.remove_previous()
            return list(state["evaluations"])
        self.seed()
        self.build()
        resumed = state if state is not None and "module" in state else None
        first = self.restore(resumed) if resumed else self.begin()
        logged = resumed["log"] if resumed else None
        show = self.config.tensorboard
        with RunLog(self.run_dir, self.stage, logged, tensorboard=show) as self.log:
            self.write_head(first, resumed)
            self.train(first)
            self.finish()
        self.state.finish(self.snapshot(finished=True))
        return self.evaluations

    def identity(self) -> dict[str, Any]:
        """All that decides the result: a run on disk with another identity is another run."""
        return {**self.decisive_settings(), **self.start_weights()}

    def conflicts(self, settings: Settings) -> list[str]:
        """Why what the folder holds must be neither gone on with nor written over, a line each."""
        if self.config.overwrite:
            return []
        return self.folder.conflicts(settings, self.foreign(), self.compare)

    def compare(self, old: Settings, new: Settings) -> list[str]:
        """In what decisive settings on disk differ from those wanted, where it matters."""
        return differences(old, new)

    def ready(self) -> dict[str, Any] | None:
        """Look at what is there already; returns the state to go on from, if there is one.

        Raises:
            UserError: this stage must not run.
        """
        self.settings = self.identity()
        problems = self.conflicts(self.settings)
        if problems:
            raise UserError("\n".join(problems))
        remove_leftovers(self.run_dir)
        self.environment = environment_line(self.device, "bf16" if self.amp else "off")
        return self.saved(to_terminal)

    def saved(self, say: Callable[[str], object] | None = None) -> dict[str, Any] | None:
        """The state to go on from, None to start anew; see ``StateFile.load``."""
        if self.config.overwrite or self.config.resume == "never":
            return None
        return self.state.load(say)

    def begin(self) -> int:
        """Mark the folder as this run's, remove what an earlier one wrote; returns epoch 0."""
        self.folder.begin(self.snapshot())
        return 0

    def restore(self, state: Settings) -> int:
        """Take a saved state over; returns the epoch to go on with."""
        path = self.state.path
        try:
            transfer(self.module, state["module"], prefix="", source=path)
            self.optimizer.load_state_dict(state["optimizer"])
        except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
            tensors = f"{error}\n" if isinstance(error, CheckpointError) else ""  # named one by one
            raise CheckpointError(
                f"{tensors}{path}: does not fit this program; train again with --overwrite"
            ) from error
        self.evaluations = state["evaluations"]
        return int(state["epoch"])

    def snapshot(self, *, finished: bool = False, **more: Any) -> dict[str, Any]:
        """What every state of this run holds, and more."""
        common = {
            "settings": self.settings,
            "outputs": self.outputs(),
            "evaluations": self.evaluations,
            "finished": finished,
            "config": self.config.to_dict(),
            "environment": self.environment,
        }
        # Through text, so that the bytes do not tell which of these came out of a file.
        return {**json.loads(json.dumps(common)), **more}

    def save_state(self, epoch: int) -> None:
        """Save all that training needs to go on with ``epoch``."""
        self.state.save(
            self.snapshot(
                epoch=epoch,
                module=self.module.state_dict(),
                optimizer=self.optimizer.state_dict(),
                log=self.log.offsets(),
            )
        )

    def write_head(self, first: int, resumed: Settings | None) -> None:
        """Write the head of the log; of a resumed run, where it goes on and on which machine."""
        self.log.header([*self.header(), *self.config.describe(), self.environment])
        if resumed is None:
            self.epoch_done(-1)
            return
        self.log.note(f"Going on after epoch {first - 1} of the run that was stopped")
        if resumed["environment"] != self.environment:
            self.log.line(f"From epoch {first} on with {self.environment}")

    # Training.

    def seed(self, *numbers: int) -> None:
        """Seed PyTorch by the run's seed, the stage and more numbers."""
        torch.manual_seed(mixed_seed(self.config.seed, self.number, *numbers))

    def precision(self) -> AbstractContextManager[object]:
        """Autocast if asked for."""
        return precision(self.amp, self.device)

    def train(self, first: int) -> None:
        """Train the epochs from ``first`` on; save the state now and then."""
        saved = time.monotonic()
        with progress(self.epochs * len(self.batches), f"{self.run_dir.name} {self.stage}") as bar:
            bar.update(first * len(self.batches))
            for epoch in range(first, self.epochs):
                started = time.monotonic()
                self.train_epoch(epoch, bar.update)
                self.epoch_done(epoch)
                if epoch == first:
                    took = time.monotonic() - started
                    self.log.note(f"First epoch took {took:.1f} s, {self.epochs - first} to do")
                if epoch + 1 < self.epochs and time.monotonic() - saved >= self.config.save_seconds:
                    self.save_state(epoch + 1)
                    saved = time.monotonic()

    def train_epoch(self, epoch: int, step_done: Callable[[], object]) -> None:
        """One pass over the batches: one log line, one wait for the device."""
        self.module.train()
        meter = AverageMeter()
        names: list[list[str]] = []
        bad_step = torch.full((), float("inf"), device=self.device)
        for step, batch in enumerate(self.batches.epoch(epoch)):
            if step == 0:  # not sooner: worker processes that start draw from the same numbers
                self.seed(epoch + 1)
            names.append(batch["name"])
            with self.precision():
                losses = self.losses(to_device(batch, self.device))
            self.optimizer.zero_grad()
            losses["loss"].backward()
            self.optimizer.step()
            for name, value in losses.items():
                meter.add(name, value)
            finite = losses["loss"].detach().isfinite()
            bad_step = torch.where(finite, bad_step, bad_step.clamp(max=step))
            step_done()
        # The last step may have spoilt the weights after its own loss: they are about to be saved.
        learned = torch.stack([p.detach().sum() for p in self.module.parameters()])
        bad_step = torch.where(learned.isfinite().all(), bad_step, bad_step.clamp(max=step))
        meter.add("bad", bad_step)
        values = meter.read()
        bad, _ = values.pop("bad")
        if bad != float("inf"):
            raise TrainingError(
                f"{self.run_dir}: the numbers are not finite in epoch {epoch}, step {int(bad)} "
                f"({', '.join(names[int(bad)])}); what was saved before is kept. Look at these "
                "files, try a lower learning rate or --amp off"
            )
        rate = max(group["lr"] for group in self.optimizer.param_groups)
        line = format_epoch(epoch, self.epochs, len(names), len(names), values)
        self.log.line(f"{line} lr {rate:g}")
        averages = {name: average for name, (_, average) in values.items()}
        self.log.metrics({"epoch": epoch, **averages, "lr": rate})
