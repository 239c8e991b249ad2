"""This module turns one number, the density, into the shares of inputs and products that each MLP keeps."""

from __future__ import annotations

from grating_core.columns.masks import Shares

INPUTS_ODDS = 1.3
FIRST_LAYER = 1.35
_SPARE = 1.15  # room for products, divided by the room that one token's products take


def allocate(
    mlp_density: float, depth: int, inputs_odds: float = INPUTS_ODDS, first_layer: float = FIRST_LAYER
) -> tuple[Shares, ...]:
    """Return the shares that each layer keeps. Their mean density is ``mlp_density``.

    Inputs matter more than products. The first layer, whose inputs are the tokens themselves, matters more than
    the others. ``scripts/fit_allocation.py`` fitted the last two numbers to the perplexity of
    SmolLM2-135M-Instruct.

    Args:
        mlp_density: Share of the MLPs' weights that a token uses, above 0 and at most 1.
        depth: Number of layers.
        inputs_odds: Odds that an input is kept, divided by the odds of the layer's density.
        first_layer: Density of the first layer, divided by the mean.
    """
    first = min(1.0, first_layer * mlp_density) if depth > 1 else mlp_density
    others = (mlp_density * depth - first) / max(1, depth - 1)
    return (_split(first, inputs_odds), *(_split(others, inputs_odds),) * (depth - 1))


def divide_room(share: float, shares: Shares) -> Shares:
    """Return the share of each kind of column that is in memory, if a layer has room for a share of all columns.

    Products come first, up to a little more than a token uses: nearly every product in memory saves a read, and
    reads of products are the small ones. Inputs come next, because their columns change more from token to token.

    Args:
        share: Share of the MLP's weights that fits into memory, from 0 to 1.
        shares: Shares that a token uses.
    """
    products = min(1.0, _SPARE * shares.products, 3 * share)
    inputs = min(1.0, (3 * share - products) / 2)
    return Shares(inputs, min(1.0, 3 * share - 2 * inputs))


def _split(density: float, inputs_odds: float) -> Shares:
    inputs = inputs_odds * density / (1 + (inputs_odds - 1) * density)
    return Shares(inputs, 3 * density - 2 * inputs)
