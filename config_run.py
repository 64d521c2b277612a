"""Whole experiments: ``run(config)`` checks all it needs, then trains and scores."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

import data
from config import FIELDS, Config, ConfigError
from dataset.check import DataReport, check_data
from encoders import require_packages
from imaging.index import index_file
from imaging.store import ImageStore
from methods import Method
from model import METHODS
from report import page, results
from stages.finetuning import Finetune, Supervised
from stages.job import (
    FILES,
    Job,
    Runner,
    experiment_dir,
    unused_settings,
)
from stages.presets import read_config
from stages.pretraining import SelfSupervised
from utils.commandline import UserError, exit_code, split_flags
from utils.device import (
    arithmetic,
    cache_bytes,
    choose_device,
    choose_precision,
    keep_freed_memory,
)
from utils.files import confined, remove_orphans
from utils.log import require_tensorboard, to_terminal
from utils.ranks import group
from utils.run_folder import LOCK_FILE, locked

STAGES: dict[str, type[Runner]] = {"self": SelfSupervised, "fine": Finetune, "sup": Supervised}


def run(
    config: Config,
    notes: Sequence[str] = (),
    *,
    store: ImageStore | None = None,
    named: frozenset[str] | None = None,
) -> None:
    """Check everything the experiment needs (UserError), then train and score.

    ``notes`` are lines for the head of the logs, such as why a preset chose what it did; ``store``
    is that of a set that was checked already, and is not read again; ``named`` are the settings
    that the command line names, None if that is not known.
    """
    config = config.resolved()
    if config.threads:
        torch.set_num_threads(config.threads)
    if config.tensorboard:
        require_tensorboard()
    require_packages(config.encoder)
    keep_freed_memory()
    jobs, warnings = open_in_turn(config, notes, store)
    jobs = [dataclasses.replace(job, named=named) for job in jobs]
    runs = [(job, STAGES[name]) for job in jobs for name in config.stage_list]
    require_same(runs)
    with ExitStack() as stack:
        stack.enter_context(arithmetic(jobs[0].amp, config.deterministic))
        hold(stack, list(dict.fromkeys(stage(job).run_dir for job, stage in runs)))
        group.by_writer(lambda: begin(runs))
        for warning in warnings:
            to_terminal(f"Warning: {warning}")
        train(runs)
    group.by_writer(lambda: tell(config))


Run = tuple[Job, type[Runner]]


def hold(stack: ExitStack, folders: Sequence[Path]) -> None:
    """Lock the run folders for this command until the stack is closed (UserError)."""

    def lock() -> None:
        for folder in folders:
            stack.enter_context(locked(folder))

    group.by_writer(lock)
    with group.agreed():
        for folder in () if group.writes() else folders:
            stack.enter_context(confined(folder))
            if not (folder / LOCK_FILE).exists():
                what = f"{folder}: not seen here, where another rank made it"
                raise UserError(f"{what}; give an --output_dir that all machines share")


def begin(runs: Sequence[Run]) -> None:
    """Refuse runs that must not be made (ConfigError), and clear their folders."""
    problems = [line for job, stage in runs for line in stage(job).problems()]
    if problems:
        raise ConfigError("\n".join(dict.fromkeys(problems)))
    runs[0][0].store.keep_index()
    for folder in {stage(job).run_dir.parent for job, stage in runs}:
        remove_orphans(folder)  # of eval.txt and the report


def train(runs: Sequence[Run]) -> None:
    """Do the runs. Ranks pretrain together, then share the runs with labels, or their batches.

    They share batches where that is the better use, with at most half as many runs as ranks, and
    where every rank has a part. Of a single run with smaller batches rank 0 alone trains.
    """
    labelled = [run for run in runs if run[1] is not SelfSupervised]
    few = len(labelled) <= group.size() / 2 and all(s(j).fits_ranks() for j, s in labelled)
    if group.size() == 1 or few or len(labelled) < 2:
        for job, stage in runs:
            stage(job).run()
            if stage is not SelfSupervised and group.writes():
                write_results(job, stage)
        return
    train([run for run in runs if run[1] is SelfSupervised])
    for job, stage in group.share(labelled):
        with group.alone():
            stage(job).run()
    group.meet()
    if group.writes():
        for job, stage in labelled:
            write_results(job, stage)


def write_results(job: Job, stage: type[Runner]) -> None:
    """Write ``eval.txt`` of the experiment of a run."""
    folder = experiment_dir(job.config, stage.stage)
    results.write_results(folder, stage.stage, unused_settings(job.config))


def tell(config: Config) -> None:
    """Print the scores of all runs, and write the report if it is wanted."""
    scored = {experiment_dir(config, s): s for s in config.stage_list if s != "self"}
    if scored:
        to_terminal(results.results_table(scored, unused_settings(config)))
    if config.report:
        for folder in dict.fromkeys(experiment_dir(config, s) for s in config.stage_list):
            to_terminal(f"Report: {page.write_report(folder)}")


def require_same(runs: Sequence[Run]) -> None:
    """Raise UserError on all ranks unless all have the same device, settings and images."""
    if group.size() == 1:
        return
    with group.agreed():
        facts: dict[Any, Any] = {}
        for job, stage in runs:
            own = stage(job).decisive_settings()
            facts |= {"device": job.device.type} | {(stage.stage, n): v for n, v in own.items()}
    first, *others = group.gather_objects(facts)
    for number, found in enumerate(others, 1):
        if found != first:
            refuse_difference(number, first, found)


def refuse_difference(number: int, first: Mapping[Any, Any], found: Mapping[Any, Any]) -> None:
    """Raise UserError of the first thing in which a rank differs from rank 0."""
    name = next(name for name in [*first, *found] if first.get(name) != found.get(name))
    was, now = first.get(name), found.get(name)
    word = name if isinstance(name, str) else name[-1]
    what = f"{word}: rank 0 has {was}, rank {number} {now}"
    if word == FILES:
        what = f"data_dir: the images of rank {number} are not those of rank 0"
    cure = {
        FILES: "copy the same set to all machines, or give --data_dir on a shared file system",
        "device": "give --device cpu, or start ranks only where there is a GPU for each",
    }
    group.refuse_together(f"{what}; {cure.get(word, 'give the same command on all machines')}")


def open_in_turn(
    config: Config, notes: Sequence[str], store: ImageStore | None
) -> tuple[list[Job], Sequence[str]]:
    """``open_set`` by rank 0, then by the others, who do not read what its index knows."""
    for first in (True, False):
        with group.agreed():
            if group.writes() is first:
                jobs, warnings = open_set(config, notes, store)
                if group.size() > 1 and first:
                    for job in jobs:
                        for name in config.stage_list:
                            STAGES[name](job).decisive_settings()  # hashes, for the index
                    jobs[0].store.keep_index()
    return jobs, warnings


def open_set(
    config: Config, notes: Sequence[str] = (), store: ImageStore | None = None
) -> tuple[list[Job], Sequence[str]]:
    """Decode and check the set (UserError); returns the runs and the warnings."""
    device = choose_device(config.device)
    amp = choose_precision(config.amp, device)
    if store:
        report = DataReport(store, ())
    else:
        report = check_set(config, [METHODS[config.self_mode]], config.stage_list)
    jobs = [
        Job(config, report.store, size, repeat, device, amp, tuple(notes), ranks=group.size())
        for size in config.sizes
        for repeat in data.annotated_repeats(config.data_dir, size, config.repeat_list)
    ]
    if not store:
        report.store.share(config.workers + 1)
    return jobs, report.warnings


def check_set(
    config: Config,
    methods: Sequence[type[Method]],
    stages: Sequence[str],
    *,
    needs_test: bool = False,
) -> DataReport:
    """``check_data`` of all that these methods and stages need of the set of ``config``."""
    return check_data(
        config.data_dir,
        num_classes=config.num_classes,
        image_size=config.image_size,
        ignore_label=config.ignore_label,
        stages=stages,
        sizes=config.sizes,
        repeats=config.repeat_list,
        use_unlabelled=config.use_unlabelled,
        self_mode_needs_groups=config.batches == "names" and any(m.needs_groups for m in methods),
        needs_annotated=any(m.needs_annotated for m in methods),
        probe=config.probe > 0,
        needs_test=needs_test,
        self_crop=config.self_crop,
        fine_crop=config.fine_crop,
        single=config.fine_batch_size == 1,
        cache=own_cache(config.cache),
        index=index_file(config.output_dir, config.data_dir),
    )


def own_cache(text: str) -> int | None:
    """Bytes of ``--cache`` for this process: ranks of one machine divide them."""
    size = cache_bytes(text)
    return None if size is None else size // group.on_this_machine()


def named_in(words: Sequence[str]) -> frozenset[str]:
    """The settings that a command line names."""
    return frozenset(split_flags(words, {}).named) & FIELDS.keys()


def main(
    argv: list[str] | None = None, prepare: Callable[[Config], None] | None = None, **defaults: Any
) -> int:
    """Run an experiment from the command line; returns the exit code, see ``exit_code``.

    ``argv`` overrides the script's ``defaults``; ``prepare`` gets the settings before the checks.
    """

    def work() -> None:
        with group.joined():
            with group.agreed():
                config, notes = read_config(argv, **defaults)
            if prepare is not None:
                group.by_writer(lambda: prepare(config))
            run(config, notes, named=named_in(sys.argv[1:] if argv is None else argv))

    return exit_code(work)
