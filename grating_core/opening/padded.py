"""A reranker is opened to be computed by transformers, where grating's own layers do not know its architecture."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from grating_core.engine.padded import PaddedScorer
from grating_core.errors import UnsupportedModelError
from grating_core.lens.store import warn_once
from grating_core.lifetime import closed_on_error
from grating_core.models.by_transformers import StoredClassifier
from grating_core.models.directory import is_gguf
from grating_core.opening.found import Found
from grating_core.opening.opened import OpenReranker, refuse_settings
from grating_core.pruning import Off
from grating_core.settings import RerankSettings
from grating_core.text.pairs import load_template
from grating_core.text.prompts import find_prompt, usual_length
from grating_core.text.windows import find_window


@dataclass(frozen=True)
class OpenPadded(OpenReranker):
    """This class knows everything about a reranker that transformers computes, but its weights."""

    stored: StoredClassifier
    lens = None
    plan = None

    @property
    def architecture(self) -> str:
        """See :attr:`OpenReranker.architecture`."""
        return self.stored.architecture

    @property
    def products(self) -> torch.dtype:
        """See :attr:`OpenReranker.products`."""
        return self.stored.dtype

    def pruning(self) -> Off:
        """See :meth:`OpenReranker.pruning`."""
        return Off()

    def load(self) -> PaddedScorer:
        """Read tokenizer and weights; see :meth:`OpenReranker.load`."""
        template = load_template(
            self.directory,
            self.window,
            prompt=self.prompt,
            instruction=self.settings.instruction,
            long_documents=self.settings.long_documents,
            rows=self.stored.vocabulary,
        )
        model = self.stored.load(show_progress=self.settings.show_progress)
        self.tell(model.notes)
        return PaddedScorer(model, template)


def open_padded(settings: RerankSettings, found: Found) -> OpenPadded:
    """Read everything about a reranker but its weights.

    Args:
        settings: The reranker's settings.
        found: What was found for them.

    Raises:
        ModelNotFoundError: The files are no usable weights.
        UnsupportedModelError: transformers has no such classifier, or it gives no relevance score.
        ValueError: A setting needs grating's own layers, or does not fit this model.
    """
    directory = found.directory
    if is_gguf(directory):
        raise UnsupportedModelError(f"model={settings.model!r} is a GGUF file, which takes engine='grating'")
    # In 16 bits transformers rounds more often than grating's own layers.
    dtype = torch.float32 if settings.dtype == "auto" else found.dtype
    stored = StoredClassifier(directory, device=found.device, dtype=dtype)
    with closed_on_error(stored):
        needs = {
            "memory_budget": (settings.budget is not None, "holds all weights in memory"),
            "dtype": (settings.dtype == "int8", "has no layers in 8 bits"),
            "adapter": (settings.adapter is not None, "gets no adapter: merge it into the model with PEFT first"),
            "cutoff_layers": (settings.cutoff_layers is not None, "knows no heads behind other layers"),
            "lens": (settings.lens is not None, "shows no states between layers to a lens"),
        }
        refuse_settings(settings, f"transformers computes {stored.architecture}, and then", needs)
        prompt = find_prompt(settings.template, str(settings.model), directory, stored.family)
        window = find_window(directory, stored.window, settings.max_length, usual_length(prompt, stored.family))
        if settings.engine == "auto":
            warn_once(
                f"transformers computes {settings.name}, because grating's own layers do not know "
                f"{stored.architecture}: this is slower, drops no document early, and takes no memory budget"
            )
        return OpenPadded(settings, stored, prompt, window)
