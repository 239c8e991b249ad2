"""What kernels take and give."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Weight(NamedTuple):
    """A weight is a packed matrix with what belongs to its columns.

    Attributes:
        packed: The matrix in the order that products read, see :mod:`grating_core.kernels.packing` and, for a
            grouped matrix, :mod:`grating_core.kernels.groups`.
        dtype: The dtype of its entries: int8, bfloat16 or float32; uint8 for entries of 4 bits.
        columns: Number of columns, which are entries of the output.
        inner: Number of entries of a row of the input.
        scale: Scales of the columns of an int8 matrix, float32 ``[columns padded to 32]``. Scales of the groups of
            a grouped matrix, float16 ``[blocks of 16 columns, groups, 16]``, or with zeros, uint8 ``[blocks of 16
            columns, groups, 2, 16]``, which are scales and zeros. Else None.
        bias: What is added to the columns, float32 ``[columns padded to 32]``; None for nothing.
        sums: The sum of each column of an int8 matrix, times its scale, float32 ``[columns padded to 32]``; None
            for other matrices, the grouped ones included.
        minimum: What is added to the entries of each group, after the scale, of the scale's shape and dtype; None
            for nothing with 8 bits, and for -8 times the scale with 4 bits.
        bits: Bits of an entry of a grouped matrix, 8 or 4; None for a matrix that is not grouped.
        factor: The factors of the columns' scales if groups have zeros, float32 ``[columns padded to 32]``. Else
            None.
    """

    packed: Tensor
    dtype: torch.dtype
    columns: int
    inner: int
    scale: Tensor | None = None
    bias: Tensor | None = None
    sums: Tensor | None = None
    minimum: Tensor | None = None
    bits: int | None = None
    factor: Tensor | None = None


class Norm(NamedTuple):
    """A norm divides a row by its size.

    Attributes:
        kind: ``"layer"`` for LayerNorm, ``"rms"`` for RMSNorm.
        eps: The number that is added to the variance.
        offset: The number that is added to the weight.
        weight: The weight, float32 ``[width]``.
        bias: The bias, float32 ``[width]``; None for none.
    """

    kind: str
    eps: float
    offset: float
    weight: Tensor
    bias: Tensor | None = None


class Rows(NamedTuple):
    """Rows are what a product takes.

    Attributes:
        data: States ``[T, width]``, or int8 ``[T, width padded with zeros to 64]``.
        scale: Of int8 rows, float32 ``[T, 2]``: entry q stands for ``scale[0] * q + scale[1]``. Else None.

    Int8 rows are multiplied by int8 weights that are not grouped. States are multiplied by weights of their own
    dtype, and by int8 and grouped weights, which the product unpacks to that dtype.
    """

    data: Tensor
    scale: Tensor | None = None


class Then(NamedTuple):
    """This class says what follows a product, in this order.

    Attributes:
        states: The dtype of states: bfloat16 or float32.
        activation: The name of the activation of the product, or of the gate's; None for none.
        first_norm: The norm of the result, before the residual; None for none.
        factor: The factor of the result in the sum with the residual.
        norm: The norm of the sum; None for none.
        total: Whether the sum is asked for, as states.
        output: Whether what the norm gives is asked for, as states.
        quantized: Whether what the norm gives is asked for, as int8 rows.
    """

    states: torch.dtype
    activation: str | None = None
    first_norm: Norm | None = None
    factor: float = 1.0
    norm: Norm | None = None
    total: bool = False
    output: bool = True
    quantized: bool = False


class Map(NamedTuple):
    """A map is a product with what follows it.

    Attributes:
        weight: The weight.
        then: What follows the product.
        gate: The gate's weight, of the same shape; None for none.
    """

    weight: Weight
    then: Then
    gate: Weight | None = None


class Finished(NamedTuple):
    """This class holds what was asked for: the sum, what the norm gave, and its int8 rows."""

    total: Tensor | None
    output: Tensor | None
    rows: Rows | None


class Lookup(NamedTuple):
    """A lookup takes a row of a table for each token.

    Attributes:
        table: The table, ``[rows, D]``, contiguous.
        rows: The number of the row of each token, int64 ``[T]``, contiguous.
    """

    table: Tensor
    rows: Tensor


class Span(NamedTuple):
    """A span is consecutive queries of one sequence, and the keys that they may see. Rows are those of a call.

    Attributes:
        start: Row of the first query.
        length: Number of queries.
        first: Position of the first query among all keys that the span may see.
        keys: Number of these keys.
        place: Row of the first of them that is not shared.
        shared: How many of the call's shared keys come before it: all, or none.
    """

    start: int
    length: int
    first: int
    keys: int
    place: int
    shared: int = 0

    @property
    def rows(self) -> slice:
        """The rows of the queries."""
        return slice(self.start, self.start + self.length)

    @property
    def own(self) -> slice:
        """The rows of the keys that are not shared."""
        return slice(self.place, self.place + self.keys - self.shared)


class Seen(NamedTuple):
    """This class holds the keys and values of a call.

    Attributes:
        key: Keys, ``[T, key heads, head size]``; the last two dimensions are contiguous.
        value: Values of the same shape.
        shared: Keys and values that come before those of some spans, and lie elsewhere; None for none.
    """

    key: Tensor
    value: Tensor
    shared: tuple[Tensor, Tensor] | None = None

    def of(self, span: Span) -> tuple[Tensor, Tensor]:
        """Return the keys and values of a span, each in one piece."""
        key, value = self.key[span.own], self.value[span.own]
        if self.shared is None or not span.shared:
            return key, value
        return torch.cat((self.shared[0], key)), torch.cat((self.shared[1], value))


class Positions(NamedTuple):
    """This class holds keys and queries of relative positions.

    Attributes:
        key: A key for each row of the table of positions, ``[rows, heads, head size]``; None for none.
        query: A query for each row, likewise.
        rows: The row of each distance of a query from a key, from the largest negative one on to the largest one:
            int32 ``[2 * reach + 1]``.
    """

    key: Tensor | None
    query: Tensor | None
    rows: Tensor

    @property
    def reach(self) -> int:
        """The largest distance that has a row."""
        return len(self.rows) // 2


class Texts(NamedTuple):
    """This class says where a sequence and its two texts are. The sequence may begin with a shared prefix.

    Attributes:
        start: Row of the first of the sequence's own tokens, among those of a call.
        length: Number of its own tokens.
        query_start: Number of the query's first token in the sequence, the prefix included.
        query_stop: Number of the token behind the query.
        document_start: Number of the document's first token.
        document_stop: Number of the token behind the document.
        shared: Number of tokens of the prefix.
    """

    start: int
    length: int
    query_start: int
    query_stop: int
    document_start: int
    document_stop: int
    shared: int = 0

    @property
    def own(self) -> slice:
        """The rows of the own tokens, if those of the prefix come first."""
        return slice(self.shared + self.start, self.shared + self.start + self.length)

    @property
    def query(self) -> tuple[slice, ...]:
        """The rows of the query: at most one run in the prefix, and then one behind it."""
        return self._runs(self.query_start, self.query_stop)

    @property
    def document(self) -> tuple[slice, ...]:
        """The rows of the document, likewise."""
        return self._runs(self.document_start, self.document_stop)

    def _runs(self, start: int, stop: int) -> tuple[slice, ...]:
        runs = slice(start, min(stop, self.shared)), slice(self.start + max(start, self.shared), self.start + stop)
        return tuple(run for run in runs if run.start < run.stop)
