"""Seconds of a rerank, grating beside its peers.

    make bench-deps
    .venv/bin/python -m benchmarks.speed --data DIRECTORY
    .venv/bin/python -m benchmarks.speed --data DIRECTORY --model smollm2-135m --per-collection 1 --rounds 2

The directory holds the collections cranfield, cisi and locomo. BM25's top candidates of a few queries of each are
reranked by every system in a process of its own. The systems take turns, in a new order for each request. A row
has the sum over the requests of the median over the rounds.

A decoder is compared with transformers, told what Qwen3-Reranker's model card says. Every decoder is asked by that
prompt, also one that was not trained on it, so that all systems compute the same tokens. ``smollm2-135m`` is a
real model, though no reranker. ``qwen3-0.6b`` has the shape of the real one and random weights: its seconds mean
something, its agreement does not.
"""

from __future__ import annotations

from pathlib import Path
from statistics import mean, median
from typing import Annotated, Any

import torch
import typer
from transformers import AutoTokenizer

from benchmarks.collections import Request, load_requests
from benchmarks.recipes import CARD_LENGTH, best, find_recipe, is_decoder
from benchmarks.report import RESULTS, Output, Row, installed, write_result
from benchmarks.shapes import find_or_write
from benchmarks.worker import Answer, Ask, Facts, Ready, System, loaded, take_turns
from grating_core import Reranker
from grating_core.models.bundled import BUNDLED_PREFIX, BUNDLED_RERANKER, bundled_source
from grating_core.settings import PruningName

COLLECTIONS = ("cranfield", "cisi", "locomo")
PEERS = ("sentence-transformers", "onnxruntime", "openvino")
REFERENCE = "transformers, padded, float32"


def load_transformers(ready: Ready, *, directory: Path, top_k: int, dtype: str, batch_size: int | None) -> Ask:
    """Load transformers, used plainly: batches padded to the longest pair of each, or a single one."""
    recipe = find_recipe(directory, None)
    ready()
    model = recipe.architecture.from_pretrained(
        directory, dtype=getattr(torch, dtype), trust_remote_code=False
    ).eval()

    def rank(request: Request) -> Facts:
        return {"ranking": best(recipe.scores(model, request.query, request.documents, batch_size), top_k)}

    return rank


def load_sentence_transformers(ready: Ready, *, directory: Path, top_k: int, batch_size: int, dtype: str) -> Ask:
    """Load a CrossEncoder, used as its users do."""
    from sentence_transformers import CrossEncoder

    ready()
    model = CrossEncoder(str(directory), device="cpu", model_kwargs={"dtype": dtype})

    def rank(request: Request) -> Facts:
        ranked = model.rank(request.query, request.documents, top_k=top_k, batch_size=batch_size)
        return {"ranking": [int(entry["corpus_id"]) for entry in ranked]}

    return rank


def load_onnx_runtime(ready: Ready, *, directory: Path, top_k: int) -> Ask:
    """Load the bundled 8-bit file in ONNX Runtime, one pair at a time: its fastest way."""
    import onnxruntime

    tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    ready()
    session = onnxruntime.InferenceSession(
        str(bundled_source(BUNDLED_RERANKER)), options, providers=["CPUExecutionProvider"]
    )
    names = [entry.name for entry in session.get_inputs()]

    def score(query: str, document: str) -> float:
        pair = tokenizer(query, document, truncation=True, return_tensors="np")
        return float(session.run(None, {name: pair[name] for name in names})[0].item())

    def rank(request: Request) -> Facts:
        return {"ranking": best([score(request.query, document) for document in request.documents], top_k)}

    return rank


def load_grating(ready: Ready, *, directory: Path, top_k: int, pruning: PruningName, dtype: str) -> Ask:
    """Load what this project offers in place of all the above."""
    asked: dict[str, Any] = (
        {"template": "qwen3-reranker", "max_length": CARD_LENGTH} if is_decoder(directory) else {}
    )
    ready()
    reranker = Reranker.from_pretrained(directory, pruning=pruning, dtype=dtype, device="cpu", **asked)

    def rank(request: Request) -> Facts:
        result = reranker.rerank(request.query, request.documents, top_k)
        return {"ranking": [ranked.index for ranked in result.ranking], "tokens": sum(result.trace.lengths)}

    return rank


def find_systems(model: str, directory: Path, top_k: int) -> list[System]:
    """Name everything that is compared, peers first."""
    common = {"directory": directory, "top_k": top_k}

    def padded(name: str, dtype: str, batch_size: int | None = None) -> System:
        return System(name, load_transformers, {**common, "dtype": dtype, "batch_size": batch_size})

    def grating(name: str, pruning: str, dtype: str = "auto") -> System:
        return System(name, load_grating, {**common, "pruning": pruning, "dtype": dtype})

    found = [padded(REFERENCE, "float32"), padded("transformers, padded, bfloat16", "bfloat16")]
    if is_decoder(directory):
        return [
            *found,
            padded("transformers, batches of 4, bfloat16", "bfloat16", 4),
            grating("grating, pruning off, float32", "off", "float32"),
            grating("grating", "off"),
        ]
    for batch_size, dtype in ((32, "float32"), (4, "float32"), (2, "float32"), (4, "bfloat16"), (2, "bfloat16")):
        name = "default" if batch_size == 32 else f"batch_size={batch_size}, {dtype}"
        settings = {**common, "batch_size": batch_size, "dtype": dtype}
        found.append(System(f"sentence-transformers, {name}", load_sentence_transformers, settings))
    if model.startswith(BUNDLED_PREFIX) and installed("onnxruntime"):
        found.append(System("ONNX Runtime, 8-bit weights, pair by pair", load_onnx_runtime, common))
    return [
        *found,
        grating("grating, pruning off, float32", "off", "float32"),
        grating("grating, pruning off", "off"),
        grating("grating", "auto"),
    ]


def summarise(answers: dict[str, list[list[Answer]]], top_k: int) -> list[Row]:
    """Make a row of each system: its seconds, and its agreement with the reference's top K."""
    reference = [rounds[0].facts["ranking"] for rounds in answers[REFERENCE]]
    rows: list[Row] = []
    for name, found in answers.items():
        rankings = [rounds[0].facts["ranking"] for rounds in found]
        kept = [len({*one} & {*other}) / top_k for one, other in zip(rankings, reference, strict=True)]
        seconds = [median(answer.seconds for answer in rounds) for rounds in found]
        rows.append({"system": name, "seconds": sum(seconds), "agreement": mean(kept)})
    usual = [row["seconds"] for row in rows if row["system"].startswith("sentence-transformers")]
    usual = usual or [row["seconds"] for row in rows if row["system"].startswith("transformers")]
    for row in rows:
        row["times_as_fast_as_usual"] = usual[0] / row["seconds"]
        row["times_as_fast_as_best_usual"] = min(usual) / row["seconds"]
    return rows


def main(
    data: Annotated[Path, typer.Option(help=f"Holds {', '.join(COLLECTIONS)}, in BEIR layout.")],
    model: Annotated[
        str, typer.Option(help="Hub id, directory, bundled name, smollm2-135m or qwen3-0.6b.")
    ] = "bundled:ms-marco-minilm-l12",
    candidates: Annotated[int, typer.Option(help="Candidates of a query.")] = 20,
    top_k: Annotated[int, typer.Option(help="How many are wanted.")] = 5,
    per_collection: Annotated[int, typer.Option(help="Queries of each collection.")] = 2,
    rounds: Annotated[int, typer.Option(help="How often each query is timed.")] = 3,
    output: Output = RESULTS,
) -> None:
    """Measure, and write speed-encoder.json or speed-decoder.json."""
    directory = find_or_write(model)
    requests = [
        request
        for name in COLLECTIONS
        for request in load_requests(data / name, candidates=candidates, queries=per_collection)
    ]
    with loaded(find_systems(model, directory, top_k)) as workers:
        answers = take_turns(workers, requests, rounds=rounds, title="reranking")
    tokens = [rounds_of_one[0].facts["tokens"] for rounds_of_one in answers["grating"]]
    write_result(
        output,
        "speed-decoder" if is_decoder(directory) else "speed-encoder",
        summarise(answers, top_k),
        rounds=rounds,
        setting={
            "model": model,
            "candidates": candidates,
            "top_k": top_k,
            "requests": len(requests),
            "collections": COLLECTIONS,
            "tokens": sum(tokens),
        },
        packages=PEERS,
    )


if __name__ == "__main__":
    typer.run(main)
