"""What the simulator says of a model on this machine, beside what is measured: tokens a second, bytes, and hits.

    .venv/bin/python -m benchmarks.simulated

The model is SmolLM2-135M in 16, 8 and 4 bits: dense and with pruned MLPs, in budgets from the smallest to one for
everything. Each configuration is loaded and writes texts at random (temperature 1). Then the simulator is asked
for the same budget. It knows what parts of a made-up model of the same widths take, which is measured first, and
the activations of the dense model for the texts that were written. Nothing in it is fitted to what is compared.

All reads go past the page cache, in the simulator's measurement as well.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer

from benchmarks.generation import make_prompt
from benchmarks.report import RESULTS, Output, Row, write_result
from benchmarks.shapes import find_or_write
from benchmarks.worker import progress
from grating_core import BudgetError, StreamedCausalLM
from grating_core.columns.allocation import allocate
from grating_core.lab.activations import Activations, record
from grating_core.lab.decoders import load_decoder
from grating_core.lab.machine import Costs
from grating_core.lab.probe import measure
from grating_core.lab.shape import Form, Shape
from grating_core.lab.simulator import Estimate, simulate, simulate_dense
from grating_core.results import Generation

LENGTH = 256  # tokens of the longest text
PROMPT_TOKENS = 16
BITS = (16, 8, 4)
DENSITIES = (1.0, 0.67, 0.5)
STEPS = {1.0: (0.0, 0.4, 0.8, 1.0), 0.67: (0.0, 0.5, 1.0), 0.5: (0.0, 0.5, 1.0)}
"""For each density the budgets: 0 is the smallest that works, 1 holds everything."""


def budgets(shape: Shape, density: float, steps: Sequence[float]) -> Iterator[int]:
    """Yield a budget in bytes for each step. Dense layers fit as well, which the simulator compares with."""
    dense, form = _refusal(shape.dense), _refusal(shape.dense if density == 1 else shape.pruned)
    smallest = max(dense.smallest, form.smallest)
    for step in steps:
        yield smallest + int(step * max(0, form.resident - smallest))


def _refusal(form: Form) -> BudgetError:
    """Return what a model says to a budget that is too small."""
    try:
        form.plan(1)
    except BudgetError as error:
        return error
    raise AssertionError("no model fits into a byte")


def generate(directory: Path, settings: dict[str, Any], tokens: int, rounds: int) -> list[Generation]:
    """Load the model, and write a text in each round."""
    prompt, _ = make_prompt(directory, PROMPT_TOKENS)
    with closing(StreamedCausalLM.from_pretrained(directory, device="cpu", dtype="bfloat16", **settings)) as model:
        return [
            model.generate(prompt, max_new_tokens=tokens + 1, temperature=1.0, seed=seed) for seed in range(rounds)
        ]


def record_texts(decoder: tuple[Any, Any], prompt: str, texts: Sequence[Generation]) -> Activations:
    """Record the dense model's activations of all tokens of texts that went through it one by one."""
    model, tokenizer = decoder
    found = []
    for text in texts:
        ids = torch.tensor(tokenizer(prompt + text.text)["input_ids"])
        each = record(model, [ids[: text.prompt_tokens + text.new_tokens - 1]])
        found.append((each.inputs[:, text.prompt_tokens :], each.products[:, text.prompt_tokens :]))
    inputs, products = zip(*found, strict=True)
    return Activations(np.concatenate(inputs, 1), np.concatenate(products, 1))


def compare(
    directory: Path, decoder: tuple[Any, Any], bits: int, *, tokens: int, rounds: int, only: Sequence[float]
) -> Iterator[Row]:
    """Yield a row for each configuration with weights in so many bits."""
    given = None if bits == 16 else bits
    shape = Shape.of(directory, torch.bfloat16, given, LENGTH)
    prompt, _ = make_prompt(directory, PROMPT_TOKENS)
    with progress.status(f"{bits} bits: measuring parts"):
        # What else the machine does can only slow it down, so the quicker measurement is the better one.
        found = [measure(shape, PROMPT_TOKENS + tokens // 2) for _ in range(2)]
        costs = min(found, key=lambda one: one.layer + one.pruned)
    for density in only:
        for budget in budgets(shape, density, STEPS[density]):
            settings = {"bits": given, "max_length": LENGTH, "memory_budget": budget, "mlp_density": density}
            with progress.status(f"{bits} bits, density {density}, {budget / 1e6:,.0f} MB: generating"):
                texts = generate(directory, settings, tokens, rounds)
                recorded = None if density == 1 else record_texts(decoder, prompt, texts)
                yield _row(texts, _estimate(shape, costs, budget, density, recorded)) | {
                    "bits": bits,
                    "density": density,
                    "budget_mb": budget / 1e6,
                }


def _estimate(shape: Shape, costs: Costs, budget: int, density: float, recorded: Activations | None) -> Estimate:
    if recorded is None:
        return simulate_dense(shape, costs, budget)
    return simulate(recorded, shape, costs, budget=budget, shares=allocate(density, shape.depth))[-1]


def _row(texts: Sequence[Generation], estimate: Estimate) -> Row:
    """Compare what all texts took after their first tokens with an estimate."""
    after = sum(text.new_tokens - 1 for text in texts)
    seconds = sum(text.seconds - text.seconds_to_first for text in texts)
    hits = [text.hit_rate for text in texts if text.hit_rate is not None]
    return {
        "tokens_per_second": after / seconds,
        "estimated_tokens_per_second": estimate.tokens_per_second,
        "ratio": estimate.tokens_per_second * seconds / after,
        "read_mb": sum(text.bytes_read - text.bytes_to_first for text in texts) / after / 1e6,
        "estimated_read_mb": estimate.bytes_per_token / 1e6,
        "hit_rate": float(np.mean(hits)) if hits else None,
        "estimated_hit_rate": estimate.hit_rate,
    }


def main(
    model: Annotated[str, typer.Option(help="A decoder: a shape, hub id or directory.")] = "smollm2-135m-bf16",
    bits: Annotated[list[int], typer.Option(help="Bits of a weight.")] = list(BITS),  # noqa: B006
    density: Annotated[list[float], typer.Option(help="Densities; 1 is dense.")] = list(DENSITIES),  # noqa: B006
    tokens: Annotated[int, typer.Option(help="New tokens of a round, after the first.")] = 32,
    rounds: Annotated[int, typer.Option(help="Rounds of each configuration.")] = 5,
    threads: Annotated[int, typer.Option(help="Threads that compute.")] = 2,
    output: Output = RESULTS,
) -> None:
    """Measure, and write generation-simulated.json."""
    torch.set_num_threads(threads)
    directory = find_or_write(model)
    decoder = load_decoder(directory)
    rows = [
        row
        for number in bits
        for row in compare(directory, decoder, number, tokens=tokens, rounds=rounds, only=density)
    ]
    setting = {"model": model, "tokens": tokens, "threads": threads}
    write_result(output, "generation-simulated", rows, rounds=rounds, setting=setting)


if __name__ == "__main__":
    typer.run(main)
