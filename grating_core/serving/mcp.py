"""The tools of the Model Context Protocol, by which agents rank documents and cut them down to a prompt's size.

See https://modelcontextprotocol.io. A tool's arguments wait in the same queue, have the same limits and are
refused in the same sentences as the bodies of the HTTP server. This file needs the extra ``mcp``.
"""

from __future__ import annotations

import asyncio
import logging
from abc import abstractmethod
from collections.abc import AsyncIterator, Generator
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any, ClassVar, Self

from mcp.server.context import ServerRequestContext
from mcp.server.lowlevel import Server
from mcp.server.stdio import stdio_server
from mcp.shared.exceptions import MCPError
from mcp.types import (
    INVALID_PARAMS,
    CallToolRequestParams,
    CallToolResult,
    ListToolsResult,
    PaginatedRequestParams,
    TextContent,
    Tool,
    ToolAnnotations,
)
from pydantic import BaseModel, ConfigDict, Field
from starlette.applications import Starlette

from grating_core import __version__
from grating_core.context import Passage, Selector, join_passages
from grating_core.forking import run_in_thread
from grating_core.requests import Request
from grating_core.results import RankedDocument
from grating_core.serving.bodies import check_entries, checked
from grating_core.serving.calls import PATIENCE
from grating_core.serving.entrance import entrance
from grating_core.serving.errors import Refused, failed, overdue
from grating_core.serving.logs import cause, tell
from grating_core.serving.metrics import Metrics
from grating_core.serving.models import ServedModel, ServedModels
from grating_core.serving.schemas import Document, Query
from grating_core.serving.settings import ServeSettings

PATH = "/mcp"
"""The path of the tools over HTTP."""

_DOCUMENTS = "The documents: strings, or objects with text."


class Result(BaseModel):
    """A document's place in the ranking."""

    index: int = Field(description="The document's position in documents, from 0.")
    score: float = Field(description="The probability that the document answers the query, from 0 to 1.")
    text: str


class Ranking(BaseModel):
    """The documents that answer the query best, best first."""

    results: list[Result]


class Place(BaseModel):
    """Where a passage stands in the documents."""

    document: int = Field(description="The document's position in documents, from 0.")
    start: int = Field(description="The position of the first character.")
    end: int = Field(description="The position after the last character.")
    score: float | None = Field(
        description="The probability that the best part answers the query, from 0 to 1; null if everything fitted."
    )
    tokens: int

    @classmethod
    def of(cls, passage: Passage) -> Self:
        """Return the place of a passage."""
        return cls(
            document=passage.document,
            start=passage.start,
            end=passage.end,
            score=passage.probability,
            tokens=passage.tokens,
        )


class Context(BaseModel):
    """The passages that answer the query best, in the order of the documents."""

    text: str = Field(description="The passages as one text; […] marks what was left out of a document.")
    passages: list[Place]


class Arguments(BaseModel):
    """The arguments of a tool."""

    model_config = ConfigDict(extra="forbid")

    name: ClassVar[str]
    about: ClassVar[str]
    answer: ClassVar[type[BaseModel]]

    query: Query
    documents: list[Document] = Field(description=_DOCUMENTS)

    @abstractmethod
    async def call(self, model: ServedModel, seconds: float) -> BaseModel:
        """Return the answer of the tool, after so many seconds as good as it is by then."""


class Rerank(Arguments):
    """A question, and the documents to be ranked."""

    name: ClassVar[str] = "rerank"
    about: ClassVar[str] = (
        "Rank documents by relevance to a query, best first. Use it to choose among texts that you have: search "
        "results, memories, files, descriptions of tools."
    )
    answer: ClassVar[type[BaseModel]] = Ranking

    top_n: int | None = Field(default=None, ge=1, description="How many documents to return; null returns all.")
    score_threshold: float | None = Field(
        default=None,
        ge=0,
        le=1,
        description="The least score of a returned document; null leaves none out. The results may be empty.",
    )

    async def call(self, model: ServedModel, seconds: float) -> Ranking:
        """See :meth:`Arguments.call`."""
        top_k = self.top_n or max(1, len(self.documents))
        threshold = self.score_threshold
        request = Request(self.query, self.documents, top_k, score_threshold=threshold, deadline=seconds)
        (found,) = await model.ranked([request], "documents")
        return Ranking(
            results=[
                Result(index=ranked.index, score=ranked.probability, text=ranked.text) for ranked in found.ranking
            ]
        )


class SelectContext(Arguments):
    """A question, and the documents to be cut down."""

    name: ClassVar[str] = "select_context"
    about: ClassVar[str] = (
        "Cut long documents down to the passages that answer a query best and fit together into a number of "
        "tokens. Use it before you read documents that are longer than you want to read."
    )
    answer: ClassVar[type[BaseModel]] = Context

    max_tokens: int = Field(default=2000, ge=1, description="The most tokens of all passages together.")

    async def call(self, model: ServedModel, seconds: float) -> Context:
        """See :meth:`Arguments.call`."""
        steps = Selector(model.reranker, self.max_tokens).steps(self.query, self.documents)
        found = await run_in_thread(_next, steps, None)
        if isinstance(found, Request):
            (result,) = await model.ranked([replace(found, deadline=seconds)], "documents")
            found = await run_in_thread(_next, steps, result.ranking)
        assert isinstance(found, list)
        return Context(text=join_passages(found), passages=list(map(Place.of, found)))


_TOOLS: dict[str, type[Arguments]] = {tool.name: tool for tool in (Rerank, SelectContext)}


class Tools:
    """These tools are called over stdio or over HTTP.

    Args:
        models: The models, of which the first is used.
        server: The server's settings, of which this takes the limits.
    """

    def __init__(self, models: ServedModels, server: ServeSettings) -> None:
        self._models = models
        self._server = server
        self._protocol: Server[Any] = Server(
            "grating", version=__version__, on_list_tools=self._list, on_call_tool=self._call
        )

    async def over_stdio(self) -> None:
        """Answer what comes in on standard input, until it ends."""
        async with stdio_server() as (incoming, outgoing):
            await self._protocol.run(incoming, outgoing, self._protocol.create_initialization_options())

    def asgi(self) -> Starlette:
        """Return the application that answers over HTTP, at :data:`PATH`."""
        server = self._server
        protocol = self._protocol.streamable_http_app(
            streamable_http_path=PATH, host=server.host, max_request_body_size=server.max_body
        )
        middleware = entrance(server, Metrics(self._models), {PATH})
        return Starlette(routes=protocol.routes, middleware=middleware, lifespan=self._lifespan)

    @asynccontextmanager
    async def _lifespan(self, app: Starlette) -> AsyncIterator[None]:
        async with self._protocol.session_manager.run():
            yield
        await run_in_thread(self._models.close)

    async def _list(
        self, context: ServerRequestContext[Any], params: PaginatedRequestParams | None
    ) -> ListToolsResult:
        """List the tools."""
        return ListToolsResult(
            tools=[
                Tool(
                    name=tool.name,
                    description=tool.about,
                    input_schema=tool.model_json_schema(),
                    output_schema=tool.answer.model_json_schema(mode="serialization"),
                    annotations=ToolAnnotations(read_only_hint=True, idempotent_hint=True, open_world_hint=False),
                )
                for tool in _TOOLS.values()
            ]
        )

    async def _call(self, context: ServerRequestContext[Any], params: CallToolRequestParams) -> CallToolResult:
        """Call a tool. What it refuses, the model that called it can read and correct."""
        if (tool := _TOOLS.get(params.name)) is None:
            raise MCPError(INVALID_PARAMS, f"name is none of the tools here: {', '.join(_TOOLS)}")
        try:
            answer = await self._answer(tool, params.arguments or {})
        except Refused as refused:
            return _refusal(refused)
        except Exception as error:
            tell("call", {"tool": tool.name, **cause(error)}, level=logging.ERROR)
            return _refusal(failed())
        return CallToolResult(
            content=[TextContent(type="text", text=answer.model_dump_json())],
            structured_content=answer.model_dump(mode="json"),
        )

    async def _answer(self, tool: type[Arguments], found: dict[str, Any]) -> BaseModel:
        check_entries("documents", found.get("documents"), self._server.max_documents)
        try:
            async with asyncio.timeout(self._server.deadline + PATIENCE):
                return await checked(tool, found).call(self._models.default, self._server.deadline)
        except TimeoutError:
            raise overdue(self._server.deadline) from None


def _refusal(refused: Refused) -> CallToolResult:
    return CallToolResult(content=[TextContent(type="text", text=refused.message)], is_error=True)


def _next(
    steps: Generator[Request, list[RankedDocument], list[Passage]], ranking: list[RankedDocument] | None
) -> Request | list[Passage]:
    """Return what comes next of a selection: a request to be ranked, or the passages."""
    try:
        return next(steps) if ranking is None else steps.send(ranking)
    except StopIteration as end:
        passages: list[Passage] = end.value
        return passages
