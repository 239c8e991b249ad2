"""What pruning saves and what it loses, on real collections.

    .venv/bin/python -m benchmarks.pruning --data ../shared/data/cranfield --data ../shared/data/cisi \
        --data ../shared/data/locomo

Every policy reranks BM25's top candidates of the same queries; the unpruned run is the reference. Agreement is the
share of the unpruned top K that a policy returns too; precision counts documents that people judged relevant.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks.collections import Request, load_requests
from grating_core import ClusterPolicy, Off, PruningPolicy, Reranker, RerankResult

POLICIES: dict[str, str | PruningPolicy] = {
    "off": Off(),
    "auto": "auto",
    "cluster": "cluster",
    "cluster, threshold 1, 3 clusters": ClusterPolicy(1.0, 3),
}


def precision(result: RerankResult, request: Request) -> float:
    """Relevant among the top K, of as many as could be: Precision@K as in the GRATING paper."""
    found = sum(request.relevant[ranked.index] for ranked in result.ranking)
    return found / max(1, min(len(result.ranking), request.all_relevant))


def main(
    data: Annotated[list[Path], typer.Option(help="A collection in BEIR layout; may be given several times.")],
    model: Annotated[str, typer.Option(help="Hub id, directory or bundled name.")] = "bundled:ms-marco-minilm-l12",
    candidates: Annotated[int, typer.Option(help="Candidates per query.")] = 20,
    top_k: Annotated[int, typer.Option(help="How many are wanted.")] = 5,
    queries: Annotated[int, typer.Option(help="Queries per collection.")] = 25,
) -> None:
    """Measure and print the table."""
    rerankers = {
        name: Reranker.from_pretrained(model, pruning=policy, show_progress=True)
        for name, policy in POLICIES.items()
    }
    table = Table(title=f"{model}: {candidates} candidates, K={top_k}, {queries} queries each")
    for heading in ("collection", "scores", "pruning", "compute share", f"agreement@{top_k}", f"P@{top_k}"):
        table.add_column(heading)
    for directory in data:
        requests = load_requests(directory, candidates=candidates, queries=queries)
        for scores in ("exact", "estimated"):
            results: dict[str, list[RerankResult]] = {name: [] for name in rerankers}
            for request in track(requests, f"{directory.name}, {scores}"):
                for name, reranker in rerankers.items():
                    results[name].append(reranker.rerank(request.query, request.documents, top_k, scores=scores))
            winners = {name: [{r.index for r in one.ranking} for one in found] for name, found in results.items()}
            for name, found in results.items():
                kept = [len(a & b) / len(b) for a, b in zip(winners[name], winners["off"], strict=True)]
                table.add_row(
                    directory.name,
                    scores,
                    name,
                    f"{np.mean([result.trace.compute_share for result in found]):.3f}",
                    f"{np.mean(kept):.3f}",
                    f"{np.mean([precision(a, b) for a, b in zip(found, requests, strict=True)]):.3f}",
                )
        table.add_section()
    Console(width=115).print(table)


if __name__ == "__main__":
    typer.run(main)
