"""What was seen of memory, as table, figures and JSON."""

from __future__ import annotations

import json
import platform
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean, median
from typing import Any

import accelerate
import numpy as np
import torch
import transformers
from matplotlib.figure import Figure
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from benchmarks.watcher import Run

ALLOWED = 1.05  # a peak of more than so many budgets breaks the promise

# What the figure shows, by how the systems' names begin; told apart by colour-blind readers.
_LINES = {"transformers": "#E69F00", "accelerate": "#0072B2", "grating, ": "#009E73"}

console = Console(width=150)


@dataclass(frozen=True)
class Summary:
    """One row of the table. Memory is in MB over the baseline, traffic in MB per request; None is not known."""

    system: str
    budget: float | None
    tokenizer: float
    tokenizer_peak: float
    peak: float
    peak_loading: float
    private: float | None
    mean: float
    load_seconds: float
    seconds: list[float]
    read: float | None
    waited_seconds: float | None
    spilled: float | None
    hit_rate: float | None
    planned: float | None
    chunk_tokens: int | None
    resident_layers: int | None
    embedding_rows: int | None

    @property
    def ratio(self) -> float | None:
        """The peak as a share of the budget."""
        return self.peak / self.budget if self.budget else None


def summarise(run: Run) -> Summary:
    """Reduce what was seen to the figures of a row."""
    imported, tokenizer, loaded = (run.all(name)[0] for name in ("imported", "tokenizer", "loaded"))
    begins, ends = run.all("begin"), run.all("end")
    computing = [run.samples(begin, end, run.resident) for begin, end in zip(begins, ends, strict=True)]

    def average(name: str, unit: float = 1.0) -> float | None:
        values = [value for mark in ends if (value := mark.facts.get(name)) is not None]
        return mean(values) / unit if values else None

    read = average("bytes_read", 1e6)
    planned = loaded.facts.get("planned")
    private = run.samples(tokenizer, ends[-1], run.private).max()
    return Summary(
        system=run.system.name,
        budget=run.system.budget and run.system.budget / 1e6,
        tokenizer=(tokenizer.resident - imported.resident) / 1e6,
        tokenizer_peak=(run.peak(imported, tokenizer) - imported.resident) / 1e6,
        peak=(run.peak(tokenizer, ends[-1]) - tokenizer.resident) / 1e6,
        peak_loading=(run.peak(tokenizer, loaded) - tokenizer.resident) / 1e6,
        private=tokenizer.private and (private - tokenizer.private) / 1e6,
        mean=(float(np.concatenate(computing).mean()) - tokenizer.resident) / 1e6,
        load_seconds=loaded.seconds - imported.seconds,
        seconds=[mark.facts["seconds"] for mark in ends],
        read=average("storage_read", 1e6) if read is None else read,
        waited_seconds=average("seconds_waited"),
        spilled=average("bytes_spilled", 1e6),
        hit_rate=average("embedding_hit_rate"),
        planned=planned and planned / 1e6,
        chunk_tokens=loaded.facts.get("chunk_tokens"),
        resident_layers=loaded.facts.get("resident_layers"),
        embedding_rows=loaded.facts.get("embedding_rows"),
    )


def show(title: str, runs: list[Run]) -> None:
    """Print the table."""
    caption = "MB over imports and tokenizer; read, waited and spilled per request"
    table = Table(title=title, caption=caption)
    table.add_column("system", no_wrap=True)
    for heading in (
        "token-\nizer MB", "peak\nMB", "private\nMB", "mean\nMB", "peak /\nbudget", "load\ns", "latency\ns",
        "read\nMB", "waited\ns", "spilled\nMB", "chunk\ntokens", "resident\nlayers",
    ):  # fmt: skip
        table.add_column(heading, justify="right")
    for row in (summarise(run) for run in runs if not run.failure):
        table.add_row(
            row.system,
            f"{row.tokenizer:.0f}",
            f"{row.peak:.0f}",
            _shown(row.private, ".0f"),
            f"{row.mean:.0f}",
            judged(row.ratio),
            f"{row.load_seconds:.2f}",
            f"{median(row.seconds):.2f}",
            _shown(row.read, ".0f"),
            _shown(row.waited_seconds, ".2f"),
            _shown(row.spilled, ".0f"),
            _shown(row.chunk_tokens, "d"),
            _shown(row.resident_layers, "d"),
        )
    console.print(table)
    for run in runs:
        if run.failure:
            console.print(f"[bold red]{run.system.name} failed:[/] {escape(run.failure)}")


def _shown(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def judged(ratio: float | None) -> str:
    """The share of a budget, loud if it is too much."""
    if ratio is None:
        return ""
    return f"[bold red]{ratio:.2f} OVER[/]" if ratio > ALLOWED else f"{ratio:.2f}"


def draw_memory(runs_by_title: dict[str, list[Run]], path: Path) -> None:
    """Memory over time while a system loads its weights and serves its first request: three lines.

    They are plain transformers and accelerate's offload, each in the batches that take the least memory, and
    grating within its smallest budget, which is dotted. A system that was not run has no line.
    """
    figure = Figure(figsize=(9, 4.5 * len(runs_by_title)), layout="constrained")
    rows = figure.subplots(len(runs_by_title), squeeze=False)[:, 0]
    for axes, (title, runs) in zip(rows, runs_by_title.items(), strict=True):
        peaks = []
        for name, colour in _LINES.items():
            alike = [run for run in runs if run.system.name.startswith(name) and not run.failure]
            if not alike:
                continue
            run = min(alike, key=_least)
            start, end = run.all("tokenizer")[0], run.all("end")[0]
            seconds = run.samples(start, end, run.seconds) - start.seconds
            grown = (run.samples(start, end, run.resident) - start.resident) / 1e6
            axes.plot(seconds, grown, color=colour, linewidth=2)
            axes.text(seconds[-1], grown[-1], f" {run.system.name}", color=colour, va="center")
            if run.system.budget:
                axes.axhline(run.system.budget / 1e6, color=colour, linestyle=":", linewidth=1)
            peaks.append(grown.max())
        if len(peaks) > 1:
            message = f"The same reranking in {peaks[-1]:,.0f} MB instead of {peaks[0]:,.0f}"
            axes.set_title(message + "\n", loc="left", fontweight="bold")
        axes.text(0, 1.02, title, transform=axes.transAxes, fontsize=9)
        axes.set(xlabel="seconds since the tokenizer was loaded", ylabel="MB over imports and tokenizer")
        axes.margins(x=0)
        axes.set_xlim(0, axes.get_xlim()[1] * 1.3)  # room for the names
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


def _least(run: Run) -> float:
    """Peak memory in MB, by which the run that is drawn is chosen among those of one kind."""
    return summarise(run).peak


def draw_ablation(runs_by_title: dict[str, list[Run]], path: Path) -> None:
    """Peak memory and latency after each step, as bars."""
    figure = Figure(figsize=(11, 3.5 * len(runs_by_title)), layout="constrained")
    rows = figure.subplots(len(runs_by_title), 2, squeeze=False, sharey="row")
    for (left, right), (title, runs) in zip(rows, runs_by_title.items(), strict=True):
        summaries = [summarise(run) for run in runs if not run.failure]
        names = [summary.system for summary in summaries]
        peaks = left.barh(names, [summary.peak for summary in summaries], color="#0072B2")
        left.bar_label(peaks, fmt="%.0f", padding=3)
        left.set(xlabel="peak MB over imports and tokenizer")
        left.set_title(title, loc="left")
        left.invert_yaxis()  # the first step on top
        seconds = right.barh(names, [median(summary.seconds) for summary in summaries], color="#E69F00")
        right.bar_label(seconds, fmt="%.1f", padding=3)
        right.set(xlabel="seconds for one rerank")
        for axes in (left, right):
            axes.margins(x=0.15)
    figure.savefig(path, dpi=150)


def write_json(runs_by_title: dict[str, list[Run]], path: Path) -> None:
    """Write all that was measured."""
    versions = {module.__name__: module.__version__ for module in (torch, transformers, accelerate)}
    measured = {title: [_raw(run) for run in runs] for title, runs in runs_by_title.items()}
    everything = {"machine": platform.platform(), "versions": versions, "runs": measured}
    path.write_text(json.dumps(everything) + "\n", encoding="utf-8")


def _raw(run: Run) -> dict[str, Any]:
    return {
        "system": run.system.name,
        "settings": run.system.settings,
        "failure": run.failure,
        "summary": None if run.failure else asdict(summarise(run)),
        "marks": [asdict(mark) for mark in run.marks],
        "memory": _thinned(run),
    }


def _thinned(run: Run, points: int = 1000) -> list[tuple[float, float]]:
    """Memory over time in few points, each the most of its stretch: monotonic seconds, and MB in memory."""
    starts = np.unique(np.linspace(0, len(run.seconds), points, endpoint=False).astype(int))
    seconds = np.asarray(run.seconds)[starts].round(3)
    most = (np.maximum.reduceat(np.asarray(run.resident), starts) / 1e6).round(2)
    return list(zip(seconds.tolist(), most.tolist(), strict=True))
