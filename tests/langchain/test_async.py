"""The event loop stays free, calls at the same time do not mix, and what streams goes on streaming."""

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from langchain_classic.retrievers import ContextualCompressionRetriever
from langchain_core.language_models import GenericFakeChatModel
from langchain_core.messages import AIMessage
from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.runnables import RunnablePassthrough
from langchain_grating import ChatGrating, GratingContextSelector, GratingRerank, GratingStore
from langgraph.store.memory import InMemoryStore

from grating_core import Route
from tests.adapters import Watched
from tests.tiny_chat import save_chat_model

QUERIES = [
    "How many people live in Berlin?",
    "What makes bread rise?",
    "Which river flows through Berlin?",
    "What is a city?",
    "How is sugar made from light?",
    "How many people live in New York?",
]


@pytest.fixture
def compressor(reranker):
    return GratingRerank(reranker=reranker, top_n=3)


@pytest.fixture
def compressing(compressor, retriever):
    return ContextualCompressionRetriever(base_compressor=compressor, base_retriever=retriever)


class AsksTheLoop:
    """Goes on after a layer only when the event loop has answered in the meantime."""

    def __init__(self):
        self.asked, self.answered, self.answers = threading.Event(), threading.Event(), []

    def route(self, layer, scores, top_k):
        self.asked.set()
        self.answers.append(self.answered.wait(30))
        self.answered.clear()
        return [Route.DEFERRED] * len(scores)

    async def answer(self):
        while True:
            if self.asked.is_set():
                self.asked.clear()
                self.answered.set()
            await asyncio.sleep(0.001)


async def test_the_event_loop_runs_while_it_reranks(model, documents, retriever):
    policy = AsksTheLoop()
    compressor = GratingRerank(model=model, pruning=policy)
    compressing = ContextualCompressionRetriever(base_compressor=compressor, base_retriever=retriever)
    loop_side = asyncio.create_task(policy.answer())
    await compressor.acompress_documents(documents, QUERIES[0])
    await compressing.ainvoke(QUERIES[0])
    loop_side.cancel()
    assert policy.answers == [True] * 22  # after each layer but the last of 12, twice


async def test_calls_at_the_same_time(compressor, compressing, documents):
    wanted = [compressor.compress_documents(documents, query) for query in QUERIES]
    assert len({ranked[0].id for ranked in wanted}) > 2
    together = await asyncio.gather(*(compressor.acompress_documents(documents, query) for query in QUERIES))
    assert together == wanted
    with ThreadPoolExecutor(6) as pool:
        assert list(pool.map(lambda query: compressor.compress_documents(documents, query), QUERIES)) == wanted
    one_by_one = [compressing.invoke(query) for query in QUERIES]
    assert await compressing.abatch(QUERIES) == one_by_one
    assert compressing.batch(QUERIES) == one_by_one


async def test_other_users_of_the_loops_threads_do_not_wait(reranker, documents, tmp_path):
    asyncio.get_running_loop().set_default_executor(watched := Watched())
    store = GratingStore(InMemoryStore(), reranker)
    await store.aput(("a",), "b", {"text": "Berlin"})
    llm = ChatGrating(model=str(save_chat_model(tmp_path)), max_tokens=5)
    assert await GratingRerank(reranker=reranker).acompress_documents(documents, QUERIES[0])
    assert await GratingContextSelector(reranker=reranker, max_tokens=30).acompress_documents(
        documents, QUERIES[0]
    )
    assert await store.asearch(("a",), query=QUERIES[0])
    assert (await llm.ainvoke("w1")).text
    assert len([chunk async for chunk in llm.astream("w1")]) > 3
    assert watched.given == []


async def test_a_retriever_streams(compressing):
    wanted = compressing.invoke(QUERIES[0])
    assert [chunk async for chunk in compressing.astream(QUERIES[0])] == [wanted]
    assert list(compressing.stream(QUERIES[0])) == [wanted]


async def test_a_chain_streams_the_answer(compressing):
    model = GenericFakeChatModel(messages=iter([AIMessage("3.7 million people live there.")]))
    prompt = ChatPromptTemplate.from_template("{context}\n\n{question}")
    chain = {"context": compressing, "question": RunnablePassthrough()} | prompt | model | StrOutputParser()
    chunks = [chunk async for chunk in chain.astream(QUERIES[0])]
    assert len(chunks) > 5
    assert "".join(chunks) == "3.7 million people live there."
