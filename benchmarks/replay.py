"""What a policy would have done with requests whose every score is known, and how good that is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from benchmarks.collections import Request
from grating_core import PruningPolicy, Route

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Outcome:
    """The top K of one request, best first, and tokens × layers computed, of those without pruning."""

    ranking: list[int]
    compute_share: float


@dataclass(frozen=True)
class SimilarityExit:
    """SEE: Similarity-based Early Exit before the first layer.

    Busolin, Lucchese, Nardini, Orlando, Perego, Trani & Veneri, "Efficient Re-ranking with Cross-encoders via
    Early Exit", SIGIR 2025, as in the authors' main experiments (similarity ``amax``, exit level 0, static
    proximity): a candidate's similarity is the sum over query tokens of the largest cosine with a document token's
    embedding; similarities are scaled to 0…1 within the request; those more than a threshold behind the k-th are
    dropped. They published k = 10 for nDCG@10 and thresholds from 0.2 to 0.9. Here k is the K that is wanted.

    Attributes:
        threshold: How far behind the k-th similarity is still computed.
    """

    threshold: float

    def route(self, layer: int, scores: Array, top_k: int) -> Sequence[Route]:
        """Drop by the similarities, which are the scores of layer 0; nothing later."""
        if layer:
            return [Route.DEFERRED] * len(scores)
        scaled = (scores - scores.min()) / (np.ptp(scores) + 1e-8)
        least = np.sort(scaled)[-top_k] - self.threshold
        return [Route.DEFERRED if one >= least else Route.DROPPED for one in scaled]


def replay(
    scores: Array,
    tokens: NDArray[np.int64],
    policy: PruningPolicy,
    top_k: int,
    *,
    prefix: int = 0,
    exact: bool,
    first: int,
) -> Outcome:
    """Prune one request as :func:`grating_core.engine.forward.forward` does.

    Args:
        scores: float64 ``[N, L + 1]``: what the policy sees after layers 0 to L, the last being the final scores.
        tokens: int64 ``[N]``: tokens of each candidate.
        policy: Decides.
        top_k: K, at most N.
        prefix: Tokens that all share, which are computed once.
        exact: Whether what is selected is computed to the end all the same.
        first: The layer after which the policy is asked for the first time: 0 or 1.
    """
    depth = scores.shape[1] - 1
    alive, winners, computed = np.arange(len(scores)), list[int](), 0
    for layer in range(first, depth + 1):
        computed += prefix + int(tokens[alive].sum()) if layer else 0
        seen, wanted = scores[alive, layer], top_k - len(winners)
        pruning = layer < depth and wanted < len(alive)
        routes = policy.route(layer, seen, wanted) if pruning else [Route.DEFERRED] * len(alive)
        stopped = np.array([route is Route.SELECTED and not exact for route in routes])
        going_on = np.array([route is not Route.DROPPED for route in routes]) & ~stopped
        winners += _best(alive[stopped], seen[stopped])
        places = top_k - len(winners)
        decided = pruning and not exact and places in (0, going_on.sum())
        if decided or layer == depth:
            winners += _best(alive[going_on], seen[going_on])[:places]
            break
        alive = alive[going_on]
    return Outcome(winners, computed / (depth * (prefix + int(tokens.sum()))))


def _best(candidates: NDArray[np.intp], scores: Array) -> list[int]:
    return [int(i) for i in candidates[np.argsort(-scores, kind="stable")]]


def agreement(ranking: list[int], reference: list[int]) -> float:
    """Return the share of the full model's top K that is returned."""
    return len(set(ranking) & set(reference)) / len(reference)


def precision(ranking: list[int], request: Request) -> float:
    """Count the relevant among the top K, of as many as could be: Precision@K as in the GRATING paper."""
    found = sum(request.is_relevant(candidate) for candidate in ranking)
    return found / max(1, min(len(ranking), request.all_relevant))


def ndcg(rankings: Sequence[list[int]], requests: Sequence[Request]) -> float:
    """Return the mean nDCG@10 of what is returned; its ideal knows all judgements, also of what was not found.

    The gain is the grade. Requests that nobody judged do not count.
    """
    import ir_measures  # a peer's package, which the tests do not have
    from ir_measures import nDCG

    grades = {str(number): request.grades for number, request in enumerate(requests) if request.grades}
    run = {
        str(number): {request.ids[candidate]: -float(place) for place, candidate in enumerate(ranking)}
        for number, (ranking, request) in enumerate(zip(rankings, requests, strict=True))
    }
    return float(ir_measures.calc_aggregate([nDCG @ 10], grades, run)[nDCG @ 10]) if grades else float("nan")
