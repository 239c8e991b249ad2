"""Memory and latency of one rerank under memory budgets, grating beside its peers.

    .venv/bin/python -m benchmarks.memory --model m3 --candidates 20 --candidates 60 --figure memory.png
    .venv/bin/python -m benchmarks.memory --model bundled:ms-marco-minilm-l12
    .venv/bin/python -m benchmarks.memory --model m3 --budget 180MB --requests 500
    .venv/bin/python -m benchmarks.memory --model qwen3-8b --budget 2GB --only "grating, 2000 MB" --rounds 1

``m3`` is a checkpoint with the shape of bge-reranker-v2-m3 and random weights, written on first use;
``qwen3-0.6b``, ``-4b`` and ``-8b`` have those of Qwen3-Reranker, whose peers follow its model card. Every system
runs in a fresh process on the same requests, with the checkpoint dropped from the page cache before loading and
before each request. This process watches the resident memory of that one every 5 ms; the kernel's high-water mark
catches what is shorter.

Memory is counted over what the process holds once everything is imported and the tokenizer is loaded, from the
first weight that is read to the end of the last request; the tokenizer has a column of its own. "Private" is the
peak of what is not mapped from a file: mapped pages count as resident, but the system can take them back. A
megabyte has 10⁶ bytes.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from rich.markup import escape

from benchmarks.memory_figures import console, draw_ablation, draw_memory, judged, show, summarise, write_json
from benchmarks.memory_systems import ablation_steps, default_budgets, limited, systems
from benchmarks.shapes import find_or_write, random_texts
from benchmarks.watcher import Job, Mark, Request, Run, System, watch

QUERY_TOKENS = 10
DIFFERENT_REQUESTS = 20  # of an endurance test; then they come round again


def make_requests(directory: Path, count: int, candidates: int, tokens: int) -> list[Request]:
    """Random queries, each with documents of its own, so that only frequent words come again."""
    queries = random_texts(directory, count, QUERY_TOKENS, seed=1)
    documents = random_texts(directory, count * candidates, tokens, seed=2)
    return [(query, documents[i * candidates : (i + 1) * candidates]) for i, query in enumerate(queries)]


def endure(system: System, job: Job) -> Run:
    """Put many requests to one system, and tell whether its memory grows."""
    held: list[int] = []
    console.print(f"{system.name}, {job.rounds} requests: MB in memory, imports included, after request")

    def tell(mark: Mark) -> None:
        if mark.name == "end":
            held.append(mark.resident)
            if len(held) % max(1, job.rounds // 20) == 0:
                console.print(f"{len(held):6d}: {mark.resident / 1e6:8.1f}   {mark.facts['seconds']:.2f} s")

    run = watch(system, job, tell)
    if run.failure:
        console.print(f"[bold red]failed:[/] {escape(run.failure)}")
        return run
    settled = held[len(held) // 2 :]  # caches fill and the allocator finds its level in the first half
    slope = np.polyfit(range(len(settled)), settled, 1)[0] if len(settled) > 1 else 0.0
    summary = summarise(run)
    console.print(
        f"{slope / 1e3:+.1f} kB a request in the second half; "
        f"peak {summary.peak:.1f} MB over imports and tokenizer, {judged(summary.ratio)} of the budget"
    )
    return run


def parse_bytes(size: str) -> int:
    """``180MB`` in bytes."""
    if not (found := re.fullmatch(r"(\d+(?:\.\d+)?)\s*(kB|MB|GB)", size)):
        raise typer.BadParameter(f"{size!r} is not a size such as 180MB")
    return int(float(found[1]) * {"kB": 10**3, "MB": 10**6, "GB": 10**9}[found[2]])


def main(
    model: Annotated[
        str, typer.Option(help="m3, qwen3-0.6b, -4b, -8b, or a hub id, directory or bundled name.")
    ] = "m3",
    directory: Annotated[Path | None, typer.Option(help="Where m3 or qwen3 is, or goes; else the cache.")] = None,
    candidates: Annotated[
        list[int] | None, typer.Option(help="Candidates of a query, else 20; may be given several times.")
    ] = None,
    tokens: Annotated[int, typer.Option(help="Mean tokens of a candidate.")] = 500,
    budget: Annotated[
        list[str] | None,
        typer.Option(help="Such as 180MB; may be given several times. Else from the smallest to all resident."),
    ] = None,
    rounds: Annotated[int, typer.Option(help="Requests, of which the median is taken.")] = 3,
    requests: Annotated[int, typer.Option(help="Endurance instead: so many requests in the first budget.")] = 0,
    figure: Annotated[Path | None, typer.Option(help="Draw memory over time here.")] = None,
    ablation: Annotated[
        Path | None, typer.Option(help="The ablation instead, of 60 candidates by default, drawn here.")
    ] = None,
    only: Annotated[str, typer.Option(help="Only systems with this in their name.")] = "",
    json_path: Annotated[Path | None, typer.Option("--json", help="Write everything measured here.")] = None,
    warm: Annotated[bool, typer.Option("--warm", help="Leave the checkpoint in the page cache.")] = False,
) -> None:
    """Measure and print the tables."""
    place = find_or_write(model, directory)
    budgets = [parse_bytes(size) for size in budget] if budget else default_budgets(place)
    rounds = requests or rounds
    cache = "warm" if warm else "cold"
    runs: dict[str, list[Run]] = {}
    for count in candidates or [60 if ablation else 20]:
        title = f"{model}: {count} candidates of {tokens} tokens, {cache} pages, {torch.get_num_threads()} threads"
        job = Job(place, make_requests(place, min(rounds, DIFFERENT_REQUESTS), count, tokens), rounds, warm)
        if requests:
            runs[title] = [endure(limited(budgets[0]), job)]
            continue
        chosen = [s for s in (ablation_steps(budgets[0]) if ablation else systems(budgets)) if only in s.name]
        runs[title] = []
        for system in chosen:
            with console.status(system.name):
                runs[title].append(watch(system, job))
        show(title, runs[title])
    if figure:
        draw_memory(runs, figure)
    if ablation:
        draw_ablation(runs, ablation)
    if json_path:
        write_json(runs, json_path)


if __name__ == "__main__":
    typer.run(main)
