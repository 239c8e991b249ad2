"""This is the command ``grating doctor``."""

from __future__ import annotations

import os
import platform
from importlib import metadata
from typing import TYPE_CHECKING, Any

from grating_core.cli.options import BUNDLED
from grating_core.cli.output import err, show, write_json
from grating_core.cli.tables import plain_table
from grating_core.errors import GratingError
from grating_core.files.places import cache_directory, is_there
from grating_core.files.writing import require_room

if TYPE_CHECKING:
    import torch

_PACKAGES = (
    "grating-core",
    "grating-kernels",
    "torch",
    "transformers",
    "tokenizers",
    "langchain-grating",
    "llama-index-postprocessor-grating",
    "llama-index-llms-grating",
    "matplotlib",
    "onnx",
)


def doctor(as_json: bool = False) -> None:
    """Show versions, the device, dtype and kernels that will be used and why, and where the caches are."""
    with err.status("Looking ..."):
        found = _found()
    if as_json:
        write_json(found)
        return
    table = plain_table("what", "found")
    table.add_row("python", f"{found['python']} on {found['platform']}")
    for package, version in found["packages"].items():
        table.add_row(package, version or "not installed")
    table.add_row("device", f"{found['device']} (CUDA: {found['cuda']}, MPS: {found['mps']})")
    table.add_row("dtype", f"{found['dtype']}: {found['dtype_reason']}")
    table.add_row("kernels", found["kernels"] or f"none. {found['kernels_reason']}")
    advice = f"; {found['thread_advice']}" if found["thread_advice"] else ""
    table.add_row("threads", f"{found['threads']} of {found['processors']} processors{advice}")
    table.add_row("grating's cache", found["cache"])
    table.add_row("hub cache", f"{found['hub_cache']}{', offline' if found['hub_offline'] else ''}")
    table.add_row("bundled model", found["bundled_model"])
    show(table)


def _found() -> dict[str, Any]:
    import torch
    from huggingface_hub import constants

    from grating_core.models.placement import choose_device, choose_dtype, thread_advice

    device = choose_device(None)
    dtype, reason = choose_dtype("auto", device)
    level, level_reason = _kernels(device, dtype)
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {package: _version(package) for package in _PACKAGES},
        "device": str(device),
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "dtype": str(dtype).removeprefix("torch."),
        "dtype_reason": reason,
        "kernels": level,
        "kernels_reason": level_reason,
        "threads": torch.get_num_threads(),
        "processors": os.cpu_count(),
        "thread_advice": thread_advice(),
        "cache": _cache(),
        "hub_cache": str(constants.HF_HUB_CACHE),
        "hub_offline": bool(constants.HF_HUB_OFFLINE),
        "bundled_model": _bundled_state(),
    }


def _kernels(device: torch.device, dtype: torch.dtype) -> tuple[str | None, str]:
    """Return the level of the compiled kernels that will compute; or None, and why torch computes."""
    from grating_core.kernels.choice import kernels

    if device.type != "cpu":
        return None, f"They are for CPUs, and the device is {device}."
    chosen = kernels()
    if chosen.level and not chosen.has(dtype):
        return None, f"The level {chosen.level} has no products of {str(dtype).removeprefix('torch.')}."
    return chosen.level, chosen.reason


def _cache() -> str:
    """Return where the cache is, or why it cannot be used."""
    try:
        directory = cache_directory()
        require_room(directory / "models", 0)
    except GratingError as error:
        return str(error)
    return str(directory)


def _bundled_state() -> str:
    from grating_core.models.bundled import bundled_directory, bundled_source

    try:
        if is_there(directory := bundled_directory(BUNDLED)):
            return f"converted, in {directory}"
        bundled_source(BUNDLED)
    except GratingError as error:
        return str(error)
    return "ready to be converted on first use"


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
