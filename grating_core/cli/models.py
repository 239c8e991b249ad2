"""``grating models`` and ``grating plan``."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer

from grating_core.cli.options import AsJson, GivenBudget, ModelName, ModelOptions, TemplateName
from grating_core.cli.output import err, show, show_whole, write_json
from grating_core.cli.tables import plain_table
from grating_core.errors import GratingError, StorageError
from grating_core.files.places import is_there


def models(as_json: AsJson = False) -> None:
    """List the models that are bundled, cached and supported."""
    from grating_core.models.families import FAMILIES

    found = [*_bundled(), *_cached()]
    if as_json:
        write_json({"models": found, "supported": list(FAMILIES)})
        return
    table = plain_table("model", "kind", "layers", "size")
    for model in found:
        size = "made on first use" if model["bytes"] is None else f"{model['bytes'] / 1e6:,.0f} MB"
        table.add_row(model["name"], model["kind"], str(model["layers"] or ""), size)
    show_whole(table)
    show("Supported, as safetensors and if classifiers with one label: " + ", ".join(FAMILIES) + ".")


def _bundled() -> Iterator[dict[str, Any]]:
    from grating_core.models.bundled import BUNDLED_MODELS, bundled_directory

    for name in BUNDLED_MODELS:
        try:
            directory = bundled_directory(name)
        except StorageError:  # there is no place for it
            yield {"name": name, "kind": "bundled", "path": None} | _described(None)
            continue
        made = directory if is_there(directory) else None
        yield {"name": name, "kind": "bundled", "path": str(directory)} | _described(made)


def _cached() -> Iterator[dict[str, Any]]:
    from huggingface_hub import constants, scan_cache_dir
    from huggingface_hub.errors import CacheNotFound

    try:
        cached = scan_cache_dir(constants.HF_HUB_CACHE).repos
    except (CacheNotFound, ValueError, OSError, RuntimeError):  # none, or none that may be read
        return
    for repo in sorted((repo for repo in cached if repo.repo_type == "model"), key=lambda repo: repo.repo_id):
        if not repo.revisions:
            continue
        snapshot = max(repo.revisions, key=lambda revision: revision.last_modified).snapshot_path
        try:
            yield {"name": repo.repo_id, "kind": "hub cache", "path": str(snapshot)} | _described(snapshot)
        except (GratingError, OSError):
            continue  # not a reranker that grating runs


def _described(directory: Path | None) -> dict[str, Any]:
    from grating_core.models.directory import describe_weights

    if directory is None:
        return {"architecture": None, "layers": None, "bytes": None}
    return describe_weights(directory)


@dataclass(frozen=True, kw_only=True)
class PlannedOptions(ModelOptions):
    """Settings that decide what a budget is spent on."""

    memory_budget: GivenBudget = field()
    template: TemplateName = None


def plan(
    model: ModelName,
    settings: PlannedOptions,
    candidates: Annotated[int, typer.Option(min=1, help="Documents of a request.")] = 20,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens of each of them with the query.")] = 500,
    as_json: AsJson = False,
) -> None:
    """Show what a memory budget is spent on, and what a request will read from disk and write to it."""
    with err.status("Looking at the model ..."):
        from grating_core.memory.meter import resident_memory
        from grating_core.opening import open_reranker
        from grating_core.settings import RerankSettings
        from grating_core.text.pairs import load_template

        with closing(open_reranker(RerankSettings(model=model, **vars(settings), show_progress=True))) as opened:
            window, planned = opened.window, opened.plan
        assert planned is not None
        before = resident_memory()
        loaded = load_template(opened.directory, window)
        tokenizer = resident_memory() - before
        del loaded
    request = candidates * min(tokens, window)
    spilled = planned.bytes_spilled(request)
    if as_json:
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
                    "bytes_spilled": spilled,
                },
            }
        )
        return
    table = plain_table("what", "MB", "")
    details = {
        "resident layers": f"{len(planned.resident)} of {len(planned.sizes.layers)}",
        "embedding rows": f"{planned.embedding_rows:,} of {planned.sizes.vocabulary:,}",
        "intermediate results": f"chunks of {planned.chunk_tokens:,} tokens, documents of up to {window:,}",
        "hidden states": f"of up to {planned.hidden_tokens:,} tokens",
        "columns": f"{planned.column_share:.0%} of those of the MLPs",
    }
    for part, size in planned.parts.items():
        table.add_row(part, f"{size / 1e6:,.1f}", details.get(part, ""))
    table.add_row("together", f"{planned.total / 1e6:,.1f}", f"of a budget of {planned.budget / 1e6:,.1f}")
    table.add_row("the tokenizer, beside the budget", f"{tokenizer / 1e6:,.1f}", "as just measured")
    show(table)
    spills = f"writes and reads {spilled / 1e6:,.0f} MB of hidden states."
    show(
        f"A request of {candidates} candidates, {request:,} tokens, reads {planned.bytes_read() / 1e6:,.0f} MB of "
        f"weights and the embedding rows it lacks; "
        + (spills if spilled else "no hidden states are spilled.")
        + (" Of the MLPs each chunk reads the columns that it uses and lacks." if planned.sizes.columns else "")
    )
