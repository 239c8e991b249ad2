"""The three matrices of each gated MLP are read from a model's files, without the rest of their layer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from torch import Tensor

from grating_core.columns.companion import MlpWeights
from grating_core.columns.order import column_orders, input_errors
from grating_core.layers.spec import Role
from grating_core.memory.checkpoint import aligned_buffer
from grating_core.memory.group import PIECE, TensorGroup
from grating_core.models.directory import blaming_weights
from grating_core.models.family import Family, ModelSpec
from grating_core.models.layout import layer_by_role


def read_matrices(
    family: Family, spec: ModelSpec, groups: Sequence[TensorGroup], importances: Sequence[Mapping[Role, Tensor]]
) -> Iterator[MlpWeights]:
    """Yield the weights of the MLP of one layer after the other. They lie in memory that the next layer takes.

    Args:
        family: The description of the model's family.
        spec: The description of the model.
        groups: W_u, W_g and W_d of each layer on disk.
        importances: What :func:`grating_core.models.sampling.find_importances` finds; it tells the columns' order
            and which of their errors count.

    Raises:
        ModelNotFoundError: The files cannot be read.
    """
    staging, buffer = aligned_buffer(_staged(groups)), aligned_buffer(max(group.size for group in groups))
    layers = zip(spec.layers, groups, importances, strict=True)
    for number, (layer, group, importance) in enumerate(layers, 1):
        with blaming_weights():
            group.read(buffer, staging)
        found = layer_by_role(family, layer, number, group.views(buffer))
        yield MlpWeights(
            found["up.weight"],
            found["gate.weight"],
            found["down.weight"],
            **column_orders(importance),
            input_errors=input_errors(importance),
        )


def reading_bytes(groups: Sequence[TensorGroup]) -> int:
    """Return the bytes that :func:`read_matrices` takes in memory."""
    return max(group.size for group in groups) + _staged(groups)


def _staged(groups: Sequence[TensorGroup]) -> int:
    """Return the bytes of the buffer that tensors are converted in."""
    return PIECE if any(group.converts for group in groups) else 0
