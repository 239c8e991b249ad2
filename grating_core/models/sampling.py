"""The tokens of a sample are embedded by the model that they are drawn for."""

from __future__ import annotations

from typing import Any

import torch

from grating_core.memory.checkpoint import Checkpoint, aligned_buffer
from grating_core.memory.group import PIECE, TensorGroup
from grating_core.memory.header import StoredTensor
from grating_core.memory.meter import Meter
from grating_core.memory.rows import RowCache
from grating_core.models.family import Family, ModelSpec
from grating_core.models.layered import LayeredModel, Parts
from grating_core.models.layout import outside_by_role
from grating_core.models.sample import Sample, draw_tokens


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
        FileError: The weights cannot be read.
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
