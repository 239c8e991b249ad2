"""What a rerank returns: the ranking, and the trace of how it came about."""

from __future__ import annotations

from dataclasses import dataclass

from grating_core.pruning import Route


@dataclass(frozen=True)
class RankedDocument:
    """A document in its place.

    Attributes:
        index: Its position in the caller's list.
        score: The model's relevance score: a raw logit, higher is more relevant.
        text: The document.
        estimated: Whether the score is an estimate read before the last layer. Never with ``scores="exact"``.
    """

    index: int
    score: float
    text: str
    estimated: bool = False


@dataclass(frozen=True)
class LayerTrace:
    """One layer of a rerank.

    Attributes:
        layer: Its number, from 1.
        alive: The candidates that were computed, as indices of documents.
        routes: What the policy decided for each of them afterwards. With ``scores="exact"`` a selected
            candidate is computed to the end all the same.
        scores: The provisional score of each; after the last layer, the score.
        tokens: Tokens computed.
        seconds: Time taken, reading scores and deciding included.
    """

    layer: int
    alive: tuple[int, ...]
    routes: tuple[Route, ...]
    scores: tuple[float, ...]
    tokens: int
    seconds: float


@dataclass(frozen=True)
class Trace:
    """The record of one rerank.

    Attributes:
        layers: One record for each layer that was computed.
        depth: Number of layers of the model.
        lengths: Tokens of each candidate, query and special tokens included.
        truncated: Indices of the documents whose end did not fit into the window.
        seconds: Time of the whole rerank, tokenising included.
    """

    layers: tuple[LayerTrace, ...]
    depth: int
    lengths: tuple[int, ...]
    truncated: tuple[int, ...]
    seconds: float

    @property
    def compute_share(self) -> float:
        """Tokens × layers computed, divided by tokens × layers of the unpruned run; 1.0 if there were none."""
        full = sum(self.lengths) * self.depth
        return sum(layer.tokens for layer in self.layers) / full if full else 1.0


@dataclass(frozen=True)
class RerankResult:
    """The outcome of :meth:`Reranker.rerank`.

    Attributes:
        ranking: The top K documents, best first; min(top_k, N) of them. Equal scores keep the caller's order.
        trace: How it came about.
    """

    ranking: list[RankedDocument]
    trace: Trace
