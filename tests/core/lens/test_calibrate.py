"""From texts to a lens, on the real model and on tiny ones."""

import copy
import random
from pathlib import Path

import numpy as np
import pytest

from grating_core import Prompt, Reranker
from grating_core.demo import load_passages
from grating_core.lens.requests import make_requests
from tests.core.conftest import BUNDLED, WORDS, save_model
from tests.core.parity import load, random_text

SOURCE = random.Random(11)
TEXTS = [random_text(SOURCE.randint(5, 40), SOURCE, WORDS) for _ in range(60)]
QUESTIONS = [random_text(4, SOURCE, WORDS) for _ in range(40)]


def test_queries_are_made_of_leading_sentences() -> None:
    texts = [f"Number {i} is a number of some kind. It is not {i + 1}." for i in range(30)]
    requests = make_requests([*texts, "short", ""], None, candidates=5, count=12)
    assert len(requests) == 12
    for request in requests:
        assert request.query.endswith("of some kind.")
        assert len(request.documents) == 5
        # The text that the query is from would be found too easily.
        assert not any(document.startswith(request.query) for document in request.documents)
    assert requests == make_requests([*texts, "short", ""], None, candidates=5, count=12)


def test_documents_that_share_words_with_the_query_come_first() -> None:
    texts = ["red apple", "green pear", "blue sky", "red sky"]
    requests = make_requests(texts, ["red apple"] * 30, candidates=2, count=50)
    assert len(requests) == 30
    assert requests[0].documents == ["red apple", "red sky"]


@pytest.mark.usefixtures("without_8_bits")
@pytest.mark.parametrize("how", ["encoder", "decoder"])
@pytest.mark.parametrize("budget", [None, "300MB"])
def test_a_lens_for_any_model(how: str, budget: str | None, tmp_path: Path, spill_directory: Path) -> None:
    settings = {"memory_budget": budget, "pruning": "auto"}
    if how == "decoder":
        settings["template"] = Prompt(pieces=("w9 w8 w7 w6 w5 w4 w3 w2 {query} w1 ", "{document} w11 w12"))
    directory = save_model(tmp_path, "bert" if how == "encoder" else "llama")
    reranker = load(directory, **settings)
    assert reranker.lens is None
    calibrated = reranker.calibrate(TEXTS, QUESTIONS, candidates=10, top_k=3, requests=40)
    assert (calibrated.summary.requests, calibrated.summary.corpora) == (40, 1)
    assert reranker.lens is not None
    # 40 requests are not evidence for 98 %: nothing may be dropped.
    result = reranker.rerank(QUESTIONS[0], TEXTS[:10], 3)
    assert result.trace.compute_share == 1
    assert [layer.layer for layer in result.trace.layers] == [1, 2, 3, 4, 5]
    careless = load(directory, **settings, target=0.6)
    result = careless.rerank(QUESTIONS[0], TEXTS[:10], 3)
    policy = calibrated.margins.policy(10, 3, target=0.6, guarantee="share", exact=True)
    looked_at = [layer.layer for layer in result.trace.layers if layer.scores]
    assert looked_at == [*(layer for layer in range(5) if policy.looks(layer)), 5]
    assert len(looked_at) > 1
    full = {ranked.index: ranked.score for ranked in load(directory, **settings | {"pruning": "off"}).rerank(
        QUESTIONS[0], TEXTS[:10], 10).ranking}  # fmt: skip
    for ranked in result.ranking:
        assert ranked.score == pytest.approx(full[ranked.index], abs=1e-4)


@pytest.mark.slow
def test_a_lens_sees_what_the_head_does_not(bundled: Reranker, tmp_path: Path, spill_directory: Path) -> None:
    passages = [" ".join(passage.split()[:40]) for passage in load_passages()]
    calibrated = bundled.calibrate(passages, candidates=10, top_k=3, requests=60, output=tmp_path / "lens")
    gammas = calibrated.summary.gammas
    assert min(gammas[2:]) > 0.25
    assert gammas[-1] > 0.9
    assert calibrated.summary.agreement > 0.9
    assert bundled.lens is None  # it was made with pruning="off"
    reranker = Reranker.from_pretrained(
        bundled.model_path, dtype="float32", device="cpu", lens=tmp_path / "lens", target=0.8
    )
    shares, kept = [], []
    for request in make_requests(passages, None, candidates=10, count=12, seed=5):
        expected = {
            ranked.index: ranked.score for ranked in bundled.rerank(request.query, request.documents, 3).ranking
        }
        result = reranker.rerank(request.query, request.documents, 3)
        shares.append(result.trace.compute_share)
        kept.append(np.mean([ranked.index in expected for ranked in result.ranking]))
        for ranked in result.ranking:
            assert ranked.score == pytest.approx(expected.get(ranked.index, ranked.score), abs=1e-4)
    assert np.mean(shares) < 0.9
    assert np.mean(kept) > 0.65


@pytest.mark.usefixtures("without_8_bits")
def test_the_newest_lens_is_that_of_a_copy(
    tiny_bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GRATING_CACHE", str(tmp_path / "cache"))
    effort = {"candidates": 4, "top_k": 1, "requests": 20}
    with load(tiny_bert, pruning="auto") as first:
        first.calibrate(TEXTS, **effort, output=tmp_path / "lens")
        with copy.copy(first) as second:
            assert second.settings.lens == str(tmp_path / "lens")
            newest = second.calibrate(TEXTS, **effort, seed=1)
            with copy.copy(second) as third:
                assert third.lens.summary == newest.summary != first.lens.summary


def test_bad_input_is_refused_before_work_starts(tiny_bert: Path) -> None:
    reranker = load(tiny_bert)
    with pytest.raises(ValueError, match=r"documents has 3 texts.*20"):
        reranker.calibrate(TEXTS[:3])
    with pytest.raises(ValueError, match=r"top_k=20 must be below candidates=20"):
        reranker.calibrate(TEXTS, top_k=20)
    with pytest.raises(ValueError, match=r"documents\[1\]"):
        reranker.calibrate(["a", 1])  # type: ignore[list-item]
    with pytest.raises(ValueError, match=r"there are 0 queries.*sentence"):
        reranker.calibrate(["w1", "w2", "w3"], candidates=2, top_k=1)
    with pytest.raises(ValueError, match=r"queries are given for \['other'\]"):
        reranker.calibrate(TEXTS, {"other": QUESTIONS})
    with pytest.raises(ValueError, match=r"requests=3"):
        reranker.calibrate(TEXTS, QUESTIONS, requests=3)
    with pytest.raises(ValueError, match=r"there are 1 queries"):
        reranker.calibrate(TEXTS, QUESTIONS[:1])


def test_bundled_model_brings_a_lens() -> None:
    found = Reranker.from_pretrained(BUNDLED).lens
    assert found is not None
    assert found.summary.target == 0.98
    assert len(found.summary.gammas) == 12
