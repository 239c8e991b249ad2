"""Test collections in BEIR layout, and the first stage that every benchmark reranks."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path

import bm25s


@dataclass(frozen=True)
class Request:
    """A query and its first-stage candidates, best first.

    Attributes:
        query: The text of the query.
        documents: The texts of the candidates.
        relevant: Whether a person judged each candidate relevant.
        all_relevant: How many documents of the whole collection are relevant.
    """

    query: str
    documents: list[str]
    relevant: list[bool]
    all_relevant: int


def load_requests(directory: Path, *, candidates: int, queries: int, seed: int = 0) -> list[Request]:
    """Sample queries of a collection and let BM25 pick their candidates.

    Args:
        directory: Holds ``corpus.jsonl``, ``queries.jsonl`` and ``qrels/test.tsv``.
        candidates: Candidates per query.
        queries: How many queries; all, if there are fewer.
        seed: Of the sample.
    """
    corpus = _read_lines(directory / "corpus.jsonl")
    texts = [f"{entry['title']} {entry['text']}".strip() for entry in corpus]
    relevant: dict[str, set[str]] = {}
    for line in (directory / "qrels" / "test.tsv").read_text(encoding="utf-8").splitlines()[1:]:
        judged_query, document, grade = line.split("\t")
        if int(grade) > 0:
            relevant.setdefault(judged_query, set()).add(document)

    chosen = _read_lines(directory / "queries.jsonl")
    random.Random(seed).shuffle(chosen)
    index = bm25s.BM25()
    index.index(bm25s.tokenize(texts, show_progress=False), show_progress=False)
    requests = []
    for query in chosen[:queries]:
        tokens = bm25s.tokenize(query["text"], show_progress=False)
        found = index.retrieve(tokens, k=min(candidates, len(texts)), show_progress=False).documents[0]
        judged = relevant.get(query["_id"], set())
        requests.append(
            Request(
                query["text"],
                [texts[i] for i in found],
                [corpus[i]["_id"] in judged for i in found],
                len(judged),
            )
        )
    return requests


def _read_lines(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
