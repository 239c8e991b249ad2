"""Columns lie by how large the values are that meet them."""

import numpy as np
import torch
from torch import Tensor

from grating_core.columns.companion import KINDS
from grating_core.columns.order import column_orders


def importance() -> dict[str, Tensor]:
    chance = torch.Generator().manual_seed(0)
    return {"up": torch.rand(24, generator=chance), "down": torch.rand(72, generator=chance)}


def test_each_column_is_in_the_order_once_and_larger_squares_come_first() -> None:
    given = importance()
    orders = column_orders(given)
    assert tuple(orders) == KINDS
    for order, squares in zip(orders.values(), given.values(), strict=True):
        assert order.dtype == np.int64
        assert np.array_equal(np.sort(order), np.arange(len(squares)))
        assert torch.equal(squares[order], squares.sort(descending=True).values)


def test_equal_columns_keep_their_order() -> None:
    given = {"up": torch.tensor([1.0, 2, 1, 2, 0, 1]), "down": torch.zeros(100)}
    orders = column_orders(given)
    assert orders["inputs"].tolist() == [1, 3, 0, 2, 5, 4]
    assert orders["products"].tolist() == list(range(100))
