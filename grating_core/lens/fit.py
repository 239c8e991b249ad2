"""Fit a lens to a model's own scores, and find the margins with which it can be trusted.

No judgements are needed: the model's final score is what the lens estimates. The requests are divided: the lens is
fitted on some, the margins come from the others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from grating_core.lens.features import LayerMap, Lens
from grating_core.lens.observations import Floats, Observations
from grating_core.lens.quantized import Quantized
from grating_core.lens.store import CalibratedLens, Int8, Recounts, Summary
from grating_core.pruning import Margins
from grating_core.pruning.conformal import Requests, calibrate_margins, replay_pruning

_STRENGTHS = (0.03, 0.1, 0.3, 1.0, 3.0)  # strengths of the ridge, for standardised features
_FITTED = 0.6  # share of the requests that the lens is fitted on
_VALIDATED = 5  # one in so many of these requests decides which strength is best


def fit(
    corpora: Sequence[Observations],
    *,
    pooling: str,
    fingerprint: str,
    top_k: int,
    target: float,
    quantized: Quantized | None = None,
    show_progress: bool = False,
) -> CalibratedLens:
    """Fit a lens and find its margins, on requests that it was not fitted on.

    With a single corpus, some requests are left for the margins. With several, a lens that was fitted on the
    others estimates each corpus, so the margins are for a corpus that the lens has not seen. The returned lens has
    seen all corpora.

    Args:
        corpora: Observations of the requests of each corpus.
        pooling: The token that the model's head reads.
        fingerprint: Identity of the model.
        top_k: K of the summary.
        target: Promise of the summary.
        quantized: What the model in 8 bits gave for the same requests; None if nothing is known of it. Its margins
            promise the top K of the model without 8 bits.
        show_progress: Whether to show progress bars on standard error.
    """
    depth = len(corpora[0].features)
    cut = round(_FITTED * len(corpora[0])) if len(corpora) == 1 else None
    left = slice(cut or 0, None)
    maps, spread = [], []
    seen = [corpora] if quantized is None else [corpora, quantized.corpora]
    estimates: list[list[list[Floats]]] = [[[] for _ in corpora] for _ in seen]
    for number in tqdm(range(depth), "Lens", unit="layer", disable=not show_progress):
        features = [corpus.layer(number)[:cut] for corpus in corpora]
        scores = [np.stack(corpus.scores[:cut]) for corpus in corpora]
        strength, error = choose_strength(features, scores)
        maps.append(fit_layer(features, scores, strength))
        spread.append(error)
        for index in range(len(corpora)):
            layer = maps[-1] if cut is not None else _fit_without(index, features, scores, strength)
            for some, found in zip(seen, estimates, strict=True):
                found[index].append(some[index].layer(number)[left] @ layer.weight.numpy())
    groups, *others = [
        [_requests(*one, left) for one in zip(some, corpora, found, strict=True)]
        for some, found in zip(seen, estimates, strict=True)
    ]
    calibrated = partial(calibrate_margins, spread=np.array(spread), show_progress=show_progress)
    margins = calibrated(groups)
    int8 = None
    if quantized is not None:
        recounted = [replace(some, doubt=quantized.doubt) for some in others[0]]
        recounts = Recounts(quantized.doubt, quantized.recounted, calibrated(recounted))
        int8 = Int8(quantized.agreement, calibrated(others[0]), recounts)
    fitted = sum(map(len, corpora)) if cut is None else cut
    summary = _summarise(groups, margins, fitted=fitted, top_k=top_k, target=target)
    return CalibratedLens(Lens(maps, pooling), margins, fingerprint, summary, int8)


def _requests(corpus: Observations, full: Observations, estimates: Sequence[Floats], left: slice) -> Requests:
    """Return the requests of a corpus that are left, of which the top K of the full model is promised."""
    return Requests(
        np.stack(estimates, axis=2).astype(np.float64),
        np.stack(corpus.scores[left]).astype(np.float64),
        np.stack(corpus.tokens[left]),
        None if corpus is full else np.stack(full.scores[left]).astype(np.float64),
    )


def _fit_without(index: int, features: Sequence[Floats], scores: Sequence[Floats], strength: float) -> LayerMap:
    """Fit the map of one layer to all corpora but one."""
    others = [number for number in range(len(features)) if number != index]
    return fit_layer([features[number] for number in others], [scores[number] for number in others], strength)


def _summarise(groups: Sequence[Requests], margins: Margins, *, fitted: int, top_k: int, target: float) -> Summary:
    candidates = max(requests.scores.shape[1] for requests in groups)
    policy = margins.policy(candidates, top_k, target=target, guarantee="share", exact=True)
    outcomes = [replay_pruning(requests, top_k, drop=np.array(policy.drop), select=None) for requests in groups]
    gammas = [
        [
            np.nan_to_num(gamma(estimates, scores))  # a request whose scores are all equal has no γ
            for requests in groups
            for estimates, scores in zip(requests.estimates[:, :, number], requests.scores, strict=True)
        ]
        for number in range(len(margins.drop))
    ]
    return Summary(
        fitted=fitted,
        measured=sum(map(len, groups)),
        candidates=candidates,
        top_k=top_k,
        target=target,
        agreement=float(1 - np.concatenate([outcome.lost for outcome in outcomes]).mean()),
        compute_share=float(np.concatenate([outcome.compute_share for outcome in outcomes]).mean()),
        gammas=tuple(float(np.mean(found)) for found in gammas),
    )


def choose_strength(features: Sequence[Floats], scores: Sequence[Floats]) -> tuple[float, float]:
    """Find the strength of the ridge with the smallest error on requests that are left out, and that error.

    Args:
        features: Features of each corpus, ``[R, N, F]``.
        scores: Final scores of each corpus, ``[R, N]``.
    """
    inputs, wanted, _ = _prepared(features, scores)
    left_out = np.concatenate([np.repeat(np.arange(len(one)) % _VALIDATED == 0, one.shape[1]) for one in scores])
    errors = {}
    for strength in _STRENGTHS:
        weight = _ridge(inputs[~left_out], wanted[~left_out], strength)
        errors[strength] = float(np.sqrt(np.mean((inputs[left_out] @ weight - wanted[left_out]) ** 2)))
    best = min(errors, key=errors.__getitem__)
    return best, errors[best]


def fit_layer(features: Sequence[Floats], scores: Sequence[Floats], strength: float) -> LayerMap:
    """Fit the map of one layer. ``strength`` is the one that :func:`choose_strength` found for the same data."""
    inputs, wanted, scale = _prepared(features, scores)
    weight = _ridge(inputs, wanted, strength) / scale
    mean = np.mean([one.mean((0, 1)) for one in features], axis=0)
    bias = np.mean([one.mean() for one in scores]) - mean @ weight
    return LayerMap(torch.from_numpy(weight.astype(np.float32)), torch.tensor(float(bias)))


def _prepared(features: Sequence[Floats], scores: Sequence[Floats]) -> tuple[Floats, Floats, Floats]:
    """Return features ``[n, F]``, centred by request and standardised; scores ``[n]``, centred; the scale."""
    inputs = np.concatenate([_centred(one).reshape(-1, one.shape[-1]) for one in features])
    wanted = np.concatenate([_centred(one).reshape(-1) for one in scores])
    scale = inputs.std(0) + np.float32(1e-6)
    inputs /= scale
    return inputs, wanted, scale


def _ridge(inputs: Floats, wanted: Floats, strength: float) -> Floats:
    from sklearn.linear_model import Ridge  # slow to import

    fitted = Ridge(alpha=strength * len(inputs), fit_intercept=False, solver="cholesky").fit(inputs, wanted)
    return np.asarray(fitted.coef_, dtype=np.float32)


def _centred(values: Floats) -> Floats:
    """Subtract the mean of each request: only what differs within a request decides its ranking."""
    return np.asarray(values - values.mean(1, keepdims=True))


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
