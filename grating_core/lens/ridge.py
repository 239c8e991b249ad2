"""Ridge regression from sums over requests, so that a lens without one corpus is a subtraction away."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

Floats = NDArray[np.float32]

_DEPTH = 100  # candidates of a request that count
_ROWS = 8192  # rows of features that are in memory at once


@dataclass(frozen=True)
class Moments:
    """Moments are all that ridge regression needs to know of features and scores, centred by request.

    Only what differs within a request decides its ranking, so the mean of each request is subtracted.

    Attributes:
        features: Sums of products of features, float32 ``[F, F]``.
        scores: Sums of products of features and scores, float32 ``[F]``.
        squares: Sum of squares of scores.
        rows: Number of candidates.
    """

    features: Floats
    scores: Floats
    squares: float
    rows: int

    def __add__(self, other: Moments) -> Moments:
        return Moments(
            self.features + other.features,
            self.scores + other.scores,
            self.squares + other.squares,
            self.rows + other.rows,
        )

    def __sub__(self, other: Moments) -> Moments:
        return Moments(
            self.features - other.features,
            self.scores - other.scores,
            self.squares - other.squares,
            self.rows - other.rows,
        )

    def solve(self, strength: float) -> Floats:
        """Return the weights of the features, float32 ``[F]``.

        Args:
            strength: The strength of the ridge for standardised features and one candidate.
        """
        # The difference of two sums may be off by a rounding error.
        scale = np.sqrt(np.maximum(np.diag(self.features), 0) / self.rows) + np.float32(1e-6)
        matrix = torch.from_numpy(self.features / scale[:, None] / scale)
        matrix.diagonal().add_(strength * self.rows)
        wanted = torch.from_numpy(self.scores / scale)[:, None]
        solved: Floats = torch.cholesky_solve(wanted, torch.linalg.cholesky(matrix))[:, 0].numpy()
        return solved / scale

    def error(self, weight: Floats) -> float:
        """Return the mean squared error of estimates with these weights, float32 ``[F]``."""
        explained = 2 * self.scores - self.features @ weight
        return max(self.squares - float(explained.astype(np.float64) @ weight), 0.0) / self.rows


def moments(features: NDArray[Any], scores: Sequence[Floats]) -> Moments:
    """Sum up the requests of a corpus.

    Args:
        features: Features of all candidates, ``[n, F]``.
        scores: Final scores of each request, ``[N]``; the requests lie one behind the other.
    """
    total: Moments | None = None
    for inputs, wanted in _blocks(features, scores):
        some = Moments(inputs.T @ inputs, inputs.T @ wanted, float(wanted @ wanted), len(wanted))
        total = some if total is None else total + some
    assert total is not None, "there are no requests"
    return total


def _blocks(features: NDArray[Any], scores: Sequence[Floats]) -> Iterable[tuple[Floats, Floats]]:
    """Yield centred features ``[B, F]`` and scores ``[B]`` of some requests at a time."""
    inputs, wanted, start = list[Floats](), list[Floats](), 0
    for number, found in enumerate(scores):
        some = features[start : start + len(found)][:_DEPTH].astype(np.float32)
        inputs.append(some - some.mean(0))
        wanted.append(found[:_DEPTH] - found[:_DEPTH].mean())
        start += len(found)
        if sum(map(len, wanted)) >= _ROWS or number == len(scores) - 1:
            yield np.concatenate(inputs), np.concatenate(wanted)
            inputs, wanted = [], []
