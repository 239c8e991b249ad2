"""grating for LangChain: document compressors, a cross-encoder, a store that reranks, and a chat model."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from langchain_grating.chat import ChatGrating
    from langchain_grating.context import GratingContextSelector
    from langchain_grating.cross_encoder import GratingCrossEncoder
    from langchain_grating.rerank import GratingRerank
    from langchain_grating.store import GratingStore

__all__ = ["ChatGrating", "GratingContextSelector", "GratingCrossEncoder", "GratingRerank", "GratingStore"]

# On first use: they bring in torch and LangChain's own modules, and the store needs langgraph.
_LATE = {
    "ChatGrating": "chat",
    "GratingContextSelector": "context",
    "GratingCrossEncoder": "cross_encoder",
    "GratingRerank": "rerank",
    "GratingStore": "store",
}


def __getattr__(name: str) -> Any:
    if name in _LATE:
        return getattr(import_module(f"{__name__}.{_LATE[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
