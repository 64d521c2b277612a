"""The whole table: every method of the paper on one UNet, from one command."""

from __future__ import annotations

import os
import shlex
import sys
import time
from collections.abc import Iterable, Sequence
from contextlib import redirect_stdout
from pathlib import Path

from utils import leave_while_loading

if __name__ == "__main__":  # before the imports that take seconds
    leave_while_loading()

from comparison.devices import (
    Piece,
    command_words,
    device_names,
    do_piece,
    pieces_of,
    run_side_by_side,
    words_for,
)
from comparison.notes import write_table
from comparison.options import read_options
from comparison.pace import Pace, duration, timed
from comparison.plan import Plan, Work
from comparison.record import record_plan
from config import ConfigError
from report.results import write_results
from stages.job import unused_settings
from utils.commandline import complain, exit_code
from utils.files import remove_orphans
from utils.log import print_result, to_terminal
from utils.ranks import group

# Not the docstring, which python -OO drops.
ABOUT = """\
The whole table: every method of the paper on one UNet, from one command, with its uncertainty.

``python reproduce.py --data_dir dataset/steel`` runs what is not done yet, repeat by repeat, and
writes ``results/steel/table.md``. After an interruption the same command goes on, and the numbers
are those of an uninterrupted run. ``--plan`` says how long it will take, ``--report`` writes the
table from what is finished, ``--ablate ratio`` varies one setting, ``--devices 0,1`` uses two GPUs,
``--commands`` prints the runs for a scheduler. ``-h`` lists everything.
"""


def learn_pace(pace: Pace, works: Iterable[Work]) -> None:
    """Time a few steps of every kind of work whose duration is not known."""
    for work in works:
        if work.pace not in pace.seconds:
            to_terminal(f"Timing a few steps: {work.kind}")
            pace.learn(work.pace, timed(work.runner))


def tell_plan(plan: Plan) -> None:
    """Print how long the unfinished work will take; write nothing."""
    left, pace, total = plan.to_do(), Pace(None), len(plan.works())
    learn_pace(pace, left)
    to_terminal(f"{len(left)} of {total} pieces of work are to do, on this machine as busy as now:")
    for kind in dict.fromkeys(work.kind for work in left):
        own = {work: share for work, share in left.items() if work.kind == kind}
        each, number = pace.seconds[next(iter(own)).pace], sum(own.values())
        to_terminal(f"  {kind}: {number:.3g} x {duration(each)} = {duration(each * number)}")
    to_terminal(f"  all: {duration(pace.left((w.pace, left[w]) for w in left))}")
    first = [w for w in left if w.for_all or w.repeat == plan.repeats[0]]
    seconds = pace.left((w.pace, left[w]) for w in first)
    to_terminal(f"  of that, the first repeat of every row: {duration(seconds)}")


def write_report(plan: Plan) -> None:
    """Write the table from what is finished."""
    for line in plan.doubts():
        to_terminal(line)
    if not any(row.results for row in write_table(plan).rows):
        to_terminal(f"Warning: {plan.config.output_dir}: no run with a score; the table is empty")
    if not plan.options.path("run.json").exists():
        record_plan(plan)


def run_all(plan: Plan) -> None:
    """Do the unfinished work; write the table after each training with labels."""
    for folder in (plan.config.output_dir, plan.options.out):
        remove_orphans(folder)
    pace = Pace(Path(plan.config.output_dir) / f"{plan.config.name}_seconds.json")
    left, total = plan.to_do(), len(plan.works())
    to_terminal(f"{total - len(left)} of {total} pieces of work are finished")
    for line in plan.doubts():
        to_terminal(line)
    record_plan(plan, plan.options.command)
    write_table(plan)
    if plan.options.devices:
        run_on_devices(plan, left)
        return
    learn_pace(pace, left)
    for number, work in enumerate(tuple(left), total - len(left) + 1):
        ahead = duration(pace.left((w.pace, share) for w, share in left.items()))
        here = duration(pace.seconds[work.pace] * left[work])
        to_terminal(f"[{number} of {total}] {work.title}: about {here} of {ahead} that are left")
        started = time.monotonic()
        work.do()
        pace.learn(work.pace, time.monotonic() - started, left.pop(work))
        if work.runner.stage != "self":
            write_table(plan)


def run_on_devices(plan: Plan, left: Iterable[Work]) -> None:
    """Do the unfinished work in processes side by side, one on each device at a time."""
    options, script = plan.options, str(Path(__file__).resolve())
    devices = device_names(options.devices)

    def command(piece: Piece, device: str) -> list[str]:
        more = words_for(device, devices, plan.config.threads)
        return command_words(piece, options.argv, script, *more)

    def done(piece: Piece) -> None:
        tell_results(piece.works)
        write_table(plan)

    run_side_by_side(pieces_of(left), devices, command, done)


def tell_results(works: Iterable[Work]) -> None:
    """Write ``eval.txt`` of the experiments of some work that other processes did."""
    runners = [work.runner for work in works if work.runner.stage != "self"]
    experiments = {(r.run_dir.parent, r.stage): r.config for r in runners}
    for (folder, stage), config in experiments.items():
        write_results(folder, stage, unused_settings(config))


def run_by_ranks(plan: Plan) -> None:
    """Do the unfinished work under torchrun, each piece by a rank of its own."""
    keys = group.by_writer(lambda: [piece.key for piece in pieces_of(plan.to_do())])
    pieces = [piece for piece in pieces_of(plan.works()) if piece.key in keys]
    for first in (True, False):  # what others wait for
        for piece in group.share([p for p in pieces if p.works[0].for_all is first]):
            with group.alone():
                do_piece(plan, piece.key)
        group.meet()

    def collect() -> None:
        tell_results(plan.works())
        record_plan(plan, plan.options.command)
        write_table(plan)

    group.by_writer(collect)


def print_commands(plan: Plan) -> None:
    """Print a shell command for each run that is to do; those first that others wait for.

    It works from any folder: paths of the command line are relative to this one, as logs show them.
    """
    script, here = str(Path(__file__).resolve()), shlex.join(["cd", os.getcwd()])
    pieces, lines = pieces_of(plan.to_do()), []
    for first in (True, False):
        own = [piece for piece in pieces if piece.works[0].for_all is first]
        if own and any(piece.works[0].for_all for piece in pieces):
            lines.append("# first, because others wait for it:" if first else "# then:")
        for piece in own:
            words = command_words(piece, plan.options.argv, script)
            lines.append(f"{here} && {shlex.join(words)}")
    print_result("\n".join(lines))


def carry_out(plan: Plan) -> None:
    """What the options ask for."""
    options = plan.options
    if options.piece:
        do_piece(plan, options.piece)
        return
    if options.commands:
        print_commands(plan)
        return
    if options.plan:
        tell_plan(plan)
        return
    if group.size() > 1 and not options.report:
        run_by_ranks(plan)
    elif group.writes():
        (write_report if options.report else run_all)(plan)
    to_terminal(f"{options.out}: table written")


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code, see ``utils.commandline.exit_code``."""
    try:
        options = read_options(sys.argv[1:] if argv is None else argv, about=ABOUT)
    except ConfigError as error:
        return complain(str(error), 2)

    def work() -> None:
        with group.joined():
            if options.devices:
                device_names(options.devices)
            asked = {name for name in ("devices", "commands", "piece") if getattr(options, name)}
            if asked and group.size() > 1:
                raise ConfigError(f"--{min(asked)}: torchrun shares the runs already; leave it out")
            with redirect_stdout(sys.stderr if options.commands else sys.stdout), group.agreed():
                plan = Plan(options)
            problems = [] if options.piece else group.by_writer(plan.problems)
            group.refuse_together("\n".join(problems))
            carry_out(plan)

    return exit_code(work)


if __name__ == "__main__":
    sys.exit(main())
