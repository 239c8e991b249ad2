"""In a contest the candidates of one request compete for the top K."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from grating_core.engine.highlights import Highlighter
from grating_core.engine.watch import Deadline
from grating_core.errors import ScoreError
from grating_core.forking import Interrupted
from grating_core.lens.pruning import Pruning
from grating_core.memory.meter import Meter
from grating_core.pruning import MarginPolicy, Off, PruningPolicy, Route
from grating_core.pruning.deadline import Costs, Race, first_that_fit
from grating_core.pruning.recount import in_doubt
from grating_core.results import LayerTrace

Scores = NDArray[np.float64]


@dataclass(frozen=True)
class Winner:
    """A winner is a candidate of the top K: its index in the request, its score, and whether that is estimated."""

    index: int
    score: float
    estimated: bool


class Contest:
    """A contest follows one request through the layers.

    Args:
        windows: Number of sequences of each of the N candidates.
        pruning: How candidates stop early.
        top_k: Number of candidates to find, from 1 to N.
        depth: Number of layers of the model.
        numbers: The number by which the caller knows each candidate, for messages; None counts them from 0.
        looks: Whether scores are read after every layer, and not only after the last.
        abandoned: Function that says whether nobody waits for the result any more.
        deadline: The time at which the contest ends with the best ranking so far; None for none.
        lengths: Number of tokens of each candidate; with a deadline only.
        highlighter: What finds the sentences that carry the scores; None for nothing.
    """

    def __init__(
        self,
        windows: tuple[int, ...],
        pruning: Pruning,
        top_k: int,
        depth: int,
        *,
        numbers: Sequence[int] | None = None,
        looks: bool = True,
        abandoned: Callable[[], bool] = lambda: False,
        deadline: Deadline | None = None,
        lengths: Sequence[int] = (),
        highlighter: Highlighter | None = None,
    ) -> None:
        self.pruning = pruning
        self.deadline = deadline
        self.winners: list[Winner] = []
        """The top K so far, best first. Candidates that stopped early rank before those that went on, whatever
        their scores: scores of different layers do not compare."""
        self.layers: list[LayerTrace] = []
        """The record of each layer."""
        self.alive = list(range(len(windows)))
        """The candidates that go on, ascending; empty when the contest is over."""
        self.error: Exception | None = None
        """Why the contest ended without a result; None if it did not."""
        self.recounted: tuple[int, ...] = ()
        """The candidates that were scored again when all others were decided."""
        self.cut_short = False
        """Whether the deadline decided something: who went on, or the end."""
        self.usage = Meter()
        """What the pass has used so far."""
        self.abandoned = abandoned
        self.highlighter = highlighter
        self.depth = depth
        self._windows = windows
        self._top_k = top_k
        self._numbers = range(len(windows)) if numbers is None else numbers
        self._looks = looks
        self._lengths = lengths
        self._beside = 0  # tokens of other requests in the pass
        self._near = False  # whether the deadline may come before the last layer
        self._estimates: dict[int, float] = {}  # of those alive, read last
        self._read = 0  # the layer after which they were read
        self._left: list[int] = []  # who was left out in the caller's order, for want of time and of estimates

    def look_at_the_clock(self, number: int, tokens: int) -> None:
        """Prepare for a layer: see whether time is short, or over before the layer's end.

        Before the first layer this also says who is computed where there is no lens.

        Args:
            number: The layer that follows.
            tokens: Number of tokens that the whole pass has in it.
        """
        if self.deadline is None or not self.alive:
            return
        own = sum(self._lengths[candidate] for candidate in self.alive)
        self._beside = tokens - own
        self._near = self.deadline.is_near(max(number, 1), tokens)
        costs = self.deadline.watch.costs(number) if number else None
        if costs is None:
            if self.deadline.over:
                self.end()
            return
        if self._near:
            self._hurry(number, costs)
        going_on = sum(self._lengths[candidate] for candidate in self.alive)
        if self.alive and self.deadline.left <= costs.seconds(self._beside + going_on)[0]:
            self.end()

    @property
    def is_near(self) -> bool:
        """Whether the deadline may come before the last layer."""
        return self._near

    def has_time_to_recount(self, candidates: Sequence[int]) -> bool:
        """Tell whether some candidates may be computed once more, without 8 bits and so more slowly."""
        if self.deadline is None:
            return True
        return not self.deadline.is_near(1, sum(self._lengths[candidate] for candidate in candidates))

    def is_late(self) -> bool:
        """Tell whether the deadline is over, and nothing more may be computed."""
        return bool(self.alive) and self.deadline is not None and self.deadline.over

    def end(self) -> None:
        """End the contest with what is known: the last estimates, else the caller's order."""
        self.cut_short = True
        places = self._top_k - len(self.winners)
        if self.pruning.errors is None or not self._estimates:
            self._left = sorted(self.alive + self._left)
        else:
            scores = np.array([self._estimates[candidate] for candidate in self.alive])
            self.winners += _best(self.alive, scores, range(len(scores)), estimated=True)[:places]
        self._fill()

    def follows(self, number: int) -> bool:
        """Tell whether a layer gets a record."""
        return bool(self.alive) and (self._looks or number == self.depth)

    def reads(self, number: int) -> bool:
        """Tell whether the scores after a layer are read."""
        if not self.follows(number):
            return False
        return number == self.depth or self.pruning.looks(number) or (self._near and self.pruning.pays(number))

    def decides(self, number: int) -> bool:
        """Tell whether the scores after a layer are needed at once. Otherwise they can be read later."""
        if number == self.depth or self._near or self.abandoned():
            return True
        return self._top_k - len(self.winners) < len(self.alive) and not isinstance(self.pruning.policy, Off)

    def after(self, number: int, scores: Scores, tokens: int, seconds: float, usage: Meter) -> None:
        """Decide who goes on after a layer. What goes wrong ends this contest with an :attr:`error`.

        Args:
            number: The layer; 0 stands for the token embeddings.
            scores: Scores of the sequences of all that are alive; none after a layer that is not looked at.
            tokens: Number of the request's tokens that were computed.
            seconds: Seconds that the layer took, of the whole pass.
            usage: What the pass used since the layer before.
        """
        self.usage += usage
        try:
            if self.abandoned():
                raise Interrupted
            self._decide(number, scores, tokens, seconds, usage)
        except Exception as error:  # a policy is the user's code; its failure is not the other requests'
            self.error, self.alive = error, []

    def in_doubt(self, doubt: float) -> list[int]:
        """Return the candidates whose place a recount decides, when the contest is over.

        Args:
            doubt: How far scores may be off, see :func:`grating_core.pruning.recount.in_doubt`.
        """
        if self.error is not None or self.cut_short or self.layers[-1].layer < self.depth:
            return []
        last = self.layers[-1]
        places = sum(not winner.estimated for winner in self.winners)
        marked = in_doubt(np.array([last.scores]), np.array([places]), doubt)[0]
        return [candidate for candidate, is_marked in zip(last.alive, marked, strict=True) if is_marked]

    def settle(self, candidates: Sequence[int], recounted: Contest) -> None:
        """Take over the scores of some candidates, or the error, from the contest in which they were recounted."""
        self.error = recounted.error
        if self.error is not None:
            return
        last = self.layers[-1]
        found = dict(zip(last.alive, last.scores, strict=True))
        found |= zip(candidates, recounted.layers[-1].scores, strict=True)
        scores = np.array([found[candidate] for candidate in last.alive])
        self.layers[-1] = replace(last, scores=_plain(scores))
        early = [winner for winner in self.winners if winner.estimated]
        others = _best(last.alive, scores, range(len(scores)), estimated=False)
        self.winners = (early + others)[: self._top_k]
        self.recounted = tuple(candidates)

    def _decide(self, number: int, scores: Scores, tokens: int, seconds: float, usage: Meter) -> None:
        alive, last, unseen = self.alive, number == self.depth, not len(scores)
        best = scores if unseen else _best_windows(scores, [self._windows[candidate] for candidate in alive])
        self._refuse_broken(best)
        wanted = self._top_k - len(self.winners)
        undecided = not (last or unseen) and wanted < len(alive)
        routes = _routes(self.pruning.policy, number, best, wanted) if undecided else [Route.DEFERRED] * len(alive)
        self.layers.append(
            LayerTrace(
                layer=number,
                alive=tuple(alive),
                routes=tuple(routes),
                scores=_plain(best),
                tokens=tokens,
                seconds=seconds,
                seconds_waited=usage.seconds_waited,
                bytes_read=usage.bytes_read,
            )
        )
        stop = () if self.pruning.exact else (Route.SELECTED,)
        stopped = [i for i, route in enumerate(routes) if route in stop]
        going_on = [i for i, route in enumerate(routes) if route not in (Route.DROPPED, *stop)]
        self.winners += _best(alive, best, stopped, estimated=True)
        places = self._top_k - len(self.winners)
        decided = undecided and not self.pruning.exact and places in (0, len(going_on))
        if decided or last:
            self.winners += _best(alive, best, going_on, estimated=decided)[:places]
            self._fill()
            return
        self.alive = [alive[i] for i in going_on]
        if not unseen:
            self._estimates = {alive[i]: float(best[i]) for i in going_on}
            self._read = number

    def _hurry(self, number: int, costs: Costs) -> None:
        """Let fewer candidates go on if not all that the policy wants can be computed in time.

        Args:
            number: The layer that follows.
            costs: The costs of the layers from it on.
        """
        assert self.deadline is not None
        errors, time = self.pruning.errors, (costs, self._beside, self.deadline.planned)
        lengths = np.array([self._lengths[candidate] for candidate in self.alive])
        if errors is None:
            if number == 1:
                self.leave_out(self.alive[first_that_fit(lengths, *time) :])
            return
        wanted = self._top_k - len(self.winners)
        if not (0 < wanted < len(self.alive) and self._estimates):
            return
        policy = self.pruning.policy
        margins = policy.drop if isinstance(policy, MarginPolicy) else (np.inf,) * self.depth
        looks = np.array([self.reads(layer) for layer in range(number, self.depth + 1)])
        read = np.maximum.accumulate(np.where(looks, range(number, self.depth + 1), self._read))
        race = Race(
            np.array([self._estimates[candidate] for candidate in self.alive]),
            wanted,
            lengths,
            np.array(errors)[np.array([self._read, *read[:-1]])],
            looks,
            np.array(margins[number - 1 :]),
        )
        if race.fits(*time):
            return
        found = dict(zip(self.alive, race.routes(*time), strict=True))
        self._note(found)
        selected = [i for i, route in enumerate(found.values()) if route is Route.SELECTED]
        self.winners += _best(self.alive, race.scores, selected, estimated=True)
        self.alive = [candidate for candidate, route in found.items() if route is Route.DEFERRED]
        if not self.alive:
            self._fill()

    def leave_out(self, candidates: Sequence[int]) -> None:
        """Let some of those alive go no further, for want of time and of estimates. They rank last."""
        if candidates:
            self._note(dict.fromkeys(candidates, Route.DROPPED))
            self._left = sorted([*candidates, *self._left])
            self.alive = sorted({*self.alive} - {*candidates})

    def _note(self, routes: Mapping[int, Route]) -> None:
        """Note what want of time has decided."""
        self.cut_short = True
        if self.layers:
            last = self.layers[-1]
            before = zip(last.alive, last.routes, strict=True)
            self.layers[-1] = replace(last, routes=tuple(routes.get(one, route) for one, route in before))

    def _fill(self) -> None:
        """Give the places that are left to those who were left out, and end the contest.

        They have the lowest score of all before them, or 0 if there is none.
        """
        lowest = min((winner.score for winner in self.winners), default=0.0)
        places = self._top_k - len(self.winners)
        self.winners += [Winner(candidate, lowest, True) for candidate in self._left[:places]]
        self.alive = []

    def _refuse_broken(self, scores: Scores) -> None:
        finite = np.isfinite(scores)
        if not finite.all():
            broken = np.flatnonzero(~finite)
            raise ScoreError(
                f"the model's score for document {self._numbers[self.alive[broken[0]]]} is not a finite "
                f"number ({len(broken)} such documents); the weights are damaged, or overflow in this dtype: try "
                f"dtype='float32'"
            )


def _best(alive: Sequence[int], scores: Scores, chosen: Sequence[int], *, estimated: bool) -> list[Winner]:
    """Return the chosen of those alive by falling score; equal scores keep their order."""
    order = sorted(chosen, key=lambda i: -scores[i])
    return [Winner(alive[i], float(scores[i]), estimated) for i in order]


def _best_windows(scores: Scores, windows: list[int]) -> Scores:
    """Return the score of each candidate's best window; NaN if a window of it has one that is not finite."""
    if len(windows) == len(scores):
        return scores
    starts = np.cumsum((0, *windows[:-1]))
    best: Scores = np.maximum.reduceat(scores, starts)
    finite = np.logical_and.reduceat(np.isfinite(scores), starts)
    return np.where(finite, best, np.nan)


def _routes(policy: PruningPolicy, number: int, scores: Scores, wanted: int) -> list[Route]:
    """Return the policy's routes, after a check that they leave ``wanted`` candidates."""
    try:
        routes = [Route(route) for route in policy.route(number, scores, wanted)]
    except ValueError as error:
        raise ValueError(f"{policy!r} after layer {number} gave something that is no route: {error}") from error
    selected, dropped = routes.count(Route.SELECTED), routes.count(Route.DROPPED)
    if len(routes) != len(scores) or selected > wanted or len(routes) - dropped < wanted:
        raise ValueError(
            f"{policy!r} after layer {number} gave {len(routes)} routes for {len(scores)} candidates, {selected} "
            f"selected and {dropped} dropped, where {wanted} are wanted"
        )
    return routes


def _plain(array: NDArray[Any]) -> tuple[Any, ...]:
    return tuple(array.tolist())
