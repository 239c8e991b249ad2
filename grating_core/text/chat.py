"""Tokens of a prompt, and text of the tokens that a model gives."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from tokenizers import Tokenizer

from grating_core.text.backend import check_vocabulary, load_backend, read_settings
from grating_core.text.messages import Messages, checked_messages, merged, without_system
from grating_core.text.prompts import control_tokens, render_chat, token_content
from grating_core.text.tokenizer import TextTokenizer, encodable

_ANSWER = "answer"
_BROKEN = "\ufffd"  # what a decoder gives for bytes that are no character, or none yet
_BYTE = re.compile("<0x[0-9A-F]{2}>")
_MOST = 64  # tokens that are decoded again for each that comes
_CONTEXT = 8  # tokens of the prompt by which the first one after it is read: whether it begins with a space, say


class PromptTokenizer:
    """Makes tokens of prompts, as transformers does.

    A string is the whole prompt: special tokens in it are tokens, whoever wrote them. In messages they are text.

    Args:
        directory: Where the model's files are.
        rows: Of the model's embedding table, if a token without one is to be refused.

    Raises:
        ModelNotFoundError: The tokenizer's files are missing or damaged, or of a model with more tokens.
        UnsupportedModelError: The tokenizer has no Rust backend.
    """

    def __init__(self, directory: Path, rows: int | None = None) -> None:
        self._directory = directory
        self._settings = read_settings(directory)
        self._backend, _ = load_backend(directory)
        check_vocabulary(directory, self._backend, rows)
        self._backend.no_padding()
        self._backend.no_truncation()
        self._texts = TextTokenizer(self._backend, control_tokens(directory, self._settings, self._backend))
        self.end_tokens = frozenset(self._end_tokens())
        """The tokens that end a text as far as the tokenizer says: its own, and what its chat format has there."""

    def encode(self, prompt: str | Messages) -> list[int]:
        """Tokens of a text that is to be continued, or of messages in the model's chat format.

        Raises:
            ValueError: The prompt is empty, or neither; or the model's chat template does not take it.
        """
        if isinstance(prompt, str | Sequence) and not prompt:
            raise ValueError(f"prompt={prompt!r} is empty: give a text, or messages, to go on from")
        if isinstance(prompt, str):
            ids: list[int] = self._backend.encode(encodable(prompt), add_special_tokens=True).ids
        else:
            ids = self._texts.ids(self._texts.written(self._chat(checked_messages(prompt))))
        if not ids:
            raise ValueError(
                f"prompt={prompt!r} comes to no tokens at all: give a text, or messages, to go on from"
            )
        return ids

    def count(self, text: str) -> int:
        """How many tokens a text has, without special ones."""
        return self._texts.count(text)

    def stream(self, prompt_ids: Sequence[int], stop: Sequence[str]) -> TextStream:
        """What makes text of the tokens that follow a prompt."""
        return TextStream(self._backend, prompt_ids, stop)

    def _chat(self, messages: list[dict[str, str]]) -> str:
        safe = [message | {"content": self._texts.guarded(message["content"])} for message in messages]
        refused: Exception | None = None
        # Some templates take no system message, or no two of a role in a row.
        for form in (safe, merged(safe), merged(without_system(safe))):
            try:
                text = render_chat(self._directory, self._settings, form)
            except Exception as error:  # jinja runs what the file says, which may fail in any way
                refused = refused or error
                continue
            if text is None:
                raise ValueError(
                    f"prompt: the model in {self._directory} has no chat template; give a string (--raw)"
                )
            return text
        raise ValueError(
            f"prompt: the chat template in {self._directory} does not take these messages: {refused}"
        ) from refused

    def _end_tokens(self) -> Iterator[int]:
        named = token_content(self._settings.get("eos_token"))
        if named and (number := self._backend.token_to_id(named)) is not None:
            yield number
        try:
            text = self._chat([{"role": "user", "content": "a"}, {"role": "assistant", "content": _ANSWER}])
        except ValueError:
            return
        if (number := self._texts.leading_control(text.partition(_ANSWER)[2])) is not None:
            yield number


class TextStream:
    """Makes text of tokens as they come, up to a stop string.

    Together the pieces are what decoding all tokens at once gives, after what the prompt has of it. What may still
    become something else is held back: a character that lacks tokens, the beginning of a stop string. Special
    tokens have no text.

    Args:
        backend: A tokenizer of the tokenizers library.
        prompt_ids: The tokens before.
        stop: Strings that end the text and are no part of it.
    """

    def __init__(self, backend: Tokenizer, prompt_ids: Sequence[int], stop: Sequence[str]) -> None:
        self._backend = backend
        self._special = {number for number, token in backend.get_added_tokens_decoder().items() if token.special}
        self._ids = self._recent([token for token in prompt_ids if token not in self._special])
        self._told = self._decode(self._ids)
        """Text of these tokens that is the prompt's or has been returned."""
        self._begun = False
        self._stop = stop
        self._held = ""
        self.stopped = False
        """Whether a stop string has come."""

    def add(self, token: int) -> str:
        """The text that is certain now that there is one more token; often none."""
        if token in self._special:
            return ""
        self._ids.append(token)
        certain = len(self._ids)
        while certain and _is_byte(self._backend, self._ids[certain - 1]):
            certain -= 1  # all bytes in a row are characters together, or none of them is
        self._take(self._decode(self._ids[:certain]).rstrip(_BROKEN))
        if certain == len(self._ids) > _MOST and not self._decode(self._ids).endswith(_BROKEN):
            self._ids = self._recent(self._ids)
            self._told = self._decode(self._ids)
        return self._up_to_stop(self._stop_begun())

    def rest(self) -> str:
        """The text that was held back, when no token will follow."""
        self._take(self._decode(self._ids))
        return self._up_to_stop(0)

    def _take(self, text: str) -> None:
        """Hold what a text has more than has been told."""
        if not self._begun:
            # A character that the prompt has begun is told as a whole.
            shared = _shared(text, self._told)
            if len(text) == shared:
                return
            self._begun, self._told = True, self._told[:shared]
        if len(text) > len(self._told):
            self._held += text[len(self._told) :]
            self._told = text

    def _up_to_stop(self, begun: int) -> str:
        """What is held, up to a stop string or to what may begin one."""
        found = [place for stop in self._stop if (place := self._held.find(stop)) >= 0]
        if found:
            self.stopped = True
        end = min(found) if found else len(self._held) - begun
        text, self._held = self._held[:end], "" if found else self._held[end:]
        return text

    def _recent(self, ids: list[int]) -> list[int]:
        """The last tokens, from one that begins a character on: whether a word begins with a space shows there."""
        start = max(0, len(ids) - _CONTEXT)
        while start and (
            _is_byte(self._backend, ids[start])
            or self._decode(ids[start : start + 1]).strip(" ")[:1] in ("", _BROKEN)
        ):
            start -= 1
        return ids[start:]

    def _decode(self, ids: Sequence[int]) -> str:
        text: str = self._backend.decode(ids, skip_special_tokens=False)
        return text

    def _stop_begun(self) -> int:
        """How many characters at the end may be the beginning of a stop string."""
        lengths = (
            length
            for stop in self._stop
            for length in range(min(len(stop) - 1, len(self._held)), 0, -1)
            if self._held.endswith(stop[:length])
        )
        return max(lengths, default=0)


def _shared(one: str, other: str) -> int:
    """How many characters two texts begin with alike."""
    return next(
        (place for place, (a, b) in enumerate(zip(one, other, strict=False)) if a != b),
        len(min(one, other, key=len)),
    )


def _is_byte(backend: Tokenizer, token: int) -> bool:
    """Whether a token stands for a byte of a character that has no token of its own."""
    return _BYTE.fullmatch(backend.id_to_token(token) or "") is not None
