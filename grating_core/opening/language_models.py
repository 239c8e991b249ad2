"""A language model is opened to generate text."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from grating_core.columns.install import mlp_pruning
from grating_core.columns.preference import Preferences, read_fits
from grating_core.lifetime import closed_on_error
from grating_core.memory.meter import resident_memory
from grating_core.memory.plan import MemoryPlan
from grating_core.models.causal_lm import CausalLM
from grating_core.models.identity import fingerprint
from grating_core.models.packing import Packing, generating
from grating_core.models.stored_causal_lm import StoredCausalLM
from grating_core.opening.found import find, with_tokenizer
from grating_core.settings import GenerationSettings
from grating_core.text.chat import PromptTokenizer
from grating_core.text.windows import find_window

USUAL_LENGTH = 4096  # tokens of a prompt and its continuation, if the user gives no limit


@dataclass(frozen=True)
class LoadedLanguageModel:
    """This class holds a loaded language model and its tokenizer.

    Attributes:
        model: The model.
        tokenizer: The tokenizer, which makes tokens of prompts and text of tokens.
        end_tokens: The tokens that end a text.
        plan: The plan of the memory budget; None without a budget.
    """

    model: CausalLM
    tokenizer: PromptTokenizer
    end_tokens: frozenset[int]
    plan: MemoryPlan | None


@dataclass(frozen=True)
class OpenLanguageModel:
    """This class knows everything about a language model but its weights.

    Attributes:
        stored: The model's files.
        window: The most tokens of a prompt together with its continuation.
        plan: The plan of the memory budget; None without a budget.
    """

    stored: StoredCausalLM
    window: int
    plan: MemoryPlan | None

    def load(self) -> LoadedLanguageModel:
        """Read tokenizer and weights.

        Raises:
            ModelNotFoundError: The files are damaged.
            UnsupportedModelError: The tokenizer has no Rust backend.
            FileError: The file with the quantised weights, or with the columns of the MLPs, is damaged, or belongs
                to other weights.
            StorageError: That file cannot be written.
        """
        before = resident_memory()
        tokenizer = PromptTokenizer(self.stored.directory, rows=self.stored.vocabulary)
        plan = with_tokenizer(self.plan, before)
        ends = self.stored.end_tokens | tokenizer.end_tokens
        return LoadedLanguageModel(self.stored.load(plan), tokenizer, ends, plan)

    def close(self) -> None:
        """Close the files. A model that was loaded from them can then read no more weights."""
        self.stored.close()


def open_language_model(settings: GenerationSettings) -> OpenLanguageModel:
    """Find a language model and read everything but its weights.

    Args:
        settings: The model's settings.

    Raises:
        ModelNotFoundError: The name leads to no usable weights.
        UnsupportedModelError: grating does not generate with weights of this kind.
        BudgetError: The memory budget is too small; the message states the smallest that works.
        ValueError: A setting does not fit this machine or this model.
    """
    device, dtype, directory, adapter = find(settings)
    packing = None if settings.bits is None else _packing(settings.bits, device, dtype)
    stored = StoredCausalLM(
        directory,
        device=device,
        dtype=dtype,
        adapter=adapter,
        lasting=settings.budget is not None,
        pruning=mlp_pruning(
            settings.mlp_density,
            _preferences(settings, directory),
            bits=settings.bits,
            show_progress=settings.show_progress,
        ),
        packing=packing,
        kv_bits=settings.kv_bits,
        show_progress=settings.show_progress,
    )
    with closed_on_error(stored):
        window = find_window(directory, stored.window, settings.max_length, USUAL_LENGTH)
        plan = None if settings.budget is None else stored.plan(window, settings.budget)
        return OpenLanguageModel(stored, window, plan)


def _preferences(settings: GenerationSettings, directory: Path) -> Preferences:
    """Return what the user asked for and what was fitted to the model, whatever adapter is merged into it."""
    prunes = settings.mlp_density is not None and settings.mlp_density < 1
    fits = read_fits(fingerprint(directory)) if prunes else []
    return Preferences(settings.inputs_preference, settings.products_preference, fits)


def _packing(bits: int, device: torch.device, dtype: torch.dtype) -> Packing:
    """Return the packing of weights in so many bits.

    Raises:
        ValueError: This device, or layers in this dtype, take no weights in so many bits.
    """
    if device.type != "cpu":
        raise ValueError(
            f"bits={bits} is for the CPU, and this model computes on {device}: use device='cpu', or leave bits out"
        )
    if dtype == torch.float16:
        raise ValueError(
            f"dtype='float16' does not go with bits={bits}: use dtype='auto', 'bfloat16' or 'float32'"
        )
    return generating(bits, dtype)
