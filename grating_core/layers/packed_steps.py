"""The steps of a packed layer, by kernels: the same as those of :mod:`grating_core.layers.layer`."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from grating_core.kernels.choice import kernels
from grating_core.kernels.operands import Map, Norm, Rows, Then, Weight
from grating_core.kernels.room import Room
from grating_core.layers.layer import Mlp
from grating_core.layers.packed import PackedLayer
from grating_core.layers.rotary import Angles
from grating_core.layers.spec import LayerSpec, Role


@dataclass(frozen=True)
class Inputs:
    """Inputs are what products take: states ``[T, width]``, or their int8 rows, or both if both are needed.

    Attributes:
        states: The states.
        rows: The int8 rows.
        room: The memory for what is made of them; None for new memory.
    """

    states: Tensor | None
    rows: Rows | None
    room: Room | None = None

    def __getitem__(self, places: Tensor) -> Inputs:
        """Return the inputs at some places, int64 ``[T]``."""
        rows = self.rows
        if rows is not None:
            assert rows.scale is not None
            rows = Rows(rows.data[places], rows.scale[places])
        return Inputs(None if self.states is None else self.states[places], rows, self.room)

    def of(self, weight: Weight) -> Rows:
        """Return the rows that a weight's product takes."""
        if weight.dtype == torch.int8 and self.rows is not None:
            return self.rows
        assert self.states is not None
        return Rows(self.states)


def prepared(spec: LayerSpec, layer: PackedLayer, hidden: Tensor, room: Room | None = None) -> Inputs:
    """Return what queries, keys and values are made of, from hidden states ``[T, D]``.

    Queries, keys and values will be in the room, until others of the same pass are.
    """
    inputs = _inputs(hidden, layer, *_wanted(layer, "query", "key", "value"), "input_norm")
    return replace(inputs, room=room)


def queries(spec: LayerSpec, layer: PackedLayer, inputs: Inputs, angles: Angles | None) -> Tensor:
    """Return the queries of prepared inputs, ``[T, heads, head size]``. Angles are float32."""
    return _heads(spec, layer, inputs, angles, "query", spec.heads)


def keys_and_values(
    spec: LayerSpec, layer: PackedLayer, inputs: Inputs, angles: Angles | None
) -> tuple[Tensor, Tensor]:
    """Return keys and values of prepared inputs, ``[T, key heads, head size]`` each."""
    key = _heads(spec, layer, inputs, angles, "key", spec.key_heads)
    return key, _heads(spec, layer, inputs, None, "value", spec.key_heads)


def positions(spec: LayerSpec, layer: PackedLayer, table: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """See :func:`grating_core.layers.layer.positions`."""
    assert spec.relative is not None
    roles = spec.relative.key, spec.relative.query
    inputs = _inputs(table, layer, *_wanted(layer, *(role for role in roles if role is not None)))
    key, query = (None if role is None else _heads(spec, layer, inputs, None, role, spec.heads) for role in roles)
    return key, query


def _heads(
    spec: LayerSpec, layer: PackedLayer, inputs: Inputs, angles: Angles | None, role: Role, heads: int
) -> Tensor:
    weight = layer.products[role]
    x = inputs.of(weight)
    shape = x.data.shape[0], heads, spec.head_size
    room = Room() if inputs.room is None else inputs.room
    found = room.states(role, shape, layer.states)
    kernels().linear(x, weight, Then(layer.states), into=found)
    norm = layer.norms.get(f"{role}_norm")
    if norm is not None or angles is not None:
        kernels().turn_heads(found, norm, *(angles or (None, None)))
    return found


def finished(
    spec: LayerSpec, layer: PackedLayer, hidden: Tensor, attended: Tensor, mlp: Mlp | None = None
) -> Tensor:
    """Return the hidden states after the layer.

    Args:
        spec: The layer's spec.
        layer: The layer.
        hidden: Hidden states before the layer, ``[T, D]``. Those after the layer take their place.
        attended: What attention gave to the same tokens, ``[T, heads, head size]``.
        mlp: The function in the place of the layer's own MLP, without biases; None for its own.
    """
    if mlp is not None:
        return _finished_with(spec, layer, hidden, attended, mlp)
    norms, states, products = layer.norms, layer.states, layer.products
    inner, quantized = _wanted(layer, "gate", "up")
    first = products["output"]
    inputs = _inputs(attended.flatten(1), layer, *_wanted(layer, "output"))
    if spec.norm_behind:
        then = Then(states, norm=norms.get("attention_norm"), quantized=quantized)
        last = Then(states, norm=norms.get("output_norm"))
    else:
        then = Then(
            states,
            first_norm=norms.get("attention_norm"),
            factor=spec.residual,
            norm=norms.get("mlp_norm"),
            total=True,
            output=inner,
            quantized=quantized,
        )
        last = Then(states, first_norm=norms.get("output_norm"), factor=spec.residual)
    output, quantized = _wanted(layer, "down")
    activated = Then(states, spec.activation, output=output, quantized=quantized)
    maps = Map(first, then), Map(products["up"], activated, products.get("gate")), Map(products["down"], last)
    kernels().chain(inputs.of(first), maps, hidden)
    return hidden


def _finished_with(spec: LayerSpec, layer: PackedLayer, hidden: Tensor, attended: Tensor, mlp: Mlp) -> Tensor:
    """Return the hidden states after a layer with a given MLP; they take the place of ``hidden``."""
    norms, weight = layer.norms, layer.products["output"]
    inputs = _inputs(attended.flatten(1), layer, *_wanted(layer, "output"))
    first, then = norms.get("attention_norm"), norms.get("mlp_norm")
    if spec.norm_behind:
        first, then = None, first
    asked = Then(layer.states, first_norm=first, factor=spec.residual, norm=then, total=True)
    total, states, _ = kernels().linear(inputs.of(weight), weight, asked, residual=hidden)
    assert total is not None
    assert states is not None
    output, last = mlp(states, {}), norms.get("output_norm")
    if spec.norm_behind:
        return hidden.copy_(_normed(states + output, last))
    return torch.add(total, _normed(output, last), alpha=spec.residual, out=hidden)


def _normed(states: Tensor, norm: Norm | None) -> Tensor:
    if norm is None:
        return states
    found, _ = kernels().normed_rows(states, norm, output=True, quantized=False)
    assert found is not None
    return found


def product(states: Tensor, weight: Weight) -> Tensor:
    """Return the product of states ``[T, D]`` with a weight alone, ``[T, columns]``."""
    output = kernels().linear(Rows(states), weight, Then(states.dtype)).output
    assert output is not None
    return output


def _wanted(layer: PackedLayer, *roles: Role) -> tuple[bool, bool]:
    """Tell whether the products of some roles take states, and whether they take int8 rows."""
    if not layer.rows:
        return True, False
    dtypes = {layer.products[role].dtype for role in roles if role in layer.products}
    return bool(dtypes - {torch.int8}), torch.int8 in dtypes


def _inputs(states: Tensor, layer: PackedLayer, output: bool, quantized: bool, role: Role = "") -> Inputs:
    """Return the norm of a role, if there is one, of states ``[T, D]`` as inputs."""
    norm = layer.norms.get(role)
    if norm is None and not quantized:
        return Inputs(states, None)
    found, rows = kernels().normed_rows(states, norm, output=output and norm is not None, quantized=quantized)
    return Inputs(states if norm is None else found, rows)
