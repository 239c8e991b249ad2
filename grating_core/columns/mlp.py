"""This module computes gated MLPs whose columns are partly in memory and partly in the companion file."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from grating_core.columns.cache import ColumnCache
from grating_core.columns.companion import ColumnSizes, Kind
from grating_core.columns.fetching import Fetcher, Request
from grating_core.columns.masks import Shares, kept
from grating_core.kernels.activations import ACTIVATIONS
from grating_core.kernels.choice import kernels
from grating_core.layers.linear import Weights
from grating_core.layers.spec import LayerSpec, Role
from grating_core.memory.meter import Meter

LIKELY = 0.5
"""The share of the columns that the next layer will use, which the largest of this layer's inputs tell best."""
UNPACKED = 1 << 21  # entries that are unpacked at a time


def unpacked_memory(sizes: ColumnSizes) -> Tensor:
    """Take the memory that columns are unpacked into as states: a prompt is multiplied by those."""
    return torch.zeros(_unpacked(sizes), dtype=sizes.dtype)


def unpacked_bytes(sizes: ColumnSizes) -> int:
    """Return the bytes of the memory that columns are unpacked into."""
    return _unpacked(sizes) * sizes.dtype.itemsize


def _unpacked(sizes: ColumnSizes) -> int:
    """Return the entries of some columns: at least one, at most all."""
    return min(max(UNPACKED, 2 * sizes.products, sizes.width), 2 * sizes.products * sizes.width)


class Product(NamedTuple):
    """A product waits for its columns.

    Attributes:
        held: Places of the columns that are in memory, int64 ``[n]``.
        values: What these are multiplied by, float32 ``[n]``.
        chosen: What the others are multiplied by, 0 for those that are not used, float32 ``[columns]``.
        requests: The requests for the others.
    """

    held: NDArray[np.int64]
    values: NDArray[np.float32]
    chosen: NDArray[np.float32]
    requests: list[Request]


class ColumnTable:
    """A column table is a matrix that keeps a limited number of its columns in memory.

    Args:
        fetcher: What reads the other columns.
        number: Number of the layer, from 1.
        kind: Kind of the columns.
        cache: What says which columns are in memory.
        unpacked: Memory for columns as states, which all tables share, see :func:`unpacked_memory`.
        meter: Counter of columns.
    """

    def __init__(
        self, fetcher: Fetcher, number: int, kind: Kind, cache: ColumnCache, unpacked: Tensor, meter: Meter
    ) -> None:
        self._fetcher, self._number, self._kind = fetcher, number, kind
        self._cache, self._unpacked, self._meter = cache, unpacked, meter
        self._form = fetcher.file.sizes.form(kind)
        self._order = fetcher.file.order(number, kind)
        self._held = torch.empty(cache.resident * self._form.row_bytes, dtype=torch.uint8)
        self._kernels = kernels()

    def fill(self) -> None:
        """Read the columns that stay in memory.

        Raises:
            FileError: They cannot be read, or are damaged.
        """
        size = self._form.row_bytes
        for arrived in self._fetcher.arrivals(self._ask(np.arange(self._cache.resident))):
            begin, end = arrived.columns.start * size, arrived.columns.stop * size
            place = int(arrived.places[0])
            self._held[begin:end] = arrived.memory[place : place + end - begin]

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
        return self.finish(self.begin(values, count))

    def begin(self, values: Tensor, count: int) -> Product:
        """Choose columns for a product, and begin to read them; see :meth:`multiply`."""
        numbers = values.float().numpy()[self._order]
        places, hits = self._cache.choose(numbers, count)
        self._meter.columns_wanted += len(places)
        missing = np.zeros(len(numbers), dtype=bool)
        missing[places[hits:]] = True
        chosen = np.where(missing, numbers, 0)
        ahead = self._fetcher.take(self._number, self._kind)
        for request in ahead:
            self._meter.columns_read += int(missing[request.columns].sum())
            missing[request.columns] = False
        requests = [*ahead, self._ask(np.flatnonzero(missing))]
        return Product(places[:hits], numbers[places[:hits]], chosen, requests)

    def finish(self, product: Product) -> Tensor:
        """Multiply when the columns of a product have come; see :meth:`multiply`."""
        total, add = torch.zeros(self._form.length), self._kernels.add_columns
        add(self._form, self._held, product.held * self._form.row_bytes, product.values, total)
        for request in product.requests:
            for arrived in self._fetcher.arrivals(request):
                values = product.chosen[request.columns[arrived.columns]]
                add(self._form, arrived.memory, arrived.places, values, total)
        return total

    def expect(self, values: Tensor, count: int) -> None:
        """Read some of what :meth:`begin` will ask for, by values that are like those that it will be given."""
        numbers = values.float().numpy()[self._order]
        places, hits = self._cache.choose(numbers, count)
        self._fetcher.expect(self._number, self._kind, places[hits:])
        self._fetcher.ask_ahead()

    def ask_ahead(self) -> None:
        """Read more of what is expected."""
        self._fetcher.ask_ahead()

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
        request = self._ask(missing)
        self._add_all(values, there, self._held, there * self._form.row_bytes, total)
        for arrived in self._fetcher.arrivals(request):
            self._add_all(values, missing[arrived.columns], arrived.memory, arrived.places, total)
        return total

    def _ask(self, columns: NDArray[np.int64]) -> Request:
        self._meter.columns_read += len(columns)
        return self._fetcher.ask(self._number, self._kind, columns)

    def _add_all(
        self, values: Tensor, columns: NDArray[np.int64], table: Tensor, places: NDArray[np.int64], total: Tensor
    ) -> None:
        """Add the products of many tokens with some columns.

        The columns are unpacked into a matrix of the same shape each time, because the library that multiplies
        keeps a kernel for every shape that it meets. Rows behind the last column are multiplied by 0.
        """
        length = self._form.length
        most = min(values.shape[1], max(1, UNPACKED // length))
        matrix = self._unpacked[: most * length].view(most, length)
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


class ColumnMlp:
    """A column MLP computes a gated MLP with the columns that a token needs. It is a :data:`layers.layer.Mlp`.

    A single token is computed with its own columns. Many tokens, as in a prompt, are computed with all columns,
    because together they need nearly all.

    While a token's columns are read and multiplied, some of the next layer's are asked for: those that this
    layer's inputs would need there. Inputs of neighbours are alike, because both are norms of the same states and
    of what one layer adds: the half of the columns that is likeliest by them is used in 85 of 100 cases.

    Args:
        spec: The layer's spec.
        inputs: The columns of W_u and W_g.
        products: The columns of W_d.
        shares: Shares that a single token uses.
        following: The columns of W_u and W_g of the next layer; None to read none ahead.
    """

    def __init__(
        self,
        spec: LayerSpec,
        inputs: ColumnTable,
        products: ColumnTable,
        shares: Shares,
        following: ColumnTable | None = None,
    ) -> None:
        self._act = ACTIVATIONS[spec.activation]
        self._inputs, self._products, self._following = inputs, products, following
        self._inputs_kept = kept(spec.width, shares.inputs)
        self._products_kept = kept(spec.inner, shares.products)

    def __call__(self, states: Tensor, weights: Weights) -> Tensor:
        """Return the MLP's output ``[T, D]`` for states of the same shape.

        Args:
            states: The MLP's input, in bfloat16 or float32.
            weights: The layer's weights. The biases of gate, up and down are used, where the layer has them.
        """
        if len(states) == 1:
            product = self._gated(self._through_inputs(states[0])[None], states.dtype, weights)
            output = self._through_products(product[0])[None]
        else:
            product = self._gated(self._inputs.multiply_all(states), states.dtype, weights)
            output = self._products.multiply_all(product)
        return _plus(output, weights, "down").to(states.dtype)

    def _through_inputs(self, values: Tensor) -> Tensor:
        product = self._inputs.begin(values, self._inputs_kept)
        if self._following is not None:
            self._following.expect(values, int(LIKELY * self._inputs_kept))
        return self._inputs.finish(product)

    def _through_products(self, values: Tensor) -> Tensor:
        product = self._products.begin(values, self._products_kept)
        if self._following is not None:
            self._following.ask_ahead()
        return self._products.finish(product)

    def _gated(self, both: Tensor, dtype: torch.dtype, weights: Weights) -> Tensor:
        """Return the gated product ``[T, F]``; ``both`` is ``[T, 2 F]``, first W_u's products and then W_g's."""
        up, gate = both.to(dtype).chunk(2, dim=1)
        return self._act(_plus(gate, weights, "gate")) * _plus(up, weights, "up")


def _plus(states: Tensor, weights: Weights, role: Role) -> Tensor:
    """Add the bias of a role to states, in place, if the layer has one."""
    bias = weights.get(f"{role}.bias")
    return states if bias is None else states.add_(bias)
