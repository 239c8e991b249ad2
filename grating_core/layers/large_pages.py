"""Packed layers that stay in memory lie one behind the other, in large pages."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

from torch import Tensor

from grating_core.kernels.operands import Norm, Weight
from grating_core.layers.packed import PackedLayer, fields_of
from grating_core.memory.pages import empty

_LINE = 64  # bytes
_Part = TypeVar("_Part", Weight, Norm)


def in_large_pages(layers: Iterable[PackedLayer], size: int) -> Iterator[PackedLayer]:
    """Move layers into one piece of memory, a layer at a time. Nothing of a layer stays where it was.

    Args:
        layers: The layers, which are given up one after the other.
        size: The bytes of all layers, each rounded up to whole cache lines.
    """
    memory, start = empty(size), 0

    def moved(tensor: Tensor) -> Tensor:
        nonlocal start
        place = memory[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        start += tensor.nbytes
        return place.copy_(tensor)

    def moved_part(part: _Part) -> _Part:
        fields: dict[str, Any] = {field: moved(tensor) for field, tensor in fields_of(part).items()}
        return part._replace(**fields)

    def moved_layer(layer: PackedLayer) -> PackedLayer:
        nonlocal start
        start = -(-start // _LINE) * _LINE
        # Products come first, because all their tensors are whole cache lines.
        products = {role: moved_part(weight) for role, weight in layer.products.items()}
        norms = {role: moved_part(norm) for role, norm in layer.norms.items()}
        return layer._replace(products=products, norms=norms)

    # No name here stands for a layer, which would stay in memory while the next one is packed.
    yield from map(moved_layer, layers)
