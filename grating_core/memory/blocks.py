"""Blocks are how GGUF files store numbers of few bits: some entries of a row together, with scales of their own.

The types of blocks are those of ggml (https://github.com/ggml-org/ggml, ``src/ggml-common.h``). Every entry is an
integer, times the scale of its group, plus the group's minimum where the type has one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from grating_core.memory.header import DTYPES, FLOATS


class Groups(NamedTuple):
    """Groups are quantised rows: entry q of a group stands for ``scale * q + minimum``.

    Attributes:
        entries: Integers, int8 ``[rows, groups, entries of a group]``.
        scale: The scale of each group, float32 ``[rows, groups]``.
        minimum: The minimum of each group, float32 ``[rows, groups]``; None for zero.
    """

    entries: Tensor
    scale: Tensor
    minimum: Tensor | None = None


class Block(NamedTuple):
    """This class describes a type of blocks.

    Attributes:
        entries: Number of entries of a block.
        bytes: Number of bytes of a block.
        groups: Function from blocks, uint8 ``[N, bytes]``, to their groups, with a row for each block.
    """

    entries: int
    bytes: int
    groups: Callable[[Tensor], Groups]


def row_bytes(kind: str, width: int) -> int:
    """Return the bytes of a row of ``width`` entries of a kind, see :data:`READABLE`."""
    block = BLOCKS.get(kind)
    return width * DTYPES[kind].itemsize if block is None else width // block.entries * block.bytes


def groups_of(kind: str, data: Tensor, width: int) -> Groups:
    """Return the groups of rows.

    Args:
        kind: The type of blocks, see :data:`BLOCKS`.
        data: Whole rows, uint8 ``[bytes]``.
        width: Number of entries of a row.
    """
    block = BLOCKS[kind]
    entries, scale, minimum = block.groups(data.view(-1, block.bytes))
    groups = width // entries.shape[-1]
    return Groups(
        entries.view(-1, groups, entries.shape[-1]),
        scale.view(-1, groups),
        None if minimum is None else minimum.view(-1, groups),
    )


def decoded(kind: str, data: Tensor, width: int) -> Tensor:
    """Return rows ``[rows, width]``: of the dtype that they are stored in, or float32 if they are in blocks.

    Args:
        kind: What they are stored as, see :data:`READABLE`.
        data: Whole rows, uint8 ``[bytes]``.
        width: Number of entries of a row.
    """
    if kind not in BLOCKS:
        # A stored tensor may begin at any byte, but torch wants elements at multiples of their size.
        at_multiple = data.storage_offset() % DTYPES[kind].itemsize == 0
        return (data if at_multiple else data.clone()).view(DTYPES[kind]).view(-1, width)
    entries, scale, minimum = groups_of(kind, data, width)
    rows = entries * scale[..., None]
    if minimum is not None:
        rows += minimum[..., None]
    return rows.view(-1, width)


def _half(blocks: Tensor, start: int) -> Tensor:
    """Return the float16 numbers that begin at a byte of each block, as float32 ``[N, 1]``."""
    return blocks[:, start : start + 2].contiguous().view(torch.float16).float()


def _nibbles(packed: Tensor) -> Tensor:
    """Return the low nibbles and then the high ones of bytes ``[…, n]``, as int8 ``[…, 2 * n]``."""
    return torch.cat((packed & 15, packed >> 4), -1).view(torch.int8)


def _bits(packed: Tensor, count: int) -> Tensor:
    """Return the single bits of bytes ``[N, n]``, lowest first, as int8 ``[N, n, count]``."""
    return (packed[..., None] >> torch.arange(count, dtype=torch.uint8) & 1).view(torch.int8)


def _q8_0(blocks: Tensor) -> Groups:
    return Groups(blocks[:, 2:].contiguous().view(torch.int8), _half(blocks, 0))


def _q4_0(blocks: Tensor) -> Groups:
    return Groups(_nibbles(blocks[:, 2:]) - 8, _half(blocks, 0))


def _q4_1(blocks: Tensor) -> Groups:
    return Groups(_nibbles(blocks[:, 4:]), _half(blocks, 0), _half(blocks, 2))


def _q5_0(blocks: Tensor) -> Groups:
    return Groups(_fives(blocks[:, 2:]) - 16, _half(blocks, 0))


def _q5_1(blocks: Tensor) -> Groups:
    return Groups(_fives(blocks[:, 4:]), _half(blocks, 0), _half(blocks, 2))


def _fives(packed: Tensor) -> Tensor:
    """Return entries of 5 bits: four bytes hold the highest bit of each, nibbles behind them the rest."""
    return _nibbles(packed[:, 4:]) + 16 * _bits(packed[:, :4], 8).flatten(1)


def _q4_k(blocks: Tensor) -> Groups:
    entries = _nibbles(blocks[:, 16:].reshape(-1, 4, 32)).view(-1, 8, 32)
    return Groups(entries, *_scales_and_minima(blocks))


def _q5_k(blocks: Tensor) -> Groups:
    low = _nibbles(blocks[:, 48:].reshape(-1, 4, 32)).view(-1, 8, 32)
    high = _bits(blocks[:, 16:48], 8).transpose(1, 2)
    return Groups(low + 16 * high, *_scales_and_minima(blocks))


def _scales_and_minima(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Return scales and minima of eight groups, which are 6 bits each in twelve bytes, times a number for all."""
    first, second, third = blocks[:, 4:16].reshape(-1, 3, 4).unbind(1)
    scale = torch.cat((first & 63, third & 15 | first >> 6 << 4), -1)
    minimum = torch.cat((second & 63, third >> 4 | second >> 6 << 4), -1)
    return _half(blocks, 0) * scale, -_half(blocks, 2) * minimum


def _q6_k(blocks: Tensor) -> Groups:
    low = _nibbles(blocks[:, :128].reshape(-1, 2, 64))  # of each half of the block, all four quarters
    high = blocks[:, 128:192].reshape(-1, 2, 1, 32) >> torch.arange(0, 8, 2, dtype=torch.uint8)[:, None] & 3
    entries = low.view(-1, 16, 16) + 16 * high.view(torch.int8).view(-1, 16, 16) - 32
    return Groups(entries, _half(blocks, 208) * blocks[:, 192:208].contiguous().view(torch.int8))


BLOCKS = {
    "Q4_0": Block(32, 18, _q4_0),
    "Q4_1": Block(32, 20, _q4_1),
    "Q5_0": Block(32, 22, _q5_0),
    "Q5_1": Block(32, 24, _q5_1),
    "Q8_0": Block(32, 34, _q8_0),
    "Q4_K": Block(256, 144, _q4_k),
    "Q5_K": Block(256, 176, _q5_k),
    "Q6_K": Block(256, 210, _q6_k),
}
"""The types of blocks that grating reads, by name."""

READABLE = FLOATS.keys() | BLOCKS.keys()
"""What weights may be stored as."""
