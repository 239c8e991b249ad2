"""Admission bounds what waits for a model, in tokens, so that nobody waits for an answer that comes too late."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from math import ceil
from time import monotonic

from grating_core.serving.errors import Refused

_LONGEST = 60  # the most seconds that a client is told to stay away
_MEMORY = 0.8  # the weight of what was known of the speed before, beside the newest request


class Place:
    """A place in the queue holds so many tokens. It is left when its request ends, however that happens."""

    def __init__(self, queue: Queue) -> None:
        self.tokens = 0
        self._queue = queue

    def take(self, tokens: int) -> None:
        """Make this a place for so many tokens.

        Raises:
            Refused: There is no room for them.
        """
        queue = self._queue
        others = queue.tokens - self.tokens
        if others and others + tokens > queue.most_tokens:
            raise Refused(
                429,
                "overloaded",
                f"{others} tokens of other requests wait for this model, and it lets {queue.most_tokens} wait; "
                f"come again later",
                retry_after=queue.seconds(others),
            )
        queue.tokens, self.tokens = others + tokens, tokens


class Queue:
    """This queue counts what waits for a model or is computed. The order is the engine's own.

    All of it runs on the event loop, so nothing is locked.

    Args:
        most_tokens: The most tokens of all requests together. A single request may have more.
    """

    def __init__(self, most_tokens: int) -> None:
        self.most_tokens = most_tokens
        self.tokens = 0
        """The tokens of all requests that have a place."""
        self.requests = 0
        """The number of requests that have a place."""
        self._speed: float | None = None  # tokens a second; None until a request has ended
        self._since = 0.0  # when the queue last stopped being empty, or a request last ended

    @contextmanager
    def place(self) -> Iterator[Place]:
        """Provide a place, without tokens at first, until the end of the ``with``."""
        if not self.requests:
            self._since = monotonic()
        place = Place(self)
        self.requests += 1
        try:
            yield place
            self._learn(place.tokens)
        finally:
            self.requests -= 1
            self.tokens -= place.tokens

    def seconds(self, tokens: int) -> int:
        """Return about how many seconds so many tokens take, from 1 to a minute."""
        return 1 if self._speed is None else max(1, min(_LONGEST, ceil(tokens / self._speed)))

    def _learn(self, tokens: int) -> None:
        """Learn the speed from a request that ended with a result."""
        now = monotonic()
        speed = tokens / max(now - self._since, 1e-3)
        self._speed = speed if self._speed is None else _MEMORY * self._speed + (1 - _MEMORY) * speed
        self._since = now
