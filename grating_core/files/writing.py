"""Files that are written as a whole or not at all.

What is being written lies beside its place, as ``.{name}-{8 letters}``. See :mod:`grating_core.files.locks`.
"""

from __future__ import annotations

import errno
import os
import re
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, BinaryIO

from grating_core.errors import StorageError
from grating_core.files.places import cache_directory, explained, is_there

_UNFINISHED = re.compile(r"\.(.+)-[a-z0-9_]{8}")

_LOCK = re.compile(r"\.(.+)\.lock")

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}

_CANNOT_RESERVE = {errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL}


def unfinished(path: Path) -> Path:
    """A place beside a file or directory for what will be it; who writes there holds the lock."""
    return path.with_name(f".{path.name}-{secrets.token_hex(4)}")


def lock_of(path: Path) -> Path:
    """The file that is locked by who writes a file or directory."""
    return path.with_name(f".{path.name}.lock")


def unfinished_of(name: str) -> str | None:
    """The name of what this is the unfinished form of, or the lock of; None if it is something else."""
    found = _UNFINISHED.fullmatch(name) or _LOCK.fullmatch(name)
    return None if found is None else found.group(1)


def remove(path: Path) -> None:
    """Remove a file, a symbolic link (not what it points to), or a directory with all that is in it."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@contextmanager
def replacing(path: Path, size: int = 0, *, private: bool = False) -> Iterator[BinaryIO]:
    """A file to write to, which takes the place of what is there when all has been written, or leaves nothing.

    Args:
        path: The file, whose lock the caller holds.
        size: Bytes that it will have, if known: room for them is taken at once.
        private: Only its owner may read it; otherwise all whom the umask allows.

    Raises:
        StorageError: It cannot be written.
    """
    place = unfinished(path)
    mode = 0o600 if private else 0o666
    try:
        with storing(path, size):
            with open(place, "xb", opener=lambda name, flags: os.open(name, flags, mode)) as file:
                reserve(file, path.parent, size)
                yield file
                file.flush()
                os.fsync(file.fileno())
            place.replace(path)
    finally:
        with suppress(OSError):
            place.unlink()


def make_private(directory: Path) -> None:
    """Make a directory into which only its owner may look.

    Raises:
        StorageError: It cannot be made.
    """
    with storing(directory):
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)


@contextmanager
def storing(path: Path, size: int = 0) -> Iterator[None]:
    """Make an ``OSError`` of writing say what was to be written, and where.

    Args:
        path: The file or directory.
        size: Bytes that it takes, if known.

    Raises:
        StorageError: Instead of an ``OSError``.
    """
    try:
        yield
    except StorageError:
        raise
    except OSError as error:
        raise StorageError(f"{path} cannot be written: {_reason(error, path, size)}") from error


def _reason(error: OSError, path: Path, size: int) -> str:
    reason = explained(error)
    if size:
        reason += f"; it takes {size / 1e6:,.1f} MB"
    if error.errno in _FULL:
        with suppress(OSError):
            free = shutil.disk_usage(_existing(path.parent)).free
            reason += f", and {free / 1e6:,.1f} MB are free in {path.parent}"
    with suppress(StorageError):
        if path.is_relative_to(cache_directory()):
            reason += ". Make room, or have" if error.errno in _FULL else ". Have"
            reason += " GRATING_CACHE name a directory that can be written"
    return reason


def _existing(directory: Path) -> Path:
    """The directory, or the nearest one above that is there."""
    return next((one for one in (directory, *directory.parents) if is_there(one)), directory)


def reserve(file: IO[bytes], directory: Path, size: int) -> None:
    """Take room for a file that will be written, so that a full disk is known before anything is computed.

    Args:
        file: Open for writing, and empty.
        directory: Where it is.
        size: Its bytes.

    Raises:
        OSError: There is no room.
    """
    if not size:
        return
    if shutil.disk_usage(directory).free < size:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    if hasattr(os, "posix_fallocate"):
        try:
            os.posix_fallocate(file.fileno(), 0, size)
        except OSError as error:
            if error.errno not in _CANNOT_RESERVE:
                raise


def temporary_file(directory: Path, size: int, *, buffering: int = -1) -> Any:
    """A file without a name, of which nothing is left whatever happens. Only its owner may read it.

    Args:
        directory: On the disk where it will be; made if it is not there.
        size: Bytes for which room is taken at once.
        buffering: As in :func:`open`.

    Raises:
        OSError: It cannot be made, or there is no room.
    """
    directory.mkdir(parents=True, exist_ok=True)
    try:
        file = tempfile.TemporaryFile(dir=directory, buffering=buffering, prefix="grating-")  # noqa: SIM115
    except OSError as error:
        error.filename = str(directory)  # rather than a name that nobody chose
        raise
    try:
        reserve(file, directory, size)
    except BaseException:
        file.close()
        raise
    return file


def require_room(path: Path, size: int) -> None:
    """Try, before anything is computed, whether there will be room for a file or directory.

    Args:
        path: The file or directory. Nothing is made there.
        size: Bytes that it will take.

    Raises:
        StorageError: There is none, or nothing can be written there.
    """
    with storing(path, size):
        temporary_file(_existing(path.parent), size).close()
