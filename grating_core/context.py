"""This module cuts long texts down to the passages that answer a query, within a budget of tokens."""

from __future__ import annotations

import re
from bisect import bisect
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from itertools import pairwise
from math import inf

from semantic_text_splitter import TextSplitter

from grating_core import arguments
from grating_core.arguments import check_query, whole_number
from grating_core.requests import Request
from grating_core.reranker import Reranker
from grating_core.results import RankedDocument
from grating_core.text.tokenizer import encodable

CountTokens = Callable[[str], int]

_SHORTEST = 1000  # characters; a word is cut only after more than these
_MARKS = re.compile(r"[^\w\s](?=\w)|[,;]|[、。，；]")
_FEW = 10_000  # tokens that are counted at no cost worth mentioning


@dataclass(frozen=True)
class Passage:
    """A passage is a part of one of the caller's documents, or all of it.

    Attributes:
        document: Index of the document in the caller's list; 0 for a single text.
        start: Position of the passage's first character in the document.
        end: Position after the last character: ``documents[document][start:end] == text``.
        text: The passage.
        score: The model's relevance score of the best chunk in the passage: a raw logit, higher is more relevant.
            None if everything fitted, so that nothing was judged.
        tokens: Number of tokens of the passage.
        probability: The score as a probability from 0 to 1; None if nothing was judged.
    """

    document: int
    start: int
    end: int
    text: str
    score: float | None
    tokens: int
    probability: float | None = None


def select_context(
    query: str,
    text_or_documents: str | Iterable[str],
    *,
    reranker: Reranker,
    max_tokens: int,
    chunk_tokens: int = 256,
    count_tokens: CountTokens | None = None,
) -> list[Passage]:
    """Cut long texts down to the passages that answer a query best and fit into a prompt together.

    The texts are divided into chunks: between paragraphs, else between lines, between sentences or between words.
    The reranker finds the best chunks, as many as fill the budget at average length. The best are kept first, and
    a chunk without room is left out. If all texts fit, all are returned and nothing is computed.

    Args:
        query: The question; not empty. If it is longer than half of the reranker's window, only its end is used,
            which has the last words of a conversation.
        text_or_documents: A text, or several, whose order is kept.
        reranker: The reranker that judges the chunks. All chunks go through the model together, so texts of
            megabytes need a reranker with a ``memory_budget``.
        max_tokens: The most tokens of all passages, as :func:`join_passages` joins them.
        chunk_tokens: The most tokens of a chunk, approximately. A chunk is kept or left out as a whole.
        count_tokens: Function that counts the tokens of a text. Take the tokenizer of the model that will read the
            prompt; with tiktoken ``lambda text: len(encoding.encode_ordinary(text))``. None for the reranker's.

    Returns:
        Passages in the order of the texts, without overlap. Neighbouring chunks are one passage. The list is empty
        if the texts are blank, or if not one of their characters fits into ``max_tokens``.

    Raises:
        ValueError: An argument is not usable; the message names it. Raised before any computing.
        ScoreError: The model gave a score that is not a finite number.
        RuntimeError: The reranker has been closed.

    Example:
        .. code-block:: python

            passages = select_context("Who did it?", book, reranker=reranker, max_tokens=4000)
            prompt = join_passages(passages) + " Who did it?"
    """
    check_query(query)
    return Selector(reranker, max_tokens, chunk_tokens, count_tokens).best(query, text_or_documents)


class Selector:
    """A selector cuts long texts down to fit into a prompt. Its arguments are those of :func:`select_context`."""

    def __init__(
        self, reranker: Reranker, max_tokens: int, chunk_tokens: int = 256, count_tokens: CountTokens | None = None
    ) -> None:
        self._max_tokens = whole_number("max_tokens", max_tokens)
        self._chunk_tokens = whole_number("chunk_tokens", chunk_tokens)
        if not isinstance(reranker, Reranker):
            raise ValueError(f"reranker={reranker!r} must be a Reranker, as Reranker.from_pretrained makes it")
        if self._chunk_tokens > reranker.max_length:
            raise ValueError(
                f"chunk_tokens={chunk_tokens} is more than the reranker reads, {reranker.max_length} tokens with "
                f"the query; use fewer"
            )
        self._reranker = reranker
        self._count = reranker.count_tokens if count_tokens is None else _checked_counter(count_tokens)

    def best(self, query: str, text_or_documents: str | Iterable[str]) -> list[Passage]:
        """Return the passages that answer a query best; see :func:`select_context`."""
        steps = self.steps(query, text_or_documents)
        try:
            request = next(steps)
            steps.send(self._reranker.rerank(request.query, request.documents, request.top_k).ranking)
        except StopIteration as end:
            passages: list[Passage] = end.value
            return passages
        raise AssertionError("a selector asks once")

    def steps(
        self, query: str, text_or_documents: str | Iterable[str]
    ) -> Generator[Request, list[RankedDocument], list[Passage]]:
        """Yield the request that is to be ranked, unless all texts fit; return the passages, given its ranking."""
        source = Source(_checked_texts(text_or_documents), self._count)
        if (everything := source.everything(self._max_tokens)) is not None:
            return everything
        chunks = list(self._chunks(source))
        if not chunks:
            return []
        # Pruning has to know how many are wanted. The best are seldom shorter than the average, so that these fill
        # the budget. Were more asked for, less could be pruned, and the last gap be filled with anything short.
        top_k = -(-self._max_tokens * len(chunks) // max(1, sum(chunk.tokens for chunk in chunks)))
        asked = self._reranker.tail(query.strip())
        ranking = yield Request(asked, [chunk.text for chunk in chunks], top_k)
        judged = [replace(chunks[best.index], score=best.score, probability=best.probability) for best in ranking]
        kept = source.fill(judged, self._max_tokens)
        # A whole text may have a few more tokens than its parts together.
        while not source.fit(passages := source.merged(kept), self._max_tokens):
            kept.pop()
        return passages

    def leading(self, text_or_documents: str | Iterable[str]) -> list[Passage]:
        """Return as much of the beginning of the texts as fits. There are no scores, because there is no query."""
        source = Source(_checked_texts(text_or_documents), self._count)
        if (everything := source.everything(self._max_tokens)) is not None:
            return everything
        kept: list[Passage] = []
        for chunk in self._chunks(source):
            if not source.fit(source.merged([*kept, chunk]), self._max_tokens):
                break
            kept.append(chunk)
        return source.merged(kept)

    def _chunks(self, source: Source) -> Iterator[Passage]:
        return source.chunks(min(self._chunk_tokens, self._max_tokens), self._max_tokens)


def join_passages(passages: Iterable[Passage]) -> str:
    """Join passages to one text for a prompt; ``[…]`` marks a part of a document that was left out.

    Args:
        passages: Passages in the order in which :func:`select_context` returned them.
    """
    passages = list(passages)
    rest = [_separator(before, after) + after.text for before, after in pairwise(passages)]
    return "".join([passage.text for passage in passages[:1]] + rest)


def _sections(text: str, size: int) -> Iterator[tuple[int, str]]:
    """Cut words of more than ``size`` characters, which a splitter would read again for every chunk.

    Words are cut after punctuation if they have some, as JSON without spaces does.
    """
    start = 0
    for word in re.finditer(rf"\S{{{size},}}", text):
        place = max(word.start(), start)
        while word.end() - place > size:
            marks = _MARKS.finditer(text, place + size // 2, place + size)
            place = max((mark.end() for mark in marks), default=place + size)
            yield start, text[start:place]
            start = place
    yield start, text[start:]


def _separator(before: Passage, after: Passage) -> str:
    return "\n\n[…]\n\n" if before.document == after.document else "\n\n"


def _place(passage: Passage) -> tuple[int, int]:
    return passage.document, passage.start


class Source:
    """This class holds the caller's texts, and counts their tokens."""

    def __init__(self, texts: list[str], count: CountTokens) -> None:
        self._texts = texts
        self._count = count
        nothing = count("")  # some functions count special tokens
        self._word_tokens = cache(lambda word: max(0, count(word) - nothing))
        self._gap_tokens = cache(count)

    def everything(self, max_tokens: int) -> list[Passage] | None:
        """Return all texts that are not blank, or None if they do not fit."""
        # Counting a book in one piece takes a hundred times its memory, so only texts that may fit are counted so.
        if sum(map(self._estimate, self._texts)) > 2 * max_tokens + _FEW:
            return None
        whole = [self._cut(index, 0, len(text)) for index, text in enumerate(self._texts) if text.strip()]
        return whole if self.fit(whole, max_tokens) else None

    def chunks(self, chunk_tokens: int, max_tokens: int) -> Iterator[Passage]:
        """Divide the texts into chunks of about ``chunk_tokens`` tokens at most, never above ``max_tokens``."""
        coarse = TextSplitter.from_callback(self._estimate, chunk_tokens)
        fine = TextSplitter.from_callback(self._count, max_tokens)
        for document, text in enumerate(self._texts):
            for begin, section in _sections(encodable(text), max(_SHORTEST, 4 * chunk_tokens)):
                for start, chunk in coarse.chunk_indices(section):
                    first = begin + start
                    if (passage := self._cut(document, first, first + len(chunk))).tokens <= max_tokens:
                        yield passage
                        continue
                    # The estimate was too low. A character that alone is too large is left out.
                    for offset, piece in fine.chunk_indices(chunk):
                        passage = self._cut(document, first + offset, first + offset + len(piece))
                        if passage.tokens <= max_tokens:
                            yield passage

    def fill(self, ranked: Iterable[Passage], max_tokens: int) -> list[Passage]:
        """Choose the chunks that have room beside all better ones; ``ranked`` begins with the best."""
        kept: list[Passage] = []
        in_order: list[Passage] = []
        used = 0
        for chunk in ranked:
            place = bisect(in_order, _place(chunk), key=_place)
            left, right = in_order[max(0, place - 1) : place], in_order[place : place + 1]
            added = chunk.tokens + self._gaps([*left, chunk, *right]) - self._gaps([*left, *right])
            if used + added <= max_tokens:
                used += added
                in_order.insert(place, chunk)
                kept.append(chunk)
        return kept

    def merged(self, chunks: Iterable[Passage]) -> list[Passage]:
        """Put chunks into the order of the texts, and join those that adjoin to one passage."""
        runs: list[list[Passage]] = []
        for chunk in sorted(chunks, key=_place):
            if runs and self._adjoin(runs[-1][-1], chunk):
                runs[-1].append(chunk)
            else:
                runs.append([chunk])
        return [self._joined(run) for run in runs]

    def fit(self, passages: list[Passage], max_tokens: int) -> bool:
        """Say whether the passages are within the budget, joined as well as one by one."""
        sizes = [passage.tokens for passage in passages]
        return not passages or max(sum(sizes), self._count(join_passages(passages))) <= max_tokens

    def _joined(self, run: list[Passage]) -> Passage:
        """Return a passage of chunks that adjoin, with the score of the best."""
        whole = self._cut(run[0].document, run[0].start, run[-1].end)
        best = max(run, key=lambda chunk: -inf if chunk.score is None else chunk.score)
        return replace(whole, score=best.score, probability=best.probability)

    def _cut(self, document: int, start: int, end: int) -> Passage:
        text = self._texts[document][start:end]
        return Passage(document, start, end, text, None, self._count(text))

    def _estimate(self, text: str) -> int:
        """Count tokens roughly: each word by itself, and only once, because a splitter asks often."""
        return sum(map(self._word_tokens, text.split()))

    def _gaps(self, chunks: list[Passage]) -> int:
        """Count the tokens that stand between chunks that follow each other."""
        return sum(
            self._gap_tokens(
                self._texts[before.document][before.end : after.start]
                if self._adjoin(before, after)
                else _separator(before, after)
            )
            for before, after in pairwise(chunks)
        )

    def _adjoin(self, before: Passage, after: Passage) -> bool:
        """Say whether there is only white space between two chunks; no chunk begins or ends with white space."""
        between = self._texts[before.document][before.end : after.start]
        return before.document == after.document and not between.strip()


def _checked_texts(text_or_documents: str | Iterable[str]) -> list[str]:
    if isinstance(text_or_documents, str):
        return [text_or_documents]
    return arguments.texts("text_or_documents", text_or_documents, "a text or a list of texts")


def _checked_counter(count_tokens: CountTokens) -> CountTokens:
    if not callable(count_tokens):
        raise ValueError(f"count_tokens={count_tokens!r} must be a function of a text, or None")
    if not isinstance(tokens := count_tokens("a text"), int):
        raise ValueError(f"count_tokens must return a whole number, not a {type(tokens).__name__}")
    return lambda text: count_tokens(encodable(text))
