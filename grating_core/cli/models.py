"""``grating models`` and ``grating plan``."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import typer

from grating_core.cli.options import MlpDensity, ModelName, ModelOptions, TemplateName
from grating_core.cli.output import err, out
from grating_core.cli.tables import plain_table
from grating_core.errors import GratingError


def models() -> None:
    """List the models that are bundled, cached and supported."""
    from huggingface_hub import scan_cache_dir
    from huggingface_hub.errors import CacheNotFound

    from grating_core.models.bundled import BUNDLED_MODELS, bundled_directory
    from grating_core.models.families import FAMILIES

    table = plain_table("model", "kind", "layers", "size", "where")
    for name in BUNDLED_MODELS:
        directory = bundled_directory(name)
        if directory.is_dir():
            table.add_row(name, "bundled", *_described(directory), str(directory))
        else:
            table.add_row(name, "bundled", "", "", "made on first use")
    try:
        cached = scan_cache_dir().repos
    except CacheNotFound:
        cached = frozenset()
    for repo in sorted((repo for repo in cached if repo.repo_type == "model"), key=lambda repo: repo.repo_id):
        snapshot = max(repo.revisions, key=lambda revision: revision.last_modified).snapshot_path
        try:
            table.add_row(repo.repo_id, "hub cache", *_described(snapshot), str(snapshot))
        except GratingError:
            continue  # not a reranker that grating runs
    out.print(table)
    out.print("Supported, as safetensors and if classifiers with one label: " + ", ".join(FAMILIES) + ".")


def _described(directory: Path) -> tuple[str, str]:
    from grating_core.models.directory import describe_weights

    described = describe_weights(directory)
    return str(described["layers"]), f"{described['bytes'] / 1e6:,.0f} MB"


@dataclass(frozen=True, kw_only=True)
class PlannedOptions(ModelOptions):
    """Arguments of ``plan_memory``."""

    memory_budget: Annotated[str, typer.Option(help="Memory it may take, such as 300MB.")] = field()
    template: TemplateName = None
    mlp_density: MlpDensity = None


def plan(
    model: ModelName,
    settings: PlannedOptions,
    candidates: Annotated[int, typer.Option(min=1, help="Documents of a request.")] = 20,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens of each of them with the query.")] = 500,
) -> None:
    """Show what a memory budget is spent on, and what a request will read from disk and write to it."""
    with err.status("Looking at the model ..."):
        from grating_core.memory.meter import resident_memory
        from grating_core.models.templates import load_template
        from grating_core.reranker import plan_memory

        directory, window, planned = plan_memory(model, **vars(settings), show_progress=True)
        before = resident_memory()
        loaded = load_template(directory, window)
        tokenizer = resident_memory() - before
        del loaded
    request = candidates * min(tokens, window)
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
    out.print(table)
    spilled = planned.bytes_spilled(request) / 1e6
    out.print(
        f"A request of {candidates} candidates, {request:,} tokens, reads {planned.bytes_read() / 1e6:,.0f} MB of "
        f"weights and the embedding rows it lacks; "
        + (f"writes and reads {spilled:,.0f} MB of hidden states." if spilled else "no hidden states are spilled.")
        + (" Of the MLPs each chunk reads the columns that it uses and lacks." if planned.sizes.columns else "")
    )
