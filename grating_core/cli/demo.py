"""This is the command ``grating demo``."""

from __future__ import annotations

from statistics import median
from typing import TYPE_CHECKING, Literal

from grating_core.cli.options import BUNDLED
from grating_core.cli.output import show, tell
from grating_core.cli.tables import plain_table, ranking_table

if TYPE_CHECKING:
    from grating_core.results import RerankResult


def demo(query: str | None = None, top_k: int = 5, candidates: int = 50) -> None:
    """Answer a question from the Python language reference: BM25 picks 50 passages, the reranker returns 5.

    Args:
        query: Your own question about Python.
        candidates: The number of passages that BM25 picks.
    """
    from grating_core.demo import QUESTION, first_stage, load_passages

    query = query or QUESTION
    passages = load_passages()
    tell(f"Passages of the Python language reference: {len(passages)}. BM25 picks {candidates} ...")
    found = first_stage(query, passages, candidates)
    pruned = _measured("auto", query, found, top_k)
    full = _measured("off", query, found, top_k)
    show(f"\n{query}", style="bold")
    show(ranking_table(pruned[0]))
    table = plain_table("", "seconds", "compute share", f"same top {top_k}")
    winners = {ranked.index for ranked in full[0].ranking}
    for name, (result, seconds) in {"unpruned": full, "pruning='auto'": pruned}.items():
        same = len(winners & {ranked.index for ranked in result.ranking})
        table.add_row(name, f"{seconds:.3f}", f"{result.trace.compute_share:.2f}", f"{same} of {len(winners)}")
    show(table)


def _measured(
    pruning: Literal["auto", "off"], query: str, documents: list[str], top_k: int
) -> tuple[RerankResult, float]:
    """Return the result, and the median seconds of three runs after a warm-up."""
    from grating_core.reranker import Reranker

    with Reranker.from_pretrained(BUNDLED, pruning=pruning, show_progress=True) as reranker:
        tell(f"Reranking with pruning={pruning!r} ...")
        results = [reranker.rerank(query, documents, top_k) for _ in range(4)]
    return results[-1], median(result.trace.seconds for result in results[1:])
