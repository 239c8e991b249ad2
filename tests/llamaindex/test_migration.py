"""Calls written for other rerankers, with nothing changed but import and class name."""

from pathlib import Path

import huggingface_hub.constants
import numpy as np
import pytest
import torch
from llama_index.core.llms import MockLLM
from llama_index.core.postprocessor import SentenceTransformerRerank
from llama_index.core.prompts import PromptTemplate
from llama_index.postprocessor.grating import GratingRerank

from grating_core import ModelNotFoundError

MODEL = "bundled:ms-marco-minilm-l12"
QUERY = "How many people live in Berlin?"


@pytest.mark.parametrize(
    ("args", "named", "wanted"),
    [
        ((), {"model": MODEL, "top_n": 5}, {"top_n": 5}),
        # llama_index.core.postprocessor.SentenceTransformerRerank
        ((4, MODEL), {}, {"top_n": 4}),
        ((4, MODEL, "cpu", True), {}, {"top_n": 4, "device": "cpu", "keep_retrieval_score": True}),
        ((4, MODEL, None, False, True), {}, {"top_n": 4, "device": None}),
        ((4,), {"model": MODEL, "trust_remote_code": False}, {"top_n": 4}),
        # llama_index.postprocessor.sbert_rerank.SentenceTransformerRerank
        ((MODEL, "cpu", None, 5), {}, {"device": "cpu", "top_n": 5}),
        ((MODEL,), {"cache_folder": None, "cross_encoder_kwargs": None}, {}),
        ((MODEL,), {"cross_encoder_kwargs": {"max_length": 128}}, {"max_length": 128}),
        (
            (MODEL,),
            {
                "cross_encoder_kwargs": {
                    "model_kwargs": {"torch_dtype": torch.float32},
                    "trust_remote_code": True,
                    "local_files_only": False,
                    "max_length": None,
                }
            },
            {"dtype": "float32", "max_length": None},
        ),
        (
            (MODEL,),
            {"cache_folder": "models", "cross_encoder_kwargs": {"revision": "main", "device": "cpu"}},
            {"cache_dir": "models", "revision": "main", "device": "cpu"},
        ),
        ((MODEL, "cpu"), {"cross_encoder_kwargs": {"device": "abacus"}}, {"device": "cpu"}),
        # FlashRankRerank
        ((), {"model": MODEL, "max_length": 256, "top_n": 20}, {"max_length": 256, "top_n": 20}),
    ],
)
def test_a_call_works_as_it_is(args, named, wanted):
    postprocessor = GratingRerank(*args, **named)
    assert postprocessor.model == MODEL
    assert {name: getattr(postprocessor, name) for name in wanted} == wanted


@pytest.mark.parametrize(
    ("named", "match"),
    [
        ({"use_fp16": True}, "use_fp16 has no place in GratingRerank: write dtype='float16'"),
        ({"model": MockLLM()}, r"model=MockLLM\(…\) must be a name"),
        ({"cross_encoder_kwargs": {"activation_fn": torch.sigmoid}}, "activation_fn .*raw_scores="),
        (
            {"cross_encoder_kwargs": {"model_kwargs": {"attn_implementation": "eager"}}},
            "attn_implementation has no",
        ),
        ({"llm": MockLLM()}, "llm has no place.*name a reranker with model="),
        ({"choice_batch_size": 5}, "choice_batch_size has no place.*memory_budget="),
        ({"choice_select_prompt": PromptTemplate("{query_str}")}, "choice_select_prompt .*instruction="),
        ({"rankgpt_rerank_prompt": PromptTemplate("{query}")}, "rankgpt_rerank_prompt .*instruction="),
        ({"verbose": True}, "verbose has no place.*events"),
        ({"api_key": "sesame"}, "api_key has no place.*on this machine"),
        ({"max_tokens_per_doc": 512}, "max_tokens_per_doc has no place.*max_length="),
        ({"top_k": 3}, "top_k"),
    ],
)
def test_what_has_no_place_here_is_refused_with_advice(named, match):
    with pytest.raises(ValueError, match=match) as refusal:
        GratingRerank(**{"model": MODEL, **named})
    assert "sesame" not in str(refusal.value)


def test_what_asks_for_nothing_is_not_refused():
    plain = GratingRerank(model=MODEL)
    nothing = {
        "llm": None, "verbose": False, "api_key": None, "choice_select_prompt": None, "top_n": None,
        "dtype": None, "use_fp16": False, "trust_remote_code": False, "callback_manager": None, "device": None,
        "pruning": None, "metadata_mode": None, "scores": None, "memory_budget": False, "cross_encoder_kwargs": {},
    }  # fmt: skip
    asked = GratingRerank(model=Path(MODEL), **nothing)
    assert (asked.to_dict(), asked.reranker) == (plain.to_dict(), plain.reranker)
    assert GratingRerank(model=MODEL, top_n=np.int64(4), dtype=torch.float32).to_dict()["top_n"] == 4


def test_names_at_services():
    for name in ("rerank-english-v3.0", "rerank-2", "jina-reranker-v2-base-multilingual", "rank-T5-flan"):
        with pytest.raises(ModelNotFoundError, match=r"name of a|write 'jinaai/") as refusal:
            GratingRerank(2, name)
        assert "\n" not in str(refusal.value)
        assert refusal.value.__context__ is None


@pytest.mark.parametrize(
    ("args", "named"), [((MockLLM(),), {}), ((1, "m", "cpu", True, True, 6), {}), ((None,), {})]
)
def test_positions_that_cannot_be_told_apart(args, named):
    with pytest.raises(ValueError, match=r"by position.*by name"):
        GratingRerank(*args, **named)


def test_an_argument_given_twice():
    with pytest.raises(ValueError, match="top_n: given by position and by name"):
        GratingRerank(3, top_n=3)


def test_flashranks_names_lead_to_the_published_weights(reranker, nodes, tmp_path, monkeypatch):
    """From the hub's cache, as if it had been fetched."""
    repository = tmp_path / "models--cross-encoder--ms-marco-MiniLM-L12-v2"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    (repository / "snapshots").mkdir()
    (repository / "snapshots" / ("0" * 40)).symlink_to(reranker.model_path)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    postprocessor = GratingRerank(model="ms-marco-MiniLM-L-12-v2", top_n=2, max_length=512)
    assert postprocessor.model == "cross-encoder/ms-marco-MiniLM-L12-v2"
    assert postprocessor.postprocess_nodes(nodes, query_str=QUERY)[0].node_id == "node-0"


def test_a_directory_of_that_name_is_yours(reranker, tmp_path, monkeypatch):
    (tmp_path / "ms-marco-MiniLM-L-12-v2").symlink_to(reranker.model_path)
    monkeypatch.chdir(tmp_path)
    assert GratingRerank(model="ms-marco-MiniLM-L-12-v2").model == "ms-marco-MiniLM-L-12-v2"


def test_ranks_as_what_it_replaces(reranker, nodes):
    """The same weights in SentenceTransformerRerank, whose scores are probabilities as well."""
    arguments = (3, str(reranker.model_path), "cpu", True)
    theirs = SentenceTransformerRerank(*arguments).postprocess_nodes(
        [node.model_copy(deep=True) for node in nodes], query_str=QUERY
    )
    ours = GratingRerank(*arguments, dtype="float32").postprocess_nodes(nodes, query_str=QUERY)
    assert [node.node_id for node in ours] == [node.node_id for node in theirs]
    assert [node.metadata for node in ours] == [node.metadata for node in theirs]
    assert [node.score for node in ours] == pytest.approx([float(node.score) for node in theirs], abs=1e-4)
