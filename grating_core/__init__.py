"""grating: the reranking step of a RAG or agent-memory pipeline, fast and small."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from grating_core.errors import BudgetError, GratingError, ModelNotFoundError, UnsupportedModelError

if TYPE_CHECKING:
    from grating_core.context import join_passages, select_context
    from grating_core.generation import StreamedCausalLM
    from grating_core.pruning import ClusterPolicy, PruningPolicy, Route
    from grating_core.requests import Request
    from grating_core.reranker import Reranker
    from grating_core.results import RerankResult, Trace
    from grating_core.text.prompts import Prompt

__version__ = "0.1.0"

__all__ = [
    "BudgetError",
    "ClusterPolicy",
    "GratingError",
    "ModelNotFoundError",
    "Prompt",
    "PruningPolicy",
    "Request",
    "RerankResult",
    "Reranker",
    "Route",
    "StreamedCausalLM",
    "Trace",
    "UnsupportedModelError",
    "join_passages",
    "select_context",
]

# These are imported on first use, because they bring in torch, which takes a second or two.
_LATE = {
    "ClusterPolicy": "pruning",
    "Prompt": "text.prompts",
    "PruningPolicy": "pruning",
    "Request": "requests",
    "RerankResult": "results",
    "Reranker": "reranker",
    "Route": "pruning",
    "StreamedCausalLM": "generation",
    "Trace": "results",
    "join_passages": "context",
    "select_context": "context",
}


def __getattr__(name: str) -> Any:
    if name in _LATE:
        return getattr(import_module(f"{__name__}.{_LATE[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
