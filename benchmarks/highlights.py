"""What a document's best highlight is worth, and what finding highlights costs.

    .venv/bin/python -m benchmarks.highlights --data DIRECTORY

The directory holds the collections cranfield and cisi. The best documents of each request that have at least five
sentences are scored again by float32 without pruning, as a whole and without each sentence. A highlight is *right*
if no other sentence's removal costs the score more. The longest sentence is there for comparison, and the sentence
with the most of the query's words. The cost is the median, over the requests, of the seconds with highlights
divided by those without, asked for in turns.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mean, median
from time import perf_counter
from typing import Annotated

import typer
from tqdm import tqdm

from benchmarks.collections import Request, load_requests
from benchmarks.report import RESULTS, Output, Row, write_result
from grating_core import Reranker
from grating_core.results import RankedDocument
from grating_core.text.sentences import sentences

COLLECTIONS = ("cranfield", "cisi")
FEWEST = 5  # sentences
TOP_K = 5
Choose = Callable[[str, RankedDocument, Sequence[str]], int]
"""Chooses a sentence of a document: from the query, the document and its sentences."""


def highlighted(query: str, document: RankedDocument, parts: Sequence[str]) -> int:
    """Choose the best highlight."""
    if not document.highlights:
        return 0
    best, end = document.highlights[0], 0
    for number, part in enumerate(parts):
        end += len(part)
        if best.start < end:
            return number
    return len(parts) - 1


def longest(query: str, document: RankedDocument, parts: Sequence[str]) -> int:
    """Choose the longest sentence."""
    return max(range(len(parts)), key=lambda number: len(parts[number]))


def shared_words(query: str, document: RankedDocument, parts: Sequence[str]) -> int:
    """Choose the sentence with the most of the query's words."""
    asked = set(re.findall(r"\w+", query.lower()))
    return max(range(len(parts)), key=lambda number: len(asked & set(re.findall(r"\w+", parts[number].lower()))))


WAYS: dict[str, Choose] = {"highlight": highlighted, "most of the query's words": shared_words, "longest": longest}


def read_part(reranker: Reranker, query: str, text: str) -> str:
    """Return the beginning of a text that fits into the window with the query."""
    room = reranker.max_length - reranker.count_tokens(query) - 3
    while reranker.count_tokens(text) > room:
        text = text[: int(len(text) * 0.95)]
    return text


def find_costs(reranker: Reranker, requests: Sequence[Request], rounds: int) -> float:
    """Return the median of the seconds with highlights divided by those without."""
    ratios = []
    for request in tqdm(requests, "Timing"):
        seconds: dict[bool, list[float]] = {False: [], True: []}
        for _ in range(rounds):
            for wanted in random.sample((False, True), 2):
                started = perf_counter()
                reranker.rerank(request.query, request.documents, TOP_K, highlights=wanted)
                seconds[wanted].append(perf_counter() - started)
        ratios.append(median(seconds[True]) / median(seconds[False]))
    return median(ratios)


def judge(reranker: Reranker, exact: Reranker, requests: Sequence[Request]) -> list[dict[str, bool]]:
    """Tell, for each document of some length among the best, which ways chose the sentence that counts most."""
    found = []
    for request in tqdm(requests, "Removing sentences"):
        texts = [read_part(reranker, request.query, text) for text in request.documents]
        documents = reranker.rerank(request.query, texts, TOP_K, highlights=True).ranking
        for document in documents:
            text = document.text
            parts = [text[start:stop] for start, stop in sentences(text)]
            if len(parts) < FEWEST:
                continue
            without = ["".join(parts[:number] + parts[number + 1 :]) for number in range(len(parts))]
            scores = exact.score([(request.query, one) for one in without])
            found.append(
                {
                    name: scores[choose(request.query, document, parts)] <= min(scores)
                    for name, choose in WAYS.items()
                }
            )
    return found


def main(
    data: Annotated[Path, typer.Option(help=f"Holds {', '.join(COLLECTIONS)}, in BEIR layout.")],
    model: Annotated[str, typer.Option(help="Hub id, directory or bundled name.")] = "bundled:ms-marco-minilm-l12",
    queries: Annotated[int, typer.Option(help="Queries of each collection.")] = 30,
    rounds: Annotated[int, typer.Option(help="How often a request is timed in each way.")] = 7,
    output: Output = RESULTS,
) -> None:
    """Measure, and write the file of results."""
    rows: list[Row] = []
    with (
        Reranker.from_pretrained(model, device="cpu") as reranker,
        Reranker.from_pretrained(model, device="cpu", dtype="float32", pruning="off") as exact,
    ):
        for name in COLLECTIONS:
            requests = load_requests(data / name, candidates=20, queries=queries, seed=7)
            cost = find_costs(reranker, requests[: queries // 3], rounds)
            found = judge(reranker, exact, requests)
            right = {way: mean(one[way] for one in found) for way in WAYS}
            rows += [
                {
                    "collection": name,
                    "way": way,
                    "documents": len(found),
                    "right": right[way],
                    "seconds": cost if way == "highlight" else None,
                }
                for way in WAYS
            ]
    write_result(output, "highlights", rows, rounds=rounds, setting={"model": model, "queries": queries})


if __name__ == "__main__":
    typer.run(main)
