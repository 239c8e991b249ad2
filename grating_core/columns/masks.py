"""Which inputs and products of a gated MLP are kept: plain tensor code that every faster path is tested against.

A gated MLP is y = W_d ((W_u x) * act(W_g x)). Dynamic input pruning (DIP, arXiv 2412.01380, section 4) keeps the
entries of x that are largest in magnitude, which decides the columns of W_u and W_g that are needed, and then the
largest of the gated product, which decides the columns of W_d.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from grating_core.errors import UnsupportedModelError

Method = Literal["dip", "glu", "gate", "up"]


@dataclass(frozen=True)
class Shares:
    """What one MLP keeps, as shares from 0 to 1.

    Attributes:
        inputs: Of the entries of its input, and so of the columns of W_u and W_g.
        products: Of the entries of its gated product, and so of the columns of W_d.
    """

    inputs: float
    products: float

    @property
    def density(self) -> float:
        """Share of the three matrices' weights that are used."""
        return (2 * self.inputs + self.products) / 3


def kept(count: int, share: float) -> int:
    """How many of so many entries a share comes to; at least one."""
    return min(count, max(1, round(share * count)))


def keep_largest(values: Tensor, share: float) -> Tensor:
    """The values with all but the largest in magnitude set to 0, along the last dimension.

    Args:
        values: ``[…, D]``.
        share: Of the D entries, which are kept.
    """
    count = kept(values.shape[-1], share)
    if count == values.shape[-1]:
        return values
    places = values.abs().topk(count, dim=-1, sorted=False).indices
    return torch.zeros_like(values).scatter(-1, places, values.gather(-1, places))


def find_gated_mlp(layer: nn.Module) -> Any:
    """The gated MLP of a decoder's layer, with ``gate_proj``, ``up_proj``, ``down_proj`` and ``act_fn``.

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

    All weights are in memory and multiplied: this says what pruning does to a model, and saves nothing.

    Args:
        mlp: The dense one, see :func:`find_gated_mlp`.
        shares: What is kept.
        method: ``"dip"``; or one of the ways it is compared with, which keep all inputs: ``"glu"`` keeps the
            largest gated products, ``"gate"`` the columns where act(W_g x) is largest, ``"up"`` where W_u x is.
            :func:`baseline_shares` says what these keep at a density.
    """

    def __init__(self, mlp: Any, shares: Shares, method: Method = "dip") -> None:
        super().__init__()
        if method not in get_args(Method):
            raise ValueError(f"method={method!r} is unknown; there are {', '.join(get_args(Method))}")
        self.mlp = mlp
        self.shares = shares
        self.method = method

    def forward(self, hidden: Tensor) -> Tensor:
        """The MLP's output ``[…, D]`` for its input of that shape."""
        mlp, products = self.mlp, self.shares.products
        if self.method == "dip":
            hidden = keep_largest(hidden, self.shares.inputs)
        gate, up = mlp.act_fn(mlp.gate_proj(hidden)), mlp.up_proj(hidden)
        if self.method == "gate":
            gate = keep_largest(gate, products)
        elif self.method == "up":
            up = keep_largest(up, products)
        product = gate * up
        if self.method in ("dip", "glu"):
            product = keep_largest(product, products)
        output: Tensor = mlp.down_proj(product)
        return output


def baseline_shares(method: Literal["glu", "gate", "up"], density: float) -> Shares | None:
    """What a method other than DIP keeps at a density, or None where it cannot go so low.

    GLU pruning needs W_u and W_g whole. Pruning by the gate needs W_g whole and of the two others what is kept; by
    the up projection likewise. What DIP keeps is a matter of allocation.
    """
    products = 3 * density - 2 if method == "glu" else (3 * density - 1) / 2
    return Shares(1.0, products) if products > 0 else None
