"""The forward loop takes all candidates through a layer, and goes on with those that may still win.

This is monolithic forwarding with progressive pruning, as in GRATING (arXiv 2510.15620).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import accumulate, pairwise
from time import perf_counter
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from grating_core.engine.contest import Contest, Scores
from grating_core.engine.head import HeadReader
from grating_core.engine.highlights import Highlighter
from grating_core.engine.ragged import RaggedBatch, Slice
from grating_core.engine.walk import Walk
from grating_core.engine.watch import Watch
from grating_core.forking import Interrupted
from grating_core.kernels.operands import Seen
from grating_core.kernels.room import Room
from grating_core.layers.rotary import Angles
from grating_core.layers.sending import sent
from grating_core.layers.spec import Rotary
from grating_core.lens.features import Provisional, Reader
from grating_core.memory.hidden import HiddenInMemory, HiddenStates
from grating_core.memory.meter import Meter, PeakMemory
from grating_core.models.cross_encoder import CrossEncoder

See = Callable[[Tensor, Slice], None]
"""A function that is given the states after a layer of the tokens that are asked for, and their slice."""


@torch.inference_mode()
def forward(
    model: CrossEncoder,
    batch: RaggedBatch,
    hidden: HiddenStates,
    contests: Sequence[Contest],
    *,
    slice_tokens: int,
    peak: PeakMemory | None = None,
    watch: Watch | None = None,
) -> Iterator[int]:
    """Take a pass through the layers, and yield the number of each request as soon as its contest is over.

    Args:
        model: The cross-encoder.
        batch: The candidates of all requests.
        hidden: Room for the hidden states of the batch in slices of this size. What is there is lost.
        contests: The contests of the requests.
        slice_tokens: The most tokens computed at once.
        peak: The meter of peak memory, which looks after every layer; None for none.
        watch: The watch that learns what a layer takes; None if nobody needs to know.

    Raises:
        Interrupted: Nobody waits for any of the requests any more.
        FileError: Weights cannot be read.
    """
    before = [replace(model.meter)] * len(contests)  # when each request was last asked about
    unread: list[_Unread] = []
    left = sum(len(contest.alive) for contest in contests)
    model.prepare(batch.input_ids)
    room = Room()
    angles = model.angles(torch.arange(batch.longest, device=model.device))
    highlighters = {
        request: contest.highlighter for request, contest in enumerate(contests) if contest.highlighter is not None
    }
    embedded = False  # whether the states before the first layer are there
    stint = _Stint(watch)
    for number in range(model.depth + 1):
        tokens_left = _tokens(batch, contests)
        for request, contest in enumerate(contests):
            if contest.alive:
                contest.look_at_the_clock(number, tokens_left)
                if not contest.alive:
                    yield request
        still = sum(len(contest.alive) for contest in contests)
        if not still:
            return
        if still < left:
            left = still
            batch, runs = batch.select({request: contest.alive for request, contest in enumerate(contests)})
            if number > 1 or embedded:
                hidden.keep(runs)
        started = perf_counter()
        readers = {
            request: reader
            for request, contest in enumerate(contests)
            if contest.reads(number) and (reader := _reader(model, number, contest.pruning.lens)) is not None
        }
        if not number and not readers:  # before the first layer, only a lens reads scores
            continue

        def see(
            states: Tensor, part: Slice, number: int = number, readers: Mapping[int, Reader] = readers
        ) -> None:
            if all(contest.abandoned() for contest in contests if contest.alive):
                raise Interrupted
            for request, asked in part.asked_by_request:
                if request in readers:
                    readers[request].see(states, asked)

        for _ in run_layer(
            model, number, batch, hidden, angles, slice_tokens, room, see, highlighters, embed=not embedded
        ):
            for request in _late(contests, model.device):
                contests[request].end()
                yield request
            if not any(contest.alive for contest in contests):
                return
        # States that are kept on disk are embedded again by the first layer: that costs less than keeping them.
        embedded = bool(number) or isinstance(hidden, HiddenInMemory)
        if peak is not None:
            peak.look()
        if number:
            stint.add(batch.tokens, last=number == model.depth)
            if model.device.type == "cpu":  # another device has done nothing yet, perhaps
                stint.end()
        tokens = batch.tokens_by_request
        now = replace(model.meter)
        for request, contest in enumerate(contests):
            reader = readers.get(request)
            if reader is None and not (number and contest.follows(number)):
                continue
            scores = torch.empty(0, device=model.device) if reader is None else reader.scores()
            usage, before[request] = now.since(before[request]), now
            count, seconds = tokens[request] if number else 0, perf_counter() - started
            unread.append(_Unread(request, number, scores, count, seconds, usage))
        if not any(contests[request].decides(number) for request in readers):
            continue
        found = _read(unread)
        stint.end()
        for one, read in zip(unread, found, strict=True):
            contest = contests[one.request]
            if contest.alive:
                seconds = perf_counter() - started if one.number == number else one.seconds
                contest.after(one.number, read, one.tokens, seconds, one.usage)
                if not contest.alive:
                    yield one.request
        unread.clear()


def _tokens(batch: RaggedBatch, contests: Sequence[Contest]) -> int:
    """Count the tokens of all that are alive. The batch may still have others."""
    alive = [{None, *contest.alive} if contest.alive else set() for contest in contests]
    return sum(piece.length for piece in batch.pieces if piece.candidate in alive[piece.request])


def _late(contests: Sequence[Contest], device: torch.device) -> list[int]:
    """Return the requests whose deadline is over. Work of another device is waited for if a deadline is near."""
    if device.type != "cpu" and any(contest.alive and contest.is_near for contest in contests):
        torch.accelerator.synchronize(device)
    return [request for request, contest in enumerate(contests) if contest.is_late()]


class _Stint:
    """A stint is the work between two moments at which the device had done everything.

    Args:
        watch: The watch that learns from it; None for none.
    """

    def __init__(self, watch: Watch | None) -> None:
        self._watch = watch
        self._begin()

    def add(self, tokens: int, *, last: bool) -> None:
        """Add a layer with so many tokens, which may be the model's last."""
        self._layers += 1
        self._tokens += tokens
        self._last = last

    def end(self) -> None:
        """Tell the watch, and begin another stint."""
        if self._watch is not None:
            seconds = self._watch.now() - self._started
            self._watch.learn(self._layers, self._tokens, seconds, last=self._last)
        self._begin()

    def _begin(self) -> None:
        self._layers = self._tokens = 0
        self._last = False
        self._started = 0.0 if self._watch is None else self._watch.now()


class _Unread(NamedTuple):
    """This class holds scores of a request that may not be computed yet, and how they came about.

    There are no scores of a layer that is not looked at.
    """

    request: int
    number: int
    scores: Tensor
    tokens: int
    seconds: float
    usage: Meter


def _read(unread: Sequence[_Unread]) -> list[Scores]:
    """Return the scores as numbers. This waits for the device, once for all of them."""
    found = (torch.cat([one.scores for one in unread]) if len(unread) > 1 else unread[0].scores).cpu()
    scores = found.numpy().astype(np.float64)
    ends = list(accumulate((len(one.scores) for one in unread), initial=0))
    return [scores[start:end] for start, end in pairwise(ends)]


def _reader(model: CrossEncoder, number: int, lens: Provisional | None) -> Reader | None:
    """Return what reads a request's scores after a layer; None if nothing does."""
    if lens is not None and number < model.depth:
        return lens.reader(number)
    return HeadReader(model, number) if number else None


def run_layer(
    model: CrossEncoder,
    number: int,
    batch: RaggedBatch,
    hidden: HiddenStates,
    angles: Mapping[Rotary, Angles],
    slice_tokens: int,
    room: Room,
    see: See,
    highlighters: Mapping[int, Highlighter],
    *,
    embed: bool,
) -> Iterator[None]:
    """Put the hidden states through a layer, slice by slice, and show them afterwards; layer 0 only embeds.

    Yields:
        None before each slice. Whoever asks for no more abandons the layer.
    """
    if not number:
        for part, states in hidden.visit(batch.slices(slice_tokens), read=False, write=False):
            yield
            if part.queries:
                see(_embed(model, batch, part, states), part)
        return
    last = number == model.depth
    slices = batch.slices(slice_tokens, model.spec.pooling if last else "mean")
    with model.layer(number) as layer:
        turned = None if layer.spec.rotary is None else angles[layer.spec.rotary]

        looking = {request: one for request, one in highlighters.items() if one.wants(number)}

        def look(part: Slice, states: Tensor, query: Tensor, seen: Seen) -> None:
            for request, highlighter in looking.items():
                highlighter.see(number, layer, part, request, states, query, seen)

        walk = Walk(layer, turned, room, look if looking else None)
        for part, states in hidden.visit(slices, read=not embed, write=not last):
            yield
            tokens = part.tokens.stop - part.tokens.start
            if embed:
                _embed(model, batch, part, states)
            rows = part.rows if layer.fills else tokens
            places = None
            if layer.spec.rotary is not None:
                places = sent(pad(batch.positions[part.tokens], (0, rows - tokens)), model.device)
            output = walk.step(part, states[:rows], places)
            if part.changed and not last and output.data_ptr() != states.data_ptr():
                states[:tokens] = output[:tokens]
            see(output, part)


def _embed(model: CrossEncoder, batch: RaggedBatch, part: Slice, states: Tensor) -> Tensor:
    """Write the states of a slice before the first layer into its first rows, and return these, ``[T, D]``."""
    tokens = part.tokens
    output = states[: tokens.stop - tokens.start]
    model.embed(batch.input_ids[tokens], batch.token_type_ids[tokens], batch.positions[tokens], output)
    return output
