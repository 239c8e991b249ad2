"""float32 parity with transformers' padded models: the ground that everything else stands on."""

import random
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from grating_core import Reranker, UnsupportedModelError
from grating_core.models.families import FAMILIES, find_family
from tests.core.conftest import WINDOW, WORDS
from tests.core.parity import TOLERANCE, load, padded, padded_scores, random_text

# Length 1, none at all, uneven lengths, and more than the window holds.
LENGTHS = [1, 0, 5, 17, 2, 90, 40, 300, 33, 1]


@pytest.mark.parametrize("slice_tokens", [1, 130, 10**6])
def test_scores_equal_transformers_whatever_the_chunks_and_the_order(tiny: Path, slice_tokens: int) -> None:
    seed = random.randrange(10**6)
    print("seed", seed)  # shown when the test fails
    source = random.Random(seed)
    query = random_text(3, source, WORDS)
    documents = [random_text(length, source, WORDS) for length in LENGTHS]
    expected = padded_scores(tiny, [(query, document) for document in documents])
    assert max(expected) - min(expected) > 100 * TOLERANCE

    reranker = load(tiny, slice_tokens=slice_tokens)
    order = source.sample(range(len(documents)), len(documents))
    ranking = reranker.rerank(query, [documents[i] for i in order], top_k=len(documents)).ranking
    assert {order[r.index]: r.score for r in ranking} == pytest.approx(dict(enumerate(expected)), abs=TOLERANCE)
    assert [r.score for r in ranking] == sorted((r.score for r in ranking), reverse=True)


def test_one_candidate_of_the_longest_window(tiny: Path) -> None:
    pair = ("w1 w2", random_text(WINDOW, random.Random(1), WORDS))
    reranker = load(tiny)
    result = reranker.rerank(*pair[:1], [pair[1]])
    assert result.trace.lengths == (WINDOW,) == (reranker.max_length,)
    assert result.trace.truncated == (0,)
    assert result.ranking[0].score == pytest.approx(padded_scores(tiny, [pair])[0], abs=TOLERANCE)


@torch.inference_mode()
def test_provisional_scores_are_the_head_on_intermediate_states(tiny: Path) -> None:
    query, document = "w1 w2 w3", random_text(40, random.Random(2), WORDS)
    model = AutoModelForSequenceClassification.from_pretrained(tiny, attn_implementation="eager").eval()
    batch = padded(tiny, [(query, document)])
    layers = model.get_submodule(FAMILIES[model.config.architectures[0]].layers)
    expected = []
    for last in range(1, len(layers)):
        # The model cut short after a layer reads that layer's states with its own norm, pooling and head.
        shorter = AutoModelForSequenceClassification.from_pretrained(tiny, attn_implementation="eager").eval()
        parent, _, name = FAMILIES[model.config.architectures[0]].layers.rpartition(".")
        setattr(shorter.get_submodule(parent), name, layers[:last])
        shorter.config.num_hidden_layers = last
        expected.append(shorter(**batch).logits.item())
    trace = load(tiny).rerank(query, [document]).trace
    assert [layer.scores[0] for layer in trace.layers[:-1]] == pytest.approx(expected, abs=TOLERANCE)


def test_bfloat16_stays_close(tiny: Path) -> None:
    source = random.Random(3)
    pairs = [("w5 w6", random_text(length, source, WORDS)) for length in (3, 20, 60, 80)]
    exact, rounded = load(tiny).score(pairs), load(tiny, dtype="bfloat16").score(pairs)
    spread = max(exact) - min(exact)
    assert rounded == pytest.approx(exact, abs=max(0.1 * spread, 0.1))
    assert rounded != exact


def test_the_real_model_equals_transformers(bundled: Reranker) -> None:
    source = random.Random(4)
    vocabulary = [
        "Berlin",
        "museum",
        "people",
        "東京",
        "שלום",
        "🎉",
        "naïve",
        "inhabitants,",
        "(population)",
        "the",
        "of",
        "and",
        "in",
        "3,520,031",
    ]
    query = "How many people live in Berlin?"
    documents = [random_text(length, source, vocabulary) for length in (0, 1, 7, 60, 150, 700)]
    expected = padded_scores(bundled.model_path, [(query, document) for document in documents])
    assert bundled.score([(query, document) for document in documents]) == pytest.approx(expected, abs=TOLERANCE)


def test_an_unknown_architecture_is_told_what_is_supported() -> None:
    for architectures in (["MambaForCausalLM"], [], None):
        with pytest.raises(UnsupportedModelError, match=r"BertForSequenceClassification.*ModernBert"):
            find_family(architectures)
