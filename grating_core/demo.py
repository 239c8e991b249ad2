"""The demo's documents come with every CPython: the topics of the language reference, cut into passages."""

from __future__ import annotations

import textwrap
from pydoc_data.topics import topics

QUESTION = "How do I run clean-up code whether or not an exception was raised?"

_PASSAGE_WORDS = 120


def load_passages() -> list[str]:
    """Return the language reference in passages of about 120 words, cut between paragraphs, each once."""
    # Topics overlap: some are excerpts of others.
    return list(dict.fromkeys(passage for text in topics.values() for passage in _passages(text)))


def _passages(text: str) -> list[str]:
    passages: list[str] = []
    words = 0
    for paragraph in textwrap.dedent(text).split("\n\n"):
        if not (paragraph := " ".join(paragraph.split()).strip("* ")):
            continue
        if passages and words < _PASSAGE_WORDS:
            passages[-1] += " " + paragraph
        else:
            passages.append(paragraph)
            words = 0
        words += len(paragraph.split())
    return passages


def first_stage(query: str, passages: list[str], candidates: int) -> list[str]:
    """Return the passages with the highest BM25 scores, best first.

    Raises:
        ModuleNotFoundError: bm25s is not installed; the message names the extra that installs it.
    """
    try:
        import bm25s
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("the demo needs bm25s: pip install 'grating-core[demo]'") from error
    index = bm25s.BM25()
    index.index(bm25s.tokenize(passages, show_progress=False), show_progress=False)
    tokens = bm25s.tokenize(query, show_progress=False)
    found = index.retrieve(tokens, k=min(candidates, len(passages)), show_progress=False).documents[0]
    return [passages[place] for place in found]
