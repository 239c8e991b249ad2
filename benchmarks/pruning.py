"""What pruning saves and what it loses, on real collections with human judgements.

    make bench-deps
    .venv/bin/python -m benchmarks.pruning --data DIRECTORY

The directory holds the collections cranfield, cisi and locomo. BM25's top candidates of each query are computed
once without pruning, and what each policy would have done with them is replayed from the scores: the lens with its
targets, and its peers, ``cluster`` and SEE. The default, and no pruning, rerank a few queries for real as well,
which gives the latency and checks the replay. The lens is the one that comes with the model; it has seen none of
the three.

Agreement is the share of the full model's top K that is returned. P@K counts documents that people judged
relevant, of as many as could be. Compute share is tokens × layers, of those without pruning.

``pruning-layers`` says how well each layer's reading ranks the candidates, by the model's own head and by the
lens. ``pruning-promise`` says whether the promise holds: of the requests of all collections a random half gives
the margins, and with the other half it is seen how much of the top K is kept, again and again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from statistics import mean, median
from typing import Annotated, Any

import numpy as np
import typer
from rich.progress import track

from benchmarks.collections import Request, load_requests
from benchmarks.recorded import Array, Recorded, record_corpus
from benchmarks.replay import Outcome, SimilarityExit, agreement, ndcg, precision, replay
from benchmarks.report import RESULTS, Output, Row, write_result
from benchmarks.worker import progress
from grating_core import ClusterPolicy, PruningPolicy, Reranker
from grating_core.engine.observing import layered
from grating_core.lens.features import look_costs
from grating_core.lens.fit import gamma
from grating_core.lens.store import CalibratedLens
from grating_core.models.cross_encoder import Shape
from grating_core.pruning import Margins, Off
from grating_core.pruning.conformal import Requests, calibrate_margins, replay_pruning

COLLECTIONS = ("cranfield", "cisi", "locomo")
TOP_K = (1, 5, 10)
DEFAULT = 0.98
MEAN = "mean"


@dataclass(frozen=True)
class Setting:
    """A policy, its target or threshold, and whether what it returns was computed to the end."""

    policy: str
    value: float | None = None
    exact: bool = True

    def make(self, lens: CalibratedLens, candidates: int, top_k: int) -> PruningPolicy:
        """Return the policy of requests with N candidates."""
        if self.value is None:
            return Off()
        if self.policy == "cluster":
            return ClusterPolicy(self.value)
        if self.policy == "SEE":
            return SimilarityExit(self.value)
        return lens.margins.policy(candidates, top_k, target=self.value, guarantee="share", exact=self.exact)


SETTINGS = (
    Setting("off"),
    *(
        Setting("lens", target, exact)
        for exact in (True, False)
        for target in (0.8, 0.85, 0.9, 0.95, DEFAULT, 0.99, 0.995)
    ),
    *(Setting("cluster", threshold) for threshold in (0.5, 1.0, 2.0, 4.0, 16.0)),
    *(Setting("SEE", threshold) for threshold in (0.1, 0.3, 0.5, 0.7)),
)


def replay_setting(corpus: Recorded, lens: CalibratedLens, setting: Setting, top_k: int) -> list[Outcome]:
    """Say what a setting makes of every request."""
    seen = corpus.estimates(lens) if setting.policy == "lens" else corpus.head.copy()
    if setting.policy == "SEE":
        seen[:, :, 0] = corpus.similarities
    policy = setting.make(lens, seen.shape[1], top_k)
    first = 0 if setting.policy in ("SEE", "lens") else 1
    return [
        replay(one, tokens, policy, top_k, prefix=prefix, exact=setting.exact, first=first)
        for one, tokens, prefix in zip(seen, corpus.tokens, corpus.prefixes.tolist(), strict=True)
    ]


def summarise(corpus: Recorded, lens: CalibratedLens) -> list[Row]:
    """Make a row of each setting and K."""
    rows = []
    for top_k, setting in track(list(product(TOP_K, SETTINGS)), f"{corpus.name}: replaying", console=progress):
        outcomes = replay_setting(corpus, lens, setting, top_k)
        full = replay_setting(corpus, lens, SETTINGS[0], top_k)
        rankings = [outcome.ranking for outcome in outcomes]
        rows.append(
            {
                "collection": corpus.name,
                "policy": setting.policy,
                "value": setting.value,
                "scores": "exact" if setting.exact else "estimated",
                "top_k": top_k,
                "requests": len(outcomes),
                "compute_share": mean(outcome.compute_share for outcome in outcomes),
                "agreement": mean(map(agreement, rankings, (outcome.ranking for outcome in full))),
                "precision": mean(map(precision, rankings, corpus.requests)),
                "ndcg_10": ndcg(rankings, corpus.requests),
            }
        )
    return rows


def with_means(rows: Sequence[Row], *names: str) -> list[Row]:
    """Return the rows, and the means over the collections of the named figures, for each setting and K."""
    keys = ("policy", "value", "scores", "top_k")
    means = []
    for key in dict.fromkeys(tuple(row[name] for name in keys) for row in rows):
        alike = [row for row in rows if tuple(row[name] for name in keys) == key]
        figures = {name: mean(row[name] for row in alike) for name in names}
        means.append(alike[0] | {"collection": MEAN, "requests": sum(row["requests"] for row in alike)} | figures)
    return [*rows, *means]


def measure(
    model: str, corpus: Recorded, requests: Sequence[Request], lens: CalibratedLens, *, top_k: int, rounds: int
) -> Row:
    """Rerank for real, with the default and without pruning, in turn; and compare with the replay."""
    default = Setting("lens", DEFAULT)
    replayed = replay_setting(corpus, lens, default, top_k)
    seconds: dict[str, list[float]] = {"off": [], "auto": []}
    differences = []
    with Reranker.from_pretrained(model, pruning="off") as off, Reranker.from_pretrained(model) as auto:
        systems = {"off": off, "auto": auto}
        for reranker in systems.values():  # warm up
            reranker.rerank(requests[0].query, requests[0].documents, top_k)
        pairs = list(zip(requests, replayed, strict=False))  # only the first are reranked
        for request, expected in track(pairs, f"{corpus.name}: reranking", console=progress):
            taken: dict[str, list[float]] = {"off": [], "auto": []}
            for _ in range(rounds):
                for name, reranker in systems.items():
                    result = reranker.rerank(request.query, request.documents, top_k)
                    taken[name].append(result.trace.seconds)
            differences.append(1 - agreement(expected.ranking, [one.index for one in result.ranking]))
            for name, times in taken.items():
                seconds[name].append(median(times))
    return {
        "collection": corpus.name,
        "requests": len(requests),
        "top_k": top_k,
        "seconds_off": mean(seconds["off"]),
        "seconds_auto": mean(seconds["auto"]),
        "share_of_time": mean(seconds["auto"]) / mean(seconds["off"]),
        "compute_share": mean(one.compute_share for one in replayed[: len(requests)]),
        "replay_differs_by_at_most": max(differences),
    }


def read_layers(corpus: Recorded, lens: CalibratedLens) -> list[Row]:
    """Say how well each layer's reading ranks the candidates: the mean γ with the final scores."""
    final = corpus.head[:, :, -1]

    def gammas(seen: Array) -> list[float]:
        pairs = [zip(layer, final, strict=True) for layer in np.moveaxis(seen, 2, 0)]
        return [float(np.nanmean([gamma(*pair) for pair in layer])) for layer in pairs]

    head, estimated = [None, *gammas(corpus.head[:, :, 1:-1])], gammas(corpus.estimates(lens)[:, :, :-1])
    return [
        {"collection": corpus.name, "layer": layer, "gamma_head": own, "gamma_lens": other}
        for layer, (own, other) in enumerate(zip(head, estimated, strict=True))
    ]


def check_promise(corpora: Sequence[Recorded], lens: CalibratedLens, shape: Shape, *, splits: int) -> list[Row]:
    """Split the requests of all collections at random, and see how much is kept where nothing was calibrated.

    Beside a K that is simulated for the margins there is one that is not.
    """
    estimates, scores, tokens = (
        np.concatenate([corpus.estimates(lens)[:, :, :-1] for corpus in corpora]),
        np.concatenate([corpus.head[:, :, -1] for corpus in corpora]),
        np.concatenate([corpus.tokens for corpus in corpora]),
    )
    candidates = scores.shape[1]
    cases = list(product(((candidates, 5), (candidates * 3 // 4, 4)), (True, False), (0.9, 0.95, DEFAULT, 0.99)))
    found: dict[Any, list[tuple[float, float]]] = {case: [] for case in cases}
    for seed in track(range(splits), "splitting", console=progress):
        halves = np.array_split(np.random.default_rng(seed).permutation(len(scores)), 2)
        calibrated, tested = (Requests(estimates[half], scores[half], tokens[half]) for half in halves)
        margins = calibrate_margins([[calibrated]], lens.margins.drop, look_costs(shape))
        for case in cases:
            found[case].append(_prune(tested, margins, *case))
    return [
        {
            "candidates": number,
            "top_k": top_k,
            "scores": "exact" if exact else "estimated",
            "target": target,
            "agreement": mean(kept for kept, _ in found[case]),
            "agreement_of_worst_split": min(kept for kept, _ in found[case]),
            "compute_share": mean(share for _, share in found[case]),
        }
        for case in cases
        for (number, top_k), exact, target in [case]
    ]


def _prune(
    requests: Requests, margins: Margins, numbers: tuple[int, int], exact: bool, target: float
) -> tuple[float, float]:
    """Prune requests as the product would; the mean share that is kept, and that is computed."""
    candidates, top_k = numbers
    policy = margins.policy(candidates, top_k, target=target, guarantee="share", exact=exact)
    select = None if exact else np.array(policy.select)
    replayed = replay_pruning(requests.first(candidates), top_k, drop=np.array(policy.drop), select=select)
    return float(1 - replayed.lost.mean()), float(replayed.compute_share.mean())


def main(
    data: Annotated[Path, typer.Option(help=f"Holds {', '.join(COLLECTIONS)}, in BEIR layout.")],
    model: Annotated[str, typer.Option(help="One with a lens.")] = "bundled:ms-marco-minilm-l12",
    candidates: Annotated[int, typer.Option(help="Candidates of a query.")] = 20,
    requests: Annotated[int, typer.Option(help="Queries of each collection.")] = 100,
    timed: Annotated[int, typer.Option(help="Queries of each collection that are reranked for real.")] = 10,
    rounds: Annotated[int, typer.Option(help="How often these are timed.")] = 3,
    splits: Annotated[int, typer.Option(help="Random splits into calibration and test.")] = 20,
    output: Output = RESULTS,
) -> None:
    """Measure, and write the four files of results whose names begin with pruning."""
    if candidates * 3 // 4 <= max(TOP_K):
        raise typer.BadParameter(f"--candidates {candidates} is too small: take {max(TOP_K) * 2} or more")
    with Reranker.from_pretrained(model) as reranker:
        lens, shape = reranker.lens, layered(reranker.scorer).model.shape
        if lens is None:
            raise typer.BadParameter(f"--model {model} has no lens: calibrate one with 'grating calibrate'")
        corpora = [
            record_corpus(
                reranker, name, load_requests(data / name, candidates=candidates, queries=requests), candidates
            )
            for name in COLLECTIONS
        ]
    rows = [row for corpus in corpora for row in summarise(corpus, lens)]
    setting = {"model": model, "candidates": candidates, "requests": sum(len(one.requests) for one in corpora)}
    latency = [measure(model, corpus, corpus.requests[:timed], lens, top_k=5, rounds=rounds) for corpus in corpora]
    layers = [row for corpus in corpora for row in read_layers(corpus, lens)]
    promise = check_promise(corpora, lens, shape, splits=splits)
    figures = ("compute_share", "agreement", "precision", "ndcg_10")
    write_result(output, "pruning", with_means(rows, *figures), rounds=1, setting=setting)
    write_result(output, "pruning-latency", latency, rounds=rounds, setting=setting)
    write_result(output, "pruning-layers", layers, rounds=1, setting=setting)
    write_result(output, "pruning-promise", promise, rounds=splits, setting=setting)


if __name__ == "__main__":
    typer.run(main)
