"""The store: the contract of LangGraph's stores, and what reranking adds to it."""

import asyncio
import importlib
import sys
from datetime import datetime
from typing import Annotated, TypedDict

import langchain_grating
import pytest
from langchain_core.messages import AIMessage
from langchain_core.tools import tool
from langchain_grating import GratingRerank, GratingStore
from langgraph.graph import START, MessagesState, StateGraph
from langgraph.prebuilt import InjectedStore, ToolNode
from langgraph.runtime import Runtime
from langgraph.store.base import (
    BaseStore,
    GetOp,
    InvalidNamespaceError,
    ListNamespacesOp,
    MatchCondition,
    PutOp,
    SearchOp,
)
from langgraph.store.memory import InMemoryStore
from langgraph.store.sqlite import AsyncSqliteStore, SqliteStore

from grating_core import Reranker, Route
from tests.langchain.conftest import TEXTS, HashedWords

QUERY = "How many people live in Berlin?"
ANN = ("memories", "ann")
INDEX = {"dims": 64, "embed": HashedWords(), "fields": ["text"]}


class WorstFirst:
    """After the first layer only as many go on as are wanted, and those are the ones that look worst."""

    def route(self, layer, scores, top_k):
        worst = set(sorted(range(len(scores)), key=lambda index: scores[index])[:top_k])
        return [Route.DEFERRED if index in worst else Route.DROPPED for index in range(len(scores))]


@pytest.fixture(scope="module")
def hasty():
    """A reranker that loses the best on the way."""
    with Reranker.from_pretrained("bundled:ms-marco-minilm-l12", pruning=WorstFirst()) as reranker:
        yield reranker


def fill(store, texts=TEXTS, namespace=ANN):
    for index, text in enumerate(texts):
        store.put(namespace, str(index), {"text": text, "number": index, "kind": "note" if index % 2 else "fact"})
    return store


def reranked(bare, reranker, **settings):
    return GratingStore(bare, reranker, **{"fields": ["text"], **settings})


def keys(items):
    return [item.key for item in items]


def found(items):
    return [(item.key, item.score) for item in items]


def expected(reranker, texts=TEXTS, top_k=10):
    """What the reranker itself says of texts whose keys are their numbers."""
    return [(str(ranked.index), ranked.probability) for ranked in reranker.rerank(QUERY, texts, top_k).ranking]


# The contract. Every store keeps it, whether reranked or not.


@pytest.fixture(params=["in memory", "indexed", "sqlite"])
def bare(request):
    if request.param == "sqlite":
        with SqliteStore.from_conn_string(":memory:") as store:
            store.setup()
            yield store
    else:
        yield InMemoryStore(index=INDEX if request.param == "indexed" else None)


@pytest.fixture(params=["bare", "reranked"])
def store(request, bare, reranker):
    return bare if request.param == "bare" else GratingStore(bare, reranker)


def test_put_get_overwrite_delete(store):
    assert store.get(ANN, "pet") is None
    store.put(ANN, "pet", {"text": "a dog"})
    first = store.get(ANN, "pet")
    assert (first.namespace, first.key, first.value) == (ANN, "pet", {"text": "a dog"})
    assert isinstance(first.created_at, datetime)
    store.put(ANN, "pet", {"text": "a dog called Rex", "tags": ["寿司", {"ü": None}]})
    assert store.get(ANN, "pet").value == {"text": "a dog called Rex", "tags": ["寿司", {"ü": None}]}
    store.put(("memories", "bob"), "pet", {"text": "a cat"})
    store.delete(ANN, "pet")
    assert store.get(ANN, "pet") is None
    assert store.get(("memories", "bob"), "pet").value == {"text": "a cat"}
    store.delete(ANN, "never there")


@pytest.mark.parametrize("index", [None, INDEX])
async def test_the_same_for_asyncio(reranker, index):  # SqliteStore has no asynchronous methods
    for store in (InMemoryStore(index=index), GratingStore(InMemoryStore(index=index), reranker)):
        await store.aput(ANN, "pet", {"text": "a dog"})
        assert (await store.aget(ANN, "pet")).value == {"text": "a dog"}
        assert keys(await store.asearch(("memories",))) == ["pet"]
        assert keys(await store.asearch(("memories",), query="Which pet?")) == ["pet"]
        assert await store.alist_namespaces() == [ANN]
        await store.adelete(ANN, "pet")
        assert await store.aget(ANN, "pet") is None
        assert await store.asearch((), query="Which pet?") == []


@pytest.mark.parametrize("namespace", [(), ("langgraph", "x"), ("a.b",), ("a", ""), ("a", 1)])
def test_bad_namespaces_are_refused(store, namespace):
    with pytest.raises(InvalidNamespaceError):
        store.put(namespace, "key", {"text": "x"})


def test_lists_namespaces(store):
    for namespace in [("a", "b", "c"), ("a", "b", "d", "e"), ("a", "x", "c"), ("z",)]:
        store.put(namespace, "key", {"text": "x"})
    assert store.list_namespaces() == [("a", "b", "c"), ("a", "b", "d", "e"), ("a", "x", "c"), ("z",)]
    assert store.list_namespaces(prefix=("a", "b")) == [("a", "b", "c"), ("a", "b", "d", "e")]
    assert store.list_namespaces(prefix=("a", "*", "c")) == [("a", "b", "c"), ("a", "x", "c")]
    assert store.list_namespaces(suffix=("c",), prefix=("a", "x")) == [("a", "x", "c")]
    assert store.list_namespaces(max_depth=2) == [("a", "b"), ("a", "x"), ("z",)]
    assert store.list_namespaces(limit=2, offset=1) == [("a", "b", "d", "e"), ("a", "x", "c")]


@pytest.mark.parametrize("query", [None, QUERY])
def test_search_keeps_to_filters_and_namespaces(store, query):
    fill(store)
    fill(store, ["Ann lives in Berlin.", "Bob does not."], namespace=(*ANN, "work"))
    fill(store, ["Bob lives in Berlin."], namespace=("memories", "bob"))

    def search(prefix, **arguments):
        items = store.search(prefix, query=query, limit=100, **arguments)
        assert all(item.namespace[: len(prefix)] == prefix for item in items)
        return sorted((*item.namespace[1:], item.key) for item in items)

    assert len(search(())) == 11
    assert len(search(ANN)) == 10
    assert search((*ANN, "work")) == [("ann", "work", "0"), ("ann", "work", "1")]
    assert search(("nobody",)) == []
    assert search(ANN, filter={"kind": "note", "number": {"$gt": 3}}) == [("ann", "5"), ("ann", "7")]
    assert search(("memories",), filter={"number": {"$lt": 1}}) == [
        ("ann", "0"),
        ("ann", "work", "0"),
        ("bob", "0"),
    ]
    assert search(ANN, filter={"kind": "dream"}) == []


@pytest.mark.parametrize("query", [None, "", QUERY])
@pytest.mark.parametrize("limit", [2, 3, 20])
def test_pages_fit_together(store, query, limit):
    fill(store)
    pages = [store.search(ANN, query=query, limit=limit, offset=offset) for offset in range(0, 12, limit)]
    assert all(len(page) <= limit for page in pages)
    assert sorted(key for page in pages for key in keys(page)) == list("01234567")
    assert pages[0] == store.search(ANN, query=query, limit=limit)
    assert store.search(ANN, query=query, limit=limit, offset=100) == []


def test_a_batch_of_everything(store):
    fill(store)
    ops = (
        op
        for op in [
            SearchOp(ANN, query=QUERY, limit=2),
            GetOp(ANN, "3"),
            PutOp(("other",), "new", {"text": "new"}),
            SearchOp(ANN, filter={"kind": "note"}),
            ListNamespacesOp(match_conditions=(MatchCondition("prefix", ("memories",)),)),
            PutOp(("memories", "gone"), "never there", None),
            SearchOp(ANN, query="What makes bread rise?", limit=1, filter={"kind": "note"}),
            GetOp(ANN, "missing"),
        ]
    )
    by_query, got, put, by_filter, namespaces, deleted, narrowed, missing = store.batch(ops)
    assert len(by_query) == 2
    assert got.value["text"] == TEXTS[3]
    assert sorted(keys(by_filter)) == ["1", "3", "5", "7"]
    assert namespaces == [ANN]
    assert [item.value["kind"] for item in narrowed] == ["note"]
    assert (put, deleted, missing) == (None, None, None)
    assert store.get(("other",), "new").value == {"text": "new"}
    assert store.batch([]) == []


# What reranking adds.


@pytest.mark.parametrize("limit", [1, 3, 8, 100])
def test_ranks_as_the_reranker_does(bare, reranker, limit):
    store = reranked(fill(bare), reranker)
    candidates = bare.search(ANN, query=QUERY, limit=50)
    ranking = reranker.rerank(QUERY, [item.value["text"] for item in candidates], limit).ranking
    items = store.search(ANN, query=QUERY, limit=limit)
    assert found(items) == [(candidates[ranked.index].key, ranked.probability) for ranked in ranking]
    assert items[0].key == "0"
    assert items[0].value == bare.get(ANN, "0").value
    assert items[0].updated_at == bare.get(ANN, "0").updated_at


@pytest.mark.parametrize("index", [None, INDEX])
async def test_async_equals_sync(reranker, index):
    store = GratingStore(fill(InMemoryStore(index=index)), reranker)
    queries = [QUERY, "What makes bread rise?", "Which river flows through Berlin?"]
    wanted = [store.search(ANN, query=query, limit=2) for query in queries]
    assert [page[0].key for page in wanted] == ["0", "3", "6"]
    assert await asyncio.gather(*(store.asearch(ANN, query=query, limit=2) for query in queries)) == wanted
    ops = [SearchOp(ANN, query=query, limit=2) for query in queries]
    assert await store.abatch(iter(ops)) == store.batch(ops) == wanted


async def test_asearch_leaves_the_event_loop_free(reranker):
    store = GratingStore(fill(InMemoryStore(), [" ".join(TEXTS)] * 20), reranker)
    beats = 0

    async def beat():
        nonlocal beats
        while True:
            await asyncio.sleep(0.005)
            beats += 1

    heart = asyncio.create_task(beat())
    await store.asearch(ANN, query=QUERY)
    heart.cancel()
    assert beats > 5


async def test_over_an_asynchronous_store(reranker):
    async with AsyncSqliteStore.from_conn_string(":memory:") as bare:
        store = GratingStore(bare, reranker)
        await asyncio.gather(*(store.aput(ANN, str(i), {"text": text}) for i, text in enumerate(TEXTS)))
        assert (await store.asearch(ANN, query=QUERY, limit=1))[0].key == "0"
        assert (await asyncio.to_thread(store.search, ANN, query=QUERY, limit=1))[0].key == "0"
        with pytest.raises(asyncio.InvalidStateError, match="main event loop"):
            store.search(ANN, query=QUERY)


@pytest.mark.parametrize("query", [None, "", " \n", "\t"])
def test_without_a_query_the_wrapped_stores_answer_is_left_alone(reranker, query):
    bare = fill(InMemoryStore(index={**INDEX, "embed": lambda texts: [[len(text), 1.0] for text in texts]}))
    store = GratingStore(bare, reranker)
    for page in ({}, {"limit": 3, "offset": 2}, {"filter": {"kind": "note"}}):
        assert found(store.search(ANN, query=query, **page)) == found(bare.search(ANN, query=query, **page))
    assert store.search(ANN, query=QUERY, limit=0) == bare.search(ANN, query=QUERY, limit=0)


@pytest.mark.parametrize("limit", [1, 2, 3, 5])
def test_pages_fit_together_whatever_is_pruned(hasty, limit):
    store = reranked(fill(InMemoryStore()), hasty)
    assert expected(hasty, top_k=2) != expected(hasty, top_k=4)[:2]  # so that a larger top_k would not do
    pages = [store.search(ANN, query=QUERY, limit=limit, offset=offset) for offset in range(0, 8, limit)]
    assert found(pages[0]) == expected(hasty, top_k=limit)
    assert sorted(key for page in pages for key in keys(page)) == list("01234567")


def test_what_lies_beyond_the_candidates_keeps_its_order(reranker):
    bare = fill(InMemoryStore(index=INDEX))
    store = GratingStore(bare, reranker, candidates=3)
    near = bare.search(ANN, query=QUERY, limit=8)
    ranking = reranker.rerank(QUERY, [item.value["text"] for item in near[:3]]).ranking
    wanted = [(near[ranked.index].key, ranked.probability) for ranked in ranking]
    wanted += [(item.key, None) for item in near[3:]]
    assert found(store.search(ANN, query=QUERY, limit=8)) == wanted
    for limit in (1, 2, 3, 4):
        pages = [store.search(ANN, query=QUERY, limit=limit, offset=offset) for offset in range(0, 8, limit)]
        assert [key for page in pages for key in keys(page)] == [key for key, _ in wanted]


def test_items_kept_out_of_the_index_stay_behind(reranker):
    bare = fill(InMemoryStore(index=INDEX))
    bare.put(ANN, "secret", {"text": TEXTS[0]}, index=False)
    bare.put(ANN, "secret too", {"text": TEXTS[0]}, index=False)
    store = GratingStore(bare, reranker)
    items = store.search(ANN, query=QUERY)
    assert keys(items)[:8] == [key for key, _ in expected(reranker)]
    assert found(items)[8:] == [("secret", None), ("secret too", None)]
    pages = [store.search(ANN, query=QUERY, limit=3, offset=offset) for offset in (0, 3, 6, 9)]
    assert [key for page in pages for key in keys(page)] == keys(items)


def test_items_without_text_come_last(reranker):
    bare = InMemoryStore()
    for index, value in enumerate(
        [{}, {"age": 42}, {"text": " "}, {"text": None, "tags": []}, {"text": TEXTS[0]}]
    ):
        bare.put(ANN, str(index), value)
    items = GratingStore(bare, reranker).search(ANN, query=QUERY)
    assert keys(items) == list("40123")
    assert [item.score is None for item in items] == [False, True, True, True, True]
    bare.delete(ANN, "4")
    assert found(GratingStore(bare, reranker).search(ANN, query=QUERY)) == [(key, None) for key in "0123"]


def judged(reranker, value, text, **settings):
    """Whether a value is judged as this text."""
    bare = settings.pop("bare", None) or InMemoryStore()
    bare.put(ANN, "key", value, **settings.pop("put", {}))
    (item,) = GratingStore(bare, reranker, **settings).search(ANN, query=QUERY)
    return item.score == reranker.probability(*reranker.score([(QUERY, text)]))


def test_judges_the_text_and_not_the_json_around_it(reranker):
    value = {
        "kind": "Memory",
        "when": 2024,
        "content": {
            "title": "Berlin",
            "turns": [{"say": "3.7 million", "by": "Ann"}, {"say": "people", "by": "Bob"}],
        },
    }
    assert judged(reranker, value, "Memory\nBerlin\n3.7 million\nAnn\npeople\nBob")
    assert judged(reranker, value, "Memory\nBerlin\n3.7 million\nAnn\npeople\nBob", fields=["$"])
    assert judged(reranker, value, "Berlin", fields=["content.title"])
    assert judged(reranker, value, "3.7 million\npeople", fields=["content.turns[*].say"])
    assert judged(
        reranker, value, "people\nBerlin\n2024", fields=["content.turns[-1].say", "content.title", "when"]
    )
    # LangGraph sorts the keys of an object that a path leads to.
    assert judged(reranker, value, "Berlin\nAnn\n3.7 million\nBob\npeople", fields=["content"])
    assert judged(reranker, value, "Berlin", fields=["nowhere", "content.title"])
    for text in ('["Berlin", 3]', '{"city": "Berlin"}', "[", '"Berlin"', "{}"):
        assert judged(reranker, {"text": text}, text, fields=["text"]), "a text is text, whatever it looks like"
    assert judged(reranker, {"text": '["Berlin" is no JSON'}, '["Berlin" is no JSON', fields=["text"])


def test_judges_the_fields_that_the_wrapped_store_indexes(reranker):
    value = {"text": "People live in Berlin.", "source": "a book"}
    assert GratingStore(InMemoryStore(index=INDEX), reranker).fields == ["text"]
    assert judged(reranker, value, "People live in Berlin.", bare=InMemoryStore(index=INDEX))
    assert judged(reranker, value, "a book", bare=InMemoryStore(index=INDEX), fields=["source"])
    whole = {"dims": 64, "embed": HashedWords()}
    assert judged(reranker, value, "People live in Berlin.\na book", bare=InMemoryStore(index=whole))
    # This item was indexed by another field than the store's.
    put = {"index": ["note"]}
    assert judged(reranker, {"note": "In Berlin."}, "In Berlin.", bare=InMemoryStore(index=INDEX), put=put)


@pytest.mark.parametrize("fields", [["text"], ["$"], ["deep"]])
def test_however_deep_a_memory_is_nested(reranker, fields):
    """One such memory must not end every search of its namespace."""
    deep = "Berlin"
    for level in range(100_000):
        deep = [deep] if level % 2 else {"in": deep}
    bare = InMemoryStore()
    bare.put(ANN, "brackets", {"text": "[" * 100_000})
    bare.put(ANN, "braces", {"text": '{"a":' * 100_000})
    bare.put(ANN, "deep", {"deep": deep})
    bare.put(ANN, "pet", {"text": "How many people live in Berlin is counted."})
    found = GratingStore(bare, reranker, fields=fields).search(ANN, query=QUERY)
    assert sorted(item.key for item in found) == ["braces", "brackets", "deep", "pet"]
    assert {item.key: item.score is not None for item in found} == dict.fromkeys(
        ["braces", "brackets", "deep", "pet"], True
    )


def test_what_is_found_is_the_callers(reranker):
    bare = InMemoryStore()
    bare.put(ANN, "pet", {"text": "Rex", "tags": [["dog"]]})
    store = GratingStore(bare, reranker)
    store.search(ANN, query=QUERY)[0].value["tags"][0].append("cat")
    assert bare.get(ANN, "pet").value == {"text": "Rex", "tags": [["dog"]]}


def test_the_wrapped_stores_items_are_left_alone(reranker):
    class Remembering(InMemoryStore):
        def batch(self, ops):
            self.results = super().batch(ops)
            return self.results

    bare = fill(Remembering(index=INDEX))
    items = GratingStore(bare, reranker).search(ANN, query=QUERY)
    (candidates,) = bare.results
    scores = {item.key: item.score for item in items}
    assert all(item.score != scores[item.key] for item in candidates)


def test_only_what_is_returned_lives_on(reranker):
    config = {"default_ttl": 10, "refresh_on_read": True}
    with SqliteStore.from_conn_string(":memory:", ttl=config) as bare:
        bare.setup()
        store = fill(reranked(bare, reranker))
        assert store.supports_ttl
        assert store.ttl_config == config

        def refreshed(**arguments):
            bare.conn.execute("UPDATE store SET expires_at = '2100-01-01 00:00:00'")
            store.search(ANN, query=QUERY, limit=2, **arguments)
            rows = bare.conn.execute("SELECT key FROM store WHERE expires_at <> '2100-01-01 00:00:00'")
            return sorted(key for (key,) in rows)

        best = sorted(keys(store.search(ANN, query=QUERY, limit=2)))
        assert refreshed() == best
        assert refreshed(refresh_ttl=True) == best
        assert refreshed(refresh_ttl=False) == []


async def test_a_store_without_ttl_refuses_one(reranker):
    store = GratingStore(InMemoryStore(), reranker)
    with pytest.raises(NotImplementedError, match="TTL"):
        store.put(ANN, "key", {"text": "x"}, ttl=5)
    with pytest.raises(NotImplementedError, match="TTL"):
        await store.aput(ANN, "key", {"text": "x"}, ttl=5)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("store", {}),
        ("reranker", InMemoryStore()),
        ("candidates", 0),
        ("candidates", "many"),
        ("fields", "text"),
    ],
)
def test_bad_arguments_are_named(reranker, name, value):
    arguments = {"store": InMemoryStore(), "reranker": reranker, name: value}
    with pytest.raises(ValueError, match=f"^{name}="):
        GratingStore(**arguments)


def test_a_models_name_is_enough(model):
    store = GratingStore(InMemoryStore(), model)
    assert store.reranker is GratingStore(InMemoryStore(), model).reranker
    default = GratingStore.__init__.__defaults__[0]
    assert default == GratingRerank.model_fields["model"].default


def test_the_package_does_without_langgraph(monkeypatch):
    monkeypatch.setitem(sys.modules, "langgraph.store.base", None)
    monkeypatch.delitem(sys.modules, "langchain_grating.store")
    importlib.reload(langchain_grating)
    with pytest.raises(ImportError, match=r"pip install \"langchain-grating\[langgraph\]\""):
        langchain_grating.GratingStore  # noqa: B018
    with pytest.raises(AttributeError, match="GratingShop"):
        langchain_grating.GratingShop  # noqa: B018


# Inside LangGraph.


class State(TypedDict, total=False):
    question: str
    memories: list[str]


async def test_in_a_graph(reranker):
    def remember(state: State, runtime: Runtime) -> State:
        items = runtime.store.search(ANN, query=state["question"], limit=2)
        return {"memories": keys(items)}

    async def aremember(state: State, runtime: Runtime) -> State:
        items = await runtime.store.asearch(ANN, query=state["question"], limit=2)
        return {"memories": keys(items)}

    store = fill(GratingStore(InMemoryStore(index=INDEX), reranker))
    for node in (remember, aremember):
        builder = StateGraph(State)
        builder.add_node("remember", node)
        builder.add_edge(START, "remember")
        graph = builder.compile(store=store)
        answers = await asyncio.gather(
            graph.ainvoke({"question": QUERY}), graph.ainvoke({"question": "What makes bread rise?"})
        )
        assert answers[0]["memories"] == [key for key, _ in expected(reranker, top_k=2)]
        assert answers[1]["memories"][0] == "3"


def test_in_an_agents_tool(reranker):
    @tool
    def recall(query: str, store: Annotated[BaseStore, InjectedStore()]) -> str:
        """Look into the memory."""
        return store.search(ANN, query=query, limit=1)[0].value["text"]

    builder = StateGraph(MessagesState)
    builder.add_node("tools", ToolNode([recall]))
    builder.add_edge(START, "tools")
    graph = builder.compile(store=fill(GratingStore(InMemoryStore(), reranker)))
    call = {"name": "recall", "args": {"query": "What makes bread rise?"}, "id": "1"}
    answer = graph.invoke({"messages": [AIMessage("", tool_calls=[call])]})
    assert answer["messages"][-1].content == TEXTS[3]


def test_of_a_long_query_the_end_is_used(reranker):
    store = GratingStore(InMemoryStore(), reranker)
    store.put(("a",), "city", {"text": "Berlin has 3.7 million people."})
    store.put(("a",), "bread", {"text": "Bread rises because of yeast."})
    found = store.search(("a",), query="Much was said before that. " * 200 + "Why does bread rise?")
    assert [item.key for item in found] == ["bread", "city"]
