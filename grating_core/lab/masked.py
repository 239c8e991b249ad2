"""A masked MLP stands in for a gated MLP of transformers, and shows what pruning does to a model."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from grating_core.columns.masks import Shares, keep_largest
from grating_core.errors import UnsupportedModelError


def find_gated_mlp(layer: nn.Module) -> Any:
    """Return the gated MLP of a decoder's layer, with ``gate_proj``, ``up_proj``, ``down_proj`` and ``act_fn``.

    Raises:
        UnsupportedModelError: The layer has no gated MLP, or one whose gate and up matrices are one.
    """
    mlp = getattr(layer, "mlp", None)
    if hasattr(mlp, "gate_up_proj"):
        raise UnsupportedModelError(
            f"a {type(layer).__name__} has one matrix, gate_up_proj, in place of gate_proj and up_proj. Such "
            f"models run with mlp_density, but can be neither distilled nor simulated"
        )
    if not all(hasattr(mlp, part) for part in ("gate_proj", "up_proj", "down_proj", "act_fn")):
        raise UnsupportedModelError(
            f"mlp_density is for models with gated MLPs (gate_proj, up_proj, down_proj), such as Llama, Qwen or "
            f"Gemma; a {type(layer).__name__} has none. Leave mlp_density out"
        )
    return mlp


class MaskedMlp(nn.Module):
    """A masked MLP computes each token with the kept entries only.

    It multiplies by all weights, so it shows how pruning changes a model, but saves nothing.

    Args:
        mlp: The dense MLP, see :func:`find_gated_mlp`.
        shares: Shares of the entries that are kept.
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
