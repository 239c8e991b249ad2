"""A small corpus, a vector store over it, and the real reranker."""

import pytest
from langchain_core.documents import Document
from langchain_core.embeddings import Embeddings
from langchain_core.vectorstores import InMemoryVectorStore

from tests.adapters import TEXTS, hashed_words, model, reranker, smollm2  # noqa: F401 - fixtures
from tests.tiny_chat import core, directory  # noqa: F401 - fixtures


class HashedWords(Embeddings):
    def embed_query(self, text):
        return hashed_words(text)

    def embed_documents(self, texts):
        return [hashed_words(text) for text in texts]


@pytest.fixture
def documents():
    return [
        Document(text, id=f"doc-{index}", metadata={"source": f"{index}.txt", "tags": ["a", {"n": index}]})
        for index, text in enumerate(TEXTS)
    ]


@pytest.fixture
def store(documents):
    store = InMemoryVectorStore(HashedWords())
    store.add_documents(documents)
    return store


@pytest.fixture
def retriever(store):
    return store.as_retriever(search_kwargs={"k": 6})
