"""What pruned MLPs do to reranking: agreement with the dense model, judgements, time, and bytes read.

    .venv/bin/python -m benchmarks.dip_rerank --adapter DIRECTORY --data DIRECTORY --data DIRECTORY

SmolLM2-135M-Instruct with a reranker's LoRA adapter, which asks for the template below. BM25's top 20 of each
query are reranked by the dense model and at each density: with all columns in memory, and within a budget that
holds half of them. Pruning of candidates is off, so that nothing else differs.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, median
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from benchmarks.collections import Request, load_requests
from benchmarks.shapes import find_or_write
from grating_core import BudgetError, Prompt, Reranker
from grating_core.reranker import plan_memory
from grating_core.results import RerankResult

TEMPLATE = Prompt(
    pieces=(
        '<|im_start|>system\nJudge whether the Document is relevant to the Query. Answer only "yes" or "no".'
        "<|im_end|>\n<|im_start|>user\n<Query>: {query}\n<Document>: ",
        "{document}",
        "<|im_end|>\n<|im_start|>assistant\n",
    ),
)
TOP_K = 5
CANDIDATES = 20
MAX_LENGTH = 640
DENSE = "dense"

console = Console(width=115)


@dataclass
class Row:
    """What was seen of one system on one collection, request by request."""

    agreement: list[float] = field(default_factory=list)
    precision: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    read: list[float] = field(default_factory=list)


def load(directory: Path, adapter: Path, **settings: Any) -> Reranker:
    """A reranker of the model, in bfloat16 on the CPU."""
    return Reranker.from_pretrained(
        directory,
        adapter=adapter,
        template=TEMPLATE,
        device="cpu",
        dtype="bfloat16",
        pruning="off",
        max_length=MAX_LENGTH,
        show_progress=True,
        **settings,
    )


def find_budget(directory: Path, adapter: Path, density: float, share: float) -> int:
    """Bytes with which this share of the columns is in memory, and all else."""
    how: dict[str, Any] = {
        "device": "cpu", "dtype": "bfloat16", "max_length": MAX_LENGTH, "template": TEMPLATE, "adapter": adapter,
        "mlp_density": density,
    }  # fmt: skip
    try:
        plan_memory(directory, 1, **how)
    except BudgetError as error:
        _, _, plan = plan_memory(directory, error.resident, **how)
        return error.resident - int((1 - share) * plan.sizes.columns)
    raise AssertionError("no model fits into a byte")


def measure(
    reranker: Reranker, requests: list[Request], dense: list[RerankResult] | None
) -> tuple[Row, list[Any]]:
    """Rerank everything, and compare with what the dense model found."""
    row, results = Row(), []
    for number, request in enumerate(tqdm(requests, leave=False)):
        started = time.perf_counter()
        result = reranker.rerank(request.query, request.documents, TOP_K)
        row.seconds.append(time.perf_counter() - started)
        found = {ranked.index for ranked in result.ranking}
        best = {ranked.index for ranked in (dense[number] if dense else result).ranking}
        row.agreement.append(len(found & best) / TOP_K)
        row.precision.append(sum(map(request.is_relevant, found)) / TOP_K)
        row.read.append(result.trace.bytes_read / 1e6)
        results.append(result)
    return row, results


def main(
    adapter: Annotated[Path, typer.Option(help="Makes a reranker of the model, with the template above.")],
    data: Annotated[list[Path], typer.Option(help="Collections in BEIR layout.")],
    density: Annotated[
        list[float] | None, typer.Option(help="mlp_density, else 0.7; may be given several times.")
    ] = None,
    queries: Annotated[int, typer.Option(help="Of each collection.")] = 20,
    cached: Annotated[float, typer.Option(help="Share of the columns that the budget holds.")] = 0.5,
) -> None:
    """Measure and print the table."""
    directory = find_or_write("smollm2-135m")
    requests = {place.name: load_requests(place, candidates=CANDIDATES, queries=queries) for place in data}
    systems: dict[str, dict[str, Any]] = {DENSE: {}}
    for share in density or [0.7]:
        budget = find_budget(directory, adapter, share, cached)
        systems[f"density {share}"] = {"mlp_density": share}
        systems[f"dense, {budget / 1e6:.0f} MB"] = {"memory_budget": budget}
        systems[f"density {share}, {budget / 1e6:.0f} MB"] = {"mlp_density": share, "memory_budget": budget}
    dense: dict[str, list[RerankResult]] = {}
    table = Table(title=f"top {TOP_K} of {CANDIDATES}, {queries} queries of each collection")
    for heading in ("system", "collection", "agreement", f"P@{TOP_K}", "seconds", "MB read"):
        table.add_column(heading, justify="left" if heading in ("system", "collection") else "right")
    for name, settings in systems.items():
        with load(directory, adapter, **settings) as reranker:
            for collection, asked in requests.items():
                row, results = measure(reranker, asked, dense.get(collection))
                dense.setdefault(collection, results)
                cells = (mean(row.agreement), mean(row.precision), median(row.seconds))
                table.add_row(name, collection, *(f"{cell:.3f}" for cell in cells), f"{mean(row.read):,.0f}")
    console.print(table)


if __name__ == "__main__":
    typer.run(main)
