"""Between two layers, the hidden states of all candidates are in memory or in a temporary file."""

from __future__ import annotations

import errno
import mmap
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from ctypes import memmove
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
from grating_core.memory.meter import Meter
from grating_core.memory.positioned import read_at

FILL = 64  # the most rows that computing adds to a span


class Span(Protocol):
    """A span is a range of tokens that are computed together."""

    @property
    def tokens(self) -> slice:
        """The span's place on the token axis."""

    @property
    def rows(self) -> int:
        """The number of rows that are computed for the span, fill included."""

    @property
    def changed(self) -> bool:
        """Whether the caller leaves other states."""


AnySpan = TypeVar("AnySpan", bound=Span)


class HiddenInMemory:
    """This class keeps the hidden states of all candidates alive in one tensor, packed along the token axis.

    Args:
        tokens: Length of the token axis.
        width: Width D of a state.
        dtype: The states' dtype.
        device: The states' device.
    """

    def __init__(self, tokens: int, width: int, dtype: torch.dtype, device: torch.device) -> None:
        shape = (tokens + FILL, width)
        if device.type == "cpu":
            # This memory goes back to the system at the end. The allocator might keep parts of it.
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
            spans: The spans. Those that are changed do not overlap.
            read: Whether the caller needs the states from before.
            write: Whether the states that the caller leaves are needed later.

        Returns:
            Each span with its states ``[rows, D]``: first the span's tokens, then fill with arbitrary values. If
            the span is changed, the tokens' rows are kept as they are when the caller asks for the next span.
        """
        for span in spans:  # the fill of a span is the beginning of the next span
            yield span, self._states[span.tokens.start : span.tokens.start + span.rows]

    def keep(self, runs: Sequence[slice]) -> None:
        """Keep only the tokens of some runs on the token axis, which rise and do not touch."""
        end = 0
        for run in runs:
            # Tokens only move forward, so moving a run never overwrites a token that has to move later.
            if end < run.start:
                self._move(self._states[run], self._states[end : end + _length(run)])
            end += _length(run)

    def _move(self, states: Tensor, place: Tensor) -> None:
        """Move states to a place that they may overlap."""
        if states.device.type == "cpu":
            memmove(place.data_ptr(), states.data_ptr(), states.nbytes)
        else:
            place.copy_(states.clone())


class HiddenOnDisk:
    """This class keeps hidden states in a temporary file. Three spans are in memory: computed, written and read.

    The file has no name, so nothing is left of it even after a crash. Use the object in a ``with`` block.

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
        self._where = torch.arange(tokens)  # row in the file of each token alive
        self._buffers = [torch.zeros(rows, width, dtype=dtype) for _ in range(3)]
        try:
            # The room is taken before computing begins, so that a full disk is noticed at once.
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
            states = self._buffers[place][: _length(spans[number].tokens)]
            moves.append(self._mover.submit(what, self._where[spans[number].tokens], states))
            busy[place] = moves[-1]

        if read:
            move(self._read, 0)
        for number, span in enumerate(spans):
            place = number % len(self._buffers)
            self._wait(busy[place])
            if read and number + 1 < len(spans):
                move(self._read, number + 1)
            states = self._buffers[place][: span.rows]
            part = states.to(self._device)
            yield span, part
            if write and span.changed:
                if part is not states:
                    states.copy_(part)
                move(self._write, number)
                self._meter.bytes_spilled += _length(span.tokens) * self._row_bytes
        for done in moves:
            self._wait(done)

    def keep(self, runs: Sequence[slice]) -> None:
        """See :meth:`HiddenInMemory.keep`. Dropped states stay in the file, but are not read any more."""
        self._where = torch.cat([self._where[run] for run in runs])

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
                raise OSError("the file is shorter than the data that was written to it")

    def _write(self, where: Tensor, states: Tensor) -> None:
        for start, view in self._stretches(where, states):
            if write_at(self._file, start, view) != len(view):
                raise OSError(errno.ENOSPC, "the disk has no room for all hidden states")

    def _stretches(self, where: Tensor, states: Tensor) -> Iterator[tuple[int, memoryview]]:
        """Yield the offset in the file of each run of neighbouring tokens, and their states in memory."""
        bytewise: Any = states.view(torch.uint8).numpy()
        data = memoryview(bytewise).cast("B")
        gaps = (where.diff() != 1).nonzero()[:, 0] + 1
        for first, last in pairwise([0, *gaps.tolist(), len(where)]):
            yield int(where[first]) * self._row_bytes, data[first * self._row_bytes : last * self._row_bytes]

    def _error(self, error: OSError) -> StorageError:
        size = len(self._where) * self._row_bytes
        return StorageError(
            f"the hidden states of {len(self._where):,} tokens cannot be kept in a file in {self._directory} "
            f"({size / 1e6:.0f} MB): {explained(error)}. Make room there, rerank fewer "
            f"documents at a time, or raise memory_budget"
        )


HiddenStates = HiddenInMemory | HiddenOnDisk
"""Hidden states of the candidates that are alive, packed along the token axis."""


def write_at(file: FileIO, start: int, view: memoryview) -> int:
    """Write at a place in a file, and return the number of bytes written, which may be fewer than given."""
    if hasattr(os, "pwrite"):  # as in read_at
        return os.pwrite(file.fileno(), view, start)
    file.seek(start)
    return file.write(view) or 0


def _length(tokens: slice) -> int:
    return int(tokens.stop - tokens.start)
