"""One process at a time writes a file or directory, and what dead processes left of it is removed.

What will be ``{name}`` lies beside it as ``.{name}-{8 letters}``, and who writes there holds the lock
``.{name}.lock``. The system frees the lock of a process that ends, however it ends. So whoever holds the lock
knows that what is unfinished there was left by the dead.
"""

from __future__ import annotations

import logging
import os
import re
import secrets
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from grating_core.files.places import storing
from grating_core.forking import tell_of_forks

_UNFINISHED = re.compile(r"\.(.+)(?:-[a-z0-9_]{8}|\.lock)")
_ABANDONED = 3600.0  # seconds since anything was written, where a file system has no locks
_PAUSE = 0.1  # seconds between two attempts to get a lock that cannot be waited for

_log = logging.getLogger("grating")


def unfinished(path: Path) -> Path:
    """Return a place beside a file or directory for what will be it; who writes there holds the lock."""
    return path.with_name(f".{path.name}-{secrets.token_hex(4)}")


def unfinished_of(name: str) -> str | None:
    """Return the name of what a file is the unfinished form of, or the lock of; None if it is something else."""
    found = _UNFINISHED.fullmatch(name)
    return None if found is None else found[1]


def remove(path: Path) -> None:
    """Remove a file, a symbolic link (not what it points to), or a directory with all that is in it."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@contextmanager
def locked(path: Path, *, wait: bool = True) -> Iterator[bool]:
    """Be the only one, of all processes and threads, that writes a file or a directory.

    What processes that were killed left unfinished of it is removed. Where a file system has no locks nobody is
    kept out, and what is unfinished is removed when nothing has been written to it for an hour.

    Args:
        path: The file or directory. Its parent is made if it is not there.
        wait: Whether to wait for another that is writing it.

    Yields:
        Whether nobody else is writing it; always true with ``wait``.

    Raises:
        StorageError: Nothing can be written there.
    """
    place = path.with_name(f".{path.name}.lock")
    with storing(path):
        descriptor, certain = _take(place, wait)
    if descriptor is None:
        yield False
        return
    try:
        _remove_unfinished(path, place, certain)
        yield True
    finally:
        if descriptor in _held.descriptors:  # not so in the child of a fork, which has let go of it
            if sys.platform != "win32":  # there a file that is open cannot be removed
                with suppress(OSError):
                    place.unlink()
            _let_go(descriptor)


def _take(place: Path, wait: bool) -> tuple[int | None, bool]:
    """Open and lock a file. Return its descriptor, or None if another has it; and whether there are locks here."""
    while True:
        place.parent.mkdir(parents=True, exist_ok=True)
        try:
            descriptor = os.open(place, os.O_RDWR | os.O_CREAT, 0o666)
        except PermissionError:  # in a cache that is shared it may be another user's
            descriptor = os.open(place, os.O_RDONLY)
        except FileNotFoundError:  # the directory has just been removed
            continue
        _held.descriptors.add(descriptor)
        try:
            found = _lock(descriptor, wait=False)
            if found is False and wait:
                _log.info("waiting for another process, which writes what %s stands for", place)
                found = _lock(descriptor, wait=True)
            # Who had it before has removed the file: a lock on that keeps nobody out.
            with suppress(FileNotFoundError):
                if found is not False and os.path.samestat(place.stat(), os.fstat(descriptor)):
                    return descriptor, found is True
        except BaseException:
            _let_go(descriptor)
            raise
        _let_go(descriptor)
        if found is False:
            return None, False


def _let_go(descriptor: int) -> None:
    _held.descriptors.discard(descriptor)
    os.close(descriptor)  # and with it goes the lock, since no child of a fork has kept it open


class _Held:
    """This class keeps the locks of this process. A forked child releases them."""

    def __init__(self) -> None:
        self.descriptors: set[int] = set()
        tell_of_forks(self)

    def after_fork(self) -> None:
        """Close the files; the parent has the locks still."""
        for descriptor in list(self.descriptors):
            _let_go(descriptor)


_held = _Held()

if sys.platform == "win32":
    import msvcrt

    def _lock(descriptor: int, wait: bool) -> bool | None:
        while True:
            try:
                msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
            except OSError:
                if not wait:
                    return False
                time.sleep(_PAUSE)
            else:
                return True

else:
    import fcntl

    def _lock(descriptor: int, wait: bool) -> bool | None:
        """Tell whether the file is now locked for us; None if the file system has no locks."""
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            return False
        except OSError:
            return None
        return True


def _remove_unfinished(path: Path, place: Path, certain: bool) -> None:
    """Remove what the dead have left of a file or directory, whose lock at ``place`` is held."""
    with suppress(OSError), os.scandir(path.parent) as entries:
        for entry in entries:
            if unfinished_of(entry.name) != path.name or entry.name == place.name:
                continue
            with suppress(OSError):
                if certain or time.time() - entry.stat(follow_symlinks=False).st_mtime > _ABANDONED:
                    remove(Path(entry.path))
