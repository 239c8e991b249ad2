"""Speed and memory of generating, by systems that hold the whole model and systems that stream it from disk.

    make bench-deps
    .venv/bin/python -m benchmarks.generation

Every system runs in a fresh process, one after the other, with the checkpoint dropped from the page cache before
loading and before each round. Those that stream read past the page cache. The first round warms the caches of
columns and is not counted. The budget is such that about half of the MLPs is in memory; dense streaming and
pruning get the same. Tokens are drawn at random (temperature 1), so that no text repeats itself.
"""

from __future__ import annotations

import time
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import torch
import typer
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

from benchmarks.report import RESULTS, Output, Row, write_result
from benchmarks.shapes import find_or_write, random_texts
from benchmarks.worker import Ask, Facts, Ready, System, forget_pages, import_all, loaded, progress, ready_after
from grating_core import BudgetError, StreamedCausalLM

LENGTH = 256  # tokens of the longest text
PROMPT_TOKENS = 16
PEERS = ("accelerate",)


class _Clock:
    """Notes when tokens come; what transformers calls a streamer."""

    def __init__(self) -> None:
        self.moments: list[float] = []

    def put(self, value: Any) -> None:
        self.moments.append(time.perf_counter())

    def end(self) -> None:
        """There is nothing to do."""


def load_transformers(ready: Ready, *, directory: Path, tokens: int, offload: bool = False) -> Ask:
    """Load transformers, with its own loop, in bfloat16.

    Args:
        ready: See :class:`System`.
        directory: Directory of the model.
        tokens: How many to generate.
        offload: Hold no weights: accelerate maps each module's from the file for as long as it computes.
    """
    import_all(directory)
    tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
    ready()
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
        return {"tokens_per_second": (len(clock.moments) - 2) / (clock.moments[-1] - clock.moments[1])}

    return generate


def load_grating(
    ready: Ready,
    *,
    directory: Path,
    tokens: int,
    memory_budget: int | None = None,
    mlp_density: float | None = None,
) -> Ask:
    """Load what this project offers."""
    import_all(directory)
    with ready_after("grating_core.opening.language_models.PromptTokenizer", ready):
        model = StreamedCausalLM.from_pretrained(
            directory,
            device="cpu",
            dtype="bfloat16",
            max_length=LENGTH,
            memory_budget=memory_budget,
            mlp_density=mlp_density,
        )

    def generate(prompt: str) -> Facts:
        found = model.generate(prompt, max_new_tokens=tokens, temperature=1.0, seed=0)
        after_first = found.new_tokens - 1
        return {
            "tokens_per_second": after_first / (found.seconds - found.seconds_to_first),
            "read_mb_per_token": (found.bytes_read - found.bytes_to_first) / after_first / 1e6,
            "hit_rate": found.hit_rate,
        }

    return generate


def find_systems(directory: Path, tokens: int, densities: list[float]) -> list[System]:
    """Name everything that is compared, peers first."""
    common = {"directory": directory, "tokens": tokens}
    budget = find_budget(directory)
    limited = {**common, "memory_budget": budget}
    name = f"{budget / 1e6:,.0f} MB"
    return [
        System("transformers, all in memory", load_transformers, common),
        System("accelerate's disk offload", load_transformers, {**common, "offload": True}),
        System("grating, all in memory", load_grating, common),
        System(f"grating, {name}, dense", load_grating, limited),
        *(
            System(f"grating, {name}, density {density}", load_grating, {**limited, "mlp_density": density})
            for density in densities
        ),
    ]


def find_budget(directory: Path) -> int:
    """Return the bytes halfway from the smallest budget that works, pruned or not, to the one that holds all."""
    smallest, largest = [], []
    for density in (None, 0.5):
        try:
            StreamedCausalLM.from_pretrained(
                directory, device="cpu", dtype="bfloat16", max_length=LENGTH, memory_budget=1, mlp_density=density
            )
        except BudgetError as error:
            smallest.append(error.smallest)
            largest.append(error.resident)
    return (max(smallest) + min(largest)) // 2


def measure(system: System, directory: Path, prompts: list[str], weights_mb: float) -> Row:
    """Continue the prompts in a fresh process, and reduce what is seen to a row; the first does not count."""
    answers = []
    forget_pages(directory)
    with loaded([system]) as (worker,):
        for prompt in prompts:
            forget_pages(directory)
            with progress.status(f"{system.name}: generating"):
                answers.append(worker.ask(prompt).facts)

    def typical(name: str) -> float | None:
        values = [value for facts in answers[1:] if (value := facts.get(name)) is not None]
        return median(values) if values else None

    budget = system.settings.get("memory_budget")
    return {
        "system": system.name,
        "budget_mb": budget and budget / 1e6,
        "density": system.settings.get("mlp_density"),
        "peak_mb": worker.peak_mb,
        "peak_of_weights": worker.peak_mb / weights_mb,
        **{name: typical(name) for name in ("tokens_per_second", "read_mb_per_token", "hit_rate")},
    }


def main(
    model: Annotated[str, typer.Option(help="A decoder: qwen3-4b, hub id or directory.")] = "smollm2-135m-bf16",
    density: Annotated[list[float], typer.Option(help="mlp_density; may be given several times.")] = [0.67],  # noqa: B006 - typer copies it
    tokens: Annotated[int, typer.Option(help="New tokens of a round.")] = 32,
    rounds: Annotated[int, typer.Option(help="Rounds that count, after one that does not.")] = 3,
    output: Output = RESULTS,
) -> None:
    """Measure, and write generation-speed.json."""
    directory = find_or_write(model)
    weights = sum(path.stat().st_size for path in directory.glob("*.safetensors")) / 1e6
    prompts = random_texts(directory, rounds + 1, PROMPT_TOKENS, seed=3)
    rows = [measure(system, directory, prompts, weights) for system in find_systems(directory, tokens, density)]
    setting = {"model": model, "weights_mb": weights, "tokens": tokens}
    write_result(output, "generation-speed", rows, rounds=rounds, setting=setting, packages=PEERS)


if __name__ == "__main__":
    typer.run(main)
