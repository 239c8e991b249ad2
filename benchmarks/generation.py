"""Speed and memory of generating, by systems that hold the whole model and systems that stream it from disk.

    .venv/bin/python -m benchmarks.generation --model qwen3-4b --of-model 0.54 --predict
    .venv/bin/python -m benchmarks.generation --model smollm2-135m-bf16 --density 0.67 --predict

``qwen3-4b`` is a checkpoint with the shape of Qwen3-4B and random weights, written on first use. Every system runs
in a fresh process; those that stream read past the page cache, and the checkpoint is dropped from it before each
round. The first round warms the caches of columns and is not counted. Budgets are such that so large a share of
the MLPs' columns is in memory, or so large a share of the model's bytes; dense streaming and pruning get the same.
Tokens are drawn at random (temperature 1), so that no text repeats itself.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Annotated, Any
from unittest.mock import patch

import torch
import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

from benchmarks.shapes import find_or_write, random_texts, write_qwen3_shape
from benchmarks.watcher import Facts, Job, Rank, Run, System, watch
from grating_core import StreamedCausalLM
from grating_core.columns.allocation import allocate
from grating_core.columns.cache import NO_PREFERENCE, Preference
from grating_core.columns.install import PREFERENCE, MlpPruning
from grating_core.engine.attention import CACHED_ATTENTION
from grating_core.files.places import cache_directory
from grating_core.lab.activations import record
from grating_core.lab.probe import find_machine
from grating_core.lab.simulator import Shape, simulate, streaming_seconds
from grating_core.memory.plan import ModelSizes, make_generation_plan
from grating_core.models.loading import StoredCausalLM
from grating_core.text.chat import PromptTokenizer

LENGTH = 256  # tokens of the longest text
PROMPT_TOKENS = 16
AS_PUBLISHED = Preference(0.2, 0.2)
TRACED_TOKENS = 192
_NO_BUDGET = 10**15

console = Console(width=150)


@dataclass(frozen=True)
class Summary:
    """One row of the table; memory and traffic in MB."""

    system: str
    budget: float | None
    peak: float
    of_model: float
    tokens_per_second: list[float]
    read: float | None
    waited: float | None
    hit_rate: float | None
    predicted: float | None

    @property
    def speed(self) -> float:
        """Tokens a second, the median of the rounds."""
        return median(self.tokens_per_second)


class _Clock:
    """Notes when tokens come; what transformers calls a streamer."""

    def __init__(self) -> None:
        self.moments: list[float] = []

    def put(self, value: Any) -> None:
        self.moments.append(time.perf_counter())

    def end(self) -> None:
        """There is nothing to do."""


def load_transformers(
    directory: Path, tokenizer_loaded: Callable[[], None], *, tokens: int, offload: bool = False
) -> tuple[Rank, Facts]:
    """Transformers' own loop in bfloat16.

    Args:
        directory: The model.
        tokenizer_loaded: Called before any weight is read.
        tokens: How many to generate.
        offload: Hold no weights: accelerate maps each module's from the file for as long as it computes.
    """
    tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
    tokenizer_loaded()
    architecture: Any = AutoModelForCausalLM
    model = architecture.from_pretrained(
        directory,
        dtype=torch.bfloat16,
        device_map={"": "disk"} if offload else None,
        trust_remote_code=False,
    )

    def generate(prompt: str) -> Facts:
        clock = _Clock()
        set_seed(0)
        ids = tokenizer(prompt, return_tensors="pt")
        model.generate(
            **ids, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=True, top_k=0, top_p=1.0, streamer=clock
        )
        # The prompt comes first, then one token after the other.
        return {"speed": (len(clock.moments) - 2) / (clock.moments[-1] - clock.moments[1])}

    return generate, {}


def load_grating(
    directory: Path,
    tokenizer_loaded: Callable[[], None],
    *,
    tokens: int,
    preference: Preference = PREFERENCE,
    **settings: Any,
) -> tuple[Rank, Facts]:
    """What this project offers.

    Args:
        directory: The model.
        tokenizer_loaded: Called before any weight is read.
        tokens: How many to generate.
        preference: Of cache-aware pruning.
        settings: For ``StreamedCausalLM.from_pretrained``.
    """

    def load_and_tell(path: Path) -> PromptTokenizer:
        tokenizer = PromptTokenizer(path)
        tokenizer_loaded()
        return tokenizer

    def pruning(density: float | None, *, show_progress: bool) -> MlpPruning | None:
        return None if density is None else MlpPruning(density, preference)

    with (
        patch("grating_core.generation.PromptTokenizer", load_and_tell),
        patch("grating_core.generation.mlp_pruning", pruning),
    ):
        model = StreamedCausalLM.from_pretrained(
            directory, device="cpu", dtype="bfloat16", max_length=LENGTH, **settings
        )

    def generate(prompt: str) -> Facts:
        found = model.generate(prompt, max_new_tokens=tokens, temperature=1.0, seed=0)
        seconds = found.seconds - found.seconds_to_first
        return {
            "speed": (found.new_tokens - 1) / seconds,
            "read": (found.bytes_read - found.bytes_to_first) / (found.new_tokens - 1),
            "waited": found.seconds_waited / found.seconds,
            "hit_rate": found.hit_rate,
        }

    return generate, {}


def find_budget(directory: Path, share: float) -> int:
    """Bytes with which this share of the MLPs' columns is in memory, beside all that is not MLP."""
    plan = make_generation_plan(_stored(directory).sizes(LENGTH), _NO_BUDGET, LENGTH)
    smaller = replace(plan, chunk_tokens=plan.sizes.window, column_share=share)
    return smaller.total


def model_bytes(directory: Path) -> int:
    """All weights, in bfloat16."""
    plan = make_generation_plan(_stored(directory).sizes(LENGTH), _NO_BUDGET, LENGTH)
    sizes = plan.sizes
    return sum(sizes.layers) + sizes.columns + sizes.rest + sizes.vocabulary * sizes.row


def _recorded(model: str, place: Path) -> Path:
    """Where the activations of the simulator come from: of the large shape, from a few layers of it."""
    if model != "qwen3-4b":
        return place
    return write_qwen3_shape(cache_directory() / "benchmarks" / "Qwen3-Reranker-4B-shape-4-layers", "4b", layers=4)


def _stored(directory: Path) -> StoredCausalLM:
    return StoredCausalLM(
        directory,
        device=torch.device("cpu"),
        dtype=torch.bfloat16,
        attention=CACHED_ATTENTION,
        pruning=MlpPruning(0.5),
    )


def systems(budgets: list[int], densities: list[float], tokens: int) -> list[System]:
    """Everything that is compared, peers first."""
    found = [
        System("transformers, all in memory", load_transformers, {"tokens": tokens}),
        System("accelerate, disk offload", load_transformers, {"tokens": tokens, "offload": True}),
        System("grating, all in memory", load_grating, {"tokens": tokens}),
    ]
    for budget in budgets:
        limited = {"tokens": tokens, "memory_budget": budget}
        name = f"{budget / 1e6:,.0f} MB"
        found.append(System(f"grating, dense, {name}", load_grating, limited, budget))
        for density in densities:
            pruned = limited | {"mlp_density": density}
            plain = pruned | {"preference": NO_PREFERENCE}
            found.append(System(f"grating, DIP {density}, {name}", load_grating, plain, budget))
            found.append(System(f"grating, cache-aware DIP {density}, {name}", load_grating, pruned, budget))
            strong = pruned | {"preference": AS_PUBLISHED}
            found.append(System(f"grating, … with γ = 0.2 for both, {name}", load_grating, strong, budget))
    return found


class Predictor:
    """What the simulator says of grating's systems, on this machine as it is measured now.

    Args:
        directory: The model that is simulated.
        recorded: The model whose activations are recorded: the same, or one with the same widths and fewer layers.
    """

    def __init__(self, directory: Path, recorded: Path) -> None:
        self._sizes = _stored(directory).sizes(LENGTH)
        self._shape = Shape.of(directory, torch.bfloat16)
        self._trace = record(recorded, self._written(recorded), TRACED_TOKENS, show_progress=True)
        self._machine = find_machine("this", torch.bfloat16)

    def _written(self, directory: Path) -> str:
        """What the model writes itself: as many tokens come again, and so are hits, as in the measured runs."""
        prompt = random_texts(directory, 1, PROMPT_TOKENS, seed=4)[0]
        with StreamedCausalLM.from_pretrained(directory, device="cpu", dtype="bfloat16") as model:
            return model.generate(prompt, max_new_tokens=2 * TRACED_TOKENS, temperature=1.0, seed=1).text

    def speed(self, system: System) -> float | None:
        """Tokens a second; None for a system that is not simulated."""
        if system.budget is None:
            return None
        density = system.settings.get("mlp_density")
        if density is None:
            resident = len(make_generation_plan(self._dense_sizes(), system.budget, LENGTH).resident)
            return 1 / streaming_seconds(self._shape, self._machine, resident)
        plan = make_generation_plan(self._sizes, system.budget, LENGTH)
        _, plain, aware = simulate(
            self._trace,
            self._shape,
            self._machine,
            memory=self._shape.memory(plan.column_share),
            shares=allocate(density, self._shape.columns.depth),
            preference=system.settings.get("preference", PREFERENCE),
        )
        return (plain if system.settings.get("preference") == NO_PREFERENCE else aware).tokens_per_second

    def _dense_sizes(self) -> ModelSizes:
        layers = tuple(layer + self._sizes.columns // len(self._sizes.layers) for layer in self._sizes.layers)
        return replace(self._sizes, layers=layers, columns=0, staging=0)


def summarise(run: Run, of: int, predicted: float | None) -> Summary:
    """Reduce what was seen to the figures of a row; the first round is not among them."""
    tokenizer = run.all("tokenizer")[0]
    ends = run.all("end")

    def typical(name: str, unit: float = 1.0) -> float | None:
        values = [value for mark in ends[1:] if (value := mark.facts.get(name)) is not None]
        return median(values) / unit if values else None

    peak = run.peak(tokenizer, ends[-1]) - tokenizer.resident
    return Summary(
        system=run.system.name,
        budget=run.system.budget and run.system.budget / 1e6,
        peak=peak / 1e6,
        of_model=peak / of,
        tokens_per_second=[mark.facts["speed"] for mark in ends[1:]],
        read=typical("read", 1e6),
        waited=typical("waited"),
        hit_rate=typical("hit_rate"),
        predicted=predicted,
    )


def show(title: str, rows: list[Summary]) -> None:
    """Print the table."""
    table = Table(title=title, caption="peak over imports and tokenizer, loading included")
    table.add_column("system", no_wrap=True)
    for heading in (
        "peak MB",
        "of the model",
        "tokens/s",
        "× dense",
        "predicted",
        "MB read a token",
        "waited",
        "hit rate",
    ):
        table.add_column(heading, justify="right")
    dense = {row.budget: row.speed for row in rows if ", dense, " in row.system}
    for row in rows:
        beside = f"{row.speed / dense[row.budget]:.2f}" if row.budget in dense else ""
        table.add_row(
            row.system,
            f"{row.peak:,.0f}",
            f"{row.of_model:.0%}",
            f"{row.speed:.2f}",
            beside,
            "" if row.predicted is None else f"{row.predicted:.2f} ({row.predicted / row.speed - 1:+.0%})",
            "" if row.read is None else f"{row.read:,.0f}",
            "" if row.waited is None else f"{row.waited:.0%}",
            "" if row.hit_rate is None else f"{row.hit_rate:.1%}",
        )
    console.print(table)


def main(
    model: Annotated[str, typer.Option(help="qwen3-4b, smollm2-135m-bf16, hub id or directory.")] = "qwen3-4b",
    density: Annotated[
        list[float] | None, typer.Option(help="mlp_density, else 0.5; may be given several times.")
    ] = None,
    share: Annotated[
        list[float] | None, typer.Option(help="Of the columns in memory, else 0.5; may be given several times.")
    ] = None,
    of_model: Annotated[list[float] | None, typer.Option(help="Budgets as shares of the model's bytes.")] = None,
    tokens: Annotated[int, typer.Option(help="New tokens of a round.")] = 16,
    rounds: Annotated[int, typer.Option(help="Rounds that count, after one that does not.")] = 3,
    only: Annotated[str, typer.Option(help="Only systems with this in their name.")] = "",
    predict: Annotated[bool, typer.Option("--predict", help="Ask the simulator as well.")] = False,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write everything measured here.")] = None,
) -> None:
    """Measure and print the table."""
    place = find_or_write(model)
    whole = model_bytes(place)
    budgets = [find_budget(place, part) for part in share or [0.5]]
    budgets += [int(part * whole) for part in of_model or ()]
    job = Job(place, random_texts(place, rounds + 1, PROMPT_TOKENS, seed=3), rounds + 1, warm=False)
    predictor = Predictor(place, _recorded(model, place)) if predict else None
    rows = []
    for system in systems(budgets, density or [0.5], tokens):
        if only not in system.name:
            continue
        with console.status(system.name):
            run = watch(system, job)
        if run.failure:
            console.print(f"[bold red]{escape(system.name)} failed:[/] {escape(run.failure)}")
            continue
        rows.append(summarise(run, whole, predictor.speed(system) if predictor else None))
        console.print(
            f"{rows[-1].system}: {rows[-1].speed:.2f} tokens/s, {rows[-1].peak:,.0f} MB", highlight=False
        )
    show(f"{model}, {whole / 1e6:,.0f} MB of weights, {torch.get_num_threads()} threads", rows)
    if json_path:
        json_path.write_text(json.dumps([asdict(row) for row in rows], indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
