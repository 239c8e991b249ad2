"""A list scorer reads all documents of a request together, and scores each by the cosine with the query.

Documents that do not fit into one sequence are divided into blocks. The query's embedding is then the mean of its
embeddings in the blocks, weighted by the best cosine of each, as in the code that comes with jina-reranker-v3.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from time import perf_counter
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import cosine_similarity

from grating_core.engine.contest import Contest
from grating_core.engine.forward import run_layer
from grating_core.engine.highlights import Highlighter
from grating_core.engine.job import UNPRUNED, Job
from grating_core.engine.one_pass import Outcome, room_for, trace_of
from grating_core.engine.ragged import Encoded, RaggedBatch, Slice
from grating_core.engine.scorer import usual_slice
from grating_core.engine.unpruned import UnprunedScorer
from grating_core.forking import Interrupted
from grating_core.kernels.room import Room
from grating_core.layers.sending import integers, sent
from grating_core.memory.hidden import HiddenStates
from grating_core.memory.meter import Meter, PeakMemory
from grating_core.memory.plan import PASS_TOKENS, MemoryPlan
from grating_core.models.cross_encoder import CrossEncoder
from grating_core.text.lists import Block, ListTemplate
from grating_core.text.pairs import TokenisedPair


class ListScorer(UnprunedScorer):
    """A list scorer computes with grating's own layers, without pruning.

    Args:
        model: The model, whose head gives embeddings. It is closed with the scorer.
        template: The template that writes documents into blocks.
        plan: The plan of the memory budget; None without a budget.
    """

    model: CrossEncoder
    template: ListTemplate
    _who = "a listwise model"

    def __init__(self, model: CrossEncoder, template: ListTemplate, plan: MemoryPlan | None = None) -> None:
        super().__init__(model, template)
        self.plan = plan
        self.slice_tokens = plan.slice_tokens if plan else usual_slice(model)
        self.pass_tokens = plan.pass_tokens if plan else max(PASS_TOKENS, self.slice_tokens)

    def highlighter(self, documents: Sequence[str]) -> Highlighter:
        """Refuse highlights; see :meth:`Scorer.highlighter`."""
        raise ValueError("highlights=True needs a model that reads one document at a time: leave it out")

    def _encode(self, query: str, documents: Sequence[str]) -> list[list[TokenisedPair]]:
        """Return the blocks of one list."""
        return [list(self.template.blocks(query, documents))] if documents else []

    def _encode_in_time(self, query: str, documents: Sequence[str], deadline: object) -> list[list[TokenisedPair]]:
        return self._encode(query, documents)

    def _run(self, jobs: Sequence[Job[Outcome]], *, lossless: bool) -> None:
        started, before = perf_counter(), replace(self.model.meter)
        for job in jobs:
            job.begun = True
        lists = [cast("Sequence[Sequence[Block]]", job.encoded) for job in jobs]
        batch = RaggedBatch.pack(
            [[[block] for blocks in own for block in blocks] for own in lists], share_prefix=False
        )
        peak = None if self.plan is None else PeakMemory(self.model.device)
        marks = _Marks(self.model, [[block for blocks in own for block in blocks] for own in lists])
        try:
            with (
                room_for(self.model, batch, self.slice_tokens, self.plan) as hidden,
                closing(self._layers(batch, hidden, marks, peak)) as layers,
            ):
                for _ in layers:
                    if _all_end_early(jobs):
                        return
        finally:
            self.model.rewind()
        embeddings = marks.embeddings()
        seconds = perf_counter() - started
        usage, memory = self.model.meter.since(before), None if peak is None else peak.bytes
        self.watch.learn(self.model.depth, batch.tokens, seconds)
        for job, own in zip(jobs, lists, strict=True):
            scores = np.concatenate([_scores(blocks, embeddings) for blocks in own])
            if not job.over:
                documents = [[document] for blocks in own for block in blocks for document in block.documents]
                self._finish(job, documents, scores, seconds, usage, memory)

    def _finish(
        self,
        job: Job[Outcome],
        candidates: Encoded,
        scores: NDArray[np.float64],
        seconds: float,
        usage: Meter,
        peak: int | None,
    ) -> None:
        """End a job with its ranking, or with its own error. The trace has one entry for all layers.

        Args:
            job: The job.
            candidates: The windows of each candidate.
            scores: The scores of all windows.
            seconds: Seconds of the whole pass.
            usage: What the pass used.
            peak: The pass's peak memory in bytes; None if it was not metered.
        """
        depth = self.model.depth
        contest = Contest(
            tuple(map(len, candidates)),
            UNPRUNED,
            job.top_k or len(candidates),
            depth,
            numbers=range(job.first_number, job.first_number + len(candidates)),
        )
        tokens = sum(len(pair.input_ids) for windows in candidates for pair in windows)
        contest.after(depth, scores, depth * tokens, seconds, usage)
        if contest.error is not None:
            job.fail(contest.error)
            return
        trace = trace_of(self.model, contest, candidates, 0, job.started, peak)
        job.finish(Outcome(contest.winners, trace))

    @torch.inference_mode()
    def _layers(
        self, batch: RaggedBatch, hidden: HiddenStates, marks: _Marks, peak: PeakMemory | None
    ) -> Generator[None, None, None]:
        """Take the blocks through the layers, and yield before each slice."""
        model, room = self.model, Room()
        model.prepare(batch.input_ids)
        angles = model.angles(torch.arange(batch.longest, device=model.device))
        embedded = False
        for number in range(1, model.depth + 1):
            see = marks.see if number == model.depth else _look_away
            yield from run_layer(
                model, number, batch, hidden, angles, self.slice_tokens, room, see, {}, embed=not embedded
            )
            embedded = True
            if peak is not None:
                peak.look()


def _ends_early(job: Job[Outcome]) -> bool:
    """End a job that nobody waits for any more, or whose deadline is over; tell whether it has ended."""
    if job.deadline is not None and job.deadline.over:
        job.finish(job.unread())
    elif job.given_up():
        job.fail(Interrupted())
    return job.over


def _all_end_early(jobs: Sequence[Job[Outcome]]) -> bool:
    """End those jobs that end early; tell whether all have ended."""
    left = [job for job in jobs if not _ends_early(job)]
    return not left


def _look_away(states: Tensor, part: Slice) -> None:
    """See nothing of a layer."""


class _Marks:
    """The marks of all blocks collect their states after the last layer.

    Args:
        model: The model.
        blocks: The blocks of each request.
    """

    def __init__(self, model: CrossEncoder, blocks: Sequence[Sequence[Block]]) -> None:
        self._model = model
        self._blocks = blocks
        self._states: list[Tensor] = []

    def see(self, states: Tensor, part: Slice) -> None:
        """Take the states ``[T, D]`` of a slice. Slices come in the order of the blocks."""
        places = [
            one.rows.start + mark - one.start
            for one in part.asked
            for mark in self._blocks[one.piece.request][one.piece.candidate or 0].marks
            if one.start <= mark < one.stop
        ]
        if places:
            read = states.index_select(0, sent(integers(places), states.device))
            self._states.append(self._model.normed(read.float()))

    @torch.inference_mode()
    def embeddings(self) -> Iterator[Tensor]:
        """Return the embeddings of each block in order, float32 ``[marks, E]``, on the CPU."""
        found = self._model.score(torch.cat(self._states), self._model.depth).cpu()
        counts = [len(block.marks) for blocks in self._blocks for block in blocks]
        return iter(torch.split(found, counts))


def _scores(blocks: Sequence[Block], embeddings: Iterator[Tensor]) -> NDArray[np.float64]:
    """Return the scores of the documents of a list: cosines with the mean of the query's embeddings.

    Args:
        blocks: The blocks of the list.
        embeddings: The embeddings of these blocks and of those after them. The query's is each block's last.
    """
    own = [next(embeddings) for _ in blocks]
    best = torch.stack([cosine_similarity(one[:-1], one[-1:]).max() for one in own])
    weights = (1.0 + best) / 2.0
    query = (weights[:, None] * torch.stack([one[-1] for one in own])).sum(0) / weights.sum()
    found = cosine_similarity(torch.cat([one[:-1] for one in own]), query[None])
    return found.numpy().astype(np.float64)
