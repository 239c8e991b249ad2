"""What a sample tells of columns: their order, and how much errors of their entries count.

Columns lie in the companion file by how large the values are that meet them, the largest first. Large values meet
the same columns again and again. So the columns that are in memory are the first ones, and those that a token
misses lie close together, where one read takes several.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from grating_core.columns.companion import Kind
from grating_core.layers.spec import Role

_MEET: dict[Kind, Role] = {"inputs": "up", "products": "down"}  # what the values of a kind are multiplied by


def hottest_first(mean_squares: NDArray[np.float32]) -> NDArray[np.int64]:
    """Return the order of columns, of which equal ones keep their order.

    Args:
        mean_squares: Mean square of the values that meet each column, ``[columns]``.

    Returns:
        Numbers of columns, the first one of the order first, int64 ``[columns]``.
    """
    return np.argsort(-mean_squares, kind="stable")


def column_orders(importance: Mapping[Role, Tensor]) -> dict[Kind, NDArray[np.int64]]:
    """Return the order of the columns of a layer, by kind.

    Args:
        importance: The mean squares of the inputs of the layer's products by role, of which ``"up"`` and
            ``"down"`` are looked at; see :meth:`grating_core.models.sample.Sample.importance`.
    """
    return {kind: hottest_first(importance[role].numpy()) for kind, role in _MEET.items()}


def input_errors(importance: Mapping[Role, Tensor]) -> Tensor:
    """Return how much squared errors of the entries of a column of W_u and W_g count, float32 ``[2 F]``.

    An entry is for one gated product, and its errors count by how large the product is: by the root of its mean
    square. By the mean square itself, the few largest products of the sample would count alone, and texts have
    others.

    Args:
        importance: See :func:`column_orders`.
    """
    return importance["down"].sqrt().repeat(2)
