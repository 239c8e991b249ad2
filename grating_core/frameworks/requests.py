"""Frameworks hand over queries, lists of documents and positions; here they are checked."""

from __future__ import annotations

from collections.abc import Iterable
from numbers import Integral
from typing import TypeVar

from grating_core.arguments import elements

Item = TypeVar("Item")


def is_blank(query: object, name: str = "query") -> bool:
    """Return whether a query says nothing, as a chat's first one may. There is nothing to judge by then.

    Args:
        query: What was handed over.
        name: What it is called there.

    Raises:
        ValueError: It is not a string.
    """
    if not isinstance(query, str):
        raise ValueError(f"{name}={query!r} must be a string, not a {type(query).__name__}")
    return not query.strip()


def checked_items(name: str, items: Iterable[Item], kind: type[Item], wrap: str) -> list[Item]:
    """Return the documents or nodes of a request as a list.

    Args:
        name: What they are called there.
        items: What was handed over.
        kind: What each of them has to be.
        wrap: How one is made of a text, to be written in the message.

    Raises:
        ValueError: It is not a list of these; the message names what is not, and what to write.
    """
    if isinstance(items, kind):  # some can be iterated over
        raise ValueError(f"{name} must be a list of {kind.__name__}, not a {kind.__name__}: write [{name}]")
    items = elements(name, items, f"a list of {kind.__name__}", values="{name}.values()")
    for index, item in enumerate(items):
        if not isinstance(item, kind):
            raise ValueError(f"{name}[{index}] is a {type(item).__name__}, not a {kind.__name__}: write {wrap}")
    return items


def position(value: object) -> int | None:
    """Return a position in a text, as metadata have it; None if the value is none.

    Args:
        value: Whatever stands there.
    """
    if isinstance(value, bool) or not isinstance(value, int | Integral):
        return None
    return int(value) if int(value) >= 0 else None
