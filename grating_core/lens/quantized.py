"""How well a model in 8 bits agrees with the same model without them, and which products have to be kept so."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import numpy as np

from grating_core.lens.observations import Floats, Observations, Observe, observe_all
from grating_core.models.cross_encoder import Shape
from grating_core.models.packing import KINDS
from grating_core.requests import Request

_ENOUGH = 0.99  # of the top 5
_TOPS = (1, 5, 10)
_SEARCHED = 100  # requests of each corpus, at most, by which kinds of products are chosen

Model = Callable[[Sequence[str] | None], AbstractContextManager[Observe]]
"""A function that opens the model: in 8 bits but for some kinds of products, or without 8 bits for None."""


@dataclass(frozen=True)
class Quantized:
    """This class holds what a model in 8 bits gave.

    Attributes:
        kept: The kinds of products that are kept out of 8 bits.
        agreement: Share of the top K of the model without 8 bits that it has in its own top K, by K.
        corpora: Observations of the requests of each corpus.
    """

    kept: tuple[str, ...]
    agreement: Mapping[int, float]
    corpora: Sequence[Observations]


def agrees(agreement: Mapping[int, float]) -> bool:
    """Tell whether a model in 8 bits agrees well enough with the same model without them."""
    return agreement.get(5, 0.0) >= _ENOUGH


def quantize(
    model: Model,
    corpora: Sequence[Sequence[Request]],
    full: Sequence[Observations],
    shape: Shape,
    *,
    show_progress: bool = False,
) -> Quantized:
    """Compute requests in 8 bits, and keep products out of them until the model agrees with itself.

    One kind of products after the other is kept, each time the one that helps most, until the agreement of the top
    5 is at least 0.99, or no kind is left.

    Args:
        model: Function that opens the model.
        corpora: The requests of each corpus.
        full: Observations of the same requests without 8 bits.
        shape: Shape of the model.
        show_progress: Whether to show progress bars on standard error.

    Raises:
        StorageError: There is no room in grating's cache.
    """

    def measured(kept: Sequence[str], most: int | None = None) -> Quantized:
        with model(kept) as observe:
            found = [observe_all(observe, some[:most], shape, show_progress=show_progress) for some in corpora]
        return Quantized(tuple(kept), _agreement(found, full), found)

    found = measured(())
    while not agrees(found.agreement) and len(found.kept) < len(KINDS):
        tried = [measured((*found.kept, kind), _SEARCHED) for kind in KINDS if kind not in found.kept]
        found = measured(max(tried, key=lambda one: one.agreement[5]).kept)
    return found


def _agreement(corpora: Sequence[Observations], full: Sequence[Observations]) -> dict[int, float]:
    """Return the mean share of the full model's top K that is in the other's, for each K below the candidates."""
    pairs = [
        pair
        for some, whole in zip(corpora, full, strict=True)
        for pair in zip(some.scores, whole.scores, strict=False)  # perhaps only the first were computed
    ]
    fewest = min(len(scores) for scores, _ in pairs)
    return {
        top_k: float(np.mean([len(_top(one, top_k) & _top(other, top_k)) / top_k for one, other in pairs]))
        for top_k in _TOPS
        if top_k < fewest
    }


def _top(scores: Floats, top_k: int) -> set[int]:
    return set(np.argsort(-scores, kind="stable")[:top_k].tolist())
