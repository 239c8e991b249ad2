"""``grating calibrate``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from grating_core.cli.inputs import read_documents
from grating_core.cli.options import InputOptions, Instruction, ModelName, ModelOptions, Target, TemplateName, TopK
from grating_core.cli.output import show
from grating_core.cli.tables import plain_table


@dataclass(frozen=True, kw_only=True)
class CalibratedOptions(ModelOptions):
    """Those arguments of :meth:`Reranker.from_pretrained` that concern a dense model."""

    template: TemplateName = None
    instruction: Instruction = None
    target: Target = 0.98


def calibrate(
    model: ModelName,
    corpus: Annotated[list[Path], typer.Option(help="File of documents; several for several kinds of text.")],
    how_stored: InputOptions,
    settings: CalibratedOptions,
    queries: Annotated[list[Path] | None, typer.Option(help="File of queries for each corpus, in order.")] = None,
    output: Annotated[Path | None, typer.Option(help="Where the lens goes; grating's cache by default.")] = None,
    candidates: Annotated[int, typer.Option(help="Documents of a request.")] = 20,
    requests: Annotated[int, typer.Option(help="Requests to compute, all corpora together.")] = 600,
    top_k: TopK = 5,
    seed: Annotated[int, typer.Option(help="Of the choice of queries.")] = 0,
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

    with Reranker.from_pretrained(model, **vars(settings), show_progress=True) as reranker:
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
