"""This module finds margins: it replays the pruning of all calibration requests with every factor."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from grating_core.pruning.looks import choose_looks
from grating_core.pruning.margins import GUARANTEES, MODES, Array, Margins
from grating_core.pruning.recount import in_doubt

# Most promises are kept with a factor between 1 and 5.
_FACTORS = np.concatenate(
    [np.geomspace(0.25, 1, 6, endpoint=False), np.geomspace(1, 5, 36), np.geomspace(5.5, 16, 6)]
)
_CANDIDATES = (5, 10, 20, 50, 100, 200, 500, 1000)
_GROWN = 4  # times as many candidates as in the largest requests
_WANTED = (1, 2, 5, 10, 20, 50, 100)
_ENOUGH = 50  # requests of a size, which a promise takes


@dataclass(frozen=True)
class Requests:
    """This class holds what is known of R requests that were computed without pruning, with N candidates each.

    Attributes:
        estimates: Estimates of the lens after layers 0 to L - 1, float64 ``[R, N, L]``. The candidates come in the
            order of the first stage, the likeliest first.
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

    @property
    def candidates(self) -> int:
        """The number N of candidates of a request."""
        return int(self.scores.shape[1])

    def first(self, candidates: int) -> Requests:
        """Return the same requests with only their first candidates."""
        return self._with(lambda values: values[:, :candidates])

    def grown(self, candidates: int) -> Requests:
        """Return requests with more candidates, which are drawn from the last halves of all R requests.

        A candidate that is drawn lies as far from the mean of its new request's last half as it lay from that of
        its own.
        """
        half = self.candidates // 2
        turns = range(1, 1 + -(-(candidates - self.candidates) // (self.candidates - half)))

        def more(values: NDArray[Any]) -> NDArray[Any]:
            last = values[:, half:]
            mean = last.mean(1, keepdims=True).astype(values.dtype)
            drawn = [mean + np.roll(last - mean, turn, axis=0) for turn in turns]
            return np.concatenate([values, *drawn], axis=1)[:, :candidates]

        return replace(self._with(more), tokens=np.maximum(more(self.tokens), 1))

    def _with(self, change: Callable[[NDArray[Any]], NDArray[Any]]) -> Requests:
        return replace(
            self,
            estimates=change(self.estimates),
            scores=change(self.scores),
            tokens=change(self.tokens),
            promised=None if self.promised is None else change(self.promised),
        )


@dataclass(frozen=True)
class Replay:
    """A replay says what pruning would have done to R requests.

    Attributes:
        lost: Share of the full model's top K that pruning does not return, float64 ``[R]``.
        compute_share: Tokens × layers computed, as a share of those without pruning, float64 ``[R]``.
        alive: Share of the tokens that go on after the look of each layer from 0, float64 ``[R, L]``.
    """

    lost: Array
    compute_share: Array
    alive: Array


def replay_pruning(requests: Requests, top_k: int, *, drop: Array, select: Array | None) -> Replay:
    """Prune requests whose every score is known, as the forward loop does.

    Args:
        requests: R requests with N candidates.
        top_k: K, below N.
        drop: Margins for dropping after each layer, float64 ``[L]``. Infinity where nobody looks.
        select: Margins for selecting; None for exact scores, with which no sure winner stops.
    """
    count, candidates, layers = requests.estimates.shape
    alive = np.ones((count, candidates), dtype=bool)
    selected = np.zeros_like(alive)
    computed = np.zeros((count, layers))
    for layer in range(layers):
        if np.isfinite(drop[layer]):
            estimates = np.where(alive, requests.estimates[:, :, layer], -np.inf)
            if select is None:
                last = -np.partition(-estimates, top_k - 1, axis=1)[:, top_k - 1, None]
                alive &= estimates >= last - drop[layer]
            else:
                _select(estimates, alive, selected, top_k, drop[layer], select[layer])
        computed[:, layer] = (alive * requests.tokens).sum(1)
    places, scores = top_k - selected.sum(1), np.where(alive, requests.scores, -np.inf)
    promised = requests.scores if requests.promised is None else requests.promised
    work = computed.sum(1)
    if requests.doubt is not None:
        again = in_doubt(scores, places, requests.doubt)
        scores = np.where(again, promised, scores)
        work = work + (again * requests.tokens).sum(1) * layers
    best = _best(scores, alive, places)
    top = _best(promised, np.ones_like(alive), np.full(count, top_k))
    lost = (top & ~(selected | best)).sum(1) / top_k
    tokens = requests.tokens.sum(1)
    return Replay(lost, work / (layers * tokens), computed / tokens[:, None])


def _select(
    estimates: Array, alive: NDArray[np.bool_], selected: NDArray[np.bool_], top_k: int, drop: float, select: float
) -> None:
    """Move sure winners from those alive to the selected, and take hopeless candidates from those alive."""
    places = top_k - selected.sum(1)
    ordered = -np.sort(-estimates, axis=1)
    last = np.take_along_axis(ordered, np.maximum(places - 1, 0)[:, None], 1)
    following = np.take_along_axis(ordered, np.minimum(places, estimates.shape[1] - 1)[:, None], 1)
    undecided = ((alive.sum(1) > places) & (places > 0))[:, None]
    ahead = alive & (estimates > following + select) & undecided
    selected |= ahead
    alive &= ~(ahead | ((estimates < last - drop) & undecided))
    # Where as many are left as there are places, they have won, and nothing is left to compute.
    places = top_k - selected.sum(1)
    decided = (places == 0) | (places == alive.sum(1))
    selected |= alive & (decided & (places > 0))[:, None]
    alive &= ~decided[:, None]


def _best(scores: Array, allowed: NDArray[np.bool_], places: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Mark the best in each row, as many as it has places; equal scores keep their order."""
    ranks = np.argsort(np.argsort(-scores, axis=1, kind="stable"), axis=1, kind="stable")
    marks: NDArray[np.bool_] = (ranks < places[:, None]) & allowed
    return marks


def calibrate_margins(
    corpora: Sequence[Sequence[Requests]],
    spread: Array,
    costs: Sequence[float],
    *,
    cells: Sequence[tuple[int, int]] | None = None,
    show_progress: bool = False,
) -> Margins:
    """Find out how much is lost with which margins.

    Requests with four times as many candidates as the largest, of which there are enough, are made of these: the
    others are drawn from their last halves. A first stage would add candidates that are less likely than these.

    Args:
        corpora: Requests of each corpus that the lens was not fitted on, in batches of as many candidates.
        spread: Typical error of the lens after each layer, the unit of margins, float64 ``[L]``.
        costs: What a look costs after each layer from 0, as a share of a layer.
        cells: Numbers of candidates N and of K that are replayed; None for all that requests may have.
        show_progress: Whether to show a progress bar on standard error.
    """
    largest = _largest(corpora)
    if cells is None:
        sizes = [*(number for number in _CANDIDATES if number < largest), largest, _GROWN * largest]
        cells = [(number, wanted) for number in sizes for wanted in _WANTED if wanted < number]
    bounds = np.zeros((len(MODES), len(GUARANTEES), len(cells), len(_FACTORS)))
    looks = np.zeros((len(cells), len(spread)), dtype=bool)
    for index, (number, wanted) in enumerate(tqdm(cells, "Margins", unit="cell", disable=not show_progress)):
        sized = [
            [batch.first(largest) for batch in corpus if batch.candidates >= min(number, largest)]
            for corpus in corpora
        ]
        sized = [
            [batch.first(number) if number <= largest else batch.grown(number) for batch in corpus]
            for corpus in sized
        ]
        some = [corpus for corpus in sized if corpus]
        looks[index] = choose_looks(_alive(some, wanted, spread), costs)
        for mode, scores in enumerate(MODES):
            unit = np.where(looks[index], spread, np.inf)
            bounds[mode, :, index] = _bounds(some, wanted, unit, estimated=scores == "estimated")
    return Margins(spread, spread, _FACTORS, np.array(cells), bounds, looks)


def _largest(corpora: Sequence[Sequence[Requests]]) -> int:
    """Return the largest number of candidates of which there are enough requests."""
    sizes = np.array([batch.candidates for corpus in corpora for batch in corpus for _ in range(len(batch))])
    return int(np.sort(sizes)[-min(_ENOUGH, len(sizes))])


def _alive(corpora: Sequence[Sequence[Requests]], top_k: int, spread: Array) -> Array:
    """Return the share of the tokens that go on after each layer with usual margins, float64 ``[L]``."""
    replays = [
        replay_pruning(batch, top_k, drop=2 * spread, select=None) for corpus in corpora for batch in corpus
    ]
    alive: Array = np.concatenate([replay.alive for replay in replays]).mean(0)
    return alive


def _bounds(corpora: Sequence[Sequence[Requests]], top_k: int, unit: Array, *, estimated: bool) -> Array:
    """Return bounds on the expected loss, of shares and of whole sets, with every factor: float64 ``[2, G]``."""
    losses = np.zeros((len(GUARANTEES), len(_FACTORS), len(corpora)))
    for number, factor in enumerate(_FACTORS):
        margins = factor * unit
        select = margins if estimated else None
        for index, corpus in enumerate(corpora):
            replays = [replay_pruning(batch, top_k, drop=margins, select=select) for batch in corpus]
            lost = np.concatenate([replay.lost for replay in replays])
            losses[:, number, index] = lost.mean(), (lost > 0).mean()
    bounds = bound_loss(losses, sum(len(batch) for corpus in corpora for batch in corpus))
    # Larger factors lose less, but for rare exceptions; the theorem asks for none.
    rising: Array = np.maximum.accumulate(bounds[:, ::-1], axis=1)[:, ::-1]
    return rising


def bound_loss(losses: Array, requests: int) -> Array:
    """Bound the expected loss on a corpus like these, in which every corpus counts the same.

    Conformal risk control bounds it for one corpus. With several, the mean may be off by chance as well, because
    corpora differ: it is raised by its standard error.

    Args:
        losses: Mean loss of the requests of each of C corpora, float64 ``[..., C]``.
        requests: Number of requests of all corpora.
    """
    mean, corpora = losses.mean(-1), losses.shape[-1]
    bound: Array = (requests * mean + 1) / (requests + 1)
    if corpora > 1:
        bound = np.maximum(bound, mean + losses.std(-1, ddof=1) / np.sqrt(corpora))
    bounded: Array = np.minimum(bound, 1.0)
    return bounded
