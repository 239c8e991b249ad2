"""Draws two figures of the documentation from one real rerank: the demo's question, 20 candidates, the top 5.

    python scripts/draw_how_it_works.py docs

``layers.png`` is the ragged batch of every layer, ``trajectories.png`` what ``grating explain --plot`` draws.
"""

from __future__ import annotations

import sys
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.patches import Patch

from grating_core import Reranker, RerankResult
from grating_core.demo import QUESTION, first_stage, load_passages
from grating_core.lab.plots import plot_trajectories

WINNER, LOSER = "#009E73", "#BBBBBB"  # as in the other figures: told apart by colour-blind readers


def draw_layers(result: RerankResult, path: Path) -> None:
    """A bar for each candidate that a layer computed, as wide as it has tokens, one row for each layer."""
    trace = result.trace
    winners = {ranked.index for ranked in result.ranking}
    layers = [layer for layer in trace.layers if layer.layer]
    figure = Figure(figsize=(8, 3.6), layout="constrained")
    axes = figure.subplots()
    for layer in layers:
        start = 0
        for candidate in layer.alive:
            colour = WINNER if candidate in winners else LOSER
            axes.barh(layer.layer, trace.lengths[candidate], left=start, color=colour, edgecolor="white")
            start += trace.lengths[candidate]
    padded = len(trace.lengths) * max(trace.lengths)
    axes.axvline(padded, color="black", linestyle=":")
    axes.text(
        padded, trace.depth, "a padded batch: all of this in every layer ", ha="right", va="center", fontsize=9
    )
    axes.set(
        xlabel="tokens computed", ylabel="layer", ylim=(trace.depth + 0.6, 0.4), yticks=range(1, trace.depth + 1)
    )
    axes.spines[["top", "right"]].set_visible(False)
    wanted, candidates = len(winners), len(trace.lengths)
    keys = [Patch(color=WINNER, label=f"the best {wanted}"), Patch(color=LOSER, label="the others")]
    axes.legend(handles=keys, loc="center", bbox_to_anchor=(0.75, 0.5))
    message = f"The best {wanted} of {candidates} for {trace.compute_share:.0%} of the computing"
    axes.set_title(message, loc="left", weight="bold", pad=22)
    read = "one real question; each block is a candidate, as wide as it has tokens"
    axes.text(0, 1.03, read, transform=axes.transAxes, fontsize=9)
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    with Reranker.from_pretrained("bundled:ms-marco-minilm-l12") as reranker:
        found = reranker.rerank(QUESTION, first_stage(QUESTION, load_passages(), 20), top_k=5)
    draw_layers(found, folder / "layers.png")
    plot_trajectories(found, folder / "trajectories.png")
