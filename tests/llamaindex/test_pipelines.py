"""Inside what LlamaIndex builds around a postprocessor: streaming, chat, workflows; and many at once."""

import asyncio
import threading

import pytest
from llama_index.core.instrumentation.events.rerank import ReRankEndEvent, ReRankStartEvent
from llama_index.core.llms import ChatMessage, MockLLM
from llama_index.core.query_engine import RetrieverQueryEngine
from llama_index.core.schema import NodeWithScore
from llama_index.core.workflow import Context, Event, StartEvent, StopEvent, Workflow, step
from llama_index.llms.grating import GratingLLM
from llama_index.postprocessor.grating import GratingContextSelector, GratingRerank

from grating_core import Route
from tests.adapters import Watched
from tests.tiny_chat import save_chat_model

QUERY = "How many people live in Berlin?"
QUERIES = [QUERY, "What makes bread rise?", "Where does the Spree go?", "How is a census done?"]


@pytest.fixture(scope="module")
def postprocessor(reranker):
    return GratingRerank(reranker=reranker)


@pytest.fixture
def wanted(reranker, index):
    """The texts that a pipeline is to end with."""
    texts = [node.text for node in index.as_retriever(similarity_top_k=6).retrieve(QUERY)]
    return [ranked.text for ranked in reranker.rerank(QUERY, texts, 3).ranking]


def texts_of(response):
    return [node.text for node in response.source_nodes]


async def test_a_streaming_query_engine(index, postprocessor, wanted):
    engine = RetrieverQueryEngine.from_args(
        index.as_retriever(similarity_top_k=6),
        llm=MockLLM(),
        node_postprocessors=[postprocessor],
        streaming=True,
    )
    response = engine.query(QUERY)
    told = "".join(response.response_gen)
    assert sorted(wanted, key=told.index) == texts_of(response) == wanted

    response = await engine.aquery(QUERY)
    told = "".join([token async for token in response.async_response_gen()])
    assert sorted(wanted, key=told.index) == texts_of(response) == wanted


@pytest.mark.parametrize("mode", ["context", "condense_plus_context"])
async def test_a_streaming_chat_engine(index, postprocessor, wanted, mode):
    def engine():
        return index.as_chat_engine(
            chat_mode=mode, llm=MockLLM(), similarity_top_k=6, node_postprocessors=[postprocessor]
        )

    response = engine().stream_chat(QUERY)
    told = "".join(response.response_gen)
    assert sorted(wanted, key=told.index) == texts_of(response) == wanted

    response = await engine().astream_chat(QUERY)
    told = "".join([token async for token in response.async_response_gen()])
    assert sorted(wanted, key=told.index) == texts_of(response) == wanted


class Retrieved(Event):
    nodes: list[NodeWithScore]


class RetrieveAndRerank(Workflow):
    """As in LlamaIndex's own example: the reranker is kept in the context's store."""

    @step
    async def retrieve(self, ctx: Context, event: StartEvent) -> Retrieved:
        await ctx.store.set("query", event.query)
        await ctx.store.set("reranker", event.reranker)
        return Retrieved(nodes=await event.retriever.aretrieve(event.query))

    @step
    async def rerank(self, ctx: Context, event: Retrieved) -> StopEvent:
        reranker = await ctx.store.get("reranker")
        query = await ctx.store.get("query")
        return StopEvent(result=await reranker.apostprocess_nodes(event.nodes, query_str=query))


async def test_a_workflow_and_its_context(index, model, wanted):
    postprocessor = GratingRerank(model=model)
    workflow = RetrieveAndRerank()
    handler = workflow.run(query=QUERY, reranker=postprocessor, retriever=index.as_retriever(similarity_top_k=6))
    assert [node.text for node in await handler] == wanted
    again = Context.from_dict(workflow, handler.ctx.to_dict())
    assert (await again.store.get("reranker")).reranker is postprocessor.reranker


class Waits:
    """A policy that computes on only when told to."""

    def __init__(self):
        self.reached, self.go = threading.Event(), threading.Event()

    def route(self, layer, scores, top_k):
        self.reached.set()
        assert self.go.wait(60), "the event loop stood still"
        return [Route.DEFERRED] * len(scores)


async def test_the_event_loop_goes_on(model, nodes):
    policy = Waits()
    postprocessor = GratingRerank(model=model, pruning=policy)
    task = asyncio.create_task(postprocessor.apostprocess_nodes(nodes, query_str=QUERY))
    while not policy.reached.is_set():
        await asyncio.sleep(0.001)
    assert not task.done()
    policy.go.set()
    assert len(await task) == 3


async def test_other_users_of_the_loops_threads_do_not_wait(reranker, nodes, tmp_path):
    asyncio.get_running_loop().set_default_executor(watched := Watched())
    llm = GratingLLM(model=str(save_chat_model(tmp_path)), max_tokens=5)
    assert await GratingRerank(reranker=reranker).apostprocess_nodes(nodes, query_str="How many people?")
    selector = GratingContextSelector(reranker=reranker, max_tokens=30)
    assert await selector.apostprocess_nodes(nodes, query_str="How many people?")
    assert (await llm.acomplete("w1")).text
    assert (await llm.achat([ChatMessage("w1")])).message.content
    assert len([response async for response in await llm.astream_chat([ChatMessage("w1")])]) > 3
    assert watched.given == []


async def test_many_at_once(reranker, postprocessor, nodes, events):
    alone = [postprocessor.postprocess_nodes(nodes, query_str=query) for query in QUERIES]
    assert len({found[0].node_id for found in alone}) == len(QUERIES)
    events.clear()
    together = await asyncio.gather(
        *(postprocessor.apostprocess_nodes(nodes, query_str=query) for query in QUERIES * 2)
    )
    assert together == alone * 2
    ends = {event.span_id: event for event in events if isinstance(event, ReRankEndEvent)}
    assert len(ends) == len(together)
    for start in [event for event in events if isinstance(event, ReRankStartEvent)]:
        assert ends[start.span_id].nodes == alone[QUERIES.index(start.query.query_str)]


async def test_a_cancelled_task_ends_its_span(model, nodes, events, spans):
    policy = Waits()
    postprocessor = GratingRerank(model=model, pruning=policy)
    task = asyncio.create_task(postprocessor.apostprocess_nodes(nodes, query_str=QUERY))
    while not policy.reached.is_set():
        await asyncio.sleep(0.001)
    task.cancel()
    policy.go.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    (start,) = events
    assert [span.id_ for span in spans.dropped_spans] == [start.span_id]
    assert not spans.open_spans


def test_in_threads(model, nodes):
    """Query engines may be asked from several threads."""
    postprocessor = GratingRerank(model=model)
    alone = [postprocessor.postprocess_nodes(nodes, query_str=query) for query in QUERIES]
    found = {}

    def ask(number):
        found[number] = postprocessor.postprocess_nodes(nodes, query_str=QUERIES[number])

    threads = [threading.Thread(target=ask, args=[number]) for number in range(len(QUERIES))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[number] for number in range(len(QUERIES))] == alone


@pytest.mark.slow
async def test_real_text_comes_out_of_a_query_engine(smollm2, reranker, index):
    llm = GratingLLM(model=smollm2, max_tokens=24)
    parts = {"llm": llm, "node_postprocessors": [GratingRerank(reranker=reranker, top_n=1)]}
    retriever = index.as_retriever(similarity_top_k=6)
    question = "How many people live in Berlin?"
    engine = RetrieverQueryEngine.from_args(retriever, **parts)
    answer = str(engine.query(question))
    assert "3.7 million" in answer
    assert str(await engine.aquery(question)) == answer
    streaming = RetrieverQueryEngine.from_args(retriever, streaming=True, **parts)
    pieces = list(streaming.query(question).response_gen)
    assert len(pieces) > 5
    assert "".join(pieces) == answer
