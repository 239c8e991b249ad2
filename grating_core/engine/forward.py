"""The forward loop: all candidates together, layer by layer, and after each layer only those that may still win.

Monolithic forwarding and progressive pruning as in GRATING (arXiv 2510.15620).
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from grating_core.engine.attention import KeysKept, Packing
from grating_core.engine.ragged import Chunk, RaggedBatch
from grating_core.errors import PolicyError, ScoreError
from grating_core.models.cross_encoder import CrossEncoder
from grating_core.pruning import PruningPolicy, Route
from grating_core.results import LayerTrace


@dataclass(frozen=True)
class Winner:
    """A candidate of the top K: its index in the batch, its score, and whether that is only an estimate."""

    index: int
    score: float
    estimated: bool


@dataclass(frozen=True)
class Outcome:
    """What a forward comes to: the top K candidates, best first, and a record of each layer computed.

    Candidates that stopped early rank before those that went on, whatever the numbers: scores of different
    layers do not compare.
    """

    winners: list[Winner]
    layers: list[LayerTrace]


@torch.inference_mode()
def forward(
    model: CrossEncoder,
    batch: RaggedBatch,
    *,
    top_k: int,
    policy: PruningPolicy,
    exact: bool = True,
    chunk_tokens: int,
    first_number: int = 0,
) -> Outcome:
    """Find the ``top_k`` candidates of a batch.

    Args:
        model: The cross-encoder.
        batch: N candidates, at least one, on the model's device.
        top_k: How many to find, from 1 to N.
        policy: Decides after each layer which candidates go on.
        exact: Compute every winner to the last layer; the policy only drops. Otherwise what it selects stops
            as well, and keeps its provisional score as an estimate.
        chunk_tokens: Most tokens computed at once.
        first_number: What the caller calls the first candidate; for messages.

    Raises:
        ScoreError: The model gave a score that is not finite.
        PolicyError: The policy broke its contract.
    """
    alive = np.arange(len(batch))
    winners: list[Winner] = []
    layers: list[LayerTrace] = []
    positions = batch.positions()[None]
    hidden = _embed(model, batch, positions, chunk_tokens)

    for number in range(1, model.depth + 1):
        started = perf_counter()
        scores = _run_layer(model, number, hidden, positions, batch, chunk_tokens)
        _refuse_broken(scores, alive + first_number)

        wanted = top_k - len(winners)
        pruning = number < model.depth and wanted < len(alive)
        routes = _decide(policy, number, scores, wanted) if pruning else [Route.DEFERRED] * len(alive)
        seconds = perf_counter() - started
        layers.append(LayerTrace(number, _plain(alive), tuple(routes), _plain(scores), batch.tokens, seconds))

        stop = () if exact else (Route.SELECTED,)
        stopped = [i for i, route in enumerate(routes) if route in stop]
        going_on = [i for i, route in enumerate(routes) if route not in (Route.DROPPED, *stop)]
        winners += _best(alive, scores, stopped, estimated=True)
        places = top_k - len(winners)
        decided = pruning and not exact and places in (0, len(going_on))
        if decided or number == model.depth:
            winners += _best(alive, scores, going_on, estimated=decided)[:places]
            break

        if len(going_on) < len(alive):
            index = batch.token_index(going_on)
            hidden, positions = hidden[:, index], positions[:, index]
            batch, alive = batch.select(going_on), alive[going_on]

    return Outcome(winners, layers)


def _embed(model: CrossEncoder, batch: RaggedBatch, positions: Tensor, chunk_tokens: int) -> Tensor:
    """Hidden states before the first layer."""
    ids, types = batch.input_ids[None], batch.token_type_ids[None]
    spans = [chunk.tokens for chunk in batch.chunks(chunk_tokens)]
    return torch.cat([model.embed(ids[:, s], types[:, s], positions[:, s]) for s in spans], dim=1)


def _run_layer(
    model: CrossEncoder, number: int, hidden: Tensor, positions: Tensor, batch: RaggedBatch, chunk_tokens: int
) -> NDArray[np.float64]:
    """Put the hidden states through a layer, in place, and read every candidate's score after it."""
    scores = []
    for chunk in batch.chunks(chunk_tokens):
        part, places = hidden[:, chunk.tokens], positions[:, chunk.tokens]
        if number == model.depth and model.reads_first_token:
            scores.append(_last_layer_scores(model, part, places, chunk))
            continue
        part[:] = model.run_layer(number, part, places, packing=Packing(chunk.lengths))
        scores.append(model.read_scores(part, chunk.lengths))
    return torch.cat(scores).cpu().double().numpy()


def _last_layer_scores(model: CrossEncoder, hidden: Tensor, positions: Tensor, chunk: Chunk) -> Tensor:
    """Scores after the last layer, where nothing but the scoring positions needs to come out.

    They still attend to the keys and values of every token. So the layer is called twice: for its keys and
    values, ending there, and then for the scoring positions alone.
    """
    packing = Packing(chunk.lengths, keep_keys=True)
    with suppress(KeysKept):
        model.run_layer(model.depth, hidden, positions, packing=packing)
    lengths = torch.tensor(chunk.lengths, device=hidden.device)
    first = lengths.cumsum(0) - lengths
    output = model.run_layer(model.depth, hidden[:, first], positions[:, first], packing=packing)
    return model.read_scores(output, (1,) * len(chunk.lengths))


def _refuse_broken(scores: NDArray[np.float64], numbers: NDArray[np.intp]) -> None:
    broken = numbers[~np.isfinite(scores)]
    if len(broken):
        raise ScoreError(
            f"the model's score for document {broken[0]} is not a finite number ({len(broken)} such documents); "
            f"the weights are damaged, or overflow in this dtype: try dtype='float32'"
        )


def _decide(policy: PruningPolicy, number: int, scores: NDArray[np.float64], wanted: int) -> list[Route]:
    """The policy's routes, once they are known to leave ``wanted`` candidates."""
    try:
        routes = [Route(route) for route in policy.route(number, scores, wanted)]
    except ValueError as error:
        raise PolicyError(f"{policy!r} after layer {number} gave something that is no route: {error}") from error
    selected, dropped = routes.count(Route.SELECTED), routes.count(Route.DROPPED)
    if len(routes) != len(scores) or selected > wanted or len(routes) - dropped < wanted:
        raise PolicyError(
            f"{policy!r} after layer {number} gave {len(routes)} routes for {len(scores)} candidates, {selected} "
            f"selected and {dropped} dropped, where {wanted} are wanted"
        )
    return routes


def _best(
    alive: NDArray[np.intp], scores: NDArray[np.float64], chosen: list[int], *, estimated: bool
) -> list[Winner]:
    """The chosen candidates by falling score; equal scores keep their order."""
    order = sorted(chosen, key=lambda i: -scores[i])
    return [Winner(int(alive[i]), float(scores[i]), estimated) for i in order]


def _plain(array: NDArray[Any]) -> tuple[Any, ...]:
    return tuple(array.tolist())
