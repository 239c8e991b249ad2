"""Where the hidden states of all candidates are between two layers: in memory, or in a temporary file."""

from __future__ import annotations

import errno
import mmap
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from io import FileIO
from itertools import pairwise
from math import prod
from pathlib import Path
from time import perf_counter
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from grating_core.errors import StorageError
from grating_core.files.places import explained
from grating_core.files.writing import temporary_file
from grating_core.forking import Threads
from grating_core.memory.checkpoint import read_at
from grating_core.memory.meter import Meter

FILL = 64  # the most rows that computing adds to a span
_GATHERED = 4096  # tokens that are moved at a time when candidates leave


class Span(Protocol):
    """A span is tokens that are computed together."""

    @property
    def tokens(self) -> slice:
        """Return where they are on the token axis."""

    @property
    def rows(self) -> int:
        """Return how many rows are computed for them, fill included."""


AnySpan = TypeVar("AnySpan", bound=Span)


class HiddenInMemory:
    """All hidden states of the candidates that are alive are in one tensor, packed along the token axis.

    Args:
        tokens: Length of the token axis.
        width: Width D of a state.
        dtype: The states' dtype.
        device: The states' device.
    """

    def __init__(self, tokens: int, width: int, dtype: torch.dtype, device: torch.device) -> None:
        shape = (1, tokens + FILL, width)
        if device.type == "cpu":
            # Memory of its own, which goes back to the system at the end; the allocator might keep it, in parts.
            private = {} if sys.platform == "win32" else {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS}
            memory = mmap.mmap(-1, prod(shape) * dtype.itemsize, **private)
            self._states = torch.frombuffer(memory, dtype=dtype).view(shape)
        else:
            self._states = torch.zeros(shape, dtype=dtype, device=device)

    def visit(
        self, spans: Sequence[AnySpan], *, read: bool = True, write: bool = True
    ) -> Iterator[tuple[AnySpan, Tensor]]:
        """Go through the spans in their order.

        Args:
            spans: The spans, which divide the token axis without gaps.
            read: Whether the states matter that are there before.
            write: Whether the states matter that will be there after.

        Returns:
            Each span with its states ``[1, rows, D]``: the first of them are the span's tokens, the rest is fill
            of any content. What the tokens' rows hold when the next span is asked for is kept.
        """
        for span in spans:  # the fill of one is the beginning of the next
            yield span, self._states[:, span.tokens.start : span.tokens.start + span.rows]

    def keep(self, index: Tensor) -> None:
        """Keep only some tokens; ``index``, int64 and ascending, says where they are on the token axis."""
        # Tokens only move forward, so moving them piece by piece never overwrites one that is still to move.
        for start in range(0, len(index), _GATHERED):
            part = index[start : start + _GATHERED]
            self._states[:, start : start + len(part)] = self._states[:, part]


class HiddenOnDisk:
    """Hidden states are in a temporary file; three spans are in memory: computing, being written, being read.

    The file has no name, so nothing is left of it whatever happens. Use it in a ``with`` block.

    Args:
        tokens: Length of the token axis.
        width: Width D of a state.
        dtype: The states' dtype.
        device: The device that computes.
        rows: The most rows of a span, fill included.
        directory: The file's directory.
        meter: The meter that counts bytes and waiting.

    Raises:
        StorageError: The file cannot be made, or there is no room for it.
    """

    def __init__(
        self,
        tokens: int,
        width: int,
        dtype: torch.dtype,
        device: torch.device,
        *,
        rows: int,
        directory: Path,
        meter: Meter,
    ) -> None:
        self._directory = directory
        self._meter = meter
        self._row_bytes = width * dtype.itemsize
        self._device = device
        self._where = torch.arange(tokens)  # of each token alive in the file, in rows
        self._buffers = [torch.zeros(1, rows, width, dtype=dtype) for _ in range(3)]
        try:
            # Room is taken before the computing begins, so that a full disk is known at once.
            self._file: FileIO = temporary_file(directory, tokens * self._row_bytes, buffering=0)
        except OSError as error:
            raise self._error(error) from error
        # One thread: a buffer is written to disk before the next read into it begins.
        self._mover = Threads(1, "grating-hidden")

    def __enter__(self) -> HiddenOnDisk:
        return self

    def __exit__(self, *_: object) -> None:
        self._mover.close()
        self._file.close()

    def visit(
        self, spans: Sequence[AnySpan], *, read: bool = True, write: bool = True
    ) -> Iterator[tuple[AnySpan, Tensor]]:
        """See :meth:`HiddenInMemory.visit`; raises :class:`StorageError` when the disk fails."""
        moves: list[Future[None]] = []
        busy: list[Future[None] | None] = [None] * len(self._buffers)  # the last move of each buffer

        def move(what: Callable[[Tensor, Tensor], None], number: int) -> None:
            place = number % len(self._buffers)
            states = self._buffers[place][0, : _length(spans[number].tokens)]
            moves.append(self._mover.submit(what, self._where[spans[number].tokens], states))
            busy[place] = moves[-1]

        if read:
            move(self._read, 0)
        for number, span in enumerate(spans):
            place = number % len(self._buffers)
            self._wait(busy[place])
            if read and number + 1 < len(spans):
                move(self._read, number + 1)
            states = self._buffers[place][:, : span.rows]
            part = states.to(self._device)
            yield span, part
            if write:
                if part is not states:
                    states.copy_(part)
                move(self._write, number)
                self._meter.bytes_spilled += _length(span.tokens) * self._row_bytes
        for done in moves:
            self._wait(done)

    def keep(self, index: Tensor) -> None:
        """See :meth:`HiddenInMemory.keep`. What leaves stays in the file and is not looked at any more."""
        self._where = self._where[index.cpu()]

    def _wait(self, move: Future[None] | None) -> None:
        if move is None:
            return
        started = perf_counter()
        try:
            move.result()
        except OSError as error:
            raise self._error(error) from error
        finally:
            self._meter.seconds_waited += perf_counter() - started

    def _read(self, where: Tensor, states: Tensor) -> None:
        for start, view in self._stretches(where, states):
            if read_at(self._file, start, [view]) != len(view):
                raise OSError("the file is shorter than what was written")

    def _write(self, where: Tensor, states: Tensor) -> None:
        for start, view in self._stretches(where, states):
            if write_at(self._file, start, view) != len(view):
                raise OSError(errno.ENOSPC, "no room for all that was to be written")

    def _stretches(self, where: Tensor, states: Tensor) -> Iterator[tuple[int, memoryview]]:
        """Yield where tokens that lie side by side begin in the file, and their states in memory."""
        bytewise: Any = states.view(torch.uint8).numpy()
        data = memoryview(bytewise).cast("B")
        gaps = (where.diff() != 1).nonzero()[:, 0] + 1
        for first, last in pairwise([0, *gaps.tolist(), len(where)]):
            yield int(where[first]) * self._row_bytes, data[first * self._row_bytes : last * self._row_bytes]

    def _error(self, error: OSError) -> StorageError:
        size = len(self._where) * self._row_bytes
        return StorageError(
            f"the hidden states of {len(self._where):,} tokens are to be kept in a file in {self._directory} "
            f"({size / 1e6:.0f} MB), which failed: {explained(error)}. Make room there, rerank fewer "
            f"documents at a time, or raise memory_budget"
        )


HiddenStates = HiddenInMemory | HiddenOnDisk
"""The hidden states of the candidates that are alive, packed along the token axis."""


def write_at(file: FileIO, start: int, view: memoryview) -> int:
    """Write at a place in a file, and return how many bytes were written, which may be fewer than there are."""
    if hasattr(os, "pwrite"):  # as in read_at
        return os.pwrite(file.fileno(), view, start)
    file.seek(start)
    return file.write(view) or 0


def _length(tokens: slice) -> int:
    return int(tokens.stop - tokens.start)
