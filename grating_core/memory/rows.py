"""A row cache keeps those rows of the embedding table in memory that are in use, instead of the table."""

from __future__ import annotations

import zlib
from time import perf_counter

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from grating_core.errors import FileError
from grating_core.memory.blocks import decoded, row_bytes
from grating_core.memory.checkpoint import Checkpoint
from grating_core.memory.header import StoredTensor
from grating_core.memory.meter import Meter

_GAP = 8 * 1024  # bytes; rows that are closer than this are read together
_BATCH = 256  # rows that are read before they are copied into the cache


class RowCache:
    """A row cache stands for an embedding table. It keeps the rows that were used last; others are on disk.

    One pass at a time may use the cache.

    Args:
        checkpoint: The files with the table.
        table: The place of the table ``[vocabulary, D]`` in the files.
        capacity: Number of rows to keep, 1 or more.
        dtype: The dtype that rows are converted to.
        device: The device of the rows.
        meter: The meter that counts bytes, hits and misses.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        table: StoredTensor,
        *,
        capacity: int,
        dtype: torch.dtype,
        device: torch.device,
        meter: Meter,
    ) -> None:
        self._checkpoint = checkpoint
        self._table = table
        self._capacity = capacity
        self._meter = meter
        vocabulary, width = table.shape
        self._row_bytes = row_bytes(table.kind, width)
        self._rows = torch.empty(capacity, width, dtype=dtype, device=device)
        self._place = np.full(vocabulary, -1, dtype=np.int32)  # place in the cache of each token's row
        self._token = np.full(capacity, -1, dtype=np.int32)  # token of the row at each place
        self._used = np.zeros(capacity, dtype=np.int64)  # time of the last use of each place
        self._checks = np.zeros(vocabulary, dtype=np.uint32)  # checksum of each token's row when first read, or 0
        self._now = 0

    def fetch(self, input_ids: Tensor) -> None:
        """Read the rows of tokens, int64 of any shape on the CPU, before a pass begins, as far as the rows fit.

        Raises:
            FileError: The rows cannot be read. Rows that were in memory before stay there.
        """
        wanted = np.unique(input_ids.numpy())
        self._meter.rows_wanted += len(wanted)
        self._hold(wanted[: self._capacity])

    def __call__(self, input_ids: Tensor) -> Tensor:
        """Return the rows of tokens, ``[…, D]``, for int64 ``[…]`` on the CPU."""
        tokens = input_ids.numpy().reshape(-1)
        found = torch.empty(len(tokens), self._rows.shape[1], dtype=self._rows.dtype, device=self._rows.device)
        # One lookup takes no more tokens than there are places, so that it never evicts its own rows.
        for start in range(0, len(tokens), self._capacity):
            part = tokens[start : start + self._capacity]
            self._hold(np.unique(part))
            places = torch.from_numpy(self._place[part].astype(np.int64))
            if self._rows.is_cuda:  # from pinned memory the copy waits in line, and the CPU goes on
                places = places.pin_memory()
            places = places.to(self._rows.device, non_blocking=self._rows.is_cuda)
            torch.index_select(self._rows, 0, places, out=found[start : start + len(part)])
        return found.view(*input_ids.shape, -1)

    def _hold(self, tokens: NDArray[np.int64]) -> None:
        """Read the rows that are not in memory. The tokens are ascending, and no more than there are places."""
        self._now += 1
        places = self._place[tokens]
        self._used[places[places >= 0]] = self._now
        missing = tokens[places < 0]
        if not len(missing):
            return
        victims = np.argpartition(self._used, len(missing) - 1)[: len(missing)]
        evicted = self._token[victims]
        self._place[evicted[evicted >= 0]] = -1
        self._token[victims] = -1
        started = perf_counter()
        self._read(missing, victims)
        self._meter.seconds_waited += perf_counter() - started
        self._token[victims] = missing
        self._place[missing] = victims
        self._used[victims] = self._now
        self._meter.rows_read += len(missing)

    def _read(self, tokens: NDArray[np.int64], places: NDArray[np.intp]) -> None:
        """Read rows from disk, neighbours together."""
        batches = [slice(start, start + _BATCH) for start in range(0, len(tokens), _BATCH)]
        runs = [self._runs(tokens[batch]) for batch in batches]
        self._checkpoint.announce(self._table, [self._span(*run) for found in runs for run in found])
        for batch, found in zip(batches, runs, strict=True):
            lengths = np.array([last - first + 1 for first, last in found])
            staging = torch.empty(int(lengths.sum()) * self._row_bytes, dtype=torch.uint8)
            offset = 0
            for first, last in found:
                start, end = self._span(first, last)
                self._checkpoint.read(self._table, start, staging[offset : offset + end - start])
                offset += end - start
            # A token's row in the staging buffer is the token plus the shift of its run.
            shifts = lengths.cumsum() - lengths - [first for first, _ in found]
            run_of = np.searchsorted([first for first, _ in found], tokens[batch], side="right") - 1
            rows = torch.from_numpy(tokens[batch] + shifts[run_of])
            stored = staging.view(-1, self._row_bytes)[rows]
            self._verify(tokens[batch], stored)
            values = decoded(self._table.kind, stored.view(-1), self._rows.shape[1])
            self._rows[torch.from_numpy(places[batch]).to(self._rows.device)] = values.to(self._rows)
            self._meter.bytes_read += offset

    def _verify(self, tokens: NDArray[np.int64], rows: Tensor) -> None:
        """Compare rows, uint8 ``[N, bytes]``, with their checksums from the first read."""
        checks = np.fromiter((zlib.crc32(row) or 1 for row in rows.numpy()), dtype=np.uint32, count=len(rows))
        first = self._checks[tokens]
        if (others := tokens[(first != 0) & (first != checks)]).size:
            raise FileError(
                f"{self._table.path} has changed since it was opened: row {others[0]} of {self._table.name} is "
                f"different. Put the file back, or load the model anew"
            )
        self._checks[tokens] = checks

    def _runs(self, tokens: NDArray[np.int64]) -> list[tuple[int, int]]:
        """Return the first and the last token of each run of rows that lie close together."""
        apart = np.flatnonzero(np.diff(tokens) * self._row_bytes > _GAP) + 1
        return [(int(run[0]), int(run[-1])) for run in np.split(tokens, apart)]

    def _span(self, first: int, last: int) -> tuple[int, int]:
        """Return where the bytes of a run begin and end in the file."""
        start = self._table.start
        return start + first * self._row_bytes, start + (last + 1) * self._row_bytes
