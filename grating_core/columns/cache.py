"""This module records which columns are in memory and chooses those that a token uses. It sees no weights."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from grating_core.columns.allocation import divide_room
from grating_core.columns.companion import Kind
from grating_core.columns.masks import Shares
from grating_core.kernels.choice import kernels
from grating_core.kernels.columns import NOWHERE, Choice, Held


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


class ColumnCache:
    """This class records which columns are in memory, of one matrix or of two that are read together.

    As in DIP (arXiv 2412.01380, section 5), masks are cache-aware, and the least used columns are evicted.

    Args:
        columns: Number of columns.
        capacity: Number of columns that fit into memory, from 0 to ``columns``.
        preference: Factor of the magnitudes of columns that are not in memory. 1 treats all columns alike.
    """

    def __init__(self, columns: int, capacity: int, *, preference: float = 1.0) -> None:
        self.capacity = min(capacity, columns)
        self.preference = preference
        self._held = Held(
            slots=np.full(columns, NOWHERE, dtype=np.int64),
            columns=np.full(self.capacity, NOWHERE, dtype=np.int64),
            uses=np.zeros(columns, dtype=np.int64),
        )
        self._choose = kernels().choose

    def fill(self) -> NDArray[np.int64]:
        """Record the first columns as in memory, one in each slot, and return their numbers."""
        columns = np.arange(self.capacity)
        self._held.slots[:] = NOWHERE
        self._held.slots[columns] = columns
        self._held.columns[:] = columns
        return columns

    def held(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return the columns that are in memory, rising, and their slots; both int64 ``[n]``."""
        columns = np.flatnonzero(self._held.slots != NOWHERE)
        return columns, self._held.slots[columns]

    def forget(self, columns: NDArray[np.int64]) -> None:
        """Record these columns as not in memory, for example after a read that failed."""
        slots = self._held.slots[columns]
        self._held.columns[slots[slots != NOWHERE]] = NOWHERE
        self._held.slots[columns] = NOWHERE

    def clear(self) -> None:
        """Record that no column is in memory."""
        self._held.slots[:] = NOWHERE
        self._held.columns[:] = NOWHERE

    def choose(self, values: NDArray[np.float32], count: int) -> Choice:
        """Choose columns for one token. Missing columns replace those that are used least frequently.

        Args:
            values: Value of each column, ``[columns]``. Those with the largest magnitudes are chosen.
            count: Number of columns to choose.
        """
        return self._choose(self._held, values, count, self.preference)


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

    def cache(self, columns: int, kind: Kind, shares: Shares) -> ColumnCache:
        """Make a full cache for columns of one kind. ``shares`` are those of the MLP that a token uses."""
        room = int(getattr(divide_room(self.share, shares), kind) * columns)
        cache = ColumnCache(columns, room, preference=getattr(self.preference, kind))
        cache.fill()
        return cache
