"""grating for LangChain: document compressors, a cross-encoder, a store that reranks, and a chat model."""

from typing import TYPE_CHECKING, Any

from langchain_grating.chat import ChatGrating
from langchain_grating.context import GratingContextSelector
from langchain_grating.cross_encoder import GratingCrossEncoder
from langchain_grating.rerank import GratingRerank

if TYPE_CHECKING:
    from langchain_grating.store import GratingStore

__all__ = ["ChatGrating", "GratingContextSelector", "GratingCrossEncoder", "GratingRerank", "GratingStore"]


def __getattr__(name: str) -> Any:
    if name == "GratingStore":  # on demand, since it needs langgraph
        from langchain_grating.store import GratingStore

        return GratingStore
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
