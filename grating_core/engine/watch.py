"""A watch knows what time it is, and what a layer takes; a deadline is a time on it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from time import perf_counter

from grating_core.pruning.deadline import Costs, Pace

_EARLY = 0.97  # of the time that is left may be planned; the rest is for what no plan knows
_PLENTY = 2.0  # times the expected time is so much that nothing has to be planned


class Watch:
    """A watch learns from every pass of a model what a layer takes.

    Args:
        depth: Number of layers of the model.
        now: Function that returns the time in seconds.
    """

    def __init__(self, depth: int, now: Callable[[], float] = perf_counter) -> None:
        self.depth = depth
        self.now = now
        self.pace: Pace | None = None
        """The pace of a layer; None until one was computed. Passes side by side share it."""
        self.last: Pace | None = None
        """The pace of the last layer, of which a head may read one token of each sequence; None until known."""

    def learn(self, layers: int, tokens: float, seconds: float, *, last: bool = False) -> None:
        """Learn from some layers, by their tokens and seconds together, or from the last layer alone."""
        if not layers or not tokens:
            return
        if last and layers == 1:
            self.last = (self.last or Pace()).learnt(tokens, seconds)
        else:
            self.pace = (self.pace or Pace()).learnt(tokens / layers, seconds / layers)

    def costs(self, number: int) -> Costs | None:
        """Return the costs of the layers from a number on; None if nobody knows yet."""
        if self.pace is None:
            return None
        return Costs.of([self.pace] * (self.depth - number) + [self.last or self.pace])


@dataclass(frozen=True)
class Deadline:
    """A deadline says until when a request has time.

    Attributes:
        at: The time.
        watch: The watch that shows it.
    """

    at: float
    watch: Watch

    @property
    def left(self) -> float:
        """The seconds that are left; below 0 when the deadline is over."""
        return self.at - self.watch.now()

    @property
    def over(self) -> bool:
        """Whether the time is over."""
        return self.left <= 0

    @property
    def planned(self) -> float:
        """The seconds that may be planned."""
        return _EARLY * self.left

    def is_near(self, number: int, tokens: int) -> bool:
        """Tell whether the layers from a number on may not be done long before. Nobody knows at first.

        Args:
            number: The layer.
            tokens: Number of tokens that go through the layers.
        """
        costs = self.watch.costs(number)
        return costs is None or self.left < _PLENTY * costs.seconds(tokens).sum()

    def allows(self, tokens: int) -> bool:
        """Tell whether a whole pass with so many tokens is known to end in time."""
        costs = self.watch.costs(1)
        return costs is not None and bool(costs.seconds(tokens).sum() <= self.planned)
