"""Spans come out of the real SDK as backends read them, and no text is in them unless it is asked for."""

import asyncio
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from grating_core import Request, Reranker, StreamedCausalLM
from grating_core.telemetry import CAPTURE
from tests.core.conftest import BUNDLED
from tests.core.serving.conftest import DOCUMENTS, ORDER, QUERY, real_model, serving
from tests.tiny_chat import save_chat_model

trace = pytest.importorskip("opentelemetry.trace")
export = pytest.importorskip("opentelemetry.sdk.trace.export")
memory = pytest.importorskip("opentelemetry.sdk.trace.export.in_memory_span_exporter")
sdk = pytest.importorskip("opentelemetry.sdk.trace")


@pytest.fixture(scope="module")
def exporter() -> Iterator["memory.InMemorySpanExporter"]:
    """Where spans go. A process has one provider for ever, so there may be one of an earlier test."""
    if not isinstance(trace.get_tracer_provider(), sdk.TracerProvider):
        trace.set_tracer_provider(sdk.TracerProvider())
    found = memory.InMemorySpanExporter()
    trace.get_tracer_provider().add_span_processor(export.SimpleSpanProcessor(found))
    yield found
    found.shutdown()


@pytest.fixture
def spans(exporter: "memory.InMemorySpanExporter", monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv(CAPTURE, raising=False)
    exporter.clear()
    return exporter.get_finished_spans


@pytest.fixture(scope="module")
def reranker() -> Iterator[Reranker]:
    with real_model() as reranker:
        yield reranker


@pytest.fixture(scope="module")
def language_model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StreamedCausalLM]:
    path = save_chat_model(tmp_path_factory.mktemp("models") / "tiny")
    with StreamedCausalLM.from_pretrained(path, device="cpu", dtype="float32") as model:
        yield model


def test_a_rerank_is_a_span_in_the_words_of_both_conventions(reranker: Reranker, spans) -> None:
    result = reranker.rerank(QUERY, DOCUMENTS, top_k=2)
    (span,) = spans()
    assert span.name == f"rerank {BUNDLED}"
    assert span.kind is trace.SpanKind.INTERNAL
    assert span.status.status_code is trace.StatusCode.UNSET
    assert (span.end_time - span.start_time) / 1e9 >= result.trace.seconds * 0.9
    best, second = result.ranking
    assert dict(span.attributes) == {
        "openinference.span.kind": "RERANKER",
        "reranker.model_name": BUNDLED,
        "reranker.top_k": 2,
        "reranker.output_documents.0.document.id": best.index,
        "reranker.output_documents.0.document.score": best.score,
        "reranker.output_documents.1.document.id": second.index,
        "reranker.output_documents.1.document.score": second.score,
        "gen_ai.operation.name": "rerank",
        "gen_ai.provider.name": "grating",
        "gen_ai.request.model": BUNDLED,
        "gen_ai.rerank.candidate.count": 3,
        "gen_ai.rerank.top_n": 2,
        "gen_ai.rerank.scores": (best.score, second.score),
        "gen_ai.usage.input_tokens": sum(result.trace.lengths),
        "grating.compute_share": result.trace.compute_share,
        "grating.cut_short": False,
        "grating.truncated_documents": 0,
    }


def test_scores_of_pairs_are_a_span(reranker: Reranker, spans) -> None:
    reranker.score([(QUERY, text) for text in DOCUMENTS])
    (span,) = spans()
    assert span.name == f"score {BUNDLED}"
    assert span.attributes["openinference.span.kind"] == "RERANKER"
    assert span.attributes["gen_ai.rerank.candidate.count"] == len(DOCUMENTS)
    assert span.attributes["gen_ai.usage.input_tokens"] == sum(reranker.rerank(QUERY, DOCUMENTS).trace.lengths)
    assert not any("content" in name or "query" in name for name in span.attributes)


@pytest.mark.parametrize("value", ["true", "SPAN_ONLY", "SPAN_AND_EVENT"])
def test_texts_come_if_they_are_asked_for(
    value: str, reranker: Reranker, spans, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(CAPTURE, value)
    reranker.rerank(QUERY, DOCUMENTS, top_k=2)
    attributes = spans()[0].attributes
    assert attributes["reranker.query"] == QUERY
    for index, text in enumerate(DOCUMENTS):
        assert attributes[f"reranker.input_documents.{index}.document.id"] == index
        assert attributes[f"reranker.input_documents.{index}.document.content"] == text
    for place, index in enumerate(ORDER[:2]):
        assert attributes[f"reranker.output_documents.{place}.document.content"] == DOCUMENTS[index]


@pytest.mark.parametrize("value", ["", "false", "NO_CONTENT", "EVENT_ONLY"])
def test_no_text_comes_otherwise(
    value: str,
    reranker: Reranker,
    language_model: StreamedCausalLM,
    spans,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(CAPTURE, value)
    reranker.rerank(QUERY, DOCUMENTS)
    text = language_model.generate("Berlin has people", max_new_tokens=3).text
    seen = "".join(span.to_json() for span in spans())
    assert "Berlin" not in seen
    assert "Museum" not in seen
    assert not text.strip() or text not in seen


def test_requests_of_one_pass_are_a_span_each_in_the_trace_of_the_caller(reranker: Reranker, spans) -> None:
    requests = [Request(QUERY, DOCUMENTS, 1), Request("Which museums are there?", DOCUMENTS[::2], 2)]
    with trace.get_tracer("test").start_as_current_span("whole"):
        reranker.rerank_many(requests)
    *ranked, whole = spans()
    assert sorted(span.attributes["gen_ai.rerank.candidate.count"] for span in ranked) == [2, 3]
    assert {span.parent.span_id for span in ranked} == {whole.context.span_id}


async def test_an_awaited_call_is_a_span_as_well_and_one_given_up_has_no_result(reranker: Reranker, spans) -> None:
    with trace.get_tracer("test").start_as_current_span("whole"):
        await reranker.arerank(QUERY, DOCUMENTS)
        given_up = asyncio.ensure_future(reranker.arerank(QUERY, [" ".join(DOCUMENTS) * 9] * 50))
        await asyncio.sleep(0.01)
        given_up.cancel()
        with pytest.raises(asyncio.CancelledError):
            await given_up
    ended, left, whole = spans()
    assert ended.parent.span_id == left.parent.span_id == whole.context.span_id
    assert "gen_ai.rerank.scores" in ended.attributes
    assert "gen_ai.rerank.scores" not in left.attributes


def test_the_best_of_many_documents_stay_where_a_span_has_little_room(reranker: Reranker, spans) -> None:
    result = reranker.rerank(QUERY, [f"{text} {number}" for number in range(50) for text in DOCUMENTS], 150)
    attributes = spans()[0].attributes
    assert len(attributes) == 128  # what the SDK keeps by default
    assert attributes["reranker.model_name"] == BUNDLED
    assert attributes["reranker.output_documents.0.document.id"] == result.ranking[0].index
    assert len(attributes["gen_ai.rerank.scores"]) == 150


def test_an_error_leaves_its_kind_and_no_message(spans) -> None:
    with real_model() as closed:
        pass
    with pytest.raises(RuntimeError):
        closed.rerank(QUERY, DOCUMENTS)
    (span,) = spans()
    assert span.status.status_code is trace.StatusCode.ERROR
    assert span.attributes["error.type"] == "RuntimeError"
    assert not span.events
    assert not span.status.description


def test_a_generated_text_is_a_span_with_its_tokens(
    language_model: StreamedCausalLM, spans, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(CAPTURE, "true")
    messages = [{"role": "user", "content": "How many people live in Berlin?"}]
    answer = language_model.generate(messages, max_new_tokens=4, temperature=0.5, top_p=0.9, seed=3)
    (span,) = spans()
    attributes = dict(span.attributes)
    assert span.name == "chat tiny"
    assert json.loads(attributes.pop("gen_ai.input.messages")) == [
        {"role": "user", "parts": [{"type": "text", "content": messages[0]["content"]}]}
    ]
    assert json.loads(attributes.pop("gen_ai.output.messages")) == [
        {
            "role": "assistant",
            "parts": [{"type": "text", "content": answer.text}],
            "finish_reason": answer.finish_reason,
        }
    ]
    assert attributes == {
        "openinference.span.kind": "LLM",
        "llm.model_name": "tiny",
        "llm.token_count.prompt": answer.prompt_tokens,
        "llm.token_count.completion": answer.new_tokens,
        "llm.token_count.total": answer.prompt_tokens + answer.new_tokens,
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "grating",
        "gen_ai.request.model": "tiny",
        "gen_ai.request.max_tokens": 4,
        "gen_ai.request.temperature": 0.5,
        "gen_ai.request.top_p": 0.9,
        "gen_ai.request.seed": 3,
        "gen_ai.response.finish_reasons": (answer.finish_reason,),
        "gen_ai.response.time_to_first_chunk": answer.seconds_to_first,
        "gen_ai.usage.input_tokens": answer.prompt_tokens,
        "gen_ai.usage.output_tokens": answer.new_tokens,
    }


def test_a_stream_is_a_span_from_its_first_piece_until_it_is_closed(
    language_model: StreamedCausalLM, spans
) -> None:
    stream = language_model.stream("Berlin has", max_new_tokens=8)
    next(stream)
    assert spans() == ()
    stream.close()
    (span,) = spans()
    assert span.name == "text_completion tiny"
    assert span.status.status_code is trace.StatusCode.UNSET
    assert "gen_ai.usage.output_tokens" not in span.attributes


def test_a_served_rerank_is_part_of_the_trace_of_its_client(spans) -> None:
    trace_id, parent = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
    headers = {"traceparent": f"00-{trace_id}-{parent}-01"}
    with serving(real_model()) as address, httpx.Client(base_url=address, timeout=60) as client:
        body = {"query": QUERY, "documents": DOCUMENTS}
        assert client.post("/v2/rerank", json=body, headers=headers).status_code == 200
        assert client.post("/v2/rerank", json={"query": QUERY}, headers=headers).status_code == 422
        assert client.get("/health", headers=headers).status_code == 200
    ranked, answered, refused = spans()
    assert [f"{span.context.trace_id:032x}" for span in (ranked, answered, refused)] == [trace_id] * 3
    assert f"{answered.parent.span_id:016x}" == parent
    assert ranked.parent.span_id == answered.context.span_id
    assert ranked.attributes["openinference.span.kind"] == "RERANKER"
    assert answered.name == "POST /v2/rerank"
    assert answered.kind is trace.SpanKind.SERVER
    assert dict(answered.attributes) == {
        "http.request.method": "POST",
        "http.route": "/v2/rerank",
        "http.response.status_code": 200,
    }
    assert refused.attributes["http.response.status_code"] == 422
    assert refused.status.status_code is trace.StatusCode.UNSET


async def test_a_call_of_a_tool_is_part_of_the_trace_of_its_agent(spans) -> None:
    mcp = pytest.importorskip("mcp")
    from tests.core.serving.test_mcp import tools

    with tools() as (address, _), trace.get_tracer("test").start_as_current_span("agent") as agent:
        async with mcp.Client(address) as client:
            await client.call_tool("rerank", {"query": QUERY, "documents": DOCUMENTS})
    (ranked,) = [span for span in spans() if span.name.startswith("rerank ")]
    assert ranked.context.trace_id == agent.get_span_context().trace_id
    assert "Berlin" not in "".join(span.to_json() for span in spans())


_ALONE = f"""
import sys
sys.modules["opentelemetry"] = None  # as if it were not installed
from grating_core import Reranker
with Reranker.from_pretrained({BUNDLED!r}, device="cpu") as reranker:
    print(reranker.rerank({QUERY!r}, {DOCUMENTS!r}).ranking[0].index)
"""


def test_nothing_is_needed_and_nothing_imported_where_nobody_traces(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", _ALONE], capture_output=True, text=True, check=True)
    assert done.stdout.split() == [str(ORDER[0])]
