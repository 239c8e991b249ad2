"""What pruning saves and loses, as table, figures, CSV and JSON."""

from __future__ import annotations

import csv
import json
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import groupby
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import sklearn
import torch
import transformers
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from rich.console import Console
from rich.table import Table

from benchmarks.recorded import Array, Recorded
from benchmarks.replay import mean_gammas
from grating_core.lab.plots import write_ranks
from grating_core.lens.store import CalibratedLens

# Told apart by colour-blind readers, and without colour by their markers.
_STYLES = {"cluster": ("#E69F00", "s"), "SEE": ("#009E73", "^"), "lens": ("#0072B2", "o")}
_MEAN = "mean"


@dataclass(frozen=True)
class Row:
    """What one setting saves and loses on one corpus. Means over requests; None was not measured.

    Attributes:
        corpus: Its name, or ``"mean"`` of all.
        calibrated_on: Where lens and margins come from: other corpora, or what the model came with.
        requests: How many were replayed.
        policy: ``"off"``, ``"cluster"``, ``"SEE"`` or ``"lens"``.
        value: Its threshold, or target.
        top_k: K.
        scores: ``"exact"`` or ``"estimated"``.
        compute_share: Tokens × layers computed, of those without pruning.
        agreement: Share of the full model's top K that is returned.
        precision: P@K against human judgements.
        ndcg: nDCG@10 of the K returned against human judgements.
        seconds: Of a real rerank.
        latency_ratio: These seconds, of those without pruning.
    """

    corpus: str
    calibrated_on: str
    requests: int
    policy: str
    value: float | None
    top_k: int
    scores: str
    compute_share: float
    agreement: float
    precision: float
    ndcg: float
    seconds: float | None
    latency_ratio: float | None

    @property
    def key(self) -> tuple[int, str, str, float]:
        """What two corpora have in common."""
        return self.top_k, self.policy, self.scores, self.value or 0.0


def mean_rows(rows: Sequence[Row]) -> list[Row]:
    """The mean over corpora of each setting and K; each corpus counts the same."""
    means = []
    for key in dict.fromkeys(row.key for row in rows):
        alike = [row for row in rows if row.key == key]
        measured = all(row.seconds is not None for row in alike)
        names = ["compute_share", "agreement", "precision", "ndcg"]
        names += ["seconds", "latency_ratio"] if measured else []
        averages: dict[str, Any] = {name: mean(getattr(row, name) for row in alike) for name in names}
        total = sum(row.requests for row in alike)
        means.append(replace(alike[0], corpus=_MEAN, calibrated_on="", requests=total, **averages))
    return means


def with_means(rows: Sequence[Row]) -> list[Row]:
    """All rows, and the mean over corpora if there are several."""
    return [*rows, *(mean_rows(rows) if len({row.corpus for row in rows}) > 1 else [])]


def show(title: str, rows: Sequence[Row], settings: Collection[tuple[str, float | None]]) -> None:
    """Print the table of some settings."""
    corpora = {row.corpus: f"{row.corpus}: lens and margins from {row.calibrated_on}" for row in rows}
    table = Table(title=title, caption="\n".join(corpora.values()))
    for heading in ("corpus", "policy", "scores"):
        table.add_column(heading, no_wrap=True)
    for heading in ("K", "compute\nshare", "agreement\n@K", "P@K", "nDCG\n@10", "seconds", "latency\n/ off"):
        table.add_column(heading, justify="right")
    shown = [row for row in with_means(rows) if (row.policy, row.value) in settings]
    for _, section in groupby(shown, key=lambda row: (row.corpus, row.top_k)):
        for row in section:
            table.add_row(*_cells(row))
        table.add_section()
    Console(width=130).print(table)


def _cells(row: Row) -> list[str]:
    return [
        row.corpus,
        row.policy if row.value is None else f"{row.policy} {row.value:g}",
        row.scores,
        str(row.top_k),
        *(f"{value:.3f}" for value in (row.compute_share, row.agreement, row.precision, row.ndcg)),
        *("" if value is None else f"{value:.3f}" for value in (row.seconds, row.latency_ratio)),
    ]


def write_rows(rows: Sequence[Row], about: dict[str, str], directory: Path) -> None:
    """Write all rows, as ``quality.csv`` and ``quality.json``."""
    entries = [asdict(row) for row in with_means(rows)]
    with (directory / "quality.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(entries[0]))
        writer.writeheader()
        writer.writerows(entries)
    versions = {module.__name__: module.__version__ for module in (torch, transformers, sklearn)}
    everything = about | {"versions": versions, "rows": entries}
    (directory / "quality.json").write_text(json.dumps(everything, indent=1) + "\n", encoding="utf-8")


def draw_curves(rows: Sequence[Row], path: Path) -> None:
    """What is kept against what it costs, mean over corpora: a row of panels for each K."""
    means = mean_rows(rows)
    top_ks = sorted({row.top_k for row in means})
    costs = {"compute_share": "compute share"}
    if len({row.value for row in means if row.policy == "lens" and row.seconds is not None}) > 1:
        costs["seconds"] = "seconds"
    gains = {
        "agreement": "Share of the full model's top {} that is kept",
        "precision": "Precision of the top {}, by human judgements",
        "ndcg": "nDCG@10 of the top {}, by human judgements",
    }
    shape = (len(top_ks), len(costs) * len(gains))
    figure = Figure(figsize=(3.8 * shape[1], 3.2 * shape[0] + 0.8), layout="constrained")
    panels = figure.subplots(*shape, squeeze=False)
    for top_k, line in zip(top_ks, panels, strict=True):
        kinds = [(cost, gain) for cost in costs for gain in gains]
        for (cost, gain), axes in zip(kinds, line, strict=True):
            _draw_curve(axes, [row for row in means if row.top_k == top_k], cost, gain)
            axes.set_title(gains[gain].format(top_k), fontsize=9)
            axes.set(xlabel=costs[cost])
    handles, labels = panels[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels))
    corpora = list(dict.fromkeys(row.corpus for row in rows))
    figure.suptitle(
        f"What pruning saves and what it loses: {', '.join(corpora[:-1])} and {corpora[-1]}, mean"
        if len(corpora) > 1
        else f"What pruning saves and what it loses: {corpora[0]}"
    )
    figure.savefig(path, dpi=120)


def _draw_curve(axes: Axes, rows: Sequence[Row], cost: str, gain: str) -> None:
    known = [row for row in rows if getattr(row, cost) is not None]
    for policy, (colour, marker) in _STYLES.items():
        for scores, style in (("exact", "-"), ("estimated", "--")):
            points = [row for row in known if (row.policy, row.scores) == (policy, scores)]
            if points:
                across, up = ([getattr(row, name) for row in points] for name in (cost, gain))
                axes.plot(
                    across, up, style, color=colour, marker=marker, markersize=4, label=f"{policy}, {scores}"
                )
    off = next(row for row in known if row.policy == "off")
    axes.plot(getattr(off, cost), getattr(off, gain), "*", color="black", markersize=11, label="off")
    axes.grid(alpha=0.3)


def draw_gammas(corpora: Sequence[Recorded], lenses: Sequence[CalibratedLens], path: Path) -> None:
    """γ and cluster-γ by layer, of head and lens: a panel for each corpus."""
    figure = Figure(figsize=(4.5 * len(corpora), 4), layout="constrained")
    panels = figure.subplots(1, len(corpora), squeeze=False, sharey=True)[0]
    for axes, corpus, lens in zip(panels, corpora, lenses, strict=True):
        readings = {"head": corpus.head[:, :, 1:], "lens": corpus.estimates(lens)[:, :, :-1]}
        for (name, seen), first, colour in zip(readings.items(), (1, 0), ("#E69F00", "#0072B2"), strict=True):
            for clusters, style in ((False, "-"), (True, "--")):
                values = mean_gammas(seen, corpus.head[:, :, -1], clusters=clusters)
                layers = np.arange(first, first + len(values))
                label = f"{name}, {'cluster-γ' if clusters else 'γ'}"
                axes.plot(layers, values, style, color=colour, marker=".", label=label)
        axes.set(title=f"{corpus.name} ({len(corpus.requests)} requests)", xlabel="layer")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("mean γ with the final scores")
    panels[-1].legend(loc="lower right")
    figure.savefig(path, dpi=150)


def draw_trajectories(corpus: Recorded, lens: CalibratedLens, path: Path, top_k: int = 5) -> None:
    """Provisional scores of one request by layer, by head and by lens; the full model's top K is thick."""
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    _draw_request(left, corpus.head[0, :, 1:], 1, top_k)
    _draw_request(right, corpus.estimates(lens)[0], 0, top_k)
    left.set(title="read by the model's own head", ylabel="provisional score")
    right.set(title="estimated by the lens; after the last layer the score itself")
    figure.suptitle(
        f"{corpus.name}: one request, {corpus.head.shape[1]} candidates, the top {top_k} with their ranks"
    )
    figure.savefig(path, dpi=150)


def _draw_request(axes: Axes, scores: Array, first: int, top_k: int) -> None:
    layers = np.arange(first, first + scores.shape[1])
    ranks = {
        index: rank for rank, index in enumerate(np.argsort(-scores[:, -1], kind="stable")[:top_k].tolist(), 1)
    }
    for candidate, trajectory in enumerate(scores):
        won = candidate in ranks
        colour, width = ("#009E73", 2.2) if won else ("#999999", 1.0)
        axes.plot(layers, trajectory, color=colour, linewidth=width, zorder=2 + won)
    write_ranks(axes, [(rank, int(layers[-1]), float(scores[index, -1])) for index, rank in ranks.items()])
    axes.set(xlabel="layer")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
