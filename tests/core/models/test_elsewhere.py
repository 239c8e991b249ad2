"""Names that other libraries and services have for rerankers."""

import pytest

from grating_core import ModelNotFoundError, Reranker, StreamedCausalLM
from grating_core.models.directory import find_model
from grating_core.models.elsewhere import hub_name


@pytest.mark.parametrize(
    ("name", "whose", "instead"),
    [
        ("ms-marco-MiniLM-L-12-v2", "FlashRank's", "cross-encoder/ms-marco-MiniLM-L12-v2"),
        ("ms-marco-MultiBERT-L-12", "FlashRank's", "BAAI/bge-reranker-v2-m3"),
        ("rank-T5-flan", "FlashRank's", "cross-encoder/ms-marco-MiniLM-L12-v2"),
        ("rerank-v3.5", "Cohere's", "BAAI/bge-reranker-v2-m3"),
        ("rerank-english-v3.0", "Cohere's", "BAAI/bge-reranker-v2-m3"),
        ("cohere.rerank-v3-5:0", "Cohere's", "BAAI/bge-reranker-v2-m3"),
        ("amazon.rerank-v1:0", "Amazon's", "BAAI/bge-reranker-v2-m3"),
        ("rerank-2", "Voyage AI's", "BAAI/bge-reranker-v2-m3"),
        ("rerank-2.5-lite", "Voyage AI's", "BAAI/bge-reranker-v2-m3"),
        ("jina-colbert-v2", "Jina AI's", "BAAI/bge-reranker-v2-m3"),
        ("jina-reranker-v2-base-multilingual", "lacks its owner", "jinaai/jina-reranker-v2-base-multilingual"),
        ("ctxl-rerank-v2-instruct-multilingual", "Contextual AI's", "Qwen/Qwen3-Reranker-0.6B"),
        ("ctxl-rerank-v2-instruct-multilingual-1b", "lacks its owner", "ContextualAI/ctxl-rerank-v2"),
        ("semantic-ranker-512@latest", "Google's", "BAAI/bge-reranker-v2-m3"),
        ("gpt-4o-mini", "a language-model service's", "Qwen/Qwen3-Reranker-0.6B"),
        ("ms-marco-MiniLM-L6-v2", "lacks its owner", "cross-encoder/ms-marco-MiniLM-L6-v2"),
        ("bge-reranker-base", "lacks its owner", "BAAI/bge-reranker-base"),
        ("https://huggingface.co/BAAI/bge-reranker-base/tree/main", "address", "'BAAI/bge-reranker-base'"),
        ("huggingface.co/BAAI/bge-reranker-base", "address", "'BAAI/bge-reranker-base'"),
    ],
)
def test_one_sentence_says_whose_name_it_is_and_what_to_take(name, whose, instead):
    with pytest.raises(ModelNotFoundError) as refusal:
        find_model(name)
    said = str(refusal.value)
    assert all(part in said for part in (repr(name), whose, instead))
    assert "\n" not in said
    assert (refusal.value.__cause__, refusal.value.__context__) == (None, None), "nothing was asked of the hub"


def test_everything_that_loads_says_so():
    for load in (Reranker.from_pretrained, Reranker.shared, StreamedCausalLM.from_pretrained):
        with pytest.raises(ModelNotFoundError, match="Cohere's name"):
            load("rerank-v3.5")


def test_a_directory_of_that_name_is_yours(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("rerank-v3.5", "ms-marco-MiniLM-L-12-v2"):
        (tmp_path / name).mkdir()
        assert find_model(name).name == name
        assert hub_name(name) == name


def test_the_same_weights_under_another_name():
    assert hub_name("ms-marco-TinyBERT-L-2-v2") == "cross-encoder/ms-marco-TinyBERT-L2-v2"
    assert hub_name("rerank-v3.5") == "rerank-v3.5"
    assert hub_name("x" * 100_000) == "x" * 100_000
