"""``grating rerank`` and ``grating explain``."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from grating_core.cli.options import AsJson, Input, InputOptions, Query, RankingOptions, TopK
from grating_core.cli.output import err, out, print_json
from grating_core.cli.tables import closing_line, ranking_table, trace_table
from grating_core.inputs import read_documents

if TYPE_CHECKING:
    from grating_core.results import RerankResult

Scores = Annotated[
    Literal["exact", "estimated"], typer.Option(help="exact, or estimated: sure winners stop early as well.")
]


def rerank(
    query: Query,
    input: Input,
    how_stored: InputOptions,
    settings: RankingOptions,
    top_k: TopK = 5,
    scores: Scores = "exact",
    as_json: AsJson = False,
) -> None:
    """Print the documents that answer a question best."""
    result = _run(settings, query, read_documents(input, **vars(how_stored)), top_k, scores)
    if as_json:
        print_json(_summary(query, result))
    else:
        out.print(ranking_table(result))
        out.print(closing_line(result), style="dim")


def explain(
    query: Query,
    input: Input,
    how_stored: InputOptions,
    settings: RankingOptions,
    top_k: TopK = 5,
    scores: Scores = "exact",
    as_json: AsJson = False,
    plot: Annotated[Path | None, typer.Option(help="Draw score trajectories into this picture.")] = None,
) -> None:
    """Like rerank, and show layer by layer how the ranking came about."""
    result = _run(settings, query, read_documents(input, **vars(how_stored)), top_k, scores)
    if plot is not None and result.trace.layers:
        from grating_core.plotting import plot_trajectories

        plot_trajectories(result, plot)
    if as_json:
        print_json(_summary(query, result) | {"layers": [asdict(layer) for layer in result.trace.layers]})
        return
    out.print(ranking_table(result))
    out.print(trace_table(result))
    out.print(closing_line(result), style="dim")


def _run(settings: RankingOptions, query: str, documents: list[str], top_k: int, scores: Scores) -> RerankResult:
    with err.status("Loading ..."):
        from grating_core.reranker import Reranker

        with Reranker.from_pretrained(**vars(settings), show_progress=True) as reranker:
            return reranker.rerank(query, documents, top_k, scores=scores)


def _summary(query: str, result: RerankResult) -> dict[str, Any]:
    ranking = [asdict(ranked) for ranked in result.ranking]
    return {"query": query, "ranking": ranking, **result.trace.summary()}
