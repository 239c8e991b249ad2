"""grating: the reranking step of a RAG or agent-memory pipeline, fast and small."""

from typing import TYPE_CHECKING, Any

from grating_core.errors import (
    BudgetError,
    CheckpointError,
    GratingError,
    LensError,
    ModelNotFoundError,
    PolicyError,
    ScoreError,
    SpillError,
    UnsupportedModelError,
)
from grating_core.pruning import ClusterPolicy, Off, PruningPolicy, Route
from grating_core.results import LayerTrace, RankedDocument, RerankResult, Trace

if TYPE_CHECKING:
    from grating_core.models.prompts import Prompt
    from grating_core.reranker import Reranker

__version__ = "0.1.0"

__all__ = [
    "BudgetError",
    "CheckpointError",
    "ClusterPolicy",
    "GratingError",
    "LayerTrace",
    "LensError",
    "ModelNotFoundError",
    "Off",
    "PolicyError",
    "Prompt",
    "PruningPolicy",
    "RankedDocument",
    "RerankResult",
    "Reranker",
    "Route",
    "ScoreError",
    "SpillError",
    "Trace",
    "UnsupportedModelError",
]


def __getattr__(name: str) -> Any:
    # On first use: they bring in torch and transformers, which take seconds that `grating --help` should not.
    if name == "Reranker":
        from grating_core.reranker import Reranker

        return Reranker
    if name == "Prompt":
        from grating_core.models.prompts import Prompt

        return Prompt
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
