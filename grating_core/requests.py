"""A request asks which documents answer a query best."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from grating_core.arguments import (
    Scores,
    check_deadline,
    check_query,
    check_target,
    check_threshold,
    elements,
    texts,
    whole_number,
)
from grating_core.pruning import PruningPolicy


@dataclass(frozen=True)
class Request:
    """A request is a query with its documents and how many of them are wanted.

    Attributes:
        query: The question; not empty.
        documents: N texts in any form that has an order; N may be 0.
        top_k: Number of documents to return; N or more returns all N.
        scores: ``"exact"`` or ``"estimated"``, see :meth:`Reranker.rerank`.
        pruning: The policy of this request alone; None takes the reranker's own pruning.
        target: The target of this request alone, which needs a lens; None takes the reranker's own target.
        score_threshold: The least probability of a document that is returned; None leaves none out.
        raw_scores: Whether the threshold is a raw score, and no probability.
        deadline: Seconds for the whole call, see :meth:`Reranker.rerank`; None takes as long as it takes.
        highlights: Whether to find the sentences that carried the scores.
    """

    query: str
    documents: Sequence[str]
    top_k: int = 10
    scores: Scores = field(default="exact", kw_only=True)
    pruning: PruningPolicy | None = field(default=None, kw_only=True)
    target: float | None = field(default=None, kw_only=True)
    score_threshold: float | None = field(default=None, kw_only=True)
    raw_scores: bool = field(default=False, kw_only=True)
    deadline: float | None = field(default=None, kw_only=True)
    highlights: bool = field(default=False, kw_only=True)

    @classmethod
    def of(cls, query: str, documents: Iterable[str], top_k: int, **wanted: Any) -> Request:
        """Return a checked request, see :meth:`checked`. The documents may come from a generator."""
        return cls(query, texts("documents", documents), top_k, **wanted).checked()

    def keeps(self, score: float, probability: float) -> bool:
        """Tell whether a document is at or above the threshold, by its raw score or its probability."""
        if self.score_threshold is None:
            return True
        return (score if self.raw_scores else probability) >= self.score_threshold

    def checked(self) -> Request:
        """Return the request with its documents in a list and a K that is an int.

        Raises:
            ValueError: A field is not usable; the message names it.
        """
        documents = texts("documents", self.documents)
        check_query(self.query)
        if self.scores not in ("exact", "estimated"):
            raise ValueError(f"scores={self.scores!r} must be 'exact' or 'estimated'")
        if isinstance(self.pruning, type) or not (self.pruning is None or hasattr(self.pruning, "route")):
            raise ValueError(f"pruning={self.pruning!r} must be an object with a route method, or None")
        if self.target is not None:
            check_target(self.target)
            if self.pruning is not None:
                raise ValueError(f"target={self.target} and pruning={self.pruning!r} exclude each other")
        check_threshold(self.score_threshold, raw_scores=self.raw_scores, scores=self.scores)
        check_deadline(self.deadline)
        return replace(self, documents=documents, top_k=whole_number("top_k", self.top_k))


def checked_requests(requests: Iterable[Request], check_length: Callable[[str], None]) -> list[Request]:
    """Check the requests in a list, tuple or generator, see :meth:`Request.checked`.

    Args:
        requests: The requests.
        check_length: Function that raises ``ValueError`` for a query that is too long for the model.

    Raises:
        ValueError: The argument is something else, or a request is not usable; the message names its index.
    """
    found = []
    for index, request in enumerate(elements("requests", requests, "a list of Request", values="{name}.values()")):
        if not isinstance(request, Request):
            raise ValueError(f"requests[{index}] is a {type(request).__name__}, not a Request")
        try:
            found.append(request.checked())
            check_length(request.query)
        except ValueError as error:
            raise ValueError(f"requests[{index}]: {error}") from error
    return found
