"""The context selector: long documents cut down to a budget of tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from langchain_core.callbacks import Callbacks
from langchain_core.documents import BaseDocumentCompressor, Document
from langchain_core.runnables import RunnableLambda

from grating_core.context import Passage
from grating_core.forking import run_in_thread
from grating_core.frameworks.nested import copied
from grating_core.frameworks.requests import checked_items, position
from grating_core.frameworks.rerankers import SelectingFields
from langchain_grating.settings import RerankerSettings


class GratingContextSelector(SelectingFields, RerankerSettings, BaseDocumentCompressor):  # type: ignore[misc]
    """This class keeps the passages of long documents that answer the query best, within a budget of tokens.

    The documents are divided into chunks, the reranker judges them, and as many of the best are kept as fit. They
    come in the order of the documents and of the text, chunks that adjoin as one document. Each is a copy of the
    caller's document with the passage as its content, ``start_index`` in the metadata as text splitters write it,
    and ``relevance_score``. If everything fits, everything is returned, and there is no score.

    The budget is for the contents with blank lines between them, without what a prompt adds to each document.

    Example:
        .. code-block:: python

            selector = GratingContextSelector(model="bundled:ms-marco-minilm-l12", max_tokens=4000)
            retriever = ContextualCompressionRetriever(
                base_compressor=selector, base_retriever=vector_store.as_retriever()
            )
            chain = {"documents": retriever, "query": RunnablePassthrough()} | selector.as_runnable() | …
    """

    def compress_documents(
        self, documents: Sequence[Document], query: str, callbacks: Callbacks | None = None
    ) -> list[Document]:
        """Select passages.

        Args:
            documents: The texts; left as they are.
            query: The question; of one longer than half of what the model reads the end. After a blank one the
                beginning of the documents is kept, as much as fits, without a score.
            callbacks: Who is told of the run, beside those that listen to the run it is called from.

        Returns:
            The passages, in the order of the documents.

        Raises:
            ValueError: The query is no string, a document no Document, or chunks of this size are more than the
                model reads.
        """
        return self.as_runnable().invoke({"documents": documents, "query": query}, {"callbacks": callbacks})

    async def acompress_documents(
        self, documents: Sequence[Document], query: str, callbacks: Callbacks | None = None
    ) -> list[Document]:
        """:meth:`compress_documents` in a worker thread, so that the event loop goes on."""
        return await self.as_runnable().ainvoke({"documents": documents, "query": query}, {"callbacks": callbacks})

    def as_runnable(self) -> RunnableLambda[dict[str, Any], list[Document]]:
        """Return the selector as a step of a chain.

        Returns:
            A Runnable from ``{"documents": …, "query": …}``, where the documents are a list of them or simply one
            long text, to the passages.
        """
        return RunnableLambda(self._select, self._aselect, name=type(self).__name__)

    async def _aselect(self, given: dict[str, Any]) -> list[Document]:
        return await run_in_thread(self._select, given)

    def _select(self, given: dict[str, Any]) -> list[Document]:
        query, documents = given["query"], given["documents"]
        if isinstance(documents, str):
            documents = [Document(documents)]
        documents = checked_items("documents", documents, Document, "Document(text)")
        passages = self._passages(query, [document.page_content for document in documents])
        return [_cut(documents[passage.document], passage, self._score(passage)) for passage in passages]


def _cut(document: Document, passage: Passage, score: float | None) -> Document:
    metadata = copied(dict(document.metadata))
    # The document may itself have been cut out of a longer one.
    metadata["start_index"] = (position(metadata.get("start_index")) or 0) + passage.start
    if score is not None:
        metadata["relevance_score"] = score
    whole = passage.text == document.page_content
    known = {"page_content": passage.text, "id": document.id if whole else None, "metadata": metadata}
    return document.model_copy(update=known)
