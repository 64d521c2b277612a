"""The outlines of a predicted folder, as files for other programs: written, kept, removed."""

from __future__ import annotations

import hashlib
import json

from annotation.outlines import SUFFIX, packed
from imaging.listing import some_names
from metallography.folder import Folder
from metallography.items import Item
from utils.files import DataError, leads_out, replace_file


def write_outlines(folder: Folder, kind: str | None) -> list[str]:
    """Write each image's outlines as ``kind``, geojson or roi, into ``outlines``; None: nothing.

    A file that is not as this program wrote it is left, unless all is overwritten: returns lines.
    """
    names, colours = folder.segmenter.class_names, folder.segmenter.colours.tolist()
    kept: list[str] = []
    for image in folder.done if kind else ():
        path = folder.file("outlines", image.item, SUFFIX[kind or ""])
        try:
            found = packed(folder.measured(image.item), kind or "", names, colours)
        except DataError as error:
            folder.bad.append(f"{path}: {error}")
            continue
        before, own = path.read_bytes() if path.is_file() else found, hashlib.sha256(found)
        known = folder.record.done[image.item.name]
        written, of = known.get("outlines", {}), known.get("outlined", {})
        foreign = before != found and hashlib.sha256(before).hexdigest() != written.get(kind)
        if foreign and not folder.overwrite:
            kept.append(path.as_posix())
            continue
        replace_file(path, found, "--out", durable=False)
        now = {"outlines": written | {kind: own.hexdigest()}}
        now["outlined"] = of | {kind: outlined(folder, image.item)}
        if not now.items() <= known.items():
            folder.record.add(known | now)
    cure = "left as they are; --overwrite writes them anew"
    what = f"{len(kept)} file(s) of outlines differ from their class maps: {some_names(kept)}"
    return [f"Warning: {what}; {cure}"] if kept else []


def outlined(folder: Folder, item: Item) -> str:
    """A digest of what decides an image's outlines: its class map, by the record, and classes.

    A correction that is older than its field counts within that.
    """
    looks = folder.segmenter.class_names, folder.segmenter.colours.tolist()
    entry = folder.record.done[item.name]
    older = entry.get("outdated") is not None and entry["outdated"] == entry.get("drawn")
    of = json.dumps([entry.get("drawn"), *looks, *([folder.field.state(item.name)] * older)])
    return hashlib.sha256(of.encode()).hexdigest()


def remove_outlines(folder: Folder, kind: str | None) -> list[str]:
    """Remove this program's outlines of class maps that are no more, but of ``kind``; lines.

    What a user saved there stays.
    """
    names, colours = folder.segmenter.class_names, folder.segmenter.colours.tolist()
    gone: list[str] = []
    for item, *_ in folder.done:
        known = folder.record.done[item.name]
        written = known.get("outlines", {})
        for other in sorted(written.keys() & SUFFIX.keys() - {kind}):
            path = folder.file("outlines", item, SUFFIX[other])
            before = path.read_bytes() if path.is_file() else b""
            own = hashlib.sha256(before).hexdigest() == written[other]
            if not own or leads_out(path, folder.out):
                continue
            of, now = known.get("outlined", {}), outlined(folder, item)
            if of.get(other) == now:
                continue
            # The class map is another one, or the classes are; both may look the same.
            try:
                anew = packed(folder.measured(item), other, names, colours)
            except DataError:  # too large for such a file
                anew = b""
            if anew != before:
                path.unlink()
                gone.append(path.as_posix())
                continue
            known = known | {"outlined": of | {other: now}}
            folder.record.add(known)
    what = f"{len(gone)} file(s) of outlines of earlier class maps removed: {some_names(gone)}"
    return [f"{what}; --outlines writes new ones"] if gone else []
