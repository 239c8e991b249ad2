"""This module finds the most tokens that a pair may have, and divides documents that have more."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import TypeGuard

from grating_core.arguments import LongDocuments
from grating_core.text.backend import read_settings
from grating_core.text.inputs import read_inputs

_SMALLEST = 8  # tokens of a window
_OVERLAP = 8  # one in so many tokens of a window comes again in the next window


def find_window(directory: Path, model_window: int, max_length: int | None, usual: int | None = None) -> int:
    """Return the most tokens that a pair may have.

    Args:
        directory: The tokenizer's directory.
        model_window: The most tokens that the model itself can take.
        max_length: The user's limit in tokens, which may be above the limit in the tokenizer's settings. None
            takes the limit in the settings.
        usual: The most tokens if the user gives no limit; None for no such limit.

    Raises:
        ModelNotFoundError: The tokenizer's settings are damaged.
        ValueError: ``max_length`` is not between 8 and the model's window.
    """
    if max_length is not None and not _SMALLEST <= max_length <= model_window:
        raise ValueError(
            f"max_length={max_length} does not fit this model; use {_SMALLEST} to {model_window} tokens, or None"
        )
    stated = read_inputs(directory).longest
    if stated is None:
        stated = read_settings(directory).get("model_max_length")
    elif max_length is None and _is_window(stated):
        usual = None
    window = min(model_window, int(stated)) if _is_window(stated) else model_window
    return max_length or min(window, usual or window)


def _is_window(stated: object) -> TypeGuard[float]:
    # Some files say 0, -1, true or infinity here.
    return (
        isinstance(stated, int | float)
        and not isinstance(stated, bool)
        and math.isfinite(stated)
        and stated >= _SMALLEST
    )


def divided(ids: list[int], room: int, long_documents: LongDocuments) -> Iterator[tuple[list[int], bool]]:
    """Yield the tokens of a document, or of each of its windows, and whether the document's end was cut.

    Args:
        ids: The document's token ids.
        room: The most tokens of the document that fit into a pair.
        long_documents: The treatment of a document that does not fit: its end is cut, or it becomes windows.
    """
    if long_documents == "truncate":
        yield ids[:room], len(ids) > room
        return
    overlap = room // _OVERLAP
    for start in range(0, max(1, len(ids) - overlap), room - overlap):
        yield ids[start : start + room], False
