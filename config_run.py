"""Whole experiments: ``run(config)`` checks all it needs, then trains and scores."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch

import data
from config import Config, ConfigError
from dataset.check import DataReport, check_data
from imaging.index import index_file
from imaging.store import ImageStore
from model import METHODS
from report import page, results
from stages.finetuning import Finetune, Supervised
from stages.job import (
    Job,
    Runner,
    experiment_dir,
)
from stages.presets import read_config
from stages.pretraining import SelfSupervised
from utils.commandline import exit_code
from utils.device import (
    arithmetic,
    cache_bytes,
    choose_device,
    choose_precision,
    keep_freed_memory,
    size_of,
)
from utils.files import remove_orphans
from utils.log import require_tensorboard, to_terminal
from utils.run_folder import locked

STAGES: dict[str, type[Runner]] = {"self": SelfSupervised, "fine": Finetune, "sup": Supervised}


def run(config: Config, notes: Sequence[str] = (), *, store: ImageStore | None = None) -> None:
    """Check everything the experiment needs (UserError), then train and score.

    ``notes`` are lines for the head of the logs, such as why a preset chose what it did; ``store``
    is that of a set that was checked already, and is not read again.
    """
    config = config.resolved()
    if config.threads:
        torch.set_num_threads(config.threads)
    if config.tensorboard:
        require_tensorboard()
    keep_freed_memory()
    jobs, warnings = open_set(config, notes, store)
    runs = [(job, STAGES[name]) for job in jobs for name in config.stage_list]
    with ExitStack() as stack:
        stack.enter_context(arithmetic(jobs[0].amp, config.deterministic))
        for folder in dict.fromkeys(stage(job).run_dir for job, stage in runs):
            stack.enter_context(locked(folder))
        problems = [line for job, stage in runs for line in stage(job).problems()]
        if problems:
            raise ConfigError("\n".join(dict.fromkeys(problems)))
        jobs[0].store.keep_index()
        for folder in {stage(job).run_dir.parent for job, stage in runs}:
            remove_orphans(folder)  # of eval.txt and the report
        for warning in warnings:
            to_terminal(f"Warning: {warning}")
        for job, stage in runs:
            stage(job).run()
            if stage is not SelfSupervised:
                results.write_results(experiment_dir(config, stage.stage), stage.stage)
    scored = {experiment_dir(config, s): s for s in config.stage_list if s != "self"}
    if scored:
        to_terminal(results.results_table(scored))
    if config.report:
        for folder in dict.fromkeys(experiment_dir(config, s) for s in config.stage_list):
            to_terminal(f"Report: {page.write_report(folder)}")


def open_set(
    config: Config, notes: Sequence[str] = (), store: ImageStore | None = None
) -> tuple[list[Job], Sequence[str]]:
    """Decode and check the set (UserError); returns the runs and the warnings."""
    device, method = choose_device(config.device), METHODS[config.self_mode]
    amp = choose_precision(config.amp, device)
    report = (
        DataReport(store, ())
        if store
        else check_data(
            config.data_dir,
            num_classes=config.num_classes,
            image_size=config.image_size,
            ignore_label=config.ignore_label,
            stages=config.stage_list,
            sizes=config.sizes,
            repeats=config.repeat_list,
            use_unlabelled=config.use_unlabelled,
            self_mode_needs_groups=method.needs_groups,
            needs_annotated=method.needs_annotated,
            probe=config.probe > 0,
            self_crop=config.self_crop,
            fine_crop=config.fine_crop,
            cache=cache_bytes(config.cache),
            index=index_file(config.output_dir, config.data_dir),
        )
    )
    jobs = [
        Job(config, report.store, size, repeat, device, amp, tuple(notes))
        for size in config.sizes
        for repeat in data.annotated_repeats(config.data_dir, size, config.repeat_list)
    ]
    warnings = () if store else report.warnings + share_memory(report.store, config)
    return jobs, warnings


def share_memory(store: ImageStore, config: Config) -> tuple[str, ...]:
    """Divide the cache among the processes; a line if the set does not fit into it."""
    store.share(config.workers + 1)
    if store.cache is None or store.bytes_seen() <= store.cache:
        return ()
    needed, kept = size_of(store.bytes_seen()), size_of(store.cache)
    what = f"{config.data_dir}: its images take {needed}, of which {kept} are kept in memory"
    return (f"{what}; the others are read again whenever they are needed; --cache changes that",)


def main(
    argv: list[str] | None = None, prepare: Callable[[Config], None] | None = None, **defaults: Any
) -> int:
    """Run an experiment from the command line; returns the exit code, see ``exit_code``.

    ``argv`` overrides the script's ``defaults``; ``prepare`` gets the settings before the checks.
    """

    def work() -> None:
        config, notes = read_config(argv, **defaults)
        if prepare is not None:
            prepare(config)
        run(config, notes)

    return exit_code(work)
