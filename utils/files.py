"""Atomic writes, never through links; lists of folders; their errors as messages for the user."""

from __future__ import annotations

import errno
import filecmp
import os
import platform
import re
import shutil
import stat
import time
import unicodedata
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, BinaryIO

from utils.commandline import UserError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".tif", ".tiff", ".webp")

# What systems and network drives put beside files, in lower case: thumbnails and deleted files.
SYSTEM_NAMES = ("thumbs.db", "ehthumbs.db", "desktop.ini", "@eadir", "@__thumb", "#recycle",
                "#snapshot", "~snapshot", "@recycle", "@recently-snapshot", "@tmp", "$recycle.bin",
                "recycler", "recycled", "trash", "network trash folder", "temporary items",
                "system volume information", "lost+found", "__macosx")  # fmt: skip
NEW, OLD = "new", "old"  # names of two folders, one of which takes the other's place
WINDOWS = os.name == "nt"
# Errors of Windows while another program holds a file: no access, a sharing or a lock violation.
HELD = (NO_ACCESS := 5, 32, 33)
# Seconds between tries to rename: scanners, indexers and OneDrive hold new files for a moment.
WAITS = (0.05, 0.1, 0.2, 0.4, 0.5, 0.5, 0.5)
MOST_BYTES = 255  # of a file name, on most file systems
_FOLLOW_NO_LINK = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
_roots: list[tuple[Path, Path]] = []  # folders that are written to: as given, and resolved


class DataError(UserError):
    """The user's image or mask files cannot be used; a line each: 'file: what; cure'."""


@contextmanager
def writing(path: str | Path, flag: str = "output_dir") -> Iterator[None]:
    """Turn OSErrors while ``path`` is written into a UserError, whose cure is another ``flag``."""
    try:
        yield
    except OSError as error:
        if error.errno == errno.ENOMEM:
            raise
        reason = error.strerror or error
        cure = f"free disk space or give an {flag} that may be written to"
        if error.errno in (errno.EEXIST, errno.ENOTDIR, errno.EISDIR):
            cure = f"a file stands where a folder is needed, or the reverse; give another {flag}"
        if error.errno == errno.ENOENT:  # folders that are missing are made
            cure = "its folder was removed or moved meanwhile, or cannot be made; give the same "
            cure += f"command again, or another {flag}"
        if is_held(error) and os.path.isfile(path):
            raise UserError(
                f"{path}: cannot be replaced ({reason}); is it open in another program, such as "
                "Excel, or read-only? Close it there and give the same command again"
            ) from error
        raise UserError(f"{path}: cannot be written ({reason}); {cure}") from error


def is_held(error: OSError) -> bool:
    """Whether Windows refused a file that another program has open; other systems never do."""
    return isinstance(error, PermissionError) and getattr(error, "winerror", None) in HELD


def rename(source: str | Path, target: str | Path) -> None:
    """``os.replace``, tried again for 2 s while Windows says that a file is held; OSError."""
    for wait in WAITS:
        try:
            return os.replace(source, target)
        except PermissionError as error:
            if not is_held(error):
                raise
        time.sleep(wait)
    os.replace(source, target)


def refuse_held(paths: Iterable[Path]) -> None:
    """UserError if a file that is to be replaced later is held now, such as a table in Excel.

    Windows renames a file, to its own name too, only if nobody holds it; elsewhere nothing is held.
    Other errors are none here: whoever writes the file will see.
    """
    for path in paths if WINDOWS else ():
        try:
            if path.is_file():
                rename(path, path)
        except OSError as error:
            if is_held(error) and getattr(error, "winerror", None) != NO_ACCESS:
                with writing(path):
                    raise


@contextmanager
def confined(folder: str | Path) -> Iterator[None]:
    """Within the block, nothing below ``folder`` is written through a link that leads out of it."""
    entry = Path(os.path.abspath(folder)), Path(folder).resolve()
    _roots.append(entry)
    try:
        yield
    finally:
        _roots.remove(entry)


def leads_out(path: str | Path, folder: str | Path) -> bool:
    """Whether the folder in which ``path``, below ``folder``, lies is elsewhere, through a link."""
    return not Path(path).parent.resolve().is_relative_to(Path(folder).resolve())


def inside(folder: str | Path, name: str | Path) -> Path | None:
    """The path of a name below ``folder``; None if it leads out of it, also through a link.

    Names in records are anyone's: a folder of results may come from somebody else.
    """
    below = Path(name)
    leaves = bool(below.anchor) or ".." in below.parts or not below.parts or "\0" in str(below)
    path = Path(folder) / below
    return None if leaves or leads_out(path, folder) else path


def refuse_links(path: str | Path) -> None:
    """Raise UserError if writing ``path`` would leave a ``confined`` folder through a link."""
    absolute = Path(os.path.abspath(path))
    for root, real in _roots:
        if absolute.is_relative_to(root) and absolute != root:
            target = absolute.parent.resolve()
            if not target.is_relative_to(real):
                raise UserError(
                    f"{path}: a link leads from {root} to {target}, and nothing is written outside "
                    "through links; remove the link"
                )


def open_to_append(path: str | Path) -> BinaryIO:
    """Open a log for appending, made if missing; UserError if its name stands for no plain file."""
    refuse_links(path)
    if os.path.islink(path):
        found = f"{path}: a link to {os.readlink(path)}, and nothing is written through links"
        raise UserError(f"{found}; remove the link")
    if kind := special_kind(path):
        raise UserError(f"{path}: {kind}, not a file; remove it")
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | getattr(os, "O_BINARY", 0)
    return os.fdopen(os.open(path, flags | _FOLLOW_NO_LINK, 0o666), "ab")


@contextmanager
def replacing(path: str | Path, flag: str = "output_dir", durable: bool = True) -> Iterator[Path]:
    """A temporary file beside ``path`` that replaces it when the block ends without an error.

    Missing folders are made; a link at ``path`` is replaced, not followed. ``durable`` syncs the
    bytes before the renaming, so that even after a power cut ``path`` is the old file or the whole
    new one. Errors and ``flag`` as for ``writing``.
    """
    path = Path(path)
    refuse_links(path)
    end = f".{os.getpid()}.tmp"
    temporary = path.with_name(f".{cut_name(path.name, MOST_BYTES - 1 - len(end))}{end}")
    with writing(path, flag):
        path.parent.mkdir(parents=True, exist_ok=True)
        with suppress(FileNotFoundError):
            temporary.unlink()  # a link of that name would be followed
        try:
            yield temporary
            if durable:
                with open(temporary, "rb+") as file:
                    os.fsync(file.fileno())
            rename(temporary, path)
        finally:  # after an interrupt, too
            with suppress(OSError):
                temporary.unlink()
        if durable:
            # Sync the renaming; Windows opens no folder, some network file systems sync none.
            with suppress(OSError):
                folder = os.open(path.parent, os.O_RDONLY)
                try:
                    os.fsync(folder)
                finally:
                    os.close(folder)


@contextmanager
def replacing_folder(folder: Path) -> Iterator[Path]:
    """An empty folder that takes the place of ``folder`` when the block ends without an error.

    Else ``folder`` stays as it was. What killed processes left beside it is put back where it is
    missing (``recover_folder``), and else removed. Errors as for ``writing``, which name ``--out``.
    """
    with writing(folder, "--out"):
        folder.parent.mkdir(parents=True, exist_ok=True)
        recover_folder(folder)
        for left in _left_beside(folder):
            if _is_own(left) and not _runs(int(left.name.split(".")[-2])):
                shutil.rmtree(left, ignore_errors=True)
        with TemporaryDirectory(
            prefix=f".{folder.name}.pscl-{_host()}.{os.getpid()}.",
            dir=folder.parent,
            ignore_cleanup_errors=True,
        ) as place:
            new, old = Path(place, NEW), Path(place, OLD)
            new.mkdir()
            yield new
            try:
                if folder.exists():
                    rename(folder, old)
                rename(new, folder)
            finally:
                if old.exists() and not folder.exists():  # stopped between the two renames
                    rename(old, folder)


def left_by_kill(folder: Path) -> Path | None:
    """Where a ``folder`` is that a kill in ``replacing_folder`` left nowhere; None if it is not.

    That is between the two renames, when the new one is still beside it: an old folder alone was
    replaced, and whoever removed the new one since wants neither.
    """
    for left in [] if os.path.lexists(folder) else _left_beside(folder):
        if (left / OLD).is_dir() and (left / NEW).is_dir():
            return left / OLD
    return None


def recover_folder(folder: Path) -> bool:
    """Put a folder back that a kill in ``replacing_folder`` left nowhere; whether there was one.

    Whose process it was does not matter: the two renames follow one another at once.
    """
    if (old := left_by_kill(folder)) is None:
        return False
    with writing(folder, "--out"):
        rename(old, folder)
    shutil.rmtree(old.parent, ignore_errors=True)
    return True


def _left_beside(folder: Path) -> list[Path]:
    """The temporary folders of ``replacing_folder`` beside a folder, the newest first."""
    form = re.compile(rf"\.{re.escape(folder.name)}\.pscl-[^.]*\.\d+\.[a-z0-9_]{{8}}")
    with suppress(OSError):
        found = [
            p for p in folder.parent.iterdir() if form.fullmatch(p.name) and not p.is_symlink()
        ]
        return sorted(found, key=lambda path: path.stat().st_mtime_ns, reverse=True)
    return []


def _is_own(left: Path) -> bool:
    """Whether a process of this machine left it: another's may still be at work.

    And whether nothing else lies in it, which nobody but its owner may remove.
    """
    return f".pscl-{_host()}." in left.name and set(os.listdir(left)) <= {NEW, OLD}


def _host() -> str:
    """The name of this machine, as a part of a file's name."""
    return re.sub(r"[^A-Za-z0-9-]", "-", platform.node())[:16]


def replace_file(
    path: str | Path, contents: str | bytes, flag: str = "output_dir", durable: bool = True
) -> None:
    """Write a file atomically (``replacing``), text as UTF-8 with line feeds on every system."""
    data = contents if isinstance(contents, bytes) else contents.encode("utf-8", "backslashreplace")
    with replacing(path, flag, durable) as temporary:
        temporary.write_bytes(data)


def copy_file(source: Path, target: Path) -> None:
    """Copy a file's contents into a folder of results, atomically; not into the disk at once."""
    with replacing(target, "--out", durable=False) as temporary:
        shutil.copyfile(source, temporary)


def keep_times(new: Path, old: Path) -> None:
    """Give the files below ``new`` the times of equal ones below ``old``: they are the same."""
    for path in (p for p in new.rglob("*") if p.is_file()):
        before = old / path.relative_to(new)
        if before.is_file() and not before.is_symlink() and filecmp.cmp(path, before, False):
            status = before.stat()
            os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def cut_name(name: str, most: int) -> str:
    """A file name of at most ``most`` bytes; the end of a longer one becomes a checksum."""
    raw = os.fsencode(name)
    if len(raw) <= most:
        return name
    end = f"~{zlib.crc32(raw):08x}"
    kept = name[: most - len(end)]
    while len(os.fsencode(kept)) > most - len(end):  # by letters: half of one is no name on macOS
        kept = kept[:-1]
    return kept + end


def remove_leftovers(folder: str | Path) -> None:
    """Remove the temporary files of killed processes; the caller must hold the folder's lock."""
    for path in Path(folder).rglob(".*.tmp"):
        if re.fullmatch(r"\..+\.\d+\.tmp", path.name):
            with writing(path):
                path.unlink(missing_ok=True)


def special_kind(path: str | Path) -> str:
    """What a name stands for that may not be opened as a file, in words; '' if it may.

    Opening a pipe waits for its other end, and a device may never end.
    """
    try:
        mode = os.stat(path).st_mode
    except OSError:  # opening it will say why
        return ""
    kinds = {stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket", stat.S_IFREG: "", stat.S_IFDIR: ""}
    return kinds.get(stat.S_IFMT(mode), "a device")


def read_plain(path: str | Path) -> bytes:
    """The bytes of a plain file; OSError for a pipe, a socket or a device, which is not opened."""
    if kind := special_kind(path):
        raise OSError(errno.EINVAL, f"{kind}, not a file")
    return Path(path).read_bytes()


def name_key(name: str) -> str:
    """A file name in the one form for comparing: macOS writes an accent as a letter of its own."""
    return unicodedata.normalize("NFC", name)


def is_of_system(name: str) -> bool:
    """Whether a name is hidden, one of ``SYSTEM_NAMES``, or an office program's lock."""
    return name.startswith((".", "~$")) or name.lower() in SYSTEM_NAMES


def remove_orphans(folder: str | Path) -> None:
    """Remove from a folder without a lock the temporary files of processes that are no more."""
    for path in Path(folder).glob(".*.tmp"):
        named = re.fullmatch(r"\..+\.(\d+)\.tmp", path.name)
        if named and not _runs(int(named[1])):
            with suppress(OSError):
                path.unlink()


def _runs(process: int) -> bool:
    """Whether a process of this machine may still run."""
    if os.name == "nt":  # signal 0 would end it
        return True
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:  # it is another user's
        pass
    return True


def list_names(folder: str | Path) -> list[Path]:
    """The sorted contents of a folder (of a missing one: none) but for those of the system.

    Raises DataError if the folder may not be listed.
    """
    folder = Path(folder)
    if not os.path.isdir(folder):
        return []
    try:
        # As paths compare, but for 50,000 of them in a tenth of the time.
        names = sorted(folder.iterdir(), key=lambda path: os.path.normcase(path.name))
    except OSError as error:
        reason = f"cannot be listed ({error.strerror}); check its permissions"
        raise DataError(f"{folder}: {reason}") from None
    return [path for path in names if not is_of_system(path.name)]


def list_files(folder: str | Path, suffixes: Collection[str] = ()) -> list[Path]:
    """The files among ``list_names``; sub-folders are walked by ``imaging.listing``.

    ``suffixes`` are in lower case, such as ``IMAGE_SUFFIXES``; empty: files of any type.
    """
    return [
        path
        for path in list_names(folder)
        if os.path.isfile(path) and (not suffixes or path.suffix.lower() in suffixes)
    ]


class Behind:
    """Jobs that a thread does in order while the program goes on, such as writing pictures.

    An error of a job is raised by the next ``do`` or ``wait``, and later jobs are left out.
    """

    def __init__(self) -> None:
        self.thread = ThreadPoolExecutor(1)
        self.last: Future[object] | None = None

    def do(self, job: Callable[..., object], *inputs: Any) -> None:
        """Do ``job(*inputs)`` once the job before is done, for which this waits: none pile up."""
        self.catch_up()
        self.last = self.thread.submit(job, *inputs)

    def catch_up(self) -> None:
        """Wait until the last job is done."""
        last, self.last = self.last, None  # what failed is told once
        if last is not None:
            last.result()

    def wait(self) -> None:
        """Wait until the last job is done, and take no more."""
        self.catch_up()
        self.thread.shutdown()

    def __enter__(self) -> Behind:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self.catch_up()
        finally:
            self.thread.shutdown()
