"""Loaded models that a process has only once, whoever uses them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from threading import Lock
from typing import Any, Protocol, TypeVar
from weakref import WeakValueDictionary


class Loaded(Protocol):
    """A model that can be closed."""

    @property
    def closed(self) -> bool:
        """Whether it has been closed."""


Model = TypeVar("Model", bound=Loaded)

_models: WeakValueDictionary[tuple[Any, ...], Any] = WeakValueDictionary()
_loading = Lock()


def find_or_load(load: Callable[..., Model], model: str | Path, settings: Mapping[str, Any]) -> Model:
    """The one model of this name and these settings that somebody holds and nobody has closed; else a new one.

    Args:
        load: Makes one of a name and settings, such as ``Reranker.from_pretrained``.
        model: The name.
        settings: The settings; each can be hashed.
    """
    key = (load, str(model), *sorted(settings.items()))
    found: Model | None = _models.get(key)
    if found is None or found.closed:
        with _loading:  # or else it would be loaded twice
            found = _models.get(key)
            if found is None or found.closed:
                found = _models[key] = load(model, **settings)
    return found
