"""This module finds the cache directory, and explains errors of files."""

from __future__ import annotations

import errno
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import platformdirs

from grating_core.errors import StorageError

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}

_log = logging.getLogger("grating")
_said: set[Path | None] = set()


def cache_directory() -> Path:
    """Return where grating keeps what it makes: ``GRATING_CACHE``, or the platform's place for caches.

    Raises:
        StorageError: The user has no home directory that anything knows of, and ``GRATING_CACHE`` names no other.
    """
    chosen = os.environ.get("GRATING_CACHE")
    try:
        return Path(chosen or platformdirs.user_cache_dir("grating")).expanduser().absolute()
    except (RuntimeError, OSError) as error:  # OSError: the working directory is gone
        told = f"GRATING_CACHE={chosen!r} names no directory" if chosen else "this user has no home directory"
        raise StorageError(
            f"grating has no place for its cache, because {told}: have GRATING_CACHE name one that can be written"
        ) from error


def expanded(path: str | Path) -> Path:
    """Return a user's path with the home directory for ``~``; unchanged if there is no known home directory."""
    path = Path(path)
    try:
        return path.expanduser()
    except RuntimeError:
        return path


def is_there(path: Path) -> bool:
    """Tell whether a file or directory is there, as far as we may look; this is never an error."""
    try:
        path.stat()
    except (OSError, ValueError):  # ValueError: a name that no file can have
        return False
    return True


def existing(directory: Path) -> Path:
    """Return the directory, or the nearest one above that is there."""
    return next((one for one in (directory, *directory.parents) if is_there(one)), directory)


def is_kept(path: Path) -> bool:
    """Tell whether a file of the cache is there. A cache that cannot be looked into is reported once."""
    try:
        path.stat()
    except FileNotFoundError:
        return False
    except OSError as error:
        go_on_without_cache(error)
        return False
    return True


def go_on_without_cache(error: OSError) -> None:
    """Say why nothing is kept in the cache directory, once for each such directory."""
    try:
        directory = cache_directory()
    except StorageError:
        directory = None
    if directory in _said:
        return
    _said.add(directory)
    told = str(error)
    if directory is not None:
        cause = error.__cause__ if isinstance(error.__cause__, OSError) else error
        told = (
            f"grating's cache, {directory}, cannot be used ({explained(cause)}): have GRATING_CACHE name a "
            f"directory that can be written"
        )
    _log.warning(
        "%s. Until then no lens is found that was calibrated here, and nothing is kept that is learnt", told
    )


def explained(error: OSError) -> str:
    """Return the system's words for an error, and the place it is about."""
    if error.strerror is None:
        return str(error)
    words = "Not a directory" if isinstance(error, FileExistsError) else error.strerror
    return words if error.filename is None else f"{words}: {error.filename}"


@contextmanager
def storing(path: Path, size: int = 0) -> Iterator[None]:
    """Make an ``OSError`` of writing say what was to be written, and where.

    Args:
        path: The file or directory.
        size: Bytes that it takes; 0 if that is not known.

    Raises:
        StorageError: An ``OSError`` was raised inside.
    """
    try:
        yield
    except StorageError:
        raise
    except OSError as error:
        reason = explained(error)
        if size:
            reason += f"; it takes {size / 1e6:,.1f} MB"
        if error.errno in _FULL:
            with suppress(OSError):
                free = shutil.disk_usage(existing(path.parent)).free
                reason += f", and {free / 1e6:,.1f} MB are free in {path.parent}"
        with suppress(StorageError):
            if path.is_relative_to(cache_directory()):
                reason += ". Make room, or have" if error.errno in _FULL else ". Have"
                reason += " GRATING_CACHE name a directory that can be written"
        raise StorageError(f"{path} cannot be written: {reason}") from error


def absolute(name: str, place: Any) -> str:
    """Return a path that exists as an absolute path, and anything else, such as a hub id, unchanged.

    Args:
        name: The name of the setting.
        place: The setting.

    Raises:
        ValueError: It is neither a text nor a path, or it is empty.
    """
    if not isinstance(place, str | Path) or not (place or name == "model"):
        raise ValueError(f"{name}={place!r} must be a directory{' or hub id' * (name == 'adapter')}, or None")
    path = expanded(place)
    # A cache directory may be made later, and is never a hub id. A "~" that is left names no user.
    made_later = name == "cache_dir" and not str(path).startswith("~")
    with suppress(OSError):  # there may be no working directory any more
        if place and (made_later or is_there(path)):
            return str(path.absolute())
    return str(place)
