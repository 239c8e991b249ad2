"""Whether the promise of the lens holds: mean agreement over random splits into calibration and test.

    .venv/bin/python -m benchmarks.promise --data ../shared/data/cranfield --data ../shared/data/cisi \
        --data ../shared/data/locomo --candidates 20

All requests of all corpora are computed once without pruning. The lens is fitted on a fixed third of them. The
others are mixed and divided by chance, again and again: half of them give the margins, with the other half it is
seen how much of the full model's top K is kept. The promise is about the mean over all such splits; here it may
fall short of the target by ALLOWED, for what chance does to a limited number of them.

Beside the N and K that were simulated for the margins there is a pair in between, which was not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, TypeVar

import numpy as np
import typer
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks.quality import record_all
from benchmarks.recorded import Array, Recorded
from grating_core import Reranker
from grating_core.lens.calibrate import choose_strength, fit_layer
from grating_core.pruning import Margins
from grating_core.pruning.conformal import Requests, Simulation, calibrate_margins, simulate

TARGETS = (0.9, 0.95, 0.98, 0.99)
ALLOWED = 0.005
_PART = 3  # the lens is fitted on one in so many requests

console = Console(width=115)

T = TypeVar("T", bound=np.generic)


@dataclass(frozen=True)
class Case:
    """How a request is pruned: N, K, the kind of scores, and what is promised."""

    candidates: int
    top_k: int
    exact: bool
    target: float


def fit_lens(corpora: Sequence[Recorded]) -> tuple[Requests, Array]:
    """Fit a lens on a third of the requests of each corpus.

    Returns:
        What it says about the other requests of all corpora, and its typical error by layer.
    """
    recordings = [corpus.recording for corpus in corpora]
    scores = [np.stack(recording.scores) for recording in recordings]
    fitted = [np.arange(len(recording)) % _PART == 0 for recording in recordings]
    left = [~some for some in fitted]
    estimates, spread = [], []
    for number in track(range(len(recordings[0].features)), "Fitting the lens"):
        layers = [recording.layer(number) for recording in recordings]
        known = _where(fitted, layers), _where(fitted, scores)
        strength, error = choose_strength(*known)
        layer = fit_layer(*known, strength)
        spread.append(error)
        others = np.concatenate(_where(left, layers))
        estimates.append(others @ layer.weight.numpy() + float(layer.bias))
    return Requests(
        np.stack(estimates, axis=2).astype(np.float64),
        np.concatenate(_where(left, scores)).astype(np.float64),
        np.concatenate(_where(left, [corpus.tokens for corpus in corpora])),
    ), np.array(spread)


def _where(chosen: Sequence[NDArray[np.bool_]], arrays: Sequence[NDArray[T]]) -> list[NDArray[T]]:
    """The chosen rows of each array."""
    return [array[some] for some, array in zip(chosen, arrays, strict=True)]


def prune(requests: Requests, margins: Margins, case: Case) -> Simulation:
    """Prune requests as the product would."""
    policy = margins.policy(case.candidates, case.top_k, target=case.target, guarantee="share", exact=case.exact)
    select = None if case.exact else np.array(policy.select)
    return simulate(requests.first(case.candidates), case.top_k, drop=np.array(policy.drop), select=select)


def split(requests: Requests, chance: np.random.Generator) -> tuple[Requests, Requests]:
    """Two halves."""
    order = chance.permutation(len(requests))
    first, second = (
        Requests(requests.estimates[half], requests.scores[half], requests.tokens[half])
        for half in np.array_split(order, 2)
    )
    return first, second


def main(
    data: Annotated[list[Path], typer.Option(help="A collection in BEIR layout; may be given several times.")],
    model: Annotated[str, typer.Option(help="Hub id, directory or bundled name.")] = "bundled:ms-marco-minilm-l12",
    candidates: Annotated[int, typer.Option(help="Candidates per query.")] = 20,
    top_k: Annotated[int, typer.Option(help="How many are wanted.")] = 5,
    requests: Annotated[int, typer.Option(help="Queries per collection.")] = 200,
    splits: Annotated[int, typer.Option(help="Random splits.")] = 20,
    cache: Annotated[Path | None, typer.Option(help="A directory that keeps what was computed.")] = None,
) -> None:
    """Measure and print the table; exit with 1 if a promise is broken."""
    with Reranker.from_pretrained(model, pruning="off", show_progress=True) as reranker:
        corpora = record_all(
            reranker, data, candidates=candidates, requests=requests, dense_model=None, cache=cache
        )
    known, spread = fit_lens(corpora)
    between = candidates * 3 // 4, top_k - 1  # neither of these was simulated for the margins
    cases = [
        Case(number, wanted, exact, target)
        for number, wanted in ((candidates, top_k), between)
        for exact in (True, False)
        for target in TARGETS
    ]
    found: dict[Case, list[Simulation]] = {case: [] for case in cases}
    for number in track(range(splits), "Splitting"):
        calibrated, tested = split(known, np.random.default_rng(number))
        margins = calibrate_margins([calibrated], spread)
        for case in cases:
            found[case].append(prune(tested, margins, case))
    if not show(f"{model}: {splits} splits of {len(known)} requests", found):
        raise typer.Exit(1)


def show(title: str, found: dict[Case, list[Simulation]]) -> bool:
    """Print the table; whether all promises hold."""
    table = Table(title=title)
    for heading in ("N", "K", "scores", "target", "agreement@K", "of the worst split", "compute share", ""):
        table.add_column(heading, justify="right")
    kept = {case: [1 - one.lost.mean() for one in simulations] for case, simulations in found.items()}
    for case, simulations in found.items():
        table.add_row(
            str(case.candidates),
            str(case.top_k),
            "exact" if case.exact else "estimated",
            f"{case.target:.2f}",
            f"{np.mean(kept[case]):.4f}",
            f"{min(kept[case]):.4f}",
            f"{np.mean([one.compute_share.mean() for one in simulations]):.3f}",
            "holds" if _holds(case, kept[case]) else "[bold red]BROKEN[/]",
            end_section=case.target == TARGETS[-1],
        )
    console.print(table)
    return all(_holds(case, kept[case]) for case in found)


def _holds(case: Case, kept: Sequence[float]) -> bool:
    return float(np.mean(kept)) >= case.target - ALLOWED


if __name__ == "__main__":
    typer.run(main)
