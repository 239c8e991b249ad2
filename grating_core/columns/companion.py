"""The companion file of a model holds the columns of its gated MLPs, each in one piece that can be read alone.

A checkpoint stores W_u, W_g and W_d row by row, but a token needs columns. So grating writes the columns again,
as a safetensors file with two tables for each layer. Row j of ``inputs`` is column j of W_u and of W_g, which are
used together; row j of ``products`` is column j of W_d. Rows have checksums and begin at whole sectors, so that
each can be read past the page cache.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from itertools import chain, pairwise
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from grating_core.errors import FileError, StorageError
from grating_core.forking import Threads
from grating_core.lifetime import closed_on_error
from grating_core.memory.checkpoint import Checkpoint, whole_sectors
from grating_core.memory.companion import WAY_OUT, Contents, check_companion, checksum, write_companion
from grating_core.memory.header import KIND_OF, StoredTensor

Kind = Literal["inputs", "products"]
KINDS: tuple[Kind, Kind] = ("inputs", "products")

READERS = 16  # reads at the same time: more were no faster on an NVMe disk
_LONGEST_READ = 1 << 20  # bytes of neighbouring columns that one call reads
_MOST_PLACES = 1024  # buffers that the system fills in one call
_BLOCK = 256  # columns that are transposed at a time


@dataclass(frozen=True)
class ColumnSizes:
    """This class holds the sizes of a model's gated MLPs.

    Attributes:
        depth: Number of layers.
        width: D, the number of entries of an MLP's input and output.
        products: F, the number of entries of its gated product.
        dtype: Type of the weights.
    """

    depth: int
    width: int
    products: int
    dtype: torch.dtype

    def count(self, kind: Kind) -> int:
        """Return the number of columns of one kind in each layer."""
        return self.width if kind == "inputs" else self.products

    def used(self, kind: Kind) -> int:
        """Return the number of weights in a row: a column of W_u and one of W_g, or a column of W_d."""
        return 2 * self.products if kind == "inputs" else self.width

    def length(self, kind: Kind) -> int:
        """Return the number of entries in a row, including the fill up to a whole sector."""
        return whole_sectors(self.used(kind) * self.dtype.itemsize) // self.dtype.itemsize

    def row_bytes(self, kind: Kind) -> int:
        """Return the bytes of one row of the companion file."""
        return self.length(kind) * self.dtype.itemsize

    @property
    def layer_bytes(self) -> int:
        """The bytes of all columns of a layer in memory."""
        return 3 * self.width * self.products * self.dtype.itemsize


def write_columns(
    path: Path,
    weights: Iterable[tuple[Tensor, Tensor, Tensor]],
    sizes: ColumnSizes,
    fingerprint: str,
    *,
    show_progress: bool = False,
) -> None:
    """Write a companion file as a whole or not at all, unless another process has written it meanwhile.

    Args:
        path: The file.
        weights: W_u and W_g ``[F, D]`` and W_d ``[D, F]`` of each layer, in the dtype of the sizes.
        sizes: Sizes of the model's MLPs.
        fingerprint: Identity of the model's weights.
        show_progress: Whether to show a progress bar on standard error.

    Raises:
        StorageError: There is no room for the file, or it cannot be written.
    """
    parts = _parts(weights, sizes, show_progress=show_progress)
    try:
        write_companion(path, _contents(sizes), fingerprint, parts)
    except StorageError as error:
        raise StorageError(
            f"the companion file with the columns of the MLPs is missing, and {error}; or leave mlp_density out"
        ) from error


def _parts(
    weights: Iterable[tuple[Tensor, Tensor, Tensor]], sizes: ColumnSizes, *, show_progress: bool
) -> Iterator[memoryview]:
    """Yield the bytes of all rows, and then of their checksums."""
    checks = []
    layers = tqdm(weights, "Writing columns", sizes.depth, unit="layer", disable=not show_progress)
    for up, gate, down in layers:
        for rows in chain(_rows((up, gate), sizes, "inputs"), _rows((down,), sizes, "products")):
            yield rows.data
            checks += [checksum(row) for row in rows]
    yield np.array(checks, dtype="<u8").data


def _tables(sizes: ColumnSizes) -> list[tuple[int, Kind]]:
    """Return the layer's number and the kind of each table, in the order of the file."""
    return [(number, kind) for number in range(1, sizes.depth + 1) for kind in KINDS]


def _contents(sizes: ColumnSizes) -> Contents:
    """Return what a companion file has: all tables, and then the checksums of their rows."""
    rows = {
        f"{number}.{kind}": (KIND_OF[sizes.dtype], (sizes.count(kind), sizes.length(kind)))
        for number, kind in _tables(sizes)
    }
    checks = {f"{number}.{kind}.checks": ("U64", (sizes.count(kind),)) for number, kind in _tables(sizes)}
    return {**rows, **checks}


def _rows(matrices: tuple[Tensor, ...], sizes: ColumnSizes, kind: Kind) -> Iterator[NDArray[np.uint8]]:
    """Yield the rows of a table, uint8 ``[n, bytes]`` at a time."""
    for start in range(0, sizes.count(kind), _BLOCK):
        columns = torch.cat([matrix[:, start : start + _BLOCK].T for matrix in matrices], dim=1)
        rows = torch.zeros(len(columns), sizes.length(kind), dtype=sizes.dtype)
        rows[:, : columns.shape[1]] = columns
        yield rows.view(torch.uint8).numpy()


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
                check_companion(path, self._checkpoint, _contents(sizes), fingerprint)
                self._tables = {table: _Table(self._checkpoint, *table) for table in _tables(sizes)}
        except (FileError, KeyError, ValueError, OSError) as error:
            raise FileError(f"{path} is no companion file of this model ({error}); {WAY_OUT}") from error
        self._readers = Threads(READERS, "grating-columns")

    def read(
        self, number: int, kind: Kind, columns: NDArray[np.int64], places: list[memoryview]
    ) -> Iterator[Future[None]]:
        """Start to read columns. Every step of the iterator starts some more reads.

        Args:
            number: Number of the layer, from 1.
            kind: Kind of the columns.
            columns: Numbers of the columns, rising, int64 ``[n]``.
            places: Memory for each column: the bytes of a row, at a whole sector.

        Yields:
            Futures to wait for. Their results raise FileError if a column cannot be read or is damaged.

        Raises:
            RuntimeError: No thread can be started. The reads that were yielded before go on.
        """
        table = self._tables[number, kind]
        runs = table.runs(columns)
        share = max(1, -(-len(runs) // READERS))
        for start in range(0, len(runs), share):
            yield self._readers.submit(table.read, runs[start : start + share], columns, places)

    def close(self) -> None:
        """Stop the threads and close the file."""
        self._readers.close()
        self._checkpoint.close()


class _Table:
    """This class reads the columns of one kind of one layer."""

    def __init__(self, checkpoint: Checkpoint, number: int, kind: Kind) -> None:
        name = f"{number}.{kind}"
        self._checkpoint = checkpoint
        self._tensor: StoredTensor = checkpoint.tensors[name]
        self._row = (self._tensor.end - self._tensor.start) // self._tensor.shape[0]
        stored = checkpoint.tensors[f"{name}.checks"]
        checks = torch.empty(stored.end - stored.start, dtype=torch.uint8)
        checkpoint.read(stored, stored.start, checks)
        self._checks = checks.numpy().view("<u8")
        # A column that was right once is not checked again, because checking takes as long as reading.
        self._seen = np.zeros(len(self._checks), dtype=bool)
        self._changes = checkpoint.changes(self._tensor)

    def runs(self, columns: NDArray[np.int64]) -> list[tuple[int, int]]:
        """Find runs of neighbouring columns, and return where each run starts and ends in ``columns``."""
        if not len(columns):
            return []
        most = max(1, min(_MOST_PLACES, _LONGEST_READ // self._row))
        apart = np.flatnonzero(np.diff(columns) != 1) + 1
        edges = [0, *apart.tolist(), len(columns)]
        return [
            (start, min(start + most, end)) for begin, end in pairwise(edges) for start in range(begin, end, most)
        ]

    def read(self, runs: list[tuple[int, int]], columns: NDArray[np.int64], places: list[memoryview]) -> None:
        self._checkpoint.read_scattered(
            self._tensor,
            [(self._tensor.start + int(columns[start]) * self._row, places[start:end]) for start, end in runs],
        )
        if (changes := self._checkpoint.changes(self._tensor)) != self._changes:
            self._seen[:] = False
            self._changes = changes
        for start, end in runs:
            numbers = columns[start:end]
            if not self._seen[numbers].all():
                self._verify(numbers, places[start:end])

    def _verify(self, columns: NDArray[np.int64], places: list[memoryview]) -> None:
        for number, place in zip(columns.tolist(), places, strict=True):
            if checksum(place) != self._checks[number]:
                raise FileError(
                    f"{self._tensor.path}: column {number} of {self._tensor.name} is damaged; {WAY_OUT}"
                )
        self._seen[columns] = True
