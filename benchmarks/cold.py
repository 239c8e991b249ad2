"""The cold start: time and memory from the start of a process to its first ranking, beside importing torch alone.

    make bench-deps
    .venv/bin/python -m benchmarks.cold
    .venv/bin/python -m benchmarks.cold --before ../older-checkout

Every program runs in fresh processes, which take turns, in a new order in each round. A round that does not count
comes first: it fills the page cache, and Python compiles what is not compiled yet. Time goes from the call that
starts the process to the first ranking. Memory is what the process then holds. A megabyte has 10⁶ bytes.
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Annotated

import psutil
import typer
from rich.progress import track

from benchmarks.report import RESULTS, ROOT, Output, Row, write_result
from benchmarks.worker import progress
from grating_core.models.bundled import BUNDLED_RERANKER, bundled_model

QUERY = "How many people live in Berlin?"
DOCUMENTS = [
    "Berlin had a population of 3,520,031 registered inhabitants in an area of 891.82 square kilometers.",
    "New York City is famous for the Metropolitan Museum of Art.",
    "Bees collect nectar and pollen from flowers, and make honey of the nectar.",
    "Berlin is well known for its museums.",
    "The city of Paris had 2,102,650 residents in January 2023.",
]
PEERS = ("sentence-transformers",)

_TORCH = "import torch"
_GRATING = """
from grating_core import Reranker
reranker = Reranker.from_pretrained({model!r}, device="cpu")
reranker.rerank({query!r}, {documents!r}, top_k=2)
"""
_PEER = """
from sentence_transformers import CrossEncoder
model = CrossEncoder({model!r}, device="cpu", local_files_only=True)
model.rank({query!r}, {documents!r}, top_k=2)
"""


@dataclass(frozen=True)
class Program:
    """A program that is started again and again.

    Attributes:
        name: What the table calls it.
        code: The code, up to the first ranking.
        root: The checkout whose packages it imports.
    """

    name: str
    code: str
    root: Path = ROOT


def start(program: Program) -> tuple[float, float]:
    """Start a program in a fresh process; return the seconds to the end of its code, and its MB of memory then.

    Raises:
        RuntimeError: The program failed.
    """
    code = f"{program.code}\nprint('ranked', flush=True)\ninput()"
    environment = os.environ | {"PYTHONPATH": str(program.root)}
    started = perf_counter()
    with subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True, env=environment, cwd=program.root,
    ) as process:  # fmt: skip
        assert process.stdout is not None
        said = process.stdout.readline()
        seconds = perf_counter() - started
        if said != "ranked\n":
            raise RuntimeError(f"{program.name} failed: {process.communicate()[1]}")
        memory = psutil.Process(process.pid).memory_info().rss / 1e6
        process.communicate("\n")
    return seconds, memory


def find_programs(before: Path | None) -> list[Program]:
    """Name everything that is compared, importing torch first."""
    known = {"query": QUERY, "documents": DOCUMENTS}
    grating = _GRATING.format(model=BUNDLED_RERANKER, **known)
    programs = [
        Program("importing torch alone", _TORCH),
        Program("sentence-transformers", _PEER.format(model=str(bundled_model(BUNDLED_RERANKER)), **known)),
        Program("grating", grating),
    ]
    if before is not None:
        programs.append(Program(f"grating, commit {_commit(before)}", grating, before.resolve()))
    return programs


def _commit(checkout: Path) -> str:
    done = subprocess.run(
        ["git", "rev-parse", "--short=12", "HEAD"], cwd=checkout, check=True, capture_output=True, text=True
    )
    return done.stdout.strip()


def measure(programs: list[Program], rounds: int) -> list[Row]:
    """Start every program once in each round, and return its row, compared with the first program."""
    order, turns = random.Random(0), list(programs)
    seen: dict[str, list[tuple[float, float]]] = {program.name: [] for program in programs}
    for number in track(range(rounds + 1), "Starting", console=progress):
        order.shuffle(turns)
        for program in turns:
            found = start(program)
            if number:
                seen[program.name].append(found)
    figures = {name: tuple(map(median, zip(*found, strict=True))) for name, found in seen.items()}
    least_seconds, least_mb = figures[programs[0].name]
    return [
        {
            "system": name,
            "seconds": seconds,
            "times_torch": seconds / least_seconds,
            "memory_mb": memory,
            "over_torch_mb": memory - least_mb,
        }
        for name, (seconds, memory) in figures.items()
    ]


def main(
    before: Annotated[Path | None, typer.Option(help="Another checkout to measure in the same run.")] = None,
    rounds: Annotated[int, typer.Option(help="Starts of each program, of which the median is taken.")] = 7,
    output: Output = RESULTS,
) -> None:
    """Measure, and write the file of results."""
    rows = measure(find_programs(before), rounds)
    setting = {"model": BUNDLED_RERANKER, "candidates": len(DOCUMENTS)}
    write_result(output, "cold", rows, rounds=rounds, setting=setting, packages=PEERS)


if __name__ == "__main__":
    typer.run(main)
