"""This module reads tensors together into one buffer, such as the weights of one layer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from grating_core.memory.blocks import BLOCKS, decoded, row_bytes
from grating_core.memory.checkpoint import SECTOR, Checkpoint, whole_sectors
from grating_core.memory.header import DTYPES, StoredTensor

_GAP = 64 * 1024  # bytes; reading a smaller gap for nothing costs less than a second read
PIECE = 1 << 22  # bytes of the buffer that holds stored tensors while they are converted
_ENTRIES = 1 << 18  # entries of blocks that are decoded at a time, which takes some bytes for each
_ALIGNMENT = 64


class Change(Protocol):
    """A change is added to a tensor after the tensor was read."""

    def add_to(self, weight: Tensor) -> None:
        """Change the tensor in place."""


@dataclass
class _Run:
    """A run is whole sectors of a file that hold neighbouring tensors."""

    first: StoredTensor
    start: int
    end: int


class TensorGroup:
    """A group reads tensors together into one buffer.

    If all tensors are stored in the wanted dtypes and in order, whole runs of them go from the file to the
    buffer, and the tensors are views into it. Otherwise each tensor passes through a small staging buffer and is
    converted.

    Args:
        checkpoint: The open files.
        tensors: The stored tensors, by the names that they will have.
        dtypes: The wanted dtype of each tensor, by name.
        changes: Changes that are added whenever a tensor is read, by the tensor's name; None for none.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        tensors: Mapping[str, StoredTensor],
        dtypes: Mapping[str, torch.dtype],
        changes: Mapping[str, Change] | None = None,
    ) -> None:
        self._checkpoint = checkpoint
        self._tensors = tensors
        self._dtypes = dtypes
        self._changes = {name: change for name, change in (changes or {}).items() if name in tensors}
        self.converts = not all(
            DTYPES.get(tensor.kind) == dtypes[name]
            and tensor.start % dtypes[name].itemsize == 0
            and not tensor.interleaved
            for name, tensor in tensors.items()
        )
        """Whether tensors are converted; reading then takes one more buffer."""
        self._runs = [] if self.converts else _coalesced(tensors.values())
        self.size = 0
        """Bytes of the buffer that the group needs."""
        self._offsets: dict[str, int] = {}  # bytes before each tensor in the buffer
        for run in self._runs:
            for name, tensor in tensors.items():
                if tensor.path == run.first.path and run.start <= tensor.start and tensor.end <= run.end:
                    self._offsets[name] = self.size + tensor.start - run.start
            self.size += run.end - run.start
        for name, tensor in tensors.items() if self.converts else ():
            self._offsets[name] = self.size
            self.size += -(-tensor.size * dtypes[name].itemsize // _ALIGNMENT) * _ALIGNMENT

    @property
    def bytes_read(self) -> int:
        """The bytes that one reading takes from the files."""
        return sum(part.end - part.start for part in self._runs or self._tensors.values())

    def views(self, buffer: Tensor) -> dict[str, Tensor]:
        """Return the tensors, by name, in a buffer that has been filled."""
        views = {}
        for name, offset in self._offsets.items():
            tensor, dtype = self._tensors[name], self._dtypes[name]
            end = offset + tensor.size * dtype.itemsize
            views[name] = buffer[offset:end].view(dtype).view(tensor.shape)
        return views

    def read(self, buffer: Tensor, staging: Tensor) -> None:
        """Fill a buffer.

        Args:
            buffer: uint8 ``[size]`` or longer, on the CPU, at a whole sector.
            staging: uint8 ``[PIECE]``, on the CPU, at a whole sector; used only if the group :attr:`converts`.

        Raises:
            FileError: A file cannot be read; the message names it and the tensor.
        """
        offset = 0
        for run in self._runs:
            length = run.end - run.start
            self._checkpoint.read(run.first, run.start, buffer[offset : offset + length], direct=True)
            offset += length
        views = self.views(buffer)
        if self.converts:
            for name, view in views.items():
                self._convert(self._tensors[name], view.view(-1), staging)
        for name, change in self._changes.items():
            change.add_to(views[name])

    def _convert(self, tensor: StoredTensor, target: Tensor, staging: Tensor) -> None:
        """Read one tensor through the staging buffer."""
        kind, block = tensor.kind, BLOCKS.get(tensor.kind)
        # What is read at a time are entries, blocks, or rows that do not stay where they are.
        unit = tensor.size // tensor.shape[0] if tensor.interleaved else 1 if block is None else block.entries
        each = row_bytes(kind, unit)
        step = min((PIECE - SECTOR) // each, _ENTRIES // unit if block else PIECE)
        for first in range(0, tensor.size // unit, step):
            count = min(step, tensor.size // unit - first)
            start = tensor.start + first * each
            shift = start % SECTOR
            end = shift + count * each
            self._checkpoint.read(tensor, start - shift, staging[: whole_sectors(end)], direct=True)
            stored = decoded(kind, staging[shift:end], unit)
            if tensor.interleaved:
                target.view(-1, unit)[tensor.place(torch.arange(first, first + count))] = stored.to(target.dtype)
            else:
                target[first * unit : (first + count) * unit].copy_(stored.view(-1))


def _coalesced(tensors: Iterable[StoredTensor]) -> list[_Run]:
    runs: list[_Run] = []
    for tensor in sorted(tensors, key=lambda tensor: (tensor.path, tensor.start)):
        end = whole_sectors(tensor.end)
        if runs and runs[-1].first.path == tensor.path and tensor.start <= runs[-1].end + _GAP:
            runs[-1].end = max(end, runs[-1].end)
        else:
            runs.append(_Run(tensor, tensor.start - tensor.start % SECTOR, end))
    return runs
