"""Paths into an item's value, in the syntax of LangGraph's index."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any

from langgraph.store.base import tokenize_path


def values_at(value: Mapping[str, Any], path: str) -> Iterator[Any]:
    """Return what a path leads to: what LangGraph's ``get_text_at_path`` writes as text, as it is.

    That function writes objects and lists as JSON, which cannot be told from a text that looks like it.

    Args:
        value: An item's value.
        path: A path such as ``"text"`` or ``"messages[*].content"``; ``"$"`` leads to the value itself.
    """
    found = _found(dict(value), [] if path == "$" else tokenize_path(path))
    return (inner for inner in found if isinstance(inner, str | int | float | list | dict))


def _found(value: Any, tokens: Sequence[str]) -> Iterator[Any]:
    if not tokens:
        yield value
        return
    token, *rest = tokens
    if token.startswith("{") and token.endswith("}"):  # ends a path
        yield from _selected(value, token[1:-1])
        return
    for inner in _step(value, token):
        yield from _found(inner, rest)


def _step(value: Any, token: str) -> Iterator[Any]:
    """Yield what one part of a path leads to."""
    if token.startswith("[") and token.endswith("]"):
        yield from _items(value, token[1:-1]) if isinstance(value, list) else ()
    elif token == "*":
        yield from value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    elif isinstance(value, dict) and token in value:
        yield value[token]


def _items(values: list[Any], index: str) -> Iterator[Any]:
    if index == "*":
        yield from values
        return
    with suppress(ValueError, IndexError):
        yield values[int(index)]


def _selected(value: Any, fields: str) -> Iterator[Any]:
    """Yield what several fields lead to, which are paths of names only, with commas between them."""
    for field in fields.split(","):
        names = tokenize_path(field.strip())
        inner = value
        for name in names:
            inner = inner.get(name) if isinstance(inner, dict) else None
        if names and inner is not None:
            yield inner
