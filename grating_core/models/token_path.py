"""The path of one token through a language model: few calls of a kernel, prepared once."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from grating_core.kernels.choice import kernels
from grating_core.kernels.operands import Weight
from grating_core.kernels.reference import normed
from grating_core.kernels.token import Output, Stack, TokenLayer
from grating_core.layers.linear import Weights
from grating_core.layers.packed import PackedLayer, norm_of
from grating_core.layers.token import is_expressible, token_layer
from grating_core.models.family import ModelSpec
from grating_core.models.layered import Layer


class TokenPath:
    """A path has the resident layers in stacks, and what makes angles and logits.

    Args:
        spec: The description of the model.
        layers: The resident layers by number from 1.
        outside: Weights around the layers, by role.
        head: The output embedding: a packed weight, or the matrix ``[V, D]``.
    """

    def __init__(
        self, spec: ModelSpec, layers: Mapping[int, PackedLayer], outside: Weights, head: Weight | Tensor
    ) -> None:
        self._kinds = list(dict.fromkeys(layer.rotary for layer in spec.layers if layer.rotary is not None))
        self._frequencies = [torch.tensor(kind.frequencies) for kind in self._kinds]
        self.output = Output(norm_of(spec.norm, outside, "final_norm"), head)
        """What makes logits of the states behind the last layer."""
        self._stacks: dict[int, Stack] = {}
        first = 1
        while first <= spec.depth:
            end = first
            while end in layers:
                end += 1
                if "up" not in layers[end - 1].products:  # its MLP is computed elsewhere, before the next layer
                    break
            if first < end:
                run = (token_layer(spec.layers[n - 1], layers[n], self._kinds) for n in range(first, end))
                self._stacks[first] = Stack(list(run))
            first = max(end, first + 1)

    def resident(self, number: int) -> Stack | None:
        """Return the resident layers from a number on; None if the layer of this number is streamed."""
        return self._stacks.get(number)

    def streamed(self, layer: Layer) -> Stack:
        """Return the stack of a packed layer that is in memory for now."""
        assert isinstance(layer.weights, PackedLayer)
        return Stack([token_layer(layer.spec, layer.weights, self._kinds)])

    def add(self, row: Tensor, output: Tensor, layer: TokenLayer) -> None:
        """Add what an MLP gave that was computed elsewhere.

        Args:
            row: The token's hidden states, float32 ``[D]``. Those after the layer take their place.
            output: The output of the MLP, float32 ``[D]``.
            layer: The layer of the MLP.
        """
        norm = layer.norms.get("output_norm")
        row.add_(output if norm is None else normed(output, norm), alpha=layer.factor)

    def angles(self, position: int) -> list[tuple[Tensor, Tensor]]:
        """Return the cosines and sines at a position, of each kind of rotary positions."""
        turned = [frequencies * position for frequencies in self._frequencies]
        return [
            (angles.cos() * kind.scale, angles.sin() * kind.scale)
            for kind, angles in zip(self._kinds, turned, strict=True)
        ]


def token_path(
    spec: ModelSpec, layers: Mapping[int, Weights | PackedLayer], outside: Weights, head: Weight | Tensor
) -> TokenPath | None:
    """Return the path of one token through a model with packed layers; None if no kernel has such layers."""
    if kernels().token is None or not all(map(is_expressible, spec.layers)):
        return None
    packed = {number: layer for number, layer in layers.items() if isinstance(layer, PackedLayer)}
    return TokenPath(spec, packed, outside, head)
