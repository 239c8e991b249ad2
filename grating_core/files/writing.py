"""This module writes files as a whole or not at all, and takes room for them."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, BinaryIO

from grating_core.files.locks import locked, unfinished
from grating_core.files.places import existing, storing

_CANNOT_RESERVE = {errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL}


@contextmanager
def replacing(path: Path, size: int = 0, *, private: bool = False) -> Iterator[BinaryIO]:
    """Open a file that takes the place of what is there when all has been written, or leaves nothing.

    Args:
        path: The file, whose lock the caller holds.
        size: Bytes that it will have, for which room is taken at once; 0 if that is not known.
        private: Whether only its owner may read it; otherwise all whom the umask allows.

    Raises:
        StorageError: The file cannot be written.
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


def replace_file(path: Path, data: bytes, *, private: bool = False) -> None:
    """Lock a file and write it as a whole, or leave what is there; see :func:`replacing`."""
    with locked(path), replacing(path, len(data), private=private) as file:
        file.write(data)


def make_private(directory: Path) -> None:
    """Make a directory into which only its owner may look; raise ``StorageError`` if that cannot be."""
    with storing(directory):
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)


def reserve(file: IO[bytes], directory: Path, size: int) -> None:
    """Take room for a file that will be written, so that a full disk is known before anything is computed.

    Args:
        file: The file, open for writing and empty.
        directory: The file's directory.
        size: Bytes that it will have.

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
    """Open a file without a name, of which nothing is left whatever happens. Only its owner may read it.

    Args:
        directory: A directory of the disk where the file will be; it is made if it is not there.
        size: Bytes for which room is taken at once.
        buffering: The buffer's size as :func:`open` takes it.

    Raises:
        OSError: The file cannot be made, or there is no room.
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
    """Try, before anything is computed, whether there will be room for a file or directory of ``size`` bytes.

    Raises:
        StorageError: There is none, or nothing can be written there.
    """
    with storing(path, size):
        temporary_file(existing(path.parent), size).close()
