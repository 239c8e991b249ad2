"""The document compressor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from numbers import Integral
from typing import Any

from langchain_core.callbacks import Callbacks
from langchain_core.documents import BaseDocumentCompressor, Document
from langchain_core.runnables import RunnableConfig, RunnableLambda
from pydantic import Field

from grating_core import RerankResult
from grating_core.arguments import elements
from grating_core.frameworks.nested import copied
from grating_core.frameworks.requests import checked_items, is_blank
from grating_core.frameworks.rerankers import HIGHLIGHTS, RankingFields
from grating_core.results import RankedDocument
from langchain_grating.settings import RerankerSettings


class GratingRerank(RankingFields, RerankerSettings, BaseDocumentCompressor):  # type: ignore[misc]
    """This class keeps the ``top_n`` documents that answer the query best, best first.

    Each is a copy of the caller's document with ``relevance_score`` in its metadata, a probability, and
    ``relevance_score_estimated`` where the score is an estimate (with ``scores="estimated"``, or when
    a ``deadline`` came early). With ``highlights=True`` there are the sentences that carried the score as well.

    In LangChain's callbacks it is a chain of its own name, within whatever run it is called from, whose outputs
    are the documents and the ``trace``: :meth:`grating_core.Trace.summary`.

    Example:
        .. code-block:: python

            compressor = GratingRerank(model="bundled:ms-marco-minilm-l12", top_n=3)
            retriever = ContextualCompressionRetriever(
                base_compressor=compressor, base_retriever=vector_store.as_retriever(search_kwargs={"k": 20})
            )
    """

    top_n: int | None = Field(
        default=3, ge=1, description="How many documents are kept. None keeps all, in their new order."
    )
    prefix_metadata: str = Field(
        default="", description="The beginning of the names of the metadata that are written."
    )

    def compress_documents(
        self, documents: Sequence[Document], query: str, callbacks: Callbacks | None = None
    ) -> list[Document]:
        """Rerank the documents.

        Args:
            documents: The candidates; left as they are.
            query: The question. A blank one ranks nothing: the first ``top_n`` come back, without a score.
            callbacks: Who is told of the run; None for those of the run that it is called from.

        Returns:
            Copies of the best ``top_n``, best first.

        Raises:
            ValueError: The query is no string, or a document no Document; the message says what to write.
        """
        given = {"query": query, "documents": documents}
        kept: list[Document] = self._run.invoke(given, self._config(callbacks))["documents"]
        return kept

    async def acompress_documents(
        self, documents: Sequence[Document], query: str, callbacks: Callbacks | None = None
    ) -> list[Document]:
        """:meth:`compress_documents` without blocking the event loop; cancelled, it stops computing."""
        given = {"query": query, "documents": documents}
        kept: list[Document] = (await self._run.ainvoke(given, self._config(callbacks)))["documents"]
        return kept

    def rerank(
        self,
        documents: Sequence[str | Document | Mapping[str, Any]],
        query: str,
        *,
        rank_fields: Sequence[str] | None = None,
        top_n: int | None = -1,
    ) -> list[dict[str, Any]]:
        """Rank documents as the method of this name of ``CohereRerank`` and ``JinaRerank`` does.

        Args:
            documents: Texts, documents, or mappings, of which a line per field is read.
            query: The question. After a blank one the first come back, with None as their score.
            rank_fields: The fields of mappings to read, in this order; None for all.
            top_n: How many to return; None for all, -1 for the object's ``top_n``.

        Returns:
            For each of the best its ``index`` in ``documents`` and ``relevance_score``, best first.

        Raises:
            ValueError: The query is no string, a document is none of these, or ``top_n`` is none of these.
        """
        if top_n is not None and (not isinstance(top_n, int | Integral) or (top_n < 1 and top_n != -1)):
            raise ValueError(f"top_n={top_n!r} must be 1 or more, None for all, or -1 for the object's")
        listed = elements(
            "documents", documents, "a list of texts, Documents or dictionaries", values="{name}.values()"
        )
        texts = [_text(document, rank_fields) for document in listed]
        wanted = self.top_n if top_n == -1 else top_n
        if is_blank(query):
            return [{"index": index, "relevance_score": None} for index in range(len(texts))][:wanted]
        ranking = self._ranked(query, texts, wanted).ranking
        return [{"index": ranked.index, **self._scores(ranked)} for ranked in ranking]

    @property
    def _run(self) -> RunnableLambda[dict[str, Any], dict[str, Any]]:
        # A Runnable tells the callbacks of inputs, outputs and errors, and finds the run that it is called from.
        return RunnableLambda(self._compress, self._acompress, name=type(self).__name__)

    def _config(self, callbacks: Callbacks | None) -> RunnableConfig:
        return {"callbacks": callbacks, "metadata": {"model": self.model, "top_n": self.top_n}}

    def _compress(self, given: dict[str, Any]) -> dict[str, Any]:
        query, documents = _checked(given)
        if is_blank(query):
            return self._unranked(documents)
        return self._outputs(documents, self._ranked(query, _texts(documents), self.top_n))

    async def _acompress(self, given: dict[str, Any]) -> dict[str, Any]:
        query, documents = _checked(given)
        if is_blank(query):
            return self._unranked(documents)
        return self._outputs(documents, await self._aranked(query, _texts(documents), self.top_n))

    def _outputs(self, documents: list[Document], result: RerankResult) -> dict[str, Any]:
        kept = [
            self._with_scores(documents[ranked.index], {**self._scores(ranked), **self._highlights(ranked)})
            for ranked in result.ranking
        ]
        return {"documents": kept, "trace": result.trace.summary()}

    def _unranked(self, documents: list[Document]) -> dict[str, Any]:
        """Return what there is without a question: nothing was judged."""
        return {
            "documents": [self._with_scores(document, {}) for document in documents[: self.top_n]],
            "trace": None,
        }

    def _scores(self, ranked: RankedDocument) -> dict[str, float]:
        """Return the metadata of a score. Only an estimate is marked."""
        marks = {"relevance_score_estimated": True} if ranked.estimated else {}
        return {"relevance_score": self._score(ranked), **marks}

    def _with_scores(self, document: Document, scores: Mapping[str, Any]) -> Document:
        metadata = copied(dict(document.metadata))
        for name in ("relevance_score", "relevance_score_estimated", HIGHLIGHTS):  # an earlier reranking's
            metadata.pop(f"{self.prefix_metadata}{name}", None)
        metadata |= {f"{self.prefix_metadata}{name}": value for name, value in scores.items()}
        return document.model_copy(update={"metadata": metadata})


def _checked(given: Mapping[str, Any]) -> tuple[str, list[Document]]:
    return given["query"], checked_items("documents", given["documents"], Document, "Document(text)")


def _texts(documents: list[Document]) -> list[str]:
    return [document.page_content for document in documents]


def _text(document: str | Document | Mapping[str, Any], fields: Sequence[str] | None) -> str:
    if isinstance(document, Document):
        return document.page_content
    if isinstance(document, Mapping):
        names = document if fields is None else [name for name in fields if name in document]
        return "\n".join(f"{name}: {document[name]}" for name in names)
    return document
