"""How long loaded models live: close, ``with``, share and pickle, once for all."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from functools import partial, wraps
from pathlib import Path
from types import TracebackType
from typing import Any, Concatenate, Generic, ParamSpec, Protocol, Self, TypeVar
from weakref import WeakValueDictionary

from grating_core.files.places import expanded, is_there
from grating_core.forking import Lock, Threads, computed

_PLACES = ("model", "lens", "adapter", "cache_dir")  # settings that may be paths


class Closeable(Protocol):
    """Something that has files or threads."""

    def close(self) -> None:
        """Close the files, stop the threads."""


Arguments = ParamSpec("Arguments")
AnyModel = TypeVar("AnyModel", bound=Closeable)


@contextmanager
def closed_on_error(thing: Closeable) -> Iterator[None]:
    """Have something closed when what is done with it fails."""
    try:
        yield
    except BaseException:
        thing.close()
        raise


def closed_error(name: str) -> RuntimeError:
    """Return the error of a call to something that has been closed.

    Args:
        name: Name of its class.
    """
    return RuntimeError(f"this {name} has been closed; make a new one with from_pretrained")


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
            raise closed_error(type(self).__name__)
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
