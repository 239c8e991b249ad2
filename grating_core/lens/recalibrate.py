"""Recalibration: a few requests are computed again without pruning, while nobody waits for an answer.

What pruning lost in them decides how later requests are pruned, see :class:`~grating_core.lens.state.State`.
Calibrating in idle time is an idea of GRATING (arXiv 2510.15620).
"""

from __future__ import annotations

import logging
import random
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from threading import Condition, Thread, current_thread
from time import monotonic
from typing import Any, Concatenate, Generic, ParamSpec, Protocol, TypeVar

from grating_core.errors import StorageError
from grating_core.files.places import go_on_without_cache
from grating_core.forking import Interrupted, computed, tell_of_forks
from grating_core.lens.pruning import ByLens
from grating_core.lens.state import RECENT, Sampling, State, state_path
from grating_core.pruning import ClusterPolicy, Margins, PruningPolicy
from grating_core.requests import Request

IDLE = 1.0  # seconds without a caller before anything is computed again
MOST_WAITING = 32  # requests that wait to be computed again; older ones are outdated
_ENOUGH = 20  # requests that a warning needs at least
_PATIENCE = 5.0  # seconds that closing waits for the thread
_ROUNDING = 1e-4  # share of the range of scores by which scores of duplicates may differ

Owner = TypeVar("Owner")
Watched = TypeVar("Watched", bound="Recalibrated")
Arguments = ParamSpec("Arguments")
Returned = TypeVar("Returned")
Rerun = Callable[[Owner, "Logged", Callable[[], bool]], Sequence[float]]

_log = logging.getLogger("grating")


@dataclass(frozen=True)
class Logged:
    """This class holds a request that will be computed again. It is never written to disk.

    Attributes:
        query: The query.
        documents: The N documents.
        found: Indices of the K documents that were returned.
    """

    query: str
    documents: Sequence[str]
    found: tuple[int, ...]

    def kept(self, scores: Sequence[float]) -> float:
        """Return the share of the K best scores that was found. Documents with equal scores count as equal."""
        bar = sorted(scores, reverse=True)[len(self.found) - 1] - _ROUNDING * (max(scores) - min(scores))
        return sum(scores[index] >= bar for index in self.found) / len(self.found)


class Recalibration(Generic[Owner]):
    """This class computes sampled requests again while nobody waits for an answer, and learns from them.

    Its thread runs from the first sampled request until :meth:`close`, or until the scorer is gone.

    Args:
        owner: The scorer, held weakly.
        rerun: Method of the scorer that returns the full model's scores ``[N]`` of a request. It takes a function
            that says whether to give up, calls it often, and then raises
            :class:`~grating_core.forking.Interrupted`.
        sampling: The goal, and the share of requests that are sampled.
        path: The file of the state, which holds nothing of the requests; None if there is no place for it. If
            several processes share the file, the last to write wins.
    """

    def __init__(
        self,
        owner: Owner,
        rerun: Rerun[Owner],
        sampling: Sampling,
        path: Path | None,
    ) -> None:
        self._owner = weakref.ref(owner)
        self._rerun = rerun
        self._sampling = sampling
        self._path = path
        self._state = State() if path is None else State.load(path)
        self._warned_at: int | None = None
        self._random = random.Random()  # not the global one, whose sequence is the caller's
        self._queue: deque[Logged] = deque(maxlen=MOST_WAITING)
        self._callers: set[object] = set()
        self._quiet_since = monotonic()
        self._closed = False
        self.changed = Condition()  # reentrant, because garbage collection may call close while it is held
        """A condition that keeps the thread from taking a request while somebody holds it."""
        self._thread: Thread | None = None
        self._ended = weakref.finalize(owner, self.close)
        tell_of_forks(self)

    def after_fork(self) -> None:
        """Keep what was learnt, but not the waiting requests, which the parent computes."""
        self.changed = Condition()
        self._callers = set()
        self._queue.clear()
        self._thread = None

    @property
    def factor(self) -> float:
        """The factor of the margins or the threshold. Above 1, less is pruned than at first."""
        return self._state.factor

    @property
    def requests(self) -> int:
        """The number of requests that were computed again, including those before a restart."""
        return self._state.requests

    @property
    def agreement(self) -> float | None:
        """The mean share of the full model's top K that was kept in the last 50 requests; None before the first.

        With ``guarantee="set"`` a request counts 1 if its whole top K was kept, else 0.
        """
        return self._state.agreement

    @property
    def waiting(self) -> int:
        """The number of requests that wait to be computed again."""
        return len(self._queue)

    @contextmanager
    def caller(self) -> Iterator[None]:
        """Pause recalibration inside the ``with``, because somebody waits for an answer."""
        one = object()
        with self.changed:
            self._callers.add(one)
        try:
            yield
        finally:
            with self.changed:
                self._callers.discard(one)  # a child that was forked during the call does not have it
                self._quiet_since = monotonic()
                self.changed.notify_all()

    def saw(self, request: Request, found: Sequence[int]) -> None:
        """Sample an answered request, unless it was not pruned by what is recalibrated.

        Args:
            request: The request.
            found: Indices of the documents that were returned.
        """
        own = request.pruning is not None or request.target is not None
        if not own and request.top_k < len(request.documents):
            self.sample(Logged(request.query, request.documents, tuple(found)))

    def sample(self, request: Logged) -> None:
        """Decide at random whether to compute the request again. If too many wait, the oldest is forgotten."""
        if self._random.random() >= self._sampling.share:
            return
        with self.changed:
            if self._closed:
                return
            self._queue.append(request)
            self.changed.notify_all()
            if self._thread is None:
                thread = Thread(target=self._work, name="grating-recalibration", daemon=True)
                with suppress(RuntimeError):  # if no thread can be started, the next sample tries again
                    thread.start()
                    self._thread = thread

    def close(self) -> None:
        """End the thread. Requests that still wait are forgotten."""
        self._ended.detach()
        with self.changed:
            self._closed = True
            self._queue.clear()
            self.changed.notify_all()
            thread = self._thread
        # The thread itself may hold the last reference to a scorer.
        if thread is not None and thread is not current_thread():
            thread.join(_PATIENCE)

    def _work(self) -> None:
        while (request := self._next()) is not None:
            try:
                self._compute(request)
            except Interrupted:
                self._put_back(request)
            except Exception as error:  # no caller may see an error of recalibration
                if not self._closed:
                    _log.warning("recalibration goes on without a request, which failed: %r", error)
            del request

    def _next(self) -> Logged | None:
        """Wait until nobody has called for a while, and return the oldest request; None after closing."""
        with self.changed:
            while not self._closed:
                left = self._quiet_since + IDLE - monotonic()
                if self._queue and not self._callers and left <= 0:
                    return self._queue.popleft()
                self.changed.wait(left if self._queue and not self._callers else None)
        return None

    def _put_back(self, request: Logged) -> None:
        with self.changed:
            if len(self._queue) < MOST_WAITING and not self._closed:
                self._queue.appendleft(request)

    def _compute(self, request: Logged) -> None:
        owner = self._owner()
        if owner is None:
            return
        kept = request.kept(self._rerun(owner, request, self._wanted_elsewhere))
        if self._sampling.guarantee == "set":
            kept = float(kept == 1)
        state = self._state.after(kept, self._sampling.target)
        self._warn_of_drop(state)
        self._state = state
        if self._path is not None:
            try:
                state.save(self._path)
            except StorageError as error:
                go_on_without_cache(error)

    def _wanted_elsewhere(self) -> bool:
        return bool(self._callers) or self._closed

    def _warn_of_drop(self, state: State) -> None:
        """Warn once of a drop, and again only after newer requests have reached the target."""
        target = self._sampling.target
        agreement = state.agreement
        if agreement is None or len(state.recent) < _ENOUGH:
            return
        if agreement >= target:
            if self._warned_at is not None and state.requests - self._warned_at >= RECENT:
                self._warned_at = None
        elif self._warned_at is None:
            self._warned_at = state.requests
            _log.warning(
                "pruning keeps less than promised: agreement %.3f over the last %d requests that were computed "
                "again, target %s; margins and thresholds are now multiplied by %.3g (%d requests in all)",
                agreement, len(state.recent), target, state.factor, state.requests,
            )  # fmt: skip


def start_recalibration(
    owner: Owner,
    rerun: Rerun[Owner],
    pruning: PruningPolicy | ByLens,
    identity: str,
    sampling: Sampling | None,
) -> Recalibration[Owner] | None:
    """Start recalibration, if it is on and has something to move: a threshold, or the margins of a lens.

    Args:
        owner: See :class:`Recalibration`.
        rerun: See :class:`Recalibration`.
        pruning: How the owner's requests are pruned.
        identity: Identity of the model.
        sampling: The goal, and the share of requests that are sampled; None for off.
    """
    moved = pruning.calibrated and pruning.calibrated.margins if isinstance(pruning, ByLens) else pruning
    if sampling is None or not isinstance(moved, ClusterPolicy | Margins):
        return None
    return Recalibration(owner, rerun, sampling, state_path(identity, moved, sampling))


class Recalibrated(Protocol):
    """This protocol is for objects that are recalibrated while nobody waits for them."""

    recalibration: Recalibration[Any] | None


def calling(watched: Recalibrated) -> AbstractContextManager[None]:
    """Return a context in which somebody waits for an answer, so that nothing is computed for recalibration."""
    recalibration = watched.recalibration
    return nullcontext() if recalibration is None else recalibration.caller()


def for_a_caller(
    method: Callable[Concatenate[Watched, Arguments], Returned],
) -> Callable[Concatenate[Watched, Arguments], Returned]:
    """Wrap a method that computes for a caller, so that nothing is computed for recalibration meanwhile."""

    @wraps(method)
    def call(self: Watched, /, *args: Arguments.args, **kwargs: Arguments.kwargs) -> Returned:
        with calling(self):
            return computed(method, self, *args, **kwargs)

    return call
