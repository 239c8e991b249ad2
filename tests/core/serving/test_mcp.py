"""Agents call the tools with the protocol's own client: over a process's pipes, and over HTTP."""

import asyncio
import json
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from time import monotonic
from typing import Any

import httpx
import pytest

from grating_core.context import join_passages, select_context
from grating_core.reranker import Reranker
from grating_core.serving.models import ServedModel, ServedModels
from grating_core.serving.server import address_of, listening, process
from grating_core.serving.settings import ServeSettings
from tests.core.conftest import BUNDLED
from tests.core.serving.conftest import DOCUMENTS, NAME, ORDER, QUERY, real_model

mcp = pytest.importorskip("mcp")
httpx2 = pytest.importorskip("httpx2")

from mcp.client.streamable_http import streamable_http_client  # noqa: E402

from grating_core.serving.mcp import PATH, Tools  # noqa: E402

COMMAND = [sys.executable, "-m", "grating_core", "mcp", BUNDLED, "--dtype", "float32"]
LONG = [" ".join(DOCUMENTS) * 9] * 200  # takes many seconds


@contextmanager
def tools(**settings: object) -> Iterator[tuple[str, ServedModel]]:
    """Tools over HTTP on a free port: their address, and the model that they use."""
    server = ServeSettings(port=0, **settings)
    models = ServedModels([ServedModel(NAME, real_model(), server)])
    with listening(server.host, server.port) as listener:
        running = process(Tools(models, server).asgi(), server)
        thread = threading.Thread(target=running.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            yield address_of(listener) + PATH, models.default
        finally:
            running.should_exit = True
            thread.join()
    assert models.default.reranker.closed


@pytest.fixture(scope="module")
def over_http() -> Iterator[tuple[str, ServedModel]]:
    with tools(max_documents=300) as found:
        yield found


@pytest.fixture(scope="module")
def reranker() -> Iterator[Reranker]:
    with real_model() as reranker:
        yield reranker


@asynccontextmanager
async def of_a_process(*options: str) -> AsyncIterator["mcp.Client"]:
    parameters = mcp.StdioServerParameters(command=COMMAND[0], args=[*COMMAND[1:], *options])
    async with mcp.Client(mcp.stdio_client(parameters)) as client:
        yield client


async def use(client: "mcp.Client", reranker: Reranker) -> None:
    """Call each tool, and compare with the library; call them wrongly, and read the refusals."""
    listed = {tool.name: tool for tool in (await client.list_tools()).tools}
    assert set(listed) == {"rerank", "select_context"}
    assert listed["rerank"].input_schema["required"] == ["query", "documents"]
    assert all(tool.annotations.read_only_hint for tool in listed.values())

    answer = await client.call_tool("rerank", {"query": QUERY, "documents": DOCUMENTS, "top_n": 2})
    assert not answer.is_error
    wanted = reranker.rerank(QUERY, DOCUMENTS, top_k=2).ranking
    assert [(one["index"], one["text"]) for one in answer.structured_content["results"]] == [
        (ranked.index, ranked.text) for ranked in wanted
    ]
    for one, ranked in zip(answer.structured_content["results"], wanted, strict=True):
        assert one["score"] == pytest.approx(ranked.probability, abs=1e-6)
    assert json.loads(answer.content[0].text) == answer.structured_content

    strict = {"query": QUERY, "documents": DOCUMENTS, "score_threshold": 0.5}
    answer = await client.call_tool("rerank", strict)
    assert [one["index"] for one in answer.structured_content["results"]] == [
        ranked.index for ranked in reranker.rerank(QUERY, DOCUMENTS, score_threshold=0.5).ranking
    ]

    objects = [{"text": text, "title": "ignored"} for text in DOCUMENTS]
    answer = await client.call_tool("rerank", {"query": QUERY, "documents": objects})
    assert [one["index"] for one in answer.structured_content["results"]] == ORDER
    assert (await client.call_tool("rerank", {"query": QUERY, "documents": []})).structured_content == {
        "results": []
    }

    text = "\n\n".join(DOCUMENTS * 20)
    asked = {"query": QUERY, "documents": [text, DOCUMENTS[1]], "max_tokens": 60}
    answer = await client.call_tool("select_context", asked)
    passages = select_context(QUERY, [text, DOCUMENTS[1]], reranker=reranker, max_tokens=60)
    assert answer.structured_content["text"] == join_passages(passages)
    assert [
        (one["document"], one["start"], one["end"], one["tokens"]) for one in answer.structured_content["passages"]
    ] == [(one.document, one.start, one.end, one.tokens) for one in passages]
    whole = await client.call_tool("select_context", asked | {"documents": DOCUMENTS})
    assert whole.structured_content["text"] == "\n\n".join(DOCUMENTS)

    for name, arguments, sentence in WRONG:
        answer = await client.call_tool(name, arguments)
        assert answer.is_error, arguments
        assert answer.content[0].text == sentence
    with pytest.raises(mcp.MCPError, match="name is none of the tools here: rerank, select_context"):
        await client.call_tool("embed", {"query": QUERY})


WRONG: list[tuple[str, dict[str, Any], str]] = [
    ("rerank", {"query": QUERY}, "documents is missing"),
    ("rerank", {"documents": DOCUMENTS}, "query is missing"),
    ("rerank", {"query": " ", "documents": DOCUMENTS}, "query must not be blank"),
    (
        "rerank",
        {"query": QUERY, "documents": ["a", 2]},
        "documents[1] must be a string, or an object whose text is a string",
    ),
    ("rerank", {"query": QUERY, "documents": "Berlin"}, "documents must be a valid list"),
    (
        "rerank",
        {"query": QUERY, "documents": DOCUMENTS, "top_n": 0},
        "top_n must be greater than or equal to 1",
    ),
    ("rerank", {"query": QUERY, "documents": [], "top_k": 1}, "top_k is unknown; leave it out"),
    (
        "rerank",
        {"query": QUERY, "documents": ["a"] * 301},
        "documents has 301 entries; this server takes 300 at most",
    ),
    (
        "select_context",
        {"query": QUERY, "documents": DOCUMENTS, "max_tokens": 0},
        "max_tokens must be greater than or equal to 1",
    ),
]


@pytest.mark.parametrize("mode", ["auto", "legacy"])
async def test_a_client_uses_the_tools_over_http(
    mode: str, over_http: tuple[str, ServedModel], reranker: Reranker
) -> None:
    async with mcp.Client(over_http[0], mode=mode) as client:
        await use(client, reranker)


async def give_up(client: "mcp.Client", tool: str) -> None:
    """Begin what takes long, give it up, and see that the next call does not wait for it."""
    asked = {"query": QUERY, "documents": LONG}
    long = asyncio.create_task(client.call_tool(tool, asked))
    await asyncio.sleep(1)
    assert not long.done()
    long.cancel()
    with pytest.raises(asyncio.CancelledError):
        await long
    started = monotonic()
    answer = await client.call_tool("rerank", {"query": QUERY, "documents": DOCUMENTS})
    assert [one["index"] for one in answer.structured_content["results"]] == ORDER
    assert monotonic() - started < 5


async def test_a_client_uses_the_tools_of_a_process_and_gives_a_call_up(reranker: Reranker) -> None:
    async with of_a_process("--max-documents", "300") as client:
        await use(client, reranker)
        await give_up(client, "rerank")


@pytest.mark.parametrize("mode", ["auto", "legacy"])
@pytest.mark.parametrize("tool", ["rerank", "select_context"])
async def test_a_call_that_is_given_up_stops_costing_over_http(
    tool: str, mode: str, over_http: tuple[str, ServedModel]
) -> None:
    address, model = over_http
    async with mcp.Client(address, mode=mode) as client:
        await give_up(client, tool)
    assert model.queue.requests == 0
    assert model.queue.tokens == 0


async def test_calls_at_once_share_the_queue_and_the_loop_goes_on(over_http: tuple[str, ServedModel]) -> None:
    address, _ = over_http
    async with mcp.Client(address) as client, httpx.AsyncClient() as plain:
        calls = [
            asyncio.create_task(client.call_tool("rerank", {"query": QUERY, "documents": LONG[:4]}))
            for _ in range(3)
        ]
        await asyncio.sleep(0.3)
        slowest = 0.0
        while not all(call.done() for call in calls):
            started = monotonic()
            assert (await plain.get(address.removesuffix(PATH) + "/nothing")).status_code == 404
            slowest = max(slowest, monotonic() - started)
            await asyncio.sleep(0.02)
        for answer in await asyncio.gather(*calls):
            assert len(answer.structured_content["results"]) == 4
    assert slowest < 1


async def test_limits_and_deadlines_are_those_of_the_server() -> None:
    with tools(max_tokens=1000, deadline=0.5, max_body=100_000) as (address, _):
        async with mcp.Client(address) as client:
            answer = await client.call_tool("rerank", {"query": QUERY, "documents": LONG[:10]})
            assert answer.is_error
            assert "over all documents; this server takes 1000" in answer.content[0].text
        body = {"jsonrpc": "2.0", "id": 1, "method": "tools/list", "params": {"x": "y" * 100_000}}
        accepts = {"Accept": "application/json, text/event-stream"}
        assert httpx.post(address, json=body, headers=accepts).status_code == 413
    with tools(deadline=0.2) as (address, _):
        async with mcp.Client(address) as client:
            answer = await client.call_tool("rerank", {"query": QUERY, "documents": LONG})
            assert not answer.is_error
            assert len(answer.structured_content["results"]) == len(LONG)  # the best ranking by then


async def test_a_key_is_asked_for_over_http() -> None:
    with tools(api_key="secret") as (address, _):
        refused = httpx.post(address, json={}, headers={"Authorization": "Bearer wrong"})
        assert refused.status_code == 401
        assert "must have the server's key" in refused.json()["message"]
        async with (
            httpx2.AsyncClient(headers={"Authorization": "Bearer secret"}) as keyed,
            mcp.Client(streamable_http_client(address, http_client=keyed)) as client,
        ):
            assert len((await client.list_tools()).tools) == 2


async def test_a_model_that_fails_is_told_without_a_text_or_a_path(
    over_http: tuple[str, ServedModel], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    address, model = over_http

    async def broken(*given: object, **how: object) -> None:
        raise RuntimeError(f"secret {QUERY}")

    monkeypatch.setattr(model, "ranked", broken)
    async with mcp.Client(address) as client:
        answer = await client.call_tool("rerank", {"query": QUERY, "documents": DOCUMENTS})
    assert answer.is_error
    assert answer.content[0].text == "The server could not compute this request. Its log has the reason."
    (record,) = [record for record in caplog.records if record.getMessage() == "call"]
    assert record.told["error"] == "RuntimeError"
    assert "secret" not in json.dumps(record.told)


def test_nothing_but_the_protocol_is_on_standard_output() -> None:
    hello = {"protocolVersion": "2025-06-18", "capabilities": {}, "clientInfo": {"name": "test", "version": "1"}}
    call = {"name": "rerank", "arguments": {"query": QUERY, "documents": DOCUMENTS}}
    said = [
        {"jsonrpc": "2.0", "id": 1, "method": "initialize", "params": hello},
        {"jsonrpc": "2.0", "method": "notifications/initialized"},
        {"jsonrpc": "2.0", "id": 2, "method": "tools/call", "params": call},
    ]
    with subprocess.Popen(
        COMMAND, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as running:
        assert running.stdin is not None
        assert running.stdout is not None
        assert running.stderr is not None
        running.stdin.write("this is no message\n")
        for message in said:
            running.stdin.write(json.dumps(message) + "\n")
        running.stdin.flush()
        lines = []
        while not lines or lines[-1].get("id") != 2:
            lines.append(json.loads(running.stdout.readline()))
        running.stdin.close()
        assert running.stdout.read() == ""
        logged = running.stderr.read()
    assert running.returncode == 0
    assert [line["jsonrpc"] for line in lines] == ["2.0"] * len(lines)
    ranked = lines[-1]["result"]["structuredContent"]["results"]
    assert [one["index"] for one in ranked] == ORDER
    assert "Berlin" not in logged
    assert "Traceback" not in logged


def test_a_missing_extra_is_told_in_a_sentence() -> None:
    code = "import sys; sys.modules['mcp'] = None; from grating_core.cli.main import main; main()"
    done = subprocess.run([sys.executable, "-c", code, "mcp", BUNDLED], capture_output=True, text=True)
    assert done.returncode == 2
    assert "pip install 'grating-core[mcp]'" in done.stderr.replace("\n", " ")
    assert done.stdout == ""
