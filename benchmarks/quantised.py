"""What 8 and 4 bits cost: perplexity beside llama.cpp's, with the same weights on the same tokens.

    make bench-deps
    .venv/bin/python -m benchmarks.quantised --data DIRECTORY

The directory holds the collections cisi and cranfield. A seed draws documents of both, which are cut into windows
of 512 tokens. A window's first token is not predicted. grating computes token by token, as when it generates, and
llama.cpp a window at once. What a system costs is how much its perplexity is above transformers' in float32.

There are two models. One has the weights that the package has, which were rounded to 4 bits in groups of 32 before
(Q4_1): rounding them again may find the same grid. The other computes the same, but its channels are rescaled, so
that its weights are on no grid, as those of most models. Its costs are the ones to look at.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from math import exp, log
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any

import torch
import typer
from numpy.typing import ArrayLike
from rich.progress import track
from torch import Tensor
from transformers import AutoTokenizer

from benchmarks import llama_cpp
from benchmarks.collections import load_collection
from benchmarks.report import RESULTS, Output, Row, write_result
from benchmarks.shapes import find_or_write
from benchmarks.worker import progress
from grating_core import StreamedCausalLM
from grating_core.engine.decode import advance, new_cache
from grating_core.lab.decoders import load_decoder
from grating_core.lab.quality import cut_windows, evaluate

COLLECTIONS = ("cisi", "cranfield")
SEEDS = (1, 2, 3)
WINDOW = 512
MODELS = ("smollm2-135m-bf16", "smollm2-135m-rescaled")
_DOCUMENTS = 200  # for each seed; more than any number of windows takes

Measure = Callable[[Tensor], float]
"""Returns the perplexity of windows, int64 ``[W, T]``."""


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
        torch.nn.functional.cross_entropy(torch.as_tensor(logits(window.tolist()))[:-1], window[1:])
        for window in track(windows, "windows", console=progress, transient=True)
    ]
    return exp(float(torch.stack(losses).mean()))


@contextmanager
def transformers_measure(directory: Path, dtype: torch.dtype) -> Iterator[Measure]:
    """Load transformers' model."""
    model, _ = load_decoder(directory, dtype=dtype)
    yield lambda windows: evaluate(model, windows).perplexity


@contextmanager
def llama_cpp_measure(file: Path, threads: int) -> Iterator[Measure]:
    """Load a GGUF file in llama.cpp."""
    model = llama_cpp.LlamaCpp(file, threads, WINDOW)
    yield partial(perplexity_of, model.logits)


@contextmanager
def grating_measure(directory: Path, **settings: Any) -> Iterator[Measure]:
    """Load this project's model, which is given one token after the other, as when it generates."""
    with StreamedCausalLM.from_pretrained(directory, device="cpu", max_length=WINDOW, **settings) as model:

        def logits(ids: list[int]) -> Tensor:
            cache = new_cache(model.model, len(ids))
            return torch.stack([advance(model.model, [token], cache, slice_tokens=1) for token in ids])

        yield partial(perplexity_of, logits)


def find_systems(directory: Path, threads: int) -> dict[str, Callable[[], AbstractContextManager[Measure]]]:
    """Return what loads each system; the others are compared with the first."""
    grating = partial(grating_measure, directory, dtype="bfloat16")
    files = llama_cpp.prepare(directory)
    return {
        "transformers, float32": partial(transformers_measure, directory, torch.float32),
        "transformers, bfloat16": partial(transformers_measure, directory, torch.bfloat16),
        **{f"llama.cpp, {kind}": partial(llama_cpp_measure, file, threads) for kind, file in files.items()},
        "grating, bfloat16": grating,
        "grating, 8 bits": partial(grating, bits=8),
        "grating, 4 bits": partial(grating, bits=4),
    }


def measure_model(name: str, texts: Sequence[Tensor], threads: int) -> list[Row]:
    """Make a row of each system for one model."""
    directory = find_or_write(name)
    rows: list[Row] = []
    bases: list[float] = []
    for system, load in find_systems(directory, threads).items():
        progress.print(f"{name}: {system}")
        with load() as measure:
            found = [measure(text) for text in texts]
        bases = bases or found
        rows.append({"model": name, "system": system, **summary(found, bases)})
    return rows


def main(
    data: Annotated[Path, typer.Option(help="Holds the collections cisi and cranfield, in BEIR layout.")],
    model: Annotated[list[str], typer.Option(help="SmolLM2, as benchmarks.shapes writes it.")] = list(MODELS),  # noqa: B006 - typer copies it
    windows: Annotated[int, typer.Option(help="Windows of 512 tokens for each of the three seeds.")] = 14,
    threads: Annotated[int, typer.Option(help="Threads of each system.")] = 2,
    output: Output = RESULTS,
) -> None:
    """Measure, and write generation-bits.json."""
    torch.set_num_threads(threads)
    tokenizer = AutoTokenizer.from_pretrained(find_or_write(model[0]), trust_remote_code=False)
    texts = read_windows(data, tokenizer, windows)
    rows = [row for name in model for row in measure_model(name, texts, threads)]
    setting = {"tokens": count_tokens(texts), "seeds": len(texts), "threads": threads}
    packages = (llama_cpp.PACKAGE,)
    write_result(output, "generation-bits", rows, rounds=1, setting=setting, packages=packages)


if __name__ == "__main__":
    typer.run(main)
