"""How a request is pruned: by the user's own policy, or by the margins of the model's lens."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from grating_core.arguments import Guarantee, is_number
from grating_core.lens.features import Provisional
from grating_core.lens.store import CalibratedLens
from grating_core.pruning import ClusterPolicy, MarginPolicy, Off, PruningPolicy


@dataclass(frozen=True)
class ByLens:
    """Pruning by the lens of the model. Nothing is pruned as long as the model has none.

    Attributes:
        target: What is kept, see :meth:`grating_core.Reranker.from_pretrained`.
        guarantee: What the target counts, see there.
        calibrated: The lens, on the model's device; None if there is none yet.
    """

    target: float
    guarantee: Guarantee
    calibrated: CalibratedLens | None


@dataclass(frozen=True)
class Pruning:
    """This class says how one request is pruned.

    Attributes:
        policy: Decides after each layer which candidates go on.
        lens: Estimates the final scores after each layer but the last, and before the first. None reads them with
            the model's own head, which says nothing before the first layer.
        exact: Whether every winner is computed to the last layer, so that the policy only drops. Otherwise what
            the policy selects stops as well, and keeps its provisional score as an estimate.
    """

    policy: PruningPolicy
    lens: Provisional | None = None
    exact: bool = True


def plan_pruning(
    by: PruningPolicy | ByLens, candidates: int, top_k: int, *, exact: bool, factor: float = 1.0
) -> Pruning:
    """Decide how a request is pruned.

    Args:
        by: The user's policy, or the lens of the model.
        candidates: N of the request.
        top_k: K of the request.
        exact: Whether every winner is computed to the last layer.
        factor: What recalibration multiplies margins and thresholds by.
    """
    if not isinstance(by, ByLens):
        return Pruning(scaled(by, factor), exact=exact)
    if by.calibrated is None or top_k >= candidates:
        return Pruning(Off(), exact=exact)
    policy = by.calibrated.margins.policy(candidates, top_k, target=by.target, guarantee=by.guarantee, exact=exact)
    if min(policy.drop) == math.inf:  # too few requests were calibrated on for this promise
        return Pruning(Off(), exact=exact)
    return Pruning(scaled(policy, factor), by.calibrated.lens, exact)


def scaled(policy: PruningPolicy, factor: float) -> PruningPolicy:
    """Return the policy with its margins, or its threshold, multiplied; above 1 it prunes less."""
    if isinstance(policy, ClusterPolicy):
        return replace(policy, dispersion_threshold=factor * policy.dispersion_threshold)
    if isinstance(policy, MarginPolicy):
        return MarginPolicy(*(tuple(factor * margin for margin in side) for side in (policy.drop, policy.select)))
    return policy


def check_share(recalibrate: float, pruning: object) -> None:
    """Refuse a share that is no share, and a policy in which recalibration has nothing to move.

    Args:
        recalibrate: The share of requests to compute again.
        pruning: What the reranker prunes by: a name, or a policy object.

    Raises:
        ValueError: The share or the policy is not usable.
    """
    if not is_number(recalibrate) or not 0 <= recalibrate <= 1:
        raise ValueError(f"recalibrate={recalibrate!r} must be a share of requests: a number from 0 (off) to 1")
    if not recalibrate or (isinstance(pruning, str) and pruning in ("auto", "cluster")):
        return
    if not isinstance(pruning, ClusterPolicy):
        raise ValueError(
            f"recalibrate={recalibrate} moves the margins of a lens or the threshold of a ClusterPolicy, and "
            f"pruning={pruning!r} has neither: use 'auto', 'cluster' or a ClusterPolicy, or leave recalibrate out"
        )
    if pruning.dispersion_threshold in (0, math.inf):
        raise ValueError(
            f"recalibrate={recalibrate} multiplies the threshold of {pruning!r}, which stays the same then: give "
            f"it a finite one above 0, or leave recalibrate out"
        )
