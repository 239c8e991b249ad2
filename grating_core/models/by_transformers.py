"""Classifiers that only transformers knows are computed by transformers' own model, as a whole.

Code that comes with a model is never run: a model's architecture must be one of transformers' own.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from grating_core.errors import ModelNotFoundError, UnsupportedModelError
from grating_core.models.agreement import check_not_quantised
from grating_core.models.directory import (
    blaming_config,
    is_gguf,
    read_headers,
    read_stated,
)
from grating_core.models.families import BASES, FAMILIES
from grating_core.models.family import Family, Fields
from grating_core.models.labels import Labels, read_labels
from grating_core.models.modules import LIST, read_head, transformer_folder

_WINDOWS = ("max_position_embeddings", "n_positions", "max_sequence_length")
_ANY_WINDOW = 8192  # tokens, for a model that can take any number


def needs_transformers(directory: Path) -> bool:
    """Tell whether a model is one of transformers' classifiers, and none that grating's own layers compute.

    Args:
        directory: A model directory, or a GGUF file.

    Raises:
        ModelNotFoundError: There is no readable ``config.json``.
        UnsupportedModelError: Only code that comes with the model computes it.
    """
    if is_gguf(directory) or read_head(directory) is not None:
        return False
    stated = read_stated(directory)
    named = set(stated["architectures"])
    if named & (FAMILIES.keys() | BASES.keys()):
        return False
    if _class_of(stated) is None and stated.get("auto_map"):
        raise _no_class(directory / "config.json", stated)
    return _class_of(stated) is not None


def _class_of(stated: Fields) -> str | None:
    """Return the name of transformers' own class for a classifier; None if it is no class of transformers."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES as CLASSES

    # A model may call itself "bert" and yet be computed by code that comes with it, as Jina's first rerankers are.
    found = CLASSES.get(str(stated.get("model_type")))
    return found if found in stated["architectures"] else None


class Asks(NamedTuple):
    """This class says how a classifier may be asked: with any prompt, or with the two texts alone.

    Attributes:
        causal: Whether it takes a prompt.
        asks: Whether the score is the logit of an answer.
        prompt: Name of the official prompt of all models of its architecture; None if they have none.
    """

    causal: bool = True
    asks: bool = False
    prompt: str | None = None


class StoredClassifier:
    """This class holds a classifier's directory, of which the configuration and the headers have been read.

    Args:
        directory: A model in Hugging Face layout with safetensors weights.
        device: The device that the weights will go to.
        dtype: The dtype of the weights and of all that is computed.

    Raises:
        ModelNotFoundError: Configuration or weights are missing or damaged.
        UnsupportedModelError: transformers has no such classifier, or it gives no relevance score.
    """

    adapter = None

    def __init__(self, directory: Path, *, device: torch.device, dtype: torch.dtype) -> None:
        if read_head(directory) is not None:
            raise UnsupportedModelError(
                f"{directory / LIST} has modules behind the transformer, which engine='transformers' does not "
                f"compute"
            )
        self.directory = directory
        self._folder = transformer_folder(directory)
        path, stated = self._folder / "config.json", read_stated(directory)
        self.device = device
        self.dtype = dtype
        self.architecture = _checked_class(path, stated)
        self.family: Family | Asks = FAMILIES.get(self.architecture, Asks())
        """How the classifier is asked."""
        check_not_quantised(read_headers(directory))
        with blaming_config(path), torch.device("meta"):
            self._config, model = _skeleton(self._folder)
        if stated.get("position_embedding_type") not in (None, "absolute") and not hasattr(
            type(self._config)(), "position_embedding_type"
        ):
            raise UnsupportedModelError(
                f"{path} has position_embedding_type={stated['position_embedding_type']!r}, which transformers' "
                f"{self.architecture} no longer computes: the scores would be wrong"
            )
        with blaming_config(path):
            self._labels = read_labels(path, stated)
            self.window = _window(self._config, model)
            """The most tokens that the model can take."""
        self.vocabulary: int | None = getattr(self._config.get_text_config(), "vocab_size", None)
        """The number of rows of the embedding table; None if the model has no such table."""

    def load(self, *, show_progress: bool = False) -> Classifier:
        """Read the weights.

        Args:
            show_progress: Whether to show a progress bar on standard error.

        Raises:
            ModelNotFoundError: The weights cannot be read, or are not those of the configuration.
        """
        from transformers import AutoModelForSequenceClassification  # slow to import

        try:
            with _progress(show_progress):
                model, info = AutoModelForSequenceClassification.from_pretrained(
                    self._folder,
                    dtype=self.dtype,
                    use_safetensors=True,
                    trust_remote_code=False,
                    local_files_only=True,
                    output_loading_info=True,
                )
        except (ValueError, OSError, RuntimeError, ImportError) as error:
            raise ModelNotFoundError(f"transformers cannot load {self.directory}: {error}") from error
        if lacking := sorted(info["missing_keys"]):
            shown = ", ".join(lacking[:3]) + ", …" * (len(lacking) > 3)
            raise ModelNotFoundError(
                f"the weights in {self.directory} lack {shown}, which {self.architecture} needs"
            )
        return Classifier(model.to(self.device).eval(), self._labels, self.dtype)

    def close(self) -> None:
        """Do nothing: no file stays open."""


class Classifier:
    """A classifier of transformers computes padded batches, all layers at once.

    Args:
        model: transformers' model, on its device.
        labels: The labels of its logits.
        dtype: The dtype of the weights and of all that is computed.
    """

    depth = 1
    kernels = "transformers"

    def __init__(self, model: Any, labels: Labels, dtype: torch.dtype) -> None:
        self._model: Callable[..., Any] | None = model
        self._labels = labels
        self.notes = () if labels.remark is None else (labels.remark,)
        """Remarks in words on how scores come about, for traces."""
        self.device: torch.device = model.device
        self.products = dtype
        """The dtype of the layers' products."""
        config = model.config.get_text_config()
        taken = inspect.signature(model.forward).parameters
        self._padding: int = config.pad_token_id or 0
        self._takes_mask = "attention_mask" in taken
        self._takes_types = "token_type_ids" in taken and getattr(config, "type_vocab_size", 2) > 1
        # Keys and values of tokens that never come would only take memory.
        self._always = {"use_cache": False} if "use_cache" in taken else {}

    @torch.inference_mode()
    def score(self, sequences: Sequence[Sequence[int]], types: Sequence[Sequence[int]]) -> Tensor:
        """Return the scores of a batch, float32 ``[N]``. Shorter sequences are padded behind their last token.

        Args:
            sequences: The token ids of N sequences.
            types: The type of each token.
        """
        assert self._model is not None  # whoever closes the model computes no more
        longest = max(map(len, sequences))

        def padded(rows: Sequence[Sequence[int]], value: int) -> Tensor:
            return torch.tensor([[*row, *[value] * (longest - len(row))] for row in rows], device=self.device)

        batch = {"input_ids": padded(sequences, self._padding)}
        if self._takes_mask:
            batch["attention_mask"] = padded([[1] * len(row) for row in sequences], 0)
        if self._takes_types and any(map(any, types)):  # a model may have another meaning for zeros than for none
            batch["token_type_ids"] = padded(types, 0)
        found: Tensor = self._model(**batch, **self._always).logits
        return self._labels.score(found.float())

    def close(self) -> None:
        """Free the weights."""
        self._model = None


def _checked_class(path: Path, stated: Fields) -> str:
    """Return the name of transformers' class for a classifier, after refusing what is none."""
    if (found := _class_of(stated)) is None:
        raise _no_class(path, stated)
    return found


def _no_class(path: Path, stated: Fields) -> UnsupportedModelError:
    """Return the error for what transformers itself cannot load as a classifier."""
    named = ", ".join(stated["architectures"]) or "no architecture"
    why = (
        "engine='transformers' computes only what transformers loads as a classifier (…ForSequenceClassification)"
    )
    if stated.get("auto_map"):
        why = "it is computed by code that comes with the model, which grating never runs"
    return UnsupportedModelError(f"{path} names {named}: {why}")


def _skeleton(directory: Path) -> tuple[Any, Any]:
    """Return configuration and model as transformers makes them, without memory for the weights."""
    from transformers import AutoConfig, AutoModelForSequenceClassification  # slow to import

    made: Any = AutoModelForSequenceClassification
    config = AutoConfig.from_pretrained(directory, trust_remote_code=False, local_files_only=True)
    return config, made.from_config(config, trust_remote_code=False)


def _window(config: Any, model: nn.Module) -> int:
    """Return the most tokens of a pair."""
    stated = [getattr(config.get_text_config(), name, None) for name in _WINDOWS]
    windows = [size for size in stated if isinstance(size, int) and size > 0]
    for name, part in model.named_modules():
        if name.endswith("position_embeddings") and isinstance(part, nn.Embedding):
            # As in RoBERTa, positions begin behind the row of padding, if there is one.
            first = 0 if part.padding_idx is None else part.padding_idx + 1
            windows.append(part.num_embeddings - first)
    return min(windows, default=_ANY_WINDOW)


@contextmanager
def _progress(show: bool) -> Iterator[None]:
    """Let transformers show progress bars inside the ``with`` only if they are wanted."""
    from transformers.utils import logging

    bars: Any = logging
    shown = bars.is_progress_bar_enabled()
    if shown and not show:
        bars.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            bars.enable_progress_bar()
