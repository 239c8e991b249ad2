"""The document compressor."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from langchain_core.callbacks import Callbacks
from langchain_core.documents import BaseDocumentCompressor, Document
from pydantic import Field

from grating_core import RankedDocument
from langchain_grating.settings import RerankerSettings


class GratingRerank(RerankerSettings, BaseDocumentCompressor):
    """Keeps the ``top_n`` documents that answer the query best, best first.

    Each is a copy of the caller's document with ``relevance_score`` in its metadata, and
    ``relevance_score_estimated`` where the score is an estimate (only with ``scores="estimated"``).

    Example:
        .. code-block:: python

            compressor = GratingRerank(model="bundled:ms-marco-minilm-l12", top_n=3)
            retriever = ContextualCompressionRetriever(
                base_compressor=compressor, base_retriever=vector_store.as_retriever(search_kwargs={"k": 20})
            )
    """

    top_n: int = Field(default=3, ge=1, description="How many documents to keep.")
    scores: Literal["exact", "estimated"] = Field(
        default="exact",
        description="'exact': as the full model's. 'estimated': sure winners stop early, which is faster.",
    )

    def compress_documents(
        self, documents: Sequence[Document], query: str, callbacks: Callbacks | None = None
    ) -> list[Document]:
        """Rerank the documents.

        Args:
            documents: The candidates; left as they are.
            query: The question; not empty.
            callbacks: Not used.

        Returns:
            Copies of the best ``top_n``, best first.

        Raises:
            ValueError: The query is empty.
        """
        texts = [document.page_content for document in documents]
        result = self.reranker.rerank(query, texts, self.top_n, scores=self.scores)
        return [_with_score(documents[ranked.index], ranked) for ranked in result.ranking]

    async def acompress_documents(
        self, documents: Sequence[Document], query: str, callbacks: Callbacks | None = None
    ) -> list[Document]:
        """:meth:`compress_documents` without blocking the event loop."""
        texts = [document.page_content for document in documents]
        result = await self.reranker.arerank(query, texts, self.top_n, scores=self.scores)
        return [_with_score(documents[ranked.index], ranked) for ranked in result.ranking]


def _with_score(document: Document, ranked: RankedDocument) -> Document:
    metadata = {**document.metadata, "relevance_score": ranked.score}
    metadata.pop("relevance_score_estimated", None)  # an earlier reranking's
    if ranked.estimated:
        metadata["relevance_score_estimated"] = True
    return document.model_copy(update={"metadata": metadata})
