"""A call is read within limits, and given up when its client leaves or its deadline has come."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager, suppress
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect, Request

from grating_core.serving.errors import Refused, overdue, too_large

Found = TypeVar("Found")

_READING = 30.0  # seconds in which a body must have come
_BODIES = 16  # bodies of the largest size that may be read at a time

PATIENCE = 2.0
"""So many seconds after its deadline a request is given up. Long before, the best ranking so far should come."""


class Left(Exception):
    """The client has left, so nobody reads an answer."""


class Reading:
    """Reading bounds the bytes of all bodies that are being read or checked at a time.

    All of it runs on the event loop, so nothing is locked.

    Args:
        most_bytes: The most bytes of a body. No more are kept, whatever the client announced.
    """

    def __init__(self, most_bytes: int) -> None:
        self._most = most_bytes
        self._bytes = 0  # of all bodies

    @asynccontextmanager
    async def body(self, request: Request) -> AsyncIterator[bytearray]:
        """Provide the body of a request, whose bytes count until the end of the ``with``.

        Raises:
            Refused: The body has too many bytes, or takes too long, or there are too many beside it.
            Left: The client has left.
        """
        announced = 0
        with suppress(ValueError):
            announced = int(request.headers.get("content-length", "0"))
        self._check(announced, self._bytes + announced)
        body = bytearray()
        try:
            try:
                async with asyncio.timeout(_READING):
                    async for part in request.stream():
                        body += part
                        self._bytes += len(part)
                        self._check(len(body), self._bytes)
            except ClientDisconnect:
                raise Left from None
            except TimeoutError:
                told = f"the body did not come within {_READING:.0f} seconds"
                raise Refused(408, "validation", told) from None
            yield body
        finally:
            self._bytes -= len(body)

    def _check(self, own: int, together: int) -> None:
        if own > self._most:
            raise too_large(f"the body has more than {self._most} bytes, which is the most that this server takes")
        if together > _BODIES * self._most:
            raise Refused(
                429, "overloaded", "the server is reading too many large bodies; come again later", retry_after=1
            )


async def unless_over(request: Request, work: Coroutine[Any, Any, Found], seconds: float) -> Found:
    """Await work for a client. Its task is cancelled as soon as nobody wants the result any more.

    Args:
        request: The request, whose body has been read.
        work: The work.
        seconds: The seconds that it should take. The engine keeps them, and ends with the best ranking so far.

    Raises:
        Refused: The work took much longer.
        Left: The client has left.
        Exception: What the work raised.
    """
    working, leaving = asyncio.ensure_future(work), asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait((working, leaving), timeout=seconds + PATIENCE, return_when=asyncio.FIRST_COMPLETED)
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
