"""In packed attention every sequence of a ragged batch attends to itself only.

transformers knows this attention as :data:`PACKED_ATTENTION`, so that its own layers run on a packed ``[1, T, D]``
batch: their matrix products see all tokens at once, and only the attention is split by sequence.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention
from transformers import AttentionInterface

from grating_core.engine.kv_cache import KeyValueCache

PACKED_ATTENTION = "grating_packed"
CACHED_ATTENTION = "grating_cached"

# Queries per step under a sliding window; with it the keys that one step looks at are few.
_WINDOW_BLOCK = 256


class KeysKept(Exception):
    """Keys and values of a layer have been put aside. The rest of that layer need not be computed."""


@dataclass
class SharedKeys:
    """This class keeps a layer's keys and values of the shared prefix, ``[1, heads, P, head size]`` each."""

    kept: tuple[Tensor, Tensor] | None = None


@dataclass
class Packing:
    """This class tells a layer's attention how the token axis divides into sequences.

    Attributes:
        lengths: Number of tokens of each sequence.
        prefix: Number of tokens of the shared prefix before the first sequence; 0 if another chunk has the prefix.
        shared: Keys and values that all sequences see before their own. The chunk with the prefix fills them in.
        keep_keys: Whether to put this layer's keys and values aside, and raise :class:`KeysKept`.
        kept: The keys and values put aside, ``[1, heads, T, head size]`` each. Once they are there, the layer's
            input is one token of each sequence, which attends to them.
    """

    lengths: tuple[int, ...]
    prefix: int = 0
    shared: SharedKeys = field(default_factory=SharedKeys)
    keep_keys: bool = False
    kept: tuple[Tensor, Tensor] | None = field(default=None, init=False)


@dataclass(frozen=True)
class Continuation:
    """This class tells a layer's attention about the next tokens of one sequence.

    Attributes:
        cache: Keys and values of the tokens before; those of the next tokens are added.
        tokens: Number of the layer's rows that are tokens; the other rows are fill.
    """

    cache: KeyValueCache
    tokens: int


def packed_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: None,
    *,
    grating: Packing,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attend within each sequence, in the signature of transformers' ``AttentionInterface``.

    Args:
        module: The attention module that calls; its ``is_causal`` says whether a token sees only those before it.
        query: Queries, ``[1, heads, T, head size]``. There may be fill behind the last sequence.
        key: Keys of the same shape, or with fewer heads, each for several heads of the query.
        value: Values of the shape of ``key``.
        attention_mask: Always None, because ``grating`` tells sequences apart.
        grating: The division into sequences.
        scaling: Factor on the products of queries and keys; None for 1/√head size.
        sliding_window: Distance in tokens below which a token sees another; None for any distance.
        softcap: Bound of the scaled products, by a hyperbolic tangent; None for no bound.

    Returns:
        The attention's output ``[1, T, heads, head size]``, zero for the fill, and no weights of attention.

    Raises:
        KeysKept: ``grating.keep_keys`` asks for the keys only.
    """
    packing = grating
    if packing.prefix and packing.kept is None:
        prefix = (slice(None), slice(None), slice(packing.prefix))
        # Copies: views would hold on to the keys of the whole chunk.
        packing.shared.kept = key[prefix].clone(), value[prefix].clone()
    if packing.kept is not None:
        key, value = packing.kept
        spans = _spans((1,) * len(packing.lengths), 0)
    elif packing.keep_keys:
        packing.kept = (key, value)
        raise KeysKept
    else:
        spans = _spans(packing.lengths, packing.prefix)

    rule = _Rule(getattr(module, "is_causal", False), scaling, sliding_window, softcap)
    output = query.new_empty(query.shape[0], query.shape[2], query.shape[1], value.shape[3])
    end = 0
    if packing.prefix and packing.kept is None:
        end = packing.prefix
        output[:, :end] = rule.attend(query[:, :, :end], key[:, :, :end], value[:, :, :end]).transpose(1, 2)
    for rows, tokens in zip(spans, _spans(packing.lengths, packing.prefix), strict=True):
        keys, values = key[:, :, tokens], value[:, :, tokens]
        if packing.shared.kept is not None:
            keys = torch.cat((packing.shared.kept[0], keys), dim=2)
            values = torch.cat((packing.shared.kept[1], values), dim=2)
        output[:, rows] = rule.attend(query[:, :, rows], keys, values).transpose(1, 2)
        end = rows.stop
    output[:, end:] = 0
    return output, None


def cached_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: None,
    *,
    grating: Continuation,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Let the next tokens of one sequence attend to themselves and to all tokens before them.

    Args:
        module: The attention module that calls; its ``layer_idx`` says which layer of the cache is its own.
        query: Queries, ``[1, heads, T, head size]``. There may be fill behind the tokens.
        key: Keys of the same shape, or with fewer heads, each for several heads of the query.
        value: Values of the shape of ``key``.
        attention_mask: Always None.
        grating: The keys and values of the tokens before, and how many of the T rows are tokens.
        scaling: See :func:`packed_attention`.
        sliding_window: See there.
        softcap: See there.

    Returns:
        The attention's output ``[1, T, heads, head size]``, zero for the fill, and no weights of attention.
    """
    new = (slice(None), slice(None), slice(grating.tokens))
    keys, values = grating.cache.extend(module.layer_idx, key[new], value[new])
    attended = _Rule(True, scaling, sliding_window, softcap).attend(query[new], keys, values)
    return pad(attended.transpose(1, 2), (0, 0, 0, 0, 0, query.shape[2] - grating.tokens)), None


def _spans(lengths: tuple[int, ...], start: int) -> Iterator[slice]:
    ends = accumulate(lengths, initial=start)
    next(ends)
    return (slice(end - length, end) for length, end in zip(lengths, ends, strict=True))


@dataclass(frozen=True)
class _Rule:
    """This class says which token of a sequence attends to which, and how much."""

    causal: bool
    scaling: float | None
    sliding_window: int | None
    softcap: float | None

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attend within one sequence.

        The queries belong to all tokens of the sequence; or to its last tokens with causal attention, and to its
        first tokens otherwise.
        """
        queries, keys = query.shape[2], key.shape[2]
        windowed = self.sliding_window is not None and keys > self.sliding_window
        if self.softcap is None and not windowed:
            if not self.causal or queries == 1:
                return self._fused(query, key, value)
            if queries == keys:
                return self._fused(query, key, value, is_causal=True)
        first = keys - queries if self.causal else 0  # position of the first query
        blocks = []
        for start in range(0, queries, _WINDOW_BLOCK):
            end = min(start + _WINDOW_BLOCK, queries)
            seen = self._seen(first + start, first + end, keys)
            mask = self._mask(range(first + start, first + end), range(seen.start, seen.stop), query.device)
            attend = self._fused if self.softcap is None else self._capped
            blocks.append(attend(query[:, :, start:end], key[:, :, seen], value[:, :, seen], attn_mask=mask))
        return torch.cat(blocks, dim=2)

    def _seen(self, start: int, end: int, keys: int) -> slice:
        """Return where the keys are that any query from position ``start`` to ``end`` sees."""
        reach = keys if self.sliding_window is None else self.sliding_window - 1
        return slice(max(0, start - reach), end if self.causal else min(keys, end + reach))

    def _mask(self, queries: range, keys: range, device: torch.device) -> Tensor:
        """Return which query sees which key, by their positions: bool ``[queries, keys]``."""
        distance = (
            torch.arange(queries.start, queries.stop, device=device)[:, None]
            - torch.arange(keys.start, keys.stop, device=device)[None]
        )
        near = distance.abs() < (self.sliding_window or len(keys) + len(queries))
        return near & (distance >= 0) if self.causal else near

    def _fused(self, query: Tensor, key: Tensor, value: Tensor, **how: Any) -> Tensor:
        grouped = query.shape[1] != key.shape[1]
        if grouped and query.shape[2] == 1:
            # The queries of a group pass as several tokens. Otherwise keys and values were copied for each query.
            folded = query.reshape(1, key.shape[1], -1, query.shape[3])
            attended = scaled_dot_product_attention(folded, key, value, scale=self.scaling, **how)
            return attended.reshape(*query.shape[:3], -1)
        return scaled_dot_product_attention(query, key, value, scale=self.scaling, enable_gqa=grouped, **how)

    def _capped(self, query: Tensor, key: Tensor, value: Tensor, *, attn_mask: Tensor) -> Tensor:
        """Attend with bounded products, which no fused kernel has."""
        assert self.softcap is not None
        heads, each = key.shape[1], query.shape[1] // key.shape[1]
        grouped = query.view(query.shape[0], heads, each, *query.shape[2:])
        scale = query.shape[-1] ** -0.5 if self.scaling is None else self.scaling
        scores = (grouped @ key[:, :, None].transpose(-1, -2)).float() * (scale / self.softcap)
        scores = (scores.tanh_() * self.softcap).masked_fill_(~attn_mask, -torch.inf)
        attended: Tensor = (scores.softmax(-1).to(value.dtype) @ value[:, :, None]).flatten(1, 2)
        return attended


AttentionInterface.register(PACKED_ATTENTION, packed_attention)
AttentionInterface.register(CACHED_ATTENTION, cached_attention)
