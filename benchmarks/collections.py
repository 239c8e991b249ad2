"""Test collections in BEIR layout, and the first stage that finds what every benchmark reranks."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import bm25s

Search = Callable[[str, int], list[int]]
"""Gives the numbers of the best texts for a query, best first, as many as asked for."""


@dataclass(frozen=True)
class Request:
    """A query and its first-stage candidates, best first.

    Attributes:
        query: The text of the query.
        documents: The texts of the candidates.
        ids: Their names in the collection.
        grades: What people judged, of the whole collection: the grade by the document's id; above 0 is relevant.
    """

    query: str
    documents: list[str]
    ids: list[str]
    grades: dict[str, int]

    @property
    def all_relevant(self) -> int:
        """How many documents of the whole collection are relevant."""
        return sum(grade > 0 for grade in self.grades.values())

    def is_relevant(self, candidate: int) -> bool:
        """Whether a person judged this candidate relevant."""
        return self.grades.get(self.ids[candidate], 0) > 0


def bm25(texts: list[str]) -> Search:
    """Index texts for BM25, the usual first stage."""
    index = bm25s.BM25()
    index.index(bm25s.tokenize(texts, show_progress=False), show_progress=False)

    def search(query: str, count: int) -> list[int]:
        tokens = bm25s.tokenize(query, show_progress=False)
        return [int(i) for i in index.retrieve(tokens, k=count, show_progress=False).documents[0]]

    return search


@dataclass(frozen=True)
class Collection:
    """Texts, queries and what people judged.

    Attributes:
        name: Name of the collection.
        texts: Title and body of each text, by its id.
        queries: The queries, by their ids.
        grades: What people judged: the grade by query and text; above 0 is relevant.
    """

    name: str
    texts: dict[str, str]
    queries: dict[str, str]
    grades: dict[str, dict[str, int]]


def load_collection(directory: Path) -> Collection:
    """Read a collection.

    Args:
        directory: Holds ``corpus.jsonl``, ``queries.jsonl`` and ``qrels/test.tsv``.
    """
    corpus, queries = (_read_lines(directory / f"{name}.jsonl") for name in ("corpus", "queries"))
    grades: dict[str, dict[str, int]] = {}
    for line in (directory / "qrels" / "test.tsv").read_text(encoding="utf-8").splitlines()[1:]:
        query, text, grade = line.split("\t")
        grades.setdefault(query, {})[text] = int(grade)
    return Collection(
        directory.name,
        {entry["_id"]: f"{entry['title']} {entry['text']}".strip() for entry in corpus},
        {entry["_id"]: entry["text"] for entry in queries},
        grades,
    )


def conversation(name: str) -> str:
    """Return the conversation that a turn or a question of LoCoMo belongs to: its id begins with it."""
    return name.split("/")[0]


def load_requests(directory: Path, *, candidates: int, queries: int, seed: int = 0) -> list[Request]:
    """Sample queries of a collection and let BM25 pick their candidates.

    Args:
        directory: See :func:`load_collection`.
        candidates: Candidates per query.
        queries: How many queries; all, if there are fewer.
        seed: Seed of the sample.
    """
    collection = load_collection(directory)
    ids, texts = list(collection.texts), list(collection.texts.values())
    chosen = list(collection.queries.items())
    random.Random(seed).shuffle(chosen)
    search = bm25(texts)
    requests = []
    for name, query in chosen[:queries]:
        found = search(query, min(candidates, len(texts)))
        requests.append(
            Request(query, [texts[i] for i in found], [ids[i] for i in found], collection.grades.get(name, {}))
        )
    return requests


def _read_lines(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
