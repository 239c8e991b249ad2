"""This module makes requests for calibration from the user's own texts."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence

import numpy as np

from grating_core.requests import Request

_QUERY_WORDS = (4, 24)  # the fewest and the most words of a query that is made of a text
FEWEST_REQUESTS = 20
_LARGE = (10, 5)  # one request in so many is large, and has so many times the candidates


def make_requests(
    documents: Sequence[str],
    queries: Sequence[str] | None,
    *,
    candidates: int,
    count: int,
    seed: int = 0,
    fewest: int = FEWEST_REQUESTS,
    large: bool = False,
) -> list[Request]:
    """Make requests like those that will come: queries, each with the documents that share most words with it.

    Args:
        documents: The texts.
        queries: Real queries. None takes the title or leading sentence of documents, which then are not among
            the candidates themselves.
        candidates: Number of documents of each request.
        count: The most requests that are made.
        seed: Seed of the choice of queries.
        fewest: The fewest queries to choose from.
        large: Whether every tenth request has five times as many candidates, or as many as there are.

    Raises:
        ValueError: There are too few documents for that many candidates, or too few queries.
    """
    from sklearn.feature_extraction.text import TfidfVectorizer  # slow to import

    texts = list(documents)
    if len(texts) <= candidates:
        raise ValueError(
            f"documents has {len(texts)} texts, which is too few for requests of {candidates}: give "
            f"more than {candidates} texts, or make candidates smaller"
        )
    asked = _leading_sentences(texts) if queries is None else [(query, None) for query in queries if query.strip()]
    if len(asked) < fewest:
        purpose = " to fit a lens" if fewest == FEWEST_REQUESTS else ""
        raise ValueError(
            f"there are {len(asked)} queries, which is too few{purpose}: pass {fewest} or more, or "
            f"documents that begin with a title or sentence, from which queries can be made"
        )
    index = TfidfVectorizer(sublinear_tf=True)
    known = index.fit_transform(texts)
    requests = []
    every, times = _LARGE if large else (1, 1)
    for number, (query, source) in enumerate(random.Random(seed).sample(asked, min(count, len(asked)))):
        likeness = (known @ index.transform([query]).T).toarray()[:, 0]
        if source is not None:
            likeness[source] = -1
        size = candidates if number % every else min(times * candidates, len(texts) - 1)
        best = np.argsort(-likeness, kind="stable")[:size]
        requests.append(Request(query, [texts[i] for i in best]))
    return requests


def _leading_sentences(texts: Sequence[str]) -> list[tuple[str, int | None]]:
    """Return each text's beginning that could be a query, with the number of the text."""
    fewest, most = _QUERY_WORDS
    found: list[tuple[str, int | None]] = []
    for number, text in enumerate(texts):
        words = re.split(r"(?<=[.?!])\s|\n", text.strip(), maxsplit=1)[0].split()
        if len(words) >= fewest:
            found.append((" ".join(words[:most]), number))
    return found
