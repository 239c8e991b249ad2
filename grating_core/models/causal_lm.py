"""A loaded language model: a layered model whose head says what comes next."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from grating_core.models.layered import LayeredModel


class CausalLM(LayeredModel):
    """A layered model with the final norm and the whole output embedding of a decoder, in the compute dtype."""

    @property
    def keys(self) -> tuple[int, int]:
        """Of how many heads a layer keeps keys and values, and how long they are for one token."""
        return keys_of(self.layers[0])

    def logits(self, hidden: Tensor) -> Tensor:
        """float32 ``[V]``, of what may come after the last token, from ``[1, T, D]`` behind the last layer."""
        logits: Tensor = self.module.lm_head(self._norm(hidden[0, -1:]))[0].float()
        cap: float | None = getattr(self.module.config, "final_logit_softcapping", None)
        return logits if cap is None else cap * torch.tanh(logits / cap)


def keys_of(layer: Any) -> tuple[int, int]:
    """See :attr:`CausalLM.keys`."""
    attention = layer.self_attn
    return attention.k_proj.out_features // attention.head_dim, attention.head_dim
