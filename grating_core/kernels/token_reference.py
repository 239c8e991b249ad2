"""One token through layers of a decoder, in torch: what the compiled kernel is tested against."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.functional import pad

from grating_core.kernels import reference
from grating_core.kernels.activations import ACTIVATIONS
from grating_core.kernels.groups import GROUP, dequantized
from grating_core.kernels.operands import Norm, Weight
from grating_core.kernels.packing import quantized
from grating_core.kernels.token import Memories, Memory, Output, Stack, TokenLayer


def token(
    row: Tensor,
    stack: Stack,
    memories: Memories,
    first: int,
    tokens: int,
    angles: Sequence[tuple[Tensor, Tensor]],
    output: Output | None = None,
    normed: Tensor | None = None,
) -> Tensor | None:
    """Take the next token of a sequence through consecutive layers of a decoder.

    For each layer, ``x += factor * attention_norm(output(attention(input_norm(x))))``, and then
    ``x += factor * output_norm(down(activation(gate(y)) * up(y)))`` with ``y = mlp_norm(x)``, or without a gate
    ``activation(up(y))``. Weights of bfloat16 and float32 are multiplied by rows of float32. Those of 8 and 4 bits
    are multiplied by rows of 8 bits, with a scale for each 32 entries.

    Args:
        row: The token's hidden states before the layers, float32 ``[D]``; those behind them take their place.
        stack: The layers, perhaps none.
        memories: Keys and values of the sequence in all layers. Those of the token are added.
        first: The number of the stack's first layer among the memories, from 0.
        tokens: The number of the tokens before this one.
        angles: Cosines and sines of the token's angles, float32 ``[head size / 2]``, of each kind of a layer.
        output: What makes logits of the states; None if they are not asked for.
        normed: Where ``y`` of the last layer goes if the layer lacks its MLP, float32 ``[D]``; None if none does.

    Returns:
        Logits, float32 ``[V]``, if they are asked for.
    """
    for number, layer in enumerate(stack.layers, first):
        memory = memories.each[number]
        attended = _attend(layer, memory, tokens, angles, _normed(row, layer.norms.get("input_norm")))
        found = _times(attended, layer.products["output"])
        row += layer.factor * _normed(found, layer.norms.get("attention_norm"))
        if normed is not None and "up" not in layer.products:
            normed.copy_(_normed(row, layer.norms.get("mlp_norm")))
            break
        found = _times(_inside(layer, _normed(row, layer.norms.get("mlp_norm"))), layer.products["down"])
        row += layer.factor * _normed(found, layer.norms.get("output_norm"))
    if output is None:
        return None
    states = _normed(row, output.norm)
    return _times(states, output.head) if isinstance(output.head, Weight) else output.head.float() @ states


def _inside(layer: TokenLayer, states: Tensor) -> Tensor:
    act, up = ACTIVATIONS[layer.activation], _times(states, layer.products["up"])
    return act(_times(states, layer.products["gate"])) * up if "gate" in layer.products else act(up)


def _attend(
    layer: TokenLayer, memory: Memory, tokens: int, angles: Sequence[tuple[Tensor, Tensor]], states: Tensor
) -> Tensor:
    query, key, value = (
        _times(states, layer.products[role]).view(-1, layer.head_size) for role in ("query", "key", "value")
    )
    query, key = (_normed(one, layer.norms.get(f"{r}_norm")) for one, r in ((query, "query"), (key, "key")))
    if layer.angles is not None:
        query, key = _turned(query, *angles[layer.angles]), _turned(key, *angles[layer.angles])
    _keep(key, memory.key, memory.key_scale, tokens)
    _keep(value, memory.value, memory.value_scale, tokens)
    begin = 0 if layer.window is None else max(0, tokens - layer.window + 1)
    keys, values = (
        _kept(states, scale, slice(begin, tokens + 1)).repeat_interleave(layer.heads // layer.key_heads, 1)
        for states, scale in ((memory.key, memory.key_scale), (memory.value, memory.value_scale))
    )
    scores = torch.einsum("hd,thd->ht", query, keys) * layer.scaling
    if layer.softcap is not None:
        scores = layer.softcap * (scores / layer.softcap).tanh()
    return torch.einsum("ht,thd->hd", scores.softmax(-1), values).flatten()


def _turned(states: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    one, two = states.chunk(2, -1)
    return torch.cat((one * cosine - two * sine, two * cosine + one * sine), -1)


def _keep(states: Tensor, memory: Tensor, scale: Tensor | None, place: int) -> None:
    if scale is not None:
        states, scale[place] = quantized(states)
    memory[place] = states


def _kept(memory: Tensor, scale: Tensor | None, places: slice) -> Tensor:
    kept = memory[places].float()
    return kept if scale is None else kept * scale[places, :, None]


def _normed(states: Tensor, norm: Norm | None) -> Tensor:
    return states.clone() if norm is None else reference.normed(states, norm)


def _times(row: Tensor, weight: Weight) -> Tensor:
    """Return the product with its bias, float32 ``[columns]``."""
    if weight.bits is not None or weight.dtype == torch.int8:
        entries, scale = quantized(pad(row, (0, -len(row) % GROUP)).view(-1, GROUP))
        row = (entries * scale[:, None]).flatten()[: len(row)]
    found = functional.linear(row, dequantized(weight))
    return found if weight.bias is None else found + weight.bias[: weight.columns]
