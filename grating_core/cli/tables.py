"""This module makes tables and lines of text of results."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from rich.table import Table
from rich.text import Text

from grating_core.cli.output import visible

if TYPE_CHECKING:
    from grating_core.results import RankedDocument, RerankResult

_SHOWN = 300  # characters of a text


def plain_table(*headings: str, numbers: int = 0) -> Table:
    """Return a table without lines, whose first columns are that many numbers."""
    table = Table(box=None, pad_edge=False, header_style="bold", title_justify="left")
    for place, heading in enumerate(headings):
        if place < numbers:
            table.add_column(heading, justify="right", no_wrap=True)
        else:
            table.add_column(heading, overflow="fold")
    return table


def ranking_table(result: RerankResult, ids: Sequence[Any] = ()) -> Table:
    """Return the documents of a ranking, best first.

    Args:
        result: The ranking.
        ids: The names of the documents, None for one without; no names for none with.
    """
    named = any(id is not None for id in ids)
    table = plain_table("rank", "score", "probability", "index", *(["id"] if named else ()), "text", numbers=4)
    for place, ranked in enumerate(result.ranking):
        score = f"{ranked.score:.3f}{' (estimate)' if ranked.estimated else ''}"
        name = ("" if ids[place] is None else str(ids[place]),) if named else ()
        probability = f"{ranked.probability:.3f}"
        table.add_row(str(place + 1), score, probability, str(ranked.index), *name, _highlighted(ranked))
    return table


def trace_table(result: RerankResult) -> Table:
    """Return a line for each layer."""
    from grating_core.pruning import Route

    headings = ("layer", "alive", *(route.value for route in Route), "best", "worst", "tokens", "ms", "waited")
    table = plain_table(*headings, numbers=len(headings))
    table.title = "By layer"
    for layer in result.trace.layers:
        table.add_row(
            str(layer.layer),
            str(len(layer.alive)),
            *(str(layer.routes.count(route)) for route in Route),
            f"{max(layer.scores):.2f}" if layer.scores else "–",
            f"{min(layer.scores):.2f}" if layer.scores else "–",
            f"{layer.tokens:,}",
            f"{1000 * layer.seconds:.1f}",
            f"{1000 * layer.seconds_waited:.1f}",
        )
    return table


def closing_line(result: RerankResult) -> str:
    """Return what a rerank took, in a line."""
    trace = result.trace
    cut = f", {len(trace.truncated)} cut to the window" if trace.truncated else ""
    line = (
        f"{len(trace.lengths)} documents, {sum(trace.lengths):,} tokens{cut}; {trace.seconds:.2f} s, "
        f"compute share {trace.compute_share:.2f}{', cut short by the deadline' if trace.cut_short else ''}"
    )
    if trace.peak_memory is None:
        return line
    spilled = f", spilled {trace.bytes_spilled / 1e6:,.0f} MB" if trace.bytes_spilled else ""
    return (
        f"{line}; read {trace.bytes_read / 1e6:,.0f} MB{spilled}, waited {trace.seconds_waited:.2f} s for the "
        f"disk, {trace.peak_memory / 1e6:,.0f} MB in memory at most"
    )


def _highlighted(ranked: RankedDocument) -> Text:
    """Return the beginning of a text with its highlights in colour, and the best one if it is not in there."""
    parts = [0, *sorted({place for one in ranked.highlights for place in (one.start, one.stop)}), len(ranked.text)]
    styles = {one.start: "bold green" if one.worth == 1 else "green" for one in ranked.highlights}
    shown = Text()
    for start, stop in pairwise(parts):
        part = visible(" ".join(ranked.text[start:stop].split()))
        style = styles.get(start, "")
        if room := _SHOWN - len(shown):
            shown.append(part if len(part) <= room else part[: room - 1] + "…", style)
            shown.append(" " if part and len(part) < room else "")
        elif style.startswith("bold"):
            shown.append(f" … {part}", style)
    shown.rstrip()
    return shown
