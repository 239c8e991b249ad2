"""How long loaded models, their threads and their locks live: fork, close, pickle and share, once for all.

A forked child has one thread, a copy of the one that forked. Threads of pools are gone, and locks that another
thread held stay locked. OpenMP's team is gone as well: the thread that came through the fork waits for it for ever
in its next parallel loop, where a new thread gets a team of its own.
"""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from contextvars import copy_context
from functools import partial, wraps
from pathlib import Path
from types import TracebackType
from typing import Any, Concatenate, Generic, ParamSpec, Protocol, Self, TypeVar
from weakref import WeakSet, WeakValueDictionary

from grating_core.files import expanded, is_there

Arguments = ParamSpec("Arguments")
Returned = TypeVar("Returned")

_CALLS = 8  # of run_in_thread at a time
_PLACES = ("model", "lens", "adapter", "cache_dir")  # settings that may be paths


class Forked(Protocol):
    """Something that a forked child has to put right."""

    def after_fork(self) -> None:
        """Called in the child, before anything else runs there."""


_to_be_told: WeakSet[Forked] = WeakSet()
_came_through_fork: int | None = None  # the thread that this process began with, if it was forked


def tell_of_forks(thing: Forked) -> None:
    """Have ``thing.after_fork()`` called in every forked child, as long as the thing lives."""
    _to_be_told.add(thing)


def _after_fork() -> None:
    global _came_through_fork
    _came_through_fork = threading.get_ident()
    for thing in list(_to_be_told):
        thing.after_fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


class Lock:
    """A lock that is free in a forked child, whoever held it."""

    def __init__(self) -> None:
        self._lock = self._held = threading.Lock()
        tell_of_forks(self)

    def after_fork(self) -> None:
        """Begin anew."""
        self._lock = threading.Lock()

    def locked(self) -> bool:
        """Whether somebody holds it."""
        return self._lock.locked()

    def __enter__(self) -> None:
        lock = self._lock
        lock.acquire()
        self._held = lock

    def __exit__(self, *_: object) -> None:
        self._held.release()  # the one that was taken, also if there was a fork meanwhile


class Threads:
    """A pool of threads that start when they are needed, in a forked child again.

    They end when the pool is closed or nobody holds it.

    Args:
        count: The most of them.
        name: What their names begin with.
        initializer: What each does first.
    """

    def __init__(self, count: int, name: str, initializer: Callable[[], None] | None = None) -> None:
        self._make = partial(ThreadPoolExecutor, count, name, initializer)
        self._pool: ThreadPoolExecutor | None = None
        self._starting = Lock()
        self._closed = False
        tell_of_forks(self)

    def after_fork(self) -> None:
        """Forget the threads; what they were to do, they do in the parent."""
        self._pool = None

    def submit(self, call: Callable[..., Returned], *args: Any) -> Future[Returned]:
        """Have a thread make a call.

        Returns:
            What to wait for. One that is cancelled before it began never begins.

        Raises:
            RuntimeError: The pool is closed, or no thread can be had. The call is not made then.
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
        """Await a call that a thread makes, with the context variables of this one."""
        return await asyncio.wrap_future(self.submit(copy_context().run, call, *args))

    def close(self, *, wait: bool = True) -> None:
        """End the threads.

        Args:
            wait: Until they have ended, which they do after the calls that they are at; those that have not begun
                are never made. Otherwise all that was submitted is still done.
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
    except BaseException as error:  # it belongs to whoever waits
        done.set_exception(error)
        del done, call, args  # the error holds this frame, which would hold them
    else:
        done.set_result(result)


_calls = Threads(_CALLS, "grating-call")
_beside_fork = Threads(1, "grating-forked")


async def run_in_thread(call: Callable[..., Returned], *args: Any) -> Returned:
    """Await a call that a thread of grating's own makes, so that no other user of the event loop's pool waits.

    Context variables are those of the caller. A call that is cancelled before it began is never made.

    Args:
        call: What to call. It may take long, and wait for its turn.
        args: Its arguments.
    """
    return await _calls.run(call, *args)


def computed(
    call: Callable[Arguments, Returned], /, *args: Arguments.args, **kwargs: Arguments.kwargs
) -> Returned:
    """Make a call that computes: here, or in a new thread if this one came through a fork.

    Args:
        call: What to call.
        args: Its arguments.
        kwargs: Its arguments by name.
    """
    made = partial(call, *args, **kwargs)
    if threading.get_ident() != _came_through_fork:
        return made()
    done: Future[Returned] = _beside_fork.submit(copy_context().run, made)
    return done.result()


class Closeable(Protocol):
    """Something that has files or threads."""

    def close(self) -> None:
        """Close the files, stop the threads."""


AnyModel = TypeVar("AnyModel", bound=Closeable)


@contextmanager
def closed_on_error(thing: Closeable) -> Iterator[None]:
    """Have something closed when what is done with it fails."""
    try:
        yield
    except BaseException:
        thing.close()
        raise


class Loaded(Generic[AnyModel]):
    """Something that holds a loaded model, until it is closed. Use it in a ``with`` block, or close it.

    It is pickled and copied as the call of ``from_pretrained`` or ``shared`` that made it: the model is loaded
    again, from the same name or directory with the same settings, but for a ``token``, which is never written.
    """

    _loaded: AnyModel | None
    _turn: AbstractContextManager[None]  # for whatever uses the model
    _calls: Threads  # for what is awaited; as many as may compute at a time
    _remake: Callable[..., Any] | None = None

    def close(self) -> None:
        """Free the weights, close the files, stop the threads."""
        with self._turn:
            if self._loaded is not None:
                self._loaded.close()
            self._loaded = None
        self._calls.close(wait=False)

    @property
    def closed(self) -> bool:
        """Whether it has been closed."""
        return self._loaded is None

    def _model(self) -> AnyModel:
        if (model := self._loaded) is None:
            raise RuntimeError(f"this {type(self).__name__} has been closed; make a new one with from_pretrained")
        return model

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[()]]:
        self._model()
        if self._remake is None:
            name = type(self).__name__
            raise TypeError(
                f"this {name} cannot be pickled or copied, because it was put together from parts, and nothing "
                f"says how to make it again: take one that {name}.from_pretrained made"
            )
        return self._remake, ()


Made = TypeVar("Made", bound=Loaded[Any])


def remembering(
    load: Callable[Concatenate[type[Made], Arguments], Made],
) -> Callable[Concatenate[type[Made], Arguments], Made]:
    """The ``from_pretrained`` of a class, whose objects know how they can be made again; see :class:`Loaded`."""

    @wraps(load)
    def call(cls: type[Made], /, *args: Arguments.args, **kwargs: Arguments.kwargs) -> Made:
        made = computed(load, cls, *args, **kwargs)
        made._remake = _remake(cls, "from_pretrained", *args, **kwargs)
        return made

    return call


def _remake(cls: type[Made], by: str, *args: Any, **kwargs: Any) -> Callable[..., Made]:
    named = {name: _found_anywhere(value) if name in _PLACES else value for name, value in kwargs.items()}
    named.pop("token", None)
    return partial(getattr(cls, by), *map(_found_anywhere, args), **named)


def _found_anywhere(place: Any) -> Any:
    """A path that is there as one that a process in another directory finds; a hub id as it is."""
    if not isinstance(place, str | Path):
        return place
    path = expanded(place)
    return str(path.absolute()) if is_there(path) else place


_shared: WeakValueDictionary[tuple[Any, ...], Any] = WeakValueDictionary()
_loading = Lock()


def find_or_load(cls: Any, model: str | Path, settings: Mapping[str, Any]) -> Any:
    """The one model of this name and these settings that somebody holds and nobody has closed; else a new one.

    Args:
        cls: A kind of :class:`Loaded`, with ``from_pretrained`` and ``shared``.
        model: The name.
        settings: The settings; each can be hashed.
    """
    key = (cls, str(model), *sorted(settings.items()))
    found = _shared.get(key)
    if found is None or found.closed:
        with _loading:  # or else it would be loaded twice
            found = _shared.get(key)
            if found is None or found.closed:
                found = _shared[key] = cls.from_pretrained(model, **settings)
                found._remake = _remake(cls, "shared", model, **settings)
    return found
