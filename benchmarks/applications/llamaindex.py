"""RAG and an agent's memory in LlamaIndex."""

from __future__ import annotations

import asyncio
import json
import uuid
from functools import partial
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

from benchmarks.applications.worker import Answer, Ask, Attach, Corpus, Job, Question, System
from benchmarks.collections import conversation

FOUND = 10  # by each retriever
TOP_N = 10

REMEMBERED = 20
RECALLED = 5


def rag(job: Job) -> Attach:
    """Hybrid RAG: BM25 and dense retrieval, fused by reciprocal ranks; the best of the union are kept."""
    corpus = job.corpus
    assert corpus
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
    retriever.retrieve(job.questions[0].text)  # warm up

    def attach(system: System) -> Ask:
        postprocessor = Watched(_load_postprocessor(system, job.model, TOP_N), TOP_N)

        def ask(question: Question) -> Answer:
            started = perf_counter()
            found = retriever.retrieve(question.text)
            postprocessor.postprocess_nodes(found, query_str=question.text)
            return postprocessor.answer(perf_counter() - started)

        return ask

    return attach


def memory(job: Job) -> Attach:
    """An agent's memory: a ``VectorMemoryBlock`` for each conversation, which recalls turns for a message."""
    corpus, loop = job.corpus, asyncio.new_event_loop()
    assert corpus
    client, embedding = AsyncQdrantClient(":memory:"), _embedding(corpus.embedder)
    blocks: dict[str, VectorMemoryBlock] = {}
    for name, turns in groupby(_nodes(corpus), key=lambda node: conversation(node.metadata["id"])):
        store = QdrantVectorStore(name, aclient=client)
        loop.run_until_complete(store.async_add(list(turns)))
        blocks[name] = VectorMemoryBlock(vector_store=store, embed_model=embedding, similarity_top_k=REMEMBERED)

    def recall(question: Question) -> None:
        message = ChatMessage(role="user", content=question.text)
        loop.run_until_complete(blocks[question.place].aget([message]))

    recall(job.questions[0])  # warm up

    def attach(system: System) -> Ask:
        postprocessor = Watched(_load_postprocessor(system, job.model, RECALLED), RECALLED)
        for block in blocks.values():
            block.node_postprocessors = [postprocessor]

        def ask(question: Question) -> Answer:
            started = perf_counter()
            recall(question)
            return postprocessor.answer(perf_counter() - started)

        return ask

    return attach


class Watched(BaseNodePostprocessor):
    """Remembers what a postprocessor was given, what it kept, and how long it took."""

    _inner: BaseNodePostprocessor | None
    _top_n: int
    _given: list[str]
    _kept: list[str]
    _seconds: float

    def __init__(self, inner: BaseNodePostprocessor | None, top_n: int) -> None:
        super().__init__()
        self._inner, self._top_n = inner, top_n

    def _postprocess_nodes(
        self, nodes: list[NodeWithScore], query_bundle: QueryBundle | None = None
    ) -> list[NodeWithScore]:
        self._given = _ids(nodes)
        started = perf_counter()
        kept = self._inner.postprocess_nodes(nodes, query_bundle) if self._inner else nodes[: self._top_n]
        self._seconds = perf_counter() - started
        self._kept = _ids(kept)
        return kept

    def answer(self, seconds: float) -> Answer:
        """What was seen last.

        Args:
            seconds: Of everything.
        """
        return Answer(self._kept, self._given, seconds - self._seconds, self._seconds)


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


def _load_postprocessor(system: System, model: Path, top_n: int) -> BaseNodePostprocessor | None:
    common: dict[str, Any] = {"model": str(model), "device": "cpu", "top_n": top_n}
    if system.kind == "grating":
        return GratingRerank(**common, **system.settings)
    if system.kind == "none":
        return None
    usual = SentenceTransformerRerank(**common)
    if "batch_size" in system.settings:  # LlamaIndex has no setting for it: one must reach for the model
        usual._model.predict = partial(usual._model.predict, **system.settings)
    return usual
