"""A span is what attention is computed for: queries of one sequence, and what they may see."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Span(NamedTuple):
    """A span is consecutive queries of one sequence, with the keys and values that they may see.

    Attributes:
        rows: Place of the queries among those of the slice.
        key: Keys, ``[key heads, M, head size]``.
        value: Values of the same shape.
        first: Position of the first query among the keys.
    """

    rows: slice
    key: Tensor
    value: Tensor
    first: int
