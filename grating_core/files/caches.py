"""This module lists and clears grating's cache."""

from __future__ import annotations

import os
import stat
import time
from collections.abc import Collection, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from grating_core.errors import StorageError
from grating_core.files.locks import locked, remove, unfinished, unfinished_of
from grating_core.files.places import cache_directory, explained

Kind = Literal["models", "lenses", "columns", "layers", "states", "activations", "preferences", "unfinished"]
"""``models``: bundled models, converted. ``lenses``: calibrated here. ``columns``: companion files, for
``mlp_density``. ``layers``: companion files with quantised layers. ``states``: what recalibration learnt.
``activations``: what ``grating simulate`` recorded. ``preferences``: what it fitted. ``unfinished``: what is being
written now, or was left by processes that were killed."""

KINDS: tuple[Kind, ...] = get_args(Kind)
_FOLDERS: dict[str, Kind] = {
    "models": "models",
    "lenses": "lenses",
    "columns": "columns",
    "layers": "layers",
    "recalibration": "states",
    "activations": "activations",
    "preferences": "preferences",
}


@dataclass(frozen=True)
class Cached:
    """This class describes one thing in the cache.

    Attributes:
        kind: One of :data:`KINDS`.
        path: File or directory of the thing.
        size: Bytes of all its files together.
        used: Time when the thing was last read or written, in seconds since the epoch, as in :func:`time.time`.
            Many file systems record reads only once a day, or never.
    """

    kind: Kind
    path: Path
    size: int
    used: float


@dataclass(frozen=True)
class Cleared:
    """This class holds the outcome of clearing the cache.

    Attributes:
        removed: Things that were removed.
        kept: Things that could not be removed, each with the reason, for example another process that writes it.
    """

    removed: list[Cached]
    kept: list[tuple[Cached, str]]


def contents(kinds: Collection[Kind] | None = None, older_than: float | None = None) -> list[Cached]:
    """List what lies in grating's cache, by kind and path, without things that grating did not make.

    Args:
        kinds: Some of :data:`KINDS`; None for all.
        older_than: Seconds for which a thing must not have been used; None lists all.

    Raises:
        ValueError: A kind is unknown, or the age is no number of seconds.
        StorageError: The cache cannot be read. A cache that does not exist is empty.
    """
    chosen = KINDS if kinds is None else kinds
    if older_than is not None and not older_than >= 0:
        raise ValueError(f"older_than={older_than!r} must be a number of seconds, 0 or more")
    if isinstance(chosen, str) or (unknown := [kind for kind in chosen if kind not in KINDS]):
        raise ValueError(
            f"kinds={chosen if isinstance(chosen, str) else unknown!r} must be some of {', '.join(KINDS)}"
        )
    before = None if older_than is None else time.time() - older_than
    directory = cache_directory()
    found = [
        one
        for one in (*_unfinished_in(directory), *_kept_in(directory))
        if one.kind in chosen and (before is None or one.used <= before)
    ]
    return sorted(found, key=lambda one: (KINDS.index(one.kind), one.path))


def clear(kinds: Collection[Kind] | None = None, older_than: float | None = None) -> Cleared:
    """Remove things from grating's cache: those that :func:`contents` lists for the same arguments.

    Things that a process is writing now are kept. Things that a process reads are removed: on Linux and macOS that
    process goes on, and on Windows the thing is kept. Nothing outside the cache is touched: if a thing is a
    symbolic link, only the link is removed.

    Args:
        kinds: Some of :data:`KINDS`; None for all.
        older_than: Seconds for which a thing must not have been used; None removes all.

    Raises:
        ValueError: A kind is unknown, or the age is no number of seconds.
        StorageError: The cache cannot be read.
    """
    reasons = [(one, _remove(one)) for one in contents(kinds, older_than)]
    return Cleared(
        [one for one, reason in reasons if reason is None],
        [(one, reason) for one, reason in reasons if reason is not None],
    )


def _remove(one: Cached) -> str | None:
    """Remove one thing, or return the reason why it cannot be removed."""
    path = one.path
    name = unfinished_of(path.name)
    target = path if name is None else path.with_name(name)
    if one.kind == "lenses":
        target = path / "lens.json"  # whoever saves a lens holds the lock of this file
    try:
        with locked(target, wait=False) as alone:
            if not alone:
                return "another process is writing it"
            if name is None:  # unfinished things were removed with the locking
                gone = unfinished(path)
                path.rename(gone)  # so nobody finds half of it
                remove(gone)
    except OSError as error:
        return explained(error)
    return "it may still be written: this file system has no locks" if os.path.lexists(path) else None


def _kept_in(directory: Path) -> Iterator[Cached]:
    for folder, kind in _FOLDERS.items():
        for entry in _entries(directory / folder):
            if not entry.name.startswith("."):
                yield from _cached(kind, entry)


def _unfinished_in(directory: Path) -> Iterator[Cached]:
    lenses = [Path(entry.path) for entry in _entries(directory / "lenses") if entry.is_dir(follow_symlinks=False)]
    for folder in (directory, *(directory / folder for folder in _FOLDERS), *lenses):
        for entry in _entries(folder):
            if unfinished_of(entry.name) is not None:
                yield from _cached("unfinished", entry)


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    """Return what is in a folder of the cache; nothing if it is a link to somewhere else."""
    try:
        if not stat.S_ISDIR(folder.lstat().st_mode) and folder != cache_directory():
            return []
        with os.scandir(folder) as entries:
            return list(entries)
    except FileNotFoundError:
        return []
    except OSError as error:
        raise StorageError(f"grating's cache cannot be read: {explained(error)}") from error


def _cached(kind: Kind, entry: os.DirEntry[str]) -> Iterator[Cached]:
    """Yield the thing, unless it has vanished meanwhile."""
    path = Path(entry.path)
    with suppress(FileNotFoundError):
        found = list(_statuses(path)) or [path.lstat()]
        used = max(max(status.st_mtime, status.st_atime) for status in found)
        size = sum(status.st_size for status in found if not stat.S_ISDIR(status.st_mode))
        yield Cached(kind, path, size, used)


def _statuses(path: Path) -> Iterator[os.stat_result]:
    """Yield the status of a file or link, or of all files below a directory, as far as they do not vanish."""
    with suppress(OSError):
        status = path.lstat()
        if not stat.S_ISDIR(status.st_mode):
            yield status
            return
        with os.scandir(path) as entries:
            for entry in list(entries):
                yield from _statuses(Path(entry.path))
