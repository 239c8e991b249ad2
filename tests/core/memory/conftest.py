"""Models with a plan of the test's own making: tiny ones fit any budget, and nothing would be streamed."""

from dataclasses import replace
from pathlib import Path

import torch

from grating_core import Prompt, Reranker, StreamedCausalLM
from grating_core.engine.scorer import LayerScorer
from grating_core.memory.plan import MemoryPlan
from grating_core.models.adapter import Adapter
from grating_core.models.cross_encoder import StoredCrossEncoder
from grating_core.models.packing import Packing
from grating_core.models.stored import StoredModel
from grating_core.models.stored_causal_lm import StoredCausalLM
from grating_core.opening.language_models import LoadedLanguageModel
from grating_core.pruning import Off, PruningPolicy
from grating_core.text.chat import PromptTokenizer
from grating_core.text.pairs import load_template
from grating_core.text.prompts import find_prompt
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
    slice_tokens: int = 64,
    template: Prompt | None = None,
    adapter: Path | None = None,
    window: int = WINDOW,
    packing: Packing | None = None,
    **changes: object,
) -> Reranker:
    """A reranker under a plan that keeps everything, but for the changes."""
    stored = StoredCrossEncoder(
        directory,
        device=torch.device("cpu"),
        dtype=dtype,
        lasting=True,
        adapter=None if adapter is None else Adapter(adapter),
    )
    plan = planned(stored, window, slice_tokens, sizes=stored.sizes(window, packing), **changes)
    prompt = find_prompt(template, str(directory), directory, stored.family)
    encoder = load_template(directory, window, prompt=prompt, asks=stored.family.asks)
    return Reranker(
        LayerScorer(stored.load(plan, encoder.answers, packing), encoder, plan),
        model_path=directory,
        identity="planned",
        pruning=pruning or Off(),
    )


def load_planned_lm(directory: Path, **settings: object) -> StreamedCausalLM:
    """A language model under a plan that keeps everything, but for the changes."""
    stored, plan = planned_lm(directory, **settings)
    return StreamedCausalLM(
        LoadedLanguageModel(stored.load(plan), PromptTokenizer(directory), stored.end_tokens, plan),
        model_path=directory,
        max_length=WINDOW,
    )


def planned_lm(
    directory: Path, *, slice_tokens: int = 64, adapter: Path | None = None, **changes: object
) -> tuple[StoredCausalLM, MemoryPlan]:
    """A language model that is not loaded yet, and a plan that keeps everything, but for the changes."""
    stored = StoredCausalLM(
        directory,
        device=torch.device("cpu"),
        dtype=torch.float32,
        lasting=True,
        adapter=None if adapter is None else Adapter(adapter),
    )
    return stored, planned(stored, WINDOW, slice_tokens, **changes)


def planned(stored: StoredModel, window: int, slice_tokens: int, **changes: object) -> MemoryPlan:
    sizes = changes.pop("sizes", None) or stored.sizes(window)
    everything = MemoryPlan(
        budget=10**9,
        sizes=sizes,
        resident=tuple(range(1, len(sizes.layers) + 1)),
        slice_tokens=slice_tokens,
        embedding_rows=sizes.vocabulary,
        hidden_tokens=10**9,
    )
    return replace(everything, **changes)
