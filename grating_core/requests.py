"""A request asks which documents answer a query best."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace

from grating_core.arguments import Scores, check_query, check_target, elements, texts, whole_number
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
    """

    query: str
    documents: Sequence[str]
    top_k: int = 10
    scores: Scores = field(default="exact", kw_only=True)
    pruning: PruningPolicy | None = field(default=None, kw_only=True)
    target: float | None = field(default=None, kw_only=True)

    @classmethod
    def of(cls, query: str, documents: Iterable[str], top_k: int, scores: Scores) -> Request:
        """Return a checked request, see :meth:`checked`. The documents may come from a generator."""
        return cls(query, texts("documents", documents), top_k, scores=scores).checked()

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
