"""Packed layers that stay in memory lie one behind the other, in large pages."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from torch import Tensor

from grating_core.layers.linear import Weights
from grating_core.layers.packed import PackedLayer
from grating_core.memory.pages import empty

_LINE = 64  # bytes


def in_large_pages(layers: Iterable[Weights | PackedLayer], size: int) -> Iterator[PackedLayer]:
    """Move the products of layers into one piece of memory, a layer at a time.

    Args:
        layers: The layers, all packed, which are given up one after the other.
        size: The bytes of all layers; what does not fit stays where it is.
    """
    memory, start = empty(size), 0

    def move(tensor: Tensor | None) -> Tensor | None:
        nonlocal start
        if tensor is None or start + tensor.nbytes > size:
            return tensor
        place = memory[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        start += -(-tensor.nbytes // _LINE) * _LINE
        return place.copy_(tensor)

    for layer in layers:
        assert isinstance(layer, PackedLayer)
        products = {}
        for role, weight in layer.products.items():
            packed, scale, minimum = map(move, (weight.packed, weight.scale, weight.minimum))
            assert packed is not None
            products[role] = weight._replace(packed=packed, scale=scale, minimum=minimum)
        yield layer._replace(products=products)
