"""This module draws the scores of a rerank layer by layer, and the results of a simulation."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grating_core.files.writing import replace_file
from grating_core.results import RerankResult

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from grating_core.lab.comparison import Point

# Colour-blind readers can distinguish these colours, and the lines differ in style as well.
_WINNER, _LOSER = "#009E73", "#999999"
_WAYS = {"dense streaming": ("black", "*"), "DIP": ("#E69F00", "s"), "cache-aware DIP": ("#0072B2", "o")}


def plot_trajectories(result: RerankResult, path: Path) -> None:
    """Draw the provisional scores of all candidates by layer.

    The lines of the top K are thick and end with their rank. A dot marks the layer after which a candidate stopped
    being computed.

    Args:
        result: A rerank of at least one document.
        path: File of the picture. The ending of its name gives the format.

    Raises:
        ModuleNotFoundError: matplotlib is not installed; the message names the extra that installs it.
        StorageError: The picture cannot be written.
    """
    with _naming_the_extra():
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator

    trace = result.trace
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    ranks = {ranked.index: rank for rank, ranked in enumerate(result.ranking, 1)}
    ends = []
    for candidate in range(len(trace.lengths)):
        computed = [layer for layer in trace.layers if layer.scores and candidate in layer.alive]
        scores = [layer.scores[layer.alive.index(candidate)] for layer in computed]
        last = computed[-1].layer
        style = _line(won=candidate in ranks, stopped=last < trace.depth, winners=len(ranks))
        axes.plot([layer.layer for layer in computed], scores, markevery=[-1], **style)
        if candidate in ranks:
            ends.append((ranks[candidate], last, scores[-1]))
    _write_ranks(axes, ends)
    reader = "score, or the lens's estimate (differences in a layer count)"
    axes.set(xlabel="layer", ylabel=reader, xlim=(trace.layers[0].layer - 0.2, trace.depth + 0.6))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_title(
        f"{len(trace.lengths)} candidates, of which the top {len(ranks)} are found "
        f"with {trace.compute_share:.0%} of the computing"
    )
    axes.grid(alpha=0.3)
    # The legend has one line of each kind, the winners first.
    kinds = {line.get_label(): line for line in axes.lines}
    axes.legend(handles=sorted(kinds.values(), key=lambda line: -line.get_linewidth()), loc="best")
    _save(figure, path)


def _line(*, won: bool, stopped: bool, winners: int) -> dict[str, Any]:
    """Return the style of a candidate's line, and its text in the legend."""
    if won:
        label = f"top {winners}, with the rank" + (", by an estimate" if stopped else "")
        style, width = ("--" if stopped else "-"), 2.2
    else:
        label = "stops being computed at the dot" if stopped else "computed to the end, not in the top"
        style, width = (":" if stopped else "-"), 1.0
    return {
        "label": label,
        "color": _WINNER if won else _LOSER,
        "linestyle": style,
        "linewidth": width,
        "marker": "." if stopped else "",
        "markersize": 8,
        "zorder": 2 + won,
    }


def _write_ranks(axes: Axes, ends: list[tuple[int, int, float]]) -> None:
    """Write each winner's rank at the end of its line. Ranks of lines that end close together are moved apart."""
    low, high = axes.get_ylim()
    gap = (high - low) / 28
    below: dict[int, float] = {}  # the lowest text so far, by the layer where lines end
    for rank, layer, score in sorted(ends, key=lambda end: -end[2]):
        height = below[layer] = min(score, below.get(layer, high) - gap)
        axes.text(layer + 0.15, height, str(rank), color=_WINNER, fontweight="bold", va="center", clip_on=False)


def plot_simulation(points: Sequence[Point], path: Path) -> None:
    """Draw perplexity against tokens a second: a curve over densities for each way of pruning, a point for dense.

    Args:
        points: Points to draw, all with perplexities.
        path: File of the picture. The ending of its name gives the format.

    Raises:
        ModuleNotFoundError: matplotlib is not installed; the message names the extra that installs it.
        StorageError: The picture cannot be written.
    """
    with _naming_the_extra():
        from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 5), layout="constrained")
    axes = figure.subplots()
    for way in dict.fromkeys(point.estimate.way for point in points):
        curve = sorted((point for point in points if point.estimate.way == way), key=lambda point: -point.density)
        colour, marker = _WAYS[way]
        speeds = [point.estimate.tokens_per_second for point in curve]
        costs = [point.perplexity or math.nan for point in curve]
        axes.plot(speeds, costs, color=colour, marker=marker, label=way)
        for point, speed, cost in zip(curve, speeds, costs, strict=True):
            axes.annotate(f"{point.density:g}", (speed, cost), (4, 4), textcoords="offset points", fontsize=8)
    axes.set(
        xlabel="tokens per second, simulated", ylabel="perplexity", yscale="log", title="at each point: density"
    )
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    _save(figure, path)


@contextmanager
def _naming_the_extra() -> Iterator[None]:
    try:
        yield
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("plots need matplotlib: pip install 'grating-core[plot]'") from error


def _save(figure: Any, path: Path) -> None:
    """Write a picture as a whole, or raise ``StorageError`` and leave what is there."""
    path = path if path.suffix else path.with_suffix(".png")
    picture = BytesIO()
    figure.savefig(picture, format=path.suffix[1:], dpi=150)
    replace_file(path, picture.getvalue())
