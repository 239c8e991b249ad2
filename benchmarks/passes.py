"""Requests of several callers: one after another, together in one pass, and in threads.

    .venv/bin/python -m benchmarks.passes
    .venv/bin/python -m benchmarks.passes --model bundled:ms-marco-minilm-l12
    .venv/bin/python -m benchmarks.passes --before ../before

With ``--before`` the source tree of another commit answers the same requests in the same run. The processes take
turns. The model's pages are dropped from the page cache before each call, also where nothing is read any more.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from benchmarks.callers import THREADS, load_grating
from benchmarks.recipes import is_decoder
from benchmarks.report import RESULTS, ROOT, Output, Row, write_result
from benchmarks.shapes import find_or_write, random_texts
from benchmarks.worker import Answer, System, loaded, take_turns

QUERY_TOKENS = 10
WAYS = ("one after another", "together", "in threads")


def find_systems(directory: Path, max_length: int, before: Path | None) -> list[System]:
    """Name what is compared: this commit and perhaps another one, without a budget and with the smallest."""
    sources = {"this commit": ROOT} | ({} if before is None else {"the commit before": before.resolve()})
    return [
        System(
            f"{name}, {'smallest budget' if smallest else 'no budget'}",
            load_grating,
            {"directory": directory, "source": source, "max_length": max_length, "smallest": smallest},
        )
        for name, source in sources.items()
        for smallest in (False, True)
    ]


def row(system: System, way: str, requests: int, answers: list[Answer], alone: list[Answer]) -> Row:
    """Reduce the answers to one way of asking to a row.

    Args:
        system: Who answered.
        way: How it was asked.
        requests: Number of requests of each answer.
        answers: The answers, one of each round.
        alone: The same requests one after another, for comparison.
    """
    latencies = [seconds for answer in answers for seconds in answer.facts["latencies"]]
    budget = answers[0].facts["budget"]
    median = float(np.median([answer.seconds for answer in answers]))
    return {
        "system": system.name,
        "way": way,
        "budget_mb": budget and budget / 1e6,
        "requests_per_second": requests / median,
        "times": float(np.median([answer.seconds for answer in alone])) / median,
        "median_seconds": float(np.median(latencies)),
        "p95_seconds": float(np.percentile(latencies, 95)),
    }


def main(
    model: Annotated[
        str, typer.Option(help="m3, qwen3-0.6b, -4b, -8b, hub id, directory or bundled name.")
    ] = "m3",
    candidates: Annotated[int, typer.Option(help="Candidates of a query.")] = 20,
    tokens: Annotated[int, typer.Option(help="Mean tokens of a candidate.")] = 60,
    requests: Annotated[int, typer.Option(help="Requests of a round.")] = THREADS,
    rounds: Annotated[int, typer.Option(help="How often the requests are made.")] = 3,
    before: Annotated[Path | None, typer.Option(help="The source tree of another commit.")] = None,
    output: Output = RESULTS,
) -> None:
    """Measure, and write the file of results that is named after the model."""
    directory = find_or_write(model)
    max_length = 640 if is_decoder(directory) else 512
    queries = random_texts(directory, requests, QUERY_TOKENS, seed=1)
    documents = random_texts(directory, requests * candidates, tokens, seed=2)
    asked = [(query, documents[i * candidates : (i + 1) * candidates]) for i, query in enumerate(queries)]
    with loaded(find_systems(directory, max_length, before)) as workers:
        answers = take_turns(workers, [(way, asked) for way in WAYS], rounds=rounds, title="reranking")
        systems = [worker.system for worker in workers]
    rows = [
        row(system, way, requests, found, answers[system.name][0])
        for system in systems
        for way, found in zip(WAYS, answers[system.name], strict=True)
        if found[0].facts["latencies"]
    ]
    setting = {
        "model": model,
        "candidates": candidates,
        "tokens": tokens,
        "requests": requests,
        "threads": THREADS,
    }
    write_result(output, f"passes-{model.split(':')[-1]}", rows, rounds=rounds, setting=setting)


if __name__ == "__main__":
    typer.run(main)
