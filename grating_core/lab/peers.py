"""This module compares grating with other systems on the user's texts: time, memory and agreement.

Each system computes the same requests with the same number of threads, in a process of its own, one after another.
Other systems get settings that suit them: sentence-transformers gets the quickest batch size, and OpenVINO gets
one pair at a time.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from importlib.util import find_spec
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import fmean, median
from time import perf_counter
from typing import Any

from grating_core.settings import PruningName, RerankSettings

Ranking = list[int]
Rank = Callable[[str, list[str]], Ranking]
Ways = Mapping[str, Rank]  # ways to use a system, by their description; the quickest counts

_PATIENCE = 30  # seconds that a finished process may take to end
_BATCH_SIZES = (1, 4, 32)  # the quickest is taken; 32 is the default of sentence-transformers
UNPRUNED, PRUNED = "grating, unpruned", "grating"
SENTENCE_TRANSFORMERS, OPENVINO = "sentence-transformers", "OpenVINO"
PEERS = {SENTENCE_TRANSFORMERS: "sentence_transformers", OPENVINO: "openvino"}
"""The modules of the other systems, by name."""


@dataclass(frozen=True)
class Job:
    """A job says what every system computes.

    Attributes:
        settings: The reranker's settings, except the pruning.
        directory: The directory of the model's files.
        requests: Queries with their documents.
        top_k: Number of documents to find for each request.
        rounds: How often each request is timed.
        threads: The number of threads to compute with.
        max_length: The most tokens of a query and a document together.
    """

    settings: RerankSettings
    directory: str
    requests: Sequence[tuple[str, list[str]]]
    top_k: int
    rounds: int
    threads: int
    max_length: int


@dataclass(frozen=True)
class Measured:
    """This class holds what was measured of one system.

    Attributes:
        system: Name of the system.
        setting: Description of how the system was used.
        load_seconds: Seconds of loading, after imports.
        seconds: Seconds of a request: the mean over requests of the median over rounds.
        peak_memory: The most bytes that the process had in memory while it reranked, imports included.
        rankings: The indices of the top K, best first, for each request.
        error: The reason why nothing was measured; None without an error.
    """

    system: str
    setting: str = ""
    load_seconds: float = 0.0
    seconds: float = 0.0
    peak_memory: int = 0
    rankings: tuple[Ranking, ...] = ()
    error: str | None = None


def installed(peer: str) -> bool:
    """Tell whether one of :data:`PEERS` is installed."""
    return find_spec(PEERS[peer]) is not None


def agreement(found: Measured, reference: Measured) -> float:
    """Return the mean share of the reference's top K that is in the other's."""
    pairs = zip(found.rankings, reference.rankings, strict=True)
    return fmean(len(set(ours) & set(theirs)) / max(1, len(theirs)) for ours, theirs in pairs)


def measure(job: Job, systems: Sequence[str], *, show_progress: bool = False) -> list[Measured]:
    """Measure systems, one after another.

    Args:
        job: The job of every system.
        systems: Names from :data:`UNPRUNED`, :data:`PRUNED` and :data:`PEERS`.
        show_progress: Whether to show a progress bar on standard error.

    Returns:
        The measurements of each system. A system that fails has an ``error``, and the others go on.
    """
    from tqdm import tqdm

    steps = len(systems) * len(job.requests) * (job.rounds + 1)
    with tqdm(total=steps, unit="request", disable=not show_progress) as bar:
        found = []
        for number, system in enumerate(systems, 1):
            bar.set_description(system)
            found.append(_in_a_process(job, system, bar))
            bar.update(number * steps // len(systems) - bar.n)
        return found


def _in_a_process(job: Job, system: str, bar: Any) -> Measured:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_work, args=(job, system, theirs), daemon=True)
    with _uninterrupted():
        process.start()
    theirs.close()
    try:
        while not isinstance(told := ours.recv(), Measured):
            bar.update()
        process.join(_PATIENCE)
        return told
    except EOFError:
        process.join()
        return Measured(system, error=f"its process ended with status {process.exitcode}")
    finally:
        ours.close()
        process.kill()
        process.join()
        process.close()


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """Let processes that start inside the ``with`` ignore interrupts, so that only this process gets them."""
    alone = threading.current_thread() is threading.main_thread()
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN) if alone else None
    try:
        yield
    finally:
        if alone:
            signal.signal(signal.SIGINT, handler)


def _work(job: Job, system: str, told: Connection) -> None:
    """Measure one system in this process."""
    sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: PTH123, SIM115 - hides progress bars and warnings
    try:
        told.send(_measured(job, system, lambda: told.send(None)))
    except Exception as error:  # the table shows any error of another system in its line
        told.send(Measured(system, error=f"{type(error).__name__}: {error}".splitlines()[0]))


def _measured(job: Job, system: str, step: Callable[[], None]) -> Measured:
    import torch

    torch.set_num_threads(job.threads)
    load = LOADERS[system]
    started = perf_counter()
    ways = load(job)
    load_seconds = perf_counter() - started
    setting, rank = _quickest(ways, *job.requests[0])
    rankings = []
    for query, documents in job.requests:  # the first round is not timed
        rankings.append(rank(query, documents))
        step()
    gc.collect()
    memory = _Memory()
    seconds: list[list[float]] = [[] for _ in job.requests]
    for _ in range(job.rounds):
        for number, (query, documents) in enumerate(job.requests):
            seconds[number].append(_seconds(rank, query, documents))
            memory.look()
            step()
    taken = fmean(median(runs) for runs in seconds)
    return Measured(system, setting, load_seconds, taken, memory.peak, tuple(rankings))


def _quickest(ways: Mapping[str, Rank], query: str, documents: list[str]) -> tuple[str, Rank]:
    """Return the quickest way for a request, with its description. A single way is not tried."""
    if len(ways) == 1:
        return next(iter(ways.items()))
    next(iter(ways.values()))(query, documents)  # the first call is slower than all others
    taken = {name: _seconds(rank, query, documents) for name, rank in ways.items()}
    best = min(taken, key=taken.__getitem__)
    return best, ways[best]


def _seconds(rank: Rank, query: str, documents: list[str]) -> float:
    started = perf_counter()
    rank(query, documents)
    return perf_counter() - started


class _Memory:
    """This class finds the most memory of this process from now on: exactly on Linux, elsewhere at each look."""

    def __init__(self) -> None:
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # forget the peak of loading
        self.peak = 0
        self.look()

    def look(self) -> None:
        import psutil

        seen = psutil.Process().memory_info().rss
        if sys.platform == "linux":
            with suppress(OSError):
                status = Path("/proc/self/status").read_text(encoding="utf-8")
                seen = 1024 * int(status.split("VmHWM:")[1].split()[0])
        self.peak = max(self.peak, seen)


def _load_grating(job: Job, pruning: PruningName) -> Ways:
    from grating_core.reranker import Reranker

    reranker = Reranker.open(replace(job.settings, pruning=pruning))

    def rank(query: str, documents: list[str]) -> Ranking:
        return [ranked.index for ranked in reranker.rerank(query, documents, job.top_k).ranking]

    return {f"{str(reranker.dtype).removeprefix('torch.')}, packed, pruning={pruning!r}": rank}


def _load_sentence_transformers(job: Job) -> Ways:
    from sentence_transformers import CrossEncoder

    model = CrossEncoder(job.directory, device="cpu", max_length=job.max_length, trust_remote_code=False)

    def rank_by(batch_size: int) -> Rank:
        def rank(query: str, documents: list[str]) -> Ranking:
            found = model.rank(query, documents, top_k=job.top_k, batch_size=batch_size, show_progress_bar=False)
            return [int(entry["corpus_id"]) for entry in found]

        return rank

    sizes = ", ".join(map(str, _BATCH_SIZES))
    return {f"float32, batch_size={size}, the quickest of {sizes}": rank_by(size) for size in _BATCH_SIZES}


def _load_openvino(job: Job) -> Ways:
    import numpy as np
    import openvino
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(job.directory, trust_remote_code=False)
    model = AutoModelForSequenceClassification.from_pretrained(
        job.directory, attn_implementation="sdpa", trust_remote_code=False
    ).eval()
    pair = tokenizer("a question", "an answer", return_tensors="pt")
    converted = openvino.convert_model(model, example_input=dict(pair))
    settings = {"INFERENCE_NUM_THREADS": job.threads, "PERFORMANCE_HINT": "LATENCY"}
    compiled = openvino.compile_model(converted, "CPU", settings)
    names = {key: key for key in pair}
    precision = compiled.get_property("INFERENCE_PRECISION_HINT").to_string()
    del model, converted

    def rank(query: str, documents: list[str]) -> Ranking:
        scores = []
        for document in documents:
            tokens = tokenizer(
                query, document, truncation="only_second", max_length=job.max_length, return_tensors="np"
            )
            scores.append(compiled({name: tokens[name] for name in names})[0].item())
        return [int(index) for index in np.argsort(-np.array(scores), kind="stable")[: job.top_k]]

    return {f"{precision}, one pair at a time": rank}


LOADERS: dict[str, Callable[[Job], Ways]] = {
    SENTENCE_TRANSFORMERS: _load_sentence_transformers,
    OPENVINO: _load_openvino,
    UNPRUNED: lambda job: _load_grating(job, "off"),
    PRUNED: lambda job: _load_grating(job, "auto"),
}
