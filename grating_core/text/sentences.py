"""Sentences of a text are found by their ends, and every character of the text is in one of them."""

from __future__ import annotations

import re
from collections.abc import Iterator

_SHORTEST = 12  # characters; what is shorter goes with the sentence behind it: initials, numbers of a list
# Each pattern goes over a text once: a run of marks is tried from its beginning only, and given back nowhere.
_MARKS = r"(?<![.!?…])[.!?…]++[\"'”’»)\]]*+"
_OTHER = r"(?<![。！？])[。！？]++[”’」』）]*+|\n\s*\n|\n(?=[^\S\n]*[-*•]\s)"
_ENDS = re.compile(rf"{_MARKS}(?=\s++[^\sa-z])|{_OTHER}")
_WITHOUT_CAPITALS = re.compile(rf"{_MARKS}(?=\s)|{_OTHER}")  # every word may begin a sentence


def sentences(text: str) -> list[tuple[int, int]]:
    """Return where each sentence of a text begins, and the character behind its end. White space leads a sentence.

    Args:
        text: The text, which may be empty. A sentence ends with its punctuation, a paragraph or an item of a list.
    """
    return list(_divided(text))


def _divided(text: str) -> Iterator[tuple[int, int]]:
    start, last = 0, len(text.rstrip())
    for end in (_WITHOUT_CAPITALS if text.islower() else _ENDS).finditer(text):
        if end.end() < last and len(text[start : end.end()].strip()) >= _SHORTEST:
            yield start, end.end()
            start = end.end()
    if start < last:
        yield start, len(text)
