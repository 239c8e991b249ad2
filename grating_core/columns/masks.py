"""Plain tensor code says what a pruned MLP computes. Every faster path is tested against it.

A gated MLP is y = W_d ((W_u x) * act(W_g x)). Dynamic input pruning (DIP, arXiv 2412.01380, section 4) keeps the
entries of x that are largest in magnitude, which decides the columns of W_u and W_g that are needed, and then the
largest of the gated product, which decides the columns of W_d.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from grating_core.errors import UnsupportedModelError


@dataclass(frozen=True)
class Shares:
    """The shares, from 0 to 1, of what one MLP keeps.

    Attributes:
        inputs: Share of the entries of its input, and so of the columns of W_u and W_g.
        products: Share of the entries of its gated product, and so of the columns of W_d.
    """

    inputs: float
    products: float

    @property
    def density(self) -> float:
        """Return the share of the three matrices' weights that are used."""
        return (2 * self.inputs + self.products) / 3


def kept(count: int, share: float) -> int:
    """Return how many of so many entries a share comes to; at least one."""
    return min(count, max(1, round(share * count)))


def keep_largest(values: Tensor, share: float) -> Tensor:
    """Return the values with all but the largest in magnitude set to 0, along the last dimension.

    Args:
        values: ``[…, D]``.
        share: Share of the D entries that is kept.
    """
    count = kept(values.shape[-1], share)
    if count == values.shape[-1]:
        return values
    places = values.abs().topk(count, dim=-1, sorted=False).indices
    return torch.zeros_like(values).scatter(-1, places, values.gather(-1, places))


def find_gated_mlp(layer: nn.Module) -> Any:
    """Return the gated MLP of a decoder's layer, with ``gate_proj``, ``up_proj``, ``down_proj`` and ``act_fn``.

    Raises:
        UnsupportedModelError: The layer has none.
    """
    mlp = getattr(layer, "mlp", None)
    if not all(hasattr(mlp, part) for part in ("gate_proj", "up_proj", "down_proj", "act_fn")):
        raise UnsupportedModelError(
            f"mlp_density is for models with gated MLPs (gate_proj, up_proj, down_proj), such as Llama, Qwen or "
            f"Gemma; a {type(layer).__name__} has none. Leave mlp_density out"
        )
    return mlp


class MaskedMlp(nn.Module):
    """A gated MLP that computes with what is kept only, for every token on its own.

    All weights are in memory and multiplied. So it shows what pruning does to a model, and saves nothing.

    Args:
        mlp: The dense one, see :func:`find_gated_mlp`.
        shares: What is kept.
    """

    def __init__(self, mlp: Any, shares: Shares) -> None:
        super().__init__()
        self.mlp = mlp
        self.shares = shares

    def forward(self, hidden: Tensor) -> Tensor:
        """Return the MLP's output ``[…, D]`` for its input of that shape."""
        mlp = self.mlp
        hidden = keep_largest(hidden, self.shares.inputs)
        gate, up = mlp.act_fn(mlp.gate_proj(hidden)), mlp.up_proj(hidden)
        output: Tensor = mlp.down_proj(keep_largest(gate * up, self.shares.products))
        return output
