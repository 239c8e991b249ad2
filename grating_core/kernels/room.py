"""Memory for intermediate results is used again from slice to slice."""

from __future__ import annotations

import torch
from torch import Tensor


class Room:
    """A room keeps the memory of intermediate results for one pass.

    Memory that is fresh from the system costs about as much as what a kernel computes in it, because the system
    clears it page by page.
    """

    def __init__(self) -> None:
        self._kept: dict[str, Tensor] = {}

    def states(self, purpose: str, count: int, width: int, dtype: torch.dtype) -> Tensor:
        """Return states ``[count, width]`` to write to, on the CPU.

        Args:
            purpose: What they are for. They lie where the states of this purpose lay before, which are lost.
            count: Number of rows.
            width: Number of entries of a row.
            dtype: The dtype, the same for all states of a purpose.
        """
        kept = self._kept.get(purpose)
        if kept is None or len(kept) < count * width:
            kept = self._kept[purpose] = torch.empty(count * width, dtype=dtype)
        return kept[: count * width].view(count, width)
