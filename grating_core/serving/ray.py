"""Ray takes grating beyond one machine: Ray Data ranks data sets, Ray Serve runs replicas of the server.

This file needs the extra ``ray``.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import ray
import torch
from ray import serve
from ray.exceptions import RayActorError
from ray.serve.config import AutoscalingContext
from ray.serve.handle import DeploymentHandle
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import Message, Scope

from grating_core.serving.app import Application
from grating_core.serving.batches import BatchReranker
from grating_core.serving.calls import Left, Reading, unless_over
from grating_core.serving.errors import Refused, told
from grating_core.serving.logs import write_to
from grating_core.serving.models import ServedModels
from grating_core.serving.settings import ServeSettings
from grating_core.settings import RerankSettings

_ONGOING = 1000  # requests at a time of an actor; what a model lets wait is bounded in tokens, by its own queue
_REPLICAS = 3  # so many are asked, one after the other, if they die
_BY_TOKENS = f"{__name__}:ByTokens"
_CARRIED = ("type", "asgi", "http_version", "method", "scheme", "query_string", "headers")  # of a scope

Answer = tuple[int, list[tuple[bytes, bytes]], bytes]


class ActorReranker(BatchReranker):
    """This :class:`BatchReranker` is for the actors of ``ray.data.Dataset.map_batches``.

    The model is loaded when the actor starts, and computes with as many threads as the actor has CPUs.
    """

    def __init__(self, model: str | Path, *, top_k: int = 10, **settings: Any) -> None:
        super().__init__(model, top_k=top_k, **settings)
        follow_cpus()
        self.load()


def application(
    settings: RerankSettings,
    server: ServeSettings | None = None,
    *,
    autoscaling_config: Mapping[str, Any] | None = None,
    **options: Any,
) -> serve.Application:
    """Return an application for ``ray.serve.run``, which answers what ``grating serve`` answers.

    Each replica loads the models and has a queue of its own, measured in tokens, whose requests share passes. If a
    replica ends before it has answered, another one computes the request.

    Args:
        settings: The settings of the model.
        server: The server's settings; None takes the defaults. The host and the port are Ray's, so those here are
            not used.
        autoscaling_config: Ray's settings of autoscaling, such as ``max_replicas``; None for a fixed number of
            replicas. Unless it has a ``policy``, the number follows :class:`ByTokens`, with a quarter of
            ``queue_tokens`` for a replica.
        options: The options of ``ray.serve.deployment`` for the replicas, such as ``num_replicas``, and
            ``ray_actor_options={"num_cpus": 4}``, which makes 4 threads.
    """
    server = ServeSettings() if server is None else server
    options = {"max_ongoing_requests": _ONGOING, "graceful_shutdown_timeout_s": server.drain} | options
    if autoscaling_config is not None:
        policy = {"policy_function": _BY_TOKENS, "policy_kwargs": {"tokens": max(1, server.queue_tokens // 4)}}
        options["autoscaling_config"] = {"policy": policy} | dict(autoscaling_config)
    replicas = serve.deployment(Replica, **options).bind(settings, server)
    front = serve.deployment(Front, max_ongoing_requests=_ONGOING, ray_actor_options={"num_cpus": 0})
    return front.bind(replicas, server)


class ByTokens:
    """This policy of autoscaling wants as many replicas as there are tokens, divided by those for one replica.

    Args:
        tokens: The tokens that wait for a replica or are computed by it, on average.
    """

    def __init__(self, tokens: int) -> None:
        self._tokens = tokens

    def __call__(self, context: AutoscalingContext) -> tuple[float, dict[str, Any]]:
        """Return the number of replicas, and an empty state. Ray applies its limits and delays to it."""
        counted = (context.aggregated_metrics or {}).get("tokens")
        return sum(counted.values()) / self._tokens if counted else context.target_num_replicas, {}


class Replica:
    """A replica has the models, and answers requests that the front has received.

    Args:
        settings: The settings of the model.
        server: The server's settings.
    """

    def __init__(self, settings: RerankSettings, server: ServeSettings) -> None:
        write_to(sys.stderr)
        follow_cpus()
        self._models = ServedModels.open(settings, server)
        self._app = Application(self._models, server).asgi()

    async def answer(self, scope: Scope, body: bytes) -> Answer:
        """Return the status, the headers and the body of an answer.

        Args:
            scope: What ASGI tells of the request.
            body: The request's body.
        """
        received = iter([{"type": "http.request", "body": body}])
        sent: list[Message] = []

        async def receive() -> Message:
            for message in received:
                return message
            return await asyncio.Future()  # nothing more comes; if the client leaves, Ray cancels this task

        async def send(message: Message) -> None:
            sent.append(message)

        await self._app(scope, receive, send)
        start, *parts = sent
        headers = [(name, value) for name, value in start["headers"] if name != b"x-request-id"]  # Ray adds it
        return start["status"], headers, b"".join(part.get("body", b"") for part in parts)

    def record_autoscaling_stats(self) -> dict[str, float]:
        """Return what :class:`ByTokens` looks at."""
        return {"tokens": float(sum(model.queue.tokens for model in self._models))}

    def __del__(self) -> None:
        """Close the models. Ray calls this when the requests in progress have ended."""
        if hasattr(self, "_models"):  # they may have failed to load
            self._models.close()


class Front:
    """The front receives requests, and has a replica answer each.

    It has no model, so it stays when a replica runs out of memory. Ranking changes nothing, so another replica may
    compute what a dead one has left.

    Args:
        replicas: The replicas.
        server: The server's settings.
    """

    def __init__(self, replicas: DeploymentHandle, server: ServeSettings) -> None:
        self._replicas = replicas
        self._server = server
        self._reading = Reading(server.max_body)

    async def __call__(self, request: Request) -> Response:
        """Answer a request."""
        try:
            async with self._reading.body(request) as body:
                status, headers, content = await unless_over(
                    request, self._asked(request.scope, bytes(body)), self._server.deadline
                )
        except Refused as refused:
            request_id = request.headers.get("x-request-id", "")
            return JSONResponse(told(refused, request_id), refused.status, refused.headers)
        except Left:
            return Response(status_code=499)  # nobody reads it
        response = Response(content, status)
        response.raw_headers = headers
        return response

    async def _asked(self, scope: Scope, body: bytes) -> Answer:
        """Return what a replica answers. If it ends meanwhile, another one is asked."""
        carried = {name: scope[name] for name in _CARRIED if name in scope}
        carried["path"] = scope["path"].removeprefix(scope.get("root_path", ""))  # the prefix is Ray's own matter
        for _ in range(_REPLICAS):
            with suppress(RayActorError):
                answer: Answer = await self._replicas.answer.remote(carried, body)
                return answer
        raise Refused(
            503,
            "unhealthy",
            f"{_REPLICAS} replicas ended while they computed this request; come again later",
            retry_after=5,
        )


def follow_cpus() -> None:
    """Let torch compute with as many threads as this actor has CPUs, one at least."""
    cpus = ray.get_runtime_context().get_assigned_resources().get("CPU", 1)
    torch.set_num_threads(max(1, int(cpus)))
