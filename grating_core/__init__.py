"""grating: the reranking step of a RAG or agent-memory pipeline, fast and small."""

from grating_core.errors import (
    GratingError,
    ModelNotFoundError,
    PolicyError,
    ScoreError,
    UnsupportedModelError,
)
from grating_core.pruning import ClusterPolicy, Off, PruningPolicy, Route
from grating_core.reranker import Reranker
from grating_core.results import LayerTrace, RankedDocument, RerankResult, Trace

__version__ = "0.1.0"

__all__ = [
    "ClusterPolicy",
    "GratingError",
    "LayerTrace",
    "ModelNotFoundError",
    "Off",
    "PolicyError",
    "PruningPolicy",
    "RankedDocument",
    "RerankResult",
    "Reranker",
    "Route",
    "ScoreError",
    "Trace",
    "UnsupportedModelError",
]
