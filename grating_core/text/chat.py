"""This module writes messages in a model's chat format, and makes tokens of prompts."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from grating_core.errors import ModelNotFoundError
from grating_core.files.reading import read_json
from grating_core.models.modules import transformer_folder
from grating_core.text.backend import load_backend, read_settings
from grating_core.text.messages import Messages, checked_messages, merged, without_system
from grating_core.text.streamed import TextStream
from grating_core.text.tokenizer import TextTokenizer, encodable

_ANSWER = "answer"
_MARK = re.compile(r"[<\[]\S+[>\]]")  # some tokenizers also list line breaks or runs of spaces, which are no marks


class ChatFormat:
    """A chat format is what a model's files say about messages and special tokens.

    Args:
        directory: The tokenizer's directory, or a GGUF file.

    Raises:
        ModelNotFoundError: The settings or the chat template are damaged.
    """

    def __init__(self, directory: Path) -> None:
        self._settings = read_settings(directory)
        try:
            self._template = _read_template(directory, self._settings)
        except (ValueError, OSError, KeyError, TypeError, AttributeError) as error:
            raise ModelNotFoundError(f"the chat template in {directory} cannot be read: {error!r}") from error

    @property
    def special_tokens(self) -> dict[str, str]:
        """The tokenizer's special tokens, by the names that templates have for them."""
        found = {name: value for name, value in self._settings.items() if isinstance(value, str | dict)}
        named = [name for name, value in found.items() if name.endswith("_token") and _content(value)]
        return {name: _content(found.get(name)) for name in ("bos_token", "eos_token", *named)}

    def controls(self, backend: Tokenizer) -> set[str]:
        """Return the tokens that have a meaning to the model beside those that its tokenizer calls special.

        Some models say so in the settings only, or not at all: their chat template writes them.
        """
        named = [value for name, value in self._settings.items() if name.endswith("_token")]
        for name in ("additional_special_tokens", "extra_special_tokens"):
            values = self._settings.get(name) or []
            named += values.values() if isinstance(values, dict) else values
        contents = {_content(value) for value in named if isinstance(value, str | dict)}
        added = {token.content for token in backend.get_added_tokens_decoder().values()}
        template = self._template or ""
        return added & (contents | {token for token in added if _MARK.fullmatch(token) and token in template})

    def render(self, messages: Sequence[Mapping[str, Any]], **variables: Any) -> str | None:
        """Write messages as the model reads them, up to its answer; return None if it has no chat template.

        Args:
            messages: Messages with ``role`` and ``content``, a text or a list of parts.
            variables: Other variables of the template, by name.

        Raises:
            Exception: Whatever the template raises; some refuse messages of some kinds.
        """
        if self._template is None:
            return None
        from transformers.utils.chat_template_utils import render_jinja_template  # slow to import

        values: dict[str, Any] = {"add_generation_prompt": True, **self.special_tokens, **variables}
        rendered: Any = render_jinja_template(
            [[dict(message) for message in messages]], chat_template=self._template, **values
        )
        return str(rendered[0][0])  # the text of the only conversation


def _read_template(directory: Path, settings: Mapping[str, Any]) -> str | None:
    directory = transformer_folder(directory)
    # Newer models keep the template in a file of its own, older ones in the settings, alone or in a list by name.
    if (path := directory / "chat_template.jinja").is_file():
        return path.read_text(encoding="utf-8")
    if (path := directory / "chat_template.json").is_file():
        settings = read_json(path)
    found = settings.get("chat_template")
    if isinstance(found, list):
        found = {entry["name"]: entry["template"] for entry in found}.get("default")
    return found if isinstance(found, str) else None


def _content(token: Any) -> str:
    # The settings hold a special token as a text, or as an object with the text in it.
    return str(token.get("content") or "" if isinstance(token, dict) else token or "")


def load_tokenizer(directory: Path, rows: int | None = None) -> tuple[TextTokenizer, bool]:
    """Load the tokenizer of a model, and tell whether the model is to know which text a token belongs to.

    Args:
        directory: The tokenizer's directory, or a GGUF file.
        rows: Number of rows of the embedding table. A token without a row is refused; None refuses no token.

    Raises:
        ModelNotFoundError: The files are missing or damaged, or belong to a model with more tokens.
        UnsupportedModelError: The tokenizer has no Rust backend.
    """
    backend, has_types = load_backend(directory, rows)
    return TextTokenizer(backend, ChatFormat(directory).controls(backend)), has_types


class PromptTokenizer:
    """A prompt tokenizer makes the tokens that transformers makes.

    A string is the whole prompt, so special tokens in it are tokens. In messages they are text.

    Args:
        directory: The tokenizer's directory, or a GGUF file.
        rows: Number of rows of the embedding table. A token without a row is refused; None refuses no token.

    Raises:
        ModelNotFoundError: The tokenizer's files are missing or damaged, or belong to a model with more tokens.
        UnsupportedModelError: The tokenizer has no Rust backend.
    """

    def __init__(self, directory: Path, rows: int | None = None) -> None:
        self._directory = directory
        self._format = ChatFormat(directory)
        self._texts, _ = load_tokenizer(directory, rows)
        self.end_tokens = frozenset(self._end_tokens())
        """The tokens that end a text: the tokenizer's own, and those that end an answer in the chat format."""

    def encode(self, prompt: str | Messages) -> list[int]:
        """Return the tokens of a text to continue, or of messages in the model's chat format.

        Raises:
            ValueError: The prompt is empty, or is no text and no messages, or the chat template refuses it.
        """
        if isinstance(prompt, str | Sequence) and not prompt:
            raise ValueError(f"prompt={prompt!r} is empty: give a text to continue, or messages to answer")
        if isinstance(prompt, str):
            ids: list[int] = self._texts.backend.encode(encodable(prompt), add_special_tokens=True).ids
        else:
            ids = self._texts.ids(self._texts.written(self._chat(checked_messages(prompt))))
        if not ids:
            raise ValueError(f"prompt={prompt!r} has no tokens: give a text to continue, or messages to answer")
        return ids

    def count(self, text: str) -> int:
        """Return how many tokens a text has, special tokens not counted."""
        return self._texts.count(text)

    def stream(self, prompt_ids: Sequence[int], stop: Sequence[str]) -> TextStream:
        """Return a stream that makes text of the tokens that follow a prompt."""
        return TextStream(self._texts.backend, prompt_ids, stop)

    def _chat(self, messages: list[dict[str, str]]) -> str:
        safe = [message | {"content": self._texts.guarded(message["content"])} for message in messages]
        refused: Exception | None = None
        # Some templates refuse a system message, or two messages of the same role in a row.
        for form in (safe, merged(safe), merged(without_system(safe))):
            try:
                text = self._format.render(form)
            except Exception as error:  # a template is a program, which may fail in any way
                refused = refused or error
                continue
            if text is None:
                raise ValueError(
                    f"prompt: the model in {self._directory} has no chat template; give a string (--raw)"
                )
            return text
        raise ValueError(
            f"prompt: the chat template in {self._directory} refuses these messages: {refused}"
        ) from refused

    def _end_tokens(self) -> Iterator[int]:
        named = self._format.special_tokens["eos_token"]
        if named and (number := self._texts.backend.token_to_id(named)) is not None:
            yield number
        try:
            text = self._chat([{"role": "user", "content": "a"}, {"role": "assistant", "content": _ANSWER}])
        except ValueError:
            return
        if (number := self._texts.leading_control(text.partition(_ANSWER)[2])) is not None:
            yield number
