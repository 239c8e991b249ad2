"""How well a model in 8 bits agrees with the same model without them, alone and with recounts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from grating_core.lens.observations import Observations, Observe, observe_all
from grating_core.models.cross_encoder import Shape
from grating_core.pruning.recount import in_doubt
from grating_core.requests import Request

_ENOUGH = 0.99  # of the top 5
_TOPS = (1, 5, 10)
_DOUBTS = (0.5, 0.7, 0.8, 0.9, 0.95, 0.98)  # shares of the candidates whose scores are off by less
_AIM = 0.995  # of the top 5, half of what may be lost

Array = NDArray[np.float64]
Agreement = Mapping[int, float]
"""The share of the top K of the model without 8 bits that is found, by K."""

Model = Callable[[bool], AbstractContextManager[Observe]]
"""A function that opens the model: in 8 bits, or without them."""


@dataclass(frozen=True)
class Quantized:
    """This class holds what a model in 8 bits gave.

    Attributes:
        corpora: Observations of the requests of each corpus.
        agreement: What the model in 8 bits finds alone.
        doubt: The distance from the bar of the top K within which scores in 8 bits are in doubt.
        recounted: What it finds if those in doubt are scored again without 8 bits.
    """

    corpora: Sequence[Observations]
    agreement: Agreement
    doubt: float
    recounted: Agreement


def agrees(agreement: Agreement) -> bool:
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
    """Compute requests in 8 bits, and find the doubt with which recounts make up for them.

    The doubt is the smallest with which the agreement of the top 5 is 0.995, among some quantiles of how far
    scores are off within their request; the largest of them if none is enough.

    Args:
        model: Function that opens the model.
        corpora: The requests of each corpus.
        full: Observations of the same requests without 8 bits.
        shape: Shape of the model.
        show_progress: Whether to show progress bars on standard error.

    Raises:
        StorageError: There is no room in grating's cache.
    """
    with model(True) as observe:
        found = [observe_all(observe, some, shape, show_progress=show_progress) for some in corpora]
    return compare(found, full)


def compare(found: Sequence[Observations], full: Sequence[Observations]) -> Quantized:
    """Find the doubt of requests that were computed in 8 bits and without, see :func:`quantize`."""
    groups = [
        (some[None].astype(np.float64), whole[None].astype(np.float64))
        for corpus, same in zip(found, full, strict=True)
        for some, whole in zip(corpus.scores, same.scores, strict=True)
    ]
    off = np.concatenate([_off(*group)[0] for group in groups])
    doubt, recounted = 0.0, dict[int, float]()
    for doubt in np.quantile(off, _DOUBTS).tolist():
        recounted = _agreement(groups, doubt)
        if recounted.get(5, 0.0) >= _AIM:
            break
    return Quantized(found, _agreement(groups), doubt, recounted)


def _off(scores: Array, full: Array) -> Array:
    """Return how far scores are off within their request. An error that all of them share changes no ranking."""
    errors = scores - full
    off: Array = np.abs(errors - errors.mean(1, keepdims=True))
    return off


def _agreement(groups: Sequence[tuple[Array, Array]], doubt: float | None = None) -> dict[int, float]:
    """Return the mean agreement for each K below the candidates, with recounts if there is a doubt."""
    fewest = min(full.shape[1] for _, full in groups)
    return {
        top_k: float(np.mean(np.concatenate([_shares(*group, top_k, doubt) for group in groups])))
        for top_k in _TOPS
        if top_k < fewest
    }


def _shares(scores: Array, full: Array, top_k: int, doubt: float | None) -> Array:
    if doubt is not None:
        scores = np.where(in_doubt(scores, np.full(len(scores), top_k), doubt), full, scores)
    both = _top(scores, top_k) & _top(full, top_k)
    shares: Array = both.sum(1) / top_k
    return shares


def _top(scores: Array, top_k: int) -> NDArray[np.bool_]:
    """Mark the top K of each request, bool ``[R, N]``."""
    marks = np.zeros(scores.shape, dtype=bool)
    np.put_along_axis(marks, np.argsort(-scores, axis=1, kind="stable")[:, :top_k], True, 1)
    return marks
