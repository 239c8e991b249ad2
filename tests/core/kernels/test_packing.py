"""A packed matrix holds the same numbers in the order of the kernels."""

import pytest
import torch

from grating_core.kernels.choice import kernels
from grating_core.kernels.operands import Weight
from grating_core.kernels.packing import fits_in_place, pack, packed_bytes, packed_weight, quantized, unpacked

SHAPES = [(1, 1), (32, 64), (70, 45), (64, 130)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.int8, torch.bfloat16, torch.float32])
def test_unpacking_gives_the_matrix(shape: tuple[int, int], dtype: torch.dtype) -> None:
    matrix = torch.randint(-127, 128, shape).to(dtype)
    packed = pack(matrix)
    assert len(packed) == packed_bytes(dtype, *shape)
    assert torch.equal(unpacked(Weight(packed, dtype, *shape)), matrix)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_weight_is_quantised_by_column(shape: tuple[int, int]) -> None:
    matrix, bias = torch.randn(shape), torch.randn(shape[0])
    weight = packed_weight(matrix, bias, torch.int8)
    entries, scale = quantized(matrix)
    assert weight.scale is not None
    assert weight.bias is not None
    assert torch.equal(unpacked(weight), entries)
    assert weight.sums is not None
    for found, expected in ((weight.scale, scale), (weight.bias, bias), (weight.sums, entries.sum(-1) * scale)):
        assert torch.equal(found[: shape[0]], expected)
        assert not found[shape[0] :].any()
    assert (entries * scale[:, None] - matrix).abs().max() <= scale.max() / 2 * 1.001


def test_rows_of_any_shape_are_quantised_each_for_itself() -> None:
    rows = torch.randn(3, 4, 33)
    rows[0, 1], rows[1, 2, 3], rows[2, 0, 7] = 0, torch.inf, torch.nan
    entries, scale = quantized(rows)
    assert scale.shape == (3, 4)
    finite = rows.isfinite().all(-1)
    # A row that is not finite does not become one that is.
    assert torch.equal((entries * scale[..., None]).isfinite().all(-1), finite)
    assert ((entries * scale[..., None] - rows).abs().amax(-1) <= scale * 0.501)[finite].all()
    assert not entries[0, 1].any()
    flat, scales = quantized(rows.flatten(0, 1))
    assert torch.equal(entries.flatten(0, 1), flat)
    torch.testing.assert_close(scale.flatten(), scales, rtol=0, atol=0, equal_nan=True)


@pytest.mark.skipif(kernels().level is None, reason=kernels().reason)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_matrix_is_packed_where_it_lies(dtype: torch.dtype) -> None:
    matrix = torch.randn(96, 64).to(dtype)
    assert fits_in_place(matrix, dtype)
    assert not fits_in_place(matrix[:, :60], dtype)
    assert not fits_in_place(matrix[:90], dtype)
    expected, at = pack(matrix), matrix.data_ptr()
    weight = packed_weight(matrix, None, dtype, kernels().pack_in_place)
    assert weight.packed.data_ptr() == at
    assert torch.equal(weight.packed, expected)
