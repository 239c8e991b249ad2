"""Generating is made of passes: the next tokens of a sequence go through all layers, and give logits.

The loop over layers is outside and the loop over slices inside, so that a streamed layer is read once for all
slices. A single token goes through all layers in memory in one call of a kernel, if there is one. Where MLPs are
pruned, a call ends before each of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from itertools import pairwise
from math import isfinite
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from grating_core.engine.ragged import filled
from grating_core.errors import ScoreError
from grating_core.kernels.choice import kernels
from grating_core.kernels.operands import Seen, Span
from grating_core.kernels.token import Memories, Stack
from grating_core.layers.attention import ragged_attention
from grating_core.layers.keys_values import KeysValues
from grating_core.layers.layer import Mlp
from grating_core.layers.rotary import Angles
from grating_core.layers.sending import sent
from grating_core.memory.meter import PeakMemory
from grating_core.models.causal_lm import CausalLM
from grating_core.models.layered import Layer
from grating_core.models.token_path import TokenPath


class Cache:
    """A cache has the keys and values of a sequence.

    Args:
        layers: The keys and values of each layer.
    """

    def __init__(self, layers: Sequence[KeysValues]) -> None:
        self.layers = tuple(layers)
        """The keys and values of each layer."""

    @property
    def tokens(self) -> int:
        """The number of the tokens so far."""
        return self.layers[0].tokens

    @cached_property
    def memories(self) -> Memories:
        """Where the keys and values of all layers are."""
        return Memories([kept.memory for kept in self.layers])


def new_cache(model: CausalLM, tokens: int) -> Cache:
    """Make room for the keys and values of a sequence of so many tokens."""
    how: dict[str, Any] = {"dtype": model.dtype, "device": model.device, "bits": model.kv_bits}
    return Cache([KeysValues(spec, tokens, **how) for spec in model.spec.layers])


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
    path = model.token_path if len(input_ids) == 1 else None
    try:
        if path is None:
            logits = _by_slices(model, input_ids, cache, slice_tokens, peak)
        else:
            logits = _in_few_calls(model, path, input_ids, cache)
    finally:
        model.rewind()
    if not isfinite(logits.sum()):  # one number that is not finite makes the sum so
        raise ScoreError(
            "the model's logits are not all finite numbers; the weights are damaged, or overflow in this dtype: "
            "try dtype='float32'"
        )
    return logits


def _embedded(model: CausalLM, input_ids: list[int], before: int, slices: list[slice]) -> Tensor:
    """Return the hidden states of tokens before the first layer, ``[T, D]``."""
    ids, positions = torch.tensor(input_ids), torch.arange(before, before + len(input_ids))
    model.prepare(ids)
    hidden = torch.empty(len(ids), model.width, dtype=model.dtype, device=model.device)
    for part in slices:
        model.embed(ids[part], torch.zeros_like(ids[part]), positions[part], hidden[part])
    return hidden


def _in_few_calls(model: CausalLM, path: TokenPath, input_ids: list[int], cache: Cache) -> Tensor:
    """Return the logits after one token, whose states stay in float32 from one layer to the next."""
    run, tokens = kernels().token, cache.tokens
    assert run is not None
    row, angles = _embedded(model, input_ids, tokens, [slice(0, 1)])[0].float(), path.angles(tokens)

    def through(stack: Stack, mlp: Mlp | None) -> Tensor | None:
        output = path.output if number + len(stack) > model.depth and mlp is None else None
        logits = run(row, stack, cache.memories, number - 1, tokens, angles, output, normed)
        if mlp is not None:
            path.add(row, mlp(normed[None], {})[0], stack.layers[-1])
        return logits

    number, logits, normed = 1, None, torch.empty_like(row)
    while number <= model.depth:
        with model.layer(number) as layer:
            stack = path.resident(number) or path.streamed(layer)
            logits = through(stack, layer.mlp)
        number += len(stack)
    if logits is None:
        logits = through(Stack(()), None)
    for kept in cache.layers:
        kept.tokens += 1
    assert logits is not None
    return model.bounded(logits)


def _by_slices(
    model: CausalLM, input_ids: list[int], cache: Cache, slice_tokens: int, peak: PeakMemory | None
) -> Tensor:
    count, before = len(input_ids), cache.tokens
    angles = model.angles(sent(torch.arange(before, before + count), model.device))
    slices = _slices(count, slice_tokens)
    hidden = _embedded(model, input_ids, before, slices)
    for number, kept in enumerate(cache.layers, 1):
        with model.layer(number) as layer:
            turned = None if layer.spec.rotary is None else angles[layer.spec.rotary]
            for part in slices:
                hidden[part] = _step(layer, hidden[part], None if turned is None else turned.at(part), kept)
        if peak is not None and count > 1:
            peak.look()
    return model.logits(hidden)


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
