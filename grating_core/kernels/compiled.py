"""The compiled kernels of the distribution grating-kernels, called through their C interface.

The kernels run in torch's own pool of threads, which they reach through torch's stable C interface. So one build
serves every release of torch that has this interface, and every release of Python.
:func:`~grating_core.kernels.loading.start` comes first. :mod:`grating_core.kernels.reference` has a function in
torch of the same signature for each.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import Array, c_int32, c_int64, c_void_p
from itertools import chain as one_by_one

import torch
from torch import Tensor

from grating_core.kernels.features import SIMILARITIES
from grating_core.kernels.loading import DTYPES, started
from grating_core.kernels.operands import (
    Finished,
    Lookup,
    Map,
    Norm,
    Positions,
    Rows,
    Seen,
    Span,
    Texts,
    Then,
    Weight,
)
from grating_core.kernels.structs import (
    ACTIVATIONS,
    AttentionStruct,
    EmbedStruct,
    FeaturesStruct,
    LinearStruct,
    LookupStruct,
    RowsStruct,
    WeightStruct,
    address,
    check,
    norm_struct,
    weight_struct,
)

_POOLINGS = {"first": 0, "last": 1, "mean": 2}

_NO_WEIGHT = WeightStruct()
_NO_ROWS = RowsStruct()
_SOMETHING = torch.empty(1, 1)


def pack_in_place(matrix: Tensor) -> Tensor:
    """Bring a matrix ``[columns, inner]`` into the order of the kernels where it lies.

    Args:
        matrix: The contiguous matrix, of bfloat16 or float32, that
            :func:`grating_core.kernels.packing.fits_in_place` takes. It holds other numbers afterwards.

    Returns:
        The same memory as int8 ``[bytes]``.
    """
    columns, inner = matrix.shape
    at = c_void_p(matrix.data_ptr())
    lib = started()
    check(lib.gk_pack(c_int32(DTYPES[matrix.dtype]), at, c_int64(columns), c_int64(inner)))
    return matrix.view(torch.int8).flatten()


def linear(
    x: Rows,
    weight: Weight,
    then: Then,
    *,
    gate: Weight | None = None,
    residual: Tensor | None = None,
    into: Tensor | None = None,
) -> Finished:
    """See :func:`grating_core.kernels.reference.linear`."""
    count = len(x.data)
    total = _new(then.total, count, weight.columns, then.states)
    output = into if then.output and into is not None else _new(then.output, count, weight.columns, then.states)
    rows = new_rows(count, weight.columns) if then.quantized else None
    call = _linear(x, Map(weight, then, gate), residual, total, output, rows)
    lib = started()
    check(lib.gk_run_linear(ctypes.byref(call)))
    return Finished(total, output, rows)


def chain(x: Rows, maps: tuple[Map, Map, Map], residual: Tensor) -> None:
    """See :func:`grating_core.kernels.reference.chain`."""
    first, second = _between(maps[0]), _between(maps[1])
    calls = (LinearStruct * 3)(
        _linear(x, maps[0], residual, *first),
        _linear(_given(maps[0], residual), maps[1], None, *second),
        _linear(_given(maps[1], residual), maps[2], None, None, residual, None),
    )
    lib = started()
    check(lib.gk_run_chain(calls))


def _between(each: Map) -> tuple[Tensor | None, Tensor | None, Rows | None]:
    """Return something for what a map is asked for; the kernels look which is there, and keep it elsewhere."""
    then = each.then
    return (
        _SOMETHING if then.total else None,
        _SOMETHING if then.output else None,
        Rows(_SOMETHING, _SOMETHING) if then.quantized else None,
    )


def _given(before: Map, states: Tensor) -> Rows:
    """Return as many rows as these states, of the dtype that a map gives to the next one."""
    return Rows(states.view(torch.int8) if before.then.quantized else states)


def _linear(
    x: Rows, each: Map, residual: Tensor | None, total: Tensor | None, output: Tensor | None, rows: Rows | None
) -> LinearStruct:
    then = each.then
    return LinearStruct(
        DTYPES[x.data.dtype],
        DTYPES[then.states],
        ACTIVATIONS[then.activation],
        then.factor,
        x.data.shape[0],
        _rows(x.data, x.scale),
        weight_struct(each.weight),
        _NO_WEIGHT if each.gate is None else weight_struct(each.gate),
        norm_struct(then.first_norm),
        norm_struct(then.norm),
        _rows(residual),
        _rows(total),
        _rows(output),
        _NO_ROWS if rows is None else _rows(rows.data, rows.scale),
    )


def normed_rows(
    states: Tensor, norm: Norm | None, *, output: bool, quantized: bool
) -> tuple[Tensor | None, Rows | None]:
    """See :func:`grating_core.kernels.reference.normed_rows`."""
    found = torch.empty_like(states) if output else None
    rows = new_rows(*states.shape) if quantized else None
    lib = started()
    check(
        lib.gk_run_rows(
            c_int32(DTYPES[states.dtype]),
            c_int64(states.shape[0]),
            c_int64(states.shape[1]),
            ctypes.byref(_rows(states)),
            ctypes.byref(norm_struct(norm)),
            ctypes.byref(_rows(found)),
            ctypes.byref(_NO_ROWS if rows is None else _rows(rows.data, rows.scale)),
        )
    )
    return found, rows


def turn_heads(states: Tensor, norm: Norm | None, cosine: Tensor | None, sine: Tensor | None) -> None:
    """See :func:`grating_core.kernels.reference.turn_heads`."""
    lib = started()
    check(
        lib.gk_run_heads(
            c_int32(DTYPES[states.dtype]),
            *map(c_int64, states.shape),
            ctypes.byref(_rows(states)),
            ctypes.byref(norm_struct(norm)),
            c_void_p(address(cosine)),
            c_void_p(address(sine)),
        )
    )


def embed(lookups: Sequence[Lookup], factor: float, norm: Norm | None, output: Tensor) -> None:
    """See :func:`grating_core.kernels.reference.embed`."""
    tables = [LookupStruct(table.data_ptr(), len(table), rows.data_ptr()) for table, rows in lookups]
    call = EmbedStruct(
        DTYPES[output.dtype],
        len(tables),
        factor,
        *output.shape,
        (LookupStruct * 3)(*tables),
        norm_struct(norm),
        _rows(output),
    )
    lib = started()
    check(lib.gk_run_embed(ctypes.byref(call)))


def attention(
    query: Tensor,
    seen: Seen,
    spans: Sequence[Span],
    *,
    causal: bool,
    scaling: float,
    window: int | None = None,
    softcap: float | None = None,
    positions: Positions | None = None,
    into: Tensor | None = None,
) -> Tensor:
    """Attend within each span.

    Args:
        query: Queries, ``[T, heads, head size]``; rows may have any stride.
        seen: Keys and values.
        spans: The spans, in rising order of their rows.
        causal: Whether a token sees only those before it.
        scaling: The factor of the products of queries and keys.
        window: Distance in tokens below which a token sees another; None for any distance.
        softcap: Bound of the scaled products, by a hyperbolic tangent; None for no bound.
        positions: Keys and queries of relative positions, which reach the largest distance within a span, for as
            many heads of keys as of queries; None for none.
        into: States of the same shape for the output; None for new memory.

    Returns:
        The attention's output, ``[T, heads, head size]``; zero for rows that are in no span.
    """
    output = torch.empty(query.shape, dtype=query.dtype) if into is None else into
    end = 0
    for span in spans:
        if end < span.start:
            output[end : span.start] = 0
        end = span.start + span.length
    if end < len(output):
        output[end:] = 0
    call = AttentionStruct(
        DTYPES[query.dtype],
        causal,
        query.shape[1],
        seen.key.shape[1],
        query.shape[2],
        window or 0,
        scaling,
        softcap or 0.0,
        *_by_row(query),
        *_by_row(seen.key),
        *_by_row(seen.value),
        *((None, 0) * 2 if seen.shared is None else (*_by_row(seen.shared[0]), *_by_row(seen.shared[1]))),
        *_by_row(output),
        _array(spans),
        len(spans),
        *(() if positions is None else _positions(positions)),
    )
    lib = started()
    check(lib.gk_run_attention(ctypes.byref(call)))
    return output


def features(
    prefix: Tensor, states: Tensor, sequences: Sequence[Texts], pooling: str, *, similarities: bool
) -> Tensor:
    """See :func:`grating_core.kernels.features.features`. Rows of prefix and states are contiguous."""
    count, width = len(sequences), states.shape[1]
    output = torch.empty(count, 5 * width + SIMILARITIES if similarities else 4 * width)
    call = FeaturesStruct(
        DTYPES[states.dtype],
        _POOLINGS[pooling],
        similarities,
        width,
        width,
        prefix.data_ptr(),
        states.data_ptr(),
        _array(sequences),
        count,
        *_by_row(output),
    )
    lib = started()
    check(lib.gk_run_features(ctypes.byref(call)))
    return output


def new_rows(count: int, width: int) -> Rows:
    """Return int8 rows to write to."""
    return Rows(
        torch.empty(count, -(-width // 64) * 64, dtype=torch.int8), torch.empty(count, 2, dtype=torch.float32)
    )


def _by_row(states: Tensor) -> tuple[int, int]:
    return states.data_ptr(), states.stride(0)


def _positions(positions: Positions) -> tuple[int | None, ...]:
    key, query = ((None, 0) if one is None else _by_row(one) for one in (positions.key, positions.query))
    return *key, *query, positions.rows.data_ptr(), positions.reach


def _array(rows: Sequence[tuple[int, ...]]) -> Array[c_int64]:
    numbers = tuple(one_by_one.from_iterable(rows))
    return (c_int64 * len(numbers))(*numbers)


def _new(wanted: bool, count: int, width: int, dtype: torch.dtype) -> Tensor | None:
    return torch.empty(count, width, dtype=dtype) if wanted else None


def _rows(data: Tensor | None, scale: Tensor | None = None) -> RowsStruct:
    return _NO_ROWS if data is None else RowsStruct(data.data_ptr(), data.stride(0), address(scale))
