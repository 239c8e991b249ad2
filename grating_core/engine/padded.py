"""A padded scorer lets transformers compute whole models, in batches of pairs of about the same length.

Nothing is pruned or streamed. This is for architectures that grating's own layers do not know.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from time import perf_counter
from typing import NamedTuple

import numpy as np
import torch

from grating_core.engine.contest import Contest
from grating_core.engine.job import UNPRUNED, Job
from grating_core.engine.one_pass import Outcome, trace_of
from grating_core.engine.unpruned import UnprunedScorer
from grating_core.errors import UnsupportedModelError
from grating_core.forking import Interrupted
from grating_core.memory.meter import Meter
from grating_core.memory.plan import PASS_TOKENS
from grating_core.models.by_transformers import Classifier
from grating_core.text.pairs import Template, TokenisedPair

_BATCH_TOKENS = {"cuda": 32768}
_USUAL_BATCH_TOKENS = 8192
_ROUNDING = {torch.float32: 1e-4}  # by which padding may change a score, as a share of it
_USUAL_ROUNDING = 3e-2


class _Row(NamedTuple):
    """A row is one sequence of a pass: the numbers of its job, of its candidate and of its window, and itself."""

    job: int
    candidate: int
    window: int
    pair: TokenisedPair


class PaddedScorer(UnprunedScorer):
    """A padded scorer computes with one of transformers' classifiers.

    Some models give a sequence another score if it is padded: a convolution or a mean over the sequence sees the
    padding. Such a model gets one sequence at a time.

    Args:
        model: The classifier, which is closed with the scorer.
        template: The template that makes token ids of queries and documents.

    Raises:
        UnsupportedModelError: The classifier cannot compute a pair of texts.
    """

    model: Classifier
    _who = "engine='transformers'"

    def __init__(self, model: Classifier, template: Template) -> None:
        super().__init__(model, template)
        self.slice_tokens = _BATCH_TOKENS.get(model.device.type, _USUAL_BATCH_TOKENS)
        self.pass_tokens = max(PASS_TOKENS, self.slice_tokens)
        self.pads = self._may_pad()
        """Whether sequences of different lengths are computed together."""

    def _run(self, jobs: Sequence[Job[Outcome]], *, lossless: bool) -> None:
        started, began = perf_counter(), self.watch.now()
        rows = [
            _Row(number, candidate, window, pair)
            for number, job in enumerate(jobs)
            for candidate, windows in enumerate(job.encoded)
            for window, pair in enumerate(windows)
        ]
        contests = [_contest(self.model, job) for job in jobs]
        tokens = sum(job.tokens for job in jobs)
        for job, contest in zip(jobs, contests, strict=True):
            job.begun = True
            contest.look_at_the_clock(1, tokens)
        rows = [row for row in rows if row.candidate in contests[row.job].alive]
        scores: list[dict[tuple[int, int], float]] = [{} for _ in jobs]
        given_up: set[int] = set()
        computed = 0
        for batch in self._batches(rows):
            given_up.update(number for number, job in enumerate(jobs) if job.given_up())
            over = given_up | {number for number, contest in enumerate(contests) if contest.is_late()}
            wanted = [row for row in batch if row.job not in over]
            for row, score in zip(wanted, self._score([row.pair for row in wanted]), strict=True):
                scores[row.job][row.candidate, row.window] = score
            computed += sum(len(row.pair.input_ids) for row in wanted)
        seconds = perf_counter() - started
        self.watch.learn(1, computed, self.watch.now() - began)
        for number, (job, contest, found) in enumerate(zip(jobs, contests, scores, strict=True)):
            if number in given_up:
                job.fail(Interrupted())
            else:
                _finish(self.model, job, contest, found, seconds)

    def _batches(self, rows: Sequence[_Row]) -> Iterator[list[_Row]]:
        """Yield rows of about the same length, padded no more tokens than are computed at once."""
        batch: list[_Row] = []
        for row in sorted(rows, key=lambda row: -len(row.pair.input_ids)):
            longest = len((batch or [row])[0].pair.input_ids)
            if batch and ((len(batch) + 1) * longest > self.slice_tokens or not self.pads):
                yield batch
                batch = []
            batch.append(row)
        if batch:
            yield batch

    def _score(self, pairs: Sequence[TokenisedPair]) -> list[float]:
        """Compute a batch; none of an empty one."""
        if not pairs:
            return []
        found: list[float] = self.model.score(
            [pair.input_ids for pair in pairs], [pair.token_type_ids for pair in pairs]
        ).tolist()
        return found

    def _may_pad(self) -> bool:
        """Tell whether a short sequence has the same score beside a longer one as alone.

        Raises:
            UnsupportedModelError: The model cannot compute a sequence alone.
        """
        (short, *_), (long, *_) = self.template.encode("a", ["a", "a b c d e f g h i j k l m n o p " * 4])
        try:
            (alone,) = self._score([short])
        except Exception as error:  # another library's model may refuse in any way
            raise UnsupportedModelError(
                f"transformers cannot compute a pair of {len(short.input_ids)} tokens with this model: {error!r}"
            ) from error
        try:
            beside, _ = self._score([short, long])
        except Exception:  # models without a token for padding refuse it
            return False
        rounding = _ROUNDING.get(self.model.products, _USUAL_ROUNDING)
        return abs(alone - beside) <= rounding * max(1.0, abs(alone))


def _contest(model: Classifier, job: Job[Outcome]) -> Contest:
    candidates = job.encoded
    return Contest(
        tuple(map(len, candidates)),
        UNPRUNED,
        job.top_k or len(candidates),
        model.depth,
        numbers=range(job.first_number, job.first_number + len(candidates)),
        deadline=job.deadline,
        lengths=[sum(len(pair.input_ids) for pair in windows) for windows in candidates],
    )


def _finish(
    model: Classifier,
    job: Job[Outcome],
    contest: Contest,
    scores: Mapping[tuple[int, int], float],
    seconds: float,
) -> None:
    """End a job with its ranking, or with its own error. One layer stands for the whole model.

    Args:
        model: The classifier.
        job: The job.
        contest: Its contest.
        scores: The scores by candidate and window, as far as there was time for them.
        seconds: Seconds of the pass.
    """
    candidates = job.encoded
    places = {one: [(one, window) for window in range(len(candidates[one]))] for one in contest.alive}
    contest.leave_out([one for one, own in places.items() if not scores.keys() >= {*own}])
    if contest.alive:
        found = np.array([scores[place] for one in contest.alive for place in places[one]])
        tokens = sum(len(pair.input_ids) for one in contest.alive for pair in candidates[one])
        contest.after(model.depth, found, tokens, seconds, Meter())
    elif not contest.winners:
        contest.end()
    if contest.error is not None:
        job.fail(contest.error)
        return
    trace = trace_of(model, contest, candidates, 0, job.started, None)
    job.finish(Outcome(contest.winners, trace))
