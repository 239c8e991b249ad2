"""This module reads files that somebody else may have written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def check_regular(path: Path) -> None:
    """Raise ``OSError`` for what is there but no file: a named pipe would be waited for without end."""
    if path.exists() and not path.is_file():
        raise OSError(f"{path} is not a regular file")


def read_json(path: Path) -> Any:
    """Read a JSON file that somebody else may have written, damaged or put there to do harm.

    Args:
        path: The file, UTF-8.

    Raises:
        OSError: The file is not there, cannot be read, or is not a regular file.
        ValueError: The file is not JSON, or nested too deeply to be read.
    """
    check_regular(path)
    return parse_json(path.read_bytes())


def read_json_or(path: Path, default: Any) -> Any:
    """Read a JSON file as :func:`read_json` does, or return ``default`` if there is none."""
    return read_json(path) if path.exists() else default


def parse_json(text: str | bytes, **how: Any) -> Any:
    """Read JSON text without trust.

    Args:
        text: The text; as bytes it is UTF-8.
        how: Options of :func:`json.loads`.

    Raises:
        ValueError: The text is not JSON, or nested too deeply to be read.
    """
    try:
        return json.loads(text, **how)
    except RecursionError as error:
        raise ValueError("the JSON is nested too deeply") from error
