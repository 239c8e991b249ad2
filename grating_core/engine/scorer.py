"""A scorer goes from texts to scores: encode, pack, forward, outcome."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from itertools import groupby
from time import perf_counter

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from grating_core.engine.job import Job
from grating_core.engine.one_pass import Outcome, run_pass
from grating_core.forking import Lock
from grating_core.lens.features import Provisional
from grating_core.lens.pruning import Pruning
from grating_core.lens.recalibrate import Logged
from grating_core.lifetime import closed_error
from grating_core.memory.plan import MemoryPlan, largest_slice
from grating_core.models.cross_encoder import CrossEncoder
from grating_core.pruning import Off
from grating_core.requests import Request
from grating_core.results import RerankResult, Trace
from grating_core.text.pairs import Template, TokenisedPair

_SLICE_TOKENS = {"cuda": 32768, "mps": 8192}  # on the CPU it depends on the size of the layers
_GROUP = 256  # pairs that scores() holds in memory at a time
Pause = Callable[[], bool]
"""A function that is called before each chunk, and returns whether to give up."""

_UNPRUNED = Pruning(Off())


class Scorer:
    """A scorer computes requests with one model.

    Several threads may call it. They take turns if the model keeps a state of a request, and under a memory
    budget, which is for one request at a time.

    Args:
        model: The cross-encoder, which is closed with the scorer.
        template: The template that makes token ids of queries and documents.
        plan: The plan of the memory budget; None without a budget.
    """

    def __init__(self, model: CrossEncoder, template: Template, plan: MemoryPlan | None = None) -> None:
        self.model = model
        self.template = template
        self.plan = plan
        usual = _SLICE_TOKENS.get(model.device.type, largest_slice(model.work))
        self.slice_tokens = plan.slice_tokens if plan else usual
        """The most tokens that are computed at once. A longer sequence is divided."""
        self.takes_turns = plan is not None or model.remembers
        self.turn: AbstractContextManager[None] = Lock() if self.takes_turns else nullcontext()
        self._closed = False

    def close(self) -> None:
        """Free the weights and close the files. The caller holds the turn."""
        self._closed = True
        self.model.close()

    def rank(
        self,
        query: str,
        documents: Sequence[str],
        top_k: int,
        pruning: Pruning,
        pause: Pause | None = None,
    ) -> RerankResult:
        """Find the ``top_k`` documents that answer the query best.

        Args:
            query: The query; not empty.
            documents: N texts.
            top_k: Number of documents to find, 1 or more; N or more finds all.
            pruning: How candidates stop early.
            pause: Function that says before each chunk whether to give up; None never gives up.

        Raises:
            Interrupted: ``pause`` said to give up.
        """
        started = perf_counter()
        if not documents:
            return RerankResult([], Trace((), self.model.depth, (), (), perf_counter() - started))
        candidates = self.template.encode(query, documents)
        job = Job[Outcome](lambda: candidates, top_k=min(top_k, len(documents)), pruning=pruning, pause=pause)
        return self._run(job).result(documents)

    def scores(self, pairs: Sequence[tuple[str, str]], *, show_progress: bool = False) -> list[float]:
        """Compute the full model's score of each pair of query and text.

        Args:
            pairs: The pairs; queries may differ.
            show_progress: Whether to show a progress bar on standard error.
        """
        found: list[float] = []
        with tqdm(total=len(pairs), unit="pair", disable=not show_progress) as bar:
            for start in range(0, len(pairs), _GROUP):
                group = pairs[start : start + _GROUP]
                candidates = [
                    windows
                    for query, same in groupby(group, key=lambda pair: pair[0])
                    for windows in self.template.encode(query, [text for _, text in same])
                ]
                job = Job[Outcome](partial(_same, candidates), first_number=start)
                found += self._run(job).trace.layers[-1].scores
                bar.update(len(group))
        return found

    def full_scores(self, request: Logged, pause: Pause) -> tuple[float, ...]:
        """Compute the full model's score of each document of a request.

        Args:
            request: The query and the documents.
            pause: Function that says before each chunk whether to give up, which raises :class:`Interrupted`.
        """
        device = self.model.device

        def caught_up() -> bool:
            # Work that was given to another device cannot be taken back, so it is waited for.
            if device.type != "cpu":
                torch.accelerator.synchronize(device)
            return pause()

        candidates = self.template.encode(request.query, request.documents)
        return self._run(Job[Outcome](lambda: candidates, pause=caught_up)).trace.layers[-1].scores

    def observe(self, request: Request, observer: Provisional) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Compute a request to the end while an observer reads the hidden states after each layer.

        Args:
            request: The query and N documents. A document's first window stands for the whole document, because
                an estimate of a window is compared with the window's own score.
            observer: The observer, in the place of a lens.

        Returns:
            Final scores, float32 ``[N]``, and the numbers of the candidates' tokens, int64 ``[N]``.
        """
        candidates = [windows[:1] for windows in self.template.encode(request.query, request.documents)]
        trace = self._run(Job[Outcome](lambda: candidates, pruning=Pruning(Off(), observer))).trace
        return np.array(trace.layers[-1].scores, dtype=np.float32), np.array(trace.lengths)

    def _run(self, job: Job[Outcome]) -> Outcome:
        with self.turn:
            if self._closed and self.model.remembers:  # while this call waited
                raise closed_error("Reranker")
            run_pass(self.model, [job], slice_tokens=self.slice_tokens, plan=self.plan)
        return job.future.result()


def _same(candidates: list[list[TokenisedPair]]) -> list[list[TokenisedPair]]:
    return candidates
