"""grating for LlamaIndex: node postprocessors, and a language model."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llama_index.postprocessor.grating.base import GratingRerank
    from llama_index.postprocessor.grating.context import GratingContextSelector
    from llama_index.postprocessor.grating.llm import GratingLLM

__all__ = ["GratingContextSelector", "GratingLLM", "GratingRerank"]

# On first use: they bring in torch and LlamaIndex's own modules.
_LATE = {"GratingContextSelector": "context", "GratingLLM": "llm", "GratingRerank": "base"}


def __getattr__(name: str) -> Any:
    if name in _LATE:
        return getattr(import_module(f"{__name__}.{_LATE[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
