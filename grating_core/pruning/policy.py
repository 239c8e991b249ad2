"""The interface of a pruning policy, and the policy that prunes nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray


class Route(StrEnum):
    """What a policy decides for a candidate after a layer."""

    SELECTED = "selected"  # sure to be among the top K
    DROPPED = "dropped"  # cannot reach the top K
    DEFERRED = "deferred"  # undecided: goes through the next layer


@runtime_checkable
class PruningPolicy(Protocol):
    """Decides after each layer but the last, from the provisional scores alone, which candidates go on.

    A policy may be called from several threads at once and should not keep state of a request.
    """

    def route(self, layer: int, scores: NDArray[np.float64], top_k: int) -> Sequence[Route]:
        """Decide for every candidate that is still in the race.

        Args:
            layer: Number of the layer just computed, from 1.
            scores: float64 ``[N]``, all finite: the provisional scores of the candidates still computed.
            top_k: How many of these N are wanted, at least 1 and below N.

        Returns:
            N routes in the order of ``scores``. At most ``top_k`` are selected, and selected and deferred
            together are at least ``top_k``.
        """
        ...


@dataclass(frozen=True)
class Off:
    """Prunes nothing."""

    def route(self, layer: int, scores: NDArray[np.float64], top_k: int) -> Sequence[Route]:
        """Defer every candidate."""
        return [Route.DEFERRED] * len(scores)
