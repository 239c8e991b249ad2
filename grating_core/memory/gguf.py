"""This module reads the header of a GGUF file: metadata, and the place of each tensor.

The format is described at https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. Nothing in a file is trusted:
every length is compared with what is left of the file before anything is read.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

from grating_core.memory.blocks import BLOCKS, READABLE, row_bytes
from grating_core.memory.header import LONGEST_HEADER, StoredTensor

MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_ALIGNMENT = 32  # bytes, unless the metadata say another
_MOST_DIMENSIONS = 4
_LARGEST = 2**48  # elements of a tensor
_LONG = 1024  # entries; longer lists are the tokenizer's

# The types of tensors, in the order of their numbers.
_NAMES = """
F32 F16 Q4_0 Q4_1 - - Q5_0 Q5_1 Q8_0 Q8_1 Q2_K Q3_K Q4_K Q5_K Q6_K Q8_K IQ2_XXS IQ2_XS IQ3_XXS IQ1_S IQ4_NL IQ3_S
IQ2_S IQ4_XS I8 I16 I32 I64 F64 IQ1_M BF16 - - - TQ1_0 TQ2_0 - - - MXFP4 NVFP4
"""
_KINDS = {number: name for number, name in enumerate(_NAMES.split()) if name != "-"}

# The types of values in the metadata, by number, with their forms in bytes.
_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_TEXT, _LIST = 8, 9


class GgufHeader(NamedTuple):
    """This class holds what a GGUF file says before its weights.

    Attributes:
        metadata: The metadata by key, without lists of more than 1,024 entries, which are the tokenizer's.
        tensors: The place of each tensor, by the name that it has in the file. Shapes are as in torch.
    """

    metadata: dict[str, Any]
    tensors: dict[str, StoredTensor]


def parse_gguf(read: Callable[[int, int], bytes], path: Path, size: int) -> GgufHeader:
    """Return metadata and tensors of a GGUF file.

    Args:
        read: Function that returns the bytes of the file from a start on, of a length.
        path: The file.
        size: Bytes of the file.

    Raises:
        ValueError: The header breaks a rule of the format; the message names the key or the tensor.
    """
    reader = _Reader(read, size)
    if reader.take(4) != MAGIC:
        raise ValueError("it does not begin with GGUF")
    version = reader.number("I")
    if version not in _VERSIONS:
        other = " (its numbers begin with the highest byte)" if version & 0xFFFF == 0 else ""
        raise ValueError(f"it has version {version}{other}, and grating reads {' and '.join(map(str, _VERSIONS))}")
    tensors, keys = reader.count(24, "tensors"), reader.count(13, "keys")
    metadata: dict[str, Any] = {}
    for _ in range(keys):
        key = reader.text()
        if key in metadata:
            raise ValueError(f"{key} is there twice")
        metadata[key] = reader.value(reader.number("I"))
    alignment = metadata.get("general.alignment", _ALIGNMENT)
    if type(alignment) is not int or alignment < 8 or alignment % 8:
        raise ValueError(f"general.alignment={alignment!r} must be a multiple of 8")
    entries = sorted((_entry(reader) for _ in range(tensors)), key=lambda entry: entry[-1])
    data = -(-reader.position // alignment) * alignment
    limits = [*(start for *_, start in entries[1:]), size - data]
    found: dict[str, StoredTensor] = {}
    for (name, kind, shape, start), limit in zip(entries, limits, strict=False):
        if name in found:
            raise ValueError(f"{name} is there twice")
        if start % alignment:
            raise ValueError(f"{name} begins at byte {start:,}, which is no multiple of {alignment}")
        # Where a tensor of another kind ends need not be known: it is refused where it is wanted.
        end = start + _bytes(name, kind, shape) if kind in READABLE else max(start, limit)
        if end > size - data:
            raise ValueError(
                f"{name} would end at byte {data + end:,} and the file, which may be cut short, at {size:,}"
            )
        if end > limit:
            raise ValueError(f"{name} overlaps the tensor behind it")
        found[name] = StoredTensor(name, path, kind, shape, data + start, data + end)
    return GgufHeader(metadata, found)


def _entry(reader: _Reader) -> tuple[str, str, tuple[int, ...], int]:
    """Return name, kind, shape and start of the next tensor."""
    name, dimensions = reader.text(), reader.number("I")
    if not 1 <= dimensions <= _MOST_DIMENSIONS:
        raise ValueError(f"{name} has {dimensions:,} dimensions")
    shape = tuple(reader.number("Q") for _ in range(dimensions))[::-1]  # the format begins with the innermost
    if not 0 < prod(shape) < _LARGEST:
        raise ValueError(f"{name} has shape {list(shape)}")
    number = reader.number("I")
    return name, _KINDS.get(number, f"type {number}"), shape, reader.number("Q")


def _bytes(name: str, kind: str, shape: tuple[int, ...]) -> int:
    block = BLOCKS.get(kind)
    if block is not None and shape[-1] % block.entries:
        raise ValueError(f"{name} has rows of {shape[-1]:,} entries, which are no blocks of {kind}")
    return prod(shape[:-1]) * row_bytes(kind, shape[-1])


class _Reader:
    """This class reads a header from its beginning on."""

    def __init__(self, read: Callable[[int, int], bytes], size: int) -> None:
        self._read = read
        self._size = min(size, LONGEST_HEADER)
        self._data = b""
        self._start = 0  # of these bytes in the file
        self.position = 0

    def take(self, length: int) -> bytes:
        """Return the next bytes."""
        end = self.position + length
        if end > self._size:
            raise ValueError(
                f"its header would go on behind byte {self._size:,}, where the file ends or any header"
            )
        if end > self._start + len(self._data):
            self._data = self._read(self.position, min(max(length, 1 << 20), self._size - self.position))
            self._start = self.position
        first = self.position - self._start
        self.position = end
        return self._data[first : first + length]

    def number(self, form: str) -> Any:
        """Return the next number; see :mod:`struct` for forms."""
        return struct.unpack(f"<{form}", self.take(struct.calcsize(f"<{form}")))[0]

    def count(self, each: int, what: str) -> int:
        """Return the next number, which counts what has at least ``each`` bytes."""
        count: int = self.number("Q")
        if count * each > self._size - self.position:
            raise ValueError(f"it would have {count:,} {what}, for which the file is too short")
        return count

    def text(self) -> str:
        """Return the next text."""
        return self.take(self.count(1, "bytes of a text")).decode("utf-8", errors="replace")

    def value(self, kind: int) -> Any:
        """Return the next value of the metadata; None for a long list."""
        if kind in _NUMBERS:
            return self.number(_NUMBERS[kind])
        if kind == _TEXT:
            return self.text()
        if kind != _LIST:
            raise ValueError(f"its metadata have a value of type {kind}, which the format does not have")
        kind = self.number("I")
        if kind in _NUMBERS:
            form = _NUMBERS[kind]
            count = self.count(struct.calcsize(f"<{form}"), "entries of a list")
            data = self.take(count * struct.calcsize(f"<{form}"))
            return list(struct.unpack(f"<{count}{form}", data)) if count <= _LONG else None
        if kind != _TEXT:
            raise ValueError(f"its metadata have a list of type {kind}, which grating does not read")
        count = self.count(8, "texts")
        if count <= _LONG:
            return [self.text() for _ in range(count)]
        for _ in range(count):
            self.take(self.count(1, "bytes of a text"))
        return None
