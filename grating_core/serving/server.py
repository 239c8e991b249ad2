"""The process that serves: a socket, an event loop, and an end that finishes what was accepted."""

from __future__ import annotations

import socket

import uvicorn
from starlette.applications import Starlette

from grating_core.serving.app import Application
from grating_core.serving.models import ServedModels
from grating_core.serving.settings import ServeSettings

_KEEP_ALIVE = 75  # seconds that an idle connection stays open, longer than clients keep theirs


def running(models: ServedModels, server: ServeSettings) -> uvicorn.Server:
    """Return a server that a signal ends. It then finishes what it accepted, and closes the models."""
    return process(Application(models, server).asgi(), server)


def process(app: Starlette, server: ServeSettings) -> uvicorn.Server:
    """Return a server of an application that a signal ends. It then finishes what it accepted.

    It logs no addresses that were called, because a query may be in them.
    """
    return uvicorn.Server(
        uvicorn.Config(
            app,
            log_config=None,
            access_log=False,
            server_header=False,
            lifespan="on",
            timeout_keep_alive=_KEEP_ALIVE,
            timeout_graceful_shutdown=max(1, round(server.drain)),
        )
    )


def listening(host: str, port: int) -> socket.socket:
    """Return a socket that listens at an address.

    Raises:
        OSError: The address is unknown, taken or not allowed; the message names it. This is found out before
            models are loaded.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        raise OSError(error.errno, f"{host}:{port} cannot be listened at: {error.strerror or error}") from error


def address_of(listener: socket.socket) -> str:
    """Return the address that clients of a socket call."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
