"""A request returns a ranking and the trace of how it came about, or a generated text and what it took."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from grating_core.pruning import Route


@dataclass(frozen=True)
class Highlight:
    """A highlight is a sentence of a document that carried the document's score.

    Attributes:
        start: The place of its first character in the document.
        stop: The place behind its last character.
        worth: How much the sentence carries, from above 0 to 1: the best sentence of the document has 1.
    """

    start: int
    stop: int
    worth: float


@dataclass(frozen=True)
class RankedDocument:
    """A ranked document has a place in the ranking.

    Attributes:
        index: Position of the document in the caller's list.
        score: The model's relevance score: a raw logit, higher is more relevant.
        text: The document.
        probability: The score as a probability from 0 to 1, see :meth:`Reranker.probability`.
        estimated: Whether the score is an estimate that was read before the last layer; never with
            ``scores="exact"``, unless time was short before a deadline. The level of a lens' estimate may be off,
            and so may its probability: compare it only with other estimates of the same request.
        highlights: The sentences that carried the score, best first, if they were asked for. There are none where
            a document has no text, or left the pass too early.
    """

    index: int
    score: float
    text: str
    probability: float
    estimated: bool = False
    highlights: tuple[Highlight, ...] = ()


@dataclass(frozen=True)
class LayerTrace:
    """This class records one layer of a rerank.

    Several requests may share a pass. Seconds and bytes are then those of the whole pass.

    Attributes:
        layer: Number of the layer, from 1; 0 for the token embeddings, which only a lens reads.
        alive: Candidates that were computed, as indices of documents.
        routes: The policy's decision for each candidate after the layer. With ``scores="exact"`` a selected
            candidate is still computed to the end.
        scores: Provisional score of each candidate, by the head or by a lens; after the last layer, the score.
            There are none after a layer that nobody looked at.
        tokens: Number of tokens computed; 0 for layer 0.
        seconds: Seconds of the layer, with reading scores and deciding. Where nothing has to be decided, a GPU
            may still compute when they are over.
        seconds_waited: Those of them in which computing stood still for the disk.
        bytes_read: Bytes of weights and embedding rows that were read from disk for the layer.
    """

    layer: int
    alive: tuple[int, ...]
    routes: tuple[Route, ...]
    scores: tuple[float, ...]
    tokens: int
    seconds: float
    seconds_waited: float = 0.0
    bytes_read: int = 0


@dataclass(frozen=True)
class Trace:
    """A trace is the record of one rerank.

    Several requests may share a pass. What was read, spilled and waited for is then that of the whole pass, as
    long as the request was in it.

    Attributes:
        layers: One record for each layer that was computed.
        depth: Number of layers of the model; 1 if transformers computed it as a whole.
        lengths: Number of tokens of each candidate in all its windows, with query and special tokens.
        truncated: Indices of the documents whose end did not fit into the window.
        windows: Number of windows of each candidate: 1, or more with ``long_documents="windows"``.
        shared_prefix: Number of tokens that all windows begin with, which were computed only once.
        seconds: Seconds from the call to the result, with tokenising and waiting for a pass.
        seconds_waited: Seconds in which computing stood still for the disk.
        bytes_read: Bytes of weights and embedding rows that were read from disk.
        bytes_spilled: Bytes of hidden states that were written to disk.
        embedding_hit_rate: Share of the pass's different tokens whose embedding was in memory before; None if the
            whole table is in memory.
        peak_memory: The most bytes of this process that were in memory while the request was in its pass. The
            number is exact if it was the most since the process began; otherwise it is the most that was seen
            after a layer. On CUDA it is the most that torch had allocated on the device since the process began.
            None without a memory budget.
        kernels: The level of the compiled kernels that computed the layers, such as ``"avx512"``; ``"torch"`` if
            torch computed them (``grating doctor`` says why), and ``"transformers"`` if transformers computed the
            model as a whole.
        recounted: Indices of the documents that were scored again without 8 bits, because their place in the top K
            was in doubt.
        notes: Remarks in words, such as which of a classifier's two labels makes the score.
        cut_short: Whether the request's deadline left no time for all that would have been computed without it.
            Otherwise the result is the one without a deadline.
    """

    layers: tuple[LayerTrace, ...]
    depth: int
    lengths: tuple[int, ...]
    truncated: tuple[int, ...]
    seconds: float
    windows: tuple[int, ...] = ()
    shared_prefix: int = 0
    seconds_waited: float = 0.0
    bytes_read: int = 0
    bytes_spilled: int = 0
    embedding_hit_rate: float | None = None
    peak_memory: int | None = None
    kernels: str = "torch"
    recounted: tuple[int, ...] = ()
    notes: tuple[str, ...] = ()
    cut_short: bool = False

    @property
    def compute_share(self) -> float:
        """Tokens × layers computed, as a share of those of the unpruned run; 1.0 without documents.

        What a recount computed counts as well.
        """
        full = self._work(range(len(self.lengths)))
        done = sum(layer.tokens for layer in self.layers) + self._work(self.recounted)
        return done / full if full else float(not self.cut_short)

    def _work(self, candidates: Sequence[int]) -> int:
        """Return the tokens × layers of some candidates without pruning."""
        if not candidates:
            return 0
        shared = self.shared_prefix
        repeated = shared * (sum(self.windows[index] for index in candidates) - 1) if shared else 0
        return (sum(self.lengths[index] for index in candidates) - repeated) * self.depth

    def summary(self) -> dict[str, Any]:
        """Return what a log or a tracing tool shows: numbers, texts and lists of them, as JSON can hold them.

        Returns:
            ``candidates`` and ``tokens`` (how many), ``alive`` (candidates computed, layer by layer),
            ``compute_share``, and of the attributes ``depth``, ``truncated``, ``seconds``, ``seconds_waited``,
            ``bytes_read``, ``bytes_spilled``, ``embedding_hit_rate``, ``peak_memory``, ``kernels``,
            ``recounted``, ``notes`` and ``cut_short``.
        """
        return {
            "candidates": len(self.lengths),
            "tokens": sum(self.lengths),
            "depth": self.depth,
            "alive": [len(layer.alive) for layer in self.layers if layer.layer > 0],
            "compute_share": self.compute_share,
            "truncated": list(self.truncated),
            "seconds": self.seconds,
            "seconds_waited": self.seconds_waited,
            "bytes_read": self.bytes_read,
            "bytes_spilled": self.bytes_spilled,
            "embedding_hit_rate": self.embedding_hit_rate,
            "peak_memory": self.peak_memory,
            "kernels": self.kernels,
            "recounted": list(self.recounted),
            "notes": list(self.notes),
            "cut_short": self.cut_short,
        }


@dataclass(frozen=True)
class RerankResult:
    """This class holds the result of :meth:`Reranker.rerank`.

    Attributes:
        ranking: The top ``min(top_k, N)`` documents, best first, without those below a threshold. Equal scores
            keep the caller's order.
        trace: The record of how the ranking came about.
    """

    ranking: list[RankedDocument]
    trace: Trace


FinishReason = Literal["stop", "length"]


@dataclass(frozen=True)
class Generation:
    """This class holds a generated text, with the tokens, bytes and seconds that it took.

    Attributes:
        text: The text that follows the prompt, without special tokens and stop string.
        finish_reason: ``"stop"``: a stop string came, or the model ended the text; ``"length"``: it has as many
            tokens as were allowed.
        prompt_tokens: The number of tokens of the prompt.
        new_tokens: The number of tokens generated, with the one that ended the text.
        seconds_to_first: Seconds until the first new token.
        seconds: Seconds until the last new token.
        bytes_read: The bytes of weights and embedding rows read from disk.
        bytes_to_first: The bytes of them that were read for the prompt, until the first new token.
        seconds_waited: Seconds that computing stood still for reading.
        hit_rate: The share of the columns used by new tokens that were in memory; None without ``mlp_density``,
            and for a single token.
    """

    text: str
    finish_reason: FinishReason
    prompt_tokens: int
    new_tokens: int
    seconds_to_first: float
    seconds: float
    bytes_read: int
    bytes_to_first: int
    seconds_waited: float
    hit_rate: float | None
