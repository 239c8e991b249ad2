"""``grating calibrate``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from grating_core.cli.inputs import read_documents
from grating_core.cli.options import Candidates, InputOptions, Takes, TopK
from grating_core.cli.output import show
from grating_core.cli.tables import plain_table
from grating_core.settings import RerankSettings


def calibrate(
    corpus: Annotated[
        list[Path], typer.Option(help="A file of documents. Several may be given, one for each kind of text.")
    ],
    how_stored: InputOptions,
    settings: Annotated[RerankSettings, Takes(without=("pruning", "guarantee", "lens", "long_documents"))],
    queries: Annotated[
        list[Path] | None, typer.Option(help="A file of queries for each corpus, in their order.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="The directory for the lens. The default is grating's cache.")
    ] = None,
    candidates: Candidates = 20,
    requests: Annotated[int, typer.Option(help="The number of requests to compute, all corpora together.")] = 600,
    top_k: TopK = 5,
    seed: Annotated[int, typer.Option(help="The seed of the choice of queries.")] = 0,
) -> None:
    """Fit a lens to a model on your own texts, so that it prunes early and keeps what it promises."""
    if queries and len(queries) != len(corpus):
        raise ValueError(f"there are {len(queries)} files of queries for {len(corpus)} of documents")
    how = how_stored.reading
    documents = {str(path): read_documents(str(path), **how) for path in corpus}
    asked = {
        str(path): read_documents(str(file), **how) for path, file in zip(corpus, queries or (), strict=False)
    }
    from grating_core.reranker import Reranker

    with Reranker.open(settings) as reranker:
        found = reranker.calibrate(
            documents,
            asked,
            top_k=top_k,
            candidates=candidates,
            requests=requests,
            output=output,
            seed=seed,
            show_progress=True,
        )
    summary = found.summary
    table = plain_table("layer", "γ of its estimates")
    for layer, gamma in enumerate(summary.gammas):
        table.add_row(str(layer), f"{gamma:.2f}")
    show(table)
    show(
        f"Fitted on {summary.fitted} requests. On {summary.measured} others with {summary.candidates} candidates, "
        f"top {summary.top_k}, target {summary.target:.2f}: compute share {summary.compute_share:.2f}, "
        f"{summary.agreement:.1%} of the full model's top {summary.top_k} kept."
    )
    if summary.compute_share == 1:
        show(
            f"That is: nothing will be pruned. {summary.measured} requests are evidence for a target of "
            f"{1 - 1 / (summary.measured + 1):.3f} at most: take more --requests, or a lower --target."
        )
    show(f"The lens is in {output}." if output else "From now on pruning='auto' finds it for this model.")
