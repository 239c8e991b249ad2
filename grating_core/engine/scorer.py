"""A scorer goes from texts to scores: encode, pack, forward, outcome."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import groupby
from time import perf_counter

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from grating_core.engine.forward import Outcome, forward
from grating_core.engine.ragged import RaggedBatch, filled
from grating_core.files.places import cache_directory
from grating_core.forking import Lock
from grating_core.lens.features import Provisional
from grating_core.lens.pruning import Pruning
from grating_core.lens.requests import Request
from grating_core.lifetime import closed_error
from grating_core.memory.hidden import HiddenInMemory, HiddenOnDisk, HiddenStates
from grating_core.memory.meter import PeakMemory
from grating_core.memory.plan import LARGEST_WORK, MemoryPlan
from grating_core.models.cross_encoder import CrossEncoder
from grating_core.pruning import Off
from grating_core.results import RankedDocument, RerankResult, Trace
from grating_core.text.pairs import Template, TokenisedPair

_CHUNK_TOKENS = {"cuda": 32768, "mps": 8192}  # on the CPU it depends on the size of the layers
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
        usual = _CHUNK_TOKENS.get(model.device.type, LARGEST_WORK // model.work)
        self.chunk_tokens = plan.chunk_tokens if plan else usual
        """The most tokens that are computed at once. A sequence is never divided."""
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
        batch = self._pack(candidates)
        peak = None if self.plan is None else PeakMemory(self.model.device)
        outcome = self._forward(batch, pruning, top_k=min(top_k, len(batch)), peak=peak, pause=pause)
        ranking = [
            RankedDocument(winner.index, winner.score, documents[winner.index], winner.estimated)
            for winner in outcome.winners
        ]
        usage = outcome.usage
        trace = Trace(
            layers=tuple(outcome.layers),
            depth=self.model.depth,
            lengths=tuple(sum(len(pair.input_ids) for pair in windows) for windows in candidates),
            truncated=tuple(index for index, windows in enumerate(candidates) if windows[0].truncated),
            windows=batch.windows,
            shared_prefix=batch.prefix,
            seconds=perf_counter() - started,
            seconds_waited=usage.seconds_waited,
            bytes_read=usage.bytes_read,
            bytes_spilled=usage.bytes_spilled,
            embedding_hit_rate=usage.hit_rate,
            peak_memory=None if peak is None else peak.bytes,
        )
        return RerankResult(ranking, trace)

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
                batch = self._pack(
                    [
                        windows
                        for query, same in groupby(group, key=lambda pair: pair[0])
                        for windows in self.template.encode(query, [text for _, text in same])
                    ]
                )
                found += self._forward(batch, _UNPRUNED, first_number=start).layers[-1].scores
                bar.update(len(group))
        return found

    def full_scores(self, request: Request, pause: Pause) -> tuple[float, ...]:
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

        batch = self._pack(self.template.encode(request.query, request.documents))
        return self._forward(batch, _UNPRUNED, pause=caught_up).layers[-1].scores

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
        batch = self._pack(candidates)
        outcome = self._forward(batch, Pruning(Off(), observer))
        return np.array(outcome.layers[-1].scores, dtype=np.float32), np.array(batch.lengths)

    def _pack(self, candidates: Sequence[Sequence[TokenisedPair]]) -> RaggedBatch:
        return RaggedBatch.pack(candidates, self.model.device, share_prefix=self.model.causal)

    def _forward(
        self,
        batch: RaggedBatch,
        pruning: Pruning,
        *,
        top_k: int = 1,
        first_number: int = 0,
        peak: PeakMemory | None = None,
        pause: Pause | None = None,
    ) -> Outcome:
        with self.turn:
            if self._closed and self.model.remembers:  # while this call waited
                raise closed_error("Reranker")
            try:
                with self._room(batch) as hidden:
                    return forward(
                        self.model,
                        batch,
                        hidden,
                        pruning,
                        top_k=top_k,
                        chunk_tokens=self.chunk_tokens,
                        first_number=first_number,
                        peak=peak,
                        pause=pause,
                    )
            finally:
                self.model.rewind()

    @contextmanager
    def _room(self, batch: RaggedBatch) -> Iterator[HiddenStates]:
        """Provide room for the hidden states of a batch: in memory, or on disk if the plan says so."""
        model = self.model
        shape = (batch.tokens, model.width, model.dtype, model.device)
        if self.plan is None or not self.plan.spills(batch.tokens):
            yield HiddenInMemory(*shape)
            return
        # The largest chunk of the batch may be too small: when candidates leave, chunks can become larger.
        rows = filled(max(self.chunk_tokens, batch.longest))
        with HiddenOnDisk(*shape, rows=rows, directory=cache_directory(), meter=model.meter) as hidden:
            yield hidden
