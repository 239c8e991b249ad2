"""The context selector, alone, in a retriever and in a chain."""

from copy import deepcopy
from pydoc_data.topics import topics

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from langchain_classic.retrievers import ContextualCompressionRetriever
from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.documents import Document
from langchain_core.runnables import RunnableParallel, RunnablePassthrough
from langchain_grating import GratingContextSelector
from langchain_text_splitters import RecursiveCharacterTextSplitter
from pydantic_core import PydanticSerializationError

from grating_core import select_context
from tests.adapters import BAD_SELECTING

QUERY = "How many people live in Berlin?"
ANSWER = "Berlin had a population of 3,520,031 registered inhabitants in 2015."
FILLER = topics["assignment"]


@pytest.fixture
def long_documents():
    text = f"{FILLER[:2000]}\n\n{ANSWER}\n\n{FILLER[2000:4000]}"
    return [
        Document(FILLER[4000:6000], id="a", metadata={"source": "a.txt", "tags": [1]}),
        Document(text, id="b", metadata={"source": "b.txt", "tags": [2]}),
        Document(ANSWER, id="c", metadata={"source": "c.txt", "tags": [3]}),
    ]


def found(documents):
    return [(document.metadata["source"], document.metadata["start_index"]) for document in documents]


def test_selects_as_the_function_does(reranker, long_documents):
    before = deepcopy(long_documents)
    selector = GratingContextSelector(reranker=reranker, max_tokens=150, chunk_tokens=50)
    passages = selector.compress_documents(long_documents, QUERY)
    wanted = select_context(
        QUERY, [d.page_content for d in before], reranker=reranker, max_tokens=150, chunk_tokens=50
    )
    assert [document.page_content for document in passages] == [passage.text for passage in wanted]
    assert [document.metadata["relevance_score"] for document in passages] == [p.probability for p in wanted]
    for document in passages:
        (original,) = [d for d in before if d.metadata["source"] == document.metadata["source"]]
        start = document.metadata["start_index"]
        assert original.page_content[start:].startswith(document.page_content)
        assert document.metadata["tags"] == original.metadata["tags"]
        assert document.id == (original.id if document.page_content == original.page_content else None)
    assert ("c.txt", 0) in found(passages)
    assert long_documents == before
    assert len({document.id for document in passages}) > 1, "whole documents and parts"


@settings(max_examples=12, deadline=None)
@given(parts=st.lists(st.sampled_from([ANSWER, FILLER[:100], "\n\n", "🦜", "Berlin. "]), max_size=12),
       max_tokens=st.integers(1, 60))  # fmt: skip
def test_never_more_than_the_budget(reranker, parts, max_tokens):
    selector = GratingContextSelector(reranker=reranker, max_tokens=max_tokens, chunk_tokens=30, count_tokens=len)
    documents = [Document("".join(parts[:6])), Document("".join(parts[6:]))]
    passages = selector.compress_documents(documents, QUERY)
    assert len("\n\n".join(document.page_content for document in passages)) <= max_tokens


def test_what_fits_comes_back_with_what_was_known_of_it(reranker, long_documents):
    long_documents[0].metadata["relevance_score"] = 7.0
    selector = GratingContextSelector(reranker=reranker, max_tokens=5000)
    passages = selector.compress_documents([*long_documents, Document(" ")], QUERY)
    assert passages == [
        document.model_copy(update={"metadata": {**document.metadata, "start_index": 0}})
        for document in long_documents
    ]


def test_positions_are_those_in_the_document_that_was_split_before(reranker):
    text = f"{FILLER[:3000]}\n\n{ANSWER}\n\n{FILLER[3000:5000]}"
    splitter = RecursiveCharacterTextSplitter(chunk_size=1500, chunk_overlap=0, add_start_index=True)
    documents = splitter.create_documents([text])
    (passage,) = GratingContextSelector(
        reranker=reranker, max_tokens=16, chunk_tokens=16
    ).compress_documents(documents, QUERY)  # fmt: skip
    assert passage.page_content == ANSWER
    assert text[passage.metadata["start_index"] :].startswith(ANSWER)


@pytest.mark.parametrize("place", [None, "7", 7.0, -7, True, [7]])
def test_what_is_no_position_is_not_taken_for_one(reranker, long_documents, place):
    selector = GratingContextSelector(reranker=reranker, max_tokens=30, chunk_tokens=30)
    wanted = found(selector.compress_documents(long_documents[1:2], QUERY))
    long_documents[1].metadata["start_index"] = place
    assert found(selector.compress_documents(long_documents[1:2], QUERY)) == wanted
    long_documents[1].metadata["start_index"] = np.int64(7)
    assert found(selector.compress_documents(long_documents[1:2], QUERY))[0][1] == wanted[0][1] + 7


class Marked(Document):
    mark: str = ""


def test_a_class_of_ones_own_is_kept_and_nested_metadata_is_copied(reranker, long_documents):
    document = Marked(page_content=long_documents[1].page_content, mark="w", metadata={"tags": [[1]]})
    selector = GratingContextSelector(reranker=reranker, max_tokens=16, chunk_tokens=16)
    (passage,) = selector.compress_documents([document], QUERY)
    assert (type(passage), passage.mark, passage.id) == (Marked, "w", None)
    passage.metadata["tags"][0].append(2)
    assert document.metadata == {"tags": [[1]]}


async def test_a_blank_query_takes_what_comes_first(reranker, long_documents):
    selector = GratingContextSelector(reranker=reranker, max_tokens=100, chunk_tokens=30)
    (passage,) = kept = selector.compress_documents(long_documents, " ")
    assert await selector.acompress_documents(long_documents, "") == kept
    assert found(kept) == [("a.txt", 0)]
    assert long_documents[0].page_content.startswith(passage.page_content)
    assert 60 < reranker.count_tokens(passage.page_content) <= 100
    assert "relevance_score" not in passage.metadata


def test_of_a_long_query_the_end_is_used(reranker, long_documents):
    selector = GratingContextSelector(reranker=reranker, max_tokens=40, chunk_tokens=40)
    long = f"{FILLER[:3000]} {QUERY * 50}"
    kept = selector.compress_documents(long_documents[2:] + long_documents[:1], long)
    assert kept == selector.compress_documents(long_documents[2:] + long_documents[:1], reranker.tail(long))
    assert any(ANSWER in passage.page_content for passage in kept)


def test_a_token_counter_of_ones_own(model, long_documents):
    selector = GratingContextSelector(model=model, max_tokens=200, count_tokens=len)
    passages = selector.compress_documents(long_documents, QUERY)
    assert ANSWER in [document.page_content for document in passages]
    assert sum(len(document.page_content) for document in passages) <= 200


async def test_in_a_contextual_compression_retriever(reranker, long_documents, retriever):
    selector = GratingContextSelector(reranker=reranker, max_tokens=20)
    compressing = ContextualCompressionRetriever(base_compressor=selector, base_retriever=retriever)
    (kept,) = compressing.invoke(QUERY)
    assert kept.page_content.startswith("Berlin has a population")
    assert await compressing.ainvoke(QUERY) == [kept]


async def test_in_a_chain(reranker, retriever):
    selector = GratingContextSelector(reranker=reranker, max_tokens=20)
    chain = RunnableParallel(documents=retriever, query=RunnablePassthrough()) | selector.as_runnable()
    wanted = selector.compress_documents(retriever.invoke(QUERY), QUERY)
    assert chain.invoke(QUERY) == wanted
    assert await chain.ainvoke(QUERY) == wanted
    assert chain.batch([QUERY, QUERY]) == [wanted, wanted]
    assert [part async for part in chain.astream(QUERY)] == [wanted]


def test_a_long_text_needs_no_documents(reranker):
    selector = GratingContextSelector(reranker=reranker, max_tokens=16, chunk_tokens=16)
    text = f"{FILLER[:2000]}\n\n{ANSWER}"
    (passage,) = selector.as_runnable().invoke({"documents": text, "query": QUERY})
    assert passage.page_content == ANSWER
    assert passage.metadata.keys() == {"start_index", "relevance_score"}


async def test_callbacks_see_a_step(reranker, long_documents):
    class Runs(BaseCallbackHandler):
        def __init__(self):
            self.ended = []

        def on_chain_start(self, serialized, inputs, *, name=None, **kwargs):
            self.ended.append((name, inputs["query"]))

        def on_chain_end(self, outputs, **kwargs):
            self.ended.append(outputs)

    selector = GratingContextSelector(reranker=reranker, max_tokens=50)
    for runs, asynchronous in ((Runs(), False), (Runs(), True)):
        if asynchronous:
            passages = await selector.acompress_documents(long_documents, QUERY, callbacks=[runs])
        else:
            passages = selector.compress_documents(long_documents, QUERY, callbacks=[runs])
        assert runs.ended == [("GratingContextSelector", QUERY), passages]


@pytest.mark.parametrize(("name", "value"), BAD_SELECTING)
def test_bad_arguments_are_named(reranker, name, value):
    with pytest.raises(ValueError, match=rf"(?m)^{name}$"):
        GratingContextSelector(reranker=reranker, **({"max_tokens": 10} | {name: value}))


def test_a_budget_has_to_be_given_and_a_query_too(reranker, long_documents):
    with pytest.raises(ValueError, match="max_tokens"):
        GratingContextSelector(reranker=reranker)
    with pytest.raises(ValueError, match="query=None"):
        GratingContextSelector(reranker=reranker, max_tokens=10).compress_documents(long_documents, None)


def test_settings_of_the_model(model):
    selector = GratingContextSelector(model=model, max_tokens=10, dtype="float32")
    assert str(selector.reranker.dtype) == "torch.float32"
    assert GratingContextSelector.model_validate_json(selector.model_dump_json()) == selector
    counting = GratingContextSelector(model=model, max_tokens=10, count_tokens=len)
    assert GratingContextSelector(**counting.model_dump()) == counting
    with pytest.raises(PydanticSerializationError, match="builtin_function_or_method"):
        counting.model_dump_json()  # rather than lose it
