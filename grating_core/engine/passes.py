"""Callers who wait while a pass runs go into the next one together."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError, Future
from contextlib import suppress
from typing import Any, Generic, TypeVar

from grating_core.engine.job import Job
from grating_core.engine.lanes import Lanes
from grating_core.forking import Interrupted, Lock, Threads, tell_of_forks
from grating_core.lifetime import closed_error

Found = TypeVar("Found")


class Passes(Generic[Found]):
    """This class gives every caller a place in a pass, in the order in which they come.

    A caller who finds nobody else computes its own jobs in its own thread. Callers who come meanwhile wait. A
    single thread then takes the waiting jobs through the layers together, as many at a time as fit into a pass.
    With lanes, two passes run at a time whenever several jobs wait. So no caller computes for others, and whatever
    interrupts a caller does not touch others. Callers with several jobs take turns, job by job.

    Args:
        run: Function that computes jobs in one pass and ends each as soon as it can. A job that it leaves
            unfinished was given up. Whoever calls it holds the turn.
        turn: The lock of the model.
        thread: The one thread, which is closed elsewhere.
        most_tokens: The most tokens of a pass. A job with more is a pass by itself.
        lanes: The lanes, which are closed here; None if only one pass at a time may use the model.
    """

    def __init__(
        self,
        run: Callable[[Sequence[Job[Found]]], None],
        turn: Lock,
        thread: Threads,
        most_tokens: int,
        lanes: Lanes | None = None,
    ) -> None:
        self._run = run
        self._turn = turn
        self._most_tokens = most_tokens
        self._thread = thread
        self._lanes = lanes
        self._closed = False
        self.after_fork()
        tell_of_forks(self)

    def after_fork(self) -> None:
        """Forget who waits. They wait in the parent."""
        self._changing = threading.Lock()
        self._waiting: deque[deque[Job[Found]]] = deque()  # each caller's jobs
        self._led = False  # whether the thread is at work, as it is whenever somebody waits
        self._choosing = threading.Lock()  # held by a lane that takes jobs
        self._in_lanes = False  # whether both lanes found somebody who waits
        self._open: set[Future[Found]] = set()  # the futures of jobs that have not ended
        self._computing: set[int] = set()  # the threads that compute passes

    @property
    def waiting(self) -> int:
        """The number of callers who wait for a pass."""
        return len(self._waiting)

    def compute(self, jobs: Sequence[Job[Found]], *, show_progress: bool = False) -> list[Found]:
        """Compute jobs: in this thread if nobody else is there, but several jobs in lanes if there are some.

        Args:
            jobs: The jobs.
            show_progress: Whether to show a progress bar on standard error.

        Raises:
            RuntimeError: :meth:`close` was called, or no thread can be started.
            Exception: The error of the first job that failed.
        """
        self._admit(jobs)
        if not jobs:
            return []
        if show_progress:
            _show_progress(jobs)
        own, found = deque([deque(jobs)]), []
        try:
            if self._lanes is not None and len(jobs) > 1:
                self._wait_with(own.popleft())
            for job in jobs:
                while own and not job.over and self._take_turn():
                    try:
                        self._pass(self._next(own), own=True)
                    finally:
                        self._turn.__exit__()
                if own and not job.over:
                    self._wait_with(own.popleft())
                found.append(job.result())
            return found
        finally:
            for job in jobs:
                job.future.cancel()
            del jobs, job, own  # an error keeps this frame, and the frame would keep these

    async def awaited(self, job: Job[Found]) -> Found:
        """Await a job, which holds no thread. When the task is cancelled, the job is given up.

        Raises:
            RuntimeError: :meth:`close` was called, or no thread can be started.
            Exception: The error of the job.
        """
        self._admit([job])
        try:
            self._wait_with(deque([job]))
            return await job.awaited()
        finally:
            job.future.cancel()

    def close(self) -> None:
        """Refuse new jobs, and wait for the end of all that were admitted.

        Raises:
            RuntimeError: The thread computes one of these jobs itself.
        """
        self._refuse_nested()
        with self._changing:
            self._closed = True
        for future in list(self._open):
            with suppress(CancelledError):
                future.exception()
        if self._lanes is not None:
            self._lanes.close()

    def _refuse_nested(self) -> None:
        """Refuse to wait for the pass that this thread computes, which would be for ever."""
        if threading.get_ident() in self._computing:
            raise RuntimeError("a pruning policy called the reranker that waits for its routes")

    def _admit(self, jobs: Sequence[Job[Found]]) -> None:
        self._refuse_nested()
        with self._changing:
            if self._closed:
                raise closed_error("Reranker")
            for job in jobs:
                self._open.add(job.future)
        for job in jobs:
            job.future.add_done_callback(self._open.discard)

    def _take_turn(self) -> bool:
        """Take the turn if nobody has it, and nobody waits for it."""
        with self._changing:
            return not self._waiting and self._turn.take()

    def _wait_with(self, jobs: deque[Job[Found]]) -> None:
        """Let jobs wait for the thread."""
        with self._changing:
            self._waiting.append(jobs)
            if self._led:
                return
            try:
                self._thread.submit(self._lead)
                self._led = True
            except RuntimeError:
                self._waiting.clear()  # nobody else waited, or the thread would be at work
                raise

    def _lead(self) -> None:
        """Run passes as long as anybody waits."""
        while True:
            with self._changing:
                if not self._waiting:
                    self._led = False
                    return
            with self._turn:
                if self._lanes is not None and self._jobs_waiting() > 1:
                    self._in_lanes = True
                    self._lanes.run(self._fill_lane)
                else:
                    self._pass(self._next(self._waiting))

    def _fill_lane(self) -> None:
        """Run passes until one of the lanes finds nobody who waits. The leading thread then decides again."""
        while jobs := self._half():
            self._pass(jobs)

    def _half(self) -> list[Job[Found]]:
        """Take jobs for a lane, and leave half of them to the other. None end both lanes."""
        with self._choosing:
            if not self._in_lanes:
                return []
            half = -(-self._jobs_waiting() // 2)
            jobs = self._next(self._waiting, most=half)
            self._in_lanes = bool(jobs)
            return jobs

    def _jobs_waiting(self) -> int:
        """Count the jobs that wait. Only one thread at a time takes jobs, and that thread asks."""
        with self._changing:
            return sum(map(len, self._waiting))

    def _pass(self, jobs: Sequence[Job[Found]], *, own: bool = False) -> None:
        """Compute jobs in one pass, see :meth:`_carry_out`. Somebody holds the turn for it."""
        self._computing.add(threading.get_ident())
        try:
            self._carry_out(jobs, own=own)
        finally:
            self._computing.discard(threading.get_ident())

    def _next(self, waiting: deque[deque[Job[Found]]], most: int | None = None) -> list[Job[Found]]:
        """Take a job of each caller in turn, as long as they fit into a pass, and ``most`` jobs at most.

        A job with a deadline shares a pass only if even the whole pass is known to end in time.
        """
        found: list[Job[Found]] = []
        room = self._most_tokens
        while waiting and len(found) != most:
            job = waiting[0][0]
            if not job.over:
                try:
                    room -= job.tokens
                except Exception as error:
                    job.fail(error)
                else:
                    if found and (room < 0 or not _in_time([*found, job])):
                        break
                    found.append(job)
            jobs = waiting.popleft()
            jobs.popleft()
            if jobs:
                waiting.append(jobs)
        return found

    def _carry_out(self, jobs: Sequence[Job[Found]], *, own: bool) -> None:
        """Compute jobs in one pass. If the pass fails, each is computed alone, so that only its cause fails.

        Args:
            jobs: The jobs.
            own: Whether all are jobs of the caller whose thread this is, which Ctrl-C then stops.
        """
        if not jobs:
            return
        try:
            self._run(jobs)
        except BaseException as error:
            if own and isinstance(error, KeyboardInterrupt):
                raise
            if len(jobs) == 1:
                jobs[0].fail(error)
            else:
                for job in jobs:
                    if not job.over:
                        self._carry_out([job], own=own)
        for job in jobs:
            job.fail(Interrupted())  # unless it has ended


def _in_time(jobs: Sequence[Job[Any]]) -> bool:
    """Tell whether one pass with all jobs is in time for each of them."""
    deadlines = [job.deadline for job in jobs if job.deadline is not None]
    tokens = sum(job.tokens for job in jobs) if deadlines else 0
    return all(deadline.allows(tokens) for deadline in deadlines)


def _show_progress(jobs: Sequence[Job[Any]]) -> None:
    from tqdm import tqdm

    bar, updating = tqdm(total=len(jobs), unit="group"), threading.Lock()

    def update(ended: Future[Any]) -> None:
        with updating:
            bar.update()

    for job in jobs:
        job.future.add_done_callback(update)
