"""Templates turn pairs of query and document into token ids."""

from __future__ import annotations

import logging
import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from grating_core.arguments import LongDocuments
from grating_core.errors import UnsupportedModelError
from grating_core.text.chat import load_tokenizer
from grating_core.text.inputs import read_inputs
from grating_core.text.prompts import Prompt
from grating_core.text.tokenizer import TextTokenizer, alike, encodable
from grating_core.text.windows import divided

Span = tuple[int, int]  # first position, and the one after the last
_MARK = re.compile(r"<\|[^<>|\s]+\|>")  # what a special token of a chat format looks like
_COUNTED = 100_000  # characters of the longest query whose tokens an error message counts

_log = logging.getLogger("grating")


@dataclass(frozen=True)
class Segments:
    """Segments say where the two texts are in a sequence. The two have no token in common.

    Attributes:
        query: The span of the query's tokens.
        document: The span of the tokens of the document, or of a window of it.
    """

    query: Span = (0, 0)
    document: Span = (0, 0)


@dataclass(frozen=True)
class TokenisedPair:
    """A pair is one query and one document, or a window of it, as one sequence.

    Attributes:
        input_ids: Token ids, with the special tokens of the model.
        token_type_ids: 0 or 1 for each token: the text that it belongs to, if the model distinguishes the two.
        segments: The places of query and document in the sequence.
        truncated: Whether the end of the document did not fit into the window and was cut.
    """

    input_ids: list[int]
    token_type_ids: list[int]
    segments: Segments = field(default_factory=Segments)
    truncated: bool = False


class Template(ABC):
    """A template makes token ids of a query and documents. It never cuts anything but the document.

    Args:
        tokenizer: The tokenizer of the texts.
        window: The most tokens that a pair may have.
        long_documents: The treatment of a document that does not fit: its end is cut, or it becomes windows.
    """

    answers: tuple[int, int | None] | None = None
    """Token ids of the answers whose logits are the score, if the model is asked a question."""
    temperature: float = 1.0
    """The number that the score is divided by, beside the model's own."""

    def __init__(self, tokenizer: TextTokenizer, window: int, long_documents: LongDocuments) -> None:
        self._tokenizer = tokenizer
        self.long_documents = long_documents
        self.window = window

    @abstractmethod
    def encode(self, query: str, documents: Sequence[str]) -> list[list[TokenisedPair]]:
        """Tokenise a query with each of the documents.

        Returns:
            The pairs of each document: one pair, or one for each window of a long document.

        Raises:
            ValueError: The query alone fills the window.
        """

    def check_length(self, query: str) -> None:
        """Raise ``ValueError`` for a query that leaves no room for a document in the window."""
        self.encode(query, [""])

    def count_tokens(self, text: str) -> int:
        """Return how many tokens a text has, special tokens not counted."""
        return self._tokenizer.count(text)

    def count_before(self, texts: Sequence[str], places: Sequence[Sequence[int]]) -> list[list[int]]:
        """See :meth:`grating_core.text.tokenizer.TextTokenizer.count_before`."""
        return self._tokenizer.count_before(texts, places)

    def tail(self, text: str, tokens: int) -> str:
        """Return the last tokens of a text as text, or the whole text if it has no more tokens."""
        kept = self._tokenizer.tail(text, tokens)
        if kept != text:
            _log.info("a text of %d characters is too long, so its last %d tokens are used", len(text), tokens)
        return kept

    def _most(self, room: int) -> int | None:
        """Return how many tokens of a document are used; None for all."""
        return None if self.long_documents == "windows" else room

    def _question(self, query: str) -> list[int]:
        # Only the beginning of a query that is too long is tokenised: the query is refused anyway.
        (found,) = self._tokenizer.encode([query], self.window)
        return found.ids

    def _check_room(self, room: int, query: str) -> None:
        if room < 1:
            tokens = f"more than {self.window}" if len(query) > _COUNTED else self.count_tokens(query)
            raise ValueError(
                f"query has {tokens} tokens, which leaves no room for a document in the model's window "
                f"of {self.window} tokens; shorten the query"
            )


class PairTemplate(Template):
    """The template of encoder rerankers joins both texts by the tokenizer's own special tokens.

    Within the window the token ids are exactly those of ``tokenizer(query, document)``, except that special tokens
    in a text are text.

    Args:
        tokenizer: The tokenizer of the texts.
        window: The most tokens a pair may have.
        long_documents: The treatment of a document that does not fit: its end is cut, or it becomes windows.
        has_types: Whether the model is told which text a token belongs to.
        prompt: The text that goes before a query.
        answers: The tokens whose logits are the score; None if it is not made of logits.
    """

    def __init__(
        self,
        tokenizer: TextTokenizer,
        window: int,
        long_documents: LongDocuments,
        *,
        has_types: bool,
        prompt: str = "",
        answers: tuple[int, int | None] | None = None,
    ) -> None:
        super().__init__(tokenizer, window, long_documents)
        self.answers = answers
        self._prompt = tokenizer.written(prompt)
        # This pair shows what the tokenizer puts around two texts. A pair with an empty text would not show it:
        # the library then says that no token comes from either text.
        pair = tokenizer.backend.encode("a", "a")
        first, second = (_place(pair.sequence_ids, number) for number in (0, 1))
        places = (0, first[0]), (first[1], second[0]), (second[1], len(pair))
        self._lead, self._gap, self._trail = (pair.ids[slice(*place)] for place in places)
        types = pair.type_ids if has_types else [0] * len(pair)
        self._types = [types[slice(*place)] for place in places], (types[first[0]], types[second[0]])

    def encode(self, query: str, documents: Sequence[str]) -> list[list[TokenisedPair]]:
        """See :meth:`Template.encode`."""
        question = self._question(self._prompt + query)
        room = self.window - len(self._lead) - len(self._gap) - len(self._trail) - len(question)
        self._check_room(room, query)
        return [
            [self._join(question, part, cut) for part, cut in divided(found.ids, room, self.long_documents)]
            for found in self._tokenizer.encode(documents, self._most(room))
        ]

    def _join(self, question: list[int], body: list[int], truncated: bool) -> TokenisedPair:
        (lead, gap, trail), (first, second) = self._types
        query = (len(lead), len(lead) + len(question))
        document = (query[1] + len(gap), query[1] + len(gap) + len(body))
        return TokenisedPair(
            self._lead + question + self._gap + body + self._trail,
            lead + [first] * len(question) + gap + [second] * len(body) + trail,
            Segments(query, document),
            truncated,
        )


class PromptTemplate(Template):
    """The template of decoder rerankers asks a question about query and document. The answer is the score.

    Special tokens in the prompt's own pieces are tokens; in query, instruction and document they are text.

    Args:
        tokenizer: The tokenizer of the texts.
        window: The most tokens that a pair may have.
        long_documents: The treatment of a document that does not fit: its end is cut, or it becomes windows.
        prompt: The question.
        instruction: The instruction to judge by; None for the prompt's own.
        asks: Whether the score is the answer's logit. A classifier's head needs no answers.

    Raises:
        ValueError: The window is too small for the prompt, or the prompt takes no instruction.
        UnsupportedModelError: An answer is not a single token of this model.
    """

    def __init__(
        self,
        tokenizer: TextTokenizer,
        window: int,
        long_documents: LongDocuments,
        *,
        prompt: Prompt,
        instruction: str | None,
        asks: bool,
    ) -> None:
        super().__init__(tokenizer, window, long_documents)
        if instruction is not None and not prompt.takes_instruction:
            raise ValueError(f"instruction={instruction!r}: the template has no slot {{instruction}} for it")
        self._prompt = replace(
            prompt,
            pieces=tuple(map(tokenizer.written, prompt.pieces)),
            ending=tokenizer.written(prompt.ending),
            instruction_format=tokenizer.written(prompt.instruction_format),
        )
        self._ending = self._ids(self._prompt.ending)
        written = {mark for text in (*prompt.pieces, prompt.ending) for mark in _MARK.findall(text)}
        if lacking := sorted(written - tokenizer.controls):
            _log.warning(
                "the prompt writes the special token %s, which the model's tokenizer does not have: the scores "
                "are wrong, unless that is meant as text. Check tokenizer.json, or the prompt (template=)",
                lacking[0],
            )
        self.temperature = prompt.temperature
        self._instruction = None if instruction is None else encodable(instruction)
        if asks:
            no = None if prompt.no is None else _answer(tokenizer, prompt.no)
            self.answers = _answer(tokenizer, prompt.yes), no
        before, head, tail = self._around("")
        if (needed := len(before) + len(self._ids(head)) + len(self._ending) + len(tail)) >= window:
            raise ValueError(
                f"max_length={window} is too small: the template alone has {needed} tokens; use at least "
                f"{needed + 64}"
            )

    def encode(self, query: str, documents: Sequence[str]) -> list[list[TokenisedPair]]:
        """See :meth:`Template.encode`."""
        if self._prompt.stripped:
            query, documents = query.strip(), [document.strip() for document in documents]
        self._check_room(self.window - len(self._question(query)), query)
        before, head, after = self._around(encodable(query))
        empty_before, empty_head, empty_after = self._around("")
        ahead = _difference(before + self._ids(head), empty_before + self._ids(empty_head))
        behind = _difference(after, empty_after)
        pairs: list[list[TokenisedPair]] = []
        # The text before the document goes along: the document's first word may share a token with a space there.
        ended = [document + self._prompt.ending for document in documents]
        for found in self._tokenizer.encode(ended, self._most(self.window), before=head):
            fixed = before + found.before
            room = self.window - len(fixed) - len(after)
            self._check_room(room - len(self._ending), query)
            pairs.append([])
            for part, cut in self._parts(found.ids, room):
                ids, end = fixed + part + after, len(fixed) + len(part)
                # A token that the query's last characters share with the document belongs to the document.
                asked = min(ahead[0], len(fixed)), min(ahead[1], len(fixed))
                if not any(ahead):
                    asked = end + behind[0], end + behind[1]
                pairs[-1].append(TokenisedPair(ids, [0] * len(ids), Segments(asked, (len(fixed), end)), cut))
        return pairs

    def _parts(self, ids: list[int], room: int) -> list[tuple[list[int], bool]]:
        """Return the tokens of a document, or of each of its windows, with its ending, and whether it was cut."""
        if len(ids) <= room or not self._ending:
            return list(divided(ids, room, self.long_documents))
        *others, (last, cut) = divided(ids, room - len(self._ending), self.long_documents)
        # What is not the document's end lacks the ending.
        return [*((part + self._ending, False) for part, _ in others), (last + self._ending if cut else last, cut)]

    def _around(self, query: str) -> tuple[list[int], str, list[int]]:
        """Return the token ids before the document's piece, the text that it begins with, and the ids after it."""
        before, head, after = self._prompt.fill(query, self._instruction)
        return self._ids(*before), head, self._ids(*after)

    def _ids(self, *pieces: str) -> list[int]:
        return [token for piece in pieces for token in self._tokenizer.ids(piece)]


def _answer(tokenizer: TextTokenizer, word: str | int) -> int:
    if isinstance(word, int):
        return word
    backend = tokenizer.backend
    ids: list[int] = backend.encode(word, add_special_tokens=False).ids
    unknown = getattr(backend.model, "unk_token", None)
    if len(ids) != 1 or (unknown is not None and ids[0] == backend.token_to_id(unknown)):
        raise UnsupportedModelError(
            f"the model's tokenizer has no single token for the answer {word!r}, so its logit cannot be the "
            f"score; pass template=Prompt(...) with answers that are single tokens"
        )
    return ids[0]


def _place(sequences: list[int | None], number: int) -> Span:
    """Return the span of the tokens of one of two texts."""
    start = sequences.index(number)
    return start, start + sequences.count(number)


def _difference(ids: list[int], other: list[int]) -> Span:
    """Return the span of ``ids`` that ``other`` does not have; (0, 0) if the two are the same."""
    start = alike(ids, other)
    end = len(ids) - alike(ids[start:][::-1], other[start:][::-1])
    return (start, end) if start < end else (0, 0)


def load_template(
    directory: Path,
    window: int,
    *,
    prompt: Prompt | None = None,
    instruction: str | None = None,
    asks: bool = False,
    long_documents: LongDocuments = "truncate",
    rows: int | None = None,
) -> Template:
    """Load the template of a model directory.

    Args:
        directory: The tokenizer's directory, or a GGUF file.
        window: The most tokens that a pair may have.
        prompt: The question to the model; None for a model that is not asked.
        instruction: The instruction to judge by; None for the prompt's own.
        asks: Whether the score is the logit of the prompt's answers.
        long_documents: The treatment of a document that does not fit: its end is cut, or it becomes windows.
        rows: Number of rows of the embedding table. A token without a row is refused; None refuses no token.

    Raises:
        ModelNotFoundError: The tokenizer's files are missing or damaged, need a package that is not installed, or
            belong to a model with more tokens.
        UnsupportedModelError: The tokenizer has no Rust backend, or no token for an answer.
        ValueError: The instruction or the window does not fit the prompt.
    """
    tokenizer, has_types = load_tokenizer(directory, rows)
    if prompt is not None:
        return PromptTemplate(tokenizer, window, long_documents, prompt=prompt, instruction=instruction, asks=asks)
    if instruction is not None:
        raise ValueError(
            f"instruction={instruction!r}: this model takes only query and document; leave the instruction out"
        )
    inputs = read_inputs(directory)
    return PairTemplate(
        tokenizer, window, long_documents, has_types=has_types, prompt=inputs.prompt, answers=inputs.answers
    )
