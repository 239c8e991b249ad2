"""The tokens of a sample are embedded by the model that they are drawn for, and go through its layers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from grating_core.layers.spec import Role
from grating_core.memory.checkpoint import Checkpoint, aligned_buffer
from grating_core.memory.group import PIECE, TensorGroup
from grating_core.memory.header import StoredTensor
from grating_core.memory.meter import Meter
from grating_core.memory.rows import RowCache
from grating_core.models.directory import blaming_weights
from grating_core.models.family import Family, ModelSpec
from grating_core.models.layered import LayeredModel, Parts
from grating_core.models.layout import layer_by_role, outside_by_role
from grating_core.models.sample import Sample, draw_tokens, sample_bytes


@blaming_weights()
def new_sample(
    family: Family,
    spec: ModelSpec,
    checkpoint: Checkpoint,
    table: StoredTensor,
    others: TensorGroup,
    dtype: torch.dtype,
) -> Sample:
    """Return a sample before the first layer of a model, on the CPU.

    Args:
        family: The description of the model's family.
        spec: The description of the model.
        checkpoint: The files with the embedding table.
        table: The place of the table in the files. Only rows of the sample's tokens are read.
        others: The weights around the layers without the table.
        dtype: The dtype of the hidden states.

    Raises:
        ModelNotFoundError: The files cannot be read.
    """
    ids, buffer = draw_tokens(spec), aligned_buffer(others.size)
    how: dict[str, Any] = {"dtype": dtype, "device": torch.device("cpu"), "meter": Meter()}
    rows = RowCache(checkpoint, table, capacity=min(ids.numel(), spec.vocabulary), **how)
    others.read(buffer, aligned_buffer(PIECE))
    outside = outside_by_role(family, spec, others.views(buffer))
    model = LayeredModel(Parts(family, spec, outside=outside, head={}, layers={}, rows=rows, **how))
    positions = torch.arange(ids.shape[1])
    hidden = torch.empty(*ids.shape, spec.width, dtype=dtype)
    for sequence, states in zip(ids, hidden, strict=True):
        model.embed(sequence, torch.zeros_like(sequence), positions, states)
    return Sample(hidden, model.angles(positions))


@blaming_weights()
def find_importances(
    sample: Sample,
    family: Family,
    spec: ModelSpec,
    groups: Mapping[int, TensorGroup],
    *,
    show_progress: bool = False,
) -> tuple[Mapping[Role, Tensor], ...]:
    """Go through all layers of a model, of which one at a time is in memory.

    Args:
        sample: The model's sample before the first layer.
        family: The description of the model's family.
        spec: The description of the model.
        groups: All weights of each layer on disk, by number from 1.
        show_progress: Whether to show a progress bar on standard error.

    Returns:
        What :meth:`Sample.importance` finds in each layer.

    Raises:
        ModelNotFoundError: The files cannot be read.
    """
    staging, buffer = aligned_buffer(PIECE), aligned_buffer(max(group.size for group in groups.values()))
    found = []
    layers = tqdm(spec.layers, "Sampling layers", unit="layer", disable=not show_progress)
    for number, layer in enumerate(layers, 1):
        groups[number].read(buffer, staging)
        weights = layer_by_role(family, layer, number, groups[number].views(buffer))
        found.append(sample.importance(layer, weights))
    return tuple(found)


def sampling_bytes(spec: ModelSpec, groups: Mapping[int, TensorGroup], states: torch.dtype) -> int:
    """Return the bytes that :func:`find_importances` takes in memory, with the sample, in this dtype of states."""
    return max(group.size for group in groups.values()) + PIECE + sample_bytes(spec, states)
