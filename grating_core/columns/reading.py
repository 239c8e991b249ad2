"""Reading columns from the companion file: several at a time, in whole sectors, past the page cache."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from grating_core.columns.companion import ColumnSizes, Kind, contents, tables
from grating_core.errors import FileError
from grating_core.forking import Threads
from grating_core.kernels.choice import kernels
from grating_core.lifetime import closed_on_error
from grating_core.memory.checkpoint import SECTOR, Checkpoint, aligned_buffer
from grating_core.memory.companion import WAY_OUT, check_companion, checksum
from grating_core.memory.pieces import Pieces

READERS = 16  # reads at the same time: more were no faster on an NVMe disk
GAP = 16 << 10  # bytes between two columns that are read as well, unless the disk was measured
_LONGEST_READ = 256 << 10  # bytes that one call reads, so that all readers have work
_MEASURED = 32 << 20  # bytes of a file that is large enough to measure a disk; a smaller one is not measured
_MEASURED_READS = {SECTOR: 512, _LONGEST_READ: 64}  # reads of each size at a time
_ROUNDS = 5  # measurements that count, after one that does not
LONGEST_GAP = 16 << 10  # bytes; longer gaps saved no time on a disk of 2 GB/s


class Block(NamedTuple):
    """A block is what is read at a time.

    Attributes:
        columns: The columns' part of all columns to read.
        places: Offset of each of them in the staging memory, int64 ``[n]``.
        reads: The parts of the file.
    """

    columns: slice
    places: NDArray[np.int64]
    reads: Pieces


class ColumnFile:
    """This class reads a companion file. One thread at a time may use it.

    Args:
        path: The file.
        sizes: Sizes of the model's MLPs.
        fingerprint: Identity of the model's weights.

    Raises:
        FileError: The file is damaged, or belongs to other weights.
    """

    def __init__(self, path: Path, sizes: ColumnSizes, fingerprint: str) -> None:
        self.path = path
        self.sizes = sizes
        try:
            self._checkpoint = Checkpoint([path], lasting=True)
            with closed_on_error(self._checkpoint):
                check_companion(path, self._checkpoint, contents(sizes), fingerprint)
                self._tables = {table: _Table(self._checkpoint, *table) for table in tables(sizes)}
        except (FileError, KeyError, ValueError, OSError) as error:
            raise FileError(f"{path} is no companion file of this model ({error}); {WAY_OUT}") from error
        self._readers = Threads(READERS, "grating-columns")
        self.gap = GAP
        """The longest gap between two columns, in bytes, that is read through."""
        self.sector = next(iter(self._tables.values())).sector
        """The bytes of a sector of the disk: 512 or 4,096."""

    def plan(self, number: int, kind: Kind, columns: NDArray[np.int64], staging: Tensor) -> Iterator[Block]:
        """Yield the blocks in which columns are read, so that each fits into half of the staging memory.

        Sectors that columns share, and short gaps between columns, are read as well.

        Args:
            number: Number of the layer, from 1.
            kind: Kind of the columns.
            columns: Numbers of the columns, rising, int64 ``[n]``.
            staging: Memory that begins at a whole sector, uint8 ``[bytes]``. Blocks take its halves in turn.
        """
        table = self._tables[number, kind]
        begins = table.start + columns * table.row
        yield from plan_blocks(begins, table.row, self.gap, staging.numpy(), self.sector)

    def read(self, number: int, kind: Kind, block: Block) -> Iterator[Future[None]]:
        """Start to read a block. Every step of the iterator starts some more reads.

        Args:
            number: Number of the layer, from 1.
            kind: Kind of the columns.
            block: A block of :meth:`plan`.

        Yields:
            Futures to wait for. Their results raise FileError if the file cannot be read.

        Raises:
            RuntimeError: No thread can be started. The reads that were yielded before go on.
        """
        return self._start(self._tables[number, kind], block.reads)

    def _start(self, table: _Table, reads: Pieces) -> Iterator[Future[None]]:
        share = -(-len(reads.starts) // READERS)
        for start in range(0, len(reads.starts), share):
            yield self._readers.submit(table.read, reads.part(slice(start, start + share)))

    def verify(self, number: int, kind: Kind, columns: NDArray[np.int64], block: Block) -> None:
        """Compare what was read with the checksums.

        Raises:
            FileError: A column is damaged.
        """
        self._tables[number, kind].verify(columns[block.columns], block)

    def measure_gap(self) -> None:
        """Measure for a fraction of a second how long a gap has to be to be worth another read.

        Reads of a sector and long reads take turns. The first ones are not counted, because threads start then and
        disks wake up. The gap is bounded, because what is read through takes memory and processor as well.
        """
        table, (*_, last) = self._tables[1, "inputs"], self._tables.values()
        span = last.start - table.start
        if span <= _MEASURED:
            return
        seconds = [
            [self._seconds(table, span, size, number) for size in _MEASURED_READS] for number in range(1 + _ROUNDS)
        ]
        sector, long = (median(values) for values in zip(*seconds[1:], strict=True))
        self.gap = min(fit_gap(sector, _LONGEST_READ / long), LONGEST_GAP)

    def _seconds(self, table: _Table, span: int, size: int, seed: int) -> float:
        """Measure the seconds that each of many reads takes, with all readers at work."""
        memory: NDArray[np.uint8] = aligned_buffer(READERS * size).numpy()
        places = np.repeat(np.arange(READERS) * size, _MEASURED_READS[size] // READERS)
        first = -(-table.start // SECTOR) * SECTOR
        chance = np.random.default_rng((size, seed))
        starts = first + chance.integers(0, (span - size) // SECTOR, len(places)) * SECTOR
        started = perf_counter()
        for reading in list(self._start(table, Pieces(starts, np.full(len(places), size), memory, places))):
            reading.result()
        return (perf_counter() - started) / len(places)

    def close(self) -> None:
        """Stop the threads and close the file."""
        self._readers.close()
        self._checkpoint.close()


def plan_blocks(
    begins: NDArray[np.int64], row: int, gap: int, memory: NDArray[np.uint8], sector: int = SECTOR
) -> Iterator[Block]:
    """Yield the blocks in which rows of a file are read, so that each fits into half of the memory.

    Args:
        begins: Offsets of the rows in the file, rising, int64 ``[n]``.
        row: Bytes of a row.
        gap: The longest gap in bytes that is read through.
        memory: Memory that begins at a whole sector, uint8 ``[bytes]``. Blocks take its halves in turn.
        sector: Bytes of a sector of the disk.
    """
    if not len(begins):
        return
    half = len(memory) // 2 // SECTOR * SECTOR
    lows, highs, joined = find_sectors(begins, row, gap, sector)
    # What each column adds to what is read, if the one before it is in the same block.
    added = np.where(joined, highs - np.roll(highs, 1), highs - lows)
    until = np.cumsum(added)
    first, at = 0, 0
    while first < len(begins):
        before = until[first] - (highs[first] - lows[first])
        end = max(first + 1, int(np.searchsorted(until, before + half, side="right")))
        part = slice(first, end)
        runs = np.flatnonzero(np.concatenate(([True], ~joined[first + 1 : end])))
        starts = lows[part][runs]
        ends = highs[part][np.concatenate((runs[1:] - 1, [end - first - 1]))]
        offsets = at + np.concatenate(([0], np.cumsum(ends - starts)[:-1]))
        lengths = np.diff(np.concatenate((runs, [end - first])))
        places = begins[part] + np.repeat(offsets - starts, lengths)
        yield Block(part, places, _cut(starts, ends, memory, offsets))
        first, at = end, half - at


def find_sectors(
    begins: NDArray[np.int64], row: int, gap: int, sector: int = SECTOR
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.bool_]]:
    """Return where the sectors of each row begin and end, and whether they are read together with those before.

    Args:
        begins: Offsets of rows in a file, rising, int64 ``[n]``.
        row: Bytes of a row.
        gap: The longest gap in bytes that is read through.
        sector: Bytes of a sector of the disk.
    """
    lows = begins // sector * sector
    highs = -(-(begins + row) // sector) * sector
    return lows, highs, np.concatenate(([False], lows[1:] - highs[:-1] <= gap))


def fit_gap(sector: float, bandwidth: float) -> int:
    """Return the longest gap, in bytes, that is read through sooner than a second read begins.

    Args:
        sector: Seconds that one of many reads of a sector takes.
        bandwidth: Bytes a second of long reads.
    """
    return max(0, int(sector * bandwidth) // SECTOR - 1) * SECTOR


def _cut(
    starts: NDArray[np.int64], ends: NDArray[np.int64], memory: NDArray[np.uint8], places: NDArray[np.int64]
) -> Pieces:
    """Cut long runs into pieces."""
    counts = -(-(ends - starts) // _LONGEST_READ)
    if counts.max() > 1:
        beyond = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        starts, places = (np.repeat(part, counts) + beyond * _LONGEST_READ for part in (starts, places))
        ends = np.minimum(np.repeat(ends, counts), starts + _LONGEST_READ)
    return Pieces(starts, ends - starts, memory, places)


def read_quickly(file: int, pieces: Pieces) -> int:
    """See :func:`grating_core.kernels.columns.read_pieces`."""
    return kernels().read_pieces(file, pieces)


class _Table:
    """This class reads the columns of one kind of one layer."""

    def __init__(self, checkpoint: Checkpoint, number: int, kind: Kind) -> None:
        name = f"{number}.{kind}"
        self._checkpoint = checkpoint
        self._tensor = checkpoint.tensors[name]
        self.start = self._tensor.start
        self.sector = checkpoint.sector(self._tensor)
        self.row = (self._tensor.end - self._tensor.start) // self._tensor.shape[0]
        stored = checkpoint.tensors[f"{name}.checks"]
        checks = torch.empty(stored.end - stored.start, dtype=torch.uint8)
        checkpoint.read(stored, stored.start, checks)
        self._checks = checks.numpy().view("<u8")
        # A column that was right once is not checked again, because checking takes as long as reading.
        self._seen = np.zeros(len(self._checks), dtype=bool)
        self._changes = checkpoint.changes(self._tensor)

    def read(self, pieces: Pieces) -> None:
        self._checkpoint.read_pieces(self._tensor, pieces, read_quickly)

    def verify(self, columns: NDArray[np.int64], block: Block) -> None:
        if (changes := self._checkpoint.changes(self._tensor)) != self._changes:
            self._seen[:] = False
            self._changes = changes
        new = np.flatnonzero(~self._seen[columns])
        for index in new.tolist():
            place, number = int(block.places[index]), int(columns[index])
            if checksum(block.reads.buffer[place : place + self.row]) != self._checks[number]:
                raise FileError(
                    f"{self._tensor.path}: column {number} of {self._tensor.name} is damaged; {WAY_OUT}"
                )
        self._seen[columns[new]] = True
