"""Pictures: every candidate's score in a rerank, layer by layer; what a simulation found."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from grating_core.pruning import Route
from grating_core.results import RerankResult, Trace

if TYPE_CHECKING:
    from grating_core.sparsity.comparison import Point

# Told apart by colour-blind readers, and without colour by their line style.
_STYLES: dict[Route, tuple[str, Literal["-", "--", ":"]]] = {
    Route.SELECTED: ("#009E73", "--"),
    Route.DEFERRED: ("#E69F00", "--"),
    Route.DROPPED: ("#999999", ":"),
}
_WAYS = {"dense streaming": ("black", "*"), "DIP": ("#E69F00", "s"), "cache-aware DIP": ("#0072B2", "o")}


def plot_trajectories(result: RerankResult, path: Path) -> None:
    """Draw the provisional scores of all candidates by layer.

    A line has the colour of the last route its candidate was given; those of the top K are thick and unbroken. A
    dot marks the layer after which a candidate stopped being computed.

    Args:
        result: A rerank of at least one document.
        path: Where the picture goes; its ending gives the format.

    Raises:
        ModuleNotFoundError: matplotlib is not installed; the message names the extra that installs it.
    """
    with _naming_the_extra():
        from matplotlib.figure import Figure
        from matplotlib.lines import Line2D
        from matplotlib.ticker import MaxNLocator

    trace = result.trace
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    winners = {ranked.index for ranked in result.ranking}
    for candidate in range(len(trace.lengths)):
        layers, scores, route = _trajectory(trace, candidate)
        colour, style = _STYLES[route]
        if won := candidate in winners:
            style = "-"
        axes.plot(layers, scores, color=colour, linestyle=style, linewidth=2.2 if won else 1.0, zorder=2 + won)
        if layers[-1] < trace.depth:
            axes.plot(layers[-1], scores[-1], ".", color=colour, markersize=8)
    first = trace.layers[0].layer
    reader = "score by the model's own head" if first else "estimate by the lens (differences in a layer count)"
    axes.set(xlabel="layer", ylabel=reader, xlim=(first - 0.2, trace.depth + 0.2))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_title(
        f"{len(trace.lengths)} candidates, top {len(winners)} drawn thick, compute share {trace.compute_share:.2f}"
    )
    axes.grid(alpha=0.3)
    keys = [Line2D([], [], color=c, linestyle=s, label=route.value) for route, (c, s) in _STYLES.items()]
    axes.legend(handles=keys, title="last route")
    figure.savefig(path, dpi=150)


def _trajectory(trace: Trace, candidate: int) -> tuple[list[int], list[float], Route]:
    """The layers a candidate was computed in, its score after each, and its last route."""
    layers, scores, route = [], [], Route.DEFERRED
    for record in trace.layers:
        if candidate in record.alive:
            place = record.alive.index(candidate)
            layers.append(record.layer)
            scores.append(record.scores[place])
            # Nothing is decided after the last layer: what was decided before it is what it is known by.
            route = record.routes[place] if record.layer < trace.depth else route
    return layers, scores, route


def plot_simulation(points: Sequence[Point], path: Path) -> None:
    """Draw perplexity against tokens a second: a curve over densities for each way of pruning, a point for dense.

    Args:
        points: With perplexities.
        path: Where the picture goes; its ending gives the format.

    Raises:
        ModuleNotFoundError: matplotlib is not installed; the message names the extra that installs it.
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
    figure.savefig(path, dpi=150)


@contextmanager
def _naming_the_extra() -> Iterator[None]:
    try:
        yield
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("plots need matplotlib: pip install 'grating-core[plot]'") from error
