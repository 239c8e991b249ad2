"""Threads and locks that a forked child can use.

A forked child has one thread, a copy of the one that forked. Threads of pools are gone, and locks that another
thread held stay locked. OpenMP's team is gone as well: the thread that came through the fork waits for it for ever
in its next parallel loop, where a new thread gets a team of its own.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextvars import copy_context
from functools import partial
from typing import Any, ParamSpec, Protocol, TypeVar
from weakref import WeakSet

Arguments = ParamSpec("Arguments")

Returned = TypeVar("Returned")

_CALLS = 8  # calls of run_in_thread at a time


class Interrupted(Exception):
    """A forward pass was given up, so that something else can run."""


class Forked(Protocol):
    """This protocol is for objects that a forked child has to repair."""

    def after_fork(self) -> None:
        """Repair the object. This is called in the child, before anything else runs there."""


_to_be_told: WeakSet[Forked] = WeakSet()

_came_through_fork: int | None = None  # the thread that this process began with, if it was forked


def tell_of_forks(thing: Forked) -> None:
    """Call ``thing.after_fork()`` in every forked child, as long as the object exists."""
    _to_be_told.add(thing)


def _after_fork() -> None:
    global _came_through_fork
    _came_through_fork = threading.get_ident()
    for thing in list(_to_be_told):
        thing.after_fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


class Lock:
    """This lock is free in a forked child, whoever held it."""

    def __init__(self) -> None:
        self._lock = self._held = threading.Lock()
        tell_of_forks(self)

    def after_fork(self) -> None:
        """Take a new lock, which nobody holds."""
        self._lock = threading.Lock()

    def locked(self) -> bool:
        """Tell whether somebody holds the lock."""
        return self._lock.locked()

    def take(self) -> bool:
        """Take the lock if it is free, and tell whether it was. Leave it with :meth:`__exit__`."""
        lock = self._lock
        if not lock.acquire(blocking=False):
            return False
        self._held = lock
        return True

    def __enter__(self) -> None:
        lock = self._lock
        lock.acquire()
        self._held = lock

    def __exit__(self, *_: object) -> None:
        self._held.release()  # this is the lock that was taken, even after a fork


class Threads:
    """A pool starts threads when they are needed, and starts them again in a forked child.

    The threads end when the pool is closed or nobody holds it.

    Args:
        count: The most threads.
        name: Beginning of the threads' names.
        initializer: The function that each thread calls first; None for none.
    """

    def __init__(self, count: int, name: str, initializer: Callable[[], None] | None = None) -> None:
        self._make = partial(ThreadPoolExecutor, count, name, initializer)
        self._pool: ThreadPoolExecutor | None = None
        self._starting = Lock()
        self._closed = False
        tell_of_forks(self)

    def after_fork(self) -> None:
        """Forget the threads. They do their work in the parent."""
        self._pool = None

    def submit(self, call: Callable[..., Returned], *args: Any) -> Future[Returned]:
        """Let a thread make a call, and return its future. A call cancelled before it begins is never made.

        Raises:
            RuntimeError: The pool is closed, or no thread can be started. The call is not made then.
        """
        with self._starting:
            if self._closed:
                raise RuntimeError("these threads have ended")
            pool = self._pool = self._pool or self._make()
        done: Future[Returned] = Future()
        try:
            pool.submit(_carry_out, done, call, args)
        except RuntimeError:
            # The pool takes a call before it starts a thread for it, so another thread may come to make it.
            if done.cancel():
                raise
        return done

    async def run(self, call: Callable[..., Returned], *args: Any) -> Returned:
        """Await a call that a thread of the pool makes, with the caller's context variables."""
        import asyncio  # it takes long to import, and few programs need it

        return await asyncio.wrap_future(self.submit(copy_context().run, call, *args))

    def close(self, *, wait: bool = True) -> None:
        """End the threads.

        Args:
            wait: Whether to wait for the end of the calls in progress, and to drop calls that have not begun.
                Otherwise all submitted calls are still made.
        """
        with self._starting:
            self._closed = True
            pool, self._pool = self._pool, None
        if pool is not None:
            pool.shutdown(wait=wait, cancel_futures=wait)


def _carry_out(done: Future[Returned], call: Callable[..., Returned], args: tuple[Any, ...]) -> None:
    if not done.set_running_or_notify_cancel():
        return
    try:
        result = call(*args)
    except BaseException as error:  # whoever waits for the future gets it
        done.set_exception(error)
        del done, call, args  # the error keeps this frame, and the frame would keep these
    else:
        done.set_result(result)


_calls = Threads(_CALLS, "grating-call")

_beside_fork = Threads(1, "grating-forked")


async def run_in_thread(call: Callable[..., Returned], *args: Any) -> Returned:
    """Await a call that one of grating's own threads makes, which leaves the event loop's pool to others.

    The call has the caller's context variables, and may take long. A call that is cancelled before it begins is
    never made.
    """
    return await _calls.run(call, *args)


def computed(
    call: Callable[Arguments, Returned], /, *args: Arguments.args, **kwargs: Arguments.kwargs
) -> Returned:
    """Make a call that computes: in this thread, or in a new one if this thread came through a fork."""
    made = partial(call, *args, **kwargs)
    if threading.get_ident() != _came_through_fork:
        return made()
    done: Future[Returned] = _beside_fork.submit(copy_context().run, made)
    return done.result()
