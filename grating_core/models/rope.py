"""Types of layers differ in window and rotary positions, which configurations spell in several ways."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from grating_core.layers import rotary
from grating_core.layers.spec import LayerSpec, Rotary
from grating_core.models.family import Fields

FULL, SLIDING = "full_attention", "sliding_attention"
"""The types of layers that grating implements, as configurations name them."""

NEEDS: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "ntk": ("factor",),
    "longrope": ("short_factor", "long_factor"),
}
"""The kinds of rotary positions that grating implements, with the parameters that each must have."""

# The fields with the bases of the frequencies, if each type of layer has its own: ModernBERT's, and Gemma 3's.
_THETAS = (
    {FULL: "global_rope_theta", SLIDING: "local_rope_theta"},
    {FULL: "rope_theta", SLIDING: "rope_local_base_freq"},
)
_LARGEST_HEAD = 2**16  # entries; more are no head, but would take much memory
_FIRST_WINDOW = "original_max_position_embeddings"


def stack(layer: LayerSpec, fields: Fields, types: Sequence[str], window: int | None) -> tuple[LayerSpec, ...]:
    """Return the specs of a model's layers, each with the rotary positions and the window of its type.

    Args:
        layer: What all layers have in common.
        fields: The fields of the configuration.
        types: The type of each layer.
        window: The window of sliding layers in tokens; None if there are no such layers.

    Raises:
        ValueError: The window is none, or no head has the layer's size.
    """
    if SLIDING in types and (window is None or window < 1):
        raise ValueError(f"sliding_window={window}, which must be a whole number, 1 or more")
    windows = {FULL: None, SLIDING: window}
    kinds = {
        kind: replace(layer, rotary=make_rotary(rope, layer.head_size), window=windows[kind])
        for kind, rope in read_ropes(fields).items()
        if kind in types
    }
    return tuple(kinds[kind] for kind in types)


def read_ropes(fields: Fields) -> dict[str, dict[str, Any]]:
    """Return the parameters of rotary positions, by type of layer: ``rope_type``, ``rope_theta`` and others.

    Older configurations have ``rope_theta`` and ``rope_scaling``, newer ones have ``rope_parameters``.
    """
    parameters, scaling = fields["rope_parameters"] or {}, fields["rope_scaling"] or {}
    thetas = _thetas(fields)
    found = {}
    for kind in (FULL, SLIDING):
        if thetas:
            own = parameters.get(kind) or {"rope_type": "default"}
            # Gemma 3 scales only the positions of layers with full attention.
            scaled = kind == FULL or "rope_theta" not in thetas.values()
            rope = {"rope_theta": fields[thetas[kind]], **own, **(scaling if scaled else {})}
        else:
            rope = {"rope_theta": fields["rope_theta"], **(scaling or parameters)}
        rope.setdefault("rope_type", rope.get("type", "default"))
        rope["max_position_embeddings"] = fields["max_position_embeddings"]
        rope.setdefault(_FIRST_WINDOW, fields["max_position_embeddings"])
        if fields.get(_FIRST_WINDOW) is not None:  # this one wins where it is given
            rope[_FIRST_WINDOW] = fields[_FIRST_WINDOW]
        if rope["rope_type"] == "yarn" and rope.get("factor", 1) is None:
            rope["factor"] = fields["max_position_embeddings"] / rope[_FIRST_WINDOW]
        found[kind] = rope
    return found


def by_type(fields: Fields) -> bool:
    """Tell whether each type of layer has rotary positions of its own."""
    return bool(_thetas(fields))


def _thetas(fields: Fields) -> dict[str, str]:
    return next((thetas for thetas in _THETAS if thetas[SLIDING] in fields), {})


def longest(fields: Fields) -> int:
    """Return the most tokens that a model can take.

    LongRoPE has other frequencies for sequences beyond the first window, so that tokens which sequences share
    would have other states in a long one. grating stays within that window.
    """
    most: list[int] = [fields["max_position_embeddings"]]
    for rope in read_ropes(fields).values():
        most += [rope[_FIRST_WINDOW]] if rope["rope_type"] == "longrope" else []
    return min(most)


def make_rotary(rope: Mapping[str, Any], size: int) -> Rotary:
    """Return the rotary positions of heads of some size.

    Raises:
        ValueError: No head has that size, or there are not as many factors as a head has pairs.
    """
    if size % 2 or not 0 < size <= _LARGEST_HEAD:
        raise ValueError(
            f"head_dim={size}, but rotary positions need an even number of entries, at most {_LARGEST_HEAD}"
        )
    kind, theta = rope["rope_type"], rope["rope_theta"]
    if kind == "default":
        return rotary.plain(size, theta)
    if kind == "longrope":
        return _longrope(rope, size)
    factor, window = rope["factor"], rope[_FIRST_WINDOW]
    if kind == "linear":
        return rotary.linear(size, theta, factor=factor)
    if kind == "ntk":
        return rotary.ntk(size, theta, factor=factor)
    if kind == "dynamic":
        return rotary.dynamic(size, theta, factor=factor, window=rope["max_position_embeddings"])
    if kind == "llama3":
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        return rotary.llama3(size, theta, factor=factor, low=low, high=high, window=window)
    scale, own, all_dimensions = (rope.get(name) for name in ("attention_factor", "mscale", "mscale_all_dim"))
    if scale is None:
        scale = rotary.yarn_scale(factor)
        if own and all_dimensions:
            scale = rotary.yarn_scale(factor, own) / rotary.yarn_scale(factor, all_dimensions)
    return rotary.yarn(
        size,
        theta,
        factor=factor,
        window=window,
        fast=rope.get("beta_fast") or 32,
        slow=rope.get("beta_slow") or 1,
        whole=rope.get("truncate", True),
        scale=scale,
    )


def _longrope(rope: Mapping[str, Any], size: int) -> Rotary:
    factors, factor, window = rope["short_factor"], rope.get("factor"), rope[_FIRST_WINDOW]
    for name in ("short_factor", "long_factor"):
        given = rope[name]
        if not isinstance(given, list) or len(given) != size // 2 or not all(map(_is_factor, given)):
            raise ValueError(f"{name} must be a list of {size // 2} numbers above 0, one for each pair of a head")
    if factor is None:
        factor = rope["max_position_embeddings"] / window
    scale = rope.get("attention_factor")
    if scale is None:
        scale = rotary.longrope_scale(factor, window)
    return rotary.longrope(size, rope["rope_theta"], factors=factors, scale=scale)


def _is_factor(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf
