"""This is the command ``grating calibrate``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from grating_core.cli.options import InputOptions, Takes
from grating_core.cli.output import show
from grating_core.cli.qrels import judged_candidates
from grating_core.cli.tables import plain_table
from grating_core.settings import RerankSettings


def calibrate(
    settings: Annotated[
        RerankSettings, Takes(without=("engine", "pruning", "guarantee", "lens", "long_documents"))
    ],
    corpus: list[Path],
    how_stored: InputOptions,
    queries: list[Path] | None = None,
    qrels: list[Path] | None = None,
    id_field: str | None = None,
    directory: Path | None = None,
    candidates: int = 20,
    requests: int = 600,
    top_k: int = 5,
    seed: int = 0,
) -> None:
    """Fit a lens to a model on your own texts, so that it prunes early and keeps what it promises.

    Args:
        corpus: A file of documents. Several may be given, one for each kind of text.
        queries: A file of queries for each corpus, in their order.
        qrels: A file of judgements for each corpus, in their order, by which probabilities are fitted as well. A
            line has the ids of a query and of a document, and a grade, which is relevant above 0.
        id_field: The JSON field or CSV column of the ids in qrels. The default is _id, or id.
        directory: The directory for the lens. The default is grating's cache.
        requests: The number of requests to compute, all corpora together.
        top_k: The number of best documents for which the summary says what is kept.
        seed: The seed of the choice of queries.
    """
    if queries and len(queries) != len(corpus):
        raise ValueError(f"there are {len(queries)} files of queries for {len(corpus)} of documents")
    if qrels and not len(qrels) == len(corpus) == len(queries or ()):
        raise ValueError(
            f"there are {len(qrels)} files of qrels for {len(corpus)} of documents with their queries"
        )
    documents = {str(path): how_stored.documents(path) for path in corpus}
    asked = {str(path): how_stored.documents(file) for path, file in zip(corpus, queries or (), strict=False)}
    judgements = [
        judged
        for files in zip(corpus, queries or (), qrels or (), strict=False)
        for judged in judged_candidates(*files, how_stored, id_field, candidates)
    ]
    from grating_core.reranker import Reranker

    with Reranker.open(settings) as reranker:
        found = reranker.calibrate(
            documents,
            asked,
            top_k=top_k,
            candidates=candidates,
            requests=requests,
            judgements=judgements if qrels else None,
            output=directory,
            seed=seed,
            show_progress=True,
        )
        fitted = reranker.fitted_probability
    summary = found.summary
    table = plain_table("layer", "γ of its estimates")
    for layer, gamma in enumerate(summary.gammas):
        table.add_row(str(layer), f"{gamma:.2f}")
    show(table)
    show(
        f"Fitted on {summary.requests} requests. With {summary.candidates} candidates that a lens has not seen, "
        f"top {summary.top_k}, target {summary.target:.2f}: compute share {summary.compute_share:.2f}, "
        f"{summary.agreement:.1%} of the full model's top {summary.top_k} kept."
    )
    if summary.compute_share == 1:
        show(
            f"That is: nothing will be pruned. {summary.requests} requests are evidence for a target of "
            f"{1 - 1 / (summary.requests + 1):.3f} at most: take more --requests, or a lower --target."
        )
    if found.int8 is not None:
        alone, recounted = (
            ", ".join(f"{share:.1%} of the top {top_k}" for top_k, share in agreement.items())
            for agreement in (found.int8.agreement, found.int8.recounts.agreement)
        )
        show(f"In 8 bits the model itself keeps {alone}; with recounts, {recounted}.")
    if qrels and fitted is not None:
        show(f"Probabilities were fitted to {fitted.pairs:,} judged texts, {fitted.relevant:,} of them relevant.")
    show(f"The lens is in {directory}." if directory else "From now on pruning='auto' finds it for this model.")
