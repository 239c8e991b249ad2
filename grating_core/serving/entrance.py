"""Every request comes through the entrance: it gets an id, shows its key, and is logged and counted at its end."""

from __future__ import annotations

import hmac
import logging
import re
import uuid
from collections.abc import Collection
from hashlib import sha256
from time import perf_counter
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware import Middleware
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from grating_core.serving.calls import Left
from grating_core.serving.errors import Refused, failed, told
from grating_core.serving.logs import cause, tell
from grating_core.serving.metrics import Metrics
from grating_core.serving.settings import ServeSettings

_ID = re.compile(r"[\w.-]{1,64}", re.ASCII)
_LEFT = 499  # what a log has for a client that did not wait


def entrance(
    server: ServeSettings, metrics: Metrics, paths: Collection[str], public: Collection[str] = ()
) -> list[Middleware]:
    """Return what every request of an application comes through.

    Args:
        server: The server's settings.
        metrics: The metrics to count in.
        paths: The paths that are counted by name.
        public: The paths that need no key.
    """
    found = [Middleware(Entrance, metrics, frozenset(paths))]
    if server.api_key is not None:
        found.append(Middleware(Keys, server.api_key, frozenset(public)))
    return found


class Entrance:
    """This middleware gives a request an id, logs and counts it, and answers for errors of the server itself.

    Args:
        app: The application behind it.
        metrics: The metrics to count in.
        paths: The paths that are counted by name.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics, paths: frozenset[str]) -> None:
        self._app = app
        self._metrics = metrics
        self._paths = paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Take a request through the application."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = perf_counter()
        given = Headers(scope=scope).get("x-request-id", "")
        request_id = given if _ID.fullmatch(given) else uuid.uuid4().hex
        path = scope["path"] if scope["path"] in self._paths else "other"
        record: dict[str, Any] = {"id": request_id, "method": scope["method"], "path": path}
        scope.setdefault("state", {}).update(id=request_id, record=record)
        status = _LEFT

        async def sending(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["X-Request-ID"] = request_id
            await send(message)

        try:
            await self._app(scope, receive, sending)
        except Left:
            pass
        except Exception as error:
            record |= cause(error)
            if status == _LEFT:  # no answer has begun
                await JSONResponse(told(failed(), request_id), 500)(scope, receive, sending)
        finally:
            seconds = perf_counter() - started
            record |= {"status": status, "seconds": round(seconds, 4)}
            self._metrics.answered(path, status, seconds)
            tell("request", record, level=logging.ERROR if "error" in record else logging.INFO)


class Keys:
    """This middleware lets in whoever shows the key.

    Args:
        app: The application behind it.
        key: The key.
        public: The paths that need no key.
    """

    def __init__(self, app: ASGIApp, key: str, public: frozenset[str]) -> None:
        self._app = app
        self._wanted = sha256(key.encode()).digest()
        self._public = public

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request in, or refuse it."""
        if scope["type"] != "http" or scope["path"] in self._public or self._has_key(scope):
            await self._app(scope, receive, send)
            return
        refused = Refused(
            401, "authentication", "the header 'Authorization: Bearer KEY' must have the server's key"
        )
        body = told(refused, scope["state"]["id"])
        await JSONResponse(body, 401, {"WWW-Authenticate": "Bearer"})(scope, receive, send)

    def _has_key(self, scope: Scope) -> bool:
        """Tell whether a request has the key, in a time that says nothing about it, its length included."""
        shown = Headers(scope=scope).get("authorization", "").rpartition(" ")[2]  # some clients leave out "Bearer"
        return hmac.compare_digest(sha256(shown.encode("latin-1")).digest(), self._wanted)
