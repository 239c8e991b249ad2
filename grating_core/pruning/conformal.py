"""This module finds margins: it replays the pruning of all calibration requests with every factor."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from grating_core.pruning.margins import GUARANTEES, MODES, Array, Margins
from grating_core.pruning.recount import in_doubt

_FACTORS = np.geomspace(0.25, 8, 56)
_CANDIDATES = (5, 10, 20, 50, 100, 200, 500, 1000)
_WANTED = (1, 2, 3, 5, 10, 20, 50, 100)


@dataclass(frozen=True)
class Requests:
    """This class holds what is known of R requests that were computed without pruning, with N candidates each.

    Attributes:
        estimates: Estimates of the lens after layers 0 to L - 1, float64 ``[R, N, L]``.
        scores: Final scores, float64 ``[R, N]``.
        tokens: Number of tokens of each candidate, int64 ``[R, N]``.
        promised: The final scores whose top K is promised, float64 ``[R, N]``; None for ``scores``.
        doubt: The distance from the bar within which a recount gives a candidate its promised score; None without
            a recount.
    """

    estimates: Array
    scores: Array
    tokens: NDArray[np.int64]
    promised: Array | None = None
    doubt: float | None = None

    def __len__(self) -> int:
        return len(self.scores)

    def first(self, candidates: int) -> Requests:
        """Return the same requests with only their first candidates."""
        return replace(
            self,
            estimates=self.estimates[:, :candidates],
            scores=self.scores[:, :candidates],
            tokens=self.tokens[:, :candidates],
            promised=None if self.promised is None else self.promised[:, :candidates],
        )


@dataclass(frozen=True)
class Replay:
    """A replay says what pruning would have done to R requests.

    Attributes:
        lost: Share of the full model's top K that pruning does not return, float64 ``[R]``.
        compute_share: Tokens × layers computed, as a share of those without pruning, float64 ``[R]``.
    """

    lost: Array
    compute_share: Array


def replay_pruning(requests: Requests, top_k: int, *, drop: Array, select: Array | None) -> Replay:
    """Prune requests whose every score is known, as the forward loop does.

    Args:
        requests: R requests with N candidates.
        top_k: K, below N.
        drop: Margins for dropping after each layer, float64 ``[L]``.
        select: Margins for selecting; None for exact scores, with which no sure winner stops.
    """
    count, candidates, layers = requests.estimates.shape
    alive = np.ones((count, candidates), dtype=bool)
    selected = np.zeros_like(alive)
    computed = np.zeros(count)
    for layer in range(layers):
        estimates = np.where(alive, requests.estimates[:, :, layer], -np.inf)
        places = top_k - selected.sum(1)
        ordered = -np.sort(-estimates, axis=1)
        last = np.take_along_axis(ordered, np.maximum(places - 1, 0)[:, None], 1)
        behind = alive & (estimates < last - drop[layer])
        undecided = (alive.sum(1) > places) & (places > 0)
        if select is not None:
            following = np.take_along_axis(ordered, np.minimum(places, candidates - 1)[:, None], 1)
            ahead = alive & (estimates > following + select[layer]) & undecided[:, None]
            selected |= ahead
            alive &= ~ahead
        alive &= ~(behind & undecided[:, None])
        if select is not None:
            # Where as many are left as there are places, they have won, and nothing is left to compute.
            places = top_k - selected.sum(1)
            decided = (places == 0) | (places == alive.sum(1))
            selected |= alive & (decided & (places > 0))[:, None]
            alive &= ~decided[:, None]
        computed += (alive * requests.tokens).sum(1)
    places, scores = top_k - selected.sum(1), np.where(alive, requests.scores, -np.inf)
    promised = requests.scores if requests.promised is None else requests.promised
    if requests.doubt is not None:
        again = in_doubt(scores, places, requests.doubt)
        scores = np.where(again, promised, scores)
        computed += (again * requests.tokens).sum(1) * layers
    best = _best(scores, alive, places)
    top = _best(promised, np.ones_like(alive), np.full(count, top_k))
    lost = (top & ~(selected | best)).sum(1) / top_k
    return Replay(lost, computed / (layers * requests.tokens.sum(1)))


def _best(scores: Array, allowed: NDArray[np.bool_], places: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Mark the best in each row, as many as it has places; equal scores keep their order."""
    ranks = np.argsort(np.argsort(-scores, axis=1, kind="stable"), axis=1, kind="stable")
    marks: NDArray[np.bool_] = (ranks < places[:, None]) & allowed
    return marks


def calibrate_margins(groups: Sequence[Requests], spread: Array, *, show_progress: bool = False) -> Margins:
    """Find out how much is lost with which margins.

    Args:
        groups: Requests that the lens was not fitted on, in groups with the same number of candidates.
        spread: Typical error of the lens after each layer, the unit of margins, float64 ``[L]``. It must not come
            from these requests.
        show_progress: Whether to show a progress bar on standard error.
    """
    most = max(requests.scores.shape[1] for requests in groups)
    sizes = sorted({number for number in _CANDIDATES if number < most} | {most})
    cells = [(number, wanted) for number in sizes for wanted in _WANTED if wanted < number]
    bounds = np.zeros((len(MODES), len(GUARANTEES), len(cells), len(_FACTORS)))
    for index, (number, wanted) in enumerate(tqdm(cells, "Margins", unit="cell", disable=not show_progress)):
        some = [requests.first(number) for requests in groups if requests.scores.shape[1] >= number]
        for mode, scores in enumerate(MODES):
            bounds[mode, :, index] = _bounds(some, wanted, spread, estimated=scores == "estimated")
    return Margins(spread, spread, _FACTORS, np.array(cells), bounds)


def _bounds(groups: Sequence[Requests], top_k: int, spread: Array, *, estimated: bool) -> Array:
    """Return bounds on the expected loss, of shares and of whole sets, with every factor: float64 ``[2, G]``."""
    losses = []
    for factor in _FACTORS:
        margins = factor * spread
        select = margins if estimated else None
        lost = np.concatenate([replay_pruning(some, top_k, drop=margins, select=select).lost for some in groups])
        losses.append((lost.mean(), (lost > 0).mean()))
    # Larger factors lose less, but for rare exceptions; the theorem asks for none.
    rising = np.maximum.accumulate(np.array(losses)[::-1])[::-1].T
    count = sum(map(len, groups))
    bounds: Array = (count * rising + 1) / (count + 1)
    return bounds
