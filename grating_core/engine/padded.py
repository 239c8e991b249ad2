"""A padded scorer lets transformers compute whole models, in batches of pairs of about the same length.

Nothing is pruned or streamed. This is for architectures that grating's own layers do not know.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from time import perf_counter
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from grating_core.engine.contest import Contest
from grating_core.engine.job import UNPRUNED, Job
from grating_core.engine.one_pass import Outcome, trace_of
from grating_core.engine.scorer import Scorer
from grating_core.errors import UnsupportedModelError
from grating_core.forking import Interrupted
from grating_core.lens.pruning import Pruning
from grating_core.memory.meter import Meter
from grating_core.memory.plan import PASS_TOKENS
from grating_core.models.by_transformers import Classifier
from grating_core.pruning import Off
from grating_core.requests import Request
from grating_core.text.pairs import Template, TokenisedPair

_BATCH_TOKENS = {"cuda": 32768}
_USUAL_BATCH_TOKENS = 8192
_ROUNDING = {torch.float32: 1e-4}  # by which padding may change a score, as a share of it
_USUAL_ROUNDING = 3e-2


class _Row(NamedTuple):
    """A row is one sequence of a pass: the number of its job, its place among the job's, and the sequence."""

    job: int
    place: int
    pair: TokenisedPair


class PaddedScorer(Scorer):
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

    def __init__(self, model: Classifier, template: Template) -> None:
        super().__init__(model, template)
        self.slice_tokens = _BATCH_TOKENS.get(model.device.type, _USUAL_BATCH_TOKENS)
        self.pass_tokens = max(PASS_TOKENS, self.slice_tokens)
        self.pads = self._may_pad()
        """Whether sequences of different lengths are computed together."""

    def job(self, request: Request, pruning: Pruning) -> Job[Outcome]:
        """See :meth:`Scorer.job`.

        Raises:
            ValueError: The request asks for what needs the states between layers.
        """
        asked = {
            "scores": request.scores if request.scores != "exact" else None,
            "pruning": None if isinstance(request.pruning, Off) else request.pruning,
            "target": request.target,
        }
        for name, value in asked.items():
            if value is not None:
                raise ValueError(
                    f"{name}={value!r}: engine='transformers' computes every document through all layers, so that "
                    f"nothing is estimated or dropped; leave {name} out"
                )
        return super().job(request, pruning)

    def _run(self, jobs: Sequence[Job[Outcome]], *, lossless: bool) -> None:
        started = perf_counter()
        rows = [
            _Row(number, place, pair)
            for number, job in enumerate(jobs)
            for place, pair in enumerate(pair for windows in job.encoded for pair in windows)
        ]
        scores = [np.full(sum(map(len, job.encoded)), np.nan) for job in jobs]
        for batch in self._batches(rows):
            ended = {number for number, job in enumerate(jobs) if _ends_early(job)}
            wanted = [row for row in batch if row.job not in ended]
            for row, score in zip(wanted, self._score([row.pair for row in wanted]), strict=True):
                scores[row.job][row.place] = score
        seconds = perf_counter() - started
        self.watch.learn(self.model.depth, sum(len(row.pair.input_ids) for row in rows), seconds)
        for job, found in zip(jobs, scores, strict=True):
            if not job.over:
                _finish(self.model, job, found, seconds)

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


def _ends_early(job: Job[Outcome]) -> bool:
    """End a job that nobody waits for any more, or whose deadline is over; tell whether it has ended."""
    if job.deadline is not None and job.deadline.over:
        job.finish(job.unread())
    elif job.given_up():
        job.fail(Interrupted())
    return job.over


def _finish(model: Classifier, job: Job[Outcome], scores: NDArray[np.float64], seconds: float) -> None:
    """End a job with its ranking, or with its own error. One layer stands for the whole model."""
    candidates = job.encoded
    contest = Contest(
        tuple(map(len, candidates)),
        UNPRUNED,
        job.top_k or len(candidates),
        model.depth,
        numbers=range(job.first_number, job.first_number + len(candidates)),
    )
    contest.after(model.depth, scores, job.tokens, seconds, Meter())
    if contest.error is not None:
        job.fail(contest.error)
        return
    trace = trace_of(model, contest, candidates, 0, job.started, None)
    job.finish(Outcome(contest.winners, trace))
