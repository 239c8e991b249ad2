"""The first step of opening is the same for all models: device, dtype, files and adapter are found."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch

from grating_core.memory.meter import resident_memory
from grating_core.memory.plan import MemoryPlan
from grating_core.models.adapter import Adapter, find_adapter
from grating_core.models.directory import find_model
from grating_core.models.hub import Hub
from grating_core.models.placement import choose_device, choose_dtype
from grating_core.settings import ModelSettings


class Found(NamedTuple):
    """This class holds what is found for some settings before a model's configuration is read.

    Attributes:
        device: The device that will compute.
        dtype: The dtype of the layers' products.
        directory: The local directory, or the GGUF file, that the weights are read from.
        adapter: The adapter that is merged into the weights; None for none.
    """

    device: torch.device
    dtype: torch.dtype
    directory: Path
    adapter: Adapter | None


def find(settings: ModelSettings) -> Found:
    """Choose device and dtype, find the files of a model, and read its adapter if there is one.

    Raises:
        ModelNotFoundError: A name leads to no usable files.
        UnsupportedModelError: The adapter is of a kind that grating does not merge.
        ValueError: A setting does not fit this machine.
    """
    device = choose_device(settings.device)
    dtype, _ = choose_dtype(settings.dtype, device)
    hub = Hub(settings.revision, settings.token, settings.cache_dir, settings.local_files_only)
    directory = find_model(str(settings.model), hub=hub, show_progress=settings.show_progress)
    adapter = None
    if settings.adapter is not None:
        adapter = find_adapter(str(settings.adapter), hub=hub, show_progress=settings.show_progress)
    return Found(device, dtype, directory, adapter)


def with_tokenizer(plan: MemoryPlan | None, before: int) -> MemoryPlan | None:
    """Write the tokenizer's bytes into a plan: the growth of the process above ``before`` bytes."""
    return plan and replace(plan, tokenizer=max(0, resident_memory() - before))
