"""A packed layer holds the weights of a layer in the order that kernels read."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from grating_core.kernels.choice import kernels
from grating_core.kernels.operands import Norm, Weight
from grating_core.kernels.packing import fits_in_place, packed_bytes, packed_weight, padded_columns
from grating_core.layers.linear import Weights
from grating_core.layers.spec import LayerSpec, Role

_PRODUCTS = ("query", "key", "value", "output", "gate", "up", "down", "position_key", "position_query")
_NORMS = ("input_norm", "query_norm", "key_norm", "attention_norm", "mlp_norm", "output_norm")

Layout = dict[str, tuple[torch.dtype, tuple[int, ...]]]
"""Dtype and shape of each tensor of a packed layer, by the names that :func:`tensors_of` gives."""


class PackedLayer(NamedTuple):
    """A packed layer has products and norms.

    Attributes:
        states: The dtype of states: bfloat16 or float32.
        products: Packed weights by role.
        norms: Norms by role; those that the layer lacks are not there.
    """

    states: torch.dtype
    products: Mapping[Role, Weight]
    norms: Mapping[Role, Norm]


def products_of(spec: LayerSpec) -> list[Role]:
    """Return the roles of a layer's products."""
    own = () if spec.relative is None else (spec.relative.key, spec.relative.query)
    absent = {"position_key", "position_query"}.difference(own)
    return [role for role in _PRODUCTS if role not in absent and (role != "gate" or spec.gated)]


def packed_layer(
    spec: LayerSpec,
    weights: Weights,
    states: torch.dtype,
    quantized: Collection[Role] = (),
    *,
    in_place: bool = False,
) -> PackedLayer:
    """Pack the weights of a layer.

    Args:
        spec: The layer's spec.
        weights: The layer's weights, by role, in any floating dtype.
        states: The dtype of states and of the other products: bfloat16 or float32.
        quantized: The roles of the products that become int8.
        in_place: Whether the memory of the weights may be used, which then hold other numbers.
    """
    products = {}
    for role in products_of(spec):
        dtype = torch.int8 if role in quantized else states
        matrix, bias = weights[f"{role}.weight"], weights.get(f"{role}.bias")
        pack = kernels().pack_in_place if in_place and fits_in_place(matrix, dtype) else None
        products[role] = packed_weight(matrix, bias, dtype, pack)
    norms = {}
    for role in _NORMS:
        weight, bias = weights.get(f"{role}.weight"), weights.get(f"{role}.bias")
        if weight is not None:
            # These are copies, because the caller may read the next layer into the same memory.
            norms[role] = _norm(
                spec,
                weight.to(torch.float32, copy=True),
                None if bias is None else bias.to(torch.float32, copy=True),
            )
    return PackedLayer(states, products, norms)


def tensors_of(layer: PackedLayer) -> dict[str, Tensor]:
    """Return the tensors of a packed layer by name, such as ``"up.packed"``, to be stored."""
    found = {}
    for name, part in (*layer.products.items(), *layer.norms.items()):
        for field in ("packed", "scale", "sums", "weight", "bias"):
            tensor = getattr(part, field, None)
            if tensor is not None:
                found[f"{name}.{field}"] = tensor
    return found


def layout_of(spec: LayerSpec, weights: Weights, states: torch.dtype, quantized: Collection[Role] = ()) -> Layout:
    """Return the layout of the layer that :func:`packed_layer` makes of the same arguments.

    Only the shapes of the weights count, so that they may be on torch's device ``meta``.
    """
    found: Layout = {}
    for role in products_of(spec):
        columns, inner = weights[f"{role}.weight"].shape
        dtype = torch.int8 if role in quantized else states
        found[f"{role}.packed"] = torch.int8, (packed_bytes(dtype, columns, inner),)
        padded = torch.float32, (padded_columns(columns),)
        found |= {f"{role}.scale": padded, f"{role}.sums": padded} if role in quantized else {}
        found |= {f"{role}.bias": padded} if f"{role}.bias" in weights else {}
    for name in (f"{role}.{kind}" for role in _NORMS for kind in ("weight", "bias")):
        if name in weights:
            found[name] = torch.float32, tuple(weights[name].shape)
    return found


def layer_of(
    spec: LayerSpec,
    tensors: Mapping[str, Tensor],
    states: torch.dtype,
    quantized: Collection[Role] = (),
) -> PackedLayer:
    """Return the packed layer that :func:`tensors_of` gave these tensors of; they may be views of one buffer.

    Args:
        spec: The layer's spec.
        tensors: The tensors by name.
        states: The dtype of states and of the other products.
        quantized: The roles of the products that are int8.
    """
    products = {}
    for role in products_of(spec):
        packed = tensors.get(f"{role}.packed")
        assert packed is not None
        columns, inner = spec.shape(role)
        dtype = torch.int8 if role in quantized else states
        others = (tensors.get(f"{role}.{field}") for field in ("scale", "bias", "sums"))
        products[role] = Weight(packed, dtype, columns, inner, *others)
    norms = {
        role: _norm(spec, tensors[f"{role}.weight"], tensors.get(f"{role}.bias"))
        for role in _NORMS
        if f"{role}.weight" in tensors
    }
    return PackedLayer(states, products, norms)


def _norm(spec: LayerSpec, weight: Tensor, bias: Tensor | None) -> Norm:
    return Norm(spec.norm.kind, spec.norm.eps, spec.norm.offset, weight.contiguous(), bias)
