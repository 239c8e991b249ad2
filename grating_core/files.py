"""Where grating keeps files, how they are written as a whole or not at all, and how JSON is read.

What is being written lies beside its place, as ``.{name}-{8 letters}``. See :mod:`grating_core.locks`.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import re
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, BinaryIO

import platformdirs

from grating_core.errors import StorageError

_UNFINISHED = re.compile(r"\.(.+)-[a-z0-9_]{8}")
_LOCK = re.compile(r"\.(.+)\.lock")
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_CANNOT_RESERVE = {errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL}

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


def check_regular(path: Path) -> None:
    """Raise ``OSError`` for what is there but no file: a named pipe would be waited for without end."""
    if path.exists() and not path.is_file():
        raise OSError(f"{path} is not a regular file")


def read_json(path: Path) -> Any:
    """Read a JSON file that somebody else may have written, damaged or put there to do harm.

    Args:
        path: The file, UTF-8.

    Returns:
        What the file holds.

    Raises:
        OSError: The file is not there, cannot be read, or is not a regular file.
        ValueError: The file is not JSON, or nested too deeply to be read.
    """
    check_regular(path)
    return parse_json(path.read_bytes())


def parse_json(text: str | bytes, **how: Any) -> Any:
    """Read JSON text without trust.

    Args:
        text: The text; as bytes it is UTF-8.
        how: As :func:`json.loads` takes it.

    Returns:
        What the text says.

    Raises:
        ValueError: The text is not JSON, or nested too deeply to be read.
    """
    try:
        return json.loads(text, **how)
    except RecursionError as error:
        raise ValueError("the JSON is nested too deeply") from error


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


def explained(error: OSError) -> str:
    """The system's words for an error, and the place it is about."""
    if error.strerror is None:
        return str(error)
    words = "Not a directory" if isinstance(error, FileExistsError) else error.strerror
    return words if error.filename is None else f"{words}: {error.filename}"


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
