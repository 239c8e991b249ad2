"""RAG and the choice of a context in LangChain."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from time import perf_counter

from langchain_classic.retrievers import EnsembleRetriever
from langchain_classic.retrievers.document_compressors import CrossEncoderReranker
from langchain_community.cross_encoders import HuggingFaceCrossEncoder
from langchain_community.retrievers import BM25Retriever
from langchain_core.documents import BaseDocumentCompressor, Document
from langchain_grating import GratingContextSelector, GratingRerank
from langchain_huggingface import HuggingFaceEmbeddings
from langchain_qdrant import QdrantVectorStore
from qdrant_client import QdrantClient
from qdrant_client.models import Distance, VectorParams
from semantic_text_splitter import TextSplitter
from tokenizers import Tokenizer

from benchmarks.applications import Corpus, Question, Reranking, Span, load_tokenizer
from benchmarks.worker import Ask, Facts, Ready

FOUND = 10  # by each retriever
TOP_N = 10

MAX_TOKENS = 1500  # of what is selected from a long text
CHUNK_TOKENS = 256
SEPARATOR = "[…]"  # between passages that do not adjoin

Select = Callable[[str, str], list[Span]]
"""Gives where the passages of a text that go into the prompt begin and end, for a query."""


def rag(ready: Ready, *, corpus: Corpus, first: Question, reranking: Reranking) -> Ask:
    """Load hybrid RAG: BM25 and dense retrieval, fused by reciprocal ranks; the best of the union are kept.

    The first question warms it up.
    """
    documents = [Document(page_content=text, metadata={"id": name}) for name, text in corpus.texts.items()]
    sparse = BM25Retriever.from_documents(documents, k=FOUND)
    dense = _vector_store(corpus).as_retriever(search_kwargs={"k": FOUND})
    retriever = EnsembleRetriever(retrievers=[sparse, dense], weights=[0.5, 0.5], id_key="id")
    retriever.invoke(first.text)
    load_tokenizer(reranking.model, ready)
    compressor = _load_compressor(reranking)

    def ask(question: Question) -> Facts:
        found = retriever.invoke(question.text)
        retrieved = perf_counter()
        kept = compressor.compress_documents(found, question.text) if compressor else found[:TOP_N]
        return {
            "reranking_seconds": perf_counter() - retrieved,
            "kept": [document.metadata["id"] for document in kept],
            "candidates": [document.metadata["id"] for document in found],
        }

    return ask


def long_context(ready: Ready, *, reranking: Reranking) -> Ask:
    """Load what says which parts of a long text go into the prompt: its beginning, or the best of its chunks."""
    tokenizer = Tokenizer.from_file(str(reranking.model / "tokenizer.json"))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    load_tokenizer(reranking.model, ready)
    select = _load_selection(reranking, tokenizer)

    def ask(question: Question) -> Facts:
        started = perf_counter()
        kept = select(question.text, question.place)
        return {"reranking_seconds": perf_counter() - started, "kept": kept, "candidates": []}

    return ask


def _load_selection(reranking: Reranking, tokenizer: Tokenizer) -> Select:
    if reranking.kind == "usual":
        return _best_chunks(
            CrossEncoderReranker(model=_cross_encoder(reranking.model, **reranking.options)), tokenizer
        )
    if reranking.kind == "grating":
        return _selector(
            GratingContextSelector(
                model=str(reranking.model),
                device="cpu",
                max_tokens=MAX_TOKENS,
                chunk_tokens=CHUNK_TOKENS,
                **reranking.options,
            )
        )
    return lambda query, text: [(0, tokenizer.encode(text, add_special_tokens=False).offsets[:MAX_TOKENS][-1][1])]


def _best_chunks(reranker: CrossEncoderReranker, tokenizer: Tokenizer) -> Select:
    """As one would build it: divide the text as grating does, and keep the best chunks for which there is room."""
    splitter = TextSplitter.from_huggingface_tokenizer(tokenizer, CHUNK_TOKENS)

    def count(text: str) -> int:
        return len(tokenizer.encode(text, add_special_tokens=False))

    def select(query: str, text: str) -> list[Span]:
        chunks = [Document(chunk, metadata={"start": start}) for start, chunk in splitter.chunk_indices(text)]
        reranker.top_n = len(chunks)
        kept: list[Span] = []
        used = 0
        for chunk in reranker.compress_documents(chunks, query):
            tokens = count(chunk.page_content) + (count(SEPARATOR) if kept else 0)
            if used + tokens <= MAX_TOKENS:
                used += tokens
                kept.append(_span(chunk, chunk.metadata["start"]))
        return kept

    return select


def _selector(selector: GratingContextSelector) -> Select:
    def select(query: str, text: str) -> list[Span]:
        passages = selector.compress_documents([Document(text)], query)
        return [_span(passage, passage.metadata["start_index"]) for passage in passages]

    return select


def _span(passage: Document, start: int) -> Span:
    return start, start + len(passage.page_content)


def _cross_encoder(
    model: Path, *, batch_size: int | None = None, dtype: str | None = None
) -> HuggingFaceCrossEncoder:
    """Load the usual model of LangChain's ``CrossEncoderReranker``.

    Args:
        model: Directory of the reranker.
        batch_size: Pairs at a time. LangChain has no setting for it: who wants another than sentence-transformers'
            32 must reach for the client.
        dtype: Of the weights; by default that of the file.
    """
    loading = {"dtype": dtype} if dtype else {}
    encoder = HuggingFaceCrossEncoder(
        model_name=str(model), model_kwargs={"device": "cpu", "model_kwargs": loading}
    )
    if batch_size:
        encoder.client.predict = partial(encoder.client.predict, batch_size=batch_size)
    return encoder


def _load_compressor(reranking: Reranking) -> BaseDocumentCompressor | None:
    if reranking.kind == "usual":
        return CrossEncoderReranker(model=_cross_encoder(reranking.model, **reranking.options), top_n=TOP_N)
    if reranking.kind == "grating":
        return GratingRerank(model=str(reranking.model), device="cpu", top_n=TOP_N, **reranking.options)
    return None


def _vector_store(corpus: Corpus) -> QdrantVectorStore:
    client = QdrantClient(":memory:")
    size = VectorParams(size=corpus.vectors.shape[1], distance=Distance.COSINE)
    client.create_collection("texts", vectors_config=size)
    payloads = [{"page_content": text, "metadata": {"id": name}} for name, text in corpus.texts.items()]
    client.upload_collection("texts", vectors=corpus.vectors, payload=payloads)
    embeddings = HuggingFaceEmbeddings(
        model_name=str(corpus.embedder),
        model_kwargs={"device": "cpu"},
        query_encode_kwargs={"prompt_name": "query"},
    )
    return QdrantVectorStore(client, "texts", embedding=embeddings)
