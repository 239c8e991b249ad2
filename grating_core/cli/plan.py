"""This is the command ``grating plan``."""

from __future__ import annotations

from contextlib import closing
from typing import TYPE_CHECKING, Annotated

from grating_core.cli.options import HUB, Takes
from grating_core.cli.output import err, show, write_json
from grating_core.cli.tables import plain_table
from grating_core.settings import RerankSettings

if TYPE_CHECKING:
    from grating_core.memory.plan import MemoryPlan

_PLANNED = ("device", "dtype", "memory_budget", "max_length", "adapter", "template", "cutoff_layers", *HUB)


def plan(
    settings: Annotated[RerankSettings, Takes(_PLANNED, required=("memory_budget",))],
    candidates: int = 20,
    tokens: int = 500,
    as_json: bool = False,
) -> None:
    """Show what a memory budget is spent on, and what a request will read from disk and write to it.

    Args:
        tokens: The tokens of each document with the query.
    """
    with err.status("Looking at the model ..."):
        from grating_core.memory.meter import resident_memory
        from grating_core.opening.rerankers import open_reranker
        from grating_core.text.pairs import load_template

        with closing(open_reranker(settings)) as opened:
            window, planned = opened.window, opened.plan
        assert planned is not None
        before = resident_memory()
        loaded = load_template(opened.directory, window)
        tokenizer = resident_memory() - before
        del loaded
    request = candidates * min(tokens, window)
    if not as_json:
        _print(planned, window, tokenizer, candidates, request)
        return
    write_json(
        {
            "budget": planned.budget,
            "parts": planned.parts,
            "total": planned.total,
            "tokenizer": tokenizer,
            "layers": len(planned.sizes.layers),
            "resident_layers": len(planned.resident),
            "window": window,
            "request": {
                "candidates": candidates,
                "tokens": request,
                "bytes_read": planned.bytes_read(),
                "bytes_spilled": planned.bytes_spilled(request),
            },
        }
    )


def _print(planned: MemoryPlan, window: int, tokenizer: int, candidates: int, request: int) -> None:
    """Print a plan, and what a request of so many candidates and tokens reads and writes."""
    details = {
        "resident layers": f"{len(planned.resident)} of {len(planned.sizes.layers)}",
        "embedding rows": f"{planned.embedding_rows:,} of {planned.sizes.vocabulary:,}",
        "intermediate results": f"slices of {planned.slice_tokens:,} tokens",
        "keys and values": f"of up to {window:,} tokens",
        "hidden states": f"of up to {planned.hidden_tokens:,} tokens",
    }
    table = plain_table("what", "MB", "")
    for part, size in planned.parts.items():
        table.add_row(part, f"{size / 1e6:,.1f}", details.get(part, ""))
    table.add_row("together", f"{planned.total / 1e6:,.1f}", f"of a budget of {planned.budget / 1e6:,.1f}")
    if planned.sizes.writing:
        writing = f"{planned.sizes.writing / 1e6:,.1f}"
        table.add_row("instead, to write the layers in 8 bits", writing, "once, before loading")
    table.add_row("the tokenizer, beside the budget", f"{tokenizer / 1e6:,.1f}", "as just measured")
    spilled = planned.bytes_spilled(request)
    spills = f"writes and reads {spilled / 1e6:,.0f} MB of hidden states"
    show(
        table,
        f"A request of {candidates} candidates, {request:,} tokens, reads {planned.bytes_read() / 1e6:,.0f} MB of "
        f"weights and the embedding rows it lacks; "
        f"{spills if spilled else 'no hidden states are spilled'}.",
    )
