"""How fast a large language model writes: all in memory, with half of its weights in memory, and with pruning.

    .venv/bin/python -m benchmarks.streaming resident
    .venv/bin/python -m benchmarks.streaming disk
    .venv/bin/python -m benchmarks.streaming slow-disk

The weights are random, in the shape of Qwen3-4B: 8 GB in bfloat16. Every system runs in a fresh process, after
another process has written what it needs in the cache (``--model qwen3-4b-9`` has a quarter of the layers, and of
the time that this takes). Those that hold everything take turns, and need 16 GB
together. Those that stream run one after the other, and read past the page cache. Their budget is what everything
in memory would take, less half of the weights. Dense streaming and pruning with as many bits get the same. The
first round warms the caches of columns and is not counted. Tokens are drawn at random (temperature 1), so that no
text repeats itself.

The slow disk is this one, made to wait: each read takes as long as its bytes take at 550 MB/s, or a 90,000th of a
second if that is longer, one read after the other, as behind a SATA cable. It is slow from the begin on, so that a
measurement of the disk finds it so. Columns that are read at the same time wait once, for all of them.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from io import FileIO
from pathlib import Path
from statistics import median
from threading import Lock
from typing import Annotated, Any, Literal
from unittest.mock import patch

import torch
import typer
from transformers import AutoConfig

from benchmarks.generation import make_prompt
from benchmarks.report import RESULTS, Output, Row, write_result
from benchmarks.shapes import find_or_write
from benchmarks.worker import Ask, Facts, Ready, System, forget_pages, import_all, loaded, progress, ready_after
from grating_core import BudgetError, StreamedCausalLM
from grating_core.columns import install, reading
from grating_core.memory import positioned
from grating_core.memory.pieces import Pieces
from grating_core.opening.language_models import OpenLanguageModel, open_language_model
from grating_core.settings import GenerationSettings

LENGTH = 256  # tokens of the longest text
PROMPT_TOKENS = 16
SLOW = 550_000_000  # bytes a second
READS = 90_000  # reads a second: data sheets of SATA disks have 90,000 to 100,000
Part = Literal["resident", "disk", "slow-disk"]


@dataclass(frozen=True)
class Case:
    """A way to generate.

    Attributes:
        bits: Bits of a weight; None for bfloat16.
        density: ``mlp_density``; None for dense layers.
    """

    bits: int | None = None
    density: float | None = None

    @property
    def name(self) -> str:
        """What the table calls it."""
        return f"{'bfloat16' if self.bits is None else f'{self.bits} bits'}, {self.way}"

    @property
    def way(self) -> str:
        """Whether it prunes."""
        return "dense" if self.density is None else f"density {self.density}"


CASES: dict[Part, tuple[Case, ...]] = {
    "resident": (Case(), Case(8), Case(4)),
    "disk": (Case(), Case(4), Case(4, 0.5)),
    "slow-disk": (Case(4), Case(4, 0.5)),
}


class SlowDisk:
    """A slow disk gives so many bytes and so many reads a second, to all its readers together.

    Args:
        rate: Bytes a second.
        reads: Reads a second.
    """

    def __init__(self, rate: float, reads: float = READS) -> None:
        self._rate, self._reads = rate, reads
        self._free = 0.0  # the moment at which the disk has nothing more to do
        self._lock = Lock()

    def read_at(self, file: FileIO, start: int, views: list[memoryview]) -> int:
        """Read, and wait until the slow disk would be done; see :func:`grating_core.memory.positioned.read_at`."""
        began = time.perf_counter()
        got = _read_at(file, start, views)
        time.sleep(max(0.0, self._take(began, self.seconds(got)) - time.perf_counter()))
        return got

    def begin_reading(self, file: int, pieces: Pieces) -> SlowReading:
        """Begin to read pieces; see :func:`grating_core.columns.reading.begin_reading`."""
        done = self._take(time.perf_counter(), float(sum(map(self.seconds, pieces.sizes.tolist()))))
        return SlowReading(_begin_reading(file, pieces), done)

    def seconds(self, size: int) -> float:
        """Return the seconds that a read of so many bytes takes."""
        return max(size / self._rate, 1 / self._reads)

    def _take(self, began: float, seconds: float) -> float:
        """Take the disk for so many seconds when it is free, and return the moment at which it has done this."""
        with self._lock:
            self._free = done = max(self._free, began) + seconds
        return done


@dataclass(frozen=True)
class SlowReading:
    """This class reads pieces from a slow disk; see :class:`grating_core.kernels.reading.Reading`.

    Attributes:
        reading: The reading from the disk as it is.
        done: The moment at which the slow disk has read the pieces.
    """

    reading: Any
    done: float

    def wait(self) -> int:
        """Wait until the slow disk would be done, and return what was read."""
        count: int = self.reading.wait()
        time.sleep(max(0.0, self.done - time.perf_counter()))
        return count


_read_at, _begin_reading = positioned.read_at, reading.begin_reading


def slow_down(rate: float) -> None:
    """Let all reads of weights, in this process from now on, be those of a slow disk."""
    disk = SlowDisk(rate)
    patch.object(positioned, "read_at", disk.read_at).start()
    patch.object(reading, "begin_reading", disk.begin_reading).start()
    # What was measured before is of the disk as it is, and what is measured now must not be kept for it.
    patch.object(install, "find_disk", lambda file, measure: measure()).start()


def load_grating(
    ready: Ready, *, directory: Path, threads: int, rate: float | None = None, **settings: Any
) -> Ask:
    """Load a model.

    Args:
        ready: See :class:`System`.
        directory: Directory of the model.
        threads: How many threads compute.
        rate: Bytes a second that the disk gives; None for what it can.
        settings: See :class:`~grating_core.settings.GenerationSettings`.
    """
    torch.set_num_threads(threads)
    import_all(directory)
    if rate is not None:
        slow_down(rate)
    with ready_after("grating_core.opening.language_models.PromptTokenizer", ready):
        model = StreamedCausalLM.from_pretrained(directory, **settings)

    def generate(question: tuple[str, int, int]) -> Facts:
        prompt, tokens, seed = question
        found = model.generate(prompt, max_new_tokens=tokens, temperature=1.0, seed=seed)
        after_first = found.new_tokens - 1
        return {
            "planned_mb": model.plan and model.plan.total / 1e6,
            "tokens_per_second": after_first / (found.seconds - found.seconds_to_first),
            "read_mb_per_token": (found.bytes_read - found.bytes_to_first) / after_first / 1e6,
            "hit_rate": found.hit_rate,
        }

    return generate


def settings_of(case: Case) -> dict[str, Any]:
    """Return the settings of a case, without a budget."""
    bits = {} if case.bits is None else {"bits": case.bits}
    return {"device": "cpu", "dtype": "bfloat16", "max_length": LENGTH, "mlp_density": case.density, **bits}


def find_smallest(directory: Path, case: Case) -> int:
    """Return the bytes of the smallest budget that works."""
    return _refusal(directory, case).smallest


def find_everything(directory: Path, case: Case) -> int:
    """Return the bytes of the smallest budget with which nothing is streamed."""
    return _refusal(directory, case).resident


def find_sizes(directory: Path, case: Case) -> tuple[int, int]:
    """Return the bytes of a model's weights in a case's bits, and the budget that holds half of them."""
    everything = find_everything(directory, case)
    with closing(_opened(directory, case, everything)) as model:
        sizes = model.stored.sizes(model.window)
    weights = sum(sizes.layers) + sizes.vocabulary * sizes.row + sizes.rest
    return weights, everything - weights // 2


def _opened(directory: Path, case: Case, budget: int) -> OpenLanguageModel:
    """Open a model with a case's bits, dense."""
    settings = settings_of(replace(case, density=None))
    return open_language_model(GenerationSettings(model=directory, **settings, memory_budget=budget))


def _refusal(directory: Path, case: Case) -> BudgetError:
    """Return what a model says to a budget that is too small."""
    try:
        _opened(directory, case, 1).close()
    except BudgetError as error:
        return error
    raise AssertionError("no model fits into a byte")


def measure(
    directory: Path, cases: Sequence[Case], part: Part, *, tokens: int, rounds: int, threads: int
) -> list[Row]:
    """Continue a prompt in a fresh process for each case, in turns, and reduce what is seen to a row each."""
    prompt, _ = make_prompt(directory, PROMPT_TOKENS)
    sizes = [find_sizes(directory, case) for case in cases]
    systems = [
        System(case.name, load_grating, _settings(directory, case, part, budget, threads))
        for case, (_, budget) in zip(cases, sizes, strict=True)
    ]
    for system in systems:
        with loaded([system]):
            pass  # the companion files are there now
    answers: list[list[Facts]] = [[] for _ in cases]
    forget_pages(directory)
    with loaded(systems) as workers:
        for seed in range(rounds + 1):
            for case, worker, own in zip(cases, workers, answers, strict=True):
                # Only caches of columns need more than a few tokens to be as they will stay.
                count = 4 if seed == 0 and case.density is None else tokens
                with progress.status(f"{case.name}: generating, round {seed} of {rounds}"):
                    own.append(worker.ask((prompt, count, seed)).facts)
        peaks = [(worker.peak_mb, worker.load_seconds) for worker in workers]
    rows = []
    for case, (weights, budget), own, (peak, seconds) in zip(cases, sizes, answers, peaks, strict=True):
        row: Row = {
            "bits": case.bits or 16,
            "way": case.way,
            "weights_mb": weights / 1e6,
            "budget_mb": None if part == "resident" else budget / 1e6,
            "peak_mb": peak,
            "load_seconds": seconds,
        }
        for name in ("planned_mb", "tokens_per_second", "read_mb_per_token", "hit_rate"):
            values = [value for facts in own[1:] if (value := facts[name]) is not None]
            row[name] = median(values) if values else None
        rows.append(row)
    return rows


def _settings(directory: Path, case: Case, part: Part, budget: int, threads: int) -> dict[str, Any]:
    """Return what :func:`load_grating` takes."""
    settings = {**settings_of(case), "directory": directory, "threads": threads}
    if part != "resident":
        settings["memory_budget"] = budget
    return settings | ({"rate": SLOW} if part == "slow-disk" else {})


def main(
    part: Annotated[Part, typer.Argument(help="Where the weights are.")],
    model: Annotated[str, typer.Option(help="A decoder: a shape, hub id or directory.")] = "qwen3-4b",
    tokens: Annotated[int, typer.Option(help="New tokens of a round.")] = 32,
    rounds: Annotated[int, typer.Option(help="Rounds that count, after one that does not.")] = 5,
    threads: Annotated[int, typer.Option(help="Threads that compute.")] = 2,
    output: Output = RESULTS,
) -> None:
    """Measure, and write generation-resident.json, generation-disk.json or generation-slow-disk.json."""
    directory = find_or_write(model)
    # What is all in memory takes turns. What streams is alone, because the page cache has to be empty.
    groups = [CASES[part]] if part == "resident" else [(case,) for case in CASES[part]]
    rows = [
        row
        for cases in groups
        for row in measure(directory, cases, part, tokens=tokens, rounds=rounds, threads=threads)
    ]
    depth = AutoConfig.from_pretrained(directory, trust_remote_code=False).num_hidden_layers
    setting = {
        "model": model,
        "layers": depth,
        "tokens": tokens,
        "threads": threads,
        "slow_mb_per_second": SLOW / 1e6,
    }
    write_result(output, f"generation-{part}", rows, rounds=rounds, setting=setting)


if __name__ == "__main__":
    typer.run(main)
