"""Generating is made of passes: the next tokens of a sequence go through all layers, and give logits.

A prompt is treated like a single token, only longer. The loop over layers is outside and the loop over slices
inside, so that a streamed layer is read once for all slices.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor
from torch.nn.functional import pad

from grating_core.engine.ragged import filled
from grating_core.errors import ScoreError
from grating_core.kernels.operands import Seen, Span
from grating_core.layers.attention import ragged_attention
from grating_core.layers.keys_values import KeysValues
from grating_core.layers.rotary import Angles
from grating_core.layers.sending import sent
from grating_core.memory.meter import PeakMemory
from grating_core.models.causal_lm import CausalLM
from grating_core.models.layered import Layer

Cache = list[KeysValues]
"""Keys and values of the tokens so far, of each layer."""


def new_cache(model: CausalLM, tokens: int) -> Cache:
    """Make room for the keys and values of a sequence of so many tokens."""
    return [KeysValues(spec, tokens, dtype=model.dtype, device=model.device) for spec in model.spec.layers]


@torch.inference_mode()
def advance(
    model: CausalLM, input_ids: list[int], cache: Cache, *, slice_tokens: int, peak: PeakMemory | None = None
) -> Tensor:
    """Put the next tokens of a sequence through the model.

    Args:
        model: The language model.
        input_ids: Token ids, at least one.
        cache: Keys and values of the tokens before, with room for those of the next tokens, which are added. After
            an error the cache is of no use any more.
        slice_tokens: The most tokens computed at once.
        peak: The meter of peak memory, which looks after every layer of a prompt; None for none.

    Returns:
        The logits of what comes after the last token, float32 ``[V]``.

    Raises:
        FileError: Weights cannot be read.
        ScoreError: The logits are not all finite.
    """
    count, before = len(input_ids), cache[0].tokens
    ids, positions = torch.tensor(input_ids), torch.arange(before, before + count)
    angles = model.angles(sent(positions, model.device))
    slices = _slices(count, slice_tokens)
    try:
        model.prepare(ids)
        hidden = torch.empty(count, model.width, dtype=model.dtype, device=model.device)
        for part in slices:
            model.embed(ids[part], torch.zeros_like(ids[part]), positions[part], hidden[part])
        for number, kept in enumerate(cache, 1):
            with model.layer(number) as layer:
                turned = None if layer.spec.rotary is None else angles[layer.spec.rotary]
                for part in slices:
                    hidden[part] = _step(layer, hidden[part], None if turned is None else turned.at(part), kept)
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


def _slices(count: int, most: int) -> list[slice]:
    """Divide tokens into even slices, because a slice of a single token would be pruned."""
    parts = -(-count // most)
    edges = [count * part // parts for part in range(parts + 1)]
    return [slice(start, end) for start, end in pairwise(edges)]


def _step(layer: Layer, hidden: Tensor, angles: Angles | None, kept: KeysValues) -> Tensor:
    """Take the next tokens through a layer: hidden states ``[T, D]`` to hidden states of the same shape."""
    spec, weights, mlp, _ = layer
    steps = layer.steps
    tokens, first = len(hidden), kept.tokens
    if fill := filled(tokens) - tokens if layer.fills and tokens > 1 else 0:
        hidden = pad(hidden, (0, 0, 0, fill))
        angles = angles and Angles(*(pad(part, (0, 0, 0, fill)) for part in angles))
    states = steps.prepared(spec, weights, hidden)
    key, value = steps.keys_and_values(spec, weights, states, angles)
    kept.extend(key[:tokens], value[:tokens])
    query = steps.queries(spec, weights, states, angles)
    span = Span(0, tokens, first, kept.tokens, 0)
    attended = ragged_attention(spec, query, Seen(kept.key, kept.value), [span])
    output: Tensor = steps.finished(spec, weights, hidden, attended, mlp)
    return output[:tokens]
