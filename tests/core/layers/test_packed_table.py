"""The rows of a packed table are what the columns of its weight stand for."""

import pytest
import torch

from grating_core.kernels.groups import dequantized, grouped_weight, weight_with_zeros
from grating_core.kernels.operands import Weight
from grating_core.kernels.packing import packed_weight
from grating_core.layers.packed_table import PackedTable

COLUMNS, INNER = 75, 100  # no multiples of what columns and inner entries are padded to
WEIGHTS = {
    "int8": lambda matrix: packed_weight(matrix, None, torch.int8),
    "bfloat16": lambda matrix: packed_weight(matrix, None, torch.bfloat16),
    "float32": lambda matrix: packed_weight(matrix, None, torch.float32),
    "8 bits": lambda matrix: grouped_weight(matrix, None, 8),
    "4 bits": lambda matrix: grouped_weight(matrix, None, 4),
    "4 bits with minima": lambda matrix: grouped_weight(matrix, None, 4, minima=True),
    "4 bits with zeros": lambda matrix: weight_with_zeros(matrix, None),
}


def packed(name: str) -> Weight:
    return WEIGHTS[name](torch.randn(COLUMNS, INNER, generator=torch.Generator().manual_seed(0)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", WEIGHTS)
@pytest.mark.parametrize("rows", [[3], [74], [74, 0, 16, 31, 32, 0, 74]])
def test_rows_are_those_of_the_matrix(name: str, rows: list[int], dtype: torch.dtype) -> None:
    weight, numbers = packed(name), torch.tensor(rows)
    found = PackedTable(weight, dtype)(numbers)
    assert found.dtype == dtype
    torch.testing.assert_close(found, dequantized(weight)[numbers].to(dtype), rtol=0, atol=0)


@pytest.mark.parametrize("name", ["int8", "4 bits"])
def test_a_row_of_the_padding_is_refused(name: str) -> None:
    with pytest.raises(IndexError, match="row 75 is not among the 75 of the table"):
        PackedTable(packed(name), torch.float32)(torch.tensor([3, 75]))
