"""RAG and an agent's memory in LlamaIndex."""

from __future__ import annotations

import asyncio
import json
import uuid
from functools import partialmethod
from itertools import groupby
from pathlib import Path
from time import perf_counter
from typing import Any

from llama_index.core import VectorStoreIndex
from llama_index.core.base.llms.types import ChatMessage
from llama_index.core.llms import MockLLM
from llama_index.core.memory import VectorMemoryBlock
from llama_index.core.postprocessor import SentenceTransformerRerank
from llama_index.core.postprocessor.types import BaseNodePostprocessor
from llama_index.core.retrievers import QueryFusionRetriever
from llama_index.core.retrievers.fusion_retriever import FUSION_MODES
from llama_index.core.schema import BaseNode, NodeWithScore, QueryBundle, TextNode
from llama_index.embeddings.huggingface import HuggingFaceEmbedding
from llama_index.postprocessor.grating import GratingRerank
from llama_index.retrievers.bm25 import BM25Retriever
from llama_index.vector_stores.qdrant import QdrantVectorStore
from qdrant_client import AsyncQdrantClient, QdrantClient
from sentence_transformers import CrossEncoder

from benchmarks.applications import Corpus, Question, Reranking, load_tokenizer
from benchmarks.collections import conversation
from benchmarks.worker import Ask, Facts, Ready

FOUND = 10  # by each retriever
TOP_N = 10

REMEMBERED = 20
RECALLED = 5


def rag(ready: Ready, *, corpus: Corpus, first: Question, reranking: Reranking) -> Ask:
    """Load hybrid RAG: BM25 and dense retrieval, fused by reciprocal ranks; the best of the union are kept.

    The first question warms it up.
    """
    nodes = _nodes(corpus)
    store = QdrantVectorStore("texts", client=QdrantClient(":memory:"))
    store.add(nodes)
    index = VectorStoreIndex.from_vector_store(store, embed_model=_embedding(corpus.embedder))
    retriever = QueryFusionRetriever(
        [
            BM25Retriever.from_defaults(nodes=nodes, similarity_top_k=FOUND),
            index.as_retriever(similarity_top_k=FOUND),
        ],
        llm=MockLLM(),  # not used, but asked for
        mode=FUSION_MODES.RECIPROCAL_RANK,
        similarity_top_k=2 * FOUND,
        num_queries=1,
        use_async=False,
    )
    retriever.retrieve(first.text)
    load_tokenizer(reranking.model, ready)
    postprocessor = Watched(_load_postprocessor(reranking, TOP_N), TOP_N)

    def ask(question: Question) -> Facts:
        postprocessor.postprocess_nodes(retriever.retrieve(question.text), query_str=question.text)
        return postprocessor.seen

    return ask


def memory(ready: Ready, *, corpus: Corpus, first: Question, reranking: Reranking) -> Ask:
    """Load an agent's memory: a ``VectorMemoryBlock`` for each conversation, which recalls turns for a message.

    The first question warms it up.
    """
    loop = asyncio.new_event_loop()
    client, embedding = AsyncQdrantClient(":memory:"), _embedding(corpus.embedder)
    blocks: dict[str, VectorMemoryBlock] = {}
    for name, turns in groupby(_nodes(corpus), key=lambda node: conversation(node.metadata["id"])):
        store = QdrantVectorStore(name, aclient=client)
        loop.run_until_complete(store.async_add(list(turns)))
        blocks[name] = VectorMemoryBlock(vector_store=store, embed_model=embedding, similarity_top_k=REMEMBERED)

    def recall(question: Question) -> None:
        message = ChatMessage(role="user", content=question.text)
        loop.run_until_complete(blocks[question.place].aget([message]))

    recall(first)
    load_tokenizer(reranking.model, ready)
    postprocessor = Watched(_load_postprocessor(reranking, RECALLED), RECALLED)
    for block in blocks.values():
        block.node_postprocessors = [postprocessor]

    def ask(question: Question) -> Facts:
        recall(question)
        return postprocessor.seen

    return ask


class Watched(BaseNodePostprocessor):
    """Remembers what a postprocessor was given, what it kept, and how long it took."""

    _inner: BaseNodePostprocessor | None
    _top_n: int
    _seen: Facts

    def __init__(self, inner: BaseNodePostprocessor | None, top_n: int) -> None:
        super().__init__()
        self._inner, self._top_n = inner, top_n

    def _postprocess_nodes(
        self, nodes: list[NodeWithScore], query_bundle: QueryBundle | None = None
    ) -> list[NodeWithScore]:
        started = perf_counter()
        kept = self._inner.postprocess_nodes(nodes, query_bundle) if self._inner else nodes[: self._top_n]
        seconds = perf_counter() - started
        self._seen = {"reranking_seconds": seconds, "kept": _ids(kept), "candidates": _ids(nodes)}
        return kept

    @property
    def seen(self) -> Facts:
        """What was seen last."""
        return self._seen


def _ids(nodes: list[NodeWithScore]) -> list[str]:
    return [node.metadata["id"] for node in nodes]


def _nodes(corpus: Corpus) -> list[BaseNode]:
    return [
        TextNode(
            id_=str(uuid.uuid5(uuid.NAMESPACE_OID, name)),  # Qdrant takes no other ids
            text=text,
            embedding=vector.tolist(),
            metadata={"id": name},
            excluded_embed_metadata_keys=["id"],
        )
        for (name, text), vector in zip(corpus.texts.items(), corpus.vectors, strict=True)
    ]


def _embedding(directory: Path) -> HuggingFaceEmbedding:
    settings = json.loads((directory / "config_sentence_transformers.json").read_text(encoding="utf-8"))
    return HuggingFaceEmbedding(
        model_name=str(directory), query_instruction=settings["prompts"]["query"], device="cpu"
    )


def _load_postprocessor(reranking: Reranking, top_n: int) -> BaseNodePostprocessor | None:
    common: dict[str, Any] = {"model": str(reranking.model), "device": "cpu", "top_n": top_n}
    if reranking.kind == "grating":
        return GratingRerank(**common, **reranking.options)
    if reranking.kind == "none":
        return None
    if (
        reranking.options
    ):  # LlamaIndex has no setting for the size of batches: one must reach for the class that it uses
        setattr(CrossEncoder, "predict", partialmethod(CrossEncoder.predict, **reranking.options))  # noqa: B010
    return SentenceTransformerRerank(**common)
