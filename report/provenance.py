"""How a folder was measured, in a paragraph to be pasted."""

from __future__ import annotations

from metallography.folder import Folder
from metallography.measure import areas_of
from metallography.particles import Row
from metallography.summary import smallest_words
from utils.tables import significant

NETWORK_WORDS = "a trained network (UNet)"


def how_measured(folder: Folder, by: str = NETWORK_WORDS) -> str:
    """A paragraph on how a folder that was run was measured, to be pasted; '' if nothing was.

    ``by`` tells who segmented, after "segmented by". Standards: ASTM E1245 and, for grains, E1382
    are of automatic image analysis; of E562, a manual point count, only the statistics are used.
    """
    rows = [row for row in folder.rows if row["class"] == 0]
    if not rows:
        return ""
    several = len(rows) > 1
    said = [
        f"Area fractions were measured on {len(rows)} field{'s' if several else ''} "
        f"{_extent(folder, rows)} by automatic image analysis (ASTM E1245); phases were segmented "
        f"by {by}{_corrected(folder)}.",
        "± is the half-width of the 95 % confidence interval over fields (Student's t, as in ASTM "
        "E562)."
        if several
        else "One field has no confidence interval.",
        f"Features of fewer than {folder.min_px:g} pixels ({smallest_words(folder)} across) were "
        "left out of counts and sizes; features cut by the frame count one half, at a corner a "
        "quarter, and are left out of sizes.",
    ]
    if folder.grain_classes:
        said.append(
            "Grain sizes are mean intercepts by image analysis (ASTM E1382), their number G that "
            "of ASTM E112."
        )
    return " ".join(said)


def _extent(folder: Folder, rows: list[Row]) -> str:
    """How large the fields are: width and height if all are alike, else their area together."""
    sizes, scales = {done.size for done in folder.done}, {row.get("um_per_px") for row in rows}
    (height, width), um = next(iter(sizes)), folder.unit_scale
    alike = len(sizes) == len(scales) == 1
    if alike and all(row["field_px"] == height * width for row in rows):
        if um is None:
            return f"of {width} × {height} pixels"
        sides = " × ".join(f"{float(f'{side * um:.4g}'):.10g}" for side in (width, height))
        return f"of {sides} µm ({um:.6g} µm per pixel)"
    together = "with a total area of" if len(rows) > 1 else "with an area of"
    known = {row.get("um_per_px") or 0.0 for row in rows}
    if not all(um is not None and um > 0 for um in known):
        return f"{together} {sum(row['field_px'] for row in rows)} pixels"
    low, high = (f"{um:.4g}" for um in (min(known), max(known)))
    scale = low if low == high else f"{low} to {high}"
    return f"{together} {significant(sum(areas_of(rows)))} µm² ({scale} µm per pixel)"


def _corrected(folder: Folder) -> str:
    """How many class maps somebody corrected by hand, if any."""
    if not folder.corrected:
        return ""
    return f"; {folder.corrected} of {len(folder.done)} class maps were corrected by hand"
