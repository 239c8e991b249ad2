"""Seconds of a rerank, grating beside its peers on a CPU, and what each loses of the float32 model's ranking.

    make bench-deps
    .venv/bin/python -m benchmarks.latency --data DIRECTORY
    .venv/bin/python -m benchmarks.latency --data DIRECTORY --model smollm2-135m --requests 2 --timed 1 --rounds 2

The directory holds the collections cranfield, cisi and locomo. BM25's top candidates of a few queries of each are
reranked by every system in a process of its own, with the same number of threads. The systems take turns, in a new
order for each request. Texts of LoCoMo, which is the memory of an agent, have about 60 tokens. A peer reranks in
the quickest of many ways, found for each collection: :mod:`benchmarks.peers`.

A few requests of each case are timed. More are reranked once, for what is returned: the agreement with float32
without pruning, and the quality by human judgements.

A decoder is compared with transformers, told what Qwen3-Reranker's model card says. Every decoder is asked by that
prompt, also one that was not trained on it, so that all systems compute the same tokens. ``smollm2-135m`` is a
real model, though no reranker. ``qwen3-0.6b`` has the shape of the real one and random weights: its seconds mean
something, its agreement does not.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, product
from math import ceil
from pathlib import Path
from statistics import mean, median
from typing import Annotated, Any

import torch
import typer
from transformers import AutoTokenizer

from benchmarks.collections import Request, load_requests
from benchmarks.peers import (
    PACKAGES,
    Open,
    Quickest,
    Way,
    open_ctranslate2,
    open_onnx_runtime,
    open_openvino,
    prepare,
    runtime_ways,
)
from benchmarks.recipes import CARD_LENGTH, best, find_recipe, is_decoder
from benchmarks.replay import agreement, ndcg, precision
from benchmarks.report import RESULTS, Output, Row, write_result
from benchmarks.shapes import find_or_write
from benchmarks.worker import Ask, Facts, Ready, System, Worker, loaded, take_turns
from grating_core import Reranker
from grating_core.settings import PruningName

COLLECTIONS = ("cranfield", "cisi", "locomo")
TOP_K = (1, 5, 10)
FAITHFUL = 0.98  # share of the top K
MEAN = "mean"
REFERENCE, DEFAULT = "grating, float32, pruning off", "grating"
DTYPES = ("float32", "bfloat16")


@dataclass(frozen=True)
class Case:
    """What is timed.

    Attributes:
        name: What the table calls it.
        collection: Where queries and candidates are from.
        candidates: Candidates of a query.
        top_k: How many of them are wanted.
        share: It takes 1 / ``share`` of the queries, since each takes longer.
    """

    name: str
    collection: str
    candidates: int = 20
    top_k: int = 5
    share: int = 1


USUAL = tuple(Case(name, name) for name in COLLECTIONS)  # whose mean is in the table as well
MANY = Case("cranfield, 10 of 100", "cranfield", candidates=100, top_k=10, share=6)


@dataclass(frozen=True)
class Question:
    """A request of a collection, and how many documents are wanted of it."""

    collection: str
    request: Request
    top_k: int


# Systems.

InBatches = Callable[[int, Request], Any]
"""Scores the candidates of a request, so many at a time."""


def ask_peer(quickest: Quickest, question: Question) -> Facts:
    """Put a question to a peer."""
    scores, way = quickest.scores(question.collection, question.request)
    return {"ranking": best(scores, len(scores)), "way": way}


def load_runtime(ready: Ready, *, directory: Path, files: Path, open_lanes: Open) -> Ask:
    """Load a runtime for CPUs."""
    tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
    ready()
    return partial(ask_peer, Quickest(runtime_ways(tokenizer, files, open_lanes, torch.get_num_threads())))


def load_sentence_transformers(ready: Ready, *, directory: Path, **ways: Sequence[Any]) -> Ask:
    """Load a CrossEncoder, used as its users do."""
    from sentence_transformers import CrossEncoder

    ready()

    def open_model(dtype: str) -> InBatches:
        model = CrossEncoder(str(directory), device="cpu", model_kwargs={"dtype": dtype})

        def scores(batch_size: int, request: Request) -> Any:
            pairs = [(request.query, document) for document in request.documents]
            return model.predict(pairs, batch_size=batch_size)

        return scores

    return load_in_batches(open_model, **ways)


def load_transformers(ready: Ready, *, directory: Path, **ways: Sequence[Any]) -> Ask:
    """Load transformers, used plainly: batches padded to the longest prompt of each."""
    recipe = find_recipe(directory, None)
    ready()

    def open_model(dtype: str) -> InBatches:
        model = recipe.architecture.from_pretrained(directory, dtype=dtype, trust_remote_code=False).eval()

        def scores(batch_size: int, request: Request) -> Any:
            return recipe.scores(model, request.query, request.documents, batch_size).numpy()

        return scores

    return load_in_batches(open_model, **ways)


def load_in_batches(
    open_model: Callable[[str], InBatches], *, dtypes: Sequence[str], batch_sizes: Sequence[int]
) -> Ask:
    """Load a model in several dtypes; it is used in the quickest of them, and of several batch sizes."""
    models = {dtype: open_model(dtype) for dtype in dtypes}
    ways: dict[str, Way] = {
        f"{dtype}, batches of {size}": partial(models[dtype], size) for dtype, size in product(dtypes, batch_sizes)
    }
    return partial(ask_peer, Quickest(ways))


def load_grating(ready: Ready, *, directory: Path, dtype: str, pruning: PruningName) -> Ask:
    """Load what this project offers in place of all the above."""
    asked: dict[str, Any] = (
        {"template": "qwen3-reranker", "max_length": CARD_LENGTH} if is_decoder(directory) else {}
    )
    ready()
    reranker = Reranker.from_pretrained(directory, pruning=pruning, dtype=dtype, device="cpu", **asked)

    def ask(question: Question) -> Facts:
        documents = question.request.documents
        # Without pruning and recounts, every K takes the same time.
        wanted = len(documents) if pruning == "off" and dtype != "int8" else question.top_k
        result = reranker.rerank(question.request.query, documents, wanted)
        ranking = [ranked.index for ranked in result.ranking]
        return {"ranking": ranking, "way": None, "tokens": sum(result.trace.lengths)}

    return ask


GRATING: dict[str, tuple[str, PruningName]] = {
    REFERENCE: ("float32", "off"),
    "grating, bfloat16, pruning off": ("bfloat16", "off"),
    "grating, int8, pruning off": ("int8", "off"),
    DEFAULT: ("auto", "auto"),
}
"""Dtype and pruning of each system of this project; all stand in the table."""

RUNTIMES: dict[str, Open] = {
    "ONNX Runtime, int8": open_onnx_runtime,
    "CTranslate2, int8": open_ctranslate2,
    "OpenVINO, float32": partial(open_openvino, file="model.xml", settings={"INFERENCE_PRECISION_HINT": "f32"}),
    "OpenVINO, bfloat16": partial(open_openvino, file="model.xml", settings={"INFERENCE_PRECISION_HINT": "bf16"}),
    "OpenVINO, int8, static": partial(open_openvino, file="static.xml", settings={}),
    "OpenVINO, int8 weights, dynamic": partial(
        open_openvino, file="weights.xml", settings={"DYNAMIC_QUANTIZATION_GROUP_SIZE": 64}
    ),
}
"""How each runtime for CPUs is opened."""


def find_systems(directory: Path) -> list[System]:
    """Name everything that is compared: first what its users have without a setting, then other peers, then us."""

    def usual(name: str, load: Callable[..., Ask], default: int) -> list[System]:
        """Return a package with its defaults, and in its quickest dtype and batch size."""
        settings = {"directory": directory, "dtypes": DTYPES, "batch_sizes": (2, 4, 8)}
        return [
            System(f"{name}, default", load, {**settings, "dtypes": ("float32",), "batch_sizes": (default,)}),
            System(f"{name}, quickest", load, settings),
        ]

    def grating(*names: str) -> list[System]:
        return [
            System(name, load_grating, {"directory": directory, "dtype": dtype, "pruning": pruning})
            for name in names
            for dtype, pruning in [GRATING[name]]
        ]

    if is_decoder(directory):
        return [*usual("transformers", load_transformers, USUAL[0].candidates), *grating(REFERENCE, DEFAULT)]
    files = prepare(directory)
    return [
        *usual("sentence-transformers", load_sentence_transformers, 32),
        *(
            System(name, load_runtime, {"directory": directory, "files": files, "open_lanes": open_lanes})
            for name, open_lanes in RUNTIMES.items()
        ),
        *grating(*GRATING),
    ]


# Measuring.


def measure(
    workers: Sequence[Worker], case: Case, requests: Sequence[Request], *, timed: int, rounds: int
) -> list[Row]:
    """Make a row of each system for a case.

    Args:
        workers: The systems, loaded.
        case: What is measured.
        requests: Are all reranked, which gives what is lost.
        timed: How many of them are timed.
        rounds: How often.
    """
    questions = [Question(case.collection, request, case.top_k) for request in requests]
    answers = take_turns(workers, questions, rounds=rounds, timed=timed, title=case.name)
    facts = {name: [rounds[0].facts for rounds in found] for name, found in answers.items()}
    reference = [one["ranking"] for one in facts[REFERENCE]]
    rows: list[Row] = []
    for worker in workers:
        name = worker.system.name
        rankings = {
            top_k: [
                ranked(worker, question, top_k, one["ranking"])
                for question, one in zip(questions, facts[name], strict=True)
            ]
            for top_k in TOP_K
        }
        kept = {
            f"agreement_{top_k}": mean(
                agreement(one, full[:top_k]) for one, full in zip(found, reference, strict=True)
            )
            for top_k, found in rankings.items()
        }
        rows.append(
            {
                "case": case.name,
                "system": name,
                "way": facts[name][0]["way"],
                "top_k": case.top_k,
                "tokens": mean(one["tokens"] for one in facts[REFERENCE][:timed]),
                "seconds": mean(median(answer.seconds for answer in rounds) for rounds in answers[name][:timed]),
                **kept,
                "precision_5": mean(map(precision, rankings[5], requests)),
                "ndcg_10": ndcg(rankings[10], requests),
            }
        )
    return rows


def ranked(worker: Worker, question: Question, top_k: int, ranking: list[int]) -> list[int]:
    """Return what a system that gave a ranking gives for another K.

    With pruning or recounts, what is computed depends on K, so the system is asked again.
    """
    if top_k == question.top_k or len(ranking) == len(question.request.documents):
        return ranking[:top_k]
    found: list[int] = worker.ask(replace(question, top_k=top_k)).facts["ranking"]
    return found


def means(rows: Sequence[Row]) -> list[Row]:
    """Return the means over cases, of each system."""
    found = []
    for system in dict.fromkeys(row["system"] for row in rows):
        alike = [row for row in rows if row["system"] == system]
        numbers = {name: mean(row[name] for row in alike) for name in list(alike[0])[3:]}
        found.append({"case": MEAN, "system": system, "way": None, **numbers, "top_k": alike[0]["top_k"]})
    return found


def with_ratios(rows: Sequence[Row]) -> list[Row]:
    """Return the rows of a case with how many times as fast each is as three peers.

    They are the usual one, the fastest, and the fastest of those that keep nearly all of the top K.
    """
    peers = [row for row in rows if not row["system"].startswith("grating")]
    faithful = [row for row in peers if row[f"agreement_{row['top_k']}"] >= FAITHFUL]
    seconds = {
        "times_usual": peers[0]["seconds"],
        "times_fastest": min(row["seconds"] for row in peers),
        "times_faithful": min(row["seconds"] for row in faithful),
    }
    return [row | {name: other / row["seconds"] for name, other in seconds.items()} for row in rows]


def main(
    data: Annotated[Path, typer.Option(help=f"Holds {', '.join(COLLECTIONS)}, in BEIR layout.")],
    model: Annotated[
        str, typer.Option(help="Hub id, directory, bundled name, smollm2-135m or qwen3-0.6b.")
    ] = "bundled:ms-marco-minilm-l12",
    timed: Annotated[int, typer.Option(help="Queries of each case that are timed.")] = 2,
    requests: Annotated[int, typer.Option(help="Queries of each collection that are reranked.")] = 12,
    rounds: Annotated[int, typer.Option(help="How often a query is timed.")] = 3,
    output: Output = RESULTS,
) -> None:
    """Measure, and write latency.json, or latency-decoder.json."""
    directory = find_or_write(model)
    decoder = is_decoder(directory)
    cases = USUAL if decoder else (*USUAL, MANY)
    found = {
        case: load_requests(
            data / case.collection, candidates=case.candidates, queries=ceil(requests / case.share)
        )
        for case in cases
    }
    with loaded(find_systems(directory)) as workers:
        rows = [
            measure(workers, case, found[case], timed=ceil(timed / case.share), rounds=rounds) for case in cases
        ]
    write_result(
        output,
        "latency-decoder" if decoder else "latency",
        [row for one in (means([*chain(*rows[: len(USUAL)])]), *rows) for row in with_ratios(one)],
        rounds=rounds,
        setting={
            "model": model,
            "candidates": USUAL[0].candidates,
            "top_k": USUAL[0].top_k,
            "collections": COLLECTIONS,
            "requests": requests,
            "timed": timed,
        },
        packages=PACKAGES,
    )


if __name__ == "__main__":
    typer.run(main)
