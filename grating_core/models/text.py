"""Tokens of a prompt, and text of the tokens that a model gives."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from grating_core.models.backend import check_vocabulary, load_backend, read_settings
from grating_core.models.prompts import render_chat
from grating_core.models.tokenizer import encodable

Messages = Sequence[Mapping[str, str]]
ROLES = ("system", "user", "assistant")
_CONTEXT = 8  # tokens of the prompt by which the first one after it is read: whether it begins with a space, say


class PromptTokenizer:
    """Makes tokens of prompts, as transformers does.

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

    def encode(self, prompt: str | Messages) -> list[int]:
        """Tokens of a text that is to be continued, or of messages in the model's chat format.

        Raises:
            ValueError: The prompt is empty, or neither; or the model's chat template does not take it.
        """
        if isinstance(prompt, str | Sequence) and not prompt:
            raise ValueError(f"prompt={prompt!r} is empty: give a text, or messages, to go on from")
        if isinstance(prompt, str):
            ids = self._ids(prompt, special=True)
        else:
            _check_messages(prompt)
            ids = self._ids(self._chat(prompt), special=False)  # the format has them written out
        if not ids:
            raise ValueError(
                f"prompt={prompt!r} comes to no tokens at all: give a text, or messages, to go on from"
            )
        return ids

    def count(self, text: str) -> int:
        """How many tokens a text has, without special ones."""
        return len(self._ids(text, special=False))

    def stream(self, prompt_ids: Sequence[int], stop: Sequence[str]) -> TextStream:
        """What makes text of the tokens that follow a prompt."""
        return TextStream(self._backend, prompt_ids, stop)

    def _ids(self, text: str, *, special: bool) -> list[int]:
        ids: list[int] = self._backend.encode(encodable(text), add_special_tokens=special).ids
        return ids

    def _chat(self, messages: Messages) -> str:
        try:
            text = render_chat(self._directory, self._settings, messages)
        except Exception as error:  # jinja runs what the file says, which may fail in any way
            raise ValueError(
                f"prompt: the chat template in {self._directory} does not take these messages: {error}"
            ) from error
        if text is None:
            raise ValueError(f"prompt: the model in {self._directory} has no chat template; give a string (--raw)")
        return text


def _check_messages(messages: object) -> None:
    if not isinstance(messages, Sequence):
        raise ValueError(f"prompt must be a string or a list of messages, not a {type(messages).__name__}")
    for index, message in enumerate(messages):
        if not (
            isinstance(message, Mapping)
            and message.get("role") in ROLES
            and isinstance(message.get("content"), str)
        ):
            raise ValueError(
                f'prompt[{index}]={message!r} must be a message such as {{"role": "user", "content": "Hello"}}; '
                f"roles are {', '.join(ROLES)}"
            )


class TextStream:
    """Makes text of tokens as they come, up to a stop string.

    What may still become something else is held back: a character that lacks tokens, the beginning of a stop
    string.
    Special tokens have no text.

    Args:
        backend: A tokenizer of the tokenizers library.
        prompt_ids: The tokens before.
        stop: Strings that end the text and are no part of it.
    """

    def __init__(self, backend: Tokenizer, prompt_ids: Sequence[int], stop: Sequence[str]) -> None:
        self._backend = backend
        self._decoder = DecodeStream(list(prompt_ids[-_CONTEXT:]), skip_special_tokens=True)
        self._stop = stop
        self._held = ""
        self.stopped = False
        """Whether a stop string has come."""

    def add(self, token: int) -> str:
        """The text that is certain now that there is one more token; often none."""
        self._held += self._decoder.step(self._backend, token) or ""
        found = [place for stop in self._stop if (place := self._held.find(stop)) >= 0]
        if found:
            self.stopped = True
            self._held = self._held[: min(found)]
            return self.rest()
        certain = len(self._held) - max(self._begun(), default=0)
        text, self._held = self._held[:certain], self._held[certain:]
        return text

    def rest(self) -> str:
        """The text that was held back, when no token will follow. A character that lacks tokens is left out."""
        text, self._held = self._held, ""
        return text

    def _begun(self) -> Iterator[int]:
        """How much of each stop string the text ends with."""
        for stop in self._stop:
            lengths = range(min(len(stop) - 1, len(self._held)), 0, -1)
            yield next((length for length in lengths if self._held.endswith(stop[:length])), 0)
