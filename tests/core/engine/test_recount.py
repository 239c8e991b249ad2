"""A model in 8 bits with recounts: whoever is in doubt gets the score of the model without 8 bits."""

import random
from pathlib import Path

import pytest
import torch

from grating_core import Request, Reranker
from grating_core.engine.recount import Recount
from grating_core.errors import ScoreError
from grating_core.kernels.choice import kernels
from grating_core.pruning import MarginPolicy
from tests.core.conftest import WORDS
from tests.core.parity import load, random_text

SOURCE = random.Random(5)
TEXTS = [random_text(length, SOURCE, WORDS) for length in (3, 40, 9, 1, 25, 12, 33, 7, 18, 5)]


def recounting(directory: Path, doubt: float, **settings: object) -> tuple[Reranker, Reranker]:
    """Load a model in 8 bits with a doubt, and without 8 bits."""
    without = load(directory, dtype="float32")
    reranker = load(directory, dtype="int8", **settings)
    lossless = without.scorer.model
    assert reranker.scorer.model.dtype in (torch.float32, torch.bfloat16)
    reranker.scorer.recount = Recount(lossless, doubt)
    return reranker, without


def test_in_great_doubt_all_is_as_without_8_bits(tiny: Path) -> None:
    reranker, without = recounting(tiny, 1e9)
    for top_k in (1, 4):
        found, expected = (one.rerank("w1 w2", TEXTS, top_k) for one in (reranker, without))
        assert found.ranking == expected.ranking
        assert found.trace.layers[-1].scores == expected.trace.layers[-1].scores
        assert found.trace.recounted == tuple(range(len(TEXTS)))
        assert found.trace.compute_share == pytest.approx(2)
        assert found.trace.summary()["recounted"] == list(range(len(TEXTS)))


def test_without_doubt_nothing_is_recounted(tiny: Path) -> None:
    reranker, _ = recounting(tiny, 0.0)
    plain = load(tiny, dtype="int8")
    assert reranker.rerank("w1 w2", TEXTS, 3).ranking == plain.rerank("w1 w2", TEXTS, 3).ranking
    assert reranker.rerank("w1 w2", TEXTS, 3).trace.recounted == ()
    # Where all are returned there is no bar.
    reranker, _ = recounting(tiny, 1e9)
    everything = reranker.rerank("w1 w2", TEXTS, len(TEXTS))
    assert everything.ranking == plain.rerank("w1 w2", TEXTS, len(TEXTS)).ranking
    assert reranker.score([("w1 w2", text) for text in TEXTS]) == plain.score([("w1 w2", text) for text in TEXTS])


def test_only_those_near_the_bar_are_recounted(tiny_bert: Path) -> None:
    plain, exact = load(tiny_bert, dtype="int8"), load(tiny_bert, dtype="float32")
    ordered = plain.rerank("w1 w2", TEXTS, len(TEXTS)).ranking
    bar = (ordered[3].score + ordered[4].score) / 2
    doubt = max(abs(ranked.score - bar) for ranked in ordered[2:6]) + 1e-6
    reranker, _ = recounting(tiny_bert, doubt)
    found = reranker.rerank("w1 w2", TEXTS, 4)
    near = {ranked.index for ranked in ordered if abs(ranked.score - bar) <= doubt}
    assert set(found.trace.recounted) == near < set(range(len(TEXTS)))
    scores = exact.score([("w1 w2", text) for text in TEXTS])
    for ranked in found.ranking:
        same = scores[ranked.index] == ranked.score
        assert same == (ranked.index in near)
    assert [ranked.score for ranked in found.ranking] == sorted((r.score for r in found.ranking), reverse=True)


def test_a_broken_score_is_told_by_the_number_of_its_document(tiny_bert: Path) -> None:
    ordered = load(tiny_bert, dtype="int8").rerank("w1 w2", TEXTS, len(TEXTS)).ranking
    near = sorted(ranked.index for ranked in ordered[-2:])
    assert near[0] > 0
    reranker, _ = recounting(tiny_bert, (ordered[-2].score - ordered[-1].score) / 2 + 1e-6)
    for weight in reranker.scorer.recount.model.head.values():
        weight.fill_(torch.nan)
    with pytest.raises(ScoreError, match=rf"score for document {near[0]} is not a finite number \(2 such"):
        reranker.rerank("w1 w2", TEXTS, len(TEXTS) - 1)
    assert reranker.score([("w1 w2", "w3")])  # nothing is recounted there


def test_early_winners_stay_where_they_are(tiny_bert: Path) -> None:
    margins = (0.0,) * load(tiny_bert).scorer.model.depth
    policy = MarginPolicy(tuple(float("inf") for _ in margins), margins)
    plain = load(tiny_bert, dtype="int8", pruning=policy)
    expected = plain.rerank("w1 w2", TEXTS, 6, scores="estimated")
    reranker, _ = recounting(tiny_bert, 1e9, pruning=policy)
    found = reranker.rerank("w1 w2", TEXTS, 6, scores="estimated")
    early = [ranked for ranked in expected.ranking if ranked.estimated]
    assert found.ranking[: len(early)] == early
    assert len(found.ranking) == 6
    assert {ranked.index for ranked in early}.isdisjoint(found.trace.recounted)


@pytest.mark.skipif(kernels().level is None, reason="torch gives other bits for rows in another call")
def test_together_each_is_recounted_as_alone(tiny_bert: Path) -> None:
    reranker, _ = recounting(tiny_bert, 0.05)
    requests = [(f"w{number} w2", TEXTS[number:], 3) for number in range(5)]
    alone = [reranker.rerank(*request) for request in requests]
    together = reranker.rerank_many([Request(*request) for request in requests])
    assert [one.ranking for one in together] == [one.ranking for one in alone]
    assert [one.trace.recounted for one in together] == [one.trace.recounted for one in alone]
