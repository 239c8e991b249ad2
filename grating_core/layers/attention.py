"""Attention of the tokens of one slice, each to the sequence that it belongs to."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from grating_core.kernels.choice import kernels
from grating_core.kernels.operands import Seen, Span
from grating_core.kernels.room import Room
from grating_core.layers.relative import attend_relatively, positions_of
from grating_core.layers.spec import LayerSpec
from grating_core.layers.varlen import pack, serves, varlen_attention

_TOGETHER = 8_000_000  # bytes of keys and values that are given to torch at once, as it makes a copy of them
_BLOCK = 256  # queries a step where a mask is needed; under a window one step then looks at few keys
_PRODUCTS = 1 << 22  # the most products of queries and keys that are in memory where they are bounded


def ragged_attention(
    spec: LayerSpec,
    query: Tensor,
    seen: Seen,
    spans: Sequence[Span],
    room: Room | None = None,
    places: tuple[Tensor | None, Tensor | None] = (None, None),
) -> Tensor:
    """Attend within each span.

    Args:
        spec: The layer's spec.
        query: Queries of a slice, ``[T, heads, head size]``.
        seen: Keys and values.
        spans: Spans in rising order of their rows. Rows that are in no span are fill.
        room: The memory for the output of a compiled kernel; None for new memory.
        places: Keys and queries of relative positions, ``[rows, heads, head size]`` each; None for none.

    Returns:
        The attention's output, ``[T, heads, head size]``; zero for the fill.
    """
    if len(query) > 1 and serves(spec, query) and (packing := pack(spec, spans)) is not None:
        return varlen_attention(spec, query, seen, spans, packing)
    positions = None
    if spec.relative is not None:
        positions = positions_of(spec.relative, *places, max((span.keys for span in spans), default=1))
    attention = kernels().attention
    if attention is not None and query.device.type == "cpu" and kernels().has(query.dtype):
        found: Tensor = attention(
            query,
            seen,
            spans,
            causal=spec.causal,
            scaling=spec.scaling,
            window=spec.window,
            softcap=spec.softcap,
            positions=positions,
            into=None if room is None else room.states("attended", query.shape, query.dtype),
        )
        return found
    output = torch.empty_like(query)
    end = 0
    for span in spans:
        asked, key, value = (states.transpose(0, 1) for states in (query[span.rows], *seen.of(span)))
        output[end : span.start] = 0
        if positions is None:
            attended = attend(spec, asked, key, value, span.first)
        else:
            attended = attend_relatively(spec, asked, key, value, span.first, positions)
        output[span.rows] = attended.transpose(0, 1)
        end = span.rows.stop
    output[end:] = 0
    return output


def attend(spec: LayerSpec, query: Tensor, key: Tensor, value: Tensor, first: int) -> Tensor:
    """Attend with consecutive queries of one sequence.

    Args:
        spec: The layer's spec.
        query: Queries, ``[heads, N, head size]``.
        key: Keys of the tokens that may be seen, ``[key heads, M, head size]``.
        value: Values of the same shape.
        first: Position of the first query among the keys.

    Returns:
        The attention's output, ``[heads, N, head size]``.
    """
    queries, keys = query.shape[1], key.shape[1]
    if spec.softcap is None and (spec.window is None or keys <= spec.window):
        if not spec.causal or (queries == 1 and first == keys - 1):
            return _fused(spec, query, key, value)
        if queries == keys:
            return _fused(spec, query, key, value, is_causal=True)
    step = _BLOCK if spec.softcap is None else max(1, min(_BLOCK, _PRODUCTS // (keys * spec.heads)))
    blocks = []
    for start in range(0, queries, step):
        places = range(first + start, first + min(start + step, queries))
        seen = _seen(spec, places, keys)
        mask = _mask(spec, places, seen, query.device)
        attend_block = _fused if spec.softcap is None else _capped
        part = slice(start, start + len(places)), slice(seen.start, seen.stop)
        blocks.append(attend_block(spec, query[:, part[0]], key[:, part[1]], value[:, part[1]], attn_mask=mask))
    return torch.cat(blocks, dim=1)


def _seen(spec: LayerSpec, queries: range, keys: int) -> range:
    """Return the positions of the keys that any of the queries sees."""
    reach = keys if spec.window is None else spec.window - 1
    stop = queries.stop if spec.causal else min(keys, queries.stop + reach)
    return range(max(0, queries.start - reach), stop)


def _mask(spec: LayerSpec, queries: range, keys: range, device: torch.device) -> Tensor:
    """Return which query sees which key, by their positions: bool ``[queries, keys]``."""
    asks = torch.arange(queries.start, queries.stop, device=device)[:, None]
    told = torch.arange(keys.start, keys.stop, device=device)[None]
    reach = spec.window or len(keys) + len(queries)
    return (told > asks - reach) & (told < asks + (1 if spec.causal else reach))


def _fused(spec: LayerSpec, query: Tensor, key: Tensor, value: Tensor, **how: Any) -> Tensor:
    heads = max(1, len(key) * _TOGETHER // (key.nbytes + value.nbytes))
    if spec.causal or heads >= len(key):  # with masks, several calls took more memory than one
        return _of_heads(spec, query, key, value, **how)
    each = spec.heads // spec.key_heads
    parts = zip(torch.split(query, each * heads), torch.split(key, heads), torch.split(value, heads), strict=True)
    return torch.cat([_of_heads(spec, *part, **how) for part in parts])


def _of_heads(spec: LayerSpec, query: Tensor, key: Tensor, value: Tensor, **how: Any) -> Tensor:
    """Attend with some heads of keys and values, and the heads of the query that belong to them."""
    grouped = spec.heads != spec.key_heads
    if grouped and query.shape[1] == 1:
        # The queries of a group pass as several tokens. Otherwise keys and values were copied for each query.
        folded = query.reshape(1, len(key), -1, spec.head_size)
        attended = scaled_dot_product_attention(folded, key[None], value[None], scale=spec.scaling, **how)
        return attended.reshape(query.shape)
    return scaled_dot_product_attention(
        query[None], key[None], value[None], scale=spec.scaling, enable_gqa=grouped, **how
    )[0]


def _capped(spec: LayerSpec, query: Tensor, key: Tensor, value: Tensor, *, attn_mask: Tensor) -> Tensor:
    """Attend with bounded products, which no fused kernel has."""
    assert spec.softcap is not None
    grouped = query.reshape(spec.key_heads, spec.heads // spec.key_heads, *query.shape[1:])
    scores = (grouped @ key[:, None].transpose(-1, -2)).float() * (spec.scaling / spec.softcap)
    scores = (scores.tanh_() * spec.softcap).masked_fill_(~attn_mask, -torch.inf)
    attended: Tensor = (scores.softmax(-1).to(value.dtype) @ value[:, None]).flatten(0, 1)
    return attended
