"""A packed layer holds the weights of a layer in the order that kernels read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from grating_core.kernels.choice import kernels
from grating_core.kernels.groups import grouped_bytes, grouped_weight, groups_shape, weight_with_zeros, zeros_shape
from grating_core.kernels.operands import Norm, Weight
from grating_core.kernels.packing import fits_in_place, packed_bytes, packed_weight, padded_columns
from grating_core.layers.linear import Weights
from grating_core.layers.spec import LayerSpec, Role
from grating_core.layers.spec import Norm as NormSpec

_PRODUCTS = ("query", "key", "value", "output", "gate", "up", "down", "position_key", "position_query")
_FIELDS = ("packed", "scale", "minimum", "factor", "sums", "bias")
_NORMS = ("input_norm", "query_norm", "key_norm", "attention_norm", "mlp_norm", "output_norm")


class Format(NamedTuple):
    """A format says how the entries of a quantised weight are stored.

    Attributes:
        bits: Bits of an entry, 8 or 4.
        grouped: Whether 32 inner entries share a scale each; if not, all of a column do, which has 8 bits.
        minima: Whether groups have a minimum each.
        zeros: Whether groups have a scale and a zero of a byte each, which only groups of 4 bits have.
    """

    bits: int
    grouped: bool = False
    minima: bool = False
    zeros: bool = False

    def __str__(self) -> str:
        return f"q{self.bits}" + "m" * self.minima + "z" * self.zeros if self.grouped else "int8"


INT8 = Format(8)
Q4 = Format(4, grouped=True, zeros=True)
"""Four and a half bits a weight with scales and zeros."""
Formats = Mapping[Role, Format]
"""The formats of quantised products by role; the others have the dtype of states."""

Layout = dict[str, tuple[torch.dtype, tuple[int, ...]]]
"""Dtype and shape of each tensor of a packed layer, by the names that :func:`tensors_of` gives."""


class PackedLayer(NamedTuple):
    """A packed layer has products and norms.

    Attributes:
        states: The dtype of states: bfloat16 or float32.
        products: Packed weights by role.
        norms: Norms by role; those that the layer lacks are not there.
        rows: Whether products by int8 matrices take int8 rows; if not, all products take states.
    """

    states: torch.dtype
    products: Mapping[Role, Weight]
    norms: Mapping[Role, Norm]
    rows: bool = True


def products_of(spec: LayerSpec) -> list[Role]:
    """Return the roles of a layer's products."""
    own = () if spec.relative is None else (spec.relative.key, spec.relative.query)
    absent = {"position_key", "position_query"}.difference(own)
    return [role for role in _PRODUCTS if role not in absent and (role != "gate" or spec.gated)]


def packed_layer(
    spec: LayerSpec,
    weights: Weights,
    states: torch.dtype,
    formats: Formats,
    done: Mapping[Role, Weight] | None = None,
    importance: Mapping[Role, Tensor] | None = None,
    *,
    in_place: bool = False,
) -> PackedLayer:
    """Pack the weights of a layer.

    Args:
        spec: The layer's spec.
        weights: The layer's weights, by role, in any floating dtype. Products may be left out.
        states: The dtype of states and of the other products: bfloat16 or float32.
        formats: The formats of the products that are quantised.
        done: Products that are packed already, by role; None for none.
        importance: How much errors of the weights that meet each entry of an input count, float32 ``[in]``, by
            role; the same of all for roles that are not there. Only formats of 4 bits look at it.
        in_place: Whether the memory of the weights may be used, which then hold other numbers.
    """
    products = dict(done or {})
    for role in products_of(spec):
        if role in products or f"{role}.weight" not in weights:
            continue
        matrix, bias = weights[f"{role}.weight"], weights.get(f"{role}.bias")
        if (format := formats.get(role)) is not None:
            products[role] = quantized_weight(matrix, bias, format, (importance or {}).get(role))
            continue
        pack = kernels().pack_in_place if in_place and fits_in_place(matrix, states) else None
        products[role] = packed_weight(matrix, bias, states, pack)
    # Norms are copied, because the caller may read the next layer into the same memory.
    return PackedLayer(states, products, _norms(spec, weights, copy=True))


def quantized_weight(
    matrix: Tensor, bias: Tensor | None, format: Format, importance: Tensor | None = None
) -> Weight:
    """Quantise a matrix ``[columns, inner]`` of any floating dtype, and pack it.

    For ``importance`` see :func:`grating_core.kernels.groups.quantized_groups`.
    """
    if format.zeros:
        return weight_with_zeros(matrix, bias, importance)
    if format.grouped:
        return grouped_weight(matrix, bias, format.bits, importance=importance, minima=format.minima)
    return packed_weight(matrix, bias, torch.int8)


def tensors_of(layer: PackedLayer) -> dict[str, Tensor]:
    """Return the tensors of a packed layer by name, such as ``"up.packed"``, to be stored."""
    parts: dict[str, Weight | Norm] = {**layer.products, **layer.norms}
    return {f"{name}.{field}": tensor for name, part in parts.items() for field, tensor in fields_of(part).items()}


def fields_of(part: Weight | Norm) -> dict[str, Tensor]:
    """Return the tensors that a weight or a norm has, by field."""
    found = ((field, getattr(part, field, None)) for field in (*_FIELDS, "weight"))
    return {field: tensor for field, tensor in found if tensor is not None}


def layout_of(spec: LayerSpec, weights: Weights, states: torch.dtype, formats: Formats) -> Layout:
    """Return the layout of the layer that :func:`packed_layer` makes of the same arguments.

    Only the shapes of the weights count, so that they may be on torch's device ``meta``.
    """
    found: Layout = {}
    for role in products_of(spec):
        if f"{role}.weight" not in weights:
            continue
        columns, inner = weights[f"{role}.weight"].shape
        layout = layout_of_weight(columns, inner, states, formats.get(role), biased=f"{role}.bias" in weights)
        found |= {f"{role}.{field}": one for field, one in layout.items()}
    for name in (f"{role}.{kind}" for role in _NORMS for kind in ("weight", "bias")):
        if name in weights:
            found[name] = torch.float32, tuple(weights[name].shape)
    return found


def layout_of_weight(
    columns: int, inner: int, states: torch.dtype, format: Format | None, *, biased: bool = False
) -> Layout:
    """Return dtype and shape of each field of a packed weight ``[columns, inner]``.

    Args:
        columns: Number of entries of the output.
        inner: Number of entries of the input.
        states: The dtype of the weight if it is not quantised.
        format: The format of a quantised weight; None for another.
        biased: Whether it has a bias.
    """
    padded = torch.float32, (padded_columns(columns),)
    found: Layout
    if format is not None and format.zeros:
        found = {"packed": (torch.int8, (grouped_bytes(4, columns, inner),))}
        found |= {"scale": (torch.uint8, zeros_shape(columns, inner)), "factor": padded}
    elif format is not None and format.grouped:
        of_groups = torch.float16, groups_shape(columns, inner)
        found = {"packed": (torch.int8, (grouped_bytes(format.bits, columns, inner),)), "scale": of_groups}
        found |= {"minimum": of_groups} if format.minima else {}
    else:
        dtype = states if format is None else torch.int8
        found = {"packed": (torch.int8, (packed_bytes(dtype, columns, inner),))}
        found |= {} if format is None else {"scale": padded, "sums": padded}
    return found | ({"bias": padded} if biased else {})


def layer_of(spec: LayerSpec, tensors: Mapping[str, Tensor], states: torch.dtype) -> PackedLayer:
    """Return the packed layer that :func:`tensors_of` gave these tensors of; they may be views of one buffer.

    Args:
        spec: The layer's spec.
        tensors: The tensors by name.
        states: The dtype of states, and of the products that are not quantised.
    """
    products = {}
    for role in products_of(spec):
        fields = {field: tensors[name] for field in _FIELDS if (name := f"{role}.{field}") in tensors}
        if fields:
            products[role] = weight_of(fields, states, *spec.shape(role))
    return PackedLayer(states, products, _norms(spec, tensors))


def weight_of(fields: Mapping[str, Tensor], states: torch.dtype, columns: int, inner: int) -> Weight:
    """Return the weight ``[columns, inner]`` that :func:`fields_of` gave these tensors of."""
    scale, bits, dtype = fields.get("scale"), None, states
    if "factor" in fields:
        bits = 4
    elif scale is not None and scale.dtype == torch.float16:
        bits = 8 if len(fields["packed"]) == grouped_bytes(8, columns, inner) else 4
    if scale is not None:
        dtype = torch.uint8 if bits == 4 else torch.int8
    return Weight(dtype=dtype, columns=columns, inner=inner, bits=bits, **fields)


def norm_of(norm: NormSpec, weights: Weights, role: Role, *, copy: bool = False) -> Norm | None:
    """Return the norm of a role as kernels take it; None if there is no weight for it.

    Args:
        norm: What all norms of the model have in common.
        weights: Weights by role, in any floating dtype.
        role: The role.
        copy: Whether to copy weights that are in float32 already.
    """
    wide = {
        kind: weights[name].to(torch.float32, copy=copy).contiguous()
        for kind in ("weight", "bias")
        if (name := f"{role}.{kind}") in weights
    }
    return Norm(norm.kind, norm.eps, norm.offset, **wide) if "weight" in wide else None


def _norms(spec: LayerSpec, weights: Weights, *, copy: bool = False) -> dict[Role, Norm]:
    found = {role: norm_of(spec.norm, weights, role, copy=copy) for role in _NORMS}
    return {role: norm for role, norm in found.items() if norm is not None}
