"""A request is pruned by the user's own policy, or by the margins of the model's lens."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from grating_core.arguments import Guarantee
from grating_core.lens.features import Provisional, compares_tokens
from grating_core.lens.store import CalibratedLens, warn_once
from grating_core.pruning import ClusterPolicy, MarginPolicy, Off, PruningPolicy
from grating_core.requests import Request


@dataclass(frozen=True)
class ByLens:
    """This class prunes by the lens of the model. Without a lens it prunes nothing.

    Attributes:
        target: The share to keep, see :class:`grating_core.settings.RerankSettings`.
        guarantee: What the target counts, see :class:`grating_core.settings.RerankSettings`.
        calibrated: The lens, on the model's device; None if there is none yet.
        model: Name of the model, for messages.
        wanted: What the model lacks if there is no lens, for messages.
    """

    target: float
    guarantee: Guarantee
    calibrated: CalibratedLens | None
    model: str = "this model"
    wanted: str = "lens"


@dataclass(frozen=True)
class Pruning:
    """This class says how one request is pruned.

    Attributes:
        policy: The policy that decides after each layer which candidates go on.
        lens: The lens that estimates final scores after each layer but the last, and before the first. None reads
            scores with the model's own head, but not before the first layer.
        exact: Whether every winner is computed to the last layer, so that the policy only drops. Otherwise what
            the policy selects stops as well, and keeps its provisional score as an estimate.
        errors: Typical errors of the lens's estimates, from layer 0 to the last but one; None without a lens.
    """

    policy: PruningPolicy
    lens: Provisional | None = None
    exact: bool = True
    errors: tuple[float, ...] | None = None

    def looks(self, number: int) -> bool:
        """Tell whether the scores after a layer are read, which is not the last."""
        return not isinstance(self.policy, MarginPolicy) or self.policy.looks(number)

    def pays(self, number: int) -> bool:
        """Tell whether one more look after a layer is worth its time before a deadline.

        To compare tokens costs a good part of a layer. Once, at first, it has to be done.
        """
        return number == 0 or self.errors is None or not compares_tokens(number, len(self.errors))


def pruning_of(request: Request, by: PruningPolicy | ByLens, factor: float) -> Pruning:
    """Decide how a request is pruned: by its own policy or target, or as the reranker prunes.

    Args:
        request: The request.
        by: The reranker's policy, or the lens of the model.
        factor: Recalibration's factor of the reranker's margins and thresholds.
    """
    if request.pruning is not None:
        by, factor = request.pruning, 1.0
    elif request.target is not None and isinstance(by, ByLens):
        by = replace(by, target=request.target)
    exact = request.scores == "exact"
    pruning = plan_pruning(by, len(request.documents), request.top_k, exact=exact, factor=factor)
    if request.deadline is None or not isinstance(by, ByLens) or by.calibrated is None:
        return pruning
    # Before a deadline the lens helps even where nobody is to be dropped.
    return replace(pruning, lens=by.calibrated.lens, errors=tuple(by.calibrated.margins.drop.tolist()))


def plan_pruning(
    by: PruningPolicy | ByLens, candidates: int, top_k: int, *, exact: bool, factor: float = 1.0
) -> Pruning:
    """Decide how a request is pruned. A line in the log says once that the model has no lens.

    Args:
        by: The user's policy, or the lens of the model.
        candidates: Number N of candidates of the request.
        top_k: K of the request.
        exact: Whether every winner is computed to the last layer.
        factor: Recalibration's factor of margins and thresholds; 1 changes nothing.
    """
    if not isinstance(by, ByLens):
        return Pruning(scaled(by, factor), exact=exact)
    if top_k >= candidates:
        return Pruning(Off(), exact=exact)
    if by.calibrated is None:
        warn_once(
            f"pruning='auto' drops nothing with {by.model}, which has no {by.wanted}: fit one to your texts with "
            f"'grating calibrate' or Reranker.calibrate, or take pruning='off'"
        )
        return Pruning(Off(), exact=exact)
    policy = by.calibrated.margins.policy(candidates, top_k, target=by.target, guarantee=by.guarantee, exact=exact)
    if min(policy.drop) == math.inf:  # calibration had too few requests for this promise
        return Pruning(Off(), exact=exact)
    return Pruning(scaled(policy, factor), by.calibrated.lens, exact)


def scaled(policy: PruningPolicy, factor: float) -> PruningPolicy:
    """Return the policy with its margins or its threshold multiplied. A factor above 1 prunes less."""
    if isinstance(policy, ClusterPolicy):
        return replace(policy, dispersion_threshold=factor * policy.dispersion_threshold)
    if isinstance(policy, MarginPolicy):
        return MarginPolicy(*(tuple(factor * margin for margin in side) for side in (policy.drop, policy.select)))
    return policy
