"""A state holds what recalibration has learnt; this module has the rule by which it learns.

A *factor* multiplies the margins of a lens, or the threshold of :class:`~grating_core.ClusterPolicy`. After every
request that was computed again, its logarithm moves by ``STEP`` × (lost - (1 - target)): adaptive conformal
inference (Gibbs & Candès, "Adaptive Conformal Inference Under Distribution Shift", NeurIPS 2021). As long as the
factor stays between its bounds, the mean loss of T requests is within log(upper / lower bound) / (STEP · T) of
1 - target, whatever the requests are.
"""

from __future__ import annotations

import json
import logging
import math
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path

from grating_core.arguments import Guarantee
from grating_core.errors import StorageError
from grating_core.files.places import cache_directory, go_on_without_cache, is_kept
from grating_core.files.reading import read_json
from grating_core.files.writing import make_private, replace_file
from grating_core.pruning import ClusterPolicy, Margins

# At a target of 0.98, losing the whole top 1 widens margins by 22 %, and losing one of 10 by 2 %. A request
# without loss narrows them by 0.4 %.
STEP = 0.2
BOUNDS = (1 / 8, 16.0)  # the smallest and the largest factor
RECENT = 50  # requests that the agreement is the mean of
_FORMAT = 1

_log = logging.getLogger("grating")


@dataclass(frozen=True)
class Sampling:
    """This class says which goal recalibration keeps, and how many requests it computes again.

    Attributes:
        share: Share of requests that are computed again, above 0 and at most 1.
        target: The goal, see :class:`grating_core.settings.RerankSettings`.
        guarantee: What the target counts, see :class:`grating_core.settings.RerankSettings`.
    """

    share: float
    target: float
    guarantee: Guarantee

    @classmethod
    def of(cls, share: float, target: float, guarantee: Guarantee, pruning: object) -> Sampling | None:
        """Return the sampling of some settings; None if recalibration is off.

        Args:
            share: See :class:`Sampling`; 0 for off.
            target: See :class:`Sampling`.
            guarantee: See :class:`Sampling`.
            pruning: How requests are pruned: a name, or a policy object.

        Raises:
            ValueError: The policy has nothing that recalibration could move.
        """
        if not share:
            return None
        if not isinstance(pruning, ClusterPolicy) and pruning not in ("auto", "cluster"):
            raise ValueError(
                f"recalibrate={share} moves margins of a lens or the threshold of a ClusterPolicy, and pruning="
                f"{pruning!r} has neither: use 'auto', 'cluster' or a ClusterPolicy, or leave recalibrate out"
            )
        if isinstance(pruning, ClusterPolicy) and pruning.dispersion_threshold in (0, math.inf):
            raise ValueError(
                f"recalibrate={share} multiplies the threshold of {pruning!r}, which stays the same then: give "
                f"it a finite one above 0, or leave recalibrate out"
            )
        return cls(float(share), float(target), guarantee)


@dataclass(frozen=True)
class State:
    """This class holds what has been learnt so far.

    Attributes:
        factor: Factor of the margins, or of the threshold.
        requests: Number of requests that were computed again.
        recent: Shares that were kept in the last requests, the latest last.
    """

    factor: float = 1.0
    requests: int = 0
    recent: tuple[float, ...] = ()

    @property
    def agreement(self) -> float | None:
        """The mean share that was kept in the last requests; None before the first."""
        return sum(self.recent) / len(self.recent) if self.recent else None

    def after(self, kept: float, target: float) -> State:
        """Return the state after one more request, which returned the share ``kept`` of its top K."""
        logarithm = math.log(self.factor) + STEP * ((1 - kept) - (1 - target))
        factor = min(max(math.exp(logarithm), BOUNDS[0]), BOUNDS[1])
        return State(factor, self.requests + 1, (*self.recent, kept)[-RECENT:])

    def save(self, path: Path) -> None:
        """Write the state, which only its owner may read; raise ``StorageError`` if that fails."""
        make_private(path.parent)
        replace_file(path, (json.dumps({"format": _FORMAT, **asdict(self)}) + "\n").encode(), private=True)

    @classmethod
    def load(cls, path: Path) -> State:
        """Read a saved state; return a new one, with a warning, if the file cannot be read."""
        if not is_kept(path):
            return cls()
        try:
            stored = read_json(path)
            state = cls(float(stored["factor"]), int(stored["requests"]), tuple(map(float, stored["recent"])))
            in_bounds = BOUNDS[0] <= state.factor <= BOUNDS[1] and all(0 <= kept <= 1 for kept in state.recent)
            if stored["format"] != _FORMAT or not in_bounds or not len(state.recent) <= state.requests:
                raise ValueError("its values are not those of a state")
        except FileNotFoundError:
            return cls()
        except (OSError, ValueError, KeyError, TypeError, OverflowError) as error:
            _log.warning("recalibration starts anew, because %s cannot be read: %r", path, error)
            return cls()
        return state


def state_path(identity: str, pruning: ClusterPolicy | Margins, sampling: Sampling) -> Path | None:
    """Return the file of the state for one model, one pruning and one goal; None if there is no cache.

    Args:
        identity: Identity of the model.
        pruning: The policy or margins that the factor multiplies. Others have factors of their own.
        sampling: The goal.
    """
    if isinstance(pruning, ClusterPolicy):
        kind = f"cluster-{pruning.dispersion_threshold}-{pruning.clusters}"
    else:
        margins = (
            pruning.drop.tobytes() + pruning.select.tobytes() + pruning.bounds.tobytes() + pruning.looks.tobytes()
        )
        kind = f"lens-{sha256(margins).hexdigest()[:8]}"
    name = f"{identity[:16]}-{kind}-{sampling.guarantee}-{sampling.target}.json"
    try:
        return cache_directory() / "recalibration" / name
    except StorageError as error:
        go_on_without_cache(error)
        return None
