"""One pass takes jobs through the layers together, and ends each with its own outcome."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from time import perf_counter

from grating_core.engine.contest import Contest, Winner
from grating_core.engine.forward import forward
from grating_core.engine.job import Job
from grating_core.engine.ragged import Encoded, RaggedBatch, filled
from grating_core.engine.recount import Recount
from grating_core.engine.watch import Watch
from grating_core.files.places import cache_directory
from grating_core.memory.hidden import HiddenInMemory, HiddenOnDisk, HiddenStates
from grating_core.memory.meter import PeakMemory
from grating_core.memory.plan import MemoryPlan
from grating_core.models.by_transformers import Classifier
from grating_core.models.cross_encoder import CrossEncoder
from grating_core.requests import Request
from grating_core.results import Highlight, RankedDocument, RerankResult, Trace


@dataclass(frozen=True)
class Outcome:
    """An outcome has the top K candidates of a job, best first, and the trace of how they were found."""

    winners: list[Winner]
    trace: Trace
    highlights: Mapping[int, tuple[Highlight, ...]] = field(default_factory=dict)
    """The highlights of the winners, by their indices, if they were asked for."""

    def result(self, request: Request, probability: Callable[[float], float]) -> RerankResult:
        """Return the result of a request.

        Args:
            request: The request.
            probability: Function that turns a score into a probability.
        """
        ranking = [
            RankedDocument(
                won.index,
                won.score,
                request.documents[won.index],
                chance,
                won.estimated,
                self.highlights.get(won.index, ()),
            )
            for won in self.winners
            if request.keeps(won.score, chance := probability(won.score))
        ]
        return RerankResult(ranking, self.trace)


def unread_outcome(depth: int, notes: tuple[str, ...], candidates: int, top_k: int, seconds: float) -> Outcome:
    """Return the outcome of a job of which no layer was computed in time: the caller's order.

    Args:
        depth: Number of layers of the model.
        notes: Remarks on the model.
        candidates: Number N of candidates.
        top_k: K, at most N.
        seconds: Seconds that the job had.
    """
    winners = [Winner(index, 0.0, True) for index in range(top_k)]
    return Outcome(winners, Trace((), depth, (0,) * candidates, (), seconds, notes=notes, cut_short=True))


def run_pass(
    model: CrossEncoder,
    jobs: Sequence[Job[Outcome]],
    *,
    slice_tokens: int,
    plan: MemoryPlan | None = None,
    recount: Recount | None = None,
    watch: Watch | None = None,
) -> None:
    """Take jobs through the layers together. Each ends as soon as it is decided, with an outcome or its own error.

    Args:
        model: The cross-encoder. Only one pass at a time may use it, unless all of it is resident.
        jobs: The jobs, at least one.
        slice_tokens: The most tokens that are computed at once.
        plan: The plan of the memory budget; None without a budget.
        recount: What decides close contests of a model in 8 bits; None if nothing does.
        watch: The watch that learns what a layer takes; None if nobody needs to know.

    Raises:
        Interrupted: Nobody waits for any of the jobs any more.
        FileError: Weights cannot be read. The jobs that have not ended stay so.
        StorageError: There is no room for hidden states. The jobs that have not ended stay so.
    """
    requests = [job.encoded for job in jobs]
    for job in jobs:
        job.begun = True
    mixed = model.kernels != "torch"  # compiled kernels give a token the same bits whatever is beside it
    batch = RaggedBatch.pack(requests, share_prefix=model.spec.causal, mixed=mixed)
    lengths = batch.lengths
    contests = [
        Contest(
            tuple(map(len, job.encoded)),
            job.pruning,
            job.top_k or len(job.encoded),
            model.depth,
            numbers=range(job.first_number, job.first_number + len(job.encoded)),
            abandoned=job.given_up,
            deadline=job.deadline,
            lengths=[lengths[number, candidate] for candidate in range(len(job.encoded))],
            highlighter=job.highlighter,
        )
        for number, job in enumerate(jobs)
    ]
    shared = {piece.request: piece.length for piece in batch.pieces if piece.candidate is None}
    peak = None if plan is None else PeakMemory(model.device)
    try:
        with room_for(model, batch, slice_tokens, plan) as hidden:
            for number in forward(
                model, batch, hidden, contests, slice_tokens=slice_tokens, peak=peak, watch=watch
            ):
                job, contest = jobs[number], contests[number]
                if recount is not None:
                    recount.settle(job, contest, slice_tokens=slice_tokens)
                if contest.error is not None:
                    job.fail(contest.error)
                    continue
                memory = None if peak is None else peak.bytes
                trace = trace_of(model, contest, requests[number], shared.get(number, 0), job.started, memory)
                job.finish(Outcome(contest.winners, trace, _highlights(model, contest, requests[number])))
    finally:
        model.rewind()


def _highlights(model: CrossEncoder, contest: Contest, candidates: Encoded) -> Mapping[int, tuple[Highlight, ...]]:
    if contest.highlighter is None:
        return {}
    return contest.highlighter.found(model, [won.index for won in contest.winners], candidates)


def trace_of(
    model: CrossEncoder | Classifier,
    contest: Contest,
    candidates: Encoded,
    shared: int,
    started: float,
    peak: int | None,
) -> Trace:
    """Return the trace of a contest that is over."""
    usage = contest.usage
    return Trace(
        layers=tuple(contest.layers),
        depth=contest.depth,
        lengths=tuple(sum(len(pair.input_ids) for pair in windows) for windows in candidates),
        truncated=tuple(index for index, windows in enumerate(candidates) if windows[0].truncated),
        windows=tuple(map(len, candidates)),
        shared_prefix=shared,
        seconds=perf_counter() - started,
        seconds_waited=usage.seconds_waited,
        bytes_read=usage.bytes_read,
        bytes_spilled=usage.bytes_spilled,
        embedding_hit_rate=usage.hit_rate,
        peak_memory=peak,
        kernels=model.kernels,
        recounted=contest.recounted,
        notes=model.notes,
        cut_short=contest.cut_short,
    )


@contextmanager
def room_for(
    model: CrossEncoder, batch: RaggedBatch, slice_tokens: int, plan: MemoryPlan | None
) -> Iterator[HiddenStates]:
    """Provide room for the hidden states of a batch: in memory, or on disk if the plan says so."""
    shape = (batch.tokens, model.width, model.dtype, model.device)
    if plan is None or not plan.spills(batch.tokens):
        yield HiddenInMemory(*shape)
        return
    rows = filled(slice_tokens)
    with HiddenOnDisk(*shape, rows=rows, directory=cache_directory(), meter=model.meter) as hidden:
        yield hidden
