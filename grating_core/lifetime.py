"""How long loaded models live: open, close, ``with``, share and pickle, once for all."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Hashable, Iterator
from contextlib import AbstractContextManager, contextmanager
from types import TracebackType
from typing import Any, Generic, Protocol, Self, TypeVar
from weakref import WeakValueDictionary

from grating_core.forking import Lock, Threads, computed


class Closeable(Protocol):
    """Something that has files or threads."""

    def close(self) -> None:
        """Close the files, stop the threads."""


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
        name: The name of its class.
    """
    return RuntimeError(f"this {name} has been closed; make a new one with from_pretrained")


class Settings(Protocol):
    """The settings that a model is opened with; they can be compared, and hashed if all of them can."""

    def portable(self) -> Self:
        """Return the settings with which another process finds the same model; they hold no secret."""


AnyModel = TypeVar("AnyModel", bound=Closeable)
AnySettings = TypeVar("AnySettings", bound=Settings)


class Loaded(Generic[AnyModel, AnySettings]):
    """Something that holds a loaded model, until it is closed. Use it in a ``with`` block, or close it.

    It is pickled and copied as its settings: the model is loaded again, from the same name or directory, but for a
    ``token``, which is never written.
    """

    settings: AnySettings | None = None
    """The settings that it was opened with; None if it was put together from parts."""

    _loaded: AnyModel | None
    _turn: AbstractContextManager[None]  # for whatever uses the model
    _calls: Threads  # for what is awaited; as many as may compute at a time
    _is_shared = False

    @classmethod
    @abstractmethod
    def _open(cls, settings: AnySettings) -> Self:
        """Load the model of these settings."""

    @classmethod
    def open(cls, settings: AnySettings) -> Self:
        """Load the model of these settings; see ``from_pretrained`` for what it raises."""
        made = computed(cls._open, settings)
        made.settings = settings
        return made

    @classmethod
    def open_shared(cls, settings: AnySettings) -> Self:
        """Return the process's one model of these settings, loaded if nobody holds it yet or it was closed.

        Raises:
            ValueError: A setting is not hashable; and as ``from_pretrained`` does.
        """
        for name, value in vars(settings).items():
            if not isinstance(value, Hashable):
                raise ValueError(f"{name}={value!r} is not hashable, so it cannot be told whether it is shared")
        found = _shared.get((cls, settings))
        if found is None or found.closed:
            with _loading:  # or else it would be loaded twice
                found = _shared.get((cls, settings))
                if found is None or found.closed:
                    found = _shared[cls, settings] = cls.open(settings)
                    found._is_shared = True
        assert isinstance(found, cls)
        return found

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

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        self._model()
        if self.settings is None:
            name = type(self).__name__
            raise TypeError(
                f"this {name} cannot be pickled or copied, because it was put together from parts, and nothing "
                f"says how to make it again: take one that {name}.from_pretrained made"
            )
        return _again, (type(self), self.settings.portable(), self._is_shared)


def _again(cls: type[Loaded[Any, Any]], settings: Any, is_shared: bool) -> Any:
    return cls.open_shared(settings) if is_shared else cls.open(settings)


_shared: WeakValueDictionary[tuple[type, Any], Loaded[Any, Any]] = WeakValueDictionary()
_loading = Lock()
