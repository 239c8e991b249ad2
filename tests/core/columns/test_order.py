"""A sample tells the order of columns, and which of their entries matter."""

import numpy as np
import torch
from torch import Tensor

from grating_core.columns.companion import KINDS
from grating_core.columns.order import column_orders, input_errors
from grating_core.kernels.columns import RowFormat, pack_columns, unpack_columns


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


def test_an_entry_counts_by_the_root_of_the_mean_square_of_its_product() -> None:
    found = input_errors({"up": torch.ones(5), "down": torch.tensor([0.25, 0, 9])})
    assert found.tolist() == [0.5, 0, 3, 0.5, 0, 3]


def test_outputs_change_less_when_errors_of_4_bits_count_by_products() -> None:
    chance = torch.Generator().manual_seed(1)
    width, products = 64, 256
    up, gate = torch.randn(2, products, width, generator=chance) * torch.rand(products, 1, generator=chance) ** 4
    states = torch.randn(200, width, generator=chance)
    columns, form = torch.cat((up, gate)).T, RowFormat(2 * products, torch.float32, 4)

    def gated(up: Tensor, gate: Tensor) -> Tensor:
        return torch.nn.functional.silu(states @ gate.T) * (states @ up.T)

    def error(importance: Tensor | None) -> float:
        table = torch.from_numpy(pack_columns(columns, form, importance))
        rounded = torch.empty(columns.shape)
        unpack_columns(form, table.flatten(), np.arange(width) * form.row_bytes, rounded)
        found, whole = rounded.T.chunk(2), gated(up, gate)
        return float((gated(*found) - whole).norm())

    assert 0 < error(input_errors({"down": gated(up, gate).square().mean(0)})) < 0.95 * error(None)
