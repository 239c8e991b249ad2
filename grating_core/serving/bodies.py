"""Bytes become a body: parsed and checked in a time that the event loop can spare, whatever the bytes are."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import from_json

from grating_core.serving.errors import invalid, of_schema, too_large

AnyBody = TypeVar("AnyBody", bound=BaseModel)


def parsed(body: bytes, most_entries: int) -> dict[str, Any]:
    """Return the JSON object in a body.

    Args:
        body: The bytes.
        most_entries: The most entries of a list. More are refused before anybody looks at each.

    Raises:
        Refused: The bytes are no JSON object, or a list is too long; the message names its field.
    """
    try:
        with _no_collecting():
            found = from_json(body, allow_inf_nan=False)
    except ValueError as error:
        raise invalid(f"the body is not JSON: {error}") from None
    if not isinstance(found, dict):
        raise invalid("the body must be a JSON object with fields such as query and documents")
    for name, value in found.items():
        check_entries(name, value, most_entries)
    return found


def check_entries(name: str, value: Any, most: int) -> None:
    """Refuse a field that is a list with more entries than the server takes, before anybody looks at each."""
    if isinstance(value, list) and len(value) > most:
        raise too_large(f"{name[:80]} has {len(value)} entries; this server takes {most} at most")


def checked(kind: type[AnyBody], found: dict[str, Any]) -> AnyBody:
    """Return a body that fits its schema.

    Raises:
        Refused: The object does not fit; the message names the field.
    """
    try:
        return kind.model_validate(found)
    except ValidationError as error:
        raise of_schema(error) from None


@contextmanager
def _no_collecting() -> Iterator[None]:
    """Keep the garbage collector from looking through millions of new objects again and again."""
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:  # whoever embeds the application may have switched it off
            gc.enable()
