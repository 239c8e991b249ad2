"""Three applications as people build them, with grating and with what their framework has for reranking.

    make bench-deps
    .venv/bin/python -m benchmarks.apps --data ../shared/data --output apps.json
    .venv/bin/python -m benchmarks.apps --data ../shared/data --only memory --memories 200

**RAG**, in LangChain on Cranfield and in LlamaIndex on CISI: BM25's ten best and the ten nearest by embedding
(bge-small-en-v1.5 in an embedded Qdrant), joined by the framework's own reciprocal rank fusion; the best ten of
both are kept. **Agent memory**, in LlamaIndex on LoCoMo: the ``VectorMemoryBlock`` of a conversation recalls the
20 turns nearest to a question about it, and five are kept. **Long context**, in LangChain on Cranfield and CISI:
of a text of 30 documents, up to three of which answer the query, what fits into 1,500 tokens is kept.

Every system has a process of its own with the same first stage in it. All are alive at once and take turns, in a
new order for each request, so that a noisy machine is noisy for all of them; those that wait compute nothing. In
the first round every request is put to every system, which gives the quality. The rounds that follow repeat the
first few, of which the median time is taken, and the mean over them. The embeddings of texts are computed once;
that of the query is part of its time.

Memory is counted over what the process holds once everything is imported, the first stage has answered, and the
reranker's tokenizer is loaded, up to the most that the kernel saw until the last request; and as a whole. Pages
mapped from files count, though the system can take them back. A megabyte has 10⁶ bytes.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import track

from benchmarks.applications.report import Row, show, summarise, write_json
from benchmarks.applications.tasks import Application, agent_memory, hybrid_rag, long_context
from benchmarks.applications.worker import Answered, Loaded, Worker
from benchmarks.collections import Collection, load_collection

PAUSE = 0.02  # seconds, in which the threads of the system before go to sleep

MAKERS: dict[str, tuple[str, Callable[[Collection, int, str], Application]]] = {
    "rag-langchain": ("cranfield", partial(hybrid_rag, "LangChain")),
    "rag-llamaindex": ("cisi", partial(hybrid_rag, "LlamaIndex")),
    "memory": ("locomo", agent_memory),
    "context-cranfield": ("cranfield", long_context),
    "context-cisi": ("cisi", long_context),
}

progress = Console(stderr=True)


def measure(
    application: Application, timed: int, rounds: int
) -> tuple[dict[str, Loaded], dict[str, list[list[Answered]]]]:
    """What every system held before its reranker was loaded, and its answers to each question, round by round.

    Args:
        application: What is asked.
        timed: How many of the questions are asked again.
        rounds: How often they are asked.
    """
    order, count = random.Random(0), len(application.job.questions)
    with ExitStack() as stack:
        workers = [stack.enter_context(closing(Worker(application.job, one))) for one in application.systems]
        with progress.status(f"{application.name}: loading"):
            loaded = {worker.system.name: worker.wait() for worker in workers}
            for worker in workers:  # warm up
                worker.ask(0)
        answers: dict[str, list[list[Answered]]] = {
            worker.system.name: [[] for _ in range(count)] for worker in workers
        }
        numbers = [*range(count), *(rounds - 1) * [*range(min(timed, count))]]
        for number in track(numbers, application.name, console=progress):
            order.shuffle(workers)
            for worker in workers:
                time.sleep(PAUSE)
                answers[worker.system.name][number].append(worker.ask(number))
    return loaded, answers


def main(
    data: Annotated[Path, typer.Option(help="Has the collections cranfield, cisi and locomo, in BEIR layout.")],
    only: Annotated[str, typer.Option(help=f"Only those with this in their name: {', '.join(MAKERS)}.")] = "",
    requests: Annotated[int, typer.Option(help="Questions of RAG.")] = 40,
    memories: Annotated[int, typer.Option(help="Questions to an agent's memory.")] = 100,
    texts: Annotated[int, typer.Option(help="Long texts, with one question each.")] = 10,
    timed: Annotated[int, typer.Option(help="How many of these are asked in every round, and timed.")] = 6,
    rounds: Annotated[int, typer.Option(help="Rounds, of which the median is taken.")] = 3,
    memory_budget: Annotated[str, typer.Option(help="Of the reranker that has one.")] = "110MB",
    output: Annotated[Path | None, typer.Option(help="Write everything measured here, as JSON.")] = None,
) -> None:
    """Measure and print the tables."""
    counts = {"rag": requests, "memory": memories, "context": texts}
    rows: list[Row] = []
    for name, (collection, make) in MAKERS.items():
        if only not in name:
            continue
        asked = counts[name.split("-")[0]]
        application = make(load_collection(data / collection), asked, memory_budget)
        found = summarise(application, *measure(application, timed, rounds), timed)
        show(found)
        rows += found
    if output:
        write_json(rows, output)


if __name__ == "__main__":
    typer.run(main)
