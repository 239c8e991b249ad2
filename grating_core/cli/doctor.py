"""``grating doctor``."""

from __future__ import annotations

import os
import platform
from importlib import metadata

from grating_core.cli.options import BUNDLED
from grating_core.cli.output import out
from grating_core.cli.tables import plain_table
from grating_core.errors import GratingError


def doctor() -> None:
    """Show versions, the device and dtype that will be used and why, and where the caches are."""
    import torch
    from huggingface_hub import constants

    from grating_core.files import cache_directory
    from grating_core.models.bundled import bundled_source
    from grating_core.models.placement import choose_device, choose_dtype

    device = choose_device(None)
    dtype, reason = choose_dtype("auto", device)
    try:
        bundled_source(BUNDLED)
        bundled = "ready to be converted, or converted"
    except GratingError as error:
        bundled = str(error)
    table = plain_table("what", "found")
    table.add_row("python", f"{platform.python_version()} on {platform.platform()}")
    for package in ("grating-core", "torch", "transformers", "tokenizers", "langchain-grating",
                    "llama-index-postprocessor-grating", "matplotlib", "onnx"):  # fmt: skip
        table.add_row(package, _version(package))
    table.add_row(
        "device", f"{device} (CUDA: {torch.cuda.is_available()}, MPS: {torch.backends.mps.is_available()})"
    )
    table.add_row("dtype", f"{str(dtype).removeprefix('torch.')}: {reason}")
    table.add_row("threads", f"{torch.get_num_threads()} of {os.cpu_count()} processors")
    table.add_row("grating's cache", str(cache_directory()))
    table.add_row("hub cache", f"{constants.HF_HUB_CACHE}{', offline' if constants.HF_HUB_OFFLINE else ''}")
    table.add_row("bundled model", bundled)
    out.print(table)


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"
