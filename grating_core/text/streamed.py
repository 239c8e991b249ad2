"""This module makes text of the tokens that a model gives one by one."""

from __future__ import annotations

import re
from collections.abc import Sequence

from tokenizers import Tokenizer

from grating_core.text.tokenizer import alike

_BROKEN = "\ufffd"  # a decoder gives this for bytes that are no character, or no whole character yet
_BYTE = re.compile("<0x[0-9A-F]{2}>")
_MOST = 64  # tokens that are decoded again for each new token
_CONTEXT = 8  # tokens at the prompt's end that show, for example, whether the next token begins with a space


class TextStream:
    """A stream makes text of tokens as they come, up to a stop string.

    The pieces together equal the text of all tokens decoded at once, less the prompt's. The stream holds back text
    that may still change: a character that lacks tokens, or the beginning of a stop string. Special tokens have no
    text.

    Args:
        backend: The model's tokenizer.
        prompt_ids: Token ids of the prompt.
        stop: Strings that end the text. They are not part of it.
    """

    def __init__(self, backend: Tokenizer, prompt_ids: Sequence[int], stop: Sequence[str]) -> None:
        self._backend = backend
        self._special = {number for number, token in backend.get_added_tokens_decoder().items() if token.special}
        self._ids = self._recent([token for token in prompt_ids if token not in self._special])
        self._told = self._decode(self._ids)  # text of the prompt, or text that has been returned
        self._begun = False
        self._stop = stop
        self._held = ""
        self.stopped = False
        """Whether a stop string has come."""

    def add(self, token: int) -> str:
        """Add a token, and return the text that is now certain; it is often empty."""
        if token in self._special:
            return ""
        self._ids.append(token)
        certain = len(self._ids)
        while certain and _is_byte(self._backend, self._ids[certain - 1]):
            certain -= 1  # bytes in a row become characters together, or not at all
        self._take(self._decode(self._ids[:certain]).rstrip(_BROKEN))
        if certain == len(self._ids) > _MOST and not self._decode(self._ids).endswith(_BROKEN):
            self._ids = self._recent(self._ids)
            self._told = self._decode(self._ids)
        return self._up_to_stop(self._stop_begun())

    def rest(self) -> str:
        """Return the text that is still held back. Call this when no token will follow."""
        self._take(self._decode(self._ids))
        return self._up_to_stop(0)

    def _take(self, text: str) -> None:
        """Hold back the part of a text that has not been returned yet."""
        if not self._begun:
            # A character that begins in the prompt is returned as a whole.
            shared = alike(text, self._told)
            if len(text) == shared:
                return
            self._begun, self._told = True, self._told[:shared]
        if len(text) > len(self._told):
            self._held += text[len(self._told) :]
            self._told = text

    def _up_to_stop(self, begun: int) -> str:
        """Return the text that is held, up to a stop string or to the possible beginning of one."""
        found = [place for stop in self._stop if (place := self._held.find(stop)) >= 0]
        if found:
            self.stopped = True
        end = min(found) if found else len(self._held) - begun
        text, self._held = self._held[:end], "" if found else self._held[end:]
        return text

    def _recent(self, ids: list[int]) -> list[int]:
        """Return the last tokens. The first of them begins a character, and shows whether a space is before it."""
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
        """Return how many characters at the end may be the beginning of a stop string."""
        lengths = (
            length
            for stop in self._stop
            for length in range(min(len(stop) - 1, len(self._held)), 0, -1)
            if self._held.endswith(stop[:length])
        )
        return max(lengths, default=0)


def _is_byte(backend: Tokenizer, token: int) -> bool:
    """Tell whether a token stands for a byte of a character that has no token of its own."""
    return _BYTE.fullmatch(backend.id_to_token(token) or "") is not None
