"""What those who listen are told: instrumentation events, spans, and the older callbacks."""

import json

import pytest
from llama_index.core.callbacks import CallbackManager, CBEventType, EventPayload, LlamaDebugHandler
from llama_index.core.instrumentation import get_dispatcher
from llama_index.core.instrumentation.event_handlers import BaseEventHandler
from llama_index.core.instrumentation.events.rerank import ReRankEndEvent, ReRankStartEvent
from llama_index.core.instrumentation.events.span import SpanDropEvent
from llama_index.core.llms import MockLLM
from llama_index.postprocessor.grating import GratingRerank

from grating_core import Reranker

QUERY = "How many people live in Berlin?"
both = pytest.mark.parametrize("asynchronous", [False, True])


@pytest.fixture
def dropped():
    """The events of spans that an error has ended."""
    seen = []

    class Collect(BaseEventHandler):
        def handle(self, event, **kwargs):
            if isinstance(event, SpanDropEvent):
                seen.append(event)

    root = get_dispatcher()
    before = list(root.event_handlers)
    root.add_event_handler(Collect())
    yield seen
    root.event_handlers = before


async def run(postprocessor, nodes, asynchronous, query=QUERY):
    if asynchronous:
        return await postprocessor.apostprocess_nodes(nodes, query_str=query)
    return postprocessor.postprocess_nodes(nodes, query_str=query)


def check_trace(trace, postprocessor, nodes):
    """It is the summary of a rerank of these nodes, and JSON can hold it."""
    again = postprocessor.reranker.rerank(
        QUERY, [node.text for node in nodes], postprocessor.top_n
    ).trace.summary()
    timed = {"seconds", "seconds_waited"}
    assert json.loads(json.dumps(trace)) == trace
    assert {name: trace[name] for name in trace.keys() - timed} == {
        name: again[name] for name in again.keys() - timed
    }
    assert trace["candidates"] == len(nodes)
    assert 0 < trace["compute_share"] < 1
    assert trace["seconds"] > 0


@both
async def test_the_events_carry_the_trace(reranker, nodes, events, spans, asynchronous):
    postprocessor = GratingRerank(reranker=reranker, top_n=2)
    ranked = await run(postprocessor, nodes, asynchronous)
    start, end = events
    assert isinstance(start, ReRankStartEvent)
    assert (start.query.query_str, start.top_n, start.nodes) == (QUERY, 2, nodes)
    assert start.model_name == str(reranker.model_path)
    assert isinstance(end, ReRankEndEvent)
    assert end.nodes == ranked
    assert end.model_dump()["tags"] == end.tags
    check_trace(end.tags["trace"], postprocessor, nodes)
    (span,) = spans.completed_spans
    assert span.id_ == start.span_id == end.span_id
    assert span.id_.startswith("GratingRerank.")


@both
async def test_the_callback_manager_is_told_the_trace(model, nodes, asynchronous):
    debug = LlamaDebugHandler(print_trace_on_end=False)
    postprocessor = GratingRerank(model=model, top_n=2, callback_manager=CallbackManager([debug]))
    ranked = await run(postprocessor, nodes, asynchronous)
    ((start, end),) = debug.get_event_pairs(CBEventType.RERANKING)
    assert start.payload == {
        EventPayload.NODES: nodes,
        EventPayload.MODEL_NAME: model,
        EventPayload.QUERY_STR: QUERY,
        EventPayload.TOP_K: 2,
    }
    assert end.payload.keys() == {EventPayload.NODES, EventPayload.ADDITIONAL_KWARGS}
    assert end.payload[EventPayload.NODES] == ranked
    check_trace(end.payload[EventPayload.ADDITIONAL_KWARGS]["trace"], postprocessor, nodes)


@both
async def test_an_error_ends_event_and_span(model, nodes, events, spans, dropped, asynchronous):
    debug = LlamaDebugHandler(print_trace_on_end=False)
    reranker = Reranker.from_pretrained(model)
    postprocessor = GratingRerank(reranker=reranker, callback_manager=CallbackManager([debug]))
    reranker.close()
    with pytest.raises(RuntimeError, match="closed"):
        await run(postprocessor, nodes, asynchronous)
    (start,) = events
    assert [event.span_id for event in dropped] == [start.span_id]
    assert "closed" in dropped[0].err_str
    assert [span.id_ for span in spans.dropped_spans] == [start.span_id]
    assert not spans.open_spans
    ((_, end),) = debug.get_event_pairs(CBEventType.RERANKING)
    assert isinstance(end.payload[EventPayload.EXCEPTION], RuntimeError)


@both
async def test_the_span_is_a_child_of_the_query_engines(reranker, index, events, spans, asynchronous):
    engine = index.as_query_engine(
        llm=MockLLM(), similarity_top_k=6, node_postprocessors=[GratingRerank(reranker=reranker)]
    )
    await engine.aquery(QUERY) if asynchronous else engine.query(QUERY)
    parents = {span.id_: span.parent_id for span in spans.completed_spans}
    assert "QueryEngine" in parents[events[0].span_id]
    assert all(event.span_id in parents for event in events)
