"""Plain tensor code defines what a pruned MLP computes. Every faster path is tested against it.

A gated MLP is y = W_d ((W_u x) * act(W_g x)). Dynamic input pruning (DIP, arXiv 2412.01380, section 4) keeps the
entries of x with the largest magnitudes, which decide the columns of W_u and W_g. Then it keeps the largest
entries of the gated product, which decide the columns of W_d.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Shares:
    """This class holds the shares, from 0 to 1, that one MLP keeps.

    Attributes:
        inputs: Share of the input's entries, and so of the columns of W_u and W_g.
        products: Share of the gated product's entries, and so of the columns of W_d.
    """

    inputs: float
    products: float

    @property
    def density(self) -> float:
        """The share of the three matrices' weights that is used."""
        return (2 * self.inputs + self.products) / 3


def kept(count: int, share: float) -> int:
    """Return the number of entries in a share of ``count`` entries, at least one."""
    return min(count, max(1, round(share * count)))


def keep_largest(values: Tensor, share: float) -> Tensor:
    """Return the values with all but the largest magnitudes set to 0, along the last dimension.

    Args:
        values: Values, ``[…, D]``.
        share: Share of the D entries that is kept.
    """
    count = kept(values.shape[-1], share)
    if count == values.shape[-1]:
        return values
    places = values.abs().topk(count, dim=-1, sorted=False).indices
    return torch.zeros_like(values).scatter(-1, places, values.gather(-1, places))
