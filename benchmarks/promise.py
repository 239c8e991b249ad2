"""Whether the promise holds on a corpus that the lens has not seen, and what that costs.

    .venv/bin/python -m benchmarks.promise --collection DIRECTORY --collection ANOTHER --observations A_THIRD

A collection is a directory in BEIR layout. Its queries are asked with 500, 100 and 20 of BM25's candidates, which
are computed once without pruning; the pruning by the model's own lens is replayed. The lens has not seen it.

``--observations`` names the directory in which ``scripts/make_bundled_lens.py`` has kept what the lens was made
of. Each of these corpora is left out in turn: a lens of all the others estimates its requests, and the margins
come from the others' requests. Without it only the collections are measured.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import numpy as np
import typer
from tqdm import tqdm

from benchmarks.collections import load_requests
from benchmarks.observed import observe_kept
from benchmarks.report import RESULTS, Output, Row, write_result
from grating_core import Reranker
from grating_core.engine.observing import layered
from grating_core.lens.features import look_costs
from grating_core.lens.fit import Crossed, batches, cross_fit
from grating_core.lens.observations import Observations
from grating_core.lens.store import CalibratedLens
from grating_core.models.cross_encoder import Shape
from grating_core.pruning import Margins
from grating_core.pruning.conformal import Requests, calibrate_margins, replay_pruning
from grating_core.requests import Request

SIZES = ((500, 8), (100, 16), (20, 48))  # candidates, and as many requests of a collection
CELLS = [(number, top_k) for number in (20, 100, 500) for top_k in (1, 5, 10)]
TARGETS = (0.95, 0.98)


@dataclass(frozen=True)
class Unseen:
    """The requests of a corpus, estimated by a lens that has not seen it, and margins that it had no part in."""

    name: str
    corpus: list[Requests]
    margins: Margins
    left_out: bool

    def rows(self) -> Iterator[Row]:
        """Yield what is kept and what it costs: a row of each number of candidates, K and target."""
        for (number, top_k), target in product(CELLS, TARGETS):
            sized = [batch.first(number) for batch in self.corpus if batch.candidates >= number]
            if not sized:
                continue
            policy = self.margins.policy(number, top_k, target=target, guarantee="share", exact=True)
            replays = [replay_pruning(batch, top_k, drop=np.array(policy.drop), select=None) for batch in sized]
            yield {
                "corpus": self.name,
                "left_out": self.left_out,
                "candidates": number,
                "top_k": top_k,
                "target": target,
                "requests": sum(map(len, sized)),
                "kept": float(1 - np.concatenate([replay.lost for replay in replays]).mean()),
                "compute_share": float(np.concatenate([replay.compute_share for replay in replays]).mean()),
                # Of the rows that sum up corpora.
                "corpora": None,
                "worst": None,
                "worst_corpus": None,
                "worst_requests": None,
            }


def leave_out(names: Sequence[str], crossed: Crossed, shape: Shape) -> Iterator[Unseen]:
    """Leave each corpus of the calibration out in turn."""
    for index, name in enumerate(tqdm(names, "Leaving out", unit="corpus")):
        others = [corpus for number, corpus in enumerate(crossed.corpora) if number != index]
        margins = calibrate_margins(others, crossed.spread, look_costs(shape), cells=CELLS)
        yield Unseen(name, crossed.corpora[index], margins, left_out=True)


def estimated(observations: Observations, lens: CalibratedLens) -> list[Requests]:
    """Estimate the requests of a collection by the model's lens."""
    estimates = [
        observations.estimates(number, layer.weight.cpu().numpy()) for number, layer in enumerate(lens.lens.maps)
    ]
    return batches(observations, observations, estimates)


def requests_of(directory: Path) -> list[Request]:
    """Ask the queries of a collection, each once: with many candidates, with some, and with few."""
    count = sum(number for _, number in SIZES)
    found = load_requests(directory, candidates=SIZES[0][0], queries=count)
    random.Random(0).shuffle(found)
    counts = [size for size, number in SIZES for _ in range(number)]
    return [Request(one.query, one.documents[:size]) for one, size in zip(found, counts, strict=False)]


def with_means(rows: Sequence[Row]) -> list[Row]:
    """Return the rows, and for each number of candidates, K and target the mean and the worst of all corpora."""
    summed = []
    for (number, top_k), target in product(CELLS, TARGETS):
        alike = [
            row
            for row in rows
            if (row["candidates"], row["top_k"], row["target"]) == (number, top_k, target)
        ]  # fmt: skip
        if alike:
            worst = min(alike, key=lambda row: row["kept"])
            summed.append(
                worst
                | {
                    "corpus": "mean",
                    "left_out": None,
                    "corpora": len(alike),
                    "requests": sum(row["requests"] for row in alike),
                    "kept": float(np.mean([row["kept"] for row in alike])),
                    "compute_share": float(np.mean([row["compute_share"] for row in alike])),
                    "worst": worst["kept"],
                    "worst_corpus": worst["corpus"],
                    "worst_requests": worst["requests"],
                }
            )
    return [*rows, *summed]


def main(
    collection: Annotated[list[Path] | None, typer.Option(help="In BEIR layout; may be given again.")] = None,
    observations: Annotated[Path | None, typer.Option(help="See scripts/make_bundled_lens.py.")] = None,
    kept: Annotated[Path | None, typer.Option(help="Where what is computed of collections is kept.")] = None,
    model: Annotated[str, typer.Option(help="One with a lens.")] = "bundled:ms-marco-minilm-l12",
    dtype: Annotated[str, typer.Option(help="One without 8 bits.")] = "bfloat16",
    output: Output = RESULTS,
) -> None:
    """Measure, and write the file of results ``promise``."""
    rows: list[Row] = []
    with Reranker.from_pretrained(model, dtype=dtype) as reranker, TemporaryDirectory() as temporary:
        lens, scorer = reranker.lens, layered(reranker.scorer)
        if lens is None:
            raise typer.BadParameter(f"--model {model} has no lens: calibrate one with 'grating calibrate'")
        shape = scorer.model.shape
        for directory in collection or []:
            found = observe_kept(scorer, requests_of(directory), kept or Path(temporary), directory.name)
            rows += Unseen(directory.name, estimated(found, lens), lens.margins, left_out=False).rows()
    if observations is not None:
        names = sorted(path.stem for path in (observations / "bfloat16").glob("*.npz"))
        seen = [observe_kept(scorer, [], observations / "bfloat16", name) for name in names]
        crossed = cross_fit(seen, None, pooling=shape.pooling, show_progress=True)
        for unseen in leave_out(names, crossed, shape):
            rows += unseen.rows()
    write_result(output, "promise", with_means(rows), rounds=1, setting={"model": model})


if __name__ == "__main__":
    typer.run(main)
