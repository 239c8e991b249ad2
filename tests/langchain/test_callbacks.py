"""Reranking is a step in LangChain's callbacks, tracing and event streams."""

import asyncio
import json
import threading

import pytest
from langchain_classic.retrievers import ContextualCompressionRetriever
from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.runnables import RunnableLambda
from langchain_core.tracers.run_collector import RunCollectorCallbackHandler
from langchain_grating import GratingRerank

from grating_core import Route

QUERY = "How many people live in Berlin?"


@pytest.fixture
def compressor(reranker):
    return GratingRerank(reranker=reranker, top_n=2)


@pytest.fixture
def compressing(compressor, retriever):
    return ContextualCompressionRetriever(base_compressor=compressor, base_retriever=retriever)


@pytest.mark.parametrize("asynchronous", [False, True])
async def test_a_child_of_the_retrievers_run(compressor, compressing, retriever, asynchronous):
    collector = RunCollectorCallbackHandler()
    config = {"callbacks": [collector]}
    found = await compressing.ainvoke(QUERY, config) if asynchronous else compressing.invoke(QUERY, config)
    (root,) = collector.traced_runs
    retrieving, step = root.child_runs
    assert (retrieving.run_type, step.name, step.run_type) == ("retriever", "GratingRerank", "chain")
    assert step.inputs == {"query": QUERY, "documents": retriever.invoke(QUERY)}
    assert step.outputs["documents"] == found
    assert step.extra["metadata"].items() >= {"model": compressor.model, "top_n": 2}.items()
    assert step.error is None
    trace = json.loads(json.dumps(step.outputs["trace"]))
    assert 0 < trace["compute_share"] <= 1
    assert (trace["candidates"], len(trace["alive"])) == (6, trace["depth"])
    assert trace["seconds"] > 0


@pytest.mark.parametrize("asynchronous", [False, True])
async def test_errors_are_reported(compressor, documents, asynchronous):
    compressing = ContextualCompressionRetriever(
        base_compressor=compressor, base_retriever=RunnableLambda(lambda _: [*documents, "text"])
    )
    collector = RunCollectorCallbackHandler()
    config = {"callbacks": [collector]}
    with pytest.raises(ValueError, match=r"documents\[8\]"):
        await compressing.ainvoke(QUERY, config) if asynchronous else compressing.invoke(QUERY, config)
    step = collector.traced_runs[0].child_runs[-1]
    assert step.name == "GratingRerank"
    assert "documents[8] is a str" in step.error
    assert not step.outputs


async def test_alone_and_inside_a_chain(compressor, documents):
    alone = RunCollectorCallbackHandler()
    compressor.compress_documents(documents, QUERY, callbacks=[alone])
    await compressor.acompress_documents(documents, QUERY, callbacks=[alone])
    assert [run.name for run in alone.traced_runs] == ["GratingRerank"] * 2

    inside = RunCollectorCallbackHandler()
    chain = RunnableLambda(lambda query: compressor.compress_documents(documents, query), name="chain")
    chain.invoke(QUERY, {"callbacks": [inside], "tags": ["mine"]})
    (root,) = inside.traced_runs
    assert [run.name for run in root.child_runs] == ["GratingRerank"]
    assert root.child_runs[0].tags == ["mine"]


async def test_in_the_stream_of_events(compressing):
    events = [event async for event in compressing.astream_events(QUERY, version="v2")]
    of_step = [event for event in events if event["name"] == "GratingRerank"]
    assert [of_step[0]["event"], of_step[-1]["event"]] == ["on_chain_start", "on_chain_end"]
    assert of_step[0]["parent_ids"] == [events[0]["run_id"]]
    assert of_step[-1]["data"]["output"]["trace"]["candidates"] == 6
    assert of_step[-1]["data"]["output"]["documents"] == events[-1]["data"]["output"]


class Waits:
    """Stands still after the first layer until it is let go."""

    def __init__(self):
        self.reached, self.go = threading.Event(), threading.Event()

    def route(self, layer, scores, top_k):
        self.reached.set()
        assert self.go.wait(30)
        return [Route.DEFERRED] * len(scores)


class Errors(BaseCallbackHandler):
    def __init__(self):
        self.seen = []

    def on_chain_error(self, error, **kwargs):
        self.seen.append(type(error))


async def test_cancelling_is_reported_and_harmless(model, documents):
    policy, errors = Waits(), Errors()
    compressor = GratingRerank(model=model, pruning=policy, top_n=2)
    task = asyncio.create_task(compressor.acompress_documents(documents, QUERY, callbacks=[errors]))
    assert await asyncio.to_thread(policy.reached.wait, 30)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert errors.seen == [asyncio.CancelledError]
    policy.go.set()
    again = await compressor.acompress_documents(documents, QUERY)
    assert again == GratingRerank(model=model, pruning="off", top_n=2).compress_documents(documents, QUERY)
