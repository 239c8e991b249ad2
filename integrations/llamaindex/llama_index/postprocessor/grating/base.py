"""The node postprocessor."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from llama_index.core.bridge.pydantic import Field
from llama_index.core.callbacks import CBEventType, EventPayload
from llama_index.core.callbacks.base import EventContext
from llama_index.core.instrumentation import get_dispatcher  # type: ignore[attr-defined]
from llama_index.core.instrumentation.events.rerank import ReRankEndEvent, ReRankStartEvent
from llama_index.core.schema import MetadataMode, NodeWithScore, QueryBundle
from llama_index.postprocessor.grating.migration import by_name
from llama_index.postprocessor.grating.settings import RerankerSettings, checked_request

from grating_core import RerankResult
from grating_core.frameworks.nested import copied
from grating_core.frameworks.requests import is_blank
from grating_core.frameworks.rerankers import HIGHLIGHTS, RankingFields
from grating_core.results import RankedDocument

dispatcher = get_dispatcher(__name__)

ESTIMATED = "relevance_score_estimated"
"""The name of the metadata that mark a score as an estimate."""


class GratingRerank(RankingFields, RerankerSettings):  # type: ignore[misc]
    """This class keeps the ``top_n`` nodes that answer the query best, best first. Their scores are probabilities.

    The model is loaded on construction, and shared with whoever uses the same settings. The caller's nodes and
    their scores are left as they are. The arguments of ``SentenceTransformerRerank`` and ``FlashRankRerank``
    work as they are, also by position. With ``highlights=True`` a node's metadata have the sentences that carried
    its score; language models and embeddings do not see them. Nor do they see ``relevance_score_estimated``, which
    marks a score that is an estimate, with ``scores="estimated"`` or when a ``deadline`` came early.

    Example:
        .. code-block:: python

            reranker = GratingRerank(model="bundled:ms-marco-minilm-l12", top_n=3)
            engine = index.as_query_engine(similarity_top_k=20, node_postprocessors=[reranker])
    """

    top_n: int = Field(default=3, ge=1, description="How many nodes are kept.")
    keep_retrieval_score: bool = Field(
        default=False, description="Whether the metadata keep the retriever's score, as 'retrieval_score'."
    )
    metadata_mode: MetadataMode = Field(
        default=MetadataMode.EMBED,
        description="The metadata that are judged with a node's text: 'embed' for those that are embedded, 'llm', "
        "'all' or 'none'.",
    )
    if not TYPE_CHECKING:  # editors and type checkers are to see the fields

        def __init__(self, *args: Any, **settings: Any) -> None:
            super().__init__(**by_name(args, settings))

    def _postprocess_nodes(
        self, nodes: list[NodeWithScore], query_bundle: QueryBundle | None = None
    ) -> list[NodeWithScore]:
        query, nodes = checked_request(query_bundle, nodes)
        if not nodes or is_blank(query.query_str):
            return self._unjudged(nodes)
        with self._started(nodes, query) as event:
            return self._ended(event, nodes, self._ranked(query.query_str, self._texts(nodes), self.top_n))

    @dispatcher.span
    async def _apostprocess_nodes(
        self, nodes: list[NodeWithScore], query_bundle: QueryBundle | None = None
    ) -> list[NodeWithScore]:
        query, nodes = checked_request(query_bundle, nodes)
        if not nodes or is_blank(query.query_str):
            return self._unjudged(nodes)
        with self._started(nodes, query) as event:
            return self._ended(event, nodes, await self._aranked(query.query_str, self._texts(nodes), self.top_n))

    def _unjudged(self, nodes: list[NodeWithScore]) -> list[NodeWithScore]:
        return [NodeWithScore(node=found.node) for found in nodes[: self.top_n]]

    def _texts(self, nodes: list[NodeWithScore]) -> list[str]:
        return [node.node.get_content(metadata_mode=self.metadata_mode) for node in nodes]

    @contextmanager
    def _started(self, nodes: list[NodeWithScore], query: QueryBundle) -> Iterator[EventContext]:
        """Tell those who listen that reranking starts, and if it fails, that it has failed."""
        dispatcher.event(ReRankStartEvent(query=query, nodes=nodes, top_n=self.top_n, model_name=self.model))
        payload: dict[str, Any] = {
            EventPayload.NODES: nodes,
            EventPayload.MODEL_NAME: self.model,
            EventPayload.QUERY_STR: query.query_str,
            EventPayload.TOP_K: self.top_n,
        }
        with self.callback_manager.event(CBEventType.RERANKING, payload=payload) as event:
            yield event

    def _ended(self, event: EventContext, nodes: list[NodeWithScore], result: RerankResult) -> list[NodeWithScore]:
        """Tell those who listen what came out, and return the nodes."""
        reranked = [self._with_score(nodes[ranked.index], ranked) for ranked in result.ranking]
        trace = result.trace.summary()
        event.on_end(payload={EventPayload.NODES: reranked, EventPayload.ADDITIONAL_KWARGS: {"trace": trace}})
        dispatcher.event(ReRankEndEvent(nodes=reranked, tags={"trace": trace}))
        return reranked

    def _with_score(self, retrieved: NodeWithScore, ranked: RankedDocument) -> NodeWithScore:
        node, added = retrieved.node, dict[str, Any](self._highlights(ranked))
        if self.keep_retrieval_score:
            added["retrieval_score"] = retrieved.score
        if ranked.estimated:
            added[ESTIMATED] = True
        if added:
            # These are for people: a language model has the text itself, and an embedding needs no more.
            hidden = {
                name: [
                    *getattr(node, name),
                    *sorted({HIGHLIGHTS, ESTIMATED} & added.keys() - {*getattr(node, name)}),
                ]
                for name in ("excluded_llm_metadata_keys", "excluded_embed_metadata_keys")
            }
            node = node.model_copy(update={"metadata": {**copied(node.metadata), **added}, **hidden})
        return NodeWithScore(node=node, score=self._score(ranked))
