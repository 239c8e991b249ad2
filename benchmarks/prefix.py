"""What is saved by computing the beginning that all prompts of a decoder have in common only once.

    .venv/bin/python -m benchmarks.prefix
    .venv/bin/python -m benchmarks.prefix --model DIRECTORY --rounds 9

The same random request is made with and without sharing, in turn, and nothing is pruned. The first of each kind is
not measured.
"""

from __future__ import annotations

from collections.abc import Callable
from statistics import median
from typing import Annotated, Any
from unittest.mock import patch

import torch
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks.shapes import find_or_write, random_texts
from grating_core import Reranker, RerankResult
from grating_core.engine.ragged import RaggedBatch

CANDIDATES = 20
DOCUMENT_TOKENS = 200
QUERY_TOKENS = 35  # with the prompt around it about 100

Rerank = Callable[[], RerankResult]


def without_sharing(rerank: Rerank) -> RerankResult:
    """Rerank with every prompt computed from its first token."""
    pack = RaggedBatch.pack

    def pack_apart(*arguments: Any, **options: Any) -> RaggedBatch:
        return pack(*arguments, **options | {"share_prefix": False})

    with patch.object(RaggedBatch, "pack", pack_apart):
        return rerank()


def measure(rerank: Rerank, rounds: int) -> tuple[list[RerankResult], list[RerankResult]]:
    """The results with and without sharing, made in turn so that a noisy machine is noisy for both."""
    rerank()
    without_sharing(rerank)
    pairs = [(rerank(), without_sharing(rerank)) for _ in track(range(rounds), "Measuring")]
    shared, apart = zip(*pairs, strict=True)
    return list(shared), list(apart)


def largest_difference(one: RerankResult, other: RerankResult) -> float:
    """Between the scores that two results give to the same document."""
    scores = {ranked.index: ranked.score for ranked in one.ranking}
    return max(abs(scores[ranked.index] - ranked.score) for ranked in other.ranking)


def computed(result: RerankResult) -> int:
    """Tokens computed in each layer."""
    return result.trace.layers[0].tokens


def main(
    model: Annotated[
        str, typer.Option(help="A decoder: qwen3-0.6b, -4b, -8b, hub id or directory.")
    ] = "qwen3-0.6b",
    rounds: Annotated[int, typer.Option(help="Runs of which the median is taken.")] = 5,
) -> None:
    """Measure and print the table."""
    directory = find_or_write(model)
    (query,) = random_texts(directory, 1, QUERY_TOKENS, seed=1)
    documents = random_texts(directory, CANDIDATES, DOCUMENT_TOKENS, seed=2)
    reranker = Reranker.from_pretrained(directory, pruning="off", device="cpu")
    shared, apart = measure(lambda: reranker.rerank(query, documents, CANDIDATES), rounds)

    trace: Any = shared[0].trace
    setting = f"{CANDIDATES} candidates of {DOCUMENT_TOKENS} tokens, {trace.shared_prefix} tokens in common"
    table = Table(title=f"{model}, {reranker.dtype}: {setting}, {torch.get_num_threads()} threads")
    for heading in ("prefix", "tokens per layer", "seconds"):
        table.add_column(heading, justify="left" if heading == "prefix" else "right")
    for name, results in (("computed for each candidate", apart), ("shared", shared)):
        seconds = median(result.trace.seconds for result in results)
        table.add_row(name, f"{computed(results[0]):,}", f"{seconds:.3f}")
    console = Console(width=115)
    console.print(table)
    saved = 1 - computed(shared[0]) / computed(apart[0])
    console.print(f"{saved:.1%} of the work of the linear layers saved.")
    console.print(f"Largest difference of a score: {largest_difference(shared[0], apart[0]):.2g}")


if __name__ == "__main__":
    typer.run(main)
