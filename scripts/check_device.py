"""Check grating on a GPU: scores, streaming, memory and latency, beside transformers. The result is JSON.

    make venv
    .venv/bin/python -m scripts.check_device --output device.json

It takes less than eight minutes, and the result names what no time was left for. Where there is no GPU it says so,
and the exit code is 2; ``--device cpu`` runs it all the same. The result names checks that failed as well, and the
exit code is then 1.

The models have the shapes of bge-reranker-v2-m3 (an encoder) and Qwen3-Reranker-0.6B (a decoder, whose candidates
share a prompt), with random weights. So times and memory are those of the real models, and rankings are not.
"""

from __future__ import annotations

import gc
import json
import platform
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Annotated, Any

import accelerate
import torch
import transformers
import typer

import grating_core
from benchmarks.recipes import Recipe, best, find_recipe, is_decoder
from benchmarks.shapes import find_or_write, random_texts
from grating_core import BudgetError, Reranker
from grating_core.layers.varlen import serves
from grating_core.memory.meter import resident_memory
from grating_core.models.placement import choose_device

MODELS = ["m3", "qwen3-0.6b"]
TOP_K = 5
CLOSE = 1e-4  # the most that a score in float32 may differ from transformers'
HALVES = {"cuda": ("bfloat16", "float16"), "mps": ("float16",), "cpu": ("bfloat16",)}
COPIED = 256_000_000  # bytes of a copy whose speed is measured

Result = dict[str, Any]
Question = tuple[str, list[str]]
Ask = Callable[[Question], list[float]]
"""A function that scores the candidates of a question, in their order."""


@dataclass
class Check:
    """A check knows its device and its time, and collects what failed."""

    device: torch.device
    seconds: float
    started: float = field(default_factory=perf_counter)
    failures: list[str] = field(default_factory=list)

    def expect(self, holds: bool, sentence: str) -> None:
        """Note a sentence that does not hold."""
        if not holds:
            self.failures.append(sentence)
            say(f"FAILED: {sentence}")

    def part(self, found: Result, name: str, measure: Callable[[], Any]) -> None:
        """Put what a part of the check measures into the result, or why it could not be measured."""
        if perf_counter() - self.started > self.seconds:
            found[name] = {"skipped": "no time was left"}
            return
        say(f"{name} ...")
        try:
            found[name] = measure()
        except Exception as error:  # a device may lack memory or a function, and the other parts still count
            found[name] = {"error": f"{type(error).__name__}: {error}"}
            self.expect(False, f"{name}: {type(error).__name__}")
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def finish(self) -> None:
        """Wait until the device has done its work."""
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)

    def seconds_of(self, work: Callable[[], object]) -> float:
        """Return the seconds of some work, until the device has done it."""
        self.finish()
        started = perf_counter()
        work()
        self.finish()
        return perf_counter() - started

    @contextmanager
    def memory(self, found: Result) -> Iterator[None]:
        """Put the most bytes that are taken inside the ``with`` into a result, where the device tells them."""
        gc.collect()
        if self.device.type == "cuda":
            before = torch.cuda.memory_allocated(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
            yield
            found["peak_bytes"] = torch.cuda.max_memory_allocated(self.device) - before
            return
        told = torch.mps.driver_allocated_memory if self.device.type == "mps" else resident_memory
        before = told()
        yield
        found["bytes_after"] = told() - before


@dataclass
class Subject:
    """A model that is checked, and questions to it."""

    check: Check
    directory: Path
    questions: list[Question]
    max_length: int

    def grating(self, dtype: str, **settings: Any) -> Reranker:
        """Load the model with grating, unpruned unless told otherwise."""
        how = {"pruning": "off", "max_length": self.max_length, **settings}
        return Reranker.from_pretrained(self.directory, device=self.check.device, dtype=dtype, **how)

    def recipe(self) -> Recipe:
        """Return how transformers is told to rerank."""
        return find_recipe(self.directory, self.max_length)

    def transformers(self, dtype: str, held: ExitStack, offload: str | None = None) -> Ask:
        """Load the model with transformers, and perhaps let accelerate offload its weights to memory or disk.

        Args:
            dtype: The dtype.
            held: What ends when the model is not needed any more.
            offload: ``"cpu"`` or ``"disk"``; None for a model on the device.
        """
        recipe, device = self.recipe(), self.check.device
        model = recipe.architecture.from_pretrained(
            self.directory, dtype=getattr(torch, dtype), trust_remote_code=False
        ).eval()
        if offload is None:
            model = model.to(device)
        elif offload == "cpu":
            accelerate.cpu_offload(model, execution_device=device)
        else:
            place = held.enter_context(tempfile.TemporaryDirectory(prefix="offloaded-"))
            accelerate.disk_offload(model, place, execution_device=device)

        def on_device(**batch: Any) -> Any:
            return model(**{name: one.to(device) if torch.is_tensor(one) else one for name, one in batch.items()})

        def ask(question: Question) -> list[float]:
            scores: list[float] = recipe.scores(on_device, *question).tolist()
            return scores

        return ask


def asker(reranker: Reranker, top_k: int | None = None) -> Ask:
    """Return a function that asks grating for the scores of all candidates, or only for the best."""

    def ask(question: Question) -> list[float]:
        ranking = reranker.rerank(*question, top_k or len(question[1])).ranking
        scores = [float("-inf")] * len(question[1])
        for ranked in ranking:
            scores[ranked.index] = ranked.score
        return scores

    return ask


def parity(subject: Subject) -> Result:
    """Compare scores with those of transformers in float32 on the same device."""
    check = subject.check
    with ExitStack() as held:
        reference = subject.transformers("float32", held)
        expected = [reference(question) for question in subject.questions]
    del reference
    found: Result = {}
    for dtype in ("float32", *HALVES[check.device.type]):
        with subject.grating(dtype) as reranker:
            ask = asker(reranker)
            scores = [ask(question) for question in subject.questions]
            query, documents = subject.questions[0]
            alone = [ask((query, [text]))[0] for text in documents[:3]]
            model = reranker.scorer.model
            served = serves(model.spec.layers[0], torch.empty(0, dtype=model.dtype, device=model.device))
        pairs = list(zip(chain.from_iterable(scores), chain.from_iterable(expected), strict=True))
        agreed = [
            len({*best(ours, TOP_K)} & {*best(theirs, TOP_K)}) / min(TOP_K, len(theirs))
            for ours, theirs in zip(scores, expected, strict=True)
        ]
        found[dtype] = {
            "attention_in_one_call": served,
            "largest_error": max(abs(ours - theirs) for ours, theirs in pairs),
            "mean_error": sum(abs(ours - theirs) for ours, theirs in pairs) / len(pairs),
            "top_k_agreement": sum(agreed) / len(agreed),
            "alone_differs_by": max(abs(a - b) for a, b in zip(alone, scores[0], strict=False)),
        }
    largest = found["float32"]["largest_error"]
    check.expect(largest <= CLOSE, f"a score in float32 differs from transformers' by {largest:.1e}")
    return found


def streaming(subject: Subject) -> Result:
    """Measure how much of reading and copying weights is hidden behind computing, with the smallest budget."""
    check, question = subject.check, subject.questions[0]
    dtype = HALVES[check.device.type][0]
    try:
        subject.grating(dtype, memory_budget=1).close()
    except BudgetError as error:
        budget = error.smallest
    found: Result = {"dtype": dtype, "budget_bytes": budget}
    with check.memory(found):
        reranker = subject.grating(dtype, memory_budget=budget)
        streamed = asker(reranker)
        scores = streamed(question)
    with reranker:
        plan, model = reranker.plan, reranker.scorer.model
        assert plan is not None
        if "peak_bytes" in found:
            found["plan_bytes"] = plan.total
            check.expect(found["peak_bytes"] <= plan.total, "the peak on the device is above the plan")

        def read_all() -> None:
            for number in range(1, model.depth + 1):
                with model.layer(number):
                    pass

        seconds = [check.seconds_of(partial(streamed, question)) for _ in range(3)]
        reading = [check.seconds_of(read_all) for _ in range(3)]
        trace = reranker.rerank(*question, TOP_K).trace
        slice_tokens = reranker.scorer.slice_tokens
    with subject.grating(dtype) as resident:
        resident.scorer.slice_tokens = slice_tokens  # the same steps, with weights that are there
        ask = asker(resident)
        difference = max(abs(a - b) for a, b in zip(ask(question), scores, strict=True))
        computing = [check.seconds_of(partial(ask, question)) for _ in range(3)]
    late = max(0.0, median(seconds) - median(computing))
    return found | {
        "seconds": median(seconds),
        "seconds_computing_alone": median(computing),
        "seconds_reading_alone": median(reading),
        "hidden_share_of_reading": 1 - min(1.0, late / median(reading)),
        "bytes_read": trace.bytes_read,
        "seconds_waited": trace.seconds_waited,
        "resident_layers": len(plan.resident),
        "slice_tokens": slice_tokens,
        "scores_differ_by": difference,
    }


def copies(check: Check) -> Result:
    """Measure copies to the device in bytes a second, from pinned and from ordinary memory."""
    target = torch.empty(COPIED, dtype=torch.uint8, device=check.device)
    found = {}
    for name, pinned in (("pinned", True), ("ordinary", False)):
        source = torch.ones(COPIED, dtype=torch.uint8, pin_memory=pinned and check.device.type == "cuda")
        copy = partial(target.copy_, source, non_blocking=True)
        seconds = [check.seconds_of(copy) for _ in range(4)]
        found[name] = COPIED / min(seconds)
    return found


def latency(subject: Subject, rounds: int) -> list[Result]:
    """Time requests with each system, the systems in turns."""
    half = HALVES[subject.check.device.type][0]
    with ExitStack() as held:
        loads: dict[tuple[str, str], Callable[[], Ask]] = {}
        for dtype in (half, "float32"):
            loads["transformers, one batch", dtype] = partial(subject.transformers, dtype, held)
            loads["grating, unpruned", dtype] = partial(_load_grating, subject, held, dtype)
        loads["grating, auto", half] = partial(_load_grating, subject, held, half, "auto", TOP_K)
        for offload in ("cpu", "disk"):
            name = f"transformers, offloaded by accelerate to {offload}"
            loads[name, half] = partial(subject.transformers, half, held, offload)
        return _timed(subject, loads, rounds)


def _load_grating(
    subject: Subject, held: ExitStack, dtype: str, pruning: str = "off", top_k: int | None = None
) -> Ask:
    return asker(held.enter_context(subject.grating(dtype, pruning=pruning)), top_k)


def _timed(subject: Subject, loads: dict[tuple[str, str], Callable[[], Ask]], rounds: int) -> list[Result]:
    check = subject.check
    rows: list[Result] = []
    asks: list[tuple[Result, Ask]] = []
    for (system, dtype), load in loads.items():
        row: Result = {"system": system, "dtype": dtype}
        rows.append(row)
        try:
            with check.memory(row):
                started = perf_counter()
                ask = load()
                row["load_seconds"] = perf_counter() - started
                row["first_seconds"] = check.seconds_of(partial(ask, subject.questions[0]))
            asks.append((row, ask))
        except Exception as error:  # too little memory for one system does not stop the others
            row["error"] = f"{type(error).__name__}: {error}"
    times: list[list[float]] = [[] for _ in asks]
    for number in range(rounds):
        question = subject.questions[number % len(subject.questions)]
        for own, (_, ask) in zip(times, asks, strict=True):
            if perf_counter() - check.started < check.seconds:
                own.append(check.seconds_of(partial(ask, question)))
    for own, (row, _) in zip(times, asks, strict=True):
        row |= {"seconds": median(own) if own else None, "rounds": own}
    return rows


def facts(device: torch.device) -> Result:
    """Return what the figures depend on."""
    found: Result = {
        "device": str(device),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "grating": grating_core.__version__,
        "processor": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {
            "name": properties.name,
            "memory_bytes": properties.total_memory,
            "capability": list(torch.cuda.get_device_capability(device)),
            "cuda": torch.version.cuda,
        }
    return found


def say(text: str) -> None:
    """Write a line to standard error."""
    typer.echo(text, err=True)


def main(
    device: Annotated[str | None, typer.Option(help="cuda, cuda:N, mps or cpu. The default is a GPU.")] = None,
    model: Annotated[
        list[str] | None, typer.Option(help="m3, qwen3-0.6b, hub id, directory or bundled name.")
    ] = None,
    candidates: Annotated[int, typer.Option(help="Candidates of a query.")] = 20,
    tokens: Annotated[int, typer.Option(help="Mean tokens of a candidate.")] = 480,
    rounds: Annotated[int, typer.Option(help="Requests that are timed, of which the median is taken.")] = 10,
    seconds: Annotated[float, typer.Option(help="Seconds after which no further part begins.")] = 400,
    output: Annotated[
        Path | None, typer.Option(help="File of the result. The default is standard output.")
    ] = None,
) -> None:
    """Check grating on a GPU, beside transformers."""
    try:
        chosen = choose_device(device)
    except ValueError as error:
        say(str(error))
        raise typer.Exit(2) from error
    if device is None and chosen.type == "cpu":
        say("This machine has no GPU that torch can use (CUDA or MPS). --device cpu runs the checks without one.")
        raise typer.Exit(2)
    check = Check(chosen, seconds)
    found: Result = {"facts": facts(chosen), "candidates": candidates, "tokens": tokens, "models": {}}
    check.part(found, "copies", partial(copies, check))
    for name in model or MODELS:
        say(f"{name}: finding or writing the model ...")
        directory = find_or_write(name)
        queries = random_texts(directory, 2, 10, seed=1)
        documents = random_texts(directory, 2 * candidates, tokens, seed=2)
        questions = [(queries[i], documents[i * candidates : (i + 1) * candidates]) for i in range(2)]
        subject = Subject(check, directory, questions, 640 if is_decoder(directory) else 512)
        own: Result = {}
        found["models"][name] = own
        check.part(own, "parity", partial(parity, subject))
        check.part(own, "streaming", partial(streaming, subject))
        check.part(own, "latency", partial(latency, subject, rounds))
    found |= {"failures": check.failures, "seconds": perf_counter() - check.started}
    text = json.dumps(found, indent=2, ensure_ascii=False) + "\n"
    if output is None:
        sys.stdout.write(text)
    else:
        output.write_text(text, encoding="utf-8")
    raise typer.Exit(1 if check.failures else 0)


if __name__ == "__main__":
    typer.run(main)
