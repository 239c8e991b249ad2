"""Staying calibrated: a few requests are computed again without pruning, and pruning is set by what they lost.

A *factor* multiplies the margins of a lens, or the threshold of :class:`~grating_core.ClusterPolicy`. After every
request that was computed again, its logarithm moves by ``STEP`` × (lost - (1 - target)): adaptive conformal
inference (Gibbs & Candès, "Adaptive Conformal Inference Under Distribution Shift", NeurIPS 2021). As long as the
factor stays between its bounds, the mean loss of T requests is within log(upper / lower bound) / (STEP · T) of
1 - target, whatever the requests are. Calibrating in idle time is an idea of GRATING (arXiv 2510.15620).
"""

from __future__ import annotations

import json
import logging
import math
import random
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from threading import Condition, Thread, current_thread
from time import monotonic
from typing import Generic, TypeVar

from grating_core.arguments import is_number
from grating_core.errors import StorageError
from grating_core.files.locks import replace_file
from grating_core.files.places import cache_directory, go_on_without_cache, is_kept
from grating_core.files.reading import read_json
from grating_core.files.writing import make_private
from grating_core.forking import Interrupted, tell_of_forks
from grating_core.lens.requests import Request
from grating_core.pruning import ClusterPolicy, Guarantee, Margins

# A whole top 1 lost at a target of 0.98 widens by 22 %, one of 10 by 2 %; a request without loss narrows by 0.4 %.
STEP = 0.2
BOUNDS = (1 / 8, 16.0)  # of the factor
IDLE = 1.0  # seconds without a caller before anything is computed again
MOST_WAITING = 32  # requests that wait to be computed again; what they say of the factor gets old
_RECENT = 50  # requests that the agreement is the mean of
_ENOUGH = 20  # of them, for a warning
_PATIENCE = 5.0  # seconds that closing waits for the thread
_ROUNDING = 1e-4  # of the range of scores: those of duplicates differ a little
_FORMAT = 1

Owner = TypeVar("Owner")

_log = logging.getLogger("grating")


@dataclass(frozen=True)
class Sampling:
    """What is to be kept, and how much is looked at for it.

    Attributes:
        share: Of requests that are computed again, above 0 and at most 1.
        target: See :meth:`grating_core.Reranker.from_pretrained`.
        guarantee: See :meth:`grating_core.Reranker.from_pretrained`.
    """

    share: float
    target: float
    guarantee: Guarantee


@dataclass(frozen=True)
class Logged(Request):
    """A request to be computed again; it is only ever in memory.

    Attributes:
        found: Indices of the K documents that were returned.
    """

    found: tuple[int, ...]

    def kept(self, scores: Sequence[float]) -> float:
        """The share of the K best of all N scores that was returned; of equal scores it does not matter which."""
        bar = sorted(scores, reverse=True)[len(self.found) - 1] - _ROUNDING * (max(scores) - min(scores))
        return sum(scores[index] >= bar for index in self.found) / len(self.found)


@dataclass(frozen=True)
class State:
    """What has been learnt so far.

    Attributes:
        factor: Of margins or threshold.
        requests: How many were computed again.
        recent: What was kept of the last of them, the latest last.
    """

    factor: float = 1.0
    requests: int = 0
    recent: tuple[float, ...] = ()

    @property
    def agreement(self) -> float | None:
        """Mean of what was kept of the last requests; None before the first."""
        return sum(self.recent) / len(self.recent) if self.recent else None

    def after(self, kept: float, target: float) -> State:
        """The state after one more request, of whose top K ``kept`` was returned."""
        logarithm = math.log(self.factor) + STEP * ((1 - kept) - (1 - target))
        factor = min(max(math.exp(logarithm), BOUNDS[0]), BOUNDS[1])
        return State(factor, self.requests + 1, (*self.recent, kept)[-_RECENT:])

    def save(self, path: Path) -> None:
        """Write it, for its owner only; raises ``StorageError``."""
        make_private(path.parent)
        replace_file(path, (json.dumps({"format": _FORMAT, **asdict(self)}) + "\n").encode(), private=True)

    @classmethod
    def load(cls, path: Path) -> State:
        """What :meth:`save` wrote; a new one, with a warning, if that cannot be read."""
        if not is_kept(path):
            return cls()
        try:
            stored = read_json(path)
            state = cls(float(stored["factor"]), int(stored["requests"]), tuple(map(float, stored["recent"])))
            in_bounds = BOUNDS[0] <= state.factor <= BOUNDS[1] and all(0 <= kept <= 1 for kept in state.recent)
            if stored["format"] != _FORMAT or not in_bounds or not len(state.recent) <= state.requests:
                raise ValueError("its values are not those of a state")
        except FileNotFoundError:
            return cls()
        except (OSError, ValueError, KeyError, TypeError, OverflowError) as error:
            _log.warning("recalibration starts anew, because %s cannot be read: %r", path, error)
            return cls()
        return state


class Recalibration(Generic[Owner]):
    """Computes sampled requests again while nobody waits for an answer, and learns from them.

    A thread does so, from the first sampled request until :meth:`close`, or until the reranker is gone.

    Args:
        owner: The reranker, held weakly.
        rerun: Its method that gives the full-depth scores ``[N]`` of a logged request, and raises
            :class:`~grating_core.forking.Interrupted` soon after the function that it is given says to.
        sampling: What is to be kept, and how much is looked at.
        path: The file that keeps what was learnt, and nothing of the requests; None if there is no place for it.
            Of several processes that share it the last to write wins.
    """

    def __init__(
        self,
        owner: Owner,
        rerun: Callable[[Owner, Logged, Callable[[], bool]], Sequence[float]],
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
        self.changed = Condition()  # reentrant: garbage collection may close inside it
        """Whoever holds it keeps the thread from taking a request."""
        self._thread: Thread | None = None
        self._ended = weakref.finalize(owner, self.close)
        tell_of_forks(self)

    def after_fork(self) -> None:
        """Begin anew, with what was learnt; the requests that wait are computed again in the parent."""
        self.changed = Condition()
        self._callers = set()
        self._queue.clear()
        self._thread = None

    @property
    def factor(self) -> float:
        """What the margins, or the threshold, are multiplied by; above 1 prunes less than at first."""
        return self._state.factor

    @property
    def requests(self) -> int:
        """How many requests have been computed again, those before a restart included."""
        return self._state.requests

    @property
    def agreement(self) -> float | None:
        """Mean over the last 50 of what was kept of the full model's top K; None before the first.

        With ``guarantee="set"`` a request counts 1 if all was kept, else 0.
        """
        return self._state.agreement

    @property
    def waiting(self) -> int:
        """How many requests wait to be computed again."""
        return len(self._queue)

    @contextmanager
    def caller(self) -> Iterator[None]:
        """While somebody waits for an answer, nothing is computed again."""
        one = object()
        with self.changed:
            self._callers.add(one)
        try:
            yield
        finally:
            with self.changed:
                self._callers.discard(one)  # of a call that was forked in its midst, the child knows nothing
                self._quiet_since = monotonic()
                self.changed.notify_all()

    def sample(self, request: Logged) -> None:
        """Keep the request, or not, to be computed again; if too many wait, the oldest is forgotten."""
        if self._random.random() >= self._sampling.share:
            return
        with self.changed:
            if self._closed:
                return
            self._queue.append(request)
            self.changed.notify_all()
            if self._thread is None:
                thread = Thread(target=self._work, name="grating-recalibration", daemon=True)
                with suppress(RuntimeError):  # if there is no thread to be had, the next sample tries again
                    thread.start()
                    self._thread = thread

    def close(self) -> None:
        """End the thread. What still waits is forgotten."""
        self._ended.detach()
        with self.changed:
            self._closed = True
            self._queue.clear()
            self.changed.notify_all()
            thread = self._thread
        # The last reference to a reranker may be the thread's own.
        if thread is not None and thread is not current_thread():
            thread.join(_PATIENCE)

    def _work(self) -> None:
        while (request := self._next()) is not None:
            try:
                self._compute(request)
            except Interrupted:
                self._put_back(request)
            except Exception as error:  # whatever it is, no caller has to do with it
                if not self._closed:
                    _log.warning("recalibration goes on without a request, which failed: %r", error)
            del request

    def _next(self) -> Logged | None:
        """The oldest request, when nobody has called for a while; None when it is closed."""
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
        """Once a drop: not again before all that the agreement is the mean of is new, and it had been reached."""
        target = self._sampling.target
        agreement = state.agreement
        if agreement is None or len(state.recent) < _ENOUGH:
            return
        if agreement >= target:
            if self._warned_at is not None and state.requests - self._warned_at >= _RECENT:
                self._warned_at = None
        elif self._warned_at is None:
            self._warned_at = state.requests
            _log.warning(
                "pruning keeps less than promised: agreement %.3f over the last %d requests that were computed "
                "again, target %s; margins and thresholds are now multiplied by %.3g (%d requests in all)",
                agreement, len(state.recent), target, state.factor, state.requests,
            )  # fmt: skip


def check_share(recalibrate: float, pruning: object) -> None:
    """Refuse a share that is none, or for a policy that has nothing to move.

    Args:
        recalibrate: The share of requests to compute again.
        pruning: What the reranker prunes by: a name, or a policy object.

    Raises:
        ValueError: One or the other.
    """
    if not is_number(recalibrate) or not 0 <= recalibrate <= 1:
        raise ValueError(f"recalibrate={recalibrate!r} must be a share of requests: a number from 0 (off) to 1")
    if not recalibrate or (isinstance(pruning, str) and pruning in ("auto", "cluster")):
        return
    if not isinstance(pruning, ClusterPolicy):
        raise ValueError(
            f"recalibrate={recalibrate} moves the margins of a lens or the threshold of a ClusterPolicy, and "
            f"pruning={pruning!r} has neither: use 'auto', 'cluster' or a ClusterPolicy, or leave recalibrate out"
        )
    if pruning.dispersion_threshold in (0, math.inf):
        raise ValueError(
            f"recalibrate={recalibrate} multiplies the threshold of {pruning!r}, which stays the same then: give "
            f"it a finite one above 0, or leave recalibrate out"
        )


def state_path(fingerprint: str, pruning: ClusterPolicy | Margins, sampling: Sampling) -> Path | None:
    """Where it is kept what was learnt for these weights with this pruning and this goal; None for nowhere.

    Args:
        fingerprint: Of the weights, see :func:`grating_core.models.identity.fingerprint`.
        pruning: What the factor multiplies; one that was learnt for something else would be wrong.
        sampling: Has the goal.
    """
    if isinstance(pruning, ClusterPolicy):
        kind = f"cluster-{pruning.dispersion_threshold}-{pruning.clusters}"
    else:
        margins = pruning.drop.tobytes() + pruning.select.tobytes() + pruning.bounds.tobytes()
        kind = f"lens-{sha256(margins).hexdigest()[:8]}"
    name = f"{fingerprint[:16]}-{kind}-{sampling.guarantee}-{sampling.target}.json"
    try:
        return cache_directory() / "recalibration" / name
    except StorageError as error:
        go_on_without_cache(error)
        return None
