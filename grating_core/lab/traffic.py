"""What tokens wanted of the columns, and what a cache had of it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from grating_core.columns.companion import KINDS, ColumnSizes, Kind


@dataclass(frozen=True)
class Traffic:
    """Columns wanted and found, over all tokens.

    Attributes:
        sizes: Of the MLPs.
        tokens: How many tokens there were.
        wanted: Columns that they used, int64 ``[depth, 2]``: by layer, and by kind as in ``KINDS``.
        hits: Those of them that were in memory, of the same shape.
    """

    sizes: ColumnSizes
    tokens: int
    wanted: NDArray[np.int64]
    hits: NDArray[np.int64]

    def hit_rate(self, kind: Kind | None = None) -> float:
        """Share of the columns wanted, of one kind or of both, that were in memory."""
        chosen = slice(None) if kind is None else KINDS.index(kind)
        return float(self.hits[:, chosen].sum() / self.wanted[:, chosen].sum())

    @property
    def bytes_per_token(self) -> float:
        """Bytes of the companion file that are read for a token."""
        rows = np.array([self.sizes.row_bytes(kind) for kind in KINDS])
        return float(((self.wanted - self.hits) * rows).sum() / self.tokens)
