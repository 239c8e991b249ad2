"""A packed table stands for an embedding table whose rows are the columns of a packed weight."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from grating_core.kernels.groups import dequantized
from grating_core.kernels.operands import Weight

_BLOCK = 16  # columns


class PackedTable:
    """This table gives the rows that the columns of a weight stand for.

    Args:
        weight: The weight, with a column for each row of the table.
        dtype: The dtype of the rows that are given.
    """

    def __init__(self, weight: Weight, dtype: torch.dtype) -> None:
        self._weight = weight
        self._dtype = dtype

    def fetch(self, input_ids: Tensor) -> None:
        """Do nothing: all rows are in memory."""

    def __call__(self, input_ids: Tensor) -> Tensor:
        """Return the rows of tokens, ``[T, D]``, for int64 ``[T]``.

        Raises:
            IndexError: There is no such row.
        """
        weight = self._weight
        if (last := int(input_ids.max())) >= weight.columns:
            raise IndexError(f"row {last} is not among the {weight.columns:,} of the table")
        if weight.bits is None:  # an embedding that this library packed: a token should not wait for more steps
            rows = _words(weight.packed.view(torch.int32), weight.columns, input_ids).view(weight.dtype)
            rows = rows[:, : weight.inner]
            return (rows if weight.scale is None else rows * weight.scale[input_ids, None]).to(self._dtype)
        columns, places = torch.unique(input_ids, return_inverse=True)
        return dequantized(_picked(weight, columns)).to(self._dtype)[places]


def _words(values: Tensor, columns: int, some: Tensor) -> Tensor:
    """Return what some of a weight's columns have of values ``[blocks of 16 columns, …, 16]``."""
    blocks = values.view(-(-columns // (2 * _BLOCK)) * 2, -1, _BLOCK)
    return blocks[some // _BLOCK, :, some % _BLOCK]


def _picked(weight: Weight, columns: Tensor) -> Weight:
    """Return a weight with some columns of another, by number: int64 ``[columns]``."""

    def some(values: Tensor | None) -> Tensor | None:
        if values is None:
            return None
        words = values.view(torch.int32) if values.dtype == torch.int8 else values
        found = pad(_words(words, weight.columns, columns), (0, 0, 0, -len(columns) % (2 * _BLOCK)))
        return found.view(-1, _BLOCK, found.shape[1]).transpose(1, 2).contiguous().flatten().view(values.dtype)

    fields: dict[str, Any] = {
        name: some(getattr(weight, name)) for name in ("packed", "scale", "bias", "sums", "minimum", "factor")
    }
    return weight._replace(columns=len(columns), **fields)
