"""One number, the density, becomes what each MLP keeps of its inputs and of its products."""

from __future__ import annotations

from typing import Any

from grating_core.arguments import is_number
from grating_core.columns.masks import Shares

INPUTS_ODDS = 1.3
FIRST_LAYER = 1.35
_SPARE = 1.15  # room for products, in units of what a token uses


def check_density(mlp_density: Any) -> float:
    """Return the density, if it is one.

    Raises:
        ValueError: It is not a number above 0, 1 at most.
    """
    if not is_number(mlp_density) or not 0 < mlp_density <= 1:
        raise ValueError(
            f"mlp_density={mlp_density!r} must be a number above 0, 1 at most: the share of the MLPs' weights "
            f"that a token uses; None for all"
        )
    return float(mlp_density)


def allocate(
    mlp_density: float, depth: int, inputs_odds: float = INPUTS_ODDS, first_layer: float = FIRST_LAYER
) -> tuple[Shares, ...]:
    """Return what each layer keeps, so that their mean density is the one wanted.

    Inputs matter more than products, and the first layer, whose inputs are the tokens themselves, more than the
    others. ``scripts/fit_allocation.py`` fitted the last two numbers to the perplexity of SmolLM2-135M-Instruct.

    Args:
        mlp_density: Share of the MLPs' weights that are used, above 0, 1 at most.
        depth: Number of layers.
        inputs_odds: Odds that an input is kept, divided by the odds of the layer's density.
        first_layer: Density of the first layer, divided by the mean.
    """
    first = min(1.0, first_layer * mlp_density) if depth > 1 else mlp_density
    others = (mlp_density * depth - first) / max(1, depth - 1)
    return (_split(first, inputs_odds), *(_split(others, inputs_odds),) * (depth - 1))


def divide_room(share: float, shares: Shares) -> Shares:
    """Return how much of each kind of column is in memory, if a layer has room for a share of all its columns.

    Products come first, as far as a token uses them and a bit more: nearly every one that is in memory saves a
    read, and their reads are the small ones. Then come inputs, whose columns change more from token to token.

    Args:
        share: Share of the MLP's weights that has room, from 0 to 1.
        shares: What a token uses.
    """
    products = min(1.0, _SPARE * shares.products, 3 * share)
    inputs = min(1.0, (3 * share - products) / 2)
    return Shares(inputs, min(1.0, 3 * share - 2 * inputs))


def _split(density: float, inputs_odds: float) -> Shares:
    inputs = inputs_odds * density / (1 + (inputs_odds - 1) * density)
    return Shares(inputs, 3 * density - 2 * inputs)
