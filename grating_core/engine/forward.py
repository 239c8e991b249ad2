"""The forward loop takes all candidates through a layer, and goes on with those that may still win.

This is monolithic forwarding with progressive pruning, as in GRATING (arXiv 2510.15620).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from time import perf_counter
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import pad

from grating_core.engine.attention import KeysKept, Packing, SharedKeys
from grating_core.engine.ragged import Chunk, RaggedBatch, filled
from grating_core.errors import ScoreError
from grating_core.forking import Interrupted
from grating_core.lens.features import Provisional, Reader, Sequences
from grating_core.lens.pruning import Pruning
from grating_core.memory.hidden import HiddenStates
from grating_core.memory.meter import Meter, PeakMemory
from grating_core.models.cross_encoder import CrossEncoder
from grating_core.pruning import PruningPolicy, Route
from grating_core.results import LayerTrace

Item = TypeVar("Item")


@dataclass(frozen=True)
class Winner:
    """A winner is a candidate of the top K: its index in the batch, its score, and whether that is an estimate."""

    index: int
    score: float
    estimated: bool


@dataclass(frozen=True)
class Outcome:
    """An outcome has the top K candidates, best first, a record of each layer computed, and what was used.

    Candidates that stopped early rank before those that went on, whatever their scores: scores of different layers
    do not compare.
    """

    winners: list[Winner]
    layers: list[LayerTrace]
    usage: Meter


@torch.inference_mode()
def forward(
    model: CrossEncoder,
    batch: RaggedBatch,
    hidden: HiddenStates,
    pruning: Pruning,
    *,
    top_k: int,
    chunk_tokens: int,
    first_number: int = 0,
    peak: PeakMemory | None = None,
    pause: Callable[[], bool] | None = None,
) -> Outcome:
    """Find the ``top_k`` candidates of a batch.

    Args:
        model: The cross-encoder.
        batch: N candidates, at least one, on the model's device.
        hidden: Room for the hidden states of the batch in chunks of this size. What is there is lost.
        pruning: How candidates stop early.
        top_k: Number of candidates to find, from 1 to N.
        chunk_tokens: The most tokens computed at once.
        first_number: The number by which the caller knows the first candidate; for messages.
        peak: The meter of peak memory, which looks after every layer; None for none.
        pause: Function that says whether to give up. It is asked first and before each chunk. None never gives up.

    Raises:
        Interrupted: ``pause`` said to give up.
        ScoreError: The model gave a score that is not finite.
        ValueError: The policy broke its contract.
    """
    if pause is not None and pause():
        raise Interrupted
    alive = np.arange(len(batch))
    winners: list[Winner] = []
    layers: list[LayerTrace] = []
    at_first = replace(model.meter)
    model.prepare(batch.input_ids)

    for number in range(0 if pruning.lens else 1, model.depth + 1):
        started, before = perf_counter(), replace(model.meter)
        scores = _run_layer(model, number, batch, hidden, chunk_tokens, pruning.lens, pause)
        _refuse_broken(scores, alive + first_number)

        wanted = top_k - len(winners)
        undecided = number < model.depth and wanted < len(alive)
        routes = _decide(pruning.policy, number, scores, wanted) if undecided else [Route.DEFERRED] * len(alive)
        layers.append(
            LayerTrace(
                layer=number,
                alive=_plain(alive),
                routes=tuple(routes),
                scores=_plain(scores),
                tokens=batch.tokens if number else 0,
                seconds=perf_counter() - started,
                seconds_waited=model.meter.seconds_waited - before.seconds_waited,
                bytes_read=model.meter.bytes_read - before.bytes_read,
            )
        )

        if peak is not None:
            peak.look()

        stop = () if pruning.exact else (Route.SELECTED,)
        stopped = [i for i, route in enumerate(routes) if route in stop]
        going_on = [i for i, route in enumerate(routes) if route not in (Route.DROPPED, *stop)]
        winners += _best(alive, scores, stopped, estimated=True)
        places = top_k - len(winners)
        decided = undecided and not pruning.exact and places in (0, len(going_on))
        if decided or number == model.depth:
            winners += _best(alive, scores, going_on, estimated=decided)[:places]
            break

        if len(going_on) < len(alive):
            if number:
                hidden.keep(batch.token_index(going_on))
            batch, alive = batch.select(going_on), alive[going_on]

    return Outcome(winners, layers, model.meter.since(at_first))


def _run_layer(
    model: CrossEncoder,
    number: int,
    batch: RaggedBatch,
    hidden: HiddenStates,
    chunk_tokens: int,
    lens: Provisional | None,
    pause: Callable[[], bool] | None,
) -> NDArray[np.float64]:
    """Put the hidden states through a layer and read every candidate's score after it; layer 0 only embeds."""
    last = number == model.depth
    read = _head(model, number) if last or lens is None else lens.reader(number, batch.prefix)
    chunks = list(batch.chunks(chunk_tokens))
    if not number:
        # Embedded again by the first layer, for those that are left: that costs less than keeping the states.
        positions = batch.positions()
        scores = [read(_embed(model, batch, chunk, positions), chunk) for chunk in _until(pause, chunks)]
    else:
        with model.layer(number):
            scores = list(_layer_scores(model, number, batch, hidden, chunks, read, pause))
    return _best_windows(torch.cat(scores).cpu().double().numpy(), batch.windows)


def _layer_scores(
    model: CrossEncoder,
    number: int,
    batch: RaggedBatch,
    hidden: HiddenStates,
    chunks: list[Chunk],
    read: Reader,
    pause: Callable[[], bool] | None,
) -> Iterator[Tensor]:
    """Put one chunk after another through the layer, and yield the scores of each."""
    first, last = number == 1, number == model.depth
    positions = batch.positions()
    shared = SharedKeys()
    for chunk, part in _until(pause, hidden.visit(chunks, read=not first, write=not last)):
        tokens = chunk.tokens.stop - chunk.tokens.start
        places = pad(positions[chunk.tokens], (0, chunk.rows - tokens))[None]
        if first:
            part[:, :tokens] = _embed(model, batch, chunk, positions)
        packing = Packing(chunk.lengths, chunk.prefix, shared)
        if last and model.reads_one_token:
            yield _last_layer_scores(model, part, places, packing)
            continue
        part[:, :tokens] = model.run_layer(number, part, places, attention=packing)[:, :tokens]
        yield read(part, chunk)


def _until(pause: Callable[[], bool] | None, chunks: Iterable[Item]) -> Iterator[Item]:
    """Yield the chunks until ``pause`` says to give up."""
    for chunk in chunks:
        if pause is not None and pause():
            raise Interrupted
        yield chunk


def _embed(model: CrossEncoder, batch: RaggedBatch, chunk: Chunk, positions: Tensor) -> Tensor:
    """Return the hidden states of a chunk before the first layer, ``[1, T, D]``."""
    return model.embed(
        batch.input_ids[None, chunk.tokens],
        batch.token_type_ids[None, chunk.tokens],
        positions[None, chunk.tokens],
    )


def _head(model: CrossEncoder, number: int) -> Reader:
    """Return a reader of the scores after a layer, by the model's own head."""

    def read(states: Tensor, sequences: Sequences) -> Tensor:
        return model.read_scores(number, states[:, sequences.prefix :], sequences.lengths)

    return read


def _last_layer_scores(model: CrossEncoder, hidden: Tensor, positions: Tensor, packing: Packing) -> Tensor:
    """Return the scores after the last layer, of which only the scoring positions are needed.

    These positions attend to the keys and values of other tokens. So the layer is called twice: for keys and
    values, where it ends, and then for the scoring positions alone.
    """
    packing.keep_keys = True
    with suppress(KeysKept):
        model.run_layer(model.depth, hidden, positions, attention=packing)
    count = len(packing.lengths)
    if not count:  # the prefix alone
        return hidden.new_empty(0, dtype=torch.float32)
    read = model.scoring_positions(packing.lengths) + packing.prefix
    read = pad(read, (0, filled(count) - count))
    output = model.run_layer(model.depth, hidden[:, read], positions[:, read], attention=packing)
    return model.read_scores(model.depth, output, (1,) * count)


def _best_windows(scores: NDArray[np.float64], windows: tuple[int, ...]) -> NDArray[np.float64]:
    """Return the score of each candidate's best window; NaN if a window of it has one that is not finite."""
    starts = np.cumsum((0, *windows[:-1]))
    best: NDArray[np.float64] = np.maximum.reduceat(scores, starts)
    finite = np.logical_and.reduceat(np.isfinite(scores), starts)
    return np.where(finite, best, np.nan)


def _refuse_broken(scores: NDArray[np.float64], numbers: NDArray[np.intp]) -> None:
    broken = numbers[~np.isfinite(scores)]
    if len(broken):
        raise ScoreError(
            f"the model's score for document {broken[0]} is not a finite number ({len(broken)} such documents); "
            f"the weights are damaged, or overflow in this dtype: try dtype='float32'"
        )


def _decide(policy: PruningPolicy, number: int, scores: NDArray[np.float64], wanted: int) -> list[Route]:
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


def _best(
    alive: NDArray[np.intp], scores: NDArray[np.float64], chosen: list[int], *, estimated: bool
) -> list[Winner]:
    """Return the chosen candidates by falling score; equal scores keep their order."""
    order = sorted(chosen, key=lambda i: -scores[i])
    return [Winner(int(alive[i]), float(scores[i]), estimated) for i in order]


def _plain(array: NDArray[Any]) -> tuple[Any, ...]:
    return tuple(array.tolist())
