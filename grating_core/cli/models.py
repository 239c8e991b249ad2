"""This is the command ``grating models``."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from grating_core.cli.options import HUB, Takes
from grating_core.cli.output import err, show, write_json
from grating_core.cli.tables import plain_table
from grating_core.errors import BudgetError, GratingError, StorageError, UnsupportedModelError
from grating_core.files.places import is_there
from grating_core.settings import RerankSettings

if TYPE_CHECKING:
    from grating_core.models.packing import Packing
    from grating_core.opening.layered import OpenLayered
    from grating_core.opening.opened import OpenReranker

_CHOSEN = ("engine", "device", "dtype", "max_length", "lens", "template", "adapter", *HUB)


def models(
    settings: Annotated[RerankSettings | None, Takes(_CHOSEN, optional=True)], as_json: bool = False
) -> None:
    """Say how a model would be computed, before weights are read. Without a name, list models that are here."""
    if settings is None:
        _list(as_json)
        return
    with err.status("Looking at the model ..."):
        from grating_core.opening.rerankers import open_reranker

        with closing(open_reranker(settings)) as opened:
            found = _report(opened)
    if as_json:
        write_json(found)
        return
    table = plain_table("what", "")
    for what, told in _told(found):
        table.add_row(what, told)
    show(table)


def _report(opened: OpenReranker) -> dict[str, Any]:
    """Return what is known of a model before its weights are read."""
    from grating_core.opening.layered import OpenLayered

    layered = isinstance(opened, OpenLayered)
    return {
        "model": opened.settings.name,
        "path": str(opened.directory),
        "architecture": opened.architecture,
        "engine": "grating" if layered else "transformers",
        "layers": opened.stored.shape.depth if isinstance(opened, OpenLayered) else None,
        "format": _format(opened),
        "lens": _lens(opened),
        "dtype": str(opened.products).removeprefix("torch."),
        "window": opened.window,
        "bytes": _bytes(opened.directory),
        **(_smallest(opened) if isinstance(opened, OpenLayered) else _NO_BUDGET),
    }


def _format(opened: OpenReranker) -> str:
    """Return how texts are written: ``pair``, ``list``, the name of a prompt, ``own``, ``chat``, ``template``."""
    from grating_core.opening.listwise import OpenListwise
    from grating_core.text.inputs import read_inputs
    from grating_core.text.prompts import PROMPTS

    if opened.prompt is None:
        return "list" if isinstance(opened, OpenListwise) else "pair"
    if official := [name for name, prompt in PROMPTS.items() if prompt == opened.prompt]:
        return official[0]
    if opened.settings.template is not None:
        return "template"
    return "own" if read_inputs(opened.directory).used else "chat"


def _lens(opened: OpenReranker) -> str | None:
    """Return whether the lens was named, calibrated here or packaged; None if there is none."""
    from grating_core.lens.store import lens_directory

    if opened.lens is None:
        return None
    if opened.settings.lens is not None:
        return "named"
    try:
        return "calibrated" if is_there(lens_directory(opened.identity)) else "packaged"
    except StorageError:  # there is no place for it
        return "packaged"


def _bytes(directory: Path) -> int:
    from grating_core.models.directory import is_gguf, weight_files

    files = [directory] if is_gguf(directory) else weight_files(directory)
    return sum(path.stat().st_size for path in files)


_NO_BUDGET = {"smallest_budget": None, "smallest_budget_int8": None}


def _smallest(opened: OpenLayered) -> dict[str, int | None]:
    """Return the smallest memory budgets in bytes; None where the model takes none."""
    from grating_core.models.packing import IN_8_BITS, Packing

    stored = opened.stored
    in_8_bits = Packing(stored.dtype, IN_8_BITS) if stored.device.type == "cpu" else None
    return {
        "smallest_budget": _smallest_with(opened, None),
        "smallest_budget_int8": None if in_8_bits is None else _smallest_with(opened, in_8_bits),
    }


def _smallest_with(opened: OpenLayered, packing: Packing | None) -> int | None:
    try:
        opened.stored.plan(opened.window, 1, packing)
    except BudgetError as error:
        return error.smallest
    except UnsupportedModelError:  # its files cannot be streamed
        pass
    return None


def _told(found: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield a report in words."""
    formats = {
        "list": "all documents in one prompt",
        "pair": "query and document, joined by the tokenizer",
        "chat": "a question with yes or no, in the model's chat format",
        "own": "the format that the model's own files describe",
        "template": "the template that was given",
    }
    lenses = {
        None: "none, so nothing is dropped early: 'grating calibrate' fits one",
        "named": "the one that was given",
        "calibrated": "calibrated here",
        "packaged": "comes with grating",
    }
    own = found["engine"] == "grating"
    by = "grating's own layers" if own else "transformers, which is slower and drops nothing early"
    yield "model", found["model"]
    yield "files", f"{found['path']}, {found['bytes'] / 1e6:,.0f} MB of weights"
    yield "architecture", found["architecture"] + (f", {found['layers']} layers" if own else "")
    yield "computed by", by
    yield "input", formats.get(found["format"], f"the prompt {found['format']}")
    yield "window", f"{found['window']:,} tokens"
    yield "dtype", found["dtype"]
    yield "lens", lenses[found["lens"]] if own and found["format"] != "list" else "none"
    budgets = {name: found[name] for name in _NO_BUDGET}
    sizes = [f"{size / 1e6:,.1f} MB{' with int8' * ('int8' in name)}" for name, size in budgets.items() if size]
    yield "smallest memory budget", ", ".join(sizes) or "none: all weights stay in memory"


def _list(as_json: bool) -> None:
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
    show(
        "Computed by grating's own layers: " + ", ".join(FAMILIES) + ". transformers computes other classifiers. "
        "'grating models NAME' says what would happen to a model."
    )


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
    from grating_core.models.by_transformers import needs_transformers
    from grating_core.models.directory import describe_weights, read_stated

    if directory is None:
        return {"architecture": None, "layers": None, "bytes": None}
    if needs_transformers(directory):
        (architecture, *_) = read_stated(directory)["architectures"]
        return {"architecture": architecture, "layers": None, "bytes": _bytes(directory)}
    return describe_weights(directory)
