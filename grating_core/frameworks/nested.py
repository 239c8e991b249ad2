"""Metadata and memories are nested in lists and mappings; here they are walked without recursion, however deep."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from copy import deepcopy
from typing import Any


def copied(value: Any) -> Any:
    """Return a copy of a value. Only what cannot be copied, such as a lock, is shared with it.

    Args:
        value: Any value; dictionaries and lists in it may be nested to any depth, and hold themselves.
    """
    root = [value]
    copies: dict[int, Any] = {}
    todo: list[Any] = [root]
    while todo:
        container = todo.pop()
        for key, inner in list(container.items() if isinstance(container, dict) else enumerate(container)):
            if type(inner) not in (dict, list):
                container[key] = _copied_leaf(inner)
                continue
            if id(inner) not in copies:
                copies[id(inner)] = inner.copy()
                todo.append(copies[id(inner)])
            container[key] = copies[id(inner)]
    return root[0]


def _copied_leaf(value: Any) -> Any:
    if isinstance(value, str | int | float | bytes | None):
        return value
    try:
        return deepcopy(value)
    except Exception:  # as many kinds as there are objects
        return value


def strings(value: Any, *, by_key: bool = False) -> Iterator[str]:
    """Yield the strings in a value, in their order. Keys are not among them.

    Args:
        value: Any value; mappings, lists and tuples in it may be nested to any depth.
        by_key: Whether those of a mapping come in the order of its keys, as in JSON with sorted keys.
    """
    todo: list[tuple[int, Iterator[Any]]] = [(0, iter([value]))]
    entered = {0}  # ids of the containers that are being walked: one that holds itself is not entered again
    while todo:
        place, inside = todo[-1]
        for inner in inside:
            if isinstance(inner, str):
                yield inner
            elif isinstance(inner, Mapping | list | tuple) and id(inner) not in entered:
                entered.add(id(inner))
                todo.append((id(inner), _inside(inner, by_key)))
                break
        else:
            entered.remove(place)
            todo.pop()


def _inside(container: Any, by_key: bool) -> Iterator[Any]:
    if not isinstance(container, Mapping):
        return iter(container)
    return iter([container[key] for key in sorted(container, key=str)] if by_key else container.values())
