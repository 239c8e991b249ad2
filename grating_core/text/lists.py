"""The template of listwise rerankers writes a query and several documents into one sequence.

The sources are those of :mod:`grating_core.models.listwise`.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from grating_core.errors import UnsupportedModelError
from grating_core.text.chat import load_tokenizer
from grating_core.text.pairs import Template, TokenisedPair
from grating_core.text.tokenizer import TextTokenizer, encodable

_QUERY = 512  # tokens of a query; the rest is cut
_DOCUMENT = 2048  # tokens of a document; the rest is cut
_BLOCK = 125  # documents
_SHARED = 2  # tokens that a document may have more behind other words than alone

_LEAD = (
    "<|im_start|>system\n"
    "You are a search relevance expert who can determine a ranking of the passages based on how relevant they are "
    "to the query. If the query is a question, how relevant a passage is depends on how well it answers the "
    "question. If not, try to analyze the intent of the query and assess how well each passage satisfies the "
    "intent. If an instruction is provided, you should follow the instruction when determining the ranking."
    "<|im_end|>\n<|im_start|>user\n"
)
_TRAIL = "\n</query><|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
_DOCUMENT_MARK, _QUERY_MARK = "<|embed_token|>", "<|rerank_token|>"

_log = logging.getLogger("grating")


@dataclass(frozen=True)
class Block(TokenisedPair):
    """A block is a query with several documents, as one sequence.

    Attributes:
        documents: The tokens of each document, and its mark.
        marks: The places of the tokens whose states are read: one behind each document, and one behind the query.
    """

    documents: tuple[TokenisedPair, ...] = ()
    marks: tuple[int, ...] = ()


class ListTemplate(Template):
    """The template asks for a ranking of numbered passages. Special tokens in a text are text.

    Args:
        tokenizer: The tokenizer of the texts.
        window: The most tokens of a block.
        instruction: The instruction to judge by; None for none.

    Raises:
        UnsupportedModelError: The tokenizer lacks the tokens whose states are read.
    """

    def __init__(self, tokenizer: TextTokenizer, window: int, *, instruction: str | None) -> None:
        super().__init__(tokenizer, window, "truncate")
        self._lead, self._trail = map(tokenizer.written, (_LEAD, _TRAIL))
        self._instruction = "" if instruction is None else f"<instruct>\n{encodable(instruction)}\n</instruct>\n"
        self._document_mark, self._query_mark = (_mark(tokenizer, name) for name in (_DOCUMENT_MARK, _QUERY_MARK))
        self._beside = (
            len(tokenizer.ids(_passage(_BLOCK))) + 1 + _SHARED
        )  # tokens of a passage beside its document

    def encode(self, query: str, documents: Sequence[str]) -> list[list[TokenisedPair]]:
        """Write each document into a block of its own; see :meth:`Template.encode`."""
        query, most = self._room(query)
        return [[self._block(query, [document], most)] for document in documents]

    def blocks(self, query: str, documents: Sequence[str]) -> list[Block]:
        """Write documents into as few blocks as hold them, in order: 125 a block, and no more than the window has.

        A query longer than 512 tokens, and a document longer than 2,048, is cut.

        Raises:
            ValueError: The query leaves no room for a document in the window.
        """
        query, most = self._room(query)
        room = self.window - self._around(query)
        blocks: list[list[str]] = []
        left = 0
        for document, found in zip(documents, self._tokenizer.encode(documents, most), strict=True):
            size = min(len(found.ids), most) + self._beside
            if not blocks or len(blocks[-1]) == _BLOCK or size > left:
                blocks.append([])
                left = room
            blocks[-1].append(document)
            left -= size
        return [self._block(query, block, most) for block in blocks]

    def _room(self, query: str) -> tuple[str, int]:
        """Return a query, cut if it is too long, and the most tokens of a document."""
        (found,) = self._tokenizer.encode([query], _QUERY)
        if len(found.ids) > _QUERY:
            _log.info("a query of %d characters is too long, so its first %d tokens are used", len(query), _QUERY)
            query = self._tokenizer.backend.decode(found.ids[:_QUERY], skip_special_tokens=False)
        query = encodable(query)
        room = self.window - self._around(query) - self._beside
        self._check_room(room, query)
        return query, min(_DOCUMENT, room)

    def _around(self, query: str) -> int:
        """Return the number of tokens of a block beside its passages."""
        texts = self._asked(query, _BLOCK), self._asked_again(query), self._trail
        return sum(len(self._tokenizer.ids(text)) for text in texts) + 1

    def _asked(self, query: str, documents: int) -> str:
        return (
            f"{self._lead}I will provide you with {documents} passages, each indicated by a numerical identifier. "
            f"Rank the passages based on their relevance to query: {query}\n{self._instruction}"
        )

    def _asked_again(self, query: str) -> str:
        return f"\n</passage>\n<query>\n{query}"

    def _block(self, query: str, documents: Sequence[str], most: int) -> Block:
        """Write documents, of at most so many tokens each, into one sequence."""
        ids, marks, parts = list[int](), list[int](), list[TokenisedPair]()
        before = self._asked(query, len(documents)) + _passage(0).removeprefix("\n</passage>\n")
        for number, document in enumerate(documents, 1):
            (found,) = self._tokenizer.encode([document], most, before=before)
            own = [*found.ids[:most], self._document_mark]
            parts.append(TokenisedPair(own, [0] * len(own), truncated=len(found.ids) > most))
            ids += [*found.before, *own]
            marks.append(len(ids) - 1)
            before = _passage(number)
        ids += [*self._tokenizer.ids(self._asked_again(query)), self._query_mark]
        marks.append(len(ids) - 1)
        ids += self._tokenizer.ids(self._trail)
        cut = any(part.truncated for part in parts)
        return Block(ids, [0] * len(ids), truncated=cut, documents=tuple(parts), marks=tuple(marks))


def _passage(number: int) -> str:
    """Return the text between a document and the next, which has this number."""
    return f'\n</passage>\n<passage id="{number}">\n'


def _mark(tokenizer: TextTokenizer, name: str) -> int:
    found: int | None = tokenizer.backend.token_to_id(name)
    if found is None:
        raise UnsupportedModelError(f"the model's tokenizer has no token {name}, whose state gives the score")
    return found


def load_list_template(
    directory: Path, window: int, *, instruction: str | None = None, rows: int | None = None
) -> ListTemplate:
    """Load the template of a listwise model's directory; see :func:`grating_core.text.pairs.load_template`."""
    tokenizer, _ = load_tokenizer(directory, rows)
    return ListTemplate(tokenizer, window, instruction=instruction)
