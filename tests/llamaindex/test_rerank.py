"""The node postprocessor, alone and inside LlamaIndex."""

import re
from copy import deepcopy
from pathlib import Path

import pytest
from llama_index.core import VectorStoreIndex
from llama_index.core.callbacks import CallbackManager, CBEventType, LlamaDebugHandler
from llama_index.core.instrumentation.events.rerank import ReRankEndEvent, ReRankStartEvent
from llama_index.core.llms import MockLLM
from llama_index.core.query_engine import RetrieverQueryEngine
from llama_index.core.schema import ImageNode, IndexNode, MetadataMode, Node, NodeWithScore, QueryBundle, TextNode
from llama_index.postprocessor.grating import GratingContextSelector, GratingRerank

from grating_core import ClusterPolicy, ModelNotFoundError, Prompt, Reranker
from grating_core.errors import FileError
from tests.adapters import BAD_RERANKING
from tests.core.models.test_decoders import save_decoder
from tests.llamaindex.conftest import HashedWords

QUERY = "How many people live in Berlin?"


@pytest.fixture(scope="module")
def postprocessor(reranker):
    return GratingRerank(reranker=reranker)


def expected(reranker, nodes, top_n, query=QUERY):
    """What the reranker itself says, as (id, probability)."""
    texts = [node.node.get_content(metadata_mode=MetadataMode.EMBED) for node in nodes]
    result = reranker.rerank(query, texts, top_n)
    return [(nodes[ranked.index].node_id, ranked.probability) for ranked in result.ranking]


def found(nodes):
    return [(node.node_id, node.score) for node in nodes]


@pytest.mark.parametrize("top_n", [1, 3, 8, 100])
def test_ranks_as_the_reranker_does(reranker, nodes, top_n):
    ranked = GratingRerank(reranker=reranker, top_n=top_n).postprocess_nodes(nodes, query_str=QUERY)
    assert found(ranked) == expected(reranker, nodes, top_n)
    assert len(ranked) == min(top_n, len(nodes))
    assert ranked[0].node_id == "node-0"
    assert all(type(node.score) is float for node in ranked)


def test_estimated_scores_keep_the_rerankers_order(model, nodes):
    postprocessor = GratingRerank(model=model, pruning=ClusterPolicy(0.1), scores="estimated", top_n=5)
    texts = [node.text for node in nodes]
    result = postprocessor.reranker.rerank(QUERY, texts, 5, scores="estimated")
    assert any(ranked.estimated for ranked in result.ranking)
    assert found(postprocessor.postprocess_nodes(nodes, query_str=QUERY)) == [
        (nodes[ranked.index].node_id, ranked.probability) for ranked in result.ranking
    ]


async def test_async_equals_sync(postprocessor, nodes):
    ranked = postprocessor.postprocess_nodes(nodes, query_str=QUERY)
    assert len(ranked) == 3
    assert await postprocessor.apostprocess_nodes(nodes, query_str=QUERY) == ranked


@pytest.mark.parametrize("keep", [False, True])
async def test_leaves_the_callers_nodes_alone(reranker, nodes, keep):
    before = deepcopy(nodes)
    postprocessor = GratingRerank(reranker=reranker, keep_retrieval_score=keep, top_n=8)
    ranked = postprocessor.postprocess_nodes(nodes, query_str=QUERY)
    await postprocessor.apostprocess_nodes(nodes, query_str=QUERY)
    assert nodes == before
    for node in ranked:
        original = before[int(node.node_id.removeprefix("node-"))]
        retrieval = {"retrieval_score": original.score} if keep else {}
        assert node.metadata == {**original.metadata, **retrieval}
        assert node.text == original.text


def test_highlights_are_metadata_that_no_model_reads(reranker, nodes):
    postprocessor = GratingRerank(reranker=reranker, highlights=True, top_n=2)
    for found in postprocessor.postprocess_nodes(nodes, query_str=QUERY):
        judged = found.node.get_content(metadata_mode=MetadataMode.EMBED)
        highlights = found.metadata["highlights"]
        assert highlights[0]["worth"] == 1.0
        assert all(one["text"] == judged[one["start"] : one["stop"]] for one in highlights)
        assert "highlights" not in found.node.get_content(metadata_mode=MetadataMode.LLM)


def test_scores_the_text_as_it_is_embedded(reranker, nodes, postprocessor):
    only_metadata = TextNode(
        text="See the title.",
        metadata={"title": "Berlin has 3.7 million inhabitants", "url": "x" * 200},
        excluded_embed_metadata_keys=["url"],
        excluded_llm_metadata_keys=["title"],
    )
    (ranked,) = postprocessor.postprocess_nodes([NodeWithScore(node=only_metadata)], query_str=QUERY)
    (raw,) = reranker.score([(QUERY, "title: Berlin has 3.7 million inhabitants\n\nSee the title.")])
    assert ranked.score == reranker.probability(raw)
    as_logits = GratingRerank(reranker=reranker, raw_scores=True)
    assert as_logits.postprocess_nodes([NodeWithScore(node=only_metadata)], query_str=QUERY)[0].score == raw

    without = [NodeWithScore(node=TextNode(id_=node.node_id, text=node.text)) for node in nodes]
    assert found(postprocessor.postprocess_nodes(nodes, query_str=QUERY)) == found(
        postprocessor.postprocess_nodes(without, query_str=QUERY)
    )


def test_duplicates_and_odd_nodes(reranker, nodes):
    odd = [
        TextNode(id_="emoji", text="🦜🦜"),
        TextNode(id_="empty", text=""),
        TextNode(id_="null", text="\x00"),
        TextNode(id_="hebrew", text="כמה אנשים גרים בברלין?"),
        ImageNode(id_="image", image_url="https://example.com/berlin.png"),
        Node(id_="nothing"),
        nodes[0].node,
        nodes[0].node,
    ]
    candidates = [NodeWithScore(node=node) for node in odd]
    ranked = GratingRerank(reranker=reranker, top_n=8).postprocess_nodes(candidates, query_str=QUERY)
    assert found(ranked) == expected(reranker, candidates, 8)
    assert [node.node_id for node in ranked[:2]] == ["node-0", "node-0"]
    assert sorted(node.node_id for node in ranked) == sorted(node.node_id for node in odd)


def test_nodes_that_stand_for_something(reranker, nodes):
    """An IndexNode keeps what it leads to."""
    other = VectorStoreIndex([TextNode(text="Berlin has twelve boroughs.")], embed_model=HashedWords())
    leads = IndexNode(text="All about the people of Berlin", index_id="berlin", obj=other.as_retriever())
    candidates = [*nodes, NodeWithScore(node=leads, score=0.5)]
    for keep in (False, True):
        ranked = GratingRerank(reranker=reranker, top_n=9, keep_retrieval_score=keep).postprocess_nodes(
            candidates, query_str=QUERY
        )
        (kept,) = [node.node for node in ranked if isinstance(node.node, IndexNode)]
        assert kept.obj is leads.obj
        assert kept.metadata == ({"retrieval_score": 0.5} if keep else {})


@pytest.mark.parametrize("mode", list(MetadataMode))
def test_the_metadata_that_is_judged(reranker, mode):
    node = TextNode(
        text="See the title.",
        metadata={"title": "Berlin has 3.7 million inhabitants", "url": "x.org", "key": 7},
        excluded_embed_metadata_keys=["url"],
        excluded_llm_metadata_keys=["title"],
    )
    (ranked,) = GratingRerank(reranker=reranker, metadata_mode=mode).postprocess_nodes(
        [NodeWithScore(node=node)], query_str=QUERY
    )
    (raw,) = reranker.score([(QUERY, node.get_content(metadata_mode=mode))])
    assert ranked.score == reranker.probability(raw)


def test_a_long_query_is_asked_by_its_end(reranker, nodes):
    filler = "That is another matter, of which more later. " * 100
    usual = GratingRerank(reranker=reranker, top_n=3)
    half = reranker.tail(filler + QUERY, reranker.max_length // 2)
    assert found(usual.postprocess_nodes(nodes, query_str=filler + QUERY)) == expected(reranker, nodes, 3, half)

    short = GratingRerank(reranker=reranker, top_n=3, max_query_tokens=7)
    assert short.postprocess_nodes(nodes, query_str=filler + QUERY) == short.postprocess_nodes(
        nodes, query_str=QUERY
    )


@pytest.mark.parametrize("place", [0, 1, 7])
async def test_the_score_threshold(reranker, nodes, place):
    everything = GratingRerank(reranker=reranker, top_n=8).postprocess_nodes(nodes, query_str=QUERY)
    for above in (0, 1e-9):
        postprocessor = GratingRerank(reranker=reranker, top_n=8, score_threshold=everything[place].score + above)
        wanted = everything[: place + (not above)]
        assert postprocessor.postprocess_nodes(nodes, query_str=QUERY) == wanted
        assert await postprocessor.apostprocess_nodes(nodes, query_str=QUERY) == wanted


def test_estimates_have_no_threshold(reranker):
    with pytest.raises(ValueError, match=r"score_threshold=0\.5 and scores='estimated' exclude each other"):
        GratingRerank(reranker=reranker, score_threshold=0.5, scores="estimated")


async def test_no_nodes(postprocessor, events):
    assert postprocessor.postprocess_nodes([], query_str=QUERY) == []
    assert await postprocessor.apostprocess_nodes([], query_str=QUERY) == []
    assert events == []


@pytest.mark.parametrize("query", ["", " \n"])
async def test_a_blank_query_keeps_the_order(postprocessor, nodes, events, query):
    """A chat's first message may be blank: there is nothing to judge by."""
    for kept in (
        postprocessor.postprocess_nodes(nodes, query_str=query),
        await postprocessor.apostprocess_nodes(nodes, QueryBundle(query)),
    ):
        assert found(kept) == [(node.node_id, None) for node in nodes[: postprocessor.top_n]]
    assert nodes[0].score == 1.0
    assert events == []


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["a text"], r"nodes\[0\] is a str, not a NodeWithScore: write NodeWithScore"),
        ([TextNode(text="a text")], r"nodes\[0\] is a TextNode"),
        ("a text", "nodes must be a list of NodeWithScore, not a str"),
        (None, "nodes must be a list of NodeWithScore, not a NoneType"),
    ],
)
def test_nodes_that_are_none(postprocessor, given, said):
    selector = GratingContextSelector(reranker=postprocessor.reranker, max_tokens=10)
    for each in (postprocessor, selector):
        with pytest.raises(ValueError, match=said):
            each.postprocess_nodes(given, query_str=QUERY)


def test_nested_metadata_is_copied(reranker, nodes):
    keeping = GratingRerank(reranker=reranker, top_n=1, keep_retrieval_score=True)
    (kept,) = keeping.postprocess_nodes(nodes, query_str=QUERY)
    kept.metadata["tags"].append("b")
    assert all(node.metadata["tags"] == ["a"] for node in nodes)


async def test_no_query(postprocessor, nodes):
    for wrong in ({}, {"query_str": None}, {"query_bundle": QueryBundle(None)}, {"query_bundle": QUERY}):
        with pytest.raises(ValueError, match=r"^query"):
            postprocessor.postprocess_nodes(nodes, **wrong)
        with pytest.raises(ValueError, match=r"^query"):
            await postprocessor.apostprocess_nodes(nodes, **wrong)


@pytest.mark.parametrize(("name", "value"), BAD_RERANKING)
def test_bad_arguments_are_named(model, name, value):
    settings = {name: value} if name == "reranker" else {"model": model, name: value}
    with pytest.raises(ValueError, match=rf"(?m)^{name}$|Value error, {name}="):
        GratingRerank(**settings)


def test_a_ready_reranker_takes_no_settings(reranker, model):
    with pytest.raises(ValueError, match="reranker is given and brings its own model, pruning"):
        GratingRerank(reranker=reranker, model=model, pruning="off")


def test_an_unknown_model_fails_on_construction(tmp_path):
    with pytest.raises(ModelNotFoundError, match="nowhere"):
        GratingRerank(model=str(tmp_path / "nowhere"))


def test_same_settings_share_one_model(model, reranker):
    one = GratingRerank(model=model, pruning=ClusterPolicy(3.0), top_n=1)
    assert GratingRerank(model=model, pruning=ClusterPolicy(3.0), scores="estimated").reranker is one.reranker
    assert GratingRerank(model=model).reranker is not one.reranker
    assert GratingRerank(reranker=reranker).reranker is reranker


def test_settings_of_pruning_reach_the_reranker(model):
    settings = {"target": 0.9, "guarantee": "set", "recalibrate": 0.5}
    postprocessor = GratingRerank(model=model, **settings)
    reranker = postprocessor.reranker
    assert (reranker.pruning.target, reranker.pruning.guarantee) == (0.9, "set")
    assert reranker.recalibration.factor > 0
    with pytest.raises(FileError, match="no lens in nowhere"):
        GratingRerank(model=model, lens="nowhere")


async def test_in_a_query_engine(reranker, postprocessor, index, events):
    candidates = index.as_retriever(similarity_top_k=6).retrieve(QUERY)
    wanted = expected(reranker, candidates, 3)
    assert [name for name, _ in wanted] != [node.node_id for node in candidates[:3]]

    engine = index.as_query_engine(llm=MockLLM(), similarity_top_k=6, node_postprocessors=[postprocessor])
    assert found(engine.query(QUERY).source_nodes) == wanted
    answer = await engine.aquery(QUERY)
    assert found(answer.source_nodes) == wanted
    assert [type(event) for event in events] == [ReRankStartEvent, ReRankEndEvent] * 2

    # MockLLM answers with its prompt: the passages reach it in the new order.
    texts = [node.text for node in answer.source_nodes]
    assert sorted(texts, key=str(answer).index) == texts


def test_in_a_query_engine_made_from_parts(reranker, model, index):
    debug = LlamaDebugHandler(print_trace_on_end=False)
    engine = RetrieverQueryEngine.from_args(
        index.as_retriever(similarity_top_k=6),
        llm=MockLLM(),
        node_postprocessors=[GratingRerank(model=model, keep_retrieval_score=True)],
        callback_manager=CallbackManager([debug]),
    )
    candidates = index.as_retriever(similarity_top_k=6).retrieve(QUERY)
    retrieval = {node.node_id: node.score for node in candidates}
    sources = engine.query(QUERY).source_nodes
    assert found(sources) == expected(reranker, candidates, 3)
    assert [node.metadata["retrieval_score"] for node in sources] == [retrieval[node.node_id] for node in sources]
    assert len(debug.get_event_pairs(CBEventType.RERANKING)) == 1


def test_the_readme_example_runs():
    readme = Path(__file__).parents[2] / "integrations" / "llamaindex" / "README.md"
    (example,) = re.findall(r"```python\n(.*?)```", readme.read_text(), flags=re.DOTALL)
    names = {}
    exec(example, names)
    assert names["ranked"][0].text.startswith("Bread")


def test_a_memory_budget_reaches_the_engine_and_leaves_the_ranking(reranker, nodes, model):
    within = GratingRerank(model=model, memory_budget="110MB", device="cpu", top_n=3)
    assert within.reranker.plan.budget == 110_000_000
    assert within.reranker.plan.streamed
    ranked = within.postprocess_nodes(nodes, query_str=QUERY)
    assert [node.node_id for node in ranked] == [name for name, _ in expected(reranker, nodes, 3)]
    with pytest.raises(ValueError, match=r"too small for this model, which needs \d+MB"):
        GratingRerank(model=model, memory_budget="1MB")


def test_a_decoder_with_its_own_question(nodes, tmp_path):
    prompt = Prompt(("<s>", "w1 {instruction} {query}", "w2 {document}"), yes="w3", no="w4")
    postprocessor = GratingRerank(
        model=str(save_decoder(tmp_path, "qwen3")), template=prompt, instruction="w5", long_documents="windows",
        dtype="float32", device="cpu", top_n=3,
    )  # fmt: skip
    found = postprocessor.postprocess_nodes(nodes, query_str="w6 w7")
    assert len(found) == 3
    with Reranker.from_pretrained(
        tmp_path, template=prompt, instruction="w5", dtype="float32", device="cpu"
    ) as reranker:
        texts = [node.node.get_content(metadata_mode=MetadataMode.EMBED) for node in found]
        expected = list(map(reranker.probability, reranker.score([("w6 w7", text) for text in texts])))
    assert [node.score for node in found] == pytest.approx(expected, abs=1e-4)


async def test_a_deadline_ends_with_the_first_nodes_marked_as_estimates(reranker, nodes):
    hurried = GratingRerank(reranker=reranker, top_n=2, deadline=1e-6)
    for kept in (
        hurried.postprocess_nodes(nodes, query_str="a question"),
        await hurried.apostprocess_nodes(nodes, query_str="a question"),
    ):
        assert [found.node.node_id for found in kept] == [found.node.node_id for found in nodes[:2]]
        assert all(found.node.metadata["relevance_score_estimated"] for found in kept)
        assert "estimated" not in kept[0].node.get_content(metadata_mode=MetadataMode.LLM)
    assert "relevance_score_estimated" not in nodes[0].node.metadata
    (calm,) = GratingRerank(reranker=reranker, top_n=1, deadline=100).postprocess_nodes(
        nodes, query_str="a question"
    )
    assert "relevance_score_estimated" not in calm.node.metadata
