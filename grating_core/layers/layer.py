"""A layer runs in steps: queries, keys and values; attention; then output, norms and MLP of a range of tokens."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from grating_core.kernels.room import Room
from grating_core.layers.epilogues import activated, added, multiplied
from grating_core.layers.linear import Weights, linear, normed
from grating_core.layers.rotary import Angles, rotated
from grating_core.layers.spec import LayerSpec

Mlp = Callable[[Tensor, Weights], Tensor]
"""A function of states ``[T, D]`` and the layer's weights that takes the place of a layer's own MLP."""


def prepared(spec: LayerSpec, weights: Weights, hidden: Tensor, room: Room | None = None) -> Tensor:
    """Return what queries, keys and values are made of: the normed hidden states ``[T, D]``.

    Torch makes new memory for each result, and leaves the room alone.
    """
    return normed(hidden, weights, "input_norm", spec.norm)


def queries(spec: LayerSpec, weights: Weights, states: Tensor, angles: Angles | None) -> Tensor:
    """Return the queries of prepared states ``[T, D]``, ``[T, heads, head size]``."""
    return _heads(spec, weights, states, angles, "query", spec.heads)


def keys_and_values(
    spec: LayerSpec, weights: Weights, states: Tensor, angles: Angles | None
) -> tuple[Tensor, Tensor]:
    """Return keys and values of prepared states ``[T, D]``, ``[T, key heads, head size]`` each."""
    key = _heads(spec, weights, states, angles, "key", spec.key_heads)
    return key, _heads(spec, weights, states, None, "value", spec.key_heads)


def positions(spec: LayerSpec, weights: Weights, table: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """Return the keys and the queries of relative positions, ``[rows, heads, head size]`` each; None for none.

    Args:
        spec: The layer's spec, with relative positions.
        weights: The layer's weights.
        table: The table of positions, ``[rows, D]``.
    """
    assert spec.relative is not None
    key, query = (
        None if role is None else linear(table, weights, role).view(len(table), spec.heads, spec.head_size)
        for role in (spec.relative.key, spec.relative.query)
    )
    return key, query


def _heads(
    spec: LayerSpec, weights: Weights, states: Tensor, angles: Angles | None, role: str, heads: int
) -> Tensor:
    found = linear(states, weights, role).view(len(states), heads, spec.head_size)
    found = normed(found, weights, f"{role}_norm", spec.norm)
    return found if angles is None else rotated(found, angles)


def finished(
    spec: LayerSpec, weights: Weights, hidden: Tensor, attended: Tensor, mlp: Mlp | None = None
) -> Tensor:
    """Return the hidden states after the layer.

    Args:
        spec: The layer's spec.
        weights: The layer's weights.
        hidden: Hidden states before the layer, ``[T, D]``, whose memory may be used for those after it.
        attended: What attention gave to the same tokens, ``[T, heads, head size]``.
        mlp: The function in the place of the layer's own MLP; None for its own.
    """
    attended = attended.flatten(1)
    if spec.norm_behind:
        states = normed(added(attended, weights, "output", hidden), weights, "attention_norm", spec.norm)
        return normed(_with_mlp(spec, weights, states, states, mlp), weights, "output_norm", spec.norm)
    if "attention_norm.weight" in weights:
        output = normed(linear(attended, weights, "output"), weights, "attention_norm", spec.norm)
        hidden = hidden.add(output, alpha=spec.residual)
    else:
        hidden = added(attended, weights, "output", hidden, spec.residual)
    return _with_mlp(spec, weights, normed(hidden, weights, "mlp_norm", spec.norm), hidden, mlp)


def _with_mlp(spec: LayerSpec, weights: Weights, states: Tensor, hidden: Tensor, mlp: Mlp | None) -> Tensor:
    """Return hidden states plus the MLP's output for states."""
    normed_first = not spec.norm_behind and "output_norm.weight" in weights
    if mlp is None and not normed_first:
        return added(inner(spec, weights, states), weights, "down", hidden, spec.residual)
    output = linear(inner(spec, weights, states), weights, "down") if mlp is None else mlp(states, weights)
    if normed_first:
        output = normed(output, weights, "output_norm", spec.norm)
    return hidden.add(output, alpha=spec.residual)


def inner(spec: LayerSpec, weights: Weights, states: Tensor) -> Tensor:
    """Return what the MLP has inside, ``[T, F]``, for its input ``[T, D]``."""
    if not spec.gated:
        return activated(states, weights, "up", spec.activation)
    return multiplied(states, weights, "up", activated(states, weights, "gate", spec.activation))
