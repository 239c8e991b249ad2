"""This module reads the header of a safetensors file, as strictly as the format's own library."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

from grating_core.files.reading import parse_json

FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
DTYPES = FLOATS | {"I8": torch.int8, "U8": torch.uint8}
"""The dtypes of tensors that are used as they are stored, by the format's name; integers are never converted."""
KIND_OF = {dtype: kind for kind, dtype in DTYPES.items()}
LONGEST_HEADER = 100_000_000  # bytes; the format's own reader has this limit and the next
_TOO_LARGE = 2**64
BITS = {
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("I16", "U16", "F16", "BF16"), 16),
    **dict.fromkeys(("I32", "U32", "F32"), 32),
    **dict.fromkeys(("I64", "U64", "F64", "C64"), 64),
}  # fmt: skip


@dataclass(frozen=True)
class StoredTensor:
    """This class says where a tensor lies in a file.

    Attributes:
        name: The tensor's name in the file.
        path: The file.
        kind: The dtype as the format names it, such as ``"BF16"``, or a type of blocks, such as ``"Q8_0"``.
        shape: The tensor's shape.
        start: Offset of the tensor's first byte in the file.
        end: Offset of the byte after its last one.
        interleaved: Number of heads whose first and second halves of rows are stored in turn, as GGUF files have
            queries and keys of Llama; 0 for rows in order.
    """

    name: str
    path: Path
    kind: str
    shape: tuple[int, ...]
    start: int
    end: int
    interleaved: int = 0

    @property
    def size(self) -> int:
        """The number of elements."""
        return prod(self.shape)

    def place(self, rows: Tensor) -> Tensor:
        """Return the places in the tensor of rows, int64, that are numbered as they are stored."""
        if not self.interleaved:
            return rows
        half = self.shape[0] // self.interleaved // 2
        head, row = rows // (2 * half), rows % (2 * half)
        return head * 2 * half + row % 2 * half + row // 2

    def beginning(self, rows: int) -> StoredTensor:
        """Return the first rows of a table; all if there are no more."""
        return self.rows(0, rows)

    def as_bytes(self) -> StoredTensor:
        """Return a matrix as the bytes of its rows, uint8 ``[rows, bytes]``."""
        rows = self.shape[0]
        return replace(self, kind="U8", shape=(rows, (self.end - self.start) // rows))

    def row(self, number: int) -> StoredTensor:
        """Return one row of a table, ``[1, D]``."""
        return self.rows(number, number + 1)

    def rows(self, first: int, last: int) -> StoredTensor:
        """Return the rows of a table from ``first`` to the one before ``last``, as far as there are so many."""
        last = min(last, self.shape[0])
        length = (self.end - self.start) // self.shape[0]
        start, end = (self.start + number * length for number in (first, last))
        return replace(self, shape=(last - first, *self.shape[1:]), start=start, end=end)


def parse_header(header: bytes, path: Path, size: int) -> dict[str, StoredTensor]:
    """Return the place of each tensor of a file, by name.

    The rules are those of the safetensors library: the tensors cover the file from the header to its end, without
    holes and without overlap, and each is as long as its shape and dtype say. A name comes once.

    Args:
        header: The JSON text, without the eight bytes of its length.
        path: The file.
        size: Bytes of the file.

    Raises:
        ValueError: The header breaks a rule; the message names the tensor.
    """
    fields = parse_json(header.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_refuse)
    if not isinstance(fields, dict):
        raise ValueError("the header is not a JSON object")
    metadata = fields.pop("__metadata__", None)
    if metadata is not None and not (
        isinstance(metadata, dict) and all(isinstance(text, str) for text in metadata.values())
    ):
        raise ValueError("__metadata__ is not a map of texts")
    data = 8 + len(header)
    tensors = {name: _stored(name, path, entry, data) for name, entry in fields.items()}
    covered = data
    for tensor in sorted(tensors.values(), key=lambda tensor: (tensor.start, tensor.end)):
        if tensor.start != covered:
            what = "overlaps the tensor before it" if tensor.start < covered else "leaves a hole before it"
            raise ValueError(f"{tensor.name} {what}: it would begin at byte {tensor.start:,}, not {covered:,}")
        covered = tensor.end
    if covered != size:
        raise ValueError(f"the tensors end at byte {covered:,} and the file, which may be cut short, at {size:,}")
    return tensors


def _stored(name: str, path: Path, entry: Any, data: int) -> StoredTensor:
    if not (isinstance(entry, dict) and entry.keys() >= {"dtype", "shape", "data_offsets"}):
        raise ValueError(f"{name} lacks dtype, shape or data_offsets")
    kind, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(kind, str) or kind not in BITS:
        raise ValueError(f"{name} has dtype {kind!r}, which the format does not have")
    if not _are_sizes(shape):
        raise ValueError(f"{name} has shape {shape!r}")
    if not (_are_sizes(offsets) and len(offsets) == 2 and offsets[0] <= offsets[1]):
        raise ValueError(f"{name} has data_offsets {offsets!r}")
    tensor = StoredTensor(name, path, kind, tuple(shape), data + offsets[0], data + offsets[1])
    if 8 * (tensor.end - tensor.start) != _elements(tensor.shape) * BITS[kind]:
        raise ValueError(f"{name} has {tensor.end - tensor.start:,} bytes, which is not {kind} {list(shape)}")
    return tensor


def _are_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(size) is int and 0 <= size < _TOO_LARGE for size in value)


def _elements(shape: Iterable[int]) -> int:
    count = 1
    for size in shape:
        if (count := count * size) >= _TOO_LARGE:  # the product of very many sizes would take for ever
            raise ValueError(f"a shape begins with {count:,} elements")
    return count


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        [(name, _)] = Counter(name for name, _ in pairs).most_common(1)
        raise ValueError(f"{name} is there twice")  # the format forbids it, but json takes the last
    for name in found:
        name.encode("utf-8")  # this fails for half of a surrogate pair
    return found


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not JSON")
