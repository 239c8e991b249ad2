"""Memory and latency of one rerank under memory budgets, grating beside its peers.

    .venv/bin/python -m benchmarks.memory --model m3 --candidates 20 --candidates 60 --figure memory.png
    .venv/bin/python -m benchmarks.memory --model bundled:ms-marco-minilm-l12
    .venv/bin/python -m benchmarks.memory --model m3 --budget 180MB --requests 500

``m3`` is a checkpoint with the shape of bge-reranker-v2-m3 and random weights, written on first use. Every system
runs in a fresh process on the same requests, with the checkpoint dropped from the page cache before loading and
before each request. This process watches the resident memory of that one every 5 ms; the kernel's high-water mark
catches what is shorter.

Memory is counted over what the process holds once everything is imported and the tokenizer is loaded, from the
first weight that is read to the end of the last request; the tokenizer has a column of its own. "Private" is the
peak of what is not mapped from a file: mapped pages count as resident, but the system can take them back. A
megabyte has 10⁶ bytes.
"""

from __future__ import annotations

import ctypes
import gc
import json
import multiprocessing
import os
import platform
import re
import sys
import time
import traceback
from array import array
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from itertools import cycle, islice
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import mean, median
from typing import Annotated, Any
from unittest.mock import patch

import accelerate
import numpy as np
import psutil
import torch
import transformers
import typer
from matplotlib.figure import Figure
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

from benchmarks.shapes import random_texts, write_m3_shape
from grating_core import Reranker
from grating_core.errors import BudgetError
from grating_core.memory.plan import MemoryPlan, ModelSizes, make_plan
from grating_core.models.bundled import cache_directory
from grating_core.models.directory import find_model
from grating_core.models.templates import load_template

MAX_LENGTH = 512
TOP_K = 5
QUERY_TOKENS = 10
SAMPLE_SECONDS = 0.005
DIFFERENT_REQUESTS = 20  # of an endurance test; then they come round again
ALLOWED = 1.05  # a peak of more than so many budgets breaks the promise
# What grating is loaded with unless a system's settings say otherwise.
GRATING: dict[str, Any] = {"device": "cpu", "dtype": "bfloat16", "max_length": MAX_LENGTH, "pruning": "off"}
TRACED = ("bytes_read", "seconds_waited", "bytes_spilled", "embedding_hit_rate", "peak_memory", "compute_share")

Request = tuple[str, list[str]]
Facts = dict[str, Any]
Rank = Callable[[Request], Facts]

console = Console(width=150)


@dataclass(frozen=True)
class System:
    """Something that reranks.

    Attributes:
        name: What the table calls it.
        load: One of this module's ``load_…`` functions.
        settings: Its keyword arguments.
        budget: The bytes it was allowed, if it was told.
    """

    name: str
    load: Callable[..., tuple[Rank, Facts]]
    settings: dict[str, Any]
    budget: int | None = None


@dataclass(frozen=True)
class Job:
    """What every system is given.

    Attributes:
        directory: The model.
        requests: Queries with their candidates.
        rounds: How many requests are made; they come round again when there are fewer.
        warm: Leave the page cache alone.
    """

    directory: Path
    requests: list[Request]
    rounds: int
    warm: bool


@dataclass(frozen=True)
class Mark:
    """A moment in a worker's life.

    Attributes:
        name: ``imported``, ``tokenizer`` (loaded), ``loaded``, ``begin`` or ``end`` of a request, or ``failed``.
        seconds: On the monotonic clock, which all processes share.
        resident: Bytes in memory.
        private: Those of them that are not mapped from a file, where the system tells.
        peak: Most bytes in memory since the mark before, where the kernel tells.
        facts: What else is known at this moment.
    """

    name: str
    seconds: float
    resident: int
    private: int | None
    peak: int | None
    facts: Facts


@dataclass
class Run:
    """What was seen of one system: its marks, and samples of its memory in bytes."""

    system: System
    marks: list[Mark] = field(default_factory=list)
    seconds: array[float] = field(default_factory=lambda: array("d"))
    resident: array[float] = field(default_factory=lambda: array("d"))
    private: array[float] = field(default_factory=lambda: array("d"))
    failure: str = ""

    def all(self, name: str) -> list[Mark]:
        """The marks of that name."""
        return [mark for mark in self.marks if mark.name == name]

    def samples(self, start: Mark, end: Mark, values: Sequence[float]) -> np.ndarray:
        """What was sampled between two marks, and a bit beyond so that there is something."""
        first, last = np.searchsorted(self.seconds, [start.seconds, end.seconds])
        return np.asarray(values)[first : last + 1]

    def peak(self, start: Mark, end: Mark) -> float:
        """Most bytes in memory between two marks, as sampled or as the kernel saw it."""
        marked = [mark.peak or mark.resident for mark in self.marks if start.seconds < mark.seconds <= end.seconds]
        return float(max([*marked, *self.samples(start, end, self.resident)]))


@dataclass(frozen=True)
class Summary:
    """One row of the table. Memory is in MB over the baseline, traffic in MB per request; None is not known."""

    system: str
    budget: float | None
    tokenizer: float
    tokenizer_peak: float
    peak: float
    peak_loading: float
    private: float | None
    mean: float
    load_seconds: float
    seconds: list[float]
    read: float | None
    waited_seconds: float | None
    spilled: float | None
    hit_rate: float | None
    planned: float | None
    chunk_tokens: int | None
    resident_layers: int | None
    embedding_rows: int | None

    @property
    def ratio(self) -> float | None:
        """The peak as a share of the budget."""
        return self.peak / self.budget if self.budget else None


# The worker: one system in a process of its own.


class Reporter:
    """Sends marks to the process that watches."""

    def __init__(self, channel: Connection) -> None:
        self._channel = channel
        self._process = psutil.Process()
        self._peak_is_known = False

    def mark(self, name: str, *, tidy: bool = False, **facts: Any) -> None:
        """Report this moment; with ``tidy`` after what is not in use was given back to the system."""
        peak = _high_water() if self._peak_is_known else None
        if tidy:
            _return_memory()
        resident, private = _memory(self._process)
        self._peak_is_known = _reset_high_water()
        self._channel.send(Mark(name, time.monotonic(), resident, private, peak, facts))


def work(system: System, job: Job, channel: Connection) -> None:
    """Load a system and put the requests to it, reporting as it goes."""
    reporter = Reporter(channel)
    try:
        # transformers imports a model's code on first use: an import all the same.
        getattr(transformers, AutoConfig.from_pretrained(job.directory).architectures[0])
        reporter.mark("imported", tidy=True)
        _forget_pages(job)
        # Not tidied: the pages that loading the tokenizer leaves half empty are its own doing, for every system.
        tokenizer_loaded = partial(reporter.mark, "tokenizer")
        rank, facts = system.load(job.directory, tokenizer_loaded, **system.settings)
        reporter.mark("loaded", **facts)
        for request in islice(cycle(job.requests), job.rounds):
            _forget_pages(job)
            reporter.mark("begin")
            before, started = _storage_read(), time.perf_counter()
            facts = rank(request)
            facts["seconds"] = time.perf_counter() - started
            if (after := _storage_read()) is not None and before is not None:
                facts["storage_read"] = after - before
            reporter.mark("end", **facts)
    except Exception as error:
        reporter.mark("failed", reason=f"{type(error).__name__}: {error}", traceback=traceback.format_exc())


def load_transformers(
    directory: Path, tokenizer_loaded: Callable[[], None], *, batch_size: int | None = None, offload: bool = False
) -> tuple[Rank, Facts]:
    """The plain way: padded batches in bfloat16.

    Args:
        directory: The model.
        tokenizer_loaded: Called before any weight is read.
        batch_size: Pairs at a time; None for all at once.
        offload: Hold no weights: accelerate maps each module's from the file for as long as it computes.
    """
    tokenizer = AutoTokenizer.from_pretrained(directory)
    tokenizer_loaded()
    model = AutoModelForSequenceClassification.from_pretrained(
        directory, dtype=torch.bfloat16, device_map={"": "disk"} if offload else None
    ).eval()
    # Were anything held after all, this would compare with something else.
    assert {weight.is_meta for weight in model.parameters()} == {offload}

    @torch.inference_mode()
    def rank(request: Request) -> Facts:
        query, documents = request
        step = batch_size or len(documents)
        scores: list[float] = []
        for start in range(0, len(documents), step):
            batch = documents[start : start + step]
            pairs = tokenizer(
                [query] * len(batch), batch, padding=True, truncation="only_second", max_length=MAX_LENGTH,
                return_tensors="pt",
            )  # fmt: skip
            scores += model(**pairs).logits[:, 0].float().tolist()
        return {"ranking": np.argsort(-np.array(scores), kind="stable")[:TOP_K].tolist()}

    return rank, {}


def load_grating(directory: Path, tokenizer_loaded: Callable[[], None], **settings: Any) -> tuple[Rank, Facts]:
    """What this project offers.

    Args:
        directory: The model.
        tokenizer_loaded: Called before any weight is read.
        settings: For ``Reranker.from_pretrained``.
    """

    def load_and_tell(*arguments: Any, **options: Any) -> Any:
        template = load_template(*arguments, **options)
        tokenizer_loaded()
        return template

    with patch("grating_core.reranker.load_template", load_and_tell):
        reranker: Any = Reranker.from_pretrained(directory, **GRATING | settings)

    def rank(request: Request) -> Facts:
        result = reranker.rerank(*request, TOP_K)
        ranking = [ranked.index for ranked in result.ranking]
        return {"ranking": ranking} | {name: getattr(result.trace, name) for name in TRACED}

    if (plan := reranker.plan) is None:
        return rank, {}
    return rank, {
        "planned": plan.total,
        "chunk_tokens": plan.chunk_tokens,
        "resident_layers": len(plan.resident),
        "embedding_rows": plan.embedding_rows,
    }


def load_with_whole_table(
    directory: Path, tokenizer_loaded: Callable[[], None], **settings: Any
) -> tuple[Rank, Facts]:
    """What a budget gives, but for the embedding table, which is resident; the arguments are as above."""

    def plan(sizes: ModelSizes, budget: int) -> MemoryPlan:
        return replace(make_plan(sizes, budget), embedding_rows=sizes.vocabulary)

    with patch("grating_core.reranker.make_plan", plan):
        return load_grating(directory, tokenizer_loaded, **settings)


def _forget_pages(job: Job) -> None:
    """Drop the checkpoint from the page cache, unless somebody has it mapped: the next read is from the disk."""
    if job.warm or not hasattr(os, "posix_fadvise"):
        return
    for path in job.directory.glob("*.safetensors"):
        file = os.open(path, os.O_RDONLY)
        os.fsync(file)  # pages not yet written would stay
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(file)


def _return_memory() -> None:
    gc.collect()
    if sys.platform == "linux" and (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)):  # glibc has it
        trim(0)


def _memory(process: psutil.Process) -> tuple[int, int | None]:
    """Resident bytes of a process, and the part of them that is not mapped from a file."""
    memory = process.memory_info()
    return memory.rss, memory.rss - memory.shared if hasattr(memory, "shared") else None


def _reset_high_water() -> bool:
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return False
    return True


def _high_water() -> int:
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


def _storage_read() -> int | None:
    """Bytes that this process has had from the disk, read-ahead included, where the system counts them."""
    process = psutil.Process()
    return process.io_counters().read_bytes if hasattr(process, "io_counters") else None


# The watcher.


def watch(system: System, job: Job, on_mark: Callable[[Mark], None] = lambda mark: None) -> Run:
    """Run a system in a fresh process and sample its memory until it is done.

    Args:
        system: What is run.
        job: What it is given.
        on_mark: Called with each mark as it comes.
    """
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=work, args=(system, job, sender), daemon=True)
    process.start()
    sender.close()  # the worker holds the only other end now: when it dies, the pipe ends
    watched = psutil.Process(process.pid)
    run = Run(system)
    try:
        while True:
            if receiver.poll(SAMPLE_SECONDS):
                run.marks.append(receiver.recv())
                on_mark(run.marks[-1])
            resident, private = _memory(watched)
            run.seconds.append(time.monotonic())
            run.resident.append(resident)
            run.private.append(private or resident)
    except (EOFError, psutil.Error):
        process.join()
    if failed := run.all("failed"):
        run.failure = failed[0].facts["reason"]
    elif process.exitcode:
        run.failure = f"died with exit code {process.exitcode}"
    return run


def summarise(run: Run) -> Summary:
    """Reduce what was seen to the figures of a row."""
    imported, tokenizer, loaded = (run.all(name)[0] for name in ("imported", "tokenizer", "loaded"))
    begins, ends = run.all("begin"), run.all("end")
    computing = [run.samples(begin, end, run.resident) for begin, end in zip(begins, ends, strict=True)]

    def average(name: str, unit: float = 1.0) -> float | None:
        values = [value for mark in ends if (value := mark.facts.get(name)) is not None]
        return mean(values) / unit if values else None

    read = average("bytes_read", 1e6)
    planned = loaded.facts.get("planned")
    private = run.samples(tokenizer, ends[-1], run.private).max()
    return Summary(
        system=run.system.name,
        budget=run.system.budget and run.system.budget / 1e6,
        tokenizer=(tokenizer.resident - imported.resident) / 1e6,
        tokenizer_peak=(run.peak(imported, tokenizer) - imported.resident) / 1e6,
        peak=(run.peak(tokenizer, ends[-1]) - tokenizer.resident) / 1e6,
        peak_loading=(run.peak(tokenizer, loaded) - tokenizer.resident) / 1e6,
        private=tokenizer.private and (private - tokenizer.private) / 1e6,
        mean=(float(np.concatenate(computing).mean()) - tokenizer.resident) / 1e6,
        load_seconds=loaded.seconds - imported.seconds,
        seconds=[mark.facts["seconds"] for mark in ends],
        read=average("storage_read", 1e6) if read is None else read,
        waited_seconds=average("seconds_waited"),
        spilled=average("bytes_spilled", 1e6),
        hit_rate=average("embedding_hit_rate"),
        planned=planned and planned / 1e6,
        chunk_tokens=loaded.facts.get("chunk_tokens"),
        resident_layers=loaded.facts.get("resident_layers"),
        embedding_rows=loaded.facts.get("embedding_rows"),
    )


# What is run.


def grating(name: str, *, budget: int | None = None, **settings: Any) -> System:
    """A reranker of this project."""
    return System(name, load_grating, {"memory_budget": budget, **settings}, budget)


def limited(budget: int) -> System:
    """A reranker of this project that is allowed so many bytes."""
    return grating(f"grating, {budget / 1e6:.0f} MB", budget=budget)


def systems(budgets: list[int]) -> list[System]:
    """Everything that is compared, peers first."""
    return [
        System("transformers, one batch", load_transformers, {}),
        System("transformers, batches of 4", load_transformers, {"batch_size": 4}),
        System("accelerate offload, one batch", load_transformers, {"offload": True}),
        System("accelerate offload, batches of 4", load_transformers, {"batch_size": 4, "offload": True}),
        grating("grating, no budget"),
        *map(limited, budgets),
    ]


def ablation_steps(budget: int) -> list[System]:
    """From everything in memory at once down to a budget, one means after the other."""
    unbounded = 10**9  # tokens in a chunk: more than there are
    return [
        grating("none", chunk_tokens=unbounded),
        grating("pruning", pruning="auto", chunk_tokens=unbounded),
        grating("+ chunks", pruning="auto"),
        System("+ streaming", load_with_whole_table, {"pruning": "auto", "memory_budget": budget}),
        grating("+ embedding rows", pruning="auto", budget=budget),
    ]


def default_budgets(directory: Path) -> list[int]:
    """The smallest budget that works, the one that holds every weight, and two between."""
    try:
        Reranker.from_pretrained(directory, memory_budget=1, **GRATING)
    except BudgetError as error:
        return [int(budget) for budget in np.linspace(error.smallest, error.resident, 4)]
    raise AssertionError("one byte was accepted as a budget")


def make_requests(directory: Path, count: int, candidates: int, tokens: int) -> list[Request]:
    """Random queries, each with documents of its own, so that only frequent words come again."""
    queries = random_texts(directory, count, QUERY_TOKENS, seed=1)
    documents = random_texts(directory, count * candidates, tokens, seed=2)
    return [(query, documents[i * candidates : (i + 1) * candidates]) for i, query in enumerate(queries)]


def endure(system: System, job: Job) -> Run:
    """Put many requests to one system, and tell whether its memory grows."""
    held: list[int] = []
    console.print(f"{system.name}, {job.rounds} requests: MB in memory, imports included, after request")

    def tell(mark: Mark) -> None:
        if mark.name == "end":
            held.append(mark.resident)
            if len(held) % max(1, job.rounds // 20) == 0:
                console.print(f"{len(held):6d}: {mark.resident / 1e6:8.1f}   {mark.facts['seconds']:.2f} s")

    run = watch(system, job, tell)
    if run.failure:
        console.print(f"[bold red]failed:[/] {escape(run.failure)}")
        return run
    settled = held[len(held) // 2 :]  # caches fill and the allocator finds its level in the first half
    slope = np.polyfit(range(len(settled)), settled, 1)[0] if len(settled) > 1 else 0.0
    summary = summarise(run)
    console.print(
        f"{slope / 1e3:+.1f} kB a request in the second half; "
        f"peak {summary.peak:.1f} MB over imports and tokenizer, {_judged(summary.ratio)} of the budget"
    )
    return run


# How it is shown.


def show(title: str, runs: list[Run]) -> None:
    """Print the table."""
    caption = "MB over imports and tokenizer; read, waited and spilled per request"
    table = Table(title=title, caption=caption)
    table.add_column("system", no_wrap=True)
    for heading in (
        "token-\nizer MB", "peak\nMB", "private\nMB", "mean\nMB", "peak /\nbudget", "load\ns", "latency\ns",
        "read\nMB", "waited\ns", "spilled\nMB", "chunk\ntokens", "resident\nlayers",
    ):  # fmt: skip
        table.add_column(heading, justify="right")
    for row in (summarise(run) for run in runs if not run.failure):
        table.add_row(
            row.system,
            f"{row.tokenizer:.0f}",
            f"{row.peak:.0f}",
            _shown(row.private, ".0f"),
            f"{row.mean:.0f}",
            _judged(row.ratio),
            f"{row.load_seconds:.2f}",
            f"{median(row.seconds):.2f}",
            _shown(row.read, ".0f"),
            _shown(row.waited_seconds, ".2f"),
            _shown(row.spilled, ".0f"),
            _shown(row.chunk_tokens, "d"),
            _shown(row.resident_layers, "d"),
        )
    console.print(table)
    for run in runs:
        if run.failure:
            console.print(f"[bold red]{run.system.name} failed:[/] {escape(run.failure)}")


def _shown(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _judged(ratio: float | None) -> str:
    if ratio is None:
        return ""
    return f"[bold red]{ratio:.2f} OVER[/]" if ratio > ALLOWED else f"{ratio:.2f}"


def draw_memory(runs_by_title: dict[str, list[Run]], path: Path) -> None:
    """Memory over time while each system loads its weights and serves its first request; budgets are dotted."""
    figure = Figure(figsize=(11, 5 * len(runs_by_title)), layout="constrained")
    rows = figure.subplots(len(runs_by_title), squeeze=False)[:, 0]
    for axes, (title, runs) in zip(rows, runs_by_title.items(), strict=True):
        for run in (run for run in runs if not run.failure):
            start, end = run.all("tokenizer")[0], run.all("end")[0]
            seconds = run.samples(start, end, run.seconds) - start.seconds
            grown = (run.samples(start, end, run.resident) - start.resident) / 1e6
            style = "-" if run.system.load is load_grating else "--"
            (line,) = axes.plot(seconds, grown, linestyle=style, label=run.system.name)
            if run.system.budget:
                axes.axhline(run.system.budget / 1e6, color=line.get_color(), linestyle=":", linewidth=1)
        axes.set(title=title, xlabel="seconds since the tokenizer was loaded")
        axes.set_ylabel("MB over imports and tokenizer")
        axes.set_xlim(left=0)
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
        axes.legend(loc="upper left", bbox_to_anchor=(1, 1))
    figure.savefig(path, dpi=150)


def draw_ablation(runs_by_title: dict[str, list[Run]], path: Path) -> None:
    """Peak memory and latency after each step, as bars."""
    figure = Figure(figsize=(11, 3.5 * len(runs_by_title)), layout="constrained")
    rows = figure.subplots(len(runs_by_title), 2, squeeze=False, sharey="row")
    for (left, right), (title, runs) in zip(rows, runs_by_title.items(), strict=True):
        summaries = [summarise(run) for run in runs if not run.failure]
        names = [summary.system for summary in summaries]
        peaks = left.barh(names, [summary.peak for summary in summaries], color="#0072B2")
        left.bar_label(peaks, fmt="%.0f", padding=3)
        left.set(xlabel="peak MB over imports and tokenizer")
        left.set_title(title, loc="left")
        left.invert_yaxis()  # the first step on top
        seconds = right.barh(names, [median(summary.seconds) for summary in summaries], color="#E69F00")
        right.bar_label(seconds, fmt="%.1f", padding=3)
        right.set(xlabel="seconds for one rerank")
        for axes in (left, right):
            axes.margins(x=0.15)
    figure.savefig(path, dpi=150)


def write_json(runs_by_title: dict[str, list[Run]], path: Path) -> None:
    """Write all that was measured."""
    versions = {module.__name__: module.__version__ for module in (torch, transformers, accelerate)}
    measured = {title: [_raw(run) for run in runs] for title, runs in runs_by_title.items()}
    everything = {"machine": platform.platform(), "versions": versions, "runs": measured}
    path.write_text(json.dumps(everything) + "\n", encoding="utf-8")


def _raw(run: Run) -> dict[str, Any]:
    return {
        "system": run.system.name,
        "settings": run.system.settings,
        "failure": run.failure,
        "summary": None if run.failure else asdict(summarise(run)),
        "marks": [asdict(mark) for mark in run.marks],
        "memory": _thinned(run),
    }


def _thinned(run: Run, points: int = 1000) -> list[tuple[float, float]]:
    """Memory over time in few points, each the most of its stretch: monotonic seconds, and MB in memory."""
    starts = np.unique(np.linspace(0, len(run.seconds), points, endpoint=False).astype(int))
    seconds = np.asarray(run.seconds)[starts].round(3)
    most = (np.maximum.reduceat(np.asarray(run.resident), starts) / 1e6).round(2)
    return list(zip(seconds.tolist(), most.tolist(), strict=True))


def parse_bytes(size: str) -> int:
    """``180MB`` in bytes."""
    if not (found := re.fullmatch(r"(\d+(?:\.\d+)?)\s*(kB|MB|GB)", size)):
        raise typer.BadParameter(f"{size!r} is not a size such as 180MB")
    return int(float(found[1]) * {"kB": 10**3, "MB": 10**6, "GB": 10**9}[found[2]])


def main(
    model: Annotated[str, typer.Option(help="m3, or a hub id, directory or bundled name.")] = "m3",
    directory: Annotated[Path | None, typer.Option(help="Where m3 is, or goes; else the cache.")] = None,
    candidates: Annotated[
        list[int] | None, typer.Option(help="Candidates of a query, else 20; may be given several times.")
    ] = None,
    tokens: Annotated[int, typer.Option(help="Mean tokens of a candidate.")] = 500,
    budget: Annotated[
        list[str] | None,
        typer.Option(help="Such as 180MB; may be given several times. Else from the smallest to all resident."),
    ] = None,
    rounds: Annotated[int, typer.Option(help="Requests, of which the median is taken.")] = 3,
    requests: Annotated[int, typer.Option(help="Endurance instead: so many requests in the first budget.")] = 0,
    figure: Annotated[Path | None, typer.Option(help="Draw memory over time here.")] = None,
    ablation: Annotated[
        Path | None, typer.Option(help="The ablation instead, of 60 candidates by default, drawn here.")
    ] = None,
    only: Annotated[str, typer.Option(help="Only systems with this in their name.")] = "",
    json_path: Annotated[Path | None, typer.Option("--json", help="Write everything measured here.")] = None,
    warm: Annotated[bool, typer.Option("--warm", help="Leave the checkpoint in the page cache.")] = False,
) -> None:
    """Measure and print the tables."""
    if model == "m3":
        place = write_m3_shape(directory or cache_directory() / "benchmarks" / "m3")
    else:
        place = find_model(model, show_progress=True)
    budgets = [parse_bytes(size) for size in budget] if budget else default_budgets(place)
    rounds = requests or rounds
    cache = "warm" if warm else "cold"
    runs: dict[str, list[Run]] = {}
    for count in candidates or [60 if ablation else 20]:
        title = f"{model}: {count} candidates of {tokens} tokens, {cache} pages, {torch.get_num_threads()} threads"
        job = Job(place, make_requests(place, min(rounds, DIFFERENT_REQUESTS), count, tokens), rounds, warm)
        if requests:
            runs[title] = [endure(limited(budgets[0]), job)]
            continue
        chosen = [s for s in (ablation_steps(budgets[0]) if ablation else systems(budgets)) if only in s.name]
        runs[title] = []
        for system in chosen:
            with console.status(system.name):
                runs[title].append(watch(system, job))
        show(title, runs[title])
    if figure:
        draw_memory(runs, figure)
    if ablation:
        draw_ablation(runs, ablation)
    if json_path:
        write_json(runs, json_path)


if __name__ == "__main__":
    typer.run(main)
