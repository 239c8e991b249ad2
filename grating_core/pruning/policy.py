"""A pruning policy decides which candidates go on. This file has its interface, and one that prunes nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray


class Route(StrEnum):
    """A route is what a policy decides for a candidate after a layer."""

    SELECTED = "selected"  # sure to be among the top K
    DROPPED = "dropped"  # cannot reach the top K
    DEFERRED = "deferred"  # undecided: goes through the next layer


@runtime_checkable
class PruningPolicy(Protocol):
    """A policy decides after each layer but the last, from provisional scores alone, which candidates go on.

    A policy may be called from several threads at once and should not keep state of a request.
    """

    def route(self, layer: int, scores: NDArray[np.float64], top_k: int) -> Sequence[Route]:
        """Decide for every candidate that is still in the race.

        Args:
            layer: Number of the layer just computed, from 1; 0 for the token embeddings, which only a lens reads.
            scores: Provisional scores of the N candidates that are still computed, float64 ``[N]``, all finite.
            top_k: Number K of candidates to find among these N, at least 1 and below N.

        Returns:
            N routes in the order of ``scores``. At most ``top_k`` are selected, and selected and deferred
            together are at least ``top_k``.
        """
        ...


@dataclass(frozen=True)
class Off:
    """This policy prunes nothing."""

    def route(self, layer: int, scores: NDArray[np.float64], top_k: int) -> Sequence[Route]:
        """Defer every candidate."""
        return [Route.DEFERRED] * len(scores)
