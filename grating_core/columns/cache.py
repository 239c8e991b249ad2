"""This module keeps account of columns: which are in memory, and which a token uses. It sees no weights."""

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
    """A preference for columns in memory: γ, from above 0 to 1, multiplies the magnitudes of the others.

    Attributes:
        inputs: γ of columns of W_u and W_g. Magnitudes of inputs are even, and bear little preference.
        products: γ of columns of W_d. Magnitudes of products are uneven, and bear a strong one.

    Raises:
        ValueError: One is not above 0, 1 at most.
    """

    inputs: float
    products: float

    def __post_init__(self) -> None:
        for name, preference in (("inputs", self.inputs), ("products", self.products)):
            if not 0 < preference <= 1:
                raise ValueError(
                    f"preference for {name}, {preference!r}, must be above 0 and at most 1, which prefers nothing"
                )


NO_PREFERENCE = Preference(1.0, 1.0)


class Choice(NamedTuple):
    """The columns that one token uses.

    Attributes:
        columns: Numbers of the columns, int64 ``[k]``: first those that are in memory, then those to be read, each
            rising.
        slots: Place of each, int64 ``[k]``. Numbers from the capacity on are places beside the cache, where a
            column lies for this token only.
        hits: Number of columns that are in memory already.
    """

    columns: NDArray[np.int64]
    slots: NDArray[np.int64]
    hits: int


class ColumnCache:
    """Keeps account of the columns of one matrix, or of two that are read together; some of them are in memory.

    Masks are cache-aware, and the least frequently used columns give way, as in DIP (arXiv 2412.01380, section 5).

    Args:
        columns: Number of columns.
        capacity: Number of columns that fit into memory, from 0 to all.
        preference: Factor of the magnitude at a column that is not in memory. 1 treats all columns alike.
    """

    def __init__(self, columns: int, capacity: int, *, preference: float = 1.0) -> None:
        self.capacity = min(capacity, columns)
        self.preference = preference
        self._slot = np.full(columns, _NOWHERE, dtype=np.int64)  # of each column
        self._column = np.full(self.capacity, _NOWHERE, dtype=np.int64)  # at each slot
        self._uses = np.zeros(columns, dtype=np.int64)

    def fill(self) -> NDArray[np.int64]:
        """Take the first columns as present, one in each slot, and return their numbers."""
        columns = np.arange(self.capacity)
        self._slot[:] = _NOWHERE
        self._slot[columns] = columns
        self._column[:] = columns
        return columns

    def held(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return the columns that are in memory, rising, and the slot of each; both int64 ``[n]``."""
        columns = np.flatnonzero(self._slot != _NOWHERE)
        return columns, self._slot[columns]

    def forget(self, columns: NDArray[np.int64]) -> None:
        """Take these columns as not in memory, such as after a read that failed."""
        slots = self._slot[columns]
        self._column[slots[slots != _NOWHERE]] = _NOWHERE
        self._slot[columns] = _NOWHERE

    def clear(self) -> None:
        """Take no column as in memory."""
        self._slot[:] = _NOWHERE
        self._column[:] = _NOWHERE

    def choose(self, magnitudes: NDArray[np.floating], count: int) -> Choice:
        """Choose columns for one token. Those that are missing take the place of the least frequently used.

        Args:
            magnitudes: How much each column matters, ``[columns]``, none below 0.
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
        """Find a slot for each missing column: first those of the columns used least, then beside the cache."""
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
        """Return the places of the missing columns that find room: those most likely to be wanted again."""
        if len(missing) <= room:
            return np.arange(len(missing))
        return np.argpartition(self._uses[missing], -room)[-room:] if room else np.empty(0, dtype=np.int64)

    def _victims(self, hits: NDArray[np.int64], count: int) -> NDArray[np.int64]:
        """Return the slots whose columns were used least; none of those that are in use now."""
        uses = np.where(self._column == _NOWHERE, _NOWHERE, self._uses[self._column])
        uses[self._slot[hits]] = np.iinfo(np.int64).max
        return np.argpartition(uses, count - 1)[:count] if count else np.empty(0, dtype=np.int64)


@dataclass(frozen=True)
class Caching:
    """The caching of a model: how much of each layer's MLP is in memory, and how much that part is preferred.

    Attributes:
        share: Share of the MLP's weights that is in memory, from 0 to 1; see :func:`divide_room`.
        preference: Preference for columns that are in memory; the default is plain DIP, without any.

    Raises:
        ValueError: The share is not from 0 to 1.
    """

    share: float
    preference: Preference = NO_PREFERENCE

    def __post_init__(self) -> None:
        if not 0 <= self.share <= 1:
            raise ValueError(f"share={self.share!r} must be from 0 to 1: how much of the MLPs is in memory")

    def cache(self, columns: int, kind: Kind, shares: Shares) -> ColumnCache:
        """Make a full cache for so many columns of one kind, of an MLP of which a token uses these shares."""
        room = int(getattr(divide_room(self.share, shares), kind) * columns)
        cache = ColumnCache(columns, room, preference=getattr(self.preference, kind))
        cache.fill()
        return cache
