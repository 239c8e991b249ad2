"""The cross-encoder, alone and inside langchain-classic's CrossEncoderReranker."""

import json

import pytest
import torch
from langchain_classic.retrievers import ContextualCompressionRetriever
from langchain_classic.retrievers.document_compressors import CrossEncoderReranker
from langchain_core.cross_encoders import BaseCrossEncoder
from langchain_grating import GratingCrossEncoder
from sentence_transformers import CrossEncoder

QUERY = "How many people live in Berlin?"


@pytest.fixture(scope="module")
def encoder(reranker):
    return GratingCrossEncoder(reranker=reranker)


@pytest.fixture(scope="module", params=["Sigmoid by default", "Identity, as ms-marco's on the hub", "raw by wish"])
def scaled(request, reranker, tmp_path_factory):
    """A model whose checkpoint names an activation or none, sentence-transformers' scores and ours."""
    directory = tmp_path_factory.mktemp("model")
    for path in reranker.model_path.iterdir():
        (directory / path.name).symlink_to(path)
    identity = request.param.startswith("Identity")
    if identity:
        config = json.loads((directory / "config.json").read_text())
        (directory / "config.json").unlink()
        activation = {"activation_fn": "torch.nn.modules.linear.Identity", "version": "4.0.1"}
        (directory / "config.json").write_text(json.dumps(config | {"sentence_transformers": activation}))
    wish = {"raw_scores": True} if request.param == "raw by wish" else {}
    activation = {"activation_fn": torch.nn.Identity()} if wish else {}
    return (
        GratingCrossEncoder(model=str(directory), dtype="float32", **wish),
        CrossEncoder(str(directory), device="cpu", **activation),
    )


def test_scores_are_on_the_scale_of_sentence_transformers(scaled, documents):
    ours, theirs = scaled
    pairs = [(QUERY, document.page_content) for document in documents]
    assert ours.score(pairs) == pytest.approx(theirs.predict(pairs).tolist(), abs=1e-4)


def test_scores_as_the_reranker_does(reranker, encoder, documents):
    pairs = [(QUERY, document.page_content) for document in documents]
    pairs += [("What makes bread rise?", documents[3].page_content), (QUERY, ""), (QUERY, "🦜")]
    scores = encoder.score(pairs)
    assert isinstance(encoder, BaseCrossEncoder)
    assert scores == list(map(reranker.probability, reranker.score(pairs)))
    assert max(scores[:8]) == scores[0]
    assert all(type(score) is float for score in scores)
    assert encoder.score([]) == []


@pytest.mark.parametrize("pair", [(None, "text"), (QUERY,), (QUERY, "text", "more"), QUERY, 3, None])
def test_bad_pairs_are_named(encoder, pair):
    with pytest.raises(ValueError, match=r"text_pairs\[1\]"):
        encoder.score([(QUERY, "text"), pair])


def test_after_a_blank_query_documents_stay_in_their_order(reranker, encoder, documents):
    scores = encoder.score([(" ", "a"), (QUERY, "b"), ("", "c")])
    assert (scores[0], scores[2]) == (0.0, 0.0)
    assert scores[1] == reranker.probability(*reranker.score([(QUERY, "b")]))
    kept = CrossEncoderReranker(model=encoder, top_n=3).compress_documents(documents, "\n")
    assert [document.id for document in kept] == [document.id for document in documents[:3]]


def test_of_a_long_query_the_end_is_used(reranker, encoder):
    long = "Let us talk about something else. " * 200 + QUERY
    raw = reranker.score([(reranker.tail(long), "text"), (QUERY, "text")])
    assert encoder.score([(long, "text"), (QUERY, "text")]) == list(map(reranker.probability, raw))


def test_selects_nothing_and_so_takes_no_top_n(reranker):
    with pytest.raises(ValueError, match="top_n"):
        GratingCrossEncoder(reranker=reranker, top_n=3)


async def test_in_a_cross_encoder_reranker(reranker, encoder, retriever):
    compressing = ContextualCompressionRetriever(
        base_compressor=CrossEncoderReranker(model=encoder, top_n=2), base_retriever=retriever
    )
    candidates = retriever.invoke(QUERY)
    scores = reranker.score([(QUERY, document.page_content) for document in candidates])
    best = sorted(range(len(candidates)), key=lambda index: -scores[index])[:2]
    wanted = [candidates[index] for index in best]
    assert wanted != candidates[:2]
    assert compressing.invoke(QUERY) == wanted
    assert await compressing.ainvoke(QUERY) == wanted
