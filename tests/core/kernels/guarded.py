"""Calls of the kernels whose operands end where memory ends: the processor stops whatever reads beyond.

Sanitizers do not see what tile instructions read. Run as a program: ``python guarded.py [short]``. With ``short``
a bias is read that ends too early.
"""

from __future__ import annotations

import ctypes
import mmap
import sys

import torch
from torch import Tensor

from grating_core.kernels import compiled
from grating_core.kernels.groups import grouped_weight, weight_with_zeros
from grating_core.kernels.loading import has, levels, start
from grating_core.kernels.operands import Lookup, Map, Norm, Positions, Rows, Seen, Span, Then, Weight
from grating_core.kernels.packing import packed_weight

PAGE = mmap.PAGESIZE
_kept: list[mmap.mmap] = []


def at_the_end(tensor: Tensor) -> Tensor:
    """Return a copy of a tensor in front of a page that cannot be read."""
    pages = -(-tensor.nbytes // PAGE)
    memory = mmap.mmap(-1, (pages + 1) * PAGE)
    _kept.append(memory)
    start_of = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    assert not ctypes.CDLL(None).mprotect(ctypes.c_void_p(start_of + pages * PAGE), ctypes.c_size_t(PAGE), 0)
    offset = pages * PAGE - tensor.nbytes
    copy = torch.frombuffer(memory, dtype=tensor.dtype, count=tensor.numel(), offset=offset).view(tensor.shape)
    return copy.copy_(tensor)


def weight_of(dtype: torch.dtype, columns: int, inner: int) -> Weight:
    whole = packed_weight(torch.randn(columns, inner), torch.randn(columns), dtype)
    scale = None if whole.scale is None else at_the_end(whole.scale)
    sums = None if whole.sums is None else at_the_end(whole.sums)
    return Weight(at_the_end(whole.packed), dtype, columns, inner, scale, at_the_end(whole.bias), sums)


def grouped_of(bits: int, columns: int, inner: int, *, zeros: bool = False) -> Weight:
    matrix, bias = torch.randn(columns, inner), torch.randn(columns)
    whole = weight_with_zeros(matrix, bias) if zeros else grouped_weight(matrix, bias, bits, minima=True)
    found = {name: getattr(whole, name) for name in ("packed", "scale", "bias", "minimum", "factor")}
    return whole._replace(**{name: at_the_end(tensor) for name, tensor in found.items() if tensor is not None})


def rows_of(dtype: torch.dtype, states: torch.dtype, count: int, inner: int) -> Rows:
    rows = Rows(at_the_end(torch.randn(count, inner).to(states)))
    if dtype != torch.int8:
        return rows
    found = compiled.normed_rows(rows.data, None, output=True, quantized=True)[1]
    return Rows(at_the_end(found.data), at_the_end(found.scale))


def norm_of(columns: int) -> Norm:
    return Norm("layer", 1e-5, 0.0, at_the_end(torch.randn(columns)), at_the_end(torch.randn(columns)))


def linear(dtype: torch.dtype, count: int, inner: int, columns: int) -> None:
    states = torch.float32 if dtype == torch.int8 else dtype
    weight, rows = weight_of(dtype, columns, inner), rows_of(dtype, states, count, inner)
    residual = at_the_end(torch.randn(count, columns).to(states))
    then = Then(states, "gelu", norm=norm_of(columns), total=True, quantized=True)
    compiled.linear(rows, weight, then, gate=weight, residual=residual)
    compiled.linear(rows, weight, Then(states))


def unpacking(states: torch.dtype, count: int, inner: int, columns: int) -> None:
    rows = rows_of(states, states, count, inner)
    for weight in (
        weight_of(torch.int8, columns, inner),
        grouped_of(8, columns, inner),
        grouped_of(4, columns, inner),
        grouped_of(4, columns, inner, zeros=True),
    ):
        compiled.linear(rows, weight, Then(states), gate=weight)


def chain(dtype: torch.dtype, count: int, width: int, inner: int) -> None:
    states, quantized = (torch.float32, True) if dtype == torch.int8 else (dtype, False)
    first, up, down = (weight_of(dtype, *shape) for shape in ((width, width), (inner, width), (width, inner)))
    maps = (
        Map(first, Then(states, norm=norm_of(width), quantized=quantized)),
        Map(up, Then(states, "gelu", output=not quantized, quantized=quantized), up),
        Map(down, Then(states, norm=norm_of(width))),
    )
    residual = at_the_end(torch.randn(count, width).to(states))
    compiled.chain(rows_of(dtype, states, count, width), maps, residual)


def attention(states: torch.dtype, count: int, size: int) -> None:
    query, key, value = (at_the_end(torch.randn(count, 2, size).to(states)) for _ in range(3))
    compiled.attention(query, Seen(key, value), [Span(0, count, 0, count, 0)], causal=True, scaling=0.1)
    places = (at_the_end(torch.randn(3, 2, size).to(states)) for _ in range(2))
    rows = at_the_end(torch.randint(0, 3, (2 * count - 1,), dtype=torch.int32))
    span, positions = Span(0, count, 0, count, 0), Positions(*places, rows)
    compiled.attention(query, Seen(key, value), [span], causal=False, scaling=0.1, positions=positions)
    angles = at_the_end(torch.rand(count, size // 2))
    compiled.turn_heads(query, Norm("rms", 1e-5, 0.0, at_the_end(torch.randn(size))), angles, angles)


def embed(states: torch.dtype, count: int, width: int) -> None:
    table, rows = at_the_end(torch.randn(3, width).to(states)), at_the_end(torch.randint(0, 3, (count,)))
    output = at_the_end(torch.empty(count, width, dtype=states))
    compiled.embed([Lookup(table, rows)] * 3, 1.0, norm_of(width), output)


def main() -> None:
    if "short" in sys.argv:
        start()
        weight = packed_weight(torch.randn(33, 65), None, torch.float32)._replace(bias=at_the_end(torch.randn(33)))
        compiled.linear(Rows(torch.randn(3, 65)), weight, Then(torch.float32))
    for level in levels():
        start(level)
        for threads in (1, 2):
            torch.set_num_threads(threads)
            for count in (1, 5, 16, 17, 32, 33):
                for dtype in filter(has, (torch.int8, torch.bfloat16, torch.float32)):
                    for inner, columns in ((1, 1), (63, 33), (64, 32), (65, 64), (100, 37)):
                        linear(dtype, count, inner, columns)
                        chain(dtype, count, inner, columns)
                for states in (torch.bfloat16, torch.float32):
                    for inner, columns in ((1, 1), (63, 33), (65, 64), (100, 37)):
                        unpacking(states, count, inner, columns)
                for states in (torch.bfloat16, torch.float32):
                    for size in (32, 80):
                        attention(states, count, size)
                    for width in (1, 33, 64, 100):
                        embed(states, count, width)
        print(level)


if __name__ == "__main__":
    main()
