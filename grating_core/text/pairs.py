"""Pairs of query and document as token ids."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, Protocol, TypeGuard, get_args

from tokenizers import Tokenizer

from grating_core.errors import UnsupportedModelError
from grating_core.text.backend import check_vocabulary, load_backend, read_settings
from grating_core.text.prompts import Prompt, control_tokens
from grating_core.text.tokenizer import TextTokenizer, encodable

LongDocuments = Literal["truncate", "windows"]
Span = tuple[int, int]  # first position, and the one after the last
_SMALLEST_WINDOW = 8  # tokens
_COUNTED = 100_000  # characters of a query whose tokens are counted to say how many are too many
_OVERLAP = 8  # the part of a window that the next one repeats: one in so many tokens


@dataclass(frozen=True)
class Segments:
    """Where the two texts are in a sequence.

    Attributes:
        query: Of the query's tokens.
        document: Of the document's tokens, or of a window of it.
    """

    query: Span = (0, 0)
    document: Span = (0, 0)


@dataclass(frozen=True)
class TokenisedPair:
    """One query and one document, or a window of it, as one sequence.

    Attributes:
        input_ids: Token ids, with the special tokens of the model.
        token_type_ids: 0 or 1 for each token; which text it belongs to, if the model cares.
        segments: Where query and document are in it.
        truncated: Whether the end of the document did not fit into the window and was cut.
    """

    input_ids: list[int]
    token_type_ids: list[int]
    segments: Segments = field(default_factory=Segments)
    truncated: bool = False


class Template(Protocol):
    """Makes token ids of queries and documents."""

    window: int
    """The most tokens a pair may have."""

    answers: tuple[int, int | None] | None
    """Token ids of the answers whose logits are the score, if the model is asked a question."""

    def encode(self, query: str, documents: Sequence[str]) -> list[list[TokenisedPair]]:
        """Tokenise a query with each of the documents.

        Returns:
            For every document its pair; or several, each with a window of a document that is too long for one.

        Raises:
            ValueError: The query alone fills the window.
        """

    def count_tokens(self, text: str) -> int:
        """How many tokens a text has by itself, without special tokens."""

    def tail(self, text: str, tokens: int) -> str:
        """The last tokens of a text, as text; all of it if it has no more."""


class _Windows:
    """What both kinds of template have in common: a document that is too long is cut, or becomes windows."""

    def __init__(self, tokenizer: TextTokenizer, window: int, long_documents: LongDocuments) -> None:
        self._tokenizer = tokenizer
        self._long_documents = long_documents
        self.window = window

    def count_tokens(self, text: str) -> int:
        """See :meth:`Template.count_tokens`."""
        return self._tokenizer.count(text)

    def tail(self, text: str, tokens: int) -> str:
        """See :meth:`Template.tail`."""
        return self._tokenizer.tail(text, tokens)

    @property
    def _most(self) -> int | None:
        """How many tokens of a document are looked at; None for all."""
        return None if self._long_documents == "windows" else self.window

    def _question(self, query: str) -> list[int]:
        """The tokens of a query; of one that is too long anyway only the first."""
        (found,) = self._tokenizer.encode([query], self.window)
        return found.ids

    def _check_room(self, room: int, query: str) -> None:
        if room < 1:
            tokens = f"more than {self.window}" if len(query) > _COUNTED else self.count_tokens(query)
            raise ValueError(
                f"query has {tokens} tokens, which leaves no room for a document in the model's window "
                f"of {self.window} tokens; shorten the query"
            )

    def _divided(self, text: list[int], room: int) -> Iterator[tuple[list[int], bool]]:
        """The tokens of a document, or of each window of it, and whether its end was cut."""
        if self._long_documents == "truncate":
            yield text[:room], len(text) > room
            return
        overlap = room // _OVERLAP
        for start in range(0, max(1, len(text) - overlap), room - overlap):
            yield text[start : start + room], False


class PairTemplate(_Windows):
    """The template of encoder rerankers: both texts joined by the tokenizer's own special tokens.

    Only the document is ever cut, never the query: a pair is then about the same question for every
    document. Within the window the token ids are exactly those of ``tokenizer(query, document)``, except that
    special tokens in a text are text.

    Args:
        backend: A tokenizer of the tokenizers library.
        tokenizer: What makes tokens of the texts.
        window: The most tokens a pair may have.
        has_types: Whether the model is to know which text a token belongs to.
        long_documents: What to do with a document that does not fit: cut its end, or make several windows of it.
    """

    answers: tuple[int, int | None] | None = None

    def __init__(
        self,
        backend: Tokenizer,
        tokenizer: TextTokenizer,
        window: int,
        *,
        has_types: bool,
        long_documents: LongDocuments = "truncate",
    ) -> None:
        super().__init__(tokenizer, window, long_documents)
        # What the tokenizer puts around two texts. Not every pair tells: of one with an empty text the library
        # says that no token comes from either.
        pair = backend.encode("a", "a")
        first, second = (_place(pair.sequence_ids, number) for number in (0, 1))
        places = (0, first[0]), (first[1], second[0]), (second[1], len(pair))
        self._lead, self._gap, self._trail = (pair.ids[slice(*place)] for place in places)
        types = pair.type_ids if has_types else [0] * len(pair)
        self._types = [types[slice(*place)] for place in places], (types[first[0]], types[second[0]])

    def encode(self, query: str, documents: Sequence[str]) -> list[list[TokenisedPair]]:
        """See :meth:`Template.encode`."""
        question = self._question(query)
        room = self.window - len(self._lead) - len(self._gap) - len(self._trail) - len(question)
        self._check_room(room, query)
        most = None if self._most is None else room
        return [
            [self._join(question, part, cut) for part, cut in self._divided(found.ids, room)]
            for found in self._tokenizer.encode(documents, most)
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


class PromptTemplate(_Windows):
    """The template of decoder rerankers: a question about query and document, whose answer is the score.

    Only the document is ever cut, never query, instruction or what comes after the document. Special tokens in the
    prompt's own pieces are tokens; in query, instruction and document they are text.

    Args:
        backend: A tokenizer of the tokenizers library.
        tokenizer: What makes tokens of the texts.
        window: The most tokens a pair may have.
        prompt: The question.
        instruction: What to judge by; None for the prompt's own.
        asks: Whether the score is the answer's logit; the head of a classifier has no need of answers.
        long_documents: What to do with a document that does not fit: cut its end, or make several windows of it.

    Raises:
        ValueError: The window is too small for the prompt, or the prompt takes no instruction.
        UnsupportedModelError: An answer is not a single token of this model.
    """

    def __init__(
        self,
        backend: Tokenizer,
        tokenizer: TextTokenizer,
        window: int,
        prompt: Prompt,
        *,
        instruction: str | None = None,
        asks: bool,
        long_documents: LongDocuments = "truncate",
    ) -> None:
        super().__init__(tokenizer, window, long_documents)
        if instruction is not None and not prompt.takes_instruction:
            raise ValueError(f"instruction={instruction!r}: the template has no slot {{instruction}} for it")
        self._prompt = replace(prompt, pieces=tuple(map(tokenizer.written, prompt.pieces)))
        self._instruction = None if instruction is None else encodable(instruction)
        self.answers = None
        if asks:
            no = None if prompt.no is None else _answer(backend, prompt.no)
            self.answers = _answer(backend, prompt.yes), no
        before, head, tail = self._around("")
        if (needed := len(before) + len(self._ids(head)) + len(tail)) >= window:
            raise ValueError(
                f"max_length={window} is too small: the template alone has {needed} tokens; use at least "
                f"{needed + 64}"
            )

    def encode(self, query: str, documents: Sequence[str]) -> list[list[TokenisedPair]]:
        """See :meth:`Template.encode`."""
        question = self._question(query)
        self._check_room(self.window - len(question), query)
        before, head, after = self._around(encodable(query))
        empty_before, empty_head, empty_after = self._around("")
        asked = (
            _difference(before + self._ids(head), empty_before + self._ids(empty_head)),
            _difference(after, empty_after),
        )
        pairs = []
        # With the text that leads up to it: the first word of a document may share a token with the space before.
        for found in self._tokenizer.encode(documents, self._most, before=head):
            fixed = before + found.before
            room = self.window - len(fixed) - len(after)
            self._check_room(room, query)
            parts = self._divided(found.ids, room)
            pairs.append([self._join(fixed, part, after, asked, cut) for part, cut in parts])
        return pairs

    def _join(
        self, before: list[int], text: list[int], after: list[int], asked: tuple[Span, Span], truncated: bool
    ) -> TokenisedPair:
        """The sequence; ``asked`` says where the query is in what comes before the document, or else after it."""
        ids = before + text + after
        end = len(before) + len(text)
        ahead, behind = asked
        query = ahead if any(ahead) else (end + behind[0], end + behind[1])
        return TokenisedPair(ids, [0] * len(ids), Segments(query, (len(before), end)), truncated)

    def _around(self, query: str) -> tuple[list[int], str, list[int]]:
        """Token ids before the document's piece, what that begins with, token ids after it."""
        before, head, after = self._prompt.fill(query, self._instruction)
        return self._ids(*before), head, self._ids(*after)

    def _ids(self, *pieces: str) -> list[int]:
        return [token for piece in pieces for token in self._tokenizer.ids(piece)]


def _answer(backend: Tokenizer, word: str) -> int:
    ids: list[int] = backend.encode(word, add_special_tokens=False).ids
    unknown = getattr(backend.model, "unk_token", None)
    if len(ids) != 1 or (unknown is not None and ids[0] == backend.token_to_id(unknown)):
        raise UnsupportedModelError(
            f"the model's tokenizer has no single token for the answer {word!r}, so its logit cannot be the "
            f"score; pass template=Prompt(...) with answers that it has"
        )
    return ids[0]


def _place(sequences: list[int | None], number: int) -> Span:
    """Where the tokens of one of two texts are."""
    start = sequences.index(number)
    return start, start + sequences.count(number)


def _difference(ids: list[int], other: list[int]) -> Span:
    """Where ``ids`` has something that ``other`` has not; (0, 0) if they are the same."""
    shorter = min(len(ids), len(other))
    start = next((i for i in range(shorter) if ids[i] != other[i]), shorter)
    end = next((i for i in range(shorter - start) if ids[-1 - i] != other[-1 - i]), shorter - start)
    return (start, len(ids) - end) if start < len(ids) - end else (0, 0)


def check_long_documents(long_documents: str) -> None:
    """Raise ``ValueError`` for what is none of :data:`LongDocuments`."""
    if long_documents not in get_args(LongDocuments):
        raise ValueError(f"long_documents={long_documents!r} must be 'truncate' or 'windows'")


def find_window(directory: Path, model_window: int, max_length: int | None, usual: int | None = None) -> int:
    """The most tokens a pair may have.

    Args:
        directory: Where the tokenizer's files are.
        model_window: The most tokens that the model itself can take.
        max_length: A window asked for by the user, or None for the one that the tokenizer's settings state. It may
            be larger than that one, if the model can take as many.
        usual: The window for users who do not ask, if the model has a larger one.

    Raises:
        ModelNotFoundError: The tokenizer's settings are damaged.
        ValueError: ``max_length`` is not between 8 and the model's window.
    """
    if max_length is not None and not _SMALLEST_WINDOW <= max_length <= model_window:
        raise ValueError(
            f"max_length={max_length} does not fit this model; use {_SMALLEST_WINDOW} to {model_window} tokens, "
            f"or None"
        )
    stated = read_settings(directory).get("model_max_length")
    window = min(model_window, int(stated)) if _is_window(stated) else model_window
    return max_length or min(window, usual or window)


def _is_window(stated: object) -> TypeGuard[float]:
    """Whether what a tokenizer's settings state is a number of tokens; files have 0, -1 and infinity as well."""
    return (
        isinstance(stated, int | float)
        and not isinstance(stated, bool)
        and math.isfinite(stated)
        and stated >= _SMALLEST_WINDOW
    )


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
    """The template of a model directory.

    Args:
        directory: Where the tokenizer's files are.
        window: The most tokens a pair may have.
        prompt: What the model is asked, if it is.
        instruction: What to judge by; None for the prompt's own.
        asks: Whether the score is the logit of the prompt's answers.
        long_documents: What to do with a document that does not fit: cut its end, or make several windows of it.
        rows: Of the model's embedding table, if a token without one is to be refused.

    Raises:
        ModelNotFoundError: The tokenizer's files are missing or damaged, need a package that is not there, or are
            of a model with more tokens.
        UnsupportedModelError: The tokenizer has no Rust backend, or no token for an answer.
        ValueError: The instruction or the window do not go with the prompt.
    """
    backend, has_types = load_backend(directory)
    check_vocabulary(directory, backend, rows)
    backend.no_padding()
    backend.no_truncation()
    tokenizer = TextTokenizer(backend, control_tokens(directory, read_settings(directory), backend))
    if prompt is not None:
        return PromptTemplate(
            backend, tokenizer, window, prompt, instruction=instruction, asks=asks, long_documents=long_documents
        )
    if instruction is not None:
        raise ValueError(f"instruction={instruction!r}: this model is given query and document only; leave it out")
    return PairTemplate(backend, tokenizer, window, has_types=has_types, long_documents=long_documents)
