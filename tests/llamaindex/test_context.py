"""The context selector, alone and in a query engine."""

from copy import deepcopy
from pydoc_data.topics import topics

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from llama_index.core import SummaryIndex
from llama_index.core.llms import MockLLM
from llama_index.core.node_parser import SentenceSplitter
from llama_index.core.schema import (
    Document,
    ImageNode,
    MetadataMode,
    NodeRelationship,
    NodeWithScore,
    QueryBundle,
    RelatedNodeInfo,
    TextNode,
)
from llama_index.postprocessor.grating import GratingContextSelector

from grating_core import select_context
from tests.adapters import BAD_SELECTING

QUERY = "How many people live in Berlin?"
ANSWER = "Berlin had a population of 3,520,031 registered inhabitants in 2015."
FILLER = topics["assignment"]
LONG = f"{FILLER[:2000]}\n\n{ANSWER}\n\n{FILLER[2000:4000]}"


@pytest.fixture
def long_nodes():
    texts = {"a": FILLER[4000:6000], "b": LONG, "c": ANSWER}
    return [
        NodeWithScore(node=TextNode(id_=name, text=text, metadata={"file": name}), score=0.5)
        for name, text in texts.items()
    ]


class Marked(TextNode):
    mark: str = ""


def texts_of(nodes):
    return [node.node.get_content(metadata_mode=MetadataMode.NONE) for node in nodes]


async def test_selects_as_the_function_does(reranker, long_nodes):
    before = deepcopy(long_nodes)
    selector = GratingContextSelector(reranker=reranker, max_tokens=150, chunk_tokens=50)
    for kept in (
        selector.postprocess_nodes(long_nodes, query_str=QUERY),
        await selector.apostprocess_nodes(long_nodes, query_str=QUERY),
    ):
        wanted = select_context(QUERY, texts_of(before), reranker=reranker, max_tokens=150, chunk_tokens=50)
        assert texts_of(kept) == [passage.text for passage in wanted]
        assert [node.score for node in kept] == [passage.probability for passage in wanted]
        assert [node.metadata["file"] for node in kept] == [before[p.document].node_id for p in wanted]
        assert kept[-1].node is long_nodes[-1].node, "a whole node stays itself"
        assert len({node.node_id for node in kept}) == len(kept) > 1
    assert long_nodes == before


@settings(max_examples=12, deadline=None)
@given(parts=st.lists(st.sampled_from([ANSWER, FILLER[:100], "\n\n", "🦜", "Berlin. "]), max_size=12),
       max_tokens=st.integers(1, 60))  # fmt: skip
def test_never_more_than_the_budget(reranker, parts, max_tokens):
    selector = GratingContextSelector(reranker=reranker, max_tokens=max_tokens, chunk_tokens=30, count_tokens=len)
    nodes = [NodeWithScore(node=TextNode(text="".join(some))) for some in (parts[:6], parts[6:])]
    kept = selector.postprocess_nodes(nodes, query_str=QUERY)
    assert len("\n\n".join(texts_of(kept))) <= max_tokens


def only(reranker, node):
    """The one passage, the answer, that is left of a node."""
    selector = GratingContextSelector(reranker=reranker, max_tokens=16, chunk_tokens=16)
    (kept,) = selector.postprocess_nodes([NodeWithScore(node=node)], query_str=QUERY)
    assert kept.node.text == ANSWER
    assert kept.score > 0.99
    # A Document cannot say where its part begins.
    assert type(kept.node) is (type(node) if isinstance(node, TextNode) else TextNode)
    assert kept.node_id != node.node_id
    return kept.node


def test_a_part_of_a_document_has_it_as_its_source(reranker):
    document = Document(
        text=LONG, id_="book", metadata={"author": "N. N."}, excluded_llm_metadata_keys=["author"],
        text_template="{metadata_str} says: {content}", embedding=[1.0],
    )  # fmt: skip
    part = only(reranker, document)
    assert LONG[part.start_char_idx : part.end_char_idx] == ANSWER
    assert part.relationships.keys() == {NodeRelationship.SOURCE}
    assert part.ref_doc_id == "book"
    assert part.embedding is None
    assert part.get_content(metadata_mode=MetadataMode.EMBED) == f"author: N. N. says: {ANSWER}"
    assert part.get_content(metadata_mode=MetadataMode.LLM) == ANSWER
    part.metadata["author"] = "changed"
    assert document.metadata == {"author": "N. N."}


def test_a_part_of_a_chunk_has_its_place_in_the_document(reranker):
    document = Document(text=LONG, id_="book")
    chunks = SentenceSplitter(chunk_size=300, chunk_overlap=0).get_nodes_from_documents([document])
    (chunk,) = [chunk for chunk in chunks if ANSWER in chunk.text]
    assert chunk.start_char_idx > 0
    part = only(reranker, chunk)
    assert LONG[part.start_char_idx : part.end_char_idx] == ANSWER
    assert part.ref_doc_id == "book"
    chunk.start_char_idx = None
    part = only(reranker, chunk)
    assert (part.start_char_idx, part.end_char_idx) == (None, None)


def test_nodes_with_more_than_text(reranker):
    part = only(reranker, ImageNode(text=LONG, image="aGk=", embedding=[1.0]))
    assert (part.start_char_idx, part.image, part.embedding) == (LONG.index(ANSWER), "aGk=", None)
    part = only(reranker, Marked(text=LONG, mark="w", metadata={"tags": [["a"]]}))
    assert (part.mark, part.metadata) == ("w", {"tags": [["a"]]})


@pytest.mark.parametrize("place", [None, -3, "7", 7.0, True])
def test_what_is_no_position_is_not_taken_for_one(reranker, place):
    node = TextNode(text=LONG, relationships={NodeRelationship.SOURCE: RelatedNodeInfo(node_id="book")})
    object.__setattr__(node, "start_char_idx", place)  # as an index that was written by others may hold it
    part = only(reranker, node)
    assert (part.start_char_idx, part.end_char_idx) == (None, None)


async def test_a_blank_query_takes_what_comes_first(reranker, long_nodes):
    selector = GratingContextSelector(reranker=reranker, max_tokens=100, chunk_tokens=30)
    for kept in (
        selector.postprocess_nodes(long_nodes, query_str="  "),
        await selector.apostprocess_nodes(long_nodes, query_str=""),
    ):
        whole = texts_of(long_nodes)[0]
        assert len(kept) == 1
        assert whole.startswith(texts_of(kept)[0])
        assert 60 < reranker.count_tokens(texts_of(kept)[0]) <= 100
        assert kept[0].score is None
    assert selector.postprocess_nodes(long_nodes[2:], query_str="")[0].node is long_nodes[2].node


def test_of_a_long_query_the_end_is_used(reranker, long_nodes):
    selector = GratingContextSelector(reranker=reranker, max_tokens=40, chunk_tokens=40)
    long = f"{FILLER[:3000]} {QUERY * 50}"
    kept = texts_of(selector.postprocess_nodes(long_nodes[2:] + long_nodes[:1], query_str=long))
    assert kept == texts_of(
        selector.postprocess_nodes(long_nodes[2:] + long_nodes[:1], query_str=reranker.tail(long))
    )
    assert ANSWER in " ".join(kept)


def test_what_fits_comes_back_as_it_is(reranker, long_nodes):
    nodes = [*long_nodes, NodeWithScore(node=TextNode(text=" "))]
    selector = GratingContextSelector(reranker=reranker, max_tokens=5000)
    assert selector.postprocess_nodes(nodes, query_str=QUERY) == long_nodes
    assert selector.postprocess_nodes([], query_str=QUERY) == []


async def test_in_a_query_engine(reranker):
    index = SummaryIndex.from_documents([Document(text=LONG, id_="book")])
    selector = GratingContextSelector(reranker=reranker, max_tokens=60, chunk_tokens=30)
    engine = index.as_query_engine(llm=MockLLM(), node_postprocessors=[selector])
    for answer in (engine.query(QUERY), await engine.aquery(QUERY)):
        assert reranker.count_tokens("\n\n".join(texts_of(answer.source_nodes))) <= 60
        # MockLLM answers with its prompt.
        assert ANSWER in str(answer)
        assert FILLER[:200] not in str(answer)
        assert {node.node.ref_doc_id for node in answer.source_nodes} == {"book"}


@pytest.mark.parametrize(("name", "value"), BAD_SELECTING)
def test_bad_arguments_are_named(reranker, name, value):
    with pytest.raises(ValueError, match=rf"(?m)^{name}$"):
        GratingContextSelector(reranker=reranker, **({"max_tokens": 10} | {name: value}))


def test_a_budget_and_a_query_are_needed(reranker, long_nodes):
    with pytest.raises(ValueError, match="max_tokens"):
        GratingContextSelector(reranker=reranker)
    selector = GratingContextSelector(reranker=reranker, max_tokens=10)
    with pytest.raises(ValueError, match="query_bundle"):
        selector.postprocess_nodes(long_nodes)
    with pytest.raises(ValueError, match="query_str=None"):
        selector.postprocess_nodes(long_nodes, QueryBundle(None))


def test_settings_of_the_model(model):
    selector = GratingContextSelector(model=model, max_tokens=10, dtype="float32")
    assert str(selector.reranker.dtype) == "torch.float32"
    data = selector.to_dict()
    assert data["class_name"] == "GratingContextSelector"
    assert GratingContextSelector.from_dict(data).reranker is selector.reranker
