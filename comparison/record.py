"""Provenance of results: a JSON file for programs and the same in Markdown for people.

Several commands, perhaps on several machines, fill a folder of results: all are kept, in the order
of their first use.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from comparison.bootstrap import LEVEL, REPLICATES, SEED
from comparison.plan import Plan
from data import annotated_split, listed_split
from imaging.store import fingerprint
from stages.forest import forest_settings
from utils.files import read_plain, replace_file
from utils.log import environment_line


def record_plan(plan: Plan, command: str = "") -> None:
    """Write ``run.json`` and ``run.md`` of a table; ``command`` as for ``write_record``."""
    options, config = plan.options, plan.config
    annotated = [annotated_split(config.data_dir, plan.size, repeat) for repeat in plan.repeats]
    splits = ["train_numf", "test_numf", *["train_unlabelled"] * config.use_unlabelled, *annotated]
    samples = {split: listed_split(plan.store, config.data_dir, split) for split in splits}
    hashes = {split: fingerprint(found, plan.store) for split, found in samples.items()}
    names = {split: [sample.name for sample in samples[split]] for split in annotated}
    facts = {
        "budget": options.budget,
        "seed": config.seed,
        "bootstrap": {"replicates": REPLICATES, "seed": SEED, "level": LEVEL},
        "data": {s: {"images": len(samples[s]), "hash": hashes[s]} for s in samples},
        "annotated": names,
        "rows": {v.key: {"title": v.title, **dict(v.settings)} for v in options.variants},
        "settings": options.config.to_dict(),
        "forest": forest_settings(),
    }
    lines = ["Data (the hash is of names, decoded and resized pixels, and masks):", ""]
    lines += [f"- {s}: {len(samples[s])} images, {hashes[s]}" for s in samples]
    lines += ["", "Annotated images:", "", *(f"- {s}: {', '.join(names[s])}" for s in names)]
    lines += ["", f"Settings (budget {options.budget}, seed {config.seed}):", ""]
    lines += [f"- {line}" for line in options.config.describe()]
    amp = "bf16" if plan.amp is torch.bfloat16 else "off"
    packages = [f"{n} {_version(n)}" for n in ("scikit-learn", "opencv-python-headless", "pillow")]
    environment = ", ".join([environment_line(plan.device, amp), *packages])
    write_record(options.path("run.json"), command, environment, facts, lines)


def write_record(
    path: Path, command: str, environment: str, facts: Mapping[str, Any], lines: Sequence[str]
) -> None:
    """Write ``path`` (.json; a damaged one is replaced) and the file beside it that ends in .md.

    ``command`` is '' for one that computed nothing; ``environment`` is a line of versions and
    machine; ``facts`` are everything else, JSON-able, and ``lines`` the same for people.
    """
    old: dict[str, Any] = {}
    with suppress(OSError, ValueError, TypeError):
        old = dict(json.loads(read_plain(path)))
    used: dict[str, list[str]] = {}
    for name, new in (("commands", command), ("environments", environment)):
        before = old[name] if isinstance(old.get(name), list) else []
        used[name] = [text for text in dict.fromkeys([*before, new]) if text]
    record = json.dumps({**used, **facts}, indent=1, ensure_ascii=False)
    replace_file(path, record + "\n", "--out")
    text = ["# How these numbers came about", "", "Commands, in the order of their first use:", ""]
    text += [f"    {line}" for line in used["commands"]]
    text += ["", "Environments:", "", *(f"- {line}" for line in used["environments"]), ""]
    replace_file(path.with_suffix(".md"), "\n".join([*text, *lines]) + "\n", "--out")


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:  # OpenCV comes in packages of several names
        return "of another package"
