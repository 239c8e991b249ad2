"""Latency of one rerank, grating beside its peers in one process.

    make bench-deps
    .venv/bin/python -m benchmarks.latency --data ../shared/data/cranfield --model bundled:ms-marco-minilm-l12
    .venv/bin/python -m benchmarks.latency --data ../shared/data/cranfield --model smollm2-135m --queries 2

BM25's top candidates of a few queries are reranked by every system in turn, round after round, so that a noisy
machine is noisy for all of them. The median over the rounds of each query is averaged over the queries.

Decoders are compared with transformers only, told what Qwen3-Reranker's model card says; sentence-transformers is
left out, for its CrossEncoder does not know that prompt. Every decoder is asked by that prompt, also one that was
not trained on it, so that all systems compute the same tokens. All systems are in memory at once. ``smollm2-135m``
is a real model, though no reranker. ``qwen3-0.6b`` has the shape of the real one and random weights: its seconds
mean something, its agreement does not.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Annotated, Any

import numpy as np
import onnxruntime
import torch
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table
from sentence_transformers import CrossEncoder
from transformers import AutoTokenizer

from benchmarks.collections import Request, load_requests
from benchmarks.recipes import CARD_LENGTH, best, find_recipe, is_decoder
from benchmarks.shapes import find_or_write
from grating_core import Reranker
from grating_core.engine.attention import PACKED_ATTENTION, Packing
from grating_core.engine.ragged import RaggedBatch
from grating_core.models.bundled import BUNDLED_PREFIX, BUNDLED_RERANKER, bundled_source
from grating_core.models.loading import StoredCrossEncoder
from grating_core.text.pairs import load_template

Ranking = list[int]
System = Callable[[Request, int], Ranking]

REFERENCE = "transformers, padded, float32"
PADDED = "transformers, padded, bfloat16"


def transformers_padded(directory: Path, dtype: torch.dtype, batch_size: int | None = None) -> System:
    """The plain way: batches padded to the longest pair of each, or a single one."""
    recipe = find_recipe(directory, None)
    model = recipe.architecture.from_pretrained(directory, dtype=dtype, trust_remote_code=False).eval()

    def rank(request: Request, top_k: int) -> Ranking:
        return best(recipe.scores(model, request.query, request.documents, batch_size), top_k)

    return rank


def sentence_transformers(directory: Path, batch_size: int) -> System:
    """CrossEncoder.rank as its users call it."""
    model = CrossEncoder(str(directory), device="cpu")

    def rank(request: Request, top_k: int) -> Ranking:
        ranked = model.rank(request.query, request.documents, top_k=top_k, batch_size=batch_size)
        return [int(entry["corpus_id"]) for entry in ranked]

    return rank


def onnx_int8(directory: Path) -> System:
    """ONNX Runtime on the bundled 8-bit file, one pair at a time: its fastest way."""
    tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(
        str(bundled_source(BUNDLED_RERANKER)), options, providers=["CPUExecutionProvider"]
    )
    names = [entry.name for entry in session.get_inputs()]

    def rank(request: Request, top_k: int) -> Ranking:
        scores = []
        for document in request.documents:
            pair = tokenizer(request.query, document, truncation=True, return_tensors="np")
            scores.append(session.run(None, {name: pair[name] for name in names})[0].item())
        return best(np.array(scores), top_k)

    return rank


def packed_loop(directory: Path, dtype: torch.dtype) -> System:
    """The layers on a packed batch and nothing else: what grating's own bookkeeping is measured against."""
    stored = StoredCrossEncoder(directory, device=torch.device("cpu"), dtype=dtype, attention=PACKED_ATTENTION)
    model, template = stored.load(None), load_template(directory, 512)

    @torch.inference_mode()
    def rank(request: Request, top_k: int) -> Ranking:
        candidates = template.encode(request.query, request.documents)
        batch = RaggedBatch.pack(candidates, model.device, share_prefix=False)
        positions = batch.positions()[None]
        hidden = model.embed(batch.input_ids[None], batch.token_type_ids[None], positions)
        for number in range(1, model.depth + 1):
            packing = Packing(batch.lengths)
            hidden = model.run_layer(number, hidden, positions, attention=packing)
        return best(model.read_scores(model.depth, hidden, batch.lengths), top_k)

    return rank


def grating(directory: Path, pruning: str, dtype: str = "auto") -> System:
    """What this project offers in place of all the above."""
    asked: dict[str, Any] = (
        {"template": "qwen3-reranker", "max_length": CARD_LENGTH} if is_decoder(directory) else {}
    )
    reranker = Reranker.from_pretrained(directory, pruning=pruning, dtype=dtype, device="cpu", **asked)

    def rank(request: Request, top_k: int) -> Ranking:
        return [ranked.index for ranked in reranker.rerank(request.query, request.documents, top_k).ranking]

    return rank


def decoder_systems(directory: Path) -> dict[str, System]:
    """Everything that is compared for a decoder, by the name it has in the table."""
    return {
        REFERENCE: transformers_padded(directory, torch.float32),
        PADDED: transformers_padded(directory, torch.bfloat16),
        "transformers, batches of 4, bfloat16": transformers_padded(directory, torch.bfloat16, 4),
        "grating, pruning off, float32": grating(directory, "off", "float32"),
        "grating, pruning off": grating(directory, "off"),
        "grating, pruning auto": grating(directory, "auto"),
    }


def encoder_systems(model: str, directory: Path) -> dict[str, System]:
    """Everything that is compared for an encoder, by the name it has in the table."""
    compared = {
        REFERENCE: transformers_padded(directory, torch.float32),
        PADDED: transformers_padded(directory, torch.bfloat16),
        "sentence-transformers, default": sentence_transformers(directory, 32),
        "sentence-transformers, batch_size=1": sentence_transformers(directory, 1),
        "sentence-transformers, batch_size=2": sentence_transformers(directory, 2),
        "sentence-transformers, batch_size=4": sentence_transformers(directory, 4),
    }
    if model.startswith(BUNDLED_PREFIX):
        compared["ONNX Runtime int8, pair by pair"] = onnx_int8(directory)
    return compared | {
        "bare packed loop, bfloat16": packed_loop(directory, torch.bfloat16),
        "grating, pruning off, float32": grating(directory, "off", "float32"),
        "grating, pruning off": grating(directory, "off"),
        "grating, pruning auto": grating(directory, "auto"),
        "grating, pruning cluster": grating(directory, "cluster"),
    }


def peers(latency: dict[str, float]) -> dict[str, float]:
    """The seconds that the others are compared with, by their heading in the table."""
    usual, default, short = "sentence-transformers", "sentence-transformers, default", "s.-t."
    if default not in latency:
        usual, default, short = "transformers", PADDED, "transf."
    fastest = min(seconds for name, seconds in latency.items() if name.startswith(usual))
    return {f"× {short} default": latency[default], f"× {short} best": fastest}


def matrix_product_rate(dtype: torch.dtype) -> float:
    """GFLOP/s of a large matrix product: how much of a dtype's promise this machine keeps."""
    size = 2048
    left, right = torch.randn(2, size, size).to(dtype).unbind()
    taken = []
    for _ in range(7):
        started = perf_counter()
        left @ right
        taken.append(perf_counter() - started)
    return 2 * size**3 / median(taken) / 1e9


def measure(
    compared: dict[str, System], requests: list[Request], top_k: int, rounds: int
) -> tuple[dict[str, float], dict[str, float]]:
    """Mean over requests of the median seconds, and mean agreement with the reference's top K, by system."""
    seconds: dict[str, list[list[float]]] = {name: [[] for _ in requests] for name in compared}
    rankings: dict[str, list[Ranking]] = {name: [rank(request, top_k) for request in requests] for name, rank in
                                          track(compared.items(), "Warming up")}  # fmt: skip
    for _ in track(range(rounds), "Measuring"):
        for number, request in enumerate(requests):
            for name, rank in compared.items():
                started = perf_counter()
                rank(request, top_k)
                seconds[name][number].append(perf_counter() - started)
    latency = {name: float(np.mean([median(runs) for runs in taken])) for name, taken in seconds.items()}
    agreement = {
        name: float(
            np.mean([len(set(a) & set(b)) / len(b) for a, b in zip(found, rankings[REFERENCE], strict=True)])
        )
        for name, found in rankings.items()
    }
    return latency, agreement


def main(
    data: Annotated[Path, typer.Option(help="A collection in BEIR layout.")],
    model: Annotated[
        str, typer.Option(help="Hub id, directory, bundled name, smollm2-135m or qwen3-0.6b.")
    ] = "bundled:ms-marco-minilm-l12",
    candidates: Annotated[int, typer.Option(help="Candidates per query.")] = 20,
    top_k: Annotated[int, typer.Option(help="How many are wanted.")] = 5,
    queries: Annotated[int, typer.Option(help="Queries, each measured on its own.")] = 3,
    rounds: Annotated[int, typer.Option(help="Runs of which the median is taken.")] = 5,
) -> None:
    """Measure and print the table."""
    directory = find_or_write(model)
    requests = load_requests(data, candidates=candidates, queries=queries)
    systems = decoder_systems(directory) if is_decoder(directory) else encoder_systems(model, directory)
    latency, agreements = measure(systems, requests, top_k, rounds)
    compared_with = peers(latency)
    setting = f"{candidates} candidates, K={top_k}, {len(requests)} queries × {rounds} rounds"
    table = Table(title=f"{data.name}, {model}: {setting}, {torch.get_num_threads()} threads")
    for heading in ("system", "seconds", *compared_with, f"agreement@{top_k}"):
        table.add_column(heading, justify="left" if heading == "system" else "right")
    for name, seconds in latency.items():
        table.add_row(
            name,
            f"{seconds:.3f}",
            *(f"{peer / seconds:.2f}" for peer in compared_with.values()),
            f"{agreements[name]:.2f}",
        )
    console = Console(width=115)
    console.print(table)
    for dtype in (torch.float32, torch.bfloat16):
        console.print(f"This machine multiplies {dtype} matrices at {matrix_product_rate(dtype):.0f} GFLOP/s.")


if __name__ == "__main__":
    typer.run(main)
