"""What the client's process of benchmarks/serve.py does: many connections ask one server, and write down the time.

The client is plain: bodies are made before, and of an answer only the status is looked at. So most of the time
that two processes share on the same cores is the server's.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from time import perf_counter, process_time

from benchmarks.worker import Ask, Facts, Ready

_HEALTH_PAUSE = 0.05  # seconds between two questions how the server is
_BACK_OFF = 0.2  # seconds after a refusal


@dataclass
class Seen:
    """What the client has seen.

    Attributes:
        statuses: Number of answers by status; 0 stands for a connection that broke.
        accepted: Seconds of each answer with status 200.
        health: Seconds of each answer about the server's health.
    """

    statuses: Counter[int] = field(default_factory=Counter)
    accepted: list[float] = field(default_factory=list)
    health: list[float] = field(default_factory=list)

    async def ask(self, connection: Connection, request: bytes) -> int:
        """Make a request, and note its status and time."""
        started = perf_counter()
        status = await connection.ask(request)
        self.statuses[status] += 1
        if status == 200:
            self.accepted.append(perf_counter() - started)
        return status


class Connection:
    """A connection that stays open, and is opened again when it broke."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def ask(self, request: bytes) -> int:
        """Return the status of the answer; 0 if there is none."""
        try:
            if self._streams is None:
                self._streams = await asyncio.open_connection("127.0.0.1", self._port)
            reader, writer = self._streams
            writer.write(request)
            head = await reader.readuntil(b"\r\n\r\n")
            await reader.readexactly(int(head.lower().split(b"content-length:")[1].split(b"\r\n")[0]))
            return int(head[9:12])
        except (OSError, EOFError):
            self.close()
            return 0

    def close(self) -> None:
        """Close the connection."""
        if self._streams is not None:
            self._streams[1].close()
            self._streams = None


def posted(path: str, body: bytes) -> bytes:
    """Return a POST request with a JSON body."""
    head = f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body


def load_client(ready: Ready) -> Ask:
    """Be a client. A question is a dictionary of arguments of :func:`visit`."""
    ready()

    def ask(question: Facts) -> Facts:
        started = process_time()
        seen = asyncio.run(visit(**question))
        return {
            "statuses": dict(seen.statuses),
            "accepted": seen.accepted,
            "health": seen.health,
            "client_seconds": process_time() - started,
        }

    return ask


async def visit(
    *, port: int, path: str, bodies: Sequence[bytes], seconds: float, connections: int, rate: float | None = None
) -> Seen:
    """Ask a server for some time.

    Args:
        port: The server's port on this machine.
        path: The path that is asked.
        bodies: The bodies of the requests, which are taken in turn.
        seconds: How long requests are begun.
        connections: Number of connections in a closed loop: each asks again as soon as it has its answer.
        rate: Requests a second in an open loop, whatever the server does; None for a closed loop.
    """
    seen = Seen()
    requests = [posted(path, body) for body in bodies]
    ends = perf_counter() + seconds
    watching = asyncio.create_task(_watch(seen, port))
    if rate is None:
        await asyncio.gather(*(_closed(seen, port, requests[n:] + requests[:n], ends) for n in range(connections)))
    else:
        await _open(seen, port, requests, ends, rate)
    watching.cancel()
    await asyncio.wait([watching])
    return seen


async def _closed(seen: Seen, port: int, requests: Sequence[bytes], ends: float) -> None:
    connection, number = Connection(port), 0
    while perf_counter() < ends:
        if await seen.ask(connection, requests[number % len(requests)]) != 200:
            await asyncio.sleep(_BACK_OFF)
        number += 1
    connection.close()


async def _open(seen: Seen, port: int, requests: Sequence[bytes], ends: float, rate: float) -> None:
    free: list[Connection] = []

    async def one(request: bytes) -> None:
        connection = free.pop() if free else Connection(port)
        await seen.ask(connection, request)
        free.append(connection)

    await _at_a_rate(lambda number: one(requests[number % len(requests)]), ends, rate)
    for connection in free:
        connection.close()


async def _at_a_rate(call: Callable[[int], Awaitable[None]], ends: float, rate: float) -> None:
    """Begin calls at even distances until the end, and wait for them."""
    calls, started = list[asyncio.Future[None]](), perf_counter()
    while (now := perf_counter()) < ends:
        while len(calls) < (now - started) * rate:
            calls.append(asyncio.ensure_future(call(len(calls))))
        await asyncio.sleep(1 / rate)
    await asyncio.gather(*calls)


async def _watch(seen: Seen, port: int) -> None:
    """Ask again and again how the server is."""
    connection = Connection(port)
    try:
        while True:
            started = perf_counter()
            await connection.ask(b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
            seen.health.append(perf_counter() - started)
            await asyncio.sleep(_HEALTH_PAUSE)
    finally:
        connection.close()
