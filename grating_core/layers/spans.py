"""A span is what attention is computed for: queries of one sequence, and what they may see."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Span(NamedTuple):
    """A span is consecutive queries of one sequence, with the keys and values that they may see.

    Attributes:
        rows: Place of the queries among those of the slice.
        key: Keys, ``[key heads, M, head size]``.
        value: Values of the same shape.
        first: Position of the first query among all keys.
        shared: Keys and values that stand before those and lie elsewhere, of the same shapes; None for none.
    """

    rows: slice
    key: Tensor
    value: Tensor
    first: int
    shared: tuple[Tensor, Tensor] | None = None

    @property
    def joined(self) -> tuple[Tensor, Tensor]:
        """All keys and all values, each in one piece."""
        if self.shared is None:
            return self.key, self.value
        key, value = self.shared
        return torch.cat((key, self.key), dim=1), torch.cat((value, self.value), dim=1)
