"""Calls written for other rerankers, with import and class name changed."""

from pathlib import Path

import huggingface_hub.constants
import numpy as np
import pytest
import torch
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


class Table:
    """What is asked for its items gives the names of its columns, as a data frame does."""

    columns = ("text", "source")

    def __iter__(self):
        return iter(self.columns)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"model": Remote()},
            "model=.*Remote.* must be a name.* use a Remote with the library that it comes from",
        ),
        (
            {"model_kwargs": {"trust_remote_code": True}},
            "trust_remote_code has no place .* never run; leave it out",
        ),
        ({"trust_remote_code": True}, "trust_remote_code has no place .* never run; leave it out"),
        ({"use_fp16": True}, "use_fp16 has no place in GratingRerank: write dtype='float16'"),
        ({"model_kwargs": {"attn": 1}}, "attn has no place in GratingRerank: leave it out"),
        ({"model_kwargs": "cpu"}, "model_kwargs must be a dictionary of arguments, not a str"),
        ({"client": object()}, "client has no place in GratingRerank: give .* model, or .* reranker"),
        ({"cohere_api_key": "secret", "top_n": 2}, "cohere_api_key has no place .*; leave it out"),
        ({"jina_api_key": "secret"}, "jina_api_key has no place .*; leave it out"),
        ({"base_url": "https://example.org"}, "base_url has no place .*; leave it out"),
    ],
)
def test_what_has_no_place_here_is_refused(model, given, message):
    with pytest.raises(ValueError, match=message) as refusal:
        GratingRerank(**{"model": model, **given})
    assert "secret" not in str(refusal.value)


def test_a_reranker_goes_elsewhere(reranker):
    with pytest.raises(ValueError, match="model must be a name; a Reranker that is ready goes to reranker="):
        GratingRerank(model=reranker)


@pytest.mark.parametrize("name", ["rerank-v3.5", "ms-marco-MultiBERT-L-12", "jina-reranker-v2-base-multilingual"])
def test_names_at_services(name):
    with pytest.raises(ModelNotFoundError, match=r"name of .*such as|take|write 'jinaai/") as refusal:
        GratingRerank(model=name)
    assert "\n" not in str(refusal.value)
    assert refusal.value.__context__ is None


def test_what_asks_for_nothing_means_not_given(model, reranker):
    nothing = {
        "device": None, "dtype": None, "memory_budget": None, "pruning": None, "target": None, "adapter": None,
        "use_fp16": False, "trust_remote_code": False, "client": None, "recalibrate": False,
        "model_kwargs": {"config_kwargs": {}}, "revision": None, "token": None, "local_files_only": None,
        "scores": None, "prefix_metadata": None,
    }  # fmt: skip
    asked = GratingRerank(model=Path(model), **nothing)
    assert asked == GratingRerank(model=model)
    assert asked.reranker is GratingRerank(model=model).reranker
    assert GratingRerank(model=Path(reranker.model_path)).model == str(reranker.model_path)
    assert GratingRerank(model=model, top_n=None).top_n is None  # which CohereRerank takes for all
    assert GratingRerank(model=model, top_n=np.int64(4), dtype=torch.float32).model_dump()["top_n"] == 4
    assert GratingCrossEncoder(model=model, dtype=None).reranker is asked.reranker


def test_rerank_as_cohere_and_jina_do(reranker, documents):
    texts = [document.page_content for document in documents]

    def wanted(top_n):
        ranking = reranker.rerank(QUERY, texts, top_n).ranking
        return [{"index": ranked.index, "relevance_score": ranked.probability} for ranked in ranking]

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
    assert compressor.rerank(texts, QUERY, top_n=np.int64(3)) == wanted(3)
    for given in ("a text", {"a": "text"}, {"a text"}, Table(), None, 3):
        with pytest.raises(
            ValueError, match="documents must be a list of texts, Documents or dictionaries, not a"
        ):
            compressor.rerank(given, QUERY)
    for top_n in ("3", 2.5):
        with pytest.raises(ValueError, match="top_n="):
            compressor.rerank(texts, QUERY, top_n=top_n)
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
