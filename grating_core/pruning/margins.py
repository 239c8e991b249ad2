"""A margin says how far behind the K-th estimate a candidate must lie to be given up, so that a promise is kept.

The estimates of a lens are off by some typical error, which differs by layer. A *margin* is that error times a
*factor*; one factor for all layers is found by conformal risk control (Angelopoulos, Bates, Fisch, Lei & Schuster,
"Conformal Risk Control", ICLR 2024, section 2): for n requests of calibration the whole pruning was replayed with
every factor, and the smallest factor is taken for which (n · mean loss + 1) / (n + 1) ≤ 1 - target. For requests
exchangeable with those, the expected loss is then at most 1 - target. With several corpora, each of which a lens
estimated that had not seen it, the promise is for the mean over corpora; their standard error is added to it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray

from grating_core.arguments import Guarantee
from grating_core.pruning.policy import Route

Array = NDArray[np.float64]

MODES = ("exact", "estimated")  # of scores
GUARANTEES: tuple[Guarantee, ...] = get_args(Guarantee)


@dataclass(frozen=True)
class MarginPolicy:
    """This policy drops what lies far behind the K-th estimate, and selects what lies far before the next one.

    Attributes:
        drop: Margin for dropping after each layer, from layer 0 (the token embeddings). Infinity drops nothing.
        select: Margin for selecting after each layer. Infinity selects nothing.
    """

    drop: tuple[float, ...]
    select: tuple[float, ...]

    def looks(self, layer: int) -> bool:
        """Tell whether anything can be decided after a layer. Otherwise nobody needs to read its scores."""
        return min(self.drop[layer], self.select[layer]) < math.inf

    def route(self, layer: int, scores: Array, top_k: int) -> Sequence[Route]:
        """See :meth:`grating_core.PruningPolicy.route`."""
        ordered = np.sort(scores)[::-1]
        dropped = scores < ordered[top_k - 1] - self.drop[layer]
        selected = scores > ordered[top_k] + self.select[layer]
        return [
            Route.SELECTED if ahead else Route.DROPPED if behind else Route.DEFERRED
            for ahead, behind in zip(selected.tolist(), dropped.tolist(), strict=True)
        ]


@dataclass(frozen=True)
class Margins:
    """Margins hold the results of calibration: errors by layer, and the loss with each factor.

    Attributes:
        drop: Typical error of an estimate, the unit of margins for dropping: float64 ``[L]``, from layer 0.
        select: Unit of margins for selecting, float64 ``[L]``.
        factors: Factors that were tried, float64 ``[G]``, rising.
        cells: Numbers of candidates N and of K that were replayed, int64 ``[C, 2]``.
        bounds: Bounds on the expected loss, float64 ``[2, 2, C, G]``: for exact and estimated scores (axis 0), of
            the share of the top K and of whole sets (axis 1), in each cell with each factor. They never rise with
            the factor.
        looks: The layers after which the lens looks, bool ``[C, L]``. Others were not looked at in the replays.

    Raises:
        ValueError: The arrays are damaged, because calibration finds no such margins.
    """

    drop: Array
    select: Array
    factors: Array
    cells: NDArray[np.int64]
    bounds: Array
    looks: NDArray[np.bool_]

    def __post_init__(self) -> None:
        layers, factors, cells = len(self.drop), len(self.factors), len(self.cells)
        wanted: dict[str, tuple[NDArray[Any], type, tuple[int, ...]]] = {
            "drop": (self.drop, np.float64, (layers,)),
            "select": (self.select, np.float64, (layers,)),
            "factors": (self.factors, np.float64, (factors,)),
            "cells": (self.cells, np.int64, (cells, 2)),
            "bounds": (self.bounds, np.float64, (len(MODES), len(GUARANTEES), cells, factors)),
            "looks": (self.looks, np.bool_, (cells, layers)),
        }
        for name, (values, dtype, shape) in wanted.items():
            if values.dtype != dtype or values.shape != shape or not values.size:
                raise ValueError(
                    f"margins.{name}: {values.dtype} {list(values.shape)}, not {np.dtype(dtype)} {list(shape)}"
                )
            if not np.isfinite(values).all() or (values < 0).any():
                raise ValueError(f"margins.{name} has numbers that are negative or not finite")
        if (np.diff(self.factors) <= 0).any():
            raise ValueError("margins.factors do not rise")
        if (self.bounds > 1).any() or (np.diff(self.bounds) > 0).any():
            raise ValueError("margins.bounds rise with the factor, or are above 1")
        if len(np.unique(self.cells, axis=0)) < cells or not (self.cells[:, 1] >= 1).all():
            raise ValueError("margins.cells has a cell twice, or one for no documents")
        if (self.cells[:, 1] > self.cells[:, 0]).any():
            raise ValueError("margins.cells has a K above its N")

    def policy(
        self, candidates: int, top_k: int, *, target: float, guarantee: Guarantee, exact: bool
    ) -> MarginPolicy:
        """Return the policy of one request.

        Args:
            candidates: Number N of candidates.
            top_k: K, below N.
            target: The promise: the expected share of the full model's top K that is kept, or the probability that
                all of it is kept.
            guarantee: ``"share"`` if the target is the share, ``"set"`` if it is the probability.
            exact: Whether only hopeless candidates stop, and no sure winners.
        """
        factor = self.factor(candidates, top_k, target=target, guarantee=guarantee, exact=exact)
        # A look that some neighbour did without may lose more than was replayed, so it is left out.
        looks = self.looks[self._cells(candidates, top_k)].all(0)
        drop, select = (np.where(looks, factor * unit, np.inf) for unit in (self.drop, self.select))
        return MarginPolicy(tuple(drop.tolist()), tuple(select.tolist()))

    def factor(self, candidates: int, top_k: int, *, target: float, guarantee: Guarantee, exact: bool) -> float:
        """Return the factor of one request; infinity if the promise cannot be made. Arguments: see :meth:`policy`.

        Between the numbers that were replayed it is the largest of the neighbours' factors. Beyond the most
        candidates, M of them, N candidates are seen as N / M requests, each of which may lose that part of the
        risk: a union bound. A larger K than was replayed needs less, so the largest K stands for all beyond it.
        """
        risk = (1 - target) / max(1.0, candidates / float(self.cells[:, 0].max()))
        bounds = self.bounds[MODES.index("exact" if exact else "estimated"), GUARANTEES.index(guarantee)]
        enough = bounds[self._cells(candidates, top_k)] <= risk
        factors = np.where(enough.any(1), self.factors[enough.argmax(1)], np.inf)
        return float(factors.max())

    def _cells(self, candidates: int, top_k: int) -> list[int]:
        """Return the numbers of the cells next to a number of candidates and a K, below and above."""
        found = []
        for number in _neighbours(self.cells[:, 0], candidates):
            rows = np.flatnonzero(self.cells[:, 0] == number)
            for wanted in _neighbours(self.cells[rows, 1], top_k):
                found.append(int(rows[self.cells[rows, 1] == wanted][0]))
        return found


def _neighbours(replayed: NDArray[np.int64], value: int) -> set[int]:
    """Return the replayed numbers next to a value, below and above; only one where there is no other."""
    below, above = replayed[replayed <= value], replayed[replayed >= value]
    return {int(side) for side in (*np.sort(below)[-1:], *np.sort(above)[:1])}
