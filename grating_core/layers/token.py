"""One token through packed layers: what the kernel is told of a layer."""

from __future__ import annotations

from collections.abc import Sequence

from grating_core.kernels.token import TokenLayer
from grating_core.layers.packed import PackedLayer
from grating_core.layers.spec import LayerSpec, Rotary


def is_expressible(spec: LayerSpec) -> bool:
    """Tell whether the kernel of one token has such a layer: one of a decoder, with norms before what is added."""
    return spec.causal and not spec.norm_behind and spec.relative is None


def token_layer(spec: LayerSpec, layer: PackedLayer, kinds: Sequence[Rotary]) -> TokenLayer:
    """Return what the kernel is told of a layer that it has.

    Args:
        spec: The layer's spec.
        layer: The layer.
        kinds: The kinds of rotary positions, in the order in which the kernel is given a token's angles.
    """
    return TokenLayer(
        layer.products,
        layer.norms,
        spec.heads,
        spec.key_heads,
        spec.head_size,
        spec.activation,
        spec.scaling,
        spec.window,
        spec.softcap,
        spec.residual,
        None if spec.rotary is None else kinds.index(spec.rotary),
    )
