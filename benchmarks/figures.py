"""The figures of the documentation that show what was measured, drawn from the files of results."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from benchmarks.report import Result, Row

# Told apart by colour-blind readers, and without colour by their markers.
_STYLES = {"cluster": ("#E69F00", "s"), "SEE": ("#009E73", "^"), "lens": ("#0072B2", "o")}
# What the figure of memory shows, by how the systems' names begin.
_LINES = {"transformers": "#E69F00", "accelerate": "#0072B2", "grating, ": "#009E73"}


def draw_memory(result: Result, path: Path) -> None:
    """Draw memory over time while a system loads its weights and serves its requests: three lines.

    They are plain transformers and accelerate's offload, each in the batches that take the least memory, and
    grating within its smallest budget, which is dotted.
    """
    figure = Figure(figsize=(9, 4.5), layout="constrained")
    axes = figure.subplots()
    peaks = []
    for beginning, colour in _LINES.items():
        alike = [row for row in result.rows if row["system"].startswith(beginning)]
        if not alike:
            continue
        row = min(alike, key=_peak)
        seconds, grown = zip(*row["curve"], strict=True)
        axes.plot(seconds, grown, color=colour, linewidth=2)
        axes.text(seconds[-1], grown[-1], f" {row['system']}", color=colour, va="center")
        if row["budget_mb"]:
            axes.axhline(row["budget_mb"], color=colour, linestyle=":", linewidth=1)
        peaks.append(row["peak_mb"])
    setting = result.setting
    message = f"The same reranking in {peaks[-1]:,.0f} MB instead of {peaks[0]:,.0f}\n"
    axes.set_title(message, loc="left", fontweight="bold")
    about = f"{setting['model']}: {setting['candidates']} candidates of {setting['tokens']} tokens"
    axes.text(0, 1.02, about, transform=axes.transAxes, fontsize=9)
    axes.set(xlabel="seconds since the tokenizer was loaded", ylabel="MB over imports and tokenizer")
    axes.margins(x=0)
    axes.set_xlim(0, axes.get_xlim()[1] * 1.45)  # room for the names
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


def _peak(row: Row) -> float:
    return float(row["peak_mb"])


def draw_pruning(result: Result, path: Path) -> None:
    """Draw what is kept against what it costs, mean over the collections: a row of panels for each K."""
    means = [row for row in result.rows if row["collection"] == "mean"]
    top_ks = sorted({row["top_k"] for row in means})
    gains = {
        "agreement": "Share of the full model's top {} that is kept",
        "precision": "Precision of the top {}, by human judgements",
        "ndcg_10": "nDCG@10 of the top {}, by human judgements",
    }
    figure = Figure(figsize=(11.4, 3.2 * len(top_ks) + 0.8), layout="constrained")
    panels = figure.subplots(len(top_ks), len(gains), squeeze=False)
    for top_k, line in zip(top_ks, panels, strict=True):
        for (gain, title), axes in zip(gains.items(), line, strict=True):
            _draw_curves(axes, [row for row in means if row["top_k"] == top_k], gain)
            axes.set_title(title.format(top_k), fontsize=9)
            axes.set(xlabel="compute share")
    handles, labels = panels[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels))
    figure.savefig(path, dpi=120)


def _draw_curves(axes: Axes, rows: list[Row], gain: str) -> None:
    for policy, (colour, marker) in _STYLES.items():
        for scores, style in (("exact", "-"), ("estimated", "--")):
            points = [row for row in rows if (row["policy"], row["scores"]) == (policy, scores)]
            if points:
                label = f"{policy}, {scores}"
                axes.plot(*_points(points, gain), style, color=colour, marker=marker, markersize=4, label=label)
    off = [row for row in rows if row["policy"] == "off"]
    axes.plot(*_points(off, gain), "*", color="black", markersize=11, label="off")
    axes.grid(alpha=0.3)


def _points(rows: list[Row], gain: str) -> tuple[list[Any], list[Any]]:
    return [row["compute_share"] for row in rows], [row[gain] for row in rows]


def draw_deadline(result: Result, path: Path) -> None:
    """Draw what is kept against the time that a request had: as measured, and replayed in three ways."""
    figure = Figure(figsize=(9, 4), layout="constrained")
    panels = figure.subplots(1, 2, sharex=True)
    styles = {"measured": ("black", "o"), "mixed": ("#0072B2", ""), "stop when it is over": ("#009E73", "")}
    styles["drop at once"] = ("#E69F00", "")
    top_k = result.setting["top_k"]
    titles = {
        "agreement": f"Share of the full model's top {top_k} that is kept",
        "agreement_1": "Requests whose best document is the full model's",
    }
    for axes, (gain, title) in zip(panels, titles.items(), strict=True):
        for way, (colour, marker) in styles.items():
            rows = [row for row in result.rows if (row["collection"], row["way"]) == ("mean", way)]
            label = way if marker else f"replayed: {way}"
            shares, gains = [row["share"] for row in rows], [row[gain] for row in rows]
            axes.plot(shares, gains, color=colour, marker=marker or None, markersize=4, label=label)
        axes.set_title(title, fontsize=9)
        axes.set(xlabel="deadline, as a share of the time without pruning", ylim=(None, 1.02))
        axes.grid(alpha=0.3)
    panels[0].legend(loc="lower right", fontsize=8)
    figure.savefig(path, dpi=120)


def draw_gammas(result: Result, path: Path) -> None:
    """Draw γ by layer, of head and lens: a panel for each collection."""
    names = list(dict.fromkeys(row["collection"] for row in result.rows))
    figure = Figure(figsize=(4.5 * len(names), 4), layout="constrained")
    panels = figure.subplots(1, len(names), squeeze=False, sharey=True)[0]
    for axes, name in zip(panels, names, strict=True):
        rows = [row for row in result.rows if row["collection"] == name]
        for reading, colour in (("head", "#E69F00"), ("lens", "#0072B2")):
            read = [row for row in rows if row[f"gamma_{reading}"] is not None]
            layers, gammas = [row["layer"] for row in read], [row[f"gamma_{reading}"] for row in read]
            axes.plot(layers, gammas, color=colour, marker=".", label=reading)
        axes.set(title=name, xlabel="layer")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("mean γ with the final scores")
    panels[-1].legend(loc="lower right")
    figure.savefig(path, dpi=150)


def draw_promise(result: Result, path: Path) -> None:
    """Draw what is kept of each corpus: a panel for each target, a column for each number of candidates and K."""
    means = [row for row in result.rows if row["corpus"] == "mean"]
    targets = sorted({row["target"] for row in means})
    figure = Figure(figsize=(5.5 * len(targets), 4), layout="constrained")
    panels = figure.subplots(1, len(targets), squeeze=False, sharey=True)[0]
    for axes, target in zip(panels, targets, strict=True):
        cells = [(row["candidates"], row["top_k"]) for row in means if row["target"] == target]
        for place, (candidates, top_k) in enumerate(cells):
            alike = [
                row
                for row in result.rows
                if (row["candidates"], row["top_k"], row["target"]) == (candidates, top_k, target)
            ]
            corpora = [row["kept"] for row in alike if row["corpus"] != "mean"]
            mean = [row["kept"] for row in alike if row["corpus"] == "mean"]
            axes.plot(
                [place] * len(corpora), corpora, "o", color="#0072B2", alpha=0.35, markersize=5, label="a corpus"
            )
            axes.plot([place], mean, "_", color="black", markersize=18, markeredgewidth=2, label="mean")
        axes.axhline(target, color="#E69F00", label="target")
        axes.set_xticks(
            range(len(cells)), [f"{top_k} of {candidates}" for candidates, top_k in cells], rotation=45
        )
        axes.set_title(f"target={target}")
        axes.grid(alpha=0.3, axis="y")
    panels[0].set_ylabel("share of the top K that is kept")
    handles, labels = panels[0].get_legend_handles_labels()
    shown = dict(zip(labels, handles, strict=True))
    panels[-1].legend(shown.values(), shown.keys(), loc="lower left")
    figure.savefig(path, dpi=150)


def draw_generation(result: Result, path: Path) -> None:
    """Draw how fast each system writes, and how soon it begins: a bar for each, the same order in two panels."""
    systems = [row["system"] for row in result.rows]
    colours = ["#009E73" if system.startswith("grating") else "#BBBBBB" for system in systems]
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for axes, name, form, title in (
        (left, "tokens_per_second_500", "%.0f", "Tokens a second: more is better"),
        (right, "seconds_to_first_500", "%.2f", "Seconds to the first token: less is better"),
    ):
        bars = axes.barh(systems, [row[name] for row in result.rows], color=colours)
        axes.bar_label(bars, fmt=form, padding=3)
        axes.set_title(title, loc="left", fontsize=10)
        axes.margins(x=0.12)
        axes.set_xticks([])
        axes.spines[["top", "right", "bottom"]].set_visible(False)
    left.invert_yaxis()
    setting = result.setting
    figure.suptitle(
        f"{setting['model']}, {setting['threads']} threads, a prompt of 500 tokens",
        x=0.01,
        ha="left",
        fontweight="bold",
    )
    figure.savefig(path, dpi=150)
