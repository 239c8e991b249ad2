"""Files that are there as a whole or not at all."""

from __future__ import annotations

import os
import tempfile
from contextlib import suppress
from pathlib import Path


def replace_file(path: Path, data: bytes) -> None:
    """Write a file as a whole, or leave what is there.

    Args:
        path: The file; its directory exists.
        data: What it is to hold.

    Raises:
        OSError: It cannot be written.
    """
    descriptor, unfinished = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
        Path(unfinished).chmod(0o644)
        Path(unfinished).replace(path)
    finally:
        with suppress(FileNotFoundError):
            Path(unfinished).unlink()
