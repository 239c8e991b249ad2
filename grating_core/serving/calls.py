"""A call is read within limits, and given up when its client leaves or its deadline has come."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from contextlib import suppress
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect, Request

from grating_core.serving.errors import Refused, overdue, too_large

Found = TypeVar("Found")

_READING = 30.0  # seconds in which a body must have come


class Left(Exception):
    """The client has left, so nobody reads an answer."""


async def read_body(request: Request, most_bytes: int) -> bytes:
    """Read the body of a request.

    Args:
        request: The request.
        most_bytes: The most bytes of a body. No more are kept, whatever the client announced.

    Raises:
        Refused: The body has more bytes, or takes too long.
        Left: The client has left.
    """
    refused = too_large(f"the body has more than {most_bytes} bytes, which is the most that this server takes")
    with suppress(ValueError):
        if int(request.headers.get("content-length", "0")) > most_bytes:
            raise refused
    body = bytearray()
    try:
        async with asyncio.timeout(_READING):
            async for part in request.stream():
                body += part
                if len(body) > most_bytes:
                    raise refused
    except ClientDisconnect:
        raise Left from None
    except TimeoutError:
        raise Refused(408, "validation", f"the body did not come within {_READING:.0f} seconds") from None
    return bytes(body)


async def unless_over(request: Request, work: Coroutine[Any, Any, Found], seconds: float) -> Found:
    """Await work for a client. Its task is cancelled as soon as nobody wants the result any more.

    Args:
        request: The request, whose body has been read.
        work: The work.
        seconds: The most seconds that it may take.

    Raises:
        Refused: The work took longer.
        Left: The client has left.
        Exception: What the work raised.
    """
    working, leaving = asyncio.ensure_future(work), asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait((working, leaving), timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        if leaving.done():
            raise Left
        raise overdue(seconds)
    finally:
        working.cancel()
        leaving.cancel()
        await asyncio.wait((working, leaving))  # the work leaves its place in the queue


async def _gone(request: Request) -> None:
    """Return when the client has left."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
