"""A small corpus, a vector store over it, and the real reranker."""

from hashlib import blake2b

import pytest
from langchain_core.documents import Document
from langchain_core.embeddings import Embeddings
from langchain_core.vectorstores import InMemoryVectorStore

from grating_core import Reranker

MODEL = "bundled:ms-marco-minilm-l12"
TEXTS = [
    "Berlin has a population of 3.7 million people registered in the city.",
    "Berlin is well known for its museums and its club scene.",
    "The population of New York City was 8.8 million in 2020.",
    "Bread rises because yeast turns sugar into carbon dioxide.",
    "A city is a large human settlement with many people.",
    "How many people live somewhere is counted in a census.",
    "The Spree flows through Berlin before it joins the Havel.",
    "Photosynthesis turns carbon dioxide and water into sugar.",
]


class HashedWords(Embeddings):
    """Bag of words, hashed into 64 buckets: deterministic, and texts that share words are close."""

    def embed_query(self, text):
        vector = [0.0] * 64
        for word in text.lower().split():
            vector[blake2b(word.encode()).digest()[0] % 64] += 1.0
        return vector

    def embed_documents(self, texts):
        return [self.embed_query(text) for text in texts]


@pytest.fixture(scope="session")
def model():
    return MODEL


@pytest.fixture(scope="session")
def reranker():
    with Reranker.from_pretrained(MODEL) as reranker:
        yield reranker


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
