"""Bytes become a body: parsed and checked in a time that the event loop can spare, whatever the bytes are."""

from __future__ import annotations

import gc
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import from_json

from grating_core.forking import run_in_thread
from grating_core.serving.errors import invalid, of_schema, too_large

AnyBody = TypeVar("AnyBody", bound=BaseModel)

_LARGE = 64 * 1024  # bytes of a body that is not looked at on the event loop
_VALUES = 100  # strings and commas for each entry that a list may have
_STEP = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"|[\[{,]', re.DOTALL)


async def understood(
    body: bytearray, most_entries: int, kind: Callable[[dict[str, Any]], type[AnyBody]]
) -> AnyBody:
    """Return the checked body in some bytes. If it is large, a thread makes it.

    Args:
        body: The bytes.
        most_entries: See :func:`parsed`.
        kind: Function that finds the schema of the object in the body.

    Raises:
        Refused: The bytes are no JSON object, have too many values, or do not fit the schema.
    """

    def made() -> AnyBody:
        found = parsed(body, most_entries)
        return checked(kind(found), found)

    return await run_in_thread(made) if len(body) > _LARGE else made()


def parsed(body: bytes | bytearray, most_entries: int) -> dict[str, Any]:
    """Return the JSON object in a body.

    Args:
        body: The bytes.
        most_entries: The most entries of a list. More are refused before anybody looks at each.

    Raises:
        Refused: The bytes are no JSON object or have too many values, or a list is too long; the message names its
            field.
    """
    # Making millions of values takes a third of a second, in which no other thread runs. Counting lets others in.
    for count, _ in enumerate(_STEP.finditer(body)):
        if count > _VALUES * most_entries:
            raise too_large(f"the body has too many values; this server takes {most_entries} entries of a list")
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
