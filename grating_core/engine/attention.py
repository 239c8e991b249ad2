"""Packed attention: every sequence of a ragged batch attends to itself only.

Registered with transformers under :data:`PACKED_ATTENTION`, so that transformers' own layers run on a packed
``[1, T, D]`` batch: their matrix products see all tokens at once, and only the attention is split by sequence.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

PACKED_ATTENTION = "grating_packed"

# Queries per step under a sliding window; with it the keys that one step looks at are few.
_WINDOW_BLOCK = 256


class KeysKept(Exception):
    """Keys and values of a layer have been put aside; the rest of that layer need not be computed."""


@dataclass
class Packing:
    """How the token axis divides into sequences, handed through a layer to its attention.

    Attributes:
        lengths: Tokens of each sequence.
        keep_keys: Put this layer's keys and values aside and raise :class:`KeysKept`.
        kept: The keys and values put aside, ``[1, heads, T, head size]`` each. When they are there the layer's
            input is one token of each sequence, the first, and these are what it attends to.
    """

    lengths: tuple[int, ...]
    keep_keys: bool = False
    kept: tuple[Tensor, Tensor] | None = field(default=None, init=False)


def packed_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: None,
    *,
    packing: Packing,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention within each sequence, in the signature of transformers' ``AttentionInterface``.

    Args:
        module: The attention module that calls; not used.
        query: ``[1, heads, T, head size]``; there may be fill behind the last sequence.
        key: Same shape.
        value: Same shape.
        attention_mask: Always None: sequences are told apart by ``packing``.
        packing: The division into sequences.
        scaling: Factor on the products of queries and keys; None for 1/√head size.
        sliding_window: A token sees those less than this far away, on both sides; None for all.

    Returns:
        ``[1, T, heads, head size]``, zero for the fill, and no attention weights.

    Raises:
        KeysKept: When ``packing.keep_keys`` asks for the keys only.
    """
    if packing.kept is not None:
        key, value = packing.kept
        spans = _spans((1,) * len(packing.lengths))
    elif packing.keep_keys:
        packing.kept = (key, value)
        raise KeysKept
    else:
        spans = _spans(packing.lengths)

    output = query.new_empty(query.shape[0], query.shape[2], query.shape[1], value.shape[3])
    for rows, tokens in zip(spans, _spans(packing.lengths), strict=True):
        attended = _attend(query[:, :, rows], key[:, :, tokens], value[:, :, tokens], scaling, sliding_window)
        output[:, rows] = attended.transpose(1, 2)
    output[:, rows.stop :] = 0
    return output, None


def _spans(lengths: tuple[int, ...]) -> Iterator[slice]:
    return (slice(end - length, end) for length, end in zip(lengths, accumulate(lengths), strict=True))


def _attend(
    query: Tensor, key: Tensor, value: Tensor, scaling: float | None, sliding_window: int | None
) -> Tensor:
    """Attention of one sequence; the queries are its first tokens, or all of them."""
    queries, keys = query.shape[2], key.shape[2]
    if sliding_window is None or keys <= sliding_window:
        return scaled_dot_product_attention(query, key, value, scale=scaling)
    position = torch.arange(keys, device=query.device)
    blocks = []
    for start in range(0, queries, _WINDOW_BLOCK):
        end = min(start + _WINDOW_BLOCK, queries)
        seen = slice(max(0, start - sliding_window + 1), min(keys, end + sliding_window - 1))
        near = (position[start:end, None] - position[None, seen]).abs() < sliding_window
        blocks.append(
            scaled_dot_product_attention(
                query[:, :, start:end], key[:, :, seen], value[:, :, seen], attn_mask=near, scale=scaling
            )
        )
    return torch.cat(blocks, dim=2)


AttentionInterface.register(PACKED_ATTENTION, packed_attention)
