"""Parity where the texts are real, and that no family goes without it."""

import itertools
from dataclasses import replace

import pytest

from grating_core import ModelNotFoundError, Reranker
from grating_core.demo import QUESTION, load_passages
from grating_core.models import bundled as module
from grating_core.models.families import FAMILIES
from tests.core.conftest import FAMILIES as TINY
from tests.core.models.test_decoders import CAUSAL
from tests.core.parity import TOLERANCE, load, padded_scores

# Uneven: every third one is cut short, and the first two are next to nothing.
PASSAGES = ["", "try", *(p if i % 3 else p[: 40 + 10 * i] for i, p in enumerate(load_passages()[:60:10]))]
PAIRS = [(QUESTION, passage) for passage in PASSAGES]


@pytest.fixture(scope="module")
def expected(bundled: Reranker) -> list[float]:
    return padded_scores(bundled.model_path, PAIRS)


def test_every_family_has_a_tiny_model() -> None:
    # Models that transformers cannot make have tests of their own.
    tiny = {type(make()).__name__ for make in (*TINY.values(), *CAUSAL.values())}
    written_out = {
        "LayerWiseMiniCPMForCausalLM",
        "CostWiseGemmaForCausalLM",
        "NewForSequenceClassification",
        "JinaForRanking",
    }
    assert tiny | written_out == set(FAMILIES)


# Token by token a passage takes seconds.
@pytest.mark.parametrize(("slice_tokens", "count"), [(1, 3), (50, len(PAIRS)), (10**6, len(PAIRS))])
def test_the_real_model_on_real_passages(
    bundled: Reranker, expected: list[float], slice_tokens: int, count: int
) -> None:
    found = load(bundled.model_path, slice_tokens=slice_tokens).score(PAIRS[:count])
    assert found == pytest.approx(expected[:count], abs=TOLERANCE)


def test_bfloat16_ranks_real_passages_the_same(bundled: Reranker, expected: list[float]) -> None:
    found = load(bundled.model_path, dtype="bfloat16").score(PAIRS)
    assert found == pytest.approx(expected, abs=0.5)
    for one, other in itertools.permutations(range(len(PAIRS)), 2):
        if expected[one] > expected[other] + 1.0:
            assert found[one] > found[other]


def test_converted_weights_of_another_digest_are_refused(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRATING_CACHE", str(tmp_path))
    recipe = module.RECIPES["bundled:ms-marco-minilm-l12"]
    other = replace(recipe, weights="0" * 64)
    monkeypatch.setitem(module.RECIPES, "bundled:ms-marco-minilm-l12", other)
    with pytest.raises(ModelNotFoundError, match="converted weights have the SHA-256 8a5a688719f1aad3"):
        module.bundled_model("bundled:ms-marco-minilm-l12")
    assert list(tmp_path.rglob("model.safetensors")) == []
