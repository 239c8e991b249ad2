"""Calls of other rerankers may have arguments by position; here they get their names."""

from __future__ import annotations

from typing import Any

_FROM_INT = ("top_n", "model", "device", "keep_retrieval_score", "trust_remote_code")
_FROM_STR = ("model", "device", "cache_folder", "top_n", "keep_retrieval_score", "cross_encoder_kwargs")
"""SentenceTransformerRerank has these orders in llama-index-core and in the integration that follows it.
CohereRerank and RankGPTRerank begin like the first."""


def by_name(args: tuple[Any, ...], named: dict[str, Any]) -> dict[str, Any]:
    """Return all arguments of a call by their names.

    Args:
        args: Those given by position, in the order of one of the rerankers that ``GratingRerank`` replaces.
        named: Those given by name.

    Raises:
        ValueError: It cannot be told which the former are, or one is given both ways.
    """
    if not args:
        return named
    order = _FROM_INT if isinstance(args[0], int) else _FROM_STR if isinstance(args[0], str) else ()
    if len(args) > len(order):
        raise ValueError(
            f"{len(args)} arguments by position, the first a {type(args[0]).__name__}, cannot be told apart: "
            f"write top_n=, model= and the others by name"
        )
    given = dict(zip(order, args, strict=False))
    if twice := given.keys() & named.keys():
        raise ValueError(f"{', '.join(sorted(twice))}: given by position and by name")
    return {**given, **named}
