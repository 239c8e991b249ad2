"""This module brings the messages of a conversation into the forms that chat templates take."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

Messages = Sequence[Mapping[str, Any]]
ROLES = ("system", "user", "assistant")
# The types of blocks that hold what a model thought before it answered. Templates leave these blocks out as well.
REASONING = ("reasoning", "thinking", "redacted_thinking", "reasoning_content")
_THOUGHT = re.compile(r"\s*<think>.*?</think>\s*", re.DOTALL)


def checked_messages(messages: object) -> list[dict[str, str]]:
    """Return the role and the text of each message, without the reasoning that led to an answer.

    Args:
        messages: Messages with ``role`` and ``content``, which is a text or a list of blocks of text.

    Raises:
        ValueError: A message has another form; the error names it.
    """
    if not isinstance(messages, Sequence):
        raise ValueError(f"prompt must be a string or a list of messages, not a {type(messages).__name__}")
    found = []
    for index, message in enumerate(messages):
        content = _text(message.get("content")) if isinstance(message, Mapping) else None
        if content is None or message.get("role") not in ROLES:
            raise ValueError(
                f'prompt[{index}]={message!r} must be a message such as {{"role": "user", "content": "Hello"}}; '
                f"roles are {', '.join(ROLES)}"
            )
        if message["role"] == "assistant":
            content = _THOUGHT.sub("", content, count=1) if _THOUGHT.match(content) else content
        found.append({"role": message["role"], "content": content})
    return found


def merged(messages: Sequence[Mapping[str, str]]) -> list[dict[str, str]]:
    """Return the messages; neighbours of the same role become one message."""
    return [
        {"role": role, "content": "\n\n".join(message["content"] for message in some)}
        for role, some in groupby(messages, key=lambda message: message["role"])
    ]


def without_system(messages: Sequence[Mapping[str, str]]) -> list[dict[str, str]]:
    """Return the messages with the system message put into the user's, for models without a system role."""
    return [
        {"role": "user" if message["role"] == "system" else message["role"], "content": message["content"]}
        for message in messages
    ]


def _text(content: Any) -> str | None:
    """Return the text of a message, which may be a list of blocks; None if a block is no text."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list | tuple):
        return None
    texts = []
    for block in content:
        if isinstance(block, Mapping) and block.get("type") in REASONING:
            continue
        text = block.get("text") if isinstance(block, Mapping) and block.get("type") == "text" else block
        if not isinstance(text, str):
            return None
        texts.append(text)
    return "".join(texts)
