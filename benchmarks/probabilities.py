"""How well probabilities hold: of texts with the probability p, a share of p should be relevant.

    .venv/bin/python -m benchmarks.probabilities --data ../shared/data

Each collection's queries get BM25's best candidates, which the full model scores. A candidate that nobody judged
counts as irrelevant, so a probability is that of a text that search finds. Probabilities are the logistic function
of the score, or a mapping that was fitted to judgements: of the other half of the same queries, or of another
collection.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from numpy.typing import NDArray

from benchmarks.collections import load_requests
from benchmarks.report import RESULTS, Output, Row, write_result
from grating_core import Reranker
from grating_core.lens.probability import fit_probability, logistic

Floats = NDArray[np.float64]
COLLECTIONS = ("cranfield", "cisi", "locomo")
BINS = 15  # of equal width, as usual


@dataclass(frozen=True)
class Judged:
    """The candidates of a collection's queries: scores, whether each is relevant, and the number of its query."""

    scores: Floats
    relevant: NDArray[np.bool_]
    query: NDArray[np.int64]

    def half(self, remainder: int) -> Judged:
        """Return every second query."""
        mine = self.query % 2 == remainder
        return Judged(self.scores[mine], self.relevant[mine], self.query[mine])

    def fitted(self) -> Callable[[float], float]:
        """Return a mapping that is fitted to the candidates."""
        return fit_probability(self.scores.tolist(), self.relevant.tolist())


def expected_calibration_error(probabilities: Floats, relevant: NDArray[np.bool_]) -> float:
    """Return how far probabilities are from the share of relevant texts, on average over bins of probability.

    See Naeini et al., "Obtaining Well Calibrated Probabilities Using Bayesian Binning", AAAI 2015.
    """
    bins = np.minimum((probabilities * BINS).astype(int), BINS - 1)
    errors = [
        abs(probabilities[mine].mean() - relevant[mine].mean()) * mine.mean()
        for mine in (bins == number for number in np.unique(bins))
    ]
    return float(sum(errors))


def row(collection: str, mapping: str, probabilities: Floats, relevant: NDArray[np.bool_]) -> Row:
    """Return what is measured of probabilities."""
    kept = probabilities >= 0.5
    return {
        "collection": collection,
        "mapping": mapping,
        "pairs": len(relevant),
        "relevant": float(relevant.mean()),
        "mean_probability": float(probabilities.mean()),
        "calibration_error": expected_calibration_error(probabilities, relevant),
        "brier": float(np.mean((probabilities - relevant) ** 2)),
        "kept": float(kept.mean()),
        "precision_kept": float(relevant[kept].mean()) if kept.any() else None,
    }


def rows(judged: dict[str, Judged]) -> Iterator[Row]:
    """Yield a row for each collection and each mapping."""
    for name, found in judged.items():
        yield row(name, "logistic function", _mapped(logistic, found.scores), found.relevant)
        halves = [found.half(0), found.half(1)]
        own = [_mapped(other.fitted(), half.scores) for half, other in zip(halves, halves[::-1], strict=True)]
        relevant = np.concatenate([half.relevant for half in halves])
        yield row(name, "fitted to other queries", np.concatenate(own), relevant)
        for other, elsewhere in judged.items():
            if other != name:
                yield row(name, f"fitted to {other}", _mapped(elsewhere.fitted(), found.scores), found.relevant)


def _mapped(probability: Callable[[float], float], scores: Floats) -> Floats:
    return np.array([probability(score) for score in scores.tolist()])


def score(reranker: Reranker, directory: Path, queries: int, candidates: int) -> Judged:
    """Score the candidates of a collection's queries."""
    requests = load_requests(directory, candidates=candidates, queries=queries)
    known: list[tuple[float, bool, int]] = []
    for number, request in enumerate(requests):
        scores = reranker.score([(request.query, text) for text in request.documents])
        known += [(found, request.is_relevant(place), number) for place, found in enumerate(scores)]
    return Judged(*map(np.array, zip(*known, strict=True)))


def main(
    data: Annotated[Path, typer.Option(help="The directory of the collections, in BEIR layout.")],
    model: Annotated[str, typer.Option(help="The reranker.")] = "bundled:ms-marco-minilm-l12",
    queries: Annotated[int, typer.Option(help="Queries of each collection.")] = 60,
    candidates: Annotated[int, typer.Option(help="Candidates of a query.")] = 20,
    output: Output = RESULTS,
) -> None:
    """Measure, and write the file of results."""
    with Reranker.from_pretrained(model, pruning="off") as reranker:
        judged = {name: score(reranker, data / name, queries, candidates) for name in COLLECTIONS}
    setting: dict[str, Any] = {"model": model, "queries": queries, "candidates": candidates}
    write_result(output, "probabilities", list(rows(judged)), rounds=1, setting=setting)


if __name__ == "__main__":
    typer.run(main)
