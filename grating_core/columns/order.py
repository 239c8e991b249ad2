"""Columns lie in the companion file by how large the values are that meet them, the largest first.

Large values meet the same columns again and again. So the columns that are in memory are the first ones, and those
that a token misses lie close together, where one read takes several.
"""

from __future__ import annotations

from collections.abc import Mapping

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
