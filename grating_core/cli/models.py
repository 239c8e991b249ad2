"""This is the command ``grating models``."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from grating_core.cli.output import show, write_json
from grating_core.cli.tables import plain_table
from grating_core.errors import GratingError, StorageError
from grating_core.files.places import is_there


def models(as_json: bool = False) -> None:
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
    show(table, whole=True)
    show("Supported, as safetensors and if classifiers with one label or two: " + ", ".join(FAMILIES) + ".")


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
