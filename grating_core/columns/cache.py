"""This module says which columns are in memory, and how strongly those are preferred. It sees no weights."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from grating_core.columns.allocation import divide_room
from grating_core.columns.companion import Kind
from grating_core.columns.masks import Shares
from grating_core.kernels.choice import kernels
from grating_core.kernels.columns import Choice


@dataclass(frozen=True)
class Preference:
    """A preference favours columns in memory: γ, above 0 and at most 1, multiplies the others' magnitudes.

    Attributes:
        inputs: γ of columns of W_u and W_g. Magnitudes of inputs are even, so the preference has to be weak.
        products: γ of columns of W_d. Magnitudes of products are uneven, so the preference may be strong.

    Raises:
        ValueError: A γ is not above 0 and at most 1.
    """

    inputs: float
    products: float

    def __post_init__(self) -> None:
        for name, preference in (("inputs", self.inputs), ("products", self.products)):
            if not 0 < preference <= 1:
                raise ValueError(
                    f"preference for {name}, {preference!r}, must be above 0 and at most 1 (1 prefers no column)"
                )


NO_PREFERENCE = Preference(1.0, 1.0)


@dataclass(frozen=True)
class ColumnCache:
    """This class holds the first columns of a table in memory: those that tokens use most.

    Masks are cache-aware, as in DIP (arXiv 2412.01380, section 5). Unlike there no column is evicted: the first
    columns of a table are those with the largest mean squares, and to change them found no more in memory. So a
    choice depends on nothing but the token.

    Attributes:
        resident: Number of columns that are in memory.
        preference: Factor of the magnitudes of columns that are not in memory. 1 treats all columns alike.
        cost: What a read from disk costs, in columns.
    """

    resident: int
    preference: float = 1.0
    cost: float = 0.0

    def choose(self, values: NDArray[np.float32], count: int) -> Choice:
        """Choose columns for one token.

        Args:
            values: Value of each column in the order of the table, ``[columns]``.
            count: Number of columns to choose, if all are in memory.
        """
        return kernels().choose(values, self.resident, count, self.preference, self.cost)


@dataclass(frozen=True)
class Caching:
    """This class says how much of each layer's MLP is in memory, and how strongly that part is preferred.

    Attributes:
        share: Share of the MLP's weights that is in memory, from 0 to 1; see :func:`divide_room`.
        preference: Preference for columns that are in memory. The default is plain DIP, without a preference.

    Raises:
        ValueError: The share is not from 0 to 1.
    """

    share: float
    preference: Preference = NO_PREFERENCE

    def __post_init__(self) -> None:
        if not 0 <= self.share <= 1:
            raise ValueError(f"share={self.share!r} must be from 0 to 1: the share of the MLPs that is in memory")

    def cache(self, columns: int, kind: Kind, shares: Shares, cost: float = 0.0) -> ColumnCache:
        """Make a cache for columns of one kind.

        Args:
            columns: Number of columns.
            kind: Their kind.
            shares: Shares of the MLP that a token uses.
            cost: What a read from disk costs, in columns.
        """
        room = int(getattr(divide_room(self.share, shares), kind) * columns)
        return ColumnCache(room, getattr(self.preference, kind), cost)
