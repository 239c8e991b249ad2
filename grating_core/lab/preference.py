"""The preference for columns in memory is fitted to a model, so that it reads little at a small error.

The fit takes a text through the dense model. In some layers it then chooses columns for each token, once for each
γ of a grid, and measures the bytes of the columns that are missing in the caches, and the error of the MLP's
output. γ of inputs and γ of products are tried one at a time: their bytes add up, and their errors nearly do.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from grating_core.arguments import check_share
from grating_core.columns.allocation import allocate
from grating_core.columns.cache import Caching, Preference
from grating_core.columns.companion import KINDS, ColumnSizes, Kind
from grating_core.columns.disk import Disk
from grating_core.columns.masks import Shares, kept
from grating_core.columns.preference import Fit, keep_fits
from grating_core.lab.activations import WINDOW
from grating_core.lab.decoders import decoder_layers, load_decoder
from grating_core.lab.quality import choose_all, cut_windows
from grating_core.lab.simulator import find_order
from grating_core.models.identity import fingerprint

GAMMAS = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2)
ERROR_ALLOWED = 1.2
"""How large the error of a fitted preference may be, divided by that of plain DIP."""
_LAYERS = 8  # layers that are measured, from the first to the last


@dataclass(frozen=True)
class Fitted:
    """This class holds a fitted preference, and says what it does.

    Attributes:
        preference: The preference.
        saved: Share of the bytes that plain DIP reads which it saves.
        error: Squared error of the MLPs' outputs, as a share of the outputs' squares, mean over layers.
        plain_error: The same error of plain DIP.
    """

    preference: Preference
    saved: float
    error: float
    plain_error: float


def fit_preferences(
    directory: Path,
    text: str,
    *,
    densities: Sequence[float],
    share: float,
    tokens: int = 512,
    show_progress: bool = False,
) -> dict[float, Fitted]:
    """Fit a preference to a model at each density, and keep them where loading the model finds them.

    Args:
        directory: Directory of the model.
        text: The text that the model reads.
        densities: Shares of the MLPs' weights that a token uses, each above 0 and at most 1.
        share: Share of the MLPs' weights that is in memory, from 0 to 1.
        tokens: Number of tokens of the text to use.
        show_progress: Whether to show a progress bar on standard error.

    Returns:
        What was fitted, by density.

    Raises:
        FileError: The file of earlier fits is damaged, or belongs to another model.
        StorageError: The fits cannot be written.
        ModelNotFoundError: The directory holds no model, or a damaged one.
        UnsupportedModelError: The model is not a language model with gated MLPs.
        ValueError: The share is 0, so that no column is ever in memory, or the text has too few tokens.
    """
    check_share("share", share, "the share of the MLPs that is in memory; a larger budget has room for more")
    model, tokenizer = load_decoder(directory)
    length = min(WINDOW, tokens)
    inputs = record_inputs(model, list(cut_windows(tokenizer, text, length, tokens // length)))
    bar = tqdm(densities, "Fitting preferences", unit="density", disable=not show_progress)
    found = {density: fit_preference(model, inputs, density, share) for density in bar}
    fits = [Fit(density, share, fitted.preference) for density, fitted in found.items()]
    keep_fits(fingerprint(directory), fits)
    return found


@dataclass(frozen=True)
class _Cost:
    """This class holds the bytes that are missing for one kind of column, and the error of the MLP's output."""

    missing: float
    error: float


@torch.inference_mode()
def record_inputs(model: Any, windows: Sequence[Tensor]) -> dict[int, Tensor]:
    """Record the inputs of MLPs of a dense model, in at most eight layers.

    Args:
        model: A causal language model of transformers with gated MLPs, in memory.
        windows: Token ids of texts, int64 ``[T]`` each.

    Returns:
        The inputs of all tokens, ``[tokens, D]``, by the index of the layer.

    Raises:
        UnsupportedModelError: The model has no gated MLPs.
    """
    layers = decoder_layers(model)
    indices = {round(place) for place in np.linspace(0, len(layers) - 1, min(_LAYERS, len(layers)))}
    found: dict[int, list[Tensor]] = {index: [] for index in sorted(indices)}

    def keeping(parts: list[Tensor]) -> Any:
        return lambda mlp, arguments: parts.append(arguments[0][0])

    hooks = [layers[index].mlp.register_forward_pre_hook(keeping(parts)) for index, parts in found.items()]
    try:
        for window in windows:
            model.model(input_ids=window[None], use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return {index: torch.cat(parts) for index, parts in found.items()}


@torch.inference_mode()
def fit_preference(model: Any, inputs: Mapping[int, Tensor], density: float, share: float) -> Fitted:
    """Choose the preference that reads least, among those whose error is at most 1.2 times that of plain DIP.

    Args:
        model: The model whose inputs were recorded.
        inputs: Inputs of MLPs, see :func:`record_inputs`.
        density: Share of the MLPs' weights that a token uses.
        share: Share of the MLPs' weights that is in memory.
    """
    layers = decoder_layers(model)
    shares = allocate(density, len(layers))
    found = [_costs(layers[index].mlp, states, shares[index], share) for index, states in inputs.items()]
    missing = {key: sum(costs[key].missing for costs in found) for key in found[0]}
    errors = {key: sum(costs[key].error for costs in found) / len(found) for key in found[0]}
    plain_missing = missing["inputs", 1.0] + missing["products", 1.0]
    plain_error = errors["inputs", 1.0] + errors["products", 1.0]
    best = Fitted(Preference(1.0, 1.0), 0.0, plain_error, plain_error)
    for pair in product(GAMMAS, repeat=len(KINDS)):
        keys = tuple(zip(KINDS, pair, strict=True))
        error = sum(errors[key] for key in keys)
        reads = sum(missing[key] for key in keys)
        if error <= ERROR_ALLOWED * plain_error and reads < (1 - best.saved) * plain_missing:
            best = Fitted(Preference(*pair), 1 - reads / plain_missing, error, plain_error)
    return best


def _costs(mlp: Any, states: Tensor, shares: Shares, share: float) -> dict[tuple[Kind, float], _Cost]:
    """Return the cost of each γ of each kind in a layer, with all columns of the other kind.

    Args:
        mlp: The dense MLP.
        states: Its inputs, ``[T, D]``.
        shares: Shares that a token uses.
        share: Share of the MLP's weights that is in memory.
    """
    dense = mlp(states)
    square = float(dense.square().sum())
    sizes = ColumnSizes(1, mlp.down_proj.out_features, mlp.down_proj.in_features, states.dtype)

    def gated(kept_states: Tensor) -> Tensor:
        both: Tensor = mlp.act_fn(mlp.gate_proj(kept_states)) * mlp.up_proj(kept_states)
        return both

    def pruned(kind: Kind, values: Tensor, gamma: float) -> tuple[Tensor, float]:
        """Choose columns for each token, and let what is read on the way be used as well.

        Return the values with those that are not used set to 0, and the bytes of the columns that are read.
        """
        columns, row_bytes = sizes.count(kind), sizes.row_bytes(kind)
        cost = Disk().gap(kind) / row_bytes
        cache = Caching(share, Preference(gamma, gamma)).cache(columns, kind, shares, cost)
        count, order = kept(columns, getattr(shares, kind)), find_order(values.numpy())
        used, hits = choose_all(cache, order, values.numpy(), count)
        return values * torch.from_numpy(used), float((used.sum() - hits) * row_bytes)

    def cost(kept_product: Tensor, missing: float) -> _Cost:
        return _Cost(missing, float((mlp.down_proj(kept_product) - dense).square().sum()) / square)

    products = gated(states)
    found: dict[tuple[Kind, float], _Cost] = {}
    for gamma in GAMMAS:
        kept_states, missing = pruned("inputs", states, gamma)
        found["inputs", gamma] = cost(gated(kept_states), missing)
        found["products", gamma] = cost(*pruned("products", products, gamma))
    return found
