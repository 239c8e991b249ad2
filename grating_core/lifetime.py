"""This module opens, closes, shares and pickles all loaded models."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Hashable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Generic, Protocol, Self, TypeVar, runtime_checkable
from weakref import WeakValueDictionary

from grating_core.forking import Lock, Threads, computed


class Closeable(Protocol):
    """This protocol is for objects that have files or threads to close."""

    def close(self) -> None:
        """Close the files, stop the threads."""


@contextmanager
def closed_on_error(thing: Closeable) -> Iterator[None]:
    """Close an object if the code inside the ``with`` fails."""
    try:
        yield
    except BaseException:
        thing.close()
        raise


def closed_error(name: str) -> RuntimeError:
    """Return the error for a call to an object that has been closed.

    Args:
        name: Name of the object's class.
    """
    return RuntimeError(f"this {name} has been closed; make a new one with from_pretrained")


@runtime_checkable
class Settings(Protocol):
    """This protocol is for settings that a model is opened with. They can be compared, and usually hashed."""

    @property
    def name(self) -> str:
        """The name of the model."""

    def portable(self) -> Self:
        """Return settings without secrets, with which another process finds the same model."""


AnyModel = TypeVar("AnyModel", bound=Closeable)
AnySettings = TypeVar("AnySettings", bound=Settings)


class Loaded(Generic[AnyModel, AnySettings]):
    """This class holds a loaded model until it is closed. Use it in a ``with`` block, or close it.

    Pickling and copying keep only the settings, without a ``token``. The model is then loaded again from the same
    name or directory.
    """

    settings: AnySettings | None = None
    """The settings that the model was opened with; None if the object was put together from parts."""

    model_path: Path

    _loaded: AnyModel | None
    _turn: AbstractContextManager[None]  # whatever uses the model holds it
    _calls: Threads  # threads of awaited calls, as many as may compute at a time
    _is_shared = False

    @classmethod
    @abstractmethod
    def _open(cls, settings: AnySettings) -> Self:
        """Load the model of these settings."""

    @classmethod
    def open(cls, settings: AnySettings) -> Self:
        """Load the model of these settings. The errors are those of ``from_pretrained``."""
        _check(settings)
        made = computed(cls._open, settings)
        made.settings = settings
        return made

    @classmethod
    def open_shared(cls, settings: AnySettings) -> Self:
        """Return the process's one model of these settings, loaded if nobody holds it yet or it was closed.

        Raises:
            ValueError: A setting is not hashable, or not usable. Other errors are those of ``from_pretrained``.
        """
        _check(settings)
        for name, value in vars(settings).items():
            if not isinstance(value, Hashable):
                raise ValueError(f"{name}={value!r} is not hashable, so no model can be shared by it")
        found = _shared.get((cls, settings))
        if found is None or found.closed:
            with _loading:  # without this lock two threads would load the model twice
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
    def name(self) -> str:
        """The name of the model, without the path that leads to it."""
        return self.model_path.name if self.settings is None else self.settings.name

    @property
    def closed(self) -> bool:
        """Whether the model has been closed."""
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
                f"this {name} cannot be pickled or copied, because it was put together from parts and has no "
                f"settings: take one that {name}.from_pretrained made"
            )
        return _again, (type(self), self.settings.portable(), self._is_shared)


def _check(settings: Any) -> None:
    if not isinstance(settings, Settings):
        raise ValueError(
            f"settings must be an object such as RerankSettings(model=…), not a {type(settings).__name__}; "
            f"from_pretrained takes the name of a model"
        )


def _again(cls: type[Loaded[Any, Any]], settings: Any, is_shared: bool) -> Any:
    return cls.open_shared(settings) if is_shared else cls.open(settings)


_shared: WeakValueDictionary[tuple[type, Any], Loaded[Any, Any]] = WeakValueDictionary()
_loading = Lock()
