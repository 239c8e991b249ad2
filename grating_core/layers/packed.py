"""A packed layer holds the weights of a layer in the order that kernels read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from grating_core.kernels.operands import Norm, Weight
from grating_core.kernels.packing import packed_bytes, packed_weight, padded_columns
from grating_core.layers.linear import Weights
from grating_core.layers.spec import LayerSpec, Role

ATTENDING = ("query", "key", "value")
"""The roles that the product ``"attention"`` holds, one behind the other, each padded to 32 columns."""
_NORMS = ("input_norm", "query_norm", "key_norm", "attention_norm", "mlp_norm", "output_norm")

Product = str
"""The name of a product of a layer: ``"attention"``, ``"output"``, ``"gate"``, ``"up"`` or ``"down"``."""


class PackedLayer(NamedTuple):
    """A packed layer has products and norms.

    Attributes:
        products: Packed weights by the name of the product.
        norms: Norms by role; those that the layer lacks are not there.
    """

    products: Mapping[Product, Weight]
    norms: Mapping[Role, Norm]


def products_of(spec: LayerSpec) -> dict[Product, tuple[int, int]]:
    """Return the products of a layer, with columns and inner entries of each."""
    columns = sum(padded_columns(spec.shape(role)[0]) for role in ATTENDING)
    found = {"attention": (columns, spec.width)}
    for role in ("output", "gate", "up", "down"):
        if role != "gate" or spec.gated:
            rows, inner = spec.shape(role)
            found[role] = rows, inner
    return found


def packed_layer(
    spec: LayerSpec, weights: Weights, dtype: torch.dtype, kept: Mapping[Product, torch.dtype] | None = None
) -> PackedLayer:
    """Pack the weights of a layer.

    Args:
        spec: The layer's spec.
        weights: The layer's weights, by role, in any floating dtype.
        dtype: The dtype of the packed products: int8, bfloat16 or float32.
        kept: The products of another dtype; None for none.
    """
    products = {}
    for name in products_of(spec):
        wanted = (kept or {}).get(name, dtype)
        if name == "attention":
            products[name] = stacked([_packed(weights, role, wanted) for role in ATTENDING])
        else:
            products[name] = _packed(weights, name, wanted)
    norms = {}
    for role in _NORMS:
        weight, bias = weights.get(f"{role}.weight"), weights.get(f"{role}.bias")
        if weight is not None:
            norms[role] = _norm(spec, weight.float(), None if bias is None else bias.float())
    return PackedLayer(products, norms)


def stacked(parts: list[Weight]) -> Weight:
    """Return one weight whose columns are those of several, each padded."""
    bias = None
    if any(part.bias is not None for part in parts):
        bias = torch.cat([torch.zeros(padded_columns(p.columns)) if p.bias is None else p.bias for p in parts])
    scales = [part.scale for part in parts if part.scale is not None]
    columns = sum(padded_columns(part.columns) for part in parts)
    packed = torch.cat([part.packed for part in parts])
    return Weight(packed, parts[0].dtype, columns, parts[0].inner, torch.cat(scales) if scales else None, bias)


def columns_of(weight: Weight, start: int, stop: int) -> Weight:
    """Return the columns from ``start``, a multiple of 32, to ``stop``."""
    each = packed_bytes(weight.dtype, 32, weight.inner) // 32
    end = padded_columns(stop)
    return Weight(
        weight.packed[start * each : end * each],
        weight.dtype,
        stop - start,
        weight.inner,
        None if weight.scale is None else weight.scale[start:end],
        None if weight.bias is None else weight.bias[start:end],
    )


def tensors_of(layer: PackedLayer) -> dict[str, Tensor]:
    """Return the tensors of a packed layer by name, such as ``"up.packed"``, to be stored."""
    found = {}
    for name, part in (*layer.products.items(), *layer.norms.items()):
        for field in ("packed", "scale", "weight", "bias"):
            tensor = getattr(part, field, None)
            if tensor is not None:
                found[f"{name}.{field}"] = tensor
    return found


def layer_of(
    spec: LayerSpec,
    tensors: Mapping[str, Tensor],
    dtype: torch.dtype,
    kept: Mapping[Product, torch.dtype] | None = None,
) -> PackedLayer:
    """Return the packed layer that :func:`tensors_of` gave these tensors of; they may be views of one buffer.

    Args:
        spec: The layer's spec.
        tensors: The tensors by name.
        dtype: The dtype of the packed products.
        kept: The products of another dtype; None for none.
    """
    products = {
        name: Weight(
            tensors[f"{name}.packed"],
            (kept or {}).get(name, dtype),
            columns,
            inner,
            tensors.get(f"{name}.scale"),
            tensors.get(f"{name}.bias"),
        )
        for name, (columns, inner) in products_of(spec).items()
    }
    norms = {
        role: _norm(spec, tensors[f"{role}.weight"], tensors.get(f"{role}.bias"))
        for role in _NORMS
        if f"{role}.weight" in tensors
    }
    return PackedLayer(products, norms)


def _packed(weights: Weights, role: Role, dtype: torch.dtype) -> Weight:
    return packed_weight(weights[f"{role}.weight"], weights.get(f"{role}.bias"), dtype)


def _norm(spec: LayerSpec, weight: Tensor, bias: Tensor | None) -> Norm:
    return Norm(spec.norm.kind, spec.norm.eps, spec.norm.offset, weight.contiguous(), bias)
