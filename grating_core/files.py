"""Where grating keeps files; files that are written as a whole or not at all; JSON that is read without trust."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import platformdirs


def cache_directory() -> Path:
    """Where grating keeps what it makes: ``GRATING_CACHE``, or the platform's place for caches."""
    chosen = os.environ.get("GRATING_CACHE")
    return Path(chosen).expanduser() if chosen else Path(platformdirs.user_cache_dir("grating"))


def read_json(path: Path) -> Any:
    """Read a JSON file that somebody else may have written, damaged or put there to do harm.

    Args:
        path: The file, UTF-8.

    Returns:
        What the file holds.

    Raises:
        OSError: The file is not there, cannot be read, or is not a regular file. A named pipe would be waited for
            without end.
        ValueError: The file is not JSON, or nested too deeply to be read.
    """
    if path.exists() and not path.is_file():
        raise OSError(f"{path} is not a regular file")
    return parse_json(path.read_bytes())


def parse_json(text: str | bytes) -> Any:
    """Read JSON text without trust.

    Args:
        text: The text; as bytes it is UTF-8.

    Returns:
        What the text says.

    Raises:
        ValueError: The text is not JSON, or nested too deeply to be read.
    """
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("the JSON is nested too deeply") from error


def replace_file(path: Path, data: bytes) -> None:
    """Write a file as a whole, or leave what is there.

    Args:
        path: The file; its directory exists.
        data: What it is to hold.

    Raises:
        OSError: It cannot be written.
    """
    with replacing(path) as file:
        file.write(data)


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file to write to, which takes the place of what is there when all has been written, or leaves nothing.

    Args:
        path: The file; its directory exists. Meanwhile what is written is beside it, as ``.{name}-…``.

    Raises:
        OSError: It cannot be written.
    """
    descriptor, unfinished = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
    try:
        with os.fdopen(descriptor, "wb") as file:
            yield file
        Path(unfinished).chmod(0o644)
        Path(unfinished).replace(path)
    finally:
        with suppress(FileNotFoundError):
            Path(unfinished).unlink()
