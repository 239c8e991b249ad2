"""This module knows the names that rerankers have in other libraries and services."""

from __future__ import annotations

import os
import re

_SMALL = "cross-encoder/ms-marco-MiniLM-L12-v2"
_MULTILINGUAL = "BAAI/bge-reranker-v2-m3"
_DECODER = "Qwen/Qwen3-Reranker-0.6B"

_SAME_WEIGHTS = {
    "ms-marco-MiniLM-L-12-v2": _SMALL,
    "ms-marco-TinyBERT-L-2-v2": "cross-encoder/ms-marco-TinyBERT-L2-v2",
}
"""FlashRank's names, and the hub ids of the same weights."""

_FLASHRANK = {
    "ce-esci-MiniLM-L12-v2": _SMALL,
    "miniReranker_arabic_v1": _MULTILINGUAL,
    "ms-marco-MultiBERT-L-12": _MULTILINGUAL,
    "rank-T5-flan": _SMALL,
    "rank_zephyr_7b_v1_full": _DECODER,
}
"""FlashRank's other names, and the models to take here instead."""

_SERVICES = (
    (r"rerank-(v\d|english-|multilingual-).*|cohere\.rerank-.*", "Cohere", _MULTILINGUAL),
    (r"rerank-(lite-)?\d.*", "Voyage AI", _MULTILINGUAL),
    (r"jina-(reranker|colbert)-.*", "Jina AI", _MULTILINGUAL),
    (r"semantic-ranker-.*", "Google", _MULTILINGUAL),
    (r"amazon\.rerank-.*", "Amazon", _MULTILINGUAL),
    (r"pinecone-rerank-.*", "Pinecone", _SMALL),
    (r"ctxl-rerank-.*", "Contextual AI", _DECODER),
    (r"(gpt-|chatgpt-|o\d|claude-|gemini-|command-).*", "a language-model service", _DECODER),
)
"""Patterns of names at services, the service, and the model to take here instead."""

_OWNERS = (
    (r"(ms-|m)marco-.*", "cross-encoder"),
    (r"bge-reranker-.*", "BAAI"),
    (r"mxbai-rerank-.*", "mixedbread-ai"),
    (r"qwen3-reranker-.*", "Qwen"),
    (r"gte-.*rerank.*", "Alibaba-NLP"),
    (r"zerank-.*", "zeroentropy"),
    (r"jina-reranker-.*-(en|multilingual)|jina-reranker-v3", "jinaai"),
    (r"ctxl-rerank-.*-\d+b.*", "ContextualAI"),
    (r"llama-.*rerank.*", "nvidia"),
    (r"granite-embedding-reranker-.*", "ibm-granite"),
    (r"monot5-.*", "castorini"),
)
"""Patterns of names on the hub that lack their owner, and the owner."""

_ADDRESS = re.compile(r"(?:https?://)?(?:huggingface\.co|hf\.co)/([\w.-]+/[\w.-]+)")
"""An address that a browser shows, with the hub id in it."""


def hub_name(name: str) -> str:
    """Return the hub id for FlashRank's name of the same weights. Other names and directories stay the same."""
    return name if os.path.isdir(name) else _SAME_WEIGHTS.get(name, name)  # noqa: PTH112 - Path raises for long ones


def known_elsewhere(name: str) -> str | None:
    """Explain a model's name that another library or service uses, and say what to take instead.

    Args:
        name: A model's name that is no directory.

    Returns:
        A sentence without its full stop; None for a name that is not known from elsewhere.
    """
    if name in _SAME_WEIGHTS:
        return f"model={name!r} is FlashRank's name of {_SAME_WEIGHTS[name]!r}: write that"
    if name in _FLASHRANK:
        return f"model={name!r} is FlashRank's name of a file that is not on the hub: take {_FLASHRANK[name]!r}"
    if found := _ADDRESS.match(name):
        return f"model={name!r} is the address of a model on the hub: write {found[1]!r}"
    for pattern, owner in _OWNERS:
        if re.fullmatch(pattern, name, re.IGNORECASE):
            return f"model={name!r} lacks its owner: write '{owner}/{name}'"
    for pattern, owner, instead in _SERVICES:
        if re.fullmatch(pattern, name, re.IGNORECASE):
            return (
                f"model={name!r} is {owner}'s name of a model that runs there: take one that runs here, "
                f"such as {instead!r}"
            )
    return None
