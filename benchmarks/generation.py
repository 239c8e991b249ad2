"""How fast a small language model writes, in 16, 8 and 4 bits, beside llama.cpp with the same weights.

    make bench-deps
    .venv/bin/python -m benchmarks.generation

The model is SmolLM2-135M. All systems hold it in memory, each in a process of its own with the same number of
threads. They take turns, in a new order each time, and each sees the same tokens. A round is a prompt and its
continuation by the likeliest tokens. Prompts are made of random words: time does not depend on what they say.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import count
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Annotated, Any

import torch
import typer
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks import llama_cpp
from benchmarks.report import RESULTS, Output, Row, write_result
from benchmarks.shapes import find_or_write, random_texts
from benchmarks.worker import Answer, Ask, Facts, Ready, System, import_all, loaded, ready_after, take_turns
from grating_core import StreamedCausalLM

PROMPTS = (16, 500, 1000)  # tokens
PEERS = (llama_cpp.PACKAGE,)

Question = tuple[str, list[int], int]
"""A prompt, its token ids, and how many tokens to generate."""


class _Clock:
    """Notes when tokens come; what transformers calls a streamer."""

    def __init__(self) -> None:
        self.moments: list[float] = []

    def put(self, value: Any) -> None:
        self.moments.append(perf_counter())

    def end(self) -> None:
        """There is nothing to do."""


def load_transformers(ready: Ready, *, directory: Path, threads: int) -> Ask:
    """Load transformers, with its own loop, in bfloat16.

    Args:
        ready: See :class:`System`.
        directory: Directory of the model.
        threads: How many threads compute.
    """
    torch.set_num_threads(threads)
    import_all(directory)
    ready()
    architecture: Any = AutoModelForCausalLM
    model = architecture.from_pretrained(directory, dtype=torch.bfloat16, trust_remote_code=False)

    def generate(question: Question) -> Facts:
        _, ids, tokens = question
        clock = _Clock()
        inputs = torch.tensor([ids])
        started = perf_counter()
        model.generate(
            inputs, attention_mask=torch.ones_like(inputs),
            max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, streamer=clock,
        )  # fmt: skip
        # The prompt comes first, then one token after the other.
        return {
            "seconds_to_first": clock.moments[1] - started,
            "tokens_per_second": (tokens - 1) / (clock.moments[-1] - clock.moments[1]),
        }

    return generate


def load_grating(ready: Ready, *, directory: Path, threads: int, **settings: Any) -> Ask:
    """Load what this project offers.

    Args:
        ready: See :class:`System`.
        directory: Directory of the model.
        threads: How many threads compute.
        settings: See :class:`~grating_core.settings.GenerationSettings`.
    """
    torch.set_num_threads(threads)
    import_all(directory)
    with ready_after("grating_core.opening.language_models.PromptTokenizer", ready):
        model = StreamedCausalLM.from_pretrained(directory, device="cpu", dtype="bfloat16", **settings)

    def generate(question: Question) -> Facts:
        prompt, ids, tokens = question
        found = model.generate(prompt, max_new_tokens=tokens)
        if (found.prompt_tokens, found.new_tokens) != (len(ids), tokens):
            raise RuntimeError(f"{found.prompt_tokens} + {found.new_tokens} tokens, not {len(ids)} + {tokens}")
        return {
            "seconds_to_first": found.seconds_to_first,
            "tokens_per_second": (tokens - 1) / (found.seconds - found.seconds_to_first),
        }

    return generate


def find_systems(directory: Path, threads: int) -> list[System]:
    """Name everything that is compared, peers first."""
    common = {"directory": directory, "threads": threads}
    window = max(PROMPTS) + 256
    files = llama_cpp.prepare(directory)
    return [
        *(
            System(
                f"llama.cpp, {kind}",
                llama_cpp.load_llama_cpp,
                {"file": file, "threads": threads, "window": window},
            )
            for kind, file in files.items()
        ),
        System("transformers, bfloat16", load_transformers, common),
        System("grating, bfloat16", load_grating, {**common, "max_length": window}),
        *(
            System(f"grating, {bits} bits", load_grating, {**common, "max_length": window, "bits": bits})
            for bits in (8, 4)
        ),
    ]


RIVALS = {
    "grating, bfloat16": "transformers, bfloat16",
    "grating, 8 bits": "llama.cpp, Q8_0",
    "grating, 4 bits": "llama.cpp, Q4_0",
}
"""For each of our systems the one of as many bits."""


def make_prompt(directory: Path, tokens: int) -> tuple[str, list[int]]:
    """Make a prompt of exactly so many tokens, and their ids."""
    tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
    for seed in count():  # a text that is cut after a token may be read as other tokens
        (text,) = random_texts(directory, 1, 2 * tokens, seed=seed)
        prompt = str(tokenizer.decode(tokenizer(text)["input_ids"][:tokens]))
        ids = list(tokenizer(prompt)["input_ids"])
        if len(ids) == tokens:
            return prompt, ids
    raise AssertionError


def reduce(
    answers: dict[str, list[list[Answer]]], peaks: dict[str, float], prompts: Sequence[int], rivals: dict[str, str]
) -> list[Row]:
    """Make a row of each system: medians of its rounds, and of its rounds' ratios to those of its rival.

    Args:
        answers: The answers of each system, by prompt and round.
        peaks: The most MB that each system held.
        prompts: Tokens of each prompt.
        rivals: See :data:`RIVALS`.
    """

    def found(system: str, number: int, name: str) -> list[float]:
        return [answer.facts[name] for answer in answers[system][number]]

    rows = []
    for system, peak in peaks.items():
        row: Row = {"system": system, "peak_mb": peak}
        for number, tokens in enumerate(prompts):
            # More is better in both: tokens a second, and one over the time to the first token.
            for name, better in (("tokens_per_second", 1), ("seconds_to_first", -1)):
                own = found(system, number, name)
                row[f"{name}_{tokens}"] = median(own)
                rival = found(rivals[system], number, name) if rivals.get(system) in peaks else None
                row[f"{name}_{tokens}_times"] = rival and median(
                    (mine / theirs) ** better for mine, theirs in zip(own, rival, strict=True)
                )
        rows.append(row)
    return rows


def main(
    model: Annotated[str, typer.Option(help="SmolLM2, as benchmarks.shapes writes it.")] = "smollm2-135m-bf16",
    tokens: Annotated[int, typer.Option(help="New tokens of a round.")] = 32,
    rounds: Annotated[int, typer.Option(help="Rounds that count, after one that does not.")] = 5,
    threads: Annotated[int, typer.Option(help="Threads of each system.")] = 2,
    only: Annotated[str, typer.Option(help="Only systems with this in their name.")] = "",
    output: Output = RESULTS,
) -> None:
    """Measure, and write generation-speed.json."""
    directory = find_or_write(model)
    questions: list[Question] = [(*make_prompt(directory, length), tokens) for length in PROMPTS]
    systems = [system for system in find_systems(directory, threads) if only in system.name]
    with loaded(systems) as workers:
        answers = take_turns(workers, questions, rounds=rounds, title="generating")
        peaks = {worker.system.name: worker.peak_mb for worker in workers}
    weights = sum(path.stat().st_size for path in directory.glob("*.safetensors")) / 1e6
    setting = {
        "model": model,
        "weights_mb": weights,
        "tokens": tokens,
        "threads": threads,
        "llama_cpp": llama_cpp.instructions(),
    }
    write_result(
        output,
        "generation-speed",
        reduce(answers, peaks, PROMPTS, RIVALS),
        rounds=rounds,
        setting=setting,
        packages=PEERS,
    )


if __name__ == "__main__":
    typer.run(main)
