"""A job is a request on its way: it waits for a pass, goes through the layers beside others, and ends alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from functools import cached_property
from time import perf_counter
from typing import Generic, TypeVar

from grating_core.engine.highlights import Highlighter
from grating_core.engine.watch import Deadline
from grating_core.lens.pruning import Pruning
from grating_core.pruning import Off
from grating_core.text.pairs import TokenisedPair

Found = TypeVar("Found")

UNPRUNED = Pruning(Off())
"""All candidates go through all layers."""


class Job(Generic[Found]):
    """A job ends once, with a result or an error, whatever becomes of the other jobs of its pass.

    Args:
        encode: Function that makes the pairs of one candidate or more: the windows of each. It is called once, by
            whoever asks for the pairs first.
        top_k: Number of candidates to find, from 1 to the number of candidates; None for all.
        pruning: How candidates stop early.
        first_number: The number by which the caller knows the first candidate; for messages.
        pause: Function that says whether to give the job up; None never says so.
        deadline: The time at which the job should end; None for none.
        unread: Function that returns what there is when not one layer was computed in time; with a deadline only.
        highlighter: What finds the sentences that carry the scores; None for nothing.
    """

    def __init__(
        self,
        encode: Callable[[], Sequence[Sequence[TokenisedPair]]],
        *,
        top_k: int | None = None,
        pruning: Pruning = UNPRUNED,
        first_number: int = 0,
        pause: Callable[[], bool] | None = None,
        deadline: Deadline | None = None,
        unread: Callable[[], Found] | None = None,
        highlighter: Highlighter | None = None,
    ) -> None:
        self.top_k = top_k
        self.pruning = pruning
        self.first_number = first_number
        self.deadline = deadline
        self.highlighter = highlighter
        self.started = perf_counter()
        """The time at which the caller came."""
        self.begun = False
        """Whether a pass has begun with the job. The pass then keeps the deadline."""
        self.future: Future[Found] = Future()
        """What the caller waits for. Cancelling it gives the job up, also while it is computed."""
        self._encode = encode
        self._pause = pause
        self._unread = unread

    @cached_property
    def encoded(self) -> Sequence[Sequence[TokenisedPair]]:
        """The windows of each candidate. They are let go when the job ends."""
        return self._encode()

    @cached_property
    def tokens(self) -> int:
        """The number of tokens of all windows together."""
        return sum(len(pair.input_ids) for windows in self.encoded for pair in windows)

    @property
    def over(self) -> bool:
        """Whether the job has ended, or was given up by its caller."""
        return self.future.done()

    def given_up(self) -> bool:
        """Tell whether nobody wants the job any more. Ask this between slices, and then :meth:`fail` the job."""
        return self.future.cancelled() or (self._pause is not None and self._pause())

    def result(self) -> Found:
        """Wait for the end of the job. If no pass has begun with it by its deadline, it ends without one.

        Raises:
            Exception: The error of the job.
        """
        if self.deadline is not None:
            wait([self.future], timeout=max(0.0, self.deadline.left))
            if self._gives_way():
                return self.unread()
        return self.future.result()

    async def awaited(self) -> Found:
        """Await what :meth:`result` returns."""
        import asyncio  # it takes long to import, and few programs need it

        future = asyncio.wrap_future(self.future)
        if self.deadline is not None:
            await asyncio.wait([future], timeout=max(0.0, self.deadline.left))
            if self._gives_way():
                return self.unread()
        return await future

    def unread(self) -> Found:
        """Return what there is when not one layer was computed in time."""
        assert self._unread is not None
        return self._unread()

    def _gives_way(self) -> bool:
        """Give the job up if it waits for a pass, and tell whether it did."""
        return not self.begun and not self.future.done() and self.future.cancel()

    def finish(self, found: Found) -> None:
        """End the job with its result, unless it has ended already."""
        if self._ends():
            self.future.set_result(found)

    def fail(self, error: BaseException) -> None:
        """End the job with an error, unless it has ended already."""
        if self._ends():
            self.future.set_exception(error)

    def _ends(self) -> bool:
        vars(self).pop("encoded", None)
        return not self.future.done() and self.future.set_running_or_notify_cancel()
