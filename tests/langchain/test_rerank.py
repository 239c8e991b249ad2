"""The document compressor, alone and inside LangChain."""

import re
import threading
from copy import deepcopy
from pathlib import Path

import pytest
from langchain_classic.retrievers import ContextualCompressionRetriever
from langchain_core.documents import Document
from langchain_core.runnables import RunnableLambda, RunnableParallel, RunnablePassthrough
from langchain_grating import GratingContextSelector, GratingCrossEncoder, GratingRerank

from grating_core import ClusterPolicy, ModelNotFoundError, Prompt, Reranker, Route
from grating_core.errors import FileError
from tests.adapters import BAD_RERANKING
from tests.core.models.test_decoders import save_decoder

QUERY = "How many people live in Berlin?"


class FirstIsSure:
    """After the first layer: the first candidate is selected and the others go on."""

    def route(self, layer, scores, top_k):
        routes = [Route.DEFERRED] * len(scores)
        if layer == 1:
            routes[0] = Route.SELECTED
        return routes


@pytest.fixture(scope="module")
def compressor(reranker):
    return GratingRerank(reranker=reranker)


def expected(reranker, documents, top_n, query=QUERY):
    """What the reranker itself says, as (id, probability)."""
    result = reranker.rerank(query, [document.page_content for document in documents], top_n)
    return [(documents[ranked.index].id, ranked.probability) for ranked in result.ranking]


def found(documents):
    return [(document.id, document.metadata["relevance_score"]) for document in documents]


@pytest.mark.parametrize("top_n", [1, 3, 8, 100])
def test_ranks_as_the_reranker_does(reranker, documents, top_n):
    ranked = GratingRerank(reranker=reranker, top_n=top_n).compress_documents(documents, QUERY)
    assert found(ranked) == expected(reranker, documents, top_n)
    assert len(ranked) == min(top_n, len(documents))
    assert ranked[0].id == "doc-0"
    assert all(type(document.metadata["relevance_score"]) is float for document in ranked)


async def test_async_equals_sync(compressor, documents):
    ranked = compressor.compress_documents(documents, QUERY)
    assert len(ranked) == 3
    assert await compressor.acompress_documents(documents, QUERY) == ranked


async def test_highlights_are_metadata(reranker, documents):
    compressor = GratingRerank(reranker=reranker, top_n=2, highlights=True)
    first = compressor.compress_documents(documents, QUERY)
    assert await compressor.acompress_documents(documents, QUERY) == first
    for document in first:
        highlights = document.metadata["highlights"]
        assert highlights[0]["worth"] == 1.0
        assert all(one["text"] == document.page_content[one["start"] : one["stop"]] for one in highlights)
    again = GratingRerank(reranker=reranker, top_n=2).compress_documents(first, QUERY)
    assert not any("highlights" in document.metadata for document in again)


async def test_keeps_everything_else_and_leaves_the_callers_documents_alone(compressor, documents):
    before = deepcopy(documents)
    for ranked in (
        compressor.compress_documents(documents, QUERY),
        await compressor.acompress_documents(documents, QUERY),
    ):
        for document in ranked:
            original = before[int(document.id.removeprefix("doc-"))]
            kept = {key: value for key, value in document.metadata.items() if key != "relevance_score"}
            assert document.page_content == original.page_content
            assert kept == original.metadata
            document.metadata["source"] = "changed"
    assert documents == before


async def test_only_estimates_are_marked(model, documents):
    settings = {"model": model, "pruning": FirstIsSure(), "top_n": 2}
    compressor = GratingRerank(**settings, scores="estimated")
    estimated = compressor.compress_documents(documents, QUERY)
    assert await compressor.acompress_documents(documents, QUERY) == estimated
    assert estimated[0].id == "doc-0"
    assert [document.metadata.get("relevance_score_estimated") for document in estimated] == [True, None]

    exact = GratingRerank(**settings).compress_documents(estimated, QUERY)
    assert len(exact) == 2
    assert not any("relevance_score_estimated" in document.metadata for document in exact)


async def test_no_documents(compressor):
    assert compressor.compress_documents([], QUERY) == []
    assert await compressor.acompress_documents([], QUERY) == []


def test_duplicates_and_odd_texts(reranker, documents):
    odd = ["🦜🦜", "", "\x00", "כמה אנשים גרים בברלין?", documents[0].page_content, documents[0].page_content]
    candidates = [Document(text, id=str(index)) for index, text in enumerate(odd)]
    ranked = GratingRerank(reranker=reranker, top_n=6).compress_documents(candidates, QUERY)
    assert found(ranked) == expected(reranker, candidates, 6)
    assert {document.id for document in ranked[:2]} == {"4", "5"}
    assert {document.id for document in ranked} == set("012345")


@pytest.mark.parametrize("query", ["", "  \n"])
async def test_empty_query(compressor, documents, query):
    """A chat's first message may be blank: there is nothing to judge by."""
    documents[1].metadata["relevance_score"] = 3.0  # an earlier reranking's
    kept = compressor.compress_documents(documents, query)
    assert await compressor.acompress_documents(documents, query) == kept
    assert [document.id for document in kept] == [document.id for document in documents[: compressor.top_n]]
    assert all("relevance_score" not in document.metadata for document in kept)
    assert documents[1].metadata["relevance_score"] == 3.0
    wide = GratingRerank(reranker=compressor.reranker, top_n=None, score_threshold=0.99)
    assert len(wide.compress_documents(documents, query)) == len(documents)
    assert wide.rerank(documents, query, top_n=2) == [{"index": n, "relevance_score": None} for n in (0, 1)]


def test_no_model_is_needed_where_nothing_is_asked(documents, model):
    with Reranker.from_pretrained(model) as reranker:
        compressor = GratingRerank(reranker=reranker, top_n=2)
    assert len(compressor.compress_documents(documents, "")) == 2
    with pytest.raises(RuntimeError, match="closed"):
        compressor.compress_documents(documents, "a question")


@pytest.mark.parametrize("query", [None, 3, ["how", "many"]])
async def test_a_query_that_is_no_text(compressor, documents, query):
    with pytest.raises(ValueError, match="query="):
        compressor.compress_documents(documents, query)
    with pytest.raises(ValueError, match="query="):
        await compressor.acompress_documents(documents, query)
    with pytest.raises(ValueError, match="query="):
        compressor.rerank(documents, query)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["a text"], r"documents\[0\] is a str, not a Document: write Document\(text\)"),
        ([None], r"documents\[0\] is a NoneType"),
        ("a text", "documents must be a list of Document, not a str"),
        (Document("a text"), r"not a Document: write \[documents\]"),
        ({"a": Document("a text")}, "documents must be a list of Document, not a dict"),
        ({"a text"}, "documents must be a list of Document, not a set"),
        (None, "documents must be a list of Document, not a NoneType"),
    ],
)
def test_documents_that_are_none(compressor, given, said):
    with pytest.raises(ValueError, match=said):
        compressor.compress_documents(given, QUERY)
    if not isinstance(given, str):  # which a selector takes for one long text
        with pytest.raises(ValueError, match=said):
            GratingContextSelector(reranker=compressor.reranker, max_tokens=10).compress_documents(given, QUERY)


def test_documents_may_come_one_by_one(compressor, documents):
    assert compressor.compress_documents(iter(documents), QUERY) == compressor.compress_documents(documents, QUERY)


def test_nested_metadata_is_copied(compressor):
    lock = threading.Lock()
    endless = {}
    endless["itself"] = endless
    deep = []
    for _ in range(100_000):
        deep = [deep]
    document = Document("text", metadata={"tags": [{"n": [1]}], "lock": lock, "endless": endless, "deep": deep})
    for query in (QUERY, ""):
        (kept,) = compressor.compress_documents([document], query)
        kept.metadata["tags"][0]["n"].append(2)
        assert document.metadata["tags"] == [{"n": [1]}]
        assert kept.metadata["lock"] is lock
        assert kept.metadata["endless"]["itself"] is kept.metadata["endless"] is not endless
        assert kept.metadata["deep"] is not deep


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
    assert GratingCrossEncoder(model=model, pruning=ClusterPolicy(3.0)).reranker is one.reranker
    assert GratingRerank(model=model).reranker is not one.reranker
    assert GratingRerank(reranker=reranker).reranker is reranker


def test_top_n_none_keeps_all_in_order(reranker, documents):
    ranked = GratingRerank(reranker=reranker, top_n=None).compress_documents(documents, QUERY)
    assert found(ranked) == expected(reranker, documents, len(documents))
    assert GratingRerank(reranker=reranker, top_n=None).compress_documents([], QUERY) == []


async def test_what_scores_below_the_threshold_is_left_out(reranker, documents):
    wanted = expected(reranker, documents, 4)
    threshold = wanted[1][1]  # what scores just that stays
    compressor = GratingRerank(reranker=reranker, top_n=4, score_threshold=threshold)
    assert found(compressor.compress_documents(documents, QUERY)) == wanted[:2]
    assert found(await compressor.acompress_documents(documents, QUERY)) == wanted[:2]
    compressor.score_threshold = 1.0
    assert compressor.compress_documents(documents, QUERY) == []
    compressor.score_threshold = 0.0  # FlashRank's default, which keeps everything
    assert found(compressor.compress_documents(documents, QUERY)) == wanted


def test_raw_scores_and_a_raw_threshold(reranker, documents):
    raw = reranker.rerank(QUERY, [document.page_content for document in documents], 4).ranking
    compressor = GratingRerank(reranker=reranker, top_n=4, raw_scores=True, score_threshold=raw[1].score)
    wanted = [(documents[ranked.index].id, ranked.score) for ranked in raw[:2]]
    assert found(compressor.compress_documents(documents, QUERY)) == wanted
    assert wanted[0][1] > 1
    compressor.score_threshold = -50.0
    assert len(compressor.compress_documents(documents, QUERY)) == 4
    with pytest.raises(ValueError, match=r"score_threshold=-50\.0 must be a probability from 0 to 1"):
        compressor.raw_scores = False


def test_estimates_are_not_compared_with_a_threshold(model):
    with pytest.raises(ValueError, match=r"score_threshold=0\.5 and scores='estimated' exclude each other"):
        GratingRerank(model=model, scores="estimated", score_threshold=0.5)


def test_metadata_with_a_prefix(model, documents):
    compressor = GratingRerank(
        model=model, pruning=FirstIsSure(), scores="estimated", top_n=2, prefix_metadata="grating_"
    )
    first, second = compressor.compress_documents(documents, QUERY)
    assert first.metadata.keys() == {
        "source",
        "tags",
        "grating_relevance_score",
        "grating_relevance_score_estimated",
    }
    assert second.metadata.keys() == {"source", "tags", "grating_relevance_score"}


def test_settings_of_pruning_reach_the_reranker(model):
    settings = {"target": 0.9, "guarantee": "set", "recalibrate": 0.5}
    compressor = GratingRerank(model=model, **settings)
    reranker = compressor.reranker
    assert (reranker.pruning.target, reranker.pruning.guarantee) == (0.9, "set")
    assert reranker.recalibration.factor > 0
    with pytest.raises(FileError, match="no lens in nowhere"):
        GratingRerank(model=model, lens="nowhere")


def test_the_default_model_is_a_small_one_on_the_hub():
    assert GratingRerank.model_fields["model"].default == "cross-encoder/ms-marco-MiniLM-L12-v2"
    assert GratingRerank.model_fields["top_n"].default == 3


async def test_in_a_contextual_compression_retriever(reranker, compressor, retriever):
    candidates = retriever.invoke(QUERY)
    wanted = expected(reranker, candidates, 3)
    assert [name for name, _ in wanted] != [document.id for document in candidates[:3]]
    compressing = ContextualCompressionRetriever(base_compressor=compressor, base_retriever=retriever)
    assert found(compressing.invoke(QUERY)) == wanted
    assert found(await compressing.ainvoke(QUERY)) == wanted
    assert "relevance_score" not in retriever.invoke(QUERY)[0].metadata


async def test_in_a_chain(reranker, compressor, retriever):
    rerank = RunnableLambda(
        lambda given: compressor.compress_documents(**given),
        afunc=lambda given: compressor.acompress_documents(**given),
    )
    chain = RunnableParallel(documents=retriever, query=RunnablePassthrough()) | rerank
    wanted = expected(reranker, retriever.invoke(QUERY), 3)
    assert found(chain.invoke(QUERY)) == wanted
    assert found(await chain.ainvoke(QUERY)) == wanted
    queries = [QUERY, "What makes bread rise?"]
    assert [batch[0].id for batch in chain.batch(queries)] == ["doc-0", "doc-3"]


def test_the_readme_example_runs():
    readme = Path(__file__).parents[2] / "integrations" / "langchain" / "README.md"
    (example,) = re.findall(r"```python\n(.*?)```", readme.read_text(), flags=re.DOTALL)
    names = {}
    exec(example, names)
    assert names["documents"][0].page_content.startswith("Bread")


def test_a_memory_budget_reaches_the_engine_and_leaves_the_ranking(reranker, documents, model):
    within = GratingRerank(model=model, memory_budget="110MB", device="cpu", top_n=3)
    assert within.reranker.plan.budget == 110_000_000
    assert within.reranker.plan.streamed
    base = RunnableLambda(lambda _: documents)
    pipeline = ContextualCompressionRetriever(base_compressor=within, base_retriever=base)
    ranked = pipeline.invoke(QUERY)
    assert [document.id for document in ranked] == [name for name, _ in expected(reranker, documents, 3)]
    with pytest.raises(ValueError, match=r"too small for this model, which needs \d+MB"):
        GratingRerank(model=model, memory_budget="1MB")


def test_a_decoder_with_its_own_question(documents, tmp_path):
    prompt = Prompt(("<s>", "w1 {instruction} {query}", "w2 {document}"), yes="w3", no="w4")
    compressor = GratingRerank(
        model=str(save_decoder(tmp_path, "qwen3")), template=prompt, instruction="w5", long_documents="windows",
        dtype="float32", device="cpu", top_n=3,
    )  # fmt: skip
    found = compressor.compress_documents(documents, "w6 w7")
    scores = [document.metadata["relevance_score"] for document in found]
    assert len(found) == 3
    assert scores == sorted(scores, reverse=True)
    with Reranker.from_pretrained(
        tmp_path, template=prompt, instruction="w5", dtype="float32", device="cpu"
    ) as reranker:
        raw = reranker.score([("w6 w7", text.page_content) for text in found])
        assert scores == pytest.approx(list(map(reranker.probability, raw)), abs=1e-4)


async def test_of_a_long_query_the_end_is_used(model, documents):
    compressor = GratingRerank(model=model, top_n=3, pruning="off")
    question = "How many people live in Berlin?"
    long = "Some words that were said before. " * 200 + question
    kept = compressor.compress_documents(documents, long)
    assert kept == await compressor.acompress_documents(documents, long)
    assert compressor.rerank(documents, long)[0]["relevance_score"] == kept[0].metadata["relevance_score"]
    last = GratingRerank(model=model, top_n=3, pruning="off", max_query_tokens=7)
    assert last.compress_documents(documents, long) == compressor.compress_documents(documents, question)


async def test_a_deadline_ends_with_the_first_documents_marked_as_estimates(reranker):
    documents = [Document(f"text {number}") for number in range(20)]
    compressor = GratingRerank(reranker=reranker, top_n=2, deadline=1e-6)
    for kept in (
        compressor.compress_documents(documents, "a question"),
        await compressor.acompress_documents(documents, "a question"),
    ):
        assert [document.page_content for document in kept] == ["text 0", "text 1"]
        assert all(document.metadata["relevance_score_estimated"] for document in kept)
    kept = compressor.model_copy(update={"deadline": 100}).compress_documents(documents, "a question")
    assert "relevance_score_estimated" not in kept[0].metadata
    with pytest.raises(ValueError, match="deadline"):
        GratingRerank(reranker=reranker, deadline=0)
