"""What is compared in memory: grating in several settings, and its peers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch

from benchmarks.recipes import best, find_recipe, is_decoder
from benchmarks.watcher import Facts, Rank, Request, System
from grating_core import Reranker
from grating_core.errors import BudgetError
from grating_core.memory.plan import MemoryPlan, ModelSizes, make_plan
from grating_core.text.pairs import load_template

TOP_K = 5
TRACED = ("bytes_read", "seconds_waited", "bytes_spilled", "embedding_hit_rate", "peak_memory", "compute_share")


def max_length(directory: Path) -> int:
    """The window of every system: a decoder's prompt comes on top of the pair."""
    return 640 if is_decoder(directory) else 512


def defaults(directory: Path) -> dict[str, Any]:
    """What grating is loaded with unless a system's settings say otherwise."""
    return {"device": "cpu", "dtype": "bfloat16", "max_length": max_length(directory), "pruning": "off"}


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
    recipe = find_recipe(directory, max_length(directory))
    tokenizer_loaded()
    model = recipe.architecture.from_pretrained(
        directory,
        dtype=torch.bfloat16,
        device_map={"": "disk"} if offload else None,
        trust_remote_code=False,
    ).eval()
    # Were anything held after all, this would compare with something else.
    assert {weight.is_meta for weight in model.parameters()} == {offload}

    def rank(request: Request) -> Facts:
        return {"ranking": best(recipe.scores(model, *request, batch_size), TOP_K)}

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
        reranker: Any = Reranker.from_pretrained(directory, **defaults(directory) | settings)

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
        Reranker.from_pretrained(directory, memory_budget=1, **defaults(directory))
    except BudgetError as error:
        return [int(budget) for budget in np.linspace(error.smallest, error.resident, 4)]
    raise AssertionError("one byte was accepted as a budget")
