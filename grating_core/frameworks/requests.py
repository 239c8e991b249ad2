"""Frameworks hand over queries, lists of documents, positions and thresholds; here they are checked."""

from __future__ import annotations

import math
import warnings
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


def check_threshold(threshold: float | None, scores: str) -> None:
    """Check the score below which a document is left out, and warn of one that may be meant as a probability.

    Args:
        threshold: A raw logit, or None.
        scores: ``"exact"`` or ``"estimated"``.

    Raises:
        ValueError: It is no finite number, or the scores are estimates, whose level may be off.
    """
    if threshold is None:
        return
    if not math.isfinite(threshold):
        raise ValueError(f"score_threshold={threshold} must be a finite number; None leaves nothing out")
    if scores == "estimated":
        raise ValueError(
            f"score_threshold={threshold} and scores='estimated' exclude each other: the level of an estimate may "
            f"be off. Use scores='exact'"
        )
    if 0 <= threshold <= 1:
        warnings.warn(
            f"score_threshold={threshold} is read as a raw logit, which is the probability "
            f"{1 / (1 + math.exp(-threshold)):.2f}. {_as_logit(threshold)}",
            stacklevel=6,
        )


def _as_logit(probability: float) -> str:
    """Return what somebody who meant a probability should write."""
    if probability == 0:
        return "If you mean the probability 0, which keeps everything, leave it out"
    if probability == 1:
        return "No document has the probability 1; that of a lower one, p, is math.log(p / (1 - p))"
    logit = math.log(probability / (1 - probability))
    return (
        f"If you mean the probability {probability}, write math.log({probability} / (1 - {probability})), which "
        f"is {logit:.2f}"
    )
