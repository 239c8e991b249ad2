"""Relative positions: which row of their table a distance has, and disentangled attention in torch."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from grating_core.kernels.operands import Positions
from grating_core.layers.sending import sent
from grating_core.layers.spec import LayerSpec, Relative

_PRODUCTS = 1 << 20  # the most products of queries and keys that are in memory at once
SCRATCH = 8 * 4 * _PRODUCTS
"""The bytes that attention in torch takes: products of queries and keys, those with positions, and copies."""


@lru_cache(maxsize=32)
def rows_of_distances(relative: Relative, reach: int) -> Tensor:
    """Return the row of each distance of a query from a key, int32 ``[2 * reach + 1]``, see :class:`Positions`.

    The numbers are computed in float32, operation by operation as transformers does, because rounding decides
    which distances share a row.

    Args:
        relative: The relative positions.
        reach: The largest distance in tokens.
    """
    distances = torch.arange(-reach, reach + 1)
    if relative.buckets:
        middle = relative.span // 2
        size = torch.where(distances.abs() < middle, middle - 1, distances.abs())
        far = torch.log(torch.tensor((relative.farthest - 1) / middle))
        logarithm = torch.ceil(torch.log(size / middle) / far * (middle - 1)) + middle
        distances = torch.where(size <= middle, distances.float(), logarithm * distances.sign()).long()
    return (distances + relative.span).clamp_(0, 2 * relative.span - 1).int()


def positions_of(relative: Relative, key: Tensor | None, query: Tensor | None, longest: int) -> Positions:
    """Return keys and queries of positions with their rows, for sequences of up to ``longest`` tokens."""
    return Positions(key, query, rows_of_distances(relative, 1 << (longest - 1).bit_length()))


def attend_relatively(
    spec: LayerSpec, query: Tensor, key: Tensor, value: Tensor, first: int, positions: Positions
) -> Tensor:
    """Attend with consecutive queries of one sequence, which all see all of its keys.

    Args:
        spec: The layer's spec.
        query: Queries, ``[heads, N, head size]``.
        key: Keys of the tokens, ``[heads, M, head size]``.
        value: Values of the same shape.
        first: Position of the first query among the keys.
        positions: Keys and queries of positions.

    Returns:
        The attention's output, ``[heads, N, head size]``.
    """
    keys = key.shape[1]
    step = max(1, _PRODUCTS // (keys * spec.heads))
    blocks = []
    for start, block in zip(range(first, first + query.shape[1], step), torch.split(query, step, 1), strict=True):
        distances = torch.arange(start, start + block.shape[1])[:, None] - torch.arange(keys)
        rows = positions.rows[distances + positions.reach].long()
        blocks.append(_attend_block(spec, block, key, value, rows, positions))
    return torch.cat(blocks, 1)


def _attend_block(
    spec: LayerSpec, query: Tensor, key: Tensor, value: Tensor, rows: Tensor, positions: Positions
) -> Tensor:
    """Attend with queries ``[heads, N, head size]``, whose distances from the keys have rows ``[N, M]``."""
    scores = (query @ key.mT).float()
    # Few rows of the table belong to the distances at hand.
    used = slice(int(rows.min()), int(rows.max()) + 1)
    index = sent(rows - used.start, query.device).expand(len(query), *rows.shape)
    if positions.key is not None:
        scores += (query @ positions.key[used].permute(1, 2, 0)).gather(-1, index)
    if positions.query is not None:
        met = positions.query[used].permute(1, 2, 0)
        step = max(1, _PRODUCTS // (len(query) * met.shape[-1]))
        split = (torch.split(one, step, dim) for one, dim in ((scores, -1), (key, 1), (index, -1)))
        for added, part, places in zip(*split, strict=True):
            added += (part @ met).gather(-1, places.mT).mT
    attended: Tensor = scores.mul_(spec.scaling).softmax(-1).to(value.dtype) @ value
    return attended
