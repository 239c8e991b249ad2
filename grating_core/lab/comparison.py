"""This module compares ways of generating at several densities, by speed and by perplexity."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from grating_core.arguments import check_density
from grating_core.columns.allocation import allocate
from grating_core.columns.cache import Caching
from grating_core.columns.preference import NOT_ASKED, Preferences
from grating_core.lab.activations import WINDOW, record_activations
from grating_core.lab.decoders import load_decoder
from grating_core.lab.machine import Costs
from grating_core.lab.masked import MaskedMlp
from grating_core.lab.quality import cached_mlps, cut_windows, evaluate
from grating_core.lab.shape import Shape
from grating_core.lab.simulator import CACHE_AWARE, DENSE, Estimate, find_order, simulate


@dataclass(frozen=True)
class Point:
    """A point is one way of generating at one density.

    Attributes:
        estimate: Speed of this way.
        density: Share of the MLPs' weights that a token uses; 1 for dense streaming.
        perplexity: Perplexity of the recorded model; None if it was not measured.
    """

    estimate: Estimate
    density: float
    perplexity: float | None


def compare(
    directory: Path,
    text: str,
    shape: Shape,
    costs: Costs,
    *,
    budget: int,
    densities: Sequence[float],
    tokens: int = 512,
    preferences: Preferences = NOT_ASKED,
    activations: Path | None = None,
    perplexity: bool = False,
    show_progress: bool = False,
) -> list[Point]:
    """Compare dense streaming with DIP and cache-aware DIP at each density.

    Args:
        directory: Directory of the decoder whose activations are recorded.
        text: The text that the decoder reads.
        shape: Shape of the simulated model, which may be another than the recorded one.
        costs: Costs of the simulated model on a machine.
        budget: The memory budget in bytes.
        densities: Shares of the MLPs' weights that a token uses, each above 0 and at most 1.
        tokens: Number of tokens of the text to use.
        preferences: Preferences of cache-aware DIP for columns in memory.
        activations: The file of the activations, which may not exist yet; None for a place in grating's cache.
        perplexity: Whether to measure perplexity on the same tokens. Each point then takes as long as recording.
        show_progress: Whether to show progress bars on standard error.

    Raises:
        BudgetError: The budget is too small.
        GratingError: The model or the file of activations is not usable.
        ValueError: An argument is not usable, or the text is too short.
    """
    if tokens < 2:
        raise ValueError(f"tokens={tokens} is too small: use 2 or more, one to read and one to predict")
    for density in densities:
        check_density(density)
    share = shape.pruned.plan(budget).column_share
    recorded = record_activations(directory, text, tokens, path=activations, show_progress=show_progress)
    found = {}
    for density in densities:
        shares = allocate(density, shape.columns.depth)
        preference = preferences.at(density, share)
        for estimate in simulate(recorded, shape, costs, budget=budget, shares=shares, preference=preference):
            found[1.0 if estimate.way == DENSE else density, estimate.way] = estimate
    perplexities = {}
    if perplexity:
        model, tokenizer = load_decoder(directory)
        length = min(WINDOW, tokens)
        windows = cut_windows(tokenizer, text, length, tokens // length)
        layers = zip(recorded.inputs, recorded.products, strict=True)
        orders = [tuple(map(find_order, layer)) for layer in layers]
        for density, way in found:
            caching = Caching(share, preferences.at(density, share))
            perplexities[density, way] = evaluate(
                model,
                windows,
                shares=None if way == DENSE else allocate(density, len(recorded.inputs)),
                # Plain DIP is measured without what is read on the way.
                make=cached_mlps(caching, orders, costs.disk.gaps) if way == CACHE_AWARE else MaskedMlp,
                show_progress=show_progress,
            ).perplexity
    return [Point(estimate, key[0], perplexities.get(key)) for key, estimate in found.items()]
