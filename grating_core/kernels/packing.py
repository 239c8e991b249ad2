"""Packing brings a matrix into the order that products read, and quantising makes int8 of it.

A matrix ``[columns, inner]`` has its columns in blocks of 16. In a block lie, for each four bytes of the inner
entries in turn, those of the 16 columns. Columns are padded with zeros to a multiple of 32, inner entries to a
multiple of 64 bytes. Every instruction set reads this order, so that a packed file serves every machine.
:mod:`grating_core.kernels.groups` has matrices whose entries share scales in groups.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import pad

from grating_core.kernels.operands import Weight

_COLUMNS = 32
_LINE = 64  # bytes
_AT_ONCE = 1 << 18  # entries of a matrix that are packed at a time
PACKING = 1 << 24
"""The bytes that packing takes beside a matrix and what becomes of it: copies of some columns in float32, and what
the allocator keeps of them."""
LEAST = 1e-30
"""A row whose largest magnitude, or half of whose range, is below this is quantised to zeros: 127 divided by it
would not be finite."""


def quantized(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Quantise each row by its largest magnitude.

    Args:
        rows: Rows ``[…, width]`` of any floating dtype, such as the columns of a matrix ``[columns, inner]``.

    Returns:
        The entries, int8 ``[…, width]``, and the scales that give the rows back, float32 ``[…]``. The scale of a
        row that is not finite is not finite either.
    """
    wide = rows.float()
    peak = wide.abs().amax(-1) if wide.shape[-1] else wide.new_zeros(wide.shape[:-1])
    return _entries(wide, peak), torch.where(peak < LEAST, 0.0, peak * (1 / 127))


def quantized_rows(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Quantise each row by the range of its entries and zero.

    The two ends of the range become -127 and 127. What an activation such as GELU gives has few entries below
    zero, so that this is nearly twice as fine as to quantise by the largest magnitude.

    Args:
        rows: Rows ``[T, width]``.

    Returns:
        The entries, int8 ``[T, width]``, and what gives the rows back, float32 ``[T, 2]``: entry q stands for
        ``scale[0] * q + scale[1]``. The scale of a row that is not finite is NaN, so that whatever is computed
        from the row is NaN.
    """
    wide = pad(rows.float(), (0, 1))  # with a zero
    high, low = wide.amax(-1) / 2, wide.amin(-1) / 2
    half = torch.where((high - low).isfinite(), high - low, torch.nan)
    middle = torch.where(half >= LEAST, high + low, 0.0)
    scale = torch.where(half < LEAST, 0.0, half * (1 / 127))
    return _entries(wide[:, :-1] - middle[:, None], half), torch.stack((scale, middle), -1)


def _entries(wide: Tensor, most: Tensor) -> Tensor:
    """Return int8 entries ``[…, width]``, 127 for the magnitude that stands for it in each row."""
    by = torch.where(most < LEAST, 0.0, 127 / most)
    return (wide * by[..., None]).nan_to_num_(0, 0, 0).round_().to(torch.int8)


def pack(matrix: Tensor) -> Tensor:
    """Return a matrix ``[columns, inner]`` of int8, bfloat16 or float32 in that order, as int8 ``[bytes]``."""
    columns, inner = matrix.shape
    each = _LINE // matrix.dtype.itemsize
    padded = pad(matrix, (0, -inner % each, 0, -columns % _COLUMNS)).contiguous()
    words = padded.view(torch.int32)
    return words.view(-1, 16, words.shape[1]).transpose(1, 2).contiguous().view(torch.int8).flatten()


def fits_in_place(matrix: Tensor, dtype: torch.dtype) -> bool:
    """Tell whether a matrix takes as much memory when it is packed as this dtype, and may stay where it is."""
    return (
        matrix.dtype == dtype
        and matrix.is_contiguous()
        and packed_bytes(dtype, *matrix.shape) == matrix.numel() * dtype.itemsize
    )


def unpacked(weight: Weight) -> Tensor:
    """Return the matrix ``[columns, inner]`` that a packed weight holds."""
    each = _LINE // weight.dtype.itemsize
    words = -(-weight.inner // each) * _LINE // 4
    matrix = weight.packed.view(torch.int32).view(-1, words, 16).transpose(1, 2).contiguous().view(weight.dtype)
    return matrix.flatten(0, 1)[: weight.columns, : weight.inner]


def packed_bytes(dtype: torch.dtype, columns: int, inner: int) -> int:
    """Return how many bytes :func:`pack` makes of a matrix ``[columns, inner]``."""
    each = _LINE // dtype.itemsize
    return padded_columns(columns) * -(-inner // each) * _LINE


def padded_columns(columns: int) -> int:
    """Return the number of columns with their padding, which scales and biases have too."""
    return -(-columns // _COLUMNS) * _COLUMNS


def packed_weight(
    matrix: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
    pack_in_place: Callable[[Tensor], Tensor] | None = None,
) -> Weight:
    """Pack a matrix, and quantise it by column if the dtype is int8.

    Args:
        matrix: The matrix ``[columns, inner]``.
        bias: What is added to the columns, ``[columns]``; None for nothing.
        dtype: The dtype of the packed entries: int8, bfloat16 or float32.
        pack_in_place: What packs a matrix of this dtype in its own memory; None to leave the matrix as it is.
    """
    columns, inner = matrix.shape
    biases = None if bias is None else padded(bias)
    if pack_in_place is not None:
        return Weight(pack_in_place(matrix), dtype, columns, inner, None, biases)
    packed = matrix.new_empty(packed_bytes(dtype, columns, inner), dtype=torch.int8)
    scale, sums = torch.zeros(2, padded_columns(columns)) if dtype == torch.int8 else (None, None)
    each = packed_bytes(dtype, _COLUMNS, inner) // _COLUMNS
    # Some columns at a time, because quantising all would take memory for copies of them in float32.
    step = max(_COLUMNS, _AT_ONCE // max(1, inner) // _COLUMNS * _COLUMNS)
    for start in range(0, columns, step):
        part = matrix[start : start + step]
        end = start + len(part)
        if scale is not None and sums is not None:
            part, scale[start:end] = quantized(part)
            sums[start:end] = part.sum(-1) * scale[start:end]
        packed[start * each : padded_columns(end) * each] = pack(part.to(dtype))
    return Weight(packed, dtype, columns, inner, scale, biases, sums)


def padded(values: Tensor) -> Tensor:
    """Return a copy of the columns' values in float32, with zeros for the padding of the columns."""
    padded = values.new_zeros(padded_columns(len(values)), dtype=torch.float32)
    padded[: len(values)] = values
    return padded
