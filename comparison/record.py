"""How results came about: a JSON file for programs and the same in Markdown for people.

A folder of results is filled by several commands, perhaps on several machines: what was used before
is kept, in the order of its first use.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from utils.files import replace_file


def write_record(
    path: Path, command: str, environment: str, facts: Mapping[str, Any], lines: Sequence[str]
) -> None:
    """Write ``path`` (.json) and the file beside it that ends in .md.

    Args:
        path: of the JSON file; what it holds of commands and environments is kept. A damaged one
            is written anew.
        command: as it was typed; '' for one that computed nothing.
        environment: versions and machine, one line.
        facts: everything else, JSON-able.
        lines: the facts for people.

    Raises:
        UserError: a file cannot be written.
    """
    old: dict[str, Any] = {}
    with suppress(OSError, ValueError, TypeError):
        old = dict(json.loads(path.read_text(encoding="utf-8")))
    used: dict[str, list[str]] = {}
    for name, new in (("commands", command), ("environments", environment)):
        before = old.get(name) if isinstance(old.get(name), list) else []
        used[name] = [text for text in dict.fromkeys([*(before or []), new]) if text]
    record = {**used, **facts}
    replace_file(path, json.dumps(record, indent=1, ensure_ascii=False) + "\n", "--out")
    text = ["# How these numbers came about", "", "Commands, in the order of their first use:", ""]
    text += [f"    {line}" for line in used["commands"]]
    text += ["", "Environments:", "", *(f"- {line}" for line in used["environments"]), ""]
    replace_file(path.with_suffix(".md"), "\n".join([*text, *lines]) + "\n", "--out")
