"""Memory and latency of a rerank under memory budgets, grating beside its peers.

    make bench-deps
    .venv/bin/python -m benchmarks.memory
    .venv/bin/python -m benchmarks.memory --model bundled:ms-marco-minilm-l12

``m3`` is a checkpoint with the shape of bge-reranker-v2-m3 and random weights, written on first use;
``qwen3-0.6b``, ``-4b`` and ``-8b`` have those of Qwen3-Reranker, whose peers follow its model card. Every system
runs in a fresh process on the same requests, one system after the other, with the checkpoint dropped from the page
cache before loading and before each request.

Memory is counted over what the process holds once everything is imported and a tokenizer is loaded, from the first
weight that is read to the end of the last request. "Private" is the peak of what is not mapped from a file: mapped
pages count as resident, but the system can take them back. A megabyte has 10⁶ bytes.
"""

from __future__ import annotations

from pathlib import Path
from statistics import mean, median
from typing import Annotated, Any

import torch
import typer

from benchmarks.recipes import best, find_recipe, is_decoder
from benchmarks.report import RESULTS, Output, Row, write_result
from benchmarks.shapes import find_or_write, random_texts
from benchmarks.worker import Ask, Facts, Ready, System, forget_pages, import_all, loaded, progress, ready_after
from grating_core import BudgetError, Reranker

QUERY_TOKENS = 10
TOP_K = 5
PEERS = ("accelerate",)

Question = tuple[str, list[str]]
"""A query with its candidates."""


def load_transformers(
    ready: Ready, *, directory: Path, max_length: int, batch_size: int | None = None, offload: bool = False
) -> Ask:
    """Load transformers, used plainly: padded batches in bfloat16.

    Args:
        ready: See :class:`System`.
        directory: Directory of the model.
        max_length: Most tokens of a pair.
        batch_size: Pairs at a time; None for all at once.
        offload: Hold no weights: accelerate maps each module's from the file for as long as it computes.
    """
    import_all(directory)
    recipe = find_recipe(directory, max_length)
    ready()
    model = recipe.architecture.from_pretrained(
        directory,
        dtype=torch.bfloat16,
        device_map={"": "disk"} if offload else None,
        trust_remote_code=False,
    ).eval()
    # Were anything held after all, this would compare with something else.
    assert {weight.is_meta for weight in model.parameters()} == {offload}

    def rank(question: Question) -> Facts:
        return {"ranking": best(recipe.scores(model, *question, batch_size), TOP_K)}

    return rank


def load_grating(ready: Ready, *, directory: Path, max_length: int, memory_budget: int | None = None) -> Ask:
    """Load what this project offers, without pruning, so that all systems compute the same."""
    import_all(directory)
    with ready_after("grating_core.opening.layered.load_template", ready):
        reranker = Reranker.from_pretrained(directory, memory_budget=memory_budget, **_settings(max_length))

    def rank(question: Question) -> Facts:
        result = reranker.rerank(*question, TOP_K)
        trace = result.trace
        return {
            "ranking": [ranked.index for ranked in result.ranking],
            "read_mb": trace.bytes_read / 1e6,
            "waited_seconds": trace.seconds_waited,
            "spilled_mb": trace.bytes_spilled / 1e6,
        }

    return rank


def _settings(max_length: int) -> dict[str, Any]:
    return {"device": "cpu", "dtype": "bfloat16", "max_length": max_length, "pruning": "off"}


def find_systems(directory: Path, max_length: int) -> list[System]:
    """Name everything that is compared, peers first; the budgets go from the smallest to all in memory."""
    common = {"directory": directory, "max_length": max_length}
    try:
        Reranker.from_pretrained(directory, memory_budget=1, **_settings(max_length))
    except BudgetError as error:
        smallest, largest = error.smallest, error.resident
    budgets = [smallest, (smallest + largest) // 2]
    return [
        System("transformers, one batch", load_transformers, common),
        System("transformers, batches of 4", load_transformers, {**common, "batch_size": 4}),
        System(
            "accelerate's disk offload, batches of 4",
            load_transformers,
            {**common, "batch_size": 4, "offload": True},
        ),
        System("grating, no budget", load_grating, common),
        *(
            System(f"grating, {budget / 1e6:.0f} MB", load_grating, {**common, "memory_budget": budget})
            for budget in budgets
        ),
    ]


def make_questions(directory: Path, count: int, candidates: int, tokens: int) -> list[Question]:
    """Make random queries, each with documents of its own, so that only frequent words come again."""
    queries = random_texts(directory, count, QUERY_TOKENS, seed=1)
    documents = random_texts(directory, count * candidates, tokens, seed=2)
    return [(query, documents[i * candidates : (i + 1) * candidates]) for i, query in enumerate(queries)]


def measure(system: System, directory: Path, questions: list[Question]) -> Row:
    """Put the questions to a system in a fresh process, and reduce what is seen to a row."""
    answers = []
    forget_pages(directory)
    with loaded([system]) as (worker,):
        for question in questions:
            forget_pages(directory)
            with progress.status(f"{system.name}: reranking"):
                answers.append(worker.ask(question))

    def average(name: str) -> float | None:
        values = [answer.facts[name] for answer in answers if name in answer.facts]
        return mean(values) if values else None

    budget = system.settings.get("memory_budget")
    read = average("read_mb")
    counted = [answer.read_mb for answer in answers if answer.read_mb is not None]
    return {
        "system": system.name,
        "budget_mb": budget and budget / 1e6,
        "peak_mb": worker.peak_mb,
        "peak_private_mb": worker.peak_private_mb,
        "mean_mb": worker.mean_mb,
        "load_seconds": worker.load_seconds,
        "seconds": median(answer.seconds for answer in answers),
        "read_mb": mean(counted) if read is None and counted else read,
        "waited_seconds": average("waited_seconds"),
        "spilled_mb": average("spilled_mb"),
        "curve": worker.curve(),
    }


def main(
    model: Annotated[
        str, typer.Option(help="m3, qwen3-0.6b, -4b, -8b, hub id, directory or bundled name.")
    ] = "m3",
    candidates: Annotated[int, typer.Option(help="Candidates of a query.")] = 20,
    tokens: Annotated[int, typer.Option(help="Mean tokens of a candidate.")] = 500,
    rounds: Annotated[int, typer.Option(help="Requests, of which the median is taken.")] = 2,
    only: Annotated[str, typer.Option(help="Only systems with this in their name.")] = "",
    output: Output = RESULTS,
) -> None:
    """Measure, and write the file of results that is named after the model."""
    directory = find_or_write(model)
    # A decoder's prompt comes on top of the pair.
    max_length = 640 if is_decoder(directory) else 512
    questions = make_questions(directory, rounds, candidates, tokens)
    rows = [
        measure(system, directory, questions)
        for system in find_systems(directory, max_length)
        if only in system.name
    ]
    weights = sum(path.stat().st_size for path in directory.glob("*.safetensors"))
    write_result(
        output,
        f"memory-{model.split(':')[-1]}",
        rows,
        rounds=rounds,
        setting={"model": model, "weights_mb": weights / 1e6, "candidates": candidates, "tokens": tokens},
        packages=PEERS,
    )


if __name__ == "__main__":
    typer.run(main)
