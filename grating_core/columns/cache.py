"""This module records which columns are in memory and chooses those that a token uses. It sees no weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from grating_core.columns.allocation import divide_room
from grating_core.columns.companion import Kind
from grating_core.columns.masks import Shares

_NOWHERE = -1


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


class Choice(NamedTuple):
    """A choice holds the columns that one token uses.

    Attributes:
        columns: Numbers of the columns, int64 ``[k]``: first those in memory, then those to read, both rising.
        slots: Slot of each column, int64 ``[k]``. Numbers from the capacity on are slots beside the cache, where a
            column stays for this token only.
        hits: Number of columns that are in memory already.
    """

    columns: NDArray[np.int64]
    slots: NDArray[np.int64]
    hits: int


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
        self._slot = np.full(columns, _NOWHERE, dtype=np.int64)  # of each column
        self._column = np.full(self.capacity, _NOWHERE, dtype=np.int64)  # at each slot
        self._uses = np.zeros(columns, dtype=np.int64)

    def fill(self) -> NDArray[np.int64]:
        """Record the first columns as in memory, one in each slot, and return their numbers."""
        columns = np.arange(self.capacity)
        self._slot[:] = _NOWHERE
        self._slot[columns] = columns
        self._column[:] = columns
        return columns

    def held(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return the columns that are in memory, rising, and their slots; both int64 ``[n]``."""
        columns = np.flatnonzero(self._slot != _NOWHERE)
        return columns, self._slot[columns]

    def forget(self, columns: NDArray[np.int64]) -> None:
        """Record these columns as not in memory, for example after a read that failed."""
        slots = self._slot[columns]
        self._column[slots[slots != _NOWHERE]] = _NOWHERE
        self._slot[columns] = _NOWHERE

    def clear(self) -> None:
        """Record that no column is in memory."""
        self._slot[:] = _NOWHERE
        self._column[:] = _NOWHERE

    def choose(self, magnitudes: NDArray[np.floating], count: int) -> Choice:
        """Choose columns for one token. Missing columns replace those that are used least frequently.

        Args:
            magnitudes: Magnitude of each column, ``[columns]``, 0 or more.
            count: Number of columns to choose.
        """
        chosen = self._largest(magnitudes, count)
        self._uses[chosen] += 1
        slots = self._slot[chosen]
        there = slots != _NOWHERE
        hits, missing = chosen[there], chosen[~there]
        places = self._make_room(hits, missing)
        return Choice(
            columns=np.concatenate((hits, missing)),
            slots=np.concatenate((slots[there], places)),
            hits=len(hits),
        )

    def _largest(self, magnitudes: NDArray[np.floating], count: int) -> NDArray[np.int64]:
        if count >= len(magnitudes):
            return np.arange(len(magnitudes))
        if self.preference != 1.0:
            magnitudes = np.where(self._slot == _NOWHERE, magnitudes * self.preference, magnitudes)
        return np.sort(np.argpartition(magnitudes, -count)[-count:])

    def _make_room(self, hits: NDArray[np.int64], missing: NDArray[np.int64]) -> NDArray[np.int64]:
        """Find a slot for each missing column: slots of the least used columns, then slots beside the cache."""
        admitted = self._most_used(missing, self.capacity - len(hits))
        slots = self._victims(hits, len(admitted))
        evicted = self._column[slots]
        self._slot[evicted[evicted != _NOWHERE]] = _NOWHERE
        self._column[slots] = missing[admitted]
        self._slot[missing[admitted]] = slots
        places = np.full(len(missing), _NOWHERE)
        places[admitted] = slots
        beside = places == _NOWHERE
        places[beside] = self.capacity + np.arange(beside.sum())
        return places

    def _most_used(self, missing: NDArray[np.int64], room: int) -> NDArray[np.int64]:
        """Return the indices of the missing columns to keep, which are the most likely to be used again."""
        if len(missing) <= room:
            return np.arange(len(missing))
        return np.argpartition(self._uses[missing], -room)[-room:] if room else np.empty(0, dtype=np.int64)

    def _victims(self, hits: NDArray[np.int64], count: int) -> NDArray[np.int64]:
        """Return the slots whose columns were used least, except columns in use now."""
        uses = np.where(self._column == _NOWHERE, _NOWHERE, self._uses[self._column])
        uses[self._slot[hits]] = np.iinfo(np.int64).max
        return np.argpartition(uses, count - 1)[:count] if count else np.empty(0, dtype=np.int64)


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
