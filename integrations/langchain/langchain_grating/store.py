"""The store: an agent's memories, reranked."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from copy import copy
from pathlib import Path
from typing import Any, TypeGuard, cast

from grating_core import Reranker
from grating_core.arguments import whole_number
from grating_core.forking import run_in_thread
from grating_core.frameworks.nested import copied, strings
from grating_core.frameworks.rerankers import DEFAULT_MODEL

try:
    from langgraph.store.base import BaseStore, GetOp, Op, Result, SearchItem, SearchOp

    from langchain_grating.paths import values_at
except ModuleNotFoundError as error:
    raise ImportError(
        'GratingStore needs LangGraph\'s stores: pip install "langchain-grating[langgraph]"'
    ) from error


class GratingStore(BaseStore):
    """This LangGraph store reranks its searches with a cross-encoder.

    It wraps any store. A search with a query takes the wrapped store's best ``candidates`` and returns those that
    answer the query best; everything else is the wrapped store's own doing, as are opening and closing it.

    A reranked item has a probability as its score. Behind the reranked items follow, in the wrapped
    store's order and with None as their score: items that an indexed store found without a vector
    (``index=False``), items without any text, and all beyond the first ``candidates``. Pages of the same
    ``limit`` therefore fit together, without gaps and repetitions.

    Attributes:
        store: The wrapped store.
        reranker: The reranker.
        candidates: How many of the wrapped store's items are reranked.
        fields: Where an item's text lies.
        raw_scores: Whether scores are raw logits in the place of probabilities.

    Example:
        .. code-block:: python

            store = GratingStore(InMemoryStore(index={"dims": 384, "embed": embeddings, "fields": ["text"]}))
            store.put(("memories", "ann"), "pet", {"text": "Ann has a dog called Rex."})
            store.search(("memories", "ann"), query="What is the name of Ann's dog?", limit=3)
    """

    def __init__(
        self,
        store: BaseStore,
        reranker: Reranker | str | Path = DEFAULT_MODEL,
        *,
        candidates: int = 50,
        fields: Sequence[str] | None = None,
        raw_scores: bool = False,
    ) -> None:
        """Wrap a store.

        Args:
            store: Any LangGraph store. Without an index it does not rank, so that its candidates are just the
                first items it lists.
            reranker: A ready :class:`grating_core.Reranker`, or the hub id, local directory or bundled name of a
                model, which is shared with everything else in the process that uses it with default settings.
            candidates: How many of the wrapped store's best items are reranked. The same for every page of a
                search; items beyond it keep their order.
            fields: Paths to the text in an item's value, in LangGraph's syntax, such as ``"text"`` or
                ``"messages[*].content"``; what they lead to is judged as one text. ``"$"`` means every string in
                the value, and so is an item judged that has nothing at these paths. None for the fields that the
                wrapped store indexes, ``["$"]`` if it does not say.
            raw_scores: Whether scores are raw logits in the place of probabilities.

        Raises:
            ValueError: An argument is not usable; the message names it.
            ModelNotFoundError: The name of the reranker leads to no usable weights.
        """
        if not isinstance(store, BaseStore):
            raise ValueError(f"store={store!r} must be a LangGraph store, such as InMemoryStore()")
        if not isinstance(reranker, Reranker | str | Path):
            raise ValueError(f"reranker={reranker!r} must be a grating_core.Reranker or the name of a model")
        if isinstance(fields, str):
            raise ValueError(f"fields={fields!r} must be a list of paths, such as [{fields!r}], or None")
        candidates = whole_number("candidates", candidates)
        self.store = store
        self.reranker = reranker if isinstance(reranker, Reranker) else Reranker.shared(reranker)
        self.candidates = candidates
        self.fields = _indexed_fields(store) if fields is None else list(fields)
        self.raw_scores = raw_scores
        self.supports_ttl = store.supports_ttl
        self.ttl_config = store.ttl_config

    def batch(self, ops: Iterable[Op]) -> list[Result]:
        """Execute operations, of which searches with a query are reranked.

        Args:
            ops: Any of LangGraph's operations, in any mixture.

        Returns:
            Their results, in the order of the operations.
        """
        ops = list(ops)
        if not any(_asks(op) for op in ops):
            return self.store.batch(ops)
        results = self._reranked(ops, self.store.batch([self._widened(op) for op in ops]))
        if reads := self._reads(ops, results):
            self.store.batch(reads)
        return results

    async def abatch(self, ops: Iterable[Op]) -> list[Result]:
        """:meth:`batch` without blocking the event loop."""
        ops = list(ops)
        if not any(_asks(op) for op in ops):
            return await self.store.abatch(ops)
        found = await self.store.abatch([self._widened(op) for op in ops])
        results = await run_in_thread(self._reranked, ops, found)
        if reads := self._reads(ops, results):
            await self.store.abatch(reads)
        return results

    def _widened(self, op: Op) -> Op:
        """Return the operation that finds the candidates of any page, and refreshes no TTL."""
        if not _asks(op):
            return op
        return op._replace(limit=max(self.candidates, op.offset + op.limit), offset=0, refresh_ttl=False)

    def _reads(self, ops: Sequence[Op], results: Sequence[Result]) -> list[Op]:
        """Return the operations that refresh the TTL of the items that are returned."""
        if not self.supports_ttl:
            return []
        pages = [_items(page) for op, page in zip(ops, results, strict=True) if _asks(op) and op.refresh_ttl]
        return [GetOp(item.namespace, item.key, refresh_ttl=True) for page in pages for item in page]

    def _reranked(self, ops: Sequence[Op], results: Sequence[Result]) -> list[Result]:
        pairs = zip(ops, results, strict=True)
        return [self._page(op, _items(result)) if _asks(op) else result for op, result in pairs]

    def _page(self, op: SearchOp, found: list[SearchItem]) -> list[SearchItem]:
        candidates = found[: self.candidates]
        judged = self._judged(candidates) if op.offset < len(candidates) else {}
        order = self._order(op, list(judged.values()))
        items = list(judged)
        ranking = [_scored(items[index], score) for index, score in order]
        rest = [_scored(item, None) for item in found if item not in judged]
        return (ranking + rest)[op.offset : op.offset + op.limit]

    def _judged(self, candidates: list[SearchItem]) -> dict[SearchItem, str]:
        """Return the candidates that are to be reranked, with their texts."""
        # A store that scores some items has no vector for the others: their owner did not want them found so.
        indexed = [item for item in candidates if item.score is not None] or candidates
        return {item: text for item in indexed if (text := _text(item.value, self.fields))}

    def _order(self, op: SearchOp, texts: list[str]) -> list[tuple[int, float]]:
        """Return indices and scores of texts, best first: the first page's, or all of them for a later page."""
        # Agents search with whole messages, whose last words say what they are about.
        query = self.reranker.tail(cast(str, op.query))
        best = self._ranked(query, texts, op.limit)
        if op.offset == 0:
            return best
        # A larger top_k instead would prune less and might find what the first page has missed: later pages
        # are what that page left, so that none of it comes twice or never.
        left = sorted(set(range(len(texts))) - {index for index, _ in best})
        rest = self._ranked(query, [texts[index] for index in left], self.candidates)
        return best + [(left[index], score) for index, score in rest]

    def _ranked(self, query: str, texts: list[str], top_k: int) -> list[tuple[int, float]]:
        ranking = self.reranker.rerank(query, texts, top_k).ranking
        return [(ranked.index, ranked.score if self.raw_scores else ranked.probability) for ranked in ranking]


def _asks(op: Op) -> TypeGuard[SearchOp]:
    """Return whether this is a search with something to rerank by."""
    return isinstance(op, SearchOp) and bool(op.query and op.query.strip()) and op.limit > 0 and op.offset >= 0


def _items(result: Result) -> list[SearchItem]:
    return cast("list[SearchItem]", result)


def _scored(item: SearchItem, score: float | None) -> SearchItem:
    item = copy(item)
    item.value = copied(item.value)
    item.score = score
    return item


def _indexed_fields(store: BaseStore) -> list[str]:
    index = getattr(store, "index_config", None) or {}
    return list(index.get("fields") or ["$"])


def _text(value: dict[str, Any], fields: list[str]) -> str:
    """Return what an item says, without the JSON around it."""
    found = [text for field in fields for text in _texts_at(value, field)]
    return "\n".join(found).strip() or "\n".join(strings(value)).strip()


def _texts_at(value: Mapping[str, Any], field: str) -> Iterator[str]:
    if field == "$":
        yield from strings(value)
        return
    for found in values_at(value, field):
        if isinstance(found, int | float):  # LangGraph indexes numbers at a path as well
            yield str(found)
        yield from strings(found, by_key=True)
