"""Linear maps and norms take their weights by role."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor
from torch.nn import functional

from grating_core.layers.spec import Norm, Role

Weights = Mapping[str, Tensor]
"""Tensors by role, such as ``"query.weight"`` and ``"query.bias"``."""


def linear(states: Tensor, weights: Weights, role: Role) -> Tensor:
    """Return the linear map of a role, ``[…, out]``, of states ``[…, in]``."""
    return functional.linear(states, weights[f"{role}.weight"], weights.get(f"{role}.bias"))


def normed(states: Tensor, weights: Weights, role: Role, norm: Norm) -> Tensor:
    """Return the norm of a role of states ``[…, D]``; the states themselves if there is no weight for it."""
    weight = weights.get(f"{role}.weight")
    if weight is None:
        return states
    if norm.kind == "layer":
        return functional.layer_norm(states, weight.shape, weight, weights.get(f"{role}.bias"), norm.eps)
    if norm.offset:
        return functional.rms_norm(states.float(), weight.shape, weight.float() + norm.offset, norm.eps).to(
            states.dtype
        )
    return functional.rms_norm(states, weight.shape, weight, norm.eps)
