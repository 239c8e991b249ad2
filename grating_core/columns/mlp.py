"""This module computes gated MLPs whose columns are partly in memory and partly in the companion file."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from time import perf_counter
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from grating_core.columns.cache import ColumnCache
from grating_core.columns.companion import ColumnSizes, Kind
from grating_core.columns.masks import Shares, kept
from grating_core.columns.reading import Arrival, Block, ColumnFile
from grating_core.kernels.activations import ACTIVATIONS
from grating_core.kernels.choice import kernels
from grating_core.layers.linear import Weights
from grating_core.layers.spec import LayerSpec, Role
from grating_core.memory.checkpoint import aligned_buffer
from grating_core.memory.meter import Meter


class Staging(NamedTuple):
    """This class holds memory that all tables share.

    Attributes:
        read: Memory that columns are read into before they are used and kept, uint8 ``[bytes]`` at a whole sector.
        unpacked: Memory for columns as states, which a prompt is multiplied by, ``[entries]`` in their dtype.
    """

    read: Tensor
    unpacked: Tensor


UNPACKED = 1 << 21  # entries that are unpacked at a time


def make_staging(size: int, sizes: ColumnSizes) -> Staging:
    """Take the memory that all tables share.

    Args:
        size: Bytes that columns are read into, enough for two columns of either kind.
        sizes: Sizes of the model's MLPs.
    """
    return Staging(aligned_buffer(size), torch.zeros(_unpacked(sizes), dtype=sizes.dtype))


def unpacked_bytes(sizes: ColumnSizes) -> int:
    """Return the bytes of the memory that columns are unpacked into."""
    return _unpacked(sizes) * sizes.dtype.itemsize


def _unpacked(sizes: ColumnSizes) -> int:
    """Return the entries of some columns: at least one, at most all."""
    return min(max(UNPACKED, 2 * sizes.products, sizes.width), 2 * sizes.products * sizes.width)


class ColumnTable:
    """A column table is a matrix that keeps a limited number of its columns in memory.

    Args:
        file: The companion file.
        number: Number of the layer, from 1.
        kind: Kind of the columns.
        cache: What says which columns are in memory.
        staging: Memory that missing columns are read into.
        meter: Counter of columns, bytes and waiting.
    """

    def __init__(
        self, file: ColumnFile, number: int, kind: Kind, cache: ColumnCache, staging: Staging, meter: Meter
    ) -> None:
        self._file, self._number, self._kind = file, number, kind
        self._cache, self._staging, self._meter = cache, staging, meter
        self._form = file.sizes.form(kind)
        self._order = file.order(number, kind)
        self._held = torch.empty(cache.resident * self._form.row_bytes, dtype=torch.uint8)
        self._kernels = kernels()

    def fill(self) -> None:
        """Read the columns that stay in memory.

        Raises:
            FileError: They cannot be read, or are damaged.
        """
        size = self._form.row_bytes
        with self._reading(np.arange(self._cache.resident)) as blocks:
            for block in blocks:
                begin, end = block.columns.start * size, block.columns.stop * size
                place = int(block.places[0])
                self._held[begin:end] = self._staging.read[place : place + end - begin]

    def multiply(self, values: Tensor, count: int) -> Tensor:
        """Multiply the matrix by the largest of one token's values.

        Args:
            values: Values, ``[columns]``.
            count: Number of values to use, if all columns are in memory.

        Returns:
            The product, float32 ``[rows of the matrix]``.

        Raises:
            FileError: Columns cannot be read, or are damaged.
        """
        numbers = values.float().numpy()[self._order]
        places, hits = self._cache.choose(numbers, count)
        chosen, missing = numbers[places], places[hits:]
        self._meter.columns_wanted += len(places)
        total = torch.zeros(self._form.length)
        add = self._kernels.add_columns
        with self._reading(missing) as blocks:
            add(self._form, self._held, places[:hits] * self._form.row_bytes, chosen[:hits], total)
            for block in blocks:
                add(self._form, self._staging.read, block.places, chosen[hits:][block.columns], total)
        return total

    def multiply_all(self, values: Tensor) -> Tensor:
        """Multiply the matrix by all values of many tokens.

        Args:
            values: Values, ``[T, columns]``, in the model's dtype.

        Returns:
            The products, float32 ``[T, rows of the matrix]``.
        """
        there, missing = np.split(np.arange(values.shape[1]), [self._cache.resident])
        values = values[:, self._order]
        self._meter.columns_wanted += values.shape[1]
        total = torch.zeros(len(values), self._form.length)
        with self._reading(missing) as blocks:
            self._add_all(values, there, self._held, there * self._form.row_bytes, total)
            for block in blocks:
                self._add_all(values, missing[block.columns], self._staging.read, block.places, total)
        return total

    def _add_all(
        self, values: Tensor, columns: NDArray[np.int64], table: Tensor, places: NDArray[np.int64], total: Tensor
    ) -> None:
        """Add the products of many tokens with some columns.

        The columns are unpacked into a matrix of the same shape each time, because the library that multiplies
        keeps a kernel for every shape that it meets. Rows behind the last column are multiplied by 0.
        """
        length = self._form.length
        most = min(values.shape[1], max(1, UNPACKED // length))
        matrix = self._staging.unpacked[: most * length].view(most, length)
        for start in range(0, len(columns), most):
            part = slice(start, start + most)
            there = torch.from_numpy(columns[part])
            self._kernels.unpack_columns(self._form, table, places[part], matrix[: len(there)])
            some = values.new_zeros(len(values), most)
            some[:, : len(there)] = values[:, there]
            if values.dtype == total.dtype:
                total.addmm_(some, matrix)
            else:
                total += some @ matrix

    @contextmanager
    def _reading(self, columns: NDArray[np.int64]) -> Iterator[Iterator[Block]]:
        """Read columns block by block, by their places. Each next block is read while the one before is used."""
        blocks = list(self._file.plan(self._number, self._kind, columns, self._staging.read))
        arriving: list[Arrival] = []  # one at most

        def begin(index: int) -> None:
            if index < len(blocks):
                arriving.append(self._file.begin(self._number, self._kind, blocks[index]))

        def arrivals() -> Iterator[Block]:
            for index, block in enumerate(blocks):
                started = perf_counter()
                arriving[0].finish()
                arriving.pop()
                self._meter.seconds_waited += perf_counter() - started
                begin(index + 1)
                self._file.verify(self._number, self._kind, columns, block)
                yield block

        try:
            begin(0)
            yield arrivals()
        finally:
            for arrival in arriving:  # after an error
                arrival.give_up()
        self._meter.columns_read += len(columns)
        self._meter.bytes_read += sum(int(block.reads.sizes.sum()) for block in blocks)


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
            states: The MLP's input, in bfloat16 or float32.
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
