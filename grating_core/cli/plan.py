"""This is the command ``grating plan``."""

from __future__ import annotations

from contextlib import closing
from typing import TYPE_CHECKING, Annotated, Any

from grating_core.cli.options import HUB, Takes
from grating_core.cli.output import err, show, write_json
from grating_core.cli.tables import plain_table
from grating_core.settings import GenerationSettings, RerankSettings

if TYPE_CHECKING:
    from grating_core.memory.plan import MemoryPlan

_OF_BOTH = ("device", "dtype", "memory_budget", "max_length", "adapter", *HUB)
_OF_RERANKERS = ("template", "cutoff_layers")


def plan(
    settings: Annotated[RerankSettings, Takes((*_OF_BOTH, *_OF_RERANKERS), required=("memory_budget",))],
    candidates: int = 20,
    tokens: int = 500,
    generate: bool = False,
    bits: int | None = None,
    kv_bits: int | None = None,
    mlp_density: float | None = None,
    as_json: bool = False,
) -> None:
    """Show what a memory budget is spent on, and what a request or a new token will read from disk.

    Args:
        tokens: The tokens of each document with the query.
        generate: Whether the model generates text, and does not rerank. The bits and the density say so as well.
        bits: The bits of each weight of a model that generates, 8 or 4.
        kv_bits: The bits of keys and values, 8.
        mlp_density: The share of the MLPs' weights that each new token uses, above 0 and at most 1.
    """
    given = {"bits": bits, "kv_bits": kv_bits, "mlp_density": mlp_density}
    if not generate and all(value is None for value in given.values()):
        planned, found = _of_reranker(settings)
        request = candidates * min(tokens, planned.sizes.window)
        reads: dict[str, Any] = {
            "candidates": candidates,
            "tokens": request,
            "bytes_read": planned.bytes_read(),
            "bytes_spilled": planned.bytes_spilled(request),
        }
        found |= {"request": reads}
        told = _request_told(**reads)
    else:
        planned, found = _of_language_model(_generating(settings, **given))
        share = 1.0 if mlp_density is None else mlp_density
        reads = {"bytes_read": planned.bytes_read(), "bytes_of_columns": int(share * planned.sizes.columns)}
        found |= {"column_share": planned.column_share if planned.sizes.columns else None, "token": reads}
        told = _token_told(**reads)
    if as_json:
        write_json(found)
    else:
        _print(planned, found["tokenizer"], told)


def _generating(settings: RerankSettings, **given: Any) -> GenerationSettings:
    """Return the settings of a model that generates.

    Raises:
        ValueError: A value is not usable, or is for rerankers.
    """
    for name in _OF_RERANKERS:
        if (value := getattr(settings, name)) is not None:
            raise ValueError(
                f"{name}={value!r} is for rerankers, and generate, bits, kv_bits and mlp_density are for models "
                f"that generate text: leave one of them out"
            )
    shared = {name: getattr(settings, name) for name in ("model", *_OF_BOTH, "show_progress")}
    return GenerationSettings(**shared, **given)


def _of_reranker(settings: RerankSettings) -> tuple[MemoryPlan, dict[str, Any]]:
    with err.status("Looking at the model ..."):
        from grating_core.memory.meter import resident_memory
        from grating_core.opening.rerankers import open_reranker
        from grating_core.text.pairs import load_template

        with closing(open_reranker(settings)) as opened:
            planned = opened.plan
        assert planned is not None
        before = resident_memory()
        loaded = load_template(opened.directory, opened.window)
        tokenizer = resident_memory() - before
        del loaded
    return planned, _as_json(planned, tokenizer)


def _of_language_model(settings: GenerationSettings) -> tuple[MemoryPlan, dict[str, Any]]:
    with err.status("Looking at the model ..."):
        from grating_core.memory.meter import resident_memory
        from grating_core.opening.language_models import open_language_model
        from grating_core.text.chat import PromptTokenizer

        with closing(open_language_model(settings)) as opened:
            planned, stored = opened.plan, opened.stored
        assert planned is not None
        before = resident_memory()
        loaded = PromptTokenizer(stored.directory, rows=stored.vocabulary)
        tokenizer = resident_memory() - before
        del loaded
    return planned, _as_json(planned, tokenizer)


def _as_json(planned: MemoryPlan, tokenizer: int) -> dict[str, Any]:
    return {
        "budget": planned.budget,
        "parts": planned.parts,
        "total": planned.total,
        "tokenizer": tokenizer,
        "layers": len(planned.sizes.layers),
        "resident_layers": len(planned.resident),
        "window": planned.sizes.window,
    }


def _request_told(candidates: int, tokens: int, bytes_read: int, bytes_spilled: int) -> str:
    spills = f"writes and reads {bytes_spilled / 1e6:,.0f} MB of hidden states"
    return (
        f"A request of {candidates} candidates, {tokens:,} tokens, reads {bytes_read / 1e6:,.0f} MB of weights "
        f"and the embedding rows it lacks; {spills if bytes_spilled else 'no hidden states are spilled'}."
    )


def _token_told(bytes_read: int, bytes_of_columns: int) -> str:
    columns = f"; of the {bytes_of_columns / 1e6:,.0f} MB of columns that it uses, it reads those it lacks"
    return (
        f"Each new token reads {bytes_read / 1e6:,.0f} MB of weights and the embedding row, if it is not in "
        f"memory{columns if bytes_of_columns else ''}."
    )


def _print(planned: MemoryPlan, tokenizer: int, told: str) -> None:
    """Print a plan, and what is told of its reads and writes."""
    sizes = planned.sizes
    details = {
        "resident layers": f"{len(planned.resident)} of {len(sizes.layers)}",
        "embedding rows": f"{planned.embedding_rows:,} of {sizes.vocabulary:,}",
        "intermediate results": f"slices of {planned.slice_tokens:,} tokens",
        "keys and values": f"of up to {sizes.window:,} tokens",
        "hidden states": f"of up to {planned.hidden_tokens:,} tokens",
        "columns": f"{planned.column_share:.0%} of each layer's",
    }
    table = plain_table("what", "MB", "")
    for part, size in planned.parts.items():
        table.add_row(part, f"{size / 1e6:,.1f}", details.get(part, ""))
    table.add_row("together", f"{planned.total / 1e6:,.1f}", f"of a budget of {planned.budget / 1e6:,.1f}")
    if sizes.writing:
        table.add_row("instead, to write companion files", f"{sizes.writing / 1e6:,.1f}", "once, before loading")
    table.add_row("the tokenizer, beside the budget", f"{tokenizer / 1e6:,.1f}", "as just measured")
    show(table, told)
