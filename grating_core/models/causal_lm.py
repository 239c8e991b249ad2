"""A language model is a layered model whose head predicts the next token."""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from grating_core.kernels.choice import kernels
from grating_core.kernels.operands import Weight
from grating_core.kernels.token import Memories, Output, Stack
from grating_core.layers.linear import linear
from grating_core.layers.packed import norm_of
from grating_core.layers.packed_steps import product
from grating_core.models.heads import softcapped
from grating_core.models.layered import LayeredModel
from grating_core.models.token_path import TokenPath, token_path


class CausalLM(LayeredModel):
    """A language model has the final norm and the whole output embedding of a decoder, in the compute dtype."""

    @property
    def output(self) -> Weight | None:
        """The packed output embedding; None if it is not packed."""
        return self._parts.output

    @property
    def kv_bits(self) -> int | None:
        """The bits of keys and values, 8; None for the dtype of states."""
        return self._parts.kv_bits

    def logits(self, hidden: Tensor) -> Tensor:
        """Return the logits of the next token.

        Args:
            hidden: Hidden states after the last layer, ``[T, D]``.

        Returns:
            The logits, float32 ``[V]``.
        """
        output, run = self.output, kernels().token
        if output is not None and run is not None and hidden.dtype == torch.bfloat16:
            # Other products unpack a weight first, which takes longer than a product of one row. They round less:
            # in float32, logits of a prompt are those of the weights, with no rounding of states.
            step = Output(norm_of(self.spec.norm, self.outside, "final_norm"), output)
            found = run(hidden[-1].float(), Stack(()), Memories(()), 0, 0, (), step)
            assert found is not None
            return self.bounded(found)
        states = self.normed(hidden[-1:])
        if output is None:
            return self.bounded(linear(states, self.head, "vocabulary")[0].float())
        return self.bounded(product(states, output)[0].float())

    def bounded(self, products: Tensor) -> Tensor:
        """Return the logits of the float32 products ``[V]`` with the output embedding."""
        logits = products if self.spec.temperature == 1 else products / self.spec.temperature
        return softcapped(logits, self.spec.softcap)

    @cached_property
    def token_path(self) -> TokenPath | None:
        """The path of one token through the layers; None if it goes like a prompt."""
        if self.packing is None:
            return None
        head = self.head["vocabulary.weight"] if self.output is None else self.output
        return token_path(self.spec, self._parts.layers, self.outside, head)
