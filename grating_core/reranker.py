"""The reranker: the one class that most people touch."""

from __future__ import annotations

import asyncio
from collections.abc import Hashable, Iterable, Sequence
from itertools import groupby
from pathlib import Path
from threading import Lock
from time import perf_counter
from types import TracebackType
from typing import Any, Literal
from weakref import WeakValueDictionary

import torch
from tqdm import tqdm
from typing_extensions import Self

from grating_core.engine.attention import PACKED_ATTENTION
from grating_core.engine.forward import Outcome, forward
from grating_core.engine.ragged import RaggedBatch
from grating_core.models.cross_encoder import CrossEncoder
from grating_core.models.loading import find_model, load_cross_encoder, read_config
from grating_core.models.placement import choose_device, choose_dtype
from grating_core.models.templates import PairTemplate, TokenisedPair, load_template
from grating_core.pruning import ClusterPolicy, Off, PruningPolicy
from grating_core.results import RankedDocument, RerankResult, Trace

_CHUNK_TOKENS = {"cpu": 4096, "cuda": 32768, "mps": 8192}
_SCORE_GROUP = 256  # pairs that score() holds in memory at a time
# Lost at most 2 % of the full model's top 5 on each corpus of benchmarks/pruning.py.
_CAUTIOUS = ClusterPolicy(dispersion_threshold=16.0)

_shared: WeakValueDictionary[tuple[Any, ...], Reranker] = WeakValueDictionary()
_shared_lock = Lock()


class Reranker:
    """Finds the K of N documents that answer a query best, with a cross-encoder.

    All documents go through the model together, layer by layer, packed without padding; those that cannot
    reach the top K stop being computed. Made by :meth:`from_pretrained`. May be called from several threads.
    """

    def __init__(
        self,
        model: CrossEncoder,
        template: PairTemplate,
        *,
        model_path: Path,
        pruning: PruningPolicy,
        chunk_tokens: int,
    ) -> None:
        self._loaded: CrossEncoder | None = model
        self._template = template
        self._pruning = pruning
        self._chunk_tokens = chunk_tokens
        self.model_path = model_path
        """The local directory that the weights were read from."""

    @classmethod
    def from_pretrained(
        cls,
        model: str | Path,
        *,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype = "auto",
        memory_budget: str | int | None = None,
        pruning: str | PruningPolicy = "auto",
        max_length: int | None = None,
        chunk_tokens: int | None = None,
        show_progress: bool = False,
    ) -> Reranker:
        """Load a cross-encoder.

        Args:
            model: A hub id such as ``"cross-encoder/ms-marco-MiniLM-L12-v2"``, a local directory in Hugging
                Face layout with safetensors weights, or ``"bundled:ms-marco-minilm-l12"``.
            device: ``"cpu"``, ``"cuda"`` or ``"mps"``; None takes the best that is there.
            dtype: ``"float32"``, ``"bfloat16"``, ``"float16"``, or ``"auto"``: bfloat16 where the processor
                has instructions for it, else float32.
            memory_budget: Only None, everything resident, in this version.
            pruning: ``"cluster"``, ``"off"``, a policy object, or ``"auto"``: the best that is known to keep
                the full model's top K, at present ``"cluster"`` with a cautious threshold.
            max_length: Most tokens of a query and document together; None for the model's own window. What
                does not fit is cut from the end of the document.
            chunk_tokens: Most tokens computed at once, which bounds the memory of intermediate results. A
                document is never split. None for a value that suits the device.
            show_progress: Show progress bars while fetching or converting.

        Raises:
            ModelNotFoundError: The name leads to no usable weights.
            UnsupportedModelError: The weights are of a kind that grating does not run.
            ValueError: An argument is not usable; the message names it.
        """
        if memory_budget is not None:
            raise ValueError(
                f"memory_budget={memory_budget!r}: streaming within a budget is not part of this version; "
                f"use None, which keeps all weights in memory"
            )
        if chunk_tokens is not None and chunk_tokens < 1:
            raise ValueError(f"chunk_tokens={chunk_tokens} must be 1 or more, or None")
        policy = _find_policy(pruning)
        chosen_device = choose_device(device)
        chosen_dtype, _ = choose_dtype(dtype, chosen_device)
        directory = find_model(str(model), show_progress=show_progress)
        config, family = read_config(directory)
        template = load_template(directory, family.window(config), max_length)
        loaded = load_cross_encoder(
            directory, device=chosen_device, dtype=chosen_dtype, attention=PACKED_ATTENTION
        )
        return cls(
            loaded,
            template,
            model_path=directory,
            pruning=policy,
            chunk_tokens=chunk_tokens or _CHUNK_TOKENS[chosen_device.type],
        )

    @classmethod
    def shared(cls, model: str | Path, **settings: Any) -> Reranker:
        """The process's one reranker with this model and these settings, loaded if nobody holds it yet.

        It is freed when the last holder lets go of it. Do not close it: others may be using it.

        Args:
            model: As in :meth:`from_pretrained`.
            settings: As in :meth:`from_pretrained`; a policy object must be hashable.

        Raises:
            ValueError: The policy object is not hashable; and as :meth:`from_pretrained` does.
        """
        if not isinstance(settings.get("pruning"), Hashable):
            raise ValueError(
                f"pruning={settings['pruning']!r} is not hashable, so it cannot be told whether it is shared"
            )
        key = (str(model), *sorted(settings.items()))
        with _shared_lock:
            reranker = _shared.get(key)
            if reranker is None or reranker._loaded is None:
                reranker = _shared[key] = cls.from_pretrained(model, **settings)
            return reranker

    def rerank(
        self,
        query: str,
        documents: Sequence[str],
        top_k: int = 10,
        *,
        scores: Literal["exact", "estimated"] = "exact",
    ) -> RerankResult:
        """Rank the documents by relevance to the query and return the best.

        Args:
            query: The question; not empty.
            documents: N texts. None at all, duplicates and empty strings are fine. Texts longer than the
                model's window are cut, and listed in the trace.
            top_k: How many to return. N or more returns all N, and nothing is pruned then.
            scores: ``"exact"``: what is returned went through every layer, so its scores are the full
                model's. ``"estimated"``: sure winners stop early as well, which is faster; their scores are
                estimates and marked so, and they rank before those that went on.

        Returns:
            The top ``min(top_k, N)`` documents, best first, and the trace.

        Raises:
            ValueError: An argument is not usable; the message names it. Raised before any computing.
            ScoreError: The model gave a score that is not a finite number.
            RuntimeError: The reranker has been closed.
        """
        started = perf_counter()
        model = self._model()
        documents = _checked_documents(documents)
        _check_query(query)
        _check_top_k(top_k)
        if scores not in ("exact", "estimated"):
            raise ValueError(f"scores={scores!r} must be 'exact' or 'estimated'")
        if not documents:
            return RerankResult([], Trace((), model.depth, (), (), perf_counter() - started))

        pairs = self._template.encode(query, documents)
        outcome = self._forward(
            model, pairs, top_k=min(top_k, len(pairs)), policy=self._pruning, exact=scores == "exact"
        )
        ranking = [
            RankedDocument(winner.index, winner.score, documents[winner.index], winner.estimated)
            for winner in outcome.winners
        ]
        trace = Trace(
            layers=tuple(outcome.layers),
            depth=model.depth,
            lengths=tuple(len(pair.input_ids) for pair in pairs),
            truncated=tuple(index for index, pair in enumerate(pairs) if pair.truncated),
            seconds=perf_counter() - started,
        )
        return RerankResult(ranking, trace)

    async def arerank(
        self,
        query: str,
        documents: Sequence[str],
        top_k: int = 10,
        *,
        scores: Literal["exact", "estimated"] = "exact",
    ) -> RerankResult:
        """:meth:`rerank` in a worker thread, so that the event loop goes on."""
        return await asyncio.to_thread(self.rerank, query, documents, top_k, scores=scores)

    def score(self, pairs: Sequence[tuple[str, str]], *, show_progress: bool = False) -> list[float]:
        """The relevance of each text to its query, by the full model.

        Args:
            pairs: ``(query, text)`` for each score wanted. Queries may differ.
            show_progress: Show a progress bar on standard error.

        Returns:
            Scores in the order of the pairs.

        Raises:
            ValueError: A pair is not two strings, or its query is empty; the message names its index.
            ScoreError: The model gave a score that is not a finite number.
            RuntimeError: The reranker has been closed.
        """
        model = self._model()
        for index, pair in enumerate(pairs):
            if not _is_pair(pair):
                raise ValueError(f"pairs[{index}]={pair!r} must be a query that is not empty and a text")
        found: list[float] = []
        with tqdm(total=len(pairs), unit="pair", disable=not show_progress) as bar:
            for start in range(0, len(pairs), _SCORE_GROUP):
                group = pairs[start : start + _SCORE_GROUP]
                encoded = [
                    pair
                    for query, same in groupby(group, key=lambda pair: pair[0])
                    for pair in self._template.encode(query, [text for _, text in same])
                ]
                outcome = self._forward(model, encoded, top_k=len(encoded), policy=Off(), first_number=start)
                found += [winner.score for winner in sorted(outcome.winners, key=lambda w: w.index)]
                bar.update(len(group))
        return found

    def close(self) -> None:
        """Free the weights. Calls after this one raise ``RuntimeError``; calls in progress end normally."""
        self._loaded = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return self._model().device

    @property
    def dtype(self) -> torch.dtype:
        """What the layers compute in."""
        return self._model().dtype

    @property
    def max_length(self) -> int:
        """Most tokens of a query and a document together."""
        return self._template.window

    def _model(self) -> CrossEncoder:
        if (model := self._loaded) is None:
            raise RuntimeError("this Reranker has been closed; make a new one with from_pretrained")
        return model

    def _forward(self, model: CrossEncoder, pairs: list[TokenisedPair], **how: Any) -> Outcome:
        batch = RaggedBatch.pack(
            [pair.input_ids for pair in pairs], [pair.token_type_ids for pair in pairs], model.device
        )
        return forward(model, batch, chunk_tokens=self._chunk_tokens, **how)


def _find_policy(pruning: str | PruningPolicy) -> PruningPolicy:
    if not isinstance(pruning, str) and isinstance(pruning, PruningPolicy):
        return pruning
    if pruning == "auto":
        return _CAUTIOUS
    if pruning == "cluster":
        return ClusterPolicy()
    if pruning == "off":
        return Off()
    raise ValueError(
        f"pruning={pruning!r} is unknown; use 'auto', 'cluster', 'off', or an object with a route method"
    )


def _check_query(query: str) -> None:
    if not isinstance(query, str) or not query.strip():
        raise ValueError(f"query={query!r} must be a string that is not empty")


def _check_top_k(top_k: int) -> None:
    if not isinstance(top_k, int) or isinstance(top_k, bool) or top_k < 1:
        raise ValueError(f"top_k={top_k!r} must be a whole number, 1 or more")


def _is_pair(pair: object) -> bool:
    return (
        isinstance(pair, Sequence)
        and len(pair) == 2
        and all(isinstance(text, str) for text in pair)
        and not isinstance(pair, str)
        and bool(pair[0].strip())
    )


def _checked_documents(documents: Sequence[str]) -> list[str]:
    if isinstance(documents, str) or not isinstance(documents, Iterable):
        raise ValueError(f"documents must be a list of strings, not a {type(documents).__name__}")
    documents = list(documents)
    for index, document in enumerate(documents):
        if not isinstance(document, str):
            raise ValueError(f"documents[{index}] is a {type(document).__name__}, not a string")
    return documents
