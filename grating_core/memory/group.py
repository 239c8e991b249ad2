"""Tensors that are read together, such as the weights of one layer, into one buffer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from types import MappingProxyType
from typing import Protocol

import torch
from torch import Tensor

from grating_core.memory.checkpoint import SECTOR, Checkpoint, whole_sectors
from grating_core.memory.header import FLOATS, StoredTensor

_GAP = 64 * 1024  # reading this much for nothing costs less than a read of its own
PIECE = 1 << 22  # bytes of the buffer in which tensors are as stored while they are converted
_ALIGNMENT = 64


class Change(Protocol):
    """Something that is added to a tensor after it was read."""

    def add_to(self, weight: Tensor) -> None:
        """Change the tensor in place."""


@dataclass(frozen=True)
class _Place:
    """Where a tensor lies in the buffer."""

    offset: int
    dtype: torch.dtype
    shape: tuple[int, ...]


@dataclass
class _Run:
    """Whole sectors of a file that hold neighbouring tensors."""

    first: StoredTensor
    start: int
    end: int


class TensorGroup:
    """Tensors that are read together into one buffer.

    If all are stored in the dtype they are wanted in, whole runs of them go from the file to the buffer and the
    tensors are views into it. Otherwise they pass through a small buffer of their own and are converted.

    Args:
        checkpoint: Where they are read from.
        tensors: Each tensor by the name it will have.
        dtypes: The dtype each is wanted in.
        changes: What is added to some of them, by name, whenever they are read.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        tensors: Mapping[str, StoredTensor],
        dtypes: Mapping[str, torch.dtype],
        changes: Mapping[str, Change] = MappingProxyType({}),
    ) -> None:
        self._checkpoint = checkpoint
        self._changes = {name: change for name, change in changes.items() if name in tensors}
        self._tensors = tensors
        self._as_stored = all(
            FLOATS[tensor.kind] == dtypes[name] and tensor.start % dtypes[name].itemsize == 0
            for name, tensor in tensors.items()
        )
        self._runs = _coalesced(tensors)
        self.size = 0
        """Bytes of buffer that it needs."""
        self._places: dict[str, _Place] = {}
        if self._as_stored:
            self._place_runs(dtypes)
        else:
            self._place_tensors(dtypes)

    @property
    def bytes_read(self) -> int:
        """Bytes that one reading takes from the files."""
        if self._as_stored:
            return sum(run.end - run.start for run in self._runs)
        return sum(tensor.end - tensor.start for tensor in self._tensors.values())

    @property
    def converts(self) -> bool:
        """Whether tensors are wanted otherwise than they are stored; reading then takes a buffer more."""
        return not self._as_stored

    def _place_runs(self, dtypes: Mapping[str, torch.dtype]) -> None:
        for run in self._runs:
            for name, tensor in self._tensors.items():
                if tensor.path == run.first.path and run.start <= tensor.start and tensor.end <= run.end:
                    offset = self.size + tensor.start - run.start
                    self._places[name] = _Place(offset, dtypes[name], tensor.shape)
            self.size += run.end - run.start

    def _place_tensors(self, dtypes: Mapping[str, torch.dtype]) -> None:
        for name, tensor in self._tensors.items():
            self._places[name] = _Place(self.size, dtypes[name], tensor.shape)
            length = prod(tensor.shape) * dtypes[name].itemsize
            self.size += -(-length // _ALIGNMENT) * _ALIGNMENT

    def views(self, buffer: Tensor) -> dict[str, Tensor]:
        """The tensors, by name, in a buffer that has been filled."""
        views = {}
        for name, place in self._places.items():
            length = prod(place.shape) * place.dtype.itemsize
            views[name] = buffer[place.offset : place.offset + length].view(place.dtype).view(place.shape)
        return views

    def read(self, buffer: Tensor, staging: Tensor) -> None:
        """Fill a buffer.

        Args:
            buffer: uint8 ``[size]`` or longer, on the CPU, at a whole sector.
            staging: uint8 ``[PIECE]``, the same way; used if the group :attr:`converts`.

        Raises:
            FileError: A file cannot be read; the message names it and the tensor.
        """
        if self._as_stored:
            offset = 0
            for run in self._runs:
                length = run.end - run.start
                self._checkpoint.read(run.first, run.start, buffer[offset : offset + length], direct=True)
                offset += length
        else:
            for name, view in self.views(buffer).items():
                self._convert(self._tensors[name], view.view(-1), staging)
        if self._changes:
            views = self.views(buffer)
            for name, change in self._changes.items():
                change.add_to(views[name])

    def _convert(self, tensor: StoredTensor, target: Tensor, staging: Tensor) -> None:
        """Read one tensor through the staging buffer."""
        dtype = FLOATS[tensor.kind]
        step = (PIECE - SECTOR) // dtype.itemsize
        for first in range(0, tensor.size, step):
            count = min(step, tensor.size - first)
            start = tensor.start + first * dtype.itemsize
            shift = start % SECTOR
            end = shift + count * dtype.itemsize
            self._checkpoint.read(tensor, start - shift, staging[: whole_sectors(end)], direct=True)
            stored = staging[shift:end]
            # A tensor may lie at any byte, and torch wants elements at multiples of their size.
            stored = (stored if shift % dtype.itemsize == 0 else stored.clone()).view(dtype)
            target[first : first + count].copy_(stored)


def _coalesced(tensors: Mapping[str, StoredTensor]) -> list[_Run]:
    runs: list[_Run] = []
    for tensor in sorted(tensors.values(), key=lambda tensor: (tensor.path, tensor.start)):
        end = whole_sectors(tensor.end)
        if runs and runs[-1].first.path == tensor.path and tensor.start <= runs[-1].end + _GAP:
            runs[-1].end = max(end, runs[-1].end)
        else:
            runs.append(_Run(tensor, tensor.start - tensor.start % SECTOR, end))
    return runs
