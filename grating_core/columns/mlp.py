"""This module computes gated MLPs whose columns are partly in memory and partly in the companion file."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from time import perf_counter
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import embedding_bag

from grating_core.columns.cache import ColumnCache
from grating_core.columns.companion import KINDS, ColumnFile, ColumnSizes, Kind
from grating_core.columns.masks import Shares, kept
from grating_core.forking import tell_of_forks
from grating_core.kernels.activations import ACTIVATIONS
from grating_core.layers.linear import Weights
from grating_core.layers.spec import LayerSpec, Role
from grating_core.memory.checkpoint import aligned_buffer
from grating_core.memory.meter import Meter


class Half(NamedTuple):
    """This class holds half of the staging memory, as places for rows and as a matrix ``[rows, length]``."""

    places: list[memoryview]
    matrix: Tensor


Staging = Mapping[Kind, tuple[Half, Half]]


def make_staging(size: int, sizes: ColumnSizes) -> Staging:
    """Take the memory that columns are read into before they are used and kept. All tables share it.

    Args:
        size: Bytes of memory, enough for two columns of either kind.
        sizes: Sizes of the model's MLPs.
    """
    # Rows without a column are multiplied by 0, so they must hold numbers.
    buffer = aligned_buffer(size).zero_()
    array: Any = buffer.numpy()
    view = memoryview(array)

    def half(row_bytes: int, number: int) -> Half:
        length = len(buffer) // 2 // row_bytes * row_bytes
        start, end = number * length, (number + 1) * length
        matrix = buffer[start:end].view(sizes.dtype).view(-1, row_bytes // sizes.dtype.itemsize)
        return Half([view[at : at + row_bytes] for at in range(start, end, row_bytes)], matrix)

    return {kind: (half(sizes.row_bytes(kind), 0), half(sizes.row_bytes(kind), 1)) for kind in KINDS}


class ColumnTable:
    """A column table is a matrix that keeps a limited number of its columns in memory.

    Args:
        file: The companion file.
        number: Number of the layer, from 1.
        kind: Kind of the columns.
        cache: The record of the columns that are in memory.
        staging: Memory that missing columns are read into.
        meter: Counter of columns, bytes and waiting.
    """

    def __init__(
        self, file: ColumnFile, number: int, kind: Kind, cache: ColumnCache, staging: Staging, meter: Meter
    ) -> None:
        self._file, self._number, self._kind = file, number, kind
        self._cache, self._meter = cache, meter
        self._halves = staging[kind]
        self._rows = file.sizes.used(kind)
        self._held = torch.zeros(cache.capacity + 1, self._rows, dtype=file.sizes.dtype)
        self._changing = False
        tell_of_forks(self)

    def after_fork(self) -> None:
        """Empty the cache if another thread was reading: columns that it recorded may never have arrived."""
        if self._changing:
            self._cache.clear()
            for half in self._halves:
                half.matrix.view(torch.uint8).numpy().fill(0)  # numpy needs no threads, which a fork loses
            self._changing = False

    def fill(self) -> None:
        """Read as many columns as fit, so that the first tokens find some in memory."""
        self._changing = True
        columns = self._cache.fill()
        with self._reading(columns) as blocks:
            for block, matrix in blocks:
                self._held[block] = matrix[: block.stop - block.start, : self._rows]

    def multiply(self, values: Tensor, count: int) -> Tensor:
        """Multiply the matrix by the largest of one token's values.

        Args:
            values: Values, ``[columns]``, in the dtype of the weights.
            count: Number of values to use.

        Returns:
            The product, float32 ``[rows of the matrix]``.
        """
        self._changing = True
        columns, slots, hits = self._cache.choose(values.abs().float().numpy(), count)
        self._meter.columns_wanted += count
        missing = columns[hits:]
        with self._reading(missing) as blocks:
            there = torch.from_numpy(columns[:hits])
            total = _weighted_sum(self._held, torch.from_numpy(slots[:hits]), values[there])
            for block, matrix in blocks:
                arrived = torch.from_numpy(missing[block])
                total += _weighted_sum(matrix, torch.arange(len(arrived)), values[arrived])[: self._rows]
                self._keep(matrix, slots[hits:][block])
        return total

    def multiply_all(self, values: Tensor) -> Tensor:
        """Multiply the matrix by all values of many tokens. The columns in memory stay the same.

        Args:
            values: Values, ``[T, columns]``, in the dtype of the weights.

        Returns:
            The products, float32 ``[T, rows of the matrix]``.
        """
        columns, slots = self._cache.held()
        missing = np.setdiff1d(np.arange(values.shape[1]), columns)
        self._meter.columns_wanted += values.shape[1]
        with self._reading(missing) as blocks:
            total = _product(self._held, values, columns, slots)
            for block, matrix in blocks:
                arrived = missing[block]
                total += _product(matrix, values, arrived, np.arange(len(arrived)))[:, : self._rows]
        return total

    def _keep(self, matrix: Tensor, slots: NDArray[np.int64]) -> None:
        """Copy columns into their slots; columns beside the cache go into the row behind it."""
        # Selecting the columns that stay would take another copy.
        capacity = self._cache.capacity
        if slots.min() < capacity:
            places = torch.from_numpy(np.minimum(slots, capacity))
            self._held.index_copy_(0, places, matrix[: len(slots), : self._rows])

    @contextmanager
    def _reading(self, columns: NDArray[np.int64]) -> Iterator[Iterator[tuple[slice, Tensor]]]:
        """Read columns block by block; each block comes with its place in ``columns``, and as rows of a matrix.

        The reads of the first block start at once. Each next block is read while the one before is used.
        """
        most = len(self._halves[0].places)
        blocks = [slice(start, min(start + most, len(columns))) for start in range(0, len(columns), most)]
        under_way: list[Future[None]] = []

        def begin(index: int) -> None:
            if index < len(blocks):
                places = self._halves[index % 2].places
                for reading in self._file.read(self._number, self._kind, columns[blocks[index]], places):
                    under_way.append(reading)  # one by one, so that all can be awaited if the next cannot start

        def arrivals() -> Iterator[tuple[slice, Tensor]]:
            for index, block in enumerate(blocks):
                self._wait(under_way)
                begin(index + 1)
                yield block, self._halves[index % 2].matrix

        self._changing = True
        try:
            begin(0)
            yield arrivals()
        except BaseException:
            self._give_up(under_way, columns)
            raise
        finally:
            self._changing = False
        self._meter.columns_read += len(columns)
        self._meter.bytes_read += len(columns) * self._file.sizes.row_bytes(self._kind)

    def _give_up(self, under_way: list[Future[None]], columns: NDArray[np.int64]) -> None:
        """Wait until no read is under way, and discard the columns that have arrived."""
        self._cache.forget(columns)
        for reading in under_way:
            if not reading.cancel():
                reading.exception()
        for half in self._halves:  # it may hold anything, but 0 times its numbers must be 0
            half.matrix.zero_()

    def _wait(self, under_way: list[Future[None]]) -> None:
        started = perf_counter()
        while under_way:
            under_way[-1].result()
            under_way.pop()
        self._meter.seconds_waited += perf_counter() - started


class ColumnMlp:
    """A column MLP computes a gated MLP with the columns that a token needs. It is a :data:`layers.layer.Mlp`.

    A single token is computed with its own columns. Many tokens, as in a prompt, are computed with all columns,
    because together they need nearly all.

    Args:
        spec: The layer's spec.
        inputs: The columns of W_u and W_g.
        products: The columns of W_d.
        shares: Shares that a single token uses.
    """

    def __init__(self, spec: LayerSpec, inputs: ColumnTable, products: ColumnTable, shares: Shares) -> None:
        self._act = ACTIVATIONS[spec.activation]
        self._inputs, self._products = inputs, products
        self._inputs_kept = kept(spec.width, shares.inputs)
        self._products_kept = kept(spec.inner, shares.products)

    def __call__(self, states: Tensor, weights: Weights) -> Tensor:
        """Return the MLP's output ``[T, D]`` for states of the same shape.

        Args:
            states: The MLP's input, in the dtype of the columns.
            weights: The layer's weights. The biases of gate, up and down are used, where the layer has them.
        """
        if len(states) == 1:
            product = self._gated(self._inputs.multiply(states[0], self._inputs_kept)[None], states.dtype, weights)
            output = self._products.multiply(product[0], self._products_kept)[None]
        else:
            product = self._gated(self._inputs.multiply_all(states), states.dtype, weights)
            output = self._products.multiply_all(product)
        return _plus(output, weights, "down").to(states.dtype)

    def _gated(self, both: Tensor, dtype: torch.dtype, weights: Weights) -> Tensor:
        """Return the gated product ``[T, F]``; ``both`` is ``[T, 2 F]``, first W_u's products and then W_g's."""
        up, gate = both.to(dtype).chunk(2, dim=1)
        return self._act(_plus(gate, weights, "gate")) * _plus(up, weights, "up")


def _plus(states: Tensor, weights: Weights, role: Role) -> Tensor:
    """Add the bias of a role to states, in place, if the layer has one."""
    bias = weights.get(f"{role}.bias")
    return states if bias is None else states.add_(bias)


def _weighted_sum(table: Tensor, slots: Tensor, weights: Tensor) -> Tensor:
    """Sum some rows, each times a weight, in float32. No row is copied."""
    if not len(slots):
        return torch.zeros(table.shape[1])
    # Each thread gets one bag, because torch never divides a bag.
    bags = min(torch.get_num_threads(), len(slots))
    offsets = torch.arange(bags) * len(slots) // bags
    return embedding_bag(slots, table, offsets, mode="sum", per_sample_weights=weights).float().sum(0)


def _product(matrix: Tensor, values: Tensor, columns: NDArray[np.int64], slots: NDArray[np.int64]) -> Tensor:
    """Multiply values ``[T, columns]`` by the rows in these slots, in float32.

    All rows are multiplied, and rows without a column by 0. Gathering the others would take longer, and the
    library that multiplies keeps a kernel for every shape that it meets.
    """
    placed = values.new_zeros(len(values), len(matrix))
    placed[:, torch.from_numpy(slots)] = values[:, torch.from_numpy(columns)]
    return (placed @ matrix).float()
