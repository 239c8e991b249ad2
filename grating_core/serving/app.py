"""The application: paths, and the one way from a body to its answer."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from statistics import fmean
from typing import Any

from pydantic import BaseModel
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route

from grating_core import __version__, telemetry
from grating_core.forking import run_in_thread
from grating_core.serving.bodies import understood
from grating_core.serving.calls import Reading, unless_over
from grating_core.serving.dialects.cohere import RerankAnswer, RerankBody
from grating_core.serving.dialects.tei import Info, Ranks, TextsBody, info
from grating_core.serving.dialects.vllm import ScoreAnswer, ScoreBody
from grating_core.serving.entrance import entrance
from grating_core.serving.errors import Refused, of_status, told
from grating_core.serving.metrics import Metrics
from grating_core.serving.models import ServedModels
from grating_core.serving.openapi import Described, document, page
from grating_core.serving.page import Page
from grating_core.serving.schemas import Body, Call
from grating_core.serving.settings import ServeSettings

_PUBLIC = frozenset({"/", "/health", "/docs", "/openapi.json"})
_DOCS_HEADERS = {"Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'"}

_ABOUT: Mapping[type[Body], str] = {
    RerankBody: "Rank documents by relevance to a question",
    ScoreBody: "Score pairs of texts",
}
_ANSWERS: Mapping[type[Body], type[BaseModel]] = {
    RerankBody: RerankAnswer,
    TextsBody: Ranks,
    ScoreBody: ScoreAnswer,
}
_BODIES: Mapping[str, Sequence[type[Body]]] = {
    "/rerank": (RerankBody, TextsBody),
    "/v1/rerank": (RerankBody,),
    "/v2/rerank": (RerankBody,),
    "/reranking": (RerankBody,),
    "/v1/reranking": (RerankBody,),
    "/score": (ScoreBody,),
    "/v1/score": (ScoreBody,),
}
_POSTS = tuple(
    Described(path, "post", _ABOUT[bodies[0]], bodies, [_ANSWERS[body] for body in bodies])
    for path, bodies in _BODIES.items()
)
_GETS = (
    Described("/health", "get", "Tell whether the server answers requests"),
    Described("/info", "get", "Describe the first model, as text-embeddings-inference does", (), (Info,)),
    Described("/v1/models", "get", "List the models"),
    Described("/metrics", "get", "Return the numbers that Prometheus collects"),
)


class Application:
    """The application answers requests with some models.

    Args:
        models: The models, which are closed when the application is shut down.
        server: The server's settings.
    """

    def __init__(self, models: ServedModels, server: ServeSettings) -> None:
        self._models = models
        self._server = server
        self._metrics = Metrics(models)
        self._reading = Reading(server.max_body)
        self._document = document((*_POSTS, *_GETS), keyed=server.api_key is not None)
        self._docs = page(self._document)
        self._page = Page.load()

    def asgi(self) -> Starlette:
        """Return the application as a server runs it."""
        gets: Mapping[str, Callable[[Request], Awaitable[Response]]] = {
            "/health": self._health,
            "/info": self._info,
            "/v1/models": self._list_models,
            "/metrics": self._show_metrics,
            "/openapi.json": self._show_document,
            "/docs": self._show_docs,
            "/": self._show_page,
        }
        routes = [Route(path, self._posted(bodies), methods=["POST"]) for path, bodies in _BODIES.items()]
        routes += [Route(path, endpoint, methods=["GET"]) for path, endpoint in gets.items()]
        paths = {route.path for route in routes}
        return Starlette(
            routes=routes,
            middleware=entrance(self._server, self._metrics, paths, _PUBLIC),
            exception_handlers={HTTPException: _refuse_status},
            lifespan=self._lifespan,
        )

    @asynccontextmanager
    async def _lifespan(self, app: Starlette) -> AsyncIterator[None]:
        yield
        await run_in_thread(self._models.close)

    def _posted(self, bodies: Sequence[type[Body]]) -> Callable[[Request], Awaitable[Response]]:
        """Return the endpoint of a path that takes these bodies."""

        async def answered(request: Request) -> Response:
            with telemetry.serving(request.url.path, request.headers) as told_status:
                response = await attempted(request)
                told_status(response.status_code)
                return response

        async def attempted(request: Request) -> Response:
            kind = bodies[0]

            def find_kind(found: dict[str, Any]) -> type[Body]:
                nonlocal kind
                kind = next((body for body in bodies if body.field in found), kind)
                return kind

            try:
                async with self._reading.body(request) as received:
                    body = await understood(received, self._server.max_documents, find_kind)
                    del received
                return await self._answer(request, body)
            except Refused as refused:
                request.state.record["refused"] = refused.kind
                content = kind.refusal(refused, request.state.id)
                return JSONResponse(content, refused.status, refused.headers)

        return answered

    async def _answer(self, request: Request, body: Body) -> Response:
        """Answer a body."""
        model = self._models.named(body.model)
        requests = body.requests()
        record: dict[str, Any] = request.state.record
        record |= {"model": model.name, "documents": sum(len(one.documents) for one in requests)}
        seconds = self._server.deadline
        if body.grating.deadline_ms is not None:
            seconds = min(seconds, body.grating.deadline_ms / 1000)
        if body.ranks:
            requests = [replace(one, deadline=seconds) for one in requests]
        results = await unless_over(request, model.ranked(requests, body.field, cuts=body.cuts), seconds)
        self._metrics.ranked(model.name, results)
        record |= {
            "tokens": sum(sum(result.trace.lengths) for result in results),
            "truncated": sum(len(result.trace.truncated) for result in results),
            "cut_short": sum(result.trace.cut_short for result in results),
            "compute_share": round(fmean([result.trace.compute_share for result in results] or [1.0]), 3),
        }
        answer = body.answer(results, Call(request.state.id, model.name, request.url.path))
        headers = {"X-Cut-Short": "true"} if record["cut_short"] else None
        return Response(answer.model_dump_json(exclude_none=True), headers=headers, media_type="application/json")

    async def _health(self, request: Request) -> Response:
        return JSONResponse({"status": "ok"})

    async def _info(self, request: Request) -> Response:
        return JSONResponse(info(self._models.default, self._server, __version__).model_dump())

    async def _list_models(self, request: Request) -> Response:
        data = [
            {"id": model.name, "object": "model", "created": 0, "owned_by": "grating"} for model in self._models
        ]
        return JSONResponse({"object": "list", "data": data})

    async def _show_metrics(self, request: Request) -> Response:
        return Response(self._metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def _show_document(self, request: Request) -> Response:
        return JSONResponse(self._document)

    async def _show_docs(self, request: Request) -> Response:
        return HTMLResponse(self._docs, headers=_DOCS_HEADERS)

    async def _show_page(self, request: Request) -> Response:
        return HTMLResponse(self._page.html, headers=self._page.headers)


async def _refuse_status(request: Request, error: Exception) -> Response:
    """Answer what no path or method is there for."""
    assert isinstance(error, HTTPException)
    return JSONResponse(told(of_status(error.status_code), request.state.id), error.status_code, error.headers)
