"""Find a user's images and their masks in folders and sub-folders, and name what is left out."""

from __future__ import annotations

import os
import re
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path

from annotation.files import ANNOTATION_SUFFIXES, KINDS_READ, another_kind, is_annotation
from imaging.listing import (
    BESIDE,
    DRAWN,
    RESULTS,
    Listing,
    in_mask_folders,
    is_drawn,
    is_image,
    labels_of_twins,
    longest_start,
    some_names,
    unread,
)
from imaging.pages import count_pages, images_of, page_name, page_names
from utils.files import IMAGE_SUFFIXES, DataError, name_key

OUTLINES = (".jsonl", ".xml")  # of objects, in a form that is not read
LABEL_TEXT = (".txt", ".csv")  # outlines, too, if they have an image's name
_MASK = r"(?:masks?|labels?|gt|ground[ _-]?truths?|seg|segmentations?|annotations?)"
SECOND = re.compile(rf"(?:(.+?)[\W_]+{_MASK}[\W_\d]*|{_MASK}[\W_]+(.+))", re.IGNORECASE)
ANIMATED = (".png", ".webp")  # a TIFF's pages can be chosen


class Pairs:
    """The images below a folder, each with the masks that it could have by name.

    A mask is looked for at the image's place below the folder of masks, then there in other letter
    case, then, if no other image has the name, anywhere below that folder; masks of pixels first,
    then files of outlines that ``annotation.files`` reads. Where the pattern says ``{class}``, an
    image has a file for each class, and ``classes`` their names. Pages of a file of several have
    masks of their own, in ``of_page``, by the names of the pages. Images named as masks or overlays
    of other images are no images, nor are files of ``no_images``. Folders that hold results of this
    program, and ``out``, are not read. ``notes`` and ``warnings`` are lines for the report, and
    ``without_mask`` the images that have none, by their paths below the folder.
    """

    def __init__(
        self, images: Path, masks: Path, pattern: str, out: Path, no_images: Collection[Path] = ()
    ) -> None:
        self.images, self.folder, self.pattern = images, masks, pattern
        self.one_folder = masks.resolve() == images.resolve()
        self.notes: list[str] = []
        self.warnings: list[str] = []
        self.classes: dict[Path, str] = {}  # class of each file, where each class has one
        other = set() if self.one_folder else {images.resolve(), masks.resolve()}
        listing = self._walk(images, other | {out.resolve()})
        there = listing if self.one_folder else self._walk(masks, other | {out.resolve()})
        self.beside, self._results = there.files, there.left_out[RESULTS]
        pictures = listing.images()
        beside = {*in_mask_folders(pictures, images)}
        beside |= {*(labels_of_twins(pictures) if self.one_folder else ())}
        beside |= {path for path in pictures if no_images and path.resolve() in no_images}
        files = [path for path in pictures if path not in beside]
        if self.one_folder:  # masks of pages beside their image
            of_pages = {name_key(name).casefold() for path in files for name in page_names(path)}
            files = [path for path in files if name_key(path.stem).casefold() not in of_pages]
        self.stems = {name_key(path.stem) for path in files}
        self._exact: dict[tuple[str, str], Path] = {}
        self._folded: defaultdict[tuple[str | None, str], list[Path]] = defaultdict(list)
        for path in self.beside:
            name = name_key(path.name)
            place = name_key(path.parent.relative_to(masks).as_posix())
            self._exact[place, name] = path
            for somewhere in (place, None):
                self._folded[somewhere, name.casefold()].append(path)
        self.page_stems = {name_key(name) for path in files for name in page_names(path)}
        named = Counter(name_key(path.stem).casefold() for path in files)
        parts = self._parts(named) if "{class}" in pattern else None
        found = {
            path: self._masks_of(path, name_key(path.stem), named)
            if parts is None
            else parts[name_key(path.stem)]
            for path in files
        }
        self.of_page: dict[Path, dict[int, list[Path]]] = {}
        for path in files:
            pages = self._of_pages(path, found, named) if parts is None else _by_page(path, parts)
            if pages:
                self.of_page[path] = pages
        alike = [own for pages in self.of_page.values() for own in pages.values()]
        taken = {mask for own in [*found.values(), *alike] for mask in own}
        taken = taken if self.one_folder else set()
        bare = [p for p in files if p not in taken and not found[p] and p not in self.of_page]
        left_out = [p for p in bare if self._is_derived(p)]
        self.masks = {p: found[p] for p in files if p not in taken and p not in left_out}
        self.used = {
            mask for own in self.masks.values() for mask in own[: len(own) if parts else 1]
        }
        self.used |= {mask for own in alike for mask in own[: len(own) if parts else 1]}
        listing.say(DRAWN, left_out)
        listing.say(BESIDE, sorted(beside - self.used))
        self._left_out = listing.lines()
        self.warnings += self._left_out + ([] if self.one_folder else there.lines())
        self._tell(listing.files)

    def first_alone(self) -> list[str]:
        """A line on animations, where one picture of a file is read."""
        stacks = [p for p in self.masks if p.suffix.lower() in ANIMATED and count_pages(p) > 1]
        found = f"{len(stacks)} file(s) of several pictures, of which the first is read"
        return [f"{found}: {some_names(map(self.relative, stacks))}"] if stacks else []

    def relative(self, path: Path) -> str:
        """An image's path below the folder of images."""
        return name_key(path.relative_to(self.images).as_posix())

    def check(self) -> Iterable[str]:
        """What is wrong, a line each: equal names, several masks of an image, or no mask at all."""
        if not self.masks:
            empty = f"{self.images}: no image in it ({' '.join(IMAGE_SUFFIXES)})"
            raise DataError("; ".join([empty, *self._left_out, "give another --images"]))
        pages = ((path, own) for path, all_ in self.of_page.items() for own in all_.values())
        for path, found in [*self.masks.items(), *pages]:
            if len(found) > 1 and not self.classes:
                names = ", ".join(mask.relative_to(self.folder).as_posix() for mask in found)
                cure = "remove all but one"
                if len({mask.parent for mask in found}) == len(found):
                    cure += '; if each folder is a class, give --mask_pattern "{class}/{stem}.png"'
                yield f"{path}: {len(found)} masks ({names}); {cure}"
        for path, second, pattern in self._second_masks():
            names = f"{self.masks[path][0].name} and {second.name} in {second.parent}"
            cure = "remove one, or say by --mask_pattern which it is, such as"
            yield f'{path}: 2 masks ({names}); {cure} "{pattern}"'
        if not self.used:
            yield self._no_mask()

    def _second_masks(self) -> Iterable[tuple[Path, Path, str]]:
        """Images that have a mask of their name, and beside it another one that is named for them.

        Which of the two is meant nobody can tell, unless a pattern says so: the second one's.
        """
        if self.one_folder or self.pattern:
            return
        places = {
            (own[0].parent, name_key(path.stem)): path for path, own in self.masks.items() if own
        }
        for mask in (path for path in self.beside if is_image(path) and path not in self.used):
            name = name_key(mask.name)
            match = SECOND.fullmatch(name_key(mask.stem))
            group = (1 if match[1] else 2) if match else 0
            image = places.get((mask.parent, match[group])) if match else None
            if match and image is not None:
                start, end = match.span(group)
                yield image, mask, f"{name[:start]}{{stem}}{name[end:]}"

    def _walk(self, folder: Path, leave_out: set[Path]) -> Listing:
        """All files below a folder; DataError if a sub-folder may not be listed."""
        listing = Listing(folder, leave_out)
        if listing.unlisted:
            raise DataError("\n".join(listing.unlisted))
        return listing

    def _wanted(self, stem: str) -> list[str]:
        """The names that the mask of an image, or of a page of it, may have."""
        if self.pattern:
            return [name_key(self.pattern).replace("{stem}", stem)]
        return [stem + end for suffix in IMAGE_SUFFIXES for end in (suffix, suffix.upper())]

    def _masks_of(self, image: Path, stem: str, named: Counter[str]) -> list[Path]:
        """The masks of an image, or of a page of it, which ``stem`` names then."""
        outlines = [stem + suffix for suffix in ANNOTATION_SUFFIXES]
        found = self._named(image, named, self._wanted(stem))
        if found or self.pattern:
            return found
        return [p for p in self._named(image, named, outlines) if not another_kind(p)]

    def _of_pages(
        self, image: Path, found: dict[Path, list[Path]], named: Counter[str]
    ) -> dict[int, list[Path]]:
        """Masks of single pages; takes from ``found`` those that have the name of a page.

        DataError if a mask has the name of a page that is not there.
        """
        numbers, stem = images_of(image)[0], name_key(image.stem)
        if len(numbers) == 1:
            return {}
        pages: dict[int, list[Path]] = {}
        for number in numbers:
            own = name_key(page_name(stem, number))
            if own.casefold() not in named and (masks := self._masks_of(image, own, named)):
                pages[number] = masks
        # A pattern such as {stem}-p2.png finds a page's mask by the name of the file.
        shape = re.compile(re.escape(page_name(stem, 0))[:-1] + r"(\d+)(?!\d)", re.IGNORECASE)
        for mask in found[image]:
            if match := shape.match(name_key(mask.stem)):
                number = int(match[1])
                if number not in numbers:
                    has = f"{image} has the pages {', '.join(map(str, numbers))}"
                    raise DataError(f"{mask}: a mask of page {number}; {has}: rename it")
                pages.setdefault(number, [mask])
        of_pages = {mask for masks in pages.values() for mask in masks}
        found[image] = [mask for mask in found[image] if mask not in of_pages]
        return pages

    def _named(self, image: Path, named: Counter[str], names: list[str]) -> list[Path]:
        place = name_key(image.parent.relative_to(self.images).as_posix())
        here = [self._exact[place, name] for name in names if (place, name) in self._exact]
        tried = [here]
        if named[name_key(image.stem).casefold()] == 1:  # else it could be another image's
            folded = dict.fromkeys(name.casefold() for name in names)
            for somewhere in (place, None):
                found = [self._folded.get((somewhere, name), []) for name in folded]
                tried.append([mask for masks in found for mask in masks])
        own = ([mask for mask in masks if mask != image] for masks in tried)
        return next(filter(None, own), [])

    def _parts(self, named: Counter[str]) -> defaultdict[str, list[Path]]:
        """The files of one class each by the image's name, from a pattern that says ``{class}``."""
        found: defaultdict[str, list[Path]] = defaultdict(list)
        fixed = re.split(r"\{stem\}|\{class\}", name_key(self.pattern))
        if len(fixed) != 3 or not fixed[1] or "{stem}" not in self.pattern:
            cure = "write both once, with something between them: {stem}_{class}.png"
            raise DataError(f"--mask_pattern {self.pattern!r}: {{stem}} and {{class}}; {cure}")
        before, between, after = fixed
        stem_first = self.pattern.index("{stem}") < self.pattern.index("{class}")
        for path in filter(is_image, self.beside):
            below = path.relative_to(self.folder).as_posix() if "/" in self.pattern else path.name
            name = name_key(below)
            inner = name[len(before) : len(name) - len(after)]
            if name != before + inner + after:
                continue
            stem = label = ""
            for at in (at for at in range(len(inner)) if inner.startswith(between, at)):
                parts = inner[:at], inner[at + len(between) :]
                own, rest = parts if stem_first else parts[::-1]
                # The longest name of an image counts: a_1_pore is of image a_1, not of a.
                if own in self.stems | self.page_stems and rest and len(own) > len(stem):
                    stem, label = own, rest
            if named[stem.casefold()] == 1 or stem in self.page_stems:
                found[stem].append(path)
                self.classes[path] = label.strip()
        return found

    def _is_derived(self, path: Path) -> bool:
        """Whether an image's name says that it is a mask, or a picture of one."""
        if is_drawn(name_key(path.stem), self.stems):
            return True
        if not (self.one_folder and self.pattern):
            return False
        shape = re.escape(name_key(self.pattern)).replace(re.escape("{stem}"), ".+")
        return re.fullmatch(shape, name_key(path.name), re.IGNORECASE) is not None

    def _tell(self, here: list[Path]) -> None:
        """Fill ``notes``, ``warnings`` and ``without_mask``."""
        nested = Counter(path.parent for path in self.masks if path.parent != self.images)
        if nested:
            names = some_names(
                f"{self.relative(place)} ({n})" for place, n in sorted(nested.items())
            )
            self.notes.append(f"{sum(nested.values())} image(s) from sub-folders: {names}")
        other_case = [
            own[0].relative_to(self.folder).as_posix()
            for image, own in self.masks.items()
            if own
            and not self.classes
            and name_key(own[0].name) not in self._wanted(name_key(image.stem))
            and not is_annotation(own[0])
        ]
        if other_case:
            found = f"{len(other_case)} mask(s) taken though the case of letters differs"
            self.notes.append(f"{found}: {some_names(other_case)}")
        alone = [
            self.relative(path)
            for path, found in self.masks.items()
            if not found and path not in self.of_page
        ]
        self.without_mask = alone if self.used else []
        outlines = self._outlines()
        if outlines and self.used:
            found = f"{len(outlines)} file(s) of outlines are not read"
            sound = is_annotation(outlines[0]) and not another_kind(outlines[0])
            first = "masks of pixels come first" if sound else ""
            self.warnings.append(f"{outlines[0]}: {found}; {first or f'read are {KINDS_READ}'}")
        pictures, others = unread(here)
        self.warnings += pictures
        others = [path for path in others if path not in outlines and path not in self.used]
        if others:
            found = f"{others[0]}: {len(others)} file(s) among the images not read"
            self.warnings.append(f"{found}; read are {' '.join(IMAGE_SUFFIXES)}")
        stray = [p for p in self.beside if is_image(p) and p not in self.used]
        if stray and self.used and not self.one_folder:
            found = f"{stray[0]}: {len(stray)} mask(s) without an image; not used"
            pattern = self._class_pattern(self._by_class())
            joined = f'; files of one class each are read with --mask_pattern "{pattern}"'
            joined = joined if pattern else ""
            self.warnings.append(found + joined)

    def _outlines(self) -> list[Path]:
        """Files of polygons or boxes among the masks."""
        return [
            path
            for path in self.beside
            if path.suffix.lower() in OUTLINES
            or (is_annotation(path) and path not in self.used)
            or (path.suffix.lower() in LABEL_TEXT and name_key(path.stem) in self.stems)
        ]

    def _by_class(self) -> list[Path]:
        """Several files that belong, by name, to the first image that has several."""
        groups = defaultdict(list)
        for path in self.beside:
            if is_image(path) and path not in self.used:
                start = longest_start(name_key(path.stem), self.stems)
                parent = name_key(path.parent.name)
                groups[start or (parent if parent in self.stems else "")].append(path)
        return next((own for stem, own in groups.items() if stem and len(own) > 1), [])

    def _class_pattern(self, parts: list[Path]) -> str:
        """The pattern by which these files of one image have their classes' names, or ''."""
        below = [part.relative_to(self.folder).as_posix() for part in parts]
        own = [longest_start(name_key(part.stem), self.stems) for part in parts]
        own += [part.parent.name for part in parts if name_key(part.parent.name) in self.stems]
        stem = next(filter(None, own), "")
        if not stem or not all(stem in name for name in below):
            return ""
        names = [name_key(name).replace(stem, "{stem}", 1) for name in below]
        begin = re.sub(r"[^\W_]+$", "", os.path.commonprefix(names))  # up to a separator
        turned = [name[len(begin) :][::-1] for name in names]
        end = re.sub(r"^[^\W_]+", "", os.path.commonprefix(turned)[::-1])
        pattern = f"{begin}{{class}}{end}"
        sound = "{stem}" in pattern and "}{" not in pattern
        return pattern if sound else ""

    def _no_mask(self) -> str:
        """Why no image has a mask: what is there instead, and the cure."""
        stem = next(iter(self.masks)).stem
        wanted = self.folder / (self.pattern.replace("{stem}", stem) or f"{stem}.*")
        missing = f"{wanted}: no image has a mask"
        if self._results and not self.one_folder:
            name = self._results[0].relative_to(self.folder).as_posix()
            cure = f"to take it for masks give --masks {self._results[0]}"
            return f"{missing}; {name} is left out as a result of this program; {cure}"
        if parts := self._by_class():
            names = some_names(part.relative_to(self.folder).as_posix() for part in parts)
            found = f"several files belong to one image ({names})"
            pattern = self._class_pattern(parts) or "{stem}_{class}.png"
            return f'{missing}; {found}: if each is a class, give --mask_pattern "{pattern}"'
        if outlines := self._outlines():
            found = f"{outlines[0]}: no image has a mask"
            kind = outlines[0].suffix[1:].upper()
            if other := another_kind(outlines[0]):
                return f"{found}, and it is {other}; export {KINDS_READ}, or a PNG of class ids"
            if is_annotation(outlines[0]):
                there = name_key(outlines[0].name)
                cure = f'give --mask_pattern, such as "{{stem}}{outlines[0].suffix}"'
                return f"{found}, and {there} has the name of none; name it as its image, or {cure}"
            target = f"{KINDS_READ}, or a PNG of class ids"
            return f"{found}, and outlines in {kind} are not read; export {target}"
        others = [path for path in self.beside if is_image(path) and path not in self.masks]
        if not self.beside:
            return f"{self.folder}: no mask in it; give the file of a mask, or a folder of masks"
        if not others:
            return f"{missing}; give --mask_pattern"
        start = longest_start(name_key(others[0].stem), self.stems)
        shape = "{stem}" + name_key(others[0].name)[len(start) :] if start else ""
        there = others[0].relative_to(self.folder).as_posix()
        return f"{missing} (there is {there}); give --mask_pattern" + (
            f' "{shape}"' if shape else ""
        )


def _by_page(image: Path, parts: Mapping[str, list[Path]]) -> dict[int, list[Path]]:
    """The files of one class each of the pages of an image, by the names of the pages."""
    numbers = images_of(image)[0]
    own = {n: parts.get(name_key(page_name(image.stem, n)), []) for n in numbers}
    return {n: files for n, files in own.items() if files} if len(numbers) > 1 else {}
