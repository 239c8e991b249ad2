"""Pairs of query and document as token ids."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol, TypeGuard, get_args

import transformers
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from grating_core.errors import ModelNotFoundError, UnsupportedModelError
from grating_core.models.families import Family
from grating_core.models.gguf import gguf_tokenizer, is_gguf
from grating_core.models.prompts import Prompt, chat_prompt, named_prompt, official_prompt

LongDocuments = Literal["truncate", "windows"]
Span = tuple[int, int]  # first position, and the one after the last
_TYPES = ("token_type_ids",)
_GROUP = 32  # documents
_SMALLEST_WINDOW = 8  # tokens
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


class PairTemplate:
    """The template of encoder rerankers: both texts joined by the tokenizer's own special tokens.

    Only the document is ever cut, never the query: a pair is then about the same question for every
    document. Within the window the token ids are exactly those of ``tokenizer(query, document)``.

    Args:
        backend: A tokenizer of the tokenizers library.
        window: The most tokens a pair may have.
        has_types: Whether the model is to know which text a token belongs to.
        long_documents: What to do with a document that does not fit: cut its end, or make several windows of it.
    """

    answers: tuple[int, int | None] | None = None

    def __init__(
        self, backend: Tokenizer, window: int, *, has_types: bool, long_documents: LongDocuments = "truncate"
    ) -> None:
        self._backend = backend
        self._has_types = has_types
        self._long_documents = long_documents
        self._special_tokens = backend.num_special_tokens_to_add(is_pair=True)
        # Special tokens before the query, and between it and the document. Not every pair tells: of one with an
        # empty text the library says that no token comes from either.
        origins = backend.encode("a", "a").sequence_ids
        self._lead = origins.index(0)
        self._gap = origins.index(1) - self._lead - origins.count(0)
        self.window = window

    def encode(self, query: str, documents: Sequence[str]) -> list[list[TokenisedPair]]:
        """See :meth:`Template.encode`."""
        question = self._backend.encode(encodable(query), add_special_tokens=False)
        room = self.window - self._special_tokens - len(question)
        _check_room(room, len(question), self.window)
        return [self._windows(question, body, room) for body in _encodings(self._backend, documents)]

    def count_tokens(self, text: str) -> int:
        """See :meth:`Template.count_tokens`."""
        return _count_tokens(self._backend, text)

    def tail(self, text: str, tokens: int) -> str:
        """See :meth:`Template.tail`."""
        return _tail(self._backend, text, tokens)

    def _windows(self, question: Any, body: Any, room: int) -> list[TokenisedPair]:
        long = len(body) > room
        if long:
            body.truncate(room, stride=_overlap(room))
        if self._long_documents == "windows":
            return [self._join(question, part, False) for part in (body, *body.overflowing)]
        return [self._join(question, body, long)]

    def _join(self, question: Any, body: Any, truncated: bool) -> TokenisedPair:
        pair = self._backend.post_process(question, body)
        types = pair.type_ids if self._has_types else [0] * len(pair)
        query = (self._lead, self._lead + len(question))
        start = query[1] + self._gap
        return TokenisedPair(pair.ids, types, Segments(query, (start, start + len(body))), truncated)


class PromptTemplate:
    """The template of decoder rerankers: a question about query and document, whose answer is the score.

    Only the document is ever cut, never query, instruction or what comes after the document.

    Args:
        backend: A tokenizer of the tokenizers library.
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
        window: int,
        prompt: Prompt,
        *,
        instruction: str | None = None,
        asks: bool,
        long_documents: LongDocuments = "truncate",
    ) -> None:
        if instruction is not None and not prompt.takes_instruction:
            raise ValueError(f"instruction={instruction!r}: the template has no slot {{instruction}} for it")
        self._backend = backend
        self._prompt = prompt
        self._instruction = None if instruction is None else encodable(instruction)
        self._long_documents = long_documents
        self.window = window
        self.answers = None
        if asks:
            no = None if prompt.no is None else self._answer(prompt.no)
            self.answers = self._answer(prompt.yes), no
        before, head, tail = self._around("")
        if (needed := len(before) + len(self._ids(head)) + len(tail)) >= window:
            raise ValueError(
                f"max_length={window} is too small: the template alone has {needed} tokens; use at least "
                f"{needed + 64}"
            )

    def encode(self, query: str, documents: Sequence[str]) -> list[list[TokenisedPair]]:
        """See :meth:`Template.encode`."""
        query = encodable(query)
        tokens = len(self._ids(query))
        before, head, after = self._around(query)
        empty_before, empty_head, empty_after = self._around("")
        asked = (
            _difference(before + self._ids(head), empty_before + self._ids(empty_head)),
            _difference(after, empty_after),
        )
        found = []
        # With the text that leads up to it: the first word of a document may share a token with the space before.
        for body in _encodings(self._backend, [head + text for text in documents]):
            start = sum(1 for begin, _ in body.offsets if begin < len(head))
            fixed = before + body.ids[:start]
            room = self.window - len(fixed) - len(after)
            _check_room(room, tokens, self.window)
            found.append(self._windows(fixed, body.ids[start:], after, room, asked))
        return found

    def count_tokens(self, text: str) -> int:
        """See :meth:`Template.count_tokens`."""
        return _count_tokens(self._backend, text)

    def tail(self, text: str, tokens: int) -> str:
        """See :meth:`Template.tail`."""
        return _tail(self._backend, text, tokens)

    def _windows(
        self, before: list[int], text: list[int], after: list[int], room: int, asked: tuple[Span, Span]
    ) -> list[TokenisedPair]:
        if self._long_documents == "truncate":
            return [self._join(before, text[:room], after, asked, len(text) > room)]
        overlap = _overlap(room)
        starts = range(0, max(1, len(text) - overlap), room - overlap)
        return [self._join(before, text[start : start + room], after, asked, False) for start in starts]

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
        return [token for piece in pieces for token in self._backend.encode(piece, add_special_tokens=False).ids]

    def _answer(self, word: str) -> int:
        ids = self._ids(word)
        unknown = getattr(self._backend.model, "unk_token", None)
        if len(ids) != 1 or (unknown is not None and ids[0] == self._backend.token_to_id(unknown)):
            raise UnsupportedModelError(
                f"the model's tokenizer has no single token for the answer {word!r}, so its logit cannot be the "
                f"score; pass template=Prompt(...) with answers that it has"
            )
        return ids[0]


def _check_room(room: int, tokens: int, window: int) -> None:
    if room < 1:
        raise ValueError(
            f"query has {tokens} tokens, which leaves no room for a document in the model's window "
            f"of {window} tokens; shorten the query"
        )


def _difference(ids: list[int], other: list[int]) -> Span:
    """Where ``ids`` has something that ``other`` has not; (0, 0) if they are the same."""
    shorter = min(len(ids), len(other))
    start = next((i for i in range(shorter) if ids[i] != other[i]), shorter)
    end = next((i for i in range(shorter - start) if ids[-1 - i] != other[-1 - i]), shorter - start)
    return (start, len(ids) - end) if start < len(ids) - end else (0, 0)


def _overlap(room: int) -> int:
    return room // _OVERLAP


def _encodings(backend: Tokenizer, texts: Sequence[str]) -> Iterator[Any]:
    """The encoding of each text; a few at a time, for they are ten times as large as the token ids in them."""
    for start in range(0, len(texts), _GROUP):
        group = [encodable(text) for text in texts[start : start + _GROUP]]
        yield from backend.encode_batch(group, add_special_tokens=False)


def _count_tokens(backend: Tokenizer, text: str) -> int:
    # The fast one keeps no positions, which would take most of the memory.
    return len(backend.encode_batch_fast([encodable(text)], add_special_tokens=False)[0])


def _tail(backend: Tokenizer, text: str, tokens: int) -> str:
    offsets = backend.encode(encodable(text), add_special_tokens=False).offsets
    return text if len(offsets) <= tokens else text[offsets[-tokens][0] :]


def encodable(text: str) -> str:
    """Half characters (lone surrogates, as broken JSON leaves them) become question marks."""
    return text.encode("utf-8", "replace").decode("utf-8")


def check_long_documents(long_documents: str) -> None:
    """Raise ``ValueError`` for what is none of :data:`LongDocuments`."""
    if long_documents not in get_args(LongDocuments):
        raise ValueError(f"long_documents={long_documents!r} must be 'truncate' or 'windows'")


def find_prompt(template: Prompt | str | None, model: str, directory: Path, family: Family) -> Prompt | None:
    """What a model is asked; None if it is given the two texts as its tokenizer joins them.

    Args:
        template: The user's choice: a prompt, the name of an official one, or None for the model's own.
        model: What the user called the model; official formats are known by it.
        directory: Where its files are.
        family: Its family.

    Raises:
        ModelNotFoundError: The tokenizer's settings or its chat template are damaged.
        ValueError: ``template`` is neither a prompt nor the name of one.
    """
    if not family.causal:
        if template is None:
            return None
        raise ValueError(
            f"template={template!r}: this model is not asked; it is given query and document as its tokenizer "
            f"joins them. Leave the template out"
        )
    if isinstance(template, Prompt):
        return template
    if template is not None:
        return named_prompt(template)
    for name in (Path(model).name, *_names(directory.resolve()), family.prompt or ""):
        if prompt := official_prompt(name):
            return prompt
    return chat_prompt(directory, read_settings(directory)) if family.asks else None


def _names(path: Path) -> list[str]:
    """What a model may be called, by where it is."""
    if is_gguf(path):
        return [path.name, path.parent.name]
    # In the hub's cache it is models--owner--name/snapshots/revision.
    return [path.name, path.parent.parent.name] if path.parent.name == "snapshots" else [path.name]


def usual_length(prompt: Prompt | None, family: Family) -> int | None:
    """The most tokens of a pair if the user does not say; None for the model's whole window."""
    if prompt is not None:
        return prompt.max_length
    return Prompt.max_length if family.causal else None


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
) -> Template:
    """The template of a model directory.

    ``tokenizer.json`` is read as it is: transformers' wrapper around it keeps copies of the vocabulary, which for
    250,000 entries takes another 130 MB.

    Args:
        directory: Where the tokenizer's files are.
        window: The most tokens a pair may have.
        prompt: What the model is asked, if it is.
        instruction: What to judge by; None for the prompt's own.
        asks: Whether the score is the logit of the prompt's answers.
        long_documents: What to do with a document that does not fit: cut its end, or make several windows of it.

    Raises:
        ModelNotFoundError: The tokenizer's files are missing or damaged, or need a package that is not there.
        UnsupportedModelError: The tokenizer has no Rust backend, or no token for an answer.
        ValueError: The instruction or the window do not go with the prompt.
    """
    backend, has_types = load_backend(directory)
    backend.no_padding()
    backend.no_truncation()
    if prompt is not None:
        return PromptTemplate(
            backend, window, prompt, instruction=instruction, asks=asks, long_documents=long_documents
        )
    if instruction is not None:
        raise ValueError(f"instruction={instruction!r}: this model is given query and document only; leave it out")
    return PairTemplate(backend, window, has_types=has_types, long_documents=long_documents)


def load_backend(directory: Path) -> tuple[Tokenizer, bool]:
    """The tokenizer of a model, and whether the model is to know which text a token belongs to."""
    if is_gguf(directory):
        return gguf_tokenizer(directory)[0], False
    # Without any of them transformers makes up an empty vocabulary, and every text becomes the same.
    if not any(list(directory.glob(pattern)) for pattern in ("tokenizer.json", "vocab.*", "*.model")):
        raise ModelNotFoundError(f"{directory} has no tokenizer.json, vocabulary or sentencepiece model")
    settings = read_settings(directory)
    named = getattr(transformers, str(settings.get("tokenizer_class")), None)
    inputs: Any = settings.get("model_input_names") or getattr(named, "model_input_names", _TYPES)
    backend: Any
    try:
        if (directory / "tokenizer.json").is_file():
            backend = Tokenizer.from_file(str(directory / "tokenizer.json"))
        else:
            tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=False, local_files_only=True)
            inputs, backend = tokenizer.model_input_names, getattr(tokenizer, "backend_tokenizer", None)
    except Exception as error:  # the tokenizers library raises plain Exception for damaged files
        raise ModelNotFoundError(f"the tokenizer in {directory} cannot be loaded: {error}") from error
    if backend is None:
        raise UnsupportedModelError(f"{directory} has a tokenizer without tokenizer.json; convert it to that form")
    return backend, _TYPES[0] in inputs


def read_settings(directory: Path) -> dict[str, Any]:
    """What ``tokenizer_config.json`` says; nothing if there is none.

    Raises:
        ModelNotFoundError: It is damaged.
    """
    if is_gguf(directory):
        return gguf_tokenizer(directory)[1]
    path = directory / "tokenizer_config.json"
    try:
        return dict(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else {}
    except (ValueError, TypeError, OSError) as error:
        raise ModelNotFoundError(f"{path} cannot be read: {error}") from error
