"""The process that serves: one event loop, the engine's threads, and an end that finishes what was accepted."""

from __future__ import annotations

import socket
from collections.abc import Callable

import uvicorn

from grating_core.serving.app import Application
from grating_core.serving.models import ServedModels
from grating_core.settings import ServeSettings

_KEEP_ALIVE = 75  # seconds that an idle connection stays open, longer than clients keep theirs


def serve(models: ServedModels, server: ServeSettings, ready: Callable[[str], None]) -> None:
    """Serve models until a signal ends the process. They are closed at the end.

    Args:
        models: The models.
        server: The server's settings.
        ready: Function that is told the server's address as soon as clients can connect.

    Raises:
        OSError: The address cannot be listened at.
    """
    with listening(server.host, server.port) as listener:
        host, port = listener.getsockname()[:2]
        config = uvicorn.Config(
            Application(models, server).asgi(),
            log_config=None,
            access_log=False,
            server_header=False,
            lifespan="on",
            timeout_keep_alive=_KEEP_ALIVE,
            timeout_graceful_shutdown=max(1, round(server.drain)),
        )
        ready(f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}")
        uvicorn.Server(config).run(sockets=[listener])


def listening(host: str, port: int) -> socket.socket:
    """Return a socket that listens at an address.

    Raises:
        OSError: The address is unknown, taken or not allowed; the message names it.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        raise OSError(error.errno, f"{host}:{port} cannot be listened at: {error.strerror or error}") from error
