"""How transformers is told to rerank: what every user of it writes, once for encoders and once for decoders."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

# The prompt of Qwen3-Reranker's model card.
PREFIX = (
    "<|im_start|>system\nJudge whether the Document meets the requirements based on the Query and the Instruct "
    'provided. Note that the answer can only be "yes" or "no".<|im_end|>\n<|im_start|>user\n'
)
SUFFIX = "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
INSTRUCTION = "Given a web search query, retrieve relevant passages that answer the query"
CARD_LENGTH = 8192
BODY = "<Instruct>: {instruction}\n<Query>: {query}\n<Document>: {document}"


class Recipe(ABC):
    """Scores padded batches with transformers.

    Attributes:
        architecture: The class that loads the model.
    """

    architecture: Any

    @torch.inference_mode()
    def scores(self, model: Any, query: str, documents: list[str], batch_size: int | None = None) -> torch.Tensor:
        """Compute the relevance of each document, in float32.

        Args:
            model: The model, as :attr:`architecture` loads it.
            query: The question.
            documents: The candidates.
            batch_size: Candidates at a time; None for all at once.
        """
        step = batch_size or len(documents)
        batches = [documents[start : start + step] for start in range(0, len(documents), step)]
        return torch.cat([self._batch_scores(model, query, batch) for batch in batches])

    @abstractmethod
    def _batch_scores(self, model: Any, query: str, documents: list[str]) -> torch.Tensor: ...


class EncoderRecipe(Recipe):
    """Pads pairs to the longest.

    Args:
        directory: Holds the tokenizer.
        max_length: Most tokens of a pair; None for what the tokenizer says.
    """

    architecture = AutoModelForSequenceClassification

    def __init__(self, directory: Path, max_length: int | None) -> None:
        self._tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
        self._max_length = max_length

    def _batch_scores(self, model: Any, query: str, documents: list[str]) -> torch.Tensor:
        pairs = self._tokenizer(
            [query] * len(documents), documents, padding=True, truncation="only_second",
            max_length=self._max_length, return_tensors="pt",
        )  # fmt: skip
        scores: torch.Tensor = model(**pairs).logits[:, 0].float()
        return scores


class DecoderRecipe(Recipe):
    """Follows the model card of Qwen3-Reranker: prompts padded on the left, and is "yes" likelier than "no"?

    In three things this is kinder than the card. Only the last position's logits are computed, keys and values
    are not kept for a continuation that never comes, and the score is the difference of the two logits: it ranks
    as the card's probability of "yes" does, but does not run into 1.

    Args:
        directory: Holds the tokenizer.
        max_length: Most tokens of a prompt.
    """

    architecture = AutoModelForCausalLM

    def __init__(self, directory: Path, max_length: int) -> None:
        self._tokenizer: Any = AutoTokenizer.from_pretrained(
            directory, padding_side="left", trust_remote_code=False
        )
        self._prefix, self._suffix = self._encode([PREFIX, SUFFIX])
        (self._yes,), (self._no,) = self._encode(["yes", "no"])
        self._room = max_length - len(self._prefix) - len(self._suffix)

    def _encode(self, texts: list[str], **options: Any) -> list[list[int]]:
        ids: list[list[int]] = self._tokenizer(texts, add_special_tokens=False, **options).input_ids
        return ids

    def _batch_scores(self, model: Any, query: str, documents: list[str]) -> torch.Tensor:
        texts = [BODY.format(instruction=INSTRUCTION, query=query, document=text) for text in documents]
        bodies = self._encode(texts, truncation=True, max_length=self._room)
        prompts = [self._prefix + body + self._suffix for body in bodies]
        batch = self._tokenizer.pad({"input_ids": prompts}, return_tensors="pt")
        logits = model(**batch, logits_to_keep=1, use_cache=False).logits[:, -1].float()
        scores: torch.Tensor = logits[:, self._yes] - logits[:, self._no]
        return scores


def find_recipe(directory: Path, max_length: int | None) -> Recipe:
    """Return the recipe for a model; ``max_length`` is the window, None for the widest that is usual."""
    if is_decoder(directory):
        return DecoderRecipe(directory, max_length or CARD_LENGTH)
    return EncoderRecipe(directory, max_length)


def is_decoder(directory: Path) -> bool:
    """Tell whether the model of a directory is one that writes text."""
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    return bool(config["architectures"][0].endswith("ForCausalLM"))


def best(scores: ArrayLike, top_k: int) -> list[int]:
    """Return the indices of the highest scores, best first."""
    return [int(index) for index in np.argsort(-np.asarray(scores, dtype=np.float64), kind="stable")[:top_k]]
