"""A small corpus, a vector index over it, and the real reranker."""

import pytest
from llama_index.core import VectorStoreIndex
from llama_index.core.embeddings import BaseEmbedding
from llama_index.core.instrumentation import get_dispatcher
from llama_index.core.instrumentation.event_handlers import BaseEventHandler
from llama_index.core.instrumentation.events.rerank import ReRankEndEvent, ReRankStartEvent
from llama_index.core.instrumentation.span_handlers import SimpleSpanHandler
from llama_index.core.schema import NodeWithScore, TextNode

from tests.adapters import TEXTS, hashed_words, model, reranker, smollm2  # noqa: F401 - fixtures


class HashedWords(BaseEmbedding):
    def _get_text_embedding(self, text):
        return hashed_words(text)

    def _get_query_embedding(self, query):
        return self._get_text_embedding(query)

    async def _aget_query_embedding(self, query):
        return self._get_text_embedding(query)


@pytest.fixture
def nodes():
    """As a retriever returns them: scored, except for one."""
    return [
        NodeWithScore(
            node=TextNode(
                id_=f"node-{index}",
                text=text,
                metadata={"page": index, "tags": ["a"]},
                excluded_embed_metadata_keys=["page", "tags"],
            ),
            score=None if index == 1 else 1.0 - index / 10,
        )
        for index, text in enumerate(TEXTS)
    ]


@pytest.fixture
def index(nodes):
    return VectorStoreIndex([node.node for node in nodes], embed_model=HashedWords())


@pytest.fixture
def events():
    """The reranking events that the root dispatcher sees."""
    seen = []

    class Collect(BaseEventHandler):
        def handle(self, event, **kwargs):
            if isinstance(event, ReRankStartEvent | ReRankEndEvent):
                seen.append(event)

    root = get_dispatcher()
    before = list(root.event_handlers)
    root.add_event_handler(Collect())
    yield seen
    root.event_handlers = before


@pytest.fixture
def spans():
    """The spans that the root dispatcher sees."""
    root = get_dispatcher()
    before = list(root.span_handlers)
    root.add_span_handler(handler := SimpleSpanHandler())
    yield handler
    root.span_handlers = before
