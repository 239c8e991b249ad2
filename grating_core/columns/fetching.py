"""Columns come from disk through memory that all tables share: several blocks at a time, and some ahead.

While one block is used, the next ones are read. What a token will need of the following layer is known only when
the token is there. But inputs of neighbouring layers are alike, so some of its columns are read ahead, in moments
in which the disk would have nothing to do. A token uses the columns that it would use without them.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from itertools import islice
from time import perf_counter
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from grating_core.columns.companion import Kind
from grating_core.columns.reading import Arrival, Block, ColumnFile
from grating_core.memory.checkpoint import SECTOR
from grating_core.memory.meter import Meter

SLOTS = 3
"""The number of blocks that are in memory at the same time."""
AHEAD = 2
"""The most blocks that are read ahead, fewer than there are slots."""


class Arrived(NamedTuple):
    """This class holds columns that have come.

    Attributes:
        columns: Their part of the columns that were asked for.
        memory: The memory that they are in, uint8 ``[bytes]``.
        places: Offset of each of them in it, int64 ``[n]``.
    """

    columns: slice
    memory: Tensor
    places: NDArray[np.int64]


class Request:
    """A request is for columns of one table, which come block by block.

    Args:
        number: Number of the layer, from 1.
        kind: Kind of the columns.
        columns: Places of the columns in the table, rising, int64 ``[n]``.
        blocks: The blocks in which they are read.
    """

    def __init__(self, number: int, kind: Kind, columns: NDArray[np.int64], blocks: Iterator[Block]) -> None:
        self.number, self.kind, self.columns = number, kind, columns
        self.blocks: deque[Block] = deque(blocks)
        """What is not read yet."""
        self.coming: deque[tuple[int, Block, Arrival]] = deque()
        """The slot of each block that is read now, and the block."""


class Fetcher:
    """A fetcher reads columns in the order in which they are asked for. One thread at a time may use it.

    Args:
        file: The companion file. :meth:`close` closes it.
        memory: The memory that columns are read into, see :func:`fetched_bytes`; uint8, from a whole sector on.
        meter: Counter of bytes and waiting.
    """

    def __init__(self, file: ColumnFile, memory: Tensor, meter: Meter) -> None:
        self.file = file
        self._meter = meter
        size = len(memory) // SLOTS // SECTOR * SECTOR
        self._slots = [memory[start : start + size] for start in range(0, SLOTS * size, size)]
        self._free = deque(range(SLOTS))
        self._asked: deque[Request] = deque()
        self._coming: dict[int, Arrival] = {}  # by slot
        self._expected: deque[Request] = deque()
        self._ahead: list[Request] = []

    def ask(self, number: int, kind: Kind, columns: NDArray[np.int64]) -> Request:
        """Ask for columns of a table; see :class:`Request`."""
        blocks = self.file.plan(number, kind, columns, len(self._slots[0]))
        return self._begin(Request(number, kind, columns, blocks))

    def expect(self, number: int, kind: Kind, columns: NDArray[np.int64]) -> None:
        """Say which columns are likely to be asked for next. Each :meth:`ask_ahead` asks for some of them."""
        size = min(self.file.disk.reach, len(self._slots[0]))
        blocks = islice(self.file.plan(number, kind, columns, size), AHEAD)
        self._expected = deque(
            Request(number, kind, columns[block.columns], iter([block.first()])) for block in blocks
        )

    def ask_ahead(self) -> None:
        """Ask for a block of what is expected, behind all that has been asked for."""
        if self._expected:
            self._ahead.append(self._begin(self._expected.popleft()))

    def take(self, number: int, kind: Kind) -> list[Request]:
        """Return what was asked for ahead of a table."""
        ahead = [request for request in self._ahead if (request.number, request.kind) == (number, kind)]
        if ahead:
            self._ahead = []
        return ahead

    def arrivals(self, request: Request) -> Iterator[Arrived]:
        """Yield the blocks of a request as they come. Use each before the next.

        Raises:
            FileError: Columns cannot be read, or are damaged. Nothing is read any more.
        """
        try:
            while request.blocks or request.coming:
                self._fill()
                slot, block, arrival = request.coming.popleft()
                started = perf_counter()
                arrival.finish()
                self._meter.seconds_waited += perf_counter() - started
                self.file.verify(request.number, request.kind, request.columns, block)
                yield Arrived(block.columns, self._slots[slot], block.places)
                del self._coming[slot]
                self._free.append(slot)
            self._fill()
        except GeneratorExit:
            raise  # perhaps long after the request, when others have been asked for
        except BaseException:
            self.drop()
            raise

    def drop(self) -> None:
        """Forget what was asked for, and wait until nothing is read any more."""
        self._asked.clear()
        self._expected.clear()
        self._ahead = []
        for arrival in self._coming.values():  # before others are read into the same memory
            arrival.give_up()
        self._coming = {}
        self._free = deque(range(SLOTS))

    def close(self) -> None:
        """Stop reading, and close the file."""
        self.drop()
        self.file.close()

    def _begin(self, request: Request) -> Request:
        self._asked.append(request)
        self._fill()
        return request

    def _fill(self) -> None:
        """Begin to read as many blocks as there is room for, in the order in which they were asked for."""
        while self._asked and self._free:
            request = self._asked[0]
            if not request.blocks:
                self._asked.popleft()
                continue
            slot = self._free.popleft()
            block = request.blocks.popleft().into(self._slots[slot].numpy())
            self._coming[slot] = arrival = self.file.begin(request.number, request.kind, block)
            self._meter.bytes_read += int(block.reads.sizes.sum())
            request.coming.append((slot, block, arrival))


def fetched_bytes(largest: int, wanted: int) -> int:
    """Return the bytes of the memory that columns are read into.

    Args:
        largest: Bytes that reading the largest column takes.
        wanted: Bytes that are as good as more.
    """
    return SLOTS * -(-max(largest, wanted // SLOTS) // SECTOR) * SECTOR
