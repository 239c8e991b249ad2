"""Before a deadline margins shrink until the rest of the work fits into the time that is left.

Dropping early and finishing a few saves time, and so does stopping all at an earlier layer. Here both are mixed.
A candidate goes on whose estimate lies near the bar of the top K, in typical errors of the lens. What lies far
behind the bar is dropped. What lies far before it is selected with its estimate, because computing it on would
not change the top K. How near is near depends on the time. But where less than ``_LEAST`` typical errors would
fit, estimates cannot tell the good from the rest, and all stop at an earlier layer instead. The two constants
were chosen by replays of real requests.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from grating_core.pruning.policy import Route

Array = NDArray[np.float64]

_AHEAD = 1.5  # how much further ahead of the bar than behind it is far
_LEAST = 0.6  # typical errors
_MEMORY = 0.8  # the weight of what was known before, beside the newest layer
_SPREAD = 0.1  # the least deviation of numbers of tokens, as a share of their mean, that tells fixed costs apart


@dataclass(frozen=True)
class Pace:
    """A pace tells the seconds of a layer by its tokens. It is a line through what was measured, lately above all.

    The line's height without tokens is what reading weights takes, and whatever else does not depend on tokens.

    Attributes:
        layers: Weight of the layers that were measured.
        tokens: Mean number of tokens.
        seconds: Mean seconds.
        squares: Mean of the squares of the tokens' deviations from their mean.
        products: Mean of the products of both deviations.
    """

    layers: float = 0.0
    tokens: float = 0.0
    seconds: float = 0.0
    squares: float = 0.0
    products: float = 0.0

    def learnt(self, tokens: float, seconds: float) -> Pace:
        """Return the pace after one more layer."""
        layers = _MEMORY * self.layers + 1.0
        share = 1.0 / layers
        more, longer = tokens - self.tokens, seconds - self.seconds
        return Pace(
            layers,
            self.tokens + share * more,
            self.seconds + share * longer,
            (1 - share) * (self.squares + share * more * more),
            (1 - share) * (self.products + share * more * longer),
        )

    @property
    def by_token(self) -> float:
        """The seconds that one more token takes in a layer."""
        proportional = self.seconds / max(self.tokens, 1.0)
        if self.squares < (_SPREAD * self.tokens) ** 2:
            return proportional
        return float(np.clip(self.products / self.squares, 0.0, proportional))

    @property
    def fixed(self) -> float:
        """The seconds of a layer without tokens."""
        return self.seconds - self.by_token * self.tokens

    def seconds_of(self, tokens: float) -> float:
        """Return the seconds of a layer with so many tokens."""
        return self.fixed + self.by_token * tokens


@dataclass(frozen=True)
class Race:
    """A race has the candidates of a request that go on, and the layers that are left to them.

    Attributes:
        scores: Estimates of N candidates, float64 ``[N]``.
        wanted: Number K of candidates to find among them, 1 or more and below N.
        tokens: Numbers of tokens of the candidates, int64 ``[N]``.
        errors: Typical errors of the estimates, float64 ``[H]``: of these and of those after each later layer but
            the last, so for each layer that is left.
        margins: Margins for dropping of the request's own policy in the same places; infinity drops nothing.
    """

    scores: Array
    wanted: int
    tokens: NDArray[np.int64]
    errors: Array
    margins: Array

    def fits(self, pace: Pace, beside: int, seconds: float) -> bool:
        """Tell whether the work fits into the time, if estimates stay as they are and the policy drops by them.

        Args:
            pace: The pace of a layer.
            beside: Number of tokens of other requests in the pass.
            seconds: The time.
        """
        behind = np.sort(self.scores)[-self.wanted] - self.scores
        going_on = np.logical_and.accumulate(behind <= self.margins[:, None], axis=0)
        return float(_seconds(going_on, self.tokens, pace, beside).sum()) <= seconds

    def routes(self, pace: Pace, beside: int, seconds: float) -> list[Route]:
        """Return routes such that the work fits into the time. Arguments: see :meth:`fits`."""
        order = np.argsort(-self.scores, kind="stable")
        best = np.isin(np.arange(len(order)), order[: self.wanted])
        bar = self.scores[order[self.wanted - 1 : self.wanted + 1]].mean()
        far = np.abs(self.scores - bar) / np.where(best, _AHEAD, 1.0)
        # With this many typical errors, or more, a candidate goes on through each layer.
        enough = np.maximum.accumulate(far / np.maximum(self.errors, 1e-12)[:, None], axis=0)
        ends = np.cumsum(_seconds(enough <= _LEAST, self.tokens, pace, beside))
        layers = max(1, int((ends <= seconds).sum()))
        most = (seconds - layers * pace.seconds_of(beside)) / max(pace.by_token, 1e-12)
        rising = np.argsort(enough[:layers], axis=None, kind="stable")
        computed = np.cumsum(np.tile(self.tokens, layers)[rising])
        last = int((computed <= most).sum())
        errors = enough[:layers].ravel()[rising[last - 1]] if last else -1.0
        return [
            Route.DEFERRED if near else Route.SELECTED if is_best else Route.DROPPED
            for near, is_best in zip((enough[0] <= errors).tolist(), best.tolist(), strict=True)
        ]


def _seconds(going_on: NDArray[np.bool_], tokens: NDArray[np.int64], pace: Pace, beside: int) -> Array:
    """Return the seconds of each layer, float64 ``[H]``, for who goes on through it, bool ``[H, N]``."""
    found = pace.fixed + pace.by_token * (beside + going_on @ tokens.astype(np.float64))
    return found.astype(np.float64)


def first_that_fit(tokens: NDArray[np.int64], layers: int, pace: Pace, beside: int, seconds: float) -> int:
    """Return how many of the first candidates can go through all layers in the time, at least one.

    Args:
        tokens: Numbers of tokens of the candidates, int64 ``[N]``.
        layers: Number of layers that are left.
        pace: The pace of a layer.
        beside: Number of tokens of other requests in the pass.
        seconds: The time.
    """
    ends = np.cumsum(tokens)
    fits = layers * (pace.fixed + pace.by_token * (beside + ends)) <= seconds
    return max(1, int(fits.sum()))
