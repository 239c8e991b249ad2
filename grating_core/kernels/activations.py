"""Activations, by the names that configurations have for them. Each works in place."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional


def _gelu(states: Tensor) -> Tensor:
    return torch.ops.aten.gelu_(states)  # type: ignore[no-any-return]


def _gelu_tanh(states: Tensor) -> Tensor:
    return torch.ops.aten.gelu_(states, approximate="tanh")  # type: ignore[no-any-return]


def _silu(states: Tensor) -> Tensor:
    return functional.silu(states, inplace=True)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": _gelu,
    "gelu_new": _gelu_tanh,
    "gelu_pytorch_tanh": _gelu_tanh,
    "relu": torch.relu_,
    "silu": _silu,
    "swish": _silu,
    "tanh": torch.tanh_,
}
"""Functions that change their argument and return it. A configuration with another name is refused."""
