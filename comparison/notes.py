"""The table as files: rows from the finished runs, and notes for the reader."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from pathlib import Path

import jinja2

from comparison import bootstrap
from comparison.options import ABLATIONS, PUBLISHED, UNKNOWN, Variant, known_rows
from comparison.plan import Plan
from comparison.table import PROTOCOLS, Comparison, Row
from data import parse_name
from report.figures import dots_png
from utils.commandline import UserError
from utils.files import replace_file

PAPERS_SET = ("aluminum", "aluminium")
HEAD = Path(__file__).with_name("table.md.j2")


def write_table(plan: Plan) -> Comparison:
    """Write the table, all values and their plot from what is finished.

    Raises:
        UserError: a run does not fit, or a file cannot be written.
    """
    references = ["sup", "best plain"]
    if plan.options.ablate:
        references = [*[v.key for v in plan.options.variants if not v.settings][:1], "sup"]
    comparison = Comparison(rows_of(plan), plan.clusters, references, plan.repeats)
    panels = []
    for protocol, title in PROTOCOLS.items():
        dots = [(row.title, row.values(protocol, "dice")) for row in comparison.rows]
        panels.append((f"Dice, {title[0].lower()}{title[1:]}", dots))
    files: dict[str, str | bytes] = {
        "table.md": "\n".join([head(plan, comparison), *comparison.markdown(), ""]),
        "table.csv": comparison.csv(),
        "values.csv": comparison.values_csv(),
        "values.png": dots_png(panels),
    }
    for name, contents in files.items():
        replace_file(plan.options.path(name), contents, "--out")
    return comparison


def rows_of(plan: Plan) -> list[Row]:
    """The rows asked for, and those of other methods that have finished runs of these settings."""
    asked, known = plan.options.variants, known_rows(plan.options.config)
    variants = [*known[:1], *asked] if plan.options.ablate else known
    rows = [(variant, _row(plan, variant, variant in asked)) for variant in variants]
    return [row for variant, row in rows if variant in asked or row.results]


def _row(plan: Plan, variant: Variant, asked: bool) -> Row:
    """What the finished repeats of a row scored."""
    results, fits = {}, []
    for repeat in range(10) if plan.size != "f" else (0,):  # repeats are digits
        try:
            found = plan.results(variant, repeat)
            fits += [repeat] if not found and plan.is_fit(variant, repeat) else []
        except UserError:
            if asked and repeat in plan.repeats:
                raise
            continue  # a run that was not asked for
        if found:
            results[repeat] = found
    papers = Path(plan.config.data_dir).resolve().name in PAPERS_SET and plan.size == "1"
    known = PUBLISHED if papers and not plan.options.ablate and not variant.settings else {}
    published = known.get(variant.method, UNKNOWN)
    return Row(variant.key, variant.title, results, variant.shared, published, fits)


def head(plan: Plan, comparison: Comparison) -> str:
    """Heading and notes of the table, see ``HEAD``."""
    missing = [
        (row.title, set(comparison.repeats) - {*row.results, *row.fits}) for row in comparison.rows
    ]
    fits = [(row.title, row.fits) for row in comparison.rows]
    scored = [found["last"] for row in comparison.rows for found in row.results.values()]
    truth = scored[0].counts.sum(axis=(0, 2)).tolist() if scored else []  # pixels of each class
    jinja = jinja2.Environment(undefined=jinja2.StrictUndefined, trim_blocks=True)
    return jinja.from_string(HEAD.read_text(encoding="utf-8")).render(
        plan=plan,
        comparison=comparison,
        bootstrap=bootstrap,
        setting=ABLATIONS.get(plan.options.ablate, ("",))[0],
        absent=[c for c, pixels in enumerate(truth) if c and not pixels],
        plain=[row.title for row in comparison.rows if row.plain],
        samples=int(plan.clusters.max()) + 1,
        sample=parse_name(plan.test[0].image.stem),
        missing=with_repeats(missing),
        fits=with_repeats(fits),
    )


def with_repeats(rows: Iterable[tuple[str, Collection[int]]]) -> list[str]:
    """Titles of rows with some of their repeats in brackets, where there are any."""
    return [f"{title} ({', '.join(map(str, sorted(n)))})" for title, n in rows if n]
