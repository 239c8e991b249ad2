"""Generating is made of passes: the next tokens of a sequence go through all layers, and give logits.

A prompt is treated like a single token, only longer. The loop over layers is outside and the loop over chunks
inside, so that a streamed layer is read once for all chunks.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor
from torch.nn.functional import pad

from grating_core.engine.attention import Continuation
from grating_core.engine.kv_cache import KeyValueCache
from grating_core.engine.ragged import filled
from grating_core.errors import ScoreError
from grating_core.memory.meter import PeakMemory
from grating_core.models.causal_lm import CausalLM


def new_cache(model: CausalLM, tokens: int) -> KeyValueCache:
    """Make room for the keys and values of a sequence of so many tokens."""
    return KeyValueCache(model.depth, *model.keys, tokens, dtype=model.dtype, device=model.device)


@torch.inference_mode()
def advance(
    model: CausalLM,
    input_ids: list[int],
    cache: KeyValueCache,
    *,
    chunk_tokens: int,
    peak: PeakMemory | None = None,
) -> Tensor:
    """Put the next tokens of a sequence through the model.

    Args:
        model: The language model.
        input_ids: Token ids, at least one.
        cache: Keys and values of the tokens before, with room for those of the next tokens, which are added. After
            an error the cache is of no use any more.
        chunk_tokens: The most tokens computed at once.
        peak: The meter of peak memory, which looks after every layer of a prompt; None for none.

    Returns:
        The logits of what comes after the last token, float32 ``[V]``.

    Raises:
        FileError: Weights cannot be read.
        ScoreError: The logits are not all finite.
    """
    count = len(input_ids)
    ids = torch.tensor(input_ids, device=model.device)
    positions = torch.arange(cache.tokens, cache.tokens + count, device=model.device)[None]
    chunks = _chunks(count, chunk_tokens)
    try:
        model.prepare(ids)
        hidden = model.embed(ids[None], torch.zeros_like(ids)[None], positions)
        for number in range(1, model.depth + 1):
            with model.layer(number):
                for chunk in chunks:
                    hidden[:, chunk] = _run_layer(model, number, hidden[:, chunk], positions[:, chunk], cache)
            if peak is not None and count > 1:
                peak.look()
    finally:
        model.rewind()
    logits = model.logits(hidden)
    if not logits.isfinite().all():
        raise ScoreError(
            "the model's logits are not all finite numbers; the weights are damaged, or overflow in this dtype: "
            "try dtype='float32'"
        )
    return logits


def _chunks(count: int, most: int) -> list[slice]:
    """Divide tokens into even parts, because a part of a single token would be pruned."""
    parts = -(-count // most)
    edges = [count * part // parts for part in range(parts + 1)]
    return [slice(start, end) for start, end in pairwise(edges)]


def _run_layer(model: CausalLM, number: int, hidden: Tensor, positions: Tensor, cache: KeyValueCache) -> Tensor:
    tokens = hidden.shape[1]
    fill = filled(tokens) - tokens if tokens > 1 else 0
    output = model.run_layer(
        number,
        pad(hidden, (0, 0, 0, fill)),
        pad(positions, (0, fill)),
        attention=Continuation(cache, tokens),
    )
    return output[:, :tokens]
