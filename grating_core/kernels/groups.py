"""Grouped matrices have a scale for each 32 inner entries of a column, and entries of 8 or 4 bits.

An entry q of 8 bits, in -127 … 127, stands for ``scale * q + minimum``, where the minimum is zero unless the group
has one. An entry q of 4 bits, in 0 … 15, stands for ``scale * q + minimum``, or ``scale * (q - 8)`` without a
minimum.

Columns are padded to a multiple of 32, and inner entries to a multiple of 64, so that there is an even number of
groups. Entries of 8 bits lie in the order of an int8 matrix, see :mod:`grating_core.kernels.packing`: a line of 64
bytes has four inner entries of 16 columns, and a group is eight lines. A group of 4 bits is four lines: the low
halves of the bytes of line i are what line i of 8 bits would be, and the high halves what line i + 4 would be.
Scales and minima are float16 ``[blocks of 16 columns, groups, 16]``, arrays of their own.

A matrix of 4 bits may have zeros instead of minima: a group's scale and its zero are a byte each, and a column has
a factor in float32. An entry q stands for ``factor * scale * (q - zero / 16)``. This takes 4.5 bits for an entry,
and not 5. Scales and zeros are uint8 ``[blocks of 16 columns, groups, 2, 16]``.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from grating_core.kernels.operands import Weight
from grating_core.kernels.packing import pack, padded, padded_columns, unpacked

GROUP = 32
"""The number of inner entries that share a scale."""
_BLOCK = 16  # columns
_AT_ONCE = 1 << 18  # entries that are quantised at a time: few enough for a processor's cache
_SHRINK = torch.linspace(0.8, 1.05, 11).tolist()
_RANGES = torch.linspace(1.0, 0.6, 6).tolist()  # the widest comes first, and stays where nothing is better
_TIMES = 4  # that steps are taken from a line, and a line is drawn through them
_LARGEST = torch.finfo(torch.float16).max


def padded_inner(inner: int) -> int:
    """Return the number of inner entries with their padding."""
    return -(-inner // (2 * GROUP)) * 2 * GROUP


def grouped_bytes(bits: int, columns: int, inner: int) -> int:
    """Return how many bytes the packed entries of a matrix ``[columns, inner]`` take, without their scales."""
    return padded_columns(columns) * padded_inner(inner) * bits // 8


def groups_shape(columns: int, inner: int) -> tuple[int, int, int]:
    """Return the shape of the packed scales, and of the minima: blocks of 16 columns, groups, 16."""
    return padded_columns(columns) // _BLOCK, padded_inner(inner) // GROUP, _BLOCK


def zeros_shape(columns: int, inner: int) -> tuple[int, int, int, int]:
    """Return the shape of the packed scales and zeros: blocks of 16 columns, groups, 2, 16."""
    blocks, groups, _ = groups_shape(columns, inner)
    return blocks, groups, 2, _BLOCK


def pack_groups(
    bits: int, entries: Tensor, scale: Tensor, minimum: Tensor | None = None, bias: Tensor | None = None
) -> Weight:
    """Pack entries that are already quantised.

    Args:
        bits: Bits of an entry, 8 or 4.
        entries: Entries ``[columns, inner]``: int8 in -127 … 127, or uint8 in 0 … 15.
        scale: The scales of the groups ``[columns, groups]``, of any floating dtype; the last group may be short.
        minimum: The minima of the groups, of the same shape; None for none.
        bias: What is added to the columns of a product, ``[columns]``; None for nothing.
    """
    columns, inner = entries.shape
    dtype = torch.int8 if bits == 8 else torch.uint8
    packed = pack(entries.to(dtype)) if bits == 8 else _pack_halves(entries)
    return Weight(
        packed,
        dtype,
        columns,
        inner,
        _pack_scales(scale.to(torch.float16), inner),
        None if bias is None else padded(bias),
        minimum=None if minimum is None else _pack_scales(minimum.to(torch.float16), inner),
        bits=bits,
    )


def _pack_halves(entries: Tensor) -> Tensor:
    low, high = pack(entries).view(torch.uint8).view(-1, 2, 4 * 64).unbind(1)
    return (low | high << 4).view(torch.int8).flatten()


def pack_zeros(entries: Tensor, scale: Tensor, zero: Tensor, factor: Tensor, bias: Tensor | None = None) -> Weight:
    """Pack entries of 4 bits that are already quantised, with zeros.

    Args:
        entries: Entries ``[columns, inner]``, uint8 in 0 … 15.
        scale: The scales of the groups, uint8 ``[columns, groups]``; the last group may be short.
        zero: The zeros of the groups in sixteenths, likewise.
        factor: The factors of the columns' scales, float32 ``[columns]``.
        bias: What is added to the columns of a product, ``[columns]``; None for nothing.
    """
    columns, inner = entries.shape
    shares = torch.stack((_pack_scales(scale, inner), _pack_scales(zero, inner)), 2)
    biases = None if bias is None else padded(bias)
    packed = _pack_halves(entries)
    return Weight(packed, torch.uint8, columns, inner, shares, biases, bits=4, factor=padded(factor))


def unpacked_groups(weight: Weight) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return entries, scales and minima of a packed weight.

    The last two are float16 as :func:`pack_groups` packed them; with zeros they are float32, what bytes stand for.
    """
    packed = weight.packed
    if weight.bits == 4:
        halves = packed.view(torch.uint8).view(-1, 1, 4 * 64)
        packed = torch.cat((halves & 15, halves >> 4), 1).view(torch.int8).flatten()
    entries = unpacked(Weight(packed, weight.dtype, weight.columns, weight.inner))
    assert weight.scale is not None
    if weight.factor is not None:
        shares = weight.scale.view(zeros_shape(weight.columns, weight.inner)).unbind(2)
        scale, zero = (_unpack_scales(weight, part.contiguous()).float() for part in shares)
        scale = scale * weight.factor[: weight.columns, None]
        return entries, scale, scale * zero / -16
    minimum = None if weight.minimum is None else _unpack_scales(weight, weight.minimum)
    return entries, _unpack_scales(weight, weight.scale), minimum


def dequantized(weight: Weight) -> Tensor:
    """Return the matrix ``[columns, inner]`` that a weight of any format stands for, as float32."""
    if weight.bits is None:
        matrix = unpacked(weight).float()
        return matrix if weight.scale is None else matrix * weight.scale[: weight.columns, None]
    entries, scale, minimum = unpacked_groups(weight)
    scales = _each_entry(scale.float(), weight.inner)
    if weight.bits == 4 and minimum is None:
        return (entries.float() - 8) * scales
    matrix = entries.float() * scales
    return matrix if minimum is None else matrix + _each_entry(minimum.float(), weight.inner)


def grouped_weight(
    matrix: Tensor,
    bias: Tensor | None,
    bits: int,
    *,
    importance: Tensor | None = None,
    minima: bool = False,
) -> Weight:
    """Quantise a matrix ``[columns, inner]`` in groups, and pack it.

    Args:
        matrix: The matrix, of any floating dtype.
        bias: What is added to the columns of a product, ``[columns]``; None for nothing.
        bits: Bits of an entry, 8 or 4.
        importance: See :func:`quantized_groups`.
        minima: See :func:`quantized_groups`.
    """
    columns, inner = matrix.shape
    blocks, _, _ = shape = groups_shape(columns, inner)
    packed = torch.zeros(grouped_bytes(bits, columns, inner), dtype=torch.int8)
    scale = torch.zeros(shape, dtype=torch.float16)
    minimum = torch.zeros(shape, dtype=torch.float16) if minima and bits == 4 else None
    by_column = len(packed) // (blocks * _BLOCK)
    # Some columns at a time, because quantising all would take memory for copies of them in float32.
    step = padded_columns(max(1, _AT_ONCE // max(1, inner)))
    for start in range(0, columns, step):
        part = pack_groups(bits, *quantized_groups(matrix[start : start + step], bits, importance, minima=minima))
        packed[start * by_column :][: len(part.packed)] = part.packed
        for whole, some in ((scale, part.scale), (minimum, part.minimum)):
            if whole is not None and some is not None:
                whole[start // _BLOCK :][: len(some)] = some
    dtype = torch.int8 if bits == 8 else torch.uint8
    biases = None if bias is None else padded(bias)
    return Weight(packed, dtype, columns, inner, scale, biases, minimum=minimum, bits=bits)


def weight_with_zeros(matrix: Tensor, bias: Tensor | None, importance: Tensor | None = None) -> Weight:
    """Quantise a matrix ``[columns, inner]`` in groups of 4 bits with zeros, and pack it.

    Args:
        matrix: The matrix, of any floating dtype.
        bias: What is added to the columns of a product, ``[columns]``; None for nothing.
        importance: See :func:`quantized_groups`.
    """
    columns, inner = matrix.shape
    packed = torch.zeros(grouped_bytes(4, columns, inner), dtype=torch.int8)
    scale = torch.zeros(shape := zeros_shape(columns, inner), dtype=torch.uint8)
    factor = torch.zeros(padded_columns(columns))
    by_column = len(packed) // (shape[0] * _BLOCK)
    step = padded_columns(max(1, _AT_ONCE // max(1, inner)))
    for start in range(0, columns, step):
        part = pack_zeros(*quantized_with_zeros(matrix[start : start + step], importance))
        packed[start * by_column :][: len(part.packed)] = part.packed
        for whole, some, each in ((scale, part.scale, _BLOCK), (factor, part.factor, 1)):
            assert some is not None
            whole[start // each :][: len(some)] = some
    biases = None if bias is None else padded(bias)
    return Weight(packed, torch.uint8, columns, inner, scale, biases, bits=4, factor=factor)


def quantized_with_zeros(
    matrix: Tensor, importance: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Quantise each 32 inner entries of each column of a matrix ``[columns, inner]`` in 4 bits with zeros.

    The scales and minima of :func:`quantized_groups` are rounded, and the entries are the nearest ones with these.

    Returns:
        Entries, scales, zeros and factors, as :func:`pack_zeros` takes them. Factors have the bits of bfloat16.
    """
    columns, inner = matrix.shape
    _, short, minimum = quantized_groups(matrix, 4, importance, minima=True)
    assert minimum is not None
    scale, lowest = short.float(), minimum.float()
    wide = pad(matrix.float(), (0, -inner % GROUP)).view(columns, -1, GROUP)
    # Where no entry of 4 bits stands for a number about zero, the range is made to have zero in it.
    low, high = (wide.amin(-1).clamp(max=0), wide.amax(-1).clamp(min=0))
    outside = (lowest > 0) | (lowest <= -16 * scale)
    scale = torch.where(outside, (high - low) / 15, scale).clamp(max=_LARGEST)
    lowest = torch.where(outside, low, lowest)
    # With 8 bits of a factor, what kernels multiply is exact, whatever they multiply first.
    factor = (scale.amax(-1) / 255).to(torch.bfloat16).float()
    by = torch.where(factor > 0, 1 / factor, 0)[:, None]
    steps = torch.where(scale > 0, (scale * by).round_().clamp_(1, 255), 0)
    rounded = steps * factor[:, None]
    each = torch.where(rounded > 0, 1 / rounded, 0)
    zero = (lowest * each * -16).round_().clamp_(0, 255)
    entries = torch.add(zero[..., None] / 16, wide * each[..., None]).round_().clamp_(0, 15)
    entries, steps, zero = (part.to(torch.uint8) for part in (entries.flatten(1)[:, :inner], steps, zero))
    return entries, steps, zero, factor


def quantized_groups(
    matrix: Tensor, bits: int, importance: Tensor | None = None, *, minima: bool = False
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Quantise each 32 inner entries of each column of a matrix ``[columns, inner]``.

    The scale of 8 bits makes 127 of the largest magnitude. With 4 bits several scales are tried; the one of
    the least squared error is taken.

    Args:
        matrix: The matrix, of any floating dtype.
        bits: Bits of an entry, 8 or 4.
        importance: The weights of the squared errors of the inner entries, such as the mean squares of the inputs
            that meet them, float32 ``[inner]``; None for the same of all.
        minima: Whether groups of 4 bits get a minimum each.

    Returns:
        Entries, scales and minima (None for none), as :func:`pack_groups` takes them. The last two are float16.
    """
    columns, inner = matrix.shape
    groups = -(-inner // GROUP)
    entries = torch.empty(columns, groups * GROUP, dtype=torch.int8 if bits == 8 else torch.uint8)
    scale = torch.empty(columns, groups, dtype=torch.float16)
    minimum = torch.empty_like(scale) if minima and bits == 4 else None
    # Some groups at a time, because quantising all would take memory for many copies of them in float32.
    step = max(1, _AT_ONCE // GROUP // max(1, columns))
    for first in range(0, groups, step):
        some, inside = slice(first, first + step), slice(first * GROUP, (first + step) * GROUP)
        part = matrix[:, inside].float()
        weights = torch.ones(part.shape[1]) if importance is None else importance[inside].float()
        fill = 0, -part.shape[1] % GROUP
        wide, weights = pad(part, fill).reshape(columns, -1, GROUP), pad(weights, fill).view(-1, GROUP)
        found, scale[:, some], lowest = _quantized(wide, weights, bits, minima=minima)
        entries[:, inside] = found.flatten(1)
        if minimum is not None and lowest is not None:
            minimum[:, some] = lowest
    return entries[:, :inner], scale, minimum


def _quantized(wide: Tensor, weights: Tensor, bits: int, *, minima: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return entries ``[columns, groups, 32]`` of groups, scales and minima ``[columns, groups]``."""
    if bits == 8:
        scale = _short(wide.abs().amax(-1, keepdim=True) / 127)
        return _steps(wide, scale).clamp_(-127, 127), scale[..., 0], None
    if minima:
        scale, minimum = _best_line(wide, weights)
        return _steps(wide - minimum.float(), scale).clamp_(0, 15), scale[..., 0], minimum[..., 0]
    scale = _best_scale(wide, weights)
    return _steps(wide, scale).clamp_(-8, 7).add_(8), scale[..., 0], None


def _best_scale(wide: Tensor, weights: Tensor) -> Tensor:
    """Return scales that make -8 … 7 of groups ``[columns, groups, 32]``, float16 ``[columns, groups, 1]``."""
    peak = wide.gather(-1, wide.abs().argmax(-1, keepdim=True))
    weighted = wide * weights
    best, most = torch.zeros_like(peak), torch.zeros_like(peak)
    for shrink in _SHRINK:
        steps = _steps(wide, peak * (shrink / -8)).clamp_(-8, 7)
        # Of these steps the best scale has the error sum(w x x) - product^2 / square.
        product = (weighted * steps).sum(-1, keepdim=True)
        square = (steps.square() * weights).sum(-1, keepdim=True)
        found = torch.where(square > 0, product.square() / square, 0)
        better = found > most
        most = torch.where(better, found, most)
        best = torch.where(better, product / square, best)
    # Where nothing was better, as in groups of no importance, the largest magnitude decides.
    return _short(torch.where(most > 0, best, peak / -8))


def _best_line(wide: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Return scales and minima of groups that make 0 … 15 of them, float16 ``[columns, groups, 1]``."""
    low, high = wide.amin(-1, keepdim=True), wide.amax(-1, keepdim=True)
    scale = (high - low) / 15
    best, most = (scale, low), torch.zeros_like(low)
    total = weights.sum(-1, keepdim=True).clamp(min=1e-30)
    mean = (wide * weights).sum(-1, keepdim=True) / total
    for shrink in _RANGES:
        # The middle of the range stays where it is.
        slope, cut = scale * shrink, low + (1 - shrink) * (high - low) / 2
        for _ in range(_TIMES):
            steps = _steps(wide - cut, slope).clamp_(0, 15)
            # The best line through these steps has the error square(entries) - product^2 / spread.
            center = (steps * weights).sum(-1, keepdim=True) / total
            weighted = (steps - center).mul_(weights)
            spread = (weighted * steps).sum(-1, keepdim=True)
            product = weighted.mul_(wide - mean).sum(-1, keepdim=True)
            slope = torch.where(spread > 0, product / spread, slope)
            cut = torch.where(spread > 0, mean - slope * center, cut)
            found = torch.where(spread > 0, product.square() / spread, 0)
        better = found > most
        most = torch.where(better, found, most)
        best = torch.where(better, slope, best[0]), torch.where(better, cut, best[1])
    return _short(best[0]), _short(best[1])


def _steps(wide: Tensor, scale: Tensor) -> Tensor:
    """Return the entries in steps of the scale, to the nearest; zero where the scale is."""
    by = torch.where(scale == 0, 0, 1 / scale.float())
    return (wide * by).nan_to_num_(0, 0, 0).round_()


def _short(scale: Tensor) -> Tensor:
    return scale.clamp(-_LARGEST, _LARGEST).to(torch.float16)


def _each_entry(scale: Tensor, inner: int) -> Tensor:
    return scale.repeat_interleave(GROUP, -1)[:, :inner]


def _pack_scales(scale: Tensor, inner: int) -> Tensor:
    columns, groups = scale.shape
    blocks, all_groups, _ = groups_shape(columns, inner)
    whole = pad(scale, (0, all_groups - groups, 0, -columns % (2 * _BLOCK)))
    return whole.view(blocks, _BLOCK, all_groups).transpose(1, 2).contiguous()


def _unpack_scales(weight: Weight, scale: Tensor) -> Tensor:
    whole = scale.view(groups_shape(weight.columns, weight.inner)).transpose(1, 2).flatten(0, 1)
    return whole[: weight.columns, : -(-weight.inner // GROUP)]
