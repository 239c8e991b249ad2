"""Latency of one rerank, grating beside its peers in one process.

    make bench-deps
    .venv/bin/python -m benchmarks.latency --data ../shared/data/cranfield --model bundled:ms-marco-minilm-l12

BM25's top candidates of a few queries are reranked by every system in turn, round after round, so that a noisy
machine is noisy for all of them. The median over the rounds of each query is summed over the queries.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Annotated

import numpy as np
import onnxruntime
import torch
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table
from sentence_transformers import CrossEncoder
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from benchmarks.collections import Request, load_requests
from grating_core import Reranker
from grating_core.engine.attention import PACKED_ATTENTION, Packing
from grating_core.engine.ragged import RaggedBatch
from grating_core.models.bundled import BUNDLED_PREFIX, bundled_source
from grating_core.models.directory import find_model
from grating_core.models.loading import StoredModel
from grating_core.models.templates import load_template

Ranking = list[int]
System = Callable[[Request, int], Ranking]

REFERENCE = "transformers, padded, float32"


def best(scores: np.ndarray | torch.Tensor, top_k: int) -> Ranking:
    """Indices of the highest scores."""
    return [int(index) for index in np.argsort(-np.asarray(scores, dtype=np.float64), kind="stable")[:top_k]]


def transformers_padded(directory: Path, dtype: torch.dtype) -> System:
    """The plain way: one batch, padded to its longest pair."""
    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = AutoModelForSequenceClassification.from_pretrained(directory, dtype=dtype).eval()

    @torch.inference_mode()
    def rank(request: Request, top_k: int) -> Ranking:
        pairs = tokenizer(
            [request.query] * len(request.documents), request.documents, padding=True, truncation=True,
            return_tensors="pt",
        )  # fmt: skip
        return best(model(**pairs).logits[:, 0].float(), top_k)

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
    tokenizer = AutoTokenizer.from_pretrained(directory)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(str(bundled_source()), options, providers=["CPUExecutionProvider"])
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
    stored = StoredModel(directory, device=torch.device("cpu"), dtype=dtype, attention=PACKED_ATTENTION)
    model, template = stored.load(None), load_template(directory, 512)

    @torch.inference_mode()
    def rank(request: Request, top_k: int) -> Ranking:
        pairs = template.encode(request.query, request.documents)
        batch = RaggedBatch.pack([p.input_ids for p in pairs], [p.token_type_ids for p in pairs], model.device)
        positions = batch.positions()[None]
        hidden = model.embed(batch.input_ids[None], batch.token_type_ids[None], positions)
        for number in range(1, model.depth + 1):
            hidden = model.run_layer(number, hidden, positions, packing=Packing(batch.lengths))
        return best(model.read_scores(hidden, batch.lengths), top_k)

    return rank


def grating(directory: Path, pruning: str, dtype: str = "auto") -> System:
    """What this project offers in place of all the above."""
    reranker = Reranker.from_pretrained(directory, pruning=pruning, dtype=dtype, device="cpu")

    def rank(request: Request, top_k: int) -> Ranking:
        return [ranked.index for ranked in reranker.rerank(request.query, request.documents, top_k).ranking]

    return rank


def systems(model: str, directory: Path) -> dict[str, System]:
    """Everything that is compared, by the name it has in the table."""
    compared = {
        REFERENCE: transformers_padded(directory, torch.float32),
        "transformers, padded, bfloat16": transformers_padded(directory, torch.bfloat16),
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
    model: Annotated[str, typer.Option(help="Hub id, directory or bundled name.")] = "bundled:ms-marco-minilm-l12",
    candidates: Annotated[int, typer.Option(help="Candidates per query.")] = 20,
    top_k: Annotated[int, typer.Option(help="How many are wanted.")] = 5,
    queries: Annotated[int, typer.Option(help="Queries, each measured on its own.")] = 3,
    rounds: Annotated[int, typer.Option(help="Runs of which the median is taken.")] = 5,
) -> None:
    """Measure and print the table."""
    directory = find_model(model, show_progress=True)
    requests = load_requests(data, candidates=candidates, queries=queries)
    latency, agreements = measure(systems(model, directory), requests, top_k, rounds)
    peers = [seconds for name, seconds in latency.items() if name.startswith("sentence-transformers")]
    setting = f"{candidates} candidates, K={top_k}, {len(requests)} queries × {rounds} rounds"
    table = Table(title=f"{data.name}, {model}: {setting}, {torch.get_num_threads()} threads")
    for heading in ("system", "seconds", "× s.-t. default", "× s.-t. best", f"agreement@{top_k}"):
        table.add_column(heading, justify="left" if heading == "system" else "right")
    for name, seconds in latency.items():
        table.add_row(
            name,
            f"{seconds:.3f}",
            f"{latency['sentence-transformers, default'] / seconds:.2f}",
            f"{min(peers) / seconds:.2f}",
            f"{agreements[name]:.2f}",
        )
    console = Console(width=115)
    console.print(table)
    for dtype in (torch.float32, torch.bfloat16):
        console.print(f"This machine multiplies {dtype} matrices at {matrix_product_rate(dtype):.0f} GFLOP/s.")


if __name__ == "__main__":
    typer.run(main)
