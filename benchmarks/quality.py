"""What pruning saves and what it loses, on real collections with human judgements.

    make bench-deps
    .venv/bin/python -m benchmarks.quality --data ../shared/data/cranfield --data ../shared/data/cisi \
        --data ../shared/data/locomo --top-k 1 --top-k 5 --top-k 10 --output results

Every request is computed once without pruning, and what each policy would have done with it is replayed from the
scores: ``off``, ``cluster`` and SEE with their thresholds, and the lens with its targets. Some of them then rerank
for real, which gives the latency and checks the replay.

The lens and its margins never come from the corpus that is tested: they are fitted on the requests of all others
(``--calibration leave-one-out``), or they are those that the model came with (``shipped``).

Agreement is the share of the full model's top K that is returned; P@K counts documents that people judged
relevant, of as many as could be; nDCG@10 is of the K returned, against all judgements. Compute share is tokens ×
layers, of those without pruning.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path
from statistics import mean, median
from typing import Annotated, Literal

import torch
import typer
from rich.console import Console
from rich.progress import track

from benchmarks.collections import Request, bm25, dense, load_requests
from benchmarks.quality_figures import Row, draw_curves, draw_gammas, draw_trajectories, show, write_rows
from benchmarks.recorded import Array, Recorded, record_corpus
from benchmarks.replay import Outcome, SimilarityExit, agreement, ndcg, precision, replay
from grating_core import ClusterPolicy, PruningPolicy, Reranker
from grating_core.lens.calibrate import fit
from grating_core.lens.store import CalibratedLens, lens_directory
from grating_core.pruning import Off

THRESHOLDS = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0)
PROXIMITIES = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.7, 0.9)
TARGETS = (0.8, 0.85, 0.9, 0.95, 0.98, 0.99, 0.995)
TOP_K = [1, 5, 10]
MEASURED = {("off", None), ("cluster", 2.0), ("lens", 0.98)}
SHOWN = MEASURED | {("cluster", 16.0), ("SEE", 0.1), ("SEE", 0.3), ("lens", 0.9), ("lens", 0.95), ("lens", 0.99)}

console = Console(width=130)


class Stage(StrEnum):
    """The first stage."""

    BM25 = "bm25"
    DENSE = "dense"


class Calibration(StrEnum):
    """Where the lens comes from."""

    LEAVE_ONE_OUT = "leave-one-out"
    SHIPPED = "shipped"


@dataclass(frozen=True)
class Setting:
    """A policy, its threshold or target, and whether what it returns was computed to the end."""

    policy: str
    value: float | None
    exact: bool = True

    @property
    def scores(self) -> Literal["exact", "estimated"]:
        """As :meth:`Reranker.rerank` calls it."""
        return "exact" if self.exact else "estimated"

    def make(self, lens: CalibratedLens, candidates: int, top_k: int) -> PruningPolicy:
        """The policy of requests with N candidates."""
        if self.value is None:
            return Off()
        if self.policy == "cluster":
            return ClusterPolicy(self.value)
        if self.policy == "SEE":
            return SimilarityExit(self.value)
        return lens.margins.policy(candidates, top_k, target=self.value, guarantee="share", exact=self.exact)


SETTINGS = [
    Setting("off", None),
    *(Setting("cluster", value, exact) for exact in (True, False) for value in THRESHOLDS),
    *(Setting("SEE", value) for value in PROXIMITIES),
    *(Setting("lens", value, exact) for exact in (True, False) for value in TARGETS),
]

Case = tuple[Setting, int]
"""A setting and K."""


def replay_all(corpus: Recorded, lens: CalibratedLens, top_ks: Sequence[int]) -> dict[Case, list[Outcome]]:
    """What every setting makes of every request, by setting and K."""
    seen = {"off": corpus.head, "cluster": corpus.head, "SEE": corpus.head.copy(), "lens": corpus.estimates(lens)}
    seen["SEE"][:, :, 0] = corpus.similarities
    cases = [(setting, top_k) for top_k in top_ks for setting in SETTINGS]
    return {
        (setting, top_k): _replay(corpus, seen[setting.policy], setting, lens, top_k)
        for setting, top_k in track(cases, f"{corpus.name}: replaying")
    }


def _replay(corpus: Recorded, scores: Array, setting: Setting, lens: CalibratedLens, top_k: int) -> list[Outcome]:
    policy = setting.make(lens, scores.shape[1], top_k)
    first = 0 if setting.policy in ("SEE", "lens") else 1
    return [
        replay(one, tokens, policy, top_k, prefix=prefix, exact=setting.exact, first=first)
        for one, tokens, prefix in zip(scores, corpus.tokens, corpus.prefixes.tolist(), strict=True)
    ]


@contextmanager
def load_rerankers(
    model: str, settings: Sequence[Setting], lens: CalibratedLens
) -> Iterator[dict[Setting, Reranker]]:
    """A reranker for each setting; those that differ only in the kind of scores share one."""
    with tempfile.TemporaryDirectory() as directory, ExitStack() as stack:
        lens.save(Path(directory))
        loaded: dict[Setting, Reranker] = {}
        for setting in settings:
            twin = replace(setting, exact=True)
            loaded[setting] = loaded.get(twin) or stack.enter_context(_load(model, setting, directory))
        yield loaded


def _load(model: str, setting: Setting, lens: str) -> Reranker:
    if setting.value is None:
        return Reranker.from_pretrained(model, pruning="off")
    if setting.policy == "cluster":
        return Reranker.from_pretrained(model, pruning=ClusterPolicy(setting.value))
    return Reranker.from_pretrained(model, lens=lens, target=setting.value)


def settings_measured(sweeps: bool) -> list[Setting]:
    """Those that rerank for real: all that the product has, or a few."""
    known = [setting for setting in SETTINGS if setting.policy != "SEE"]
    return [setting for setting in known if sweeps or (setting.policy, setting.value) in MEASURED]


def measure(
    rerankers: dict[Setting, Reranker], requests: Sequence[Request], top_ks: Sequence[int], rounds: int
) -> dict[Case, list[tuple[float, Outcome]]]:
    """Rerank for real: the median seconds of each request, and its outcome.

    The settings take turns request by request, so that a noisy machine is noisy for all of them.
    """
    cases = [(setting, top_k) for setting in rerankers for top_k in top_ks]
    found: dict[Case, list[tuple[float, Outcome]]] = {case: [] for case in cases}
    for setting, top_k in cases:  # warm up
        rerankers[setting].rerank(requests[0].query, requests[0].documents, top_k)
    for request in track(requests, "Reranking"):
        taken: dict[Case, list[float]] = {case: [] for case in cases}
        for last in range(rounds - 1, -1, -1):
            for setting, top_k in cases:
                result = rerankers[setting].rerank(request.query, request.documents, top_k, scores=setting.scores)
                taken[setting, top_k].append(result.trace.seconds)
                if not last:
                    outcome = Outcome([one.index for one in result.ranking], result.trace.compute_share)
                    found[setting, top_k].append((median(taken[setting, top_k]), outcome))
    return found


def largest_differences(
    replayed: dict[Case, list[Outcome]], measured: dict[Case, list[tuple[float, Outcome]]]
) -> tuple[float, float]:
    """Between what was replayed and what a real rerank did: of the shares of the top K, of the compute shares."""
    pairs = [
        (here, there)
        for case, found in measured.items()
        for here, (_, there) in zip(replayed[case], found, strict=False)  # only the first are measured
    ]
    return (
        max(1 - agreement(here.ranking, there.ranking) for here, there in pairs),
        max(abs(here.compute_share - there.compute_share) for here, there in pairs),
    )


def summarise(
    corpus: Recorded,
    calibrated_on: str,
    replayed: dict[Case, list[Outcome]],
    measured: dict[Case, list[tuple[float, Outcome]]],
) -> list[Row]:
    """A row for each setting and K."""
    rows = []
    seconds = {case: mean(one for one, _ in found) for case, found in measured.items()}
    for (setting, top_k), outcomes in replayed.items():
        off = SETTINGS[0], top_k
        rankings = [outcome.ranking for outcome in outcomes]
        reference = [outcome.ranking for outcome in replayed[off]]
        taken = seconds.get((setting, top_k))
        rows.append(
            Row(
                corpus=corpus.name,
                calibrated_on=calibrated_on,
                requests=len(outcomes),
                policy=setting.policy,
                value=setting.value,
                top_k=top_k,
                scores=setting.scores,
                compute_share=mean(outcome.compute_share for outcome in outcomes),
                agreement=mean(map(agreement, rankings, reference)),
                precision=mean(map(precision, rankings, corpus.requests)),
                ndcg=ndcg(rankings, corpus.requests),
                seconds=taken,
                latency_ratio=None if taken is None else taken / seconds[off],
            )
        )
    return rows


def calibrate(reranker: Reranker, others: Sequence[Recorded]) -> CalibratedLens:
    """The lens and margins that the requests of some corpora give."""
    return fit(
        [other.recording for other in others],
        pooling=reranker._model().pooling,
        fingerprint=reranker._fingerprint,
        top_k=1,  # of the summary, which is not used
        target=0.98,
        show_progress=True,
    )


def find_shipped(reranker: Reranker, model: str) -> tuple[CalibratedLens, str]:
    """The lens that a model came with, and where it is from."""
    if reranker.lens is None:
        raise typer.BadParameter(f"{model} comes with no lens: give two corpora or more, for leave-one-out")
    if lens_directory(reranker._fingerprint).is_dir():
        return reranker.lens, "what 'grating calibrate' found here, perhaps on this corpus"
    return reranker.lens, "what comes with the package"


def record_all(
    reranker: Reranker,
    data: Sequence[Path],
    *,
    candidates: int,
    requests: int,
    dense_model: str | None,
    cache: Path | None,
) -> list[Recorded]:
    """Compute the requests of all corpora without pruning."""
    first_stage = dense(dense_model) if dense_model else bm25
    stage = Path(dense_model).name if dense_model else "bm25"
    recorded = []
    for directory in data:
        found = load_requests(directory, candidates=candidates, queries=requests, first_stage=first_stage)
        name = f"{directory.name}-{stage}-{candidates}-{requests}-{reranker._fingerprint[:8]}-{reranker.dtype}.npz"
        corpus = record_corpus(reranker, directory.name, found, candidates, cache and cache / name)
        console.print(
            f"{directory.name}: {len(corpus.requests)} requests; {corpus.dropped} had too few candidates"
        )
        recorded.append(corpus)
    return recorded


def main(
    data: Annotated[list[Path], typer.Option(help="A collection in BEIR layout; may be given several times.")],
    model: Annotated[str, typer.Option(help="Hub id, directory or bundled name.")] = "bundled:ms-marco-minilm-l12",
    candidates: Annotated[int, typer.Option(help="Candidates per query.")] = 20,
    top_k: Annotated[list[int], typer.Option(help="How many are wanted; may be given several times.")] = TOP_K,
    requests: Annotated[
        int, typer.Option(help="Queries per collection: to test it, to calibrate for others.")
    ] = 200,
    calibration: Annotated[
        Calibration | None, typer.Option(help="By default leave-one-out, if it can be.")
    ] = None,
    first_stage: Annotated[Stage, typer.Option(help="What picks the candidates.")] = Stage.BM25,
    dense_model: Annotated[str, typer.Option(help="Of the dense first stage.")] = "BAAI/bge-small-en-v1.5",
    measured: Annotated[bool, typer.Option(help="Rerank for real as well.")] = True,
    queries: Annotated[int, typer.Option(help="Queries per collection that are reranked for real.")] = 25,
    rounds: Annotated[int, typer.Option(help="Real reranks of which the median time is taken.")] = 1,
    sweeps: Annotated[bool, typer.Option(help="Rerank for real with every threshold and target.")] = False,
    output: Annotated[Path | None, typer.Option(help="A directory for CSV, JSON and figures.")] = None,
    cache: Annotated[Path | None, typer.Option(help="A directory that keeps what was computed.")] = None,
) -> None:
    """Measure, print the table, draw the figures."""
    if max(top_k) >= candidates:
        raise typer.BadParameter(f"--top-k {max(top_k)} must be below --candidates {candidates}")
    calibration = calibration or (Calibration.LEAVE_ONE_OUT if len(data) > 1 else Calibration.SHIPPED)
    if calibration is Calibration.LEAVE_ONE_OUT and len(data) < 2:
        raise typer.BadParameter("leave-one-out needs two corpora or more")
    reranker = Reranker.from_pretrained(model, show_progress=True)
    shipped = find_shipped(reranker, model) if calibration is Calibration.SHIPPED else None
    corpora = record_all(
        reranker,
        data,
        candidates=candidates,
        requests=requests,
        dense_model=dense_model if first_stage is Stage.DENSE else None,
        cache=cache,
    )
    rows: list[Row] = []
    lenses = []
    for corpus in corpora:
        others = [other for other in corpora if other is not corpus]
        lens, origin = shipped or (calibrate(reranker, others), ", ".join(other.name for other in others))
        lenses.append(lens)
        replayed = replay_all(corpus, lens, top_k)
        real: dict[Case, list[tuple[float, Outcome]]] = {}
        if measured:
            with load_rerankers(model, settings_measured(sweeps), lens) as rerankers:
                real = measure(rerankers, corpus.requests[:queries], top_k, rounds)
            kept, computed = largest_differences(replayed, real)
            console.print(
                f"{corpus.name}: what was replayed and what was measured differ by at most {kept:.3f} of a top K "
                f"and {computed:.1e} of a compute share"
            )
        rows += summarise(corpus, origin, replayed, real)
    setting = f"{candidates} candidates by {first_stage.value}, {torch.get_num_threads()} threads"
    show(f"{model}: {setting}", rows, SHOWN)
    if output:
        output.mkdir(parents=True, exist_ok=True)
        write_rows(rows, {"model": model, "setting": setting, "calibration": calibration.value}, output)
        draw_curves(rows, output / "curves.png")
        draw_gammas(corpora, lenses, output / "gammas.png")
        draw_trajectories(corpora[0], lenses[0], output / "trajectories.png")
        console.print(f"CSV, JSON and figures are in {output}.")


if __name__ == "__main__":
    typer.run(main)
