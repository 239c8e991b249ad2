"""Fit a lens to a model's own scores, and find the margins with which it can be trusted.

No judgements are needed: the model's final score is what the lens estimates. Each request is estimated by a lens
that has not seen its corpus, or its part of a single corpus. The margins come from these estimates.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import reduce
from operator import add
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from grating_core.lens.features import LayerMap, Lens
from grating_core.lens.observations import Floats, Observations
from grating_core.lens.quantized import Quantized
from grating_core.lens.ridge import Moments, moments
from grating_core.lens.store import CalibratedLens, Int8, Recounts, Summary
from grating_core.pruning import Margins
from grating_core.pruning.conformal import Requests, calibrate_margins, replay_pruning

_STRENGTHS = (0.1, 0.3, 1.0, 3.0)  # strengths of the ridge, for standardised features
_PARTS = 5  # of a single corpus


@dataclass(frozen=True)
class Crossed:
    """This class holds a lens, and what lenses that have not seen a corpus say of its requests.

    Attributes:
        lens: The lens, which has seen all corpora.
        spread: Typical error of the other lenses after each layer, float64 ``[L]``.
        corpora: The estimated requests of each corpus, in batches of as many candidates.
        in_8_bits: The same of the model in 8 bits; None if nothing is known of it.
    """

    lens: Lens
    spread: NDArray[np.float64]
    corpora: list[list[Requests]]
    in_8_bits: list[list[Requests]] | None


def fit(
    corpora: Sequence[Observations],
    *,
    pooling: str,
    fingerprint: str,
    costs: Sequence[float],
    top_k: int,
    target: float,
    quantized: Quantized | None = None,
    show_progress: bool = False,
) -> CalibratedLens:
    """Fit a lens and find its margins.

    Args:
        corpora: Observations of the requests of each corpus.
        pooling: The token that the model's head reads.
        fingerprint: Identity of the model.
        costs: What a look costs after each layer from 0, as a share of a layer.
        top_k: K of the summary.
        target: Promise of the summary.
        quantized: What the model in 8 bits gave for the same requests; None if nothing is known of it. Its margins
            promise the top K of the model without 8 bits.
        show_progress: Whether to show progress bars on standard error.
    """
    crossed = cross_fit(
        corpora, None if quantized is None else quantized.corpora, pooling=pooling, show_progress=show_progress
    )

    def calibrated(groups: list[list[Requests]]) -> Margins:
        return calibrate_margins(groups, crossed.spread, costs, show_progress=show_progress)

    margins = calibrated(crossed.corpora)
    int8 = None
    if quantized is not None and crossed.in_8_bits is not None:
        recounted = [[replace(some, doubt=quantized.doubt) for some in corpus] for corpus in crossed.in_8_bits]
        recounts = Recounts(quantized.doubt, quantized.recounted, calibrated(recounted))
        int8 = Int8(quantized.agreement, calibrated(crossed.in_8_bits), recounts)
    summary = _summarise(crossed.corpora, margins, top_k=top_k, target=target)
    return CalibratedLens(crossed.lens, margins, fingerprint, summary, int8)


def cross_fit(
    corpora: Sequence[Observations],
    in_8_bits: Sequence[Observations] | None,
    *,
    pooling: str,
    show_progress: bool = False,
) -> Crossed:
    """Fit a lens to all corpora, and for each corpus one to the others, which estimates its requests.

    A single corpus is divided into parts, which take the place of corpora.

    Args:
        corpora: See :func:`fit`.
        in_8_bits: Observations of the same requests by the model in 8 bits.
        pooling: See :func:`fit`.
        show_progress: See :func:`fit`.
    """
    depth = len(corpora[0].features)
    folds = _folds(corpora)
    seen = [corpora] if in_8_bits is None else [corpora, in_8_bits]
    estimates: list[list[list[list[Floats]]]] = [[[] for _ in corpora] for _ in seen]  # by corpus and layer
    maps, spread = [], []
    for number in tqdm(range(depth), "Lens", unit="layer", disable=not show_progress):
        layer = _fit_layer(corpora, folds, number)
        maps.append(layer.map)
        spread.append(layer.error)
        for some, found in zip(seen, estimates, strict=True):
            for index, (corpus, own) in enumerate(zip(some, folds, strict=True)):
                found[index].append(_estimates(corpus, number, own, layer.weights))
    groups, *others = [
        [batches(corpus, full, found) for corpus, full, found in zip(some, corpora, estimated, strict=True)]
        for some, estimated in zip(seen, estimates, strict=True)
    ]
    return Crossed(Lens(maps, pooling), np.array(spread), groups, others[0] if others else None)


@dataclass(frozen=True)
class _Layer:
    """A layer's map of all folds, the weights without each fold, and the error of these on it."""

    map: LayerMap
    weights: list[Floats]
    error: float


def _folds(corpora: Sequence[Observations]) -> list[NDArray[np.int64]]:
    """Return the number of the fold of each request, for each corpus."""
    if len(corpora) == 1:
        return [np.arange(len(corpora[0])) % _PARTS]
    return [np.full(len(corpus), index) for index, corpus in enumerate(corpora)]


def _fit_layer(corpora: Sequence[Observations], folds: Sequence[NDArray[np.int64]], number: int) -> _Layer:
    parts = [
        _moments(corpus, number, own, fold)
        for corpus, own in zip(corpora, folds, strict=True)
        for fold in np.unique(own).tolist()
    ]
    total = reduce(add, parts)
    without = {strength: [(total - part).solve(strength) for part in parts] for strength in _STRENGTHS}
    errors = {
        strength: float(np.mean([part.error(weight) for part, weight in zip(parts, weights, strict=True)]))
        for strength, weights in without.items()
    }
    best = min(errors, key=errors.__getitem__)
    weight = total.solve(best)
    biases = [
        np.mean(np.concatenate(corpus.scores)) - np.mean(np.concatenate(corpus.estimates(number, weight)))
        for corpus in corpora
    ]
    layer = LayerMap(torch.from_numpy(weight), torch.tensor(float(np.mean(biases))))
    return _Layer(layer, without[best], float(np.sqrt(errors[best])))


def _moments(corpus: Observations, number: int, own: NDArray[np.int64], fold: int) -> Moments:
    """Sum up the requests of a corpus that belong to a fold."""
    features = corpus.layer(number)
    ends = np.cumsum([len(found) for found in corpus.scores])
    chosen = np.flatnonzero(own == fold)
    rows = np.concatenate([np.arange(ends[i] - len(corpus.scores[i]), ends[i]) for i in chosen])
    return moments(features if len(rows) == len(features) else features[rows], [corpus.scores[i] for i in chosen])


def _estimates(
    corpus: Observations, number: int, own: NDArray[np.int64], weights: Sequence[Floats]
) -> list[Floats]:
    """Estimate each request by the weights without its fold."""
    found = {fold: corpus.estimates(number, weights[fold]) for fold in np.unique(own).tolist()}
    return [found[fold][index] for index, fold in enumerate(own.tolist())]


def batches(corpus: Observations, full: Observations, estimates: Sequence[list[Floats]]) -> list[Requests]:
    """Return the requests of a corpus, of which the top K of the full model is promised."""
    sizes = np.array([len(found) for found in corpus.scores])
    return [
        Requests(
            np.stack([np.stack([layer[i] for i in alike]) for layer in estimates], axis=2).astype(np.float64),
            np.stack([corpus.scores[i] for i in alike]).astype(np.float64),
            np.stack([corpus.tokens[i] for i in alike]),
            None if corpus is full else np.stack([full.scores[i] for i in alike]).astype(np.float64),
        )
        for size in np.unique(sizes)
        for alike in [np.flatnonzero(sizes == size)]
    ]


def _summarise(corpora: Sequence[Sequence[Requests]], margins: Margins, *, top_k: int, target: float) -> Summary:
    """Summarise what happens to requests of the most frequent size."""
    batches = [requests for corpus in corpora for requests in corpus]
    sizes = [requests.scores.shape[1] for requests in batches for _ in range(len(requests))]
    candidates = max(set(sizes), key=sizes.count)
    alike = [requests for requests in batches if requests.scores.shape[1] == candidates]
    policy = margins.policy(candidates, top_k, target=target, guarantee="share", exact=True)
    outcomes = [replay_pruning(requests, top_k, drop=np.array(policy.drop), select=None) for requests in alike]
    gammas = [
        [
            np.nan_to_num(gamma(estimates, scores))  # a request whose scores are all equal has no γ
            for requests in alike
            for estimates, scores in zip(requests.estimates[:, :, number], requests.scores, strict=True)
        ]
        for number in range(len(margins.drop))
    ]
    return Summary(
        requests=len(sizes),
        corpora=len(corpora),
        candidates=candidates,
        top_k=top_k,
        target=target,
        agreement=float(1 - np.concatenate([outcome.lost for outcome in outcomes]).mean()),
        compute_share=float(np.concatenate([outcome.compute_share for outcome in outcomes]).mean()),
        gammas=tuple(float(np.mean(found)) for found in gammas),
    )


def gamma(estimates: NDArray[Any], scores: NDArray[Any], pairs: NDArray[np.bool_] | None = None) -> float:
    """Compute Goodman and Kruskal's γ between two readings of the same candidates.

    Args:
        estimates: One reading, ``[N]``.
        scores: The other reading, ``[N]``.
        pairs: The pairs that count, bool ``[N, N]``, symmetric; None for all.

    Returns:
        (concordant − discordant) / (concordant + discordant) pairs; NaN without such pairs.
    """
    order = np.sign(estimates[:, None] - estimates) * np.sign(scores[:, None] - scores)
    if pairs is not None:
        order = order[pairs]
    counted = np.abs(order).sum()
    return float(order.sum() / counted) if counted else float("nan")
