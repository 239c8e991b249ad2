"""What was measured of the applications, as tables and JSON."""

from __future__ import annotations

import json
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.applications.tasks import Application
from benchmarks.applications.worker import Answered, Loaded

PACKAGES = ("torch", "transformers", "sentence-transformers", "langchain-classic", "llama-index-core")


@dataclass(frozen=True)
class Row:
    """One system in one application.

    Attributes:
        application: Its name.
        system: Its name.
        kind: ``"none"``, ``"usual"`` or ``"grating"``.
        settings: What the system was told.
        requests: Questions that were asked; of these the quality and the memory.
        timed: Those that were timed in every round.
        candidates: Mean number of texts that were found and reranked.
        quality: Means over the questions, by measure.
        seconds: From the question to what is kept: mean over questions of the median over rounds.
        reranking: The same for what follows the first stage.
        adds: Most MB over what the process held before the reranker was loaded; None where the kernel is silent.
        peak: MB that the process held at most.
    """

    application: str
    system: str
    kind: str
    settings: dict[str, Any]
    requests: int
    timed: int
    candidates: float
    quality: dict[str, float]
    seconds: float
    reranking: float
    adds: float | None
    peak: float | None


def summarise(
    application: Application, loaded: dict[str, Loaded], answers: dict[str, list[list[Answered]]], timed: int
) -> list[Row]:
    """A row for each system.

    Args:
        application: What was asked.
        loaded: What each system held before its reranker was loaded.
        answers: Those of each system, by question and round.
        timed: How many of the questions were asked in every round.

    Raises:
        RuntimeError: The first stage did not find the same for all systems.
    """
    given = [[first.answer.candidates for first, *_ in found] for found in answers.values()]
    if any(other != given[0] for other in given):
        raise RuntimeError(f"{application.name}: the systems were not given the same candidates")
    rows = []
    for system in application.systems:
        found = answers[system.name]
        before, peak = loaded[system.name].before, _most(found)
        repeated = [[one.answer for one in rounds] for rounds in found[:timed]]
        rows.append(
            Row(
                application=application.name,
                system=system.name,
                kind=system.kind,
                settings=system.settings,
                requests=len(found),
                timed=len(repeated),
                candidates=mean(map(len, given[0])),
                quality=application.judge([first.answer.kept for first, *_ in found]),
                seconds=mean(median(one.retrieval + one.reranking for one in rounds) for rounds in repeated),
                reranking=mean(median(one.reranking for one in rounds) for rounds in repeated),
                adds=None if peak is None else (peak - before) / 1e6,
                peak=None if peak is None else peak / 1e6,
            )
        )
    return rows


def _most(found: list[list[Answered]]) -> int | None:
    return max((one.peak for rounds in found for one in rounds if one.peak is not None), default=None)


def show(rows: Sequence[Row]) -> None:
    """Print the table of one application."""
    first, usual = rows[0], [row for row in rows if row.kind == "usual"]
    table = Table(
        title=f"{first.application}: {first.requests} requests, {first.timed} of them timed, "
        + (f"{first.candidates:.1f} candidates, " if first.candidates else "")
        + f"{torch.get_num_threads()} threads",
        caption=f"/ usual: of {usual[0].system}; / best: of the fastest, or smallest, with that name",
    )
    table.add_column("system", no_wrap=True)
    for heading in (
        *first.quality, "end to\nend ms", "/ usual", "/ best", "reranking\nms", "adds\nMB", "/ usual", "/ best",
        "process\nMB",
    ):  # fmt: skip
        table.add_column(heading, justify="right")
    for row in rows:
        table.add_row(
            row.system,
            *(f"{value:.3f}" for value in row.quality.values()),
            _shown(1000 * row.seconds),
            *_ratios(row, usual, "seconds"),
            _shown(1000 * row.reranking),
            _shown(row.adds),
            *_ratios(row, usual, "adds"),
            _shown(row.peak),
        )
    Console(width=150).print(table)


def _shown(value: float | None) -> str:
    return "" if value is None else str(round(value))


def _ratios(row: Row, usual: Sequence[Row], name: str) -> list[str]:
    """What part it is of the usual system's as it is, and of the best usual one's."""
    value, peers = getattr(row, name), [getattr(peer, name) for peer in usual]
    if row.kind == "none" or value is None:
        return ["", ""]
    return [f"{value / peers[0]:.2f}", f"{value / min(peers):.2f}"]


def write_json(rows: Sequence[Row], path: Path) -> None:
    """Write all rows."""
    everything = {
        "machine": platform.platform(),
        "threads": torch.get_num_threads(),
        "versions": {package: version(package) for package in PACKAGES},
        "rows": [asdict(row) for row in rows],
    }
    path.write_text(json.dumps(everything, indent=1) + "\n", encoding="utf-8")
