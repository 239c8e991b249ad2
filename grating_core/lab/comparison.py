"""Ways of generating are compared at several densities: how fast they are, and what they cost in perplexity."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from grating_core.columns.allocation import allocate, check_density
from grating_core.columns.cache import Caching, Preference
from grating_core.columns.install import PREFERENCE
from grating_core.columns.masks import MaskedMlp
from grating_core.lab.activations import WINDOW, record_activations
from grating_core.lab.decoders import load_decoder
from grating_core.lab.machine import Machine
from grating_core.lab.quality import CachedMlp, cut_windows, evaluate
from grating_core.lab.simulator import CACHE_AWARE, DENSE, Estimate, Shape, simulate


@dataclass(frozen=True)
class Point:
    """One way of generating at one density.

    Attributes:
        estimate: Speed of this way.
        density: Share of the MLPs' weights that a token uses; 1 for dense streaming.
        perplexity: Perplexity of the model that was recorded; None if it was not measured.
    """

    estimate: Estimate
    density: float
    perplexity: float | None


def compare(
    directory: Path,
    text: str,
    shape: Shape,
    machine: Machine,
    *,
    memory: int,
    densities: Sequence[float],
    tokens: int = 512,
    preference: Preference = PREFERENCE,
    activations: Path | None = None,
    perplexity: bool = False,
    show_progress: bool = False,
) -> list[Point]:
    """Compare dense streaming with DIP and cache-aware DIP at each density.

    Args:
        directory: The decoder whose activations are recorded.
        text: Text that it reads.
        shape: Shape of the model that is simulated, the same or another.
        machine: The machine that is simulated.
        memory: Bytes of memory for the weights.
        densities: Shares of the MLPs' weights that a token uses, each above 0, 1 at most.
        tokens: Number of tokens of the text.
        preference: Preference of cache-aware DIP.
        activations: The file that holds the activations, or will; None for a place in grating's cache.
        perplexity: Measure it as well, on the same tokens. It takes about as long as recording, for each point.
        show_progress: Show progress bars on standard error.

    Raises:
        GratingError: The model or the file of activations cannot be used.
        ValueError: An argument is bad, or the text too short.
    """
    if tokens < 2:
        raise ValueError(f"tokens={tokens} is too small: a token to predict the next one from makes 2")
    for density in densities:
        check_density(density)
    caching = Caching(shape.share(memory), preference)
    recorded = record_activations(directory, text, tokens, path=activations, show_progress=show_progress)
    found = {}
    for density in densities:
        shares = allocate(density, shape.columns.depth)
        for estimate in simulate(recorded, shape, machine, memory=memory, shares=shares, preference=preference):
            found[1.0 if estimate.way == DENSE else density, estimate.way] = estimate
    costs = {}
    if perplexity:
        model, tokenizer = load_decoder(directory)
        length = min(WINDOW, tokens)
        windows = cut_windows(tokenizer, text, length, tokens // length)
        for density, way in found:
            costs[density, way] = evaluate(
                model,
                windows,
                shares=None if way == DENSE else allocate(density, len(recorded.inputs)),
                # What plain DIP chooses does not depend on its cache.
                make=partial(CachedMlp, caching=caching) if way == CACHE_AWARE else MaskedMlp,
                show_progress=show_progress,
            ).perplexity
    return [Point(estimate, key[0], costs.get(key)) for key, estimate in found.items()]
