"""A look reads estimates after a layer. It pays off where what it drops saves more than it costs."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


def choose_looks(alive: NDArray[np.float64], costs: Sequence[float]) -> NDArray[np.bool_]:
    """Choose the layers that are looked at.

    Whatever a look would have dropped is dropped by the next one, so a look saves what it drops one layer.

    Args:
        alive: Share of the tokens that go on after each layer from 0 if all are looked at, float64 ``[L]``.
        costs: What a look at all that is computed costs after each layer, as a share of that layer's time.

    Returns:
        The marks, bool ``[L]``.
    """
    looks = np.zeros(len(alive), dtype=bool)
    computed = 1.0
    for layer, (left, cost) in enumerate(zip(alive.tolist(), costs, strict=True)):
        if computed - left > cost * computed:
            looks[layer], computed = True, left
    return looks
