"""grating: the reranking step of a RAG or agent-memory pipeline, fast and small."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from grating_core.errors import (
    BudgetError,
    CheckpointError,
    ColumnsError,
    GratingError,
    LensError,
    ModelNotFoundError,
    PolicyError,
    ScoreError,
    SpillError,
    StorageError,
    TraceError,
    UnsupportedModelError,
)

if TYPE_CHECKING:
    from grating_core.context import Passage, join_passages, select_context
    from grating_core.generation import Generation, StreamedCausalLM
    from grating_core.pruning import ClusterPolicy, Off, PruningPolicy, Route
    from grating_core.reranker import Reranker
    from grating_core.results import LayerTrace, RankedDocument, RerankResult, Trace
    from grating_core.text.prompts import Prompt

__version__ = "0.1.0"

__all__ = [
    "BudgetError",
    "CheckpointError",
    "ClusterPolicy",
    "ColumnsError",
    "Generation",
    "GratingError",
    "LayerTrace",
    "LensError",
    "ModelNotFoundError",
    "Off",
    "Passage",
    "PolicyError",
    "Prompt",
    "PruningPolicy",
    "RankedDocument",
    "RerankResult",
    "Reranker",
    "Route",
    "ScoreError",
    "SpillError",
    "StorageError",
    "StreamedCausalLM",
    "Trace",
    "TraceError",
    "UnsupportedModelError",
    "join_passages",
    "select_context",
]


# On first use: they bring in torch, transformers and scikit-learn, which take seconds that `grating --help` should
# not.
_LATE = {
    "ClusterPolicy": "pruning",
    "Generation": "generation",
    "LayerTrace": "results",
    "Off": "pruning",
    "Passage": "context",
    "Prompt": "text.prompts",
    "PruningPolicy": "pruning",
    "RankedDocument": "results",
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
