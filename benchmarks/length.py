"""Whether a long document costs more than its length says: one document, longer from line to line.

    .venv/bin/python -m benchmarks.length
    .venv/bin/python -m benchmarks.length --model qwen3-0.6b --tokens 1024 --tokens 4096

Both systems compute the same tokens in bfloat16: Qwen3-Reranker's prompt around a random document that fills the
window. They take turns, so that a noisy machine is noisy for both; the first run of each is not timed, but tells
by how much the process grows while it computes. grating runs once more beside an empty document: then the prompt's
beginning is shared, and attention goes in steps over the long one.

The work for a token has a part that is the same for all and a part that grows with those before it: seconds per
1,000 tokens rise steadily, and a jump would be a cliff.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks.recipes import find_recipe
from benchmarks.shapes import find_or_write, random_texts
from benchmarks.watcher import high_water, reset_high_water, return_memory
from grating_core import Reranker
from grating_core.memory.meter import resident_memory

LENGTHS = (512, 1024, 2048, 4096, 8192)
QUERY_TOKENS = 20

Rank = Callable[[], Any]


def systems(directory: Path, model: Any, tokens: int) -> dict[str, Rank]:
    """What is compared at one length, by the name it has in the table.

    Args:
        directory: Holds the decoder.
        model: The same, as transformers loads it.
        tokens: The length of the prompt with the document in it.
    """
    (query,) = random_texts(directory, 1, QUERY_TOKENS, seed=1)
    (document,) = random_texts(directory, 1, 2 * tokens, seed=2)  # both cut it to the window
    recipe = find_recipe(directory, tokens)
    reranker = Reranker.from_pretrained(
        directory, dtype="bfloat16", device="cpu", pruning="off", template="qwen3-reranker", max_length=tokens
    )
    return {
        "transformers": lambda: recipe.scores(model, query, [document]),
        "grating": lambda: reranker.rerank(query, [document]),
        "grating, beside another": lambda: reranker.rerank(query, [document, ""]),
    }


def growth(rank: Rank) -> float:
    """By how many MB the process is larger at its largest while it reranks; not a number if nobody tells."""
    return_memory()
    known, before = reset_high_water(), resident_memory()
    rank()
    return (high_water() - before) / 1e6 if known else float("nan")


def measure(compared: dict[str, Rank], rounds: int) -> dict[str, float]:
    """The median of the seconds of each system."""
    seconds: dict[str, list[float]] = {name: [] for name in compared}
    for _ in range(rounds):
        for name, rank in compared.items():
            started = perf_counter()
            rank()
            seconds[name].append(perf_counter() - started)
    return {name: median(taken) for name, taken in seconds.items()}


def main(
    model: Annotated[
        str, typer.Option(help="A decoder: smollm2-135m, qwen3-0.6b, -4b, -8b, hub id or directory.")
    ] = "smollm2-135m",
    tokens: Annotated[list[int] | None, typer.Option(help="A length; may be given several times.")] = None,
    rounds: Annotated[int, typer.Option(help="Runs of which the median is taken.")] = 3,
) -> None:
    """Measure and print the table."""
    directory = find_or_write(model)
    architecture = find_recipe(directory, None).architecture
    padded = architecture.from_pretrained(directory, dtype=torch.bfloat16, trust_remote_code=False).eval()
    table = Table(title=f"{model}, bfloat16: one document, {rounds} rounds, {torch.get_num_threads()} threads")
    for heading in ("tokens", "system", "seconds", "seconds per 1,000 tokens", "grows by MB"):
        table.add_column(heading, justify="left" if heading == "system" else "right")
    for length in track(tokens or LENGTHS, "Measuring"):
        compared = systems(directory, padded, length)
        grown = {name: growth(rank) for name, rank in compared.items()}
        for name, seconds in measure(compared, rounds).items():
            table.add_row(
                f"{length:,}", name, f"{seconds:.2f}", f"{seconds / length * 1000:.2f}", f"{grown[name]:.0f}"
            )
        table.add_section()
    Console(width=115).print(table)


if __name__ == "__main__":
    typer.run(main)
