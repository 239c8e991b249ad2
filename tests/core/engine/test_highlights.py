"""Highlights are sentences of the returned documents, and finding them changes no score."""

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForSequenceClassification

from grating_core import Request, Reranker
from grating_core.engine.highlights import Highlighter
from grating_core.pruning import MarginPolicy
from grating_core.text.pairs import Segments, TokenisedPair
from grating_core.text.sentences import Divided
from tests.core.conftest import WORDS, save_model
from tests.core.parity import load, random_text

SOURCE = random.Random(11)
QUERY = "w1 w2 w3"


def text(*lengths: int) -> str:
    """Return a text of sentences with so many words."""
    return " ".join(f"W1 {random_text(length, SOURCE, WORDS)}." for length in lengths)


TEXTS = [text(*lengths) for lengths in ((9, 5, 12, 7), (6,), (20, 4), (3, 3, 3, 3, 3, 3, 3, 3), (1,), (40, 30))]


def test_highlights_change_no_score(tiny: Path) -> None:
    reranker = load(tiny)
    plain, found = (reranker.rerank(QUERY, TEXTS, 4, highlights=wanted) for wanted in (False, True))
    assert [(one.index, one.score) for one in found.ranking] == [(one.index, one.score) for one in plain.ranking]
    assert not any(one.highlights for one in plain.ranking)
    for one in found.ranking:
        assert one.highlights[0].worth == 1
        worths = [highlight.worth for highlight in one.highlights]
        assert worths == sorted(worths, reverse=True)
        assert worths[-1] >= 0.5
        for highlight in one.highlights:
            sentence = one.text[highlight.start : highlight.stop]
            assert sentence == sentence.strip()
            assert (sentence[:3], sentence[-1]) == ("W1 ", ".")


def test_a_single_sentence_alone_scores_what_its_document_does(tiny: Path) -> None:
    reranker = load(tiny)
    job = reranker.job(Request(QUERY, [TEXTS[1], TEXTS[4], TEXTS[0]], 3, highlights=True))
    with reranker.scorer.turn:
        reranker.scorer.run([job])
    scores = job.future.result().trace.layers[-1].scores
    assert job.highlighter is not None
    model = reranker.scorer.model
    for candidate in (0, 1):
        (alone,) = job.highlighter.alone(model, [candidate])
        if alone is None:  # a mean has no scoring token
            assert model.shape.pooling == "mean" or model.spec.layers[0].relative is not None
            continue
        assert alone == pytest.approx([scores[candidate]], abs=1e-4)
    (several,) = job.highlighter.alone(model, [2])
    assert several is None or (len(several) == 4 and np.isfinite(several).all())


def test_highlights_do_not_depend_on_neighbours(tiny_bert: Path) -> None:
    reranker = load(tiny_bert)
    together = {one.index: one for one in reranker.rerank(QUERY, TEXTS, len(TEXTS), highlights=True).ranking}
    for index, one in enumerate(TEXTS):
        (single,) = reranker.rerank(QUERY, [one], 1, highlights=True).ranking
        assert [highlight.start for highlight in single.highlights] == [
            highlight.start for highlight in together[index].highlights
        ]


def test_what_has_no_sentence_has_no_highlight(tiny_bert: Path) -> None:
    found = load(tiny_bert).rerank(QUERY, ["", " ", "w1"], 3, highlights=True)
    highlights = {one.index: one.highlights for one in found.ranking}
    assert highlights[0] == highlights[1] == ()
    assert [(one.start, one.stop, one.worth) for one in highlights[2]] == [(0, 2, 1.0)]
    (alone,) = load(tiny_bert).rerank(QUERY, [""], 1, highlights=True).ranking
    assert alone.highlights == ()


@pytest.mark.parametrize("family", ["bert", "qwen2", "modernbert-mean", "deberta-v3"])
def test_a_document_in_several_slices_has_the_highlights_of_one(family: str, tmp_path: Path) -> None:
    directory = save_model(tmp_path, family)
    documents = [text(9, 8, 7, 6), text(12, 10, 5)]
    whole, divided = (
        load(directory, slice_tokens=most).rerank(QUERY, documents, 2, highlights=True).ranking
        for most in (10**6, 8)
    )
    for one, other in zip(whole, divided, strict=True):
        assert [(found.start, found.stop) for found in one.highlights] == [
            (found.start, found.stop) for found in other.highlights
        ]
        assert [found.worth for found in one.highlights] == pytest.approx(
            [found.worth for found in other.highlights], abs=1e-3
        )


def test_tokens_of_white_space_are_no_sentence(tiny_bert: Path) -> None:
    model = load(tiny_bert).scorer.model
    highlighter = Highlighter(model.spec, lambda candidates, tokens: [Divided([], [])] * len(candidates))
    pair = TokenisedPair([2, 7, 8, 3, 9, 3], [0, 0, 0, 0, 1, 1], Segments((1, 3), (4, 5)))
    assert highlighter.found(model, [0], [[pair]]) == {0: ()}


def test_a_word_that_no_other_sentence_has_is_a_loss(tiny_bert: Path) -> None:
    scorer = load(tiny_bert).scorer
    document = "W4 w5 w6 w4. W1 w2 w3 w9. W4 w8 w7 w5."
    highlighter = Highlighter.of(scorer.model.spec, scorer.template, [document])
    encoded = scorer.template.encode(QUERY, [document])
    best, *_ = highlighter.found(scorer.model, [0], encoded)[0]  # no layer was seen, so losses alone tell
    assert document[best.start : best.stop] == "W1 w2 w3 w9."


def test_attention_to_the_query_is_that_of_the_model(tiny_bert: Path) -> None:
    reranker = load(tiny_bert)
    job = reranker.job(Request(QUERY, TEXTS, len(TEXTS), highlights=True))
    pairs = [pair for (pair,) in job.encoded]
    with reranker.scorer.turn:
        reranker.scorer.run([job])
    assert job.highlighter is not None
    model = AutoModelForSequenceClassification.from_pretrained(tiny_bert, attn_implementation="eager").eval()
    depth = model.config.num_hidden_layers
    for candidate, pair in enumerate(pairs):
        with torch.inference_mode():
            output = model(
                torch.tensor([pair.input_ids]),
                token_type_ids=torch.tensor([pair.token_type_ids]),
                output_attentions=True,
            )
        weights = output.attentions[depth - max(1, depth // 4)][0, :, 0].clone()
        weights[:, slice(*pair.segments.document)] = 0
        wanted = (weights / weights.sum(1, keepdim=True))[:, slice(*pair.segments.query)].mean(0)
        torch.testing.assert_close(job.highlighter.attention[candidate], wanted, atol=1e-4, rtol=0)


def test_highlights_lie_in_what_was_read(tiny_bert: Path) -> None:
    reranker = load(tiny_bert, max_length=24)
    found = reranker.rerank(QUERY, [text(8, 8, 8, 8, 8, 8)], 1, highlights=True)
    assert found.trace.truncated == (0,)
    assert all(one.start < 24 * 8 for one in found.ranking[0].highlights)


def test_a_document_that_leaves_early_has_highlights(tiny_bert: Path) -> None:
    reranker = load(tiny_bert)
    depth = reranker.scorer.model.depth
    early = MarginPolicy((0.0,) * (depth + 1), (0.0,) * (depth + 1))
    request = Request(QUERY, TEXTS, 2, scores="estimated", pruning=early, highlights=True)
    (found,) = reranker.rerank_many([request])
    assert len(found.ranking) == 2
    assert all(one.estimated and one.highlights[0].worth == 1 for one in found.ranking)


def test_windows_are_refused(tiny_bert: Path) -> None:
    reranker = load(tiny_bert, long_documents="windows")
    with pytest.raises(ValueError, match="highlights=True"):
        reranker.rerank(QUERY, TEXTS, 2, highlights=True)


def test_the_sentence_that_answers_is_highlighted(bundled: Reranker) -> None:
    document = (
        "The city lies on a river. Many people visit it each year! Berlin had 3,520,031 inhabitants in 2015. "
        "The weather is mild. Its zoo is the oldest in the country."
    )
    (found,) = bundled.rerank("How many people live in Berlin?", [document], 1, highlights=True).ranking
    best = found.highlights[0]
    assert document[best.start : best.stop] == "Berlin had 3,520,031 inhabitants in 2015."


class WithoutDoubles(TorchDispatchMode):
    """Refuses float64 anywhere but on the CPU, as Apple's GPUs do."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        for one in tree_leaves(found):
            if isinstance(one, torch.Tensor) and one.dtype == torch.float64 and one.device.type != "cpu":
                raise TypeError(f"{func} made float64 on {one.device}")
        return found


@pytest.mark.skipif(not torch.accelerator.is_available(), reason="there is no accelerator")
def test_an_accelerator_needs_no_float64(tiny_bert: Path) -> None:
    device = str(torch.accelerator.current_accelerator())
    expected = load(tiny_bert).rerank(QUERY, TEXTS, 3, highlights=True)
    how = {"dtype": "float32", "device": device, "pruning": "off"}
    with Reranker.from_pretrained(tiny_bert, **how) as reranker, WithoutDoubles():
        found = reranker.rerank(QUERY, TEXTS, 3, highlights=True)
    for one, other in zip(found.ranking, expected.ranking, strict=True):
        assert [(each.start, each.stop) for each in one.highlights] == [
            (each.start, each.stop) for each in other.highlights
        ]
