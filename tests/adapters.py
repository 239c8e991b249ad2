"""What the tests of both adapters share: a small corpus, the real reranker, bad settings, and a watched pool."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from hashlib import blake2b
from typing import Any

import pytest

from benchmarks.shapes import find_or_write
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
BAD_RERANKING = [
    ("top_n", 0),
    ("top_n", -1),
    ("top_n", "many"),
    ("score_threshold", float("nan")),
    ("score_threshold", float("inf")),
    ("score_threshold", "high"),
    ("scores", "guessed"),
    ("deadline", 0),
    ("deadline", float("nan")),
    ("deadline", "soon"),
    ("pruning", "wild"),
    ("device", "abacus"),
    ("dtype", "float3"),
    ("memory_budget", "a lot"),
    ("target", 1.5),
    ("guarantee", "most"),
    ("recalibrate", 2.0),
    ("reranker", "ready"),
    ("top_k", 3),
]
BAD_SELECTING = [("max_tokens", 0), ("max_tokens", "many"), ("chunk_tokens", 0), ("count_tokens", 3), ("top_n", 3)]


def hashed_words(text: str) -> list[float]:
    """Return a bag of words, hashed into 64 buckets: deterministic, and texts that share words are close."""
    vector = [0.0] * 64
    for word in text.lower().split():
        vector[blake2b(word.encode()).digest()[0] % 64] += 1.0
    return vector


class Watched(ThreadPoolExecutor):
    "The event loop's own pool, which everybody's `to_thread` shares: whoever fills it makes others wait."

    def __init__(self) -> None:
        super().__init__(1)
        self.given: list[Any] = []

    def submit(self, call: Any, /, *args: Any, **kwargs: Any) -> Any:
        self.given.append(call)
        return super().submit(call, *args, **kwargs)


@pytest.fixture(scope="session")
def model() -> str:
    return MODEL


@pytest.fixture(scope="session")
def reranker() -> Iterator[Reranker]:
    with Reranker.from_pretrained(MODEL) as reranker:
        yield reranker


@pytest.fixture(scope="session")
def smollm2() -> str:
    try:
        return str(find_or_write("smollm2-135m"))
    except FileNotFoundError as error:
        pytest.skip(str(error))
