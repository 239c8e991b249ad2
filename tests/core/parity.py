"""transformers' own answer, and random texts to ask it about."""

import inspect
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BatchEncoding,
    DynamicCache,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from grating_core import Reranker

TOLERANCE = 1e-4


def saved_tokenizer(directory: Path) -> PreTrainedTokenizerBase:
    """transformers' tokenizer; for the tests' own, not what AutoTokenizer makes up for some architectures."""
    own = json.loads((directory / "tokenizer_config.json").read_text())["tokenizer_class"] == "TokenizersBackend"
    return (PreTrainedTokenizerFast if own else AutoTokenizer).from_pretrained(directory)


@torch.inference_mode()
def padded_scores(directory: Path, pairs: list[tuple[str, str]]) -> list[float]:
    """Scores of one padded batch in float32 with transformers' eager attention."""
    model = AutoModelForSequenceClassification.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    return model(**padded(directory, pairs)).logits[:, 0].tolist()


def padded(directory: Path, pairs: list[tuple[str, str]]) -> BatchEncoding:
    """One padded batch, of pairs as the tokenizer joins them, or of the prompts of NVIDIA's rerankers."""
    tokenizer = saved_tokenizer(directory)
    how = {"padding": True, "return_tensors": "pt", "max_length": tokenizer.model_max_length}
    if json.loads((directory / "config.json").read_text())["model_type"] == "llama_bidirec":
        texts = [f"<|begin_of_text|>question:{query} \n \n passage:{text}" for query, text in pairs]
        return tokenizer(texts, truncation=True, add_special_tokens=False, **how)
    queries, documents = [query for query, _ in pairs], [text for _, text in pairs]
    return tokenizer(queries, documents, truncation="only_second", **how)


def random_text(words: int, source: random.Random, vocabulary: list[str]) -> str:
    return " ".join(source.choices(vocabulary, k=words))


def load(directory: Path, *, slice_tokens: int | None = None, **settings: object) -> Reranker:
    """Unpruned and in float32, unless told otherwise."""
    reranker = Reranker.from_pretrained(
        directory, **{"pruning": "off", "dtype": "float32", "device": "cpu", **settings}
    )
    reranker.scorer.slice_tokens = slice_tokens or reranker.scorer.slice_tokens
    return reranker


def going_on(model: PreTrainedModel) -> Callable[[list[int]], Any]:
    """A function that puts the next tokens of a sequence through a language model, which keeps keys and values."""
    # Since transformers 5.24 it is called "cache".
    name = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
    kept = {name: DynamicCache(config=model.config)}
    return lambda ids: model(torch.tensor([ids]), use_cache=True, **kept)
