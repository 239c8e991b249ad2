"""Sentences of a text are found by their ends, and every character of the text is in one of them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

_SHORTEST = 12  # characters; what is shorter goes with the sentence behind it: initials, numbers of a list
# Each pattern goes over a text once: a run of marks is tried from its beginning only, and given back nowhere.
_MARKS = r"(?<![.!?…])[.!?…]++[\"'”’»)\]]*+"
_OTHER = r"(?<![。！？])[。！？]++[”’」』）]*+|\n\s*\n|\n(?=[^\S\n]*[-*•]\s)"
_ENDS = re.compile(rf"{_MARKS}(?=\s++[^\sa-z])|{_OTHER}")
_WITHOUT_CAPITALS = re.compile(rf"{_MARKS}(?=\s)|{_OTHER}")  # every word may begin a sentence


class Divided(NamedTuple):
    """This class says how a document is divided into sentences, which all have a token.

    Attributes:
        places: The first character of each sentence in the text, and the one behind its last.
        ends: The number of the document's tokens before the end of each sentence, rising.
    """

    places: Sequence[tuple[int, int]]
    ends: Sequence[int]

    def owners(self, tokens: int) -> NDArray[np.int64]:
        """Return the number of the sentence of each of a document's tokens; that of none is behind all."""
        return np.searchsorted(self.ends, np.arange(tokens), side="right")


def divided(text: str, places: Sequence[tuple[int, int]], ends: Sequence[int], tokens: int) -> Divided:
    """Return the sentences of a document that have a token, without the white space before them.

    Args:
        text: The text.
        places: The places of all its sentences, see :func:`sentences`.
        ends: The number of tokens before the end of each sentence.
        tokens: The number of tokens that are read of the document, from its first on.
    """
    stops = [min(end, tokens) for end in ends]
    kept = [number for number, stop in enumerate(stops) if stop > (stops[number - 1] if number else 0)]
    lengths = [len(text[slice(*places[number])].lstrip()) for number in kept]
    found = [(places[number][1] - length, places[number][1]) for number, length in zip(kept, lengths, strict=True)]
    return Divided(found, [stops[number] for number in kept])


def sentences(text: str) -> list[tuple[int, int]]:
    """Return where each sentence of a text begins, and the character behind its end. White space leads a sentence.

    Args:
        text: The text, which may be empty. A sentence ends with its punctuation, a paragraph or an item of a list.
    """
    return list(_found(text))


def _found(text: str) -> Iterator[tuple[int, int]]:
    start, last = 0, len(text.rstrip())
    for end in (_WITHOUT_CAPITALS if text.islower() else _ENDS).finditer(text):
        if end.end() < last and len(text[start : end.end()].strip()) >= _SHORTEST:
            yield start, end.end()
            start = end.end()
    if start < last:
        yield start, len(text)
