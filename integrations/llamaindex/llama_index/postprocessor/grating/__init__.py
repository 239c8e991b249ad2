"""grating for LlamaIndex: node postprocessors."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llama_index.postprocessor.grating.base import GratingRerank
    from llama_index.postprocessor.grating.context import GratingContextSelector

__all__ = ["GratingContextSelector", "GratingRerank"]

# On first use: they bring in torch and LlamaIndex's own modules.
_LATE = {"GratingContextSelector": "context", "GratingRerank": "base"}


def __getattr__(name: str) -> Any:
    if name in _LATE:
        return getattr(import_module(f"{__name__}.{_LATE[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
