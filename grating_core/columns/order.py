"""What a sample tells of columns: their order, and how much errors of their entries count.

Columns lie in the companion file by how large the values are that meet them, the largest first. Large values meet
the same columns again and again. So the columns that are in memory are the first ones, and those that a token
misses lie close together, where one read takes several.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from grating_core.columns.companion import Kind
from grating_core.layers.spec import Role

_MEET: dict[Kind, Role] = {"inputs": "up", "products": "down"}  # what the values of a kind are multiplied by


def column_orders(importance: Mapping[Role, Tensor]) -> dict[Kind, Tensor]:
    """Return the order of the columns of a layer, by kind.

    Args:
        importance: The mean squares of the inputs of the layer's products by role, of which ``"up"`` and
            ``"down"`` are looked at; see :meth:`grating_core.models.sample.Sample.importance`.

    Returns:
        Numbers of columns, the first one of the order first, int64 ``[columns]``. Of equal columns the one with
        the smaller number comes first.
    """
    return {kind: importance[role].argsort(descending=True, stable=True) for kind, role in _MEET.items()}


def input_importance(importance: Mapping[Role, Tensor], down: Tensor) -> Tensor:
    """Return how much squared errors of the entries of a column of W_u and W_g count.

    Errors count where the gated product is large that the entry is for, and where its column of W_d is large.

    Args:
        importance: See :func:`column_orders`.
        down: W_d, ``[D, F]`` of any floating dtype.

    Returns:
        Float32 ``[2 F]``, first for W_u and then for W_g.
    """
    squares: Tensor = torch.linalg.vector_norm(down, dim=0, dtype=torch.float32).square()
    return (importance["down"] * squares).repeat(2)
