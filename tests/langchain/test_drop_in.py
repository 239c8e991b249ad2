"""Calls written for other rerankers, with import and class name changed."""

import huggingface_hub.constants
import pytest
from langchain_classic.retrievers.document_compressors import CrossEncoderReranker
from langchain_community.cross_encoders import HuggingFaceCrossEncoder
from langchain_core.cross_encoders import BaseCrossEncoder
from langchain_grating import GratingCrossEncoder, GratingRerank

from grating_core import ModelNotFoundError

QUERY = "How many people live in Berlin?"


def test_cross_encoder_reranker_with_its_hugging_face_model(reranker, documents):
    theirs = HuggingFaceCrossEncoder(model_name=str(reranker.model_path), model_kwargs={"device": "cpu"})
    wanted = CrossEncoderReranker(model=theirs, top_n=3).compress_documents(documents, QUERY)
    ours = GratingRerank(model=theirs, top_n=3)
    assert (ours.model, ours.device) == (str(reranker.model_path), "cpu")
    assert [document.id for document in ours.compress_documents(documents, QUERY)] == [d.id for d in wanted]


def test_cross_encoder_reranker_with_ours(reranker, model, documents):
    encoder = GratingCrossEncoder(
        model_name=model, model_kwargs={"device": "cpu", "max_length": 128}, pruning="off"
    )
    assert (encoder.model, encoder.device, encoder.reranker.max_length) == (model, "cpu", 128)
    ours = GratingRerank(model=encoder, top_n=2)
    assert ours.reranker is encoder.reranker
    wanted = CrossEncoderReranker(model=encoder, top_n=2).compress_documents(documents, QUERY)
    assert [document.id for document in ours.compress_documents(documents, QUERY)] == [d.id for d in wanted]
    assert GratingRerank(model=encoder, max_length=64).reranker.max_length == 64
    assert GratingRerank(model=GratingCrossEncoder(reranker=reranker)).reranker is reranker


def test_flashranks_names_of_models(monkeypatch, tmp_path):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ModelNotFoundError, match="cross-encoder/ms-marco-TinyBERT-L2-v2"):
        GratingRerank(model="ms-marco-TinyBERT-L-2-v2", top_n=2)


class Remote(BaseCrossEncoder):
    def score(self, text_pairs):
        raise NotImplementedError


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"model": Remote()}, "model=.*Remote.* must be a name"),
        ({"model_kwargs": {"trust_remote_code": True}}, "(?m)^trust_remote_code$"),
        ({"client": object()}, "client is not a parameter of GratingRerank: give .* model, or .* reranker"),
        ({"cohere_api_key": "secret", "top_n": 2}, "cohere_api_key is not a parameter .*: leave it out"),
        ({"jina_api_key": "secret"}, "jina_api_key is not a parameter .*: leave it out"),
        ({"base_url": "https://example.org"}, "base_url is not a parameter .*: leave it out"),
    ],
)
def test_what_has_no_place_here_is_refused(model, given, message):
    with pytest.raises(ValueError, match=message):
        GratingRerank(**{"model": model, **given})


def test_rerank_as_cohere_and_jina_do(reranker, documents):
    texts = [document.page_content for document in documents]

    def wanted(top_n):
        ranking = reranker.rerank(QUERY, texts, top_n).ranking
        return [{"index": ranked.index, "relevance_score": ranked.score} for ranked in ranking]

    compressor = GratingRerank(reranker=reranker, top_n=2)
    assert compressor.rerank(documents, QUERY) == wanted(2)
    assert compressor.rerank(texts, QUERY, top_n=3) == wanted(3)
    assert compressor.rerank(documents, QUERY, top_n=None) == wanted(8)
    assert compressor.rerank([], QUERY) == []
    strict = GratingRerank(reranker=reranker, top_n=8, score_threshold=wanted(8)[1]["relevance_score"])
    assert strict.rerank(documents, QUERY) == wanted(8)[:2]
    for top_n in (0, -2):
        with pytest.raises(ValueError, match=f"top_n={top_n}"):
            compressor.rerank(documents, QUERY, top_n=top_n)
    with pytest.raises(ValueError, match=r"documents\[1\] is a int"):
        compressor.rerank(["text", 3], QUERY)


def test_mappings_are_read_field_by_field(reranker, documents):
    compressor = GratingRerank(reranker=reranker, top_n=None)
    mappings = [{"title": f"Text {document.id}", "text": document.page_content} for document in documents]
    assert compressor.rerank(mappings, QUERY, rank_fields=["text", "author"]) == compressor.rerank(
        [f"text: {document.page_content}" for document in documents], QUERY
    )
    assert compressor.rerank(mappings, QUERY) == compressor.rerank(
        [f"title: Text {document.id}\ntext: {document.page_content}" for document in documents], QUERY
    )
