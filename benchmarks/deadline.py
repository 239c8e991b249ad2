"""How good a ranking is that had to be there in time, and by how much deadlines are overrun.

    make bench-deps
    .venv/bin/python -m benchmarks.deadline --data DIRECTORY

The directory holds the collections cranfield, cisi and locomo. BM25's top candidates of a few queries of each are
first reranked without pruning and without a deadline, which gives each request's time and the full model's top K.
The same requests then have shares of that time as deadlines. Agreement is the share of the full model's top K that
comes back.

``deadline-overrun`` has many calls with random deadlines. A deadline may be overrun by one slice: the time of the
request's longest slice is that share of its longest layer without pruning.

The ways to spend too little time are compared by replays of the same requests from their scores, where tokens ×
layers are the time: the way that the engine takes; to go on with all that margins leave and stop when the time is
over; and to drop at once so many that the rest can be computed to the end.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from statistics import mean, median
from time import perf_counter
from typing import Annotated

import numpy as np
import typer
from numpy.typing import NDArray
from rich.progress import track

from benchmarks.collections import Request, load_requests
from benchmarks.recorded import Array, Recorded, record_corpus
from benchmarks.replay import agreement
from benchmarks.report import RESULTS, Output, Row, write_result
from benchmarks.worker import progress
from grating_core import Reranker, Route
from grating_core.lens.store import CalibratedLens
from grating_core.pruning import MarginPolicy
from grating_core.pruning.deadline import Costs, Race

COLLECTIONS = ("cranfield", "cisi", "locomo")
SHARES = (0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6, 0.75, 1.0)
TARGET = 0.98
MEASURED, MIXED, STOP, FINISH = "measured", "mixed", "stop when it is over", "drop at once"

_RANDOM = (0.02, 1.2)  # random deadlines, as shares of the time without pruning


@dataclass(frozen=True)
class Timed:
    """A request with the full model's top K, and what that took.

    Attributes:
        collection: Name of the collection.
        request: The request.
        best: The full model's top K, best first.
        seconds: Seconds without pruning.
        slice_seconds: Seconds of its longest slice.
    """

    collection: str
    request: Request
    best: list[int]
    seconds: float
    slice_seconds: float


def time_unpruned(off: Reranker, collection: str, request: Request, *, top_k: int, rounds: int) -> Timed:
    """Rerank a request without pruning, again and again, for its median time."""
    seconds, slices = [], []
    for _ in range(rounds):
        started = perf_counter()
        result = off.rerank(request.query, request.documents, top_k)
        seconds.append(perf_counter() - started)
        computed = [layer for layer in result.trace.layers if layer.tokens]
        share = min(1.0, off.scorer.slice_tokens / computed[0].tokens)
        slices.append(share * max(layer.seconds for layer in computed))
    best = [ranked.index for ranked in result.ranking]
    return Timed(collection, request, best, median(seconds), median(slices))


def measure(reranker: Reranker, timed: Sequence[Timed], share: float, *, top_k: int) -> list[Row]:
    """Rerank requests with a share of their time; a row for each collection."""
    found: dict[str, list[tuple[float, float, float, float]]] = {}
    for one in timed:
        deadline = share * one.seconds
        started = perf_counter()
        result = reranker.rerank(one.request.query, one.request.documents, top_k, deadline=deadline)
        seconds = perf_counter() - started
        ranking = [ranked.index for ranked in result.ranking]
        estimated = mean(ranked.estimated for ranked in result.ranking)
        kept = agreement(ranking, one.best), float(ranking[0] == one.best[0])
        found.setdefault(one.collection, []).append((*kept, seconds / one.seconds, estimated))
    return [
        {
            "collection": name,
            "way": MEASURED,
            "share": share,
            "requests": len(rows),
            "agreement": mean(row[0] for row in rows),
            "agreement_1": mean(row[1] for row in rows),
            "share_taken": mean(row[2] for row in rows),
            "estimated": mean(row[3] for row in rows),
        }
        for name, rows in found.items()
    ]


Step = Callable[[Race, float], list[Route]]
"""A function that routes the candidates of a race in some seconds."""


def mixed(race: Race, seconds: float) -> list[Route]:
    """Route as the engine does."""
    return race.routes(_costs(race), 0, seconds)


def _costs(race: Race) -> Costs:
    """Return costs by which a token takes a second in each layer."""
    return Costs(np.zeros(len(race.errors)), np.ones(len(race.errors)))


def keep_all(race: Race, seconds: float) -> list[Route]:
    """Let all go on until the time is over."""
    return [Route.DEFERRED] * len(race.scores)


def drop_at_once(race: Race, seconds: float) -> list[Route]:
    """Keep the best that can be computed to the end, K at least."""
    order = np.argsort(-race.scores, kind="stable")
    fits = np.cumsum(race.tokens[order]) * len(race.errors) <= seconds
    kept = set(order[: max(race.wanted, int(fits.sum()))].tolist())
    return [Route.DEFERRED if one in kept else Route.DROPPED for one in range(len(order))]


def replay(
    scores: Array,
    tokens: NDArray[np.int64],
    policy: MarginPolicy,
    errors: Array,
    top_k: int,
    share: float,
    step: Step,
) -> list[int]:
    """Rank one request in a share of its tokens × layers.

    Args:
        scores: Estimates after layers 0 to L - 1, and the final scores, float64 ``[N, L + 1]``.
        tokens: Tokens of each candidate, int64 ``[N]``.
        policy: The margins without a deadline.
        errors: Typical errors of the estimates, float64 ``[L]``.
        top_k: K.
        share: The share.
        step: What decides when time is short.
    """
    depth = len(errors)
    left = share * depth * float(tokens.sum())
    alive, winners, reached = np.arange(len(tokens)), list[int](), 0
    for layer in range(depth + 1):
        cost = float(tokens[alive].sum()) if layer else 0.0
        if cost > left:
            break
        left, reached = left - cost, layer
        wanted = top_k - len(winners)
        if layer == depth or not 0 < wanted < len(alive):
            continue
        seen = scores[alive, layer]
        going_on = np.array([route is not Route.DROPPED for route in policy.route(layer, seen, wanted)])
        alive, seen = alive[going_on], seen[going_on]
        if wanted == len(alive):
            continue
        looks = np.ones(depth - layer, dtype=bool)
        race = Race(seen, wanted, tokens[alive], errors[layer:], looks, np.array(policy.drop[layer:]))
        if race.fits(_costs(race), 0, left):
            continue
        routes = np.array(step(race, left))
        chosen = alive[routes == Route.SELECTED]
        winners += chosen[np.argsort(-scores[chosen, layer], kind="stable")].tolist()
        alive = alive[routes == Route.DEFERRED]
    winners += alive[np.argsort(-scores[alive, reached], kind="stable")].tolist()
    return winners[:top_k]


def compare_ways(corpus: Recorded, lens: CalibratedLens, *, top_k: int) -> list[Row]:
    """Replay the requests of a collection in all ways; a row for each way and share."""
    seen = corpus.estimates(lens)
    policy = lens.margins.policy(seen.shape[1], top_k, target=TARGET, guarantee="share", exact=True)
    best = [np.argsort(-one, kind="stable")[:top_k].tolist() for one in seen[:, :, -1]]
    rows = []
    for way, step in {MIXED: mixed, STOP: keep_all, FINISH: drop_at_once}.items():
        for share in SHARES:
            rankings = [
                replay(one, tokens, policy, lens.margins.drop, top_k, share, step)
                for one, tokens in zip(seen, corpus.tokens, strict=True)
            ]
            rows.append(
                {
                    "collection": corpus.name,
                    "way": way,
                    "share": share,
                    "requests": len(rankings),
                    "agreement": mean(map(agreement, rankings, best)),
                    "agreement_1": mean(
                        float(one[0] == first[0]) for one, first in zip(rankings, best, strict=True)
                    ),
                    "share_taken": None,
                    "estimated": None,
                }
            )
    return rows


def with_means(rows: Sequence[Row]) -> list[Row]:
    """Return the rows, and the means over the collections for each way and share."""
    means = []
    for way, share in dict.fromkeys((row["way"], row["share"]) for row in rows):
        alike = [row for row in rows if (row["way"], row["share"]) == (way, share)]
        figures = {
            name: mean(row[name] for row in alike)
            for name in ("agreement", "agreement_1", "share_taken", "estimated")
            if alike[0][name] is not None
        }
        means.append(
            alike[0] | {"collection": "mean", "requests": sum(row["requests"] for row in alike)} | figures
        )
    return [*rows, *means]


def measure_overrun(reranker: Reranker, timed: Sequence[Timed], calls: int, *, top_k: int) -> Row:
    """Make calls with random deadlines, and count by how much they are overrun."""
    source = np.random.default_rng(0)
    slices, seconds = [], []
    for one in track(islice(cycle(timed), calls), "random deadlines", total=calls, console=progress):
        deadline = source.uniform(*_RANDOM) * one.seconds
        started = perf_counter()
        reranker.rerank(one.request.query, one.request.documents, top_k, deadline=deadline)
        over = perf_counter() - started - deadline
        slices.append(over / one.slice_seconds)
        seconds.append(over)
    return {
        "calls": calls,
        "in_time": float(np.mean(np.array(slices) <= 0)),
        "within_a_slice": float(np.mean(np.array(slices) <= 1)),
        "slice_ms": 1000 * mean(one.slice_seconds for one in timed),
        "overrun_ms_99": 1000 * float(np.percentile(seconds, 99)),
        "overrun_slices_99": float(np.percentile(slices, 99)),
        "overrun_slices_most": max(slices),
    }


def main(
    data: Annotated[Path, typer.Option(help=f"Holds {', '.join(COLLECTIONS)}, in BEIR layout.")],
    model: Annotated[str, typer.Option(help="One with a lens.")] = "bundled:ms-marco-minilm-l12",
    candidates: Annotated[int, typer.Option(help="Candidates of a query.")] = 20,
    top_k: Annotated[int, typer.Option(help="K.")] = 5,
    requests: Annotated[int, typer.Option(help="Queries of each collection.")] = 30,
    calls: Annotated[int, typer.Option(help="Calls with random deadlines.")] = 1000,
    rounds: Annotated[int, typer.Option(help="How often each request is timed without pruning.")] = 3,
    output: Output = RESULTS,
) -> None:
    """Measure, and write the two files of results whose names begin with deadline."""
    asked = {name: load_requests(data / name, candidates=candidates, queries=requests) for name in COLLECTIONS}
    timed = list[Timed]()
    with Reranker.from_pretrained(model, pruning="off") as off:
        for name, own in asked.items():
            off.rerank(own[0].query, own[0].documents, top_k)  # warm up
            for request in track(own, f"{name}: reranking without pruning", console=progress):
                timed.append(time_unpruned(off, name, request, top_k=top_k, rounds=rounds))
    with Reranker.from_pretrained(model) as reranker:
        if (lens := reranker.lens) is None:
            raise typer.BadParameter(f"--model {model} has no lens: calibrate one with 'grating calibrate'")
        for one in timed[:3]:  # warm up, and learn what a layer takes
            reranker.rerank(one.request.query, one.request.documents, top_k)
        rows = list[Row]()
        for share in track(SHARES, "deadlines", console=progress):
            rows += measure(reranker, timed, share, top_k=top_k)
        overrun = measure_overrun(reranker, timed, calls, top_k=top_k)
        for name, own in asked.items():
            rows += compare_ways(record_corpus(reranker, name, own, candidates), lens, top_k=top_k)
    setting = {"model": model, "candidates": candidates, "top_k": top_k, "requests": len(timed)}
    setting |= {"seconds": mean(one.seconds for one in timed)}
    write_result(output, "deadline", with_means(rows), rounds=1, setting=setting)
    write_result(output, "deadline-overrun", [overrun], rounds=1, setting=setting)


if __name__ == "__main__":
    typer.run(main)
