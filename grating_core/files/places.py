"""Where grating keeps files, and what is there."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import platformdirs

from grating_core.errors import StorageError

_log = logging.getLogger("grating")

_said: set[Path | None] = set()


def cache_directory() -> Path:
    """Where grating keeps what it makes: ``GRATING_CACHE``, or the platform's place for caches.

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
    """A path that a user gave, where ``~`` is the home directory; if nobody knows that, the path as it is."""
    path = Path(path)
    try:
        return path.expanduser()
    except RuntimeError:
        return path


def is_there(path: Path) -> bool:
    """Whether a file or directory is there, as far as we may look; never an error."""
    try:
        path.stat()
    except (OSError, ValueError):  # ValueError: a name that no file can have
        return False
    return True


def is_kept(path: Path) -> bool:
    """Whether a file of the cache is there. If the cache cannot be looked into, that is said once.

    Args:
        path: Inside the cache directory.
    """
    try:
        path.stat()
    except FileNotFoundError:
        return False
    except OSError as error:
        go_on_without_cache(error)
        return False
    return True


def go_on_without_cache(error: OSError) -> None:
    """Say, once for each cache directory, that nothing is kept there.

    Args:
        error: Why not.
    """
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
    """The system's words for an error, and the place it is about."""
    if error.strerror is None:
        return str(error)
    words = "Not a directory" if isinstance(error, FileExistsError) else error.strerror
    return words if error.filename is None else f"{words}: {error.filename}"
