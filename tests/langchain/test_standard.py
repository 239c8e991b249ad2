"""langchain-tests on a retriever whose results GratingRerank selects."""

from functools import partial

import pytest
from langchain_classic.retrievers import ContextualCompressionRetriever
from langchain_grating import GratingRerank
from langchain_tests.integration_tests import RetrieversIntegrationTests


def compressing(reranker, base_retriever, k=5):
    """``k``: how many documents are kept; given to ``invoke``, the retriever below takes it."""
    return ContextualCompressionRetriever(
        base_compressor=GratingRerank(reranker=reranker, top_n=k), base_retriever=base_retriever
    )


class TestCompressionRetriever(RetrieversIntegrationTests):
    @pytest.fixture(autouse=True)
    def _parts(self, reranker, store):
        self.parts = {"reranker": reranker, "base_retriever": store.as_retriever(search_kwargs={"k": 6})}

    @property
    def retriever_constructor(self):
        return partial(compressing, **self.parts)

    @property
    def retriever_query_example(self):
        return "How many people live in Berlin?"
