"""A companion file holds a model's weights once more, in the form in which grating streams them.

It is a safetensors file that grating writes as a whole or not at all. Its header names the identity of the
weights, and is whole sectors long, so that what follows can be read past the page cache.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from grating_core.files.locks import locked
from grating_core.files.places import is_there
from grating_core.files.reading import parse_json
from grating_core.files.writing import replacing
from grating_core.memory.checkpoint import Checkpoint, whole_sectors
from grating_core.memory.header import BITS

_FORMAT = "1"
WAY_OUT = "delete the file, and grating writes it again when the model is loaded"

Contents = Mapping[str, tuple[str, tuple[int, ...]]]
"""The tensors of a companion file in their order: name, dtype as the format names it, and shape."""


def write_companion(path: Path, contents: Contents, fingerprint: str, parts: Iterable[memoryview]) -> None:
    """Write a companion file as a whole or not at all, unless another process has written it meanwhile.

    Args:
        path: The file.
        contents: The tensors of the file.
        fingerprint: Identity of the model's weights.
        parts: The bytes of all tensors, in pieces of any size.

    Raises:
        StorageError: There is no room for the file, or it cannot be written.
    """
    header, size = _header(contents, fingerprint)
    with locked(path):
        if is_there(path):
            return
        with replacing(path, size) as file:
            file.write(header)
            for part in parts:
                file.write(part)


def _header(contents: Contents, fingerprint: str) -> tuple[bytes, int]:
    """Return the beginning of the file, whole sectors long, and the size of the file in bytes."""
    entries: dict[str, Any] = {"__metadata__": {"format": _FORMAT, "fingerprint": fingerprint}}
    end = 0
    for name, (kind, shape) in contents.items():
        start, end = end, end + prod(shape) * BITS[kind] // 8
        entries[name] = {"dtype": kind, "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(entries).encode()
    length = whole_sectors(8 + len(text)) - 8
    return length.to_bytes(8, "little") + text.ljust(length), 8 + length + end


def check_companion(path: Path, checkpoint: Checkpoint, contents: Contents, fingerprint: str) -> None:
    """Compare a companion file with what it should be.

    Args:
        path: The file.
        checkpoint: The open file.
        contents: The tensors that it should have.
        fingerprint: Identity of the model's weights.

    Raises:
        ValueError: The file is another model's, or of another release of grating.
        KeyError: A tensor is missing.
    """
    with path.open("rb") as file:
        header = parse_json(file.read(int.from_bytes(file.read(8), "little")))
    metadata = header.get("__metadata__") or {}
    if metadata.get("format") != _FORMAT or metadata.get("fingerprint") != fingerprint:
        raise ValueError(
            f"it belongs to other weights, or comes from another release of grating: its fingerprint is "
            f"{str(metadata.get('fingerprint'))[:16]}..., and this model's is {fingerprint[:16]}..."
        )
    for name, (kind, shape) in contents.items():
        stored = checkpoint.tensors[name]
        if (stored.kind, stored.shape) != (kind, shape):
            raise ValueError(f"its {name} has another shape than the model's")


def checksum(data: Any) -> int:
    """Return the sum of 64-bit words. A CRC takes ten times as long, which is as long as reading."""
    return int(np.add.reduce(np.frombuffer(data, dtype="<u8")))
