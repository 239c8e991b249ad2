"""Before a deadline margins shrink until the rest of the work fits into the time that is left.

Dropping early and finishing a few saves time, and so does stopping all at an earlier layer. Here both are mixed.
A candidate goes on whose estimate lies near the bar of the top K, in typical errors of the lens. What lies far
behind the bar is dropped. What lies far before it is selected with its estimate, because computing it on would
not change the top K. How near is near depends on the time. But where less than ``_LEAST`` typical errors would
fit, estimates cannot tell the good from the rest, and all stop at an earlier layer instead. The constants
were chosen by replays of real requests.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from grating_core.pruning.policy import Route

Array = NDArray[np.float64]

_AHEAD = 1.25  # how much further ahead of the bar than behind it is far
_LEAST = 0.4  # typical errors
_NARROWING = 1.5  # the power of the errors with which the candidates that go on come nearer to the bar
_MEMORY = 0.98  # the weight of what was known before, beside the newest layer
_SPREAD = 0.2  # the deviation of numbers of tokens, as a share of their mean, that tells half of fixed costs apart
_LATELY = 0.6  # the weight of how slow layers were before, beside the newest


@dataclass(frozen=True)
class Pace:
    """A pace tells the seconds of a layer by its tokens: a line through what was measured, times how slow it is.

    The line's height without tokens is what reading weights takes, and whatever else does not depend on tokens.

    Attributes:
        weight: Weight of the layers that were measured. A layer with fewer tokens tells more of fixed costs.
        tokens: Mean number of tokens.
        seconds: Mean seconds.
        squares: Mean of the squares of the tokens' deviations from their mean.
        products: Mean of the products of both deviations.
        slowness: The seconds of the latest layers, as a share of those that the line tells. They depend on what
            else the machine does, and on the lengths of the sequences.
    """

    weight: float = 0.0
    tokens: float = 0.0
    seconds: float = 0.0
    squares: float = 0.0
    products: float = 0.0
    slowness: float = 1.0

    def learnt(self, tokens: float, seconds: float) -> Pace:
        """Return the pace after one more layer."""
        weight = _MEMORY * self.weight + 1.0 / tokens
        share = 1.0 / (tokens * weight)
        more, longer = tokens - self.tokens, seconds - self.seconds
        line = Pace(
            weight,
            self.tokens + share * more,
            self.seconds + share * longer,
            (1 - share) * (self.squares + share * more * more),
            (1 - share) * (self.products + share * more * longer),
        )
        now = seconds / max(line.seconds_of(tokens), 1e-12)
        return replace(line, slowness=_LATELY * self.slowness + (1 - _LATELY) * now)

    @property
    def by_token(self) -> float:
        """The seconds that one more token takes in a layer."""
        return self.slowness * self._slope

    @property
    def fixed(self) -> float:
        """The seconds of a layer without tokens."""
        return self.slowness * (self.seconds - self._slope * self.tokens)

    def seconds_of(self, tokens: float) -> float:
        """Return the seconds of a layer with so many tokens."""
        return self.fixed + self.by_token * tokens

    @cached_property
    def _slope(self) -> float:
        """The slope of the line. The more alike the numbers of tokens were, the nearer the line comes to zero."""
        proportional = self.seconds / max(self.tokens, 1.0)
        alike = (_SPREAD * self.tokens) ** 2
        slope = (self.products + alike * proportional) / max(self.squares + alike, 1e-12)
        return min(max(slope, 0.0), proportional)


@dataclass(frozen=True)
class Costs:
    """Costs are the seconds of the H layers that are left.

    Attributes:
        fixed: Seconds of each layer without tokens, float64 ``[H]``.
        by_token: Seconds of each token in each layer, float64 ``[H]``.
    """

    fixed: Array
    by_token: Array

    @classmethod
    def of(cls, paces: Sequence[Pace]) -> Costs:
        """Return the costs of layers, each with its pace."""
        return cls(np.array([pace.fixed for pace in paces]), np.array([pace.by_token for pace in paces]))

    def seconds(self, tokens: Array | float) -> Array:
        """Return the seconds of each layer, float64 ``[H]``.

        Args:
            tokens: Numbers of tokens, float64 ``[H]``, or the number of tokens of all layers.
        """
        found: Array = self.fixed + self.by_token * tokens
        return found


@dataclass(frozen=True)
class Race:
    """A race has the candidates of a request that go on, and the layers that are left to them.

    Attributes:
        scores: Estimates of N candidates, float64 ``[N]``.
        wanted: Number K of candidates to find among them, 1 or more and below N.
        tokens: Numbers of tokens of the candidates, int64 ``[N]``.
        errors: Typical errors of the estimates, float64 ``[H]``: of these and of those after each later layer but
            the last, so for each layer that is left. Where nobody looks they stay as they are.
        looks: Whether the lens looks after each layer that is left, bool ``[H]``. After the last the head does.
        margins: Margins for dropping of the request's own policy, float64 ``[H]``, in the places of the errors;
            infinity drops nothing.
    """

    scores: Array
    wanted: int
    tokens: NDArray[np.int64]
    errors: Array
    looks: NDArray[np.bool_]
    margins: Array

    def fits(self, costs: Costs, beside: int, seconds: float) -> bool:
        """Tell whether the work fits into the time, if estimates stay as they are and the policy drops by them.

        Args:
            costs: The costs of the layers.
            beside: Number of tokens of other requests in the pass.
            seconds: The time.
        """
        behind = np.sort(self.scores)[-self.wanted] - self.scores
        going_on = np.logical_and.accumulate(behind <= self.margins[:, None], axis=0)
        return float(self._seconds(going_on, costs, beside).sum()) <= seconds

    def routes(self, costs: Costs, beside: int, seconds: float) -> list[Route]:
        """Return routes such that the work fits into the time. Arguments: see :meth:`fits`."""
        order = np.argsort(-self.scores, kind="stable")
        best = np.zeros(len(order), dtype=bool)
        best[order[: self.wanted]] = True
        bar = self.scores[order[self.wanted - 1 : self.wanted + 1]].mean()
        far = np.abs(self.scores - bar) / np.where(best, _AHEAD, 1.0)
        errors = np.maximum(self.errors, 1e-12)
        narrowing = errors[0] * (errors / errors[0]) ** _NARROWING
        # With this many typical errors, or more, a candidate goes on through each layer.
        enough = np.maximum.accumulate(far / narrowing[:, None], axis=0)
        ends = np.cumsum(self._seconds(enough <= _LEAST, costs, beside))
        # Whoever stops after a layer without a look has gone through it in vain.
        stops = 1 + np.flatnonzero(self.looks)
        layers = int(stops[max(0, int((ends[stops - 1] <= seconds).sum()) - 1)])
        most = seconds - costs.seconds(float(beside))[:layers].sum()
        rising = np.argsort(enough[:layers], axis=None, kind="stable")
        computed = np.cumsum(np.outer(costs.by_token[:layers], self.tokens).ravel()[rising])
        fit = int((computed <= most).sum())
        too_many = enough[:layers].ravel()[rising[fit]] if fit < len(rising) else np.inf
        return [
            Route.DEFERRED if near else Route.SELECTED if is_best else Route.DROPPED
            for near, is_best in zip((enough[0] < too_many).tolist(), best.tolist(), strict=True)
        ]

    def _seconds(self, going_on: NDArray[np.bool_], costs: Costs, beside: int) -> Array:
        """Return the seconds of each layer, float64 ``[H]``, for who goes on through it, bool ``[H, N]``."""
        return costs.seconds((beside + going_on @ self.tokens).astype(np.float64))


def first_that_fit(tokens: NDArray[np.int64], costs: Costs, beside: int, seconds: float) -> int:
    """Return how many of the first candidates can go through all layers in the time, at least one.

    Args:
        tokens: Numbers of tokens of the candidates, int64 ``[N]``.
        costs: The costs of the layers that are left.
        beside: Number of tokens of other requests in the pass.
        seconds: The time.
    """
    ends = beside + np.cumsum(tokens)
    fits = costs.fixed.sum() + costs.by_token.sum() * ends <= seconds
    return max(1, int(fits.sum()))
