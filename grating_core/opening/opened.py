"""An opened reranker is everything but the weights, whoever computes its layers."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Protocol

import torch

from grating_core.engine.scorer import Scorer
from grating_core.files.places import expanded
from grating_core.lens.probability import Probability, find_probability, logistic
from grating_core.lens.pruning import ByLens
from grating_core.lens.store import CalibratedLens
from grating_core.memory.plan import MemoryPlan
from grating_core.models.adapter import Adapter
from grating_core.models.identity import fingerprint
from grating_core.pruning import Off, PruningPolicy
from grating_core.settings import RerankSettings
from grating_core.text.prompts import Prompt

_log = logging.getLogger("grating")


class Files(Protocol):
    """This protocol is for a model's files, of which the weights have not been read."""

    @property
    def directory(self) -> Path:
        """The local directory, or the GGUF file."""

    @property
    def adapter(self) -> Adapter | None:
        """The adapter that is merged into the weights; None for none."""

    def close(self) -> None:
        """Close the files."""


@dataclass(frozen=True)
class OpenReranker(ABC):
    """This class knows everything about a reranker but its weights.

    Attributes:
        settings: The settings that the reranker was opened with.
        stored: The reranker's files.
        prompt: The question to the model; None if the tokenizer joins the two texts without a question.
        window: The most tokens of a pair.
    """

    settings: RerankSettings
    stored: Files
    prompt: Prompt | None
    window: int

    @property
    def directory(self) -> Path:
        """The local directory, or the GGUF file, that the weights are read from."""
        return self.stored.directory

    @cached_property
    def identity(self) -> str:
        """The identity of the model and of its question, see :func:`grating_core.models.identity.fingerprint`."""
        asked = "" if self.prompt is None else self.prompt.asked
        if (cutoff := self.settings.cutoff_layers) is not None:
            asked += f" cutoff_layers={cutoff}"
        return fingerprint(self.directory, self.stored.adapter, asked)

    @property
    @abstractmethod
    def architecture(self) -> str:
        """The name of the architecture, as a ``config.json`` has it."""

    @property
    @abstractmethod
    def products(self) -> torch.dtype:
        """The dtype of the layers' products."""

    @property
    @abstractmethod
    def lens(self) -> CalibratedLens | None:
        """The lens that the settings name, or the one of this model; None if there is none.

        Raises:
            FileError: The lens in the settings is missing or damaged, or is for other weights.
        """

    @property
    def probability(self) -> Probability:
        """The function from raw scores to probabilities: one that was fitted to judgements, or the usual."""
        lens = self.settings.lens
        return find_probability(None if lens is None else expanded(lens), self.identity, self._usual_probability)

    @property
    def _usual_probability(self) -> Probability:
        """The mapping without judgements."""
        return logistic

    @property
    @abstractmethod
    def plan(self) -> MemoryPlan | None:
        """The plan of the memory budget; None without a budget.

        Raises:
            BudgetError: The budget is too small; the message states the smallest that works.
        """

    @abstractmethod
    def pruning(self) -> PruningPolicy | ByLens:
        """Return the pruning of the settings. ``"auto"`` reads :attr:`lens`."""

    @abstractmethod
    def load(self) -> Scorer:
        """Read tokenizer and weights.

        Raises:
            ModelNotFoundError: The files are damaged.
            UnsupportedModelError: The tokenizer has no Rust backend, or no token for an answer.
            ValueError: The instruction or the window does not fit the prompt.
        """

    def tell(self, notes: Iterable[str]) -> None:
        """Write into the log how scores come about."""
        for note in notes:
            _log.info("model %s: %s", self.directory, note)

    def close(self) -> None:
        """Close the files. A model that was loaded from them can then read no more weights."""
        self.stored.close()


def refuse_settings(settings: RerankSettings, because: str, needs: Mapping[str, tuple[bool, str]]) -> None:
    """Refuse settings that a model has no meaning for.

    Args:
        settings: The settings.
        because: What is different with the model.
        needs: For each setting, by name, whether it was given, and why it does not fit. Pruning is refused by
            itself, as no document is dropped.

    Raises:
        ValueError: There is such a setting; the message names it.
    """
    prunes = settings.pruning not in ("auto", "off") and not isinstance(settings.pruning, Off)
    all_needs = {
        **needs,
        "recalibrate": (settings.recalibrate > 0, "has no margins to recalibrate"),
        "pruning": (prunes, "drops no document before the last layer"),
    }
    for name, (given, why) in all_needs.items():
        if given:
            raise ValueError(
                f"{name}={getattr(settings, name)!r} does not fit this model: {because} {why}; leave {name} out"
            )
