"""The three matrices of each gated MLP are read from a model's files, without the rest of their layer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor

from grating_core.memory.checkpoint import aligned_buffer
from grating_core.memory.group import PIECE, TensorGroup
from grating_core.models.directory import blaming_weights
from grating_core.models.family import Family, ModelSpec
from grating_core.models.layout import layer_by_role


def read_matrices(
    family: Family, spec: ModelSpec, groups: Sequence[TensorGroup]
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield W_u, W_g and W_d of one layer after the other. They lie in memory that the next layer takes.

    Args:
        family: The description of the model's family.
        spec: The description of the model.
        groups: W_u, W_g and W_d of each layer on disk.

    Raises:
        ModelNotFoundError: The files cannot be read.
    """
    staging, buffer = aligned_buffer(_staged(groups)), aligned_buffer(max(group.size for group in groups))
    for number, (layer, group) in enumerate(zip(spec.layers, groups, strict=True), 1):
        with blaming_weights():
            group.read(buffer, staging)
        found = layer_by_role(family, layer, number, group.views(buffer))
        yield found["up.weight"], found["gate.weight"], found["down.weight"]


def reading_bytes(groups: Sequence[TensorGroup]) -> int:
    """Return the bytes that :func:`read_matrices` takes in memory."""
    return max(group.size for group in groups) + _staged(groups)


def _staged(groups: Sequence[TensorGroup]) -> int:
    """Return the bytes of the buffer that tensors are converted in."""
    return PIECE if any(group.converts for group in groups) else 0
