"""Rerankers with a plan of the test's own making: tiny models fit any budget, and nothing would be streamed."""

from dataclasses import replace
from pathlib import Path

import torch

from grating_core import Prompt, Reranker
from grating_core.engine.attention import PACKED_ATTENTION
from grating_core.memory.plan import MemoryPlan
from grating_core.models.adapter import Adapter
from grating_core.models.loading import StoredModel
from grating_core.models.templates import load_template
from grating_core.pruning import Off, PruningPolicy
from tests.core.conftest import WINDOW

# What a plan may do without, alone and together.
PLANS: dict[str, dict[str, object]] = {
    "resident": {},
    "streamed": {"resident": ()},
    "some streamed": {"resident": (2, 5)},
    "spilled": {"hidden_tokens": 0},
    "few rows": {"embedding_rows": 7},
    "one row": {"embedding_rows": 1},
    "all at once": {"resident": (), "hidden_tokens": 0, "embedding_rows": 7},
}


def load_planned(
    directory: Path,
    *,
    dtype: torch.dtype = torch.float32,
    pruning: PruningPolicy | None = None,
    chunk_tokens: int = 64,
    template: Prompt | None = None,
    adapter: Path | None = None,
    window: int = WINDOW,
    **changes: object,
) -> Reranker:
    """A reranker under a plan that keeps everything, but for the changes."""
    stored = StoredModel(
        directory,
        device=torch.device("cpu"),
        dtype=dtype,
        attention=PACKED_ATTENTION,
        lasting=True,
        adapter=None if adapter is None else Adapter(adapter),
    )
    sizes = stored.sizes(window)
    everything = MemoryPlan(
        budget=10**9,
        sizes=sizes,
        resident=tuple(range(1, len(sizes.layers) + 1)),
        chunk_tokens=chunk_tokens,
        embedding_rows=sizes.vocabulary,
        hidden_tokens=10**9,
    )
    plan = replace(everything, **changes)
    encoder = load_template(directory, window, prompt=template, asks=stored.family.asks)
    return Reranker(
        stored.load(plan, encoder.answers),
        encoder,
        model_path=directory,
        fingerprint="planned",
        pruning=pruning or Off(),
        chunk_tokens=chunk_tokens,
        plan=plan,
    )
