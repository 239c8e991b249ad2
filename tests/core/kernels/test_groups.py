"""A grouped matrix is packed as the formats say, and quantised with a small error."""

import pytest
import torch
from torch import Tensor
from torch.nn.functional import pad

from grating_core.kernels.groups import (
    dequantized,
    grouped_bytes,
    grouped_weight,
    groups_shape,
    pack_groups,
    pack_zeros,
    quantized_groups,
    quantized_with_zeros,
    unpacked_groups,
    weight_with_zeros,
    zeros_shape,
)
from grating_core.kernels.packing import packed_weight

SHAPES = [(1, 1), (32, 64), (70, 45), (64, 130)]
KINDS = [(8, False), (8, True), (4, False), (4, True)]


def drawn(bits: int, columns: int, inner: int, *, minima: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """Draw entries, scales and minima."""
    low, high = (-127, 128) if bits == 8 else (0, 16)
    entries = torch.randint(low, high, (columns, inner)).to(torch.int8 if bits == 8 else torch.uint8)
    scale, minimum = torch.randn(2, columns, -(-inner // 32)).half().unbind()
    return entries, scale, minimum if minima else None


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("bits", "minima"), KINDS)
def test_unpacking_gives_what_was_packed(shape: tuple[int, int], bits: int, *, minima: bool) -> None:
    entries, scale, minimum = drawn(bits, *shape, minima=minima)
    weight = pack_groups(bits, entries, scale, minimum, torch.randn(shape[0]))
    assert len(weight.packed) == grouped_bytes(bits, *shape)
    assert weight.scale is not None
    assert weight.scale.shape == groups_shape(*shape)
    found = unpacked_groups(weight)
    assert torch.equal(found[0], entries)
    assert torch.equal(found[1], scale)
    assert minimum is None if found[2] is None else torch.equal(found[2], minimum)
    each = scale.float().repeat_interleave(32, 1)[:, : shape[1]]
    least = -8 * each * (bits == 4)
    if minimum is not None:
        least = minimum.float().repeat_interleave(32, 1)[:, : shape[1]]
    torch.testing.assert_close(dequantized(weight), entries * each + least, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("shape", SHAPES)
def test_unpacking_gives_what_was_packed_with_zeros(shape: tuple[int, int]) -> None:
    entries, _, _ = drawn(4, *shape, minima=False)
    scale, zero = torch.randint(0, 256, (2, shape[0], -(-shape[1] // 32)), dtype=torch.uint8).unbind()
    factor, bias = torch.rand(2, shape[0]).unbind()
    weight = pack_zeros(entries, scale, zero, factor, bias)
    assert len(weight.packed) == grouped_bytes(4, *shape)
    assert weight.scale is not None
    assert weight.scale.shape == zeros_shape(*shape)
    assert torch.equal(unpacked_groups(weight)[0], entries)
    each, offset = (part.repeat_interleave(32, 1)[:, : shape[1]].float() for part in (scale, zero))
    expected = factor[:, None] * each * (entries - offset / 16)
    torch.testing.assert_close(dequantized(weight), expected, atol=1e-3, rtol=1e-6)


def test_halves_of_bytes_lie_as_the_format_says() -> None:
    entries, scale, _ = drawn(4, 32, 64, minima=False)
    packed = pack_groups(4, entries, scale).packed.view(torch.uint8)
    block, group, line, column, place = 1, 1, 2, 5, 3
    byte = int(packed[((block * 2 + group) * 4 + line) * 64 + column * 4 + place])
    inner = group * 32 + line * 4 + place
    assert byte & 15 == entries[block * 16 + column, inner]
    assert byte >> 4 == entries[block * 16 + column, inner + 16]


@pytest.mark.parametrize(("bits", "minima"), [(8, False), (4, False), (4, True)])
def test_a_wide_matrix_is_quantised_in_parts_like_its_groups(bits: int, *, minima: bool) -> None:
    matrix, importance = torch.randn(40, 20_010), torch.rand(20_010)
    found = quantized_groups(matrix, bits, importance, minima=minima)
    parts = [
        quantized_groups(part, bits, weights, minima=minima)
        for part, weights in zip(matrix.split(640, 1), importance.split(640), strict=True)
    ]
    for whole, each in zip(found, zip(*parts, strict=True), strict=True):
        assert (whole is None) == (each[0] is None)
        assert whole is None or torch.equal(whole, torch.cat(each, 1))


@pytest.mark.parametrize("shape", [*SHAPES, (100, 9000)])
@pytest.mark.parametrize(("bits", "minima", "most"), [(8, False, 0.006), (4, False, 0.09), (4, True, 0.08)])
def test_quantising_keeps_a_matrix(shape: tuple[int, int], bits: int, most: float, *, minima: bool) -> None:
    matrix = torch.randn(shape)
    weight = grouped_weight(matrix, torch.randn(shape[0]), bits, minima=minima)
    entries, scale, minimum = quantized_groups(matrix, bits, minima=minima)
    whole = pack_groups(bits, entries, scale, minimum)
    assert torch.equal(weight.packed, whole.packed)
    assert weight.scale is not None
    assert torch.equal(weight.scale, whole.scale)
    assert (dequantized(weight) - matrix).norm() < most * matrix.norm()


@pytest.mark.parametrize("shape", [*SHAPES, (100, 9000)])
def test_zeros_of_a_byte_cost_little(shape: tuple[int, int]) -> None:
    matrix, importance = torch.randn(shape) * torch.rand(shape[0], 1), torch.rand(shape[1])
    weight = weight_with_zeros(matrix, torch.randn(shape[0]), importance)
    whole = pack_zeros(*quantized_with_zeros(matrix, importance))
    for found, wanted in zip(
        (weight.packed, weight.scale, weight.factor), (whole.packed, whole.scale, whole.factor), strict=True
    ):
        assert found is not None
        assert wanted is not None
        assert torch.equal(found, wanted)
    wider = dequantized(grouped_weight(matrix, None, 4, importance=importance, minima=True))
    most = ((wider - matrix).square() @ importance).sum().sqrt()
    assert ((dequantized(weight) - matrix).square() @ importance).sum().sqrt() < 1.02 * most + 1e-3 * matrix.norm()


def test_groups_without_zero_among_them_are_kept() -> None:
    matrix = torch.rand(48, 128) + torch.tensor([0.1, 3.0, 50.0]).repeat(16)[:, None]
    matrix[::2] *= -1
    matrix[5, :32] = 1e-6
    step = (matrix.abs().view(48, 4, 32).amax(-1) / 15).repeat_interleave(32, 1)
    assert (
        (dequantized(weight_with_zeros(matrix, None)) - matrix).abs()
        <= 0.6 * step + 0.01 * matrix.abs().amax(1, keepdim=True)
    ).all()


def test_the_scale_of_least_error_beats_the_largest_magnitude() -> None:
    matrix = torch.randn(64, 320)
    groups = matrix.view(-1, 32)
    peak = groups.gather(1, groups.abs().argmax(1, keepdim=True)) / -8
    plain = (groups / peak).round().clamp(-8, 7) * peak
    found = dequantized(grouped_weight(matrix, None, 4)).view(-1, 32)
    assert ((found - groups).square().sum(1) <= (plain - groups).square().sum(1) * 1.01).all()
    assert (found - groups).norm() < 0.97 * (plain - groups).norm()


def test_no_other_line_through_the_entries_is_better() -> None:
    matrix, importance = torch.randn(64, 320), torch.rand(320) ** 4
    entries, scale, minimum = quantized_groups(matrix, 4, importance, minima=True)
    assert minimum is not None
    groups, weights = matrix.view(64, 10, 32), importance.view(10, 32).sqrt()
    steps = entries.view(64, 10, 32).float()
    lines = torch.stack((steps, torch.ones_like(steps)), -1)
    best = torch.linalg.lstsq(lines * weights[..., None], (groups * weights)[..., None]).solution

    def error(slope: Tensor, cut: Tensor) -> Tensor:
        return ((steps * slope[..., None] + cut[..., None] - groups) * weights).norm()

    least, most = groups.aminmax(dim=-1)
    assert error(scale.float(), minimum.float()) < 1.02 * error(best[..., 0, 0], best[..., 1, 0])
    steps = ((groups - least[..., None]) / (most - least)[..., None] * 15).round()
    plain = error((most - least) / 15, least)
    steps = entries.view(64, 10, 32).float()
    assert error(scale.float(), minimum.float()) < 0.8 * plain


@pytest.mark.parametrize("minima", [False, True])
def test_important_entries_get_less_error(*, minima: bool) -> None:
    matrix, importance = torch.randn(64, 300), torch.rand(300) ** 8
    plain = dequantized(grouped_weight(matrix, None, 4, minima=minima))
    found = dequantized(grouped_weight(matrix, None, 4, importance=importance, minima=minima))
    plain, found = ((each - matrix).square() @ importance for each in (plain, found))
    assert found.sum() < 0.8 * plain.sum()


@pytest.mark.parametrize(("bits", "minima"), [(8, False), (4, False), (4, True)])
def test_zeros_equal_entries_and_extremes_are_kept(bits: int, *, minima: bool) -> None:
    rows = [
        torch.zeros(64),
        torch.full((64,), 0.5),
        torch.full((64,), -1e-9),
        torch.full((64,), 3e38),
        torch.eye(64)[3],
    ]
    weight = grouped_weight(torch.stack(rows), None, bits, minima=minima)
    found = dequantized(weight)
    assert found.isfinite().all()
    assert not found[0].any()
    torch.testing.assert_close(found[[1, 4]], torch.stack(rows)[[1, 4]], atol=0.01, rtol=0)
    assert found[2].abs().max() < 1e-6


def test_zeros_equal_entries_and_extremes_are_kept_with_zeros() -> None:
    rows = torch.stack([torch.zeros(64), torch.full((64,), 0.5), torch.full((64,), 3e38), torch.eye(64)[3]])
    found = dequantized(weight_with_zeros(rows, None))
    assert found.isfinite().all()
    assert not found[0].any()
    torch.testing.assert_close(found[[1, 3]], rows[[1, 3]], atol=0.01, rtol=0)


def test_a_matrix_of_any_format_is_given_back() -> None:
    matrix = torch.randn(70, 45)
    for dtype, error in ((torch.float32, 0.0), (torch.bfloat16, 0.02), (torch.int8, 0.02)):
        found = dequantized(packed_weight(matrix, None, dtype))
        assert (found - matrix).abs().max() <= error
    assert pad(dequantized(grouped_weight(matrix, None, 8)), (0, 19)).shape == (70, 64)
