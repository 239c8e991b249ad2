"""Reading columns from the companion file: several at a time, in whole sectors, past the page cache."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from grating_core.columns.companion import KINDS, ColumnSizes, Kind, contents, tables
from grating_core.columns.disk import Disk, fit_gap, fit_reach
from grating_core.errors import FileError
from grating_core.kernels.choice import kernels
from grating_core.kernels.compiled_reading import CompiledReading
from grating_core.kernels.reading import Reading
from grating_core.lifetime import closed_on_error
from grating_core.memory.checkpoint import SECTOR, Checkpoint, aligned_buffer
from grating_core.memory.companion import WAY_OUT, check_companion, checksum
from grating_core.memory.header import StoredTensor
from grating_core.memory.pieces import Pieces

LONGEST_READ = 512 << 10  # bytes that one call reads, so that all threads have work
_MEASURED = 32 << 20  # bytes of a file that is large enough to measure a disk
_SHORT_READS, _LONG_READS = 512, 32  # at a time
_ROUNDS = 5  # measurements that count, after one that does not


class Block(NamedTuple):
    """A block is what is read at a time.

    Attributes:
        columns: The columns' part of all columns to read.
        places: Offset of each of them in the memory that they are read into, int64 ``[n]``.
        reads: The parts of the file.
    """

    columns: slice
    places: NDArray[np.int64]
    reads: Pieces

    def first(self) -> Block:
        """Return the block as one of its own columns only."""
        return self._replace(columns=slice(0, len(self.places)))

    def into(self, memory: NDArray[np.uint8]) -> Block:
        """Return the block with the memory that it is read into."""
        return self._replace(reads=self.reads._replace(buffer=memory))


_NOWHERE = np.zeros(0, dtype=np.uint8)


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
        self.disk = Disk()
        """What reads from the disk cost."""
        self.sector = next(iter(self._tables.values())).sector
        """The bytes of a sector of the disk: 512 or 4,096."""

    def plan(self, number: int, kind: Kind, columns: NDArray[np.int64], size: int) -> Iterator[Block]:
        """Yield the blocks in which columns are read.

        Sectors that columns share are read once.

        Args:
            number: Number of the layer, from 1.
            kind: Kind of the columns.
            columns: Places of the columns in the table, rising, int64 ``[n]``.
            size: The most bytes of a block, at least what one column takes.
        """
        table = self._tables[number, kind]
        begins = table.start + columns * table.row
        yield from plan_blocks(begins, table.row, size, self.sector)

    def begin(self, number: int, kind: Kind, block: Block) -> Arrival:
        """Begin to read a block.

        Args:
            number: Number of the layer, from 1.
            kind: Kind of the columns.
            block: A block of :meth:`plan` with memory, which must stay until it has arrived or was given up.
        """
        return self._tables[number, kind].begin(block.reads)

    def verify(self, number: int, kind: Kind, columns: NDArray[np.int64], block: Block) -> None:
        """Compare what was read with the checksums.

        Raises:
            FileError: A column is damaged.
        """
        self._tables[number, kind].verify(columns[block.columns], block)

    def order(self, number: int, kind: Kind) -> NDArray[np.int64]:
        """Return the number of the column at each place of a table, int64 ``[columns]``."""
        return self._tables[number, kind].order

    def cost(self, kind: Kind) -> float:
        """Return what a read costs, in columns of a kind."""
        return self.disk.gap(kind) / self.sizes.row_bytes(kind)

    def measure(self) -> Disk:
        """Measure for a fraction of a second what reads from the disk cost; a small file is not measured.

        Short and long reads take turns. The first ones are not counted, because threads start then and disks wake
        up.
        """
        table, (*_, last) = self._tables[1, "inputs"], self._tables.values()
        span = last.start - table.start
        if span <= _MEASURED:
            return Disk()
        short = [-(-self.sizes.row_bytes(kind) // self.sector) * self.sector for kind in KINDS]
        reads = [*((size, _SHORT_READS) for size in short), (LONGEST_READ, _LONG_READS)]
        seconds = [[self._seconds(table, span, *each, number) for each in reads] for number in range(1 + _ROUNDS)]
        *each, long = (median(values) for values in zip(*seconds[1:], strict=True))
        bandwidth = LONGEST_READ / long
        inputs, products = (fit_gap(*pair, bandwidth) for pair in zip(each, short, strict=True))
        return Disk(inputs, products, fit_reach(bandwidth))

    def _seconds(self, table: _Table, span: int, size: int, count: int, seed: int) -> float:
        """Measure the seconds that each of many reads takes, with all readers at work."""
        memory: NDArray[np.uint8] = aligned_buffer(count * size).numpy()
        first = -(-table.start // SECTOR) * SECTOR
        chance = np.random.default_rng((size, seed))
        starts = first + chance.integers(0, (span - size) // SECTOR, count) * SECTOR
        started = perf_counter()
        table.begin(Pieces(starts, np.full(count, size), memory, np.arange(count) * size)).finish()
        return (perf_counter() - started) / count

    def close(self) -> None:
        """Close the file."""
        self._checkpoint.close()


def plan_blocks(begins: NDArray[np.int64], row: int, size: int, sector: int = SECTOR) -> Iterator[Block]:
    """Yield the blocks in which rows of a file are read.

    Args:
        begins: Offsets of the rows in the file, rising, int64 ``[n]``.
        row: Bytes of a row.
        size: The most bytes of a block, unless one row takes more.
        sector: Bytes of a sector of the disk.
    """
    if not len(begins):
        return
    lows, highs, joined = find_sectors(begins, row, sector)
    # What each column adds to what is read, if the one before it is in the same block.
    added = np.where(joined, highs - np.roll(highs, 1), highs - lows)
    until = np.cumsum(added)
    first = 0
    while first < len(begins):
        before = until[first] - (highs[first] - lows[first])
        end = max(first + 1, int(np.searchsorted(until, before + size, side="right")))
        part = slice(first, end)
        runs = np.flatnonzero(np.concatenate(([True], ~joined[first + 1 : end])))
        starts = lows[part][runs]
        ends = highs[part][np.concatenate((runs[1:] - 1, [end - first - 1]))]
        offsets = np.concatenate(([0], np.cumsum(ends - starts)[:-1]))
        lengths = np.diff(np.concatenate((runs, [end - first])))
        places = begins[part] + np.repeat(offsets - starts, lengths)
        yield Block(part, places, _cut(starts, ends, offsets))
        first = end


def find_sectors(
    begins: NDArray[np.int64], row: int, sector: int = SECTOR
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.bool_]]:
    """Return where the sectors of each row begin and end, and whether they are read together with those before.

    Args:
        begins: Offsets of rows in a file, rising, int64 ``[n]``.
        row: Bytes of a row.
        sector: Bytes of a sector of the disk.
    """
    lows = begins // sector * sector
    highs = -(-(begins + row) // sector) * sector
    return lows, highs, np.concatenate(([False], lows[1:] <= highs[:-1]))


def _cut(starts: NDArray[np.int64], ends: NDArray[np.int64], places: NDArray[np.int64]) -> Pieces:
    """Cut long runs into pieces."""
    counts = -(-(ends - starts) // LONGEST_READ)
    if counts.max() > 1:
        beyond = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        starts, places = (np.repeat(part, counts) + beyond * LONGEST_READ for part in (starts, places))
        ends = np.minimum(np.repeat(ends, counts), starts + LONGEST_READ)
    return Pieces(starts, ends - starts, _NOWHERE, places)


def begin_reading(file: int, pieces: Pieces) -> Reading | CompiledReading:
    """See :class:`grating_core.kernels.reading.Reading`."""
    return kernels().reading(file, pieces)


class Arrival:
    """An arrival is columns that are being read.

    Args:
        checkpoint: The open companion file.
        tensor: The table.
        pieces: The pieces of the file.
    """

    def __init__(self, checkpoint: Checkpoint, tensor: StoredTensor, pieces: Pieces) -> None:
        self._checkpoint, self._tensor, self._pieces = checkpoint, tensor, pieces
        self._reading = begin_reading(checkpoint.descriptor(tensor), pieces)

    def finish(self) -> None:
        """Wait until all has come.

        Raises:
            FileError: The file cannot be read.
        """
        self._checkpoint.read_pieces(self._tensor, self._pieces, self._reading.wait)

    def give_up(self) -> None:
        """Wait until nothing is read any more. What has come is of no use."""
        self._reading.wait()


class _Table:
    """This class reads the columns of one kind of one layer."""

    def __init__(self, checkpoint: Checkpoint, number: int, kind: Kind) -> None:
        name = f"{number}.{kind}"
        self._checkpoint = checkpoint
        self._tensor = checkpoint.tensors[name]
        self.start = self._tensor.start
        self.sector = checkpoint.sector(self._tensor)
        self.row = (self._tensor.end - self._tensor.start) // self._tensor.shape[0]
        self._checks = self._numbers(f"{name}.checks").view("<u8")
        self.order = self._numbers(f"{name}.order").view("<i8").astype(np.int64)
        """The column at each place."""
        if not np.array_equal(np.sort(self.order), np.arange(len(self._checks))):
            raise ValueError(f"{name}.order does not have each column once")
        # A column that was right once is not checked again, because checking takes as long as reading.
        self._seen = np.zeros(len(self._checks), dtype=bool)
        self._changes = checkpoint.changes(self._tensor)

    def _numbers(self, name: str) -> NDArray[np.uint8]:
        stored = self._checkpoint.tensors[name]
        numbers = torch.empty(stored.end - stored.start, dtype=torch.uint8)
        self._checkpoint.read(stored, stored.start, numbers)
        found: NDArray[np.uint8] = numbers.numpy()
        return found

    def begin(self, pieces: Pieces) -> Arrival:
        return Arrival(self._checkpoint, self._tensor, pieces)

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
