"""A scorer goes from texts to scores: encode, pack, forward, outcome."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from itertools import groupby
from time import perf_counter
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from grating_core.engine.highlights import Highlighter
from grating_core.engine.job import Job
from grating_core.engine.lanes import Lanes
from grating_core.engine.one_pass import Outcome, run_pass, unread_outcome
from grating_core.engine.recount import Recount
from grating_core.engine.watch import Deadline, Watch
from grating_core.forking import Lock
from grating_core.lens.features import Provisional
from grating_core.lens.pruning import Pruning
from grating_core.lens.recalibrate import Logged
from grating_core.lens.store import CalibratedLens
from grating_core.lifetime import closed_error
from grating_core.memory.plan import PASS_TOKENS, MemoryPlan, tokens_of_slice
from grating_core.models.cross_encoder import CrossEncoder
from grating_core.pruning import Off
from grating_core.requests import Request
from grating_core.results import Trace
from grating_core.text.pairs import Template, TokenisedPair

_SLICE_TOKENS = {"cuda": 32768, "mps": 8192}  # on the CPU it depends on the size of the layers
_GROUP = 256  # pairs whose scores are one job
_ENCODED = 32  # documents that are tokenised between two looks at a watch


class Model(Protocol):
    """This protocol is for models that a scorer computes with."""

    @property
    def device(self) -> torch.device:
        """The device that computes."""

    @property
    def products(self) -> torch.dtype:
        """The dtype of the layers' products."""

    @property
    def depth(self) -> int:
        """The number of layers; 1 for a model that is computed as a whole."""

    @property
    def notes(self) -> tuple[str, ...]:
        """Remarks on the model, for traces."""

    def close(self) -> None:
        """Free the weights, and close the files."""


class Scorer(ABC):
    """A scorer computes requests with one model. One thread at a time has the turn to compute, or to fill lanes.

    Args:
        model: The model, which is closed with the scorer.
        template: The template that makes token ids of queries and documents.
    """

    plan: MemoryPlan | None = None
    """The plan of the memory budget; None without a budget."""
    lanes: Lanes | None = None
    """The lanes of passes that run side by side; None if only one pass at a time may use the model."""
    slice_tokens: int
    """The most tokens that are computed at once."""
    pass_tokens: int
    """The most tokens of several jobs that go through the model together."""

    def __init__(self, model: Model, template: Template) -> None:
        self.model = model
        self.template = template
        self.watch = Watch(model.depth)
        """The watch that knows what a layer takes."""
        self.turn = Lock()
        """The lock that is held by whoever computes."""
        self._closed = False

    def close(self) -> None:
        """Free the weights and close the files. The caller holds the turn."""
        self._closed = True
        self.model.close()

    def job(self, request: Request, pruning: Pruning) -> Job[Outcome]:
        """Return the job of finding the top K of a request. Without documents the job has ended.

        Args:
            request: The request, checked.
            pruning: How candidates stop early.
        """
        query, documents, top_k = request.query, request.documents, min(request.top_k, len(request.documents))
        finder = self.highlighter(documents) if request.highlights else None
        if request.deadline is None:
            encode = partial(self._encode, query, documents)
            job: Job[Outcome] = Job(encode, top_k=top_k, pruning=pruning, highlighter=finder)
        else:
            deadline = Deadline(self.watch.now() + request.deadline, self.watch)
            encode_in_time = partial(self._encode_in_time, query, documents, deadline)
            model = self.model
            unread = partial(unread_outcome, model.depth, model.notes, len(documents), top_k, request.deadline)
            job = Job(
                encode_in_time,
                top_k=top_k,
                pruning=pruning,
                deadline=deadline,
                unread=unread,
                highlighter=finder,
            )
        if not documents:
            seconds = perf_counter() - job.started
            job.finish(Outcome([], Trace((), self.model.depth, (), (), seconds, notes=self.model.notes)))
        return job

    def _encode(self, query: str, documents: Sequence[str]) -> list[list[TokenisedPair]]:
        """Return the windows of each candidate."""
        return self.template.encode(query, documents)

    def _encode_in_time(
        self, query: str, documents: Sequence[str], deadline: Deadline
    ) -> list[list[TokenisedPair]]:
        """Return the windows of each candidate; no candidates at all if the deadline comes before all are done."""
        found: list[list[TokenisedPair]] = []
        for first in range(0, len(documents), _ENCODED):
            if deadline.over:
                return []
            found += self.template.encode(query, documents[first : first + _ENCODED])
        return found

    def highlighter(self, documents: Sequence[str]) -> Highlighter:
        """Return what finds the highlights of a request's documents.

        Raises:
            ValueError: This scorer finds none.
        """
        raise ValueError(
            "highlights=True needs grating's own layers, but transformers computes this model: leave it out"
        )

    def jobs_of_pairs(self, pairs: Sequence[tuple[str, str]]) -> list[Job[Outcome]]:
        """Return the jobs of computing the full model's score of each pair of query and text.

        Args:
            pairs: The pairs; queries may differ.
        """
        return [
            Job(partial(self._encode_pairs, pairs[first : first + _GROUP]), first_number=first)
            for first in range(0, len(pairs), _GROUP)
        ]

    def _encode_pairs(self, pairs: Sequence[tuple[str, str]]) -> list[list[TokenisedPair]]:
        return [
            windows
            for query, same in groupby(pairs, key=lambda pair: pair[0])
            for windows in self.template.encode(query, [text for _, text in same])
        ]

    def run(self, jobs: Sequence[Job[Outcome]], *, lossless: bool = False) -> None:
        """Take jobs through the model together; each ends with an outcome or an error. The caller holds the turn.

        Args:
            jobs: The jobs, at least one.
            lossless: Whether to compute without 8 bits, if the model has its layers without them as well.
        """
        if self._closed:  # while the caller waited
            raise closed_error("Reranker")
        for job in jobs:
            if job.deadline is not None and (job.deadline.over or not job.encoded):
                job.finish(job.unread())
        if jobs := [job for job in jobs if not job.over]:
            self._run(jobs, lossless=lossless)

    @abstractmethod
    def _run(self, jobs: Sequence[Job[Outcome]], *, lossless: bool) -> None:
        """Compute jobs, see :meth:`run`."""

    def full_scores(self, request: Logged, pause: Callable[[], bool]) -> tuple[float, ...]:
        """Compute the full model's score of each document of a request.

        Args:
            request: The query and the documents.
            pause: Function that says after each slice whether to give up, which raises :class:`Interrupted`.
        """
        device = self.model.device

        def caught_up() -> bool:
            # Work that was given to another device cannot be taken back, so it is waited for.
            if device.type != "cpu":
                torch.accelerator.synchronize(device)
            return pause()

        encode = partial(self.template.encode, request.query, request.documents)
        return self._alone(Job(encode, pause=caught_up), lossless=True).layers[-1].scores

    def _alone(self, job: Job[Outcome], *, lossless: bool = False) -> Trace:
        """Compute one job in this thread."""
        with self.turn:
            self.run([job], lossless=lossless)
        return job.future.result().trace


def usual_slice(model: CrossEncoder) -> int:
    """Return the most tokens that a model computes at once without a budget."""
    return _SLICE_TOKENS.get(model.device.type, tokens_of_slice(model.work))


class LayerScorer(Scorer):
    """A layer scorer computes with grating's own layers, so that candidates can stop after any layer.

    Args:
        model: The cross-encoder, which is closed with the scorer.
        template: The template that makes token ids of queries and documents.
        plan: The plan of the memory budget; None without a budget.
        recount: What decides close contests of a model in 8 bits; None if nothing does.
    """

    model: CrossEncoder

    def __init__(
        self,
        model: CrossEncoder,
        template: Template,
        plan: MemoryPlan | None = None,
        recount: Recount | None = None,
    ) -> None:
        super().__init__(model, template)
        self.recount = recount
        """What decides close contests of a model in 8 bits; None if nothing does."""
        self.plan = plan
        self.slice_tokens = plan.slice_tokens if plan else usual_slice(model)  # a longer sequence is divided
        # Only compiled kernels give the same bits with any number of threads, and only a resident model may be
        # used by two passes.
        side_by_side = plan is None and model.kernels != "torch" and Lanes.work_here()
        self.lanes = Lanes() if side_by_side else None
        usual_pass = max(PASS_TOKENS // 2 if side_by_side else PASS_TOKENS, self.slice_tokens)
        self.pass_tokens = plan.pass_tokens if plan else usual_pass

    def _run(self, jobs: Sequence[Job[Outcome]], *, lossless: bool) -> None:
        model = self.recount.model if lossless and self.recount is not None else self.model
        watch = self.watch if model is self.model else None
        run_pass(model, jobs, slice_tokens=self.slice_tokens, plan=self.plan, recount=self.recount, watch=watch)

    def highlighter(self, documents: Sequence[str]) -> Highlighter:
        """See :meth:`Scorer.highlighter`."""
        return Highlighter.of(self.model.spec, self.template, documents)

    def take_over(self, calibrated: CalibratedLens) -> CalibratedLens | None:
        """Return a new lens with the margins for this model; None if it has none. Recounts take over its doubt."""
        if self.model.products != torch.int8:
            return calibrated
        if self.recount is not None and calibrated.int8 is not None:
            self.recount = replace(self.recount, doubt=calibrated.int8.recounts.doubt)
        return calibrated.in_8_bits(alone=self.recount is None)

    def observe(self, request: Request, observer: Provisional) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Compute a request to the end while an observer reads the hidden states after each layer.

        Args:
            request: The query and N documents. A document's first window stands for the whole document, because
                an estimate of a window is compared with the window's own score.
            observer: The observer, in the place of a lens.

        Returns:
            Final scores, float32 ``[N]``, and the numbers of the candidates' own tokens, int64 ``[N]``. The tokens
            that all candidates share do not count.
        """
        candidates = [windows[:1] for windows in self.template.encode(request.query, request.documents)]
        trace = self._alone(Job(lambda: candidates, pruning=Pruning(Off(), observer)))
        return np.array(trace.layers[-1].scores, dtype=np.float32), np.array(trace.lengths) - trace.shared_prefix
