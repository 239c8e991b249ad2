"""An epilogue is what follows a product of matrices, computed before the product leaves the processor's cache.

In 16 bits oneDNN has them: product and GELU of the m3 shape's MLP then took 0.7 of the time of both apart.
In float32 they were no faster.
"""

from __future__ import annotations

import platform
from functools import cache

import torch
from torch import Tensor

from grating_core.kernels.activations import ACTIVATIONS
from grating_core.layers.linear import Weights, linear
from grating_core.layers.spec import Role

# oneDNN's name and variant of each activation.
_FUSED = {
    "gelu": ("gelu", "none"),
    "gelu_new": ("gelu", "tanh"),
    "gelu_pytorch_tanh": ("gelu", "tanh"),
    "relu": ("relu", ""),
    "silu": ("swish", ""),
    "swish": ("swish", ""),
    "tanh": ("tanh", ""),
}


def activated(states: Tensor, weights: Weights, role: Role, activation: str) -> Tensor:
    """Return the activation, by its name, of the linear map of a role, ``[T, out]``, of states ``[T, in]``."""
    if not (_fuses(states) and activation in _FUSED):
        return ACTIVATIONS[activation](linear(states, weights, role))
    name, variant = _FUSED[activation]
    product: Tensor = torch.ops.mkldnn._linear_pointwise(
        states, weights[f"{role}.weight"], weights.get(f"{role}.bias"), name, [], variant
    )
    return product


def multiplied(states: Tensor, weights: Weights, role: Role, factors: Tensor) -> Tensor:
    """Return the linear map of a role of states, times factors ``[T, out]``, which may be overwritten."""
    if not _fuses(states):
        return factors.mul_(linear(states, weights, role))
    product: Tensor = torch.ops.mkldnn._linear_pointwise.binary(
        states, factors, weights[f"{role}.weight"], weights.get(f"{role}.bias"), "mul"
    )
    return product


def added(states: Tensor, weights: Weights, role: Role, total: Tensor, factor: float = 1.0) -> Tensor:
    """Return a total ``[T, out]`` plus the linear map of a role, times a factor, of states ``[T, in]``."""
    weight, bias = weights[f"{role}.weight"], weights.get(f"{role}.bias")
    if bias is None:
        return torch.addmm(total, states, weight.t(), alpha=factor)
    if factor == 1 and _fuses(states):
        output: Tensor = torch.ops.mkldnn._linear_pointwise.binary(states, total, weight, bias, "add")
        return output
    return total.add(bias, alpha=factor).addmm_(states, weight.t(), alpha=factor)


def _fuses(states: Tensor) -> bool:
    return states.device.type == "cpu" and _has_products(states.dtype)


@cache
def _has_products(dtype: torch.dtype) -> bool:
    """Tell whether oneDNN has fused products of this dtype for this processor."""
    # Compiled models of torch call the same function. Only processors of this kind were measured.
    if platform.machine().lower() not in ("x86_64", "amd64") or not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    known = {
        torch.bfloat16: torch.ops.mkldnn._is_mkldnn_bf16_supported,
        torch.float16: torch.ops.mkldnn._is_mkldnn_fp16_supported,
    }
    return dtype in known and bool(known[dtype]())
