"""Memory for intermediate results is used again from slice to slice."""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor


class Room:
    """A room keeps the memory of intermediate results for one pass.

    Memory that is fresh from the system costs about as much as what a kernel computes in it, because the system
    clears it page by page.
    """

    def __init__(self) -> None:
        self._kept: dict[str, Tensor] = {}
        self._given: dict[tuple[str, tuple[int, ...]], Tensor] = {}

    def states(self, purpose: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Return states to write to, on the CPU.

        Args:
            purpose: What they are for. They lie where the states of this purpose lay before, which are lost.
            shape: Their shape.
            dtype: Their dtype, the same for all states of a purpose.
        """
        found = self._given.get((purpose, shape))
        if found is None:
            kept, size = self._kept.get(purpose), prod(shape)
            if kept is None or len(kept) < size:
                kept = self._kept[purpose] = torch.empty(size, dtype=dtype)
                self._given = {key: one for key, one in self._given.items() if key[0] != purpose}
            found = self._given[purpose, shape] = kept[:size].view(shape)
        return found
